"""Mini-batches for contrastive learning, random or hard. Copy this file: it needs torch and scipy alone.

    sampler = ContrastiveBatchSampler(len(dataset), batch_size=32)
    for rows in sampler:                  # an epoch; or DataLoader(dataset, batch_sampler=sampler)
        ...                               # a step on these samples, which embeds them: u, v [32, d]
        sampler.update(rows, u, v)        # for nothing: the next epoch's batches are hard to tell apart

or on embeddings that you have, u, v [n, d] in a random order:

    batches = spectral_batches(u, v, batch_size=32, k=40, refine=True)   # [n // 32, 32]: hard to tell apart
    print(batch_losses(u, v, batches).mean(), batch_losses(u, v, random_batches(len(u), 32)).mean())

The algorithms of Cho et al., "Mini-Batch Optimization of Contrastive Loss" (TMLR 2024), with its letters: n
pairs, B = batch_size, k batches at a time of which q are kept. Row i of v is the partner of row i of u; both
may have any length (they are scaled to 1), any floating-point type and device. Every selection returns int64
row numbers, the same for the same state of `generator` (None: torch's global one). Whatever does not fit
raises a ValueError that says what to give; values of a GPU are looked at only where it waits anyway.
"""
import copy
import functools
import math
import operator
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain, combinations

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor
from torch.utils.data import BatchSampler, SequentialSampler

LOSSES = ("nt_xent", "dcl", "infonce")
MAX_INDICES = 2 ** 27  # all_batches: entries of the table, 1 GiB
# spectral_batches: the largest window that is solved whole, in rows or in batches; the parts of larger ones.
DENSE_ROWS, DENSE_BATCHES, PART_ROWS = 4096, 128, 1280


# ------------------------------------------------------------------------------------------ what is refused
def _integer(name: str, x: int, least: float = -math.inf, most: float = math.inf, where: str = "") -> int:
    try:
        if least <= (number := operator.index(x)) <= most:
            return number
    except TypeError:
        pass
    raise ValueError(f"{name} is {x!r:.80}{where}; give an integer from {least} to {most}")


def _check_size(n: int, batch_size: int, k: int = 1) -> tuple[int, int, int]:
    n = _integer("number of samples", n)
    batch_size = _integer("batch_size", batch_size, 2, n, f" with {n} samples")
    k = _integer("k", k, 1, n // batch_size, f" with {n} samples in batches of {batch_size}")
    return n, batch_size, k


def _kind(x) -> str:
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f"of type {type(x).__name__}"


def _check(u: Tensor, v: Tensor, temperature: float, read: bool | None = None) -> None:
    """read: also the values, for which a GPU must wait (None: on the CPU alone)."""
    fit = all(isinstance(x, Tensor) and x.ndim == 2 and x.is_floating_point() for x in (u, v))
    if not fit or u.shape != v.shape or u.shape[1] == 0:
        raise ValueError(f"u is {_kind(u)} and v {_kind(v)}; give two floating-point torch tensors [n, d] of "
                         "one shape (of numpy's torch.from_numpy(u))")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; give a number > 0, for instance 0.1")
    for name, x in (("u", u), ("v", v)) if read or read is None and u.device.type == "cpu" else ():
        # The sum, twenty times as fast, first; it may also overflow, so the rows decide.
        total = x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))
        if not total.isfinite() and (count := int((~x.isfinite()).any(1).sum())):
            raise ValueError(f"{name} has {count} of {len(x)} rows with NaN or infinity; drop them, or see "
                             "why the encoder made them (a learning rate too high, half-precision overflow)")


def _check_rows(name: str, rows: Tensor, n: int, ndim: int, read: bool) -> None:
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != ndim:
        raise ValueError(f"{name} is {_kind(rows)}; give int64 row numbers {('[m]', '[m, B]')[ndim - 1]}")
    if read and rows.numel() and not 0 <= rows.min() <= rows.max() < n:
        raise ValueError(f"{name} has rows from {rows.min()} to {rows.max()}; give 0 to {n - 1}")


def _check_exclude(exclude, n: int, refine: bool, batch_size: int, k: int) -> Tensor | None:
    if exclude is None:
        return None
    x = exclude if isinstance(exclude, Tensor) else np.asarray(exclude)
    most = _dense(batch_size) // batch_size  # parts of similar rows are mostly of one group
    if x.shape != (n,) or "int" not in str(x.dtype) or not refine or k > most:
        raise ValueError(f"exclude is {tuple(x.shape)} {x.dtype}, refine {refine}, k {k}; give {n} integers "
                         "(of names numpy.unique(names, return_inverse=True)[1]), refine=True and a k of at "
                         f"most {most}")
    return torch.as_tensor(x)


def _dense(batch_size: int) -> int:
    """Rows of the largest window that is solved whole."""
    return max(min(DENSE_ROWS, DENSE_BATCHES * batch_size), 2 * batch_size)


def _unit(u: Tensor, v: Tensor) -> list[Tensor]:
    """Rows of length 1, float32 or float64, also of rows whose squares are out of range."""
    dtype = torch.promote_types(torch.promote_types(u.dtype, v.dtype), torch.float32)
    units = []
    for x in (u.to(dtype), v.to(dtype)):
        largest = x.detach().abs().amax(1, keepdim=True)
        units.append(F.normalize(x / largest.masked_fill(largest == 0, 1), dim=1))
    return units


