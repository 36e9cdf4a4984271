"""The network and LARS.  Run: python -m pytest tests/test_model.py

reference.npz holds inputs and expected values, computed independently in float64.
"""
import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from lars import LARS, warmup_cosine
from model import ContrastiveModel, SmallMapConv2d, embed

REFERENCE = {key: torch.from_numpy(np.asarray(value))
             for key, value in np.load(Path(__file__).with_name("reference.npz")).items()}
close = dict(rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ network
def test_network():
    model = ContrastiveModel()
    encoder, images = model.encoder, torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, 128) and encoder(images).shape == (2, 512)
    assert all(block.bn2.weight.abs().max() == 0 for block in (*encoder.layer1, *encoder.layer4))
    assert [tuple(p.shape) for p in model.head.parameters()] == [(2048, 512), (2048,), (2048,), (128, 2048)]
    small = ContrastiveModel(small_stem=True).encoder
    assert small.maxpool(small.relu(small.bn1(small.conv1(images)))).shape == (2, 64, 32, 32)


@pytest.mark.parametrize("side, words", [
    *((side, {"stride": stride}) for side in ((1, 1), (2, 2), (1, 2), (2, 1)) for stride in (1, 2)),
    ((3, 2), {"stride": 2}), ((5, 5), {}), ((2, 2), {"stride": (2, 1)}), ((2, 2), {"bias": True}),
    ((2, 2), {"padding": 2}), ((2, 2), {"padding": 2, "dilation": 2}), ((2, 2), {"groups": 2}),
    ((1, 1), {"kernel_size": 1, "padding": 0}), ((2, 2), {"padding_mode": "replicate"})])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolution_of_small_maps_is_the_convolution(side, words, layout):
    torch.manual_seed(0)
    words = {"kernel_size": 3, "padding": 1, "bias": False} | words
    plain, quick = (kind(6, 4, **words).to(torch.float64, memory_format=layout)
                    for kind in (torch.nn.Conv2d, SmallMapConv2d))
    quick.load_state_dict(plain.state_dict())
    x = torch.randn(4, 6, *side, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    a, b = plain(x), quick(y)
    torch.testing.assert_close(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(plain.weight.grad, quick.weight.grad)


def test_network_is_torchvisions():
    torch.manual_seed(0)
    model, plain = ContrastiveModel().encoder.eval(), resnet18(weights=None)
    assert sum(isinstance(m, SmallMapConv2d) for m in model.modules()) == 8
    for name, weight in model.named_parameters():
        if name.endswith("bn2.weight"):  # zero, so that the blocks would do nothing
            torch.nn.init.uniform_(weight, 0.5, 1)
    plain.fc = torch.nn.Identity()
    plain.load_state_dict(model.state_dict())
    for side in 32, 64, 80:
        images = torch.randn(2, 3, side, side)
        torch.testing.assert_close(model(images), plain.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_embedding_leaves_no_trace(training):
    torch.manual_seed(0)
    model, pictures, done = ContrastiveModel().train(training), torch.randn(6, 3, 32, 32), []
    model.head[1].eval()  # one module in another mode than the rest
    model(torch.randn(8, 3, 32, 32))
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    u, v = embed(model, lambda index: pictures[index], torch.arange(6), 4, done.append)
    assert u.shape == (6, 128) and not u.requires_grad and done == [0, 4]
    torch.testing.assert_close(u, v)  # the same views both times

    def interrupt(done):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        embed(model, lambda index: pictures[index], torch.arange(6), on_chunk=interrupt)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    torch.testing.assert_close(u, model.eval()(pictures).detach(), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ optimiser
@pytest.mark.parametrize("lr", [0.3, torch.tensor(0.3, dtype=torch.float64), "as on CUDA"])
def test_lars_reference(lr, monkeypatch):
    if lr == "as on CUDA":  # the operations for it, on the CPU
        lr = torch.tensor(0.3, dtype=torch.float64)
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    params = [torch.nn.Parameter(REFERENCE[f"lars_p{i}"].clone()) for i in range(3)]
    optimizer = LARS(params, lr=lr, momentum=0.9, weight_decay=0.01)
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = REFERENCE[f"lars_g{i}"][step].clone()
        optimizer.step()
    for i, p in enumerate(params):
        torch.testing.assert_close(p.data, REFERENCE[f"lars_out{i}"], **close)


def test_lars_without_gradients_zero_norms_and_state():
    zero, unused, bias = (torch.nn.Parameter(x)
                          for x in (torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2)))
    optimizer = LARS([{"params": [bias, zero]}, {"params": [unused], "lr": 7.0}], lr=0.5)
    zero.grad, bias.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step()
    assert (zero == -0.5).all() and (bias == -0.5).all() and (unused == 1).all()  # |w| = 0: scale 1
    copies = [torch.nn.Parameter(p.detach().clone()) for p in (bias, zero, unused)]
    twin = LARS([{"params": copies[:2]}, {"params": copies[2:], "lr": 7.0}], lr=0.5)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, (b, z) in ((optimizer, (bias, zero)), (twin, copies[:2])):
        z.grad, b.grad = torch.full((2, 2), 3.0), torch.zeros(2)
        o.step()
    torch.testing.assert_close(copies[1], zero, rtol=0, atol=0)
    torch.testing.assert_close(bias.data, torch.full((2,), -0.95))  # momentum alone
    with pytest.raises(ValueError, match="momentum is -1"):
        LARS([zero], lr=1, momentum=-1)


def test_schedule_reference():
    peak = 0.075 * math.sqrt(32)
    for epoch, value in zip(REFERENCE["lr_epoch"].tolist(), REFERENCE["lr_value"].tolist()):
        assert warmup_cosine(epoch, 100, 10, peak) == pytest.approx(value, abs=1e-9)
    assert warmup_cosine(0, 10, 0, 1.0) == 1 and warmup_cosine(10, 10, 0, 1.0) == pytest.approx(0)
