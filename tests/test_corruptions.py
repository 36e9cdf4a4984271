"""Tests of corruptions.py; the -C sets are written small, in their published layouts.

Run: pytest tests/test_corruptions.py
"""
import shutil
import zipfile

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, nn

import corruptions
from corruptions import own_version_ranks
from deadleaves import deadleaves
from retrieval import partner_ranks

STATISTICS = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)  # mean and std of the channels


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
    assert {name for name, x in zip(corruptions.BUILT_IN, changed) if x} == {
        "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "motion_blur", "fog", "elastic"}
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
        x = corruptions.official("cifar100", place, labels, 32)(torch.tensor([2, 0]), 4)
        assert x.shape == (2, 19, 3, 32, 32) and x.dtype == torch.uint8
        assert x[0, :, 0, 5, 5].tolist() == list(range(19)) and (x[:, :, 1] == 4).all()
        assert x[:, 0, 2, 0, 0].tolist() == [2, 0]

    def refused(match):
        with pytest.raises((ValueError, OSError), match=match) as error:
            corruptions.official("cifar100", tmp_path, labels, 32)
        assert "\n" not in str(error.value)
    fog = (folder / "fog.npy").read_bytes()
    (folder / "fog.npy").rename(folder / "smog.npy")
    refused("lacks fog.npy")
    np.save(folder / "fog.npy", np.zeros((15, 32, 32), np.uint8))
    refused(r"fog.npy is uint8 \(15, 32, 32\), not uint8 \(15, 32, 32, 3\)")
    np.save(folder / "fog.npy", np.zeros((15, 32, 32, 3), np.float32))
    refused("fog.npy is float32")
    (folder / "fog.npy").write_bytes(fog[:5000])
    refused("cannot read .*fog.npy")
    (folder / "fog.npy").write_bytes(fog)
    np.save(folder / "labels.npy", np.tile([0, 2, 1], 5))
    refused("labels.npy does not hold the labels")
    (folder / "labels.npy").unlink()
    refused("cannot read .*labels.npy")
    shutil.rmtree(folder)
    refused("no CIFAR-100-C in")


def tiny(folder):
    """Tiny ImageNet of few images and its -C set, whose images are told apart by their colours."""
    clean, names = folder / "tiny-imagenet-200", ("val_0.JPEG", "val_1.JPEG", "val_2.JPEG")
    wnids = ("n02", "n01", "n02")
    (clean / "val" / "images").mkdir(parents=True)
    for wnid in set(wnids):
        (clean / "train" / wnid / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(clean / "train" / wnid / "images" / f"{wnid}_0.JPEG")
    lines = [f"{name}\t{wnid}\t0\t0\t1\t1\n" for name, wnid in zip(names, wnids)]
    (clean / "val" / "val_annotations.txt").write_text("".join(lines))
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
    for name in "tiny-imagenet-200-full.zip", "tiny-imagenet-200-half.zip":  # the one that is given
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for file in (tmp_path / "tiny-imagenet-200").rglob("*"):
                archive.write(file, file.relative_to(tmp_path))
    corrupted = corruptions.official("tinyimagenet", tmp_path / "tiny-imagenet-200-half.zip", labels, 32)
    assert corrupted(torch.tensor([0]), 1).shape[1] == 15
    for file in tmp_path.glob("*.zip"):
        file.unlink()

    def refused(match, labels=labels):
        with pytest.raises((ValueError, OSError), match=match) as error:
            corruptions.official("tinyimagenet", tmp_path, labels, 64)(torch.arange(3), 3)
        assert "\n" not in str(error.value)
    refused("n02/val_0.JPEG is not in the folder of its class", 1 - labels)
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
    image.with_name("val_9.JPEG").unlink()
    (folder / "fog" / "5").rename(folder / "fog" / "6")
    refused(r"fog/5 lacks val_0.JPEG, .* \(3 such\)")
    (folder / "fog" / "6").rename(folder / "fog" / "5")
    image.write_bytes(whole[:300])
    refused("cannot read .*val_2.JPEG")
    (folder / "snow").rename(folder / "hail")
    refused("lacks snow:")


# --------------------------------------------------------------------------------
def test_ranks_among_own_versions():
    g = Generator().manual_seed(0)
    u, v = torch.randn(2, 9, 5, 8, generator=g)
    whole = own_version_ranks(u, v)
    assert whole.shape == (2, 9, 5)
    assert torch.equal(whole, torch.stack([partner_ranks(*pair) for pair in zip(u, v)], 1))
    assert (own_version_ranks(u, 3.3 * u) == 1).all()
    assert own_version_ranks(u[:, :1].expand_as(u), v[:, :1].expand_as(v)).unique().tolist() == [5]  # ties
    v[3, 1, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        own_version_ranks(u, v)


def test_own_versions_are_the_candidates_and_both_views_are_of_one():
    """Of a network that passes pixels on, views whose noise is less than versions differ by are found."""
    def task(noise):
        def views(pictures, g):
            return lambda index: pictures[index] + noise * torch.randn(len(index), 3, 2, 2, generator=g)

        def corrupted(rows, severity):  # versions of one image differ by severity, those of two images do not
            return torch.randn(len(rows), 7, 3, 2, 2, generator=Generator().manual_seed(severity)) / severity
        rows = torch.arange(9)
        return corruptions.own_versions(nn.Flatten(), views, rows, corrupted, 0, "", chunk=4)["ranks"]
    assert task(1e-3).shape == (5, 2, 9, 7) and (task(1e-3) == 1).all()
    found = (task(0.3) == 1).mean((1, 2, 3))
    assert found[0] > found[2] > found[4] > 1 / 7


def test_probe_is_what_its_docstring_says():
    """Against loops over images for the neighbours, and scipy's optimiser for the linear classifier."""
    g = Generator().manual_seed(1)
    labels = torch.arange(600) % 3
    x = (0.35 * torch.randn(3, 100, generator=g))[labels] + torch.randn(600, 100, generator=g)
    images = (127 + 30 * x[:, :75]).clamp(0, 255).byte().view(600, 3, 5, 5)
    sets = [(images, torch.arange(300), labels), (images, torch.arange(300, 600), labels)]
    near, linear = corruptions.probe(nn.Flatten(), sets, 5, STATISTICS, torch.device("cpu"), 0, "")["correct"]
    mean, std = (torch.tensor(x)[:, None, None] for x in STATISTICS)
    x, y = ((images / 255 - mean) / std).flatten(1).double().numpy(), labels.numpy()
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
            logits = torch.from_numpy(x[rows]) @ w[:, :-1].T + w[:, -1]
            value = F.cross_entropy(logits, labels[rows]) + l2 / 2 * w[:, :-1].square().sum()
            value.backward()
            return value.item(), w.grad.numpy().ravel()
        w = scipy.optimize.minimize(loss, np.zeros(228), jac=True, method="L-BFGS-B").x.reshape(3, 76)
        return (x[of] @ w[:, :-1].T + w[:, -1]).argmax(1) == y[of]
    order = torch.randperm(300, generator=Generator().manual_seed(0)).numpy()
    held = {l2: classes(order[60:], l2, order[:60]).mean() for l2 in (0.3, 0.1, 0.03, 0.01, 0.003)}
    agree = {l2: (classes(np.arange(300), l2, np.arange(300, 600)) == linear).mean() for l2 in held}
    assert agree[max(held, key=held.get)] == max(agree.values()) > 0.99 and min(agree.values()) < 0.97


def test_probe_at_another_size_and_of_one_class():
    labels = torch.arange(60) % 3
    colours = torch.randint(0, 256, (60, 3, 1, 1), generator=Generator().manual_seed(0))
    images = colours.byte().expand(60, 3, 6, 6)

    def correct(size, labels=labels):
        sets = [(images, torch.arange(30), labels), (images, torch.arange(30, 60), labels)]
        encoder = nn.Sequential(nn.AvgPool2d(size), nn.Flatten())
        return corruptions.probe(encoder, sets, size, STATISTICS, torch.device("cpu"), 0, "")["correct"]
    assert correct(6).shape == (2, 30) and correct(6).dtype == bool
    assert (correct(6) == correct(9)).all()  # flat images stay as they are
    with pytest.raises(ValueError, match="two classes"):
        correct(6, labels * 0)