# ------------------------------------------------------------------------------------------ scores
def batch_losses(u: Tensor, v: Tensor, batches: Tensor, temperature: float = 0.1,
                 loss: str = "nt_xent") -> Tensor:
    """The loss of each batch: the score of OSGD.

    u, v [n, d]; batches [m, B] row numbers.  Returns [m] on the device of u, float32 (float64 for float64
    input).  "nt_xent" (Chen et al., ICML 2020): the mean over the 2B views of -log softmax at the partner,
    the softmax taken over the other 2B - 1 views of the cosines / temperature.  "dcl" (Yeh et al., ECCV
    2022): without the partner in the denominator.  "infonce", of the paper's theory and of two modalities:
    the softmax over the B rows of the other view, the two directions added.  Memory is bounded by chunks;
    gradients flow (and then keep every chunk).
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; give one of {', '.join(LOSSES)}")
    _check(u, v, temperature)
    on_cpu = u.device.type == "cpu"
    _check_rows("batches", batches, len(u), 2, read=on_cpu)
    batches, B, d = batches.to(u.device, non_blocking=u.is_cuda), batches.shape[1], u.shape[1]
    losses = []
    with torch.autocast(u.device.type, enabled=False):  # a bfloat16 logit of 10 is wrong by 0.03
        u, v = _unit(u, v)
        # A chunk's views and logits stay in a core's cache; on a GPU larger chunks save launches.
        chunk = max(1, (2 ** 22 if on_cpu else 2 ** 28) // (u.itemsize * 2 * B * (2 * B + d)))
        for rows in batches.split(chunk):
            a, b = (x.index_select(0, rows.reshape(-1)).view(-1, B, d) for x in (u, v))
            if loss == "infonce":
                s = a @ b.mT / temperature  # [c, B, B]
                losses.append((s.logsumexp(1) + s.logsumexp(2) - 2 * s.diagonal(0, 1, 2)).mean(1))
                continue
            z = torch.cat([a, b], 1)  # [c, 2B, d]
            # Less its upper bound: with exp(-2 / temperature) in range, no maximum need be found.
            s = (z @ z.mT).sub_(1).div_(temperature)  # [c, 2B, 2B]
            positive = s.diagonal(B, 1, 2).mean(1)
            for offset in (0,) if loss == "nt_xent" else (0, B, -B):
                s.diagonal(offset, 1, 2).fill_(-torch.inf)
            lse = s.exp().sum(2).log() if temperature > 0.03 else s.logsumexp(2)
            losses.append(lse.mean(1) - positive)
    return torch.cat(losses)


# ------------------------------------------------------------------------------------------ random batches
def random_batches(n: int, batch_size: int, generator: Generator | None = None) -> Tensor:
    """A random permutation of n samples cut into batches [n // B, B], the rest dropped (Algorithm 4)."""
    n, batch_size, _ = _check_size(n, batch_size)
    order = torch.randperm(n, generator=generator, device=generator.device if generator else "cpu")
    return order[:n // batch_size * batch_size].view(-1, batch_size)


def random_batches_with_replacement(m: int, n: int, batch_size: int,
                                    generator: Generator | None = None) -> Tensor:
    """m independent, uniformly random B-subsets of n samples, [m, B] (Algorithm 3)."""
    (n, batch_size, _), m = _check_size(n, batch_size), _integer("m", m, 1)
    device = generator.device if generator else "cpu"
    # Floyd's sampling, all rows at once: column c draws from 0..n-B+c, and takes that last number where its
    # draw is there already.
    last = torch.arange(n - batch_size, n, device=device)
    rows = torch.randint(2 ** 63 - 1, (m, batch_size), generator=generator, device=device) % (last + 1)
    for c in range(1, batch_size):
        taken = (rows[:, :c] == rows[:, c:c + 1]).any(1)
        rows[:, c] = torch.where(taken, last[c], rows[:, c])
    return rows


def all_batches(n: int, batch_size: int) -> Tensor:
    """Every B-subset of n samples, [C(n, B), B], in lexicographic order ("NcB", for Algorithm 2)."""
    n, batch_size, _ = _check_size(n, batch_size)
    count = math.comb(n, batch_size)
    if count * batch_size > MAX_INDICES:
        raise ValueError(f"n = {n} has {count} batches of {batch_size}, of which {MAX_INDICES // batch_size} "
                         "are listed at most; take a smaller n or random_batches_with_replacement")
    rows = np.fromiter(chain.from_iterable(combinations(range(n), batch_size)), np.int64, count * batch_size)
    return torch.from_numpy(rows).view(count, batch_size)


# ------------------------------------------------------------------------------------------ by loss
def select_by_loss(u: Tensor, v: Tensor, batches: Tensor, q: int, temperature: float = 0.1,
                   lowest: bool = False, loss: str = "nt_xent") -> Tensor:
    """Of the given batches the q of highest (or `lowest`) loss, by rising loss (of all_batches: Algorithm 2).

    u, v [n, d]; batches [k, B], or [groups, k, B] to choose q in each group.  Returns [q, B], [groups, q, B].
    """
    _check(u, v, temperature, read=False)
    k, batch_size = batches.shape[-2:]
    q, batches = _integer("q", q, 1, k, f" with k = {k}"), batches.to(u.device, non_blocking=u.is_cuda)
    losses = batch_losses(u.detach(), v.detach(), batches.reshape(-1, batch_size), temperature, loss)
    order = losses.view(batches.shape[:-1]).argsort(dim=-1, stable=True)
    chosen = order[..., :q] if lowest else order[..., k - q:]
    return batches.gather(-2, chosen[..., None].expand(*chosen.shape, batch_size))


def osgd_batches(u: Tensor, v: Tensor, batch_size: int, k: int, q: int, temperature: float = 0.1,
                 lowest: bool = False, loss: str = "nt_xent") -> Tensor:
    """Of each k consecutive batches the q of highest loss (OSGD without replacement, Algorithm 6).

    u, v [n, d] in a random order: rows 0..B-1 are the first batch.  Returns [(n // B // k) * q, B], group by
    group, each as select_by_loss gives it; a last group of fewer than k batches is dropped.
    """
    _check(u, v, temperature, read=False)
    n, batch_size, k = _check_size(len(u), batch_size, k)
    groups = n // batch_size // k
    batches = torch.arange(groups * k * batch_size, device=u.device).view(groups, k, batch_size)
    return select_by_loss(u, v, batches, q, temperature, lowest, loss).flatten(0, 1)


def osgd_batches_with_replacement(u: Tensor, v: Tensor, batch_size: int, k: int, q: int,
                                  temperature: float = 0.1, lowest: bool = False,
                                  generator: Generator | None = None, loss: str = "nt_xent") -> Tensor:
    """Of k uniformly random B-subsets the q of highest loss, [q, B] (one step of OSGD, Algorithm 5)."""
    _check(u, v, temperature, read=False)
    draws = random_batches_with_replacement(_integer("k", k, 1), len(u), batch_size, generator)
    return select_by_loss(u, v, draws, q, temperature, lowest, loss)


# ------------------------------------------------------------------------------------------ by similarity
def spectral_affinity(u: Tensor, v: Tensor, batch_size: int, temperature: float = 0.1) -> Tensor:
    """Edge weights W [n, n] of the graph whose heavy clusters are hard batches (Algorithm 1).

    With unit rows divided by sqrt(temperature) and f(x) = log(1 + (B-1) e^x),
        w(k, l) = sum over (i, j) in {(k, l), (l, k)} of f(u_i.v_j - u_i.v_i) + f(v_i.u_j - v_i.u_i):
    the sum of w inside a batch, over B(B-1), bounds its InfoNCE loss from below.  Symmetric, zero diagonal,
    on the device of u, float32 (float64 for float64 input).
    """
    _check(u, v, temperature, read=True)
    batch_size = _integer("batch_size", batch_size, 2)
    with torch.autocast(u.device.type, enabled=False):
        u, v = _unit(u, v)
        s = (u @ v.T) / temperature
        own = s.diagonal() - math.log(batch_size - 1)
        if temperature < 0.06:
            w = F.softplus(s - own[:, None]) + F.softplus(s - own)
        else:  # one exponential and one logarithm, in float32's range up to exp(2 / 0.06): four times as fast
            scale = (1 / temperature - own).exp()
            s = s.sub_(1 / temperature).exp_()
            one = torch.ones((), dtype=s.dtype, device=s.device)
            w = torch.addcmul(one, s, scale[:, None]).mul_(torch.addcmul(one, s, scale)).log_()
        return (w + w.T).fill_diagonal_(0)


def spectral_batches(u: Tensor, v: Tensor, batch_size: int, k: int, temperature: float = 0.1,
                     generator: Generator | None = None, refine: bool = False, exclude: Tensor | None = None,
                     relative_margin: float | None = None) -> Tensor:
    """Batches of samples hard to tell apart: balanced spectral clustering of spectral_affinity (Algorithm 1).

    u, v [n, d] in a random order: each window of k * B rows (the last may be smaller) is split into batches
    of exactly B, the last n % B rows dropped.  Returns [n // B, B] on the device of u.  refine: exchange rows
    between batches until they are harder still (ours: refine_by_weight).  Memory is O((k B)^2) up to
    DENSE_ROWS rows or DENSE_BATCHES batches; a larger window is cut into parts of similar rows, about
    PART_ROWS each, and with refine batches that lie close are twice brought together in new parts.
    Against false negatives, with refine, such rows share a batch only where sizes leave no other way: exclude
    [n], integers such as class labels: rows of one number (needs a window solved whole); relative_margin (as
    in NV-Retriever): rows whose u_i.v_j and u_j.v_i exceed 1 - relative_margin of both u_i.v_i and u_j.v_j.
    """
    _check(u, v, temperature, read=True)
    _, B, k = _check_size(len(u), batch_size, k)
    exclude = _check_exclude(exclude, len(u), refine, B, k)
    if relative_margin is not None and not (0 <= relative_margin < 1 and refine):
        raise ValueError(f"relative_margin is {relative_margin}, refine {refine}; give one >= 0 and < 1, for "
                         "instance 0.1, and refine=True")
    whole = len(u) // B * B
    u, v = (x.float() for x in _unit(u.detach()[:whole], v.detach()[:whole]))

    def solve(rows: Tensor, batches: Tensor | None = None) -> Tensor:
        w = spectral_affinity(u[rows], v[rows], B, temperature)
        apart, rounds = None, None
        if exclude is not None:
            group = exclude.to(w.device)[rows]
            apart = group[:, None] == group
        if relative_margin is not None:
            s = u[rows] @ v[rows].T
            near = (1 - relative_margin) * s.diagonal()
            close = torch.minimum(s, s.T) > torch.maximum(near[:, None], near)
            apart = close if apart is None else apart | close
        if apart is not None:
            w.masked_fill_(apart.fill_diagonal_(False), 0)
        if batches is None:
            batches = _balanced_clusters(w, B, generator)
        if apart is not None:  # one such edge outweighs all that a batch can gain; a round may part but two
            w.masked_fill_(apart, -4 * B * w.max())
            rounds = max(batches.numel(), 2 ** 31 // (batches.numel() * B))
        return rows[refine_by_weight(w, batches, rounds) if refine else batches.to(rows.device)]

    def solve_in_parts(window: Tensor) -> Tensor:
        part = min(max(PART_ROWS // B, 2), DENSE_BATCHES)  # batches in a part
        centre = F.normalize(u[window] + v[window], dim=1)
        parts = _similar_parts(centre, part * B, B, generator)
        batches = torch.cat([solve(window[rows]) for rows in parts])
        for _ in range(2 * refine):
            groups = _similar_parts(centre[batches - window[0]].mean(1), part, 1, generator)
            batches = torch.cat([solve(batches[group].flatten(), torch.arange(
                len(group) * B, device=u.device).view(-1, B)) for group in groups])
        return batches

    with torch.autocast(u.device.type, enabled=False):
        windows = torch.arange(whole, device=u.device).split(k * B)
        return torch.cat([(solve if len(rows) <= _dense(B) else solve_in_parts)(rows) for rows in windows])


def refine_by_weight(w: Tensor, batches: Tensor, max_rounds: int | None = None) -> Tensor:
    """A partition of greater inside weight, from any one: exchanges between batches while they add to it.

    w [n, n] symmetric, finite, with zero diagonal (spectral_affinity); batches [k, B] of its rows, all
    distinct; returns [k, B].  With D[i, b] the weight of row i to the rows of batch b, exchanging row i of a
    and row j of b adds
        D[i, b] - D[i, a] + D[j, a] - D[j, b] - 2 w[i, j]
    to the sum of w inside batches. A round makes the best exchange in each of many disjoint pairs of batches,
    those first whose bound (the same without w[i, j]) is highest. Ends where no exchange helps, or after
    max_rounds (default: 2^30 gains looked at, which only batches of hundreds reach).
    """
    _check_rows("batches", batches, len(w), 2, read=w.device.type == "cpu")
    k, size = batches.shape
    batches = batches.to(w.device, copy=True)
    if k < 2:
        return batches
    if max_rounds is None:
        max_rounds = max(2 ** 31 // (k * size ** 2), 1)
    every = torch.arange(k, device=w.device)
    inside = w[:, batches.flatten()].view(-1, k, size).sum(2)[batches]  # [k, B, k]: D of the row in each slot
    own = inside.diagonal(0, 0, 2).T[:, :, None]  # a view: D[i, a]
    least = 1e-6 * inside.abs().mean()  # what counts as better
    top = (inside - own).amax(1)  # [a, b]: the most that a row of a gains by moving to b
    open_pairs = ~torch.eye(k, dtype=torch.bool, device=w.device)
    for _ in range(max_rounds):
        bound, mate = (top + top.T).where(open_pairs, -torch.inf).max(1)
        a = ((mate[mate] == every) & (every < mate) & (bound > least)).nonzero()[:, 0]
        if len(a) == 0:
            break
        b = mate[a]
        leave = (inside[a, :, b] - inside[a, :, a])[:, :, None] + (inside[b, :, a] - inside[b, :, b])[:, None]
        gain = leave - 2 * w[batches[a][:, :, None], batches[b][:, None]]  # [pairs, B, B]
        gain, slots = gain.flatten(1).max(1)
        better = gain > least
        open_pairs[a[~better], b[~better]] = open_pairs[b[~better], a[~better]] = False
        a, b, x, y = a[better], b[better], slots[better] // size, slots[better] % size
        i, j = batches[a, x], batches[b, y]
        batches[a, x], batches[b, y] = j, i
        inside[a, x], inside[b, y] = inside[b, y], inside[a, x]
        change = (w[j] - w[i])[:, batches].permute(1, 2, 0)
        inside[:, :, a] += change
        inside[:, :, b] -= change
        changed = torch.cat([a, b])
        top[changed] = (inside[changed] - own[changed]).amax(1)
        top[:, changed] = (inside[:, :, changed] - own).amax(1)
        open_pairs[changed] = open_pairs[:, changed] = True
        open_pairs.fill_diagonal_(False)
    return batches


def _similar_parts(x: Tensor, size: int, unit: int, generator: Generator | None,
                   rows: Tensor | None = None) -> list[Tensor]:
    """Row numbers of x [n, d] in parts of similar rows, at most `size` each, a multiple of `unit` (n is one):
    bisects by the line between two centres (2-means of a sample), where it keeps parts of one size."""
    rows = torch.arange(len(x), device=x.device) if rows is None else rows
    count = -(-len(rows) // size)
    if count == 1:
        return [rows]
    device = generator.device if generator else "cpu"
    sample = x[rows[torch.randint(len(rows), (2048,), generator=generator, device=device).to(x.device)]]
    one, two = sample[:2]
    for _ in range(8):
        line = two - one
        near = (sample @ line > (two + one) @ line / 2).to(x.dtype)
        one, two = (weight @ sample / weight.sum().clamp(min=1) for weight in (1 - near, near))
    order = rows[(x[rows] @ (two - one)).argsort(stable=True)]
    cut = count // 2 * -(-len(rows) // count // unit) * unit
    return [part for half in (order[cut:], order[:cut])
            for part in _similar_parts(x, size, unit, generator, half)]


def _balanced_clusters(w: Tensor, size: int, generator: Generator | None) -> Tensor:
    """Rows of the affinity w [n, n] in clusters of exactly `size`, [n // size, size]."""
    n, k = len(w), len(w) // size
    if k == 1:
        return torch.arange(n)[None]
    draw = dict(generator=generator, device=generator.device if generator else "cpu", dtype=w.dtype)
    # Largest eigenpairs of D^-1/2 W D^-1/2. Of large ones by subspace iteration: after 4 products the
    # batches are as hard as with exact eigenvectors, to 1 %, in a tenth of the time.
    half = w.sum(1, keepdim=True).clamp(min=1e-30).rsqrt()
    if n <= max(256, 4 * k):
        values, x = torch.linalg.eigh(half * w * half.T)
    else:
        x = torch.randn(n, min(n, k + 8), **draw).to(w.device)
        for _ in range(4):
            x = torch.linalg.qr(half * (w @ (half * x)))[0]
        values, rotation = torch.linalg.eigh(x.T @ (half * (w @ (half * x))))
        x = x @ rotation
    # The first one is D^1/2 1 for every graph. Scaled by the root of the eigenvalue, inner products of rows
    # are the closest rank-k affinity. A diagonal added to W, which no partition feels, lifts negative ones.
    x = (x[:, -k:-1] * (values[-k:-1] - values[-k - 1].clamp(max=0)).sqrt()).cpu()  # [n, k-1]: small now
    # k-means++ (Arthur & Vassilvitskii, 2007): the next centre with probability by squared distance.
    distance, chosen = x.new_full((n,), torch.inf), []
    for number in torch.rand(k, **draw).cpu():
        total = (distance if chosen else torch.ones_like(distance)).cumsum(0)
        # The clamp: with fewer distinct points than centres every distance ends at 0.
        chosen.append(torch.searchsorted(total, number * total[-1], right=True).clamp(max=n - 1))
        distance = torch.minimum(distance, (x - x[chosen[-1]]).square().sum(1))
    centres = x[torch.stack(chosen)]
    for _ in range(10):  # Lloyd; further rounds add less than 1 %
        member = F.one_hot((2 * x @ centres.T - centres.square().sum(1)).argmax(1), k).to(x.dtype)
        count = member.sum(0)[:, None]
        centres = torch.where(count > 0, member.T @ x / count.clamp(min=1), centres)
    label = _assign(2 * x @ centres.T - centres.square().sum(1), size)
    return label.argsort(stable=True).view(k, size)


def _assign(gain: Tensor, size: int) -> Tensor:
    """Labels [n] from gain [n, k], each given to exactly `size` = n / k rows, of (nearly) the greatest sum.

    At the right prices on the labels each row's own choice is the assignment. Sinkhorn iterations find them
    up to a few rows; those, and the rows nearest to changing their minds, 320 in all, are then assigned
    optimally: all 1,280 take ten times as long.
    """
    n, k = gain.shape
    gain = gain / gain.std().clamp(min=1e-12)
    price = gain.new_zeros(k)
    for step in range(20):
        heat = max(0.05, 0.5 * 0.8 ** step)
        demand = torch.softmax((gain - price) / heat, 1).sum(0)
        price += heat * (demand / size).clamp(min=1e-9).log()
    gain = gain - price
    best, labels = gain.topk(2, 1)
    label = labels[:, 0]
    order = (best[:, 1] - best[:, 0]).argsort(stable=True)  # surest first
    order = order[label[order].argsort(stable=True)]
    count = torch.bincount(label, minlength=k)
    rank = torch.empty_like(label)
    rank[order] = torch.arange(n) - (count.cumsum(0) - count)[label[order]]  # of a row within its label
    loose = rank >= size - max(1, 320 // k)
    slots = torch.arange(k).repeat_interleave(size - torch.bincount(label[~loose], minlength=k))
    assigned = linear_sum_assignment(gain[loose][:, slots].numpy(), maximize=True)[1]
    label[loose] = slots[torch.from_numpy(assigned)]
    return label


# ------------------------------------------------------------------------------------------ batch after batch
class ContrastiveBatchSampler(BatchSampler):
    """Batches for DataLoader(dataset, batch_sampler=...) or a loop of your own: lists of B row numbers.

    method: "spectral" (Algorithm 1): a permutation of the n samples is taken in windows of k * B samples,
    each split into k hard batches; "osgd" (6): of each k batches of a permutation the q of highest, or
    `lowest`, loss; "osgd-replacement" (5): of k batches drawn anew from all samples; "random" (4); or a
    function (u, v, batch_size, k, temperature, generator) -> batches [m, B] of the window's rows.  k: 40, or
    n // B if that is less; q: a tenth of k.  refine, exclude, relative_margin, loss, temperature:
    as in spectral_batches, select_by_loss. The first random_epochs are random.  u, v [m, d] come from
    - embed(indices [m]), without gradients, embed_size samples a call; set the encoder to eval mode in it.
      Each window is embedded in its turn or, at_once, all samples whenever a permutation is drawn
      (osgd-replacement: in each epoch); or
    - update(indices, u, v) after each step: the step's own embeddings, for nothing. Samples not yet seen come
      first, in random batches: the first epoch, or all where neither function is used.
    ahead, with update or at_once: a thread chooses the next window on the CPU while the steps of this one
    run, with the same result; not of osgd, which a GPU does best.
    An epoch is n // B batches: a partition, or, of osgd, as much of one permutation after another; a new
    iteration is the next epoch, also where the last one was broken off. The processes of torch.distributed
    choose the same batches, embed a share each and share what update is given. Each of world_size takes every
    world_size-th batch; leave rank and world_size out where the trainer deals batches out, as accelerate
    does. It, and DataLoader workers, fetch ahead: state_dict(behind).
    """
    MADE = ("num_samples", "batch_size", "method", "refine", "k", "q", "lowest", "temperature", "loss",
            "relative_margin", "seed", "random_epochs", "at_once", "world_size")
    STATE = "epoch", "step", "rest", "random", "pending", "stale", "uv", "seen"

    def __init__(self, num_samples: int, batch_size: int, method: str | Callable = "spectral",
                 refine: bool = True, k: int | None = None, q: int | None = None, temperature: float = 0.1,
                 seed: int = 0, embed: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
                 lowest: bool = False, exclude: Tensor | None = None, relative_margin: float | None = None,
                 rank: int = 0, world_size: int = 1, loss: str = "nt_xent", random_epochs: int = 0,
                 at_once: bool = False, ahead: bool = False, embed_size: int = 256):
        n, B, _ = _check_size(num_samples, batch_size)
        k = min(40, n // B) if k is None else k
        k = _integer("k", k, 1) if method == "osgd-replacement" else _check_size(n, B, k)[2]
        by_loss, spectral = method in ("osgd", "osgd-replacement"), method == "spectral"
        if not by_loss and not spectral and method != "random" and not callable(method):
            raise ValueError(f"method is {method!r}; give 'spectral', 'osgd', 'osgd-replacement', "
                             "'random' or a function")
        if not (by_loss or q is None and not lowest) or not (spectral or exclude is relative_margin is None):
            raise ValueError(f"method is {method!r}, q {q}, lowest {lowest}; q and lowest are for 'osgd' and "
                             "'osgd-replacement', exclude and relative_margin for 'spectral'")
        if at_once and embed is None:
            raise ValueError("at_once is given and embed is not; give both, or neither")
        q = max(1, k // 10) if q is None else _integer("q", q)
        two = torch.ones(2, 1)  # the functions themselves refuse what they cannot use
        select_by_loss(two, two, torch.zeros(k, 2, dtype=torch.int64), q, temperature, loss=loss)
        spectral_batches(two, two, 2, 1, temperature, None, refine, None, relative_margin)
        super().__init__(SequentialSampler(range(n)), B, drop_last=True)  # what trainers look at
        self.world_size = _integer("world_size", world_size, 1, n // B)
        self.rank = _integer("rank", rank, 0, self.world_size - 1)
        method, loss = (str(x) if isinstance(x, str) else x for x in (method, loss))  # numpy's own, too
        self.num_samples, self.batch_size, self.method, self.by_loss = n, B, method, by_loss
        self.k, self.q, self.lowest, self.refine = k, q, bool(lowest), bool(refine)
        self.temperature, self.loss, self.seed = float(temperature), loss, _integer("seed", seed)
        self.exclude = _check_exclude(exclude, n, refine, B, k)
        self.relative_margin = None if relative_margin is None else float(relative_margin)
        self.random_epochs = _integer("random_epochs", random_epochs)
        self.embed, self.embed_size = embed, _integer("embed_size", embed_size, 1)
        self.at_once = bool(at_once)
        self.ahead = bool(ahead) and (embed is None or at_once) and world_size == 1 and not by_loss
        self.uv = self.last = self.solved = None
        self.given = deque(maxlen=1024)  # the iteration's last steps: epoch, step, batches
        with torch.inference_mode(False):  # what is made inside it could not be written to in training
            self.seen = torch.zeros(n, dtype=torch.bool)
        self.generator = torch.Generator()
        self._begin(0)

    def _begin(self, epoch: int, go_on: bool = False) -> None:
        """The epoch's first batch comes next: of a new permutation, or where the last epoch ended."""
        if not go_on:
            self._ended()
            self.rest = torch.empty(0, dtype=torch.int64)  # of a permutation
            self.random, self.pending = 0, []  # so many batches of it are random; those of the window
        self.stale = self.at_once and (not go_on or self.stale or self.method == "osgd-replacement")
        self.epoch, self.step, self.loaded = epoch, 0, False
        self.generator.manual_seed((self.seed * 1_000_003 + epoch) % 2 ** 63)
        self.before = None  # the generator's state before a window that is not out yet

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that comes next; else it is the one after the last. Keeps a loaded position."""
        if epoch != self.epoch or self.step and not self.loaded:
            self._begin(_integer("epoch", epoch))

    def __len__(self) -> int:
        return self.num_samples // self.batch_size // self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        if self.step and not self.loaded:  # the last iteration was broken off
            self._begin(self.epoch + 1)
        self.loaded = False
        self.given.clear()
        for _ in range(len(self) - self.step):
            while len(self.pending) < self.world_size:  # so all processes choose at the same step
                self.pending += self._choose()
            batches, self.pending = self.pending[:self.world_size], self.pending[self.world_size:]
            self.given.append((self.epoch, self.step, batches))
            self.step += 1
            if self.step == len(self):  # before the last batch is out: not every loop asks for one more
                self._begin(self.epoch + 1, go_on=self.by_loss)
            yield batches[self.rank]

    def _choose(self) -> list[list[int]]:
        """The batches of the next window."""
        B, n = self.batch_size, self.num_samples
        least = self.k * B if self.method == "osgd" else B  # samples in a window
        if not self.random and len(self.rest) < least:
            self.rest = torch.randperm(n, generator=self.generator)
            if self.method == "random" or self.epoch < self.random_epochs:
                self.random = n // B
            elif self.embed is None:
                seen = self.seen.cpu()[self.rest]
                self.rest = self.rest[seen.byte().argsort(stable=True)]  # those without an embedding first
                self.random = min(math.ceil(int((~seen).sum()) / B), n // B)
            self.stale = self.at_once and not self.random
        rows, local = self._window()
        taken, self.last = len(rows), None
        if self.random:
            batches = rows[local]
        elif self.solved:
            batches, self.last = self._ended().result()
        else:
            self.before = self.generator.get_state()
            if self.method == "osgd-replacement":
                draws = random_batches_with_replacement(self.k, n, B, self.generator)
                (rows, local), taken = draws.unique(return_inverse=True), 0
            batches, self.last = self._solve(rows, local, *self._embeddings(rows))
        shared = [batches.tolist()]
        if _world()[1] > 1:
            dist.broadcast_object_list(shared)
        # Only now: embed may be interrupted.
        self.rest, self.random, self.before = self.rest[taken:], max(0, self.random - taken // B), None
        if self.ahead and not self.random and len(self.rest) >= least and self.uv is not None:
            self.before, (rows, local) = self.generator.get_state(), self._window()
            thread = _thread(os.getpid())
            self.solved = thread.submit(self._solve, rows, local, *self._embeddings(rows))
        return shared[0]

    def _window(self) -> tuple[Tensor, Tensor]:
        """The next samples of the permutation, and batches of them, numbers of these rows."""
        count = min(self.random or self.k, len(self.rest) // self.batch_size)
        local = torch.arange(count * self.batch_size).view(count, -1)
        return self.rest[:local.numel()], local

    def _solve(self, rows: Tensor, local: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, tuple]:
        """The batches chosen in the window `rows` [c], local [k, B], with embeddings u, v [c, d]; and what
        window_losses needs."""
        words = u, v, self.batch_size, len(local), self.temperature, self.generator
        if self.by_loss:
            chosen = select_by_loss(u, v, local, self.q, self.temperature, self.lowest, self.loss)
        elif self.method == "spectral":
            exclude = None if self.exclude is None else self.exclude[rows]
            chosen = spectral_batches(*words, self.refine, exclude, self.relative_margin)
        else:
            _check(u, v, self.temperature, read=True)
            chosen = self.method(*words)
            _check_rows("the method's batches", chosen, len(rows), 2, read=True)
            if len(chosen) == 0 or chosen.shape[1] != self.batch_size:
                raise ValueError(f"the method gave {_kind(chosen)}; give [m, {self.batch_size}], m > 0")
        return rows[chosen.cpu()], (u, v, rows, chosen, local)

    def _ended(self) -> Future | None:
        """What was chosen ahead, if anything was: the thread has ended, and the generator is free."""
        if self.solved:
            wait([self.solved])  # may be interrupted, and then it is still there
        solved, self.solved = self.solved, None
        return solved

    def _embeddings(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """u, v [m, d] of the samples `rows` [m]."""
        if self.stale:
            self.uv, self.stale = torch.stack(self._embed(torch.arange(self.num_samples)), 1), False
        if self.embed is not None and not self.at_once:
            return self._embed(rows)
        uv = self.uv[rows.to(self.uv.device)]
        # Ahead, all windows on the CPU: a resumed run itself chooses one that a thread had begun.
        return (uv.cpu() if self.ahead else uv).unbind(1)

    def _embed(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        rank, processes = _world()
        share = -(-len(rows) // processes)
        own = rows[(torch.arange(share) + share * rank) % len(rows)]
        with torch.no_grad():
            parts = [self.embed(part) for part in own.split(self.embed_size)]
        if any(not isinstance(x, (tuple, list)) or len(x) != 2 for x in parts):
            raise ValueError(f"embed gave {type(parts[0]).__name__}; give (u, v), two tensors [m, d]")
        u, v = (torch.cat([torch.as_tensor(x) for x in each]) for each in zip(*parts))
        if len(u) != len(own):
            raise ValueError(f"embed gave {len(u)} rows for {len(own)} indices; give one for each, in order")
        return tuple(of_all_processes(x)[:len(rows)] for x in (u, v))

    def window_losses(self) -> dict[str, Tensor] | None:
        """Of the last batch's window (None: a random one), on the embeddings it was chosen by: the losses
        `chosen` [m] of its batches, `random` [c] of random ones (osgd: those it chose among), and these
        batches, `chosen_rows` [m, B] and `random_rows` [c, B]."""
        if self.last is None:
            return None
        (u, v, rows, *both), found = self.last, {}
        for name, x in zip(("chosen", "random"), both):
            found |= {name: batch_losses(u, v, x, self.temperature, self.loss), f"{name}_rows": rows[x.cpu()]}
        return found

    def update(self, indices: Tensor | list[int], u: Tensor, v: Tensor) -> None:
        """Stores u, v [m, d] of the samples `indices` [m], on the device of u, without waiting for it. Where
        torch.distributed runs several processes all call it, with the same m, and store what all gave."""
        _check(u, v, self.temperature, read=False)
        indices, n = torch.as_tensor(indices), self.num_samples
        d = (u if self.uv is None else self.uv).shape[-1]
        _check_rows("indices", indices, n, 1, read=indices.device.type == "cpu")
        if self.embed is not None:
            raise ValueError("update is called and embed was given; leave out one of the two")
        if len(indices) != len(u) or u.shape[1] != d:
            raise ValueError(f"indices is {_kind(indices)} and u {_kind(u)}; give [m] and [m, {d}]")
        with torch.inference_mode(False), torch.no_grad():
            # Rows of float64 may be out of float32's range.
            u, v = (x.float() for x in (_unit(u, v) if torch.float64 in (u.dtype, v.dtype) else (u, v)))
            uv = of_all_processes(torch.stack([u, v], 1))
            indices = of_all_processes(indices.to(u.device, non_blocking=u.is_cuda))
            if self.uv is None:
                self.uv = torch.zeros(n, 2, d, dtype=torch.float32, device=u.device)
            self.uv, self.seen = self.uv.to(u.device), self.seen.to(u.device)
            self.uv.index_copy_(0, indices, uv)
            self.seen.index_fill_(0, indices, True)

    def _made(self) -> dict:
        made = {name: getattr(self, name) for name in self.MADE} | {"embed": self.embed and "given"}
        if callable(self.method):
            made["method"] = getattr(self.method, "__name__", type(self.method).__name__)
        return made | {"exclude": None if self.exclude is None else self.exclude.tolist()}

    def state_dict(self, behind: int = 0) -> dict:
        """Where the epoch stands, and what update stored: after load_state_dict the rest follows exactly.
        behind: so many batches, the last that were given, are fetched and not trained on; they come again."""
        behind = _integer("behind", behind, 0, len(self.given))
        generator = self.generator.get_state() if self.before is None else self.before
        state = {name: copy.deepcopy(getattr(self, name)) for name in self.STATE}
        for epoch, step, batches in list(self.given)[::-1][:behind]:
            state |= {"epoch": epoch, "step": step, "pending": copy.deepcopy(batches) + state["pending"]}
        return {"generator": generator} | state | self._made()

    def load_state_dict(self, state: dict) -> None:
        """Goes on where state_dict was called. Raises ValueError where the sampler was made otherwise."""
        for name, value in self._made().items():
            if state[name] != value:
                raise ValueError(f"{name} is {value!r:.80}; for this state make the sampler with {name} "
                                 f"{state[name]!r:.80}")
        self._begin(0)
        with torch.inference_mode(False):
            for name in self.STATE:
                setattr(self, name, copy.deepcopy(state[name]))
        self.generator.set_state(state["generator"])
        self.loaded, self.last = True, None
        self.given.clear()


@functools.cache
def _thread(process: int) -> ThreadPoolExecutor:
    """What chooses ahead: a thread that stays, as a fork beside one that is ending can hang; of this process,
    as one from before a fork never answers."""
    return ThreadPoolExecutor(1)


def _world() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def of_all_processes(x: Tensor) -> Tensor:
    """The rows of x [m, ...] of every process, one after another; each gives the same m."""
    if (processes := _world()[1]) == 1:
        return x
    every = [torch.empty_like(x) for _ in range(processes)]
    dist.all_gather(every, x.contiguous())
    return torch.cat(every)
