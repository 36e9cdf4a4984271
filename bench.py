"""What samplers are worth and what things cost; each prints a table, in about a minute.

    python bench.py samplers [--run RUN | --embeddings FILE.npz]   hardness, time and memory, also of rivals
    python bench.py step [--image-size 224]            train.py's step, hours of the paper's runs
    python bench.py augment                            against torchvision's transforms, image by image

FILE.npz holds arrays NAME_u and NAME_v [n, d] and, if there are, class ids NAME_labels [n]. Times of a table
are taken in turns, so that ratios hold on a busy machine.
"""
import contextlib
import copy
import ctypes
import itertools
import json
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import cli
import compare
import retrieval
import rivals
import samplers
import train
from augment import MEAN, NUM_UNIFORM, STD, augment, views_of
from cli import Stop
from data import STATISTICS
from model import embed

B, K, TEMPERATURE = 32, 40, 0.1  # samplers: a window is K batches of B pairs
KNOBS = {
    "embeddings": (None, str, "samplers: a .npz of embeddings (default: those of a short run)"),
    "run": (None, str, "samplers: a run folder of train.py, of whose training images embeddings are made"),
    "data_dir": (None, str, "samplers: folder of that run's data (default: the run's own)"),
    "against": (None, str, "samplers: another samplers.py, to compare with"),
    "pairs": (None, f"int >= {B * K}", "samplers: also so many made-up pairs as one window"),
    "image_size": (None, "int >= 8", "step: side of the views (default: 32 and 64, on CUDA also 224)"),
    "out": (None, str, "a .json for all numbers"),
}


