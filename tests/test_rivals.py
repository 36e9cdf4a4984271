"""Tests of rivals.py: what every method promises, planted groups, brute force, other formulations, bad input:
python -m pytest tests/test_rivals.py
"""
import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

import rivals
from rivals import b3, gcbs, released_spectral
from samplers import batch_losses, random_batches, spectral_affinity
from test_samplers import clustered, refused, seeded, views

RIVALS = {
    "gcbs": lambda u, v, B, g=None: gcbs(u, v, B),
    "released_spectral": lambda u, v, B, g=None: released_spectral(u, v, B, max(1, len(u) // B), generator=g),
    "b3": lambda u, v, B, g=None: b3(u, v, B, generator=g),
}


def spied(monkeypatch, name: str) -> list:
    """(arguments, result) of each call of rivals.name from now on."""
    calls, inner = [], getattr(rivals, name)
    monkeypatch.setattr(rivals, name, lambda *x, **y: calls.append((x, inner(*x, **y))) or calls[-1][1])
    return calls


@pytest.mark.parametrize("kind", ["distinct", "identical", "zeros"])
@pytest.mark.parametrize("n, B", [(2, 2), (11, 3), (33, 2), (64, 32), (100, 32), (120, 48)])
def test_partitions(n, B, kind):
    u, v = views(n, 8, dtype=torch.float32)
    if kind != "distinct":
        u, v = (x[:1].expand(n, 8) * (kind != "zeros") for x in (u, v))
    for name, rival in RIVALS.items():
        b = rival(u, v, B, seeded())
        assert b.shape == (n // B, B) and b.dtype == torch.int64, name
        assert torch.equal(b.flatten().sort()[0], torch.arange(n // B * B)), name


@pytest.mark.parametrize("name", RIVALS)
def test_generator_decides_and_scale_does_not(name):
    u, v = views(96, dtype=torch.float32)
    first = RIVALS[name](u, v, 8, seeded(1))
    row = 2.0 ** (30 * torch.arange(96).fmod(7)[:, None] - 90)  # powers of two: bit for bit
    assert torch.equal(first, RIVALS[name]((u * row).requires_grad_(), v / 4 / row, 8, seeded(1)))
    assert torch.equal(first, RIVALS[name](u, v, 8, seeded(2))) == (name == "gcbs")
    torch.manual_seed(1)
    assert torch.equal(first, RIVALS[name](u, v, 8))


@pytest.mark.parametrize("name", RIVALS)
def test_tight_groups_become_batches(name):
    label = torch.arange(96)[torch.randperm(96, generator=seeded())] // 8  # far from each other
    u, v = torch.eye(12)[label] + 0.02 * torch.randn(2, 96, 12, generator=seeded())
    b = RIVALS[name](u, v, 8, seeded())
    excess = batch_losses(u, v, b).mean() - batch_losses(u, v, random_batches(96, 8, seeded())).mean()
    assert (label[b] == label[b][:, :1]).all() and excess > 1.8


@pytest.mark.parametrize("name", RIVALS)
def test_bad_input_is_refused(name):
    (u, v), call = views(20), RIVALS[name]
    bad = v.clone()
    bad[3, 1], bad[5, 1] = math.nan, math.inf
    refused(lambda: call(u, v[:19], 20), "(20, 16)", "(19, 16)", "one shape")
    refused(lambda: call(u, bad, 4), "v has 2 of 20 rows", "NaN")
    for B in (1, 21):
        refused(lambda: call(u, v, B), f"batch_size is {B} with 20 samples", "from 2 to 20")


@pytest.mark.parametrize("n, quantile", [(200, 0.9), (3000, 0.99)])  # of 3,000 it is estimated
def test_gcbs_graph(monkeypatch, n, quantile):
    u, v = views(n, 8, dtype=torch.float32)
    calls = spied(monkeypatch, "reverse_cuthill_mckee")
    gcbs(u, v, 10, quantile)
    s = F.normalize(u, dim=1) @ F.normalize(v, dim=1).T
    edge = s > np.quantile(s.numpy(), quantile)
    wrong = (calls[0][0][0].toarray() > 0) ^ (edge | edge.T).fill_diagonal_(False).numpy()
    assert edge.sum() > n and wrong.sum() <= (0 if n == 200 else 0.05 * edge.sum())


def test_released_spectral_step_by_step(monkeypatch):
    u, v, _ = clustered(20, 8, 1.2)
    calls = spied(monkeypatch, "_kmeans")
    b = released_spectral(u, v, 8, 20, 0.2, seeded())
    x, centres = calls[0][0][0].numpy(), calls[0][1].numpy()
    # Divided by D^1/2 they are the eigenvectors of A y = lambda D y with y D y = 1, up to a rotation.
    w = spectral_affinity(u.double(), v.double(), 8, 0.2).numpy()
    a = np.exp(w) * (1 - np.eye(160))
    y = scipy.linalg.eigh(a, np.diag(a.sum(1)))[1][:, -20:]
    gram = y @ y.T * np.exp(w.max())  # the common factor that was left out of A and so of D
    np.testing.assert_allclose(x @ x.T, gram, rtol=1e-6, atol=1e-9 * np.abs(gram).max())
    cost = np.repeat(np.sqrt(((x[:, None] - centres) ** 2).sum(2)), 8, 1)
    best = cost[linear_sum_assignment(cost)].sum()
    assert cost[b.flatten(), range(160)].sum() == pytest.approx(best, rel=1e-9)


def test_released_spectral_window_by_window_where_exp_overflows():
    u, v, _ = clustered(12, 40, 0.1)
    assert spectral_affinity(u, -v, 16, 0.005).max() > 710
    b = released_spectral(u, -v, 16, 8, 0.005, seeded())
    for w in range(4):  # 480 rows in windows of 128
        rows = torch.arange(128 * w, min(128 * w + 128, 480))
        assert torch.equal(b[8 * w:8 * w + 8].flatten().sort()[0], rows)


def test_kmeans():
    for k, noise in (5, 0.1), (8, 1.5):
        x, _, label = clustered(5, 60, noise)
        centres = rivals._kmeans(x, k, seeded(1))
        member = torch.cdist(x, centres).argmin(1)
        torch.testing.assert_close(torch.stack([x[member == c].mean(0) for c in range(k)]), centres)
        if k == 5:  # as planted
            assert len({*zip(member.tolist(), label.tolist())}) == 5
    assert (rivals._kmeans(x[:1].repeat(9, 1), 4, seeded()) - x[0]).abs().max() < 1e-5  # without rows too


def test_b3(monkeypatch):
    u, v = views(192, 4, noise=1.0)
    given = []
    monkeypatch.setattr(rivals, "_partition", lambda row, col, n, size, g: (
        given.extend(zip(row.tolist(), col.tolist())), torch.arange(n).view(-1, size))[1])
    b = b3(u, v, 64, (3, 9), seeded())
    s = F.normalize(u, dim=1) @ F.normalize(v, dim=1).T
    ranked = [sorted({*range(192)} - {i}, key=lambda j: -s[i, j])[3:9] for i in range(192)]
    expected = {(i, j) for i in range(192) for j in ranked[i] if i in ranked[j]}
    assert set(given) == expected and len(given) == len(expected) > 100
    assert (b.view(6, 32) % 32 == torch.arange(32)).all()  # batches are unions of communities
    assert not torch.equal(b[:, 32], b[:, 0] + 32)  # of random ones


def test_partition_of_points_in_a_square():
    x, y = torch.rand(2, 4096, generator=seeded())
    near = (x[:, None] - x).square() + (y[:, None] - y).square() < 0.001
    row, col = near.fill_diagonal_(False).nonzero(as_tuple=True)
    part = torch.empty(4096, dtype=torch.int64)
    part[rivals._partition(row, col, 4096, 16, seeded())] = torch.arange(256)[:, None]
    column = x.argsort().argsort() // 256  # to beat: columns, each cut in cells
    cell = (2 * column + y).argsort().argsort() // 16
    assert (part[row] == part[col]).float().mean() > 1.04 * (cell[row] == cell[col]).float().mean()
