"""Tests of theory.py and synthetic.py: closed forms, gradients, where training ends, and verdicts.

    python -m pytest test_synthetic.py
"""
import itertools
import json
import math

import numpy as np
import pytest
import torch

import report
import synthetic
import theory
from model import infonce
from samplers import all_batches
from theory import (METHODS, Matching, claim, cross_polytope, cross_polytope_loss, descend, distance, etf, etf_loss, evaluations,
                    first_steps, growth, interval, loss_gradient, schedule, speedup, start, train)

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
    """The cross-polytope in n / 2 dimensions, turned, its points dealt out at random; and each point's partner."""
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
    assert etf_loss(n) == pytest.approx(2 * math.log(1 + (n - 1) * math.exp(-n / (n - 1))), abs=1e-12)
    for b in (2, 3):
        batches = all_batches(n, b)
        assert infonce(u[0][batches], u[0][batches]).mean().item() == pytest.approx(etf_loss(n, b), abs=1e-9)
    assert etf_loss(n, 2) == pytest.approx(2 * math.log(1 + math.exp(-n / (n - 1))), abs=1e-12)
    assert infonce(u / 0.3, u).item() == pytest.approx(etf_loss(n, temperature=0.3), abs=1e-9)
    x, _ = random_polytope(n, 0)
    assert infonce(x, x).item() == pytest.approx(cross_polytope_loss(n), abs=1e-12)
    assert cross_polytope_loss(n) == pytest.approx(2 * math.log((math.e + math.exp(-1) + n - 2) / math.e), abs=1e-12)
    assert cross_polytope_loss(n) > etf_loss(n)
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
    assert distance(u, u, matching).item() == pytest.approx(math.sqrt(n * (1 - 1 / (n - 1)) ** 2 + n * (n - 2) / (n - 1) ** 2))
    few = Matching(4)  # brute force over the three matchings of four samples
    u, v = start(30, 4, 3, seed=1)
    partners = torch.tensor([[1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]])
    every = torch.stack([(u @ v.mT - cross_polytope(p).double()).flatten(1).norm(dim=1) for p in partners])
    torch.testing.assert_close(distance(u, v, few), every.min(0).values)


# ---------------------------------------------------------------------------- gradient steps
def by_autograd(u, v, batches, lr, temperature=1.0, weights=None):
    """The step by autograd, a loop over runs and batches."""
    out = []
    for r in range(len(u)):
        x, y = u[r].clone().requires_grad_(), v[r].clone().requires_grad_()
        own = batches if batches.ndim == 2 else batches[r]
        w = [1 / len(own)] * len(own) if weights is None else weights[r]
        loss = sum(a * infonce(x[b] / temperature, y[b]) for a, b in zip(w, own))
        out.append([torch.nn.functional.normalize(z.detach() - lr * g, dim=1) for z, g in zip((x, y), torch.autograd.grad(loss, (x, y)))])
    return (torch.stack(x) for x in zip(*out))


@pytest.mark.parametrize("batches, weights", [
    (torch.arange(8)[None], None), (all_batches(8, 3), None), (torch.tensor([[1, 6, 3]]), None),
    (torch.tensor([[[0, 1], [1, 2]], [[7, 3], [7, 0]], [[4, 5], [6, 2]]]), None),  # a row in two batches of a run
    (all_batches(8, 2), torch.rand(3, 28, generator=seeded(), **F64)),
    (torch.arange(8).view(4, 2).expand(3, 4, 2), torch.rand(3, 4, generator=seeded(), **F64))])
def test_a_step_against_autograd(batches, weights):
    u, v = start(3, 8, 5, seed=2)
    expected = [*by_autograd(u, v, batches, 0.7, 0.4, weights)]
    descend(u, v, batches, 0.7, 0.4, weights)
    for x, y in zip((u, v), expected):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_chunks_of_batches_are_one_step(monkeypatch):
    one, two = (start(2, 8, 4, seed=3) for _ in range(2))
    descend(*one, all_batches(8, 4), 0.5)
    real = range
    monkeypatch.setattr(theory, "range", lambda a, b, c: real(a, b, 9), raising=False)  # the last of the chunks is smaller
    monkeypatch.setattr(theory, "max", lambda *_: 9, raising=False)
    descend(*two, all_batches(8, 4), 0.5)
    for x, y in zip(one, two):
        torch.testing.assert_close(x, y)


