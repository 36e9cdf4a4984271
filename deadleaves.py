"""Dead leaves: images of overlapping random shapes, drawn from a seed.

    images, labels = deadleaves("train", 1280, seed=0)
"""
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

import cli

LEAVES = 48  # per image, front to back; what they leave open is the background
LARGEST = 0.45  # radius of a leaf, of the image's side
LADDER = np.array([0.3, 0.45, 0.6, 0.74, 0.88])  # lightness of a palette's colours
HARMONIES = np.array([[0, 0.03, -0.04, 0.07, 0.5], [0, 0.06, 0.12, -0.06, 0.18], [0, 0.5, 0.04, 0.54, -0.04],
                      [0, 0.33, 0.67, 0.03, 0.36], [0, 0.42, 0.58, 0.03, -0.03]])  # hues of a palette, turns
f32 = np.float32
SHAPES = (  # distances from the centre, up to the edge at the radius, of shapes of about the same area
    lambda x, y: np.sqrt(x * x + y * y),  # disc
    lambda x, y: np.maximum(np.abs(x), np.abs(y)) * f32(1.125),  # square
    lambda x, y: np.maximum(y, np.abs(x) * f32(0.875) - y * f32(0.5)) * f32(1.25),  # triangle
    lambda x, y: np.maximum(np.abs(y), np.abs(x) * f32(0.875) + np.abs(y) * f32(0.5)))  # hexagon
CHUNK = 4096  # pixels drawn at a time, each with all its leaves: what the caches hold


def oklch_to_srgb(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """Colours [..., 3], whole numbers to 255, of OKLab's lightness, chroma, hue in turns (Ottosson, 2020)."""
    a, b = chroma * np.cos(2 * np.pi * hue), chroma * np.sin(2 * np.pi * hue)
    to_lms = (0.3963377774, 0.2158037573), (-0.1055613458, -0.0638541728), (-0.0894841775, -1.2914855480)
    to_rgb = ((4.0767416621, -3.3077115913, 0.2309699292), (-1.2684380046, 2.6097574011, -0.3413193965),
              (-0.0041960863, -0.7034186147, 1.7076147010))
    lms = np.stack([lightness + x * a + y * b for x, y in to_lms], -1) ** 3
    rgb = np.stack([(lms * row).sum(-1) for row in to_rgb], -1).clip(0, 1)
    return np.round(255 * np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055))


