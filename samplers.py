"""Mini-batches for contrastive learning, random or hard. Copy this file into your project; it needs torch and scipy.

    u, v = encoder(view1), encoder(view2)                    # [n, d] each, in a random order; any scale, any device
    batches = spectral_batches(u, v, batch_size=32, k=40, refine=True)    # [n // 32, 32]: rows hard to tell apart
    for rows in batches:
        loss = contrastive_loss(view1[rows], view2[rows])
    print(batch_losses(u, v, batches).mean(), batch_losses(u, v, random_batches(len(u), 32)).mean())

or as a batch sampler that keeps the embeddings of your training steps:

    sampler = ContrastiveBatchSampler(len(dataset), batch_size=32)    # DataLoader(dataset, batch_sampler=sampler)
    ...; sampler.update(rows, u, v)

The algorithms of Cho et al., "Mini-Batch Optimization of Contrastive Loss" (TMLR 2024), with its letters: n pairs,
B = batch_size, k batches at a time of which q are kept. Every selection returns int64 row numbers, the same ones
for the same state of `generator` (None: torch's global one). Rows of u and v are scaled to length 1 here.
"""
import copy
import math
import operator
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor
from torch.utils.data import Sampler

MAX_INDICES = 2 ** 27  # all_batches: entries of the table, 1 GiB
DENSE_ROWS, DENSE_BATCHES, PART_ROWS = 4096, 128, 1280  # spectral_batches: largest window solved whole, parts of larger ones


def _check_integer(name: str, x: int) -> None:
    try:
        operator.index(x)
    except TypeError:
        raise ValueError(f"{name} is {x!r:.80}; give an integer") from None


def _check_size(n: int, batch_size: int) -> None:
    _check_integer("number of samples", n)
    _check_integer("batch_size", batch_size)
    if not 2 <= batch_size <= n:
        raise ValueError(f"batch_size is {batch_size} with {n} samples; give a batch_size from 2 to {n}")


def _check(u: Tensor, v: Tensor, temperature: float, read: bool | None = None) -> None:
    """Raises ValueError for what no sampler can use. read: look at the values as well, for which a GPU must wait (None: on
    the CPU alone)."""
    if not (isinstance(u, Tensor) and isinstance(v, Tensor)):
        raise ValueError(f"u is of type {type(u).__name__} and v of {type(v).__name__}; give two torch tensors [n, d], of numpy "
                         "arrays torch.from_numpy(u)")
    if u.ndim != 2 or u.shape != v.shape or not u.is_floating_point() or not v.is_floating_point():
        raise ValueError(f"u is {tuple(u.shape)} {u.dtype} and v {tuple(v.shape)} {v.dtype}; "
                         "give two floating-point [n, d] tensors of one shape, row i of v the partner of row i of u")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; give a number > 0, for instance 0.1")
    for name, x in (("u", u), ("v", v)) if read or read is None and u.device.type == "cpu" else ():
        # The sum, twenty times as fast, first; it may also overflow, so the rows decide.
        total = x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))
        if not total.isfinite() and (count := int((~x.isfinite()).any(1).sum())):
            raise ValueError(f"{name} has {count} of {len(x)} rows with NaN or infinity; drop them, or see why the "
                             "encoder made them (a learning rate too high, half-precision overflow)")


def _check_k(n: int, batch_size: int, k: int) -> None:
    _check_integer("k", k)
    if not 1 <= k <= n // batch_size:
        raise ValueError(f"k is {k} with {n} samples in batches of {batch_size}; give a k from 1 to {n // batch_size}, "
                         "or more samples")


def _check_batches(batches: Tensor, n: int, read: bool, distinct: bool = False) -> None:
    if not isinstance(batches, Tensor):
        raise ValueError(f"batches is of type {type(batches).__name__}; give an int64 torch tensor [m, B] of row numbers")
    if batches.ndim != 2 or batches.shape[1] < 2 or batches.dtype != torch.int64 or distinct and batches.numel() > n:
        raise ValueError(f"batches is {tuple(batches.shape)} {batches.dtype}; "
                         "give an int64 [m, B] tensor of row numbers, B >= 2" + f", at most {n} in all" * distinct)
    if read and batches.numel():
        if not 0 <= batches.min() <= batches.max() < n:
            raise ValueError(f"batches has row numbers from {batches.min()} to {batches.max()}; give 0 to {n - 1}")
        if distinct and batches.flatten().bincount().max() > 1:
            raise ValueError("batches has a row number twice; give each once, as in a partition")


def _dense(batch_size: int) -> int:
    """Rows of the largest window that is solved whole."""
    return max(min(DENSE_ROWS, DENSE_BATCHES * batch_size), 2 * batch_size)


