"""The data sets, read from small ones in the real formats on disk: `python -m pytest test_data.py`."""
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import time
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

WNIDS = ('n02', 'n01', 'n03')
RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError('no route to host')
    monkeypatch.setattr(urllib.request, 'urlopen', refuse)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))


def pattern(seed, size=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)).resize((size, size))


def make_tiny(folder, per_class=3, per_val=4):
    """An unpacked tiny-imagenet-200 in `folder`; returns {relative path: RGB array} as Pillow alone decodes it."""
    root, expected = folder / 'tiny-imagenet-200', {}
    names = [f'train/{w}/images/{w}_{i}.JPEG' for w in WNIDS for i in range(per_class)]
    names += [f'val/images/val_{i}.JPEG' for i in range(per_val)]
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (pattern(i).convert('L') if i == 1 else pattern(i)).save(root / name)
        expected[name] = np.asarray(Image.open(root / name).convert('RGB'))
    for w in WNIDS:
        (root / f'train/{w}/{w}_boxes.txt').write_text('')
    (root / 'wnids.txt').write_text('\n'.join(WNIDS))
    (root / 'val/val_annotations.txt').write_text(''.join(f'val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t9\t9\n' for i in range(per_val)))
    return expected


def zip_folder(folder, target, prefix='tiny-imagenet-200/', deflate=False):
    with zipfile.ZipFile(target, 'w', zipfile.ZIP_DEFLATED if deflate else zipfile.ZIP_STORED) as z:
        for file in sorted(folder.rglob('*'), reverse=True):  # not in the order of the names
            if file.is_file():
                z.write(file, prefix + str(file.relative_to(folder)))


def make_photos(folder, n=12):
    for i in range(n):
        (folder / f'c{i % 3}').mkdir(parents=True, exist_ok=True)
        pattern(i).save(folder / f'c{i % 3}/{i}.png')
    return folder


def caches(folder):
    return sorted(f for f in (folder / '.cache-minibatch').iterdir() if f.name.endswith('.cache'))


def no_decoding(monkeypatch):
    monkeypatch.setattr(data, 'decode', lambda *a: pytest.fail('decoded again'))


def count_decoding(monkeypatch):
    counted, decode = [], data.decode
    monkeypatch.setattr(data, 'decode', lambda *a: (counted.append(1), decode(*a))[1])
    return counted


# ---------------------------------------------------------------------------------------------------------------------
# Tiny ImageNet and CIFAR-100

def test_tiny_imagenet_zip_and_unpacked_are_the_same(tmp_path):
    expected = make_tiny(tmp_path / 'unpacked')
    root = tmp_path / 'unpacked/tiny-imagenet-200'
    for name, prefix, deflate in (('official/tiny-imagenet-200.zip', 'tiny-imagenet-200/', False),
                                  ('half/tiny-imagenet-200-half.zip', 'tiny-imagenet-200/', True), ('any/name.zip', '', False)):
        (tmp_path / name).parent.mkdir()
        zip_folder(root, tmp_path / name, prefix, deflate)
    given = [tmp_path / 'official', tmp_path / 'half', tmp_path / 'any/name.zip', tmp_path / 'unpacked', root]
    for split, labels in (('train', [0, 0, 0, 1, 1, 1, 2, 2, 2]), ('val', [1, 0, 2, 1])):
        names = [n for n in sorted(expected) if n.startswith(split)]
        for path in given:
            x, y = data.load('tinyimagenet', split, path)
            assert x.dtype == torch.uint8 and x.shape == (len(names), 3, 64, 64)
            assert y.dtype == torch.int64 and y.tolist() == labels
            assert np.array_equal(x.permute(0, 2, 3, 1), np.stack([expected[n] for n in names])), path
    assert len(caches(tmp_path / 'any')) == 2 and len(caches(tmp_path / 'official')) == 2
    assert data.load('tinyimagenet', 'val', root, source_size=32)[0].shape == (4, 3, 32, 32)


