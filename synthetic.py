"""The paper's theory on synthetic embeddings, checked and drawn: where mini-batches lead, how fast.

    python synthetic.py                             # every experiment: some minutes
    python synthetic.py --quick                     # smaller, without what settles nothing then: a minute
    python synthetic.py --experiment toy --out DIR  # or another of EXPERIMENTS, at the end of this file
    python synthetic.py --experiment histograms --embeddings FILE.npz  # also of arrays NAME_u, NAME_v [n, d]

Each writes NAME.json, NAME.png and NAME.pdf, and prints a line per claim: the verdict, which follows from the
numbers alone, the claim, what was measured, its 95 % bootstrap interval over runs, the closed form or bound.
"""
import itertools
import json
import math
import sys
import time
from math import inf
from pathlib import Path

import numpy as np
import torch

import cli
from bench import read_pairs
from cli import COLOURS, canvas, progress
from model import infonce
from samplers import all_batches, batch_losses, spectral_batches
from theory import (METHODS, claim, descend, digits, directions, evaluations, first_steps, growth, interval,
                    least_matching, nearest, optimum, schedule, speedup, start, toy_curves, train)

KNOBS = {
    "experiment": ("all", ("all", "toy", "angle", "optima", "convergence", "subsets", "histograms",
                           "temperature", "scaling"), "which experiment to run"),
    "out": ("results/synthetic", str, "folder of the results"),
    "seeds": (None, "int >= 2 <= 100000", "runs from different starts, all at once (default: 8 to 2,000)"),
    "steps": (None, "int >= 1", "gradient steps (default: each experiment's own)"),
    "lr": (0.5, "float > 0 <= 100", "step size; toy and angle have their own"),
    "seed": (0, "int >= 0 < 4294967296", "fixes every number on one machine"),
    "float32": (False, bool, "compute in float32; without it float64"),
    "device": ("cpu", str, "cpu, cuda, or auto for CUDA where there is one"),
    "embeddings": (None, str, "histograms: also of a .npz, arrays NAME_u and NAME_v [n, d], n >= 64"),
    "quick": (False, bool, "fewer seeds and steps; leaves out temperature and scaling"),
}
ABOVE_1 = math.nextafter(1, 2), inf  # an interval that ends at 1 does not lie in it
CHOOSING = "osgd-direct", "osgd-replacement", "osgd", "spectral"  # those that look before they step


