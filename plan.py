"""What a plan of commands costs: time measured and counted, arithmetic, memory. run_all.sh --dry-run makes the plan.

    bash run_all.sh --dry-run
"""
import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import data
import train
from augment import augment
from bench import clustered
from cli import Stop
from lars import LARS
from model import ContrastiveModel, embed, nt_xent
from report import clock
from samplers import spectral_batches

# Seconds, at --quick and in full, of steps that cannot be counted, on two cores of an AMD EPYC on which a window of spectral
# batches takes 19 ms; roughly. Once a step has run, its own time stands in for it.
REFERENCE = {"synthetic-toy": (11, 24), "synthetic-optima": (18, 190), "synthetic-convergence": (15, 97), "synthetic-subsets": (14, 60),
             "synthetic-histograms": (6, 6), "synthetic-temperature": (11, 79), "synthetic-scaling": (5, 120), "bench": (60, 60),
             "report": (1, 1), "test": (170, 170)}
FORWARD = 1.82e9 / 224 ** 2  # multiply-adds of ResNet-18 a pixel of an image; backward takes twice as many
RETRIEVAL_VIEWS = 30_000, 4_000_000  # embedded to evaluate a run: of generated images, of the -C sets
A100 = 60e12  # FLOP/s achieved in bfloat16, assumed: a fifth of the peak, as small batches of a small network do


def repeated(function: Callable[[], object], budget: float = 4) -> float:
    """Median seconds of a call, of at most 20 and as many as the budget allows, at least one, after one that warms up."""
    times, ends = [], math.inf
    while len(times) < 2 or len(times) < 21 and times[-1] < ends - time.perf_counter():
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        ends = min(ends, time.perf_counter() + budget)
    return statistics.median(times[1:])


