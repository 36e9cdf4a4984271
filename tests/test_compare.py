"""Tests of compare.py on made-up scores and runs, where the difference is known.  Run: pytest test_compare.py"""
import math
from pathlib import Path

import numpy as np
import pytest

import compare
import train


def scores(rng, images, seeds, gain=0.0, n=200):
    """Made-up R@1 [n] by seed: images of different difficulty, seeds of different luck, chance."""
    return {s: (rng.random(n) < 1 / (1 + np.exp(-images - gain - 0.1 * rng.normal()))).astype(float) for s in range(seeds)}


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_a_difference_is_found_and_none_is_not(seeds, monkeypatch):
    for name in "DRAWS", "OF_IMAGES":
        monkeypatch.setattr(compare, name, 1000)
    rng = np.random.default_rng(seeds)
    rates = {}
    for gain in (0, 1.5, -1.5):
        words = []
        for draw in range(150):
            images = rng.normal(size=200)
            x, y = scores(rng, images, seeds, gain), scores(rng, images, seeds)
            words.append(compare.verdict(*compare.intervals([compare.difference(x, y)], draw)[0, 1:]))
        rates[gain] = {word: words.count(word) / 150 for word in ("better", "worse", "not settled")}
    assert rates[0]["not settled"] > (0.8 if seeds == 1 else 0.88)  # of one seed nothing is known of other seeds
    assert seeds == 2 or rates[0]["not settled"] < 1  # nor is it always said
    if seeds != 2:  # two seeds tell too little
        assert rates[1.5]["better"] > 0.9 and rates[-1.5]["worse"] > 0.9


def test_pairs_by_image_are_narrower():
    rng = np.random.default_rng(0)
    images = rng.normal(size=400)
    x, y = ({s: images + 0.1 * rng.normal(size=400) for s in range(3)} for _ in range(2))
    apart = {s: rng.permutation(one) for s, one in y.items()}
    paired, unpaired = (np.diff(compare.intervals([compare.difference(x, other)])[0, 1:])[0] for other in (y, apart))
    assert paired < 0.5 * unpaired


def test_intervals_of_means():
    """Against closed forms: Student's t over seeds, the normal over images."""
    rng = np.random.default_rng(0)
    seeds = rng.normal(size=(4, 1)) + np.zeros((4, 500))
    images = rng.normal(size=500) + np.zeros((4, 1))
    one = rng.normal(size=(1, 500))
    found = compare.intervals([[seeds], [images], [one], [seeds, -images]])
    half = [3.1824 * seeds[:, 0].std(ddof=1) / 2, 1.96 * images[0].std() / 500 ** 0.5, 1.96 * one.std() / 500 ** 0.5]
    for (mean, low, high), x, h in zip(found, (seeds, images, one), half):
        assert mean == pytest.approx(x.mean()) and high - mean == pytest.approx(h, rel=0.07) and mean - low == pytest.approx(h, rel=0.07)
    assert found[3, 0] == pytest.approx(seeds.mean() - images.mean())
    np.testing.assert_allclose(compare.intervals([[np.ones((3, 7))]]), [[1, 1, 1]])
    lucky = rng.normal(size=(3, 500))  # seeds whose means agree by chance say nothing of other images
    mean, low, high = compare.intervals([[lucky - lucky.mean(1, keepdims=True)]])[0]
    half = 1.96 * (lucky - lucky.mean(1, keepdims=True)).mean(0).std() / 500 ** 0.5
    assert high - mean == pytest.approx(half, rel=0.1) and mean - low == pytest.approx(half, rel=0.1)


def test_pairs():
    a, b = {s: np.full(4, s) for s in (1, 2, 3)}, {s: np.full(4, 10.0 * s) for s in (4, 3, 2)}
    assert [x.tolist() for x in compare.difference(a, b)] == [[[-18] * 4, [-27] * 4]]
    far = {s + 7: x for s, x in b.items()}
    assert [len(x) for x in compare.difference(a, far)] == [3, 3] and sum(x.mean() for x in compare.difference(a, far)) == -28
    assert compare.difference(a, {2: np.zeros(4)})[0].tolist() == [[2] * 4]  # the same seed
    assert compare.difference(a, {9: np.zeros(4)})[0].tolist() == [[2] * 4]  # the mean of all


def made_up_run(sampler, seed, log=({"step": 9, "R1": 0.5, "seconds_training": 1.0, "seconds_selecting": 0.0},), **knobs):
    template = {name: default for name, (default, *_) in train.KNOBS.items()}
    return compare.Run(Path(f"{sampler}-{seed}"), {**template, "sampler": sampler, "seed": seed, **knobs},
                       {"seconds_training": 10.0 + seed, "seconds_selecting": 2.0}, list(log))


