"""Tests of compare.py on made-up scores and runs, where the difference is known.  Run: pytest
tests/test_compare.py"""
import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

import compare
import train
from test_retrieval import refusal

KNOBS = {name: default for name, (default, *_) in train.KNOBS.items()} | {
    "limit": 64, "image_size": 32, "batch_size": 32, "lr": 0.4243, "epochs": 1}


@pytest.mark.parametrize("seeds", [2, 3, 6])
@pytest.mark.parametrize("luck", [0, 0.02, 0.1])
def test_intervals_cover_the_truth(seeds, luck):
    """Of 95 % intervals that are over seeds and images at once, no fewer hold what is true; unpaired as
    well."""
    rng = np.random.default_rng(0)
    hit = np.zeros(2)
    for _ in range(300):
        images = 0.3 * rng.normal(size=300)
        x, y = (images + luck * rng.normal(size=(seeds, 1)) + 0.3 * rng.normal(size=(seeds, 300))
                for _ in range(2))
        hit += [low <= 0 <= high for _, low, high in (compare.interval([x]), compare.interval([x, -y]))]
    assert (hit / 300 > 0.92).all(), hit


def test_intervals_of_means():
    """Against scipy's of seeds that alone differ, of images that alone differ, and of one seed."""
    rng = np.random.default_rng(0)
    seeds = rng.normal(size=(4, 1)) + np.zeros((4, 500))
    images = rng.normal(size=500) + np.zeros((4, 1))
    one = rng.normal(size=(1, 500))
    for x, alone in ((seeds, seeds[:, 0]), (images, images[0]), (one, one[0])):
        ends = scipy.stats.ttest_1samp(alone, 0).confidence_interval()
        np.testing.assert_allclose(compare.interval([x]), [alone.mean(), *ends], rtol=1e-6)
    both = compare.interval([seeds, -images])
    assert both[0] == pytest.approx(seeds.mean() - images.mean())
    halves = [np.diff(compare.interval([x])[1:])[0] for x in (seeds, images)]
    assert both[2] - both[1] == pytest.approx(math.hypot(*halves), rel=1e-6)
    np.testing.assert_allclose(compare.interval([np.ones((3, 7))]), [1, 1, 1])
    assert compare.interval([np.ones((1, 1))]) == (1, 1, 1)
    lucky = rng.normal(size=(3, 500))  # seeds whose means agree by chance say nothing of other images
    lucky -= lucky.mean(1, keepdims=True)
    ends = scipy.stats.ttest_1samp(lucky.mean(0), 0).confidence_interval()
    np.testing.assert_allclose(compare.interval([lucky])[1:], ends, rtol=1e-6)


def test_pairs():
    a, b = {s: np.full(4, s) for s in (1, 2, 3)}, {s: np.full(4, 10.0 * s) for s in (4, 3, 2)}
    assert [x.tolist() for x in compare.difference(a, b)] == [[[-18] * 4, [-27] * 4]]
    far = {s + 7: x for s, x in b.items()}
    assert [len(x) for x in compare.difference(a, far)] == [3, 3]
    assert sum(x.mean() for x in compare.difference(a, far)) == -28
    assert compare.difference(a, {2: np.zeros(4)})[0].tolist() == [[2] * 4]  # the same seed
    assert compare.difference(a, {9: np.zeros(4)})[0].tolist() == [[2] * 4]  # the mean of all


def made_up_run(sampler, seed, log=({"R1": 0.5},), values=None, digest="", **knobs):
    """A run whose log, and scores of a task "two views", are as given."""
    usual = {"epoch": 1.0, "step": 9, "seconds_training": 10.0 + seed, "seconds_selecting": 2.0}
    run = compare.Run(Path(f"{sampler}-{seed}"), {**KNOBS, "sampler": sampler, "seed": seed, **knobs}, {},
                      [{**usual, **line} for line in log])
    if values is None:
        return run
    task = {"images": len(values["R1"]), "images_digest": digest, "values": values, "parts": 1,
            "scores": {name: {"mean": x.mean()} for name, x in values.items()}}
    return run._replace(scores={"two views": task})


