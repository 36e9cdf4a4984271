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
from torch import Generator

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
from test_synthetic import lost

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


@pytest.mark.parametrize("power, dtype", [*((x, torch.float32) for x in (64, 100, -44, -100)),
                                          (664, torch.float64), (-664, torch.float64)])
def test_ranks_of_rows_of_any_length(power, dtype):
    scale = 2.0 ** power  # which rounds nothing
    u, v = torch.randn(2, 300, 8, dtype=dtype, generator=Generator().manual_seed(0))
    length = torch.tensor([scale, 1 / scale], dtype=dtype).repeat(150)[:, None]
    assert torch.equal(partner_ranks(u * length, v * scale), partner_ranks(u, v))
    for z in (v, v * scale):
        assert torch.equal(partner_ranks(u * scale, z, cosine=False), partner_ranks(u, v, cosine=False))
    assert (partner_ranks(0 * u, v, cosine=False) == 300).all()


def test_ranks_are_those_of_sorting():
    g = Generator().manual_seed(0)
    u = torch.randn(3000, 8, generator=g)  # two tiles
    v = u + torch.randn(3000, 8, generator=g)
    s = F.normalize(u, dim=1) @ F.normalize(v, dim=1).T
    for ranks, matrix in zip(partner_ranks(u, v), (s, s.T)):
        place = matrix.argsort(1, descending=True).argsort(1).diagonal() + 1
        assert (ranks - place).abs().max() <= 1 and (ranks != place).float().mean() < 0.01  # rounding


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
    words = [runs / "random-?", runs / "osgd-*", "--curve", "--recalibrate", "--corruptions", "built-in",
             "--probe", "--histograms"]
    retrieval.main(small(tmp_path / "out", *words))
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
    for name in ("curve", "histograms"):
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert image.width > 700 and np.asarray(image.convert("L")).std() > 5
        assert (tmp_path / "out" / f"{name}.pdf").read_bytes().startswith(b"%PDF")

    kept = json.loads((runs / "random-0" / "results.json").read_text())
    entries = kept["scores"]
    assert len(entries) == 7 and all({"command", "commit", "versions"} <= x.keys() for x in entries.values())

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


@pytest.mark.parametrize("kind", ["full", "pipe"])
def test_lost_output_costs_no_results(kind, runs, tmp_path, monkeypatch):
    file = tmp_path / "runs.json.gz"
    for script, words in ((retrieval, small(tmp_path, runs / "random-0", "--export", file)),
                          (compare, [str(file), "--out", str(tmp_path)])):
        monkeypatch.setattr(sys, "stdout", lost(kind))
        assert cli.run(script.main, script.__name__, words) == 0
    assert {x.name for x in tmp_path.iterdir()} >= {"retrieval.json", "runs.json.gz", "curve.png"}


def test_a_folder_that_exists_is_no_pattern(runs, tmp_path, capsys):
    for name in ("seed[1]", "seed1", "*", "a[1]/seed2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        twin(runs / "random-0", tmp_path / name, noise=0.02)
    for word, found in (("seed[1]", ["seed[1]"]), ("*", ["*"]), ("seed[0-9]", ["seed1"]),
                        ("seed*", ["seed1", "seed[1]"]), ("a[1]/*", ["a[1]/seed2"])):
        assert [run.folder for run in compare.read_runs([str(tmp_path / word)])] == [
            tmp_path / x for x in found], word
    (tmp_path / "picture.png").write_text("")  # the shell's * gives it, too
    words = [str(tmp_path / x) for x in ("picture.png", "seed1")]
    assert [run.folder.name for run in compare.read_runs(words)] == ["seed1"]
    with pytest.raises(compare.Stop, match="picture.png is no folder"):
        compare.read_runs(words[:1])
    retrieval.main(small(tmp_path / "out", tmp_path / "seed[1]"))
    assert "seed[1]: two views, 64 images" in capsys.readouterr().out
    assert [path.parent.name for path in tmp_path.rglob("results.json")] == ["seed[1]"]


def test_scores_are_those_of_a_plain_loop(runs):
    """Against embedding the run's views again, and sorting."""
    run = compare.read_runs([str(runs / "random-0")])[0]
    scored = retrieval.evaluate(run, PLAIN | {"limit": 64, "repeats": 2}, CPU).scores["two views"]
    images, _, rows = retrieval.load(run, "val", Path(run.knobs["data_dir"]), 64)
    model, ranks = retrieval.load_checkpoint(run.folder / "checkpoint.pt", run.knobs), {}
    look = [run.knobs[x] for x in ("image_size", "crop_scale", "jitter")]
    for repeat in range(2):  # each draw has views of its own; the first is train.py's
        view = views_of(images, Generator().manual_seed(repeat), *look, *data.STATISTICS["deadleaves"], CPU)
        pair = [x.double().numpy() for x in embed(model, view, rows)]
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in pair]
        for kind, (u, v) in ("cosine", unit), ("", pair):
            for a, b in ((u, v), (v, u)):
                s, longest = a @ b.T, [np.linalg.norm(x, axis=1).max() for x in (a, b)]
                rounding = (8 + 128 ** 0.5) * 2 ** -23 * np.prod(longest)  # of float32: ties are not rare
                ranks.setdefault(kind, []).append((s >= s.diagonal()[:, None] - rounding).sum(1))
    r, values = np.array(ranks["cosine"]), scored["values"]
    assert (r[:2] == 1).mean() == pytest.approx(run.log[-1]["R1"]) and (r[:2] != r[2:]).any()
    for name, x in (("R1", r == 1), ("R5", r <= 5), ("R10", r <= 10), ("mrr", 1 / r), ("rank", r)):
        np.testing.assert_allclose(values[name], x.mean(0))
        assert scored["scores"][name]["mean"] == pytest.approx(x.mean())
        assert scored["scores"][name]["se"] == pytest.approx(np.std(x.mean(0), ddof=1) / 8)
    np.testing.assert_allclose(values["R1_inner_product"], (np.array(ranks[""]) == 1).mean(0))
    assert scored["parts"] == 4 and scored["images"] == 64


