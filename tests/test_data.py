"""The data sets, read from small ones in the real formats on disk: `python -m pytest tests/test_data.py`."""
import errno
import hashlib
import os
import pickle
import shutil
import socket
import struct
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data

URLOPEN = urllib.request.urlopen
WNIDS = "n02", "n01", "n03"
RED, BLUE = (200, 30, 30), (30, 30, 200)
BLACK, DARK, LIGHT, WHITE = ((level,) * 3 for level in (0, 60, 180, 255))


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def pattern(seed, size=64):
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(colours).resize((size, size))


def make_tiny(folder):
    """An unpacked tiny-imagenet-200; returns {relative path: RGB array} as Pillow alone decodes it."""
    root, expected = folder / "tiny-imagenet-200", {}
    names = [f"train/{w}/images/{w}_{i}.JPEG" for w in WNIDS for i in range(3)]
    for i, name in enumerate([*names, *(f"val/images/val_{i}.JPEG" for i in range(4))]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (pattern(i).convert("L") if i == 1 else pattern(i)).save(root / name)
        expected[name] = np.asarray(Image.open(root / name).convert("RGB"))
    lines = [f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t9\t9\n" for i in range(4)]
    (root / "val/val_annotations.txt").write_text("".join(lines))
    return expected


def zip_folder(folder, target, prefix, method=zipfile.ZIP_STORED):
    target.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(target, "w", method) as z:
        for file in sorted(folder.rglob("*"), reverse=True):  # not in the order of the names
            if file.is_file() and ".cache-minibatch" not in file.parts:
                z.write(file, prefix + str(file.relative_to(folder)))


def make_photos(folder, n=12):
    for i in range(n):
        (folder / f"c{i % 3}").mkdir(parents=True, exist_ok=True)
        pattern(i).save(folder / f"c{i % 3}/{i}.png")
    return folder


def cached(folder):
    return sorted(f.name.split(".", 1)[1] for f in (folder / ".cache-minibatch").iterdir())


ONE_CACHE = ["images.npy", "json", "labels.npy"]


def refused(kind, words, *args, **options):
    with pytest.raises(kind, match=words) as caught:
        data.load(*args, **options)
    assert "\n" not in str(caught.value) and not caught.value.__cause__


def test_tiny_imagenet_zip_and_unpacked_are_the_same(tmp_path):
    expected, root = make_tiny(tmp_path / "unpacked"), tmp_path / "unpacked/tiny-imagenet-200"
    zips = [tmp_path / name for name in ("official/tiny-imagenet-200.zip", "half/tiny-imagenet-200-half.zip",
                                         "any/a.zip")]
    for file, prefix in zip(zips, ("tiny-imagenet-200/", "a/b/", "")):
        zip_folder(root, file, prefix)
    given = [tmp_path / "unpacked", root, zips[0].parent, zips[1].parent, zips[2]]
    (tmp_path / "official/tiny-imagenet-200-b.zip").touch()  # the shortest name counts
    for split, labels in (("train", [0, 0, 0, 1, 1, 1, 2, 2, 2]), ("val", [1, 0, 2, 1])):
        pixels = np.stack([expected[name] for name in sorted(expected) if name.startswith(split)])
        for path in given:
            x, y = data.load("tinyimagenet", split, path)
            assert x.dtype == torch.uint8 and y.dtype == torch.int64 and y.tolist() == labels
            assert np.array_equal(x.permute(0, 2, 3, 1), pixels), path
    assert cached(tmp_path / "any") == cached(tmp_path / "official") == sorted(ONE_CACHE * 2)
    table = root / "val/val_annotations.txt"
    table.write_text(table.read_text().replace("n01", "n03"))  # as many bytes
    zip_folder(root, zips[2], "")
    for path in (root, zips[2]):
        assert data.load("tinyimagenet", "val", path)[1].tolist() == [1, 2, 2, 1]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_in_a_zip_is_named(tmp_path, method):
    make_tiny(tmp_path)
    good, bad, image = tmp_path / "good.zip", tmp_path / "bad.zip", "train/n01/images/n01_2.JPEG"
    zip_folder(tmp_path / "tiny-imagenet-200", good, "", method)
    for name, damage, words in ((image, 60, "image .*n01_2.JPEG.*--skip-broken"),
                                ("val/val_annotations.txt", 10, "bad.zip is no complete zip .*from http")):
        content = bytearray(good.read_bytes())
        with zipfile.ZipFile(good) as z:
            content[z.getinfo(name).header_offset + 30 + len(name) + damage] ^= 0xff
        bad.write_bytes(content)
        refused(ValueError, words, "tinyimagenet", "train", bad)
        if name == image:
            assert len(data.load("tinyimagenet", "train", bad, skip_broken=True)[0]) == 8
    bad.write_bytes(good.read_bytes()[:-300])
    refused(ValueError, "bad.zip is no complete zip", "tinyimagenet", "val", bad)


def test_tiny_imagenet_download(tmp_path, monkeypatch):
    new, served = tmp_path / "new", tmp_path / "served.zip"
    refused(OSError, "no route to host.*fetch .*cs231n.*put it there", "tinyimagenet", "train", new)
    monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)
    make_tiny(tmp_path)
    zip_folder(tmp_path / "tiny-imagenet-200", served, "")
    monkeypatch.setattr(data, "TINY_URL", served.as_uri())
    refused(OSError, "bytes came instead of 248,100,043", "tinyimagenet", "train", new)
    assert [f.name for f in new.rglob("*")] == [".cache-minibatch"]  # no part stays
    monkeypatch.setattr(data, "TINY_BYTES", served.stat().st_size)
    assert len(data.load("tinyimagenet", "train", new)[0]) == 9
    served.unlink()
    assert len(data.load("tinyimagenet", "val", new)[0]) == 4


def test_cifar100(tmp_path, monkeypatch):
    refused(OSError, "no CIFAR-100 in .*fetch .*cifar-100-python.tar.gz", "cifar100", "train", tmp_path)
    folder, pixels, sums = tmp_path / "made/cifar-100-python", {}, {}
    folder.mkdir(parents=True)
    for name, n in (("train", 20), ("test", 10), ("meta", 0)):
        pixels[name] = np.random.default_rng(n).integers(0, 256, (n, 3072), np.uint8)
        labels = [i % 7 for i in range(n)]
        content = {"data": pixels[name], "fine_labels": labels, "fine_label_names": []}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    refused(ValueError, "damaged", "cifar100", "train", folder.parent)  # not the official checksums
    for name, value in (("train_list", [["train", sums["train"]]]), ("test_list", [["test", sums["test"]]]),
                        ("meta", dict(data.CIFAR100.meta, md5=sums["meta"]))):
        monkeypatch.setattr(data.CIFAR100, name, value)
    packed = tmp_path / "packed/cifar-100-python.tar.gz"  # put there by hand
    packed.parent.mkdir()
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(data.CIFAR100, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
    for path in (folder.parent, folder, packed.parent):
        for split, name in (("train", "train"), ("val", "test")):
            x, y = data.load("cifar100", split, path)
            assert np.array_equal(x, pixels[name].reshape(-1, 3, 32, 32))
            assert y.tolist() == [i % 7 for i in range(len(x))]
    assert cached(packed.parent) == sorted(ONE_CACHE * 2)  # no folder in which it was unpacked


def test_a_download_that_stalls_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)
    monkeypatch.setattr(data, "PATIENCE", 0.2)
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("localhost", 0)) as server:  # which never answers
        url = f"http://localhost:{server.getsockname()[1]}/x.zip"
        monkeypatch.setattr(data, "TINY_URL", url)
        monkeypatch.setattr(data.CIFAR100, "url", url)
        for dataset in ("tinyimagenet", "cifar100"):
            refused(OSError, f"download failed .*timed out.*: fetch {url}", dataset, "train", tmp_path)
    assert socket.getdefaulttimeout() is None


