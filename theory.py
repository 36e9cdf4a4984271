"""The paper's theory on embeddings that are themselves the parameters: closed forms, gradient steps, methods.

    u, v = start(runs=32, n=8, d=16, seed=0)                         # [32, 8, 16] each, 32 runs at once
    distances = train("osgd", u, v, 2, 300, 0.5, torch.Generator())  # to the ETF, 300 steps: [32, 301]

U, V are [R, N, d], R runs at once: a step is the gradient of the mean InfoNCE loss of some batches, and then
every row goes back to unit length. At the end: what is said of the runs, as intervals and verdicts.
synthetic.py makes the experiments.
"""
import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cli import COLOURS, progress
from model import infonce
from samplers import all_batches, random_batches_with_replacement, select_by_loss, spectral_batches


# ------------------------------------------------------------------------------------------ closed forms
def etf(n: int, **kind) -> Tensor:
    """U V^T [n, n] at the full batch's optimum for d >= n - 1, the simplex equiangular tight frame."""
    return (n * torch.eye(n, **kind) - 1) / (n - 1)


def etf_loss(n: int, batch_size: int | None = None, temperature: float = 1.0) -> float:
    """InfoNCE at the ETF: of all n pairs, or of any batch of batch_size of them."""
    return 2 * math.log1p(((batch_size or n) - 1) * math.exp(-n / (n - 1) / temperature))


def cross_polytope_loss(n: int) -> float:
    """Full-batch InfoNCE at the cross-polytope, d = n / 2: half of it is minus the other half."""
    return 2 * math.log((math.e + 1 / math.e + n - 2) / math.e)


def cross_polytope(partner: Tensor) -> Tensor:
    """U V^T [..., n, n] of the cross-polytope that has sample partner[..., i] at the point opposite to i."""
    n = partner.shape[-1]
    return torch.eye(n, device=partner.device) - F.one_hot(partner, n)


class Matching:
    """Perfect matchings of n samples, n even and at most 20, of the least sum of costs: exact, many at once.

    Dynamic programming over the sets of samples still alone: the lowest of a set is matched to each other.
    """

    def __init__(self, n: int):
        if n % 2 or not 2 <= n <= 20:
            raise ValueError(f"n is {n}; give an even number from 2 to 20")
        self.n, self.levels, sets = n, [], [(1 << n) - 1]
        while sets != [0]:
            members = [[i for i in range(n) if s >> i & 1] for s in sets]
            left = [[s & ~(1 << m[0]) & ~(1 << j) for j in m[1:]] for s, m in zip(sets, members)]
            sets = sorted(set(itertools.chain.from_iterable(left)))
            place = {s: i for i, s in enumerate(sets)}
            lowest, others = [m[0] for m in members], [m[1:] for m in members]
            rest = [[place[s] for s in row] for row in left]
            self.levels.append(tuple(map(torch.tensor, (lowest, others, rest))))

    def __call__(self, cost: Tensor) -> Tensor:
        """partner [R, n] of each sample under the matching of least sum of cost [R, n, n] (symmetric)."""
        best, choices = cost.new_zeros(len(cost), 1), []
        for lowest, others, rest in reversed(self.levels):
            best, choice = (cost[:, lowest[:, None], others] + best[:, rest]).min(2)
            choices.append(choice)
        run, state = torch.arange(len(cost)), torch.zeros(len(cost), dtype=torch.int64)
        partner = torch.empty(len(cost), self.n, dtype=torch.int64)
        for (lowest, others, rest), choice in zip(self.levels, reversed(choices)):
            pick = choice[run, state].cpu()
            i, j = lowest[state], others[state, pick]
            partner[run, i], partner[run, j] = j, i
            state = rest[state, pick]
        return partner


def distance(u: Tensor, v: Tensor, matching: Matching | None = None) -> Tensor:
    """Of U V^T to the ETF, Frobenius norm [R]; with a matching, to the nearest cross-polytope."""
    s = u @ v.mT
    if matching is None:
        return (s - etf(s.shape[-1], dtype=s.dtype, device=s.device)).flatten(1).norm(dim=1)
    # ||S - G||^2 = ||S||^2 - 2 <S, G> + 2n, and <S, G> is the trace of S less the matched entries.
    partner = matching(s + s.mT)
    return (s - cross_polytope(partner.to(s.device))).flatten(1).norm(dim=1)