def test_corruptions_by_severity(runs, monkeypatch):
    ranks = np.ones((5, 2, 6, 14), np.int64)
    ranks[4] = 4  # at the highest severity no partner is found
    ranks[4, :, 0] = 1  # but of one image
    monkeypatch.setattr(corruptions, "own_versions", lambda *_: ranks)
    run = compare.read_runs([str(runs / "random-1")])[0]
    knobs = PLAIN | {"limit": 64, "corruptions": "built-in", "corruption_limit": 6, "seed": 7}
    found = retrieval.evaluate(run, knobs, CPU).scores["corruptions, built-in"]["values"]
    assert [found[f"severity_{s}"].tolist() for s in (1, 4, 5)] == [[1] * 6, [1] * 6, [1] + [0] * 5]
    assert found["R1"] == pytest.approx([1] + [0.8] * 5) and found["mrr"] == pytest.approx([1] + [0.85] * 5)


def test_histograms_are_of_the_batches_of_the_samplers(runs, monkeypatch):
    run = compare.read_runs([str(runs / "osgd-1")])[0]
    run.knobs["temperature"] = 0.3
    os.utime(run.folder / "checkpoint.pt", ns=(1, 1))  # nothing that is kept counts
    seen, real = [], samplers.batch_losses
    monkeypatch.setattr(samplers, "batch_losses", lambda *x: [seen.append(x), real(*x)][1])
    monkeypatch.setattr(retrieval, "MOST", 48)
    monkeypatch.setattr(retrieval, "load_checkpoint", lambda *_: ContrastiveModel().eval())
    scores = retrieval.evaluate(run, PLAIN | {"limit": 64, "histograms": True}, CPU).scores
    losses = scores["batch losses"]["values"]
    assert [len(losses[kind]) for kind in ("random", "spectral")] == [6, 6] and len(seen[0][0]) == 48
    for (u, v, batches, temperature), found in zip(seen, losses.values()):
        assert temperature == 0.3 and sorted(batches.flatten().tolist()) == list(range(48))
        for batch, loss in zip(batches, found):  # NT-Xent, written out
            z = F.normalize(torch.cat([u[batch], v[batch]]), dim=1).double()
            s = (z @ z.T / 0.3).fill_diagonal_(-math.inf)
            assert loss == pytest.approx(F.cross_entropy(s, torch.arange(16).roll(8)).item(), rel=1e-5)
    assert losses["spectral"].mean() > losses["random"].mean()


def test_recalibration_sees_two_views_of_training_images(runs, monkeypatch):
    batches, real = [], retrieval.update_bn
    monkeypatch.setattr(retrieval, "update_bn", lambda x, *y: real([batches.append(b) or b for b in x], *y))
    run = compare.read_runs([str(runs / "random-0")])[0]
    knobs = {"recalibrate": True, "recalibrate_batches": 5, "limit": 64, "seed": 9}
    retrieval.evaluate(run, PLAIN | knobs, CPU)
    assert [tuple(b.shape) for b in batches] == [(8, 3, 32, 32)] * 10  # each view apart
    means = torch.stack([b.mean((2, 3)) for b in batches]).unflatten(0, (5, 2))
    a, b = means.unbind(1)  # the colours of an image are seen in both
    assert (a - b).norm(dim=2).mean() < 0.75 * (a - b.roll(1, 1)).norm(dim=2).mean()
    assert not torch.equal(a, b) and len(torch.unique(means.flatten(0, 2), dim=0)) == 80


