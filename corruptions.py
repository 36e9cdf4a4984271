"""Corrupted versions of validation images: readers of the published -C sets, and a dozen corruptions of our own.

Both give a function corrupted(rows, severity), uint8 [len(rows), C, 3, H, W]: the versions by the C corruptions at
severity 1 to 5 of the images `rows` of the validation split. Built-in scores compare with one another
alone, never with those of the -C sets: the corruptions are similar in kind, not in strength.
"""
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

import data

# ------------------------------------------------------------------------------------------------- the published sets
TINY = ("brightness", "contrast", "defocus_blur", "elastic_transform", "fog", "frost", "gaussian_noise", "glass_blur",
        "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "shot_noise", "snow", "zoom_blur")
CIFAR = tuple(sorted((*TINY, "gaussian_blur", "saturate", "spatter", "speckle_noise")))
OFFICIAL = {"cifar100": ("CIFAR-100-C", "https://zenodo.org/records/3555552"),
            "tinyimagenet": ("Tiny-ImageNet-C", "https://zenodo.org/records/2536630")}  # Hendrycks and Dietterich, ICLR 2019
SEVERITIES = range(1, 6)


def clean_folder(data_dir: Path) -> Path:
    """Where the clean images are when data_dir may be the folder of a -C set itself."""
    return data_dir.parent if data_dir.name.lower() in [name.lower() for name, _ in OFFICIAL.values()] else data_dir


def published(dataset: str, data_dir: Path) -> Path:
    """The folder of the -C set of this data set, in data_dir or data_dir itself. Raises FileNotFoundError where there is none."""
    name, url = OFFICIAL[dataset]
    data_dir = data_dir.parent if data_dir.is_file() else data_dir  # a zip of the clean images
    found = [path for path in (data_dir, *sorted(data_dir.iterdir())) if path.is_dir() and path.name.lower() == name.lower()]
    if not found:
        raise FileNotFoundError(f"no {name} in {data_dir}: unpack {url} there, or give --corruptions built-in")
    return found[0]


def digest(folder: Path) -> str:
    """Of the names, sizes and times of a -C set's arrays and folders: tells a changed set from the one before without reading it."""
    there = [(path, path.stat()) for depth in ("*", "*/*", "*/*/*") for path in sorted(folder.glob(depth))]
    return data.digest("".join(f"{path.relative_to(folder)} {s.st_size} {s.st_mtime_ns}\n" for path, s in there).encode())


def official(dataset: str, data_dir: Path, labels: Tensor, size: int) -> Callable:
    """Reader of the -C set of this data set in data_dir (or data_dir itself), after a check of its whole layout.

    dataset: cifar100 or tinyimagenet. labels [N]: of the whole validation split. size: side to which Tiny-ImageNet-C's JPEGs
    are brought. CIFAR-100-C stays on the disk, memory-mapped. Raises ValueError or OSError, with one line, for a set that is absent or not complete.
    """
    folder, url = published(dataset, data_dir), OFFICIAL[dataset][1]
    names, suffix = (CIFAR, ".npy") if dataset == "cifar100" else (TINY, "")
    missing = [x for x in names if not (folder / f"{x}{suffix}").exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(x + suffix for x in missing)}: it takes all {len(names)} corruptions; "
                                f"get the whole set from {url}")
    read = cifar_c if dataset == "cifar100" else tiny_c
    return read(folder, names, clean_folder(data_dir), labels.numpy(), size)


def cifar_c(folder: Path, names: tuple, clean: Path, labels: np.ndarray, size: int) -> Callable:
    """CIFAR-100-C: <corruption>.npy, uint8 [5N, 32, 32, 3], severity s at rows (s-1)N to sN; labels.npy [5N]."""
    n = len(labels)

    def mapped(name: str) -> np.ndarray:
        try:
            return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read {folder / name}.npy ({str(error).splitlines()[0]}): get it again") from None
    arrays = [mapped(name) for name in names]
    for name, array in zip(names, arrays):
        if array.dtype != np.uint8 or array.shape != (5 * n, 32, 32, 3):
            raise ValueError(f"{folder / name}.npy is {array.dtype} {array.shape}, not uint8 {(5 * n, 32, 32, 3)}: get it again")
    given = mapped("labels")
    if given.size not in (n, 5 * n) or (given.reshape(-1, n) != labels).any():
        raise ValueError(f"{folder / 'labels.npy'} does not hold the labels of the {n:,} clean images in their order: get it again")

    def corrupted(rows: Tensor, severity: int) -> Tensor:
        at = (severity - 1) * n + rows.numpy()
        return torch.from_numpy(np.stack([array[at] for array in arrays], 1)).permute(0, 1, 4, 2, 3)
    return corrupted


