"""Further questions to a trained network, asked by retrieval.py: the partner among an image's own corrupted versions
(--corruptions: the published -C sets, or fourteen corruptions of our own), and what its features are worth (--probe).

    corrupted = official("cifar100", Path("data"), labels, 32)     # or built_in(images, seed)
    pictures = corrupted(rows, severity=3)                         # uint8 [len(rows), C, 3, H, W]

are the versions of the validation images `rows` by the C corruptions at severity 1 to 5. Scores on our own compare
with one another alone, never with those of the -C sets: they are similar in kind, not in strength.
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

import cli
import data
from model import embed

# ------------------------------------------------------------------------------------------ the published sets
TINY = ("brightness", "contrast", "defocus_blur", "elastic_transform", "fog", "frost", "gaussian_noise", "glass_blur",
        "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "shot_noise", "snow", "zoom_blur")
CIFAR = tuple(sorted((*TINY, "gaussian_blur", "saturate", "spatter", "speckle_noise")))
OFFICIAL = {"cifar100": ("CIFAR-100-C", "https://zenodo.org/records/3555552"),  # Hendrycks and Dietterich, ICLR 2019
            "tinyimagenet": ("Tiny-ImageNet-C", "https://zenodo.org/records/2536630")}
SEVERITIES = range(1, 6)


def clean_folder(data_dir: Path) -> Path:
    """Where the clean images are when data_dir may be the folder of a -C set itself."""
    return data_dir.parent if data_dir.name.lower() in [name.lower() for name, _ in OFFICIAL.values()] else data_dir


def published(dataset: str, data_dir: Path) -> Path:
    """The folder of this data set's -C set: data_dir, or in it. Raises FileNotFoundError where there is none."""
    name, url = OFFICIAL[dataset]
    data_dir = data_dir.parent if data_dir.is_file() else data_dir  # a zip of the clean images
    found = [x for x in (data_dir, *sorted(data_dir.iterdir())) if x.is_dir() and x.name.lower() == name.lower()]
    if not found:
        raise FileNotFoundError(f"no {name} in {data_dir}: unpack {url} there, or give --corruptions built-in")
    return found[0]


def digest(folder: Path) -> str:
    """Of the names, sizes and times of a -C set's arrays and folders: tells that it has changed without reading it."""
    there = [(path, path.stat()) for depth in ("*", "*/*", "*/*/*") for path in sorted(folder.glob(depth))]
    return data.digest(repr([(str(path.relative_to(folder)), s.st_size, s.st_mtime_ns) for path, s in there]).encode())


def official(dataset: str, data_dir: Path, labels: Tensor, size: int) -> Callable:
    """corrupted(rows, severity) of the -C set in data_dir (or data_dir itself), after a check of its whole layout.

    dataset: cifar100 or tinyimagenet. labels [N]: of the whole validation split. size: side to which
    Tiny-ImageNet-C's JPEGs are brought. CIFAR-100-C stays on the disk, memory-mapped. Raises ValueError or OSError,
    with one line, for a set that is absent or not complete.
    """
    folder, url = published(dataset, data_dir), OFFICIAL[dataset][1]
    names, suffix = (CIFAR, ".npy") if dataset == "cifar100" else (TINY, "")
    missing = [x for x in names if not (folder / f"{x}{suffix}").exists()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(x + suffix for x in missing)}: it takes all {len(names)} "
                                f"corruptions; get the whole set from {url}")
    if dataset == "cifar100":
        return cifar_c(folder, labels.numpy())
    return tiny_c(folder, clean_folder(data_dir), labels.numpy(), size)


def cifar_c(folder: Path, labels: np.ndarray) -> Callable:
    """CIFAR-100-C: <corruption>.npy, uint8 [5N, 32, 32, 3], severity s at rows (s-1)N to sN; labels.npy [5N]."""
    n = len(labels)

    def mapped(name: str) -> np.ndarray:
        try:
            return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read {folder / name}.npy ({str(error).splitlines()[0]}): get it again") from None
    arrays, shape = [mapped(name) for name in CIFAR], (5 * n, 32, 32, 3)
    for name, array in zip(CIFAR, arrays):
        if array.dtype != np.uint8 or array.shape != shape:
            raise ValueError(f"{folder / name}.npy is {array.dtype} {array.shape}, not uint8 {shape}: get it again")
    given = mapped("labels")
    if given.size not in (n, 5 * n) or (given.reshape(-1, n) != labels).any():
        raise ValueError(f"{folder / 'labels.npy'} does not hold the labels of the {n:,} clean images in their order: "
                         "get it again")

    def corrupted(rows: Tensor, severity: int) -> Tensor:
        at = (severity - 1) * n + rows.numpy()
        return torch.from_numpy(np.stack([array[at] for array in arrays], 1)).permute(0, 1, 4, 2, 3)
    return corrupted


