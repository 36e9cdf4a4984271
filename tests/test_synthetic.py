"""Tests of theory.py and synthetic.py: closed forms, gradients, where training ends, and verdicts.

    python -m pytest tests/test_synthetic.py
"""
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import cli
import synthetic
from model import infonce
from samplers import all_batches
from theory import (METHODS, Matching, angle_losses, claim, cross_polytope, cross_polytope_loss, descend,
                    distance, etf, etf_loss, evaluations, first_steps, growth, interval, nearest, race,
                    schedule, speedup, start, start_released, toy_start, toy_steps, train)

F64 = {"dtype": torch.float64}


@pytest.fixture(autouse=True, scope="module")
def one_thread():  # tensors this small gain nothing from a second
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(gram: torch.Tensor) -> torch.Tensor:
    """Rows with these inner products, [1, n, n]."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=0).sqrt())[None]


def random_polytope(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-polytope in n / 2 dimensions, turned, its points dealt at random; and each one's partner."""
    d = n // 2
    turn = torch.linalg.qr(torch.randn(d, d, generator=seeded(seed), **F64))[0]
    order = torch.randperm(n, generator=seeded(seed + 1))
    partner = torch.empty(n, dtype=torch.int64)
    partner[order] = order.roll(d)  # point c of the list stands at sample order[c], its opposite d further on
    x = torch.empty(n, d, **F64)
    x[order] = torch.cat([turn, -turn])
    return x[None], partner


# ---------------------------------------------------------------------------- closed forms
@pytest.mark.parametrize("n", [4, 8, 16])
def test_closed_forms_of_the_optima(n):
    u = points(etf(n, **F64))
    assert infonce(u, u).item() == pytest.approx(etf_loss(n), abs=1e-12)
    for b in (2, 3):
        batches = all_batches(n, b)
        assert infonce(u[0][batches], u[0][batches]).mean().item() == pytest.approx(etf_loss(n, b), abs=1e-9)
    assert infonce(u / 0.3, u).item() == pytest.approx(etf_loss(n, temperature=0.3), abs=1e-9)
    x, _ = random_polytope(n, 0)
    assert infonce(x, x).item() == pytest.approx(cross_polytope_loss(n), abs=1e-12)
    pair = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]], **F64)
    assert infonce(pair, pair).item() == pytest.approx(2 * math.log(1 + math.exp(-2)), abs=1e-12)


@pytest.mark.parametrize("n", [4, 6, 8])
def test_matching_against_all_matchings(n):
    def matchings(left):
        if not left:
            yield []
        for j in left[1:]:
            for rest in matchings([x for x in left[1:] if x != j]):
                yield [(left[0], j), *rest]
    cost = torch.randn(20, n, n, generator=seeded(), **F64)
    cost = cost + cost.mT
    partner = Matching(n)(cost)
    assert (partner.gather(1, partner) == torch.arange(n)).all() and (partner != torch.arange(n)).all()
    least = torch.stack([sum(cost[:, i, j] for i, j in m) for m in matchings(list(range(n)))]).min(0).values
    torch.testing.assert_close(cost.gather(2, partner[:, :, None])[:, :, 0].sum(1) / 2, least)
    for wrong in (5, 0, 22):
        with pytest.raises(ValueError, match=f"n is {wrong}"):
            Matching(wrong)


@pytest.mark.parametrize("n", [4, 8, 16])
def test_distances(n):
    matching = Matching(n)
    for seed in range(5):
        x, partner = random_polytope(n, seed)
        torch.testing.assert_close((x @ x.mT)[0], cross_polytope(partner).double())
        assert distance(x, x, matching).item() < 1e-7 and distance(x, x).item() > 0.5
    u = points(etf(n, **F64))
    assert distance(u, u).item() < 1e-7
    # Of the ETF's Gram matrix any matching leaves n entries 1 - 1/(n-1) away, n(n-2) of them 1/(n-1).
    expected = math.sqrt(n * (1 - 1 / (n - 1)) ** 2 + n * (n - 2) / (n - 1) ** 2)
    assert distance(u, u, matching).item() == pytest.approx(expected)
    few = Matching(4)  # brute force over the three matchings of four samples
    u, v = start(30, 4, 3, seed=1)
    partners = torch.tensor([[1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]])
    every = torch.stack([(u @ v.mT - cross_polytope(p)).flatten(1).norm(dim=1) for p in partners])
    torch.testing.assert_close(distance(u, v, few), every.min(0).values)


