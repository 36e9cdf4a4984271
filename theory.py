"""The paper's theory on embeddings that are themselves the parameters: closed forms, gradient steps, methods.

    u, v, _ = start(runs=32, n=8, d=16, seed=0)                      # [32, 8, 16] each, 32 runs at once
    distances = train("osgd", u, v, 2, 300, 0.5, torch.Generator())  # to the ETF, 300 steps: [32, 301]

A step is the gradient of the mean InfoNCE loss of some batches, and then every row goes back to unit length.
At the end: what is said of the runs, as intervals and verdicts. synthetic.py makes the experiments.
"""
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Generator, Tensor

from cli import COLOURS, progress
from model import infonce
from samplers import all_batches, random_batches_with_replacement, select_by_loss, spectral_batches


# ------------------------------------------------------------------------------------------ closed forms
def optimum(n: int, d: int) -> tuple[Tensor, float]:
    """U V^T [n, n] at the full batch's optimum and its InfoNCE: the simplex equiangular tight frame (ETF) for
    d >= n - 1, a cross-polytope for d = n / 2 (sample i + n / 2 is opposite to i, or in any other order)."""
    eye = torch.eye(n, dtype=torch.float64)
    if d >= n - 1:
        return (n * eye - 1) / (n - 1), 2 * math.log1p((n - 1) * math.exp(-n / (n - 1)))
    return eye - eye.roll(n // 2, 0), 2 * math.log((math.e + 1 / math.e + n - 2) / math.e)


@functools.cache
def remaining(n: int, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Level by level, of each set of samples left when pairs are taken, always the lowest and some other:
    the lowest [S], the others [S, m], and the place [S, m] in the next level of the set without both."""
    levels, sets = [], [tuple(range(n))]
    while sets[0]:
        left = [[s[1:j] + s[j + 1:] for j in range(1, len(s))] for s in sets]
        following = sorted({x for row in left for x in row})
        place = {s: i for i, s in enumerate(following)}
        level = [s[0] for s in sets], [s[1:] for s in sets], [[place[x] for x in row] for row in left]
        levels.append(tuple(torch.tensor(x, device=device) for x in level))
        sets = following
    return levels


def least_matching(cost: Tensor) -> Tensor:
    """The least sum of cost [R, n, n] (symmetric) over the pairs of a perfect matching, n even: exact, [R].
    Its gradient is 1 at the pairs (i, j), i < j, of that matching."""
    best = cost.new_zeros(len(cost), 1)
    for lowest, others, rest in reversed(remaining(cost.shape[-1], cost.device)):
        best = (cost[:, lowest[:, None], others] + best[:, rest]).min(2).values
    return best[:, 0]


def distance(u: Tensor, v: Tensor) -> Tensor:
    """||U V^T - optimum|| [R]: to the ETF for d >= n - 1, else to the nearest of all cross-polytopes."""
    s, (n, d) = u @ v.mT, u.shape[1:]
    if d >= n - 1:
        return (s - optimum(n, d)[0].to(s.device, s.dtype)).flatten(1).norm(dim=1)
    # ||S - G||^2 = ||S||^2 - 2 <S, G> + 2n, and <S, G> is the trace of S less the matched entries.
    product = s.diagonal(dim1=1, dim2=2).sum(1) - least_matching(s + s.mT)
    return (s.square().sum((1, 2)) - 2 * product + 2 * n).clamp(min=0).sqrt()


# ------------------------------------------------------------------------------------------ dynamics
def start(runs: int, n: int, d: int, seed: int, dtype: torch.dtype = torch.float64,
          device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """U, V [runs, n, d], the directions of normal rows, and the lengths [runs, n, 1] of these."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(runs, n, d, generator=g, dtype=torch.float64).to(device, dtype) for _ in range(2))
    lengths = x.norm(dim=2, keepdim=True), y.norm(dim=2, keepdim=True)
    return x / lengths[0], y / lengths[1], lengths


def descend(u: Tensor, v: Tensor, batches: Tensor, lr: float, temperature: float = 1.0,
            lengths: tuple[Tensor, Tensor] | None = None) -> None:
    """One step in place: U, V less lr times the gradient of the mean batch loss, rows back to unit length.

    u, v [R, N, d]; batches [m, B] for all runs or [R, m, B].
    lengths, two [R, N, 1]: the released code's dynamics instead. Its parameters are the rows of U and V times
    these, which change too; the gradient goes through the division by them, and nothing is brought back.
    """
    R, n, d = u.shape
    m, B = batches.shape[-2:]
    batches, rows = batches.to(u.device), torch.arange(R * n, device=u.device).view(R, n)
    if m * B < n:  # only the rows of these batches move
        rows = (batches + rows[:, :1, None]).expand(R, m, B).flatten(1)
        batches = torch.arange(m * B, device=u.device).view(m, B)
    size, rows = rows.shape[1], rows.flatten()
    a, b = (x.view(-1, d)[rows].view(R, size, d) for x in (u, v))
    # Every inner product once, in however many batches it is.
    s, slope = (a @ b.mT / temperature).flatten(1), u.new_zeros(R, size * size)
    index = (batches[..., :, None] * size + batches[..., None, :]).flatten(-3).expand(R, -1)
    s = s.gather(1, index).view(R, m, B, B)
    g = s.softmax(-1) + s.softmax(-2)  # of infonce, by its logits, times B
    g.diagonal(dim1=-2, dim2=-1).sub_(2)
    slope = slope.scatter_add_(1, index, (g / (m * B)).flatten(1)).view(R, size, size) * (lr / temperature)
    for x, dx, length in zip((u, v), (slope @ b, slope.mT @ a), lengths or (None, None)):
        x, dx = x.view(-1, d), dx.view(-1, d)
        if length is not None:  # what lies across x: 1 / length by the chain rule, 1 / length for the turn
            length = length.view(-1, 1)
            dx = (dx - (dx * x[rows]).sum(1, keepdim=True) * x[rows]) / length[rows] ** 2
        x.index_add_(0, rows, dx, alpha=-1)  # a row may be in several batches
        norm = x[rows].norm(dim=1, keepdim=True)
        x[rows] = x[rows] / norm
        if length is not None:
            length[rows] = length[rows] * norm


# ------------------------------------------------------------------------------------------ methods
METHODS = {  # name: (label with the number of the paper's algorithm, colour)
    "full": ("full batch", "#000000"), "ncb": ("all N choose B", "#D55E00"),
    "fixed": ("fixed disjoint", "#56B4E9"), "sgd-replacement": ("SGD with replacement (3)", "#999999"),
    "sgd": ("SGD (4)", COLOURS["random"]), "osgd-direct": ("OSGD of all (2)", "#7F5F00"),
    "osgd-replacement": ("OSGD with replacement (5)", COLOURS["osgd-replacement"]),
    "osgd": ("OSGD (6)", COLOURS["osgd"]), "spectral": ("spectral (1)", COLOURS["spectral"])}


def schedule(method: str, u: Tensor, v: Tensor, batch_size: int, temperature: float,
             generator: Generator) -> Iterator[Tensor]:
    """Each step's batches, [m, B] for all runs or [R, m, B], chosen on u, v [R, N, d] as they are then."""
    R, n, _ = u.shape
    k = n // batch_size
    q = max(1, k // 4)  # OSGD keeps a quarter of a permutation's batches
    first = torch.arange(R, device=u.device)[:, None, None] * n  # of each run, in the rows of all runs
    rows = (u.view(R * n, -1), v.view(R * n, -1))  # views: they change with u and v
    every = all_batches(n, batch_size) if method in ("ncb", "osgd-direct") else None

    def hardest(batches: Tensor, count: int) -> Tensor:
        return select_by_loss(*rows, batches.to(u.device) + first, count, temperature, loss="infonce") - first

    while True:
        if method == "full":
            yield torch.arange(n)[None]
        elif method == "ncb":
            yield every
        elif method == "fixed":
            yield torch.arange(k * batch_size).view(k, batch_size)
        elif method == "sgd-replacement":
            yield random_batches_with_replacement(R, n, batch_size, generator)[:, None]
        elif method == "osgd-direct":
            yield hardest(every, 1)
        elif method == "osgd-replacement":
            drawn = random_batches_with_replacement(R * k, n, batch_size, generator)
            yield hardest(drawn.view(R, k, batch_size), q)
        else:  # a list, taken one batch a step
            if method == "spectral":
                batches = spectral_batches(*rows, batch_size, k, temperature, generator)
                batches = batches.view(R, k, batch_size) - first
            else:
                order = torch.rand(R, n, generator=generator, dtype=torch.float64).argsort(1)
                batches = order[:, :k * batch_size].view(R, k, batch_size)
                batches = batches if method == "sgd" else hardest(batches, q).flip(1)
            yield from batches.split(1, dim=1)


def evaluations(method: str, n: int, batch_size: int) -> float:
    """Pairs in a gradient, and pairs embedded only to choose, a step."""
    k, every = n // batch_size, math.comb(n, batch_size)
    q = max(1, k // 4)
    batches = {"full": n / batch_size, "ncb": every, "fixed": k, "osgd-direct": 1 + every,
               "osgd-replacement": q + k, "osgd": 1 + k / q, "spectral": 2}
    return batch_size * batches.get(method, 1)


def train(method: str, u: Tensor, v: Tensor, batch_size: int, steps: int, lr: float, generator: Generator,
          temperature: float = 1.0, every: int = 1, lengths: tuple[Tensor, Tensor] | None = None,
          tick: Callable[[float], None] = lambda share: None) -> Tensor:
    """Distances [R, steps / every + 1] to the optimum along a method's steps, which change u, v, lengths; on
    the CPU. tick is told the share of the steps that is done."""
    distances = [distance(u, v)]
    for step, batches in zip(range(1, steps + 1), schedule(method, u, v, batch_size, temperature, generator)):
        descend(u, v, batches, lr, temperature, lengths=lengths)
        if step % every == 0:
            distances.append(distance(u, v))
        tick(step / steps)
    return torch.stack(distances, 1).cpu()


# ------------------------------------------------------------------------------------------ in the plane
def directions(degrees: Tensor) -> Tensor:
    """Unit vectors [..., 2] at these angles [...]."""
    return torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], -1)


def toy_curves(method: str, runs: int, steps: int, lr: float, tolerance: float, generator: Generator,
               least: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """U = V at a rectangle's corners, on the way to a square's. [2, runs, T]: half the angle of samples 1 and
    2, and the full-batch loss above the optimum's, until all runs have been within the tolerance, but for
    `least` to `steps` steps."""
    corners = directions(torch.tensor([10, -10, 190, 170], dtype=dtype, device=device))
    u, v = corners.repeat(runs, 1, 1), corners.repeat(runs, 1, 1)
    batches, path, there = schedule(method, u, v, 2, 1.0, generator), [], False
    tick = progress(f"toy, {METHODS[method][0]}, at most", steps, "steps")
    for step in range(steps + 1):
        gap = infonce(u, v) - optimum(4, 2)[1]
        angle = torch.atan2(u[:, 0, 1], u[:, 0, 0]) - torch.atan2(u[:, 1, 1], u[:, 1, 0])
        path.append(torch.stack([angle.rad2deg() % 360 / 2, gap]))
        there |= gap <= tolerance  # [R]
        if step == steps or step >= least and there.all():
            break
        descend(u, v, next(batches), lr)
        tick(step)
    return torch.stack(path, 2).cpu()


# ------------------------------------------------------------------------------------------ statistics
def interval(samples, statistic=np.mean) -> tuple[float, float, float]:
    """A statistic(x, axis) of samples [R, ...], also infinite, and its 95 % bootstrap interval over R."""
    samples = np.asarray(samples, dtype=float)
    pick = np.random.default_rng(0).integers(len(samples), size=(2000, len(samples)))
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.quantile(statistic(samples[pick], axis=1), (0.025, 0.975), method="nearest")
        return float(statistic(samples, axis=0)), float(low), float(high)


def claim(text: str, measured, allowed: tuple[float, float], form: str, asked_by: str = "paper") -> dict:
    """Whether the interval of what was measured lies in the allowed range, outside, or neither; measured:
    samples [R], for their mean; (value, low, high); or a number that is certain. form: the bound in words."""
    if isinstance(measured, np.ndarray):
        measured = interval(measured)
    value, low, high = measured if isinstance(measured, tuple) else (measured,) * 3
    inside, outside = allowed[0] <= low and high <= allowed[1], high < allowed[0] or low > allowed[1]
    verdict = "holds" if inside else "does not hold" if outside else "not settled"
    return {"claim": text, "measured": value, "measured_interval": (low, high), "allowed": allowed,
            "form": form, "asked_by": asked_by, "verdict": verdict}


def growth(text: str, first: tuple, last: tuple, form: str, asked_by: str = "paper") -> dict:
    """The claim that a lead, (value, low, high), has grown, by the quotient of the two."""
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient = np.array(last) / np.array(first)[[0, 2, 1]]
    return claim(text, tuple(quotient.tolist()), (1, math.inf),
                 f"leads {form}: {digits(last[0], 2)} / {digits(first[0], 2)} >= 1", asked_by)


def digits(x: float, places: int = 3) -> str:
    """A number for a person; a dash for what is not finite: not reached, or not known."""
    return f"{x:.{places}g}" if math.isfinite(x) else "–"


def first_steps(distances: Tensor, tolerance: float) -> np.ndarray:
    """The first place [R] in [R, T] within the tolerance; infinity where there is none."""
    there = distances <= tolerance
    return torch.where(there.any(1), there.int().argmax(1).double(), torch.inf).numpy()


def nearest(distances: Tensor, grid: float) -> float:
    """The nearest distance, on this grid, that three quarters of the runs [R, T] reach: beyond it there is
    nothing to compare with."""
    return round(grid * math.ceil(float(np.quantile(distances.min(1).values, 0.75)) / grid), 9)


def speedup(sgd: Tensor, own: Tensor, tolerance: float) -> tuple[float, float, float]:
    """SGD's median of steps to the tolerance over a method's, of distances [R, T], with its interval.
    Infinite if only the method arrives, 0 if only SGD does, NaN if neither does."""
    return interval(np.stack([first_steps(x, tolerance) for x in (sgd, own)], 1),
                    lambda x, axis: np.divide(*np.moveaxis(np.median(x, axis), -1, 0)))
