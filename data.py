"""Image data sets as one uint8 tensor [N, 3, H, W], decoded once into a memory-mapped cache file.

    images, labels = load('tinyimagenet', 'train', '~/data')             # finds the zip there, or downloads it
    images, labels = load('folder', 'val', '~/photos', source_size=96)

Every image is decoded once, by all cores, into `<data-dir>/.cache-minibatch/` (where that cannot be written:
`${XDG_CACHE_HOME:-~/.cache}/minibatch-contrastive/`). Later starts map the file: no decoding, one copy in memory for
all processes, and sets larger than memory work. The cache folder can be deleted at any time.
"""
import collections
import contextlib
import difflib
import errno
import fcntl
import hashlib
import http.client
import io
import json
import math
import os
import re
import shutil
import stat
import struct
import sys
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
from torchvision.datasets import CIFAR100

from deadleaves import deadleaves

SOURCE_SIZE = {'deadleaves': 32, 'cifar100': 32, 'tinyimagenet': 64, 'folder': 64}  # the data sets; pixels of a side
STATISTICS = {x: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) for x in SOURCE_SIZE}  # STANDIN
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff')
TINY_URL, TINY_BYTES = 'http://cs231n.stanford.edu/tiny-imagenet-200.zip', 248_100_043
CACHE_VERSION = 1  # raise it when decoding, the split or the dead leaves change: older caches are then rebuilt

# ---------------------------------------------------------------------------------------------------------------------
# Where the images come from. Each source returns (home, fingerprint, read): the folder of the data; JSON that changes
# when the data do, cheap enough for every start; and read() -> (names, labels, get), get(i) being the bytes of an
# image file or an array [H, W, 3].


def walk(root: Path, suffixes: tuple = IMAGE_SUFFIXES) -> list[tuple[str, int, int]]:
    """(relative path, bytes, mtime) of every file with these suffixes beneath root, sorted. Hidden names are left out;
    links are followed, but no folder is visited twice, so links in circles end."""
    found, seen, folders = [], set(), collections.deque([('', os.stat(root))])
    while folders:
        folder, info = folders.popleft()
        if (info.st_dev, info.st_ino) in seen:
            continue
        seen.add((info.st_dev, info.st_ino))
        inner = []
        for entry in os.scandir(root / folder):
            try:
                info, name = entry.stat(), folder + entry.name
            except OSError:  # a dangling link, or a file that has just gone
                continue
            if stat.S_ISDIR(info.st_mode) and not entry.name.startswith('.'):
                inner.append((name + '/', info))
            elif stat.S_ISREG(info.st_mode) and not entry.name.startswith('.') and name.lower().endswith(suffixes):
                found.append((name, info.st_size, info.st_mtime_ns))
        folders.extend(sorted(inner))
    return sorted(found)


def digest(value) -> str:
    return hashlib.blake2b(value if isinstance(value, bytes) else repr(value).encode(), digest_size=16).hexdigest()


def folder_source(path: Path, split: str):
    """Any tree of images. With subfolders `train` and `val` (or `valid`, `validation`, `test`) those are the splits;
    otherwise a fixed tenth of the files, chosen by a hash of the relative path, and at least one, is for validation.
    A file's class is its topmost folder below those that all files share; without folders all are class 0."""
    if not path.is_dir():
        raise FileNotFoundError(f'there is no folder {path}: give one with images as --data-dir')
    every = walk(path)
    if not every:
        why = f"holds no images ({' '.join(IMAGE_SUFFIXES)})" if any(path.iterdir()) else 'is empty'
        raise ValueError(f'{path} {why}: give a folder with images as --data-dir')

    def read():
        names = [name for name, _, _ in every]
        val = next((v for v in ('val', 'valid', 'validation', 'test') if (path / v).is_dir()), None)
        if val and (path / 'train').is_dir():
            tails = {name: name.split('/', 1)[1] for name in names if name.startswith(('train/', val + '/'))}
            names = [name for name in tails if name.startswith('train/' if split == 'train' else val + '/')]
        else:
            score = {name: zlib.crc32(os.fsencode(name)) for name in names}
            held = [name for name in names if score[name] % 10 == 0] or sorted(names, key=score.get)[:1]
            held = set(held[:max(1, len(names) - 1)])  # one at least is left to train on
            tails = {name: name for name in names}
            names = [name for name in names if (name in held) == (split == 'val')]
        if not names:
            raise ValueError(f'{path} holds no image for the {split} split: give at least two images, or one in train/ '
                             'and one in val/')
        depth = len(Path(os.path.commonpath(['/' + os.path.dirname(tail) for tail in tails.values()])).parts) - 1
        tops = {name: ''.join(tail.split('/')[depth:-1][:1]) for name, tail in tails.items()}
        classes = {top: i for i, top in enumerate(sorted(set(tops.values())))}
        return names, [classes[tops[name]] for name in names], lambda i: (path / names[i]).read_bytes()
    return path, digest(every), read