def test_gradient_of_the_logits():
    logits = torch.randn(5, 6, 6, generator=seeded(), requires_grad=True, **F64)
    eye = torch.eye(6, **F64).expand(5, 6, 6)
    torch.testing.assert_close(loss_gradient(logits), torch.autograd.grad(infonce(logits, eye).sum(), logits)[0])


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
    torch.testing.assert_close(infonce(u[:, pairs], v[:, pairs]), torch.full((8, 4), 2 * math.log(1 + math.exp(-2)), **F64), rtol=0, atol=1e-6)
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
        assert 0 <= batches.min() and batches.max() < 8 and (batches.sort(2).values.diff(dim=2) > 0).all() if method != "full" else True
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


def test_toy_case():
    square = synthetic.toy_start(1, **F64)
    assert infonce(square, square).item() > cross_polytope_loss(4) + 0.3
    first, path = synthetic.toy_steps("osgd-direct", 1, 200, 0.5, (1e-1, 1e-2, 1e-3), seeded(), F64, shown=30)
    assert [x.item() for x in first.values()] == [7, 10, 10]
    theta, excess = path[:, 0]
    assert theta[0] == pytest.approx(10) and theta[10] == pytest.approx(45, abs=1) and excess[10] < 1e-3 < excess[9]
    slow, _ = synthetic.toy_steps("sgd-replacement", 300, 1500, 0.5, (1e-1, 1e-2), seeded(), F64)
    assert slow[1e-1].mean() > 3 * 7 and slow[1e-2].mean() > 4 * 10
    never, _ = synthetic.toy_steps("osgd-direct", 1, 50, 0.5, (1e-12,), seeded(), F64)
    assert np.isinf(never[1e-12]).all()


# ---------------------------------------------------------------------------- verdicts
def test_verdicts_follow_from_the_data():
    g = np.random.default_rng(0)
    near, far, between = g.normal(0.01, 0.003, 40), g.normal(0.9, 0.1, 40), g.normal(0.05, 0.05, 40)
    verdicts = [claim("ends at the optimum", interval(x), (0, 0.05), "distance <= 0.05")["verdict"] for x in (near, far, between)]
    assert verdicts == ["holds", "does not hold", "not settled"]
    assert claim("no data", (math.nan,) * 3, (0, 1), "")["verdict"] == "not settled"
    assert growth("grows", (2.0, 1.8, 2.2), (6.0, 5.0, 7.0), "")["verdict"] == "holds"
    assert growth("grows", (6.0, 5.0, 7.0), (2.0, 1.8, 2.2), "")["verdict"] == "does not hold"
    assert growth("grows", (6.0, 5.0, 7.0), (6.5, 5.0, 7.0), "")["verdict"] == "not settled"


def test_experiment_contradicted_by_its_data_says_so(monkeypatch):
    """The claims of `subsets` on an optimum that no training reaches."""
    knobs = dict(quick=True, seeds=2, steps=30, seed=0, lr=0.5, float32=False, device="cpu")
    verdicts = {c["claim"]: c["verdict"] for c in synthetic.subsets(knobs)[0]}
    monkeypatch.setattr(synthetic, "etf_loss", lambda n: etf_loss(n) - 0.5)
    wrong = {c["claim"]: c["verdict"] for c in synthetic.subsets(knobs)[0]}
    every = next(text for text in verdicts if text.startswith("B = 4: all 70"))
    assert wrong[every] == "does not hold" and set(verdicts.values()) <= {"holds", "does not hold", "not settled"}
    assert verdicts["B = 4: fixed disjoint, 2 of 70 batches, ends above it"] == "holds"


