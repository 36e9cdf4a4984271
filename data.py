"""Image data sets as one uint8 tensor [N, 3, H, W], decoded once into a memory-mapped cache.

    images, labels = load("tinyimagenet", "train", "~/data")  # finds the zip there, or downloads it
    images, labels = load("folder", "val", "~/photos", source_size=96)

Every image is decoded once, by all cores, into two .npy files in `<data-dir>/.cache-minibatch/` (where that
cannot be written: `${XDG_CACHE_HOME:-~/.cache}/minibatch-contrastive/`). Later starts map them: one copy in
memory for all processes, and sets larger than memory work. The cache folder can be deleted at any time.
"""
import collections
import contextlib
import errno
import functools
import hashlib
import http.client
import io
import itertools
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import CIFAR100

import cli
from deadleaves import deadleaves

SOURCE_SIZE = {"deadleaves": 32, "cifar100": 32, "tinyimagenet": 64, "folder": 64}  # pixels of a side
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS = dict.fromkeys(SOURCE_SIZE, IMAGENET) | {  # mean and deviation of red, green and blue, in 0 to 1
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))}
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "testing")}
NOT_DECODED = {"BUFR", "GRIB", "HDF5", "WMF", "MPEG", "EPS", "IPTC"}  # that Pillow identifies
TINY_URL, TINY_BYTES = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", 248_100_043
CACHE_VERSION = 2  # raise it when decoding, the split or the dead leaves change: caches are then made anew


def digest(value) -> str:
    content = value if isinstance(value, bytes) else repr(value).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


@functools.cache
def say(line: str) -> None:
    """A line for the person at the terminal, once in a process."""
    with contextlib.suppress(OSError):  # a closed terminal costs no run
        print(line, file=sys.stderr, flush=True)


def reason(error: Exception) -> str:
    text = "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)
    return " ".join(text.split()) or type(error).__name__


# -------------------------------------------------------------------------------------------------- sources
# Each returns (home, made_from, read): the folder of the data; JSON that changes when they do, cheap enough
# for every start; read() -> (names, labels, get), get(i) being an image file's bytes or an array [H, W, 3].

def walk(root: Path) -> list[tuple[str, int, int]]:
    """(relative path, bytes, mtime) of all files beneath root but hidden ones, sorted. Links are followed, no
    folder is visited twice, so links in circles end."""
    found, seen, folders = [], set(), [os.path.join(root, "")]
    for folder in folders:  # which grows meanwhile
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in seen:
            continue
        seen.add((info.st_dev, info.st_ino))
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            with contextlib.suppress(OSError):  # a link in circles, or a file that has just gone
                if entry.is_dir() and not entry.name.startswith("."):
                    folders.append(entry.path)
                elif entry.is_file() and not entry.name.startswith("."):
                    info = entry.stat()
                    found.append((entry.path[len(folders[0]):], info.st_size, info.st_mtime_ns))
    return sorted(found)


