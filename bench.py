"""What things cost and what samplers are worth. Each prints a small table of medians, in about a minute.

    python bench.py samplers [--run FOLDER | --embeddings FILE.npz]   all samplers and rivals: hardness, time, memory; growth
    python bench.py losses                               scores of batches against a bare matrix product
    python bench.py augment                              against torchvision's transforms, image by image
    python bench.py step [--image-size 224]              a training step against bare forward + backward
    python bench.py synthetic                            runs of theory.py at once, against a loop with autograd
    python bench.py data                                 decoding JPEGs into the cache, and the second start
    python bench.py retrieval                            metrics against sorting each row and searching it; their memory

The samplers work on embeddings of training images of a finished run (FOLDER), of a short one that is made for it, or of
FILE.npz: arrays [n, d] named NAME_u and NAME_v, or u and v, and class ids [n], NAME_labels, if there are. Times of one
table are measured in turns in one run, so their ratios hold on a busy machine.
"""
import argparse
import contextlib
import ctypes
import gc
import io
import json
import math
import signal
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import compare
import data
import retrieval
import rivals
import theory
import train
from augment import MEAN, STD, augment
from cli import Stop, provenance, write_atomically
from deadleaves import deadleaves
from model import ContrastiveModel, embed, infonce, nt_xent
from samplers import all_batches, batch_losses, osgd_batches, random_batches, spectral_batches


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


def read_pairs(file: str) -> dict[str, tuple]:
    """u, v [n, d] float32 and class ids [n], or None, of each pair of arrays in a .npz, by name. Raises Stop with one line."""
    give = "give a .npz with arrays NAME_u and NAME_v [n, d], and NAME_labels [n] if there are"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            arrays = {name: torch.from_numpy(x) for name, x in arrays.items()}
    except FileNotFoundError:
        raise Stop(f"--embeddings {file}: not there; {give}") from None
    except Exception as error:  # np.load fails in many ways on what is not its own
        raise Stop(f"--embeddings {file}: cannot be read ({type(error).__name__}); {give}") from None
    sets = {}
    for name in (name[:-1] for name in arrays if name == "u" or name.endswith("_u")):
        if name + "v" not in arrays:
            raise Stop(f"--embeddings {file}: {name}u is without {name}v; {give}")
        u, v, labels = (arrays.get(name + x) for x in ("u", "v", "labels"))
        if u.ndim != 2 or u.shape != v.shape or labels is not None and labels.shape != u.shape[:1]:
            raise Stop(f"--embeddings {file}: {name}u is {tuple(u.shape)}, {name}v {tuple(v.shape)}"
                       + (f", {name}labels {tuple(labels.shape)}" if labels is not None else "") + f"; {give}")
        sets[name.rstrip("_") or "embeddings"] = u.float(), v.float(), labels
    if not sets:
        raise Stop(f"--embeddings {file}: no pairs among its arrays ({', '.join(arrays) or 'it has none'}); {give}")
    return sets


