"""Tests of retrieval.py: metrics, kept results, the command, and the file for compare.py.

Runs are made up from one that train.py wrote.  Run: pytest tests/test_retrieval.py
"""
import gzip
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, nn

import cli
import compare
import corruptions
import data
import retrieval
import samplers
import train
from augment import views_of
from deadleaves import deadleaves
from model import ContrastiveModel, embed
from retrieval import partner_ranks, retrieval_metrics
from test_corruptions import cifar_c

REFERENCE = np.load(Path(__file__).parent / "reference.npz")
PLAIN = {name: default for name, (default, *_) in retrieval.KNOBS.items()}
CPU = torch.device("cpu")


# -------------------------------------------------------------------------------- metrics
def test_metrics_reference_and_errors():
    u, v = (torch.from_numpy(REFERENCE[f"retrieval_{x}"]) for x in "uv")
    metrics = retrieval_metrics(u, v)
    assert len(metrics) == 12 and all(type(x) is float for x in metrics.values())
    for name, value in metrics.items():
        assert value == pytest.approx(REFERENCE[f"retrieval_{name}"].item(), abs=1e-6), name
    for bad in (math.nan, math.inf):
        broken = v.clone()
        broken[3, 1] = bad
        with pytest.raises(ValueError, match="NaN"):
            retrieval_metrics(u, broken)
    for other in (v[:5], v[:, :3], v[0]):
        with pytest.raises(ValueError, match=r"\[N, D\]"):
            retrieval_metrics(u, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [32, 2048])