def seconds(*functions: Callable[[], object], rounds: int = 3, calls: int = 1) -> list[float]:
    """Median seconds a call of each function; they take turns."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times, tick = np.zeros((rounds + 1, len(functions))), cli.progress("timing", rounds + 1, "rounds")
    for i, j in np.ndindex(times.shape):  # the first round warms up
        sync()
        start = time.perf_counter()
        for _ in range(calls):
            functions[j]()
        sync()
        times[i, j] = (time.perf_counter() - start) / calls
        tick(i + (j + 1) / len(functions))
    return np.median(times[1:], axis=0).tolist()


def peak(function: Callable[[], object], device: torch.device) -> float | None:
    """MB by which memory grew at most: on CUDA torch's, else the process's (None but on Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier methods freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    except (OSError, AttributeError):
        return None

    def most() -> int:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    before = most()
    function()
    return (most() - before) / 1024


def show(row: dict, heading: bool) -> None:
    """Print a row of a table, below its heading if that is due."""
    def cell(x) -> str:
        return "-" if x is None else x if isinstance(x, str) else f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"
    widths = ["<26" if isinstance(x, str) else f">{max(8, len(key)) + 2}" for key, x in row.items()]
    for cells in ([row] if heading else []) + [map(cell, row.values())]:
        cli.say("".join(map(format, cells, widths)).rstrip())


def read_pairs(file: str, least: int) -> dict[str, tuple]:
    """u, v [n, d], n >= least, and class ids [n] or None by name, of the arrays of a .npz. Raises Stop."""
    try:
        with np.load(cli.expand(file)) as found:
            arrays = {name: torch.from_numpy(x) for name, x in found.items()}
        sets = {name.rstrip("_") or "embeddings":
                (arrays[name + "u"].float(), arrays[name + "v"].float(), arrays.get(name + "labels"))
                for name in (x[:-1] for x in arrays if x == "u" or x.endswith("_u"))}
        if not sets:
            raise ValueError("no NAME_u")
        for name, (u, v, labels) in sets.items():
            if not len(v) == len(u if labels is None else labels) == len(u) >= least:
                raise ValueError(f"{name} has {len(u)} pairs of at least {least}, or arrays that do not fit")
            samplers._check(u, v, TEMPERATURE)
        return sets
    except Exception as error:  # np.load fails in many ways on what is not its own
        raise Stop(f"--embeddings {file}: {error or type(error).__name__}; give a .npz with arrays NAME_u, "
                   "NAME_v and, if there are, NAME_labels") from None


def read_samplers(file: str) -> Callable:
    """spectral_batches of another samplers.py. Raises Stop."""
    try:
        return runpy.run_path(file)["spectral_batches"]
    except Exception as error:  # whatever stands in it
        raise Stop(f"--against {file}: {error!r}; give a samplers.py with spectral_batches") from None


def embed_run(folder: str, data_dir: str | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """u, v [n, d] and class ids [n] of a run's training images, of at most four windows. Raises Stop."""
    run, g = compare.read_runs([folder])[0], torch.Generator().manual_seed(0)
    knobs, path = run.knobs, cli.expand(data_dir or run.knobs["data_dir"])
    model = retrieval.load_checkpoint(run.folder / "checkpoint.pt", knobs).to(device)
    images, labels, rows = retrieval.load(run, "train", path, knobs["limit"])
    rows = rows[torch.randperm(len(rows), generator=g)][:4 * K * B]
    look = (knobs[x] for x in ("image_size", "crop_scale", "jitter"))
    views = views_of(images, g, *look, *STATISTICS[knobs["dataset"]], device)
    return *embed(model, views, rows, on_chunk=cli.progress("embedding", len(rows), "images")), labels[rows]


def embed_short_run(n: int, device: torch.device, steps: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """The same of n generated images, after so many steps of train.py on them."""
    words = f"--sampler random --batch-size {B} --lr 0.424 --limit {n} --max-steps {steps}"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train.main([*words.split(), "--data-dir", folder, "--out-dir", f"{folder}/run"])
        return embed_run(f"{folder}/run", None, device)


def choosers(u: Tensor, v: Tensor, labels: Tensor | None, g: torch.Generator, against=None) -> dict:
    """By name what chooses the batches [m, B] of a window u, v [K * B, d], labels [K * B] or None.

    against: another spectral_batches. A new rival is a line here.
    """
    def spectral(refine: bool, function: Callable = samplers.spectral_batches, **options) -> Callable:
        return lambda: function(u, v, B, K, TEMPERATURE, g, refine=refine, **options)
    found = {
        "random": lambda: torch.cat([samplers.random_batches(len(u), B, g) for _ in range(20)]),
        "osgd, q = k/10": lambda: samplers.osgd_batches(u, v, B, K, max(1, K // 10), TEMPERATURE),
        "GCBS": lambda: rivals.gcbs(u, v, B),
        "released spectral": lambda: rivals.released_spectral(u, v, B, K, TEMPERATURE, g),
        "B3": lambda: rivals.b3(u, v, B, generator=g),
        "spectral": spectral(False), "refined": spectral(True)}
    if against:
        found |= {"spectral, against": spectral(False, against), "refined, against": spectral(True, against)}
    if labels is not None:
        found |= {"refined, exclude=labels": spectral(True, exclude=labels),
                  "refined, relative_margin=0.1": spectral(True, relative_margin=0.1)}
    return found


def bench_samplers(sets: dict[str, tuple], against: Callable | None, device: torch.device) -> dict:
    """Loss (mean of all windows, median of 3 seeds), time and memory of each method on sets of read_pairs."""
    cli.say(f"windows of {K} batches of {B}; excess: of loss over random, relative: to the released method's")
    table, g, n = [], torch.Generator(), K * B
    for name, arrays in sets.items():
        windows = [[x if x is None else x[i:i + n].to(device) for x in arrays]
                   for i in range(0, len(arrays[0]) - n + 1, n)]
        methods = [choosers(*window, g, against) for window in windows]
        rows, tick = {}, cli.progress("choosing", len(methods[0]), "samplers")
        for method in methods[0]:
            losses, shares = np.zeros((3, len(windows))), []
            for done, (seed, i) in enumerate(np.ndindex(losses.shape)):
                g.manual_seed(seed)
                (u, v, labels), batches = windows[i], methods[i][method]()
                losses[seed, i] = samplers.batch_losses(u, v, batches, TEMPERATURE).mean()
                tick(len(rows) + (done + 1) / losses.size)
                if labels is not None:
                    y = labels[batches]
                    shares.append((y[:, :, None] == y[:, None]).double().mean().item() * B - 1)
            rows[method] = {"embeddings": name, "sampler": method, "loss": np.median(losses.mean(1)).item(),
                            "same_class": np.mean(shares).item() / (B - 1) if shares else None}
        matrix = torch.randn(n, n, dtype=torch.float64, device=device)  # eigh reads one half of it
        eigh, *took = seconds(lambda: torch.linalg.eigh(matrix), *methods[0].values())
        random, released = rows["random"]["loss"], rows["released spectral"]["loss"]
        for (method, row), s in zip(rows.items(), took):
            row["excess"] = row["loss"] - random
            row["relative"] = row["excess"] / (released - random) if released != random else None
            row |= {"ms": 1000 * s, "of_eigh": s / eigh, "MB": peak(methods[0][method], device)}
            show(row, heading=method == "random")
        table += rows.values()
    return {"batch_size": B, "k": K, "temperature": TEMPERATURE, "samplers": table}


def bench_window(n: int, device: torch.device) -> dict:
    """Refined batches of n made-up pairs as one window: time, memory."""
    cli.say(f"one window of {n:,} pairs, chosen from three times")
    u, v = torch.randn(2, n, 128, device=device)
    def choose() -> Tensor:
        return samplers.spectral_batches(u, v, B, n // B, refine=True)
    took, = seconds(choose, rounds=1)
    row = {"pairs": n, "seconds": took, "us_a_pair": 1e6 * took / n, "MB": peak(choose, device)}
    show(row, heading=True)
    return row


class Operations(TorchDispatchMode):
    """Counts the operations under it, those of backward as well."""
    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += 1
        return function(*arguments, **(named or {}))


def measure_step(size: int, batch_size: int, mode: str, a: Tensor) -> dict:
    """Time, operations and arithmetic of train.py's own step, beside the product a @ a of a [n, n]."""
    if mode == "compile":
        cli.say("compiling, up to a minute", sys.stderr)
        torch.compiler.reset()  # else another size is a recompilation, of which there may be few
    words = f"--sampler random --image-size {size} --batch-size {batch_size} --step {mode}"
    words += f" --device {a.device}"
    side = min(size, 64)  # before augmentation, as in the paper's data sets
    images = torch.randint(256, (1024, 3, side, side), dtype=torch.uint8, device=a.device)
    trained = train.Step(train.settle(words.split()), images, a.device)
    rows, uniform = torch.randperm(len(images))[:batch_size], torch.rand(2 * batch_size, NUM_UNIFORM)

    def step() -> None:
        trained.place.zero_()  # of the losses, which nobody reads here
        trained(rows, uniform, 0.01)
    tick = cli.progress(f"first steps, {size} px, B = {batch_size}", train.WARM + 1, "steps")
    for i in range(train.WARM + 1):  # the last one captures
        step()
        tick(i + 1)
    with Operations() if mode != "compile" else contextlib.nullcontext() as counter:
        step()  # under the counter a compiled network would run as it was before
    calls = max(1, round(0.3 / seconds(step, rounds=1)[0]))  # a third of a second of steps a round
    took, product = seconds(step, lambda: a @ a, calls=calls)
    with FlopCounterMode(display=False) as flops:  # by shapes alone
        views = torch.zeros(2 * batch_size, 3, size, size, device="meta")
        copy.deepcopy(trained.model).to("meta")(views).sum().backward()
    rate, best = flops.get_total_flops() / took / 1e12, 2 * len(a)**3 / product / 1e12
    return {"ms": 1000 * took, "images/s": batch_size / took, "operations": counter and counter.count,
            "TFLOP/s": rate, "of_product": rate / best, "product_TFLOP/s": best}


def paper_hours(ms: dict[int, float]) -> dict[str, float]:
    """Hours of the paper's twelve runs, from the ms of a step of 32 images by their pixels."""
    cifar, tiny = (6 * 100 * (n // 32) / 3.6e6 for n in (50_000, 100_000))  # six runs of 100 epochs each
    sides = {"224 px": (224, 224), "own size": (32, 64)}
    return {name: cifar * ms[a] + tiny * ms[b] for name, (a, b) in sides.items() if {a, b} <= ms.keys()}


def bench_step(device: torch.device, size: int | None) -> dict:
    """Each way of making train.py's step, and hours of the paper's runs."""
    cuda, hours, table = device.type == "cuda", {}, []
    if cuda:
        train.use_repeatable_kernels()
    side, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    a = torch.randn(side, side, device=device, dtype=dtype)
    cli.say(f"train.py's step on two views of each of B images; product: {side} x {side}, {dtype}")
    for mode in ("eager", "graph", "compile") if cuda else ("eager",):
        ms = {}
        for pixels, count in itertools.product([size] if size else [32, 64] + [224] * cuda, (32, 128)):
            table.append(row := {"step": mode, "pixels": pixels, "B": count})
            try:
                row |= measure_step(pixels, count, mode, a)
                ms |= {pixels: row["ms"]} if count == 32 else {}
            except RuntimeError as error:  # too little memory, no compiler: the other rows still count
                row["failed"] = f"{type(error).__name__}: {error}"[:300]
            show(row, heading=len(table) == 1)
        hours[mode] = paper_hours(ms)
    cli.say(f"hours of the paper's runs, six of CIFAR-100 and six of Tiny ImageNet: {json.dumps(hours)}")
    return {"product": f"{side}^3, {dtype}", "steps": table, "paper_hours": hours}


def bench_augment() -> dict:
    """Images a second on the CPU, of one step's batch and of a large one."""
    table = []
    for side, count in itertools.product((32, 64), (64, 2048)):
        images, g = torch.randint(256, (count, 3, side, side), dtype=torch.uint8), torch.Generator()
        pipeline = v2.Compose([
            v2.RandomResizedCrop(side, antialias=True), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), v2.RandomGrayscale(0.2),
            v2.GaussianBlur(max(3, side // 10 | 1), (0.1 * side / 224, 2 * side / 224)),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
        # torchvision's time an image does not depend on how many there are.
        theirs, ours = seconds(lambda: [pipeline(image) for image in images[:64]],
                               lambda: augment(images, side, g), rounds=7)
        row = {"images": count, "pixels": side, "augment/s": count / ours, "torchvision/s": 64 / theirs}
        table.append(row | {"ratio": row["augment/s"] / row["torchvision/s"]})
        show(table[-1], heading=len(table) == 1)
    return {"augment": table}


def main(argv: list[str]) -> None:
    knobs, _ = cli.parse(argv, __doc__, KNOBS, {}, words="what")
    what, out, device = " ".join(knobs["what"]), cli.expand(knobs["out"] or ""), cli.pick_device("auto")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if what == "samplers":
            other = read_samplers(knobs["against"]) if knobs["against"] else None
            sets = (read_pairs(knobs["embeddings"], B * K) if knobs["embeddings"] else
                    {Path(knobs["run"]).name: embed_run(knobs["run"], knobs["data_dir"], device)}
                    if knobs["run"] else {"deadleaves": embed_short_run(2 * K * B, device)})
            if (n := min(len(u) for u, _, _ in sets.values())) < B * K:
                raise Stop(f"--run {knobs['run']}: {n:,} training images; give a run of {B * K:,} or more")
            record = bench_samplers(sets, other, device)
            if knobs["pairs"]:
                record["one_window"] = bench_window(knobs["pairs"], device)
        elif what == "step":
            record = bench_step(device, knobs["image_size"])
        elif what == "augment":
            record = bench_augment()
        else:
            raise Stop(f"{what or 'nothing'} to measure{cli.nearest(what, ('samplers', 'step', 'augment'))}")
    except (OSError, ValueError) as error:
        raise Stop(str(error)) from None
    if knobs["out"]:
        record = {"experiment": what, **cli.provenance(device), **record}
        cli.write_atomically(out, json.dumps(record, indent=1, allow_nan=False).encode())


if __name__ == "__main__":
    sys.exit(cli.run(main, "bench.py"))