def open_zip(path: Path, landmark: str):
    """(names, read(name) -> bytes) of a zip's files, named from the folder in it that holds `landmark`."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise ValueError(f'{path} is not a complete zip file (it has {path.stat().st_size:,} bytes, the official one '
                         f'{TINY_BYTES:,}): get it again from {TINY_URL}') from None
    prefix = min((m for m in archive.namelist() if m.endswith(landmark)), key=len, default=landmark)[:-len(landmark)]
    members = {m.filename[len(prefix):]: m for m in archive.infolist() if m.filename.startswith(prefix)}

    def read(name: str) -> bytes:
        # What archive.read() does, without its lock and most of its time: 1.4 times the images/s
        member, file = members[name], archive.fp.fileno()
        header = os.pread(file, 30, member.header_offset)
        start = member.header_offset + 30 + sum(struct.unpack('<26x2H', header))  # after the name and the extra field
        data = os.pread(file, member.compress_size, start)
        data = zlib.decompress(data, -15) if member.compress_type == zipfile.ZIP_DEFLATED else data
        if zlib.crc32(data) != member.CRC:
            raise zipfile.BadZipFile('wrong checksum: the zip is damaged')
        return data
    return list(members), read


def tinyimagenet_source(path: Path, split: str):
    """The official archive: the zip itself, a folder with `tiny-imagenet-200*.zip` in it (read without unpacking) or
    with the unpacked `tiny-imagenet-200`, or that; where there is none of them, it is downloaded to there."""
    landmark = 'val/val_annotations.txt'
    unpacked = [f for f in (path / 'tiny-imagenet-200', path) if (f / 'train').is_dir() or (f / 'val').is_dir()]
    archive = path if path.suffix.lower() == '.zip' or path.is_file() else path / 'tiny-imagenet-200.zip'
    if not archive.exists() and archive != path:
        others = sorted(path.glob('tiny-imagenet-200*.zip'))
        if len(others) > 1:
            raise ValueError(f"{path} holds {' and '.join(z.name for z in others)}: give one of them as --data-dir")
        archive = others[0] if others else archive
    if not archive.exists() and not unpacked:
        if archive == path:
            raise FileNotFoundError(f'there is no {path}: give a zip, or the folder it is in or is to be put in')
        try:
            with locked(path / '.cache-minibatch') as cache:
                if not archive.exists():  # another process may have put it there meanwhile
                    download(TINY_URL, archive, TINY_BYTES, cache)
        except (OSError, http.client.HTTPException) as e:
            raise OSError(f'no Tiny ImageNet in {path}, and the download failed ({e}): fetch {TINY_URL} elsewhere and '
                          f'put it there as {archive}') from None
    if archive.exists():
        with open(archive, 'rb') as file:  # its end lists the members with their checksums
            file.seek(-min(archive.stat().st_size, 1 << 20), os.SEEK_END)
            fingerprint = [archive.stat().st_size, archive.stat().st_mtime_ns, digest(file.read())]
    else:
        files = walk(unpacked[0], ('.jpeg', '.jpg', landmark))
        fingerprint = digest(files)

    def read():
        every, get = (open_zip(archive, landmark) if archive.exists() else
                      ([file[0] for file in files], lambda name: (unpacked[0] / name).read_bytes()))
        lines = get(landmark).decode().splitlines() if landmark in every else []
        wnid_of = dict(line.split('\t')[:2] for line in lines if '\t' in line)
        found = [m for f in every if (m := re.fullmatch(r'(train/([^/]+)|val)/images/([^/.][^/]*\.jpe?g)', f, re.I))]
        train = sorted((m[2], m[0]) for m in found if m[2])
        val = [(wnid_of.get(m[3]), m[0]) for m in found if not m[2]]
        if not train or not val or not all(wnid for wnid, _ in val):
            raise ValueError(f'{path} is not laid out as Tiny ImageNet (train/<wnid>/images/*.JPEG, val/images/*.JPEG,'
                             f' {landmark} with the wnid of each of them): get it from {TINY_URL}')
        classes = {wnid: i for i, wnid in enumerate(sorted({wnid for wnid, _ in train + val}))}
        chosen = train if split == 'train' else sorted(val, key=lambda sample: sample[1])
        return [name for _, name in chosen], [classes[wnid] for wnid, _ in chosen], lambda i: get(chosen[i][1])
    return path.parent if archive == path else path, fingerprint, read


def cifar100_source(path: Path, split: str):
    """torchvision's `cifar-100-python`, in the folder or the folder itself; downloaded where there is none."""
    name = 'train' if split == 'train' else 'test'
    folder = path if (path / name).is_file() else path / 'cifar-100-python'
    if not (folder / name).is_file():
        try:
            with locked(path / '.cache-minibatch'):
                enough_disk(path, 360_000_000)  # the archive and its contents
                CIFAR100(path, download=True)
        except (OSError, RuntimeError) as e:
            raise OSError(f'no CIFAR-100 in {path}, and the download failed ({e}): fetch {CIFAR100.url} elsewhere '
                          f'and put it there as {path / CIFAR100.filename}') from None

    def read():
        try:  # with the folder's own name, which the class takes from an attribute
            data = type('Here', (CIFAR100,), {'base_folder': folder.name})(folder.parent, train=split == 'train')
        except RuntimeError:
            raise ValueError(f'{folder} is damaged (wrong checksum): remove it, and it is downloaded again') from None
        return [f'{name}[{i}]' for i in range(len(data.data))], data.targets, lambda i: data.data[i]
    return path, [(folder / name).stat().st_size, (folder / name).stat().st_mtime_ns], read


