"""Tests of the evaluation: metrics, corruptions, kept results, comparisons.  Run: pytest test_retrieval.py

Runs are made up from one that train.py wrote; the -C sets are written small in their published layouts.
"""
import json
import math
import os
import re
import shutil
import zipfile
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

REFERENCE = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parent / "test_reference.npz").items()}


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


# ------------------------------------------------------------------------------------------------- corruptions
@pytest.mark.parametrize("size", [32, 56])
def test_built_in_corruptions(size):
    images, _ = deadleaves("val", 24, 0, size)
    assert len(corruptions.BUILT_IN) == 14
    corrupted = corruptions.built_in(images, 3)
    rows = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19])
    versions = torch.stack([corrupted(rows, s) for s in corruptions.SEVERITIES])  # [5, 8, 14, 3, S, S]
    assert versions.shape == (5, 8, 14, 3, size, size) and versions.dtype == torch.uint8
    distance = (versions.float() - images[rows][:, None]).abs().mean((1, 3, 4, 5))  # [5, 14]
    assert (distance[0] > 0.3).all() and (distance.diff(dim=0) > 0.02 * distance[:-1]).all(), distance
    assert torch.equal(corrupted(rows, 4), versions[3])
    changed = (corruptions.built_in(images, 4)(rows, 4) != versions[3]).flatten(2).any(2).any(0)
    drawn = {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "motion_blur", "fog", "elastic"}
    assert {name for name, x in zip(corruptions.BUILT_IN, changed) if x} == drawn
    assert torch.equal(corruptions.corrupt("contrast", images * 0 + 7, 5, Generator()), images * 0 + 7)
    with pytest.raises(ValueError, match="severity is 6"):
        corruptions.corrupt("fog", images, 6, Generator())


def cifar_c(folder, n=3):
    """CIFAR-100-C of n images: each pixel tells the corruption, the severity and the image."""
    folder.mkdir(parents=True)
    for c, name in enumerate(corruptions.CIFAR):
        array = np.full((5 * n, 32, 32, 3), c, np.uint8)
        array[..., 1] = np.repeat(np.arange(1, 6), n)[:, None, None]
        array[..., 2] = np.tile(np.arange(n), 5)[:, None, None]
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "labels.npy", np.tile(np.arange(n), 5))
    return folder


def test_cifar_100_c(tmp_path):
    assert len(corruptions.CIFAR) == 19
    folder, labels = cifar_c(tmp_path / "CIFAR-100-C"), torch.arange(3)
    for place in (tmp_path, folder):
        corrupted = corruptions.official("cifar100", place, labels, 32)
        x = corrupted(torch.tensor([2, 0]), 4)
        assert x.shape == (2, 19, 3, 32, 32) and x.dtype == torch.uint8
        assert x[0, :, 0, 5, 5].tolist() == list(range(19)) and (x[:, :, 1] == 4).all() and x[:, 0, 2, 0, 0].tolist() == [2, 0]

    def refused(match):
        with pytest.raises((ValueError, OSError), match=match) as error:
            corruptions.official("cifar100", tmp_path, labels, 32)
        assert "\n" not in str(error.value)
    good = {name: (folder / f"{name}.npy").read_bytes() for name in ("fog", "labels")}
    (folder / "fog.npy").rename(folder / "smog.npy")
    refused("lacks fog.npy")
    np.save(folder / "fog.npy", np.zeros((15, 32, 32), np.uint8))
    refused(r"fog.npy is uint8 \(15, 32, 32\), not uint8 \(15, 32, 32, 3\)")
    np.save(folder / "fog.npy", np.zeros((15, 32, 32, 3), np.float32))
    refused("fog.npy is float32")
    (folder / "fog.npy").write_bytes(good["fog"][:5000])
    refused("cannot read .*fog.npy")
    (folder / "fog.npy").write_bytes(good["fog"])
    np.save(folder / "labels.npy", np.tile([0, 2, 1], 5))
    refused("labels.npy does not hold the labels")
    (folder / "labels.npy").unlink()
    refused("cannot read .*labels.npy")
    shutil.rmtree(folder)
    refused("no CIFAR-100-C in")


