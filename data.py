"""Image data sets as one uint8 tensor [N, 3, H, W], decoded once into a memory-mapped cache.

    images, labels = load("tinyimagenet", "train", "~/data")  # finds the zip there, or downloads it
    images, labels = load("folder", "val", "~/photos", source_size=96)

The decoded images are two .npy files in `<data-dir>/.cache-minibatch/` (where that cannot be written, in
`${XDG_CACHE_HOME:-~/.cache}/minibatch-contrastive/`). Later starts map them: one copy in memory for all
processes, and sets larger than memory work. Changed data are decoded anew; delete old files at any time.
"""
import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import socket
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
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR100

import cli
from deadleaves import deadleaves

SOURCE_SIZE = {"deadleaves": 32, "cifar100": 32, "tinyimagenet": 64, "folder": 64}  # pixels of a side
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS = dict.fromkeys(SOURCE_SIZE, IMAGENET) | {  # mean and deviation of red, green and blue, in 0 to 1
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))}
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test", "testing")}
TINY_URL, TINY_BYTES = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", 248_100_043
PATIENCE = 60  # seconds
CACHE_VERSION = 4  # raise it when decoding, the split or the dead leaves change: caches are then made anew

warnings.filterwarnings("ignore", "The given NumPy array is not writ")  # the mapped images are read-only


def digest(value) -> str:
    content = value if isinstance(value, bytes) else repr(value).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# -------------------------------------------------------------------------------------------------- sources
# Each returns (home, made_from, read): the folder of the data; JSON that changes when they do, cheap enough
# for every start; read() -> (names, labels, get), get(i) being an image file's bytes or an array [H, W, 3].

def walk(root: Path, inside: str = "", above: tuple = ()):
    """(relative path, bytes, mtime) of all files beneath root but hidden ones; links are followed, but no
    folder is entered from within itself."""
    here = os.path.realpath(root / inside)
    for entry in os.scandir(root / inside) if here not in above else ():
        if entry.is_dir() and not entry.name.startswith("."):
            yield from walk(root, f"{inside}{entry.name}/", (*above, here))
        elif entry.is_file() and not entry.name.startswith("."):
            yield inside + entry.name, entry.stat().st_size, entry.stat().st_mtime_ns


def below_shared(folders: dict[str, list[str]]) -> dict[str, list[str]]:
    """The folders of each file, without those on top that all files share."""
    depth = len(os.path.commonprefix(list(folders.values())))
    return {name: folder[depth:] for name, folder in folders.items()}


def folder_source(path: Path, split: str):
    """Any tree of images. Topmost folders named as in SPLITS, in any case, are the splits; without both, a
    tenth of the files, by a hash of the relative path, is for validation. A file's class is its topmost
    folder below that. Folders that all files share do not count."""
    no_decoder = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow knows them by name alone
    suffixes = Image.registered_extensions()  # which fills Image.OPEN
    known = {x for x, kind in suffixes.items() if kind in {*Image.OPEN, "MPO"} - no_decoder}
    files = sorted(walk(path))
    images = [file for file in files if os.path.splitext(file[0])[1].lower() in known]

    def read():
        folders = below_shared({name: name.split("/")[:-1] for name, _, _ in images})
        tops = {name: folder[0].lower() for name, folder in folders.items() if folder}
        begin = {key: next((w for w in words if w in tops.values()), None) for key, words in SPLITS.items()}
        if all(begin.values()):
            folders = below_shared({name: folders[name][1:] for name in tops if tops[name] in begin.values()})
            chosen = [name for name in folders if tops[name] == begin[split]]
        else:
            held = {name for name in folders if zlib.crc32(os.fsencode(name)) % 10 == 0} or {*[*folders][:1]}
            held = {*sorted(held)[:max(1, len(folders) - 1)]}  # one at least is left to train on
            chosen = [name for name in folders if (name in held) == (split == "val")]
        left = len(files) - len(folders)
        if left and folders and split == "train":  # once
            cli.say(f"{path}: {left:,} files left out, not read by Pillow or in no split", sys.stderr)
        classes = np.unique(["".join(folder[:1]) for folder in folders.values()], return_inverse=True)[1]
        label = dict(zip(folders, classes.tolist()))
        return chosen, [label[name] for name in chosen], lambda i: (path / chosen[i]).read_bytes()
    return path, digest(images), read


