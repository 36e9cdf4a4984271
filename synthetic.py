"""The paper's theory on synthetic embeddings, checked and drawn: where training on mini-batches ends, and how fast.

    python synthetic.py                                # every experiment
    python synthetic.py --quick                        # the same, smaller: less than two minutes
    python synthetic.py --experiment toy --out DIR     # one of optima convergence subsets toy histograms temperature scaling

Each writes NAME.json (settings, numbers, verdicts), NAME.png and NAME.pdf, and prints a line per claim: the verdict, which
follows from the numbers alone, the claim, what was measured with its 95 % bootstrap interval over the runs, and the
closed form or bound. theory.py holds the closed forms, the gradient steps and the methods.
"""
import itertools
import json
import math
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from cli import Stop, parse, pick_device, provenance, write_atomically
from cli import COLOURS, canvas, save_figure as save
from model import infonce
from samplers import all_batches, batch_losses, spectral_batches
from theory import (METHODS, Matching, claim, cross_polytope, cross_polytope_loss, descend, etf, etf_loss, evaluations,
                    first_steps, growth, interval, schedule, speedup, start, table_of, train)

KNOBS = {
    "experiment": ("all", ("all", "optima", "convergence", "subsets", "toy", "histograms", "temperature", "scaling"),
                   "which experiment to run"),
    "out": ("results/synthetic", str, "folder of the results"),
    "seeds": (None, "int >= 2 <= 100000", "runs from different starts, all at once (default: each experiment's own, 8 to 2,000)"),
    "steps": (None, "int >= 1", "gradient steps (default: each experiment's own)"),
    "lr": (0.5, "float > 0", "step size"),
    "seed": (0, "int >= 0 < 4294967296", "fixes every number on one machine"),
    "float32": (False, bool, "compute in float32; without it float64"),
    "device": ("cpu", str, "cpu, cuda, or auto for CUDA where there is one"),
    "embeddings": (None, str, "histograms: also of the embeddings in this .npz file, arrays NAME_u and NAME_v [n, d]"),
    "quick": (False, bool, "fewer seeds and steps"),
}


def band(axis, x, values: np.ndarray, method: str, label: str | None = None) -> None:
    """Median and quartiles of values [R, T] against x [T]."""
    name, colour = METHODS[method]
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
    axis.plot(x, middle, color=colour, label=label or name)
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


# ------------------------------------------------------------------------------------------------- experiments
# Each takes the knobs and returns its claims, its numbers (for the .json), its figure, and lines of a table.
CHOOSING = "osgd-direct", "osgd-replacement", "osgd", "spectral"  # the paper's methods that look before they step


def setting(knobs: dict, seeds: int, steps: int, quick_seeds: int, quick_steps: int) -> tuple[int, int, Generator, dict]:
    """Runs, steps, generator, and dtype and device of the tensors."""
    quick = knobs["quick"]
    return (knobs["seeds"] or (quick_seeds if quick else seeds), knobs["steps"] or (quick_steps if quick else steps),
            torch.Generator().manual_seed(knobs["seed"]),
            {"dtype": torch.float32 if knobs["float32"] else torch.float64, "device": torch.device(knobs["device"])})