# ------------------------------------------------------------------------------------------ dynamics
def start(runs: int, n: int, d: int, seed: int, **kind) -> tuple[Tensor, Tensor]:
    """U, V [runs, n, d], each row uniform on the sphere. kind: dtype and device."""
    return start_released(runs, n, d, seed, **kind)[:2]


def start_released(runs: int, n: int, d: int, seed: int, **kind) -> tuple[Tensor, Tensor, tuple]:
    """As start, and the two lengths [runs, n, 1] of the normal rows whose directions they are."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(runs, n, d, generator=g, dtype=torch.float64) for _ in range(2))
    u, v = (F.normalize(z, dim=2).to(**kind) for z in (x, y))
    return u, v, tuple(z.norm(dim=2, keepdim=True).to(**kind) for z in (x, y))


def loss_gradient(logits: Tensor) -> Tensor:
    """Of infonce with respect to its logits [..., B, B]: (softmax over rows + over columns - 2 I) / B."""
    B = logits.shape[-1]
    g = logits.softmax(-1) + logits.softmax(-2)
    g.diagonal(dim1=-2, dim2=-1).sub_(2)
    return g / B


def descend(u: Tensor, v: Tensor, batches: Tensor, lr: float, temperature: float = 1.0,
            weights: Tensor | None = None, lengths: tuple[Tensor, Tensor] | None = None) -> None:
    """One step in place: U, V less lr times the gradient of the mean batch loss, rows back to unit length.

    u, v [R, N, d]; batches [m, B] for all runs or [R, m, B]; weights [R, m] of the batches (default: 1 / m).
    lengths, two [R, N, 1]: the released code's dynamics instead. Its parameters are the rows of U and V times
    these, which change too; the gradient goes through the division by them, and nothing is brought back.
    """
    R, n, d = u.shape
    m, B = batches.shape[-2:]
    rows = torch.arange(R * n, device=u.device).view(R, n)
    if m * B < n:  # only the rows of these batches move
        rows = (batches + rows[:, :1, None]).expand(R, m, B).flatten(1)
        batches = torch.arange(m * B, device=u.device).view(m, B)
    size, rows = rows.shape[1], rows.flatten()
    a, b = (x.view(-1, d)[rows].view(R, size, d) for x in (u, v))
    # Every inner product once, in however many batches it is.
    s, slope = (a @ b.mT / temperature).flatten(1), u.new_zeros(R, size * size)
    index = (batches[..., :, None] * size + batches[..., None, :]).flatten(-3).expand(R, -1)
    g = loss_gradient(s.gather(1, index).view(R, m, B, B))
    g = g / m if weights is None else g * weights[..., None, None]
    slope = slope.scatter_add_(1, index, g.flatten(1)).view(R, size, size) * (lr / temperature)
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
    "osgd": ("OSGD (6)", COLOURS["osgd"]), "spectral": ("spectral (1)", COLOURS["spectral"]),
    "refined": ("refined", COLOURS["refined"]),
}


def k_and_q(n: int, batch_size: int) -> tuple[int, int]:
    """OSGD's k and q here: all batches of a permutation, of which a quarter is kept."""
    return n // batch_size, max(1, n // batch_size // 4)