def members(source: Path):
    """(names, get(name) -> bytes) of the files in a folder or a zip."""
    if source.is_dir():
        return [file[0] for file in walk(source)], lambda name: (source / name).read_bytes()
    archive, lock = zipfile.ZipFile(source), threading.Lock()  # zipfile counts its readers without one
    # One handle: to open it is to read all names, for each thread a second of Tiny ImageNet's.

    def get(name: str) -> bytes:
        with lock:
            return archive.read(name)
    return archive.namelist(), get


@contextlib.contextmanager
def giving_up():
    """Downloads within it end in an OSError once nothing has come for PATIENCE."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def tinyimagenet_source(path: Path, split: str):
    """The official archive, a zip that is read as it is, or unpacked: that itself, or a folder in which it is
    named `tiny-imagenet-200*` (zips and short names first); downloaded to there where there is none."""
    official = path / "tiny-imagenet-200.zip"
    there = [path] if path.suffix.lower() == ".zip" else sorted(
        path.glob("tiny-imagenet-200*"), key=lambda file: (file.suffix != ".zip", len(file.name), file.name))
    there += [path] * (path / "train").is_dir()
    if not there:
        try:
            with giving_up(), own_folder(path / ".cache-minibatch") as own:
                tick = cli.progress(TINY_URL, TINY_BYTES / 1e6, "MB")
                urllib.request.urlretrieve(TINY_URL, own / "zip", lambda n, size, _: tick(n * size / 1e6))
                if (size := (own / "zip").stat().st_size) != TINY_BYTES:
                    raise OSError(f"{size:,} bytes came instead of {TINY_BYTES:,}")
                os.replace(own / "zip", official)
        except OSError as error:
            raise OSError(f"no Tiny ImageNet in {path}, and the download failed ({error}): fetch {TINY_URL} "
                          "elsewhere and put it there") from None
    source = [*there, official][0]
    made_from = source.name, source.stat().st_size, source.stat().st_mtime_ns
    if source.is_dir():
        made_from = digest(sorted(walk(source)))

    def read():
        layout = re.compile(r"(?:.*/)?(?:train/([^/]+)|val)/images/([^/.][^/]*\.jpe?g)", re.I)
        try:
            names, get = members(source)
            found = {name: match for name in sorted(names) if (match := layout.fullmatch(name))}
            table = next((name for name in names if name.endswith("val/val_annotations.txt")), "annotations")
            wnid_of = dict(line.split("\t")[:2] for line in get(table).decode().splitlines())
            wnids = {name: match[1] or wnid_of[match[2]] for name, match in found.items()}
            chosen = [name for name in found if bool(found[name][1]) == (split == "train")]
        except Exception as error:  # zipfile fails in many ways on a damaged file
            raise ValueError(f"{source} is no complete zip or folder of Tiny ImageNet ({error!r}): get "
                             f"it from {TINY_URL}") from None
        classes = sorted(set(wnids.values()))
        return chosen, [classes.index(wnids[name]) for name in chosen], lambda i: get(chosen[i])
    return path.parent if path.suffix.lower() == ".zip" else path, made_from, read


def cifar100_source(path: Path, split: str):
    """torchvision's `cifar-100-python`, in the folder or that itself; downloaded where there is none."""
    root = path.parent if path.name == CIFAR100.base_folder else path
    folder, archive = root / CIFAR100.base_folder, root / CIFAR100.filename
    if not folder.is_dir():
        try:
            with giving_up(), own_folder(root / ".cache-minibatch") as own:
                if archive.exists():
                    (own / archive.name).symlink_to(archive)
                CIFAR100(own, download=True)
                os.rename(own / folder.name, folder)
        except (OSError, RuntimeError) as error:
            if not folder.is_dir():  # else another process was faster
                raise OSError(f"no CIFAR-100 in {root}, and the download failed ({error}): fetch "
                              f"{CIFAR100.url} elsewhere and put it there") from None

    def read():
        try:
            data = CIFAR100(root, train=split == "train")
        except RuntimeError:
            raise ValueError(f"{folder} is damaged (wrong checksum): remove it to get it again") from None
        return range(len(data.data)), data.targets, lambda i: data.data[i]
    return root, digest(sorted(walk(folder))), read