# ---------------------------------------------------------------------------- gradient steps
def by_autograd(u, v, batches, lr, temperature=1.0, weights=None, released=False):
    """The step by autograd, a loop over runs and batches; released: of parameters u, v of any lengths."""
    out = []
    for r in range(len(u)):
        x, y = u[r].clone().requires_grad_(), v[r].clone().requires_grad_()
        a, b = (normalize(x, dim=1), normalize(y, dim=1)) if released else (x, y)
        own = batches if batches.ndim == 2 else batches[r]
        w = [1 / len(own)] * len(own) if weights is None else weights[r]
        loss = sum(w_i * infonce(a[rows] / temperature, b[rows]) for w_i, rows in zip(w, own))
        moved = [z.detach() - lr * g for z, g in zip((x, y), torch.autograd.grad(loss, (x, y)))]
        out.append(moved if released else [normalize(z, dim=1) for z in moved])
    return [torch.stack(x) for x in zip(*out)]


STEPS = [(torch.arange(8)[None], None), (all_batches(8, 3), None), (torch.tensor([[1, 6, 3]]), None),
         (torch.tensor([[[0, 1], [1, 2]], [[7, 3], [7, 0]], [[4, 5], [6, 2]]]), None),  # a row in two batches
         (all_batches(8, 2), torch.rand(3, 28, generator=seeded(), **F64)),
         (torch.arange(8).view(4, 2).expand(3, 4, 2), torch.rand(3, 4, generator=seeded(), **F64))]


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("batches, weights", STEPS)
def test_steps_against_autograd(batches, weights, released):
    u, v, lengths = start_released(3, 8, 5, seed=2)
    x, y = (u * lengths[0], v * lengths[1]) if released else (u, v)
    for _ in range(2):  # in the second step the lengths that the first one left
        x, y = by_autograd(x, y, batches, 0.7, 0.4, weights, released)
        descend(u, v, batches, 0.7, 0.4, weights, lengths if released else None)
        torch.testing.assert_close([u, v], [normalize(x, dim=2), normalize(y, dim=2)], rtol=1e-12, atol=1e-12)
    if released:
        torch.testing.assert_close([*lengths], [x.norm(dim=2, keepdim=True), y.norm(dim=2, keepdim=True)])


def test_training_by_the_released_dynamics():
    u, v, lengths = start_released(2000, 4, 16, seed=0)
    x = torch.stack([u * lengths[0], v * lengths[1]])  # a standard normal
    assert abs(x.mean()) < 0.01 and abs(x.var() - 1) < 0.01 and abs((x ** 4).mean() - 3) < 0.05
    x, y = x[:, :3]
    found = train("full", u[:3], v[:3], 2, 2, 0.5, seeded(), lengths=tuple(length[:3] for length in lengths))
    for step in range(3):
        expected = distance(normalize(x, dim=2), normalize(y, dim=2))
        torch.testing.assert_close(found[:, step], expected)
        x, y = by_autograd(x, y, torch.arange(4)[None], 0.5, released=True)


# ---------------------------------------------------------------------------- where training ends
@pytest.mark.parametrize("method, steps", [("full", 400), ("ncb", 2500)])
def test_full_batch_and_all_batches_reach_the_etf(method, steps):
    for n in (4, 8):
        u, v = start(8, n, 2 * n, seed=0)
        distances = train(method, u, v, 2, steps, 0.5, seeded(), every=steps)
        assert distances.shape == (8, 2) and (distances[:, 0] > 1).all() and (distances[:, 1] < 1e-3).all()
        assert (infonce(u, v) - etf_loss(n)).abs().max() < 1e-6
        torch.testing.assert_close(u.norm(dim=2), torch.ones(8, n, **F64))


