"""Tests of samplers.py: reference values, closed forms, brute force, properties, bad input.

    python -m pytest test_samplers.py

tests/reference.npz holds inputs and values computed in float64 by an independent implementation.
"""
import functools
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from samplers import (LOSSES, _assign, all_batches, batch_losses, osgd_batches, osgd_batches_with_replacement,
                      random_batches, random_batches_with_replacement, refine_by_weight, select_by_loss,
                      spectral_affinity, spectral_batches)

REFERENCE = np.load(Path(__file__).parent / "tests" / "reference.npz")
REF = {key: torch.from_numpy(REFERENCE[key]) for key in REFERENCE if key.startswith(("ntx", "aff", "osgd"))}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def views(n: int, d: int = 16, seed: int = 0, noise: float = 0.5, dtype=torch.float64) -> tuple:
    u, e = torch.randn(2, n, d, generator=seeded(seed), dtype=dtype)
    return u, u + noise * e


def clustered(k: int, size: int, noise: float, seed: int = 0, d: int = 32) -> tuple:
    """Two views of k clusters of `size` rows each around random centres, shuffled, and the rows' clusters."""
    g = seeded(seed)
    label = torch.arange(k).repeat_interleave(size)[torch.randperm(k * size, generator=g)]
    x = torch.randn(k, d, generator=g)[label]
    return *(x + noise * torch.randn(x.shape, generator=g) for _ in range(2)), label


def by_loops(u, v, temperature: float, loss: str = "nt_xent") -> float:
    z, B, total = [x / x.norm() for x in (*u, *v)], len(u), 0.0
    for i in range(2 * B):
        partner = (i + B) % (2 * B)
        below = {"nt_xent": set(range(2 * B)) - {i}, "dcl": set(range(2 * B)) - {i, partner},
                 "infonce": set(range(B, 2 * B) if i < B else range(B))}[loss]
        logit = [float(z[i] @ z[j]) / temperature for j in range(2 * B)]
        total += math.log(sum(math.exp(logit[j]) for j in below)) - logit[partner]
    return total / (B if loss == "infonce" else 2 * B)


def is_partition(batches, n: int) -> bool:
    return batches.dtype == torch.int64 and torch.equal(batches.flatten().sort()[0], torch.arange(n))