def band(axis, x, values, label: str, colour: str) -> None:
    """Median and quartiles of values [R, T] against x [T]."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
    axis.plot(x, middle, color=colour, label=label)
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


# ------------------------------------------------------------------------------------------ experiments
# Each returns its claims, its numbers (for the .json) and its figure. knobs["kind"]: dtype and device.
def toy(runs, steps, generator, knobs):
    """Four samples in the plane: steps to the optimum of OSGD, and of SGD, a random variable."""
    tolerances = {0.1: "-", 0.01: "--", 1e-3: ":", 1e-4: "-."}  # and their lines
    figure, axes = canvas(2, 3, 7.2, 4.6)
    claims, numbers, form = [], [], "mean T_SGD / T_OSGD"
    for line, (lr, shown, asked_by, wide, narrow) in zip(axes, ((0.5, 60, "paper", 0.01, 1e-3),
                                                                (0.1, 150, "us", 0.1, 0.01))):
        leads = {}
        for method in ("osgd-direct", "sgd-replacement", "sgd"):
            label, colour = METHODS[method]
            many = 1 if method == "osgd-direct" else runs
            path = toy_curves(method, many, steps, lr, min(tolerances), generator, shown, **knobs["kind"])
            for axis, x in zip(line, path[..., :shown + 1].numpy()):
                band(axis, np.arange(x.shape[1]), x, label, colour)
            first = {t: first_steps(path[1], t) for t in tolerances}
            numbers += [{"lr": lr, "method": method, "tolerance": t, "steps": x.tolist()}
                        for t, x in first.items()]
            if many == 1:
                certain = {t: x[0] for t, x in first.items()}
                continue
            for t, x in first.items():
                # Runs that have not arrived count as `steps`: a lower bound. 0 where OSGD does not arrive.
                lead = leads[method, t] = interval(np.minimum(x, steps) / certain[t])
                line[2].plot(np.sort(x), np.linspace(0, 100, len(x)), tolerances[t], color=colour,
                             label=f"{t:g}" if method == "sgd" else None)
                text = f"step size {lr:g}, to {t:g}: OSGD needs fewer steps than {label} (OSGD "
                text += f"{digits(certain[t])}; {np.isfinite(x).mean():.1%} of its runs arrive)"
                claims.append(claim(text, lead, ABOVE_1, f"{form} > 1", asked_by))
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


def angle(runs, steps, generator, knobs):
    """Losses as u_1 turns, the others on a decagon: other values, same minimiser; N = 10, B = 2, d = 2."""
    degrees, order = torch.arange(-180, 180.25, 0.25, **knobs["kind"]), torch.arange(10)
    v = directions(torch.arange(10, **knobs["kind"]) * 36).repeat(len(degrees), 1, 1)
    u = torch.cat([directions(degrees)[:, None], v[:, 1:]], 1)
    figure, (axes,) = canvas(1, 3, 7.2, 2.3)
    losses, least = {}, {}
    for axis, method, title, batches in zip(
            axes, ("full", "ncb", "fixed"), ("full batch of 10", "mean over all 45 batches of 2",
                                             "mean over 5 fixed batches of 2"),
            (order[None], all_batches(10, 2), order.view(5, 2))):
        losses[method] = infonce(u[:, batches], v[:, batches]).mean(1).cpu()
        least[method] = degrees[losses[method].argmin()].item()
        axis.plot(degrees.cpu(), losses[method].numpy(), color=METHODS[method][1])
        axis.axvline(least[method], color="black", linewidth=0.6, linestyle=":")
        axis.set(title=title, xlabel="angle of $u_1$ (degrees)", xticks=range(-180, 181, 90))
    axes[0].set_ylabel("loss (dotted: its minimum)")
    claims = [claim("the full batch and all batches of 2 have the same minimiser",
                    abs(least["full"] - least["ncb"]), (0, 0.25),
                    "angle between their minima in degrees <= 0.25, the grid's step"),
              claim("the full batch's loss has other values than the mean of all batches of 2",
                    (losses["full"] - losses["ncb"]).min().item(), (0.1, inf), "least difference >= 0.1"),
              claim("fixed disjoint batches have another minimiser", abs(least["full"] - least["fixed"]),
                    (1, inf), "angle to the full batch's in degrees >= 1")]
    return claims, [{"degrees": degrees.tolist()} | {m: x.tolist() for m, x in losses.items()}], figure


def optima(runs, steps, generator, knobs):
    """Where each method ends: U V^T beside the optimum's, its relative distance and full-batch loss."""
    sizes = [(n, b, ratio) for ratio in (2, 0.5) for n in (4, 8, 16)[:3 - knobs["quick"]] for b in (2, 4)]
    figure, axes = canvas(len(sizes), len(METHODS) + 1, 7.2, 0.64 * len(sizes) + 0.9)
    tick, numbers = progress("optima", len(sizes) * len(METHODS), "trainings"), []
    look = {"vmin": -1, "vmax": 1, "cmap": "RdBu_r"}
    for (n, b, ratio), line in zip(sizes, axes):
        d, pairs = int(ratio * n), torch.arange(n).view(-1, 2)
        target, least = optimum(n, d)
        for method, axis in zip(METHODS, line[1:]):
            u, v, _ = start(runs, n, d, knobs["seed"], **knobs["kind"])
            # Without noise all it takes is time. All batches together pull a pair (B-1)/(N-1) times as hard
            # as the full batch does.
            own_steps = steps * {"full": 5, "ncb": 3}.get(method, 1)
            lr = knobs["lr"] * (n - 1) / (b - 1) if method == "ncb" else knobs["lr"]
            far = train(method, u, v, b, own_steps, lr, generator, every=own_steps,
                        tick=lambda share: tick(len(numbers) + share))[:, -1] / target.norm()
            own = infonce(u[:, pairs], v[:, pairs]).mean(1) - 2 * math.log1p(math.exp(-2))
            numbers.append({"n": n, "batch_size": b, "d": d, "method": method,
                            "relative_distance": far.tolist(),
                            "above_optimum": (infonce(u, v) - least).tolist(),
                            "pairs_above_own_optimum": own.tolist()})
            s, order = (u[0] @ v[0].T).cpu(), torch.arange(n)
            if ratio < 2:  # one of each opposite pair, then their partners
                cost = (s + s.T)[None].requires_grad_()
                order = torch.autograd.grad(least_matching(cost).sum(), cost)[0][0].nonzero().T.flatten()
            axis.imshow(s[order][:, order].numpy(), **look)
        picture = line[0].imshow(target.numpy(), **look)
        line[0].set_ylabel(f"N={n} B={b}\nd={d}", rotation=0, ha="right", va="center")
    for axis, label in zip(axes[0], ["optimum"] + [METHODS[method][0] for method in METHODS]):
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
    far = {method: runs_of(method, "relative_distance") for method in METHODS}
    own = np.abs(runs_of("fixed", "pairs_above_own_optimum", 2))
    claims = []
    for method in ("full", "ncb"):
        label, above = METHODS[method][0], np.abs(runs_of(method, "above_optimum"))
        claims += [claim(f"{label}: ends at the {name}", far[method].max(0), (0, 0.05),
                         "relative distance <= 0.05 at every N, B"),
                   claim(f"{label}: ends at the loss of the {name}", above.max(0), (0, 1e-4),
                         f"{form} to 1e-4")]
    label = METHODS["fixed"][0]
    claims += [claim(f"{label}: stays away from the {name}", far["fixed"].min(0), (0.2, inf),
                     "relative distance >= 0.2 at every N, B"),
               claim(f"{label}: the full-batch loss is worse than at the {name}",
                     runs_of("fixed", "above_optimum").min(0), (0.01, inf), "by >= 0.01 at every N, B"),
               claim(f"{label}, B = 2, {name[name.index('d ='):]}: each batch at its own optimum", own.max(0),
                     (0, 1e-3), "2 log(1 + e^-2) to 1e-3", "us")]
    return claims + [
        claim(f"{METHODS[method][0]}: nearer to the {name}, than {METHODS['sgd'][0]}",
              (far[method] - far["sgd"]).mean(0), (-inf, 0),
              f"relative distances, {far[method].mean():.2f} - {far['sgd'].mean():.2f} < 0")
        for method in CHOOSING]