def test_tiny_imagenet_bad_archives(tmp_path):
    make_tiny(tmp_path)
    root, good = tmp_path / 'tiny-imagenet-200', tmp_path / 'good.zip'
    zip_folder(root, good)
    (tmp_path / 'cut.zip').write_bytes(good.read_bytes()[:-300])
    with zipfile.ZipFile(tmp_path / 'other.zip', 'w') as z:
        z.writestr('hello.txt', 'hello')
    shutil.copytree(root, tmp_path / 'noval')
    (tmp_path / 'noval/val/val_annotations.txt').unlink()
    shutil.copytree(root, tmp_path / 'unlisted')
    (tmp_path / 'unlisted/val/val_annotations.txt').write_text('val_0.JPEG\tn01\t0\n')
    for name, words in (('cut.zip', 'not a complete zip'), ('other.zip', 'not laid out as'), ('noval', 'not laid out as'),
                        ('unlisted', 'not laid out as')):
        with pytest.raises(ValueError, match=words) as e:
            data.load('tinyimagenet', 'train', tmp_path / name)
        assert name in str(e.value) and '\n' not in str(e.value)
    for n in 'ab':
        (tmp_path / 'two').mkdir(exist_ok=True)
        shutil.copy(good, tmp_path / f'two/tiny-imagenet-200-{n}.zip')
    with pytest.raises(ValueError, match='tiny-imagenet-200-a.zip and tiny-imagenet-200-b.zip'):
        data.load('tinyimagenet', 'train', tmp_path / 'two')
    with pytest.raises(FileNotFoundError, match='there is no .*nothing.zip'):
        data.load('tinyimagenet', 'train', tmp_path / 'nothing.zip')
    with zipfile.ZipFile(good) as z:  # one byte in the middle of an image: a JPEG that still decodes
        at = z.getinfo('tiny-imagenet-200/train/n01/images/n01_2.JPEG').header_offset + 700
    garbled = bytearray(good.read_bytes())
    garbled[at] ^= 0xff
    (tmp_path / 'garbled.zip').write_bytes(garbled)
    with pytest.raises(ValueError, match='n01_2.JPEG.*checksum.*--skip-broken'):
        data.load('tinyimagenet', 'train', tmp_path / 'garbled.zip')
    assert len(data.load('tinyimagenet', 'train', tmp_path / 'garbled.zip', skip_broken=True)[0]) == 8


def test_tiny_imagenet_download(tmp_path, monkeypatch, capsys):
    with pytest.raises(OSError, match='no route to host.*cs231n.*put it there as .*tiny-imagenet-200.zip') as e:
        data.load('tinyimagenet', 'train', tmp_path / 'new')
    assert '\n' not in str(e.value)
    make_tiny(tmp_path)
    zip_folder(tmp_path / 'tiny-imagenet-200', tmp_path / 'served.zip')
    asked = []
    monkeypatch.setattr(urllib.request, 'urlopen', lambda url, timeout: (asked.append(url), open(tmp_path / 'served.zip', 'rb'))[1])
    with pytest.raises(OSError, match='bytes came instead of 248,100,043'):
        data.load('tinyimagenet', 'train', tmp_path / 'new')
    assert [f.name for f in (tmp_path / 'new').rglob('*')] == ['.cache-minibatch']  # nothing half-fetched stays
    monkeypatch.setattr(data, 'TINY_BYTES', (tmp_path / 'served.zip').stat().st_size)
    assert len(data.load('tinyimagenet', 'train', tmp_path / 'new')[0]) == 9
    assert (tmp_path / 'new/tiny-imagenet-200.zip').exists() and 'MB/s' in capsys.readouterr().err
    assert len(data.load('tinyimagenet', 'val', tmp_path / 'new')[0]) == 4 and asked == [data.TINY_URL] * 2