def optima(knobs: dict):
    """Where each method ends: U V^T beside the optimum's, its relative distance and full-batch loss."""
    runs, steps, generator, kind = setting(knobs, 8, 1200, 8, 300)
    methods = [method for method in METHODS if method != "refined"]
    rows = [(n, b, d) for d in (2, 0.5) for n in ((4, 8) if knobs["quick"] else (4, 8, 16)) for b in (2, 4)]
    figure, axes = canvas(len(rows), len(methods) + 1, 7.2, 0.64 * len(rows) + 0.9)
    numbers, claims = [], []
    away, above, own = ({ratio: {method: [] for method in methods} for ratio in (2, 0.5)} for _ in range(3))
    for (n, b, ratio), line in zip(rows, axes):
        d, pairs = int(ratio * n), torch.arange(n).view(-1, 2)
        matching = None if ratio == 2 else Matching(n)
        optimum, target = (etf_loss(n), etf(n)) if ratio == 2 else \
            (cross_polytope_loss(n), cross_polytope(torch.arange(n).roll(n // 2)).double())
        for method, axis in zip(methods, line[1:]):
            u, v = start(runs, n, d, knobs["seed"], **kind)
            # Without noise all it takes is time. All batches together pull a pair (B-1)/(N-1) times as hard as the full batch does.
            own_steps = steps * {"full": 5, "ncb": 3}.get(method, 1)
            lr = knobs["lr"] * (n - 1) / (b - 1) if method == "ncb" else knobs["lr"]
            relative = (train(method, u, v, b, own_steps, lr, generator, every=own_steps, matching=matching)[:, -1].cpu()
                        / target.norm()).numpy()
            loss = infonce(u, v).cpu().numpy()
            numbers.append({"n": n, "batch_size": b, "d": d, "method": method, "steps": own_steps, "lr": lr, "relative_distance": relative.tolist(),
                            "full_batch_loss": loss.tolist(), "optimum": optimum})
            if b < n:  # else every method is the full batch
                away[ratio][method].append(relative)
                above[ratio][method].append(loss - optimum)
                if b == 2:
                    own[ratio][method].append(infonce(u[:, pairs], v[:, pairs]).mean(1).cpu().numpy() - 2 * math.log1p(math.exp(-2)))
            u, v, order = u[0].cpu(), v[0].cpu(), torch.arange(n)
            if matching is not None:  # one of each opposite pair, then their partners
                partner = matching((u @ v.T + v @ u.T)[None])[0]
                ahead = order[order < partner]
                order = torch.cat([ahead, partner[ahead]])
            axis.imshow((u @ v.T)[order][:, order].numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        picture = line[0].imshow(target.numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        line[0].set_ylabel(f"N={n} B={b}\nd={d}", rotation=0, ha="right", va="center")
    for axis, label in zip(axes[0], ["optimum"] + [METHODS[method][0] for method in methods]):
        axis.set_title(label.replace(" with ", " with\n"), rotation=40, ha="left", x=0.2)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.colorbar(picture, ax=axes[:, -1], label="$u_i \\cdot v_j$", shrink=min(1, 3 / len(rows)))
    for ratio, name, form in ((2, "ETF, d = 2N", "2 log(1 + (N-1) e^(-N/(N-1)))"), (0.5, "cross-polytope, d = N/2", "2 log((e + 1/e + N - 2) / e)")):
        far, loss = ({method: np.array(x) for method, x in values[ratio].items()} for values in (away, above))
        for method in ("full", "ncb"):
            label = METHODS[method][0]
            claims += [claim(f"{label}: ends at the {name}", interval(far[method].max(0)), (0, 0.05), "relative distance <= 0.05 at every N, B"),
                       claim(f"{label}: ends at the loss of the {name}", interval(np.abs(loss[method]).max(0)), (0, 1e-4), f"{form} to 1e-4")]
        claims += [claim(f"{METHODS['fixed'][0]}: stays away from the {name}", interval(far["fixed"].min(0)), (0.2, math.inf),
                         "relative distance >= 0.2 at every N, B"),
                   claim(f"{METHODS['fixed'][0]}: the full-batch loss is worse than at the {name}", interval(loss["fixed"].min(0)), (0.01, math.inf),
                         "above L* by >= 0.01 at every N, B"),
                   claim(f"{METHODS['fixed'][0]}, B = 2, {name[name.index('d ='):]}: each batch at its own optimum",
                         interval(np.abs(own[ratio]["fixed"]).max(0)), (0, 1e-3), "2 log(1 + e^-2) to 1e-3")]
        claims += [claim(f"{METHODS[method][0]}: nearer to the {name}, than {METHODS['sgd'][0]}", interval((far[method] - far["sgd"]).mean(0)),
                         (-math.inf, 0), f"relative distances, {far[method].mean():.2f} - {far['sgd'].mean():.2f} < 0")
                   for method in CHOOSING]
        if ratio == 0.5:
            least = min(x.min() for x in loss.values())
            claims.append(claim(f"no run of any method ends below the loss of the {name}", (least, least, least), (-1e-6, math.inf), "L* - 1e-6"))
    return claims, numbers, figure, []


def convergence(knobs: dict):
    """Distance to the optimum against steps, against pairs in a gradient, and against all pairs evaluated; N = 8, B = 2."""
    runs, steps, generator, kind = setting(knobs, 32, 1500, 32, 200)
    n, b, tolerances = 8, 2, (3.0, 2.0, 1.0, 0.5, 0.2, 0.1)
    figure, axes = canvas(4, 3, 7.2, 7.6, sharex="col", sharey="row")
    claims, numbers, table = [], [], []
    for line, (lr, d) in zip(axes, itertools.product((knobs["lr"], knobs["lr"] / 10), (2 * n, n // 2))):
        matching, name = (None, "ETF") if d > n else (Matching(n), "cross-polytope")
        reached, ratios, lowest = {}, {}, 1.0
        for method in ("sgd", *(x for x in METHODS if x not in ("sgd", "refined"))):
            u, v = start(runs, n, d, knobs["seed"], **kind)
            distances = train(method, u, v, b, steps, lr, generator, matching=matching).cpu()
            gradient, scored = evaluations(method, n, b)
            shown = np.unique(np.geomspace(1, steps, 80).astype(int))
            curve = distances[:, shown].numpy()
            lowest = min(lowest, np.median(curve, 0).min())
            for axis, cost in zip(line, (1, gradient, gradient + scored)):
                band(axis, shown * cost, curve, method)
            reached[method] = [first_steps(distances, tolerance) for tolerance in tolerances]
            ratios[method] = [interval(np.stack(x, 1), speedup(steps)) for x in zip(reached["sgd"], reached[method])]
            numbers.append({"lr": lr, "d": d, "method": method, "pairs_in_a_gradient": gradient, "pairs_scored": scored,
                            "steps": shown.tolist(), "distance_quartiles": np.quantile(curve, (0.25, 0.5, 0.75), axis=0).tolist(),
                            "steps_to": {str(t): x.tolist() for t, x in zip(tolerances, reached[method])},
                            "sgd_over_this": {str(t): x for t, x in zip(tolerances, ratios[method])}})
        table += table_of(f"step size {lr:g}, {name}, d = {d}", reached, ratios, tolerances, steps)
        nearest = max((i for i, x in enumerate(reached["sgd"]) if np.isfinite(np.median(x))), default=None)
        for method in CHOOSING if nearest is not None else ():
            price = sum(evaluations("sgd", n, b)) / sum(evaluations(method, n, b))
            text = f"{METHODS[method][0]} before SGD at the nearest distance to the {name} that SGD reaches, {tolerances[nearest]:g}, step size {lr:g}"
            claims += [claim(f"{text}, in {unit}", tuple(factor * x for x in ratios[method][nearest]), (1, math.inf), "SGD's over its own > 1")
                       for unit, factor in (("steps", 1), ("pairs evaluated", price))]
        line[0].set(ylabel=f"distance to the {name}\nd = {d}, step size {lr:g}", yscale="log", ylim=(max(0.7 * lowest, 1e-2), 8))
    for axis, label in zip(axes[-1], ("steps", "pairs in a gradient", "pairs in a gradient or scored")):
        axis.set(xscale="log", xlabel=label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return claims, numbers, figure, table


def subsets(knobs: dict):
    """Full-batch loss where training on only some of the N choose B batches ends, above that of the ETF; N = 8."""
    runs, steps, _, kind = setting(knobs, 16, 4000, 8, 1000)
    n, rng = 8, np.random.default_rng(knobs["seed"])
    figure, axes = canvas(1, 2, 7.2, 2.8, sharey=True)
    claims, numbers = [], []
    planes = [[x for x in range(8) if (x & a).bit_count() % 2 == c] for a in range(1, 8) for c in range(2)]
    named = {2: {"fixed disjoint": [[i, i + 1] for i in range(0, n, 2)], "cycle of pairs": [sorted((i, (i + 1) % n)) for i in range(n)]},
             4: {"fixed disjoint": [[0, 1, 2, 3], [4, 5, 6, 7]], "balanced design": planes}}
    for (b, families), axis in zip(named.items(), axes[0]):
        batches = all_batches(n, b)
        every = batches.tolist()
        sizes = sorted({round(x) for x in np.linspace(n // b, len(every), 28 if b == 2 else 24)})
        # The families and the random subsets of each size, all runs at once: a weight for each batch, 0 where it is left out.
        weights, label = [], []
        for name, family in families.items():
            weights += [[(batch in family) / len(family) for batch in every]] * runs
            label += [name] * runs
        for size in sizes:
            for _ in range(runs):
                weights.append(np.isin(np.arange(len(every)), rng.permutation(len(every))[:size]) / size)
                label.append(size)
        weights = torch.tensor(np.array(weights)).to(**kind)
        u, v = (x[:runs].repeat(len(weights) // runs, 1, 1) for x in start(runs, n, 2 * n, knobs["seed"], **kind))
        for _ in range(steps):
            descend(u, v, batches.to(kind["device"]), knobs["lr"], weights=weights)
        gap = (infonce(u, v) - etf_loss(n)).cpu().numpy()
        gaps = {x: gap[[i for i, y in enumerate(label) if y == x]] for x in dict.fromkeys(label)}
        numbers += [{"batch_size": b, "family": x, "batches": x if isinstance(x, int) else len(families[x]), "of": len(every),
                     "gap": y.tolist()} for x, y in gaps.items()]
        share = [100 * size / len(every) for size in sizes]
        low, middle, high = np.quantile([gaps[size] for size in sizes], (0.25, 0.5, 0.75), axis=1)
        axis.plot(share, middle, color=COLOURS["random"], label="random subset")
        axis.fill_between(share, low, high, color=COLOURS["random"], alpha=0.2, linewidth=0)
        for name, colour, marker in (("fixed disjoint", METHODS["fixed"][1], "s"), ("cycle of pairs", METHODS["ncb"][1], "o"),
                                     ("balanced design", COLOURS["refined"], "D")):
            if name in families:
                axis.plot(100 * len(families[name]) / len(every), np.median(gaps[name]), marker, color=colour, label=name, clip_on=False)
        axis.set(xlabel=f"share of the {len(every)} batches, B = {b} (%)", yscale="symlog")
        axis.set_yscale("symlog", linthresh=1e-4)
        axis.set_ylim(-2e-5, 1)
        axis.legend(loc="center left", bbox_to_anchor=(0.1, 0.4))
        closed = [size for size in sizes if np.max(gaps[size]) < 1e-5]
        claims.append(claim(f"B = {b}: all {len(every)} batches end at the full batch's optimum", interval(np.abs(gaps[len(every)])), (0, 1e-5),
                            "gap <= 1e-5"))
        claims += [claim(f"B = {b}: {name}, {len(family)} of {len(every)} batches, ends above it", interval(gaps[name]), (1e-3, math.inf),
                         "gap >= 1e-3") for name, family in families.items()]
        claims.append(claim(f"B = {b}: a random subset closes the gap only when it is all of them", (min(closed, default=len(every)) / len(every),) * 3,
                            (1, 1), "smallest share at which every run's gap is below 1e-5"))
    axes[0, 0].set_ylabel("full-batch loss above the ETF's")
    return claims, numbers, figure, []


def toy_start(runs: int, **kind) -> Tensor:
    """U = V [runs, 4, 2] of the toy case, N = 4, B = 2: the corners of a rectangle at 10 degrees; the optimum is a square's."""
    x, y = math.cos(math.radians(10)), math.sin(math.radians(10))
    return torch.tensor([[x, y], [x, -y], [-x, -y], [-x, y]], dtype=torch.float64).to(**kind).repeat(runs, 1, 1)


def toy_steps(method: str, runs: int, steps: int, lr: float, tolerances, generator: Generator, kind: dict, shown: int = 0):
    """First steps [runs] to a full-batch loss within each tolerance of the optimum's (infinity: not in `steps`), and
    along the first `shown` steps theta, half the angle between samples 1 and 2, and the loss above the optimum's."""
    u, v = toy_start(runs, **kind), toy_start(runs, **kind)
    first, path = {t: torch.full((runs,), math.inf, dtype=torch.float64) for t in tolerances}, []
    batches = schedule(method, u, v, 2, 1.0, generator)
    for step in range(steps + 1):
        gap = (infonce(u, v) - cross_polytope_loss(4)).cpu()
        if step <= shown:
            angle = torch.atan2(u[:, 0, 1], u[:, 0, 0]) - torch.atan2(u[:, 1, 1], u[:, 1, 0])
            path.append(torch.stack([angle.cpu().rad2deg() % 360 / 2, gap]))
        for t, x in first.items():
            x[(gap <= t) & x.isinf()] = step
        if step == steps or step >= shown and not any(x.isinf().any() for x in first.values()):
            break
        descend(u, v, next(batches), lr)
    return {t: x.numpy() for t, x in first.items()}, torch.stack(path).permute(1, 2, 0).numpy()


def toy(knobs: dict):
    """Four samples in the plane: steps to the optimum of OSGD, which is certain, and of SGD, a random variable."""
    runs, steps, generator, kind = setting(knobs, 2000, 5000, 1000, 2000)
    tolerances, sgd = (1e-1, 1e-2, 1e-3, 1e-4), ("sgd-replacement", "sgd")
    figure, axes = canvas(2, 3, 7.2, 4.4)
    claims, numbers = [], []
    for line, lr in zip(axes, (0.5, 0.1)):
        shown, ratios = 60 if lr > 0.2 else 150, {}
        for method in ("osgd-direct", *sgd):
            first, path = toy_steps(method, 1 if method == "osgd-direct" else runs, steps, lr, tolerances, generator, kind, shown)
            if method == "osgd-direct":
                certain = {t: x[0] for t, x in first.items()}
            for axis, x in zip(line, path):
                band(axis, np.arange(x.shape[1]), x, method)
            for (t, x), style in zip(first.items(), ("-", "--", ":", "-.")):
                arrived = float(np.isfinite(x).mean())
                # Runs that have not arrived count as `steps`: the mean is then a lower bound. 0 where OSGD does not arrive.
                ratios[method, t] = interval(np.minimum(x, steps) / certain[t])
                numbers.append({"lr": lr, "method": method, "tolerance": t, "steps": x.tolist(), "arrived": arrived,
                                "over_osgd": ratios[method, t]})
                if method in sgd:
                    claims.append(claim(f"step size {lr:g}, to {t:g}: OSGD needs fewer steps than {METHODS[method][0]} (OSGD {certain[t]:g}; "
                                        f"{arrived:.1%} of SGD's runs arrive)", ratios[method, t], (1, math.inf), "mean T_SGD / T_OSGD > 1"))
                    line[2].plot(np.sort(np.minimum(x, steps)), np.linspace(0, 100, len(x)), style, color=METHODS[method][1],
                                 label=f"{t:g}" if method == "sgd" else None)
        line[0].axhline(45, color="black", linewidth=0.6, linestyle=":")
        line[0].set(ylabel=f"theta (degrees)\nstep size {lr:g}", xlabel="steps")
        line[1].set(ylabel="full-batch loss - L*", xlabel="steps", yscale="log", ylim=(1e-5, 2))
        line[2].set(xlabel="T_SGD (steps)", ylabel="runs that arrived (%)", xscale="log", xlim=(1, None))
        a, b = (1e-2, 1e-3) if lr > 0.2 else (1e-1, 1e-2)
        claims.append(growth(f"step size {lr:g}: the gap widens as the tolerance shrinks, {a:g} to {b:g}", ratios["sgd-replacement", a],
                             ratios["sgd-replacement", b], "mean T_SGD / T_OSGD"))
    axes[1, 2].legend(loc="upper left", title="to")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return claims, numbers, figure, []


def load_pairs(file: str) -> list[tuple[str, Tensor, Tensor]]:
    """Name, u and v [n, d] of all pairs of arrays NAME_u and NAME_v (or u and v) in an .npz file. Raises Stop."""
    try:
        with np.load(file) as arrays:
            pairs = [(name[:-1].strip("_") or "file", *(torch.from_numpy(arrays[name[:-1] + view].astype(np.float32)) for view in "uv"))
                     for name in arrays if name.endswith("u") and name[:-1] + "v" in arrays]
            if not pairs or any(u.shape != v.shape or u.ndim != 2 or len(u) < 64 for _, u, v in pairs):
                raise ValueError(f"it holds {', '.join(f'{name} {arrays[name].shape}' for name in arrays)}")
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise Stop(f"--embeddings {file}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}; give an .npz file with arrays "
                   "NAME_u and NAME_v [n, d], n >= 64") from None
    return pairs


def histograms(knobs: dict):
    """Losses of mini-batches, random and chosen, along training on random ones; and for embeddings from a file."""
    runs, epochs, generator, kind = setting(knobs, 8, 64, 8, 16)
    n, b, d = 256, 8, 32
    u, v = start(runs, n, d, knobs["seed"], **kind)
    sets = []
    moments = [0, *sorted({max(1, epochs // 16), max(1, epochs // 4), epochs})]
    for before, now in zip([0] + moments, moments):
        if now:
            train("sgd", u, v, b, (now - before) * (n // b), knobs["lr"], generator, every=n)
        sets.append((f"after {now} epochs", [(x, y) for x, y in zip(u.cpu().clone(), v.cpu().clone())], b, 1.0, "infonce"))
    if knobs["embeddings"]:
        sets += [(name, list(zip(u.split(1280), v.split(1280))), 32, 0.1, "nt_xent") for name, u, v in load_pairs(knobs["embeddings"])]
    figure, axes = canvas(-(-len(sets) // 2), 2, 7.2, 2.1 * -(-len(sets) // 2))
    claims, numbers = [], []
    for (title, groups, size, temperature, loss), axis in zip(sets, axes.flat):
        found = {"sgd": [], "spectral": [], "refined": []}
        for x, y in groups:
            order = torch.randperm(len(x), generator=generator)
            x, y, k = x[order], y[order], len(x) // size
            for method in found:
                batches = torch.arange(k * size).view(k, size) if method == "sgd" else \
                    spectral_batches(x, y, size, k, temperature, generator, refine=method == "refined")
                found[method].append(batch_losses(x, y, batches, temperature, loss).numpy())
        edges = np.histogram_bin_edges(np.concatenate([np.concatenate(x) for x in found.values()]), 40)
        for method, losses in found.items():
            axis.hist(np.concatenate(losses), edges, density=True, color=METHODS[method][1], alpha=0.6, label=METHODS[method][0])
        axis.set(title=title, xlabel=f"loss of a mini-batch of {size}", ylabel="density")
        mean = {method: np.array([x.mean() for x in losses]) for method, losses in found.items()}
        numbers.append({"set": title, **{method: [x.tolist() for x in losses] for method, losses in found.items()}})
        for better, worse in (("spectral", "sgd"), ("refined", "spectral")):
            claims.append(claim(f"{title}: {METHODS[better][0]} batches harder than {METHODS[worse][0]}'s", interval(mean[better] - mean[worse]),
                                (0, math.inf), "difference of mean losses > 0"))
    for axis in axes.flat[len(sets):]:
        axis.remove()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return claims, numbers, figure, []


def temperature(knobs: dict):
    """Whether the lead of chosen batches grows or vanishes as the temperature falls; N = 8, B = 2, d = 16."""
    runs, steps, generator, kind = setting(knobs, 32, 750, 8, 250)
    n, b, tolerances, temperatures = 8, 2, (2.0, 1.0, 0.5), (1.0, 0.5, 0.2, 0.1)
    figure, axes = canvas(1, 2, 7.2, 3.0, sharey=True)
    claims, numbers, table = [], [], []
    for axis, falling in zip(axes[0], (False, True)):
        rule, leads = f"step size {knobs['lr']:g}" + " x temperature" * falling, {}
        for t in temperatures:
            reached, ratios = {}, {}
            for method in ("sgd", *CHOOSING):
                u, v = start(runs, n, 2 * n, knobs["seed"], **kind)
                distances = train(method, u, v, b, steps, knobs["lr"] * (t if falling else 1), generator, t).cpu()
                reached[method] = [first_steps(distances, tolerance) for tolerance in tolerances]
                ratios[method] = [interval(np.stack(x, 1), speedup(steps)) for x in zip(reached["sgd"], reached[method])]
                leads.setdefault(method, []).append(ratios[method][0])
                numbers.append({"rule": rule, "temperature": t, "method": method, "steps_to": {str(a): x.tolist() for a, x in zip(tolerances, reached[method])},
                                "sgd_over_this": {str(a): x for a, x in zip(tolerances, ratios[method])}})
            table += table_of(f"temperature {t:g}, {rule}", reached, ratios, tolerances, steps)
        lead_figure(axis, temperatures, leads, rule, "temperature")
        claims += [growth(f"{METHODS[method][0]}, {rule}: its lead over SGD is at least as large at temperature 0.1 as at 1",
                          leads[method][0], leads[method][-1], f"in steps to distance {tolerances[0]:g}") for method in CHOOSING]
    axes[0, 0].set_ylabel(f"SGD's steps to distance {tolerances[0]:g} / own")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return claims, numbers, figure, table


def lead_figure(axis, x, leads: dict, title: str, label: str) -> None:
    """Ratios with their intervals, leads[method] one for each of x; where there is none (neither arrives) a gap."""
    from matplotlib.ticker import LogLocator
    for i, (method, ratios) in enumerate(leads.items()):
        if method != "sgd":
            middle, low, high = np.array(ratios).T
            axis.errorbar(np.array(x) * 1.03 ** (i - len(leads) / 2), middle, np.nan_to_num((middle - low, high - middle)), color=METHODS[method][1],
                          marker="o", markersize=3, label=METHODS[method][0])
    axis.axhline(1, color="black", linewidth=0.6, linestyle=":")
    axis.set(title=title, xlabel=label, xscale="log", yscale="log", xticks=x, xticklabels=x)
    axis.minorticks_off()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axis.yaxis.set_major_formatter("{x:g}")


def scaling(knobs: dict):
    """How the lead of chosen batches grows with N, from 8 to 256, at B = 2 and 8; d = 2N, k and q in a fixed ratio."""
    runs, epochs, generator, kind = setting(knobs, 8, 60, 4, 20)
    methods = "sgd", "osgd", "spectral"
    figure, axes = canvas(2, 2, 7.2, 4.6, sharex="col", sharey="row")
    claims, numbers = [], []
    for (above, below), b in zip(axes.T, (2, 8)):
        sizes, curves = [n for n in (8, 16, 32, 64, 128, 256) if n > b and n <= (64 if knobs["quick"] else 256)], {}
        for n, method in itertools.product(sizes, methods):
            u, v = start(runs, n, 2 * n, knobs["seed"], **kind)
            every = max(1, n // b // 16)
            distances = train(method, u, v, b, epochs * (n // b), knobs["lr"], generator, every=every).cpu() / etf(n).double().norm()
            curves.setdefault(method, []).append((distances, every))
        # The nearest distance that SGD reaches at every N: beyond it there is nothing to compare with.
        tolerance = max(math.ceil(20 * x.min(1).values.median()) / 20 for x, _ in curves["sgd"])
        reached = {method: [first_steps(x, tolerance, every) for x, every in runs_of] for method, runs_of in curves.items()}
        leads = {method: [interval(np.stack(x, 1), speedup(epochs * (n // b))) for n, *x in zip(sizes, reached["sgd"], own)]
                 for method, own in reached.items()}
        lead_figure(above, sizes, leads, f"B = {b}, to relative distance {tolerance:g}", "N")
        for method in methods:
            last = np.array([x[:, -1].numpy() for x, _ in curves[method]])
            numbers += [{"n": n, "batch_size": b, "method": method, "tolerance": tolerance, "steps_to": x.tolist(), "sgd_over_this": lead,
                         "last_relative_distance": y.tolist()} for n, x, lead, y in zip(sizes, reached[method], leads[method], last)]
            band(below, sizes, last.T, method)
        below.set(xlabel="N", xscale="log", xticks=sizes, xticklabels=sizes)
        below.minorticks_off()
        claims += [growth(f"{METHODS[method][0]}, B = {b}: its lead over SGD grows from N = {sizes[0]} to {sizes[-1]}", leads[method][0],
                          leads[method][-1], f"in steps to relative distance {tolerance:g}") for method in methods[1:]]
    axes[0, 0].set_ylabel("SGD's steps / own")
    axes[1, 0].set_ylabel(f"relative distance\nafter {epochs} epochs")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return claims, numbers, figure, []


EXPERIMENTS = {f.__name__: f for f in (toy, optima, convergence, subsets, histograms, temperature, scaling)}


# ------------------------------------------------------------------------------------------------- the command
def plain(x):
    """x for a .json file: what is not finite becomes null."""
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def run(name: str, knobs: dict, out: Path) -> None:
    """One experiment: its figures and its record in the folder `out`, its table and its claims on the terminal."""
    began = time.perf_counter()
    claims, numbers, figure, table = EXPERIMENTS[name](knobs)
    save(figure, out / name)
    record = {"experiment": name, "about": EXPERIMENTS[name].__doc__, "knobs": knobs, **provenance(torch.device(knobs["device"])),
              "seconds": time.perf_counter() - began, "claims": claims, "table": table, "numbers": numbers}
    write_atomically(out / f"{name}.json", json.dumps(plain(record)).encode())
    print(f"== {name}: {EXPERIMENTS[name].__doc__}\n" + "\n".join(table))
    for c in claims:
        low, high = c["interval"]
        print(f"{c['verdict']:<14} {c['claim']}: {c['measured']:.3g} [{low:.3g}, {high:.3g}]; {c['form']}", flush=True)


def main(argv: list[str]) -> int:
    try:
        knobs, _ = parse(argv, __doc__, KNOBS, {})
        knobs["device"] = str(pick_device(knobs["device"]))
        torch.set_num_threads(1)  # of tensors this small a second thread makes a step many times slower
        out = Path(knobs["out"]).expanduser()
        out.mkdir(parents=True, exist_ok=True)
        for name in EXPERIMENTS if knobs["experiment"] == "all" else [knobs["experiment"]]:
            run(name, knobs, out)
    except Stop as stop:
        print(f"synthetic.py: error: {stop}", file=sys.stderr)
        return stop.code
    except ValueError as error:  # of a sampler, NaN in a file say
        print(f"synthetic.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"synthetic.py: error: {error.filename or knobs['out']}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --experiment NAME runs one of the rest", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
