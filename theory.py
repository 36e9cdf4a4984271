"""The paper's theory on embeddings that are themselves the parameters: closed forms, gradient steps, and the methods.

    u, v = start(runs=32, n=8, d=16, seed=0)                            # [32, 8, 16] each, 32 runs at once
    distances = train("osgd", u, v, batch_size=2, steps=300, lr=0.5, generator=torch.Generator())    # to the ETF, [32, 301]

U and V are [R, N, d], R runs at once: a step is the gradient of the mean InfoNCE loss of some mini-batches, then every row
goes back to unit length. At the end: what is said of the runs, as intervals and verdicts. synthetic.py makes the experiments.
"""
import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cli import COLOURS
from samplers import all_batches, random_batches_with_replacement, select_by_loss, spectral_batches


# ------------------------------------------------------------------------------------------------- closed forms
def etf(n: int, **kind) -> Tensor:
    """U V^T [n, n] at the optimum of the full-batch loss for d >= n - 1, the simplex equiangular tight frame."""
    return (n * torch.eye(n, **kind) - 1) / (n - 1)


def etf_loss(n: int, batch_size: int | None = None, temperature: float = 1.0) -> float:
    """InfoNCE at the ETF: of all n pairs, or of any batch of batch_size of them."""
    return 2 * math.log1p(((batch_size or n) - 1) * math.exp(-n / (n - 1) / temperature))


def cross_polytope_loss(n: int) -> float:
    """Full-batch InfoNCE at the cross-polytope, d = n / 2: half the points the negatives of the other half."""
    return 2 * math.log((math.e + 1 / math.e + n - 2) / math.e)


def cross_polytope(partner: Tensor) -> Tensor:
    """U V^T [..., n, n] of the cross-polytope in which partner [..., n] is the sample at the opposite point."""
    n = partner.shape[-1]
    return torch.eye(n, device=partner.device) - F.one_hot(partner, n)