def folder_source(path: Path, split: str):
    """Any tree of images. Subfolders named as in SPLITS, in any case, are the splits; without both, a tenth
    of the files, by a hash of the relative path, and at least one, is for validation. A file's class is its
    topmost folder below those that all files share; without folders all are class 0."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}: give one with images as --data-dir")
    known = Image.registered_extensions()
    decoded = Image.OPEN.keys() - NOT_DECODED | {"MPO"}  # which JPEG's reader reads
    suffixes = tuple(suffix for suffix, kind in known.items() if kind in decoded)
    images, others = [], collections.Counter()
    for file in walk(path):
        if file[0].lower().endswith(suffixes):
            images.append(file)
        else:
            others[os.path.splitext(file[0])[1].lower() or "without suffix"] += 1
    if not images:
        why = "holds no images (.jpg, .png, all that Pillow reads)" if any(path.iterdir()) else "is empty"
        raise ValueError(f"{path} {why}: give a folder of images as --data-dir")
    if others:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in others.most_common(6))
        say(f"{path}: {others.total():,} files left out that Pillow reads no images from ({kinds})")

    def read():
        names = [name for name, _, _ in images]
        folders = {name: name.split("/")[:-1] for name in names}
        shared = os.path.commonprefix(list(folders.values()))
        above = list(itertools.takewhile(lambda part: part.lower() not in sum(SPLITS.values(), ()), shared))
        there = {f.name.lower(): f.name for f in sorted(path.joinpath(*above).iterdir()) if f.is_dir()}
        begin = {key: next(("/".join([*above, there[word], ""]) for word in words if word in there), None)
                 for key, words in SPLITS.items()}
        if all(begin.values()):
            names = [name for name in names if name.startswith(tuple(begin.values()))]
            folders = {name: folders[name][len(above) + 1:] for name in names}
            if len(names) < len(images):
                outside = len(images) - len(names)
                say(f"{path}: {outside:,} images left out that are outside {' and '.join(begin.values())}")
            chosen = [name for name in names if name.startswith(begin[split])]
        else:
            score = {name: zlib.crc32(os.fsencode(name)) for name in names}
            held = [name for name in names if score[name] % 10 == 0] or sorted(names, key=score.get)[:1]
            held = set(held[:max(1, len(names) - 1)])  # one at least is left to train on
            chosen = [name for name in names if (name in held) == (split == "val")]
        if not chosen:
            raise ValueError(f"{path} holds no image for the {split} split: give at least two images, or one "
                             "in train/ and one in val/")
        depth = len(os.path.commonprefix(list(folders.values())))
        tops = {name: "".join(folders[name][depth:depth + 1]) for name in names}
        classes = {top: i for i, top in enumerate(sorted(set(tops.values())))}
        labels = [classes[tops[name]] for name in chosen]
        return chosen, labels, lambda i: (path / chosen[i]).read_bytes()
    return path, digest(images), read


def open_zip(path: Path):
    """(names, read(name) -> bytes) of a zip's files."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile fails in many ways on a damaged file
        raise ValueError(f"{path} is not a complete zip file ({reason(error)}; {path.stat().st_size:,} bytes,"
                         f" the official one has {TINY_BYTES:,}): get it again from {TINY_URL}") from None
    lock = threading.Lock()  # zipfile counts open members without one; faster than a handle for each thread

    def read(name: str) -> bytes:
        with lock:
            return archive.read(name)
    return archive.namelist(), read


def tinyimagenet_source(path: Path, split: str):
    """The official archive: the zip itself, a folder with `tiny-imagenet-200*.zip` in it, read as it is, or
    the unpacked `tiny-imagenet-200`, or that; where there is none of them, it is downloaded to there."""
    official, is_zip = path / "tiny-imagenet-200.zip", path.is_file() or path.suffix.lower() == ".zip"
    if is_zip and not path.exists():
        raise FileNotFoundError(f"there is no {path}: give a zip, or the folder it is in or is to be put in")
    zips = [path] if is_zip else sorted(path.glob("tiny-imagenet-200*.zip"))
    zips = [official] if official in zips else zips
    if len(zips) > 1:
        raise ValueError(f"{path} holds {' and '.join(z.name for z in zips)}: give one of them as --data-dir")
    folders = [f for f in (path / official.stem, path) if (f / "train").is_dir() or (f / "val").is_dir()]
    if not zips and not folders:
        try:
            download(TINY_URL, official, TINY_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"no Tiny ImageNet in {path}, and the download failed ({error}): fetch {TINY_URL} "
                          f"elsewhere and put it there as {official}") from None
        zips = [official]
    if zips:
        with open(zips[0], "rb") as file:  # its end lists the members with their checksums
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 20)))
            made_from = [size, zips[0].stat().st_mtime_ns, digest(file.read())]
    else:
        files = [file for file in walk(folders[0]) if file[0].lower().endswith((".jpeg", ".jpg", ".txt"))]
        made_from = digest(files)

    def read():
        every, get = open_zip(zips[0]) if zips else ([file[0] for file in files],
                                                     lambda name: (folders[0] / name).read_bytes())
        table = "val/val_annotations.txt"
        at = min((name for name in every if name.endswith(table)), key=len, default=table)
        try:
            lines = get(at).decode(errors="replace").splitlines() if at in every else []
        except Exception as error:  # zipfile fails in many ways on a damaged member
            raise ValueError(f"{path}: {at} is damaged ({reason(error)}): get {TINY_URL} again") from None
        wnid_of = dict(line.split("\t")[:2] for line in lines if "\t" in line)
        layout = re.escape(at.removesuffix(table)) + r"(train/([^/]+)|val)/images/([^/.][^/]*\.jpe?g)"
        found = [m for name in every if (m := re.fullmatch(layout, name, re.I))]
        train = sorted((m[2], m[0]) for m in found if m[2])
        val = [(wnid_of.get(m[3]), m[0]) for m in found if not m[2]]
        if not train or not val or not all(wnid for wnid, _ in val):
            raise ValueError(f"{path} is not laid out as Tiny ImageNet (train/<wnid>/images/*.JPEG, "
                             f"val/images/*.JPEG, {table} with the wnid of each): get it from {TINY_URL}")
        classes = {wnid: i for i, wnid in enumerate(sorted({wnid for wnid, _ in train + val}))}
        chosen = train if split == "train" else sorted(val, key=lambda sample: sample[1])
        names = [name for _, name in chosen]
        return names, [classes[wnid] for wnid, _ in chosen], lambda i: get(names[i])
    return path.parent if is_zip else path, made_from, read