def embed_run(folder: str, data_dir: str | None, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """u, v [n, d] of two views of n training images of a finished run's data set, in a random order, and class ids [n]."""
    (run,) = compare.read_runs([folder])
    model = retrieval.load_checkpoint(run.folder / "checkpoint.pt", run.knobs)
    images, labels, rows = retrieval.load(run, "train", retrieval.data_folder(run, {"data_dir": data_dir}), n)
    g = torch.Generator().manual_seed(0)
    views = retrieval.augmented(images, g, *(run.knobs[x] for x in ("image_size", "crop_scale", "jitter")), torch.device("cpu"))
    rows = rows[torch.randperm(len(rows), generator=g)]
    return *embed(model, views, rows), labels[rows]


def embed_short_run(n: int, steps: int = 128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """embed_run of a run of so many steps on n images of the embedded data."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = train.main(["--data-dir", folder, "--out-dir", f"{folder}/run", "--sampler", "random", "--limit", str(n),
                               "--max-steps", str(steps)])
        if code:
            raise Stop("train.py failed; run it by itself to see why")
        return embed_run(f"{folder}/run", None, n)


def same_class(labels: torch.Tensor) -> float:
    """Share of the pairs inside a batch that are of one class, mean over batches; labels [m, B]."""
    B = labels.shape[1]
    return ((labels[:, :, None] == labels[:, None]).sum((1, 2)) - B).float().mean().item() / (B * (B - 1))


def bench_samplers(source: str, sets: dict[str, tuple], pairs: list[int], out: str | None = None, batch_size: int = 32,
                   k: int = 40, temperature: float = 0.1, file_order: bool = False, rounds: int = 3) -> None:
    """Batches from windows of k*B pairs: mean loss, its excess, time, memory; then growth with the number of pairs.

    sets: u, v [n, d] and class ids [n], or None, by name. file_order: their order means something, so it is a baseline
    as well. All of it also as JSON in `out`.
    """
    size, g = k * batch_size, torch.Generator()
    record = {"experiment": "samplers", "embeddings": source, "batch_size": batch_size, "k": k, "temperature": temperature,
              **provenance(torch.device("cpu")), "samplers": [], "growth": []}

    def refined(u, v, y, g, **options):
        return spectral_batches(u, v, batch_size, k, temperature, g, refine=True, **options)

    methods = {
        "random": lambda u, v, y, g: torch.cat([random_batches(len(u), batch_size, g) for _ in range(20)]),
        "in file order": lambda u, v, y, g: torch.arange(size).view(k, batch_size),
        "osgd, q = k/10": lambda u, v, y, g: osgd_batches(u, v, batch_size, k, max(1, k // 10), temperature),
        "BatchSampler": lambda u, v, y, g: rivals.batch_sampler(u, v, batch_size, generator=g),
        "GCBS": lambda u, v, y, g: rivals.gcbs(u, v, batch_size),
        "released spectral": lambda u, v, y, g: rivals.released_spectral(u, v, batch_size, k, temperature, g),
        "B3": lambda u, v, y, g: rivals.b3(u, v, batch_size, generator=g),
        "B3, no rank skipped": lambda u, v, y, g: rivals.b3(u, v, batch_size, ranks=(0, 100), generator=g),
        "k-means, then fill": lambda u, v, y, g: rivals.greedy_groups(u, v, batch_size, g),
        "spectral": lambda u, v, y, g: spectral_batches(u, v, batch_size, k, temperature, g),
        "refined": refined,
    }
    labelled = {
        "refined, exclude=labels": lambda u, v, y, g: refined(u, v, y, g, exclude=y),
        "refined, ceiling=0.999": lambda u, v, y, g: refined(u, v, y, g, ceiling=0.999),
        "refined, ceiling=0.99": lambda u, v, y, g: refined(u, v, y, g, ceiling=0.99),
    }
    columns = {"loss": "10.3f", "excess": "8.3f", "relative": "9.2f", "over_file_order": "8.3f",
               "relative_to_file_order": "9.2f", "same_class": "11.2%", "ms": "9.1f", "of_eigh": "8.2f", "MB": "7.0f"}
    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix += matrix.T.clone()
    print(f"embeddings: {source}\nwindows of k={k} batches of B={batch_size}, median of 3 seeds; excess: mean loss over that of "
          "random batches, and relative to the released\nmethod's; over those in file order likewise; same class: pairs inside "
          f"a batch; eigh: one float64 torch.linalg.eigh of {size} x {size}")
    print(f"{'embeddings':<14}{'sampler':<24}{'mean loss':>10}{'excess':>8}{'relative':>9}{'file o.':>8}{'relative':>9}"
          f"{'same class':>11}{'ms':>9}{'of eigh':>8}{'MB':>7}")
    for name, (u, v, labels) in sets.items():
        windows = [(u[i:i + size], v[i:i + size], None if labels is None else labels[i:i + size])
                   for i in range(0, len(u) - size + 1, size)]
        if not windows:
            raise Stop(f"{name} has {len(u):,} pairs and a window takes {size:,}: give more")
        chosen, losses, rows = methods | (labelled if labels is not None else {}), {}, {}
        if not file_order:
            del chosen["in file order"]
        for method, choose in chosen.items():
            batches = [[choose(*w, g.manual_seed(seed)) for w in windows] for seed in range(3)]
            losses[method] = statistics.median(statistics.mean(
                batch_losses(x, y, b, temperature).mean().item() for (x, y, _), b in zip(windows, of_seed)) for of_seed in batches)
            rows[method] = {"embeddings": name, "sampler": method, "loss": losses[method]}
            if labels is not None:
                rows[method]["same_class"] = statistics.mean(same_class(w[2][b]) for x in batches for w, b in zip(windows, x))
        eigh, *took = seconds(lambda: torch.linalg.eigh(matrix), *(
            lambda choose=choose: choose(*windows[0], g.manual_seed(0)) for choose in chosen.values()), rounds=rounds)
        for (method, choose), t in zip(chosen.items(), took):
            for base, excess, relative in ("random", "excess", "relative"), ("in file order", "over_file_order", "relative_to_file_order"):
                if base in losses:
                    rows[method] |= {excess: losses[method] - losses[base],
                                     relative: (losses[method] - losses[base]) / (losses["released spectral"] - losses[base] or math.nan)}
            rows[method] |= {"ms": 1000 * t, "of_eigh": t / eigh, "MB": peak(lambda: choose(*windows[0], g.manual_seed(0)))[1]}
            record["samplers"].append({"same_class": None, **rows[method]})
            cells = (f"{rows[method][x]:>{form}}" if x in rows[method] else f"{'-':>{form.split('.')[0]}}" for x, form in columns.items())
            print(f"{name:<14}{method:<24}{''.join(cells)}", flush=True)
        plain, best = rows["spectral"], rows["refined"]
        print(f"spectral: {plain['excess'] / best['excess']:.2f} of refined's excess at {plain['ms'] / best['ms']:.2f} of its time")
    print("\nall pairs as one window, refined, in parts (made-up embeddings of 128 dimensions)")
    print(f"{'pairs':>10}{'random':>9}{'windows of k':>14}{'all':>8}{'seconds':>10}{'us a pair':>11}{'MB':>7}")
    for n in pairs:
        u, v = clustered(n)
        start = time.perf_counter()
        batches, memory = peak(lambda: spectral_batches(u, v, batch_size, n // batch_size, temperature, g.manual_seed(0), refine=True))
        took = time.perf_counter() - start
        few = slice(0, min(n, 8 * size))
        windows = refined(u[few], v[few], None, g.manual_seed(0))
        loss = [batch_losses(u, v, x, temperature).mean().item()
                for x in (torch.arange(n // batch_size * batch_size).view(-1, batch_size), windows, batches)]
        record["growth"].append(dict(zip(("pairs", "random", "windows", "all", "seconds", "us_a_pair", "MB"),
                                         (n, *loss, took, 1e6 * took / n, memory))))
        print(f"{n:>10,}{loss[0]:>9.3f}{loss[1]:>14.3f}{loss[2]:>8.3f}{took:>10.1f}{1e6 * took / n:>11.0f}{memory:>7.0f}", flush=True)
    if out:
        write_atomically(Path(out).expanduser(), json.dumps(record, indent=1).replace("NaN", "null").encode())


def bench_losses(shapes: tuple = ((20, 4, 16), (20, 4, 40), (20, 4, 128), (48_000, 32, 128)), rounds: int = 15) -> None:
    """Milliseconds of batch_losses, of all B-subsets of n = 20 and of a partition, and of one product of the same shapes."""
    print(f"{'pairs':>8}{'batches':>9}{'of':>4}{'dimensions':>12}{'product, ms':>13}{'losses, ms':>12}{'ratio':>7}")
    for n, batch_size, d in shapes:
        u, v = torch.randn(2, n, d)
        batches = all_batches(n, batch_size) if n <= 20 else random_batches(n, batch_size)
        views = torch.randn(len(batches), 2 * batch_size, d)
        product, losses = seconds(lambda: views @ views.mT, lambda: batch_losses(u, v, batches), rounds=rounds)
        print(f"{n:>8,}{len(batches):>9,}{batch_size:>4}{d:>12}{1000 * product:>13.2f}{1000 * losses:>12.2f}{losses / product:>7.2f}")


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


def bench_step(size: int = 32) -> None:
    """Seconds of a step of train.py against forward and backward of the same network on a fixed batch, and the rest."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = max(2, 40 if device.type == "cuda" else 40 * 32 * 32 // size ** 2)
    model = ContrastiveModel().to(device, memory_format=torch.channels_last)
    images = torch.randn(64, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)

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
                                   "--image-size", str(size), "--max-steps", str(steps), "--log-every", str(steps)])
            if code:
                raise Stop("train.py failed; run it by itself to see why")
            whole.append(json.loads(Path(out, "log.jsonl").read_text())["seconds_training"] / steps)
        forward_backward, _ = seconds(bare, training, rounds=3)
    forward_backward, step = forward_backward / steps, statistics.median(whole[1:])
    print(f"ResNet-18 at {size} px, 2 x 32 views, {device}")
    print(f"{'forward + backward':<20}{1000 * forward_backward:>8.1f} ms")
    print(f"{'step of train.py':<20}{1000 * step:>8.1f} ms   ratio {step / forward_backward:.2f}")