def test_intervals_cover_what_they_should():
    g = np.random.default_rng(1)
    inside = [low <= 3 <= high for _, low, high in (interval(g.normal(3, 1, 30), draws=400) for _ in range(300))]
    assert 0.88 < np.mean(inside) < 0.98
    x = np.stack([np.full(9, 40.0), np.full(9, 10.0)], 1)
    assert interval(x, speedup(100)) == (4, 4, 4)
    never = np.full(9, math.inf)
    assert interval(np.stack([never, x[:, 1]], 1), speedup(100))[0] == 10  # a lower bound
    assert interval(np.stack([x[:, 0], never], 1), speedup(100))[0] == 0 and math.isnan(interval(np.stack([never, never], 1), speedup(9))[0])


def test_first_steps():
    distances = torch.tensor([[3.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0], [0.5, 9.0, 9.0, 9.0]])
    assert first_steps(distances, 1.0, every=5).tolist() == [10, math.inf, 0]


# ---------------------------------------------------------------------------- the command
@pytest.mark.parametrize("name", synthetic.EXPERIMENTS)
def test_every_experiment_writes_its_record(name, tmp_path, capsys):
    embeddings = tmp_path / "e.npz"
    np.savez(embeddings, a_u=np.random.default_rng(0).normal(size=(96, 8)), a_v=np.random.default_rng(1).normal(size=(96, 8)))
    argv = ["--quick", "--experiment", name, "--out", str(tmp_path / "synthetic"), "--seeds", "2", "--steps", "3", "--embeddings", str(embeddings)]
    assert synthetic.main(argv) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "synthetic" / f"{name}.json").read_text())
    assert {"knobs", "command", "commit", "versions", "device", "numbers", "claims", "seconds"} <= record.keys()
    assert record["claims"] and all(c["claim"] in printed and c["verdict"] in ("holds", "does not hold", "not settled") for c in record["claims"])
    assert sorted(x.name for x in (tmp_path / "synthetic").iterdir()) == [f"{name}.{x}" for x in ("json", "pdf", "png")]
    assert (tmp_path / "synthetic" / f"{name}.png").stat().st_size > 5000
    first = record["numbers"]
    assert synthetic.main(argv) == 0 and json.loads((tmp_path / "synthetic" / f"{name}.json").read_text())["numbers"] == first
    if name == "histograms":
        assert [x["set"] for x in first][-1] == "a"
    blocks = report.build(tmp_path, tmp_path / "runs")  # and the report reads it
    assert ("h3", name.capitalize()) in blocks and not any("cannot be read" in line for block in blocks if block[0] == "table" for line in block[2])


@pytest.mark.parametrize("argv, words", [
    (["--experiment", "toys"], ["toys", "did you mean toy?"]),
    (["--seeds", "1"], ["--seeds 1", ">= 2"]),
    (["--lr", "0"], ["--lr 0", "> 0"]),
    (["--device", "tpu9"], ["tpu9", "cpu"]),
    (["--stepz", "9"], ["--stepz", "did you mean --steps?"]),
    (["--experiment", "histograms", "--embeddings", "nowhere.npz"], ["nowhere.npz", "NAME_u"]),
])
def test_bad_input_is_one_line(argv, words, tmp_path, capsys):
    argv = ["--quick", "--steps", "1", "--seeds", "2", "--experiment", "toy", "--out", str(tmp_path / "out"), *argv]
    assert synthetic.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("synthetic.py: error: ") and err.count("\n") == 1 and all(word in err for word in words), err


def test_bad_embeddings_and_folders_are_one_line(tmp_path, capsys):
    good, run = np.ones((80, 4)), ["--quick", "--steps", "1", "--seeds", "2", "--experiment", "histograms"]
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "names.npz", x=good)
    np.savez(tmp_path / "shapes.npz", u=good, v=good[:70])
    np.savez(tmp_path / "nan.npz", u=good, v=good * np.nan)
    for name, word in ("text", "NAME_u"), ("names", "x (80, 4)"), ("shapes", "(70, 4)"), ("nan", "NaN"):
        assert synthetic.main([*run, "--out", str(tmp_path / "out"), "--embeddings", str(tmp_path / f"{name}.npz")]) == 2, name
        err = capsys.readouterr().err
        assert word in err and err.count("\n") == 1, err
    (tmp_path / "file").write_text("")
    assert synthetic.main([*run, "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
