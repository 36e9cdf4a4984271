"""What things cost and what samplers are worth. Each prints a small table of medians, in about a minute.

    python bench.py samplers [--run FOLDER | --embeddings FILE.npz]   hardness, time, memory, also of rivals
    python bench.py step [--image-size 224]   train.py's step: time, arithmetic; hours of the paper's runs
    python bench.py augment                   against torchvision's transforms, image by image

The samplers work on embeddings of training images of a finished run (FOLDER), of a short one made for it, or
of FILE.npz: arrays [n, d] named NAME_u and NAME_v, or u and v, and class ids [n], NAME_labels, if there are.
Times of one table are measured in turns in one run, so their ratios hold on a busy machine.
"""
import argparse
import contextlib
import copy
import ctypes
import gc
import importlib.util
import itertools
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cli
import compare
import data
import retrieval
import rivals
import samplers
import train
from augment import MEAN, NUM_UNIFORM, STD, augment, views_of
from cli import Stop
from model import embed
from samplers import batch_losses

CPU = torch.device("cpu")
HEADINGS = {"over_file_order": "file o.", "relative_to_file_order": "relative"}  # too long for a table


# ---------------------------------------------------------------------- measuring
def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(*functions: Callable[[], object], rounds: int = 5, calls: int = 1) -> list[float]:
    """Median seconds a call of each function; they take turns, so that a busy machine slows all alike."""
    times, tick = [], cli.progress("timing", rounds + 1, "rounds")
    for i in range(rounds + 1):  # the first round warms up
        times.append([])
        for function in functions:
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            wait()
            times[-1].append((time.perf_counter() - start) / calls)
            tick(i + len(times[-1]) / len(functions))
    return np.median(times[1:], axis=0).tolist()