def halves(mode="RGB", left=RED, right=BLUE, size=(64, 64)):
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def odd_images():
    """name -> image, options of save(), colour of the left half, of the right half."""
    rgba, palette = halves("RGBA", (*RED, 255), (*RED, 0)), halves().quantize(4)
    with_hole, turned, quarter = palette.copy(), Image.Exif(), Image.Exif()
    with_hole.info["transparency"] = palette.getpixel((0, 0))
    turned[0x0112], quarter[0x0112] = 3, 6  # upside down; lying on its left
    tall, wide = Image.new("RGB", (64, 64), RED), Image.new("RGB", (200, 50), (30, 200, 30))
    tall.paste(BLUE, (0, 0, 64, 32))
    wide.paste(halves(size=(50, 50)), (75, 0))
    best, frames = dict(quality=95, subsampling=0), dict(save_all=True, append_images=[tall.quantize(4)])
    plain = ("PNG", "bmp", "tiff", "ppm", "jp2", "TGA", "mpo", "webp")
    same = {f"plain.{suffix}": (halves(), dict(best, lossless=True)) for suffix in plain} | {
        "e.gif": (palette, frames), "k.png": (palette, {}), "s.jpg": (tall, dict(best, exif=quarter)),
        "u.png": (wide, {}), "ü b.png": (halves(size=(32, 24)), {}), "w.jpg": (halves(), dict(format="PNG")),
        "v.jpg": (halves(size=(1000, 900)), best)}
    cases = {name: (*case, RED, BLUE) for name, case in same.items()} | {
        f"turned.{suffix}": (halves(), dict(best, exif=turned), BLUE, RED)
        for suffix in ("jpg", "png", "tif")} | {
        "h.JPEG": (halves("L", 60, 180), {}, DARK, LIGHT), "i.png": (rgba, {}, RED, WHITE),
        "l.png": (with_hole, {}, WHITE, BLUE), "m.png": (halves("LA", (60, 255), (60, 0)), {}, DARK, WHITE),
        "n.png": (halves("1", 0, 1), {}, BLACK, WHITE),
        "q.jpg": (halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), best, (255, 0, 0), (0, 0, 255))}
    for name, dtype, left, right in (
            ("16.png", np.uint16, 60 * 257, 180 * 257), ("16.tif", np.uint16, 60 * 257, 180 * 257),
            ("16.pgm", np.int32, 60 * 257, 180 * 257), ("1.tif", np.float32, 60 / 255, 180 / 255),
            ("255.tif", np.float32, 60, 180), ("65535.tif", np.float32, 60 * 257, 180 * 257),
            ("int.tif", np.int32, 60 * 257, 180 * 257), ("negative.tif", np.float32, -3, 7),
            ("nan.tif", np.float32, np.nan, 255), ("more.tif", np.int32, 100_000, 200_000),
            ("u32.tif", np.uint32, 60 * 0x1010101, 180 * 0x1010101), ("mu32.tif", np.uint32, 10**5, 10**6)):
        colours = (BLACK, WHITE) if name[0] in "nm" else (DARK, LIGHT)
        values = np.where(np.arange(64) < 32, left, right).astype(dtype)[None].repeat(64, 0)
        cases[name] = (Image.fromarray(values), {}, *colours)
    return cases