def convergence(runs, steps, generator, knobs):
    """Distance to the optimum against steps and pairs evaluated; B = 2, N = 8, and 4 and 16 as released."""
    given = knobs["lr"]
    rows = (8, given, False), (8, given / 10, False), *((n, given, True) for n in (4, 8, 16))  # released?
    methods = sorted(METHODS, key="sgd".__ne__)  # SGD first, whom the others race
    figure, axes = canvas(len(rows), 4, 9.6, 9.0, sharex="col", sharey="row")
    claims, numbers, form = [], [], "SGD's over its own > 1"
    tick = progress("convergence", 2 * len(rows) * len(methods), "trainings")
    for line, (n, lr, released) in zip(axes, rows):
        rule = f"N = {n}, " + ("released dynamics" if released else f"step size {lr:g}")
        own_steps, every = max(4, steps * n // 8), 4 if n > 8 else 1
        shown = np.unique(np.geomspace(1, own_steps // every, 80).astype(int))
        for name, d, pair in (("ETF", 2 * n, line[:2]), ("cross-polytope", n // 2, line[2:])):
            for method in methods:
                u, v, lengths = start(runs, n, d, knobs["seed"], **knobs["kind"])
                distances = train(method, u, v, 2, own_steps, lr, generator, 1.0, every,
                                  lengths if released else None, lambda share: tick(len(numbers) + share))
                costs = 1, evaluations(method, n, 2)
                for axis, cost in zip(pair, costs):
                    band(axis, shown * every * cost, distances[:, shown], *METHODS[method])
                if method == "sgd":
                    tolerance, sgd, cost_of_sgd = nearest(distances, 0.1), distances, costs[1]
                lead = speedup(sgd, distances, tolerance)
                numbers.append({"n": n, "lr": lr, "d": d, "released": released, "method": method,
                                "tolerance": tolerance, "sgd_over_this": lead})
                if method not in CHOOSING:
                    continue
                text = f"{METHODS[method][0]} before SGD at distance {tolerance:g} to the {name}, {rule}, in "
                asked_by = "us" if lr < given else "paper"
                claims.append(claim(text + "steps", lead, ABOVE_1, form, asked_by))
                if not released:
                    lead = tuple(cost_of_sgd / costs[1] * x for x in lead)
                    claims.append(claim(text + "pairs evaluated", lead, ABOVE_1, form, "us"))
        line[0].set(ylabel=f"{rule}\ndistance")
        line[0].set_yscale("log")
        line[0].set_ylim(max(0.02, line[0].get_ylim()[0]), 8)  # the full batch goes on, to rounding errors
    for axis, title in zip(axes[0, ::2], ("to the ETF, d = 2N", "to the cross-polytope, d = N/2")):
        axis.set_title(title, loc="left")
    for axis, label in zip(axes[-1], ("steps", "pairs in a gradient or scored") * 2):
        axis.set(xscale="log", xlabel=label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return claims, numbers, figure


PLANES = [[x for x in range(8) if (x & a).bit_count() % 2 == c] for a in range(1, 8) for c in range(2)]
FAMILIES = {  # of batches of 8 samples, by B; any three samples meet in one batch of the balanced design
    2: {"fixed disjoint": [[i, i + 1] for i in range(0, 8, 2)],
        "cycle of pairs": [[i, (i + 1) % 8] for i in range(8)]},
    4: {"fixed disjoint": [[0, 1, 2, 3], [4, 5, 6, 7]], "balanced design": PLANES}}


def subsets(runs, steps, generator, knobs):
    """Full-batch loss where training on only some of the N choose B batches ends, above the ETF's; N = 8."""
    rng = np.random.default_rng(knobs["seed"])
    figure, axes = canvas(1, 2, 7.2, 2.8, sharey=True)
    claims, numbers = [], []
    for (b, families), axis in zip(FAMILIES.items(), axes[0]):
        batches = all_batches(8, b)
        every = len(batches)
        sizes = sorted({round(x) for x in np.linspace(8 // b, every, 28 if b == 2 else 24)})
        taken = {name: torch.tensor(family) for name, family in families.items()}
        for size in sizes:  # another random subset for each run
            mask = rng.permuted(np.tile(np.arange(every) < size, (runs, 1)), axis=1)
            taken[size] = batches[mask.nonzero()[1].reshape(runs, size)]
        gaps, tick = {}, progress(f"subsets, B = {b}", len(taken), "subsets")
        for name, own in taken.items():
            u, v, _ = start(runs, 8, 16, knobs["seed"], **knobs["kind"])
            for step in range(steps):
                descend(u, v, own, knobs["lr"])
                tick(len(gaps) + (step + 1) / steps)
            gaps[name] = (infonce(u, v) - optimum(8, 16)[1]).cpu().numpy()
            numbers.append({"batch_size": b, "family": name, "of": every, "gap": gaps[name].tolist()})
        band(axis, 100 * np.array(sizes) / every, np.transpose([gaps[size] for size in sizes]),
             "random subset", COLOURS["random"])
        closed = min((size for size in sizes if gaps[size].max() < 1e-5), default=every)
        claims += [claim(f"B = {b}: all {every} batches end at the full batch's optimum", np.abs(gaps[every]),
                         (0, 1e-5), "gap <= 1e-5"),
                   claim(f"B = {b}: a random subset closes the gap only when it is all of them",
                         closed / every, (1, 1), "smallest share at which every run's gap is below 1e-5")]
        for (name, family), method, marker in zip(families.items(), ("fixed", "ncb"), "so"):
            axis.plot(100 * len(family) / every, np.median(gaps[name]), marker, color=METHODS[method][1],
                      label=name, clip_on=False)
            text = f"B = {b}: {name}, {len(family)} of {every} batches, ends"
            claims.append(
                claim(f"{text} at the full batch's optimum too: some strict subsets suffice", gaps[name],
                      (-1e-5, 1e-5), "gap <= 1e-5", "us") if name == "balanced design" else
                claim(f"{text} above it", gaps[name], (1e-3, inf), "gap >= 1e-3"))
        axis.set(xlabel=f"share of the {every} batches of {b} (%)", xlim=(0, 102))
        axis.set_yscale("symlog", linthresh=1e-4)
        axis.set_ylim(-2e-5, 1)
        axis.legend(loc="center left", bbox_to_anchor=(0.1, 0.4))
    axes[0, 0].set_ylabel("full-batch loss above the ETF's")
    return claims, numbers, figure


def histograms(runs, epochs, generator, knobs):
    """Losses of mini-batches, random and chosen, along training on random ones, and of embeddings given."""
    n, before, sets = 256, 0, []
    u, v, _ = start(runs, n, 32, knobs["seed"], **knobs["kind"])
    for now in sorted({0, max(1, epochs // 16), max(1, epochs // 4), epochs}):
        for batches in itertools.islice(schedule("sgd", u, v, 8, 1.0, generator), (now - before) * (n // 8)):
            descend(u, v, batches, knobs["lr"])
        sets.append((f"after {now} epochs", list(zip(u.clone(), v.clone())), 8, 1.0, "infonce"))
        before = now
    for name, pairs in knobs["pairs"].items():  # as trained on: in windows of 40 batches of 32
        m = min(1280, len(pairs[0]))
        windows = list(zip(*(x[:len(x) // m * m].to(u.device).split(m) for x in pairs[:2])))
        sets.append((name, windows, 32, 0.1, "nt_xent"))
    figure, axes = canvas(-(-len(sets) // 2), 2, 7.2, 2.1 * -(-len(sets) // 2))
    claims, numbers, tick = [], [], progress("histograms", len(sets), "sets of embeddings")
    for (title, windows, b, t, loss), axis in zip(sets, axes.flat):
        losses = {"random": [], "spectral": [], "refined": []}  # [R, n / b] each
        for i, (x, y) in enumerate(windows):
            order = torch.randperm(len(x), generator=generator)[:len(x) // b * b].to(x.device)
            x, y, shuffled = x[order], y[order], torch.arange(len(order)).view(-1, b)
            for method, own in losses.items():
                batches = shuffled if method == "random" else \
                    spectral_batches(x, y, b, len(shuffled), t, generator, method == "refined")
                own.append(batch_losses(x, y, batches, t, loss).cpu().numpy())
            tick(len(numbers) + (i + 1) / len(windows))
        edges = np.histogram_bin_edges(list(losses.values()), 40)
        for method, own in losses.items():
            axis.hist(np.ravel(own), edges, density=True, histtype="stepfilled", label=method,
                      facecolor=(COLOURS[method], 0.25), edgecolor=COLOURS[method])
        axis.set(title=title, xlabel=f"loss of a mini-batch of {b}", ylabel="density")
        mean = {method: np.mean(own, 1) for method, own in losses.items()}
        numbers.append({"set": title} | {method: x.tolist() for method, x in mean.items()})
        for better, worse, asked_by in (("spectral", "random", "paper"), ("refined", "spectral", "us")):
            claims.append(claim(f"{title}: {better} batches harder than {worse} ones",
                                mean[better] - mean[worse], (0, inf), "difference of mean losses > 0",
                                asked_by))
    for axis in axes.flat[len(sets):]:
        axis.remove()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return claims, numbers, figure


def temperature(runs, steps, generator, knobs):
    """Does the lead of chosen batches last as temperature and step size fall together? N = 8, B = 2."""
    settings = {t: (8, steps, knobs["lr"] * t, t) for t in (1.0, 0.5, 0.2, 0.1)}
    return lead_against("temperature", settings, CHOOSING, runs, generator, knobs)


def scaling(runs, epochs, generator, knobs):
    """Does the lead of chosen batches grow with N? B = 2, d = 2N, k and q fixed parts of N."""
    settings = {n: (n, epochs * n // 2, knobs["lr"], 1.0)
                for n in (8, 16, 32, 64, 128, 256)[:4 if knobs["quick"] else 6]}
    return lead_against("N", settings, ("osgd", "spectral"), runs, generator, knobs)


def lead_against(label: str, settings: dict, methods: tuple, runs: int, generator, knobs: dict):
    """How many times the steps of a method SGD takes to the nearest distance that it reaches in all settings:
    the number on the x axis -> N, steps, step size, temperature."""
    curves, tick = {}, progress(label, len(settings) * (1 + len(methods)), "trainings")
    for (x, (n, steps, lr, t)), method in itertools.product(settings.items(), ("sgd", *methods)):
        u, v, _ = start(runs, n, 2 * n, knobs["seed"], **knobs["kind"])
        far = train(method, u, v, 2, steps, lr, generator, t, every=max(1, n // 32),
                    tick=lambda share: tick(len(curves) + share))
        curves[x, method] = far / optimum(n, 2 * n)[0].norm()
    figure, ((axis,),) = canvas(1, 1, 4.8, 3.2)
    claims, numbers, (least, *_, last) = [], [], settings
    tolerance = max(nearest(curves[x, "sgd"], 0.05) for x in settings)
    for method in methods:
        name, colour = METHODS[method]
        leads = {x: speedup(curves[x, "sgd"], curves[x, method], tolerance) for x in settings}
        numbers += [{label: x, "method": method, "tolerance": tolerance, "sgd_over_this": lead}
                    for x, lead in leads.items()]
        middle, low, high = np.transpose(list(leads.values()))
        axis.plot(list(leads), middle, "o-", color=colour, label=name)
        axis.fill_between(list(leads), low, high, color=colour, alpha=0.2, linewidth=0)
        claims.append(growth(f"{name}: lead over SGD at least as large at {label} {last:g} as at {least:g}",
                             leads[least], leads[last], f"in steps to relative distance {tolerance:g}", "us"))
    axis.axhline(1, color="black", linewidth=0.6, linestyle=":")
    axis.set(xlabel=label, ylabel=f"SGD's steps / own, to {tolerance:g}", xscale="log", yscale="log")
    axis.legend()
    return claims, numbers, figure


EXPERIMENTS = {  # and seeds, steps (histograms, scaling: epochs); with --quick
    "toy": (toy, (2000, 5000), (1000, 2000)), "angle": (angle, (1, 1), (1, 1)),
    "optima": (optima, (8, 1200), (8, 300)), "convergence": (convergence, (32, 1500), (24, 200)),
    "subsets": (subsets, (16, 4000), (8, 1000)), "histograms": (histograms, (8, 64), (8, 16)),
    "temperature": (temperature, (32, 750), (8, 250)), "scaling": (scaling, (8, 60), (4, 20))}


# ------------------------------------------------------------------------------------------ the command
def run(name: str, knobs: dict, out: Path) -> None:
    """One experiment: its figures and its record in the folder `out`, its claims on the terminal."""
    began = time.perf_counter()
    experiment, *sizes = EXPERIMENTS[name]
    runs, steps = sizes[knobs["quick"]]
    generator = torch.Generator().manual_seed(knobs["seed"])
    claims, numbers, figure = experiment(knobs["seeds"] or runs, knobs["steps"] or steps, generator, knobs)
    cli.save_figure(figure, out / name)
    record = {"experiment": name, "about": experiment.__doc__, "knobs": {x: knobs[x] for x in KNOBS},
              **cli.provenance(knobs["kind"]["device"]), "seconds": time.perf_counter() - began,
              "claims": claims, "numbers": numbers}
    finite = json.loads(json.dumps(record), parse_constant=lambda _: None)  # null for NaN and infinity
    cli.write_atomically(out / f"{name}.json", json.dumps(finite).encode())
    cli.say(f"== {name}: {record['about']}")
    for c in claims:
        value, low, high = map(digits, (c["measured"], *c["measured_interval"]))
        cli.say(f"{c['verdict']:<14} {c['claim']}: {value} [{low}, {high}]; {c['form']}")


def main(argv: list[str]) -> None:
    knobs, _ = cli.parse(argv, __doc__, KNOBS, {})
    knobs["kind"] = {"dtype": torch.float32 if knobs["float32"] else torch.float64,
                     "device": cli.pick_device(knobs["device"])}
    knobs["pairs"] = read_pairs(knobs["embeddings"], 64) if knobs["embeddings"] else {}
    torch.set_num_threads(1)  # of tensors this small a second thread makes a step many times slower
    out = cli.expand(knobs["out"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cli.Stop(f"--out {out}: {error.strerror}; give a folder that can be written") from None
    every = list(EXPERIMENTS)[:6 if knobs["quick"] else 8]  # at the size of --quick the others settle nothing
    for name in every if knobs["experiment"] == "all" else [knobs["experiment"]]:
        run(name, knobs, out)


if __name__ == "__main__":
    sys.exit(cli.run(main, "synthetic.py"))
