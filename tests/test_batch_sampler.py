"""Tests of ContrastiveBatchSampler: epochs, what is chosen, settings, bad input.

    python -m pytest tests/test_batch_sampler.py
"""
import functools
import io
import itertools

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader

from samplers import ContrastiveBatchSampler, batch_losses, osgd_batches_with_replacement, spectral_batches
from test_samplers import clustered, refused, seeded

# Twelve clusters of 20 samples each, in two views; 8 in a batch.
N, B = 240, 8
U, V, LABEL = clustered(12, 20, 0.5)
make = functools.partial(ContrastiveBatchSampler, N, B)


def lookup(rows):
    return U[rows], V[rows]


def hardness(batches) -> float:
    return batch_losses(U, V, torch.tensor(batches)).mean().item()


def flat(batches) -> list:
    return sorted(row for batch in batches for row in batch)


def shuffled(u, v, batch_size, k, temperature, generator):  # a method of one's own
    return torch.randperm(len(u), generator=generator).view(k, batch_size)[u[:k, 0].argsort()[:-1]]


METHODS = {"spectral": {"k": 10}, "osgd": {"k": 7, "q": 3}, shuffled: {"k": 10}, "random": {},
           "osgd-replacement": {"k": 35, "q": 4}}
methods = pytest.mark.parametrize("method", METHODS, ids=str)


def train(sampler, steps: int) -> list:
    """The batches of so many steps, with an update after each that differs from step to step."""
    out = []
    while len(out) < steps:
        for rows in sampler:
            out.append(rows)
            if sampler.embed is None:
                noise = torch.randn(2, B, 32, generator=seeded(sum(rows)), dtype=torch.float32) / 4
                u, v = lookup(torch.tensor(rows) % N)
                sampler.update(rows, u + noise[0], v + noise[1])
            if len(out) == steps:
                break
    return out


