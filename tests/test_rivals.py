"""Tests of rivals.py: what every method promises, planted groups, brute force, other formulations, bad input.

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


def tight(k: int, size: int, seed: int = 0) -> tuple:
    """k groups of `size` all but identical pairs, far from other groups, shuffled; and the rows' groups."""
    g = seeded(seed)
    label = torch.arange(k).repeat_interleave(size)[torch.randperm(k * size, generator=g)]
    x = torch.linalg.qr(torch.randn(k, k, generator=g))[0][label]
    return *(x + 0.02 * torch.randn(x.shape, generator=g) for _ in range(2)), label


def pure(label, batches) -> bool:
    return bool((label[batches] == label[batches][:, :1]).all())


# ---------------------------------------------------------------------------- what all of them promise

@pytest.mark.parametrize("kind", ["distinct", "identical", "duplicates", "zeros"])
@pytest.mark.parametrize("n, B", [(2, 2), (4, 2), (4, 4), (11, 3), (33, 2), (64, 32), (100, 32), (120, 48)])
def test_partitions(n, B, kind):
    u, v = views(n, 8, dtype=torch.float32)
    if kind != "distinct":
        rows = torch.arange(n) % (1 if kind == "identical" else 2)
        u, v = u[rows] * (kind != "zeros"), v[rows] * (kind != "zeros")
    for name, rival in RIVALS.items():
        b = rival(u, v, B, seeded())
        assert b.shape == (n // B, B) and b.dtype == torch.int64, name
        assert torch.equal(b.flatten().sort()[0], torch.arange(n // B * B)), name


@pytest.mark.parametrize("name", [name for name in RIVALS if name != "gcbs"])
def test_generator_decides(name):
    u, v = views(96, dtype=torch.float32)
    first = RIVALS[name](u, v, 8, seeded(1))
    assert torch.equal(first, RIVALS[name](u, v, 8, seeded(1)))
    assert not torch.equal(first, RIVALS[name](u, v, 8, seeded(2)))
    torch.manual_seed(3)
    a = RIVALS[name](u, v, 8)
    torch.manual_seed(3)
    assert torch.equal(a, RIVALS[name](u, v, 8))


@pytest.mark.parametrize("name", RIVALS)
def test_scale_and_gradient_do_not_matter(name):
    u, v = views(60, dtype=torch.float32)
    row = 2.0 ** torch.arange(60).fmod(7)[:, None]  # powers of two: bit for bit
    scaled = RIVALS[name]((u * row).requires_grad_(), v / 4 / row, 8, seeded())
    assert torch.equal(scaled, RIVALS[name](u, v, 8, seeded()))


@pytest.mark.parametrize("name", RIVALS)
def test_tight_groups_become_batches(name):
    u, v, label = tight(12, 8)
    b = RIVALS[name](u, v, 8, seeded())
    excess = batch_losses(u, v, b).mean() - batch_losses(u, v, random_batches(96, 8, seeded())).mean()
    assert pure(label, b) and excess > 1.8


# ---------------------------------------------------------------------------- GCBS

def spied(monkeypatch, name: str) -> list:
    """(arguments, result) of each call of rivals.name from now on."""
    calls, inner = [], getattr(rivals, name)

    def spy(*words, **named):
        calls.append((words, inner(*words, **named)))
        return calls[-1][1]
    monkeypatch.setattr(rivals, name, spy)
    return calls


def order_and_graph(monkeypatch, u, v, batch_size, **quantile) -> tuple:
    calls = spied(monkeypatch, "reverse_cuthill_mckee")
    return gcbs(u, v, batch_size, **quantile).flatten(), calls[0][0][0]


@pytest.mark.parametrize("n, quantile", [(200, 0.9), (200, 0.999), (3000, 0.99)])  # of 3,000 it is estimated
def test_gcbs_graph(monkeypatch, n, quantile):
    u, v = views(n, 8, dtype=torch.float32)
    _, graph = order_and_graph(monkeypatch, u, v, 10, quantile=quantile)
    s = F.normalize(u, dim=1) @ F.normalize(v, dim=1).T
    edge = s > np.quantile(s.numpy(), quantile)
    edge = (edge | edge.T).fill_diagonal_(False).numpy()
    wrong = (graph.toarray() > 0) ^ edge
    assert edge.sum() > 0 and wrong.sum() <= (0 if n == 200 else 0.05 * edge.sum())


def test_gcbs_default_keeps_a_batch_of_edges_a_row(monkeypatch):
    u, v, label = tight(15, 8)
    order, graph = order_and_graph(monkeypatch, u, v, 8)
    i, j = graph.nonzero()
    assert (label[i] == label[j]).all() and len(i) >= 0.99 * 15 * 8 * 7
    place = order.argsort().numpy()
    assert np.abs(place[i] - place[j]).max() == 7  # the blocks are recovered


def test_gcbs_reduces_the_bandwidth(monkeypatch):
    place = torch.randperm(240, generator=seeded())  # points on an arc, shuffled: the ends do not meet
    angle = place * math.pi / 300
    u = torch.stack([angle.cos(), angle.sin()], 1)
    order, graph = order_and_graph(monkeypatch, u, u, 12, quantile=0.95)
    i, j = graph.nonzero()
    best, found = (np.abs(at[i] - at[j]).max() for at in (place.numpy(), order.argsort().numpy()))
    assert best < 10 and found <= 2 * best
    batches = place[order].view(-1, 12)
    assert (batches.max(1)[0] - batches.min(1)[0]).max() < 12 + best


# ---------------------------------------------------------------------------- the released spectral method

def test_released_spectral_step_by_step(monkeypatch):
    u, v, _ = clustered(20, 8, 1.2)
    calls = spied(monkeypatch, "_kmeans")
    b = released_spectral(u, v, 8, 20, 0.2, seeded())
    x, centres = calls[0][0][0].numpy(), calls[0][1].numpy()
    # Divided by D^1/2 they are the eigenvectors of A y = lambda D y with y D y = 1, up to a rotation.
    w = spectral_affinity(u.double(), v.double(), 8, 0.2).numpy()
    a = np.exp(w)
    np.fill_diagonal(a, 0)
    y = scipy.linalg.eigh(a, np.diag(a.sum(1)))[1][:, -20:]
    gram = y @ y.T * np.exp(w.max())  # the common factor that was left out of A and so of D
    np.testing.assert_allclose(x @ x.T, gram, rtol=1e-6, atol=1e-9 * np.abs(gram).max())
    distance = np.sqrt(((x[:, None] - centres) ** 2).sum(2))
    rows, slots = linear_sum_assignment(np.repeat(distance, 8, 1))
    best = distance[rows, slots // 8].sum()
    assert sum(distance[batch, c].sum() for c, batch in enumerate(b.numpy())) == pytest.approx(best, rel=1e-9)


def test_released_spectral_window_by_window():
    u, v, _ = clustered(12, 40, 0.8)
    b = released_spectral(u, v, 16, 8, generator=seeded())
    for w in range(4):  # 480 rows in windows of 128
        rows = torch.arange(128 * w, min(128 * w + 128, 480))
        assert torch.equal(b[8 * w:8 * w + 8].flatten().sort()[0], rows)


def test_released_spectral_where_exp_overflows():
    u, v, label = tight(6, 8)
    assert spectral_affinity(u, -v, 8, 0.005).max() > 710
    assert pure(label[:48], released_spectral(u, v, 8, 6, 0.02, seeded()))
    b = released_spectral(u, -v, 8, 6, 0.005, seeded())
    assert torch.equal(b.flatten().sort()[0], torch.arange(48))


# ---------------------------------------------------------------------------- B3

def test_b3_edges(monkeypatch):
    u, v = views(40, 4, noise=1.0)
    given = []
    monkeypatch.setattr(rivals, "_partition", lambda row, col, n, size, g: (
        given.append((row, col)), torch.arange(n).view(-1, size))[1])
    b = b3(u, v, 8, 4, (3, 9), seeded())
    s = F.normalize(u, dim=1) @ F.normalize(v, dim=1).T
    ranked = [sorted(set(range(40)) - {i}, key=lambda j: -s[i, j])[3:9] for i in range(40)]
    expected = {(i, j) for i in range(40) for j in ranked[i] if i in ranked[j]}
    assert set(zip(*(x.tolist() for x in given[0]))) == expected and len(given[0][0]) == len(expected) > 20
    assert (b.view(10, 4) % 4 == torch.arange(4)).all()  # batches are unions of communities
    assert not torch.equal(b.flatten(), torch.arange(40)) and b.unique().numel() == 40  # in a random order


def test_b3_leaves_out_the_nearest():
    # Tight groups of 8, two and two close: ranks 0 to 6 are the own group, 7 to 14 the close one.
    group = torch.arange(16).repeat_interleave(8)[torch.randperm(128, generator=seeded())]
    close = group // 2
    x = torch.cat([F.one_hot(group, 16), F.one_hot(close, 8)], 1)
    u, v = x + 0.02 * torch.randn(2, *x.shape, generator=seeded(1))
    own, skipped = (b3(u, v, 8, ranks=ranks, generator=seeded()) for ranks in ((0, 7), (7, 15)))
    assert pure(group, own) and pure(close, skipped)
    share = (group[skipped] % 2).float().mean(1)
    assert ((share - 0.5).abs() < 0.3).all()  # a batch of one group alone would have none of the edges inside
    random = random_batches(128, 8, seeded())
    losses = [batch_losses(u, v, b).mean().item() for b in (random, skipped, own)]
    assert losses[0] + 0.5 < losses[1] < losses[2] - 0.2, losses


def test_partition_of_points_in_a_square():
    x, y = torch.rand(2, 4096, generator=seeded())
    near = (x[:, None] - x).square() + (y[:, None] - y).square() < 0.001
    row, col = near.fill_diagonal_(False).nonzero(as_tuple=True)
    part = torch.empty(4096, dtype=torch.int64)
    part[rivals._partition(row, col, 4096, 16, seeded())] = torch.arange(256)[:, None]
    # To beat: sixteen columns of 256 points, each cut into sixteen cells of 16.
    column = x.argsort().argsort() // 256
    cell = (2 * column + y).argsort().argsort() // 16
    assert (part[row] == part[col]).float().mean() > 1.04 * (cell[row] == cell[col]).float().mean()


# ---------------------------------------------------------------------------- k-means

def means(x, centres):
    member = torch.cdist(x, centres).argmin(1)
    return torch.stack([x[member == c].mean(0) for c in range(len(centres))])


def test_kmeans():
    x, _, label = clustered(5, 30, 0.1)
    planted = torch.stack([x[label == c].mean(0) for c in range(5)])
    centres = rivals._kmeans(x, 5, seeded(1))
    torch.testing.assert_close(centres[torch.cdist(planted, centres).argmin(1)], planted)
    x, _, _ = clustered(5, 60, 1.5)
    centres = rivals._kmeans(x, 8, seeded(1))
    torch.testing.assert_close(means(x, centres), centres)  # Lloyd's fixed point, which a start is not
    assert (means(x, rivals._kmeans(x, 8, seeded(1), rounds=0)) - centres).abs().max() > 0.1
    assert (rivals._kmeans(x[:1].repeat(9, 1), 4, seeded()) - x[0]).abs().max() < 1e-5  # without rows too


# ---------------------------------------------------------------------------- bad input

U, V = views(20)
NAN = U.clone()
NAN[3, 1], NAN[5, 1] = math.nan, math.inf


@pytest.mark.parametrize("name", RIVALS)
def test_bad_input_is_refused(name):
    call = RIVALS[name]
    call(U, V, 4)
    refused(lambda: call(U, V[:19], 4), "(20, 16)", "(19, 16)", "one shape")
    refused(lambda: call(U.long(), V, 4), "int64", "floating-point")
    refused(lambda: call(NAN, V, 4), "u has 2 of 20 rows", "NaN")
    refused(lambda: call(U, NAN, 4), "v has 2 of 20 rows", "NaN")
    for B in (-1, 1, 21):
        refused(lambda: call(U, V, B), f"batch_size is {B} with 20 samples", "from 2 to 20")


def test_bad_parameters_are_refused():
    for q in (-0.1, 1, math.nan):
        refused(lambda: gcbs(U, V, 4, q), f"quantile is {q}", "from 0 to below 1")
    for k in (0, 6):
        refused(lambda: released_spectral(U, V, 4, k), f"k is {k} with 20 samples", "from 1 to 5")
    refused(lambda: released_spectral(U, V, 4, 5, 0), "temperature is 0", "> 0")
    for size in (-2, 0, 3, 8):
        refused(lambda: b3(U, V, 4, size), f"cluster_size is {size} with a batch_size of 4", "divisor of 4")
    for ranks in ((-1, 3), (3, 3), (19, 30)):
        refused(lambda: b3(U, V, 4, ranks=ranks), f"ranks is {ranks} with 20 samples", "low < high")