# ---------------------------------------------------------------------------- losses
def test_reference_values():
    loss = batch_losses(REF["ntxent_z1"], REF["ntxent_z2"], torch.arange(8)[None], 0.1)
    assert loss.dtype == torch.float64 and abs(loss.item() - REFERENCE["ntxent_loss"]) < 1e-12
    # 99 rows are 12 batches of 8 and a rest; of each 6 the hardest two, the hardest last.
    k, q = REF["osgd_k_q"].tolist()
    assert torch.equal(osgd_batches(REF["osgd_u"], REF["osgd_v"], 8, k, q), REF["osgd_batches"])
    w = spectral_affinity(REF["affinity_u"], REF["affinity_v"], batch_size=8, temperature=0.1)
    expected = REF["affinity_w"].clone().fill_diagonal_(0)  # there the diagonal was not emptied
    assert w.dtype == torch.float64 and (w - expected).abs().max() < 1e-9


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("temperature", [0.1, 0.02, 2.0])
def test_batch_losses_against_loops(temperature, loss):
    u, v = views(20, 6)
    batches = torch.tensor([[3, 1, 19], [0, 5, 7], [7, 5, 0]])
    expected = torch.tensor([by_loops(u[b], v[b], temperature, loss) for b in batches], dtype=torch.float64)
    for x, tolerance in ((7 * u, 1e-9), (u.float(), 1e-4)):
        losses = batch_losses(x, v.to(x.dtype), batches, temperature, loss)
        torch.testing.assert_close(losses, expected.to(x.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [0.1, 0.01, 1e-3])
def test_batch_losses_closed_forms(temperature):
    pair, same = torch.tensor([[0, 1]]), torch.ones(6, 3)
    loss = batch_losses(same, same, torch.arange(6)[None], temperature)
    assert loss.item() == pytest.approx(math.log(11), rel=1e-4)
    # Four views at the corners of a tetrahedron: all logits alike, however far below 1/temperature.
    z = torch.tensor([[1., 1., 1.], [1., -1., -1.], [-1., 1., -1.], [-1., -1., 1.]])
    assert batch_losses(z[:2], z[2:], pair, temperature).item() == pytest.approx(math.log(3), rel=1e-3)
    # Two antipodal pairs: the partner at cosine 1, the two others at -1.
    u = torch.tensor([[1., 2.], [-1., -2.]], dtype=torch.float64)
    small = math.log1p(2 * math.exp(-2 / temperature))
    assert batch_losses(u, u, pair, temperature).item() == pytest.approx(small, rel=1e-6, abs=1e-11)
    # Partners opposed: the partner at -1, the others at 1 and -1.
    assert batch_losses(u, -u, pair, temperature).item() == pytest.approx(2 / temperature + small, rel=1e-9)


def test_batch_losses_in_chunks_equal_those_one_by_one():
    u, v = views(4000, 128, dtype=torch.float32)  # 125 batches of 32, several chunks
    batches = random_batches(4000, 32, seeded())
    one_by_one = torch.cat([batch_losses(u, v, b[None]) for b in batches])
    torch.testing.assert_close(batch_losses(u, v, batches), one_by_one)


def test_batch_losses_gradients():
    u, v = (x.requires_grad_() for x in views(8, 5))
    batches = torch.tensor([[0, 1, 2], [2, 6, 7]])
    assert torch.autograd.gradcheck(lambda u, v: batch_losses(u, v, batches, 0.3), (u, v))
    gradient = torch.autograd.grad(batch_losses(u, v, batches, 0.3).sum(), u)[0]
    assert (gradient[[3, 4, 5]] == 0).all() and (gradient[[0, 1, 2, 6, 7]].norm(dim=1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    u, v = (x.to(dtype) for x in views(64))
    batches = random_batches(64, 8, seeded())
    expected = batch_losses(u.float(), v.float(), batches)
    assert torch.equal(batch_losses(u, v, batches), expected) and expected.dtype == torch.float32
    w = spectral_affinity(u.float(), v.float(), 8)
    assert torch.equal(spectral_affinity(u, v, 8), w) and w.dtype == torch.float32
    chosen = spectral_batches(u.float(), v.float(), 8, 8, generator=seeded(), refine=True)
    assert torch.equal(spectral_batches(u, v, 8, 8, generator=seeded(), refine=True), chosen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(batch_losses(u.float(), v.float(), batches), expected)
        assert torch.equal(spectral_affinity(u.float(), v.float(), 8), w)


@pytest.mark.parametrize("scale, dtype", [*((x, torch.float32) for x in (1e19, 1e30, 1e-13, 1e-30)),
                                          (1e200, torch.float64), (1e-200, torch.float64)])
def test_rows_of_any_length(scale, dtype):
    u, v = (F.normalize(x, dim=1) for x in views(240, dtype=dtype))
    batches = random_batches(240, 8, seeded())
    for loss in LOSSES:
        torch.testing.assert_close(batch_losses(u * scale, v * scale, batches, loss=loss),
                                   batch_losses(u, v, batches, loss=loss), rtol=1e-4, atol=1e-5)
    w = spectral_affinity(u, v, 8)
    torch.testing.assert_close(spectral_affinity(u * scale, v, 8), w, rtol=1e-4, atol=1e-4)
    random, chosen, scaled = (batch_losses(u, v, x).mean() for x in (batches, *(
        spectral_batches(u * y, v * y, 8, 30, generator=seeded(), refine=True) for y in (1, scale))))
    assert abs(scaled - chosen) < 0.05 * (chosen - random)  # a rounded weight turns exchanges
    x = u[:8].clone().mul_(scale).requires_grad_()
    gradient = torch.autograd.grad(batch_losses(x, v[:8], torch.arange(8)[None]).sum(), x)[0] * scale
    assert (gradient * u[:8]).sum(1).abs().max() < 1e-4 < gradient.norm(dim=1).min()  # along the sphere


def test_double_as_the_default_type_and_numbers_of_numpy():
    u, v = views(960, dtype=torch.float32)

    def everything(B, k, q, m, temperature):
        return [batch_losses(u, v, ROWS, temperature), osgd_batches(u, v, B, k, q, temperature),
                osgd_batches_with_replacement(u, v, B, k, q, temperature, generator=seeded()),
                spectral_affinity(u[:40], v[:40], B, temperature), all_batches(k, q),
                random_batches(m, B, seeded()), spectral_batches(u, v, B, k, temperature, seeded(), False),
                spectral_batches(u, v, B, k, temperature, seeded(), True)]
    expected = everything(8, 20, 3, 99, 0.125)
    assert all(map(torch.equal, everything(*map(np.int64, (8, 20, 3, 99)), np.float64(0.125)), expected))
    assert all(map(torch.equal, everything(*map(np.uint8, (8, 20, 3, 99)), np.float32(0.125)), expected))
    torch.set_default_dtype(torch.float64)
    try:
        assert all(map(torch.equal, everything(8, 20, 3, 99, 0.125), expected))
    finally:
        torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------------- which subsets
@pytest.mark.parametrize("n, B", [(5, 2), (6, 3), (7, 7), (20, 4), (12, 11)])
def test_all_batches(n, B):
    assert torch.equal(all_batches(n, B), torch.tensor(list(itertools.combinations(range(n), B))))


def test_random_batches():
    b, other = random_batches(103, 8, seeded(1)), random_batches(103, 8, seeded(2))
    assert b.shape == (12, 8) and len(set(b.flatten().tolist()) & set(range(103))) == 96
    assert torch.equal(b, random_batches(103, 8, seeded(1))) and not torch.equal(b, other)
    g = seeded()
    assert len(torch.cat([random_batches(103, 8, g) for _ in range(20)]).unique()) == 103  # dropped rows vary


@pytest.mark.parametrize("n, B", [(6, 2), (6, 4), (5, 5), (7, 3)])
def test_random_batches_with_replacement_is_uniform(n, B):
    m, subsets = 20_000, math.comb(n, B)
    b = random_batches_with_replacement(m, n, B, seeded())
    count = np.unique((2 ** b).sum(1).numpy(), return_counts=True)[1]  # a sum for each subset
    assert len(count) == subsets and 0 <= b.min() and b.max() < n
    chi2 = ((count - m / subsets) ** 2 / (m / subsets)).sum()
    assert chi2 < subsets - 1 + 4 * math.sqrt(2 * subsets) and (b.sort(1)[0].diff(dim=1) > 0).all()


def test_random_batches_with_replacement_large():
    b, again, other = (random_batches_with_replacement(1500, 100_000, 32, seeded(x)) for x in (3, 3, 4))
    assert b.shape == (1500, 32) and b.dtype == torch.int64 and 0 <= b.min() and b.max() < 100_000
    assert (b.sort(1)[0].diff(dim=1) > 0).all() and torch.equal(b, again) and not torch.equal(b, other)
    assert abs(b.double().mean() - 49_999.5) < 4 * 100_000 / math.sqrt(12 * b.numel())


# ---------------------------------------------------------------------------- OSGD
@pytest.mark.parametrize("lowest", [False, True])
def test_osgd_against_loops(lowest):
    u, v = views(47, 6)
    B, k, q = 4, 5, 2  # 11 batches and 3 rows; two groups, one batch left
    expected = []
    for group in range(2):
        batches = [torch.arange(s, s + B) for s in range(group * k * B, (group + 1) * k * B, B)]
        batches.sort(key=lambda b: by_loops(u[b], v[b], 0.2))
        expected += batches[:q] if lowest else batches[-q:]
    assert torch.equal(osgd_batches(u, v, B, k, q, 0.2, lowest), torch.stack(expected))
    assert len(osgd_batches(u, v, B, 11, 11)) == 11


@pytest.mark.parametrize("lowest", [False, True])
def test_osgd_with_replacement(lowest):
    u, v = views(9)
    drawn = random_batches_with_replacement(40, 9, 3, seeded(7))  # k B may exceed n
    draw = functools.partial(osgd_batches_with_replacement, u, v, 3, 40, 6, 0.2, lowest)
    b, again, other = (draw(seeded(x)) for x in (7, 7, 8))
    assert b.shape == (6, 3) and torch.equal(b, again) and not torch.equal(b, other)
    expected = batch_losses(u, v, drawn, 0.2).sort()[0]
    torch.testing.assert_close(batch_losses(u, v, b, 0.2), expected[:6] if lowest else expected[-6:])
    assert {tuple(r) for r in b.tolist()} <= {tuple(r) for r in drawn.tolist()}


# ---------------------------------------------------------------------------- spectral
def test_affinity_against_loops():
    u, v = views(6, 4)
    w = spectral_affinity(3 * u, v, 5, 0.2)
    x, y = (F.normalize(a, dim=1) / math.sqrt(0.2) for a in (u, v))
    for k, l in itertools.product(range(6), repeat=2):
        expected = 0.0
        for i, j in ((k, l), (l, k)) if k != l else ():
            expected += math.log(1 + 4 * math.exp(x[i] @ y[j] - x[i] @ y[i]))
            expected += math.log(1 + 4 * math.exp(y[i] @ x[j] - y[i] @ x[i]))
        assert w[k, l].item() == pytest.approx(expected, rel=1e-9)


def test_affinity_of_large_logits_is_finite():
    u, v = views(6, dtype=torch.float32)
    w = spectral_affinity(u, -v, 4, 1e-4)  # differences of some 10^4: log(1 + e^x) is x
    u, v = F.normalize(u.double(), dim=1), F.normalize(-v.double(), dim=1)
    s = u @ v.T / 1e-4
    x = (s - s.diag()[:, None]).clamp(min=0) + (s - s.diag()).clamp(min=0)
    torch.testing.assert_close(w.double(), x + x.T, rtol=1e-3, atol=5)


@pytest.mark.parametrize("n, k", [(12, 3), (60, 6), (300, 30), (640, 20)])
def test_assignment_against_the_optimum(n, k):
    from scipy.optimize import linear_sum_assignment
    gain = torch.randn(n, k, generator=seeded(n)) + torch.linspace(0, 2, k)  # the last labels are in demand
    label = _assign(gain, n // k)
    assert (torch.bincount(label, minlength=k) == n // k).all()
    rows, columns = linear_sum_assignment(gain.repeat_interleave(n // k, 1).numpy(), maximize=True)
    best = gain[rows, torch.from_numpy(columns) // (n // k)].sum().item()
    assert gain[torch.arange(n), label].sum().item() == pytest.approx(best, rel=1e-6 if n <= 320 else 2e-3)


@pytest.mark.parametrize("k, size, seed", [(2, 16, 0), (8, 2, 1), (10, 8, 2), (40, 32, 3)])
def test_spectral_recovers_a_planted_partition(k, size, seed):
    u, v, label = clustered(k, size, 0.1, seed)
    b = spectral_batches(u, v, size, k, generator=seeded(seed))
    assert (label[b] == label[b][:, :1]).all() and label[b][:, 0].unique().numel() == k


def test_spectral_is_harder_than_random_and_refined_harder_window_by_window():
    u, v, _ = clustered(12, 40, 1.2)  # the 480 rows do not fit the windows of 8 * 16 rows
    plain, refined = (spectral_batches(u, v, 16, 8, generator=seeded(), refine=r) for r in (False, True))
    for w, (soft, hard) in enumerate(zip(plain.split(8), refined.split(8))):
        assert is_partition(soft - 128 * w, soft.numel()) and is_partition(hard - 128 * w, soft.numel())
        random = soft.flatten()[random_batches(soft.numel(), 16, seeded(w))]
        random, soft, hard = (batch_losses(u, v, x).mean() for x in (random, soft, hard))
        assert soft > random + 0.5 and hard - random > 1.05 * (soft - random)


@pytest.mark.parametrize("kind", ["distinct", "identical", "duplicates", "zeros", "underflow"])
@pytest.mark.parametrize("n, B, k", [(2, 2, 1), (4, 2, 1), (4, 2, 2), (4, 4, 1), (11, 3, 3), (33, 2, 7),
                                     (64, 32, 2), (100, 32, 2), (70, 2, 35), (600, 300, 2)])
def test_spectral_partitions(n, B, k, kind):
    u, v = views(n, 8, dtype=torch.float32)
    if kind == "underflow":
        v = u
        assert (spectral_affinity(u, u, B, 1e-3) == 0).float().mean() > 0.99
    elif kind != "distinct":
        rows = torch.arange(n) % (1 if kind == "identical" else 2)
        u, v = u[rows] * (kind != "zeros"), v[rows] * (kind != "zeros")
    for refine in (False, True):
        b = spectral_batches(u, v, B, k, 1e-3 if kind == "underflow" else 0.1, seeded(), refine)
        assert b.shape == (n // B, B) and is_partition(b, n // B * B)


def test_spectral_generator_decides():
    call = functools.partial(spectral_batches, *views(96, dtype=torch.float32), 8, 12)
    first, again, other = (call(generator=seeded(x)) for x in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    for draw in call, lambda: random_batches(50, 5), lambda: random_batches_with_replacement(9, 50, 5):
        torch.manual_seed(3)
        first = draw()
        torch.manual_seed(3)
        assert torch.equal(first, draw())


# ---------------------------------------------------------------------------- refinement
def all_partitions(rows: list, size: int):
    """Every partition of the rows into batches, each once."""
    if not rows:
        yield []
    for others in itertools.combinations(rows[1:], size - 1) if rows else ():
        for rest in all_partitions([row for row in rows[1:] if row not in others], size):
            yield [[rows[0], *others], *rest]


def inside(w, batches) -> torch.Tensor:
    return w[batches[..., :, None], batches[..., None, :]].sum((-3, -2, -1))


@pytest.mark.parametrize("n, B", [(8, 2), (9, 3), (12, 3), (12, 4)])
def test_refined_is_near_the_optimum(n, B):
    partitions = torch.tensor(list(all_partitions(list(range(n)), B)))
    shares = []
    for seed in range(50):
        g = seeded(seed)
        u = torch.randn(n, 4, generator=g)
        v = u + 0.5 * torch.randn(n, 4, generator=g)
        w = spectral_affinity(u, v, B)
        best = inside(w, partitions).max()
        shares.append([inside(w, batches) / best for batches in (
            spectral_batches(u, v, B, n // B, generator=g, refine=True),
            spectral_batches(u, v, B, n // B, generator=g),
            refine_by_weight(w, random_batches(n, B, g)), random_batches(n, B, g))])
    refined, plain, from_random, random = torch.tensor(shares).mean(0).tolist()
    assert random < 0.5 < plain < refined and refined >= 0.99 and from_random > 0.95


def test_inside_weight_never_falls_and_ends_where_no_exchange_helps():
    u, v, _ = clustered(6, 8, 1.0)
    w, start = spectral_affinity(u, v, 8), random_batches(48, 8, seeded())
    weights = [inside(w, start)]
    for rounds in itertools.count(1):
        batches = refine_by_weight(w, start, rounds)
        assert is_partition(batches, 48)
        weights.append(inside(w, batches))
        if weights[-1] == weights[-2] and torch.equal(batches, refine_by_weight(w, start)):
            break
        assert weights[-1] >= weights[-2]
    assert rounds > 5 and weights[-1] > 1.5 * weights[0]
    for x, y in itertools.combinations(range(48), 2):  # brute force over all exchanges
        other = batches.flatten().clone()
        other[[x, y]] = other[[y, x]]
        assert inside(w, other.view(6, 8)) <= weights[-1] * (1 + 1e-5)


def test_windows_larger_than_what_is_solved_whole(monkeypatch):
    u, v, _ = clustered(24, 40, 0.7)  # 960 rows
    whole = spectral_batches(u, v, 16, 60, generator=seeded(), refine=True)
    small = spectral_batches(u, v, 16, 10, generator=seeded(), refine=True)
    monkeypatch.setattr("samplers.DENSE_ROWS", 512)
    monkeypatch.setattr("samplers.PART_ROWS", 160)
    seen = []

    def affinity(u, v, *more):
        seen.append(len(u))
        return spectral_affinity(u, v, *more)
    monkeypatch.setattr("samplers.spectral_affinity", affinity)
    parts = spectral_batches(u, v, 16, 60, generator=seeded(), refine=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(parts, spectral_batches(u, v, 16, 60, generator=seeded(), refine=True))
    assert max(seen) <= 160 and is_partition(parts, 960)
    loss = [batch_losses(u, v, b).mean() for b in (whole, parts, small)]
    assert loss[1] - loss[2] > 0.85 * (loss[0] - loss[2]) > 0.5  # nearly all that the large window gains


def test_exclude_keeps_groups_apart_and_stays_hard():
    u, v, cluster = clustered(8, 32, 0.5)
    group = torch.arange(256) // 8 % 8 * 100 + cluster  # clusters in 8 groups each
    plain, apart = (spectral_batches(u, v, 16, 16, generator=seeded(), refine=True, exclude=x)
                    for x in (None, group))

    def together(batches):
        return sum(16 - group[rows].unique().numel() for rows in batches)
    assert together(plain) > 40 and together(apart) == 0 and is_partition(apart, 256)
    random = batch_losses(u, v, random_batches(256, 16, seeded())).mean()
    assert batch_losses(u, v, apart).mean() > random + 0.3 * (batch_losses(u, v, plain).mean() - random)
    crowded = spectral_batches(u, v, 16, 16, generator=seeded(), refine=True, exclude=torch.arange(256) % 12)
    assert is_partition(crowded, 256)
    assert sum(16 - (rows % 12).unique().numel() for rows in crowded) == 64  # 12 groups in 16 places


def test_relative_margin_keeps_copies_apart_and_stays_hard():
    u, v, _ = clustered(16, 16, 1.0)
    u[128:144], v[128:144] = (x[:16] + 0.01 * torch.randn(16, x.shape[1], generator=seeded()) for x in (u, v))
    plain, apart = (spectral_batches(u, v, 8, 32, generator=seeded(), refine=True, relative_margin=x)
                    for x in (None, 0.1))

    def together(batches):
        return sum(((rows[:, None] - rows) == 128)[:, rows < 16].any(0).sum().item() for rows in batches)
    assert together(plain) > 8 and together(apart) == 0 and is_partition(apart, 256)
    random = batch_losses(u, v, random_batches(256, 8, seeded())).mean()
    assert batch_losses(u, v, apart).mean() > random + 0.3 * (batch_losses(u, v, plain).mean() - random)
    distinct = torch.eye(64)  # no two rows are alike
    assert torch.equal(*(spectral_batches(distinct, distinct, 8, 8, generator=seeded(), refine=True,
                                          relative_margin=x) for x in (None, 0.1)))


# ---------------------------------------------------------------------------- bad input
U, V = views(20)
NAN = U.clone()
NAN[3, 1], NAN[5, 1] = math.nan, math.inf
ROWS = torch.arange(20).view(5, 4)
EVERY = {
    "losses": lambda u, v, t: batch_losses(u, v, ROWS, t),
    "osgd": lambda u, v, t: osgd_batches(u, v, 4, 5, 2, t),
    "replacement": lambda u, v, t: osgd_batches_with_replacement(u, v, 4, 5, 2, t),
    "affinity": lambda u, v, t: spectral_affinity(u, v, 4, t),
    "spectral": lambda u, v, t: spectral_batches(u, v, 4, 5, t),
}


def refused(call, *parts: str) -> None:
    """call raises a ValueError of one line that has all the parts."""
    with pytest.raises(ValueError) as error:
        call()
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value), str(error.value)


@pytest.mark.parametrize("name", EVERY)
def test_bad_embeddings_are_refused(name):
    call = EVERY[name]
    call(U, V, 0.1)
    refused(lambda: call(U, V[:19], 0.1), "(20, 16)", "(19, 16)", "one shape")
    refused(lambda: call(U[:, :0], V[:, :0], 0.1), "(20, 0)", "[n, d]")
    refused(lambda: call(U[0], V[0], 0.1), "(16,)", "[n, d]")
    refused(lambda: call(U.long(), V, 0.1), "int64", "floating-point")
    refused(lambda: call(U.numpy(), V.numpy(), 0.1), "u is of type ndarray", "torch.from_numpy")
    refused(lambda: call(NAN, V, 0.1), "u has 2 of 20 rows", "NaN")
    refused(lambda: call(U, NAN, 0.1), "v has 2 of 20 rows", "NaN")
    for temperature in (0, -0.5, math.nan, math.inf):
        refused(lambda: call(U, V, temperature), f"temperature is {temperature}", "> 0")


@pytest.mark.parametrize("B", [-1, 0, 1, 21])
def test_bad_batch_sizes_are_refused(B):
    for call in (lambda: random_batches(20, B), lambda: random_batches_with_replacement(3, 20, B),
                 lambda: all_batches(20, B), lambda: osgd_batches(U, V, B, 1, 1),
                 lambda: osgd_batches_with_replacement(U, V, B, 1, 1), lambda: spectral_batches(U, V, B, 1)):
        refused(call, f"batch_size is {B} with 20 samples", "from 2 to 20")
    if B < 2:
        refused(lambda: spectral_affinity(U, V, B), f"batch_size is {B}", "from 2")


W, BIG, PAIRS = spectral_affinity(U, V, 4), views(1040), torch.arange(20) // 2
SPECTRAL = functools.partial(spectral_batches, U, V, 4, 5)
OTHERS = [
    *((lambda call=call, k=k: call(U, V, 4, k), f"k is {k} with 20 samples in batches of 4", "from 1 to 5")
      for k in (6, 0) for call in (functools.partial(osgd_batches, q=1), spectral_batches)),
    *((lambda call=call, q=q: call(q), f"q is {q} with k = 2", "from 1 to 2") for q in (3, 0) for call in (
        lambda q: osgd_batches(U, V, 4, 2, q), lambda q: osgd_batches_with_replacement(U, V, 4, 2, q),
        lambda q: select_by_loss(U, V, ROWS[:2], q))),
    (lambda: osgd_batches_with_replacement(U, V, 4, 0, 1), "k is 0", "from 1"),
    (lambda: SPECTRAL(refine=True, exclude=PAIRS[:7]), "exclude is (7,)", "20 integers"),
    (lambda: SPECTRAL(exclude=PAIRS), "refine False", "refine=True"),
    (lambda: spectral_batches(*BIG, 8, 130, 0.1, None, True, range(1040)), "k 130", "at most 128"),
    *((lambda x=x: SPECTRAL(refine=True, relative_margin=x), f"relative_margin is {x}", "0.1")
      for x in (-0.1, 1, math.nan)),
    (lambda: SPECTRAL(relative_margin=0.1), "refine False", "refine=True"),
    (lambda: batch_losses(U, V, ROWS.numpy()), "batches is of type ndarray", "int64"),
    (lambda: batch_losses(U, V, ROWS, loss="clip"), "loss is 'clip'", "infonce"),
    (lambda: osgd_batches(U, V, 4., 5, 2), "batch_size is 4.0", "an integer"),
    (lambda: osgd_batches(U, V, 4, 5, "2"), "q is '2'", "an integer"),
    (lambda: spectral_batches(U, V, 4, None), "k is None", "an integer"),
    (lambda: random_batches([1, 2, 3], 2), "number of samples is [1, 2, 3]", "an integer"),
    (lambda: random_batches_with_replacement(0, 20, 4), "m is 0", "from 1"),
    (lambda: all_batches(100, 10), str(math.comb(100, 10)), str(2 ** 27 // 10), "smaller n"),
    *((lambda call=call, rows=rows: call(rows), *parts)
      for call in (functools.partial(batch_losses, U, V), functools.partial(refine_by_weight, W))
      for rows, *parts in ((ROWS[0], "(4,)", "[m, B]"), (ROWS.float(), "float32", "int64"),
                           (ROWS + 1, "from 1 to 20", "0 to 19"), (ROWS - 1, "from -1 to 18", "0 to 19"))),
]


def test_other_bad_input_is_refused():
    for call, *parts in OTHERS:
        refused(call, *parts)
    assert refine_by_weight(W, ROWS[:0]).shape == (0, 4) and refine_by_weight(W, ROWS[1:]).shape == (4, 4)
    assert spectral_affinity(U.half(), V, 4).dtype == torch.float64