# ---------------------------------------------------------------------------------------------------------------------
# Decoding and the cache file: images [N, 3, H, W], labels int64 [N], a JSON record, 16 bytes that close it. One file,
# as two could disagree; closed last, so that an unfinished one is known by its end.

CLOSING = struct.Struct('<QI4s')  # length of the record, its CRC, and b'MBC1'


def decode(data: bytes | np.ndarray, size: int) -> np.ndarray:
    """uint8 [3, size, size] of an image file's bytes or of [H, W, 3]: upright, the centre square of the shorter side,
    antialiased; of an animation the first frame; transparency on white; 16-bit grey scaled to 8 bits."""
    image = Image.fromarray(data) if isinstance(data, np.ndarray) else Image.open(io.BytesIO(data))
    image.draft(None, (2 * size, 2 * size))  # JPEG: read at 1/2, 1/4 or 1/8, no smaller than twice the size wanted
    image.load()
    if image.getexif().get(0x0112, 1) != 1:  # orientation
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):           # 16-bit grey ('I' in older Pillow), which convert() would clip at 255
        grey = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if 'transparency' in image.info or image.mode.upper().endswith('A'):
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
    image = image if image.mode == 'RGB' else image.convert('RGB')
    (w, h), side = image.size, min(image.size)
    box = ((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2)
    if (w, h) != (size, size):  # with side == size this cuts and alters nothing
        image = image.resize((size, size), Image.Resampling.BICUBIC, box)
    return np.asarray(image).transpose(2, 0, 1)


def checksum(images: np.ndarray, labels: np.ndarray) -> int:
    """CRC of the labels and of the images' blocks of 4 MiB: of all up to 2 GiB, of 256 to 511 spread ones beyond."""
    flat, crc, block = images.reshape(-1), zlib.crc32(labels), 4 << 20
    for start in range(0, flat.size, block * max(1, flat.size // (256 * block))):
        crc = zlib.crc32(flat[start:start + block], crc)
    return crc


def open_cache(path: Path, key: dict) -> tuple[np.ndarray, np.ndarray, list] | None:
    """(images, labels, broken files) of a cache that is complete, undamaged and made with this key; otherwise None."""
    try:
        with open(path, 'rb') as file:
            end = file.seek(-CLOSING.size, os.SEEK_END)
            length, crc, magic = CLOSING.unpack(file.read())
            file.seek(end - length)
            record = file.read(length)
            if magic != b'MBC1' or zlib.crc32(record) != crc:
                return None
            record = json.loads(record)
            shape = tuple(record['shape'])
            if record['key'] != key or math.prod(shape) + 8 * shape[0] + length != end:
                return None
            file.seek(math.prod(shape))
            labels = np.frombuffer(bytearray(file.read(8 * shape[0])), np.int64)
            # Mode 'r': a private writable mapping that is larger than memory would be refused
            images = np.memmap(file, np.uint8, 'r', shape=shape)
    except (OSError, ValueError, OverflowError):
        return None
    return (images, labels, record['broken']) if checksum(images, labels) == record['checksum'] else None


def write_cache(path: Path, key: dict, names: list[str], labels: list[int], get, skip_broken: bool) -> None:
    """Decodes all images on all cores into a temporary file that then takes its place at `path`.

    Threads: Pillow decodes and resizes without the interpreter's lock, so on photos they are as fast as processes, and
    at 64 px, where the lock binds, one core does 5,000 images/s. They need no fork and no __main__ guard."""
    size, broken, kept = key['size'], [], []
    enough_disk(path.parent, len(names) * (3 * size * size + 8))
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    tick = progress(f"{key['dataset']} {key['split']}: decoded", len(names), 'images')
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    chunk = max(1, (1 << 20) // (3 * size * size))
    window = 16 * cores * chunk  # what may be in memory at a time

    def decode_chunk(start: int) -> tuple[int, np.ndarray, dict[int, str]]:
        images, failed = np.empty((min(chunk, len(names) - start), 3, size, size), np.uint8), {}
        for row in range(len(images)):
            try:
                images[row] = decode(get(start + row), size)
            except UnidentifiedImageError:  # whose text is the address of an object
                failed[row] = 'no known image format'
            except Exception as e:  # decoders raise all sorts of things on damaged files
                failed[row] = str(e).replace('\n', ' ') or type(e).__name__
        return start, images, failed

    try:
        with open(temporary, 'wb') as file, ThreadPoolExecutor(cores) as pool:
            for begin in range(0, len(names), window):
                starts = range(begin, min(begin + window, len(names)), chunk)
                for start, images, failed in pool.map(decode_chunk, starts):
                    broken += [[names[start + row], reason] for row, reason in failed.items()]
                    if broken and not skip_broken:
                        raise broken_images(broken)
                    good = [row for row in range(len(images)) if row not in failed]
                    kept += [labels[start + row] for row in good]
                    file.write(images[good])
                    tick(start + len(images))
            if not kept:
                raise ValueError(f'all {len(names)} images are broken: {names[0]} ({broken[0][1]}), ...')
            file.flush()
            shape, kept = (len(kept), 3, size, size), np.array(kept, np.int64)
            record = json.dumps({'key': key, 'shape': shape, 'broken': broken, 'checksum': checksum(
                np.memmap(temporary, np.uint8, 'r', shape=shape), kept)}).encode()
            file.write(kept.tobytes() + record + CLOSING.pack(len(record), zlib.crc32(record), b'MBC1'))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        full = f'the disk of {path.parent} is full: free some space and start again'
        raise (OSError(full) if e.errno in (errno.ENOSPC, errno.EDQUOT) else e) from None
    finally:
        temporary.unlink(missing_ok=True)


def broken_images(broken: list) -> ValueError:
    return ValueError(f'cannot read the image {broken[0][0]!r} ({broken[0][1]}): repair or remove it, or leave such '
                      'images out with --skip-broken')


@contextlib.contextmanager
def locked(folder: Path):
    """Creates a cache folder and lets one process at a time write to it; temporary files in it are then nobody's."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # a lock on the folder itself leaves no file behind and ends with the process
    try:
        with contextlib.suppress(OSError):  # a file system without locks: each process writes its own temporary file
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f'waiting for another process that is filling {folder}', file=sys.stderr, flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            for leftover in folder.glob('*.tmp'):
                leftover.unlink()
        yield folder
    finally:
        os.close(lock)


def enough_disk(folder: Path, needed: int) -> None:
    free, needed = shutil.disk_usage(folder).free, needed + (64 << 20)  # and some room to spare
    if free < needed:
        raise OSError(f'{folder} needs {needed / 1e9:.2f} GB of free disk and has {free / 1e9:.2f} GB: free some, or '
                      'give another --data-dir')


def progress(what: str, total: float, unit: str):
    """tick(done): a line on stderr with the count and the speed, rewritten in place on a terminal, else every 10 s."""
    began = shown = time.perf_counter()
    live = sys.stderr.isatty()

    def tick(done: float) -> None:
        nonlocal shown
        now = time.perf_counter()
        if done >= total or now - shown > (0.2 if live else 10):
            shown = now
            print(f'{what} {done:,.0f} of {total:,.0f} {unit}, {done / (now - began + 1e-9):,.0f} {unit}/s  ',
                  end='\r' if live and done < total else '\n', file=sys.stderr, flush=True)
    return tick


def download(url: str, target: Path, size: int, cache: Path) -> None:
    """Puts the file at url at target once it is complete. Raises OSError that says what to do by hand."""
    enough_disk(target.parent, size)
    temporary = cache / f'{target.name}.{os.getpid()}.tmp'
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(temporary, 'wb') as file:
            tick = progress(f'{url}:', size / 1e6, 'MB')
            while block := response.read(1 << 20):
                file.write(block)
                tick(file.tell() / 1e6)
        if temporary.stat().st_size != size:
            raise OSError(f'{temporary.stat().st_size:,} bytes came instead of {size:,}')
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# What the rest of the project calls


def load(dataset: str, split: str, data_dir: str | Path, *, source_size: int | None = None, skip_broken: bool = False,
         num_images: int = 4096, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images, uint8 [N, 3, H, W], memory-mapped and read-only (write to a clone), and class ids, int64 [N].

    `dataset` is a key of SOURCE_SIZE, `split` is 'train' or 'val', H = W = source_size (None: SOURCE_SIZE's; shorter
    side, centre crop). skip_broken leaves unreadable images out and says so; num_images and seed are deadleaves'. The
    cache is replaced when the data have changed; those of other sizes, seeds and numbers stay, as one goes back and
    forth between them. Raises ValueError or OSError, with one line that says what to change."""
    for what, given, allowed in (('data set', dataset, list(SOURCE_SIZE)), ('split', split, ['train', 'val'])):
        if given not in allowed:
            near = difflib.get_close_matches(str(given).lower(), allowed, 1, 0.4)
            raise ValueError(f"unknown {what} '{given}': give {' or '.join(near or allowed)}")
    size = SOURCE_SIZE[dataset] if source_size is None else source_size
    if not 1 <= size <= 4096:
        raise ValueError(f'source size {size}: give 1 to 4096 pixels')
    path = Path(data_dir).expanduser().absolute()
    if path.is_file() and dataset != 'tinyimagenet':
        raise NotADirectoryError(f'{path} is a file: give a folder as --data-dir')
    if dataset == 'deadleaves':
        def read():
            images, labels = deadleaves(split, num_images, seed, size)
            return range(len(images)), labels.tolist(), lambda i: images[i].permute(1, 2, 0).contiguous().numpy()
        home, fingerprint = path, [num_images, seed]
    else:
        source = {'cifar100': cifar100_source, 'tinyimagenet': tinyimagenet_source, 'folder': folder_source}[dataset]
        home, fingerprint, read = source(path, split)

    key = {'version': CACHE_VERSION, 'dataset': dataset, 'split': split, 'size': size, 'made_from': fingerprint}
    elsewhere = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'minibatch-contrastive'
    knobs = fingerprint if dataset == 'deadleaves' else None
    # Named by the settings and by where the data are, seen from the cache: a folder can be moved with its cache
    files = [folder / f'{dataset}-{split}-{size}px-{digest((os.path.relpath(path, folder), knobs))[:12]}.cache'
             for folder in (home / '.cache-minibatch', elsewhere)]
    found = next(filter(None, (open_cache(file, key) for file in files)), None)
    if not found:
        file = next((f for f in files if writable(f.parent)), None)
        if not file:
            raise OSError(f'neither {files[0].parent} nor {elsewhere} can be written: set XDG_CACHE_HOME to a folder '
                          'that can')
        with locked(file.parent):
            if not open_cache(file, key):  # another process may have made it meanwhile
                write_cache(file, key, *read(), skip_broken)
            found = open_cache(file, key)
    images, labels, broken = found
    if broken and not skip_broken:
        raise broken_images(broken)
    if broken:
        print(f"{dataset} {split}: {len(broken)} broken images left out: {', '.join(name for name, _ in broken[:3])}"
              f"{', ...' if len(broken) > 3 else ''}", file=sys.stderr)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that torch knows no read-only tensors
        return torch.from_numpy(images), torch.from_numpy(labels)


def writable(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK | os.X_OK)
    return False


def limit_indices(labels: torch.Tensor, n: int) -> torch.Tensor:
    """int64 [min(n, N)], ascending: n samples, the classes' first ones in turn. Raises ValueError if n < 1."""
    if n < 1:
        raise ValueError(f'limit {n}: give at least 1 image')
    by_class = torch.argsort(labels, stable=True)
    turn = torch.arange(len(labels)) - torch.searchsorted(labels[by_class], labels[by_class])  # 0, 1, ... in each class
    return by_class[torch.argsort(turn, stable=True)[:n]].sort().values


def fingerprint(images, labels):  # STANDIN
    return digest(images[:: max(1, len(images) // 256)].numpy().tobytes() + labels.numpy().tobytes())