def bench_synthetic(runs: int = 32, steps: int = 50) -> None:
    """Seed-steps/s of theory.py's steps on all 28 batches of N = 8, B = 2 against a loop over runs and batches with autograd."""
    batches = all_batches(8, 2)
    threads = torch.get_num_threads()

    def loop() -> None:  # one run, one step
        u, v = (x[0].requires_grad_() for x in theory.start(1, 8, 16, 0))
        loss = sum(infonce(u[rows], v[rows]) for rows in batches) / len(batches)
        for x, gradient in zip((u, v), torch.autograd.grad(loss, (u, v))):
            F.normalize(x.detach() - 0.5 * gradient, dim=1)

    def batched() -> None:
        u, v = theory.start(runs, 8, 16, 0)
        for _ in range(steps):
            theory.descend(u, v, batches, 0.5)
    torch.set_num_threads(1)  # as synthetic.py does
    one, many = seconds(loop, batched, rounds=9)
    torch.set_num_threads(threads)
    one, many = 1 / one, runs * steps / many
    print("N = 8, B = 2, d = 16, all 28 batches a step, float64, one thread")
    print(f"{'loop with autograd':<30}{one:>12,.0f} seed-steps/s")
    print(f"{f'theory.py, {runs} runs at once':<30}{many:>12,.0f} seed-steps/s   ratio {many / one:.0f}")


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


