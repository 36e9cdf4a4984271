"""Whole-batch augmentation: SimCLR's pipeline in tensor code, each sample with its own random parameters.
Copy this file into your project; it needs torch alone.

    views = augment(images, 32, torch.Generator())    # uint8 [B, 3, H, W] -> float32 [B, 3, 32, 32]
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
LUMA = (0.2989, 0.587, 0.114)  # weights of red, green and blue in grey, as in torchvision
RATIO, TRIES = (3 / 4, 4 / 3), 10  # of the random resized crop
PIECE = 2**19  # output pixels augmented at a time on a CPU
NUM_UNIFORM = 2 * TRIES + 14  # uniform numbers that one sample needs
_ON_DEVICE = {}  # by device and values, of _constants


class Augmentation(NamedTuple):
    """Parameters of B augmentations, in the units of torchvision's functional transforms."""
    box: Tensor      # [B, 4] int64: top, left, height, width of the crop, pixels of the source
    flip: Tensor     # [B] bool
    order: Tensor    # [B, 4] int64: which of brightness 0, contrast 1, saturation 2, hue 3 comes first, ...
    factors: Tensor  # [B, 4] float32 of brightness, contrast, saturation, hue; (1, 1, 1, 0) changes nothing
    grey: Tensor     # [B] bool
    sigma: Tensor    # [B] float32, of the blur, pixels of the output