def saved(sampler, **words):
    torch.save(sampler.state_dict(**words), file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---------------------------------------------------------------------------- batches, epochs, seeds
@pytest.mark.parametrize("method", ["spectral", "random"])
@pytest.mark.parametrize("n", [240, 247])
@pytest.mark.parametrize("embed", [None, lambda rows: (U[rows % N], V[rows % N])])
def test_an_epoch_is_a_partition(n, embed, method):
    sampler = ContrastiveBatchSampler(n, B, method, k=7, embed=embed)  # 30 batches: four windows and 2
    epochs = [list(sampler) for _ in range(3)]
    for batches in epochs:
        assert len(batches) == len(sampler) == 30 and all(len(b) == B for b in batches)
        assert all(type(row) is int for b in batches for row in b)
        assert len(set(flat(batches))) == 240 and 0 <= flat(batches)[0] and flat(batches)[-1] < n
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert n == 240 or set(flat(epochs[0])) != set(flat(epochs[1]))  # the samples left out vary


@methods
def test_seed_and_epoch_decide(method):
    state = torch.get_rng_state()
    build = functools.partial(make, method, embed=lookup, **METHODS[method])
    first, again, other = (train(build(seed=x), 90) for x in (0, 0, 1))
    assert first == again and len({str(x) for x in (first[:30], first[30:60], other[:30])}) == 3
    if method not in ("osgd", "osgd-replacement"):  # whose windows go on in the next epoch
        sampler = build()
        for epoch in (2, 0, 1, 1):  # in any order, also a second time
            sampler.set_epoch(epoch)
            assert list(sampler) == first[30 * epoch:30 * epoch + 30]
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn from torch's global generator


def passed(sampler, loader, how: str, steps: int = 5) -> list:
    if how == "next":
        batches = iter(loader)
        return [next(batches) for _ in range(steps)]
    if how == "islice":
        return list(itertools.islice(loader, steps))
    out = []
    for batch in loader:
        out.append(batch)
        if len(out) == steps:
            break
    return out


@pytest.mark.parametrize("workers", [None, 0, 2])
@pytest.mark.parametrize("how", ["next", "islice", "break"])
def test_a_new_iteration_gives_the_next_epoch(how, workers):
    whole = train(make(k=10, embed=lookup), 120)
    for steps in 5, 30:
        sampler = make(k=10, embed=lookup)
        loader = sampler
        if workers is not None:
            loader = DataLoader(torch.arange(N), batch_sampler=sampler, num_workers=workers)
            assert len(loader) == 30
        for epoch in (0, 1, 2, 3) if workers != 2 else (0, 1):
            batches = [torch.as_tensor(x).tolist() for x in passed(sampler, loader, how, steps)]
            assert batches == whole[30 * epoch:30 * epoch + steps]
        sampler.set_epoch(1)
        assert torch.as_tensor(next(iter(loader))).tolist() == whole[30]


def test_a_loaded_position_and_a_set_epoch_hold_once():
    whole, sampler = train(make(k=10), 120), make(k=10)
    train(sampler, 47)
    state, again = saved(sampler), make(k=10)
    for _ in range(2):
        again.load_state_dict(state)
        again.set_epoch(1)  # as trainers do before each epoch
        assert train(again, 13) == whole[47:60] and again.epoch == 2
    again.load_state_dict(state)
    again.set_epoch(2)
    assert len(list(again)) == 30 and again.epoch == 3
    again.load_state_dict(state)
    next(iter(again))
    assert len(list(again)) == 30 and again.epoch == 3  # its epoch, 1, was broken off


# ---------------------------------------------------------------------------- what is chosen
def test_embeddings_make_batches_hard():
    random = hardness(list(make()))
    hard, plain = (hardness(list(make(refine=x, embed=lookup))) for x in (True, False))
    highest, lowest = (hardness(list(make("osgd", embed=lookup, q=1, k=30, lowest=x))) for x in (False, True))
    assert hard > plain > random + 0.5 and highest > random + 0.15 and lowest < random - 0.15
    assert abs(hardness(list(make("random", embed=lookup))) - random) < 0.1


@pytest.mark.parametrize("method", ["spectral", "osgd", "osgd-replacement"])
def test_temperature_and_loss_decide(method):
    first, *others = (list(make(method, embed=lookup, **words)) for words in (
        {}, {"temperature": 1.0}, *[{"loss": "dcl", "temperature": 0.3}] * (method != "spectral")))
    assert all(first != x for x in others) and others[0] not in others[1:] and len(first) == 30


@pytest.mark.parametrize("loss", ["nt_xent", "dcl"])
def test_osgd_takes_the_hardest_of_each_k_and_goes_on_in_the_next_epoch(loss):
    asked = []
    sampler = make("osgd", k=12, q=4, embed=lambda rows: asked.append(rows) or lookup(rows), loss=loss)
    batches = [*sampler, *sampler]
    assert len(batches) == 60 and len(asked) == 15  # seven permutations, and half a one
    for group, rows in enumerate(asked):
        losses = batch_losses(U, V, rows.view(12, B), loss=loss)
        assert batches[4 * group:4 * group + 4] == rows.view(12, B)[losses.argsort()[-4:]].tolist()
    assert all(len({*a.tolist(), *b.tolist()}) == 24 * B for a, b in zip(asked[::2], asked[1::2]))


def test_osgd_with_replacement_draws_from_all_samples():
    g = seeded(5 * 1_000_003)
    torch.randperm(N, generator=g)
    expected = [osgd_batches_with_replacement(U, V, B, 35, 4, generator=g).tolist() for _ in range(8)]
    assert list(make("osgd-replacement", k=35, q=4, seed=5, embed=lookup)) == sum(expected, [])[:30]
    free = train(make("osgd-replacement", k=35, q=4), 60)
    assert flat(free[:30]) == list(range(N)) and hardness(free[30:]) > hardness(free[:30]) + 0.1


def test_windows_are_embedded_in_their_turn():
    asked = []

    def embed(rows):
        assert not torch.is_grad_enabled() and rows.dtype == torch.int64
        asked.append(rows.tolist())
        return lookup(rows % N)
    given = []
    for step, rows in enumerate(make(k=10, embed=embed)):
        assert len(asked) == step // 10 + 1  # and not a batch before
        given.append(rows)
    assert [sorted(x) for x in asked] == [flat(given[s:s + 10]) for s in (0, 10, 20)]
    for words, sizes in ({}, [256, 256, 256, 32]), ({"embed_size": 700}, [700, 100]):
        asked.clear()  # a large window in several calls
        next(iter(ContrastiveBatchSampler(2000, B, k=100, embed=embed, **words)))
        assert [len(x) for x in asked] == sizes


@pytest.mark.parametrize("method, draws", [
    ("spectral", 2), ("osgd", 5), ("osgd-replacement", 2), ("random", 0)])
def test_at_once_embeds_all_samples_whenever_a_permutation_is_drawn(method, draws):
    asked = []

    def embed(rows):  # no permutation's as those of the last
        asked.extend(rows.tolist())
        return U[rows] + (len(asked) - 1) // N, V[rows]
    sampler = make(method, embed=embed, at_once=True, embed_size=100, random_epochs=1, **METHODS[method])
    list(sampler)
    assert asked == []
    epochs = train(sampler, 60)
    assert asked == list(range(N)) * draws
    for epoch in (1, 2) if method == "spectral" else ():
        free = make(k=10)
        free.update(torch.arange(N), U + epoch - 1, V)
        free.set_epoch(epoch)
        assert list(free) == epochs[30 * epoch - 30:30 * epoch]


def test_a_function_as_method():
    def hardest(u, v, batch_size, k, temperature, generator):
        called.append((len(u), batch_size, k, temperature, generator.initial_seed()))
        return spectral_batches(u, v, batch_size, k, temperature, generator, refine=True)
    called = []
    sampler = make(hardest, k=14, embed=lookup, temperature=0.2, seed=3)
    assert list(sampler) == list(make(k=14, embed=lookup, temperature=0.2, seed=3))
    assert called == [(k * B, B, k, 0.2, 3_000_009) for k in (14, 14, 2)]
    assert flat(train(make(shuffled, k=30, embed=lookup), 30)) != list(range(N))  # 29 of each 30
    sampler.method = functools.partial(hardest)
    assert saved(sampler)["method"] == "partial"
    for wrong, word in ((torch.zeros(0, B), "float32"), (torch.zeros(0, B).long(), "(0, 8)"), (None, "None"),
                        (torch.zeros(3, 5).long(), "(3, 5)"), (torch.full((3, B), 300), "0 to 239")):
        refused(lambda: list(make(lambda *a: wrong, k=30, embed=lookup)), word)


def test_random_epochs_come_first():
    asked = []
    fresh = make(k=10, random_epochs=2, embed=lambda rows: asked.append(rows) or lookup(rows))
    soft = train(fresh, 60)
    assert asked == [] and flat(soft[:30]) == flat(soft[30:]) == list(range(N))
    free = train(make(k=10, random_epochs=2), 90)
    least = min(hardness(list(fresh)), hardness(free[60:]))
    assert least > max(hardness(x) for x in (soft, free[:30], free[30:60])) + 0.4


@methods
def test_window_losses_are_those_of_the_window(method):
    asked = []
    sampler = make(method, loss="dcl", temperature=0.2, embed=lambda rows: asked.append(rows) or lookup(rows),
                   **METHODS[method])
    k, q = sampler.k, {"osgd": 3, "osgd-replacement": 4, shuffled: 9}.get(method, 10)
    for step, rows in zip(range(2 * q), sampler):
        window = sampler.window_losses()
        if method == "random":
            assert window is None
            continue
        assert window["chosen_rows"].shape == (q, B) and window["chosen_rows"][step % q].tolist() == rows
        assert window["random_rows"].shape == (k, B)
        assert set(window["random_rows"].flatten().tolist()) == set(asked[-1].tolist())
        for name in "chosen", "random":
            expected = batch_losses(U, V, window[name + "_rows"], 0.2, "dcl")
            torch.testing.assert_close(window[name], expected)
        assert method == shuffled or window["chosen"].mean() > window["random"].mean()


def test_two_modalities():
    see, read = torch.nn.Linear(32, 6), torch.nn.Sequential(torch.nn.Linear(32, 9), torch.nn.Linear(9, 6))
    sampler = make(embed=lambda rows: (see(U[rows]), read(V[rows]).half()))
    with torch.no_grad():
        losses = [batch_losses(see(U), read(V), torch.tensor(list(s))).mean() for s in (make(), sampler)]
    assert losses[1] > losses[0] + 0.1


def test_exclude_may_be_a_list_an_array_or_a_tensor():
    batches = [list(make(embed=lookup, exclude=x)) for x in (LABEL, LABEL.tolist(), LABEL.numpy())]
    assert batches[0] == batches[1] == batches[2]
    plain = list(make(embed=lookup))
    alike = [sum(B - LABEL[rows].unique().numel() for rows in x) for x in (plain, batches[0])]
    assert alike[0] > 100 and alike[1] == 0


# ---------------------------------------------------------------------------- free embeddings
@pytest.mark.parametrize("method", ["spectral", "osgd"])
def test_update_makes_later_epochs_hard(method):
    sampler = ContrastiveBatchSampler(N + 5, B, method, k=10)  # 5 samples are left out of the first epoch
    order = [train(sampler, 30) for _ in range(3)]
    assert len(set(flat(order[0]))) == N  # a random partition, for either method
    unseen = set(range(N + 5)) - set(flat(order[0]))
    assert unseen <= set(order[1][0]) and sampler.seen.all()  # first of all, and in a single random batch
    losses = [batch_losses(U, V, torch.tensor(x) % N).mean() for x in (order[0], order[1][1:], order[2])]
    assert min(losses[1:]) > losses[0] + (0.4 if method == "spectral" else 0.1)


def test_update_stores_what_came_last_of_any_type_and_length():
    expected = list(make(k=10, embed=lookup))
    for u, v in ((U, V), (U.double().requires_grad_(), V), (1e200 * U.double(), V.double() / 1e200),
                 (1e30 * U, V)):
        sampler = make(k=10)
        sampler.update(torch.arange(N), torch.randn(N, 32), torch.randn(N, 32))
        sampler.update(list(range(N)), u, v)
        assert sampler.uv.dtype == torch.float32 and not sampler.uv.requires_grad
        batches = list(sampler)
        assert batches == expected or abs(hardness(batches) - hardness(expected)) < 0.05 and u is not U
    for dtype in torch.float16, torch.bfloat16:
        sampler.update(torch.arange(N), U.to(dtype), V.to(dtype))
        assert torch.equal(sampler.uv, torch.stack([U, V], 1).to(dtype).float())


def test_update_on_a_device_reads_nothing_back():
    sampler = make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        indices = torch.zeros(2, dtype=torch.int64, device="cuda")
        for _ in range(2):
            sampler.update(indices, *torch.randn(2, 2, 16, device="cuda", dtype=torch.bfloat16))
        assert sampler.uv.device.type == sampler.seen.device.type == "cuda"


@methods
@pytest.mark.parametrize("ahead", [False, True])
def test_inference_mode_and_a_default_type_and_numpy_settings_change_nothing(method, ahead):
    words = METHODS[method]
    expected = train(make(method, seed=3, temperature=0.125, ahead=ahead, **words), 70)
    numbers = {name: np.int64(x) for name, x in words.items()} | {"ahead": np.bool_(ahead)}
    for dtype in torch.float32, torch.float64:
        torch.set_default_dtype(dtype)
        try:
            with torch.inference_mode():
                sampler = ContrastiveBatchSampler(
                    np.int64(N), np.int32(B), np.str_(method) if isinstance(method, str) else method,
                    seed=np.int64(3), temperature=np.float32(0.125),
                    rank=np.int64(0), world_size=np.uint8(1), random_epochs=np.int8(0), embed_size=np.int8(9),
                    refine=np.bool_(True), lowest=np.bool_(False), **numbers)
                sampler.set_epoch(np.int64(0))
                rows = train(sampler, 30)
            rows += train(sampler, 10)
            with torch.inference_mode():
                sampler.load_state_dict(saved(sampler))  # what weights_only takes
            assert rows + train(sampler, 30) == expected
        finally:
            torch.set_default_dtype(torch.float32)
    refused(lambda: make(relative_margin=np.float64(0.5), method="random"), "relative_margin")
    assert saved(make(relative_margin=np.float64(0.5)))["relative_margin"] == 0.5


# ---------------------------------------------------------------------------- bad input
def test_bad_arguments_are_refused():
    pairs = torch.arange(20) // 2
    for words, *parts in [
        *(({"batch_size": x}, f"batch_size is {x} with 20 samples", "from 2 to 20") for x in (1, 21)),
        *(({"k": k}, f"k is {k} with 20 samples in batches of 4", "from 1 to 5") for k in (0, 6)),
        ({"method": "osgd-replacement", "k": 0}, "k is 0", "from 1"),
        ({"method": "hard"}, "method is 'hard'", "'spectral'", "'osgd'"),
        *(({"method": x, "q": 2}, f"'{x}', q 2", "'osgd'") for x in ("spectral", "random")),
        ({"lowest": True}, "'spectral'", "lowest True", "'osgd'"),
        *(({"method": "osgd", "q": q}, f"q is {q} with k = 5", "from 1 to 5") for q in (0, 6)),
        ({"temperature": 0}, "temperature is 0", "> 0"),
        ({"num_samples": 20.}, "number of samples is 20.0", "an integer"),
        *(({name: 8.5}, f"{name} is 8.5", "an integer") for name in ("k", "seed", "embed_size")),
        ({"seed": None}, "seed is None", "an integer"),
        ({"embed_size": 0}, "embed_size is 0", "from 1"),
        ({"loss": "clip"}, "loss is 'clip'", "infonce"),
        ({"at_once": True}, "at_once is given and embed is not"),
        ({"exclude": pairs[:7]}, "exclude is (7,)", "20 integers"),
        ({"exclude": pairs.view(10, 2)}, "exclude is (10, 2)", "20 integers"),
        ({"exclude": pairs.float()}, "torch.float32", "20 integers"),
        ({"exclude": ["cat"] * 20}, "<U3", "return_inverse"),
        ({"exclude": range(1040), "num_samples": 1040, "batch_size": 8, "k": 130}, "k 130", "most 128"),
        ({"exclude": pairs, "refine": False}, "refine False", "refine=True"),
        *(({"relative_margin": x}, f"relative_margin is {x}", "0.1") for x in (-0.1, 1)),
        *(({"method": x} | words, repr(x), "exclude and relative_margin for")
          for x in ("osgd", "random") for words in ({"exclude": pairs}, {"relative_margin": 0.1})),
        *(({"rank": r, "world_size": 2}, f"rank is {r}", "from 0 to 1") for r in (2, -1)),
        *(({"world_size": w}, f"world_size is {w}", "from 1 to 5") for w in (0, 6)),
    ]:
        refused(lambda: ContrastiveBatchSampler(**{"num_samples": 20, "batch_size": 4} | words), *parts)
    assert [ContrastiveBatchSampler(n, 4).k for n in (20, 500)] == [5, 40]
    assert [ContrastiveBatchSampler(n, 4, "osgd").q for n in (20, 500)] == [1, 4]


def test_bad_embeddings_are_refused():
    sampler = make()
    refused(lambda: sampler.update([1, 2], U[:2], V[:3]), "(2, 32)", "(3, 32)", "[n, d]")
    refused(lambda: sampler.update([1, 2, 3], U[:2], V[:2]), "indices is (3,) torch.int64", "(2, 32)")
    refused(lambda: sampler.update([1., 2.], U[:2], V[:2]), "torch.float32", "int64")
    for wrong in (-1, N):
        refused(lambda: sampler.update([wrong], U[:1], V[:1]), f"to {wrong}", f"0 to {N - 1}")
    sampler.update([1, 2], U[:2], V[:2])
    refused(lambda: sampler.update([1, 2], U[:2, :7], V[:2, :7]), "(2, 7)", "[m, 32]")
    for method in ("spectral", "osgd", shuffled):
        sampler = make(method)
        sampler.update(torch.arange(N), U, V * float("nan"))
        refused(lambda: next(iter(sampler)), "v has 240 of 240 rows", "NaN")
    sampler.embed = lookup
    refused(lambda: sampler.update([1, 2], U[:2], V[:2]), "embed", "leave out")
    for embed, *parts in ((lambda rows: (U[rows[1:]], V[rows[1:]]), "239 rows for 240 indices", "one for"),
                          (lambda rows: (U[rows], V[rows][:, 1:]), "(240, 32)", "(240, 31)"),
                          *((lambda rows, x=x: x, f"embed gave {type(x).__name__}", "(u, v)")
                            for x in (None, U[:2], (U, V, U)))):
        refused(lambda: next(iter(make(embed=embed))), *parts)