def tiny_c(folder: Path, clean: Path, labels: np.ndarray, size: int) -> Callable:
    """Tiny-ImageNet-C: <corruption>/<severity>/<wnid>/<name>.JPEG, one for each image of the clean validation split."""
    files = [Path(name).name for name in data.tinyimagenet_source(clean, "val")[2]()[0]]
    if len(files) != len(labels):
        raise ValueError(f"{clean} has {len(files):,} validation images, of which {len(labels):,} can be read: repair "
                         "the others")
    wnid_of, tick = {}, cli.progress(f"checking {folder.name}", len(TINY), "corruptions")
    for i, name in enumerate(TINY):
        tick(i)
        there = sorted(entry.name for entry in os.scandir(folder / name) if entry.is_dir())
        if there != [str(s) for s in SEVERITIES]:
            raise ValueError(f"{folder / name} has the folders {' '.join(there) or 'none'}, not 1 2 3 4 5: get the "
                             "whole set again")
        for inside in (folder / name / severity for severity in there):
            of = {file.name: wnid.name for wnid in os.scandir(inside) if wnid.is_dir() for file in os.scandir(wnid)}
            lacking, surplus = sorted(set(files) - of.keys()), sorted(of.keys() - set(files))
            if lacking:
                raise ValueError(f"{inside} lacks {lacking[0]}, which is in the clean validation split "
                                 f"({len(lacking):,} such): get the whole set again")
            if surplus:
                raise ValueError(f"{inside} holds {surplus[0]}, which is not in the clean validation split "
                                 f"({len(surplus):,} such): give the whole clean data set as --data-dir")
            classes = {wnid: i for i, wnid in enumerate(sorted(set(of.values())))}
            for file, label in zip(files, labels):
                if classes[of[file]] != label or wnid_of.setdefault(file, of[file]) != of[file]:
                    raise ValueError(f"{inside / of[file] / file} is not in the folder of its class: get the whole set "
                                     "again")
    pool = ThreadPoolExecutor(os.cpu_count())

    def decoded(path: Path) -> Tensor:
        try:
            content = path.read_bytes()
            sides, image = Image.open(io.BytesIO(content)).size, torch.from_numpy(data.decode(content, size).copy())
        except Exception as error:  # Pillow fails in many ways on a damaged file
            raise OSError(f"cannot read {path} ({type(error).__name__}): get it again") from None
        if sides != (64, 64):
            raise ValueError(f"{path} has {sides[0]} x {sides[1]} pixels, not 64 x 64: get it again")
        return image

    def corrupted(rows: Tensor, severity: int) -> Tensor:
        shown = [files[i] for i in rows.tolist()]
        paths = [folder / name / str(severity) / wnid_of[file] / file for file in shown for name in TINY]
        return torch.stack(list(pool.map(decoded, paths))).unflatten(0, (len(rows), len(TINY)))
    return corrupted


# ------------------------------------------------------------------------------------------ built in
# Each takes x [n, 3, S, S], float32 in 0 to 1, on the CPU, the severity 0 to 4 and a generator, and returns corrupted
# images, which are then cut to 0 to 1. Lengths are parts of an image's side: they mean the same at every size.
def uniform(x: Tensor, generator: Generator, *shape: int) -> Tensor:
    return torch.rand(len(x), *shape, generator=generator)


def normal(x: Tensor, generator: Generator, *shape: int) -> Tensor:
    return torch.randn(len(x), *shape, generator=generator)


def gaussian_noise(x, s, generator):
    return x + (0.04, 0.07, 0.1, 0.14, 0.2)[s] * normal(x, generator, *x.shape[1:])


def shot_noise(x, s, generator):
    photons = (300, 120, 60, 30, 15)[s]
    return torch.poisson(x * photons, generator=generator) / photons


