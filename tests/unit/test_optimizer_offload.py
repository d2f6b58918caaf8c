"""State that leaves the device and comes back in place; the CPU stands for the device."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from tlt.policy.offload import OptimizerOffload

pytestmark = pytest.mark.megatron


def stepped(master: bool) -> tuple[torch.nn.Linear, SimpleNamespace, list[torch.Tensor]]:
    """(model, Megatron's optimizer in outline, what AdamW keeps of it); master weights are copies, else the model."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    parameters = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()] if master else model.parameters()
    inner = torch.optim.AdamW(parameters, lr=0.1)
    for parameter in inner.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    inner.step()
    kept = [value for state in inner.state.values() for name, value in state.items() if name != "step"]
    return model, SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner)]), kept


@pytest.mark.parametrize("master", [True, False])
def test_state_is_freed_and_comes_back_as_it_was(master):
    model, optimizer, kept = stepped(master)
    inner = optimizer.chained_optimizers[0].optimizer
    parameters = inner.param_groups[0]["params"]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    expected = [tensor.clone() for tensor in (*kept, *(parameter.detach() for parameter in parameters))]
    offload = OptimizerOffload(optimizer, model, torch.device("cpu"))
    for _ in range(2):
        offload.to_host()
        offload.to_host()  # is done already
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in kept)
        assert all((parameter.untyped_storage().nbytes() == 0) is master for parameter in parameters)
        assert all(map(torch.equal, model.parameters(), weights)), "the model itself stays"
        offload.to_device()
        offload.to_device()
        assert all(map(torch.equal, (*kept, *parameters), expected))
    inner.step()
    assert not any(map(torch.equal, parameters, expected[len(kept) :])), "AdamW goes on with it"


@pytest.mark.parametrize("master", [True, False])
def test_state_can_be_read_on_the_host(master):
    model, optimizer, kept = stepped(master)
    inner = optimizer.chained_optimizers[0].optimizer
    tensors = [*kept, *inner.param_groups[0]["params"]]
    expected = [tensor.detach().clone() for tensor in tensors]
    offload = OptimizerOffload(optimizer, model, torch.device("cpu"))
    with offload.readable():
        assert all(map(torch.equal, tensors, expected)), "nothing was moved"
    offload.to_host()
    for error in (None, KeyError):
        with contextlib.suppress(KeyError), offload.readable():
            assert all(map(torch.equal, tensors, expected))
            if error:
                raise error
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in kept)
    offload.to_device()
    assert all(map(torch.equal, tensors, expected))
    inner.step()
    assert not any(map(torch.equal, inner.param_groups[0]["params"], expected[len(kept) :])), "AdamW goes on with it"


def test_host_memory_is_kept_from_one_time_to_the_next():
    model, optimizer, _ = stepped(master=True)
    offload = OptimizerOffload(optimizer, model, torch.device("cpu"))
    addresses = []
    for _ in range(2):
        offload.to_host()
        addresses.append({host.data_ptr() for _, host in offload._moved})
        offload.to_device()
    assert addresses[0] == addresses[1]