def bench_retrieval(d: int = 128) -> None:
    """Seconds of retrieval_metrics, how many times faster than sorting each row and searching it, and its memory."""
    print(f"{'pairs':>8}{'sort and search, s':>20}{'retrieval_metrics, s':>22}{'ratio':>7}{'MB':>6}")
    for n in 10_000, 100_000:
        u, v = clustered(n, d)
        x, y = (F.normalize(x, dim=1) for x in (u, v))

        def sort(rows: int = 100) -> None:
            for query, gallery in ((x, y), (y, x)):
                for i, s in enumerate(query[:rows] @ gallery.T):
                    (s.argsort(descending=True) == i).nonzero()
        slow, fast = seconds(sort, lambda: retrieval.retrieval_metrics(u, v), rounds=3 if n == 10_000 else 1)
        slow *= n / 100
        print(f"{n:>8,}{slow:>20.1f}{fast:>22.2f}{slow / fast:>7.0f}{peak(lambda: retrieval.retrieval_metrics(u, v))[1]:>6.0f}", flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("samplers", "losses", "augment", "step", "synthetic", "data", "retrieval"))
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--embeddings", metavar="FILE.npz", help="samplers: these embeddings (default: made by a short run)")
    given.add_argument("--run", metavar="FOLDER", help="samplers: embeddings by the network of a finished run of train.py")
    parser.add_argument("--data-dir", metavar="DIR", help="samplers: folder of that run's data (default: as when it was trained)")
    parser.add_argument("--pairs", metavar="N", type=int, nargs="*", default=[10_000, 100_000],
                        help="samplers: sizes at which growth is measured (default: 10000 100000; 1000000 takes minutes)")
    parser.add_argument("--out", metavar="FILE.json", help="samplers: write the numbers here too")
    parser.add_argument("--image-size", metavar="S", type=int, default=32, help="step: side of the views (default: 32)")
    words = parser.parse_args(argv)
    try:
        if words.what != "samplers":
            globals()[f"bench_{words.what}"](*[words.image_size] * (words.what == "step"))
            return 0
        window = 40 * 32
        if min(words.pairs, default=window) < window:
            raise Stop(f"--pairs {min(words.pairs)}: less than a window; give {window} or more")
        if words.out:  # said before the minute, not after
            Path(words.out).expanduser().parent.mkdir(parents=True, exist_ok=True)
        sets = read_pairs(words.embeddings) if words.embeddings else \
            {Path(words.run).name: embed_run(words.run, words.data_dir, 2 * window)} if words.run else \
            {"deadleaves": embed_short_run(2 * window)}
        bench_samplers(words.embeddings or words.run or "a short run of train.py", sets, words.pairs, words.out,
                       file_order=bool(words.embeddings))
    except (Stop, OSError, ValueError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # its output may be cut, as by head
    sys.exit(main(sys.argv[1:]))