def test_fixed_disjoint_batches_do_not():
    u, v = start(8, 8, 16, seed=0)
    assert (train("fixed", u, v, 2, 1500, 0.5, seeded(), every=1500)[:, -1] > 1).all()
    pairs = torch.arange(8).view(4, 2)
    assert (infonce(u[:, pairs], v[:, pairs]) - 2 * math.log(1 + math.exp(-2))).abs().max() < 1e-6
    assert (infonce(u, v) - etf_loss(8) > 0.02).all()


@pytest.mark.parametrize("method", METHODS)
def test_methods_choose_valid_batches_and_the_seed_decides(method):
    def taken(seed):
        u, v = start(3, 8, 6, seed=0)
        steps = []
        for batches in itertools.islice(schedule(method, u, v, 2, 1.0, seeded(seed)), 8):
            steps.append(batches.expand(3, -1, -1) if batches.ndim == 2 else batches)
            descend(u, v, batches, 0.3)
        return steps
    first = taken(0)
    for batches in first:
        assert 0 <= batches.min() and batches.max() < 8 and (batches.sort(2).values.diff(dim=2) > 0).all()
    assert all(map(torch.equal, first, taken(0)))
    if method not in ("full", "ncb", "fixed", "osgd-direct"):
        assert not all(map(torch.equal, first, taken(1)))
    gradient, _ = evaluations(method, 8, 2)
    assert gradient == first[0][0].numel()
    if method in ("sgd", "spectral", "refined"):  # every sample once in an epoch
        assert all(torch.cat([x[r].flatten() for x in first[:4]]).unique().numel() == 8 for r in range(3))


def test_osgd_takes_what_has_the_highest_loss():
    u, v = start(4, 6, 4, seed=5)
    every = all_batches(6, 2)
    losses = torch.stack([infonce(u[:, b], v[:, b]) for b in every], 1)
    chosen = next(schedule("osgd-direct", u, v, 2, 1.0, seeded()))
    assert torch.equal(chosen[:, 0], every[losses.argmax(1)])


@pytest.mark.parametrize("method", ["osgd-direct", "osgd-replacement", "osgd", "spectral", "refined"])
def test_chosen_batches_are_harder_than_random_ones(method):
    u, v = start(400, 8, 16, seed=6)

    def loss(method: str) -> float:  # of the first batches
        flat, first = (x.view(-1, 16) for x in (u, v)), torch.arange(400)[:, None, None] * 8
        a, b = (x[next(schedule(method, u, v, 2, 1.0, seeded())) + first] for x in flat)
        return infonce(a, b).mean().item()
    assert loss(method) > loss("sgd") + 0.1


def test_losses_against_the_angle_by_a_plain_loop():
    degrees = [-180.0, -46.75, 0.0, 20.0, 135.0]
    corners = [(math.cos(math.radians(36 * i)), math.sin(math.radians(36 * i))) for i in range(10)]

    def loss(u: list, v: list) -> float:
        s = [[math.exp(a[0] * b[0] + a[1] * b[1]) for b in v] for a in u]
        each = [math.log(sum(s[i]) * sum(row[i] for row in s) / s[i][i] ** 2) for i in range(len(u))]
        return sum(each) / len(each)
    for angle, full, ncb, fixed in zip(degrees, *angle_losses(torch.tensor(degrees, **F64)).values()):
        u = [(math.cos(math.radians(angle)), math.sin(math.radians(angle))), *corners[1:]]
        of = {(i, j): loss([u[i], u[j]], [corners[i], corners[j]])
              for i, j in itertools.combinations(range(10), 2)}
        assert full.item() == pytest.approx(loss(u, corners), abs=1e-12)
        assert ncb.item() == pytest.approx(sum(of.values()) / 45, abs=1e-12)
        assert fixed.item() == pytest.approx(sum(of[i, i + 1] for i in range(0, 10, 2)) / 5, abs=1e-12)


