"""The paper's theory on synthetic embeddings, checked and drawn: where mini-batches lead, how fast.

    python synthetic.py                             # every experiment: some minutes
    python synthetic.py --quick                     # smaller, without what settles nothing then: a minute
    python synthetic.py --experiment toy --out DIR  # or another of EXPERIMENTS, at the end of this file

Each writes NAME.json (settings, numbers, verdicts), NAME.png and NAME.pdf, and prints a line per claim: the
verdict, which follows from the numbers alone, the claim, what was measured, its 95 % bootstrap interval
over runs, and the closed form or bound. theory.py holds the closed forms, the gradient steps and the methods.
"""
import itertools
import json
import math
import sys
import time
import zipfile
from math import inf
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import cli
from cli import COLOURS, Stop, canvas, progress
from model import infonce
from samplers import all_batches, batch_losses, spectral_batches
from theory import (METHODS, Matching, angle_losses, claim, cross_polytope, cross_polytope_loss, descend,
                    digits, etf, etf_loss, evaluations, growth, interval, nearest, race, start,
                    start_released, toy_steps, train)

KNOBS = {
    "experiment": ("all", ("all", "toy", "angle", "optima", "convergence", "subsets", "histograms",
                           "temperature", "scaling"), "which experiment to run"),
    "out": ("results/synthetic", str, "folder of the results"),
    "seeds": (None, "int >= 2 <= 100000", "runs from different starts, all at once (default: 8 to 2,000)"),
    "steps": (None, "int >= 1", "gradient steps (default: each experiment's own)"),
    "lr": (0.5, "float > 0", "step size"),
    "seed": (0, "int >= 0 < 4294967296", "fixes every number on one machine"),
    "float32": (False, bool, "compute in float32; without it float64"),
    "device": ("cpu", str, "cpu, cuda, or auto for CUDA where there is one"),
    "embeddings": (None, str, "histograms: also those of this .npz file, arrays NAME_u and NAME_v [n, d]"),
    "quick": (False, bool, "fewer seeds and steps; leaves out temperature and scaling"),
}
ABOVE_1 = math.nextafter(1, 2), inf  # an interval that ends at 1 does not lie in it
OF_PAPER = [method for method in METHODS if method != "refined"]
CHOOSING = "osgd-direct", "osgd-replacement", "osgd", "spectral"  # those that look before they step


def setting(knobs: dict, seeds: int, steps: int, quick_seeds: int, quick_steps: int):
    """Runs, steps, generator, and dtype and device of the tensors."""
    runs, steps = (quick_seeds, quick_steps) if knobs["quick"] else (seeds, steps)
    dtype = torch.float32 if knobs["float32"] else torch.float64
    return (knobs["seeds"] or runs, knobs["steps"] or steps, torch.Generator().manual_seed(knobs["seed"]),
            {"dtype": dtype, "device": torch.device(knobs["device"])})


