"""What things cost and what samplers are worth. Each prints a small table of medians, in under a minute.

    python bench.py samplers [--embeddings FILE.npz]     all samplers and rivals: hardness, time, memory; growth with n
    python bench.py augment                              against torchvision's transforms, image by image
    python bench.py step                                 a training step against bare forward + backward
    python bench.py data                                 decoding JPEGs into the cache, and the second start

FILE.npz holds pairs of arrays [n, d] named NAME_u and NAME_v, or u and v. Times of one table are measured in turns in
one run, so their ratios hold on a busy machine.
"""
import argparse
import contextlib
import ctypes
import gc
import io
import json
import math
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import data
import rivals
import train
from augment import MEAN, STD, augment
from cli import Stop
from deadleaves import deadleaves
from model import ContrastiveModel, nt_xent
from samplers import batch_losses, osgd_batches, random_batches, spectral_batches


def seconds(*functions: Callable[[], object], rounds: int = 5) -> list[float]:
    """Median seconds of each function; they take turns, so that a busy machine slows all of them alike."""
    times = []
    for _ in range(rounds + 1):  # the first round warms up
        times.append([])
        for function in functions:
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[-1].append(time.perf_counter() - start)
    return [statistics.median(column) for column in zip(*times[1:])]


def clustered(n: int, d: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand-in for a trained network's embeddings: n pairs around n/16 centres, partners close to each other."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(n // 16, d, generator=g).repeat_interleave(16, 0)[torch.randperm(n // 16 * 16, generator=g)]
    sample = centres + torch.randn(centres.shape, generator=g)
    return tuple(sample + 0.5 * torch.randn(sample.shape, generator=g) for _ in range(2))


def peak(function: Callable[[], object]) -> tuple[object, float]:
    """What the function returns, and the MB by which memory in use grew at most while it ran (Linux; else NaN)."""
    def status(key: str) -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what earlier methods freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = status("VmRSS")
        result = function()
        return result, max(0, status("VmHWM") - before) / 1024
    except (OSError, AttributeError):
        return function(), math.nan


def bench_samplers(file: str | None, pairs: list[int], batch_size: int = 32, k: int = 40, temperature: float = 0.1) -> None:
    """Batches from windows of k*B pairs: mean loss, excess over random relative to the released method's, time, memory."""
    if file:
        arrays = {name: torch.from_numpy(x).float() for name, x in np.load(file).items()}
        sets = {name[:-1].rstrip("_") or "embeddings": (x, arrays[name[:-1] + "v"])
                for name, x in arrays.items() if name.endswith("u")}
    else:
        sets = {"clustered": clustered(2 * k * batch_size)}
    size = k * batch_size
    methods = {
        "random": lambda u, v, g: torch.cat([random_batches(len(u), batch_size, g) for _ in range(20)]),
        "osgd, q = k/10": lambda u, v, g: osgd_batches(u, v, batch_size, k, k // 10, temperature),
        "BatchSampler": lambda u, v, g: rivals.batch_sampler(u, v, batch_size, generator=g),
        "GCBS": lambda u, v, g: rivals.gcbs(u, v, batch_size),
        "released spectral": lambda u, v, g: rivals.released_spectral(u, v, batch_size, k, temperature, g),
        "B3": lambda u, v, g: rivals.b3(u, v, batch_size, generator=g),
        "B3, no rank skipped": lambda u, v, g: rivals.b3(u, v, batch_size, ranks=(0, 100), generator=g),
        "k-means, then fill": lambda u, v, g: rivals.greedy_groups(u, v, batch_size, g),
        "spectral": lambda u, v, g: spectral_batches(u, v, batch_size, k, temperature, g),
        "refined": lambda u, v, g: spectral_batches(u, v, batch_size, k, temperature, g, refine=True),
    }
    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix += matrix.T.clone()
    print(f"windows of k={k} batches of B={batch_size}, median of 3 seeds; excess: mean loss over that of random batches, and\n"
          f"relative to the released method's; eigh: one float64 torch.linalg.eigh of {size} x {size}")
    print(f"{'embeddings':<11}{'sampler':<20}{'mean loss':>10}{'excess':>8}{'relative':>9}{'ms':>9}{'of eigh':>8}{'MB':>7}")
    for name, (u, v) in sets.items():
        windows = [(u[i:i + size], v[i:i + size]) for i in range(0, len(u) - size + 1, size)]
        if not windows:
            raise Stop(f"{name} has {len(u)} pairs, a window takes {size}")
        g = torch.Generator()
        losses = {method: statistics.median(statistics.mean(
            batch_losses(*w, choose(*w, g.manual_seed(seed)), temperature).mean().item() for w in windows) for seed in range(3))
            for method, choose in methods.items()}
        (eigh,) = seconds(lambda: torch.linalg.eigh(matrix), rounds=3)
        base = losses["random"]
        for method, choose in methods.items():
            (took,) = seconds(lambda: choose(*windows[0], g.manual_seed(0)), rounds=3)
            memory = peak(lambda: choose(*windows[0], g.manual_seed(0)))[1]
            excess = losses[method] - base
            print(f"{name:<11}{method:<20}{losses[method]:>10.3f}{excess:>8.3f}{excess / (losses['released spectral'] - base):>9.2f}"
                  f"{1000 * took:>9.1f}{took / eigh:>8.2f}{memory:>7.0f}", flush=True)
    print("\nall pairs as one window, refined, in parts (made-up embeddings of 128 dimensions)")
    print(f"{'pairs':>10}{'random':>9}{'windows of k':>14}{'all':>8}{'seconds':>10}{'us a pair':>11}{'MB':>7}")
    for n in pairs:
        u, v = clustered(n)
        start = time.perf_counter()
        batches, memory = peak(lambda: spectral_batches(u, v, batch_size, n // batch_size, temperature,
                                                        torch.Generator().manual_seed(0), refine=True))
        took = time.perf_counter() - start
        few = slice(0, min(n, 8 * size))
        windows = spectral_batches(u[few], v[few], batch_size, k, temperature, torch.Generator().manual_seed(0), refine=True)
        loss = [batch_losses(u, v, x, temperature).mean().item() for x in (torch.arange(n // batch_size * batch_size).view(-1, batch_size),
                                                                         windows, batches)]
        print(f"{n:>10,}{loss[0]:>9.3f}{loss[1]:>14.3f}{loss[2]:>8.3f}{took:>10.1f}{1e6 * took / n:>11.0f}{memory:>7.0f}", flush=True)


def bench_augment() -> None:
    """Images/s of both and their ratio, for one step's batch (2 views of 32) and for a large one."""
    from torchvision.transforms import v2
    print(f"{'pixels':>8} {'batch':>6} {'torchvision images/s':>21} {'augment images/s':>17} {'ratio':>6}")
    for size, batch_size, rounds in (32, 64, 15), (32, 2048, 5), (64, 64, 11), (64, 2048, 5):
        images = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8)
        few = images[:64]  # torchvision's time per image does not depend on how many there are
        pipeline = v2.Compose([
            v2.RandomResizedCrop(size, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.GaussianBlur(max(3, size // 10 | 1), (0.1 * size / 224, 2 * size / 224)),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ])
        generator = torch.Generator().manual_seed(0)
        slow, fast = seconds(lambda: torch.stack([pipeline(image) for image in few]),
                             lambda: augment(images, size, generator), rounds=rounds)
        slow, fast = len(few) / slow, batch_size / fast
        print(f"{size:>3} → {size:<3}{batch_size:>6} {slow:>21,.0f} {fast:>17,.0f} {fast / slow:>6.1f}")


def bench_step(steps: int = 40) -> None:
    """Seconds of a step of train.py against forward and backward of the same network on a fixed batch, and the rest."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ContrastiveModel().to(device, memory_format=torch.channels_last)
    images = torch.randn(64, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)

    def bare() -> None:
        for _ in range(steps):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                z1, z2 = model(images).chunk(2)
            nt_xent(z1, z2).backward()
            model.zero_grad(set_to_none=True)

    whole = []
    with tempfile.TemporaryDirectory() as folder:
        def training() -> None:
            out = f"{folder}/{len(whole)}"
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                code = train.main(["--data-dir", folder, "--out-dir", out, "--sampler", "random", "--device", device.type,
                                   "--max-steps", str(steps), "--log-every", str(steps)])
            if code:
                raise Stop("train.py failed; run it by itself to see why")
            whole.append(json.loads(Path(out, "log.jsonl").read_text())["seconds_training"] / steps)
        forward_backward, _ = seconds(bare, training, rounds=3)
    forward_backward, step = forward_backward / steps, statistics.median(whole[1:])
    print(f"ResNet-18 at 32 px, 2 x 32 views, {device}")
    print(f"{'forward + backward':<20}{1000 * forward_backward:>8.1f} ms")
    print(f"{'step of train.py':<20}{1000 * step:>8.1f} ms   ratio {step / forward_backward:.2f}")


def bench_data(count: int = 20_000) -> None:
    """Images/s from a zip of 64 px JPEGs in Tiny ImageNet's layout into the cache, and seconds of the next start."""
    from PIL import Image
    images, _ = deadleaves("train", 512, 0, size=64)
    jpegs = []
    for image in images:
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream := io.BytesIO(), "JPEG", quality=90)
        jpegs.append(stream.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(Path(folder, "tiny-imagenet-200.zip"), "w") as archive:
            for i in range(count):
                archive.writestr(f"tiny-imagenet-200/train/n{i % 200:08}/images/n{i % 200:08}_{i}.JPEG", jpegs[i % 512])
            archive.writestr("tiny-imagenet-200/val/images/val_0.JPEG", jpegs[0])
            archive.writestr("tiny-imagenet-200/val/val_annotations.txt", "val_0.JPEG\tn00000000\t0\t0\t1\t1\n")

        def decode() -> None:
            for cache in Path(folder).glob(".cache*/*"):
                cache.unlink()
            with contextlib.redirect_stderr(io.StringIO()):
                data.load("tinyimagenet", "train", folder)

        def one_by_one() -> None:
            for i in range(count):
                np.asarray(Image.open(io.BytesIO(jpegs[i % 512])).convert("RGB"))
        alone, first, again = seconds(one_by_one, decode, lambda: data.load("tinyimagenet", "train", folder), rounds=3)
    print(f"{count:,} JPEGs of 64 px")
    print(f"{'Pillow, one thread, no cache':<30}{count / alone:>9,.0f} images/s")
    print(f"{'first start, into the cache':<30}{count / first:>9,.0f} images/s   ratio {alone / first:.2f}")
    print(f"{'second start':<30}{again:>9.3f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("samplers", "augment", "step", "data"))
    parser.add_argument("--embeddings", metavar="FILE.npz", help="samplers: real embeddings (default: made up)")
    parser.add_argument("--pairs", metavar="N", type=int, nargs="+", default=[10_000, 40_000],
                        help="samplers: sizes at which growth is measured (default: 10000 40000; 1000000 takes minutes)")
    words = parser.parse_args()
    try:
        bench_samplers(words.embeddings, words.pairs) if words.what == "samplers" else globals()[f"bench_{words.what}"]()
    except (Stop, OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
