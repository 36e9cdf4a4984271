"""The training step without a GPU: what a CUDA graph would freeze, and what would wait.  Run: pytest
tests/test_step.py"""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import augment
import train
from samplers import ContrastiveBatchSampler

OBJECTIVES = ["simclr", "sogclr", "hcl", "dcl"]


class Record(TorchDispatchMode):
    """What a step asks of PyTorch: operations, shapes, devices and Python numbers."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def plain(x):
            if isinstance(x, torch.Tensor):
                return tuple(x.shape), x.dtype, x.device.type
            return [plain(y) for y in x] if isinstance(x, (list, tuple)) else str(x)
        result = function(*args, **(kwargs or {}))
        self.calls.append((str(function), plain(list(args)), plain(list((kwargs or {}).values())), plain(result)))
        return result


def make_step(objective: str, device: torch.device, sampler: ContrastiveBatchSampler) -> train.Step:
    knobs = train.settle(["--objective", objective, "--sampler", "refined", "--batch-size", "4"])
    images = torch.zeros(16, 3, 32, 32, dtype=torch.uint8, device=device)
    return train.Step(knobs, images, device, sampler.update)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_step_asks_for_the_same_operations(objective):
    """Python numbers that differ between two steps would be those of the captured one in every replay."""
    torch.manual_seed(0)
    step = make_step(objective, torch.device("cpu"), ContrastiveBatchSampler(16, 4))
    calls = []
    for number in range(4):
        step.rows.copy_(torch.randperm(16)[:4])
        step.uniform.copy_(torch.rand(step.uniform.shape))
        step.lr.fill_(0.1 * number)
        with Record() as record:
            step.run()
        calls.append(record.calls)
    assert len(calls[2]) > 300
    assert calls[2] == calls[3]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_neither_copies_between_devices_nor_reads_back(objective, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **kwargs: self)  # fake weights cannot be moved
    augment._constants.cache_clear()
    sampler = ContrastiveBatchSampler(16, 4)
    try:
        with FakeTensorMode():  # reading a value back raises there
            sampler.seen = torch.zeros(16, dtype=torch.bool, device="cuda")
            sampler.uv = torch.zeros(16, 2, 128, device="cuda")
            with torch.device("cuda"):
                step = make_step(objective, torch.device("cuda"), sampler)
            parameters = list(step.model.parameters())

            def backward(loss):  # autograd would ask the driver for the device
                for p in parameters:
                    p.grad = torch.zeros_like(p)
            monkeypatch.setattr(torch.Tensor, "backward", backward)
            step.run()
            with Record() as record:
                step.run()
    finally:
        augment._constants.cache_clear()
    across = [call for call in record.calls if "_to_copy" in call[0] and "cpu" in str(call[1:3])
              or "copy_" in call[0] and "'cpu'" in str(call[1])]
    assert len(record.calls) > 300 and not across