def test_groups_have_short_names():
    kinds = [("random", {}), ("random", {"objective": "hcl"}), ("osgd", {"k": 32, "q": 8}), ("refined", {"embeddings": "free", "k": 32}),
             ("refined", {"embeddings": "fresh", "k": 32}), ("refined", {"embeddings": "fresh", "k": 32, "select_after": 3}),
             ("refined", {"embeddings": "free", "k": 64})]
    runs = [made_up_run(sampler, seed, **knobs, out_dir=str(seed)) for seed in (0, 1) for sampler, knobs in kinds]
    groups = compare.group_runs(runs)
    assert list(groups) == ["random", "random hcl", "osgd", "refined free k 32", "refined fresh", "refined fresh select-after 3",
                            "refined free k 64"]
    assert groups["random hcl"] == [1, 8]
    assert compare.pick_baseline(groups, runs, None) == "random" and compare.pick_baseline(groups, runs, "osgd") == "osgd"
    with pytest.raises(compare.Stop, match="did you mean refined fresh"):
        compare.pick_baseline(groups, runs, "refined fres")
    with pytest.raises(compare.Stop, match="osgd-1 and osgd-1 are runs of the same settings and seed 1"):
        compare.group_runs(runs + [made_up_run("osgd", 1, k=32, q=8)])
    short = made_up_run("osgd", 2, [{**runs[0].log[0], "step": 4}], k=32, q=8, max_steps=4)  # stopped, so no seed of theirs
    assert list(compare.group_runs([runs[2], runs[9], short])) == ["osgd steps 9", "osgd steps 4"]
    old = made_up_run("osgd", 0, k=32, q=8)
    del old.knobs["lowest"], old.knobs["select_after"]  # of a commit that had no such knobs
    assert list(compare.group_runs([runs[9], old]).values()) == [[1, 0]]


