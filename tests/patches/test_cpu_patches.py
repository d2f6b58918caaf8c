"""Every patch: the bug is there unpatched, the patched code does what upstream meant, applying twice does nothing.

Unpatched upstream code runs in a process of its own, since other tests of this session apply the patches.
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import megatron_patches
from megatron_patches.cpu_torch import on_cpu
from megatron_patches.patch import fingerprint

pytestmark = pytest.mark.megatron
NAMES = megatron_patches.CPU_PATCHES + megatron_patches.EVERYWHERE

PROBE = """
import importlib, inspect, json, sys, torch
import megatron_patches
report = {}
for name in megatron_patches.ALL_PATCHES:
    original = megatron_patches.load_patch(name).original()
    source = inspect.getsource(original)
    marks = (
        '"cuda"', "'cuda'", "torch.cuda.", ".cuda()", "cuda rng state", "_lazy_init", "copy_(tensors[key])",
        "RouterGatingLinearFunction",
    )
    report[name] = [mark for mark in marks if mark in source]
try:
    torch.cuda.current_device()
    report["current_device"] = "works"
except Exception as error:
    report["current_device"] = type(error).__name__
try:
    torch.zeros(1, device="cuda")
    report["factory"] = "works"
except Exception as error:
    report["factory"] = type(error).__name__
from megatron.core.transformer.moe import router
try:
    router.router_gating_linear(torch.ones(1, 2), torch.ones(2, 2), None, torch.float32)
    report["router"] = "works"
except Exception as error:
    report["router"] = type(error).__name__
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def unpatched() -> dict:
    root = Path(__file__).parents[2]
    shown = subprocess.run([sys.executable, "-W", "ignore", "-c", PROBE], cwd=root, capture_output=True, text=True,
                           check=True)  # fmt: skip
    return json.loads(shown.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_unpatched_upstream_reaches_for_cuda(unpatched, name):
    assert unpatched["current_device"] != "works"
    assert unpatched["factory"] != "works"
    assert unpatched[name], "nothing of CUDA is left in the original: delete the patch"


@pytest.mark.parametrize("name", NAMES)
def test_applying_twice_does_nothing(name):
    megatron_patches.apply_patches()
    patch = megatron_patches.load_patch(name)
    before = patch.original()
    assert patch.apply() is False
    after = patch.original()
    assert getattr(after, "__func__", after) is getattr(before, "__func__", before)


@pytest.mark.parametrize("name", NAMES)
def test_another_version_or_source_stops(name):
    megatron_patches.apply_patches()
    patch = megatron_patches.load_patch(name)
    with pytest.raises(RuntimeError, match="re-check"):
        replace(patch, name="other", versions=">=99").apply()
    with pytest.raises(RuntimeError, match="source text"):
        replace(patch, name="other", source_sha256=("000000000000",)).apply()


def test_a_router_computes_without_transformer_engine(unpatched):
    if importlib.util.find_spec("transformer_engine") is None:
        assert unpatched["router"] == "NameError"
    megatron_patches.apply_patches()
    from megatron.core.transformer.moe import router

    inputs = torch.randn(3, 1, 4, dtype=torch.bfloat16), torch.randn(2, 4, dtype=torch.bfloat16)
    logits = router.router_gating_linear(*inputs, None, torch.float32)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, inputs[0].float() @ inputs[1].float().T)


def routed(route, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights, chosen experts) [tokens, experts] of the best 8, by Megatron's function."""
    return route(logits, 8, score_function="softmax")


LOGITS = torch.randn(512, 128, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_of_equal_experts_those_of_lower_number_are_chosen():
    patch = megatron_patches.load_patch("moe_topk_ties")
    assert fingerprint(patch.original()) in patch.source_sha256
    patched = patch.make(patch.original())
    (probs, chosen), (_, by_torch) = routed(patched, LOGITS), routed(patch.original(), LOGITS)
    order = np.argsort(-LOGITS.float().numpy(), axis=1, kind="stable")[:, :8]
    expected = torch.zeros_like(chosen).scatter_(1, torch.from_numpy(order), True)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(probs.sum(1).float(), torch.ones(512), rtol=0, atol=0.02)
    assert not torch.equal(by_torch, expected), "torch.topk does the same now: delete the patch"
    leaf = LOGITS.float().requires_grad_()
    routed(patched, leaf)[0].square().sum().backward()
    assert torch.equal(leaf.grad != 0, expected)


def test_on_a_cpu_policy_and_engine_choose_the_same_of_equal_experts():
    from vllm.model_executor.layers.fused_moe.router.cpu_router import _softmax_topk

    found = next(each for each in _softmax_topk(LOGITS, 8, True) if not each.is_floating_point())
    _, chosen = routed(megatron_patches.load_patch("moe_topk_ties").original(), LOGITS)
    assert torch.equal(torch.zeros_like(chosen).scatter_(1, found.long(), True), chosen)


def test_torch_itself_stays_as_it_was():
    zeros, cuda = torch.zeros, torch.Tensor.cuda
    megatron_patches.apply_patches()
    assert torch.zeros is zeros
    assert torch.Tensor.cuda is cuda
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def test_patched_functions_do_what_upstream_meant():
    megatron_patches.apply_patches()
    from megatron.core.optimizer.optimizer import clip_grad_by_total_norm_fp32
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    assert torch.cuda.current_device() == torch.device("cpu")
    with get_cuda_rng_tracker().fork():
        pass
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    clip_grad_by_total_norm_fp32([parameter], 1.0, 5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
    clip_grad_by_total_norm_fp32([parameter], 9.0, 1.0)  # below the limit: untouched
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)


def _names_cuda() -> tuple[torch.Tensor, bool]:
    return torch.zeros(1, device="cuda"), torch.zeros(1).type() == "torch.cuda.FloatTensor"


def test_on_cpu_changes_device_and_type_names_only():
    tensor, is_type = on_cpu(_names_cuda)()
    assert tensor.device.type == "cpu"
    assert is_type
    assert fingerprint(on_cpu(_names_cuda)) == fingerprint(_names_cuda)


def test_the_readme_is_the_table():
    folder = Path(megatron_patches.__file__).parent
    assert (folder / "README.md").read_text() == megatron_patches.readme()
    files = {path.stem for path in folder.glob("*_*.py")} - {"cpu_torch", "__init__"}
    assert files == set(megatron_patches.ALL_PATCHES)
