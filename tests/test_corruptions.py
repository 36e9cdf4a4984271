"""Tests of corruptions.py; the -C sets are written small in their published layouts.  Run: pytest test_corruptions.py"""
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator

import corruptions
from deadleaves import deadleaves


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
