"""Tests of corruptions.py; the -C sets are written small, in their published layouts.

Run: pytest tests/test_corruptions.py
"""
import shutil

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


def cifar_c(folder, n=3):
    """CIFAR-100-C of n images: each pixel tells the corruption, the severity and the image."""
    folder.mkdir(parents=True)
    for c, name in enumerate(corruptions.CIFAR):
        array = np.full((5 * n, 32, 32, 3), c, np.uint8)
        array[..., 1] = np.repeat(np.arange(1, 6), n)[:, None, None]
        array[..., 2] = np.tile(np.arange(n), 5)[:, None, None]
        np.save(folder / f"{name}.npy", array)
    return folder


def refused(match, *words):
    with pytest.raises((ValueError, OSError), match=match) as error:
        corruptions.official(*words)(torch.arange(3), 3)
    assert "\n" not in str(error.value)


def test_cifar_100_c(tmp_path):
    assert len(corruptions.CIFAR) == 19
    folder, words = cifar_c(tmp_path / "CIFAR-100-C"), ("cifar100", tmp_path, 3, 32)
    x = corruptions.official(*words)(torch.tensor([2, 0]), 4)
    assert x.shape == (2, 19, 3, 32, 32) and x.dtype == torch.uint8
    assert x[0, :, 0, 5, 5].tolist() == list(range(19)) and (x[:, :, 1] == 4).all()
    assert x[:, 0, 2, 0, 0].tolist() == [2, 0]
    np.save(folder / "fog.npy", np.zeros((15, 32, 32), np.uint8))
    refused(r"fog.npy is uint8 \(15, 32, 32\), not uint8 \(15, 32, 32, 3\)", *words)
    (folder / "fog.npy").write_bytes(b"")  # the disk was full
    refused("CIFAR-100-C is empty: get it again", *words)
    (folder / "fog.npy").unlink()
    refused("fog.npy", *words)
    shutil.rmtree(folder)
    refused("there is no .*CIFAR-100-C: unpack https", *words)


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
                there = folder / "Tiny-ImageNet-C" / corruption / str(severity) / wnid
                there.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (64, 64), (10 * c, 40 * severity, 80 * i)).save(there / name, quality=100)
    return folder / "Tiny-ImageNet-C"


def test_tiny_imagenet_c(tmp_path):
    assert len(corruptions.TINY) == 15
    folder, words = tiny(tmp_path), ("tinyimagenet", tmp_path, 3, 32)
    x = corruptions.official(*words)(torch.tensor([2, 1]), 3).float()
    assert x.shape == (2, 15, 3, 32, 32)
    torch.testing.assert_close(x[0, :, 0, 9, 9], 10.0 * torch.arange(15), rtol=0, atol=4)
    torch.testing.assert_close(x[:, 0, 1:, 9, 9], torch.tensor([[120.0, 160], [120, 80]]), rtol=0, atol=4)
    image = folder / "fog" / "3" / "n02" / "val_2.JPEG"
    image.write_bytes(image.read_bytes()[:300])
    refused("cannot read .*val_2.JPEG", *words)
    (folder / "brightness" / "1" / "n02" / "val_2.JPEG").unlink()
    refused("do not hold the same", *words)


# --------------------------------------------------------------------------------
def test_ranks_among_own_versions():
    g = Generator().manual_seed(0)
    u, v = torch.randn(2, 9, 5, 8, generator=g)
    whole = own_version_ranks(u, v)
    assert whole.shape == (2, 9, 5)
    assert torch.equal(whole, torch.stack([partner_ranks(*pair) for pair in zip(u, v)], 1))
    assert (own_version_ranks(u, 3.3 * u) == 1).all()
    for power in (64, 100, -44, -100):
        assert torch.equal(own_version_ranks(u * 2.0 ** power, v), whole)
    assert own_version_ranks(u[:, :1].expand_as(u), v[:, :1].expand_as(v)).unique().tolist() == [5]  # ties


def test_own_versions_are_the_candidates_and_both_views_are_of_one():
    """Of a network that passes pixels on, views whose noise is less than versions differ by are found."""
    def task(noise):
        def views(pictures, g):
            return lambda index: pictures[index] + noise * torch.randn(len(index), 3, 2, 2, generator=g)

        def corrupted(rows, severity):  # versions of one image differ by severity, those of two images do not
            return torch.randn(len(rows), 7, 3, 2, 2, generator=Generator().manual_seed(severity)) / severity
        rows = torch.arange(9)
        return corruptions.own_versions(nn.Flatten(), views, rows, corrupted, 0, "", chunk=4)
    assert task(1e-3).shape == (5, 2, 9, 7) and (task(1e-3) == 1).all()
    found = (task(0.3) == 1).mean((1, 2, 3))
    assert found[0] > found[2] > found[4] > 1 / 7


def test_probe_is_what_its_docstring_says():
    """Against loops over images for the neighbours, and scipy's optimiser for the linear classifier."""
    g = Generator().manual_seed(1)
    labels = torch.arange(600) % 3
    features = (0.15 * torch.randn(3, 75, generator=g))[labels] + torch.randn(600, 75, generator=g)
    found = corruptions.probe(features[:300], labels[:300], features[300:], labels[300:], 0, "")
    near, linear = found["knn"][0], found["linear"][0]
    for scale in (2.0 ** 70, 2.0 ** -70):  # bit for bit
        x, new = scale * features[:300], scale * features[300:]
        scaled = corruptions.probe(x, labels[:300], new, labels[300:], 0, "")
        assert all(np.array_equal(scaled[name], found[name]) for name in found)
    x, y = features.double().numpy(), labels.numpy()
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
    with pytest.raises(ValueError, match="two classes"):
        corruptions.probe(features, labels * 0, features, labels, 0, "")


def test_features_are_of_normalised_images_of_the_given_size():
    colours = torch.randint(0, 256, (5, 3, 1, 1), generator=Generator().manual_seed(0))
    images = colours.byte().expand(5, 3, 6, 6)
    mean, std, rows = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), torch.tensor([3, 1])
    expected = (images[rows, :, 0, 0] / 255 - torch.tensor(mean)) / torch.tensor(std)
    for size in (6, 9):  # flat images stay as they are
        encoder = nn.Sequential(nn.AvgPool2d(size), nn.Flatten())
        found = corruptions.features(encoder, images, rows, size, mean, std, torch.device("cpu"))
        torch.testing.assert_close(found, expected)