def tiny(folder):
    """Tiny ImageNet with one training and three validation images, and Tiny-ImageNet-C: colours tell them apart."""
    clean, names = folder / "tiny-imagenet-200", ("val_0.JPEG", "val_1.JPEG", "val_2.JPEG")
    wnids = ("n02", "n01", "n02")
    (clean / "val" / "images").mkdir(parents=True)
    for wnid in set(wnids):
        (clean / "train" / wnid / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(clean / "train" / wnid / "images" / f"{wnid}_0.JPEG")
    (clean / "val" / "val_annotations.txt").write_text("".join(f"{n}\t{w}\t0\t0\t1\t1\n" for n, w in zip(names, wnids)))
    for name in names:
        Image.new("RGB", (64, 64)).save(clean / "val" / "images" / name)
    for c, corruption in enumerate(corruptions.TINY):
        for severity in range(1, 6):
            for i, (name, wnid) in enumerate(zip(names, wnids)):
                there = folder / "tiny-imagenet-c" / corruption / str(severity) / wnid
                there.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (64, 64), (10 * c, 40 * severity, 80 * i)).save(there / name, quality=100)
    return folder / "tiny-imagenet-c"


def test_tiny_imagenet_c(tmp_path):
    assert len(corruptions.TINY) == 15
    folder, labels = tiny(tmp_path), torch.tensor([1, 0, 1])
    for place in (tmp_path, folder):
        x = corruptions.official("tinyimagenet", place, labels, 32)(torch.tensor([2, 1]), 3).float()
        assert x.shape == (2, 15, 3, 32, 32)
        torch.testing.assert_close(x[0, :, 0, 9, 9], 10.0 * torch.arange(15), rtol=0, atol=4)
        torch.testing.assert_close(x[:, 0, 1:, 9, 9], torch.tensor([[120.0, 160], [120, 80]]), rtol=0, atol=4)

    def refused(match):
        with pytest.raises((ValueError, OSError), match=match) as error:
            corruptions.official("tinyimagenet", tmp_path, labels, 64)(torch.arange(3), 3)
        assert "\n" not in str(error.value)
    for name in "tiny-imagenet-200-full.zip", "tiny-imagenet-200-half.zip":  # the one that is given
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for file in (tmp_path / "tiny-imagenet-200").rglob("*"):
                archive.write(file, file.relative_to(tmp_path))
    assert corruptions.official("tinyimagenet", tmp_path / "tiny-imagenet-200-half.zip", labels, 32)(torch.tensor([0]), 1).shape[1] == 15
    for file in tmp_path.glob("*.zip"):
        file.unlink()
    image = folder / "fog" / "3" / "n02" / "val_2.JPEG"
    whole = image.read_bytes()
    Image.new("RGB", (48, 70)).save(image)
    refused("val_2.JPEG has 48 x 70 pixels, not 64 x 64")
    image.write_bytes(whole)
    image.rename(tmp_path / "kept")
    refused("fog/3 lacks val_2.JPEG")
    shutil.copy(tmp_path / "kept", folder / "fog" / "3" / "n01" / "val_2.JPEG")
    refused("val_2.JPEG is not in the folder of its class")
    (folder / "fog" / "3" / "n01" / "val_2.JPEG").rename(image)
    shutil.copy(image, image.with_name("val_9.JPEG"))
    refused("fog/3 holds val_9.JPEG, which is not in the clean")
    image.with_name("val_9.JPEG").write_bytes(b"")
    image.with_name("val_9.JPEG").unlink()
    (folder / "fog" / "5").rename(folder / "fog" / "6")
    refused("fog has the folders 1 2 3 4 6, not 1 2 3 4 5")
    (folder / "fog" / "6").rename(folder / "fog" / "5")
    image.write_bytes(image.read_bytes()[:300])
    refused("cannot read .*val_2.JPEG")
    (folder / "snow").rename(folder / "hail")
    refused("lacks snow:")


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


# ------------------------------------------------------------------------------------------------- comparisons
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


def test_frames_of_the_picture():
    """The partner in green, another of its class in orange, the others in white."""
    pictures = {i: (np.zeros((24, 24, 3)), np.zeros((24, 24, 3))) for i in range(6)}
    figure = compare.draw_neighbours({"random": np.array([[1, 0, 2, 3, 4]])}, np.array([0]), pictures, np.array([7, 8, 7, 9, 9, 9]))
    line = np.asarray(figure.axes[1].images[0].get_array())
    frames = [tuple(line[3, 16 + 32 * i].round(2)) for i in range(5)]
    assert frames == [(1, 1, 1), (0, 0.62, 0.45), (0.9, 0.62, 0), (1, 1, 1), (1, 1, 1)]


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
        compare.read_runs([str(run)]), retrieval.evaluate(compare.read_runs([str(run)])[0], PLAIN | {"limit": 64}, torch.device("cpu"))
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
