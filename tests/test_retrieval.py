"""Tests of the evaluation: metrics, probe, kept results, the command.  Run: pytest test_retrieval.py

Runs are made up from one that train.py wrote.
"""
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import compare
import corruptions
import data
import figures
import report
import retrieval
import train
from augment import MEAN, STD
from deadleaves import deadleaves
from model import ContrastiveModel, embed
from probe import probe
from retrieval import own_version_ranks, partner_ranks, recalibrate, retrieval_metrics
from test_corruptions import cifar_c

REFERENCE = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parent / "reference.npz").items()}


# ------------------------------------------------------------------------------------------------- metrics
def test_metrics_reference_and_errors():
    u, v = REFERENCE["retrieval_u"], REFERENCE["retrieval_v"]
    metrics = retrieval_metrics(u, v)
    assert len(metrics) == 12 and all(type(x) is float for x in metrics.values())
    for name, value in metrics.items():
        assert value == pytest.approx(REFERENCE[f"retrieval_{name}"].item(), abs=1e-6), name
    for bad in (math.nan, math.inf):
        broken = v.clone()
        broken[3, 1] = bad
        with pytest.raises(ValueError, match="NaN"):
            retrieval_metrics(u, broken)
        with pytest.raises(ValueError, match="NaN"):
            own_version_ranks(u[None], broken[None])
    for other in (v[:5], v[:, :3], v[0]):
        with pytest.raises(ValueError, match=r"\[N, D\]"):
            retrieval_metrics(u, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [32, 2048])
def test_a_partner_in_the_same_direction_is_first(dtype, D):
    u = torch.randn(600, D, dtype=dtype, generator=Generator().manual_seed(0))
    assert (partner_ranks(u, 3.3 * u) == 1).all()
    assert (own_version_ranks(u.view(100, 6, D), 3.3 * u.view(100, 6, D)) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ties_count_against_the_model_also_up_to_rounding(dtype):
    same = torch.randn(1, 50, generator=Generator().manual_seed(0)).to(dtype).expand(1003, 50)
    collapsed = retrieval_metrics(same, same * torch.linspace(1, 2, 1003, dtype=dtype)[:, None])
    assert collapsed["u2v_R10"] == 0 == collapsed["v2u_R10"] and collapsed["v2u_mean_rank"] == 1003
    axes = torch.eye(6, dtype=dtype)
    assert partner_ranks(axes, axes).tolist() == [[1] * 6] * 2
    assert partner_ranks(axes, axes[[1, 0, 2, 3, 4, 5]]).tolist() == [[6, 6, 1, 1, 1, 1]] * 2  # 0 is as near as four others
    assert own_version_ranks(same[None, :7], same[None, :7]).unique().tolist() == [7]


def test_ranks_are_those_of_sorting():
    g = Generator().manual_seed(0)
    u = torch.randn(3000, 8, generator=g)  # two tiles
    v = u + torch.randn(3000, 8, generator=g)
    s = F.normalize(u, dim=1) @ F.normalize(v, dim=1).T
    for ranks, matrix in zip(partner_ranks(u, v), (s, s.T)):
        place = matrix.argsort(1, descending=True).argsort(1).diagonal() + 1
        assert (ranks - place).abs().max() <= 1 and (ranks != place).float().mean() < 0.01  # rounding
    u, v = torch.randn(2, 9, 5, 8, generator=g)
    whole = own_version_ranks(u, v)
    assert whole.shape == (2, 9, 5)
    assert torch.equal(whole, torch.stack([partner_ranks(*pair) for pair in zip(u, v)], 1))


def test_cuda_without_cuda():
    """Fake CUDA tensors raise where devices mix."""
    with FakeTensorMode():
        u, v = torch.randn(2, 4, 6, 8, device="cuda")
        s = F.normalize(u, dim=2) @ F.normalize(v, dim=2).mT
        assert s.device.type == "cuda"
        images = torch.zeros(4, 3, 16, 16, device="cuda")
        for name, f in corruptions.BUILT_IN.items():
            if name != "jpeg":  # reads the pixels
                assert f(images, 2, Generator()).device.type == "cuda", name
        views = retrieval.augmented(torch.zeros(9, 3, 20, 20, dtype=torch.uint8), Generator(), 16, 0.5, 1.0, torch.device("cuda"))
        batch = views(torch.arange(4))
        assert batch.device.type == "cuda" and batch.shape == (4, 3, 16, 16)
        with torch.device("cuda"):
            net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        recalibrate(net, [batch])
        with pytest.raises(RuntimeError):
            recalibrate(net, [batch.cpu()])


# ------------------------------------------------------------------------------------------------- batch norm, probe
def test_recalibration_is_the_plain_average_over_batches():
    g = Generator().manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4, affine=False)).eval()
    net[3].train()
    for _ in range(20):  # running statistics of shifted batches
        net[0](torch.randn(8, 3, 2, 2, generator=g) + 5)
    weights = [p.clone() for p in net.parameters()]
    net.eval()[3].train()
    batches = [2 * torch.randn(16, 3, 2, 2, generator=g) - i for i in range(4)]
    recalibrate(net, batches)
    torch.testing.assert_close(net[0].running_mean, torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0))
    torch.testing.assert_close(net[0].running_var, torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in batches]).mean(0))
    hidden = [net[2](((x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()).flatten(1))
              for x in batches]  # what the second norm sees while the first is in training mode
    torch.testing.assert_close(net[3].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0), rtol=1e-4, atol=1e-5)
    assert [m.training for m in net] == [False, False, False, True] and net[0].momentum == 0.3
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters()))


