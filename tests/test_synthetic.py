"""Tests of theory.py and synthetic.py: closed forms, gradients, where training ends, and verdicts.

    python -m pytest tests/test_synthetic.py
"""
import errno
import itertools
import json
import math
import os
import sys

import matplotlib.pyplot
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import cli
import synthetic
from model import infonce
from samplers import all_batches
from test_samplers_devices import GPU
from theory import (METHODS, claim, descend, distance, evaluations, first_steps, growth, interval,
                    least_matching, nearest, optimum, schedule, speedup, start, toy_curves, train)

F64 = {"dtype": torch.float64}
pytestmark = pytest.mark.usefixtures("one_thread")  # tensors this small gain nothing from a second


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(gram: torch.Tensor) -> torch.Tensor:
    """Rows with these inner products, [1, n, n]."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp(min=0).sqrt())[None]


def polytope(n: int, seed: int) -> torch.Tensor:
    """The cross-polytope in n / 2 dimensions, turned, its points dealt at random, [1, n, n / 2]."""
    turn = torch.linalg.qr(torch.randn(n // 2, n // 2, generator=seeded(seed), **F64))[0]
    return torch.cat([turn, -turn])[torch.randperm(n, generator=seeded(seed + 1))][None]


# ---------------------------------------------------------------------------- closed forms
@pytest.mark.parametrize("n", [4, 8, 16])
def test_closed_forms_and_distances(n):
    gram, least = optimum(n, 2 * n)
    u = points(gram)
    assert infonce(u, u).item() == pytest.approx(least, abs=1e-12)
    assert distance(u, u).item() < 1e-7
    least = optimum(n, n // 2)[1]
    for seed in range(5):
        x = polytope(n, seed)
        assert infonce(x, x).item() == pytest.approx(least, abs=1e-12)
        assert distance(x, x).item() < 1e-6
    x = points(optimum(n, n // 2)[0])
    assert infonce(x, x).item() == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize("n", [4, 6, 8])
def test_matching_against_all_matchings(n):
    def matchings(left):
        if not left:
            yield []
        for j in left[1:]:
            for rest in matchings([x for x in left[1:] if x != j]):
                yield [(left[0], j), *rest]
    cost = torch.randn(20, n, n, generator=seeded(), **F64)
    cost = (cost + cost.mT).requires_grad_()
    found = least_matching(cost)
    least = torch.stack([sum(cost[:, i, j] for i, j in m) for m in matchings(list(range(n)))]).min(0).values
    torch.testing.assert_close(found, least)
    pairs = torch.autograd.grad(found.sum(), cost)[0]
    assert set(pairs.unique().tolist()) == {0, 1} and (pairs.triu(1) == pairs).all()
    assert ((pairs + pairs.mT).sum(1) == 1).all()
    torch.testing.assert_close((pairs * cost).sum((1, 2)), least)
    u, v, _ = start(20, n, n // 2, seed=1)
    s, eye = u @ v.mT, torch.eye(n, **F64)
    partners = [dict(m) | {j: i for i, j in m} for m in matchings(list(range(n)))]
    every = [(s - eye + eye[[x[i] for i in range(n)]]).flatten(1).norm(dim=1) for x in partners]
    torch.testing.assert_close(distance(u, v), torch.stack(every).min(0).values)


# ---------------------------------------------------------------------------- gradient steps
def by_autograd(u, v, batches, lr, temperature=1.0, released=False):
    """The step by autograd, a loop over runs and batches; released: of parameters u, v of any lengths."""
    out = []
    for r in range(len(u)):
        x, y = u[r].clone().requires_grad_(), v[r].clone().requires_grad_()
        a, b = (normalize(x, dim=1), normalize(y, dim=1)) if released else (x, y)
        own = batches if batches.ndim == 2 else batches[r]
        loss = sum(infonce(a[rows] / temperature, b[rows]) for rows in own) / len(own)
        moved = [z.detach() - lr * g for z, g in zip((x, y), torch.autograd.grad(loss, (x, y)))]
        out.append(moved if released else [normalize(z, dim=1) for z in moved])
    return [torch.stack(x) for x in zip(*out)]


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("batches", [
    torch.arange(8)[None], all_batches(8, 3), torch.tensor([[1, 6, 3]]), torch.arange(8).view(4, 2),
    torch.tensor([[[0, 1], [1, 2]], [[7, 3], [7, 0]], [[4, 5], [6, 2]]])])  # a row in two batches
def test_steps_against_autograd(batches, released):
    u, v, lengths = start(3, 8, 5, seed=2)
    x, y = (u * lengths[0], v * lengths[1]) if released else (u, v)
    for _ in range(2):  # in the second step the lengths that the first one left
        x, y = by_autograd(x, y, batches, 0.7, 0.4, released)
        descend(u, v, batches, 0.7, 0.4, lengths if released else None)
        torch.testing.assert_close([u, v], [normalize(x, dim=2), normalize(y, dim=2)], rtol=1e-12, atol=1e-12)
    if released:
        torch.testing.assert_close([*lengths], [x.norm(dim=2, keepdim=True), y.norm(dim=2, keepdim=True)])


def test_training_by_the_released_dynamics():
    u, v, lengths = start(3, 4, 16, seed=0)
    x, y = u * lengths[0], v * lengths[1]
    found = train("full", u, v, 2, 2, 0.5, seeded(), lengths=lengths)
    for step in range(3):
        torch.testing.assert_close(found[:, step], distance(normalize(x, dim=2), normalize(y, dim=2)))
        x, y = by_autograd(x, y, torch.arange(4)[None], 0.5, released=True)


# ---------------------------------------------------------------------------- where training ends
@pytest.mark.parametrize("method, steps", [("full", 400), ("ncb", 2500), ("fixed", 1500)])
def test_where_training_ends(method, steps):
    u, v, _ = start(8, 8, 16, seed=0)
    distances = train(method, u, v, 2, steps, 0.5, seeded(), every=steps)
    assert distances.shape == (8, 2) and (distances[:, 0] > 1).all()
    pairs, own = torch.arange(8).view(4, 2), 2 * math.log(1 + math.exp(-2))
    if method == "fixed":
        assert (distances[:, 1] > 1).all() and (infonce(u[:, pairs], v[:, pairs]) - own).abs().max() < 1e-6
    else:
        assert (distances[:, 1] < 1e-3).all() and (infonce(u, v) - optimum(8, 16)[1]).abs().max() < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_methods_choose_valid_batches_and_the_seed_decides(method):
    def taken(seed):
        u, v, _ = start(3, 8, 6, seed=0)
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
    scored = {"osgd-direct": 56, "osgd-replacement": 8, "osgd": 8, "spectral": 2}.get(method, 0)
    assert evaluations(method, 8, 2) == first[0][0].numel() + scored
    if method in ("sgd", "spectral"):  # every sample once in an epoch
        assert all(torch.cat([x[r].flatten() for x in first[:4]]).unique().numel() == 8 for r in range(3))


@pytest.mark.parametrize("method", synthetic.CHOOSING)
def test_chosen_batches_are_harder_than_random_ones(method):
    u, v, _ = start(400, 8, 16, seed=6)

    def loss(method: str) -> float:  # of the first batches
        batches = next(schedule(method, u, v, 2, 1.0, seeded()))[:, 0, :, None].expand(-1, -1, 16)
        return infonce(u.gather(1, batches), v.gather(1, batches)).mean().item()
    assert loss(method) > loss("sgd") + 0.1


def test_losses_against_the_angle_by_a_plain_loop():
    corners = [(math.cos(math.radians(36 * i)), math.sin(math.radians(36 * i))) for i in range(10)]

    def loss(u: list, v: list) -> float:
        s = [[math.exp(a[0] * b[0] + a[1] * b[1]) for b in v] for a in u]
        each = [math.log(sum(s[i]) * sum(row[i] for row in s) / s[i][i] ** 2) for i in range(len(u))]
        return sum(each) / len(each)
    curves = synthetic.angle(1, 1, None, {"kind": F64})[1][0]
    for angle, full, ncb, fixed in list(zip(*curves.values()))[::203]:
        u = [(math.cos(math.radians(angle)), math.sin(math.radians(angle))), *corners[1:]]
        of = {(i, j): loss([u[i], u[j]], [corners[i], corners[j]])
              for i, j in itertools.combinations(range(10), 2)}
        assert full == pytest.approx(loss(u, corners), abs=1e-12)
        assert ncb == pytest.approx(sum(of.values()) / 45, abs=1e-12)
        assert fixed == pytest.approx(sum(of[i, i + 1] for i in range(0, 10, 2)) / 5, abs=1e-12)


def test_toy_case():
    theta, excess = toy_curves("osgd-direct", 1, 200, 0.5, 1e-3, seeded(), least=30)
    assert theta.shape == (1, 31) and theta[0, 0] == pytest.approx(10) and excess[0, 0] > 0.3
    assert [first_steps(excess, t).item() for t in (0.1, 0.01, 1e-3)] == [7, 10, 10]
    assert theta[0, 10] == pytest.approx(45, abs=1)
    slow = toy_curves("sgd-replacement", 300, 1500, 0.5, 1e-2, seeded())[1]
    assert math.inf > first_steps(slow, 1e-1).mean() > 3 * 7
    assert math.inf > first_steps(slow, 1e-2).mean() > 4 * 10


# ---------------------------------------------------------------------------- verdicts
def test_verdicts_follow_from_the_data():
    g = np.random.default_rng(0)
    near, far, between = g.normal(0.01, 0.003, 40), g.normal(0.9, 0.1, 40), g.normal(0.05, 0.05, 40)

    def verdict(measured, allowed=(0, 0.05)) -> str:
        return claim("", measured, allowed, "")["verdict"]
    assert [verdict(x) for x in (near, far, between)] == ["holds", "does not hold", "not settled"]
    assert [verdict(x) for x in (0.05, 0.06, (math.nan,) * 3)] == ["holds", "does not hold", "not settled"]
    assert verdict((1.2, 1.0, 1.5), synthetic.ABOVE_1) == "not settled"
    assert claim("", near, (0, 0.05), "")["measured_interval"] == interval(near)[1:]
    small, large = (2.0, 1.8, 2.2), (6.0, 5.0, 7.0)
    pairs = (small, large), (large, small), (large, (6.5, 5.0, 7.0))
    assert [growth("", *x, "")["verdict"] for x in pairs] == ["holds", "does not hold", "not settled"]


def test_an_experiment_contradicted_by_its_data_says_so(monkeypatch):
    """subsets, also on an optimum that no training reaches. That a balanced design suffices is our claim."""
    given = 2, 100, None, dict(seed=0, lr=2.0, kind={})
    every, alone, _, design = synthetic.subsets(*given)[0][-4:]
    assert [x["verdict"] for x in (every, alone, design)] == ["holds"] * 3 and design["asked_by"] == "us"
    assert every["claim"].startswith("B = 4: all 70") and "balanced design, 14" in design["claim"]
    monkeypatch.setattr(synthetic, "optimum", lambda *x: (None, optimum(*x)[1] - 0.5))
    assert [synthetic.subsets(*given)[0][i]["verdict"] for i in (-4, -1)] == ["does not hold"] * 2
    threes = [three for plane in synthetic.PLANES for three in itertools.combinations(plane, 3)]
    assert sorted(threes) == list(itertools.combinations(range(8), 3))  # each once


def test_intervals_and_leads():
    g = np.random.default_rng(1)
    found = [interval(g.normal(3, 1, 30)) for _ in range(300)]
    assert 0.88 < np.mean([low <= 3 <= high for _, low, high in found]) < 0.98
    distances = torch.tensor([[3.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0], [0.5, 9.0, 9.0, 9.0]])
    assert first_steps(distances, 1.0).tolist() == [2, math.inf, 0]
    falling = torch.tensor([[9.0, 4.0, 2.0, 1.0]]).repeat(4, 1)
    assert nearest(falling + 0.32, 0.05) == 1.35
    assert nearest(torch.cat([falling, falling[:1] + 2]), 0.1) == 1  # one run of five stays away
    assert nearest(torch.cat([falling, falling[:3] + 2]), 0.1) == 3  # three of seven do
    fast, never = falling[:, [0, 2, 2, 3]], falling + 9
    assert speedup(falling, fast, 2.0) == (2, 2, 2) and speedup(falling, never, 2.0) == (0, 0, 0)
    assert speedup(never, fast, 2.0)[0] == math.inf and math.isnan(speedup(never, never, 2.0)[0])


# ---------------------------------------------------------------------------- the command
def run(monkeypatch, *argv) -> int:
    monkeypatch.setattr(sys, "argv", ["synthetic.py", *map(str, argv)])
    return cli.run(synthetic.main, "synthetic.py")


SMALL = "--quick", "--seeds", 2, "--steps", 3


@pytest.mark.parametrize("name", synthetic.EXPERIMENTS)
def test_every_experiment_writes_its_record(name, tmp_path, capsys, monkeypatch):
    argv = *SMALL, "--experiment", name, "--out", tmp_path / "out"
    assert run(monkeypatch, *argv) == 0
    printed, text = capsys.readouterr().out, (tmp_path / f"out/{name}.json").read_text()
    record = json.loads(text)
    assert {"knobs", "command", "commit", "versions", "device", "numbers", "seconds"} <= record.keys()
    assert not any(word in text + printed.replace("–", "") for word in ("NaN", "nan", "Infinity", " inf"))
    assert record["claims"] and {c["asked_by"] for c in record["claims"]} <= {"paper", "us"}
    for c in record["claims"]:
        assert c["claim"] in printed and c["verdict"] in ("holds", "does not hold", "not settled")
    files = sorted((tmp_path / "out").iterdir())
    assert [x.name for x in files] == [f"{name}.{x}" for x in ("json", "pdf", "png")]
    assert files[2].stat().st_size > 5000


@pytest.mark.parametrize("name", synthetic.EXPERIMENTS)
def test_experiments_repeat_also_on_a_gpu_and_tell_how_far_they_are(name, monkeypatch):
    told = []
    monkeypatch.setattr(synthetic, "progress", lambda _, total, unit: lambda done: told.append(done / total))
    u = torch.randn(2, 96, 8, generator=seeded())
    knobs = {"seed": 0, "lr": 0.5, "quick": True, "pairs": {"given": (*u, None)}}

    def numbers(device: str) -> str:
        kind = {"dtype": torch.float32, "device": torch.device(device)}
        *found, figure = synthetic.EXPERIMENTS[name][0](2, 3, seeded(), knobs | {"kind": kind})
        matplotlib.pyplot.close(figure)
        return repr(found)
    with GPU():
        found = numbers("cuda")
    assert found == numbers("cpu")
    if name not in ("toy", "angle"):
        assert told[-1] == pytest.approx(1) and np.diff(told).max() < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_float32_stays_and_differs_by_its_rounding(method):
    found = []
    for dtype in torch.float32, torch.float64:
        u, v, lengths = start(4, 8, 4, 0, dtype)
        found.append(train(method, u, v, 2, 6, 0.5, seeded(), lengths=lengths))
        assert {x.dtype for x in (u, v, *lengths, found[-1])} == {dtype}
    assert 0 < (found[0] - found[1]).abs().max() < 1e-4


def test_histograms_of_given_embeddings(tmp_path, monkeypatch):
    (z, w), noise = torch.randn(2, 40, 8, generator=seeded()), torch.randn(2600, 8, generator=seeded(1))
    many = z.repeat(65, 1)
    np.savez(tmp_path / "e.npz", u=many, v=many + 0.1 * noise, few_u=w.repeat(2, 1), few_v=w.repeat(2, 1))
    argv = *SMALL, "--experiment", "histograms", "--embeddings", tmp_path / "e.npz", "--out", tmp_path
    assert run(monkeypatch, *argv) == 0
    record = json.loads((tmp_path / "histograms.json").read_text())
    *_, given, few = record["numbers"]
    assert [x["set"] for x in (given, few)] == ["embeddings", "few"] and record["knobs"]["embeddings"]
    assert [len(x["random"]) for x in (given, few)] == [2, 1]  # windows of at most 1,280
    assert min(given["spectral"]) > max(given["random"]) + 0.5
    assert any(x["claim"] == "few: spectral batches harder than random ones" for x in record["claims"])


def test_quick_leaves_out_what_it_cannot_settle(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(synthetic, "run", lambda name, knobs, out: ran.append((name, knobs["kind"]["dtype"])))
    argv = "--out", tmp_path, "--device", "auto"
    assert run(monkeypatch, "--quick", "--float32", *argv) == run(monkeypatch, *argv) == 0
    small = "toy", "angle", "optima", "convergence", "subsets", "histograms"
    assert ran == [(x, torch.float32) for x in small] + [
        (x, torch.float64) for x in (*small, "temperature", "scaling")]


def lost(kind: str):
    """A stdout behind which the disk is full, or of `| head` that has ended."""
    if kind == "full":
        return open("/dev/full", "w", buffering=1)
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", buffering=1)


@pytest.mark.parametrize("kind", ["full", "pipe"])
def test_lost_output_costs_no_results(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "EXPERIMENTS", dict.fromkeys("ab", synthetic.EXPERIMENTS["angle"]))
    monkeypatch.setattr(cli, "save_figure", lambda figure, path: None)  # which takes seconds
    monkeypatch.setattr(sys, "stdout", lost(kind))
    assert run(monkeypatch, *SMALL, "--out", tmp_path) == 0
    assert all(json.loads((tmp_path / f"{x}.json").read_text())["claims"] for x in "ab")


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    argv = *SMALL, "--experiment", "angle", "--out", tmp_path
    monkeypatch.setattr(cli, "save_figure", lambda figure, path: None)
    assert run(monkeypatch, *argv) == 0
    before = (tmp_path / "angle.json").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    assert run(monkeypatch, *argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("synthetic.py: error: cannot write ") and err.count("\n") == 1
    assert "No space left on device; free some space" in err
    assert [x.read_bytes() for x in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize("argv, words", [
    (["--out", "/proc", "--experiment", "angle"], ["cannot write /proc/angle.png", "another folder"]),
    (["--experiment", "toys"], ["toys", "did you mean toy?"]), (["--seeds", "1"], ["--seeds 1", ">= 2"]),
    (["--lr", "0"], ["--lr 0", "> 0"]), (["--out", "file/out"], ["file", "give a folder"]),
    (["--device", "tpu"], ["--device tpu", "give cpu, cuda or auto"]),
    (["--embeddings", "file"], ["--embeddings file", "give a .npz with arrays NAME_u"]),
    (["--embeddings", "few.npz"], ["x has 63 pairs of at least 64"]),
    (["--embeddings", "nan.npz"], ["64 of 64 rows with NaN"])])
def test_bad_input_is_one_line(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for name, x in ("few", np.ones((63, 2))), ("nan", np.full((64, 2), np.nan)):
        np.savez(tmp_path / name, x_u=x, x_v=x)
    assert run(monkeypatch, *SMALL, *argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("synthetic.py: error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err
