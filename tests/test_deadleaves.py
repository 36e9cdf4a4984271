"""The generated images.  Run: python -m pytest tests/test_deadleaves.py"""
import hashlib

import pytest
import torch

from deadleaves import deadleaves


def test_deadleaves_are_the_same_everywhere():
    images, labels = deadleaves("train", 300, seed=0)
    assert images.shape == (300, 3, 32, 32) and images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16] == "138a9773eac529f9"
    assert torch.equal(deadleaves("train", 300, seed=0)[0], images)
    assert torch.equal(labels, torch.arange(300) % 128)
    assert 100 < images.float().mean() < 150 and images.float().std() > 50


def test_deadleaves_splits_seeds_and_sizes():
    train, val = deadleaves("train", 256, seed=1)[0], deadleaves("val", 256, seed=1)[0]
    distance = (train.flatten(1)[:, None].float() - val.flatten(1).float()).abs().mean(2)  # [256, 256]
    assert distance.min() > 5 and len(train.flatten(1).unique(dim=0)) == 256
    assert not torch.equal(train, deadleaves("train", 256, seed=2)[0])
    images, labels = deadleaves("val", 7, seed=0, size=48, num_classes=5)
    assert images.shape == (7, 3, 48, 48) and labels.tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_deadleaves_classes_are_shared_by_the_splits():
    def look(images):  # [N, 64]: how much of an image each colour of a coarse cube takes
        levels = (images.long() // 64 * torch.tensor([16, 4, 1])[:, None, None]).sum(1).flatten(1)
        return torch.nn.functional.one_hot(levels, 64).float().mean(1)

    train, labels = deadleaves("train", 1280, seed=0)
    val, val_labels = deadleaves("val", 512, seed=0)
    means = torch.zeros(128, 64).index_add_(0, labels, look(train)) / 10
    accuracy = (torch.cdist(look(val), means).argmin(1) == val_labels).float().mean()
    assert accuracy > 0.25  # chance is 0.008; the classes are neither alike nor given away by colour


@pytest.mark.parametrize("arguments", [
    ("test", 8, 0), ("train", 0, 0), ("train", 8, 0, 0), ("train", 8, 0, 32, 0)])
def test_deadleaves_bad_input_is_refused(arguments):
    with pytest.raises(ValueError, match="split|at least 1"):
        deadleaves(*arguments)
