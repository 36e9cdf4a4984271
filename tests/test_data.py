"""The data sets, read from small ones in the real formats on disk: `python -m pytest tests/test_data.py`."""
import errno
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data

WNIDS = "n02", "n01", "n03"
METHODS = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA
RED, GREEN, BLUE, WHITE = (200, 30, 30), (30, 200, 30), (30, 30, 200), (255, 255, 255)
DARK, LIGHT = (60,) * 3, (180,) * 3


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def pattern(seed, size=64):
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(colours).resize((size, size))


def make_tiny(folder, per_class=3, per_val=4):
    """An unpacked tiny-imagenet-200; returns {relative path: RGB array} as Pillow alone decodes it."""
    root, expected = folder / "tiny-imagenet-200", {}
    names = [f"train/{w}/images/{w}_{i}.JPEG" for w in WNIDS for i in range(per_class)]
    names += [f"val/images/val_{i}.JPEG" for i in range(per_val)]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (pattern(i).convert("L") if i == 1 else pattern(i)).save(root / name)
        expected[name] = np.asarray(Image.open(root / name).convert("RGB"))
    for w in WNIDS:
        (root / f"train/{w}/{w}_boxes.txt").write_text("")
    (root / "val/val_annotations.txt").write_text(
        "".join(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t9\t9\n" for i in range(per_val)))
    return expected


def zip_folder(folder, target, prefix="tiny-imagenet-200/", method=zipfile.ZIP_STORED):
    target.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(target, "w", method) as z:
        for file in sorted(folder.rglob("*"), reverse=True):  # not in the order of the names
            if file.is_file():
                z.write(file, prefix + str(file.relative_to(folder)))


def make_photos(folder, n=12):
    for i in range(n):
        (folder / f"c{i % 3}").mkdir(parents=True, exist_ok=True)
        pattern(i).save(folder / f"c{i % 3}/{i}.png")
    return folder


def cached(folder):
    return sorted(f.name.split(".", 1)[1] for f in (folder / ".cache-minibatch").iterdir())


def names_of(folder, split):
    return data.folder_source(folder, split)[2]()[0]


ONE_CACHE = ["images.npy", "json", "labels.npy"]


def refused(kind, words, *args, **options):
    with pytest.raises(kind, match=words) as caught:
        data.load(*args, **options)
    assert "\n" not in str(caught.value) and not caught.value.__cause__
    return str(caught.value)


# ------------------------------------------------------------------------------- Tiny ImageNet and CIFAR-100

def test_tiny_imagenet_zip_and_unpacked_are_the_same(tmp_path):
    expected, root = make_tiny(tmp_path / "unpacked"), tmp_path / "unpacked/tiny-imagenet-200"
    given = [tmp_path / "unpacked", root]
    for method, name, prefix in zip(
            METHODS,
            ("official/tiny-imagenet-200.zip", "half/tiny-imagenet-200-half.zip", "any/a.zip", "deep/x.zip"),
            ("tiny-imagenet-200/", "tiny-imagenet-200/", "", "a/b/")):
        zip_folder(root, tmp_path / name, prefix, method)
        given.append((tmp_path / name).parent if name.startswith(("official", "half")) else tmp_path / name)
    for other in ("tiny-imagenet-200-b.zip", "tiny-imagenet-200/train"):  # the shortest name of a zip counts
        (tmp_path / "official" / other).mkdir(parents=True)
    for split, labels in (("train", [0, 0, 0, 1, 1, 1, 2, 2, 2]), ("val", [1, 0, 2, 1])):
        names = [n for n in sorted(expected) if n.startswith(split)]
        for path in given:
            x, y = data.load("tinyimagenet", split, path)
            assert x.dtype == torch.uint8 and x.shape == (len(names), 3, 64, 64)
            assert y.dtype == torch.int64 and y.tolist() == labels
            assert np.array_equal(x.permute(0, 2, 3, 1), np.stack([expected[n] for n in names])), path
    assert cached(tmp_path / "any") == cached(tmp_path / "official") == sorted(ONE_CACHE * 2)


@pytest.mark.parametrize("method", METHODS)
def test_damage_in_a_zip_is_named(tmp_path, method):
    make_tiny(tmp_path)
    good, bad, member = tmp_path / "good.zip", tmp_path / "bad.zip", "train/n01/images/n01_2.JPEG"
    zip_folder(tmp_path / "tiny-imagenet-200", good, method=method)
    for name, damage, words in ((member, 60, "image .*n01_2.JPEG.*--skip-broken"),
                                (member, -40, "image .*n01_2.JPEG.*--skip-broken"),
                                ("val/val_annotations.txt", 10, "bad.zip is no complete zip .*get it from http")):
        content = bytearray(good.read_bytes())
        with zipfile.ZipFile(good) as z:
            info = z.getinfo("tiny-imagenet-200/" + name)
        at = info.header_offset + (30 + len(info.filename) + damage if damage > 0 else 0)  # or its header
        content[at] ^= 0xff
        bad.write_bytes(content)
        refused(ValueError, words, "tinyimagenet", "train", bad)
        if name == member:
            assert len(data.load("tinyimagenet", "train", bad, skip_broken=True)[0]) == 8
    bad.write_bytes(good.read_bytes()[:-300])
    refused(ValueError, "bad.zip is no complete zip", "tinyimagenet", "val", bad)


@pytest.mark.parametrize("listed", [None, "val_0.JPEG\tn01\t0\n"])
def test_an_incomplete_tiny_imagenet_is_refused(tmp_path, listed):
    make_tiny(tmp_path)
    table = tmp_path / "tiny-imagenet-200/val/val_annotations.txt"
    table.write_text(listed) if listed else table.unlink()
    refused(ValueError, "tiny-imagenet-200 is no complete zip or folder", "tinyimagenet", "train", tmp_path)


def test_tiny_imagenet_download(tmp_path, monkeypatch):
    new, served, ticks = tmp_path / "new", tmp_path / "served.zip", []
    refused(OSError, "no route to host.*fetch .*cs231n.*put it there", "tinyimagenet", "train", new)
    monkeypatch.undo()
    make_tiny(tmp_path)
    zip_folder(tmp_path / "tiny-imagenet-200", served)
    monkeypatch.setattr(data, "TINY_URL", served.as_uri())
    refused(OSError, "bytes came instead of 248,100,043", "tinyimagenet", "train", new)
    assert [f.name for f in new.rglob("*")] == [".cache-minibatch"]  # no part stays
    monkeypatch.setattr(data, "TINY_BYTES", served.stat().st_size)
    monkeypatch.setattr(data.cli, "progress", lambda _, *total: lambda done: ticks.append((done, *total)))
    assert len(data.load("tinyimagenet", "train", new)[0]) == 9
    assert ticks[0][2] == "MB" and ticks[-1] == (9, 9, "images")
    served.unlink()
    assert len(data.load("tinyimagenet", "val", new)[0]) == 4


def test_cifar100(tmp_path, monkeypatch):
    refused(OSError, "no CIFAR-100 in .*fetch .*cifar-100-python.tar.gz", "cifar100", "train", tmp_path)
    folder, pixels, sums = tmp_path / "made/cifar-100-python", {}, {}
    folder.mkdir(parents=True)
    for name, n in (("train", 20), ("test", 10), ("meta", 0)):
        pixels[name] = np.random.default_rng(n).integers(0, 256, (n, 3072), np.uint8)
        labels = [i % 7 for i in range(n)]
        content = {"data": pixels[name], "fine_labels": labels, "fine_label_names": ["x"] * 7}
        (folder / name).write_bytes(pickle.dumps(content, 2))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    refused(ValueError, "damaged", "cifar100", "train", folder.parent)  # not the official checksums
    monkeypatch.setattr(data.CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(data.CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(data.CIFAR100, "meta", dict(data.CIFAR100.meta, md5=sums["meta"]))
    packed = tmp_path / "packed/cifar-100-python.tar.gz"  # put there by hand
    packed.parent.mkdir()
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(data.CIFAR100, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
    for split, name in (("train", "train"), ("val", "test")):
        for path in (folder.parent, folder, packed.parent):
            x, y = data.load("cifar100", split, path)
            assert np.array_equal(x, pixels[name].reshape(-1, 3, 32, 32))
            assert y.tolist() == [i % 7 for i in range(len(x))]
    assert cached(packed.parent) == sorted(ONE_CACHE * 2)  # no folder in which it was unpacked


# --------------------------------------------------------------------------------------------- single images

def halves(mode="RGB", left=RED, right=BLUE, size=(64, 64)):
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def numbers(dtype, left, right):
    return Image.fromarray(np.where(np.arange(64) < 32, left, right).astype(dtype)[None].repeat(64, 0))


def odd_images():
    """name -> image, options of save(), colour of the left half, of the right half."""
    rgba, palette = halves("RGBA", (*RED, 255), (*RED, 0)), halves().quantize(4)
    with_hole, turned, quarter = palette.copy(), Image.Exif(), Image.Exif()
    with_hole.info["transparency"] = palette.getpixel((0, 0))
    turned[0x0112], quarter[0x0112] = 3, 6  # upside down; lying on its left
    tall = Image.new("RGB", (64, 64), RED)
    tall.paste(BLUE, (0, 0, 64, 32))
    wide = Image.new("RGB", (200, 50), GREEN)
    wide.paste(halves(size=(50, 50)), (75, 0))
    best = dict(quality=95, subsampling=0)
    frames = dict(save_all=True, append_images=[Image.new("P", (64, 64))])
    cases = {f"plain.{suffix}": (halves(), {}) for suffix in ("PNG", "bmp", "tiff", "ppm", "jp2", "TGA")} | {
        "a.jpg": (halves(), best), "c.webp": (halves(), dict(lossless=True)), "e.gif": (palette, frames),
        "f.mpo": (halves(), dict(best, save_all=True, append_images=[halves()])), "k.png": (palette, {}),
        "g.png": (halves("L", 60, 180), {}, DARK, LIGHT), "h.JPEG": (halves("L", 60, 180), {}, DARK, LIGHT),
        "i.png": (rgba, {}, RED, WHITE), "j.webp": (rgba, dict(lossless=True), RED, WHITE),
        "l.png": (with_hole, {}, WHITE, BLUE), "m.png": (halves("LA", (60, 255), (60, 0)), {}, DARK, WHITE),
        "n.png": (halves("1", 0, 1), {}, (0,) * 3, WHITE),
        "q.jpg": (halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), best, (255, 0, 0), (0, 0, 255)),
        "r.jpg": (halves(), dict(best, exif=turned), BLUE, RED), "s.jpg": (tall, dict(best, exif=quarter)),
        "t.png": (halves(), dict(exif=turned), BLUE, RED), "t.tif": (halves(), dict(exif=turned), BLUE, RED),
        "u.png": (wide, {}), "ü b.png": (halves(), {}), "v.jpg": (halves(size=(1000, 900)), best),
        "w.png": (halves(size=(32, 24)), {}), "wrong-name.jpg": (halves(), dict(format="PNG"))}
    for name, dtype, scale in (
            ("16.png", np.uint16, 257), ("16.tif", np.uint16, 257), ("16.pgm", np.int32, 257),
            ("float.tif", np.float32, 1 / 255), ("float-255.tif", np.float32, 1),
            ("float-16.tif", np.float32, 257), ("int-8.tif", np.int32, 1), ("int-16.tif", np.int32, 257)):
        cases[name] = (numbers(dtype, 60 * scale, 180 * scale), {}, DARK, LIGHT)
    for name, dtype, left, right in (
            ("negative.tif", np.float32, -3, 7), ("nan.tif", np.float32, np.nan, 255),
            ("more.tif", np.int32, 100_000, 200_000)):
        cases[name] = (numbers(dtype, left, right), {}, (0,) * 3, WHITE)
    return {name: case + (RED, BLUE) * (len(case) == 2) for name, case in cases.items()}


def test_odd_images(tmp_path):
    """Each file's colours in its left and right half after reading, within what its compression loses."""
    cases, found, wrong = odd_images(), {}, {}
    for name, (image, options, _, _) in cases.items():
        image.save(tmp_path / name, **options)
    for split in ("train", "val"):
        images, labels = data.load("folder", split, tmp_path, source_size=48)
        assert images.shape[1:] == (3, 48, 48) and set(labels.tolist()) == {0}
        found |= dict(zip(names_of(tmp_path, split), images.float(), strict=True))
    assert found.keys() == cases.keys()
    for name, (_, _, left, right) in cases.items():
        for half, colour in ((found[name][:, 4:-4, 4:18], left), (found[name][:, 4:-4, -18:-4], right)):
            worst = (half - torch.tensor(colour).float()[:, None, None]).abs().max().item()
            if worst > (6 if name.lower().endswith(("jpg", "jpeg", "mpo")) else 1):
                wrong[name] = worst, half.mean((1, 2)).tolist(), colour
    assert not wrong


def test_size_and_crop(tmp_path):
    """An image of the wanted height is cut and not resampled; shrinking averages, and leaves no stripes."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 45, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png")
    stripes = np.tile(np.array([0, 255], np.uint8)[None, :, None], (256, 128, 3))
    for name in ("1.png", "3.png"):
        Image.fromarray(stripes).save(tmp_path / name)
    cut, shrunk = (data.load("folder", s, tmp_path, source_size=32)[0][0] for s in ("val", "train"))
    assert np.array_equal(cut.permute(1, 2, 0), noise[:, 6:38])
    assert (shrunk[:, :, 2:-2].float() - 127.5).abs().max() < 4


def test_broken_images(tmp_path, capsys):
    photos = make_photos(tmp_path / "train")
    (photos / "c1/cut.png").write_bytes((photos / "c1/1.png").read_bytes()[:-40])
    (photos / "c1/cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (photos / "c1/empty.png").write_bytes(b"")
    make_photos(tmp_path / "val", 3)
    refused(ValueError, r"c1/cut.jpg. \(.*--skip-broken", "folder", "train", tmp_path)
    assert not cached(tmp_path)
    for _ in range(2):  # decoded and from the cache
        x, y = data.load("folder", "train", tmp_path, skip_broken=True)
        assert len(x) == 12 and y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert "3 broken images left out (train/c1/cut.jpg" in capsys.readouterr().err
    assert np.array_equal(x[4].permute(1, 2, 0), pattern(1)) and np.array_equal(x[11].permute(1, 2, 0), pattern(8))
    refused(ValueError, "cut.jpg", "folder", "train", tmp_path)  # what others skipped is not skipped for all


# ----------------------------------------------------------------------------------------- folders of images

def test_folder_layouts(tmp_path, capsys):
    photos = make_photos(tmp_path / "photos", 60)
    for junk in ("notes.txt", ".hidden.png", ".git/x.png", "c0/._1.png", "c1/a.heic", "LICENSE"):
        (photos / junk).parent.mkdir(exist_ok=True)
        (photos / junk).write_bytes(b"junk")
    os.symlink("gone", photos / "dangling.png")
    shutil.move(photos / "c1", tmp_path / "c1")
    os.symlink(tmp_path / "c1", photos / "c1")
    (train, labels, _), (val, val_labels, _) = (data.folder_source(photos, s)[2]() for s in ("train", "val"))
    assert sorted([*train, *val]) == sorted(f"c{i % 3}/{i}.png" for i in range(60))
    assert val == ["c0/27.png", "c1/13.png", "c1/52.png", "c2/2.png", "c2/59.png"]  # on every machine
    assert [f"c{label}" for label in labels + val_labels] == [name[:2] for name in train + val]
    assert capsys.readouterr().err == f"{photos}: 3 files left out, not read by Pillow or in no split\n"
    pattern(99).save(photos / "c0/extra.png")  # a new file moves none between the splits
    assert set(names_of(photos, "val")) - {"c0/extra.png"} == set(val)

    (tmp_path / "nested").mkdir()
    shutil.move(photos, tmp_path / "nested/deep")
    for split in ("train", "val"):
        names, labels, _ = data.folder_source(tmp_path / "nested", split)[2]()
        assert labels == [int(name[len("deep/c")]) for name in names] and len(names)


@pytest.mark.parametrize("train, val", [
    ("train", "validation"), ("Train", "Test"), ("training", "valid"), ("TRAIN", "VAL"),
    ("deep/train", "deep/val"), ("Training", "Testing")])
def test_split_folders(tmp_path, capsys, train, val):
    other = Path(train).parent / "other"
    for folder in (f"{train}/a", f"{train}/b", f"{val}/b", other):  # class ids are of both splits
        (tmp_path / folder).mkdir(parents=True)
        pattern(1).save(tmp_path / folder / "1.png")
    assert data.load("folder", "train", tmp_path)[1].tolist() == [0, 1]
    assert data.load("folder", "val", tmp_path)[1].tolist() == [1]
    assert "1 files left out" in capsys.readouterr().err


def test_val_counts_before_test(tmp_path):
    for i, folder in enumerate(("train", "test", "val")):
        (tmp_path / folder).mkdir()
        pattern(i).save(tmp_path / f"{folder}/{i}.png")
    assert [names_of(tmp_path, split) for split in ("train", "val")] == [["train/0.png"], ["val/2.png"]]


# ------------------------------------------------------------------------------------------------- the cache

def test_second_load_decodes_nothing(tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "p")
    first = data.load("folder", "train", photos)
    monkeypatch.setattr(data, "decode", lambda *a: pytest.fail("decoded again"))
    second = data.load("folder", "train", str(photos))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    mapped = [line for line in open("/proc/self/maps") if f"{photos}/.cache-minibatch/" in line]
    assert mapped and all(" r--s " in line for line in mapped)  # not read, nor copied
    os.rename(photos, tmp_path / "moved")  # a folder can be moved with its cache
    assert torch.equal(data.load("folder", "train", tmp_path / "moved")[0], first[0])


def test_deadleaves_is_cached_by_its_parameters(tmp_path, monkeypatch):
    asked = []

    def drawn(split, n, seed, size):
        asked.append((split, n, seed, size))
        return torch.full((n, 3, size, size), 10 * seed + n, dtype=torch.uint8), torch.arange(n) % 3
    monkeypatch.setattr(data, "deadleaves", drawn)
    for _ in range(2):
        for split, n, seed in (("train", 7, 0), ("val", 5, 0), ("train", 7, 1)):
            x, y = data.load("deadleaves", split, tmp_path / "new", num_images=n, seed=seed)
            assert x.shape == (n, 3, 32, 32) and (x == 10 * seed + n).all()
            assert y.tolist() == [i % 3 for i in range(n)]
    assert asked == [("train", 7, 0, 32), ("val", 5, 0, 32), ("train", 7, 1, 32)]


def test_changed_data_and_damaged_caches_are_decoded_anew(tmp_path, monkeypatch):
    photos, counted, decode = make_photos(tmp_path / "p"), [], data.decode
    good = data.load("folder", "train", photos)[0].clone()
    monkeypatch.setattr(data, "decode", lambda *a: (counted.append(1), decode(*a))[1])

    def rebuilt():
        counted.clear()
        x, y = data.load("folder", "train", photos)
        assert len(counted) == len(x) == len(y)
        return x
    for kind in ONE_CACHE:
        file, = (photos / ".cache-minibatch").glob(f"*.{kind}")
        for damaged in (None, b"", file.read_bytes()[:-1]):
            file.unlink()  # not in place: the tensors of before are still mapped
            if damaged is not None:
                file.write_bytes(damaged)
            assert torch.equal(rebuilt(), good)
    (photos / "notes.txt").write_text("no image")
    data.load("folder", "train", photos)
    assert len(counted) == len(good)
    pattern(50).save(photos / "c0/0.png")  # another picture under the same name
    os.utime(photos / "c0/0.png", ns=(1, 1))
    assert not torch.equal(rebuilt(), good)
    for i in range(60, 70):
        pattern(i).save(photos / f"c0/{i}.png")
    assert len(rebuilt()) > len(good)
    os.rename(photos / "c2/2.png", photos / "c2/2a.png")  # in the same place, but not the same split
    rebuilt()
    monkeypatch.setattr(data, "CACHE_VERSION", 999)
    rebuilt()


def test_a_changed_zip_is_read_again(tmp_path):
    make_tiny(tmp_path)
    root, archive, labels = tmp_path / "tiny-imagenet-200", tmp_path / "a.zip", []
    text = (root / "val/val_annotations.txt").read_text()
    for time, words in enumerate((text, text.replace("n01", "n03"))):  # of the same size
        (root / "val/val_annotations.txt").write_text(words)
        zip_folder(root, archive)
        os.utime(archive, ns=(time, time))
        labels.append(data.load("tinyimagenet", "val", archive)[1].tolist())
    assert labels == [[1, 0, 2, 1], [1, 2, 2, 1]]


def test_another_process_fills_the_same_cache_meanwhile(tmp_path, monkeypatch):
    photos, results, replace = make_photos(tmp_path / "p"), [], os.replace

    def interrupted(source, target):
        if Path(target).name.endswith("labels.npy") and not results:  # the images are in place
            results.append(None)
            results[0] = [x.clone() for x in data.load("folder", "train", photos)]
        replace(source, target)
    monkeypatch.setattr(os, "replace", interrupted)
    for _ in range(2):
        assert all(map(torch.equal, data.load("folder", "train", photos), results[0]))
    assert cached(photos) == sorted(ONE_CACHE)


def test_processes_at_once(tmp_path):
    photos = make_photos(tmp_path / "p", 40)
    code = f"""if 1:
        import time, data
        decode = data.decode
        data.decode = lambda *a: (time.sleep(0.1), decode(*a))[1]
        x, y = data.load("folder", "train", {str(photos)!r}, source_size=16)
        print(len(x), int(x.long().sum()), int(y.sum()))"""
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=Path(data.__file__).parent, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [p.communicate() for p in both]
    x, y = data.load("folder", "train", photos, source_size=16)
    assert [out for out, _ in outputs] == [f"{len(x)} {int(x.long().sum())} {int(y.sum())}\n"] * 2, outputs
    assert cached(photos) == sorted(ONE_CACHE)


def test_unwritable_data_folder(tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "p")
    (photos / ".cache-minibatch").write_text("in the way")
    x, _ = data.load("folder", "train", photos)
    assert len(list((tmp_path / "xdg/minibatch-contrastive").iterdir())) == 3
    monkeypatch.setattr(data, "decode", lambda *a: pytest.fail("decoded again"))
    assert torch.equal(data.load("folder", "train", photos)[0], x)


def test_full_disk(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    photos = make_photos(tmp_path / "p")
    before = data.load("folder", "train", photos)[0].clone()
    monkeypatch.setattr(os, "fsync", full)
    refused(OSError, "the disk of .* is full", "folder", "train", photos, source_size=32)
    monkeypatch.setattr(data, "decode", lambda *a: pytest.fail("decoded again"))
    assert cached(photos) == sorted(ONE_CACHE)
    assert torch.equal(data.load("folder", "train", photos)[0], before)


# ------------------------------------------------------------------------------------ bad input and the rest

@pytest.mark.parametrize("dataset, split, folder, words", [
    ("cifar10", "train", ".", "of 'cifar10': give train or val of deadleaves, cifar100"),
    ("folder", "test", ".", "no split 'test'"), ("folder", "train", "gone", "No such file .*gone"),
    ("folder", "train", "empty", "empty holds no images"), ("folder", "train", "a.txt", "Not a directory.*a.txt"),
    ("folder", "train", "texts", "texts holds no images"), ("folder", "train", "one", "no images .*for train"),
    ("tinyimagenet", "train", "nothing.zip", "No such file .*nothing.zip"),
    ("tinyimagenet", "train", "texts/a.zip", "no complete zip")])
def test_bad_input(tmp_path, dataset, split, folder, words):
    for name in ("empty", "texts", "one"):
        (tmp_path / name).mkdir()
    for name in ("a.txt", "texts/a.zip"):
        (tmp_path / name).write_text("hello")
    pattern(0).save(tmp_path / "one/a.png")
    refused((ValueError, OSError), words, dataset, split, tmp_path / folder)


def test_limit_indices():
    labels = torch.tensor([2, 2, 2, 2, 0, 0, 1, 1, 1])
    assert data.limit_indices(labels, 3).tolist() == [0, 4, 6]
    assert data.limit_indices(labels, 6).tolist() == [0, 1, 4, 5, 6, 7]
    assert data.limit_indices(labels, 8).tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert data.limit_indices(labels, 99).tolist() == list(range(9))
    many = torch.randint(5, (1000,), generator=torch.Generator().manual_seed(0))
    assert many[data.limit_indices(many, 100)].bincount().tolist() == [20] * 5
    assert data.limit_indices(torch.zeros(9, dtype=torch.int64), 4).tolist() == [0, 1, 2, 3]


def test_fingerprint_sees_every_pixel_and_label():
    images = torch.randint(256, (700, 3, 96, 96), dtype=torch.uint8)  # more than a block
    labels, found = torch.arange(700) % 3, []
    for row, *at in ((0, 0, 0, 0), (605, 0, 3, 4), (606, 1, 50, 7), (607, 1, 0, 0), (699, 2, 95, 95)):
        images[row][tuple(at)] += 1
        found.append(data.fingerprint(images, labels))
    labels[699] = 2 - labels[699]
    found.append(data.fingerprint(images, labels))
    found += [data.fingerprint(images.flip(0), labels.flip(0)), data.fingerprint(images[:699], labels[:699]),
              data.fingerprint(images.view(700, 3, 48, 192), labels)]
    assert len(set(found)) == 9 and data.fingerprint(images.clone(), labels.clone()) == found[5]


def test_statistics_are_of_every_data_set():
    assert data.STATISTICS.keys() == data.SOURCE_SIZE.keys()
    assert data.STATISTICS["cifar100"] == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
    assert data.STATISTICS["folder"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