def test_probe_finds_what_is_there_and_nothing_else():
    g = Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    colours = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
    images = (colours[labels][:, :, None, None] + 40 * torch.rand(600, 3, 4, 4, generator=g)).byte()
    sets = [(images, torch.arange(300), labels), (images, torch.arange(300, 600), labels)]
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 16))
    correct = probe(encoder, sets, 4, torch.device("cpu"), 0)
    assert correct.shape == (2, 300) and correct.dtype == bool and correct.mean() == 1
    shuffled = labels[torch.randperm(600, generator=g)]
    chance = probe(encoder, [(*s[:2], shuffled) for s in sets], 8, torch.device("cpu"), 0)  # also brought to another size
    assert (abs(chance.mean(1) - 1 / 3) < 0.12).all()
    with pytest.raises(ValueError, match="two classes"):
        probe(encoder, [(*s[:2], labels * 0) for s in sets], 4, torch.device("cpu"), 0)


def test_probe_is_what_its_docstring_says():
    """Against loops over images for the neighbours, and scipy's optimiser for the linear classifier and its L2."""
    g = Generator().manual_seed(1)
    labels = torch.arange(600) % 3
    x = (0.35 * torch.randn(3, 100, generator=g))[labels] + torch.randn(600, 100, generator=g)
    images = (127 + 30 * x[:, :75]).clamp(0, 255).byte().view(600, 3, 5, 5)
    near, linear = probe(nn.Flatten(), [(images, torch.arange(300), labels), (images, torch.arange(300, 600), labels)], 5, torch.device("cpu"), 0)
    x = ((images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]).flatten(1).double().numpy()
    y = labels.numpy()
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for i in range(300, 600):
        cosine = unit[:300] @ unit[i]
        votes = np.zeros(3)
        for j in np.argsort(-cosine)[:20]:
            votes[y[j]] += np.exp(cosine[j] / 0.07)
        assert near[i - 300] == (votes.argmax() == y[i])
    x = (x - x[:300].mean(0)) / x[:300].std(0, ddof=1)

    def classes(rows, l2, of):
        def loss(w):
            w = torch.from_numpy(w).view(3, 76).requires_grad_()
            value = F.cross_entropy(torch.from_numpy(x[rows]) @ w[:, :-1].T + w[:, -1], labels[rows]) + l2 / 2 * w[:, :-1].square().sum()
            value.backward()
            return value.item(), w.grad.numpy().ravel()
        w = scipy.optimize.minimize(loss, np.zeros(228), jac=True, method="L-BFGS-B").x.reshape(3, 76)
        return (x[of] @ w[:, :-1].T + w[:, -1]).argmax(1) == y[of]
    order = torch.randperm(300, generator=Generator().manual_seed(0)).numpy()
    held = {l2: classes(order[60:], l2, order[:60]).mean() for l2 in (0.3, 0.1, 0.03, 0.01, 0.003)}
    agree = {l2: (classes(np.arange(300), l2, np.arange(300, 600)) == linear).mean() for l2 in held}
    assert agree[max(held, key=held.get)] == max(agree.values()) > 0.99 and min(agree.values()) < 0.97, (held, agree)