def test_toy_case():
    square = toy_start(1, **F64)
    assert infonce(square, square).item() > cross_polytope_loss(4) + 0.3
    first, path = toy_steps("osgd-direct", 1, 200, 0.5, (1e-1, 1e-2, 1e-3), seeded(), F64, shown=30)
    assert [x.item() for x in first.values()] == [7, 10, 10]
    theta, excess = path[:, 0]
    assert theta[0] == pytest.approx(10) and theta[10] == pytest.approx(45, abs=1)
    assert excess[10] < 1e-3 < excess[9]
    slow, _ = toy_steps("sgd-replacement", 300, 1500, 0.5, (1e-1, 1e-2), seeded(), F64)
    assert slow[1e-1].mean() > 3 * 7 and slow[1e-2].mean() > 4 * 10
    never, _ = toy_steps("osgd-direct", 1, 50, 0.5, (1e-12,), seeded(), F64)
    assert np.isinf(never[1e-12]).all()


# ---------------------------------------------------------------------------- verdicts
def test_verdicts_follow_from_the_data():
    g = np.random.default_rng(0)
    near, far, between = g.normal(0.01, 0.003, 40), g.normal(0.9, 0.1, 40), g.normal(0.05, 0.05, 40)

    def verdict(measured, allowed=(0, 0.05)) -> str:
        return claim("", measured, allowed, "")["verdict"]
    assert [verdict(x) for x in (near, far, between)] == ["holds", "does not hold", "not settled"]
    assert [verdict(x) for x in (0.05, 0.06, (math.nan,) * 3)] == ["holds", "does not hold", "not settled"]
    assert verdict((1.2, 1.0, 1.5), synthetic.ABOVE_1) == "not settled"
    assert claim("", near, (0, 0.05), "")["interval"] == interval(near)[1:]
    assert [claim("", 0.0, (0, 1), "", *x)["asked_by"] for x in ([], ["us"])] == ["paper", "us"]
    small, large = (2.0, 1.8, 2.2), (6.0, 5.0, 7.0)
    assert growth("", small, large, "")["verdict"] == "holds"
    assert growth("", large, small, "")["verdict"] == "does not hold"
    assert growth("", large, (6.5, 5.0, 7.0), "")["verdict"] == "not settled"


def test_an_experiment_contradicted_by_its_data_says_so(monkeypatch):
    """subsets, also on an optimum that no training reaches. That a balanced design suffices is our claim."""
    knobs = dict(quick=True, seeds=2, steps=100, seed=0, lr=2.0, float32=False, device="cpu")
    every, alone, _, design = synthetic.subsets(knobs)[0][-4:]
    assert [x["verdict"] for x in (every, alone, design)] == ["holds"] * 3 and design["asked_by"] == "us"
    assert every["claim"].startswith("B = 4: all 70") and "balanced design, 14" in design["claim"]
    monkeypatch.setattr(synthetic, "etf_loss", lambda n: etf_loss(n) - 0.5)
    assert [synthetic.subsets(knobs)[0][i]["verdict"] for i in (-4, -1)] == ["does not hold"] * 2
    threes = [three for plane in synthetic.PLANES for three in itertools.combinations(plane, 3)]
    assert sorted(threes) == list(itertools.combinations(range(8), 3))  # each once


def test_intervals_cover_what_they_should():
    g = np.random.default_rng(1)
    found = [interval(g.normal(3, 1, 30), draws=400) for _ in range(300)]
    assert 0.88 < np.mean([low <= 3 <= high for _, low, high in found]) < 0.98
    never, slow, fast = (np.full(9, x) for x in (math.inf, 40.0, 10.0))
    assert interval(np.stack([slow, fast], 1), speedup) == (4, 4, 4)
    assert interval(np.stack([slow, never], 1), speedup) == (0, 0, 0)
    assert math.isnan(interval(np.stack([never, never], 1), speedup)[0])


def test_race():
    distances = torch.tensor([[3.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0], [0.5, 9.0, 9.0, 9.0]])
    assert first_steps(distances, 1.0, every=5).tolist() == [10, math.inf, 0]
    falling = torch.tensor([[9.0, 4.0, 2.0, 1.0]]).repeat(4, 1)
    assert nearest([falling, falling + 0.32], 0.05) == 1.35
    assert nearest([torch.cat([falling, falling[:1] + 2])], 0.1) == 1  # one run of five stays away
    assert nearest([torch.cat([falling, falling[:3] + 2])], 0.1) == 3  # three of seven do
    sgd, own = race({"sgd": falling, "osgd": falling[:, [0, 2, 2, 3]]}, [2.0, 0.5], every=3, n=7)
    assert own["method"] == "osgd" and own["n"] == sgd["n"] == 7 and own["steps_to"][2.0] == [3] * 4
    assert own["sgd_over_this"][2.0] == (2, 2, 2) and math.isnan(own["sgd_over_this"][0.5][0])