def test_table_says_what_the_interval_is_over():
    rng = np.random.default_rng(0)
    runs = [made_up_run(sampler, seed) for sampler in ("random", "osgd", "spectral") for seed in (0, 1, 2)] + [made_up_run("refined", 0)]
    hard = 0.4 * rng.random(300)  # images differ, for all runs alike
    every = [{"R1": (rng.random(300) < p - 0.2 + hard).astype(float), "mrr": np.full(300, p)} for p in (0.3,) * 3 + (0.7,) * 3 + (0.3,) * 3 + (0.7,)]
    groups = compare.group_runs(runs)
    rows = {row["group"]: row for row in compare.table(every, runs, groups, "random")}
    assert rows["random"]["verdict"] == "baseline" and rows["osgd"]["verdict"] == "better"
    assert rows["spectral"]["verdict"] == "not settled" == rows["refined"]["verdict"]  # no difference; one seed
    assert rows["refined"]["difference_interval"][0] > 0.2
    assert rows["osgd"]["difference_over"] == "seeds and images, paired by seed" and rows["refined"]["difference_over"] == "images, paired by seed"
    assert rows["osgd"]["R1"] == pytest.approx(np.mean([x["R1"] for x in every[3:6]]))
    low, high = rows["osgd"]["difference_interval"]
    assert low < rows["osgd"]["R1"] - rows["random"]["R1"] < high
    assert rows["osgd"]["difference"] == pytest.approx(rows["osgd"]["R1"] - rows["random"]["R1"])
    assert rows["osgd"]["seconds_training"] == 11 and rows["osgd"]["seconds_selecting"] == 2
    assert rows["random"]["mrr_interval"] == pytest.approx([0.3, 0.3])
    for n, word in (19, "not settled"), (20, "better"):  # a handful of images settles nothing
        some = [{"R1": np.repeat([low, 1.0], [n // 2, n - n // 2])} for low in (0, 0, 0, 0.8, 1, 1)]
        row = compare.table(some, runs[:6], compare.group_runs(runs[:6]), "random")[1]
        assert row["difference_interval"][0] > 0 and row["verdict"] == word
        assert row["R1_interval"][1] == 1  # no more than a share can be
    text = compare.markdown(list(rows.values()), "random").splitlines()
    assert "over images only" in text[5] and "over images only" not in text[3] and "better" in text[3] and f"{100 * low:+.1f}" in text[3]


def test_cost_to_a_target():
    y = np.array([[0.1, 0.3, 0.5], [0.1, 0.2, 0.2], [0.6, 0.6, 0.7]])
    x = np.array([[10.0, 20, 30]] * 3)
    assert compare.first_at(np.full(3, 0.4), y, x).tolist() == [25, math.inf, 10]

    def log(rate, start=0.0):
        return [{"step": 10 * e, "seconds_training": 5.0 * e, "seconds_selecting": 1.0 * e, "R1": start + rate * e} for e in range(1, 11)]
    runs = [made_up_run("random", s, log(0.04 + 0.001 * s)) for s in (0, 1, 2)] + \
        [made_up_run("osgd", s, log(0.08 + 0.001 * s)) for s in (0, 1, 2)] + [made_up_run("spectral", 0, log(0.01))]
    groups = compare.group_runs(runs)
    found = compare.curves(runs, groups)
    short = compare.curves([run._replace(log=run.log[:4 + run.knobs["seed"]]) for run in runs], groups)["osgd"]  # of the epochs that all have
    assert short["steps"] == [10, 20, 30, 40] and short["R1"][2] == pytest.approx([0.082 * e for e in range(1, 5)])
    rows = {row["group"]: row for row in compare.cost(found, "random", None)}
    assert rows["random"]["target"] == pytest.approx(0.41) and rows["random"]["steps"] == 100 and rows["random"]["steps_ratio"] == 1
    assert rows["osgd"]["steps"] == pytest.approx(100 * 0.41 / 0.81) and rows["osgd"]["seconds"] == pytest.approx(60 * 0.41 / 0.81)
    low, high = rows["osgd"]["steps_ratio_interval"]
    assert low < 0.41 / 0.81 < high < 0.6
    assert rows["osgd"]["gain"] == pytest.approx(0.4) and rows["random"]["gain_interval"] == [0, 0]
    assert rows["osgd"]["gain_interval"] == pytest.approx([0.4, 0.4])  # paired by seed: the same luck in both
    others = {**found, "osgd": {**found["osgd"], "seeds": [3, 4, 5]}}
    worst, best = compare.cost(others, "random", None)[1]["gain_interval"]  # two means of three, of spread 0.01: 4.3 * 0.01 / 3^0.5 each
    assert 0.03 < 0.4 - worst < 0.06 and 0.03 < best - 0.4 < 0.06
    assert rows["spectral"]["steps"] is None and rows["spectral"]["steps_ratio_interval"] is None and rows["spectral"]["gain_interval"] is None
    text = compare.cost_markdown(list(rows.values()), "random")
    assert "not reached" in text.splitlines()[4] and "not reached" not in text.splitlines()[3]
    assert "| +40.0 [+40.0, +40.0] |" in text.splitlines()[3] and text.splitlines()[4].endswith("| -31.0 |") and text.splitlines()[2].endswith("|  |")
    for factor, gain in ((2, 0.81 / 2 - 0.41), (16, None)):  # the same steps, but with twice the seconds; and the first not done in time
        slow = [run._replace(log=[line | {"seconds_training": (factor * 6 - 1) * line["step"] / 10} for line in run.log])
                if run.knobs["sampler"] == "osgd" else run for run in runs]
        row = compare.cost(compare.curves(slow, groups), "random", None)[1]
        assert row["gain"] == (gain and pytest.approx(gain))
    assert rows["random"]["seconds_ratio_interval"] == [1, 1] and min(rows["osgd"]["seconds_ratio_interval"]) > 0
    mixed = compare.group_runs(runs[::-1])  # the order of the words changes nothing
    assert {r["group"]: r["steps_ratio_interval"] for r in compare.cost(compare.curves(runs[::-1], mixed), "random", None)}["osgd"] == [low, high]
    alone = compare.cost(compare.curves(runs[2:], compare.group_runs(runs[2:])), "random", None)
    assert [row["steps_ratio_interval"] for row in alone] == [None] * 3  # one seed of random
    higher = {row["group"]: row for row in compare.cost(found, "random", 0.6)}  # the baseline's whole run counts
    assert higher["random"]["steps"] is None and higher["osgd"]["steps_ratio"] == pytest.approx(0.6 / 0.81)


def test_frames_of_the_picture():
    """The partner in green, another of its class in orange, the others in white."""
    pictures = {i: (np.zeros((24, 24, 3)), np.zeros((24, 24, 3))) for i in range(6)}
    figure = compare.draw_neighbours({"random": np.array([[1, 0, 2, 3, 4]])}, np.array([0]), pictures, np.array([7, 8, 7, 9, 9, 9]))
    line = np.asarray(figure.axes[1].images[0].get_array())
    frames = [tuple(line[3, 16 + 32 * i].round(2)) for i in range(5)]
    assert frames == [(1, 1, 1), (0, 0.62, 0.45), (0.9, 0.62, 0), (1, 1, 1), (1, 1, 1)]
