"""Other methods of choosing hard mini-batches, each after its paper; bench.py compares them with samplers.py.

All take embeddings u, v [n, d] of n pairs (any scale, any device) and return int64 row numbers [n // B, B],
B = batch_size, on the device of u, the same ones for the same state of `generator` (of the CPU; None: torch's
global one). No row is in two batches; the last n % B rows are in none. All work on the CPU. Raise ValueError
for wrong shapes, NaN, temperature <= 0, a batch_size outside [2, n].
"""
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import reverse_cuthill_mckee
from torch import Generator, Tensor

from samplers import _check, _check_size, _unit, spectral_affinity


def _similarities(u: Tensor, v: Tensor, batch_size: int) -> Tensor:
    """Cosines u_i.v_j [m, m] of the first m = n // B * B rows."""
    _check(u, v, 1.0, read=True)
    _check_size(len(u), batch_size)
    whole = len(u) // batch_size * batch_size
    u, v = _unit(*(x[:whole].detach().cpu() for x in (u, v)))
    return u.float() @ v.float().T


def gcbs(u: Tensor, v: Tensor, batch_size: int, quantile: float | None = None) -> Tensor:
    """GCBS: consecutive rows of a bandwidth-reducing order of the graph of the most similar pairs.

    Sachidananda, Yang & Zhu, "Global Selection of Contrastive Batches via Optimization on Sample
    Permutations", ICML 2023.  Edges, either way, are the u_i.v_j, i != j, above the quantile of all; reverse
    Cuthill-McKee orders. Nothing is random.
    """
    s = _similarities(u, v, batch_size)
    # The released 0.999 leaves a few thousand rows next to no edges, so at least B a row.
    quantile = min(0.999, 1 - batch_size / len(s)) if quantile is None else quantile
    floor = s[::-(-s.numel() // 2 ** 22)].quantile(quantile)  # which takes 2^24 numbers at most
    edges = (s > floor).fill_diagonal_(False).numpy()
    order = reverse_cuthill_mckee(csr_array(edges | edges.T), symmetric_mode=True)
    return torch.from_numpy(order.astype("int64")).view(-1, batch_size).to(u.device)


def b3(u: Tensor, v: Tensor, batch_size: int, ranks: tuple[int, int] | None = None,
       generator: Generator | None = None) -> Tensor:
    """B3: batches are unions of communities of a graph without the edges to each row's very nearest.

    Thirukovalluru et al., "Breaking the Batch Barrier (B3) of Contrastive Learning via Smart Batch Mining",
    NeurIPS 2025.  Each u_i ranks the v_j, j != i, from 0; an edge joins two rows that give each other a rank
    in [low, high) (nearer ones are likely false negatives).  A community has 32 rows, or B if that is no
    multiple.
    """
    s = _similarities(u, v, batch_size).fill_diagonal_(-torch.inf)
    n, size = len(s), batch_size if batch_size % 32 else 32
    # The released ranks, 30 to 130 of 10^4 samples and more, would of fewer skip whole neighbourhoods and
    # then join almost everything, so both shrink with n below 3,840 and 1,600.
    low, high = ranks or (min(30, n // 128), min(30, n // 128) + min(100, max(1, n // 16)))
    edges = (torch.arange(n)[:, None] * n + s.topk(min(high, n - 1)).indices[:, low:]).flatten()
    edges = edges[torch.isin(edges % n * n + edges // n, edges)]
    communities = _partition(edges // n, edges % n, n, size, generator)
    order = torch.rand(len(communities), generator=generator).argsort()
    return communities[order].view(-1, batch_size).to(u.device)


def _partition(row: Tensor, col: Tensor, n: int, size: int, generator: Generator | None) -> Tensor:
    """n nodes in parts [n // size, size] with few edges (row, col), listed both ways, between the parts.

    In METIS's place: recursive bisection, all parts of a level at once. A part is cut along the slowest mode
    of a random walk in it, where the sizes come out right; then nodes change to the side of most neighbours.
    """
    def total(x: Tensor, node: Tensor) -> Tensor:
        return torch.zeros(n).index_add_(0, node, x)

    def cut(x: Tensor) -> Tensor:  # 2 * part for each part's smallest x, as halves says, else 2 * part + 1
        order = x.argsort(stable=True)
        order = order[part[order].argsort(stable=True)]
        side = torch.arange(len(halves)).repeat_interleave(size * halves)
        return torch.empty_like(part).scatter_(0, order, side)

    part, parts = torch.zeros(n, dtype=torch.int64), torch.tensor([n // size])  # parts: what each will become
    while parts.max() > 1:
        inside = part[row] == part[col]
        row, col = row[inside], col[inside]
        degree = total(torch.ones(len(row)), row).clamp(min=1)
        halves = torch.stack([parts // 2, parts - parts // 2], 1).flatten()
        x = torch.rand(n, generator=generator) - 0.5
        for _ in range(50):  # every mode but the constant, which orders nothing, fades, the slowest last
            x = (x + total(x[col], row) / degree) / 2
        new = cut(x)
        for _ in range(20):  # a random half stays where it is: all at once would change places to and fro
            side, stays = new % 2 * 2 - 1.0, torch.rand(n, generator=generator) < 0.5
            new = cut(torch.where(stays, side * n, total(side[col], row) + side))
        part, parts = new.unique(return_inverse=True)[1], halves[halves > 0]
    return part.argsort(stable=True).view(-1, size)


def released_spectral(u: Tensor, v: Tensor, batch_size: int, k: int, temperature: float = 0.1,
                      generator: Generator | None = None) -> Tensor:
    """Algorithm 1 as its authors released it: spectral clustering of exp(w), w = spectral_affinity.

    Cho et al., "Mini-Batch Optimization of Contrastive Loss", TMLR 2024; sc_even_kb_loose of its code.
    Of each window of k * B consecutive rows, in float64: the first k eigenvectors of the normalised Laplacian
    of exp(w), its diagonal zero (the k largest of D^-1/2 exp(w) D^-1/2), times D^-1/2 as in scikit-learn, the
    rows not scaled to length 1; k-means of the rows; to each centre B rows by an optimal assignment of the
    distances, not squared.  Unlike there: a last, shorter window is used as well; k-means starts once, not
    ten times (for trained networks the mean loss is the same to 0.01); eigh, not ARPACK.
    """
    _check(u, v, temperature, read=True)
    _check_size(len(u), batch_size)
    batches = []
    for rows in torch.arange(len(u) // batch_size * batch_size).split(k * batch_size):
        w = spectral_affinity(*(x.detach().cpu()[rows].double() for x in (u, v)), batch_size, temperature)
        affinity = (w - w.max()).exp().fill_diagonal_(0)  # exp(w) alone may overflow; the factor cancels
        half = affinity.sum(1, keepdim=True).clamp(min=1e-150).rsqrt()
        x = half * torch.linalg.eigh(half * affinity * half.T)[1][:, -(len(rows) // batch_size):]
        cost = torch.cdist(x, _kmeans(x, x.shape[1], generator)).repeat_interleave(batch_size, 1)
        label = torch.from_numpy(linear_sum_assignment(cost.numpy())[1]) // batch_size
        batches.append(rows[label.argsort(stable=True)].view(-1, batch_size))
    return torch.cat(batches).to(u.device)


def _kmeans(x: Tensor, k: int, generator: Generator | None, rounds: int = 30) -> Tensor:
    """Centres [k, d] of the rows of x [n, d]: k-means++ (Arthur & Vassilvitskii, 2007), then Lloyd's."""
    weight, centres = torch.full((len(x),), 1e30, dtype=x.dtype), []  # all the same: a uniform first draw
    for draw in torch.rand(k, generator=generator):
        total = weight.cumsum(0, dtype=torch.float64)
        # With fewer distinct rows than centres every weight ends at 0, and the clamp takes the last row.
        drawn = torch.searchsorted(total, draw * total[-1], right=True).clamp(max=len(x) - 1)
        centres.append(x[drawn])
        weight = torch.minimum(weight, (x - centres[-1]).square().sum(1))
    centres = torch.stack(centres)
    for _ in range(rounds):
        label = torch.cdist(x, centres).argmin(1)
        count = torch.bincount(label, minlength=k)[:, None]
        mean = torch.zeros_like(centres).index_add_(0, label, x) / count.clamp(min=1)
        centres = torch.where(count > 0, mean, centres)
    return centres