def test_a_partner_in_the_same_direction_is_first(dtype, D):
    u = torch.randn(600, D, dtype=dtype, generator=Generator().manual_seed(0))
    assert (partner_ranks(u, 3.3 * u) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ties_count_against_the_model_also_up_to_rounding(dtype):
    same = torch.randn(1, 50, generator=Generator().manual_seed(0)).to(dtype).expand(1003, 50)
    collapsed = retrieval_metrics(same, same * torch.linspace(1, 2, 1003, dtype=dtype)[:, None])
    assert collapsed["u2v_R10"] == 0 == collapsed["v2u_R10"] and collapsed["v2u_mean_rank"] == 1003
    assert (partner_ranks(1e4 * same, same, cosine=False) == 1003).all()
    axes = torch.eye(6, dtype=dtype)
    assert partner_ranks(axes, axes).tolist() == [[1] * 6] * 2
    # 0 is as near as four others
    assert partner_ranks(axes, axes[[1, 0, 2, 3, 4, 5]]).tolist() == [[6, 6, 1, 1, 1, 1]] * 2


def test_ranks_are_those_of_sorting():
    g = Generator().manual_seed(0)
    u = torch.randn(3000, 8, generator=g)  # two tiles
    v = u + torch.randn(3000, 8, generator=g)
    s = F.normalize(u, dim=1) @ F.normalize(v, dim=1).T
    for ranks, matrix in zip(partner_ranks(u, v), (s, s.T)):
        place = matrix.argsort(1, descending=True).argsort(1).diagonal() + 1
        assert (ranks - place).abs().max() <= 1 and (ranks != place).float().mean() < 0.01  # rounding


def test_scores_of_images():
    ranks = np.ones((5, 2, 6, 14), np.uint8)
    ranks[4] = 4  # at the highest severity no partner is found
    ranks[4, :, 0] = 1  # but of one image
    values = retrieval.score_values("corruptions, built-in", {"ranks": ranks})
    found = {name: x.mean(0) for name, x in values.items()}
    assert [found[f"severity_{s}"].tolist() for s in (1, 4, 5)] == [[1] * 6, [1] * 6, [1] + [0] * 5]
    assert found["R1"] == pytest.approx([1] + [0.8] * 5) and found["mrr"] == pytest.approx([1] + [0.85] * 5)
    correct = np.array([[True, True], [False, True]])  # neighbours, linear
    found = retrieval.score_values("probe", {"correct": correct})
    assert list(found) == ["linear", "knn"] and found["linear"].tolist() == [[0, 1]]


# -------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a short run of train.py, random-0, and others that differ in name, seed and noise on
    weights."""
    folder = tmp_path_factory.mktemp("runs")
    whole, train.VALIDATION_IMAGES = train.VALIDATION_IMAGES, 64
    try:
        train.main(["--data-dir", str(folder / "data"), "--out-dir", str(folder / "random-0"), "--limit",
                    "64", "--batch-size", "8", "--epochs", "2", "--warmup-epochs", "1", "--sampler",
                    "random"])
    finally:
        train.VALIDATION_IMAGES = whole
    for sampler, seed in (("random", 1), ("osgd", 0), ("osgd", 1)):
        twin(folder / "random-0", folder / f"{sampler}-{seed}", noise=0.02, sampler=sampler, seed=seed)
    return folder


def twin(run, there, noise=0.0, **knobs):
    """A copy of a run, without what is kept of it, with other knobs and noise on its convolutions."""
    shutil.copytree(run, there, ignore=shutil.ignore_patterns("results.*"))
    config = json.loads((there / "config.json").read_text())
    config["knobs"] |= knobs
    (there / "config.json").write_text(json.dumps(config))
    saved = torch.load(there / "checkpoint.pt", weights_only=True)
    g = Generator().manual_seed(sum(there.name.encode()))
    for name, x in saved["model"].items():
        if "conv" in name:
            x += noise * torch.randn(x.shape, generator=g)
    torch.save(saved | {"settings": saved["settings"] | knobs}, there / "checkpoint.pt")
    return there


def small(out, *words):
    return [*map(str, words), "--limit", "64", "--repeats", "2", "--recalibrate-batches", "3",
            "--corruption-limit", "2", "--out", str(out)]


def refusal(capsys, monkeypatch, *argv, script=retrieval):
    """The one line that a refused command prints; exit code 2."""
    name = f"{script.__name__}.py"
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    assert cli.run(script.main, name) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"{name}: error: ") and line.count("\n") == 1, line
    return line


def test_everything_and_again_from_what_is_kept(runs, tmp_path, monkeypatch, capsys):
    sizes, real = [], corruptions.probe
    monkeypatch.setattr(corruptions, "probe", lambda *x: [sizes.append(x[2]), real(*x)][1])
    words = [runs / "random-?", runs / "osgd-*", "--curve", "--recalibrate", "--corruptions", "built-in",
             "--probe", "--histograms"]
    retrieval.main(small(tmp_path / "out", *words))
    assert sizes == [32] * 8  # the views' side, also after recalibrating
    printed = capsys.readouterr().out
    assert "images; 95 % intervals over seeds and images\n" in printed
    record = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    titles = ["two views", "corruptions, built-in", "probe"]
    for title in titles + [f"{title}, recalibrated" for title in titles]:
        rows = record[title]
        assert [(row["group"], row["seeds"]) for row in rows] == [("random", 2), ("osgd", 2)]
        assert rows[1]["verdict"] in ("better", "worse", "not settled") and f"\n{title}, " in printed
    corrupted = record["corruptions, built-in"][0]
    assert {"severity_1", "severity_5", "R1"} <= corrupted.keys() and corrupted["images"] == 2
    assert {"command", "commit", "versions", "device", "baseline", "knobs"} <= record.keys()
    assert record["two views"][0]["R1"] != record["two views, recalibrated"][0]["R1"]
    assert list(record["histograms"]) == ["random, seed 0", "random, seed 1", "osgd, seed 0", "osgd, seed 1"]
    for name in ("curve", "neighbours", "histograms"):
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert image.width > 700 and np.asarray(image.convert("L")).std() > 5
        assert (tmp_path / "out" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert not [x for x in os.listdir(tmp_path / "out") if x.endswith("tmp")]

    kept = json.loads((runs / "random-0" / "results.json").read_text())
    assert len(kept) == 7
    entry = next(x for key, x in kept.items() if "task=two views" in key and "recalibrate_batches=0" in key)
    assert {"settings", "command", "commit", "versions"} <= entry.keys() and entry["images"] == 64
    logged = json.loads((runs / "random-0" / "log.jsonl").read_text().splitlines()[-1])
    with np.load(runs / "random-0" / "results.npz") as arrays:
        names = [x for x in arrays if "task=two views" in x and "batches=0" in x and x.endswith("ranks")]
        ranks = arrays[names[0]]
    # each draw has views of its own; the first is train.py's
    assert ranks.shape == (2, 2, 64) and (ranks[0] != ranks[1]).any()
    assert (ranks[0] == 1).mean() == pytest.approx(logged["R1"])
    for prefix, r in (("", ranks), ("u2v_", ranks[:, :1]), ("v2u_", ranks[:, 1:])):
        for name, x in (("R1", r == 1), ("R5", r <= 5), ("mean_rank", r), ("mrr", 1 / r)):
            by_image, by_draw = x.mean((0, 1)), x.mean((1, 2))
            errors = {"se_images": by_image.std(ddof=1) / 8, "se_draws": by_draw.std(ddof=1) / 2 ** 0.5}
            if prefix + name != "mean_rank":
                assert entry["scores"][prefix + name] == pytest.approx({"mean": x.mean(), **errors})
    assert entry["scores"]["u2v_median_rank"]["mean"] == np.median(ranks[:, 0], axis=1).mean()

    def no(*_, **__):
        raise AssertionError("embeds again")
    monkeypatch.setattr(retrieval, "load_checkpoint", no)
    retrieval.main(small(tmp_path / "again", *words))
    assert "random-1: read from results.json" in capsys.readouterr().out
    again = json.loads((tmp_path / "again" / "retrieval.json").read_text())
    assert all(again[title] == record[title] for title in (*titles, "cost", "histograms"))
    assert json.loads((runs / "random-0" / "results.json").read_text()) == kept
    with pytest.raises(AssertionError, match="embeds again"):
        retrieval.main(small(tmp_path / "again", *words, "--seed", "1"))


def test_tables_of_the_exported_file_are_those_of_the_runs(runs, tmp_path, capsys):
    file = tmp_path / "runs.json.gz"
    words = [runs / "random-?", runs / "osgd-*", "--corruptions", "built-in", "--curve", "--export", file]
    retrieval.main(small(tmp_path / "one", *words))
    printed = capsys.readouterr().out
    compare.main([str(file), "--out", str(tmp_path / "other")])
    redrawn = capsys.readouterr().out
    assert redrawn.count("\n") > 15 and redrawn[:redrawn.rindex("\n\n")] in printed
    curve = [Image.open(tmp_path / x / "curve.png").convert("L") for x in ("one", "other")]
    assert np.array_equal(*map(np.asarray, curve))
    assert str(runs).encode() not in gzip.decompress(file.read_bytes())
    run = compare.read_file(file)[0]
    assert run.made_by["commit"] and run.made_by["versions"]["torch"] and run.log[-1]["seconds_training"] > 0
    assert run.scores["two views"]["scores"]["R1"]["se_images"] > 0


def test_two_views_by_inner_product_of_the_same_embeddings(runs):
    """Against embedding the run's views again, and a plain loop."""
    run = compare.read_runs([str(runs / "random-0")])[0]
    scored, found = retrieval.evaluate(run, PLAIN | {"limit": 64, "repeats": 2}, CPU)
    images, _, rows = retrieval.load(run, "val", retrieval.data_folder(run, PLAIN), 64)
    model = retrieval.load_checkpoint(run.folder / "checkpoint.pt", run.knobs)
    right = np.zeros((2, 2, 64), bool)
    for repeat in range(2):
        view = retrieval.views_by(run, CPU)(images, Generator().manual_seed(repeat))
        u, v = (x.double().numpy() for x in embed(model, view, rows))
        for i in range(64):
            right[repeat, :, i] = [all(a[i] @ b[i] > a[i] @ b[j] for j in range(64) if j != i)
                                   for a, b in ((u, v), (v, u))]
    assert np.array_equal(found["two views"]["first_by_inner_product"], right) and 0 < right.mean() < 1
    values = scored.scores["two views"]["values"]
    assert np.allclose(values["R1_inner_product"], right.mean((0, 1)))


def test_histograms_are_of_the_batches_of_the_samplers(runs, monkeypatch):
    run = compare.read_runs([str(runs / "osgd-1")])[0]
    run.knobs["temperature"] = 0.3
    torch.save(torch.load(run.folder / "checkpoint.pt", weights_only=True), run.folder / "checkpoint.pt")
    seen, asked, real, spectral = [], [], samplers.batch_losses, samplers.spectral_batches
    monkeypatch.setattr(samplers, "batch_losses", lambda *x: [seen.append(x), real(*x)][1])
    monkeypatch.setattr(samplers, "spectral_batches", lambda *x: [asked.append(x), spectral(*x)][1])
    monkeypatch.setattr(retrieval, "MOST", 48)
    monkeypatch.setattr(retrieval, "load_checkpoint", lambda *_: ContrastiveModel().eval())
    losses = retrieval.evaluate(run, PLAIN | {"limit": 64, "histograms": True}, CPU)[1]["batch losses"]
    assert [len(losses[kind]) for kind in ("random", "spectral")] == [6, 6] and len(seen[0][0]) == 48
    for (u, v, batches, temperature), found in zip(seen, losses.values()):
        assert temperature == 0.3 and sorted(batches.flatten().tolist()) == list(range(48))
        for batch, loss in zip(batches, found):  # NT-Xent, written out
            z = F.normalize(torch.cat([u[batch], v[batch]]), dim=1).double()
            s = (z @ z.T / 0.3).fill_diagonal_(-math.inf)
            assert loss == pytest.approx(F.cross_entropy(s, torch.arange(16).roll(8)).item(), rel=1e-5)
    assert asked[0][2:5] == (8, 6, 0.3) and losses["spectral"].mean() > losses["random"].mean()


def test_recalibration_sees_two_views_of_training_images(runs, monkeypatch):
    batches, real = [], retrieval.update_bn
    monkeypatch.setattr(retrieval, "update_bn", lambda x, *y: real([batches.append(b) or b for b in x], *y))
    run = compare.read_runs([str(runs / "random-0")])[0]
    knobs = {"recalibrate": True, "recalibrate_batches": 5, "limit": 64, "seed": 9}
    retrieval.evaluate(run, PLAIN | knobs, CPU)
    assert [tuple(b.shape) for b in batches] == [(16, 3, 32, 32)] * 5  # two views of 8
    means = torch.stack([b.mean((2, 3)) for b in batches]).unflatten(1, (2, 8))
    a, b = means.unbind(1)  # the colours of an image are seen in both
    assert (a - b).norm(dim=2).mean() < 0.75 * (a - b.roll(1, 1)).norm(dim=2).mean()
    assert not torch.equal(a, b) and len(torch.unique(means.flatten(0, 2), dim=0)) == 80


def test_every_run_sees_the_same_views(runs, tmp_path):
    """The same weights under another seed have the same ranks in every task, in training mode before or
    not."""
    other = twin(runs / "random-0", tmp_path / "twin", seed=5)
    knobs = PLAIN | {"limit": 64, "recalibrate": True, "recalibrate_batches": 3, "corruptions": "built-in",
                     "corruption_limit": 4, "probe": True, "histograms": True}
    (one, arrays), (two, others) = (retrieval.evaluate(run, knobs, CPU)
                                    for run in compare.read_runs([str(runs / "random-0"), str(other)]))
    assert len(arrays) == 7 and arrays.keys() == others.keys()
    for title, found in arrays.items():
        assert all(np.array_equal(x, others[title][name]) for name, x in found.items()), title
    assert all(one.scores[x]["images_digest"] == two.scores[x]["images_digest"] for x in one.scores)


@pytest.mark.parametrize("seed", [0, 3])
def test_the_picture_shows_the_views_that_were_embedded(runs, monkeypatch, seed):
    run = compare.read_runs([str(runs / "random-0")])[0]
    near = np.array([[0, 5, 299, 256, 1]] * 4)
    figure = retrieval.draw_neighbours({"random": near}, run, PLAIN | {"limit": 300, "seed": seed})
    images, labels, rows = retrieval.load(run, "val", retrieval.data_folder(run, PLAIN), 300)
    g, statistics = Generator().manual_seed(1000 * seed), data.STATISTICS["deadleaves"]
    u, v = embed(nn.Flatten(), views_of(images, g, 32, 0.5, 0.5, *statistics, CPU), rows)
    mean, std = (torch.tensor(x)[:, None, None] for x in statistics)

    def picture(axis, i):  # the frame around it
        whole = axis.images[0].get_array()[:, 40 * i:40 * i + 40]
        return whole[4:-4, 4:-4], tuple(whole[3, 20].round(2))

    def expected(view):
        return (view.view(3, 32, 32) * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    queries = retrieval.query_rows(300).tolist()
    for j, query in enumerate(queries):
        np.testing.assert_allclose(picture(figure.axes[j], 0)[0], expected(u[query]), atol=1e-5)
        for place, i in enumerate(near[j].tolist()):
            shown, frame = picture(figure.axes[len(queries) + j], place)
            np.testing.assert_allclose(shown, expected(v[i]), atol=1e-5)
            assert frame == ((0, 0.62, 0.45) if i == query else (0.9, 0.62, 0) if labels[i] == labels[query]
                             else (1, 1, 1))


def test_stale_and_damaged_results_are_made_anew(runs, tmp_path, capsys, monkeypatch):
    run = twin(runs / "random-0", tmp_path / "random-0")
    argv, lines = small(tmp_path / "out", run), []
    monkeypatch.setattr(retrieval, "draw_neighbours", lambda *_: cli.canvas(1, 1, 1, 1)[0])

    def first_line(*words):
        retrieval.main([*argv, *words])
        return capsys.readouterr().out.splitlines()[0]
    for change in (lambda: None, lambda: os.utime(run / "checkpoint.pt", ns=(1, 1)),
                   lambda: (run / "results.npz").write_bytes(b"PK"),
                   lambda: (run / "results.json").write_text("[]"), lambda: None):
        change()
        lines.append(first_line())
    assert ["read from" in line for line in lines] == [False] * 4 + [True], lines
    assert len({re.sub(r"\(.*", "", line) for line in lines[:4]}) == 1  # the same number each time
    first_line("--repeats", "1")  # other settings: both are kept
    assert len(json.loads((run / "results.json").read_text())) == 2
    monkeypatch.setattr(retrieval, "code", lambda *_: "other")  # code: what is kept of the old one goes
    assert "read from" not in first_line() and len(json.loads((run / "results.json").read_text())) == 1
    arrays = (run / "results.npz").read_bytes()
    for i in (100, len(arrays) // 2):  # single bits flip
        (run / "results.npz").write_bytes(arrays[:i] + bytes([arrays[i] ^ 4]) + arrays[i + 1:])
        first_line()
    load, negative = data.load, lambda images, labels: (255 - images, labels)
    monkeypatch.setattr(data, "load", lambda *x, **y: negative(*load(*x, **y)))  # the images themselves
    assert "read from" not in first_line()
    first_line("--recalibrate")
    assert "read from" in first_line("--recalibrate")
    other = data.load  # other training images, the same validation images
    monkeypatch.setattr(data, "load", lambda *x, **y: other(*x, **y) if x[1] == "val" else
                        negative(*other(*x, **y)))
    assert "two views, recalibrated, 64 images" in first_line("--recalibrate")

    def gone(*_, **__):
        raise FileNotFoundError("no images in nowhere")
    monkeypatch.setattr(data, "load", gone)
    assert "no images in nowhere" in refusal(capsys, monkeypatch, *argv)


def test_checkpoints_that_are_refused(runs, tmp_path, capsys, monkeypatch):
    run, other = twin(runs / "random-0", tmp_path / "run"), ContrastiveModel(small_stem=True).state_dict()
    checkpoint = run / "checkpoint.pt"
    whole, saved = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)
    settings, argv = saved["settings"], small(tmp_path / "out", run)

    class Code:  # what a file that is not only weights could do
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)
    saved["model"]["encoder.conv1.weight"][0] = math.nan
    for content, words in (
            (whole[:-5000], "damaged"), (whole[:1000], "damaged"), (b"", "damaged"), (Code(), "not of train"),
            ({"weights": 1}, "not of train.py"), (Path("x"), "not of train.py"),
            ({"settings": settings, "model": other}, "not of train.py"), (saved, "NaN"),
            ({"settings": settings | {"image_size": 64}, "model": {}}, "image_size 64 there, 32 in config")):
        checkpoint.write_bytes(content) if isinstance(content, bytes) else torch.save(content, checkpoint)
        assert words in refusal(capsys, monkeypatch, *argv)
    assert not (tmp_path / "it ran").exists()
    checkpoint.unlink()
    assert "No such file" in refusal(capsys, monkeypatch, *argv)


def test_bad_input_is_one_line(runs, tmp_path, capsys, monkeypatch):
    run, out = runs / "random-0", tmp_path / "out"
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "file").write_text("")
    for argv, words in (
            (["--curve"], "name the folders"), ([tmp_path / "unfinished"], "--resume"),
            ([runs / "x*"], "matches no folder"), ([tmp_path / "fil*"], "matches no folder"),
            ([run, "--baseline", "randon"], "did you mean random?"), ([run, "--repeats", "0"], "--repeats 0"),
            ([run, "--target", "52"], "--target 52"), ([run, "--device", "tpu"], "cpu"),
            ([run, "--corruption", "built-in"], "did you mean --corruptions?"),
            ([run, "--corruptions", "builtin"], "did you mean built-in?"),
            ([run, "--corruptions", "official"], "built-in"), ([run, "--out", tmp_path / "file/x"], "--out"),
            ([run, "--export", tmp_path / "absent" / "x.json.gz"], "absent")):
        assert words in refusal(capsys, monkeypatch, *argv, *["--out", out] * ("--out" not in argv)), argv
    other = twin(run, tmp_path / "other")
    config, log = (json.loads((other / "config.json").read_text())), (other / "log.jsonl").read_text()
    for name, value in (("image_size", 64), ("crop_scale", 0.2), ("dataset", "cifar100"), ("limit", "x"),
                        ("data_dir", None), ("seed", 1.5)):
        (other / "config.json").write_text(json.dumps({**config, "knobs": config["knobs"] | {name: value}}))
        line = refusal(capsys, monkeypatch, run, other, "--out", out)
        assert str(other) in line and ("damaged" in line or name in line and str(value) in line)
        assert ("damaged" in line) == (name in ("limit", "data_dir", "seed"))
    for content, damaged in ((config, log.replace('"R1": ', '"R1": NaN, "x": ')), ({}, log)):
        (other / "config.json").write_text(json.dumps(content))
        (other / "log.jsonl").write_text(damaged)
        assert "damaged" in refusal(capsys, monkeypatch, other, "--curve", "--out", out)


