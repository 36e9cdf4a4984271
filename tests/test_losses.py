"""The losses.  Run: python -m pytest tests/test_losses.py

reference.npz holds inputs and expected values, computed independently in float64.
"""
import math
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

from model import SogCLRLoss, dcl, hcl, infonce, nt_xent
from samplers import all_batches

REFERENCE = {key: torch.from_numpy(np.asarray(value))
             for key, value in np.load(Path(__file__).with_name("reference.npz")).items()}
close = dict(rtol=0, atol=1e-6)


def test_nt_xent_reference_and_closed_forms():
    loss = nt_xent(REFERENCE["ntxent_z1"], REFERENCE["ntxent_z2"], 0.1)
    torch.testing.assert_close(loss, REFERENCE["ntxent_loss"], **close)
    same = torch.ones(5, 3)
    assert nt_xent(same, same).item() == pytest.approx(math.log(9))  # nine equal logits
    axes = torch.eye(4, dtype=torch.float64)  # one logit 1/t against six of 0
    assert nt_xent(7 * axes, axes, 0.5).item() == pytest.approx(math.log(1 + 6 * math.exp(-2)))
    assert dcl(7 * axes, axes, 0.5).item() == pytest.approx(math.log(6) - 2)


def test_infonce_reference_and_closed_forms():
    u, v = REFERENCE["infonce_u"], REFERENCE["infonce_v"]
    torch.testing.assert_close(infonce(u, v), REFERENCE["infonce_full"], **close)
    for size in 2, 3:
        batches = all_batches(len(u), size)
        mean = infonce(u[batches], v[batches]).mean()
        torch.testing.assert_close(mean, REFERENCE[f"infonce_ncb{size}"], **close)
    n = 6  # at the simplex ETF
    etf = torch.linalg.cholesky(torch.eye(n, dtype=torch.float64) * (n / (n - 1) + 1e-12) - 1 / (n - 1))
    expected = 2 * math.log(1 + (n - 1) * math.exp(-n / (n - 1)))
    assert infonce(etf, etf).item() == pytest.approx(expected, abs=1e-6)


def test_sogclr_reference():
    loss = SogCLRLoss(24, temperature=0.1, gamma=0.9).double()
    steps = zip(*(REFERENCE[f"sogclr_{x}"] for x in ("z", "index", "loss", "grad", "u")))
    for z, index, expected, gradient, u in steps:
        z = z.clone().requires_grad_()
        value = loss(z[0], z[1], index)
        value.backward()
        torch.testing.assert_close(value.detach(), expected, **close)
        torch.testing.assert_close(z.grad, gradient, **close)
        torch.testing.assert_close(loss.log_u.exp(), u, rtol=1e-9, atol=1e-6)
    assert "log_u" in loss.state_dict()


def test_sogclr_first_visit_is_per_sample():
    """A batch half new and half seen must treat each sample by its own history."""
    torch.manual_seed(0)
    loss, fresh = SogCLRLoss(6, gamma=0.5).double(), SogCLRLoss(6, gamma=0.5).double()
    z, w = torch.randn(2, 2, 4, 8, dtype=torch.float64)
    loss(z[0], z[1], torch.tensor([0, 1, 2, 3]))
    before = loss.log_u.exp()
    loss(w[0], w[1], torch.tensor([2, 3, 4, 5]))
    fresh(w[0], w[1], torch.tensor([2, 3, 4, 5]))
    after, new = loss.log_u.exp(), fresh.log_u.exp()
    torch.testing.assert_close(after, torch.cat([before[:2], (before[2:4] + new[2:4]) / 2, new[4:]]))


def test_hcl_reference_and_limits():
    z1, z2 = REFERENCE["hcl_z1"], REFERENCE["hcl_z2"]
    torch.testing.assert_close(hcl(z1, z2, 0.1, 0.1, 1.0), REFERENCE["hcl_loss"], **close)
    torch.testing.assert_close(hcl(z1, z2, 0.1, 0.0, 0.0), nt_xent(z1, z2, 0.1))  # no weights, no debiasing
    axes = torch.eye(3, dtype=torch.float64)  # (4 - 0.5*4*e) / 0.5 < 0, so the floor 4/e holds
    assert hcl(axes, axes, 1.0, 0.5, 1.0).item() == pytest.approx(math.log1p(4 * math.exp(-1) / math.e))