def tiny_c(folder: Path, names: tuple, clean: Path, labels: np.ndarray, size: int) -> Callable:
    """Tiny-ImageNet-C: <corruption>/<severity>/<wnid>/<name>.JPEG, one for each image of the clean validation split."""
    files = [Path(name).name for name in data.tinyimagenet_source(clean, "val")[2]()[0]]
    if len(files) != len(labels):
        raise ValueError(f"{clean} has {len(files):,} validation images, of which {len(labels):,} can be read: repair the others")
    wnid_of = {}
    for name in names:
        there = sorted(entry.name for entry in os.scandir(folder / name) if entry.is_dir())
        if there != [str(s) for s in SEVERITIES]:
            raise ValueError(f"{folder / name} has the folders {' '.join(there) or 'none'}, not 1 2 3 4 5: get the whole set again")
        for severity in there:
            inside = folder / name / severity
            of = {file.name: wnid.name for wnid in os.scandir(inside) if wnid.is_dir() for file in os.scandir(wnid.path)}
            lacking, surplus = sorted(set(files) - of.keys()), sorted(of.keys() - set(files))
            if lacking:
                raise ValueError(f"{inside} lacks {lacking[0]}, which is in the clean validation split ({len(lacking):,} such): "
                                 "get the whole set again")
            if surplus:
                raise ValueError(f"{inside} holds {surplus[0]}, which is not in the clean validation split ({len(surplus):,} such): "
                                 "give the whole clean data set as --data-dir")
            wnids = {wnid: i for i, wnid in enumerate(sorted(set(of.values())))}
            wrong = next((f for f, label in zip(files, labels) if wnids[of[f]] != label or wnid_of.setdefault(f, of[f]) != of[f]), None)
            if wrong:
                raise ValueError(f"{inside / of[wrong] / wrong} is not in the folder of its class: get the whole set again")
    pool = ThreadPoolExecutor(os.cpu_count())

    def decoded(path: Path) -> Tensor:
        try:
            content = path.read_bytes()
            image, sides = torch.from_numpy(data.decode(content, size).copy()), Image.open(io.BytesIO(content)).size
        except Exception as error:  # Pillow fails in many ways on a damaged file
            raise OSError(f"cannot read {path} ({type(error).__name__}): get it again") from None
        if sides != (64, 64):
            raise ValueError(f"{path} has {sides[0]} x {sides[1]} pixels, not 64 x 64: get it again")
        return image

    def corrupted(rows: Tensor, severity: int) -> Tensor:
        paths = [folder / name / str(severity) / wnid_of[files[i]] / files[i] for i in rows.tolist() for name in names]
        return torch.stack(list(pool.map(decoded, paths))).unflatten(0, (len(rows), len(names)))
    return corrupted


# ------------------------------------------------------------------------------------------------- built in
# Each takes x [n, 3, S, S], float32 in 0 to 1, the severity 0 to 4 and a generator, and returns the corrupted images,
# which built_in cuts to 0 to 1. Lengths are in parts of the image's side, so that they mean the same at every size.
def uniform(x: Tensor, generator: Generator, *shape: int) -> Tensor:
    """On the generator's device: with a CPU generator the numbers are the same whatever device the images are on."""
    return torch.rand(len(x), *shape, generator=generator, device=generator.device).to(x.device)


def normal(x: Tensor, generator: Generator, *shape: int) -> Tensor:
    return torch.randn(len(x), *shape, generator=generator, device=generator.device).to(x.device)


def gaussian_noise(x, s, generator):
    return x + (0.04, 0.07, 0.1, 0.14, 0.2)[s] * normal(x, generator, *x.shape[1:])


def shot_noise(x, s, generator):
    photons = (300, 120, 60, 30, 15)[s]
    return torch.poisson((x * photons).to(generator.device), generator=generator).to(x.device) / photons


def impulse_noise(x, s, generator):
    u = uniform(x, generator, *x.shape[1:])
    share = (0.01, 0.03, 0.06, 0.1, 0.16)[s]
    return torch.where(u < share, (u < share / 2).float(), x)


def speckle_noise(x, s, generator):
    return x + x * (0.08, 0.14, 0.2, 0.3, 0.45)[s] * normal(x, generator, *x.shape[1:])


def gaussian_blur(x, s, generator):
    side = x.shape[-1]
    at = torch.arange(side, device=x.device)
    sigma = (0.012, 0.018, 0.026, 0.037, 0.052)[s] * side
    weights = torch.softmax(-0.5 * ((at - at[:, None]) / sigma) ** 2, 1)
    return weights @ x @ weights.T