def test_a_folder_is_taken_as_it_is_named_before_it_is_a_pattern(runs, tmp_path):
    for name in ("seed[1]", "seed1"):
        twin(runs / "random-0", tmp_path / name)
    assert [run.folder.name for run in compare.read_runs([str(tmp_path / "seed[1]")])] == ["seed[1]"]
    assert [run.folder.name for run in compare.read_runs([str(tmp_path / "seed[0-9]")])] == ["seed1"]
    assert len(compare.read_runs([str(tmp_path / "seed*"), str(tmp_path / "seed1")])) == 2


def test_official_corruptions_through_the_command(runs, tmp_path, monkeypatch, capsys):
    """A made-up CIFAR-100 of three images: the scores' name is the set's, and the data are found beside
    it."""
    run = twin(runs / "random-0", tmp_path / "run", dataset="cifar100", limit=None)
    seen = []
    monkeypatch.setattr(retrieval, "draw_neighbours", lambda *_: cli.canvas(1, 1, 1, 1)[0])
    monkeypatch.setattr(data, "load", lambda *x, **_: seen.append(x) or deadleaves(x[1], 3, 0))
    folder = cifar_c(tmp_path / "cifar-100-c")
    argv = [str(run), "--out", str(tmp_path / "out"), "--corruptions", "official", "--repeats", "1",
            "--data-dir", str(folder)]
    retrieval.main(argv)
    row = json.loads((tmp_path / "out" / "retrieval.json").read_text())["corruptions, CIFAR-100-C"][0]
    assert row["images"] == 3 and seen[0] == ("cifar100", "val", tmp_path)
    capsys.readouterr()
    retrieval.main(argv)
    assert "read from" in capsys.readouterr().out
    np.save(folder / "fog.npy", 255 - np.load(folder / "fog.npy"))  # another set in its place
    retrieval.main(argv)
    assert capsys.readouterr().out.startswith(f"{run}: corruptions, CIFAR-100-C, 3 images")
    (folder / "snow.npy").unlink()
    assert "snow.npy" in refusal(capsys, monkeypatch, *argv)