def deadleaves(split: str, num_images: int, seed: int, size: int = 32,
               num_classes: int = 128) -> tuple[Tensor, Tensor]:
    """Images, uint8 [N, 3, size, size], and labels, int64 [N]: dead leaves (Baradad et al., NeurIPS 2021).

    Labels go round the classes; train and val share a seed's classes and differ in the images. The bytes are
    the same everywhere: leaves are drawn in float64 and rounded to coarse steps; pixels see only single
    additions, products, square roots and roundings, which IEEE 754 fixes to the bit; what is summed, in any
    order, are whole numbers below 2^24. Raises ValueError for another split, or a number below 1.
    """
    if split not in ("train", "val") or min(num_images, size, num_classes) < 1:
        raise ValueError(f"{(split, num_images, size, num_classes)}: give train or val, and at least 1")
    C, N, L = num_classes, num_images, LEAVES

    # Classes: each a palette of five, a ladder of lightness over hues in harmony, a kind of leaves.
    draw = np.random.default_rng([seed, 0]).random
    hue = (np.arange(C) * 0.618034)[:, None] + HARMONIES[(draw(C) * len(HARMONIES)).astype(int)]  # [C, 5]
    lightness = LADDER[draw((C, 5)).argsort(1)] + 0.1 * (draw((C, 5)) - 0.5)
    chroma = (0.03 + 0.12 * draw((C, 1))) * (0.5 + draw((C, 5)))
    smallest, stretch, aligned = 0.05 + 0.06 * draw(C), 1 + 2 * draw(C) ** 2, draw(C) < 0.5
    direction, shape = draw(C), (draw(C) * len(SHAPES)).astype(int)
    striped, period = draw(C) < 0.3, 0.08 + 0.12 * draw(C)

    # Leaves, front to back: [N, L] of position, radius, direction, colour, in parts of the image and turns.
    draw = np.random.default_rng([seed, 1 + (split == "val")]).random
    labels = np.arange(N) % C
    of = labels[:, None]
    centre = 1.2 * draw((N, L, 2)) - 0.1
    # P(radius > r) ~ 1/r^2: alike at every scale, up to the largest.
    radius = smallest[of] / np.sqrt(1 - draw((N, L)) * (1 - (smallest[of] / LARGEST) ** 2))
    turn = np.where(aligned[of], direction[of] + 0.04 * (draw((N, L)) - 0.5), draw((N, L)))
    share = (draw((N, 5)) ** 2).cumsum(1)  # of each colour in the image: some rule, some hardly occur
    pick = of, (draw((N, L, 1)) * share[:, None, 4:] > share[:, None, :4]).sum(2)
    colour = oklch_to_srgb(lightness[pick] + 0.08 * (draw((N, L)) - 0.5) + 0.1 * (draw((N, 1)) - 0.5),
                           chroma[pick] * (0.8 + 0.4 * draw((N, L))), hue[pick] + 0.04 * (draw((N, L)) - 0.5))
    radius[:, -1], centre[:, -1] = 2, 0.5  # the last is the background

    # A leaf's coordinates along and across it are affine in the pixel's, and so is the light on it: red,
    # green, blue at the corner of the image, and their change along x and y.
    cos, sin, long = np.cos(2 * np.pi * turn), np.sin(2 * np.pi * turn), np.sqrt(stretch[of])
    axes = np.stack([np.stack([cos / long, sin / long], -1), np.stack([-sin * long, cos * long], -1)], 2)
    offset = -(axes * centre[:, :, None]).sum(3) * size  # [N, L, 2]
    slope = -18 / (radius * size)  # levels per pixel: the light comes from the upper left
    corner = colour - (slope * centre.sum(2) * size)[..., None]
    paint = np.stack([*np.moveaxis(corner, 2, 0), slope, slope], 1)
    rounded = (np.round(v * 4096) / 4096 for v in (axes, offset, radius * size, 1 / (period[labels] * size)))
    axes, offset, radius, wave = (v.astype(np.float32) for v in rounded)
    paint = np.round(paint * 16).astype(np.float32)  # [N, 5, L]
    pixel = np.arange(size, dtype=np.float32) + f32(0.5)
    images = np.empty((N, 3, size, size), np.uint8)

    def render(rows: slice) -> None:  # n images of one class
        label = labels[rows.start]
        along, across = (axes[rows, :, i, :1, None] * pixel + axes[rows, :, i, 1:, None] * pixel[:, None]
                         + offset[rows, :, i, None, None] for i in (0, 1))  # [n, L, size, size] each
        cover = (radius[rows, :, None, None] + f32(0.5) - SHAPES[shape[label]](along, across)).clip(0, 1)
        open_ = np.full((len(cover), size, size), 512, np.float32)  # what leaves in front have left, of 512
        for part in cover.swapaxes(0, 1):
            part[:] = np.rint(part * open_)
            open_ -= part
        layers = (paint[rows] @ cover.reshape(-1, L, size * size)).reshape(-1, 5, size, size)
        image = layers[:, :3] + layers[:, 3:4] * pixel + layers[:, 4:] * pixel[:, None]
        if striped[label]:
            along *= wave[rows, None, None, None]
            along = np.abs(along - np.floor(along) - f32(0.5))
            image += ((np.rint(along * 640) - 160) * cover).sum(1, keepdims=True)
        images[rows] = np.rint(image / f32(16 * 512)).clip(0, 255)

    stride = C * max(1, CHUNK // size**2)
    chunks = [slice(at, at + stride, C) for label in range(min(C, N)) for at in range(label, N, stride)]
    tick = cli.progress("drawing images", len(chunks), "parts")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, _ in enumerate(pool.map(render, chunks), 1):
            tick(done)
    return torch.from_numpy(images), torch.from_numpy(labels)
