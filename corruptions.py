"""Further questions to a trained network, which retrieval.py asks: the partner among an image's own corrupted
versions (--corruptions), how hard batches are for it (--histograms), what its features are worth (--probe).

    corrupted = official("cifar100", Path("data"), 10_000, 32)   # a published set; or built_in(images, seed)
    pictures = corrupted(rows, severity=3)         # uint8 [len(rows), C, 3, H, W] of validation images `rows`

Scores on our own corruptions compare with one another alone: the -C sets have other strengths.
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
from torch import Generator, Tensor, nn
from torchvision.transforms.functional import normalize

import cli
import data
import samplers
from model import embed, unit

# -------------------------------------------------------------------------------- the published sets
TINY = ("brightness", "contrast", "defocus_blur", "elastic_transform", "fog", "frost", "gaussian_noise",
        "glass_blur", "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "shot_noise", "snow",
        "zoom_blur")
CIFAR = tuple(sorted((*TINY, "gaussian_blur", "saturate", "spatter", "speckle_noise")))
OFFICIAL = {"cifar100": ("CIFAR-100-C", "https://zenodo.org/records/3555552"),
            "tinyimagenet": ("Tiny-ImageNet-C", "https://zenodo.org/records/2536630")}  # ICLR 2019
SEVERITIES = range(1, 6)


def official(dataset: str, data_dir: Path, n: int, size: int) -> Callable:
    """corrupted(rows, severity) of the -C set of cifar100 or tinyimagenet in data_dir.

    n: images of the whole validation split. size: side to which Tiny-ImageNet-C's JPEGs are brought.
    CIFAR-100-C stays on the disk, memory-mapped. Raises ValueError or OSError, with one line. """
    name, url = OFFICIAL[dataset]
    folder = (data_dir.parent if data_dir.is_file() else data_dir) / name  # beside a zip of the clean images
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no {folder}: unpack {url} there, or give --corruptions built-in")
    return cifar_c(folder, n) if dataset == "cifar100" else tiny_c(folder, data_dir, n, size)


def cifar_c(folder: Path, n: int) -> Callable:
    """CIFAR-100-C: <corruption>.npy, uint8 [5N, 32, 32, 3], severity s at rows (s-1)N to sN."""
    try:
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in CIFAR]
    except EOFError:
        raise ValueError(f"a file of {folder} is empty: get it again") from None
    for name, array in zip(CIFAR, arrays):
        if array.dtype != np.uint8 or array.shape != (5 * n, 32, 32, 3):
            raise ValueError(f"{folder / name}.npy is {array.dtype} {array.shape}, not uint8 "
                             f"{(5 * n, 32, 32, 3)}: get it again")

    def corrupted(rows: Tensor, severity: int) -> Tensor:
        at = (severity - 1) * n + rows.numpy()
        return torch.from_numpy(np.stack([array[at] for array in arrays], 1)).permute(0, 1, 4, 2, 3)
    return corrupted


def tiny_c(folder: Path, clean: Path, n: int, size: int) -> Callable:
    """Tiny-ImageNet-C: <corruption>/<severity>/<wnid>/<name>.JPEG, one for each clean validation image."""
    files = [Path(name).name for name in data.tinyimagenet_source(clean, "val")[2]()[0]]
    wnid = {path.name: path.parent.name for path in (folder / TINY[0] / "1").glob("*/*.JPEG")}
    if len(files) != n or wnid.keys() != set(files):
        raise ValueError(f"{folder} and {clean} do not hold the same validation images: get both whole")
    pool = ThreadPoolExecutor(os.cpu_count())

    def decoded(path: Path) -> Tensor:
        try:
            return torch.from_numpy(data.decode(path.read_bytes(), size).copy())
        except Exception as error:  # Pillow fails in many ways on a damaged file
            raise OSError(f"cannot read {path} ({type(error).__name__}): get it again") from None

    def corrupted(rows: Tensor, severity: int) -> Tensor:
        shown = [files[i] for i in rows.tolist()]
        paths = [folder / name / str(severity) / wnid[file] / file for file in shown for name in TINY]
        return torch.stack(list(pool.map(decoded, paths))).unflatten(0, (len(rows), len(TINY)))
    return corrupted


# -------------------------------------------------------------------------------- built in
# Functions of x [n, 3, S, S], float32 in 0 to 1, a strength and a generator give corrupted images, which are
# then cut to 0 to 1. Lengths are parts of an image's side, so that they mean the same at every size.
def normal(x: Tensor, g: Generator) -> Tensor:
    return torch.randn(x.shape, generator=g)


def impulse_noise(x: Tensor, share: float, g: Generator) -> Tensor:
    u = torch.rand(x.shape, generator=g)
    return torch.where(u < share, (u < share / 2).float(), x)


def gaussian_blur(x: Tensor, sigma: float, g: Generator) -> Tensor:
    at = torch.arange(x.shape[-1])
    weights = torch.softmax(-0.5 * ((at - at[:, None]) / (sigma * x.shape[-1])) ** 2, 1)
    return weights @ x @ weights.T


def moved(x: Tensor, matrix: Tensor, way: Tensor | float = 0.0) -> Tensor:
    """Images seen through affine maps [n, 2, 3] of coordinates from -1 to 1, moved by `way`; mirrored."""
    grid = F.affine_grid(matrix, x.shape, align_corners=False) + way
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def motion_blur(x: Tensor, length: float, g: Generator) -> Tensor:
    angle = 2 * torch.pi * torch.rand(len(x), 1, generator=g)
    way = length / 4 * torch.cat([angle.cos(), angle.sin()], 1)[:, :, None]
    eye = torch.eye(2).expand(len(x), 2, 2)
    return sum(moved(x, torch.cat([eye, t * way], 2)) for t in range(-4, 5)) / 9


def zoom_blur(x: Tensor, most: float, g: Generator) -> Tensor:
    eye = torch.eye(2, 3).expand(len(x), 2, 3)
    return sum(moved(x, eye / (1 + most * t / 7)) for t in range(8)) / 8


def smooth(noise: Tensor, side: int) -> Tensor:
    return F.interpolate(noise, size=(side, side), mode="bicubic", align_corners=False)


def fog(x: Tensor, share: float, g: Generator) -> Tensor:
    grids = ((i, torch.rand(len(x), 1, 2 ** i, 2 ** i, generator=g)) for i in range(1, 5))
    cloud = sum(smooth(grid, x.shape[-1]) / 2 ** i for i, grid in grids)
    return x + share * (0.5 + 0.5 * cloud - x)


def elastic(x: Tensor, length: float, g: Generator) -> Tensor:
    way = length * smooth(torch.randn(len(x), 2, 5, 5, generator=g), x.shape[-1])
    return moved(x, torch.eye(2, 3).expand(len(x), 2, 3), way.permute(0, 2, 3, 1))


def pixelate(x: Tensor, share: float, g: Generator) -> Tensor:
    side = max(1, round(share * x.shape[-1]))
    return F.interpolate(F.interpolate(x, size=(side, side), mode="area"), size=x.shape[-2:], mode="nearest")


def jpeg(x: Tensor, quality: int, g: Generator) -> Tensor:
    def coded(image: np.ndarray) -> np.ndarray:
        Image.fromarray(image).save(stream := io.BytesIO(), "JPEG", quality=quality)
        return np.asarray(Image.open(stream))
    pixels = (255 * x).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return torch.from_numpy(np.stack(list(pool.map(coded, pixels)))).permute(0, 3, 1, 2) / 255


BUILT_IN = {  # name: (function, its strength at severity 1 to 5)
    "gaussian_noise": (lambda x, s, g: x + s * normal(x, g), (0.04, 0.07, 0.1, 0.14, 0.2)),
    "shot_noise": (lambda x, s, g: torch.poisson(x * s, generator=g) / s, (300, 120, 60, 30, 15)),
    "impulse_noise": (impulse_noise, (0.01, 0.03, 0.06, 0.1, 0.16)),
    "speckle_noise": (lambda x, s, g: x + x * s * normal(x, g), (0.08, 0.14, 0.2, 0.3, 0.45)),
    "gaussian_blur": (gaussian_blur, (0.012, 0.018, 0.026, 0.037, 0.052)),
    "motion_blur": (motion_blur, (0.06, 0.1, 0.15, 0.21, 0.3)),
    "zoom_blur": (zoom_blur, (0.08, 0.14, 0.22, 0.32, 0.45)),
    "contrast": (lambda x, s, g: x.mean((1, 2, 3), keepdim=True).lerp(x, s), (0.75, 0.55, 0.4, 0.25, 0.15)),
    "brightness": (lambda x, s, g: x + s, (0.08, 0.15, 0.23, 0.32, 0.42)),
    "saturate": (lambda x, s, g: x.mean(1, keepdim=True).lerp(x, s), (1.4, 1.9, 2.6, 3.6, 5)),
    "fog": (fog, (0.2, 0.32, 0.45, 0.58, 0.7)),
    "elastic": (elastic, (0.04, 0.06, 0.09, 0.13, 0.18)),
    "pixelate": (pixelate, (0.75, 0.6, 0.45, 0.34, 0.25)),
    "jpeg": (jpeg, (50, 30, 18, 10, 5)),
}


def built_in(images: Tensor, seed: int) -> Callable:
    """corrupted(rows, severity) of uint8 images [N, 3, S, S], made when asked for, the same for the same
    rows."""
    def corrupted(rows: Tensor, severity: int) -> Tensor:
        # torch's CPU generator keeps 32 bits of a seed; the same draws at every severity.
        mixed = np.random.SeedSequence([seed, int(rows[0])]).generate_state(1)
        generator, x = Generator().manual_seed(int(mixed[0])), images[rows].float() / 255
        versions = [function(x, strengths[severity - 1], generator)
                    for function, strengths in BUILT_IN.values()]
        return torch.stack([(255 * x).round_().clamp_(0, 255).byte() for x in versions], 1)
    return corrupted


# -------------------------------------------------------------------------------- what is asked
def own_version_ranks(u: Tensor, v: Tensor) -> Tensor:
    """Ranks from 1, int64 [2, N, C], of u, v [N, C, D], where the candidates of each are the C versions of
    the same image; ties as retrieval.partner_ranks has them."""
    s = unit(u) @ unit(v).mT
    bound = s.diagonal(dim1=1, dim2=2) - (8 + u.shape[2] ** 0.5) * torch.finfo(s.dtype).eps
    return torch.stack([(s >= bound[:, :, None]).sum(2), (s >= bound[:, None]).sum(1)])


def own_versions(model: nn.Module, views: Callable, rows: Tensor, corrupted: Callable, seed: int, name: str,
                 chunk: int = 64) -> np.ndarray:
    """Ranks [5, 2, n, C] of partner views among those of the own versions of each of `rows`, by severity.
    views(images, generator): augment.views_of; name: of the progress."""
    ranks, tick = [], cli.progress(name, 5 * len(rows), "images")
    for severity in SEVERITIES:
        generator, found = Generator().manual_seed(seed), []
        for i, part in enumerate(rows.split(chunk)):
            tick((severity - 1) * len(rows) + i * chunk)
            pictures = corrupted(part, severity)  # [n, C, 3, H, W]
            shape = pictures.shape[:2]
            u, v = embed(model, views(pictures.flatten(0, 1), generator), torch.arange(shape.numel()))
            found.append(own_version_ranks(u.unflatten(0, shape), v.unflatten(0, shape)))
        ranks.append(torch.cat(found, 1))
    return torch.stack(ranks).cpu().numpy()


def batch_losses(model: nn.Module, views: Callable, images: Tensor, rows: Tensor, batch_size: int,
                 temperature: float, seed: int, name: str) -> dict[str, np.ndarray]:
    """NT-Xent [1, n // B] of random and of spectral batches of the same projections of images[rows]."""
    generator = Generator().manual_seed(seed)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    u, v = embed(model, views(images, generator), rows, on_chunk=cli.progress(name, len(rows), "images"))
    window = min(40, len(rows) // batch_size)  # the paper's, in batches
    chosen = {"random": samplers.random_batches(len(rows), batch_size, generator).to(u.device),
              "spectral": samplers.spectral_batches(u, v, batch_size, window, temperature, generator)}
    losses = {kind: samplers.batch_losses(u, v, x, temperature) for kind, x in chosen.items()}
    return {kind: x[None].cpu().numpy() for kind, x in losses.items()}


def draw_histograms(losses: dict[str, dict[str, np.ndarray]]):
    """Histograms of what batch_losses() gave, of each run by its name."""
    figure, axes = cli.canvas(len(losses), 1, 5, 0.6 + 1.6 * len(losses))
    for axis, (name, found) in zip(axes.flat, losses.items()):
        bins = np.histogram_bin_edges(np.concatenate([*found.values()]), 30)
        for kind, x in found.items():
            axis.hist(x, bins, color=cli.COLOURS[kind], alpha=0.6, label=kind)
        axis.set(title=name, xlabel="NT-Xent of a batch", ylabel="batches")
    axes[0, 0].legend()
    return figure


@torch.no_grad()
def features(encoder: nn.Module, images: Tensor, rows: Tensor, size: int, mean: tuple, std: tuple,
             device: torch.device) -> Tensor:
    """encoder's [n, d], float32, of images[rows] as they are, brought to size x size and normalised."""
    found, tick = [], cli.progress("features", len(rows), "images")
    for part in rows.split(256):
        tick(256 * len(found))
        x = F.interpolate(images[part].to(device) / 255, (size, size), mode="bilinear", antialias=True)
        x = normalize(x, mean, std).contiguous(memory_format=torch.channels_last)
        found.append(encoder(x).float())
    return torch.cat(found)


def probe(x: Tensor, y: Tensor, val_x: Tensor, val_y: Tensor, seed: int, name: str) -> dict[str, np.ndarray]:
    """linear and knn, bool [1, n]: is the class val_y of the features val_x [n, d] found by x, y?

    linear: multinomial logistic regression on standardised features, by L-BFGS, its L2 the best on a fifth of
    x held out.  knn: the 20 of greatest cosine vote with exp(cosine / 0.07) (Wu et al., CVPR 2018). """
    if y.max() == 0 or not (x.isfinite().all() and val_x.isfinite().all()):
        raise ValueError("--probe needs images of two classes or more and finite features: leave it out")
    classes, gallery, knn = int(y.max()) + 1, unit(x), []
    for part in unit(val_x).split(64):
        cosine, index = (part @ gallery.T).topk(min(20, len(x)), dim=1)
        votes = part.new_zeros(len(part), classes).scatter_add_(1, y[index], (cosine / 0.07).exp())
        knn.append(votes.argmax(1))
    largest = x.abs().max().clamp(min=torch.finfo(x.dtype).tiny)  # as unit, of any scale
    x, val_x = x / largest, val_x / largest
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, val_x = (F.pad((z - mean) / std, (0, 1), value=1) for z in (x, val_x))  # the last weights are biases

    def fit(x: Tensor, y: Tensor, l2: float, weight: Tensor) -> Tensor:
        weight = weight.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weight], max_iter=50, history_size=10, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ weight.T, y) + l2 / 2 * weight[:, :-1].square().sum()
            value.backward()
            return value
        optimizer.step(loss)
        return weight.detach()
    order = torch.randperm(len(x), generator=Generator().manual_seed(seed)).to(x.device)
    held, rest = order.tensor_split([max(1, len(x) // 5)])
    weight, right, tick = x.new_zeros(classes, x.shape[1]), {}, cli.progress(name, 6, "fits")
    for i, l2 in enumerate((0.3, 0.1, 0.03, 0.01, 0.003), 1):  # from strong to weak, each from the last
        weight = fit(x[rest], y[rest], l2, weight)
        right[l2] = ((x[held] @ weight.T).argmax(1) == y[held]).float().mean().item()
        tick(i)
    linear = (val_x @ fit(x, y, max(right, key=right.get), weight).T).argmax(1)
    return {k: (z == val_y)[None].cpu().numpy() for k, z in (("linear", linear), ("knn", torch.cat(knn)))}