def impulse_noise(x, s, generator):
    u = uniform(x, generator, *x.shape[1:])
    share = (0.01, 0.03, 0.06, 0.1, 0.16)[s]
    return torch.where(u < share, (u < share / 2).float(), x)


def speckle_noise(x, s, generator):
    return x + x * (0.08, 0.14, 0.2, 0.3, 0.45)[s] * normal(x, generator, *x.shape[1:])


def gaussian_blur(x, s, generator):
    side = x.shape[-1]
    at = torch.arange(side)
    sigma = (0.012, 0.018, 0.026, 0.037, 0.052)[s] * side
    weights = torch.softmax(-0.5 * ((at - at[:, None]) / sigma) ** 2, 1)
    return weights @ x @ weights.T


def moved(x: Tensor, matrix: Tensor) -> Tensor:
    """Images seen through affine maps [n, 2, 3] of coordinates that go from -1 to 1, mirrored at the borders."""
    grid = F.affine_grid(matrix, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def motion_blur(x, s, generator):
    angle = 2 * torch.pi * uniform(x, generator, 1)
    way = torch.cat([angle.cos(), angle.sin()], 1)[:, :, None] * (0.06, 0.1, 0.15, 0.21, 0.3)[s]
    eye = torch.eye(2).expand(len(x), 2, 2)
    return sum(moved(x, torch.cat([eye, way * t / 4], 2)) for t in range(-4, 5)) / 9


def zoom_blur(x, s, generator):
    most = (0.08, 0.14, 0.22, 0.32, 0.45)[s]
    eye = torch.eye(2, 3).expand(len(x), 2, 3)
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
    still = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x, still + way.permute(0, 2, 3, 1), padding_mode="reflection", align_corners=False)


def pixelate(x, s, generator):
    side = max(1, round(x.shape[-1] * (0.75, 0.6, 0.45, 0.34, 0.25)[s]))
    return F.interpolate(F.interpolate(x, size=(side, side), mode="area"), size=x.shape[-2:], mode="nearest")


def jpeg(x, s, generator):
    def coded(image: np.ndarray) -> np.ndarray:
        Image.fromarray(image).save(stream := io.BytesIO(), "JPEG", quality=(50, 30, 18, 10, 5)[s])
        return np.asarray(Image.open(stream))
    pixels = (255 * x).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return torch.from_numpy(np.stack(list(pool.map(coded, pixels)))).permute(0, 3, 1, 2) / 255


BUILT_IN = {f.__name__: f for f in (
    gaussian_noise, shot_noise, impulse_noise, speckle_noise, gaussian_blur, motion_blur, zoom_blur, contrast,
    brightness, saturate, fog, elastic, pixelate, jpeg)}


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


# ------------------------------------------------------------------------------------------ tasks
def own_version_ranks(u: Tensor, v: Tensor) -> Tensor:
    """Ranks from 1, int64 [2, N, C], as retrieval.partner_ranks has them, of u, v [N, C, D], where the candidates of
    each are the C versions of the same image.  Raises ValueError for embeddings that are not finite."""
    if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
        raise ValueError("u or v holds NaN or infinity: embed with a model whose loss is finite")
    s = F.normalize(u, dim=2) @ F.normalize(v, dim=2).mT
    bound = s.diagonal(dim1=1, dim2=2) - (8 + u.shape[2] ** 0.5) * torch.finfo(s.dtype).eps
    return torch.stack([(s >= bound[:, :, None]).sum(2), (s >= bound[:, None]).sum(1)])


def own_versions(model: nn.Module, views: Callable, rows: Tensor, corrupted: Callable, seed: int, name: str,
                 chunk: int = 64) -> dict[str, np.ndarray]:
    """ranks [5, 2, n, C] of the second view among those of the own versions of each of the images `rows`, by severity.

    views(images, generator): augment.views_of. name: of the progress.
    """
    ranks, tick = [], cli.progress(name, 5 * len(rows), "images")
    for severity in SEVERITIES:
        generator, found = Generator().manual_seed(seed), []
        for i, part in enumerate(rows.split(chunk)):
            tick((severity - 1) * len(rows) + i * chunk)
            pictures = corrupted(part, severity)  # [n, C, 3, H, W]
            n, c = pictures.shape[:2]
            u, v = embed(model, views(pictures.flatten(0, 1), generator), torch.arange(n * c))
            found.append(own_version_ranks(u.unflatten(0, (n, c)), v.unflatten(0, (n, c))))
        ranks.append(torch.cat(found, 1))
    return {"ranks": torch.stack(ranks).cpu().numpy().astype(np.uint8)}