def measure(size: int, source: int, batch_size: int, device: torch.device) -> tuple[float, float]:
    """Seconds of a training step and of embedding one view, both with augmentation."""
    model = ContrastiveModel().to(device, memory_format=torch.channels_last)
    optimizer = LARS(model.parameters(), 0.1)
    images = torch.randint(0, 256, (512, 3, source, source), dtype=torch.uint8, device=device)
    g = torch.Generator().manual_seed(0)

    def views(index: torch.Tensor) -> torch.Tensor:
        return augment(images[index.to(device)], size, g).contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            z1, z2 = model(views(torch.arange(batch_size).repeat(2) % 512)).chunk(2)
        nt_xent(z1, z2).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # A CPU takes as long a view whatever their number, and a large step would take a minute.
    share = 1 if device.type == "cuda" else max(1, min(batch_size // 4, size * size // 4096))
    few, batch_size = torch.arange(256 if device.type == "cuda" else 16 // share + 4), batch_size // share
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return share * repeated(step), repeated(lambda: embed(model, views, few)) / (2 * len(few))


def plan(jobs: int) -> None:
    """Time of the commands on standard input, lines of: act, name, why, seconds last time (or empty), command; tab-separated.

    Training is counted in steps and forward passes, whose times are measured here at each size of views; what takes the
    same time on every machine of a kind was measured once (REFERENCE) and is scaled by a window of spectral batches.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pairs, g = clustered(1280), torch.Generator().manual_seed(0)
    window = repeated(lambda: spectral_batches(*pairs, 32, 40, 0.1, g))
    pace, measured, total, training, counts, sets = window / 0.019, {}, 0.0, 0.0, [], {}
    if device.type == "cuda":
        pairs = tuple(x.to(device) for x in pairs)
        window = repeated(lambda: spectral_batches(*pairs, 32, 40, 0.1, g))

    def speed(knobs: dict) -> tuple[float, float]:
        key = knobs["image_size"], knobs["source_size"] or data.SOURCE_SIZE[knobs["dataset"]], knobs["batch_size"]
        if key not in measured:
            measured[key] = measure(*key, device)
        return measured[key]
    print(f"{'':<7}{'estimate':>9}  command")
    for line in filter(None, sys.stdin.read().split("\n")):
        act, name, why, last, command = line.split("\t")
        words = shlex.split(command)
        took = 0.0
        if act == "skip":
            pass
        elif words[0] == "train.py":
            knobs = train.settle(words[1:])
            images = min({"cifar100": 50_000, "tinyimagenet": 100_000}.get(knobs["dataset"], 1 << 62), knobs["limit"] or 1 << 62)
            size, b, side = knobs["image_size"], knobs["batch_size"], knobs["source_size"] or data.SOURCE_SIZE[knobs["dataset"]]
            step, view = speed(knobs)
            steps = min(knobs["epochs"] * (images // b), knobs["max_steps"] or 1 << 62)
            log = Path(knobs["out_dir"], "log.jsonl")
            there = json.loads(log.read_text().splitlines()[-1])["step"] if act == "resume" and log.exists() and log.read_text() else 0
            k, q = knobs["k"] or 1, knobs["q"] or 1
            embedded = 0 if knobs["sampler"] == "random" or knobs["embeddings"] == "free" else 2 * b * k / q  # views a step
            split = {"spectral": window / 40, "refined": 4 * window / 40}.get(knobs["sampler"], 0)
            took = (steps - there) * (step + embedded * view + split + 2 * train.VALIDATION_IMAGES * view / (images // b))
            flop = 2 * FORWARD * size ** 2 * steps * (3 * 2 * b + embedded)
            counts.append((name, steps, 2 * b, embedded, flop))
            sets[knobs["dataset"]] = 3 * side ** 2 * images
            training += took
        elif last.isdigit() and why != "its command changed":
            took = int(last)
        elif words[0] == "retrieval.py":
            folders, dataset = [word for word in words if word.startswith("runs/")], name.split("-")[1]
            try:  # of a run that there is; one that is to be made has the defaults, or the sizes of its data set
                knobs = json.loads(Path(folders[0], "config.json").read_text())["knobs"]
            except (OSError, ValueError, LookupError):
                size = {"retrieval-cifar100-own": ["--image-size", "32"], "retrieval-tinyimagenet-own": ["--image-size", "64"]}.get(name, [])
                knobs = train.settle(["--dataset", dataset, *size])
            took = len(folders) * RETRIEVAL_VIEWS[dataset != "deadleaves"] * speed(knobs)[1]
        else:
            took = pace * REFERENCE.get(name, (0, 0))["--quick" not in words]
        total += took
        print(f"{act:<7}{clock(took) if act != 'skip' else '-':>9}  {shlex.join(['python', *words])}    # {why}")
    print(f"{'sum':<7}{clock(total):>9}" + (f"; {clock(total - training + training / jobs)} with --jobs {jobs} where each has a GPU to itself" if jobs > 1 else ""))
    for (size, side, b), (step, view) in list(measured.items()):
        print(f"measured at {size} px on {device}: {1000 * step:.1f} ms a training step of 2 x {b} views, {1 / view:,.0f} embedded views/s")
        if device.type == "cuda":
            four, memory = measure(size, side, 4 * b, device)[0], torch.cuda.max_memory_allocated(device)
            print(f"4 times the batch takes {four / step:.1f} times as long and at most {memory / 1e9:.1f} GB, of "
                  f"{torch.cuda.get_device_properties(device).total_memory / 1e9:.0f}: about {4 * step / four:.1f} runs side by side keep a GPU "
                  "busy, as --jobs N for N runs in all")
    if counts:
        print(f"\n{'run':<32}{'steps':>9}{'trained':>9}{'embedded views a step':>23}{'FLOP':>9}{'on one A100':>13}")
    for name, steps, trained, embedded, flop in counts:
        print(f"{name:<32}{steps:>9,}{trained:>9}{embedded:>23,.0f}{flop:>9.1e}{clock(flop / A100):>13}")
    if counts:
        flop = sum(row[-1] for row in counts)
        print(f"{'sum':<73}{flop:>9.1e}{clock(flop / A100):>13}   at {A100 / 1e12:.0f} TFLOP/s, an assumption")
        print(f"Decoded once into one memory-mapped file for all runs, also side by side: "
              f"{', '.join(f'{name} {size / 1e6:,.0f} MB' for name, size in sets.items())}.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="training runs at a time")
    try:
        plan(parser.parse_args().jobs)
    except (Stop, OSError, ValueError) as error:
        print(f"plan.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