def test_scores_of_images():
    ranks = np.ones((5, 2, 6, 14), np.uint8)
    ranks[4] = 4  # at the highest severity no partner is found
    found = retrieval.image_scores("corruptions, built-in", {"ranks": ranks})
    assert [found[f"severity_{s}"].tolist() for s in (1, 4, 5)] == [[1] * 6, [1] * 6, [0] * 6]
    assert found["R1"] == pytest.approx(np.full(6, 0.8)) and found["mrr"] == pytest.approx(np.full(6, 0.85))
    found = retrieval.image_scores("probe", {"correct": np.array([[True, True], [False, True]])})  # neighbours, linear
    assert list(found) == ["linear", "knn"] and found["linear"].tolist() == [0, 1] and found["knn"].tolist() == [1, 1]


# ------------------------------------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a short run of train.py, random-0, and others that differ from it in name, seed and noise on the weights."""
    folder = tmp_path_factory.mktemp("runs")
    whole, train.VALIDATION_IMAGES = train.VALIDATION_IMAGES, 64
    try:
        assert train.main(["--data-dir", str(folder / "data"), "--out-dir", str(folder / "random-0"), "--limit", "64", "--batch-size", "8",
                           "--epochs", "2", "--warmup-epochs", "1", "--sampler", "random"]) == 0
    finally:
        train.VALIDATION_IMAGES = whole
    saved = torch.load(folder / "random-0" / "checkpoint.pt", weights_only=True)
    for sampler, seed in (("random", 1), ("osgd", 0), ("osgd", 1)):
        there = folder / f"{sampler}-{seed}"
        there.mkdir()
        config = json.loads((folder / "random-0" / "config.json").read_text())
        config["knobs"] |= {"sampler": sampler, "seed": seed}
        (there / "config.json").write_text(json.dumps(config))
        for name in ("result.json", "log.jsonl"):
            shutil.copy(folder / "random-0" / name, there)
        g = Generator().manual_seed(seed)
        weights = {k: v + 0.02 * torch.randn(v.shape, generator=g) if "conv" in k else v for k, v in saved["model"].items()}
        torch.save({"settings": saved["settings"] | {"sampler": sampler, "seed": seed}, "model": weights}, there / "checkpoint.pt")
    return folder


def small(runs, out, *words):
    return [*words, "--limit", "64", "--repeats", "2", "--recalibrate-batches", "3", "--corruption-limit", "2", "--out", str(out)]