def augmentation_parameters(uniform: Tensor, height: int, width: int, size: int,
                            crop_scale: tuple[float, float] = (0.08, 1.0), jitter: float = 1.0,
                            ) -> Augmentation:
    """Parameters for images of height×width, views of size×size, from `uniform` [B, NUM_UNIFORM] in [0, 1).

    The crop is torchvision's RandomResizedCrop: the first of ten drawn boxes that fits, else the central crop
    of the nearest allowed ratio. Colour jitter (0.4, 0.4, 0.2, 0.1)·jitter is for 80 %, grey for 20 %.
    """
    area, ratio, other = uniform.split([TRIES, TRIES, NUM_UNIFORM - 2 * TRIES], dim=1)
    area = height * width * (crop_scale[0] + (crop_scale[1] - crop_scale[0]) * area)
    ratio = (math.log(RATIO[0]) + math.log(RATIO[1] / RATIO[0]) * ratio).exp()
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()  # [B, TRIES]
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    # The fallback is an eleventh try that always fits; argmax finds the first that does.
    central = (min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1])))
    first = torch.nn.functional.pad(fits.int(), (0, 1), value=1).argmax(1, keepdim=True)
    h, w = (torch.nn.functional.pad(x, (0, 1), value=c).gather(1, first)[:, 0]
            for x, c in zip((h, w), central))
    top, left, flip, apply, grey, sigma = other[:, :6].unbind(1)
    # (1 - 2^-24)·n may round up to n, hence the minimum.
    top, left = (torch.minimum((u * (free + 1)).floor(), free)
                 for u, free in ((top, height - h), (left, width - w)))
    fallback = first[:, 0] == TRIES
    top = torch.where(fallback, (height - central[0]) // 2, top)
    left = torch.where(fallback, (width - central[1]) // 2, left)

    strengths = (0.4 * jitter, 0.4 * jitter, 0.2 * jitter, 0.1 * jitter)
    low = [max(0.0, 1 - s) for s in strengths[:3]] + [-strengths[3]]
    high = [1 + s for s in strengths[:3]] + [strengths[3]]
    factors = torch.stack([torch.where(apply < 0.8, a + (b - a) * u, float(c < 3))
                           for c, (a, b, u) in enumerate(zip(low, high, other[:, 6:10].unbind(1)))], 1)
    order = other[:, 10:14].argsort(dim=1, stable=True)
    return Augmentation(torch.stack([top, left, h, w], 1).long(), flip < 0.5, order, factors, grey < 0.2,
                        (0.1 + 1.9 * sigma) * (size / 224))


def resize_weights(index: Tensor, start: Tensor, length: Tensor, n: int) -> Tensor:
    """Weights [B, S, n] of antialiased bilinear resizing: pixels [start, start + length) of n to S.

    `index` [B, S] is the output pixel each row stands for. A triangle as wide as the step between output
    pixels, at least one pixel, cut off at the edges of the crop: torch's `interpolate(antialias=True)`.
    """
    length = length[:, None, None].float()
    scale = length / index.shape[1]
    pixel = (torch.arange(n, device=index.device) - start[:, None])[:, None].float()  # [B, 1, n], of the crop
    distance = (pixel + 0.5 - (index[:, :, None].float() + 0.5) * scale).div_(scale.clamp(min=1))
    weights = (1 - distance.abs_()).clamp_(min=0).mul_((pixel >= 0) & (pixel < length))
    return weights.div_(weights.sum(2, keepdim=True))


def blur_weights(sigma: Tensor, size: int) -> Tensor:
    """Weights [B, size, size] of a blur of `sigma` [B], a tenth of the image wide, borders reflected."""
    reach = max(3, size // 10 | 1) // 2
    offset = torch.arange(-reach, reach + 1, device=sigma.device)
    # e^-60 is as good as nothing, and far from the denormal numbers, which are slow to multiply with.
    kernel = torch.softmax((-0.5 * (offset / sigma[:, None]) ** 2).clamp(min=-60), 1)  # [B, k]
    last = size - 1
    pixel = torch.arange(size, device=sigma.device)
    source = pixel[:, None] + offset[:, None, None]  # [k, size, 1]
    source = (last - (last - source.abs()).abs()).clamp(min=0)
    return (kernel @ (source == pixel).float().flatten(1)).view(-1, size, size)


def resample(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows[b] @ x[b, c] @ columns[b]^T, channels-last, of x [B, C, H, W], rows [B, S, H], columns [B, T, W].

    The channels ride along as rows, then as columns: two products per sample, no copies of the weights.
    """
    B, C, H, W = x.shape
    S, T = rows.shape[1], columns.shape[1]
    x = (x.float().reshape(B, C * H, W) @ columns.mT).view(B, C, H, T)
    return (rows @ x.permute(0, 2, 3, 1).reshape(B, H, T * C)).view(B, S, T, C).permute(0, 3, 1, 2)


def shift_hue(x: Tensor, turn: Tensor) -> Tensor:
    """x [B, 3, P] in [0, 1], the hue of HSV moved by `turn` [B] of the circle, value and saturation kept."""
    r, g, b = x.unbind(1)
    low, high = torch.minimum(torch.minimum(r, g), b), torch.maximum(torch.maximum(r, g), b)
    chroma = high.sub_(low)
    # Around the hexagon, with (r, g, b) scaled to reach from 0 to 1, g + b - r rises from -1 at red to 2 at
    # cyan while g >= b, and falls again while b > g: no case a sextant. Hue in sextants from cyan, -3 to 3.
    hue = (g + b).sub_(r).sub_(low).div_(chroma.clamp(min=1e-30)).neg_().add_(2).copysign_(b - g)
    hue.add_(6 * turn[:, None])
    hue.sub_((hue / 6).round_(), alpha=6)  # remainder_ takes as long as all the rest
    x = torch.stack([hue.abs().sub_(1), 2 - (hue + 1).abs_(), 2 - (hue - 1).abs_()], 1)
    return x.clamp_(0, 1).mul_(chroma[:, None]).add_(low[:, None])


@torch.compiler.assume_constant_result
def _constants(device: torch.device, *values: float) -> Tensor:
    """Copied to a device once: in every step a copy would wait, and a CUDA graph could not hold it."""
    if (device, values) not in _ON_DEVICE:
        _ON_DEVICE[device, values] = torch.tensor(values, dtype=torch.float32, device=device)
    return _ON_DEVICE[device, values]


def apply_augmentation(images: Tensor, parameters: Augmentation, size: int, mean: tuple = MEAN,
                       std: tuple = STD) -> Tensor:
    """Augmented images, normalised float32 [B, 3, size, size], channels-last, of uint8 [B, 3, H, W].

    Equals torchvision's functional transforms of the same parameters on float images in [0, 1], to rounding
    (on CUDA unless matrix products may round to TF32). The parameters are on the images' device.
    """
    (B, _, H, W), device = images.shape, images.device
    box, flip, order, factors, grey, sigma = parameters
    luma, mean, std = (_constants(device, *x) for x in (LUMA, mean, std))

    with torch.autocast(device.type, enabled=False):
        # Random resized crop and flip.
        top, left, height, width = box.unbind(1)
        index = torch.arange(size, device=device).expand(B, size)
        x = resample(images, resize_weights(index, top, height, H).div_(255),
                     resize_weights(torch.where(flip[:, None], size - 1 - index, index), left, width, W))
        x = x.reshape(B, 3, size * size)

        # Colour. Brightness, contrast and saturation are f·x + (1-f)·(0, the mean of grey, or grey): a 3×3
        # matrix and a constant per sample. Hue costs more, and its place in the order differs; so all pass
        # three places before hue, hue, and three after it, with f = 1 where a place is not theirs.
        hues_passed = (order == 3).cumsum(1)  # [B, 4]: 0 before hue's place, 1 from there on
        f = factors.gather(1, order)
        f = torch.cat([torch.where(hues_passed == 0, f, 1),
                       torch.where((hues_passed == 1) & (order != 3), f, 1)], 1)
        rest, eye = (1 - f) * (order == 2).repeat(1, 2), torch.eye(3, dtype=torch.float32, device=device)
        matrices = f[:, :, None, None] * eye + rest[:, :, None, None] * luma  # [B, 8, 3, 3]
        rest = (1 - f) * (order == 1).repeat(1, 2)

        def blend(x: Tensor, place: int) -> Tensor:
            constant = rest[:, place] * (x.mean(2) * luma).sum(1)
            return torch.baddbmm(constant[:, None, None], matrices[:, place], x).clamp_(0, 1)

        for place in (0, 1, 2):
            x = blend(x, place)
        x = shift_hue(x, factors[:, 3])
        for place in (5, 6, 7):
            x = blend(x, place)

        # Grey and normalisation in one product; blur after it is the same, since its weights sum to one.
        matrix = torch.where(grey[:, None, None], luma, eye) / std[:, None]  # [B, 3, 3]
        x = torch.baddbmm((-mean / std)[:, None], matrix, x).view(B, 3, size, size)
        blur = blur_weights(sigma, size)
        return resample(x, blur, blur)


def augment(images: Tensor, size: int, source: torch.Generator | Tensor,
            crop_scale: tuple[float, float] = (0.08, 1.0), jitter: float = 1.0, mean: tuple = MEAN,
            std: tuple = STD) -> Tensor:
    """One random view of each image: normalised float32 [B, 3, size, size] of uint8 `images` [B, 3, H, W].

    Random resized crop, flip, colour jitter (times `jitter`, 0 to 5), grey and Gaussian blur as in SimCLR
    (Chen et al., ICML 2020), then `mean` and `std` of the channels.  source: a generator, of which one
    torch.rand takes all that is random, or those numbers, uniform in [0, 1), [B, NUM_UNIFORM]: equal ones
    give the same views on every device, to rounding. Raises ValueError on a wrong dtype, shape or knob.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must be uint8 [B, 3, H, W], got {images.dtype} {list(images.shape)}")
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ValueError(f"crop_scale must be (low, high) with 0 < low <= high <= 1, got {tuple(crop_scale)}")
    if not 0 <= jitter <= 5:
        raise ValueError(f"jitter must be from 0 (none) to 5 (hue all around), got {jitter}")
    if not isinstance(source, Tensor):
        shape = len(images), NUM_UNIFORM
        source = torch.rand(shape, generator=source, dtype=torch.float32, device=source.device)
    # On the CPU in pieces that its caches hold; a device takes the whole batch at once.
    piece = max(1, PIECE // size**2) if images.device.type == "cpu" else max(1, len(images))
    uniform = source.to(images.device, non_blocking=images.is_cuda)  # to the CPU nothing would wait for it
    views = [apply_augmentation(x, augmentation_parameters(part, *x.shape[2:], size, crop_scale, jitter),
                                size, mean, std)
             for x, part in zip(images.split(piece), uniform.split(piece))]
    return torch.cat(views) if len(views) > 1 else views[0]


def views_of(images: Tensor, generator: torch.Generator, size: int, crop_scale: float, jitter: float,
             mean: tuple, std: tuple, device: torch.device) -> Callable[[Tensor], Tensor]:
    """views(index) -> one random view of each of images[index], [len(index), 3, size, size] on the device."""
    def views(index: Tensor) -> Tensor:
        batch = images[index.to(images.device, non_blocking=images.is_cuda)]
        if batch.device != device:  # a set too large for the device: only a pinned copy does not wait for it
            batch = batch.pin_memory().to(device, non_blocking=True)
        batch = augment(batch, size, generator, (crop_scale, 1.0), jitter, mean, std)
        return batch.contiguous(memory_format=torch.channels_last)
    return views