def test_cifar100(tmp_path, monkeypatch):
    with pytest.raises(OSError, match='no CIFAR-100 in .*put it there as .*cifar-100-python.tar.gz') as e:
        data.load('cifar100', 'train', tmp_path)
    assert '\n' not in str(e.value)
    folder, pixels, sums = tmp_path / 'cifar-100-python', {}, {}
    folder.mkdir()
    for name, n in (('train', 20), ('test', 10), ('meta', 0)):
        pixels[name] = np.random.default_rng(n).integers(0, 256, (n, 3072), np.uint8)
        content = {'data': pixels[name], 'fine_labels': [i % 7 for i in range(n)], 'fine_label_names': ['x'] * 7}
        (folder / name).write_bytes(pickle.dumps(content, 2))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    with pytest.raises(ValueError, match='damaged'):  # not the official checksums
        data.load('cifar100', 'train', tmp_path)
    monkeypatch.setattr(data.CIFAR100, 'train_list', [['train', sums['train']]])
    monkeypatch.setattr(data.CIFAR100, 'test_list', [['test', sums['test']]])
    monkeypatch.setattr(data.CIFAR100, 'meta', dict(data.CIFAR100.meta, md5=sums['meta']))
    shutil.copytree(folder, tmp_path / 'other/renamed')
    for split, name in (('train', 'train'), ('val', 'test')):
        for path in (tmp_path, folder, tmp_path / 'other/renamed'):
            x, y = data.load('cifar100', split, path)
            assert np.array_equal(x, pixels[name].reshape(-1, 3, 32, 32)) and y.tolist() == [i % 7 for i in range(len(x))]


# ---------------------------------------------------------------------------------------------------------------------
# Folders of images

def halves(mode='RGB', left=RED, right=BLUE, size=(64, 64)):
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def test_odd_images(tmp_path):
    """Each file's colours in its left and right half after reading, within what its compression loses."""
    grey16 = np.full((64, 64), 60 * 257, np.uint16)
    grey16[:, 32:] = 180 * 257
    rgba = halves('RGBA', (*RED, 255), (*RED, 0))
    palette = halves().quantize(4)
    with_hole = palette.copy()
    with_hole.info['transparency'] = palette.getpixel((0, 0))
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    quarter = Image.Exif()
    quarter[0x0112] = 6
    tall = Image.new('RGB', (64, 64), RED)
    tall.paste(BLUE, (0, 0, 64, 32))  # blue above red; turned by 90 degrees clockwise: red left, blue right
    wide = Image.new('RGB', (200, 50), GREEN)
    wide.paste(halves(size=(50, 50)), (75, 0))
    second = Image.new('P', (64, 64))
    white = (255, 255, 255)
    cases = [  # name, image, options, left, right
        ('a.jpg', halves(), dict(quality=95, subsampling=0), RED, BLUE), ('b.PNG', halves(), {}, RED, BLUE),
        ('c.webp', halves(), dict(lossless=True), RED, BLUE), ('d.bmp', halves(), {}, RED, BLUE),
        ('e.gif', palette, dict(save_all=True, append_images=[second]), RED, BLUE), ('f.tiff', halves(), {}, RED, BLUE),
        ('g.png', halves('L', 60, 180), {}, (60,) * 3, (180,) * 3), ('h.JPEG', halves('L', 60, 180), {}, (60,) * 3, (180,) * 3),
        ('i.png', rgba, {}, RED, white), ('j.webp', rgba, dict(lossless=True), RED, white),
        ('k.png', palette, {}, RED, BLUE), ('l.png', with_hole, {}, white, BLUE),
        ('m.png', halves('LA', (60, 255), (60, 0)), {}, (60,) * 3, white), ('n.png', halves('1', 0, 1), {}, (0,) * 3, white),
        ('o.png', Image.fromarray(grey16), {}, (60,) * 3, (180,) * 3), ('p.tif', Image.fromarray(grey16), {}, (60,) * 3, (180,) * 3),
        ('q.jpg', halves('CMYK', (0, 255, 255, 0), (255, 255, 0, 0)), dict(quality=95), (255, 0, 0), (0, 0, 255)),
        ('r.jpg', halves(), dict(exif=turned, quality=95, subsampling=0), BLUE, RED),
        ('s.jpg', tall, dict(exif=quarter, quality=95, subsampling=0), RED, BLUE),
        ('t.png', halves(), dict(exif=turned), BLUE, RED), ('t.webp', halves(), dict(exif=turned, lossless=True), BLUE, RED),
        ('t.tif', halves(), dict(exif=turned), BLUE, RED), ('u.png', wide, {}, RED, BLUE), ('ü b.png', halves(), {}, RED, BLUE),
        ('v.jpg', halves(size=(1000, 900)), dict(quality=95), RED, BLUE), ('w.png', halves(size=(32, 24)), {}, RED, BLUE),
        ('wrong-name.jpg', halves(), dict(format='PNG'), RED, BLUE)]
    for name, image, options, _, _ in cases:
        image.save(tmp_path / name, **options)
    x, y = data.load('folder', 'train', tmp_path, source_size=48)
    z, _ = data.load('folder', 'val', tmp_path, source_size=48)
    assert x.shape[1:] == (3, 48, 48) and len(x) + len(z) == len(cases) and len(z) >= 1 and set(y.tolist()) == {0}
    every = data.walk(tmp_path)
    assert [e[0] for e in every] == sorted(c[0] for c in cases)
    in_order = {}
    for split, images in (('train', x), ('val', z)):
        names = data.folder_source(tmp_path, split)[2]()[0]
        in_order.update(zip(names, images))
    for name, _, _, left, right in cases:
        image = in_order[name].float()
        for half, colour in ((image[:, 4:-4, 4:18], left), (image[:, 4:-4, -18:-4], right)):
            worst = (half - torch.tensor(colour).float()[:, None, None]).abs().max().item()
            assert worst <= (6 if name.lower().endswith(('jpg', 'jpeg')) else 1), (name, worst, half.mean((1, 2)), colour)