def test_everything_and_again_from_what_is_kept(runs, tmp_path, monkeypatch, capsys):
    sizes, real = [], retrieval.probe
    monkeypatch.setattr(retrieval, "probe", lambda *x: [sizes.append(x[2]), real(*x)][1])
    words = [str(runs / "random-?"), str(runs / "osgd-*"), "--curve", "--recalibrate", "--corruptions", "built-in", "--probe"]
    assert retrieval.main(small(runs, tmp_path / "out", *words)) == 0
    assert sizes == [32] * 8  # the views' side, also after recalibrating
    printed = capsys.readouterr().out
    assert "images; 95 % intervals over seeds and images\n" in printed
    record = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    titles = ["two views", "corruptions, built-in", "probe"]
    for title in titles + [f"{title}, recalibrated" for title in titles]:
        rows = record[title]
        assert [row["group"] for row in rows] == ["random", "osgd"] and [row["seeds"] for row in rows] == [2, 2]
        assert rows[1]["verdict"] in ("better", "worse", "not settled") and f"\n{title}, " in printed
    assert {"severity_1", "severity_5", "R1"} <= record["corruptions, built-in"][0].keys() and record["corruptions, built-in"][0]["images"] == 2
    assert {"command", "commit", "versions", "device", "knobs", "baseline"} <= record.keys() and record["knobs"]["seed"] == 0
    assert record["two views"][0]["R1"] != record["two views, recalibrated"][0]["R1"]
    for name in ("curve", "neighbours"):
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert image.width > 800 and np.asarray(image.convert("L")).std() > 5
        assert (tmp_path / "out" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert not [x for x in os.listdir(tmp_path / "out") if x.endswith("tmp")]
    blocks = report.build(tmp_path, runs)  # and the report reads it
    assert [block[1] for block in blocks if block[0] == "h3"] == [f"generated images, out: {title}" for title in record if title.split(",")[0] in
                                                                  ("two views", "corruptions", "probe")]
    unread = next(blocks[i + 1][2] for i, block in enumerate(blocks) if block == ("h2", "What is missing"))
    assert not [line for line in unread if "retrieval" in line[0] or line[1] == "cannot be read"], unread

    kept = json.loads((runs / "random-0" / "results.json").read_text())
    assert len(kept) == 6
    entry = next(x for key, x in kept.items() if "task=two views" in key and "recalibrate_batches=0" in key)
    assert {"settings", "checkpoint", "images", "images_digest", "scores", "command", "commit", "versions"} <= entry.keys()
    assert {"R1", "mrr", "u2v_R1", "u2v_median_rank", "v2u_mrr"} <= entry["scores"].keys() and entry["images"] == 64
    logged = json.loads((runs / "random-0" / "log.jsonl").read_text().splitlines()[-1])
    with np.load(runs / "random-0" / "results.npz") as arrays:
        ranks = next(arrays[x] for x in arrays if "task=two views" in x and "recalibrate_batches=0" in x and x.endswith("ranks"))
    assert (ranks[0] != ranks[1]).any()  # each draw has views of its own
    each = {way: (ranks[:, i], entry["scores"]) for i, way in enumerate(("u2v", "v2u"))}
    for way, (r, found) in each.items():
        for name, x in (("R5", r <= 5), ("mean_rank", r), ("mrr", 1 / r)):
            assert found[f"{way}_{name}"] == pytest.approx({"mean": x.mean(), "se_images": x.mean(0).std(ddof=1) / 8,
                                                            "se_draws": x.mean(1).std(ddof=1) / 2 ** 0.5})
    assert ranks.shape == (2, 2, 64) and (ranks[0] == 1).mean() == pytest.approx(logged["R1"])  # the first draw is train.py's
    by_image, by_draw = (ranks == 1).mean((0, 1)), (ranks == 1).mean((1, 2))
    assert entry["scores"]["R1"] == pytest.approx({"mean": by_image.mean(), "se_images": by_image.std(ddof=1) / 8,
                                                   "se_draws": by_draw.std(ddof=1) / 2 ** 0.5})

    def no(*_, **__):
        raise AssertionError("embeds again")
    monkeypatch.setattr(retrieval, "load_checkpoint", no)
    assert retrieval.main(small(runs, tmp_path / "again", *words)) == 0
    assert "random-1: read from results.json" in capsys.readouterr().out
    again = json.loads((tmp_path / "again" / "retrieval.json").read_text())
    assert all(again[title] == record[title] for title in titles) and again["cost"] == record["cost"]
    assert json.loads((runs / "random-0" / "results.json").read_text()) == kept
    with pytest.raises(AssertionError, match="embeds again"):
        retrieval.main(small(runs, tmp_path / "again", *words, "--seed", "1"))


def test_recalibration_sees_two_views_of_training_images(runs, monkeypatch):
    batches, real = [], retrieval.recalibrate
    monkeypatch.setattr(retrieval, "recalibrate", lambda model, x: real(model, [batches.append(b) or b for b in x]))
    run = compare.read_runs([str(runs / "random-0")])[0]
    knobs = PLAIN | {"limit": 64, "recalibrate": True, "recalibrate_batches": 5, "seed": 9}
    retrieval.evaluate(run, knobs, torch.device("cpu"))
    assert [tuple(b.shape) for b in batches] == [(16, 3, 32, 32)] * 5  # two views of 8
    means = torch.stack([b.mean((2, 3)) for b in batches]).unflatten(1, (2, 8))  # colours of an image are seen in both
    assert (means[:, 0] - means[:, 1]).norm(dim=2).mean() < 0.9 * (means[:, 0] - means[:, 1].roll(1, 1)).norm(dim=2).mean()
    assert not torch.equal(means[:, 0], means[:, 1]) and len(torch.unique(means.flatten(0, 2), dim=0)) == 80


PLAIN = {name: default for name, (default, *_) in retrieval.KNOBS.items()}


def test_every_run_sees_the_same_views(runs, tmp_path):
    """The same weights under another seed have the same ranks in every task."""
    shutil.copytree(runs / "random-0", tmp_path / "twin", ignore=shutil.ignore_patterns("results.*"))
    config = json.loads((tmp_path / "twin" / "config.json").read_text())
    config["knobs"]["seed"] = 5
    (tmp_path / "twin" / "config.json").write_text(json.dumps(config))
    saved = torch.load(tmp_path / "twin" / "checkpoint.pt", weights_only=True)
    torch.save(saved | {"settings": saved["settings"] | {"seed": 5}}, tmp_path / "twin" / "checkpoint.pt")
    knobs = PLAIN | {"limit": 64, "recalibrate": True, "recalibrate_batches": 3, "corruptions": "built-in", "corruption_limit": 4, "probe": True}
    one, other = (retrieval.evaluate(run, knobs, torch.device("cpu")) for run in compare.read_runs([str(runs / "random-0"), str(tmp_path / "twin")]))
    assert len(one) == 6 and one.keys() == other.keys()
    for title, (digest, arrays) in one.items():
        assert digest == other[title][0]
        assert all(np.array_equal(x, other[title][1][name]) for name, x in arrays.items()), title


def test_the_picture_shows_the_views_that_were_embedded(runs, monkeypatch):
    run = compare.read_runs([str(runs / "random-0")])[0]
    drawn = {}
    monkeypatch.setattr(compare, "draw_neighbours", lambda nearest, queries, few, labels: drawn.update(few) or (queries, labels))
    near = np.array([[0, 5, 299, 256, 1]] * 4)
    queries, labels = retrieval.neighbours([run], {"random": [0]}, [{"two views": ("", {"neighbours": near})}], PLAIN | {"limit": 300})
    assert set(drawn) == {0, 5, 299, 256, 1} | set(queries.tolist()) and len(labels) == 300
    images, _, rows = retrieval.load(run, "val", retrieval.data_folder(run, PLAIN), 300)
    seen = []

    def record(batch):
        seen.append(batch)
        return batch.new_zeros(len(batch), 1)
    model = nn.Module()
    model.forward = record
    embed(model, retrieval.augmented(images, Generator().manual_seed(0), 32, 0.5, 0.5, torch.device("cpu")), rows)
    u, v = (torch.cat([batch.chunk(2)[i] for batch in seen])[:300] for i in range(2))
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    for i, pair in drawn.items():
        for view, picture in zip((u, v), pair):
            torch.testing.assert_close((view[i] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy(), picture, rtol=0, atol=1e-6)


def test_stale_and_damaged_results_are_made_anew(runs, tmp_path, capsys, monkeypatch):
    run = tmp_path / "random-0"
    shutil.copytree(runs / "random-0", run, ignore=shutil.ignore_patterns("results.*"))
    argv = small(runs, tmp_path / "out", str(run))
    lines = []
    for change in (lambda: None, lambda: os.utime(run / "checkpoint.pt", ns=(1, 1)), lambda: (run / "results.npz").write_bytes(b"PK"),
                   lambda: (run / "results.json").write_text("[]"), lambda: None):
        change()
        assert retrieval.main(argv) == 0
        lines.append(capsys.readouterr().out.splitlines()[0])
    assert ["read from" in line for line in lines] == [False] * 4 + [True], lines
    assert len({re.sub(r"\(.*", "", line) for line in lines[:4]}) == 1  # the same number each time
    assert retrieval.main([*argv[:-2], "--out", str(tmp_path / "out"), "--repeats", "1"]) == 0  # other settings: both are kept
    assert len(json.loads((run / "results.json").read_text())) == 2
    monkeypatch.setattr(retrieval, "code", lambda: "other")  # code: what is kept of the old one goes
    assert retrieval.main(argv) == 0 and len(json.loads((run / "results.json").read_text())) == 1
    arrays = bytearray((run / "results.npz").read_bytes())
    for i in (100, len(arrays) // 2):  # single bits flip
        (run / "results.npz").write_bytes(arrays[:i] + bytes([arrays[i] ^ 4]) + arrays[i + 1:])
        compare.read_runs([str(run)]), retrieval.evaluate(compare.read_runs([str(run)])[0], PLAIN | {"limit": 64, "repeats": 2}, torch.device("cpu"))
    capsys.readouterr()
    load = data.load
    monkeypatch.setattr(data, "load", lambda *x, **y: [255 - load(*x, **y)[0], load(*x, **y)[1]])  # the images themselves
    assert retrieval.main(argv) == 0 and "read from" not in capsys.readouterr().out
    again = [*argv, "--recalibrate"]
    assert retrieval.main(again) == retrieval.main(again) == 0 and "two views, recalibrated" in (text := capsys.readouterr().out)
    assert "read from" in text and "over images (one seed)" in text
    other = data.load  # other training images, the same validation images
    monkeypatch.setattr(data, "load", lambda d, split, *x, **y: other(d, split, *x, **y) if split == "val" else
                        [255 - other(d, split, *x, **y)[0], other(d, split, *x, **y)[1]])
    assert retrieval.main(again) == 0
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()[:1]] == ["two views, recalibrated, 64 images"]
    def gone(*_, **__):
        raise FileNotFoundError("no images in nowhere")
    monkeypatch.setattr(data, "load", gone)
    assert "no images in nowhere" in refusal(capsys, *argv)


def refusal(capsys, *argv):
    """The one line that a refused command prints; exit code 2."""
    assert retrieval.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("retrieval.py: error: ") and err.count("\n") == 1, err
    return err


def test_checkpoints_that_are_refused(runs, tmp_path, capsys):
    run, other = tmp_path / "run", ContrastiveModel(small_stem=True).state_dict()
    shutil.copytree(runs / "random-0", run, ignore=shutil.ignore_patterns("results.*"))
    checkpoint = run / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    settings = torch.load(checkpoint, weights_only=True)["settings"]

    def saved(content):
        torch.save(content, checkpoint)
        return checkpoint.read_bytes()
    class Code:  # what a file that is not only weights could do
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it ran"),)
    for content, words in ((whole[:-5000], "damaged"), (whole[:20000], "damaged"), (whole[:1000], "damaged"), (b"", "damaged"), (saved(Code()), "not of train.py"), (saved({"weights": 1}), "not of train.py"),
                           (saved({"settings": settings, "model": other}), "not of train.py"), (saved(Path("x")), "not of train.py"),
                           (saved({"settings": settings | {"image_size": 64}, "model": {}}), "image_size 64 there, 32 in config.json")):
        checkpoint.write_bytes(content)
        assert words in refusal(capsys, *small(runs, tmp_path / "out", str(run)))
    assert not (tmp_path / "it ran").exists()
    checkpoint.unlink()
    assert "No such file" in refusal(capsys, *small(runs, tmp_path / "out", str(run)))
    bad = torch.load(runs / "random-0" / "checkpoint.pt", weights_only=True)["model"]
    bad["encoder.conv1.weight"][0] = math.nan
    saved({"settings": settings, "model": bad})
    assert "NaN" in refusal(capsys, *small(runs, tmp_path / "out", str(run)))


def test_bad_input_is_one_line(runs, tmp_path, capsys):
    run = str(runs / "random-0")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "file").write_text("")
    for argv, words in ((["--curve"], "name the folders"), ([str(tmp_path / "unfinished")], "--resume"), ([str(runs / "x*")], "matches no folder"),
                        ([str(tmp_path / "fil*")], "matches no folder"),
                        ([run, "--baseline", "randon"], "did you mean random?"), ([run, "--repeats", "0"], "--repeats 0"),
                        ([run, "--target", "52"], "--target 52"), ([run, "--corruption", "built-in"], "did you mean --corruptions?"),
                        ([run, "--corruptions", "builtin"], "did you mean built-in?"), ([run, "--corruptions", "official"], "built-in"),
                        ([run, "--device", "tpu"], "cpu"), ([run, "--out", str(tmp_path / "file" / "x")], "--out")):
        assert words in refusal(capsys, *(argv if "--out" in argv else [*argv, "--out", str(tmp_path / "out")])), argv
    other = tmp_path / "other"
    shutil.copytree(runs / "random-0", other)
    config = json.loads((other / "config.json").read_text())
    for name, value in (("image_size", 64), ("crop_scale", 0.2), ("dataset", "cifar100")):
        (other / "config.json").write_text(json.dumps({**config, "knobs": config["knobs"] | {name: value}}))
        line = refusal(capsys, run, str(other), "--out", str(tmp_path / "out"))
        assert name in line and str(value) in line and str(other) in line
    for name, value in (("limit", "x"), ("data_dir", None), ("seed", 1.5)):
        (other / "config.json").write_text(json.dumps({**config, "knobs": config["knobs"] | {name: value}}))
        assert "not of train.py or damaged" in refusal(capsys, str(other), "--out", str(tmp_path / "out"))
    (other / "config.json").write_text(json.dumps(config))
    log = (other / "log.jsonl").read_text()
    (other / "log.jsonl").write_text(log.replace('"R1": ', '"R1": NaN, "x": '))
    assert "damaged" in refusal(capsys, str(other), "--curve", "--out", str(tmp_path / "out"))
    (other / "log.jsonl").write_text(log)
    (other / "config.json").write_text("{}")
    assert "damaged" in refusal(capsys, str(other), "--out", str(tmp_path / "out"))


def test_official_corruptions_through_the_command(runs, tmp_path, monkeypatch, capsys):
    """A made-up CIFAR-100 of three images: the scores' name is the set's, and the data are found beside it."""
    run = tmp_path / "run"
    shutil.copytree(runs / "random-0", run, ignore=shutil.ignore_patterns("results.*"))
    config = json.loads((run / "config.json").read_text())
    config["knobs"] |= {"dataset": "cifar100", "limit": None}
    (run / "config.json").write_text(json.dumps(config))
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(saved | {"settings": saved["settings"] | {"dataset": "cifar100", "limit": None}}, run / "checkpoint.pt")
    seen = []

    def load(dataset, split, folder, **_):
        seen.append((dataset, split, folder))
        return deadleaves(split, 3, 0)
    monkeypatch.setattr(data, "load", load)
    folder = cifar_c(tmp_path / "cifar-100-c")
    argv = [str(run), "--out", str(tmp_path / "out"), "--corruptions", "official", "--repeats", "1", "--data-dir"]
    assert retrieval.main([*argv, str(folder)]) == 0
    row = json.loads((tmp_path / "out" / "retrieval.json").read_text())["corruptions, CIFAR-100-C"][0]
    assert row["images"] == 3 and seen[0] == ("cifar100", "val", tmp_path)
    capsys.readouterr()
    assert retrieval.main([*argv, str(folder)]) == 0 and "read from" in capsys.readouterr().out
    array = np.load(folder / "fog.npy")
    np.save(folder / "fog.npy", 255 - array)  # another set in its place
    assert retrieval.main([*argv, str(folder)]) == 0
    assert [line.split(": ")[1].split(",")[0] for line in capsys.readouterr().out.splitlines()[:1]] == ["corruptions"]
    (folder / "snow.npy").unlink()
    assert "snow.npy" in refusal(capsys, *argv, str(folder))


def test_figures_are_whole_or_not_there(tmp_path, monkeypatch):
    figure, axes = figures.canvas(2, 3, 4, 2)
    assert axes.shape == (2, 3)
    figures.save(figure, tmp_path / "x")
    before = (tmp_path / "x.png").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(compare.Stop, match="cannot write .*x.png.*No space"):
        figures.save(figures.canvas(1, 1, 3, 2)[0], tmp_path / "x")
    assert (tmp_path / "x.png").read_bytes() == before and sorted(os.listdir(tmp_path)) == ["x.pdf", "x.png"]