def peak(function: Callable[[], object], device: torch.device = CPU) -> tuple[object, float | None]:
    """What the function returns, and the MB by which memory in use grew at most while it ran: on CUDA the
    device's, as torch allocates it, else the process's (Linux; None elsewhere)."""
    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return function(), (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier methods freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = status("VmRSS")
    except (OSError, AttributeError):
        return function(), None
    return function(), max(0, status("VmHWM") - before) / 1024


def show(row: dict, heading: bool) -> None:
    """Print a row of a table, below its heading if that is due: words to the left, numbers to the right."""
    def cell(x) -> str:
        whole = isinstance(x, int) or isinstance(x, float) and abs(x) >= 1000
        return "-" if x is None else x if isinstance(x, str) else f"{x:,.0f}" if whole else f"{x:.4g}"
    heads = [HEADINGS.get(key, key.replace("_", " ")) for key in row]
    widths = [f"<{max(25, len(head)) + 1}" if isinstance(x, str) else f">{max(8, len(head)) + 2}"
              for head, x in zip(heads, row.values())]
    for cells in ([heads] if heading else []) + [map(cell, row.values())]:
        print("".join(format(x, width) for x, width in zip(cells, widths)).rstrip(), flush=True)


def race(what: str, unit: str, entrants: dict[str, tuple[Callable, int]], rounds: int = 5) -> None:
    """Print seconds a call of each function, which does so many units; units/s; their ratio to the first."""
    times = seconds(*(function for function, _ in entrants.values()), rounds=rounds)
    rates = [count / s for (_, count), s in zip(entrants.values(), times)]
    for i, name in enumerate(entrants):
        row = {what: name, "seconds": times[i], f"{unit}/s": rates[i], "ratio": rates[i] / rates[0]}
        show(row, heading=i == 0)


def clustered(n: int, d: int = 128) -> tuple[Tensor, Tensor]:
    """Stand-in for a trained network's embeddings: n pairs around n/16 centres, partners close by."""
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(n // 16 * 16, generator=g)
    centres = torch.randn(n // 16, d, generator=g).repeat_interleave(16, 0)[order]
    sample = centres + torch.randn(centres.shape, generator=g)
    return tuple(sample + 0.5 * torch.randn(sample.shape, generator=g) for _ in range(2))


# ---------------------------------------------------------------------- a training step
class Operations(TorchDispatchMode):
    """Counts the operations that are dispatched under it, those of backward as well."""
    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += 1
        return function(*arguments, **(named or {}))


def training_step(size: int, batch_size: int, mode: str, device: torch.device) -> tuple:
    """A function that makes one of train.py's own steps on random images, and the network that it trains.

    mode: eager, graph or compile. The one place that knows what train.py calls its parts.
    """
    words = ["--sampler", "random", "--image-size", str(size), "--batch-size", str(batch_size)]
    side = min(size, 64)  # before augmentation, as in the paper's data sets
    images = torch.randint(256, (1024, 3, side, side), dtype=torch.uint8, device=device)
    trained = train.Step(train.settle([*words, "--step", mode]), images, device)
    rows, uniform = torch.randperm(len(images))[:batch_size], torch.rand(2 * batch_size, NUM_UNIFORM)

    def step() -> None:
        trained.place.zero_()  # of the losses, which nobody reads here
        trained(rows, uniform, 0.01)
    for _ in range(train.WARM + 1):  # the last one captures
        step()
    return step, trained.model


def measure_step(size: int, batch_size: int, mode: str, a: Tensor) -> dict:
    """Time, operations and arithmetic of a step, beside the product of the matrix a [n, n] with itself."""
    step, model = training_step(size, batch_size, mode, a.device)
    with Operations() if mode != "compile" else contextlib.nullcontext() as counter:
        step()  # under the counter a compiled network would run as it was before
    # On a CPU about a second of steps a round.
    calls = 50 if a.device.type == "cuda" else max(1, round(1 / seconds(step, rounds=1)[0]))
    took, product = seconds(step, lambda: a @ a, calls=calls)
    with FlopCounterMode(display=False) as flops:  # by shapes alone
        views = torch.zeros(2 * batch_size, 3, size, size, device="meta")
        copy.deepcopy(model).to("meta")(views).sum().backward()
    rate, best = flops.get_total_flops() / took / 1e12, 2 * len(a)**3 / product / 1e12
    return {"ms": 1000 * took, "images/s": batch_size / took, "operations": counter and counter.count,
            "TFLOP/s": rate, "of_product": rate / best, "product_TFLOP/s": best}


def paper_hours(ms: dict[int, float]) -> dict[str, float]:
    """Hours of the steps of the paper's twelve runs, from the ms of a step of 32 images by their pixels."""
    cifar, tiny = (6 * 100 * (n // 32) for n in (50_000, 100_000))  # six runs of 100 epochs each
    total = {"224 px": (cifar + tiny) * ms[224]} if 224 in ms else {}
    if {32, 64} <= ms.keys():
        total["own size"] = cifar * ms[32] + tiny * ms[64]
    return {where: x / 3.6e6 for where, x in total.items()}


def bench_step(sizes: list[int] | None, out: Path | None = None, batch_sizes: tuple = (32, 128)) -> None:
    """Each way of making train.py's step, beside a large matrix product, and hours of the paper's runs."""
    device = cli.pick_device("auto")
    cuda = device.type == "cuda"
    sizes = sizes or ([32, 64, 224] if cuda else [32, 64])
    for size in sizes:
        train.settle(["--image-size", str(size)])  # refuses one now, not after the others
    side, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    a = torch.randn(side, side, device=device, dtype=dtype)
    record = {"experiment": "step", **cli.provenance(device), "product": f"{side}^3, {dtype}", "steps": []}
    print(f"train.py's step on two views of each of B images, {record['device']}\n"
          f"product: of two {side} x {side} matrices in {dtype}, in turns with the steps")
    modes = {mode: {} for mode in (("eager", "graph", "compile") if cuda else ("eager",))}
    for mode, size, batch_size in itertools.product(modes, sizes, batch_sizes):
        row = {"step": mode, "pixels": size, "B": batch_size}
        try:
            row |= measure_step(size, batch_size, mode, a)
            modes[mode] |= {size: row["ms"]} if batch_size == 32 else {}
        except RuntimeError as error:  # too little memory, no compiler: the other rows still count
            if not cuda:
                raise
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        show(row, heading=not record["steps"])
        record["steps"].append(row)
        record["paper_hours"] = {mode: paper_hours(ms) for mode, ms in modes.items()}
        save(record, out)  # after each row, as a later one may end the process
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.compiler.reset()
    print("hours of the steps of the paper's twelve runs, six of CIFAR-100, six of Tiny ImageNet, at 224 px\n"
          f"and at their own 32 and 64 px: {json.dumps(record['paper_hours'])}")


# ---------------------------------------------------------------------- samplers
def read_pairs(file: str) -> dict[str, tuple]:
    """u, v [n, d] float32 and class ids [n] or None by name, of the arrays of a .npz. Raises Stop."""
    def refuse(what: str) -> Stop:
        return Stop(f"--embeddings {file}: {what}; give a .npz with arrays NAME_u and NAME_v [n, d], and "
                    "NAME_labels [n] if there are")
    try:
        with np.load(cli.expand(file), allow_pickle=False) as arrays:
            arrays = {name: torch.from_numpy(x) for name, x in arrays.items()}
    except Exception as error:  # np.load fails in many ways on what is not its own
        raise refuse(f"cannot be read ({type(error).__name__})") from None
    sets = {}
    for name in (name[:-1] for name in arrays if name == "u" or name.endswith("_u")):
        found = {name + x: arrays[name + x] for x in ("u", "v", "labels") if name + x in arrays}
        if name + "v" not in found:
            raise refuse(f"{name}u is without {name}v")
        u, v, labels = (found.get(name + x) for x in ("u", "v", "labels"))
        if u.ndim != 2 or u.shape != v.shape or labels is not None and labels.shape != u.shape[:1]:
            raise refuse(", ".join(f"{x} is {tuple(found[x].shape)}" for x in found))
        sets[name.rstrip("_") or "embeddings"] = u.float(), v.float(), labels
    if not sets:
        raise refuse(f"no pairs among its arrays ({', '.join(arrays) or 'it has none'})")
    return sets


def read_samplers(file: str):
    """Another version of samplers.py, as a module. Raises Stop."""
    try:
        spec = importlib.util.spec_from_file_location("other_samplers", cli.expand(file))
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        if not hasattr(module, "spectral_batches"):
            raise AttributeError("it has no spectral_batches")
        return module
    except Exception as error:  # whatever that file does
        raise Stop(f"--against {file}: {type(error).__name__}: {error}; give a samplers.py") from None


def embed_run(folder: str, data_dir: str | None, n: int, device: torch.device = CPU) -> tuple:
    """u, v [n, d] of two views of n training images of a finished run, in a random order; class ids [n]."""
    (run,) = compare.read_runs([folder])
    knobs, g = run.knobs, torch.Generator().manual_seed(0)
    network = retrieval.load_checkpoint(run.folder / "checkpoint.pt", knobs).to(device)
    images, labels = data.load(
        knobs["dataset"], "train", cli.expand(data_dir or knobs["data_dir"]), num_images=n,
        source_size=knobs["source_size"], skip_broken=knobs["skip_broken"])
    rows = data.limit_indices(labels, min(n, len(images)))
    rows = rows[torch.randperm(len(rows), generator=g)]
    views = views_of(images, g, knobs["image_size"], knobs["crop_scale"], knobs["jitter"],
                     *data.STATISTICS[knobs["dataset"]], device)
    return *embed(network, views, rows, on_chunk=cli.progress("embedding", len(rows), "images")), labels[rows]


def embed_short_run(n: int, device: torch.device, steps: int = 128) -> tuple:
    """embed_run of a run of so many steps on n generated images."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train.main(["--data-dir", folder, "--out-dir", f"{folder}/run", "--sampler", "random",
                    "--limit", str(n), "--max-steps", str(steps)])
        return embed_run(f"{folder}/run", None, n, device)


def same_class(labels: Tensor) -> float:
    """Share of the pairs inside a batch that are of one class, mean over batches; labels [m, B]."""
    size = labels.shape[1]
    pairs = (labels[:, :, None] == labels[:, None]).sum((1, 2)) - size
    return pairs.float().mean().item() / (size * (size - 1))


def compare_samplers(windows: list, methods: dict[str, Callable], temperature: float, rounds: int) -> dict:
    """By method a row of the table. windows: u, v and class ids or None of each; the first one is timed."""
    g, table = torch.Generator(), {}
    tick = cli.progress("choosing", len(methods), "samplers")
    for method, choose in methods.items():
        losses, shares = [], []
        for seed in range(3):
            chosen = [(*window, choose(*window, g.manual_seed(seed))) for window in windows]
            means = [batch_losses(u, v, rows, temperature).mean().item() for u, v, _, rows in chosen]
            losses.append(np.mean(means))
            shares += [same_class(labels[rows]) for _, _, labels, rows in chosen if labels is not None]
        share = float(np.mean(shares)) if shares else None
        table[method] = {"loss": float(np.median(losses)), "same_class": share}
        tick(len(table))
    u = windows[0][0]
    matrix = torch.randn(len(u), len(u), dtype=torch.float64, device=u.device)  # eigh reads one half of it
    calls = [partial(lambda choose: choose(*windows[0], g.manual_seed(0)), x) for x in methods.values()]
    eigh, *took = seconds(lambda: torch.linalg.eigh(matrix), *calls, rounds=rounds)
    for row, call, s in zip(table.values(), calls, took):
        for base, *keys in (("random", "excess", "relative"),
                            ("in file order", "over_file_order", "relative_to_file_order")):
            if base in table:
                released = table["released spectral"]["loss"] - table[base]["loss"]
                excess = row["loss"] - table[base]["loss"]
                row |= dict(zip(keys, (excess, excess / released if released else None)))
        row |= {"ms": 1000 * s, "of_eigh": s / eigh, "MB": peak(call, u.device)[1]}
    return table


def bench_samplers(source: str, sets: dict[str, tuple], pairs: list[int], size: int = 32, k: int = 40,
                   temperature: float = 0.1, file_order: bool = False, other=None, rounds: int = 3,
                   device: torch.device = CPU, out: Path | None = None) -> None:
    """Batches of `size` from windows of k * size pairs: mean loss, its excess, time, memory; then growth.

    sets: u, v [n, d] and class ids [n], or None, by name. file_order: their order means something, so it is a
    baseline as well. other: a second samplers.py, to compare with.
    """
    window = k * size
    record = {"experiment": "samplers", "embeddings": source, "batch_size": size, "k": k,
              "temperature": temperature, **cli.provenance(device), "samplers": [], "growth": []}
    print(f"embeddings: {source}; {record['device']}\nwindows of k={k} batches of B={size}; loss: mean of "
          "batches, median of 3 seeds; excess: beyond random batches;\nrelative: in excesses of the released "
          "method; both again beyond batches in file order; same class: share\nof the pairs in a batch; of "
          "eigh: ms in those of a torch.linalg.eigh; MB: most memory, less that before")
    for name, arrays in sets.items():
        u, v, labels = (x if x is None else x.to(device) for x in arrays)
        parts = [[x if x is None else x[i:i + window] for x in (u, v, labels)]
                 for i in range(0, len(u) - window + 1, window)]
        if not parts:
            raise Stop(f"{name} has {len(u):,} pairs and a window takes {window:,}: give more")
        methods = rivals.choosers(size, k, temperature, file_order, labels is not None, other)
        rows = compare_samplers(parts, methods, temperature, rounds)
        for method, row in rows.items():
            record["samplers"].append({"embeddings": name, "sampler": method, **row})
            show(record["samplers"][-1], heading=method == "random")
        others = [(x, f"{x}, against") for x in ("spectral", "refined") if other]
        for x, y in [("spectral", "refined"), *others]:
            excess, ms = (rows[x][key] / rows[y][key] for key in ("excess", "ms"))
            print(f"{x}: {excess:.3f} of the excess of {y} at {ms:.2f} of its time")
    print("\nall pairs as one window, refined, in parts (made-up embeddings of 128 dimensions)")
    tick, g = cli.progress("growth", sum(pairs), "pairs"), torch.Generator()
    refine = partial(samplers.spectral_batches, batch_size=size, temperature=temperature, refine=True)
    for n in pairs:
        u, v = (x.to(device) for x in clustered(n))
        wait()
        start = time.perf_counter()
        batches, memory = peak(lambda: refine(u, v, k=n // size, generator=g.manual_seed(0)), device)
        wait()
        took, few = time.perf_counter() - start, 8 * window
        random = torch.arange(n // size * size).view(-1, size)
        windows = refine(u[:few], v[:few], k=k, generator=g.manual_seed(0))
        losses = (batch_losses(u, v, x, temperature).mean().item() for x in (random, windows, batches))
        row = {"pairs": n, **dict(zip(("random", "windows", "all"), losses)), "seconds": took,
               "us_a_pair": 1e6 * took / n, "MB": memory}
        record["growth"].append(row)
        show(row, heading=n == pairs[0])
        tick(sum(row["pairs"] for row in record["growth"]))
    save(record, out)


def save(record: dict, out: Path | None) -> None:
    if out:
        cli.write_atomically(out, json.dumps(record, indent=1, allow_nan=False).encode())


# ---------------------------------------------------------------------- the rest
def bench_augment() -> None:
    """One step's batch (two views of 32 images) and a large one."""
    from torchvision.transforms import v2
    for side, count, rounds in (32, 64, 15), (32, 2048, 5), (64, 64, 11), (64, 2048, 5):
        images, g = torch.randint(256, (count, 3, side, side), dtype=torch.uint8), torch.Generator()
        pipeline = v2.Compose([
            v2.RandomResizedCrop(side, antialias=True), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v2.RandomGrayscale(0.2),
            v2.GaussianBlur(max(3, side // 10 | 1), (0.1 * side / 224, 2 * side / 224)),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
        # torchvision's time an image does not depend on how many there are.
        race(f"{count:,} images of {side} px", "images", {
            "torchvision, one by one": (lambda: torch.stack([pipeline(image) for image in images[:64]]), 64),
            "augment": (lambda: augment(images, side, g), count)}, rounds=rounds)


# ---------------------------------------------------------------------- the command line
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    benches = {name.removeprefix("bench_"): f for name, f in globals().items() if name.startswith("bench_")}
    parser.add_argument("what", choices=list(benches))
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--embeddings", metavar="FILE.npz", help="samplers: on these (default: a short run's)")
    given.add_argument("--run", metavar="FOLDER", help="samplers: on those by the network of a finished run")
    parser.add_argument("--data-dir", metavar="DIR", help="samplers: that run's data (default: as trained)")
    parser.add_argument("--against", metavar="FILE.py", help="samplers: and those of another samplers.py")
    parser.add_argument("--pairs", metavar="N", type=int, nargs="*", default=[10_000, 100_000],
                        help="samplers: sizes of which growth is measured (default: 10000 100000)")
    parser.add_argument("--image-size", metavar="S", type=int, nargs="+",
                        help="step: sides of the views (default: 32 64, on CUDA 32 64 224)")
    parser.add_argument("--out", metavar="FILE.json", type=cli.expand, help="samplers, step: write all here")

    def refuse(message: str) -> None:
        raise Stop(f"{message}; see --help")
    parser.error = refuse
    words = parser.parse_args(argv)
    window, device = 32 * 40, cli.pick_device("auto")
    if min(words.pairs, default=window) < window:
        raise Stop(f"--pairs {min(words.pairs)}: less than a window; give {window} or more")
    try:
        if words.out:  # said before the minute, not after
            words.out.parent.mkdir(parents=True, exist_ok=True)
        if words.what == "step":
            bench_step(words.image_size, words.out)
        elif words.what == "samplers":
            other = words.against and read_samplers(words.against)
            if words.embeddings:
                sets = read_pairs(words.embeddings)
            elif words.run:
                sets = {Path(words.run).name: embed_run(words.run, words.data_dir, 2 * window, device)}
            else:
                sets = {"deadleaves": embed_short_run(2 * window, device)}
            bench_samplers(words.embeddings or words.run or "a short run of train.py", sets, words.pairs,
                           file_order=bool(words.embeddings), other=other, device=device, out=words.out)
        else:
            benches[words.what]()
    except (OSError, ValueError) as error:
        raise Stop(str(error)) from None


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # its output may be cut, as by head
    sys.exit(cli.run(main, "bench.py"))