def test_every_run_sees_the_same_views(runs, tmp_path):
    """The same weights under another seed have the same ranks in every task, in training mode before or
    not."""
    other = twin(runs / "random-0", tmp_path / "twin", seed=5)
    knobs = PLAIN | {"limit": 64, "recalibrate": True, "recalibrate_batches": 3, "corruptions": "built-in",
                     "corruption_limit": 4, "probe": True, "histograms": True}
    one, two = (retrieval.evaluate(run, knobs, CPU).scores
                for run in compare.read_runs([str(runs / "random-0"), str(other)]))
    assert len(one) == 7 and one.keys() == two.keys()
    for title, found in one.items():
        assert found["images_digest"] == two[title]["images_digest"]
        assert all(np.array_equal(x, two[title]["values"][y]) for y, x in found["values"].items()), title


def test_stale_results_are_made_anew(runs, tmp_path, capsys, monkeypatch):
    run = twin(runs / "random-0", tmp_path / "random-0")
    argv, lines, read = small(tmp_path / "out", run), [], Path.read_bytes

    def first_line(*words):
        retrieval.main([*argv, *words])
        return capsys.readouterr().out.splitlines()[0]
    for change in (lambda: None, lambda: os.utime(run / "checkpoint.pt", ns=(1, 1)),
                   lambda: (run / "results.json").write_text("{}"), lambda: None):
        change()
        lines.append(first_line())
    assert ["read from" in line for line in lines] == [False] * 3 + [True], lines
    assert len({re.sub(r"\(.*", "", line) for line in lines[:3]}) == 1  # the same number each time
    first_line("--repeats", "1")  # other settings: both are kept
    load = data.load  # the images themselves
    with monkeypatch.context() as patch:
        def other(*words, **named):  # one pixel of the last image
            images, labels = load(*words, **named)
            images = images.clone()
            images[-1, -1, -1, -1] ^= 1
            return images, labels
        patch.setattr(data, "load", other)
        assert "read from" not in first_line()
    assert "read from" in first_line() and "read from" in first_line("--repeats", "1")
    first_line("--recalibrate")
    with monkeypatch.context() as patch:  # the training images, which other scores do not see
        patch.setattr(data, "load", lambda name, split, *x, **y: (
            load(name, split, *x, **y)[0] // (1 + (split == "train")), load(name, split, *x, **y)[1]))
        assert "read from" in first_line() and "recalibrated" in first_line("--recalibrate")
    assert "read from" in first_line("--recalibrate")
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "model.py"))
    assert "read from" not in first_line()  # code

    def gone(*_, **__):
        raise FileNotFoundError("no images in nowhere")
    monkeypatch.setattr(data, "load", gone)
    assert "no images in nowhere" in refusal(capsys, monkeypatch, *argv)


def test_checkpoints_that_are_refused(runs, tmp_path, capsys, monkeypatch):
    run, other = twin(runs / "random-0", tmp_path / "run"), ContrastiveModel(small_stem=True).state_dict()
    checkpoint = run / "checkpoint.pt"
    whole, saved = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)

    class Code:  # what a file that is not only weights could do
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)
    saved["model"]["encoder.conv1.weight"][0] = math.nan
    for content, words in ((whole[:-5000], "damaged"), (b"", "damaged"), (Code(), "not of train.py"),
                           ({"weights": 1}, "not of train.py"), ({"model": other}, "not of train.py"),
                           (saved, "NaN"), ({**saved, "settings": {"jitter": 7}}, "of another run")):
        checkpoint.write_bytes(content) if isinstance(content, bytes) else torch.save(content, checkpoint)
        assert words in refusal(capsys, monkeypatch, *small(tmp_path / "out", run))
    assert not (tmp_path / "it ran").exists()


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
            ([run, "--corruptions", "builtin"], "did you mean built-in?"), ([run, run], "leave one out"),
            ([run, "--corruptions", "official"], "built-in"), ([run, "--out", tmp_path / "file/x"], "--out"),
            ([run, twin(run, tmp_path / "other", crop_scale=0.2)], "crop_scale")):
        assert words in refusal(capsys, monkeypatch, *argv, *["--out", out] * ("--out" not in argv)), argv


def test_official_corruptions_through_the_command(runs, tmp_path, monkeypatch, capsys):
    """A made-up CIFAR-100 of three images: the scores' name is the set's, the data are found beside it, and
    what is kept is not of another set."""
    run = twin(runs / "random-0", tmp_path / "run", dataset="cifar100", limit=None)
    monkeypatch.setattr(data, "load", lambda *x, **_: deadleaves(x[1], 3, 0))
    cifar_c(tmp_path / "CIFAR-100-C")
    argv = [str(run), "--out", str(tmp_path / "out"), "--corruptions", "official", "--repeats", "1",
            "--data-dir", str(tmp_path)]
    for changed, made in (False, 2), (False, 0), (True, 1):
        if changed:
            os.utime(tmp_path / "CIFAR-100-C" / "fog.npy", ns=(1, 1))
        retrieval.main(argv)
        assert capsys.readouterr().out.count(" 3 images: ") == made
    row = json.loads((tmp_path / "out" / "retrieval.json").read_text())["corruptions, CIFAR-100-C"][0]
    assert row["images"] == 3 and 0 <= row["severity_5"] <= 1