class Matching:
    """Perfect matchings of n samples, n even and at most 20, of the least sum of costs: exact, many matrices at once.

    Dynamic programming over the sets of samples still alone: the lowest of a set is matched to each of the others.
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
            self.levels.append((torch.tensor([m[0] for m in members]), torch.tensor([m[1:] for m in members]),
                                torch.tensor([[place[s] for s in row] for row in left])))

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
    """Of U V^T to the optimum, Frobenius norm [R]: to the ETF; with a matching to the nearest cross-polytope."""
    s = u @ v.mT
    if matching is None:
        return (s - etf(s.shape[-1], dtype=s.dtype, device=s.device)).flatten(1).norm(dim=1)
    partner = matching(s + s.mT)  # ||S - G||^2 = ||S||^2 - 2 <S, G> + 2n, and <S, G> is tr S less the matched entries
    return (s - cross_polytope(partner.to(s.device))).flatten(1).norm(dim=1)


# ------------------------------------------------------------------------------------------------- dynamics
def start(runs: int, n: int, d: int, seed: int, **kind) -> tuple[Tensor, Tensor]:
    """U, V [runs, n, d], each row uniform on the sphere."""
    g = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(runs, n, d, generator=g, dtype=torch.float64), dim=2).to(**kind) for _ in range(2))


def loss_gradient(logits: Tensor) -> Tensor:
    """Of infonce with respect to its logits [..., B, B]: (softmax over rows + softmax over columns - 2 I) / B."""
    B = logits.shape[-1]
    g = logits.softmax(-1) + logits.softmax(-2)
    g.diagonal(dim1=-2, dim2=-1).sub_(2)
    return g / B


def descend(u: Tensor, v: Tensor, batches: Tensor, lr: float, temperature: float = 1.0, weights: Tensor | None = None) -> None:
    """One step in place: U and V less lr times the gradient of the mean batch loss, and all rows back to unit length.

    u, v [R, N, d]; batches [m, B] for all runs or [R, m, B]; weights [R, m] of the batches (default: all 1 / m).
    """
    R, n, d = u.shape
    m, B = batches.shape[-2:]
    scale = lr / temperature * (1 / m if weights is None else weights[:, :, None, None])
    if m * B >= n:  # every inner product once, however many batches it is in: chunks of batches bound the memory
        s, slope = (u @ v.mT / temperature).flatten(1), u.new_zeros(R, n * n)
        for i in range(0, m, chunk := max(1, 2 ** 24 // (R * B * B))):
            part = batches[..., i:i + chunk, :]
            index = (part[..., :, None] * n + part[..., None, :]).flatten(-3).expand(R, -1)
            g = loss_gradient(s.gather(1, index).view(R, -1, B, B))
            slope.scatter_add_(1, index, (scale * g if weights is None else scale[:, i:i + chunk] * g).flatten(1))
        slope = slope.view(R, n, n)
        du, dv = slope @ v, slope.mT @ u
        for x, dx in ((u, du), (v, dv)):
            x -= dx
            x /= x.norm(dim=2, keepdim=True)
    else:  # only the rows of these batches move
        rows = (batches + torch.arange(R, device=u.device)[:, None, None] * n).expand(R, m, B)
        flat = rows.flatten()
        a, b = (x.view(-1, d)[flat].view(R, m, B, d) for x in (u, v))
        g = scale * loss_gradient(a @ b.mT / temperature)
        for x, dx in ((u, g @ b), (v, g.mT @ a)):
            x = x.view(-1, d)
            x.index_add_(0, flat, dx.view(-1, d), alpha=-1)
            x[flat] = F.normalize(x[flat], dim=1)


# ------------------------------------------------------------------------------------------------- methods
METHODS = {  # name: (label with the number of the paper's algorithm, colour)
    "full": ("full batch", "#000000"), "ncb": ("all N choose B", "#D55E00"), "fixed": ("fixed disjoint", "#56B4E9"),
    "sgd-replacement": ("SGD with replacement (3)", "#999999"), "sgd": ("SGD (4)", COLOURS["random"]),
    "osgd-direct": ("OSGD of all (2)", "#7F5F00"), "osgd-replacement": ("OSGD with replacement (5)", COLOURS["osgd-replacement"]),
    "osgd": ("OSGD (6)", COLOURS["osgd"]), "spectral": ("spectral (1)", COLOURS["spectral"]),
    "refined": ("refined", COLOURS["refined"]),
}


def k_and_q(n: int, batch_size: int) -> tuple[int, int]:
    """OSGD's k and q here: all batches of a permutation, of which a quarter is kept."""
    return n // batch_size, max(1, n // batch_size // 4)