def moved(x: Tensor, matrix: Tensor) -> Tensor:
    """Images seen through affine maps [n, 2, 3] of coordinates that go from -1 to 1, mirrored at the borders."""
    return F.grid_sample(x, F.affine_grid(matrix, x.shape, align_corners=False), padding_mode="reflection", align_corners=False)


def motion_blur(x, s, generator):
    angle = 2 * torch.pi * uniform(x, generator, 1)
    way = torch.cat([angle.cos(), angle.sin()], 1)[:, :, None] * (0.06, 0.1, 0.15, 0.21, 0.3)[s]
    eye = torch.eye(2, device=x.device).expand(len(x), 2, 2)
    return sum(moved(x, torch.cat([eye, way * t / 4], 2)) for t in range(-4, 5)) / 9


def zoom_blur(x, s, generator):
    most = (0.08, 0.14, 0.22, 0.32, 0.45)[s]
    eye = torch.eye(2, 3, device=x.device).expand(len(x), 2, 3)
    return sum(moved(x, eye / (1 + most * t / 7)) for t in range(8)) / 8


def contrast(x, s, generator):
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (0.75, 0.55, 0.4, 0.25, 0.15)[s]


def brightness(x, s, generator):
    return x + (0.08, 0.15, 0.23, 0.32, 0.42)[s]


def saturate(x, s, generator):
    grey = x.mean(1, keepdim=True)
    return grey + (x - grey) * (1.4, 1.9, 2.6, 3.6, 5)[s]


def smooth(noise: Tensor, side: int) -> Tensor:
    return F.interpolate(noise, size=(side, side), mode="bicubic", align_corners=False)


def fog(x, s, generator):
    share = (0.2, 0.32, 0.45, 0.58, 0.7)[s]
    cloud = sum(smooth(uniform(x, generator, 1, 2 ** i, 2 ** i), x.shape[-1]) / 2 ** i for i in range(1, 5))
    return x + share * (0.5 + 0.5 * cloud - x)


def elastic(x, s, generator):
    way = smooth(normal(x, generator, 2, 5, 5), x.shape[-1]) * (0.04, 0.06, 0.09, 0.13, 0.18)[s]
    still = F.affine_grid(torch.eye(2, 3, device=x.device).expand(len(x), 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x, still + way.permute(0, 2, 3, 1), padding_mode="reflection", align_corners=False)


def pixelate(x, s, generator):
    side = max(1, round(x.shape[-1] * (0.75, 0.6, 0.45, 0.34, 0.25)[s]))
    return F.interpolate(F.interpolate(x, size=(side, side), mode="area"), size=x.shape[-2:], mode="nearest")


def jpeg(x, s, generator):
    def coded(image: np.ndarray) -> np.ndarray:
        Image.fromarray(image).save(stream := io.BytesIO(), "JPEG", quality=(50, 30, 18, 10, 5)[s])
        return np.asarray(Image.open(stream))
    pixels = (255 * x).round().byte().permute(0, 2, 3, 1).cpu().contiguous().numpy()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return torch.from_numpy(np.stack(list(pool.map(coded, pixels)))).to(x.device).permute(0, 3, 1, 2) / 255


BUILT_IN = {f.__name__: f for f in (gaussian_noise, shot_noise, impulse_noise, speckle_noise, gaussian_blur, motion_blur,
                                    zoom_blur, contrast, brightness, saturate, fog, elastic, pixelate, jpeg)}


def corrupt(name: str, images: Tensor, severity: int, generator: Generator) -> Tensor:
    """Images corrupted by BUILT_IN[name], uint8 of uint8 [n, 3, S, S], at severity 1 to 5."""
    if severity not in SEVERITIES:
        raise ValueError(f"severity is {severity}; give 1 to 5")
    x = BUILT_IN[name](images.float() / 255, severity - 1, generator)
    return (255 * x).round_().clamp_(0, 255).byte()


def built_in(images: Tensor, seed: int) -> Callable:
    """Corruptions of our own of uint8 images [N, 3, S, S], made when they are asked for, the same for the same rows."""
    def corrupted(rows: Tensor, severity: int) -> Tensor:
        mixed = np.random.SeedSequence([seed, int(rows[0])]).generate_state(1)  # torch's CPU generator keeps but 32 bits
        generator = Generator().manual_seed(int(mixed[0]))  # the same draws at every severity
        return torch.stack([corrupt(name, images[rows], severity, generator) for name in BUILT_IN], 1)
    return corrupted