def schedule(method: str, u: Tensor, v: Tensor, batch_size: int, temperature: float,
             generator: Generator) -> Iterator[Tensor]:
    """The batches of each next step, [m, B] for all runs or [R, m, B], by a method of METHODS.

    u, v [R, N, d] are looked at when a method is due to choose. Samplers get all runs' rows in one list.
    """
    R, n, _ = u.shape
    k, q = k_and_q(n, batch_size)
    device = u.device
    first = torch.arange(R, device=device)[:, None, None] * n  # row of each run's sample 0
    rows = (u.view(R * n, -1), v.view(R * n, -1))  # views: they change with u and v

    def permutations() -> Tensor:
        order = torch.rand(R, n, generator=generator, dtype=torch.float64).argsort(1)
        return order[:, :k * batch_size].view(R, k, batch_size).to(device)

    def hardest(batches: Tensor, count: int) -> Tensor:
        return select_by_loss(*rows, batches + first, count, temperature, loss="infonce") - first

    static = {"full": lambda: torch.arange(n)[None], "ncb": lambda: all_batches(n, batch_size),
              "fixed": lambda: torch.arange(k * batch_size).view(k, batch_size)}
    if method in static:
        yield from itertools.repeat(static[method]().to(device))
    every = all_batches(n, batch_size).to(device) if method == "osgd-direct" else None
    while True:
        if method == "sgd-replacement":
            yield random_batches_with_replacement(R, n, batch_size, generator).to(device)[:, None]
        elif method == "osgd-direct":
            yield hardest(every, 1)
        elif method == "osgd-replacement":
            drawn = random_batches_with_replacement(R * k, n, batch_size, generator)
            yield hardest(drawn.view(R, k, batch_size).to(device), q)
        else:  # lists, taken one batch a step
            if method in ("spectral", "refined"):
                refine = method == "refined"
                batches = spectral_batches(*rows, batch_size, k, temperature, generator, refine)
                batches = batches.view(R, k, batch_size) - first
            else:
                batches = permutations() if method == "sgd" else hardest(permutations(), q).flip(1)
            yield from batches.split(1, dim=1)


def evaluations(method: str, n: int, batch_size: int) -> tuple[float, float]:
    """Pairs in a gradient and pairs embedded only to choose, both a step."""
    k, q = k_and_q(n, batch_size)
    one, every = batch_size, math.comb(n, batch_size) * batch_size
    return {"full": (n, 0), "ncb": (every, 0), "fixed": (k * one, 0), "osgd-direct": (one, every),
            "osgd-replacement": (q * one, k * one), "osgd": (one, k * one / q), "spectral": (one, one),
            "refined": (one, one)}.get(method, (one, 0))