def cifar100_source(path: Path, split: str):
    """torchvision's `cifar-100-python`, in the folder or that itself; downloaded where there is none."""
    name = "train" if split == "train" else "test"
    folder = path if (path / name).is_file() else path / CIFAR100.base_folder
    archive = path / CIFAR100.filename
    if not (folder / name).is_file():
        try:
            with own_folder(path / ".cache-minibatch", 360_000_000) as own:  # the archive and its contents
                if archive.exists():
                    (own / archive.name).symlink_to(archive)
                CIFAR100(own, download=True)
                folder.mkdir(exist_ok=True)
                for file in (own / CIFAR100.base_folder).iterdir():
                    os.replace(file, folder / file.name)
        except (OSError, RuntimeError) as error:
            raise OSError(f"no CIFAR-100 in {path}, and the download failed ({error}): fetch {CIFAR100.url} "
                          f"elsewhere and put it there as {archive}") from None

    def read():
        try:  # with the folder's own name, which the class takes from an attribute
            here = type("Here", (CIFAR100,), {"base_folder": folder.name})
            data = here(folder.parent, train=split == "train")
        except RuntimeError:
            raise ValueError(f"{folder} is damaged (wrong checksum): remove it to get it again") from None
        return [f"{name}[{i}]" for i in range(len(data.data))], data.targets, lambda i: data.data[i]
    return path, [(folder / name).stat().st_size, (folder / name).stat().st_mtime_ns], read


# ------------------------------------------------------------------------------------------------- decoding

def grey(image: Image.Image) -> Image.Image:
    """8 bits of a grey image of more; Pillow's own conversion cuts off at 255. White is the end of the range:
    of 12 or 16 bits where the file says so, else the least of 1 (floats), 255 and the ends of 16, 31 and 32
    bits that holds all values. Where none does, or all were black in it, the range is the values' own."""
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "I" and tags and np.ravel(tags.get(339, 1))[0] == 1:  # an unsigned TIFF, read as signed
        values = values.view(np.uint32)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("it holds no finite value")
    black, white = float(finite.min()), float(finite.max())
    if image.mode.startswith("I;") or image.mode == "I" and image.format in ("PNG", "PPM"):
        black, white = 0, 2 ** int(np.ravel(tags.get(258, 16))[0]) - 1
    elif black >= 0:
        ends = [1] * (image.mode == "F") + [2**8 - 1, 2**16 - 1, 2**31 - 1, 2**32 - 1]
        end = next((end for end in ends if white <= end), np.inf)
        black, white = (0, end) if white >= end / 256 else (black, white)
    values = np.nan_to_num(values.astype(np.float64), nan=black, posinf=white, neginf=black) - black
    return Image.fromarray(np.rint(values * (255 / (white - black or 1))).clip(0, 255).astype(np.uint8))