def test_odd_images(tmp_path):
    """Each file's colours in its left and right half after reading, within what its compression loses."""
    cases, found, wrong = odd_images(), {}, {}
    for name, (image, options, _, _) in cases.items():
        image.save(tmp_path / name, **options)
        if "u32" in name:  # Pillow writes all as signed
            signs = (struct.pack("<HHII", 339, 3, 1, kind) for kind in (2, 1))
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes().replace(*signs))
    for split in ("train", "val"):
        images = data.load("folder", split, tmp_path, source_size=48)[0]
        found |= dict(zip(data.folder_source(tmp_path, split)[2]()[0], images.float(), strict=True))
    assert found.keys() == cases.keys()
    for name, (_, _, *colours) in cases.items():
        for half, colour in zip((found[name][:, 4:-4, 4:18], found[name][:, 4:-4, -18:-4]), colours):
            worst = (half - torch.tensor(colour).float()[:, None, None]).abs().max().item()
            if worst > (6 if name.lower().endswith(("jpg", "jpeg", "mpo")) else 1):
                wrong[name] = worst, half.mean((1, 2)).tolist(), colour
    assert not wrong


def test_size_and_crop(tmp_path):
    """An image of the wanted height is cut and not resampled; shrinking averages, and leaves no stripes."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 45, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.png")
    stripes = np.tile(np.array([0, 255], np.uint8)[None, :, None], (256, 128, 3))
    Image.fromarray(stripes).save(tmp_path / "1.png")
    cut, shrunk = (data.load("folder", s, tmp_path, source_size=32)[0][0] for s in ("val", "train"))
    assert np.array_equal(cut.permute(1, 2, 0), noise[:, 6:38])
    assert (shrunk[:, :, 2:-2].float() - 127.5).abs().max() < 4


def test_broken_images(tmp_path, capsys):
    photos = make_photos(tmp_path / "train")
    (photos / "c1/cut.png").write_bytes((photos / "c1/1.png").read_bytes()[:-40])
    (photos / "c1/cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (photos / "c1/empty.png").write_bytes(b"")
    shutil.copytree(photos, tmp_path / "val")
    refused(ValueError, r"c1/cut.jpg. \(.*--skip-broken", "folder", "train", tmp_path)
    assert not cached(tmp_path)
    for _ in range(2):  # decoded and from the cache
        x, y = data.load("folder", "train", tmp_path, skip_broken=True)
        assert len(x) == 12 and y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert "3 broken images left out (train/c1/cut.jpg" in capsys.readouterr().err
    assert np.array_equal(x[11].permute(1, 2, 0), pattern(8))
    refused(ValueError, "cut.jpg", "folder", "train", tmp_path)  # what others skipped is not skipped for all


def test_folder_layouts(tmp_path, capsys):
    photos = make_photos(tmp_path / "photos", 60)
    for junk in ("notes.txt", ".hidden.png", ".git/x.png", "c0/._1.png", "c1/a.heic", "LICENSE", "c2/x.h5",
                 "film.mpg"):
        (photos / junk).parent.mkdir(exist_ok=True)
        (photos / junk).write_bytes(b"junk")
    os.symlink("gone", photos / "dangling.png")
    shutil.move(photos / "c1", tmp_path / "c1")
    os.symlink(tmp_path / "c1", photos / "c1")
    (train, labels, _), (val, val_labels, _) = (data.folder_source(photos, s)[2]() for s in ("train", "val"))
    assert sorted([*train, *val]) == sorted(f"c{i % 3}/{i}.png" for i in range(60))
    assert val == ["c0/27.png", "c1/13.png", "c1/52.png", "c2/2.png", "c2/59.png"]  # on every machine
    assert [f"c{label}" for label in labels + val_labels] == [name[:2] for name in train + val]
    assert capsys.readouterr().err == f"{photos}: 5 files left out, not read by Pillow or in no split\n"


@pytest.mark.parametrize("train, val", [
    ("train", "validation"), ("Training", "Test"), ("TRAIN", "VAL"), ("deep/train", "deep/val")])
def test_split_folders(tmp_path, capsys, train, val):
    other = Path(train).parent / ("test" if val.lower() == "val" else "other")
    for folder in (f"{train}/a", f"{train}/b", f"{val}/b", other):  # class ids are of both splits
        (tmp_path / folder).mkdir(parents=True)
        pattern(1).save(tmp_path / folder / "1.png")
    assert data.load("folder", "train", tmp_path)[1].tolist() == [0, 1]
    assert data.load("folder", "val", tmp_path)[1].tolist() == [1]
    assert "1 files left out" in capsys.readouterr().err


def test_second_load_decodes_nothing(tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "p")
    first = data.load("folder", "train", photos)
    monkeypatch.setattr(data, "decode", lambda *a: pytest.fail("decoded again"))
    assert all(map(torch.equal, data.load("folder", "train", str(photos)), first))
    mapped = [line for line in open("/proc/self/maps") if f"{photos}/.cache-minibatch/" in line]
    assert mapped and all(" r--s " in line for line in mapped)  # not read, nor copied
    os.rename(photos, tmp_path / "moved")  # a folder can be moved with its cache
    assert torch.equal(data.load("folder", "train", tmp_path / "moved")[0], first[0])


def test_deadleaves_is_cached_by_its_parameters(tmp_path, monkeypatch):
    asked, draw = [], data.deadleaves
    monkeypatch.setattr(data, "deadleaves", lambda *a: (asked.append(a), draw(*a))[1])
    wanted = [("train", 7, 0, 32), ("val", 5, 0, 32), ("train", 7, 1, 32), ("train", 7, 1, 48)]
    for split, n, seed, size in 2 * wanted:
        found = data.load("deadleaves", split, tmp_path / "new", num_images=n, seed=seed, source_size=size)
        assert all(map(torch.equal, found, draw(split, n, seed, size)))
    assert asked == wanted


def test_changed_data_and_damaged_caches_are_decoded_anew(tmp_path, monkeypatch):
    photos, counted, decode = make_photos(tmp_path / "p"), [], data.decode
    good = data.load("folder", "train", photos)[0].clone()
    monkeypatch.setattr(data, "decode", lambda *a: (counted.append(1), decode(*a))[1])

    def rebuilt():
        counted.clear()
        x, _ = data.load("folder", "train", photos)
        assert len(counted) == len(x)
        return x
    for kind in ONE_CACHE:
        file, = (photos / ".cache-minibatch").glob(f"*.{kind}")
        content = file.read_bytes()[:-1]
        file.unlink()  # not in place: the tensors of before are still mapped
        file.write_bytes(content)
        assert torch.equal(rebuilt(), good)
    (photos / "notes.txt").write_text("no image")
    data.load("folder", "train", photos)
    assert len(counted) == len(good)
    pattern(50).save(photos / "c0/0.png")  # another picture under the same name
    os.utime(photos / "c0/0.png", ns=(1, 1))
    assert not torch.equal(rebuilt(), good)
    monkeypatch.setattr(data, "CACHE_VERSION", 999)
    rebuilt()


def test_another_process_fills_the_same_cache_meanwhile(tmp_path, monkeypatch):
    photos, results, replace = make_photos(tmp_path / "p"), [], os.replace

    def interrupted(source, target):
        if target.endswith("labels.npy"):
            monkeypatch.setattr(os, "replace", replace)
            assert not list(photos.rglob("*.json"))  # which comes last
            results.extend(x.clone() for x in data.load("folder", "train", photos))
        replace(source, target)
    monkeypatch.setattr(os, "replace", interrupted)
    assert all(map(torch.equal, data.load("folder", "train", photos), results))
    assert cached(photos) == sorted(ONE_CACHE)


def test_unwritable_data_folder(tmp_path, monkeypatch):
    photos = make_photos(tmp_path / "p")
    (photos / ".cache-minibatch").write_text("in the way")
    x, _ = data.load("folder", "train", photos)
    assert len(list((tmp_path / "xdg/minibatch-contrastive").iterdir())) == 3
    monkeypatch.setattr(data, "decode", lambda *a: pytest.fail("decoded again"))
    assert torch.equal(data.load("folder", "train", photos)[0], x)


def test_what_killed_processes_left_is_swept(tmp_path):
    photos = make_photos(tmp_path)
    for name, age in ("tmp_old", 90_000), ("tmp_of_now", 60):
        (folder := photos / ".cache-minibatch" / name).mkdir(parents=True)
        (folder / "zip").write_text("a part")
        os.utime(folder, 2 * (time.time() - age,))
    data.load("folder", "train", photos)
    assert [x.name for x in (photos / ".cache-minibatch").glob("tmp*")] == ["tmp_of_now"]


def test_full_disk(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    refused(OSError, "the disk of .* is full", "folder", "train", make_photos(tmp_path))
    assert not cached(tmp_path)


@pytest.mark.parametrize("dataset, split, folder, words", [
    ("cifar10", "train", ".", "of 'cifar10': give train or val of deadleaves, cifar100"),
    ("folder", "test", ".", "no split 'test'"), ("folder", "train", "gone", "No such file .*gone"),
    ("folder", "train", "a.txt", "Not a directory.*txt"), ("folder", "train", "texts", "no images .*train"),
    ("folder", "train", "one", "no images .*train"), ("tinyimagenet", "val", "gone.zip", "No such .*zip"),
    ("tinyimagenet", "train", "tiny-imagenet-200", "no complete zip or folder of Tiny")])
def test_bad_input(tmp_path, dataset, split, folder, words):
    make_tiny(tmp_path)
    (tmp_path / "tiny-imagenet-200/val/val_annotations.txt").write_text("val_0.JPEG\tn01\t0\n")
    for name in ("a.txt", "texts/a.txt", "one/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pattern(0).save(tmp_path / name, "PNG")
    refused((ValueError, OSError), words, dataset, split, tmp_path / folder)


def test_limit_indices():
    labels = torch.tensor([2, 2, 2, 2, 0, 0, 1, 1, 1])
    assert data.limit_indices(labels, 3).tolist() == [0, 4, 6]
    assert data.limit_indices(labels, 6).tolist() == [0, 1, 4, 5, 6, 7]
    assert data.limit_indices(labels, 99).tolist() == list(range(9))


def test_fingerprint_sees_every_pixel_and_label():
    images = torch.randint(256, (5000, 3, 4, 4), dtype=torch.uint8)  # more than a block
    labels, found = torch.arange(5000) % 3, []
    for at in ((0, 0, 0, 0), (4095, 2, 3, 3), (4096, 0, 0, 0), (4999, 2, 3, 3)):
        images[at] += 1
        found.append(data.fingerprint(images, labels))
    labels[4999] += 1
    for pair in ((images, labels), (images.flip(0), labels.flip(0)), (images.view(5000, 3, 2, 8), labels)):
        found.append(data.fingerprint(*pair))
    assert len(set(found)) == 7 and data.fingerprint(images.clone(), labels.clone()) == found[4]


def test_links_in_circles_two_images_and_none_that_can_be_read(tmp_path):
    make_photos(tmp_path / "two", 2)
    (tmp_path / "two/again").symlink_to(tmp_path / "two", target_is_directory=True)
    for split in ("train", "val"):
        assert len(data.load("folder", split, tmp_path / "two")[0]) == 1
    (tmp_path / "broken").mkdir()
    for name in "abcdef":
        (tmp_path / f"broken/{name}.png").write_bytes(b"no image")
    refused(ValueError, "images are broken", "folder", "train", tmp_path / "broken", skip_broken=True)
