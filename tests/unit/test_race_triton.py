"""The GPU's race kernel, run by Triton's interpreter, draws what the reference in tensor operations draws."""

import os
import subprocess
import sys

CASE = """
import torch
from tlt.spec.race import RARE, tensor_race
from tlt.spec.race_triton import triton_race

generator = torch.Generator().manual_seed(0)
num_rare = 0
for columns, rows, scale in ((50, 64, 1.0), (512, 64, 3.0), (3000, 40, 0.3), (3000, 40, 4.0), (5000, 30, 8.0)):
    probs = (torch.randn(rows, columns, generator=generator) * scale).softmax(1)
    probs[0] = 0
    probs[0, 7] = 1  # certain
    seeds = torch.randint(0, 2**62, (rows,), generator=generator)
    positions = torch.randint(0, 10**6, (rows,), generator=generator)
    for stream, names in ((0, None), (3, torch.arange(columns) * 3)):
        expected = tensor_race(probs, seeds.tolist(), positions.tolist(), stream=stream, token_ids=names)
        streams = torch.full((rows,), stream)
        assert torch.equal(triton_race(probs, seeds, positions, streams, token_ids=names), expected), (columns, stream)
        num_rare += int((probs.gather(1, expected[:, None]) < RARE).sum())
assert num_rare > 50, num_rare
broken = torch.full((2, 300), float("nan"))
broken[1] = 1 / 300
one = torch.tensor([1, 2])
assert triton_race(broken, one, one, torch.zeros(2, dtype=torch.int64))[0] == -1
print("agrees")
"""


def test_the_kernel_draws_what_the_reference_draws():
    found = subprocess.run(
        [sys.executable, "-c", CASE], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert found.stdout.endswith("agrees\n"), found.stderr
