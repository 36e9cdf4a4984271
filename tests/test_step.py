"""The training step without a GPU: what it computes, what a CUDA graph would freeze, and what would wait.

    python -m pytest tests/test_step.py
"""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import augment
import train
from model import ContrastiveModel
from samplers import ContrastiveBatchSampler

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


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
        self.calls.append([str(function), *map(plain, (list(args), list((kwargs or {}).values()), result))])
        return result


def make_step(objective: str, device: torch.device, sampler: ContrastiveBatchSampler) -> train.Step:
    words = ["--sampler", "refined", "--batch-size", "4", "--image-size", "8", "--objective", objective,
             "--precision", "bfloat16" if device.type == "cuda" else "float32"]
    return train.Step(train.settle(words), torch.zeros(16, 3, 8, 8, dtype=torch.uint8, device=device), device,
                      sampler.update)


def test_precision_is_that_of_the_network_alone():
    images = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8)
    for name in "bfloat16", "float32":
        words = "--sampler", "random", "--batch-size", "4", "--image-size", "8", "--precision", name
        loss, z1, _ = train.Step(train.settle(words), images, CPU).forward()
        assert z1.dtype == getattr(torch, name) and loss.dtype == torch.float32
    assert train.settle(["--device", "cpu"])["precision"] == "float32"


def test_each_view_is_a_pass_of_its_own():
    """The loss and batch norm's running statistics are those of two passes of B images."""
    step = make_step("simclr", CPU, ContrastiveBatchSampler(16, 4))
    step.images.copy_(torch.randint(256, step.images.shape))
    model, rows, uniform = ContrastiveModel(), torch.randperm(16)[:4], torch.rand(step.uniform.shape)
    model.load_state_dict(step.model.state_dict())
    views = augment.augment(step.images[rows].repeat(2, 1, 1, 1), 8, uniform, (0.5, 1.0), 0.5)
    z1, z2 = model(views[:4].contiguous()), model(views[4:].contiguous())
    z = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(8).roll(4))
    step(rows, uniform, 0.1)
    assert step.read_losses() == [pytest.approx(loss.item(), abs=1e-4)]
    for (name, here), there in zip(step.model.named_buffers(), model.buffers()):
        if "num_batches" in name:  # nobody reads it
            continue
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5, msg=name)


def test_the_step_is_one_graph_to_the_compiler():
    """Each break in it would be kernels that nothing is fused with."""
    step = make_step("sogclr", CPU, ContrastiveBatchSampler(16, 4))
    forward = torch.compile(step.forward, backend="eager", fullgraph=True)
    assert forward()[0].isfinite()


@pytest.mark.parametrize("objective", ["simclr", "sogclr", "hcl", "dcl"])
def test_every_step_asks_for_the_same_operations(objective):
    """Python numbers that differ between two steps would be those of the captured one in every replay."""
    step, calls = make_step(objective, CPU, ContrastiveBatchSampler(16, 4)), []
    for number in range(3):
        step.rows.copy_(torch.randperm(16)[:4])
        step.uniform.copy_(torch.rand(step.uniform.shape))
        step.lr.fill_(0.1 * number)
        with Record() as record:
            step.run()
        calls.append(record.calls)
    assert len(calls[1]) > 300 and calls[1] == calls[2]


@pytest.mark.parametrize("objective", ["sogclr", "hcl"])
def test_a_step_neither_copies_between_devices_nor_reads_back(objective, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)  # fake weights cannot be moved
    augment._ON_DEVICE.clear()
    sampler = ContrastiveBatchSampler(16, 4)
    try:
        with FakeTensorMode():  # reading a value back raises there
            sampler.seen = torch.zeros(16, dtype=torch.bool, device=CUDA)
            sampler.uv = torch.zeros(16, 2, 128, device=CUDA)
            with CUDA:
                step = make_step(objective, CUDA, sampler)
            parameters = list(step.model.parameters())

            def backward(loss):  # autograd would ask the driver for the device
                for p in parameters:
                    p.grad = torch.zeros_like(p)
            monkeypatch.setattr(torch.Tensor, "backward", backward)
            step.run()
            with Record() as record:
                step.run()
            slips = [lambda: step.images[torch.zeros(4, dtype=torch.int64)], lambda: step.lr * torch.ones(()),
                     lambda: step.lr.to("cpu"), lambda: step.lr.copy_(torch.ones(()))]
            for slip in slips:  # what is looked for is seen
                with Record() as seen:
                    slip()
                assert across(seen)
    finally:
        augment._ON_DEVICE.clear()
    assert len(record.calls) > 300 and not across(record)


def across(record: Record) -> list:
    """The operations that take or give a tensor of the CPU."""
    return [call for call in record.calls if "'cpu'" in str(call)]