def band(axis, x, values: np.ndarray, label: str, colour: str) -> None:
    """Median and quartiles of values [R, T] against x [T]."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
    axis.plot(x, middle, color=colour, label=label)
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def plain_ticks(axis, subs: tuple) -> None:
    """Numbers such as 2 and 0.05, not powers, at these multiples of ten's powers on a logarithmic y axis."""
    from matplotlib.ticker import LogLocator, NullLocator
    axis.set(yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


# ------------------------------------------------------------------------------------------ experiments
# Each takes the knobs and returns its claims, its numbers (for the .json) and its figure.
def toy(knobs: dict):
    """Four samples in the plane: steps to the optimum of OSGD, and of SGD, a random variable."""
    runs, steps, generator, kind = setting(knobs, 2000, 5000, 1000, 2000)
    tolerances = {0.1: "-", 0.01: "--", 1e-3: ":", 1e-4: "-."}  # and their lines
    figure, axes = canvas(2, 3, 7.2, 4.6)
    claims, numbers, form = [], [], "mean T_SGD / T_OSGD"
    for line, (lr, shown, asked_by, wide, narrow) in zip(axes, ((0.5, 60, "paper", 0.01, 1e-3),
                                                                (0.1, 150, "us", 0.1, 0.01))):
        leads = {}
        for method in ("osgd-direct", "sgd-replacement", "sgd"):
            many = 1 if method == "osgd-direct" else runs
            first, path = toy_steps(method, many, steps, lr, tolerances, generator, kind, shown)
            if many == 1:
                certain = {t: x[0] for t, x in first.items()}
            for axis, x in zip(line, path):
                band(axis, np.arange(x.shape[1]), x, *METHODS[method])
            for t, x in first.items():
                # Runs that have not arrived count as `steps`: a lower bound. 0 where OSGD does not arrive.
                lead = leads[method, t] = interval(np.minimum(x, steps) / certain[t])
                arrived = float(np.isfinite(x).mean())
                numbers.append({"lr": lr, "method": method, "tolerance": t, "steps": x.tolist(),
                                "arrived": arrived, "over_osgd": lead})
                if method == "osgd-direct":
                    continue
                line[2].plot(np.sort(x), np.linspace(0, 100, len(x)), tolerances[t], color=METHODS[method][1],
                             label=f"{t:g}" if method == "sgd" else None)
                own = f"OSGD {certain[t]:g}" if math.isfinite(certain[t]) else f"OSGD not in {steps}"
                text = f"step size {lr:g}, to {t:g}: OSGD needs fewer steps than {METHODS[method][0]}"
                claims.append(claim(f"{text} ({own}; {arrived:.1%} of its runs arrive)", lead, ABOVE_1,
                                    f"{form} > 1", asked_by))
        line[0].axhline(45, color="black", linewidth=0.6, linestyle=":")
        line[0].set(ylabel=f"step size {lr:g}\ntheta (degrees)", xlabel="steps")
        line[1].set(ylabel="loss above the optimum's", xlabel="steps", yscale="log", ylim=(1e-5, 2))
        line[2].set(ylabel="runs that arrived (%)", xlabel="steps", xscale="log", xlim=(1, None))
        text = f"step size {lr:g}: the gap widens as the tolerance shrinks, {wide:g} to {narrow:g}"
        first, last = leads["sgd-replacement", wide], leads["sgd-replacement", narrow]
        claims.append(growth(text, first, last, form, asked_by))
    axes[1, 2].legend(loc="upper left", title="within")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return claims, numbers, figure


def angle(knobs: dict):
    """Losses as u_1 turns, the others on a decagon: other values, same minimiser; N = 10, B = 2, d = 2."""
    degrees = torch.arange(-180, 180.25, 0.25, **setting(knobs, 2, 1, 2, 1)[-1])
    losses = {method: x.cpu().numpy() for method, x in angle_losses(degrees).items()}
    degrees = degrees.cpu().numpy()
    least = {method: float(degrees[x.argmin()]) for method, x in losses.items()}
    figure, axes = canvas(1, 3, 7.2, 2.3)
    titles = "full batch of 10", "mean over all 45 batches of 2", "mean over 5 fixed batches of 2"
    for axis, title, (method, x) in zip(axes[0], titles, losses.items()):
        axis.plot(degrees, x, color=METHODS[method][1])
        axis.axvline(least[method], color="black", linewidth=0.6, linestyle=":")
        axis.set(title=title, xlabel="angle of $u_1$ (degrees)", xticks=range(-180, 181, 90))
    axes[0, 0].set_ylabel("loss (dotted: its minimum)")
    full, ncb, fixed = least.values()
    difference = float((losses["full"] - losses["ncb"]).min())
    claims = [claim("the full batch and all batches of 2 have the same minimiser", abs(full - ncb), (0, 0.25),
                    "angle between their minima in degrees <= 0.25, the grid's step"),
              claim("the full batch's loss has other values than the mean of all batches of 2", difference,
                    (0.1, inf), "least difference >= 0.1"),
              claim("fixed disjoint batches have another minimiser", abs(full - fixed), (1, inf),
                    "angle to the full batch's in degrees >= 1")]
    return claims, [{"degrees": degrees.tolist()} | {m: x.tolist() for m, x in losses.items()}], figure


def optima(knobs: dict):
    """Where each method ends: U V^T beside the optimum's, its relative distance and full-batch loss."""
    runs, steps, generator, kind = setting(knobs, 8, 1200, 8, 300)
    largest = 8 if knobs["quick"] else 16
    sizes = [(n, b, ratio) for ratio in (2, 0.5) for n in (4, 8, 16) for b in (2, 4) if n <= largest]
    figure, axes = canvas(len(sizes), len(OF_PAPER) + 1, 7.2, 0.64 * len(sizes) + 0.9)
    tick, numbers = progress("optima", len(sizes) * len(OF_PAPER), "trainings"), []
    for (n, b, ratio), line in zip(sizes, axes):
        d, pairs = int(ratio * n), torch.arange(n).view(-1, 2)
        matching, optimum, target = (None, etf_loss(n), etf(n)) if ratio == 2 else \
            (Matching(n), cross_polytope_loss(n), cross_polytope(torch.arange(n).roll(n // 2)).float())
        for method, axis in zip(OF_PAPER, line[1:]):
            u, v = start(runs, n, d, knobs["seed"], **kind)
            # Without noise all it takes is time. All batches together pull a pair (B-1)/(N-1) times as hard
            # as the full batch does.
            own_steps = steps * {"full": 5, "ncb": 3}.get(method, 1)
            lr = knobs["lr"] * (n - 1) / (b - 1) if method == "ncb" else knobs["lr"]
            far = train(method, u, v, b, own_steps, lr, generator, every=own_steps, matching=matching)[:, -1]
            own = infonce(u[:, pairs], v[:, pairs]).mean(1) - 2 * math.log1p(math.exp(-2))
            numbers.append({
                "n": n, "batch_size": b, "d": d, "method": method, "steps": own_steps, "lr": lr,
                "relative_distance": (far.cpu() / target.norm()).tolist(), "optimum": optimum,
                "above_optimum": (infonce(u, v) - optimum).tolist(), "pairs_above_own_optimum": own.tolist()})
            order = torch.arange(n)
            if matching is not None:  # one of each opposite pair, then their partners
                partner = matching((u @ v.mT + v @ u.mT)[:1].cpu())[0]
                order = torch.cat([order[order < partner], partner[order < partner]])
            axis.imshow((u[0] @ v[0].T).cpu()[order][:, order].numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
            tick(len(numbers))
        picture = line[0].imshow(target.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        line[0].set_ylabel(f"N={n} B={b}\nd={d}", rotation=0, ha="right", va="center")
    for axis, label in zip(axes[0], ["optimum"] + [METHODS[method][0] for method in OF_PAPER]):
        axis.set_title(label.replace(" with ", " with\n"), rotation=40, ha="left", x=0.2)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.colorbar(picture, ax=axes[:, -1], label="$u_i \\cdot v_j$", shrink=min(1, 3 / len(sizes)))
    claims = optima_claims(numbers, 2, "ETF, d = 2N", "2 log(1 + (N-1) e^(-N/(N-1)))") + \
        optima_claims(numbers, 0.5, "cross-polytope, d = N/2", "2 log((e + 1/e + N - 2) / e)")
    return claims, numbers, figure


def optima_claims(numbers: list[dict], ratio: float, name: str, form: str) -> list[dict]:
    """What is claimed of where the methods end at d = ratio N."""
    def runs_of(method: str, key: str, largest: int = 8) -> np.ndarray:  # [settings, R]
        return np.array([x[key] for x in numbers if x["method"] == method and x["d"] == ratio * x["n"]
                         and x["batch_size"] <= min(largest, x["n"] - 1)])  # B = N is the full batch
    far, above = ({method: runs_of(method, key) for method in OF_PAPER}
                  for key in ("relative_distance", "above_optimum"))
    claims = []
    for method in ("full", "ncb"):
        claims += [claim(f"{METHODS[method][0]}: ends at the {name}", far[method].max(0), (0, 0.05),
                         "relative distance <= 0.05 at every N, B"),
                   claim(f"{METHODS[method][0]}: ends at the loss of the {name}",
                         np.abs(above[method]).max(0), (0, 1e-4), f"{form} to 1e-4")]
    fixed, own = METHODS["fixed"][0], runs_of("fixed", "pairs_above_own_optimum", 2)
    claims += [claim(f"{fixed}: stays away from the {name}", far["fixed"].min(0), (0.2, inf),
                     "relative distance >= 0.2 at every N, B"),
               claim(f"{fixed}: the full-batch loss is worse than at the {name}", above["fixed"].min(0),
                     (0.01, inf), "above L* by >= 0.01 at every N, B"),
               claim(f"{fixed}, B = 2, {name[name.index('d ='):]}: each batch at its own optimum",
                     np.abs(own).max(0), (0, 1e-3), "2 log(1 + e^-2) to 1e-3", "us")]
    for method in CHOOSING:
        claims.append(claim(f"{METHODS[method][0]}: nearer to the {name}, than {METHODS['sgd'][0]}",
                            (far[method] - far["sgd"]).mean(0), (-inf, 0), "relative distances, "
                            f"{far[method].mean():.2f} - {far['sgd'].mean():.2f} < 0"))
    if ratio == 0.5:
        claims.append(claim(f"no run of any method ends below the loss of the {name}",
                            float(min(x.min() for x in above.values())), (-1e-6, inf), "L* - 1e-6", "us"))
    return claims


def convergence(knobs: dict):
    """Distance to the optimum against steps and pairs evaluated; B = 2, N = 8, and 4 and 16 as released."""
    runs, steps, generator, kind = setting(knobs, 32, 1500, 24, 200)
    given = knobs["lr"]
    rows = (8, given, False), (8, given / 10, False), *((n, given, True) for n in (4, 8, 16))  # released?
    methods = sorted(OF_PAPER, key="sgd".__ne__)  # SGD first, whom the others race
    figure, axes = canvas(len(rows), 4, 9.6, 9.0, sharex="col", sharey="row")
    claims, numbers = [], []
    tick = progress("convergence", 2 * len(rows) * len(methods), "trainings")
    for line, (n, lr, released) in zip(axes, rows):
        rule = f"N = {n}, " + ("released dynamics" if released else f"step size {lr:g}")
        own_steps, every = max(4, steps * n // 8), 4 if n > 8 else 1
        shown = np.unique(np.geomspace(1, own_steps // every, 80).astype(int))
        sides = ("ETF", 2 * n, None, line[:2]), ("cross-polytope", n // 2, Matching(n), line[2:])
        for name, d, matching, pair in sides:
            distances = {}
            for method in methods:
                u, v, lengths = start_released(runs, n, d, knobs["seed"], **kind)
                distances[method] = train(method, u, v, 2, own_steps, lr, generator, 1.0, every, matching,
                                          lengths if released else None).cpu()
                curve = distances[method][:, shown].numpy()
                for axis, cost in zip(pair, (1, sum(evaluations(method, n, 2)))):
                    band(axis, shown * every * cost, curve, *METHODS[method])
                tick(len(numbers) + len(distances))
            tolerance = nearest([distances["sgd"]], 0.1)
            closer = [t for t in (3.0, 2.0, 1.0, 0.5, 0.2, 0.1) if t < tolerance]
            found = race(distances, [tolerance, *closer], every, n=n, lr=lr, d=d, released=released)
            for x in found:
                x["pairs_in_a_gradient"], x["pairs_scored"] = evaluations(x["method"], n, 2)
                x["steps"] = (shown * every).tolist()
                curve = distances[x["method"]][:, shown].numpy()
                x["distance_quartiles"] = np.quantile(curve, (0.25, 0.5, 0.75), 0).tolist()
            numbers += found
            asked_by = "us" if lr < given else "paper"
            claims += convergence_claims(found, tolerance, f"{name}, {rule}", asked_by)
        line[0].set(ylabel=f"{rule}\ndistance")
        plain_ticks(line[0], (1, 2, 5))
        line[0].set_ylim(max(0.02, line[0].get_ylim()[0]), 8)  # the full batch goes on, to rounding errors
    for axis, title in zip(axes[0, ::2], ("to the ETF, d = 2N", "to the cross-polytope, d = N/2")):
        axis.set_title(title, loc="left")
    for axis, label in zip(axes[-1], ("steps", "pairs in a gradient or scored") * 2):
        axis.set(xscale="log", xlabel=label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return claims, numbers, figure


def convergence_claims(found: list[dict], tolerance: float, where: str, asked_by: str) -> list[dict]:
    """Who of a race comes to this distance before SGD, its first record."""
    cost = [x["pairs_in_a_gradient"] + x["pairs_scored"] for x in found]
    claims, form = [], "SGD's over its own > 1"
    for x, own in zip(found, cost):
        if x["method"] in CHOOSING:
            text = f"{METHODS[x['method']][0]} before SGD at distance {tolerance:g} to the {where}"
            lead = x["sgd_over_this"][tolerance]
            claims.append(claim(f"{text}, in steps", lead, ABOVE_1, form, asked_by))
            if not x["released"]:
                lead = tuple(cost[0] / own * y for y in lead)
                claims.append(claim(f"{text}, in pairs evaluated", lead, ABOVE_1, form, "us"))
    return claims


PLANES = [[x for x in range(8) if (x & a).bit_count() % 2 == c] for a in range(1, 8) for c in range(2)]
FAMILIES = {  # of batches of 8 samples, by B and name: the batches, colour and marker
    2: {"fixed disjoint": ([[i, i + 1] for i in range(0, 8, 2)], METHODS["fixed"][1], "s"),
        "cycle of pairs": ([sorted((i, (i + 1) % 8)) for i in range(8)], METHODS["ncb"][1], "o")},
    4: {"fixed disjoint": ([[0, 1, 2, 3], [4, 5, 6, 7]], METHODS["fixed"][1], "s"),
        "balanced design": (PLANES, COLOURS["refined"], "D")}}  # any three samples meet in one batch


def subsets(knobs: dict):
    """Full-batch loss where training on only some of the N choose B batches ends, above the ETF's; N = 8."""
    runs, steps, _, kind = setting(knobs, 16, 4000, 8, 1000)
    rng, tick = np.random.default_rng(knobs["seed"]), progress("subsets", 2 * steps, "steps")
    figure, axes = canvas(1, 2, 7.2, 2.8, sharey=True)
    claims, numbers = [], []
    for (b, families), axis in zip(FAMILIES.items(), axes[0]):
        batches = all_batches(8, b)
        every = len(batches)
        sizes = sorted({round(x) for x in np.linspace(8 // b, every, 28 if b == 2 else 24)})
        # The families, and random subsets of each size, all runs at once: a weight for each batch, or 0.
        taken = {name: np.tile([batch in family for batch in batches.tolist()], (runs, 1))
                 for name, (family, *_) in families.items()}
        taken |= {size: rng.permuted(np.tile(np.arange(every) < size, (runs, 1)), axis=1) for size in sizes}
        weights = np.concatenate([x / x.sum(1, keepdims=True) for x in taken.values()])
        weights, batches = torch.from_numpy(weights).to(**kind), batches.to(kind["device"])
        u, v = (x.repeat(len(taken), 1, 1) for x in start(runs, 8, 16, knobs["seed"], **kind))
        for step in range(steps):
            descend(u, v, batches, knobs["lr"], weights=weights)
            tick(steps * (b == 4) + step + 1)
        gaps = dict(zip(taken, (infonce(u, v) - etf_loss(8)).cpu().numpy().reshape(-1, runs)))
        numbers += [{"batch_size": b, "family": name, "batches": int(taken[name][0].sum()), "of": every,
                     "gap": gap.tolist()} for name, gap in gaps.items()]
        band(axis, 100 * np.array(sizes) / every, np.array([gaps[size] for size in sizes]).T, "random subset",
             COLOURS["random"])
        for name, (family, colour, marker) in families.items():
            axis.plot(100 * len(family) / every, np.median(gaps[name]), marker, color=colour, label=name,
                      clip_on=False)
        axis.set(xlabel=f"share of the {every} batches of {b} (%)", xlim=(0, 102))
        axis.set_yscale("symlog", linthresh=1e-4)
        axis.set_ylim(-2e-5, 1)
        axis.legend(loc="center left", bbox_to_anchor=(0.1, 0.4))
        claims += subset_claims(b, every, gaps)
    axes[0, 0].set_ylabel("full-batch loss above the ETF's")
    return claims, numbers, figure


def subset_claims(b: int, every: int, gaps: dict) -> list[dict]:
    """Of the gaps [R] where training on a family, or on random subsets of a size, ends."""
    sizes = [size for size in gaps if size not in FAMILIES[b]]
    closed = min((size for size in sizes if gaps[size].max() < 1e-5), default=every)
    claims = [claim(f"B = {b}: all {every} batches end at the full batch's optimum", np.abs(gaps[every]),
                    (0, 1e-5), "gap <= 1e-5"),
              claim(f"B = {b}: a random subset closes the gap only when it is all of them", closed / every,
                    (1, 1), "smallest share at which every run's gap is below 1e-5")]
    for name, (family, *_) in FAMILIES[b].items():
        text = f"B = {b}: {name}, {len(family)} of {every} batches, ends"
        if name == "balanced design":  # what is not guaranteed may happen
            claims.append(claim(f"{text} at the full batch's optimum too: some strict subsets suffice",
                                gaps[name], (-1e-5, 1e-5), "gap <= 1e-5", "us"))
        else:
            claims.append(claim(f"{text} above it", gaps[name], (1e-3, inf), "gap >= 1e-3"))
    return claims


def load_pairs(file: str) -> list[tuple[str, Tensor, Tensor]]:
    """Name, u and v [n, d] of all arrays NAME_u and NAME_v (or u and v) in an .npz file. Raises Stop."""
    try:
        with np.load(file) as arrays:
            names = [x[:-1] for x in arrays if x.endswith("u") and x[:-1] + "v" in arrays]
            pairs = [[torch.from_numpy(arrays[name + x].astype(np.float32)) for x in "uv"] for name in names]
            if not pairs or any(u.shape != v.shape or u.ndim != 2 or len(u) < 64 for u, v in pairs):
                raise ValueError(f"it holds {', '.join(f'{name} {arrays[name].shape}' for name in arrays)}")
            if not all(x.isfinite().all() for x in sum(pairs, [])):
                raise ValueError("it holds NaN or infinity")
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        what = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise Stop(f"--embeddings {file}: {what}; give an .npz file with arrays NAME_u and NAME_v [n, d], "
                   "n >= 64, of finite numbers") from None
    return [(name.strip("_") or "file", u, v) for name, (u, v) in zip(names, pairs)]


def histograms(knobs: dict):
    """Losses of mini-batches, random and chosen, along training on random ones; and of a file's."""
    runs, epochs, generator, kind = setting(knobs, 8, 64, 8, 16)
    n, b, before = 256, 8, 0
    pairs = load_pairs(knobs["embeddings"]) if knobs["embeddings"] else []
    u, v = start(runs, n, 32, knobs["seed"], **kind)
    sets = []
    for now in sorted({0, max(1, epochs // 16), max(1, epochs // 4), epochs}):
        if now:
            train("sgd", u, v, b, (now - before) * (n // b), knobs["lr"], generator, every=n)
        title = f"after {now} epoch{'s' * (now > 1)}" if now else "before training"
        sets.append((title, list(zip(u.cpu().clone(), v.cpu().clone())), b, 1.0, "infonce"))
        before = now
    sets += [(name, list(zip(u.split(1280), v.split(1280))), 32, 0.1, "nt_xent") for name, u, v in pairs]
    figure, axes = canvas(-(-len(sets) // 2), 2, 7.2, 2.1 * -(-len(sets) // 2))
    claims, numbers, tick = [], [], progress("histograms", len(sets), "sets of embeddings")
    for (title, groups, size, temperature, loss), axis in zip(sets, axes.flat):
        found = {"sgd": [], "spectral": [], "refined": []}
        for x, y in groups:
            order = torch.randperm(len(x), generator=generator)
            x, y, k = x[order], y[order], len(x) // size
            for method, losses in found.items():
                batches = torch.arange(k * size).view(k, size) if method == "sgd" else \
                    spectral_batches(x, y, size, k, temperature, generator, method == "refined")
                losses.append(batch_losses(x, y, batches, temperature, loss).numpy())
        edges = np.histogram_bin_edges(np.concatenate(sum(found.values(), [])), 40)
        for method, losses in found.items():
            label, colour = METHODS[method]
            axis.hist(np.concatenate(losses), edges, density=True, histtype="stepfilled", label=label,
                      facecolor=(colour, 0.25), edgecolor=colour)
        axis.set(title=title, xlabel=f"loss of a mini-batch of {size}", ylabel="density")
        numbers.append({"set": title} | {method: [x.tolist() for x in own] for method, own in found.items()})
        mean = {method: np.array([x.mean() for x in losses]) for method, losses in found.items()}
        for better, worse, asked_by in (("spectral", "sgd", "paper"), ("refined", "spectral", "us")):
            text = f"{title}: {METHODS[better][0]} batches harder than {METHODS[worse][0]}'s"
            claims.append(claim(text, mean[better] - mean[worse], (0, inf), "difference of mean losses > 0",
                                asked_by))
        tick(len(numbers))
    for axis in axes.flat[len(sets):]:
        axis.remove()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return claims, numbers, figure


def temperature(knobs: dict):
    """Does the lead of chosen batches grow or vanish as the temperature falls? N = 8, B = 2, d = 16."""
    runs, steps, generator, kind = setting(knobs, 32, 750, 8, 250)
    temperatures, methods = (1.0, 0.5, 0.2, 0.1), ("sgd", *CHOOSING)
    figure, axes = canvas(1, 2, 7.2, 3.2, sharey=True)
    claims, numbers, tick = [], [], progress("temperature", 2 * len(temperatures), "temperatures")
    for axis, falling in zip(axes[0], (False, True)):
        curves = {t: {} for t in temperatures}
        for t, method in itertools.product(temperatures, methods):
            u, v = start(runs, 8, 16, knobs["seed"], **kind)
            lr = knobs["lr"] * (t if falling else 1)
            curves[t][method] = train(method, u, v, 2, steps, lr, generator, t).cpu() / etf(8).norm()
            tick(falling * len(curves) + temperatures.index(t))
        title = f"step size {knobs['lr']:g}" + " x temperature" * falling
        found = lead_against(axis, "temperature", curves, dict.fromkeys(curves, 1), title)
        claims += found[0]
        numbers += found[1]
    axes[0, 0].set_ylabel("SGD's steps / own")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return claims, numbers, figure


def scaling(knobs: dict):
    """Does the lead of chosen batches grow with N? B = 2 and 8, d = 2N, k and q fixed parts of N."""
    runs, epochs, generator, kind = setting(knobs, 8, 60, 4, 20)
    figure, axes = canvas(1, 2, 7.2, 3.2, sharey=True)
    claims, numbers = [], []
    for axis, b in zip(axes[0], (2, 8)):
        sizes = [n for n in (8, 16, 32, 64, 128, 256) if b < n <= (64 if knobs["quick"] else 256)]
        curves, every = {n: {} for n in sizes}, {n: max(1, n // b // 16) for n in sizes}
        tick = progress(f"scaling, B = {b}", sum(n ** 2 for n in sizes))  # about the time that a size takes
        for n, method in itertools.product(sizes, ("sgd", "osgd", "spectral")):
            u, v = start(runs, n, 2 * n, knobs["seed"], **kind)
            distances = train(method, u, v, b, epochs * (n // b), knobs["lr"], generator, every=every[n])
            curves[n][method] = distances.cpu() / etf(n).norm()
            tick(sum(x ** 2 for x in sizes if x < n) + n ** 2 * len(curves[n]) / 3)
        found = lead_against(axis, "N", curves, every, f"B = {b}")
        claims += found[0]
        numbers += found[1]
    axes[0, 0].set_ylabel("SGD's steps / own")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return claims, numbers, figure


def lead_against(axis, label: str, curves: dict, every: dict, title: str) -> tuple[list[dict], list[dict]]:
    """Claims and numbers of how many times the steps of a method SGD takes, drawn against the keys of curves.

    curves[x][method]: relative distances [R, T], taken at each every[x]-th step.
    """
    tolerance = nearest([distances["sgd"] for distances in curves.values()], 0.05)
    found, claims, keys = [], [], list(curves)
    for x, distances in curves.items():
        found.append(race(distances, [tolerance], every[x], **{label: x}, setting=title))
        for record in found[-1]:
            record["last_relative_distance"] = distances[record["method"]][:, -1].tolist()
    for i, records in enumerate(zip(*(x[1:] for x in found))):  # of one method, at every x
        name, colour = METHODS[records[0]["method"]]
        leads = np.array([x["sgd_over_this"][tolerance] for x in records])
        middle, low, high = np.where(np.isfinite(leads) & (leads > 0), leads, np.nan).T
        whiskers = np.nan_to_num((middle - low, high - middle))
        axis.errorbar(np.array(keys) * 1.03 ** (i - 1.5), middle, whiskers, color=colour, marker="o",
                      markersize=3, label=name)
        text = f"{name}, {title}: lead over SGD at least as large at {label} {keys[-1]:g} as at {keys[0]:g}"
        claims.append(growth(text, leads[0], leads[-1], f"in steps to relative distance {tolerance:g}", "us"))
    axis.axhline(1, color="black", linewidth=0.6, linestyle=":")
    axis.set(title=f"{title}, to relative distance {tolerance:g}", xlabel=label, xscale="log", xticks=keys,
             xticklabels=keys)
    axis.minorticks_off()
    plain_ticks(axis, (1, 1.5, 2, 3, 5))
    return claims, sum(found, [])


EXPERIMENTS = {f.__name__: f for f in (toy, angle, optima, convergence, subsets, histograms, temperature,
                                       scaling)}
TOO_LARGE = "temperature", "scaling"  # for --quick: at its size they settle nothing


# ------------------------------------------------------------------------------------------ the command
def run(name: str, knobs: dict, out: Path) -> None:
    """One experiment: its figures and its record in the folder `out`, its claims on the terminal."""
    began = time.perf_counter()
    claims, numbers, figure = EXPERIMENTS[name](knobs)
    cli.save_figure(figure, out / name)
    record = {"experiment": name, "about": EXPERIMENTS[name].__doc__, "knobs": knobs,
              **cli.provenance(torch.device(knobs["device"])), "seconds": time.perf_counter() - began,
              "claims": claims, "numbers": numbers}
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)  # null for NaN and infinity
    cli.write_atomically(out / f"{name}.json", json.dumps(finite).encode())
    print(f"== {name}: {record['about']}")
    for c in claims:
        value, low, high = map(digits, (c["measured"], *c["interval"]))
        print(f"{c['verdict']:<14} {c['claim']}: {value} [{low}, {high}]; {c['form']}", flush=True)


def main(argv: list[str]) -> None:
    knobs, _ = cli.parse(argv, __doc__, KNOBS, {})
    knobs["device"] = str(cli.pick_device(knobs["device"]))
    torch.set_num_threads(1)  # of tensors this small a second thread makes a step many times slower
    out = cli.expand(knobs["out"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Stop(f"--out {out}: {error.strerror}; give a folder that can be written") from None
    every = [name for name in EXPERIMENTS if not (knobs["quick"] and name in TOO_LARGE)]
    for name in every if knobs["experiment"] == "all" else [knobs["experiment"]]:
        try:
            run(name, knobs, out)
        except ValueError as error:  # of a sampler: NaN, from a step that is too large
            raise Stop(f"{name}: {error}") from None


if __name__ == "__main__":
    sys.exit(cli.run(main, "synthetic.py"))