def test_groups_have_short_names():
    kinds = [("random", {}), ("random", {"objective": "dcl"}), ("osgd", {"k": 32, "q": 8}),
             ("refined", {"embeddings": "free", "k": 32}), ("refined", {"embeddings": "fresh", "k": 32}),
             ("refined", {"embeddings": "fresh", "k": 32, "select_after": 3}),
             ("refined", {"embeddings": "free", "k": 16, "batch_size": 64, "lr": 0.6}),
             ("random", {"batch_size": 128, "lr": 0.85}),
             ("random", {"batch_size": 128, "lr": 1.7}),
             ("spectral-released", {"k": 40}), ("spectral-released", {"k": 40, "embeddings": "list"})]
    runs = [made_up_run(sampler, seed, **knobs, out_dir=str(seed), step=seed) for seed in (0, 1)
            for sampler, knobs in kinds]
    groups = compare.group_runs(runs)
    usual = "batch-size 32"
    assert list(groups) == [
        f"random, {usual}", f"random, dcl, {usual}", f"osgd, {usual}", f"refined, free, {usual}",
        f"refined, fresh, {usual}", f"refined, fresh, {usual}, select-after 3",
        "refined, free, batch-size 64", "random, batch-size 128, lr 0.85",
        "random, batch-size 128, lr 1.7", f"spectral-released, {usual}", f"spectral-released, list, {usual}"]
    assert groups[f"random, dcl, {usual}"] == [1, 12]

    def first(name):
        return next(iter(compare.baseline_first(groups, runs, name)))
    for name, expected in (None, f"random, {usual}"), (2 * (f"random, dcl, {usual}",)):
        assert first(name) == expected
    for name in [x for x in groups if x.startswith("random, ") and "dcl" not in x]:
        del groups[name]
    assert first(None) == f"random, dcl, {usual}"
    with pytest.raises(compare.Stop, match="did you mean random, dcl, batch"):
        first("random dcl batch-size 32")
    with pytest.raises(compare.Stop, match="osgd-1 and osgd-1 have the same settings and seed"):
        compare.group_runs(runs + [made_up_run("osgd", 1, k=32, q=8)])
    short = made_up_run("osgd", 2, [{"step": 4, "R1": 0}], k=32, q=8, max_steps=4)  # so no seed of theirs
    assert list(compare.group_runs([runs[2], runs[13], short])) == ["osgd, steps 9", "osgd, steps 4"]
    rates = [made_up_run("osgd", 1, lr=0.1), made_up_run("spectral", 1, lr=2 / 3)]
    assert list(compare.group_runs(rates)) == ["osgd, lr 0.1", "spectral, lr 0.6667"]
    new = made_up_run("osgd", 1, k=32, q=8, colour="blue")  # of a commit that has more
    assert list(compare.group_runs([runs[13], new])) == ["osgd", "osgd, blue"]


def test_table_says_what_the_interval_is_over():
    rng = np.random.default_rng(0)
    hard = 0.4 * rng.random(300)  # images differ, for all runs alike
    kinds = [(x, s, p) for x, p in (("random", 0.3), ("osgd", 0.7), ("spectral", 0.3)) for s in (0, 1, 2)]
    runs = [made_up_run(sampler, seed, values={
        "R1": (rng.random(300) < p - 0.2 + hard).astype(float), "mrr": np.full(300, p),
        "R1_inner_product": np.full(300, p / 2)}) for sampler, seed, p in (*kinds, ("refined", 0, 0.7))]
    groups = compare.group_runs(runs)
    rows = {row["group"]: row for row in compare.table("two views", runs, groups)}
    assert rows["random"]["verdict"] == "baseline" and rows["osgd"]["verdict"] == "better"
    assert rows["spectral"]["verdict"] == "not settled"  # no difference
    assert rows["refined"]["verdict"] == "not settled"  # one seed
    assert rows["refined"]["difference_interval"][0] > 0.2
    mean = {x: np.mean([run.scores["two views"]["values"]["R1"] for run in runs if run.knobs["sampler"] == x])
            for x in groups}
    assert {x: row["R1"] for x, row in rows.items()} == pytest.approx(mean)
    low, high = rows["osgd"]["difference_interval"]
    assert low < rows["osgd"]["difference"] < high
    assert rows["osgd"]["difference"] == pytest.approx(mean["osgd"] - mean["random"])
    assert rows["osgd"]["seconds_training"] == 11 and rows["osgd"]["seconds_selecting"] == 2
    assert rows["random"]["mrr_interval"] == pytest.approx([0.3, 0.3])
    text = compare.table_text(list(rows.values())).splitlines()
    body = {line.split()[0]: line for line in text if line.split()[0] in rows}
    assert f"{100 * mean['osgd']:.1f} ±" in body["osgd"]
    assert f"{100 * rows['osgd']['difference']:+.1f} ±{50 * (high - low):.1f}" in body["osgd"]
    assert body["osgd"].split()[-5:] == ["better", "13", "(2)", "70.0", "35.0"]
    assert " 1* " in body["refined"] and " 3 " in body["osgd"] and "over images only" in text[-1]
    by_severity = ["R1", *(f"severity_{s}" for s in range(1, 6)), "mrr"]
    for scores in ["R1", "R5", "R10", "mrr", "R1_inner_product"], by_severity:
        row = rows["osgd"] | {"group": 35 * "x", "seeds": 9, "verdict": "not settled"} | {
            name: 0.999 for name in scores} | {"R1_interval": [0.5, 1]}
        shown = {k: x for k, x in row.items() if k not in compare.NAMES or k in scores}
        assert max(map(len, compare.table_text([shown]).splitlines())) <= 110


