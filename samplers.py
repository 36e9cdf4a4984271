"""Mini-batches for contrastive learning, random or hard. Copy this file: it needs torch and scipy alone.

    sampler = ContrastiveBatchSampler(len(dataset), batch_size=32)
    for rows in sampler:                  # an epoch; or DataLoader(dataset, batch_sampler=sampler)
        ...                               # a step on these samples, which embeds them: u, v [32, d]
        sampler.update(rows, u, v)        # for nothing: the next epoch's batches are hard to tell apart

or on embeddings you have:

    u, v = encoder(view1), encoder(view2)              # [n, d] each, in a random order; any scale, any device
    batches = spectral_batches(u, v, batch_size=32, k=40, refine=True)   # [n // 32, 32]: hard to tell apart
    print(batch_losses(u, v, batches).mean(), batch_losses(u, v, random_batches(len(u), 32)).mean())

The algorithms of Cho et al., "Mini-Batch Optimization of Contrastive Loss" (TMLR 2024), with its letters: n
pairs, B = batch_size, k batches at a time of which q are kept. Every selection returns int64 row numbers, the
same for the same state of `generator` (None: torch's global one). Rows of u and v are scaled to length 1.
"""
import copy
import functools
import math
import operator
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor
from torch.utils.data import BatchSampler, SequentialSampler

LOSSES = ("nt_xent", "dcl", "infonce")
MAX_INDICES = 2 ** 27  # all_batches: entries of the table, 1 GiB
# spectral_batches: the largest window solved whole, in rows or in batches, and the parts of larger ones.
DENSE_ROWS, DENSE_BATCHES, PART_ROWS = 4096, 128, 1280


# ------------------------------------------------------------------------------------------ what is refused
def _integer(name: str, x: int, least: int | None = None) -> int:
    try:
        x = operator.index(x)
    except TypeError:
        raise ValueError(f"{name} is {x!r:.80}; give an integer") from None
    if least is not None and x < least:
        raise ValueError(f"{name} is {x}; give {least} or more")
    return x


def _check_size(n: int, batch_size: int) -> tuple[int, int]:
    n, batch_size = _integer("number of samples", n), _integer("batch_size", batch_size)
    if not 2 <= batch_size <= n:
        raise ValueError(f"batch_size is {batch_size} with {n} samples; give a batch_size from 2 to {n}")
    return n, batch_size


def _check_k(n: int, batch_size: int, k: int) -> int:
    if not 1 <= (k := _integer("k", k)) <= n // batch_size:
        raise ValueError(f"k is {k} with {n} samples in batches of {batch_size}; give a k from 1 to "
                         f"{n // batch_size}, or more samples")
    return k


def _kind(x) -> str:
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else f"of type {type(x).__name__}"


def _check(u: Tensor, v: Tensor, temperature: float, read: bool | None = None) -> None:
    """Raises ValueError for what no sampler can use. read: look at the values as well, for which a GPU must
    wait (None: on the CPU alone)."""
    fit = all(isinstance(x, Tensor) and x.ndim == 2 and x.is_floating_point() for x in (u, v))
    if not fit or u.shape != v.shape or u.shape[1] == 0:
        raise ValueError(f"u is {_kind(u)} and v {_kind(v)}; give two floating-point torch tensors [n, d] of "
                         "one shape, row i of v the partner of row i of u (of numpy's torch.from_numpy(u))")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; give a number > 0, for instance 0.1")
    for name, x in (("u", u), ("v", v)) if read or read is None and u.device.type == "cpu" else ():
        # The sum, twenty times as fast, first; it may also overflow, so the rows decide.
        total = x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))
        if not total.isfinite() and (count := int((~x.isfinite()).any(1).sum())):
            raise ValueError(f"{name} has {count} of {len(x)} rows with NaN or infinity; drop them, or see "
                             "why the encoder made them (a learning rate too high, half-precision overflow)")


def _check_batches(batches: Tensor, n: int, read: bool, distinct: bool = False) -> None:
    fit = isinstance(batches, Tensor) and batches.dtype == torch.int64 and batches.ndim == 2
    if not fit or batches.shape[1] < 2 or distinct and batches.numel() > n:
        most = f", at most {n} in all" if distinct else ""
        raise ValueError(f"batches is {_kind(batches)}; give an int64 tensor [m, B] of rows, B >= 2{most}")
    if read and batches.numel():
        low, high = batches.aminmax()
        if not 0 <= low <= high < n:
            raise ValueError(f"batches has row numbers from {low} to {high}; give 0 to {n - 1}")
        if distinct and batches.flatten().bincount().max() > 1:
            raise ValueError("batches has a row number twice; give each once, as in a partition")