def test_size_and_crop(tmp_path):
    """An image of the wanted height is cut and not resampled; shrinking averages, and leaves no stripes."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 45, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / '12.png')
    Image.fromarray(np.tile(np.array([0, 255], np.uint8)[None, :, None], (256, 128, 3))).save(tmp_path / '38.png')
    cut, shrunk = (data.load('folder', s, tmp_path, source_size=32)[0][0] for s in ('val', 'train'))
    assert np.array_equal(cut.permute(1, 2, 0), noise[:, 6:38])
    assert (shrunk[:, :, 2:-2].float() - 127.5).abs().max() < 4


def test_folder_layouts(tmp_path):
    photos = make_photos(tmp_path / 'photos', 60)
    for junk in ('notes.txt', '.hidden.png', '.git/x.png', 'c0/._1.png'):
        (photos / junk).parent.mkdir(exist_ok=True)
        (photos / junk).write_bytes(b'junk')
    os.symlink('..', photos / 'c1/loop')
    os.symlink('gone', photos / 'dangling.png')
    os.symlink('self.png', photos / 'self.png')
    train, val = (data.folder_source(photos, s)[2]() for s in ('train', 'val'))
    assert sorted(train[0] + val[0]) == sorted(f'c{i % 3}/{i}.png' for i in range(60))
    assert val[0] == ['c0/27.png', 'c1/13.png', 'c1/52.png', 'c2/2.png', 'c2/59.png']  # on every machine
    assert all(label == int(name[1]) for names, labels, _ in (train, val) for name, label in zip(names, labels))
    pattern(99).save(photos / 'c0/extra.png')  # a new file moves none between the splits
    assert set(data.folder_source(photos, 'val')[2]()[0]) - {'c0/extra.png'} == set(val[0])

    nested = tmp_path / 'nested/deep'
    shutil.copytree(photos, nested, symlinks=True)
    for split in ('train', 'val'):
        names, labels, _ = data.folder_source(tmp_path / 'nested', split)[2]()
        assert labels == [int(name[len('deep/c')]) for name in names] and len(names)

    for name, classes in (('train', 'ab'), ('validation', 'b')):  # class ids are of both splits
        for c in classes:
            (tmp_path / f'split/{name}/{c}').mkdir(parents=True)
            pattern(1).save(tmp_path / f'split/{name}/{c}/1.png')
    assert data.load('folder', 'train', tmp_path / 'split')[1].tolist() == [0, 1]
    assert data.load('folder', 'val', tmp_path / 'split')[1].tolist() == [1]
    (tmp_path / 'pair').mkdir()
    for i in (12, 38):  # both of which the hash gives to validation
        pattern(i).save(tmp_path / f'pair/{i}.png')
    assert [len(data.load('folder', s, tmp_path / 'pair')[0]) for s in ('train', 'val')] == [1, 1]


def test_broken_images(tmp_path, capsys):
    photos = make_photos(tmp_path / 'p')
    (photos / 'c1/cut.png').write_bytes((photos / 'c1/1.png').read_bytes()[:-40])
    (photos / 'c1/cut.jpg').write_bytes(b'\xff\xd8\xff\xe0 no picture')
    (photos / 'c1/empty.png').write_bytes(b'')
    os.rename(photos, photos.parent / 'train')
    make_photos(tmp_path / 'val', 3)
    with pytest.raises(ValueError, match=r'c1/cut.jpg. \(.*--skip-broken') as e:
        data.load('folder', 'train', tmp_path)
    assert '\n' not in str(e.value) and not list((tmp_path / '.cache-minibatch').iterdir())
    for _ in range(2):  # decoded and from the cache
        x, y = data.load('folder', 'train', tmp_path, skip_broken=True)
        assert len(x) == 12 and y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert '3 broken images left out: train/c1/cut.jpg' in capsys.readouterr().err
    assert np.array_equal(x[4].permute(1, 2, 0), pattern(1))
    with pytest.raises(ValueError, match='cut.jpg'):  # what others skipped is not skipped for all
        data.load('folder', 'train', tmp_path)
    for f in (tmp_path / 'val').rglob('*.png'):
        f.write_bytes(b'')
    with pytest.raises(ValueError, match='all 3 images are broken'):
        data.load('folder', 'val', tmp_path, skip_broken=True)


# ---------------------------------------------------------------------------------------------------------------------
# The cache

def test_second_load_decodes_nothing(tmp_path, monkeypatch):
    photos = make_photos(tmp_path / 'p')
    first = data.load('folder', 'train', photos)
    no_decoding(monkeypatch)
    second = data.load('folder', 'train', str(photos))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    os.rename(photos, tmp_path / 'moved')  # a folder can be moved with its cache
    assert torch.equal(data.load('folder', 'train', tmp_path / 'moved')[0], first[0])


def test_deadleaves_is_cached_by_its_parameters(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(data, 'deadleaves', lambda split, n, seed, size: (asked.append((split, n, seed, size)), (
        torch.full((n, 3, size, size), 10 * seed + n, dtype=torch.uint8), torch.arange(n) % 3))[1])
    for _ in range(2):
        for split, n, seed in (('train', 7, 0), ('val', 5, 0), ('train', 7, 1)):
            x, y = data.load('deadleaves', split, tmp_path / 'new', num_images=n, seed=seed)
            assert x.shape == (n, 3, 32, 32) and (x == 10 * seed + n).all() and y.tolist() == [i % 3 for i in range(n)]
    assert asked == [('train', 7, 0, 32), ('val', 5, 0, 32), ('train', 7, 1, 32)]


def test_damaged_and_stale_caches_are_rebuilt(tmp_path, monkeypatch):
    photos = make_photos(tmp_path / 'p')
    good, _ = data.load('folder', 'train', photos)
    good, n = good.clone(), len(good)
    file, = caches(photos)
    content = file.read_bytes()
    counted = count_decoding(monkeypatch)

    def rebuilt():
        counted.clear()
        x, y = data.load('folder', 'train', photos)
        assert len(counted) == len(x) == len(y) and len(caches(photos)) == 1
        return x
    damaged = [b'', b'x' * 9, content[:-1], content[:len(content) // 2], content[:1000] + content[1001:], content + b'\0']
    for at in (5, n * 3 * 64 * 64 + 3, -300, -14, -6, -1):  # image, label, record, its length, its CRC, the magic
        damaged.append(bytearray(content))
        damaged[-1][at] ^= 1
    for bad in damaged:
        file.unlink()  # not in place: the tensors of before are still mapped
        file.write_bytes(bad)
        assert torch.equal(rebuilt(), good)
    pattern(50).save(photos / 'c0/0.png')  # another picture under the same name
    os.utime(photos / 'c0/0.png', ns=(1, 1))
    assert not torch.equal(rebuilt(), good)
    for i in range(60, 70):
        pattern(i).save(photos / f'c0/{i}.png')
    assert len(rebuilt()) > n
    os.rename(photos / 'c2/2.png', photos / 'c2/2a.png')  # the same place in the order, but not the same split
    rebuilt()
    os.utime(photos / 'c2/2a.png', ns=(2, 2))
    rebuilt()
    monkeypatch.setattr(data, 'CACHE_VERSION', 999)
    rebuilt()
    counted.clear()
    data.load('folder', 'train', photos)
    assert not counted


def test_a_changed_zip_is_read_again(tmp_path):
    make_tiny(tmp_path)
    root, archive, labels = tmp_path / 'tiny-imagenet-200', tmp_path / 'a.zip', []
    text = (root / 'val/val_annotations.txt').read_text()
    for words in (text, text.replace('n01', 'n03')):  # of the same size and, below, of the same time
        (root / 'val/val_annotations.txt').write_text(words)
        zip_folder(root, archive)
        os.utime(archive, ns=(1, 1))
        labels.append(data.load('tinyimagenet', 'val', archive)[1].tolist())
    assert labels == [[1, 0, 2, 1], [1, 2, 2, 1]]


SLOW = '''
import sys, time; import data
decode = data.decode
data.decode = lambda *a: (time.sleep({nap}), decode(*a))[1]
x, y = data.load('folder', 'train', {folder!r}, source_size=16)
print(len(x), int(x.long().sum()), int(y.sum()))
'''


def start(folder, nap):
    return subprocess.Popen([sys.executable, '-c', SLOW.format(folder=str(folder), nap=nap)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, cwd=Path(data.__file__).parent)


def test_killed_and_concurrent_processes(tmp_path):
    photos = make_photos(tmp_path / 'p', 40)
    killed, cache = start(photos, 1), photos / '.cache-minibatch'
    deadline = time.time() + 200
    while not (cache.is_dir() and list(cache.glob('*.tmp'))) and killed.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    assert [f.suffix for f in cache.iterdir()] == ['.tmp']
    both = [start(photos, 0.1) for _ in range(2)]
    outputs = [p.communicate() for p in both]
    x, y = data.load('folder', 'train', photos, source_size=16)
    assert [out for out, _ in outputs] == [f'{len(x)} {int(x.long().sum())} {int(y.sum())}\n'] * 2, outputs
    assert sum('decoded' in err for _, err in outputs) == 1  # the other one waited
    assert [f.suffix for f in cache.iterdir()] == ['.cache']


def test_without_locks_each_process_writes_its_own_file(tmp_path, monkeypatch):
    photos, foreign = make_photos(tmp_path / 'p'), tmp_path / 'p/.cache-minibatch/other.1.tmp'

    def unsupported(*args):
        raise OSError('no locks here')
    monkeypatch.setattr(data.fcntl, 'flock', unsupported)
    foreign.parent.mkdir()
    foreign.write_text('of a living process')
    data.load('folder', 'train', photos)
    assert foreign.exists() and len(caches(photos)) == 1


def test_unwritable_data_folder(tmp_path, monkeypatch):
    photos = make_photos(tmp_path / 'p')
    (photos / '.cache-minibatch').write_text('in the way')
    x, _ = data.load('folder', 'train', photos)
    assert len(list((tmp_path / 'xdg/minibatch-contrastive').iterdir())) == 1
    no_decoding(monkeypatch)
    assert torch.equal(data.load('folder', 'train', photos)[0], x)
    monkeypatch.setenv('XDG_CACHE_HOME', str(photos / '.cache-minibatch'))
    with pytest.raises(OSError, match='can be written: set XDG_CACHE_HOME'):
        data.load('folder', 'train', photos)


def test_full_disk(tmp_path, monkeypatch):
    photos = make_photos(tmp_path / 'p')
    with monkeypatch.context() as m:
        m.setattr(shutil, 'disk_usage', lambda path: SimpleNamespace(free=70 << 20))
        with pytest.raises(OSError, match='needs 0.34 GB of free disk and has 0.07 GB.*--data-dir'):
            data.load('folder', 'train', photos, source_size=2900)
        with pytest.raises(OSError, match='needs 0.32 GB of free disk'):
            data.load('tinyimagenet', 'train', tmp_path / 'new')

    def full(*args):
        raise OSError(data.errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='the disk of .* is full'):
        data.load('folder', 'train', photos)
    assert not list((photos / '.cache-minibatch').iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Bad input, and the choice of a subset

@pytest.mark.parametrize('dataset, split, folder, words', [
    ('cifar10', 'train', '.', "unknown data set 'cifar10': give cifar100"), ('xyz', 'train', '.', 'give deadleaves or cifar100'),
    ('folder', 'validation', '.', "unknown split 'validation': give val"), ('folder', 'train', 'gone', 'there is no folder .*gone'),
    ('folder', 'train', 'empty', 'empty is empty'), ('folder', 'train', 'texts', 'holds no images .*png'),
    ('folder', 'train', 'one', 'no image for the train split'),
    ('cifar100', 'train', 'texts/a.txt', 'is a file: give a folder'), ('tinyimagenet', 'val', 'texts/a.txt', 'not a complete zip')])
def test_bad_input(tmp_path, dataset, split, folder, words):
    for name in ('empty', 'texts', 'one'):
        (tmp_path / name).mkdir()
    (tmp_path / 'texts/a.txt').write_text('hello')
    pattern(0).save(tmp_path / 'one/a.png')
    with pytest.raises((ValueError, OSError), match=words) as e:
        data.load(dataset, split, tmp_path / folder)
    assert '\n' not in str(e.value) and not e.value.__cause__
    with pytest.raises(ValueError, match='source size 0'):
        data.load('deadleaves', 'train', tmp_path, source_size=0)


def test_limit_indices():
    labels = torch.tensor([2, 2, 2, 2, 0, 0, 1, 1, 1])
    assert data.limit_indices(labels, 3).tolist() == [0, 4, 6]
    assert data.limit_indices(labels, 6).tolist() == [0, 1, 4, 5, 6, 7]
    assert data.limit_indices(labels, 8).tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert data.limit_indices(labels, 99).tolist() == list(range(9))
    many = torch.randint(5, (1000,), generator=torch.Generator().manual_seed(0))
    assert many[data.limit_indices(many, 100)].bincount().tolist() == [20] * 5
    assert data.limit_indices(torch.zeros(9, dtype=torch.int64), 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match='limit 0'):
        data.limit_indices(labels, 0)