def test_a_verdict_takes_twenty_images():
    for n, word in (19, "not settled"), (20, "better"):
        runs = [made_up_run(sampler, seed, values={"R1": np.repeat([low, 1.0], [n // 2, n - n // 2])})
                for sampler, lows in (("random", (0, 0, 0)), ("osgd", (0.8, 1, 1)))
                for seed, low in enumerate(lows)]
        row = compare.table("two views", runs, compare.group_runs(runs))[1]
        assert row["difference_interval"][0] > 0 and row["verdict"] == word
        assert row["R1_interval"][1] == 1  # no more than a share can be


def along(runs, groups=None):
    return compare.curves(runs, groups or compare.group_runs(runs))


def test_cost_to_a_target():
    y = np.array([0.1, 0.3, 0.5])
    assert [compare.first_at(x, y, [10, 20, 30]) for x in (0.4, 0.1, 0.6)] == [pytest.approx(25), 10, None]

    def log(rate, factor=1):
        return [{"step": 10 * e, "seconds_training": (6 * factor - 1.0) * e, "seconds_selecting": 1.0 * e,
                 "R1": rate * e} for e in range(1, 11)]
    runs = [made_up_run(x, s, log(rate + 0.001 * s)) for x, rate in (("random", 0.04), ("osgd", 0.08))
            for s in (0, 1, 2)] + [made_up_run("spectral", 0, log(0.01))]
    groups = compare.group_runs(runs)
    found = along(runs)
    short = along([run._replace(log=run.log[:4 + run.knobs["seed"]]) for run in runs], groups)["osgd"]
    assert short["images"] == [320, 640, 960, 1280]  # the epochs that all have
    assert short["R1"][2] == pytest.approx([0.082 * e for e in range(1, 5)])
    rows = {row["group"]: row for row in compare.cost(found, None)}
    assert rows["random"]["target"] == pytest.approx(0.41)
    assert rows["random"]["images"] == 3200 and rows["random"]["images_ratio"] == 1
    assert rows["osgd"]["images_ratio"] == rows["osgd"]["images"] / 3200 == pytest.approx(0.41 / 0.81)
    assert rows["osgd"]["seconds"] == pytest.approx(60 * 0.41 / 0.81)  # of training and selecting
    assert rows["osgd"]["gain"] == pytest.approx(0.4) and rows["random"]["gain_interval"] == [0, 0]
    assert rows["osgd"]["gain_interval"] == pytest.approx([0.4, 0.4])  # paired by seed: the same luck in both
    others = {**found, "osgd": {**found["osgd"], "seeds": [3, 4, 5]}}
    worst, best = compare.cost(others, None)[1]["gain_interval"]  # two means of three, of spread 0.01
    assert (best - worst) / 2 == pytest.approx(4.302653 * 0.01 * (2 / 3) ** 0.5, rel=1e-5)
    assert [rows["spectral"][x] for x in ("images", "images_ratio", "gain_interval")] == [None] * 3
    text = {line.split()[0]: line for line in compare.cost_text(list(rows.values())).splitlines()}
    assert text["spectral"].split() == ["spectral", "1", "never", "never", "-30.0"]  # of seed 0
    assert text["osgd"].split() == ["osgd", "3", "1,620", "0.51", "30", "0.51", "+40.0", "±0.0"]
    assert text["random"].split() == ["random", "3", "3,200", "1.00", "60", "1.00", "+0.0", "±0.0"]
    for factor, gain in ((2, 0.81 / 2 - 0.41), (16, None)):  # more seconds a step: none is done in time
        slow = [made_up_run("osgd", s, log(0.08 + 0.001 * s, factor)) for s in (0, 1, 2)]
        assert compare.cost(along(runs[:3] + slow), None)[1]["gain"] == (gain and pytest.approx(gain))
    higher = {row["group"]: row for row in compare.cost(found, 0.6)}  # the baseline's whole run counts
    assert higher["random"]["images"] is None and higher["osgd"]["images_ratio"] == pytest.approx(0.6 / 0.81)


def test_whole_schedules():
    """Ends of 6, 12 and 24 epochs: random's at 60, 120, 240 s; osgd's as good in 0.4 of these seconds."""
    def run(sampler, epochs, seed, second):
        log = [{"epoch": e, "step": e, "seconds_training": second * e, "seconds_selecting": 0.0,
                "R1": math.log2(epochs) / 10 * e / epochs + seed / 100} for e in range(1, epochs + 1)]
        return made_up_run(sampler, seed, log, epochs=epochs)
    runs = [run(sampler, epochs, seed, second) for sampler, lengths, second in (
        ("random", (6, 12, 24), 10), ("osgd", (6, 12, 48), 4), ("refined", (12,), 1)) for epochs in lengths
        for seed in (0, 1)]
    lines = compare.schedules(runs, compare.group_runs(runs))
    assert list(lines) == ["random", "osgd", "refined"] and len(lines["refined"]) == 1
    assert [x["seconds"] for x in lines["random"]] == [60, 120, 240]
    assert [x["ratio"] for x in lines["random"]] == [1, 1, 1]
    assert lines["osgd"][1]["R1"] == pytest.approx([math.log2(12) / 10, math.log2(12) / 10 + 0.01])
    assert [x["ratio"] for x in lines["osgd"]] == [0.4, 0.4, None]  # the last is better than any of random's
    rows = {line.split("  ")[0]: line.split() for line in compare.schedules_text(lines).splitlines()}
    assert rows["osgd, epochs 12"][-4:] == ["2", "36.3", "48", "0.40"]
    assert rows["osgd, epochs 48"][-1] == "192"
    cut = [x._replace(log=x.log[:e]) for x in runs[:2] for e in (3, 5)]
    cut = [x._replace(knobs=x.knobs | {"max_steps": len(x.log)}) for x in cut]
    older = [x._replace(knobs={k: v for k, v in x.knobs.items() if k != "lowest"}) for x in runs[2:4]]
    again = compare.schedules(some := [*runs[:2], *older, *cut], compare.group_runs(some))
    assert [x["seconds"] for ends in again.values() for x in ends] == [60, 120]  # no cut one, one line
    others = [x._replace(knobs=x.knobs | {"lr": x.knobs["epochs"] / 10}) for x in runs]
    for none in runs[:2] + runs[6:8], others:  # one schedule of each; of other settings
        assert compare.schedules(none, compare.group_runs(none)) == {}


def test_equal_ends_can_be_drawn():
    r = [11 / 20] * 5  # whose mean of percentages rounds below them
    assert (100 * np.array(r)).mean() != 100 * r[0]
    compare.draw_schedules({"random": [{"seconds": 1.0, "R1": r}, {"seconds": 2.0, "R1": r}]})


def test_images_are_those_of_all_processes():
    runs = [made_up_run("random", 0), made_up_run("random", 0, processes=2)]
    found = compare.curves(runs, compare.group_runs(runs))
    assert {name: x["images"] for name, x in found.items()} == {
        "random": [9 * 32], "random, processes 2": [9 * 64]}


# -------------------------------------------------------------------------------- the file
def test_files_that_are_refused(tmp_path, capsys, monkeypatch):
    def refused(*runs, change=lambda x: x):
        path = tmp_path / "x.json.gz"
        path.write_bytes(change(compare.export(runs)))
        return refusal(capsys, monkeypatch, path, "--out", tmp_path, script=compare)
    values = {"R1": np.ones(3)}
    a, b = (made_up_run(x, 0, values=values, digest=x) for x in ("random", "osgd"))
    assert "different images" in refused(a, b)
    assert "image_size" in refused(a, made_up_run("osgd", 0, values=values, image_size=64))
    assert "same settings and seed" in refused(a, a._replace(log=[{**a.log[0], "R1": 0.4}]))
    for change in (lambda x: x[:-9], lambda x: b"text", lambda x: gzip.compress(b'{"runs": [{}]}')):
        assert "give a file that retrieval.py --export wrote" in refused(a, change=change)
    assert "No such file" in refusal(capsys, monkeypatch, tmp_path / "absent", script=compare)
    assert "name a file" in refusal(capsys, monkeypatch, script=compare)
    assert "did you mean" in refusal(capsys, monkeypatch, "x", "--targt", "1", script=compare)


def test_a_run_of_two_files_counts_once(tmp_path, capsys):
    values, files = {"R1": np.ones(30)}, [tmp_path / "a", tmp_path / "b"]
    runs = [made_up_run("random", seed, values=values)._replace(made_by={"device": f"card {seed // 2}"})
            for seed in range(3)]
    more = [x._replace(scores=x.scores | {"more": x.scores["two views"]}) for x in runs]
    for file, those in zip(files, (more[:2], [runs[1], more[2]])):
        file.write_bytes(compare.export(those))
    compare.main([*map(str, files), "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("\nrandom      3  100.0") == 2
    assert "seconds are of card 0 and card 1: do not compare them" in out