def by_definition(name: str, z1: torch.Tensor, z2: torch.Tensor, t: float) -> float:
    """The loss as its docstring has it, term by term in decimals, which neither overflow nor round to 0."""
    b, mean = len(z1), lambda x: sum(x) / len(x)
    z = torch.nn.functional.normalize(torch.cat([z1, z2]).double(), dim=1)
    s = [[Decimal(x) for x in row] for row in (z @ z.T).tolist()]
    e = [[(x / Decimal(t)).exp() for x in row] for row in s]
    values, first = [], []
    for i in range(2 * b):
        p = (i + b) % (2 * b)
        others = [j for j in range(2 * b) if j not in (i, p)]
        if name == "hcl":
            r = sum(e[i][j] ** 2 for j in others) / mean([e[i][j] for j in others])
            floor = len(others) * (-1 / Decimal(t)).exp()
            negative = max((r - Decimal(0.1) * len(others) * e[i][p]) / (1 - Decimal(0.1)), floor)
            values.append((1 + negative / e[i][p]).ln())
        elif name == "sogclr":  # of a second visit: u is 0.1 of both views, 0.9 its own
            first.append(mean([e[i][j] for j in others]))
        elif name == "infonce":
            side = range(b, 2 * b) if i < b else range(b)
            values.append(2 * ((sum(e[i][j] for j in side)).ln() - s[i][p] / Decimal(t)))
        else:
            total = sum(e[i][j] for j in others) + (e[i][p] if name == "nt_xent" else 0)
            values.append((total / e[i][p]).ln())
    for i, g in enumerate(first):
        p = (i + b) % (2 * b)
        u = Decimal(0.1) * (g + first[p]) / 2 + Decimal(0.9) * g
        weighted = mean([e[i][j] / u * s[i][j] for j in range(2 * b) if j not in (i, p)])
        values.append(2 * (weighted - s[i][p]))
    return float(mean(values))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["nt_xent", "dcl", "hcl", "sogclr", "infonce"])
@pytest.mark.parametrize("temperature", [0.001, 0.01, 0.1])
def test_losses_at_low_temperatures(name, temperature, autocast):
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(6, 16, generator=generator)
    z2 = z1 + 3 * torch.randn(6, 16, generator=generator)  # far enough for the gradients not to vanish
    if name == "infonce":  # of inner products as they are
        z1, z2 = (torch.nn.functional.normalize(z, dim=1) for z in (z1, z2))

    def loss(a, b):
        sogclr, rows = SogCLRLoss(6, temperature), torch.arange(6)
        if name == "sogclr":
            sogclr(a.detach(), b.detach(), rows)
        functions = {"nt_xent": nt_xent, "dcl": dcl, "hcl": hcl, "infonce": infonce}
        return sogclr(a, b, rows) if name == "sogclr" else functions[name](a, b, temperature=temperature)

    exact = [z.double().requires_grad_() for z in (z1, z2)]
    single = [z.clone().requires_grad_() for z in (z1, z2)]
    loss(*exact).backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(*single)
    value.backward()
    expected = by_definition(name, z1, z2, temperature)
    assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-6 / temperature)
    for a, b in zip(single, exact):
        torch.testing.assert_close(a.grad, b.grad.float(), rtol=1e-3, atol=1e-6 / temperature)
    assert all(a.grad.abs().max() > 0.01 for a in single)


def test_gradient_of_dcl_is_that_of_its_formula():
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.randn(5, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in "ab")
    z = torch.cat([z1, z2])
    s = (z / z.norm(dim=1, keepdim=True)) @ (z / z.norm(dim=1, keepdim=True)).T / 0.2
    terms = [sum(s[i, j].exp() for j in range(10) if j % 5 != i % 5).log() - s[i, (i + 5) % 10]
             for i in range(10)]
    expected = torch.autograd.grad(sum(terms) / 10, (z1, z2))
    for a, b in zip(torch.autograd.grad(dcl(z1, z2, 0.2), (z1, z2)), expected):
        torch.testing.assert_close(a, b)
        assert a.abs().max() > 0.01


@pytest.mark.parametrize("scale, dtype", [*((x, torch.float32) for x in (1e19, 1e30, 1e-13, 1e-30)),
                                          (1e200, torch.float64), (1e-200, torch.float64)])
@pytest.mark.parametrize("loss", [nt_xent, dcl, hcl, lambda a, b: SogCLRLoss(9)(a, b, torch.arange(len(a)))])
def test_losses_of_rows_of_any_length(loss, scale, dtype):
    x = torch.randn(2, 6, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 0  # as zeros, whose gradient the scale leaves as it is
    one, other = x.clone().requires_grad_(), (x * scale).requires_grad_()
    values = [loss(*z) for z in (one, other)]
    torch.testing.assert_close(*values)
    for value in values:
        value.backward()
    torch.testing.assert_close(one.grad[:, 1:], other.grad[:, 1:] * scale, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one.grad[0, 0], other.grad[0, 0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", [nt_xent, dcl, hcl, lambda a, b: SogCLRLoss(9)(a, b, torch.arange(len(a)))])
def test_losses_refuse_wrong_shapes(loss):
    for a, b in ((3, 2), (4, 2)), ((1, 2), (1, 2)), ((3,), (3,)):
        with pytest.raises(ValueError, match="B, D"):
            loss(torch.ones(a), torch.ones(b))
    with pytest.raises(ValueError, match="tau_plus is 1"):
        hcl(torch.ones(3, 2), torch.ones(3, 2), tau_plus=1)