def decode(data: bytes | np.ndarray, size: int) -> np.ndarray:
    """uint8 [3, size, size] of an image file's bytes or of [H, W, 3]: upright, the centre square, smoothed;
    of an animation the first frame; transparency on white; grey of more than 8 bits as in grey()."""
    image = Image.fromarray(data) if isinstance(data, np.ndarray) else Image.open(io.BytesIO(data))
    image.draft(None, (2 * size, 2 * size))  # JPEG: read at 1/2, 1/4 or 1/8, no smaller than this
    image.load()
    if image.getexif().get(0x0112, 1) != 1:  # orientation
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":
        image = grey(image)
    if "transparency" in image.info or image.mode.upper().endswith("A"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image if image.mode == "RGB" else image.convert("RGB")
    (w, h), side = image.size, min(image.size)
    box = ((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2)
    if (w, h) != (size, size):  # with side == size this cuts and alters nothing
        image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    return np.asarray(image).transpose(2, 0, 1)


# ------------------------------------------------------------------------------------------------ the cache
# <stem>.images.npy, <stem>.labels.npy and, put there last, <stem>.json. The stem names the content: whoever
# else writes there writes the same.

def open_cache(stem: Path, size: int) -> tuple[np.ndarray, np.ndarray, list] | None:
    """(images, labels, broken files) of a cache that is whole; otherwise None."""
    try:
        broken = json.loads(Path(f"{stem}.json").read_bytes())["broken"]
        images, labels = np.load(f"{stem}.images.npy", mmap_mode="r"), np.load(f"{stem}.labels.npy")
        fits = images.shape == (len(labels), 3, size, size)
        return (images, labels, broken) if fits else None
    except Exception:  # none is there, or it is damaged in one of many ways: it is made anew
        return None


@contextlib.contextmanager
def own_folder(inside: Path, needed: int):
    """A folder of this process alone, gone afterwards, on a disk with room for so many bytes."""
    try:
        inside.mkdir(parents=True, exist_ok=True)
        free, needed = shutil.disk_usage(inside).free, needed + (64 << 20)  # and some to spare
        if free < needed:
            raise OSError(f"{inside} needs {needed / 1e9:.2f} GB of free disk and has {free / 1e9:.2f} GB: "
                          "free some, or give another --data-dir")
        with tempfile.TemporaryDirectory(dir=inside, suffix=".tmp") as own:
            yield Path(own)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"the disk of {inside} is full: free some space and start again") from None
        raise


def download(url: str, target: Path, size: int) -> None:
    with own_folder(target.parent / ".cache-minibatch", size) as own:
        part = own / target.name
        with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:
            tick = cli.progress(url, size / 1e6, "MB")
            while block := response.read(1 << 20):
                file.write(block)
                tick(file.tell() / 1e6)
        if part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size:,} bytes came instead of {size:,}")
        os.replace(part, target)


def refuse(broken: list, skip_broken: bool) -> None:
    if broken and not skip_broken:
        name, why = broken[0]
        raise ValueError(f"cannot read the image {name!r} ({why}): repair or remove it, or leave such images "
                         "out with --skip-broken")


def write_cache(stem: Path, key: dict, names: list[str], labels: list[int], get, skip_broken: bool) -> None:
    """Decodes all images, in threads, as Pillow does most of its work without the interpreter's lock."""
    size, broken, kept = key["size"], [], []
    window = max(os.cpu_count() or 1, (64 << 20) // (3 * size**2))  # images that may be in memory at a time
    tick = cli.progress(f"{key['dataset']} {key['split']}, decoding", len(names), "images")

    def decoded(row: int) -> np.ndarray | str:
        try:
            return np.ascontiguousarray(decode(get(row), size))
        except Exception as error:  # decoders raise all sorts of things on damaged files
            return reason(error)

    def write_header(file, count: int) -> None:  # as long for any count
        shape = (count, 3, size, size)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})

    with own_folder(stem.parent, len(names) * (3 * size**2 + 8)) as own, ThreadPoolExecutor() as pool:
        with open(own / "images.npy", "wb") as file:  # a full disk would kill who writes to a mapping
            write_header(file, len(names))
            for start in range(0, len(names), window):
                rows = range(start, min(start + window, len(names)))
                for row, image in zip(rows, pool.map(decoded, rows)):
                    if isinstance(image, str):
                        broken.append([names[row], image])
                        refuse(broken, skip_broken)
                    else:
                        file.write(image)
                        kept.append(labels[row])
                    tick(row + 1)
            if not kept:
                raise ValueError(f"all {len(names)} images are broken: {names[0]} ({broken[0][1]}), ...")
            write_header(file, len(kept))
            file.flush()
            os.fsync(file.fileno())
        np.save(own / "labels.npy", np.array(kept, np.int64))
        (own / "json").write_text(json.dumps({"key": key, "broken": broken}))
        for name in ("images.npy", "labels.npy", "json"):
            os.replace(own / name, f"{stem}.{name}")
    for old in stem.parent.glob(f"{stem.name.rpartition('-')[0]}*"):  # of the data as they were before
        if not old.name.startswith(stem.name):
            old.unlink(missing_ok=True)


def writable(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK | os.X_OK)
    return False


# ----------------------------------------------------------------------------------------- for other scripts

