"""Augmentation against torchvision's functional transforms, and its distribution.

    python -m pytest tests/test_augment.py
"""
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

import augment as module
from augment import MEAN, NUM_UNIFORM, STD, Augmentation, apply_augmentation, augment, augmentation_parameters


def noise(batch_size: int, height: int, width: int) -> torch.Tensor:
    """uint8 images [B, 3, H, W] with flat, grey, black and saturated pixels among the random ones."""
    generator = torch.Generator().manual_seed(height)
    images = torch.randint(0, 256, (batch_size, 3, height, width), generator=generator)
    images[:, :, :height // 4] = images[:, :1, :height // 4]  # grey
    images[:, :, height // 4:height // 2] //= 128  # 0 and 255 only
    images[:, :, height // 4:height // 2] *= 255
    return images.to(torch.uint8)


def uniform(batch_size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch_size, NUM_UNIFORM, generator=torch.Generator().manual_seed(seed))


def plain(batch_size: int, height: int, width: int) -> Augmentation:
    """Parameters that change nothing but the size."""
    return Augmentation(torch.tensor([0, 0, height, width]).repeat(batch_size, 1),
                        torch.zeros(batch_size, dtype=torch.bool), torch.arange(4).repeat(batch_size, 1),
                        torch.tensor([1.0, 1, 1, 0]).repeat(batch_size, 1),
                        torch.zeros(batch_size, dtype=torch.bool), torch.full((batch_size,), 1e-3))


def assert_torchvisions(images: torch.Tensor, parameters: Augmentation, size: int) -> torch.Tensor:
    """The views, seen to be the same as with torchvision, one float image after another."""
    result = apply_augmentation(images, parameters, size)
    assert result.shape == (len(images), 3, size, size) and result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    views = []
    for image, box, flip, order, factors, grey, sigma in zip(images, *parameters):
        view = F.to_dtype(image, torch.float32, scale=True)
        view = F.resized_crop(view, *box.tolist(), [size, size], antialias=True)
        view = F.horizontal_flip(view) if flip else view
        for operation in order.tolist():
            view = adjust[operation](view, factors[operation].item())
        view = F.rgb_to_grayscale(view, 3) if grey else view
        if size > 1:
            view = F.gaussian_blur(view, [{32: 3, 64: 7, 224: 23}.get(size, 3)] * 2, [sigma.item()] * 2)
        views.append(F.normalize(view, MEAN, STD))
    torch.testing.assert_close(result.contiguous(), torch.stack(views), rtol=0, atol=2e-5)
    return result


@pytest.mark.parametrize(("height", "width", "size"), [
    (32, 32, 32), (64, 64, 64), (64, 64, 224), (96, 96, 32), (40, 70, 32), (70, 40, 18), (300, 6, 8),
    (5, 5, 1)])
def test_augmentation_matches_torchvision(height, width, size):
    images = noise(4 if size == 224 else 48, height, width)
    assert_torchvisions(images, augmentation_parameters(uniform(len(images)), height, width, size), size)


OPERATIONS = {
    "none": lambda p: p,
    "crop": lambda p: p._replace(box=torch.stack([torch.arange(9), 8 - torch.arange(9), 20 - torch.arange(9),
                                                  torch.arange(9) + 12], 1)),
    "flip": lambda p: p._replace(flip=torch.arange(9) % 2 == 0),
    **{name: lambda p, c=c, low=low, high=high: p._replace(factors=p.factors.index_copy(
        1, torch.tensor([c]), torch.linspace(low, high, 9)[:, None]))
       for c, (name, low, high) in enumerate([("brightness", 0, 2), ("contrast", 0, 2), ("saturation", 0, 2),
                                              ("hue", -0.5, 0.5)])},
    "grey": lambda p: p._replace(grey=torch.arange(9) % 2 == 0),
    "blur": lambda p: p._replace(sigma=torch.linspace(0.01, 3, 9)),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size", [28, 64])
def test_each_operation_matches_torchvision_and_does_something(name, size):
    images = noise(9, 28, 28)
    views = assert_torchvisions(images, OPERATIONS[name](plain(9, 28, 28)), size)
    changed = (views - apply_augmentation(images, plain(9, 28, 28), size)).abs().amax((1, 2, 3)) > 0.01
    assert changed.any() == (name != "none")


def crop_by_hand(u: list[float], height: int, width: int, low: float, high: float) -> list[int]:
    """torchvision's RandomResizedCrop.get_params, its draws replaced by the uniform numbers `u` of one
    sample."""
    for area, ratio in zip(u[:10], u[10:20]):
        area = height * width * (low + (high - low) * area)
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return [int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w]
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize(("height", "width", "scale"), [
    (32, 32, (0.08, 1)), (64, 64, (0.5, 1)), (20, 90, (0.08, 1)), (90, 20, (0.3, 0.9)), (6, 400, (0.5, 1)),
    (400, 6, (0.5, 1))])
def test_crops_are_torchvisions(height, width, scale):
    u = uniform(2000)
    box = augmentation_parameters(u, height, width, 32, scale).box
    top, left, h, w = box.unbind(1)
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    assert (h > 0).all() and (w > 0).all()
    by_hand = torch.tensor([crop_by_hand(row, height, width, *scale) for row in u.tolist()])
    # float32 here and float64 there may round a side differently now and then
    assert (box == by_hand).all(1).float().mean() > 0.998
    theirs = torch.tensor([RandomResizedCrop.get_params(torch.empty(3, height, width), scale, (3 / 4, 4 / 3))
                           for _ in range(500)]).float()
    torch.testing.assert_close(box.float().mean(0), theirs.mean(0), rtol=0.12, atol=0.3)


def test_distribution_of_the_parameters():
    n = 24_000
    p = augmentation_parameters(uniform(n), 1000, 1000, 112, (0.2, 0.6), jitter=0.5)
    top, left, h, w = p.box.double().unbind(1)
    area, ratio = h * w / 1e6, w / h
    assert 0.199 < area.min() < 0.205 and 0.595 < area.max() < 0.601
    assert 0.747 < ratio.min() < 0.76 and 1.31 < ratio.max() < 1.337
    assert abs(area.mean() - 0.4) < 0.01 and abs(ratio.log().mean()) < 0.01
    for start, room in (top, 1000 - h), (left, 1000 - w):
        assert abs((start / room).mean() - 0.5) < 0.01 and (start == room).any() and (start == 0).any()
    assert abs(p.flip.double().mean() - 0.5) < 0.015 and abs(p.grey.double().mean() - 0.2) < 0.015
    assert 0.05 <= p.sigma.min() < 0.052 and 0.998 < p.sigma.max() <= 1  # half of (0.1, 2): 112 of 224 pixels
    jittered = (p.factors != torch.tensor([1.0, 1, 1, 0])).any(1)
    assert abs(jittered.double().mean() - 0.8) < 0.015
    low, high = p.factors[jittered].amin(0), p.factors[jittered].amax(0)
    torch.testing.assert_close(low, torch.tensor([0.8, 0.8, 0.9, -0.05]), rtol=0, atol=1e-3)
    torch.testing.assert_close(high, torch.tensor([1.2, 1.2, 1.1, 0.05]), rtol=0, atol=1e-3)
    torch.testing.assert_close(p.factors[jittered].mean(0), torch.tensor([1.0, 1, 1, 0]), rtol=0, atol=0.005)
    counts = (p.order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    chi2 = ((counts - n / 24) ** 2 / (n / 24)).sum()
    assert len(counts) == 24 and chi2 < 60  # of 23 degrees of freedom: 1 in 30,000
    assert (p.order.sort(1)[0] == torch.arange(4)).all()
    # none depends on another
    columns = torch.stack([p.flip, p.grey, jittered, area, ratio, p.sigma, *p.factors.T, *p.order.T[:1]])
    assert (torch.corrcoef(columns.double()) - torch.eye(11)).abs().max() < 0.03


def test_jitter_and_scale_off_leave_the_pixels():
    images = noise(64, 32, 32)
    p = augmentation_parameters(uniform(64), 32, 32, 32, (1, 1), jitter=0)
    assert (p.factors == torch.tensor([1.0, 1, 1, 0])).all()
    views = apply_augmentation(images, plain(64, 32, 32)._replace(order=p.order, factors=p.factors), 32)
    std, mean = torch.tensor(STD)[:, None, None], torch.tensor(MEAN)[:, None, None]
    pixels = ((views * std + mean) * 255).contiguous()
    torch.testing.assert_close(pixels, images.float(), rtol=0, atol=2e-3)


def test_same_generator_state_same_views():
    images = noise(600, 32, 32)
    generator = torch.Generator().manual_seed(3)
    first, second = augment(images, 32, generator), augment(images, 32, generator)
    assert not torch.equal(first, second)
    generator.manual_seed(3)
    assert torch.equal(augment(images, 32, generator), first)
    assert torch.equal(augment(images, 32, generator), second)
    same = augment(images[:1].expand(600, -1, -1, -1), 32, generator)
    assert len(same.flatten(1).unique(dim=0)) == 600  # each sample has parameters of its own
    parameters = augmentation_parameters(uniform(600, 3), 32, 32, 32)
    torch.testing.assert_close(first, apply_augmentation(images, parameters, 32), rtol=0, atol=1e-5)


def test_large_batches_go_in_pieces(monkeypatch):
    images = noise(37, 32, 32)
    whole = augment(images, 16, torch.Generator().manual_seed(0))
    monkeypatch.setattr("augment.PIECE", 5 * 16**2)
    pieces = augment(images, 16, torch.rand(37, NUM_UNIFORM, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)
    assert pieces.is_contiguous(memory_format=torch.channels_last)
    assert augment(images[:0], 16, torch.Generator()).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(("images", "arguments", "message"), [
    (torch.zeros(2, 3, 8, 8), {}, "uint8"),
    *((torch.zeros(shape, dtype=torch.uint8), {}, "B, 3, H, W")
      for shape in ((3, 8, 8), (2, 1, 8, 8), (2, 3, 0, 8))),
    *((noise(2, 8, 8), {name: value}, name) for name, value in [
        ("size", 0), ("crop_scale", (0.0, 1.0)), ("crop_scale", (0.5, 1.5)), ("crop_scale", (0.8, 0.5)),
        ("crop_scale", (math.nan, 1.0)), ("jitter", -1.0), ("jitter", 5.5)])])
def test_bad_input_is_refused(images, arguments, message):
    with pytest.raises(ValueError, match=message):
        augment(images, **{"size": 8, "source": torch.Generator(), **arguments})


@pytest.mark.parametrize("size", [32, 64])
def test_on_another_device_nothing_is_mixed_or_read_back(size):
    generator = torch.Generator()
    module._ON_DEVICE.clear()
    with FakeTensorMode():
        images = torch.empty(6, 3, 40, 32, dtype=torch.uint8, device="cuda")
        views = augment(images, size, generator)
        assert (views.device.type, views.shape, views.dtype) == ("cuda", (6, 3, size, size), torch.float32)
        assert views.is_contiguous(memory_format=torch.channels_last)
    module._ON_DEVICE.clear()


def test_autocast_does_not_round():
    images, source = noise(8, 32, 32), uniform(8)
    exact = augment(images, 32, source)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment(images, 32, source), exact)


def test_the_default_dtype_does_not_matter():
    images = noise(3, 16, 16)
    expected = augment(images, 8, torch.Generator().manual_seed(0))
    module._ON_DEVICE.clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(augment(images, 8, torch.Generator().manual_seed(0)), expected)
    finally:
        torch.set_default_dtype(torch.float32)
        module._ON_DEVICE.clear()