# ---------------------------------------------------------------------------- the command
def run(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["synthetic.py", *map(str, argv)])
    return cli.run(synthetic.main, "synthetic.py")


SMALL = "--quick", "--seeds", 2, "--steps", 3


@pytest.mark.parametrize("name", synthetic.EXPERIMENTS)
def test_every_experiment_writes_its_record(name, tmp_path, capsys, monkeypatch):
    g, out = np.random.default_rng(0), tmp_path / "synthetic"
    np.savez(tmp_path / "e.npz", a_u=g.normal(size=(96, 8)), a_v=g.normal(size=(96, 8)))
    argv = *SMALL, "--experiment", name, "--out", out, "--embeddings", tmp_path / "e.npz"
    assert run(monkeypatch, *argv) == 0
    printed, text = capsys.readouterr().out, (out / f"{name}.json").read_text()
    record = json.loads(text)
    assert {"knobs", "command", "commit", "versions", "device", "numbers", "seconds"} <= record.keys()
    assert not any(word in text + printed.replace("–", "") for word in ("NaN", "nan", "Infinity", " inf"))
    assert record["claims"] and {c["asked_by"] for c in record["claims"]} <= {"paper", "us"}
    for c in record["claims"]:
        assert c["claim"] in printed and c["verdict"] in ("holds", "does not hold", "not settled")
    assert sorted(x.name for x in out.iterdir()) == [f"{name}.{x}" for x in ("json", "pdf", "png")]
    assert (out / f"{name}.png").stat().st_size > 5000
    monkeypatch.setattr(cli, "save_figure", lambda figure, path: None)
    assert run(monkeypatch, *argv) == 0
    assert json.loads((out / f"{name}.json").read_text())["numbers"] == record["numbers"]
    if name == "histograms":
        assert record["numbers"][-1]["set"] == "a"


def test_quick_leaves_out_what_it_cannot_settle(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(synthetic, "run", lambda name, knobs, out: ran.append(name))
    assert run(monkeypatch, "--quick", "--out", tmp_path) == run(monkeypatch, "--out", tmp_path) == 0
    small = ["toy", "angle", "optima", "convergence", "subsets", "histograms"]
    assert ran == small + small + ["temperature", "scaling"]


@pytest.mark.parametrize("argv, words", [
    (["--experiment", "toys"], ["toys", "did you mean toy?"]),
    (["--seeds", "1"], ["--seeds 1", ">= 2"]),
    (["--lr", "0"], ["--lr 0", "> 0"]),
    (["--device", "tpu9"], ["tpu9", "cpu"]),
    (["--stepz", "9"], ["--stepz", "did you mean --steps?"]),
    (["--experiment", "histograms", "--embeddings", "nowhere.npz"], ["nowhere.npz", "NAME_u"]),
    (["--experiment", "histograms", "--embeddings", "text.npz"], ["text.npz", "NAME_u"]),
    (["--experiment", "histograms", "--embeddings", "names.npz"], ["x (80, 4)"]),
    (["--experiment", "histograms", "--embeddings", "shapes.npz"], ["(70, 4)"]),
    (["--experiment", "histograms", "--embeddings", "nan.npz"], ["NaN"]),
    (["--out", "text.npz/out"], ["text.npz", "give a folder"]),
    (["--experiment", "histograms", "--lr", "1e39", "--float32"], ["histograms", "NaN"]),
])
def test_bad_input_is_one_line(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = np.ones((80, 4))
    (tmp_path / "text.npz").write_text("no archive")
    np.savez("names.npz", x=good)
    np.savez("shapes.npz", u=good, v=good[:70])
    np.savez("nan.npz", u=good, v=good * np.nan)
    assert run(monkeypatch, *SMALL, "--experiment", "toy", "--out", tmp_path / "out", *argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("synthetic.py: error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err