def train(method: str, u: Tensor, v: Tensor, batch_size: int, steps: int, lr: float, generator: Generator,
          temperature: float = 1.0, every: int = 1, matching: Matching | None = None,
          lengths: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Distances [R, steps / every + 1] to the optimum along `steps` steps of a method, which change u and v.

    lengths as in descend: the released code's dynamics.
    """
    distances = [distance(u, v, matching)]
    for step, batches in zip(range(1, steps + 1), schedule(method, u, v, batch_size, temperature, generator)):
        descend(u, v, batches, lr, temperature, lengths=lengths)
        if step % every == 0:
            distances.append(distance(u, v, matching))
    return torch.stack(distances, 1)


# ------------------------------------------------------------------------------------------ in the plane
def toy_start(runs: int, **kind) -> Tensor:
    """U = V [runs, 4, 2] of the toy case: a rectangle's corners, at 10 degrees; the optimum is a square's."""
    x, y = math.cos(math.radians(10)), math.sin(math.radians(10))
    corners = torch.tensor([[x, y], [x, -y], [-x, -y], [-x, y]], dtype=torch.float64)
    return corners.to(**kind).repeat(runs, 1, 1)


def toy_steps(method: str, runs: int, steps: int, lr: float, tolerances, generator: Generator, kind: dict,
              shown: int = 0) -> tuple[dict[float, np.ndarray], np.ndarray]:
    """First steps [runs] to a full-batch loss within each tolerance of the optimum's (inf: not in `steps`);
    theta, half the angle of samples 1 and 2, and the loss above the optimum's, [2, runs, shown + 1]."""
    u, v = toy_start(runs, **kind), toy_start(runs, **kind)
    first, path = {t: torch.full((runs,), math.inf, dtype=torch.float64) for t in tolerances}, []
    batches = schedule(method, u, v, 2, 1.0, generator)
    tick = progress(f"toy, {METHODS[method][0]}, at most", steps, "steps")
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
        tick(step)
    return {t: x.numpy() for t, x in first.items()}, torch.stack(path).permute(1, 2, 0).numpy()


def angle_losses(degrees: Tensor) -> dict[str, Tensor]:
    """Losses [T] with u_1 at these angles [T], other u_i = v_i and v_1 at the corners of a decagon."""
    def directions(x: Tensor) -> Tensor:
        return torch.stack([x.deg2rad().cos(), x.deg2rad().sin()], -1)
    v = directions(torch.arange(10).to(degrees) * 36).repeat(len(degrees), 1, 1)
    u = v.clone()
    u[:, 0] = directions(degrees)
    order = torch.arange(10)
    batches = {"full": order[None], "ncb": all_batches(10, 2), "fixed": order.view(5, 2)}
    return {method: infonce(u[:, x], v[:, x]).mean(1) for method, x in batches.items()}


# ------------------------------------------------------------------------------------------ statistics
def interval(samples, statistic=np.mean, draws: int = 2000) -> tuple[float, float, float]:
    """A statistic of samples [R] (or [R, columns], resampled together), its 95 % bootstrap interval over R.

    statistic(x, axis) of an array, over that axis. Unlike scipy.stats.bootstrap it takes infinite samples.
    """
    samples = np.asarray(samples, dtype=float)
    pick = np.random.default_rng(0).integers(len(samples), size=(draws, len(samples)))
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.quantile(statistic(samples[pick], axis=1), (0.025, 0.975), method="nearest")
        return float(statistic(samples, axis=0)), float(low), float(high)


def claim(text: str, measured, allowed: tuple[float, float], form: str, asked_by: str = "paper") -> dict:
    """A claim, what was measured, and whether its interval lies in the allowed range, outside, or neither.

    measured: samples [R], for their mean and its interval; (value, low, high); or a number that is certain.
    form: the closed form or bound, in words. asked_by: "paper" for what the paper claims, else "us".
    """
    if isinstance(measured, np.ndarray):
        measured = interval(measured)
    value, low, high = measured if isinstance(measured, tuple) else (measured,) * 3
    inside, outside = allowed[0] <= low and high <= allowed[1], high < allowed[0] or low > allowed[1]
    verdict = "holds" if inside else "does not hold" if outside else "not settled"
    return {"claim": text, "measured": value, "interval": (low, high), "allowed": allowed, "form": form,
            "asked_by": asked_by, "verdict": verdict}


def growth(text: str, first: tuple, last: tuple, form: str, asked_by: str = "paper") -> dict:
    """The claim that a lead, (value, low, high), has grown, by the quotient of the two."""
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient = np.array(last) / np.array(first)[[0, 2, 1]]
    return claim(text, tuple(quotient.tolist()), (1, math.inf),
                 f"leads {form}: {digits(last[0], 2)} / {digits(first[0], 2)} >= 1", asked_by)


def digits(x: float, places: int = 3) -> str:
    """A number for a person; a dash for what is not finite: not reached, or not known."""
    return f"{x:.{places}g}" if math.isfinite(x) else "–"


def first_steps(distances: Tensor, tolerance: float, every: int = 1) -> np.ndarray:
    """Steps [R] to the first distance [R, T] within the tolerance; infinity where there is none."""
    there = distances <= tolerance
    return torch.where(there.any(1), there.int().argmax(1).double() * every, torch.inf).cpu().numpy()


def nearest(distances: list[Tensor], grid: float) -> float:
    """The nearest distance, on this grid, that three quarters of the runs reach in each of [R, T]: beyond it
    there is nothing to compare with."""
    reached = max(float(np.quantile(x.min(1).values, 0.75)) for x in distances)
    return round(grid * math.ceil(reached / grid), 9)


def speedup(x: np.ndarray, axis: int) -> np.ndarray:
    """Statistic of steps [R, 2]: SGD's median over a method's. Infinite if only the method arrives, 0 if only
    SGD does, NaN if neither does."""
    sgd, own = np.moveaxis(np.median(x, axis), -1, 0)
    return sgd / own


def race(distances: dict[str, Tensor], tolerances, every: int = 1, **about) -> list[dict]:
    """A record for each method of distances [R, T]: first steps [R] to each tolerance, and SGD's over them
    (speedup, with its interval). about: what else the records are to say."""
    reached = {method: [first_steps(x, t, every) for t in tolerances] for method, x in distances.items()}
    return [{**about, "method": method, "steps_to": {t: x.tolist() for t, x in zip(tolerances, own)},
             "sgd_over_this": {t: interval(np.stack([sgd, x], 1), speedup)
                               for t, sgd, x in zip(tolerances, reached["sgd"], own)}}
            for method, own in reached.items()]