def _check_exclude(exclude, n: int, refine: bool, batch_size: int, k: int) -> Tensor | None:
    if exclude is None:
        return None
    try:
        exclude = torch.as_tensor(exclude)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError("exclude holds something else than numbers; give one integer for each sample, of names for "
                         "instance numpy.unique(names, return_inverse=True)[1]") from None
    if exclude.shape != (n,) or exclude.is_floating_point() or exclude.is_complex() or not refine:
        raise ValueError(f"exclude is {tuple(exclude.shape)} {exclude.dtype} for {n} samples, refine {refine}; "
                         "give one integer for each sample, and refine=True")
    if k * batch_size > _dense(batch_size):  # parts of similar rows are mostly of one group
        raise ValueError(f"exclude is given with windows of {k * batch_size} samples; give a k of at most "
                         f"{_dense(batch_size) // batch_size}")
    return exclude


def batch_losses(u: Tensor, v: Tensor, batches: Tensor, temperature: float = 0.1, loss: str = "nt_xent") -> Tensor:
    """NT-Xent (Chen et al., ICML 2020) or InfoNCE of each batch: the score of OSGD.

    u, v [n, d] the two views; batches [m, B] row numbers, B >= 2.  Returns [m], on the device of u, in float32
    (float64 for float64 input).  "nt_xent": the mean over the 2B views of -log softmax at the partner, the softmax
    taken over the other 2B - 1 views of the cosines / temperature.  "infonce", of the paper's theory and of two
    modalities: the softmax over the B rows of the other view, the two directions added.  Memory is bounded by chunks;
    gradients flow (and then keep every chunk).  Raises ValueError for wrong shapes, temperature or loss, and, where
    looking does not stop a GPU, that is on the CPU, for NaN, infinity and row numbers outside [0, n).
    """
    if loss not in ("nt_xent", "infonce"):
        raise ValueError(f"loss is {loss!r}; give 'nt_xent' or 'infonce'")
    _check(u, v, temperature)
    on_cpu = u.device.type == "cpu"
    _check_batches(batches, len(u), read=on_cpu)
    batches = batches.to(u.device, non_blocking=True)
    B, n, d = batches.shape[1], *u.shape
    dtype = torch.promote_types(u.dtype, torch.float32)
    # A chunk's views and logits stay in a core's cache; on a GPU larger chunks save launches.
    chunk = max(1, (2 ** 22 if on_cpu else 2 ** 28) // (dtype.itemsize * 2 * B * (2 * B + d)))

    def logits(z: Tensor) -> Tensor:  # [..., r, d] -> [..., r, r]
        s = z @ z.mT
        # Lengths stand on the diagonal: scaling the logits is cheaper than scaling the views, as 2B < d.
        scale = (s.diagonal(0, -2, -1).clamp(min=1e-24) * temperature).rsqrt()
        # Logits less their upper bound: with exp(-2/temperature) in range, no search for the maximum is needed.
        return s * scale[..., None] * scale[..., None, :] - 1 / temperature

    losses, table = [], None
    with torch.autocast(u.device.type, enabled=False):  # a bfloat16 logit of 10 is wrong by 0.03
        # Where the batches meet every pair several times, as all_batches do, each logit is computed once and looked up.
        if loss == "nt_xent" and 4 * n * n <= min(2 ** 20, len(batches) * B * B):
            table = logits(torch.cat([u, v]).to(dtype)).flatten()
        for rows in batches.split(chunk):
            if table is not None:
                row = torch.cat([rows, rows + n], 1)
                s = table.index_select(0, (2 * n * row[:, :, None] + row[:, None]).flatten()).view(-1, 2 * B, 2 * B)
            else:
                z = torch.cat([x.index_select(0, rows.reshape(-1)).view(-1, B, d) for x in (u, v)], 1).to(dtype)  # [c, 2B, d]
                if loss == "infonce":
                    a, b = F.normalize(z, dim=2).split(B, 1)
                    s = a @ b.mT / temperature  # [c, B, B]
                    losses.append((s.logsumexp(1) + s.logsumexp(2) - 2 * s.diagonal(0, 1, 2)).mean(1))
                    continue
                s = logits(z)  # [c, 2B, 2B]
            positive = s.diagonal(B, 1, 2).mean(1)
            s.diagonal(0, 1, 2).fill_(-torch.inf)
            lse = s.exp().sum(2).log() if temperature > 0.03 else s.logsumexp(2)
            losses.append(lse.mean(1) - positive)
    return torch.cat(losses)


def random_batches(n: int, batch_size: int, generator: Generator | None = None) -> Tensor:
    """A random permutation of n samples cut into batches [n // B, B] (Algorithm 4), on the generator's device.

    The n % B samples that are left over are dropped.  Raises ValueError for a batch_size outside [2, n].
    """
    _check_size(n, batch_size)
    order = torch.randperm(n, generator=generator, device=generator.device if generator else "cpu")
    return order[:n // batch_size * batch_size].view(-1, batch_size)


def random_batches_with_replacement(m: int, n: int, batch_size: int, generator: Generator | None = None) -> Tensor:
    """m independent, uniformly random B-subsets of n samples, [m, B] (Algorithm 3), on the generator's device.

    The order inside a row is not random.  Raises ValueError for m < 1 or a batch_size outside [2, n].
    """
    _check_size(n, batch_size)
    _check_integer("m", m)
    if m < 1:
        raise ValueError(f"m is {m} batches; give 1 or more")
    device = generator.device if generator else "cpu"
    # Floyd's sampling, all rows at once: column c draws from 0..n-B+c and takes that last number where its draw
    # is there already. B steps and no [m, n] table. (63 bits modulo n: uniform to one part in 2^63 / n.)
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
    _check_size(n, batch_size)
    count = math.comb(n, batch_size)
    if count * batch_size > MAX_INDICES:
        raise ValueError(f"n = {n} has {count} batches of {batch_size} and at most {MAX_INDICES // batch_size} are "
                         "listed; take a smaller n or random_batches_with_replacement")
    rows = torch.arange(n - batch_size + 1)[:, None]
    for c in range(1, batch_size):  # each prefix once for every next number that still leaves room for the rest
        choices = n - batch_size + c - rows[:, -1]
        first = choices.cumsum(0) - choices
        rows = rows.repeat_interleave(choices, 0)
        step = torch.arange(len(rows)) - first.repeat_interleave(choices)
        rows = torch.cat([rows, rows[:, -1:] + 1 + step[:, None]], 1)
    return rows


def select_by_loss(u: Tensor, v: Tensor, batches: Tensor, q: int, temperature: float = 0.1,
                   lowest: bool = False, loss: str = "nt_xent") -> Tensor:
    """Of the given batches the q of highest loss, by rising loss (with all_batches: Algorithm 2).

    u, v [n, d]; batches [k, B], or [groups, k, B] to choose q in each group.  Returns [q, B] or [groups, q, B].
    lowest: the q of lowest loss instead.  Raises ValueError as batch_losses, and for q outside [1, k].
    """
    _check(u, v, temperature, read=False)
    if not isinstance(batches, Tensor) or batches.ndim not in (2, 3):
        raise ValueError(f"batches is {tuple(getattr(batches, 'shape', ()))}; give a tensor of row numbers [k, B] or [groups, k, B]")
    batches = batches.to(u.device, non_blocking=True)
    k, batch_size = batches.shape[-2:]
    _check_integer("q", q)
    if not 1 <= q <= k:
        raise ValueError(f"q is {q} with k = {k} batches to choose from; give a q from 1 to {k}")
    losses = batch_losses(u.detach(), v.detach(), batches.reshape(-1, batch_size), temperature, loss)
    order = losses.view(batches.shape[:-1]).argsort(dim=-1, stable=True)
    chosen = order[..., :q] if lowest else order[..., k - q:]
    return batches.gather(-2, chosen[..., None].expand(*chosen.shape, batch_size))


def osgd_batches(u: Tensor, v: Tensor, batch_size: int, k: int, q: int, temperature: float = 0.1,
                 lowest: bool = False, loss: str = "nt_xent") -> Tensor:
    """Of each k consecutive batches the q of highest loss (OSGD without replacement, Algorithm 6).

    u, v [n, d], already in a random order: rows 0..B-1 are the first batch, and so on.  Returns
    [(n // B // k) * q, B] on the device of u, group by group, inside a group by rising loss; a last group of fewer
    than k batches is dropped.  lowest: the q of lowest loss instead.  Raises ValueError as batch_losses, and for a
    batch_size outside [2, n], k * B > n, q outside [1, k].
    """
    _check(u, v, temperature, read=False)
    _check_size(len(u), batch_size)
    _check_k(len(u), batch_size, k)
    groups = len(u) // batch_size // k
    batches = torch.arange(groups * k * batch_size, device=u.device).view(groups, k, batch_size)
    return select_by_loss(u, v, batches, q, temperature, lowest, loss).flatten(0, 1)


def osgd_batches_with_replacement(u: Tensor, v: Tensor, batch_size: int, k: int, q: int, temperature: float = 0.1,
                                  lowest: bool = False, generator: Generator | None = None,
                                  loss: str = "nt_xent") -> Tensor:
    """Of k uniformly random B-subsets the q of highest loss, by rising loss (one step of OSGD, Algorithm 5).

    u, v [n, d].  Returns [q, B] on the device of u.  k may exceed n / B here.  lowest and ValueErrors as osgd_batches.
    """
    _check(u, v, temperature, read=False)
    _check_integer("k", k)
    if k < 1:
        raise ValueError(f"k is {k}; draw 1 batch or more")
    batches = random_batches_with_replacement(k, len(u), batch_size, generator)
    return select_by_loss(u, v, batches.to(u.device), q, temperature, lowest, loss)


def spectral_affinity(u: Tensor, v: Tensor, batch_size: int, temperature: float = 0.1) -> Tensor:
    """Edge weights W [n, n] of the graph whose heavy clusters are hard batches (Algorithm 1).

    With unit rows divided by sqrt(temperature) and f(x) = log(1 + (B-1) e^x),
        w(k, l) = sum over (i, j) in {(k, l), (l, k)} of f(u_i.v_j - u_i.v_i) + f(v_i.u_j - v_i.u_i):
    the sum of w inside a batch, over B(B-1), bounds its InfoNCE loss from below.  Symmetric, zero diagonal, on the
    device of u, float32 (float64 for float64 input).  Raises ValueError for wrong shapes or temperature, NaN, B < 2.
    """
    _check(u, v, temperature, read=True)
    if batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}; give 2 or more")
    with torch.autocast(u.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(u.dtype, v.dtype), torch.float32)
        u, v = (F.normalize(x.to(dtype), dim=1) for x in (u, v))
        s = (u @ v.T) / temperature
        own = s.diagonal() - math.log(batch_size - 1)
        if temperature < 0.06:
            w = F.softplus(s - own[:, None]) + F.softplus(s - own)
        else:  # one exponential and one logarithm, which hold in float32 up to exp(2 / 0.06): four times as fast
            scale = (1 / temperature - own).exp()
            s = s.sub_(1 / temperature).exp_()
            one = torch.ones((), dtype=s.dtype, device=s.device)
            w = torch.addcmul(one, s, scale[:, None]).mul_(torch.addcmul(one, s, scale)).log_()
        return (w + w.T).fill_diagonal_(0)


def spectral_batches(u: Tensor, v: Tensor, batch_size: int, k: int, temperature: float = 0.1,
                     generator: Generator | None = None, refine: bool = False, exclude: Tensor | None = None,
                     ceiling: float | None = None, loss: str = "nt_xent") -> Tensor:
    """Batches of samples hard to tell apart: balanced spectral clustering of spectral_affinity (Algorithm 1).

    u, v [n, d], in a random order: each window of k * B consecutive rows (the last may be smaller) is split into
    batches of exactly B, so that every row is in one batch; the last n % B rows are dropped.  Returns [n // B, B] on
    the device of u.  refine: exchange rows between batches until they are harder still (ours: refine_by_weight, then
    refine_by_loss).  Works in float32.  Memory is O((k B)^2) up to DENSE_ROWS rows or DENSE_BATCHES batches; a larger
    window is cut into parts of similar rows, about PART_ROWS each, so that time and memory grow as k B; with refine,
    batches that lie close are brought together in new parts, twice, and go on exchanging.
    loss: what refine_by_loss makes harder; "infonce", of two modalities, is left to the weights, which bound it.
    Against false negatives: exclude [n], integers such as class labels, two rows of one number share a batch only
    where sizes leave no other way (needs refine and a window solved whole); ceiling, a quantile, 0.999 say: heavier edges weigh no more than
    it, so that near-duplicates attract no more than others. Either leaves refine_by_loss out, which knows of neither.
    Raises ValueError for wrong shapes, NaN, temperature <= 0, a batch_size outside [2, n], k * B > n, a ceiling
    outside (0, 1], exclude with a window that is not solved whole.
    """
    _check(u, v, temperature, read=True)
    _check_size(len(u), batch_size)
    _check_k(len(u), batch_size, k)
    n = len(u) // batch_size * batch_size
    exclude = _check_exclude(exclude, len(u), refine, batch_size, k)
    if loss not in ("nt_xent", "infonce"):
        raise ValueError(f"loss is {loss!r}; give 'nt_xent' or 'infonce'")
    if ceiling is not None and not 0 < ceiling <= 1:
        raise ValueError(f"ceiling is {ceiling}; give a quantile > 0 and <= 1, for instance 0.999")
    u, v = (x.detach()[:n] for x in (u, v))

    def solve(rows: Tensor, batches: Tensor | None = None) -> Tensor:
        x, y = u[rows].float(), v[rows].float()
        w = spectral_affinity(x, y, batch_size, temperature)
        if ceiling is not None:
            w = w.clamp(max=w.flatten().kthvalue(math.ceil(ceiling * w.numel())).values)
        if exclude is not None:
            group = exclude.to(w.device)[rows]
            same = (group[:, None] == group).fill_diagonal_(False)
            w = w.masked_fill(same, 0)
        if batches is None:
            batches = _balanced_clusters(w, batch_size, generator)
        if exclude is not None:  # one such edge outweighs all that a batch can gain
            w = w.masked_fill(same, -4 * batch_size * w.max())
        if refine:
            # For two the weight is the InfoNCE loss and for few near it; few large batches meet too seldom to matter.
            by_loss = loss == "nt_xent" and exclude is None and ceiling is None and 8 <= batch_size <= 8 * len(batches)
            # Before it, all rounds would take 1.6 times the time. A round may part but two of a group.
            rounds = len(batches) // 2 if by_loss else None if exclude is None else max(batches.numel(), 2 ** 31 // (batches.numel() * batch_size))
            batches = refine_by_weight(w, batches, rounds)
            if by_loss:
                batches = refine_by_loss(x, y, batches, temperature)
        return rows[batches]

    batches = []
    for window in torch.arange(n, device=u.device).split(k * batch_size):
        if len(window) <= _dense(batch_size):
            batches.append(solve(window))
            continue
        part = min(max(PART_ROWS // batch_size, 2), DENSE_BATCHES)  # batches in a part
        centre = F.normalize(F.normalize(u[window].float(), dim=1) + F.normalize(v[window].float(), dim=1), dim=1)
        parts = _similar_parts(centre, part * batch_size, batch_size, generator)
        own = torch.cat([solve(window[rows]) for rows in parts])
        for _ in range(2 * refine):
            groups = _similar_parts(centre[own - window[0]].mean(1), part, 1, generator)
            own = torch.cat([solve(own[group].flatten(), torch.arange(len(group) * batch_size, device=u.device)
                                   .view(-1, batch_size)) for group in groups])
        batches.append(own)
    return torch.cat(batches)


def refine_by_weight(w: Tensor, batches: Tensor, max_rounds: int | None = None) -> Tensor:
    """A partition of greater inside weight, from any one: exchanges between pairs of batches while they add to it.

    w [n, n] symmetric with zero diagonal (spectral_affinity); batches [k, B] of its rows, all distinct.  With
    D[i, b] the weight of row i to the rows of batch b, exchanging i of a and j of b adds
        D[i, b] - D[i, a] + D[j, a] - D[j, b] - 2 w[i, j]
    to the sum of w inside batches. A round makes the best exchange in each of many disjoint pairs of batches, those first
    whose bound (the same without w, which is one where w[i, j] >= 0) is highest. Ends where no exchange helps, or after
    max_rounds (default: 2^30 gains looked at, which only batches of hundreds reach).  Returns [k, B].  Rows of w in no
    batch stay out.  That w is symmetric, with a zero diagonal and finite, is assumed, not looked at.  Raises ValueError
    for wrong shapes and, on the CPU, for row numbers outside [0, n) or given twice.
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
        gain = ((inside[a, :, b] - inside[a, :, a])[:, :, None] + (inside[b, :, a] - inside[b, :, b])[:, None]
                - 2 * w[batches[a][:, :, None], batches[b][:, None]])  # [pairs, B, B]
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


def refine_by_loss(u: Tensor, v: Tensor, batches: Tensor, temperature: float = 0.1, tournaments: int = 1) -> Tensor:
    """A partition of greater mean NT-Xent, from any one: exchanges between pairs of batches while they add to it.

    u, v [n, d]; batches [k, B] of their rows, all distinct.  In a tournament every batch meets every other, k/2 pairs at a
    time. The loss of a sample is log S, S a sum over its batch, so what an exchange does to those who stay is bounded by
    its first-order term; the exchange of the highest bound in each pair is made if its exact gain is positive.
    Memory O(k B (B + d)), in float32.  Returns [k, B].  Raises ValueError as batch_losses, and for a row given twice.
    """
    _check(u, v, temperature)
    _check_batches(batches, len(u), read=u.device.type == "cpu", distinct=True)
    k, size = batches.shape
    batches = batches.to(u.device, copy=True)
    z = torch.stack([F.normalize(x[batches].float(), dim=2) for x in (u, v)], 1)  # [k, 2 views, B, d]

    def terms(z1: Tensor, z2: Tensor) -> Tensor:  # of the sums S: exp(cosine / temperature), less their upper bound
        return (z1.flatten(1, 2) @ z2.flatten(1, 2).mT).sub_(1).div_(temperature).exp_().view(-1, 2, size, 2, size)

    # e[a, z, i, j]: what sample j of its batch a adds to the sum of view z of sample i, over both views of j.
    e = terms(z, z)
    positive = e[:, 0, :, 1].diagonal(0, 1, 2).clone()  # [k, B]
    e = e.sum(3)
    e.diagonal(0, 2, 3).zero_()
    players = k + k % 2  # the last one of an odd number sits out
    ring = torch.arange(players, device=u.device)
    open_pairs = (ring[:, None] < k) & (ring < k)
    side = torch.arange(2, device=u.device)[:, None]
    for _ in range(tournaments * (players - 1)):
        ring = torch.cat([ring[:1], ring[1:].roll(1)])
        pair = torch.stack([ring[:players // 2], ring[players // 2:].flip(0)])  # [2 sides, P]
        pair = pair[:, open_pairs[pair[0], pair[1]]]
        if pair.shape[1] == 0:
            continue
        open_pairs[pair, pair.flip(0)] = False
        across = terms(z[pair[0]], z[pair[1]])
        same, other = e[pair.T], torch.stack([across.sum(3), across.sum(1).permute(0, 2, 3, 1)], 1)  # [P, sides, 2, B, B]
        start = positive[pair.T][:, :, None]
        total, total_other = start + same.sum(4), start + other.sum(4)  # [P, sides, 2, B]: S here, and with all of the other
        slope = 1 / total
        flat = slope.flatten(2)[:, :, None]
        stay = (flat @ other.flatten(2, 3)).flip(1) - flat @ same.flatten(2, 3)
        leave = stay[:, :, 0] - total.log().sum(2)  # [P, sides, B]
        # Whoever moves does not meet whom it replaces, and has no part in what those who stay gain.
        meet = ((total_other[..., None] - other).clamp_(min=1e-37).log_() - slope[..., None] * other).sum(2)
        bound = meet[:, 0] + meet[:, 1].mT + leave[:, 0, :, None] + leave[:, 1, None]  # [P, B, B]
        bound, slots = bound.flatten(1).max(1)
        slot = torch.stack([slots // size, slots % size])  # [sides, P]
        p = torch.arange(len(slots), device=u.device)
        arriving = other[p, side, :, :, slot.flip(0)]  # [sides, P, 2, B]: to the sums of those who are there
        change = (arriving - same[p, side, :, :, slot]) * slope.transpose(0, 1)
        error = change.clamp(min=-1 + 1e-7).log1p() - change
        error[side, p, :, slot] = 0
        better = bound + error.sum((0, 2, 3)) > 1e-4
        p, pair, slot = p[better], pair[:, better], slot[:, better]
        e[pair, :, slot] = other[p, 1 - side, :, slot.flip(0)]
        e[pair, :, :, slot] = arriving[:, better]
        e[pair, :, slot, slot] = 0
        z[pair, :, slot] = z[pair.flip(0), :, slot.flip(0)]
        for x in (batches, positive):
            x[pair, slot] = x[pair.flip(0), slot.flip(0)]
        changed = pair.flatten()
        open_pairs[changed, :k] = open_pairs[:k, changed] = True
        open_pairs.fill_diagonal_(False)
    return batches


def _similar_parts(x: Tensor, size: int, unit: int, generator: Generator | None) -> list[Tensor]:
    """Row numbers of x [n, d] in parts of similar rows, at most `size` each and a multiple of `unit` (n is one).

    Bisects by the line between two centres (2-means of a sample), at the quantile that keeps parts of one size.
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
    device = generator.device if generator else "cpu"
    with torch.autocast(w.device.type, enabled=False):
        # Largest eigenpairs of D^-1/2 W D^-1/2. Of large ones by subspace iteration: after 4 products the batches are as
        # hard as with exact eigenvectors, to 1 %, in a tenth of the time. The extra columns make few clusters exact too.
        half = w.sum(1, keepdim=True).clamp(min=1e-30).rsqrt()
        if n <= max(256, 4 * k):
            values, x = torch.linalg.eigh(half * w * half.T)
        else:
            x = torch.randn(n, min(n, k + 8), generator=generator, device=device).to(w.device)
            for _ in range(4):
                x = torch.linalg.qr(half * (w @ (half * x)))[0]
            values, rotation = torch.linalg.eigh(x.T @ (half * (w @ (half * x))))
            x = x @ rotation
        # The first one is D^1/2 1 for every graph. Scaled by the root of the eigenvalue, inner products of rows are the
        # closest rank-k affinity, and the many small eigenvalues of real embeddings weigh less in the distances. A graph
        # without clusters has negative ones: a diagonal added to W, which no partition feels, lifts them above 0.
        x = (x[:, -k:-1] * (values[-k:-1] - values[-k - 1].clamp(max=0)).sqrt()).cpu()  # [n, k-1]; small from here on
        # k-means++ (Arthur & Vassilvitskii, 2007): the next centre with probability by squared distance.
        draws = torch.rand(k, generator=generator, device=device).cpu()
        distance, chosen = torch.full((n,), torch.inf), []
        for draw in draws:
            total = (distance if chosen else torch.ones(n)).cumsum(0)
            # With fewer distinct points than centres every distance ends at 0, and the clamp takes the last row.
            chosen.append(torch.searchsorted(total, draw * total[-1], right=True).clamp(max=n - 1))
            distance = torch.minimum(distance, (x - x[chosen[-1]]).square().sum(1))
        centres = x[torch.stack(chosen)]
        for _ in range(10):  # Lloyd; further rounds add less than 1 %
            member = F.one_hot((2 * x @ centres.T - centres.square().sum(1)).argmax(1), k).float()
            count = member.sum(0)[:, None]
            centres = torch.where(count > 0, member.T @ x / count.clamp(min=1), centres)
        label = _assign(2 * x @ centres.T - centres.square().sum(1), size)
    return label.argsort(stable=True).view(k, size)


def _assign(gain: Tensor, size: int) -> Tensor:
    """Labels [n] from gain [n, k], each of the k given to exactly `size` = n / k rows, of (nearly) the greatest sum.

    Prices on the labels at which demand meets supply turn the assignment into each row's own choice. Sinkhorn
    iterations find them up to a few rows; those, and the rows nearest to changing their minds, are then
    assigned optimally: 320 rows (all of them, and so exactly, if n <= 320), where all 1,280 take ten times as long.
    """
    n, k = gain.shape
    gain = gain / gain.std().clamp(min=1e-12)
    price = torch.zeros(k)
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
    rank[order] = torch.arange(n) - (count.cumsum(0) - count)[label[order]]  # of a row among those of its label
    loose = rank >= size - max(1, 320 // k)
    slots = torch.arange(k).repeat_interleave(size - torch.bincount(label[~loose], minlength=k))
    label[loose] = slots[torch.from_numpy(linear_sum_assignment(gain[loose][:, slots].numpy(), maximize=True)[1])]
    return label


class ContrastiveBatchSampler(Sampler):
    """Hard batches for DataLoader(dataset, batch_sampler=...) or a loop of your own: lists of B row numbers.

    A permutation of the n samples is taken in windows of k * B (or `window`) samples. Each is embedded when its turn
    comes and gives k batches ("spectral", Algorithm 1), or the q of highest, or `lowest`, loss ("osgd", Algorithm 6,
    on as many permutations as an epoch of n // B batches needs). By default k is 40, or n // B if that is less, and q a
    tenth of k; refine, exclude, ceiling, loss and temperature are those of spectral_batches. u, v [m, d], two views or two modalities, come from
    - embed(indices [m]), without gradients, up to max(B, 256) samples a call; set the encoder to eval mode in it; or
    - update(indices, u, v) after each step: the step's own embeddings, for nothing. Samples not yet seen come first,
      in random batches: that is all of the first epoch. Without either function every batch is random.
    Of these batches each of world_size processes takes every world_size-th; with torch.distributed, of rank 0's. Give
    both there, unless the trainer deals batches out by itself, as accelerate does.
    DataLoader workers fetch ahead: windows are then chosen, and state_dict stands, a few batches early.
    Raises ValueError for arguments that do not fit together and, while iterating, for embeddings it cannot use.
    """
    MADE = ("num_samples", "batch_size", "method", "refine", "k", "q", "lowest", "temperature", "loss", "ceiling", "seed",
            "world_size")
    STATE = "epoch", "step", "rest", "random", "pending", "uv", "seen"

    def __init__(self, num_samples: int, batch_size: int, method: str = "spectral", refine: bool = True,
                 k: int | None = None, q: int | None = None, window: int | None = None, temperature: float = 0.1,
                 seed: int = 0, embed: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None, lowest: bool = False,
                 exclude: Tensor | None = None, ceiling: float | None = None, rank: int = 0, world_size: int = 1,
                 loss: str = "nt_xent"):
        _check_size(num_samples, batch_size)
        _check_integer("seed", seed)
        whole = num_samples // batch_size
        if window is not None:
            _check_integer("window", window)
        if window is not None and (not batch_size <= window <= num_samples or k not in (None, window // batch_size)):
            raise ValueError(f"window is {window} and k {k}; give k, or a window from {batch_size} to {num_samples}")
        k = window // batch_size if window is not None else min(40, whole) if k is None else k
        _check_k(num_samples, batch_size, k)
        if method not in ("spectral", "osgd") or method == "spectral" and (q is not None or lowest):
            raise ValueError(f"method is {method!r}, q {q}, lowest {lowest}; give 'spectral' without them, or 'osgd'")
        q = max(1, k // 10) if q is None else q
        if method == "osgd" and (exclude is not None or ceiling is not None):
            raise ValueError("method 'osgd' knows neither exclude nor ceiling; leave them out, or give 'spectral'")
        exclude = _check_exclude(exclude, num_samples, refine, batch_size, k)
        two = torch.ones(2, 1)  # the functions themselves refuse what they cannot use
        select_by_loss(two, two, torch.zeros(k, 2, dtype=torch.int64), q, temperature, loss=loss)
        spectral_batches(two, two, 2, 1, temperature, None, refine, None, ceiling, loss)
        if not 0 <= rank < world_size <= whole:
            raise ValueError(f"rank is {rank} and world_size {world_size}; give 0 <= rank < world_size <= {whole}")
        self.num_samples, self.batch_size, self.drop_last = num_samples, batch_size, True  # accelerate reads drop_last
        self.method, self.refine, self.k, self.q, self.lowest = method, refine, k, q, lowest
        self.temperature, self.seed, self.embed, self.rank, self.world_size = temperature, seed, embed, rank, world_size
        self.exclude, self.ceiling, self.loss = exclude, ceiling, loss  # as spectral_batches takes them
        self.uv, self.seen = None, torch.zeros(num_samples, dtype=torch.bool)
        self.generator = torch.Generator()
        self._begin(0)

    def _begin(self, epoch: int) -> None:
        self.epoch, self.step, self.resumed = epoch, 0, False
        self.rest, self.random = torch.empty(0, dtype=torch.int64), 0  # of the permutation; its first, random batches
        self.pending = []  # batches of the window
        self.generator.manual_seed((self.seed * 1_000_003 + epoch) % 2 ** 63)

    def set_epoch(self, epoch: int) -> None:
        """Sets what the next iteration gives; otherwise that is the epoch after the last. Keeps a loaded position."""
        if epoch != self.epoch:
            self._begin(epoch)

    def __len__(self) -> int:
        return self.num_samples // self.batch_size // self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        if not self.resumed:
            self._begin(self.epoch)
        self.resumed = False
        while self.step < len(self):
            while len(self.pending) < self.world_size:  # so all processes choose at the same step
                self.pending += self._choose()
            batches, self.pending = self.pending[:self.world_size], self.pending[self.world_size:]
            self.step += 1
            yield batches[self.rank]
        self._begin(self.epoch + 1)

    def _choose(self) -> list[list[int]]:
        """The batches of the next window."""
        B, least = self.batch_size, self.k if self.method == "osgd" else 1
        if not self.random and len(self.rest) < least * B:
            self.rest = torch.randperm(self.num_samples, generator=self.generator)
            if self.embed is None:
                seen = self.seen.cpu()[self.rest]
                self.rest = self.rest[seen.byte().argsort(stable=True)]  # those without an embedding first
                self.random = min(math.ceil(int((~seen).sum()) / B), len(seen) // B)
        count = min(self.random or self.k, self.k, len(self.rest) // B)
        rows = self.rest[:count * B]
        if not self.random:
            if self.embed is None:
                u, v = self.uv[rows.to(self.uv.device)].unbind(1)
            else:
                with torch.no_grad():
                    parts = [self.embed(part) for part in rows.split(max(B, 256))]
                if any(not isinstance(x, (tuple, list)) or len(x) != 2 for x in parts):
                    raise ValueError(f"embed gave {type(parts[0]).__name__}; give (u, v), two tensors [m, d]")
                u, v = (torch.cat([torch.as_tensor(x) for x in each]) for each in zip(*parts))
                if len(u) != len(rows):
                    raise ValueError(f"embed gave {len(u)} rows for {len(rows)} indices; give one for each, in order")
            chosen = (osgd_batches(u, v, B, self.k, self.q, self.temperature, self.lowest, self.loss)
                      if self.method == "osgd" else
                      spectral_batches(u, v, B, count, self.temperature, self.generator, self.refine,
                                       None if self.exclude is None else self.exclude[rows], self.ceiling, self.loss))
            rows = rows[chosen.flatten().cpu()]
        batches = [rows.view(-1, B).tolist()]
        if self._distributed():
            dist.broadcast_object_list(batches)
        self.rest, self.random = self.rest[count * B:], max(0, self.random - count)  # now: embed may be interrupted
        return batches[0]

    def _distributed(self) -> bool:
        return self.world_size > 1 and dist.is_available() and dist.is_initialized()

    def update(self, indices: Tensor | list[int], u: Tensor, v: Tensor) -> None:
        """Stores u, v [m, d] of the samples `indices` [m], on the device of u and without waiting for it.

        With torch.distributed and world_size > 1 all processes call it, with the same m, and store what all gave.
        Raises ValueError for shapes that do not fit, a sampler with embed and, on the CPU, indices outside [0, n).
        """
        _check(u, v, self.temperature, read=False)
        indices, d = torch.as_tensor(indices), u.shape[1] if self.uv is None else self.uv.shape[2]
        if self.embed is not None:
            raise ValueError("update is called and embed was given; leave out one of the two")
        if indices.dtype != torch.int64 or indices.shape != u.shape[:1] or u.shape[1] != d:
            raise ValueError(f"indices is {tuple(indices.shape)} {indices.dtype} and u {tuple(u.shape)}; "
                             f"give m int64 indices and [m, {d}] embeddings")
        if indices.device.type == "cpu" and len(u) and not 0 <= indices.min() <= indices.max() < self.num_samples:
            raise ValueError(f"indices go from {indices.min()} to {indices.max()}; give 0 to {self.num_samples - 1}")
        indices, uv = indices.to(u.device, non_blocking=True), torch.stack([u.detach(), v.detach()], 1).float()
        if self._distributed():
            of_all = [x.new_empty(dist.get_world_size() * len(x), *x.shape[1:]) for x in (indices, uv)]
            for every, own in zip(of_all, (indices, uv)):
                dist.all_gather_into_tensor(every, own)
            indices, uv = of_all
        if self.uv is None:
            self.uv = torch.zeros(self.num_samples, 2, d, device=u.device)
        self.uv, self.seen = self.uv.to(u.device), self.seen.to(u.device)
        self.uv.index_copy_(0, indices, uv)
        self.seen.index_fill_(0, indices, True)

    def state_dict(self) -> dict:
        """Where the epoch stands, and what update stored: after load_state_dict the rest follows exactly."""
        return {"generator": self.generator.get_state(), "exclude": self.exclude, "embed": self.embed is not None
                } | {name: copy.deepcopy(getattr(self, name)) for name in self.MADE + self.STATE}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where state_dict was called. Raises ValueError where the two samplers were made otherwise (MADE)."""
        if missing := [name for name in (*self.MADE, *self.STATE, "generator", "exclude", "embed") if name not in state]:
            raise ValueError(f"the state has no {', '.join(missing)}; give what state_dict of this class returned")
        for name in self.MADE:
            if state[name] != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}; for this state make the sampler with {state[name]}")
        if state["embed"] != (self.embed is not None):
            raise ValueError(f"for this state make the sampler {'with' if state['embed'] else 'without'} embed")
        groups = [torch.empty(0) if x is None else x.cpu() for x in (self.exclude, state["exclude"])]
        if not torch.equal(*groups):
            raise ValueError("exclude is not that of this state; make the sampler with the same groups")
        for name in self.STATE:
            setattr(self, name, copy.deepcopy(state[name]))
        self.generator.set_state(state["generator"])
        self.resumed = True
        if self.step == len(self):
            self._begin(self.epoch + 1)