def features(encoder: nn.Module, images: Tensor, rows: Tensor, size: int, statistics: tuple, device: torch.device,
             name: str) -> Tensor:
    """float32 [n, d], in eval mode, of images[rows] as they are, brought to size x size and normalised."""
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in statistics)
    found, tick = [], cli.progress(name, len(rows), "images")
    for i, part in enumerate(rows.split(256)):
        tick(256 * i)
        x = images[part].to(device).float() / 255
        if x.shape[-1] != size:
            x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        found.append(encoder(((x - mean) / std).contiguous(memory_format=torch.channels_last)).float())
    return torch.cat(found)


def neighbour_classes(x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
    """The class [m] of each of `queries` [m, d]: the 20 of x [n, d], of classes y, of greatest cosine vote with
    exp(cosine / 0.07) (Wu et al., CVPR 2018)."""
    gallery, found = F.normalize(x, dim=1), []
    for part in F.normalize(queries, dim=1).split(max(1, 2 ** 23 // len(x))):
        cosine, index = (part @ gallery.T).topk(min(20, len(x)), dim=1)
        votes = part.new_zeros(len(part), int(y.max()) + 1)
        found.append(votes.scatter_add_(1, y[index], (cosine / 0.07).exp()).argmax(1))
    return torch.cat(found)


def linear_classes(x: Tensor, y: Tensor, queries: Tensor, seed: int, name: str) -> Tensor:
    """The class [m] of each of `queries` [m, d] by multinomial logistic regression on standardised features, by
    L-BFGS; its L2 is the best on a fifth of x held out."""
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    x, queries = ((z - mean) / std for z in (x, queries))

    def logits(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight[:, :-1], weight[:, -1])

    def fit(x: Tensor, y: Tensor, l2: float, weight: Tensor) -> Tensor:
        weight = weight.clone().requires_grad_()  # [classes, d + 1], the last column the biases
        optimizer = torch.optim.LBFGS([weight], max_iter=50, history_size=10, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(logits(x, weight), y) + l2 / 2 * weight[:, :-1].square().sum()
            value.backward()
            return value
        optimizer.step(loss)
        return weight.detach()
    order = torch.randperm(len(x), generator=Generator().manual_seed(seed)).to(x.device)
    held, rest = order[:max(1, len(x) // 5)], order[max(1, len(x) // 5):]
    weight, right, tick = x.new_zeros(int(y.max()) + 1, x.shape[1] + 1), {}, cli.progress(name, 6, "fits")
    for i, l2 in enumerate((0.3, 0.1, 0.03, 0.01, 0.003)):  # from strong to weak, each from where the last ended
        weight = fit(x[rest], y[rest], l2, weight)
        right[l2] = (logits(x[held], weight).argmax(1) == y[held]).float().mean().item()
        tick(i + 1)
    return logits(queries, fit(x, y, max(right, key=right.get), weight)).argmax(1)


def probe(encoder: nn.Module, sets: list[tuple[Tensor, Tensor, Tensor]], size: int, statistics: tuple,
          device: torch.device, seed: int, name: str) -> dict[str, np.ndarray]:
    """correct, bool [2, n]: is the class of a validation image found by neighbours, and by a linear classifier?

    encoder: images [B, 3, size, size] -> features [B, d].  sets: of training and of validation the uint8 images
    [N, 3, H, H], the rows [n] of them to use, and the labels [N].  statistics: mean and std of the channels. The
    images are not augmented, and embedded once.
    Raises ValueError where there is but one class, or features that are not finite.
    """
    if sets[0][2].max() == 0:
        raise ValueError("--probe needs images of two classes or more: leave it out")
    encoder.eval()
    with torch.no_grad():
        x, val_x = (features(encoder, images, rows, size, statistics, device, name) for images, rows, _ in sets)
    y, val_y = (labels[rows].to(device) for _, rows, labels in sets)
    if not (x.isfinite().all() and val_x.isfinite().all()):
        raise ValueError("the features hold NaN or infinity: give a run whose loss is finite")
    found = neighbour_classes(x, y, val_x), linear_classes(x, y, val_x, seed, name)
    return {"correct": torch.stack([classes == val_y for classes in found]).cpu().numpy()}