def load(dataset: str, split: str, data_dir: str | Path, *, source_size: int | None = None,
         skip_broken: bool = False, num_images: int = 4096, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images, uint8 [N, 3, H, W], memory-mapped and read-only (write to a clone), and class ids, int64 [N].

    `dataset` is a key of SOURCE_SIZE, `split` "train" or "val", H = W = source_size (None: SOURCE_SIZE's).
    skip_broken leaves unreadable images out and says so; num_images and seed are of deadleaves. The cache is
    replaced when the data have changed; those of other sizes, seeds and numbers stay, as one goes back and
    forth between them. Raises ValueError or OSError, with one line that says what to change.
    """
    for what, given, allowed in (("data set", dataset, SOURCE_SIZE), ("split", split, SPLITS)):
        if given not in allowed:
            raise ValueError(f"unknown {what} '{given}'{cli.nearest(str(given), allowed)}")
    size = SOURCE_SIZE[dataset] if source_size is None else source_size
    if not 1 <= size <= 4096:
        raise ValueError(f"source size {size}: give 1 to 4096 pixels")
    path = cli.expand(data_dir).absolute()
    if path.is_file() and dataset != "tinyimagenet":
        raise NotADirectoryError(f"{path} is a file: give a folder as --data-dir")
    if dataset == "deadleaves":
        def read():
            images, labels = deadleaves(split, num_images, seed, size)
            arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
            return range(num_images), labels.tolist(), lambda i: arrays[i]
        home, made_from = path, [num_images, seed]
    else:
        sources = {"cifar100": cifar100_source, "tinyimagenet": tinyimagenet_source, "folder": folder_source}
        home, made_from, read = sources[dataset](path, split)

    key = {"version": CACHE_VERSION, "dataset": dataset, "split": split, "size": size, "made_from": made_from}
    elsewhere = cli.expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "minibatch-contrastive"
    stems = []
    for folder in [home / ".cache-minibatch"] + [elsewhere] * elsewhere.is_absolute():  # ~ may be nowhere
        # By where the data are, seen from the cache: a folder can be moved with its cache.
        place = digest((os.path.relpath(path, folder), made_from if dataset == "deadleaves" else None))[:12]
        stems.append(folder / f"{dataset}-{split}-{size}px-{place}-{digest(key)[:12]}")
        for left in folder.glob("*.tmp"):  # by a process that was killed more than a day ago
            with contextlib.suppress(OSError):  # it may have just gone
                if time.time() - left.stat().st_mtime > 86400:
                    shutil.rmtree(left)
    found = next(filter(None, (open_cache(stem, size) for stem in stems)), None)
    if not found:
        stem = next((stem for stem in stems if writable(stem.parent)), None)
        if not stem:
            raise OSError(f"neither {stems[0].parent} nor {elsewhere} can be written: set XDG_CACHE_HOME to "
                          "a folder that can")
        write_cache(stem, key, *read(), skip_broken)
        found = open_cache(stem, size)
        if not found:
            raise OSError(f"{stem}.* has gone, as the data change while they are read: start again")
    images, labels, broken = found
    refuse(broken, skip_broken)
    if broken:
        say(f"{dataset} {split}: {len(broken)} broken images left out: "
            f"{', '.join(name for name, _ in broken[:3])}{', ...' * (len(broken) > 3)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch knows no read-only tensors
        return torch.from_numpy(images), torch.from_numpy(labels)


def fingerprint(images: Tensor, labels: Tensor) -> str:
    """Digest of images, uint8 [N, 3, H, W], and labels [N]: another one for any other pixel, label or order.

    Reads all of them, about a second a GB; a set larger than memory once from the disk, as an epoch does."""
    found, step = hashlib.blake2b(digest_size=16), max(1, (16 << 20) // images[0].numel())
    tick = cli.progress("fingerprint of the data", len(images), "images")
    for start in range(0, len(images), step):
        found.update(images[start:start + step].cpu().flatten().numpy())
        tick(start + step)
    found.update(repr((images.shape, labels.tolist())).encode())
    return found.hexdigest()


def limit_indices(labels: Tensor, n: int) -> Tensor:
    """int64 [min(n, N)], ascending: n samples, the classes' first in turn. Raises ValueError if n < 1."""
    if n < 1:
        raise ValueError(f"limit {n}: give at least 1 image")
    by_class = torch.argsort(labels, stable=True)
    ordered = labels[by_class]
    turn = torch.arange(len(labels)) - torch.searchsorted(ordered, ordered)  # 0, 1, ... in each class
    return by_class[torch.argsort(turn, stable=True)[:n]].sort().values