def _check_exclude(exclude, n: int, refine: bool, batch_size: int, k: int) -> Tensor | None:
    if exclude is None:
        return None
    try:
        exclude = torch.as_tensor(exclude)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError("exclude holds something else than numbers; give one integer for each sample, of "
                         "names numpy.unique(names, return_inverse=True)[1]") from None
    if exclude.shape != (n,) or exclude.is_floating_point() or exclude.is_complex() or not refine:
        raise ValueError(f"exclude is {_kind(exclude)} for {n} samples, refine {refine}; give one integer "
                         "for each sample, and refine=True")
    if k * batch_size > _dense(batch_size):  # parts of similar rows are mostly of one group
        raise ValueError(f"exclude is given with windows of {k * batch_size} samples; give a k of at most "
                         f"{_dense(batch_size) // batch_size}")
    return exclude


def _dense(batch_size: int) -> int:
    """Rows of the largest window that is solved whole."""
    return max(min(DENSE_ROWS, DENSE_BATCHES * batch_size), 2 * batch_size)


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1, float32 or float64; of any length before: the squares of 1e20 are out of range."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.detach().abs().amax(1, keepdim=True)
    return F.normalize(x / largest.masked_fill(largest == 0, 1), dim=1)


# ------------------------------------------------------------------------------------------ scores
def batch_losses(u: Tensor, v: Tensor, batches: Tensor, temperature: float = 0.1,
                 loss: str = "nt_xent") -> Tensor:
    """The loss of each batch: the score of OSGD.

    u, v [n, d] the two views; batches [m, B] row numbers, B >= 2.  Returns [m], on the device of u, in
    float32 (float64 for float64 input).  "nt_xent" (Chen et al., ICML 2020): the mean over the 2B views of
    -log softmax at the partner, over the cosines / temperature with the other 2B - 1 views.  "dcl" (Yeh et
    al., ECCV 2022): the partner left out of the denominator.  "infonce", of the paper's theory and of two
    modalities: the softmax over the B rows of the other view, the two directions added.  Memory is bounded by
    chunks; gradients flow (and then keep every chunk).  Raises ValueError for wrong shapes, temperature or
    loss, and on the CPU, where looking does not stop a GPU, for NaN, infinity and row numbers outside [0, n).
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; give one of {', '.join(LOSSES)}")
    _check(u, v, temperature)
    on_cpu = u.device.type == "cpu"
    _check_batches(batches, len(u), read=on_cpu)
    batches, B, (n, d) = batches.to(u.device, non_blocking=True), batches.shape[1], u.shape
    dtype = torch.promote_types(torch.promote_types(u.dtype, v.dtype), torch.float32)
    # A chunk's views and logits stay in a core's cache; on a GPU larger chunks save launches.
    chunk = max(1, (2 ** 22 if on_cpu else 2 ** 28) // (dtype.itemsize * 2 * B * (2 * B + d)))
    losses, table = [], None
    with torch.autocast(u.device.type, enabled=False):  # a bfloat16 logit of 10 is wrong by 0.03
        u, v = _unit(u).to(dtype), _unit(v).to(dtype)
        # Where the batches meet every pair several times, as all_batches do, each logit is computed once.
        if loss != "infonce" and 4 * n * n <= min(2 ** 20, len(batches) * B * B):
            z = torch.cat([u, v])
            table = (z @ z.T).sub_(1).div_(temperature).flatten()
        for rows in batches.split(chunk):
            if table is not None:
                row = torch.cat([rows, rows + n], 1)
                place = 2 * n * row[:, :, None] + row[:, None]
                s = table.index_select(0, place.flatten()).view_as(place)
            else:
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
    """A random permutation of n samples cut into batches [n // B, B] (Algorithm 4), where the generator is.

    The n % B samples that are left over are dropped.  Raises ValueError for a batch_size outside [2, n].
    """
    n, batch_size = _check_size(n, batch_size)
    order = torch.randperm(n, generator=generator, device=generator.device if generator else "cpu")
    return order[:n // batch_size * batch_size].view(-1, batch_size)


def random_batches_with_replacement(m: int, n: int, batch_size: int,
                                    generator: Generator | None = None) -> Tensor:
    """m independent, uniformly random B-subsets of n samples, [m, B] (Algorithm 3), where the generator is.

    The order inside a row is not random.  Raises ValueError for m < 1 or a batch_size outside [2, n].
    """
    (n, batch_size), m = _check_size(n, batch_size), _integer("m", m, 1)
    device = generator.device if generator else "cpu"
    # Floyd's sampling, all rows at once: column c draws from 0..n-B+c and takes that last number where its
    # draw is there already. B steps and no [m, n] table. (63 bits modulo n: uniform to one part in 2^63 / n.)
    last = torch.arange(n - batch_size, n, device=device)
    rows = torch.randint(2 ** 63 - 1, (m, batch_size), generator=generator, device=device) % (last + 1)
    for c in range(1, batch_size):
        taken = (rows[:, :c] == rows[:, c:c + 1]).any(1)
        rows[:, c] = torch.where(taken, last[c], rows[:, c])
    return rows


def all_batches(n: int, batch_size: int) -> Tensor:
    """Every B-subset of n samples, [C(n, B), B], in lexicographic order ("NcB"; Algorithm 2 scores them all).

    Raises ValueError for a batch_size outside [2, n] and for a table of more than 2^27 row numbers (1 GiB).
    """
    n, batch_size = _check_size(n, batch_size)
    count = math.comb(n, batch_size)
    if count * batch_size > MAX_INDICES:
        raise ValueError(f"n = {n} has {count} batches of {batch_size}, of which {MAX_INDICES // batch_size} "
                         "are listed at most; take a smaller n or random_batches_with_replacement")
    rows = torch.arange(n - batch_size + 1)[:, None]
    for c in range(1, batch_size):  # each prefix once for every next number that leaves room for the rest
        choices = n - batch_size + c - rows[:, -1]
        first = choices.cumsum(0) - choices
        rows = rows.repeat_interleave(choices, 0)
        step = torch.arange(len(rows)) - first.repeat_interleave(choices)
        rows = torch.cat([rows, rows[:, -1:] + 1 + step[:, None]], 1)
    return rows


# ------------------------------------------------------------------------------------------ by loss
def select_by_loss(u: Tensor, v: Tensor, batches: Tensor, q: int, temperature: float = 0.1,
                   lowest: bool = False, loss: str = "nt_xent") -> Tensor:
    """Of the given batches the q of highest loss, by rising loss (with all_batches: Algorithm 2).

    u, v [n, d]; batches [k, B], or [groups, k, B] to choose q in each group.  Returns [q, B], [groups, q, B].
    lowest: the q of lowest loss instead.  Raises ValueError as batch_losses, and for q outside [1, k].
    """
    _check(u, v, temperature, read=False)
    if not isinstance(batches, Tensor) or batches.ndim not in (2, 3):
        raise ValueError(f"batches is {_kind(batches)}; give row numbers, a tensor [k, B] or [groups, k, B]")
    k, batch_size = batches.shape[-2:]
    if not 1 <= _integer("q", q) <= k:
        raise ValueError(f"q is {q} with k = {k} batches to choose from; give a q from 1 to {k}")
    batches = batches.to(u.device, non_blocking=True)
    losses = batch_losses(u.detach(), v.detach(), batches.reshape(-1, batch_size), temperature, loss)
    order = losses.view(batches.shape[:-1]).argsort(dim=-1, stable=True)
    chosen = order[..., :q] if lowest else order[..., k - q:]
    return batches.gather(-2, chosen[..., None].expand(*chosen.shape, batch_size))


def osgd_batches(u: Tensor, v: Tensor, batch_size: int, k: int, q: int, temperature: float = 0.1,
                 lowest: bool = False, loss: str = "nt_xent") -> Tensor:
    """Of each k consecutive batches the q of highest loss (OSGD without replacement, Algorithm 6).

    u, v [n, d], already in a random order: rows 0..B-1 are the first batch, and so on.  Returns [m, B], m = q
    * (n // B // k), on the device of u, group by group, in a group by rising loss; a last group of fewer than
    k batches is dropped.  lowest, ValueErrors: as select_by_loss, and for a batch_size outside [2, n], k * B
    > n.
    """
    _check(u, v, temperature, read=False)
    n, batch_size = _check_size(len(u), batch_size)
    k = _check_k(n, batch_size, k)
    groups = n // batch_size // k
    batches = torch.arange(groups * k * batch_size, device=u.device).view(groups, k, batch_size)
    return select_by_loss(u, v, batches, q, temperature, lowest, loss).flatten(0, 1)


def osgd_batches_with_replacement(u: Tensor, v: Tensor, batch_size: int, k: int, q: int,
                                  temperature: float = 0.1, lowest: bool = False,
                                  generator: Generator | None = None, loss: str = "nt_xent") -> Tensor:
    """Of k uniformly random B-subsets the q of highest loss, by rising loss (one step of OSGD, Algorithm 5).

    u, v [n, d].  Returns [q, B] on the device of u.  k may exceed n / B.  lowest, ValueErrors: osgd_batches.
    """
    _check(u, v, temperature, read=False)
    draws = random_batches_with_replacement(_integer("k", k, 1), len(u), batch_size, generator)
    return select_by_loss(u, v, draws, q, temperature, lowest, loss)


# ------------------------------------------------------------------------------------------ by similarity
def spectral_affinity(u: Tensor, v: Tensor, batch_size: int, temperature: float = 0.1) -> Tensor:
    """Edge weights W [n, n] of the graph whose heavy clusters are hard batches (Algorithm 1).

    With unit rows divided by sqrt(temperature) and f(x) = log(1 + (B-1) e^x),
        w(k, l) = sum over (i, j) in {(k, l), (l, k)} of f(u_i.v_j - u_i.v_i) + f(v_i.u_j - v_i.u_i):
    the sum of w inside a batch, over B(B-1), bounds its InfoNCE loss from below.  Symmetric, zero diagonal,
    on the device of u, float32 or float64.  Raises ValueError for wrong shapes or temperature, NaN, B < 2.
    """
    _check(u, v, temperature, read=True)
    batch_size = _integer("batch_size", batch_size, 2)
    with torch.autocast(u.device.type, enabled=False):
        dtype = torch.promote_types(u.dtype, v.dtype)
        u, v = _unit(u.to(dtype)), _unit(v.to(dtype))
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
                     ceiling: float | None = None) -> Tensor:
    """Batches of samples hard to tell apart: balanced spectral clustering of spectral_affinity (Algorithm 1).

    u, v [n, d], in a random order: each window of k * B consecutive rows (the last may be smaller) is split
    into batches of exactly B, so that every row is in one batch; the last n % B rows are dropped.  Returns
    [m, B], m = n // B, on the device of u.  refine: exchange rows between batches until they are harder still
    (ours: refine_by_weight).  Works in float32.  Memory is O((k B)^2) up to DENSE_ROWS rows or DENSE_BATCHES
    batches; a larger window is cut into parts of similar rows, about PART_ROWS each, so that time and memory
    grow as k B; with refine, batches that lie close are brought together in new parts, twice, and go on
    exchanging. Against false negatives: exclude [n], integers such as class labels, two rows of one number
    share a batch only where sizes leave no other way (needs refine and a window solved whole); ceiling, a
    quantile, 0.999 say: heavier edges weigh no more than it, so that near-duplicates attract no more than
    others.  Raises ValueError for wrong shapes, NaN, temperature <= 0, a batch_size outside [2, n], k * B >
    n, a ceiling outside (0, 1], exclude with a window that is not solved whole.
    """
    _check(u, v, temperature, read=True)
    _, B = _check_size(len(u), batch_size)
    k = _check_k(len(u), B, k)
    exclude = _check_exclude(exclude, len(u), refine, B, k)
    if ceiling is not None and not 0 < ceiling <= 1:
        raise ValueError(f"ceiling is {ceiling}; give a quantile > 0 and <= 1, for instance 0.999")
    whole = len(u) // B * B
    u, v = (_unit(x.detach()[:whole]).float() for x in (u, v))

    def solve(rows: Tensor, batches: Tensor | None = None) -> Tensor:
        w = spectral_affinity(u[rows], v[rows], B, temperature)
        if ceiling is not None:
            w = w.clamp(max=w.flatten().kthvalue(math.ceil(ceiling * w.numel())).values)
        if exclude is not None:
            group = exclude.to(w.device)[rows]
            same = (group[:, None] == group).fill_diagonal_(False)
            w = w.masked_fill(same, 0)
        if batches is None:
            batches = _balanced_clusters(w, B, generator)
        rounds = None
        if exclude is not None:  # one such edge outweighs all that a batch can gain; a round may part but two
            w = w.masked_fill(same, -4 * B * w.max())
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

    w [n, n] symmetric with zero diagonal (spectral_affinity); batches [k, B] of its rows, all distinct.  With
    D[i, b] the weight of row i to the rows of batch b, exchanging i of a and j of b adds
        D[i, b] - D[i, a] + D[j, a] - D[j, b] - 2 w[i, j]
    to the sum of w inside batches. A round makes the best exchange in each of many disjoint pairs of batches,
    those first whose bound (the same without w, one where w[i, j] >= 0) is highest. Ends where no exchange
    helps, or after max_rounds (default: 2^30 gains looked at, which only batches of hundreds reach).  Returns
    [k, B].  Rows of w in no batch stay out.  That w is symmetric, with a zero diagonal and finite, is
    assumed. Raises ValueError for wrong shapes and, on the CPU, for row numbers outside [0, n) or given
    twice.
    """
    if w.ndim != 2 or w.shape[0] != w.shape[1] or not w.is_floating_point():
        raise ValueError(f"w is {tuple(w.shape)} {w.dtype}; give floating-point weights [n, n]")
    _check_batches(batches, len(w), read=w.device.type == "cpu", distinct=True)
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


def _similar_parts(x: Tensor, size: int, unit: int, generator: Generator | None) -> list[Tensor]:
    """Row numbers of x [n, d] in parts of similar rows, at most `size` each, a multiple of `unit` (n is one).

    Bisects by the line between two centres (2-means of a sample), at the quantile that keeps parts of one
    size.
    """
    device = generator.device if generator else "cpu"
    whole, parts = [torch.arange(len(x), device=x.device)], []
    while whole:
        rows = whole.pop()
        count = -(-len(rows) // size)
        if count == 1:
            parts.append(rows)
            continue
        sample = x[rows[torch.randint(len(rows), (2048,), generator=generator, device=device).to(x.device)]]
        one, two = sample[:2]
        for _ in range(8):
            line = two - one
            near = (sample @ line > (two + one) @ line / 2).to(x.dtype)
            one, two = (weight @ sample / weight.sum().clamp(min=1) for weight in (1 - near, near))
        order = rows[(x[rows] @ (two - one)).argsort(stable=True)]
        cut = count // 2 * -(-len(rows) // count // unit) * unit
        whole += [order[:cut], order[cut:]]
    return parts


def _balanced_clusters(w: Tensor, size: int, generator: Generator | None) -> Tensor:
    """Rows of the affinity w [n, n] in clusters of exactly `size`, [n // size, size]."""
    n, k = len(w), len(w) // size
    if k == 1:
        return torch.arange(n)[None]
    draw = dict(generator=generator, device=generator.device if generator else "cpu", dtype=w.dtype)
    with torch.autocast(w.device.type, enabled=False):
        # Largest eigenpairs of D^-1/2 W D^-1/2. Of large ones by subspace iteration: after 4 products the
        # batches are as hard as with exact eigenvectors, to 1 %, in a tenth of the time; extra columns make
        # few clusters exact.
        half = w.sum(1, keepdim=True).clamp(min=1e-30).rsqrt()
        if n <= max(256, 4 * k):
            values, x = torch.linalg.eigh(half * w * half.T)
        else:
            x = torch.randn(n, min(n, k + 8), **draw).to(w.device)
            for _ in range(4):
                x = torch.linalg.qr(half * (w @ (half * x)))[0]
            values, rotation = torch.linalg.eigh(x.T @ (half * (w @ (half * x))))
            x = x @ rotation
        # The first one is D^1/2 1 for every graph. Scaled by the root of the eigenvalue, inner products of
        # rows are the closest rank-k affinity, and the many small eigenvalues of real embeddings weigh less
        # in the distances. A graph without clusters has negative ones: a diagonal added to W, which no
        # partition feels, lifts them.
        x = (x[:, -k:-1] * (values[-k:-1] - values[-k - 1].clamp(max=0)).sqrt()).cpu()  # [n, k-1]: small now
        # k-means++ (Arthur & Vassilvitskii, 2007): the next centre with probability by squared distance.
        distance, chosen = x.new_full((n,), torch.inf), []
        for number in torch.rand(k, **draw).cpu():
            total = (distance if chosen else torch.ones_like(distance)).cumsum(0)
            # With fewer distinct points than centres every distance ends at 0, and the clamp takes the last
            # row.
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

    Prices on the labels at which demand meets supply turn the assignment into each row's own choice. Sinkhorn
    iterations find them up to a few rows; those, and the rows nearest to changing their minds, are then
    assigned optimally: 320 rows (all of them, and so exactly, if n <= 320), where all 1,280 take ten times as
    long.
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
    function (u, v, batch_size, k, temperature, generator) -> batches [m, B] of the window's rows.  By default
    k is 40, or n // B if that is less, and q a tenth of k.  refine, exclude, ceiling, loss and temperature:
    as in spectral_batches, select_by_loss. The first random_epochs are random.  u, v [m, d], two views or two
    modalities, come from
    - embed(indices [m]), without gradients, embed_size samples a call; set the encoder to eval mode in it.
      Each window is embedded when its turn comes or, at_once, all samples whenever a permutation is drawn
      (osgd-replacement: in each epoch); or
    - update(indices, u, v) after each step: the step's own embeddings, for nothing. Samples not yet seen come
      first, in random batches: that is all of the first epoch. Without either function every batch is random.
      ahead: a thread chooses the next window of a permutation on the CPU while the steps of this one run,
      which do not touch its embeddings: the same batches, and a GPU need not wait for them.
    An epoch is n // B batches. A permutation gives osgd fewer: what is left of it, and of the chosen batches,
    goes on in the next epoch; for any other method each epoch is a partition. A new iteration gives the next
    epoch, also where the last one was broken off. Where torch.distributed runs several processes they choose
    the same batches (rank 0's), embed a share each and share what update is given. Of the batches each of
    world_size processes takes every world_size-th; leave rank and world_size out where the trainer deals
    batches out by itself, as accelerate does. DataLoader workers, and accelerate, fetch ahead: windows are
    then chosen a few batches early; see state_dict. Raises ValueError for arguments that do not fit together
    and, while iterating, for embeddings it cannot use.
    """
    MADE = ("num_samples", "batch_size", "method", "refine", "k", "q", "lowest", "temperature", "loss",
            "ceiling", "seed", "random_epochs", "at_once", "world_size")
    STATE = "epoch", "step", "rest", "random", "pending", "stale", "uv", "seen"

    def __init__(self, num_samples: int, batch_size: int, method: str | Callable = "spectral",
                 refine: bool = True, k: int | None = None, q: int | None = None, temperature: float = 0.1,
                 seed: int = 0, embed: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
                 lowest: bool = False, exclude: Tensor | None = None, ceiling: float | None = None,
                 rank: int = 0, world_size: int = 1, loss: str = "nt_xent", random_epochs: int = 0,
                 at_once: bool = False, ahead: bool = False, embed_size: int = 256):
        n, B = _check_size(num_samples, batch_size)
        k = min(40, n // B) if k is None else k
        k = _integer("k", k, 1) if method == "osgd-replacement" else _check_k(n, B, k)
        by_loss = method in ("osgd", "osgd-replacement")
        known = by_loss or method in ("spectral", "random") or callable(method)
        if not known or not by_loss and (q is not None or lowest):
            raise ValueError(f"method is {method!r}, q {q}, lowest {lowest}; give 'spectral', 'random' or a "
                             "function without them, or 'osgd', 'osgd-replacement'")
        if method != "spectral" and (exclude is not None or ceiling is not None):
            raise ValueError(f"method is {method!r}, and knows neither exclude nor ceiling; give 'spectral'")
        if at_once and embed is None:
            raise ValueError("at_once is given and embed is not; give both, or neither")
        q = max(1, k // 10) if q is None else _integer("q", q)
        two = torch.ones(2, 1)  # the functions themselves refuse what they cannot use
        select_by_loss(two, two, torch.zeros(k, 2, dtype=torch.int64), q, temperature, loss=loss)
        spectral_batches(two, two, 2, 1, temperature, None, refine, None, ceiling)
        self.rank, self.world_size, most = _integer("rank", rank), _integer("world_size", world_size), n // B
        if not 0 <= rank < world_size <= most:
            raise ValueError(f"rank is {rank} of {world_size}; give 0 <= rank < world_size <= {most}")
        super().__init__(SequentialSampler(range(n)), B, drop_last=True)  # what trainers look at
        self.num_samples, self.batch_size, self.method, self.by_loss = n, B, method, by_loss
        self.k, self.q, self.lowest, self.refine = k, q, bool(lowest), bool(refine)
        self.temperature, self.loss, self.seed = float(temperature), loss, _integer("seed", seed)
        self.exclude = _check_exclude(exclude, n, refine, B, k)
        self.ceiling = None if ceiling is None else float(ceiling)
        self.random_epochs = _integer("random_epochs", random_epochs)
        self.embed, self.embed_size = embed, _integer("embed_size", embed_size, 1)
        self.at_once = bool(at_once)
        self.ahead = bool(ahead) and embed is None and world_size == 1 and method != "osgd-replacement"
        self.least = k * B if method == "osgd" else B  # samples in a window
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
        if not self.random and len(self.rest) < self.least:
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
        if self.ahead and not self.random and len(self.rest) >= self.least and self.uv is not None:
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
        B, k, temperature = self.batch_size, len(local), self.temperature
        if self.by_loss:
            chosen = select_by_loss(u, v, local, self.q, temperature, self.lowest, self.loss)
        elif self.method == "spectral":
            exclude = None if self.exclude is None else self.exclude[rows]
            chosen = spectral_batches(u, v, B, k, temperature, self.generator, self.refine, exclude,
                                      self.ceiling)
        else:
            _check(u, v, temperature, read=True)
            chosen = self.method(u, v, B, k, temperature, self.generator)
            _check_batches(chosen, len(rows), read=True)
            if len(chosen) == 0 or chosen.shape[1] != B:
                raise ValueError(f"the method gave {_kind(chosen)}; give rows of the window, [m, {B}]")
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
        """Of the window that the last batch came from, on the embeddings it was chosen by: the losses
        `chosen` [m] of its batches, `random` [c] of random ones of its samples (osgd: those it chose among),
        and these batches, `chosen_rows` [m, B] and `random_rows` [c, B]. None where batches are random."""
        if self.last is None:
            return None
        u, v, rows, *both = self.last
        values = [batch_losses(u, v, x, self.temperature, self.loss) for x in both]
        values += [rows[x.cpu()] for x in both]
        return dict(zip(("chosen", "random", "chosen_rows", "random_rows"), values))

    def update(self, indices: Tensor | list[int], u: Tensor, v: Tensor) -> None:
        """Stores u, v [m, d] of the samples `indices` [m], on the device of u and without waiting for it.

        Where torch.distributed runs several processes all call it, with the same m, and store what all gave.
        Raises ValueError for shapes that do not fit, with embed and, on the CPU, for indices outside [0, n).
        """
        _check(u, v, self.temperature, read=False)
        indices, n = torch.as_tensor(indices), self.num_samples
        d = (u if self.uv is None else self.uv).shape[-1]
        if self.embed is not None:
            raise ValueError("update is called and embed was given; leave out one of the two")
        if indices.dtype != torch.int64 or indices.shape != u.shape[:1] or u.shape[1] != d:
            raise ValueError(f"indices is {_kind(indices)} and u {_kind(u)}; give int64 [m] and [m, {d}]")
        if indices.device.type == "cpu" and len(u) and not 0 <= indices.min() <= indices.max() < n:
            raise ValueError(f"indices go from {indices.min()} to {indices.max()}; give 0 to {n - 1}")
        with torch.inference_mode(False), torch.no_grad():
            # Rows of float64 may be out of float32's range.
            u, v = ((_unit(x) if x.dtype == torch.float64 else x).float() for x in (u, v))
            uv = of_all_processes(torch.stack([u, v], 1))
            indices = of_all_processes(indices.to(u.device, non_blocking=True))
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
        if not 0 <= _integer("behind", behind) <= len(self.given):
            raise ValueError(f"behind is {behind}; give 0 to {len(self.given)}")
        generator = self.generator.get_state() if self.before is None else self.before
        state = {name: copy.deepcopy(getattr(self, name)) for name in self.STATE}
        for epoch, step, batches in list(self.given)[::-1][:behind]:
            state |= {"epoch": epoch, "step": step, "pending": copy.deepcopy(batches) + state["pending"]}
        return {"generator": generator} | state | self._made()

    def load_state_dict(self, state: dict) -> None:
        """Goes on where state_dict was called. Raises ValueError where the sampler was made otherwise."""
        made = self._made()
        if missing := [name for name in (*made, *self.STATE, "generator") if name not in state]:
            raise ValueError(f"the state has no {', '.join(missing)}; give what state_dict of this class is")
        for name, value in made.items():
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