def grey(image: Image.Image) -> Image.Image:
    """8 bits of a grey image of more; Pillow's own conversion cuts off at 255. White is 65535 in files of 16
    bits, 2^32 - 1 where only 32 bits without a sign hold a value, else the least of 1 (floats), 255 and 65535
    that holds all; else the range is theirs."""
    values = np.asarray(image)
    if image.mode == "I" and image.format == "TIFF" and image.tag_v2.get(339, (1,)) == (1,):
        values = values.view(np.uint32)  # by its SampleFormat without a sign, which Pillow reads with one
    values = np.nan_to_num(values.astype(np.float64), posinf=0, neginf=0)
    black, white = values.min().item(), values.max().item()
    if image.mode.startswith("I;") or image.mode == "I" and image.format in ("PNG", "PPM"):
        black, white = 0, 65535
    elif black >= 0:
        ends = [1] * (image.mode == "F") + [255, 65535] + [2**32 - 1] * (image.mode == "I" and white >= 2**31)
        black, white = next(((0, end) for end in ends if white <= end), (black, white))
    return Image.fromarray(np.rint((values - black) * (255 / (white - black or 1))).astype(np.uint8))


def decode(data: bytes | np.ndarray, size: int) -> np.ndarray:
    """uint8 [3, size, size] of an image file's bytes or of [H, W, 3]: upright, the centre square, smoothed;
    of an animation the first frame; transparency on white; grey of more than 8 bits as in grey()."""
    image = Image.fromarray(data) if isinstance(data, np.ndarray) else Image.open(io.BytesIO(data))
    image.draft(None, (2 * size, 2 * size))  # JPEG: read at 1/2, 1/4 or 1/8, no smaller than this
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":
        image = grey(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    (w, h), side = image.size, min(image.size)
    box = ((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2)
    image = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC, box)
    return np.asarray(image).transpose(2, 0, 1)


# ------------------------------------------------------------------------------------------------ the cache
# The stem of the files names their content, <stem>.json comes last: many processes can make the same at once.

def open_cache(stem: Path) -> tuple[np.ndarray, np.ndarray, list] | None:
    """(images, labels, broken files), or None where they are not all there."""
    try:
        broken = json.loads(Path(f"{stem}.json").read_bytes())
        labels = np.load(f"{stem}.labels.npy")
        return np.load(f"{stem}.images.npy", mmap_mode="r")[:len(labels)], labels, broken
    except (OSError, ValueError, EOFError):
        return None


@contextlib.contextmanager
def own_folder(inside: Path):
    """A folder of this process alone, gone afterwards."""
    try:
        inside.mkdir(parents=True, exist_ok=True)
        for old in inside.glob("tmp*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - old.stat().st_mtime > 24 * 3600:  # of a process that was killed
                    shutil.rmtree(old, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=inside) as own:
            yield Path(own)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"the disk of {inside} is full: free some, or give another --data-dir") from None
        raise


def write_cache(stem: Path, size: int, skip_broken: bool, names, labels: list[int], get) -> None:
    """Decodes all images, in threads, as Pillow does most of its work without the interpreter's lock."""
    def decoded(row: int) -> np.ndarray | None:
        try:
            return np.ascontiguousarray(decode(get(row), size))
        except Exception as error:  # decoders raise all sorts of things on damaged files
            if skip_broken:
                return None
            why = str(error).split(" <")[0] or type(error).__name__
            raise ValueError(f"cannot read the image {names[row]!r} ({why}): repair or remove it, or leave "
                             "such images out with --skip-broken") from None

    broken, kept, tick = [], [], cli.progress("decoding", len(names), "images")
    with own_folder(stem.parent) as own, ThreadPoolExecutor() as pool:
        path, shape = own / "images.npy", (len(names), 3, size, size)
        begin = np.lib.format.open_memmap(path, "w+", np.uint8, shape).offset
        with open(path, "r+b") as file:  # a full disk would kill who writes to the mapping
            file.seek(begin)
            for start in range(0, len(names), 512):  # as many as are in memory at a time
                rows = range(start, min(start + 512, len(names)))
                for row, image in zip(rows, pool.map(decoded, rows)):
                    if image is None:
                        broken.append(names[row])
                    else:
                        file.write(image)
                        kept.append(labels[row])
                    tick(row + 1)
            file.flush()
            os.fsync(file.fileno())
        if not kept:
            raise ValueError(f"all {len(names)} images are broken: {names[0]}, ...; give others")
        np.save(own / "labels.npy", np.array(kept, np.int64))
        (own / "json").write_text(json.dumps(broken))
        for name in ("images.npy", "labels.npy", "json"):
            os.replace(own / name, f"{stem}.{name}")


def load(dataset: str, split: str, data_dir: str | Path, *, source_size: int | None = None,
         skip_broken: bool = False, num_images: int = 4096, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images, uint8 [N, 3, H, W], memory-mapped and read-only (write to a clone), and class ids, int64 [N].

    `dataset` is a key of SOURCE_SIZE, `split` "train" or "val", H = W = source_size (None: SOURCE_SIZE's).
    skip_broken leaves unreadable images out and says so; num_images and seed are of deadleaves.
    Raises ValueError or OSError, with one line that says what to change."""
    if dataset not in SOURCE_SIZE or split not in SPLITS:
        raise ValueError(f"no split {split!r} of {dataset!r}: give train or val of {', '.join(SOURCE_SIZE)}")
    size, path = source_size or SOURCE_SIZE[dataset], cli.expand(data_dir).absolute()
    if dataset == "deadleaves":
        def read():
            images, labels = deadleaves(split, num_images, seed, size)
            return range(num_images), labels.tolist(), lambda i: images[i].permute(1, 2, 0).numpy()
        home, made_from = path, [num_images, seed]
    else:
        sources = {"cifar100": cifar100_source, "tinyimagenet": tinyimagenet_source, "folder": folder_source}
        home, made_from, read = sources[dataset](path, split)

    key = CACHE_VERSION, dataset, split, size, skip_broken, made_from
    elsewhere = cli.expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "minibatch-contrastive"
    stems = [folder / f"{dataset}-{split}-{size}px-{digest(key)[:16]}"
             for folder in (home / ".cache-minibatch", elsewhere)]
    found = open_cache(stems[0]) or open_cache(stems[1])
    if not found:
        names, labels, get = read()
        if not names:
            raise ValueError(f"{path} holds no images (.jpg, .png, what Pillow reads) for {split}: give more")
        with contextlib.suppress(OSError):
            stems[0].parent.mkdir(parents=True, exist_ok=True)
        stem = stems[not os.access(stems[0].parent, os.W_OK | os.X_OK)]
        write_cache(stem, size, skip_broken, names, labels, get)
        found = open_cache(stem)
    images, labels, broken = found
    if broken:
        cli.say(f"{dataset} {split}: {len(broken)} broken images left out ({broken[0]}, ...)", sys.stderr)
    return torch.from_numpy(images), torch.from_numpy(labels)


def fingerprint(images: Tensor, labels: Tensor) -> str:
    """Digest of images, uint8 [N, 3, H, W], and labels [N], in their order; about a second a GB."""
    found = hashlib.blake2b(digest_size=16)
    tick = cli.progress("fingerprint of the data", len(images), "images")
    for start in range(0, len(images), 4096):
        found.update(images[start:start + 4096].contiguous().numpy())
        tick(start + 4096)
    found.update(repr((images.shape, labels.tolist())).encode())
    return found.hexdigest()


def limit_indices(labels: Tensor, n: int) -> Tensor:
    """int64 [min(n, N)], ascending: n samples, the classes' first in turn."""
    by_class = torch.argsort(labels, stable=True)
    ordered = labels[by_class]
    turn = torch.arange(len(labels)) - torch.searchsorted(ordered, ordered)  # 0, 1, ... in each class
    return by_class[torch.argsort(turn, stable=True)[:n]].sort().values