def schedule(method: str, u: Tensor, v: Tensor, batch_size: int, temperature: float, generator: Generator) -> Iterator[Tensor]:
    """The batches of each next step, [m, B] for all runs or [R, m, B], by a method of METHODS (paper's algorithm in brackets).

    u, v [R, N, d] are looked at when a method is due to choose. Samplers get all runs' rows one after the other.
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
            yield hardest(random_batches_with_replacement(R * k, n, batch_size, generator).view(R, k, -1).to(device), q)
        else:  # lists, taken one batch a step
            if method in ("spectral", "refined"):
                batches = spectral_batches(*rows, batch_size, k, temperature, generator, refine=method == "refined")
                batches = batches.view(R, k, batch_size) - first
            else:
                batches = permutations() if method == "sgd" else hardest(permutations(), q).flip(1)
            yield from batches.split(1, dim=1)


def evaluations(method: str, n: int, batch_size: int) -> tuple[float, float]:
    """Pairs in a gradient and pairs embedded only to choose, both a step."""
    k, q = k_and_q(n, batch_size)
    every = math.comb(n, batch_size) * batch_size
    return {"full": (n, 0), "ncb": (every, 0), "fixed": (k * batch_size, 0), "osgd-direct": (batch_size, every),
            "osgd-replacement": (q * batch_size, k * batch_size), "osgd": (batch_size, k * batch_size / q),
            "spectral": (batch_size, batch_size), "refined": (batch_size, batch_size)}.get(method, (batch_size, 0))


def train(method: str, u: Tensor, v: Tensor, batch_size: int, steps: int, lr: float, generator: Generator,
          temperature: float = 1.0, every: int = 1, matching: Matching | None = None) -> Tensor:
    """Distances [R, steps / every + 1] to the optimum along `steps` steps of a method, which change u and v in place."""
    distances = [distance(u, v, matching)]
    for step, batches in zip(range(1, steps + 1), schedule(method, u, v, batch_size, temperature, generator)):
        descend(u, v, batches, lr, temperature)
        if step % every == 0:
            distances.append(distance(u, v, matching))
    return torch.stack(distances, 1)


# ------------------------------------------------------------------------------------------------- statistics
def interval(samples, statistic=np.mean, draws: int = 2000) -> tuple[float, float, float]:
    """A statistic of samples [R] (or [R, columns], resampled together) and its 95 % bootstrap interval over R.

    statistic(x, axis) of an array, over that axis.
    """
    samples = np.asarray(samples, dtype=float)
    pick = np.random.default_rng(0).integers(len(samples), size=(draws, len(samples)))
    with np.errstate(invalid="ignore", divide="ignore"):
        low, high = np.quantile(statistic(samples[pick], axis=1), (0.025, 0.975), method="nearest")
        return float(statistic(samples, axis=0)), float(low), float(high)


def verdict(low: float, high: float, allowed: tuple[float, float]) -> str:
    """Whether an interval of what was measured lies in the range that a claim allows, outside of it, or neither."""
    if allowed[0] <= low and high <= allowed[1]:
        return "holds"
    return "does not hold" if high < allowed[0] or low > allowed[1] else "not settled"


def claim(text: str, measured: tuple[float, float, float], allowed: tuple[float, float], form: str) -> dict:
    """A claim, what was measured (value, interval), and the verdict. form: the closed form or bound, in words."""
    return {"claim": text, "measured": measured[0], "interval": measured[1:], "allowed": allowed, "form": form,
            "verdict": verdict(*measured[1:], allowed)}


def first_steps(distances: Tensor, tolerance: float, every: int = 1) -> np.ndarray:
    """Steps [R] to the first distance [R, T] within the tolerance; infinity where there is none."""
    there = distances <= tolerance
    return torch.where(there.any(1), there.int().argmax(1).double() * every, torch.inf).cpu().numpy()


def speedup(steps: int):
    """Statistic of [R, 2]: median steps of SGD over those of a method. Runs of SGD that never arrive count as `steps`,
    so that it is then a lower bound; 0 where only SGD arrives, NaN where neither does."""
    def ratio(x: np.ndarray, axis: int) -> np.ndarray:
        sgd, own = np.moveaxis(np.median(x, axis), -1, 0)
        return np.where(np.isinf(sgd) & np.isinf(own), np.nan, np.minimum(sgd, steps) / own)
    return ratio


def table_of(title: str, reached: dict, ratios: dict, tolerances, steps: int) -> list[str]:
    """Markdown: a method's median steps to each distance, and in brackets SGD's over them with the 95 % interval."""
    def cell(own: np.ndarray, ratio: tuple) -> str:
        if not np.isfinite(np.median(own)):
            return "–"
        return f"{np.median(own):g} ({ratio[0]:.2g}; {ratio[1]:.2g} to {ratio[2]:.2g})".replace("nan", "?")
    return [f"| {title}: steps to (SGD's / own; – : not in {steps}) | " + " | ".join(f"{t:g}" for t in tolerances) + " |",
            "|---" * (len(tolerances) + 1) + "|"] + [
        f"| {METHODS[method][0]} | " + " | ".join(cell(*x) for x in zip(own, ratios[method])) + " |" for method, own in reached.items()] + [""]


def growth(text: str, first: tuple, last: tuple, form: str) -> dict:
    """The claim that a lead, (value, low, high), has grown, by the quotient of the two."""
    with np.errstate(invalid="ignore", divide="ignore"):
        one, other = np.array(first), np.array(last)
        return claim(text, tuple((other / one[[0, 2, 1]]).tolist()), (1, math.inf), f"leads {form}: {other[0]:.2g} / {one[0]:.2g} >= 1")
