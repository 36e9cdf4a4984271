"""Tests of ContrastiveBatchSampler and of the README's recipes, which run as they stand there.

    python -m pytest test_batch_sampler.py
"""
import functools
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, TensorDataset

from samplers import ContrastiveBatchSampler, batch_losses
from test_samplers import clustered, refused

HERE = Path(__file__).parents[1]
SOURCE, RECIPES = (HERE.joinpath(name).read_text() for name in ("samplers.py", "README.md"))

# Twelve clusters of 20 samples each, in two views; 8 in a batch.
N, B = 240, 8
U, V, LABEL = clustered(12, 20, 0.5)


def lookup(rows):
    return U[rows], V[rows]


def hardness(batches) -> float:
    return batch_losses(U, V, torch.tensor(batches)).mean().item()


def flat(batches) -> list:
    return sorted(row for batch in batches for row in batch)


def train(sampler, epochs: int = 1) -> list:
    """The batches of whole epochs, with an update after each, as [epochs, m, B]."""
    out = []
    for _ in range(epochs):
        out.append([])
        for rows in sampler:
            out[-1].append(rows)
            sampler.update(rows, U[rows], V[rows])
    return out


# ---------------------------------------------------------------------------- batches, epochs, seeds

@pytest.mark.parametrize("n", [240, 247])
@pytest.mark.parametrize("embed", [None, lambda rows: (U[rows % N], V[rows % N])])
def test_an_epoch_is_a_partition(n, embed):
    sampler = ContrastiveBatchSampler(n, B, k=7, embed=embed)  # 30 batches: four windows of 7 and one of 2
    epochs = [list(sampler) for _ in range(3)]
    for batches in epochs:
        assert len(batches) == len(sampler) == 30 and all(len(b) == B for b in batches)
        assert all(type(row) is int for b in batches for row in b)
        assert len(set(flat(batches))) == 240 and 0 <= flat(batches)[0] and flat(batches)[-1] < n
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert n == 240 or set(flat(epochs[0])) != set(flat(epochs[1]))  # the samples left out vary


@pytest.mark.parametrize("method", ["spectral", "osgd"])
def test_seed_and_epoch_decide(method):
    def epochs(seed, count=3):
        sampler = ContrastiveBatchSampler(N, B, method, k=10, seed=seed, embed=lookup)
        return [list(sampler) for _ in range(count)]
    first = epochs(0)
    assert first == epochs(0) and first[0] != epochs(1)[0] and first[1] != epochs(1)[0]
    sampler = ContrastiveBatchSampler(N, B, method, k=10, embed=lookup)
    for epoch in (2, 0, 1, 1):  # in any order, also a second time
        sampler.set_epoch(epoch)
        assert list(sampler) == first[epoch]
    assert list(sampler) == first[2]  # and on from there
    sampler.set_epoch(1)
    next(iter(sampler))  # one that was broken off counts
    assert list(sampler) == first[2]
    state = torch.get_rng_state()
    list(sampler)
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn from torch's global generator


@pytest.mark.parametrize("workers", [0, 2])
def test_with_dataloader(workers):
    data = TensorDataset(torch.arange(N), LABEL)
    sampler = ContrastiveBatchSampler(N, B, embed=lookup, k=10)
    expected = list(sampler)
    sampler.set_epoch(0)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=workers)
    assert len(loader) == 30
    epochs = [list(loader) for _ in range(2)]
    assert [rows.tolist() for rows, _ in epochs[0]] == expected
    assert [rows.tolist() for rows, _ in epochs[1]] != expected
    assert all(torch.equal(label, LABEL[rows]) for rows, label in epochs[1])


# ---------------------------------------------------------------------------- hardness

def test_embeddings_make_batches_hard():
    random = hardness(list(ContrastiveBatchSampler(N, B)))
    hard = hardness(list(ContrastiveBatchSampler(N, B, embed=lookup)))
    plain = hardness(list(ContrastiveBatchSampler(N, B, refine=False, embed=lookup)))
    highest = hardness(list(ContrastiveBatchSampler(N, B, "osgd", embed=lookup, q=1, k=30)))
    lowest = hardness(list(ContrastiveBatchSampler(N, B, "osgd", embed=lookup, q=1, k=30, lowest=True)))
    assert hard > plain > random + 0.5 and highest > random + 0.15 and lowest < random - 0.15


@pytest.mark.parametrize("method", ["spectral", "osgd"])
def test_temperature_decides(method):
    first, second = (list(ContrastiveBatchSampler(N, B, method, temperature=t, embed=lookup)) for t in (0.1, 1.0))
    assert first != second


def test_osgd_takes_the_hardest_of_each_k_in_an_epoch_of_n_over_B():
    sampler = ContrastiveBatchSampler(N, B, "osgd", k=12, q=5, embed=lookup)
    asked = []
    sampler.embed = lambda rows: asked.append(rows) or lookup(rows)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 30 and len(asked) == 6  # three permutations of two groups and 6 batches
    for group, rows in enumerate(asked):
        losses = batch_losses(U, V, rows.view(12, B))
        assert batches[5 * group:5 * group + 5] == rows.view(12, B)[losses.argsort()[-5:]].tolist()
    for first, second in zip(asked[::2], asked[1::2]):
        assert len(set(first.tolist() + second.tolist())) == 24 * B


def test_windows_are_embedded_in_their_turn():
    asked = []

    def embed(rows):
        assert not torch.is_grad_enabled() and rows.dtype == torch.int64
        asked.append(rows.tolist())
        return lookup(rows)
    sampler = ContrastiveBatchSampler(N, B, window=83, embed=embed)  # k = 10
    given = []
    for step, rows in enumerate(sampler):
        assert len(asked) == step // 10 + 1  # and not a batch before
        given.append(rows)
    assert [sorted(x) for x in asked] == [flat(given[s:s + 10]) for s in (0, 10, 20)]
    asked.clear()  # a large window in several calls
    ContrastiveBatchSampler(2000, B, k=100, embed=lambda rows: embed(rows % N))._choose()
    assert [len(x) for x in asked] == [256, 256, 256, 32]


def test_two_modalities():
    see, read = torch.nn.Linear(32, 6), torch.nn.Sequential(torch.nn.Linear(32, 9), torch.nn.Linear(9, 6))
    sampler = ContrastiveBatchSampler(N, B, embed=lambda rows: (see(U[rows]), read(V[rows]).half()))
    with torch.no_grad():
        losses = [batch_losses(see(U), read(V), torch.tensor(list(s))).mean() for s in (ContrastiveBatchSampler(N, B), sampler)]
    assert losses[1] > losses[0] + 0.1


def test_exclude_may_be_a_list_an_array_or_a_tensor():
    state = torch.get_rng_state()
    batches = [list(ContrastiveBatchSampler(N, B, embed=lookup, exclude=x)) for x in (LABEL, LABEL.tolist(), LABEL.numpy())]
    assert batches[0] == batches[1] == batches[2]
    plain = list(ContrastiveBatchSampler(N, B, embed=lookup))
    alike = [sum(B - LABEL[rows].unique().numel() for rows in x) for x in (plain, batches[0])]
    assert alike[0] > 100 and alike[1] == 0 and torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------------------- free embeddings

@pytest.mark.parametrize("method", ["spectral", "osgd"])
def test_update_makes_later_epochs_hard(method):
    sampler = ContrastiveBatchSampler(N + 5, B, method, k=10)  # 5 samples are left out of the first epoch
    order = []
    for epoch in range(3):
        order.append([])
        for rows in sampler:
            order[-1].append(rows)
            sampler.update(torch.tensor(rows), U[torch.tensor(rows) % N].double().requires_grad_(), V[torch.tensor(rows) % N])
    assert not sampler.uv.requires_grad and sampler.uv.dtype == torch.float32
    assert len(set(flat(order[0]))) == N  # a random partition, for either method
    unseen = set(range(N + 5)) - set(flat(order[0]))
    assert unseen <= set(order[1][0]) and sampler.seen.all()  # first of all, and in a single random batch
    losses = [batch_losses(U, V, torch.tensor(batches) % N).mean() for batches in (order[0], order[1][1:], order[2])]
    assert min(losses[1:]) > losses[0] + (0.4 if method == "spectral" else 0.1)


def test_update_beforehand_with_every_sample_is_as_embed():
    sampler = ContrastiveBatchSampler(N, B, k=10)
    sampler.update(torch.arange(N), U, V)
    assert list(sampler) == list(ContrastiveBatchSampler(N, B, k=10, embed=lookup))


def test_update_uses_what_was_stored_last():
    sampler = ContrastiveBatchSampler(N, B)
    sampler.update(torch.arange(N), torch.randn(N, 32), torch.randn(N, 32))
    sampler.update(list(range(N)), U, V)
    assert torch.equal(sampler.uv, torch.stack([U, V], 1))


def test_update_on_a_device_reads_nothing_back():
    sampler = ContrastiveBatchSampler(N, B)
    with FakeTensorMode(allow_non_fake_inputs=True):
        indices = torch.zeros(2, dtype=torch.int64, device="cuda")
        for _ in range(2):
            sampler.update(indices, *torch.randn(2, 2, 16, device="cuda", dtype=torch.bfloat16))
        assert sampler.uv.device.type == sampler.seen.device.type == "cuda" and sampler.uv.dtype == torch.float32


# ---------------------------------------------------------------------------- processes

@pytest.mark.parametrize("method", ["spectral", "osgd"])
@pytest.mark.parametrize("world", [2, 3, 4])  # 30 batches in windows of 7
def test_ranks_share_one_partition(world, method):
    whole = list(ContrastiveBatchSampler(N, B, method, k=7, embed=lookup))
    parts = [list(ContrastiveBatchSampler(N, B, method, k=7, embed=lookup, rank=r, world_size=world)) for r in range(world)]
    assert [len(p) for p in parts] == [30 // world] * world
    assert [b for step in zip(*parts) for b in step] == whole[:30 // world * world]


def two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    noise = torch.Generator().manual_seed(rank)  # no two processes embed exactly alike

    def embed(rows):
        return tuple(x[rows] + 0.5 * torch.randn(len(rows), 32, generator=noise) for x in (U, V))
    fresh = list(ContrastiveBatchSampler(N, B, k=7, embed=embed, rank=rank, world_size=2))
    sampler = ContrastiveBatchSampler(N, B, k=7, rank=rank, world_size=2)
    free = train(sampler, 2)
    assert torch.equal(sampler.uv, torch.stack([U, V], 1))  # of the other process's batches as well
    torch.save((fresh, free), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    method = "fork" if sys.platform == "linux" else "spawn"  # without importing torch again, where that is safe
    torch.multiprocessing.start_processes(two_processes, (str(tmp_path),), nprocs=2, start_method=method)
    (fresh, free), (fresh1, free1) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert flat(fresh + fresh1) == flat(free[0] + free1[0]) == flat(free[1] + free1[1]) == list(range(N))
    assert hardness(free[1] + free1[1]) > hardness(free[0] + free1[0]) + 0.4


# ---------------------------------------------------------------------------- resuming

@pytest.mark.parametrize("method", ["spectral", "osgd"])
@pytest.mark.parametrize("stop", [0, 7, 30, 60, 61, 70, 73, 89, 90])  # 30 steps an epoch, windows of 10
def test_a_resumed_run_gives_exactly_the_rest(method, stop):
    def run(sampler, steps, saved=None):
        """Trains up to `steps` steps of four epochs; the batches and a saved state."""
        batches = []
        for epoch in range(sampler.epoch, 4):
            sampler.set_epoch(epoch)
            for rows in sampler:
                batches.append(rows)
                sampler.update(rows, *lookup([row % N for row in rows]))
                if len(batches) == steps:
                    break
            if len(batches) == steps:
                break
        torch.save(sampler.state_dict(), saved := io.BytesIO())
        saved.seek(0)
        return batches, torch.load(saved)
    make = functools.partial(ContrastiveBatchSampler, N + 5, B, method, k=10, seed=3)
    whole, _ = run(make(), 120)
    first, state = run(make(), stop) if stop else ([], make().state_dict())
    again = make()
    run(again, 40)  # whatever it did before
    again.load_state_dict(state)
    rest, _ = run(again, 120)
    assert len(whole) == 120 and first + rest == whole and len(first) == stop


def test_a_state_is_a_copy():
    sampler = ContrastiveBatchSampler(N, B, k=10)
    train(sampler)
    batches = iter(sampler)
    next(batches)
    state = sampler.state_dict()
    rest = list(batches)
    sampler.update(torch.arange(N), V, U)
    list(sampler)
    for _ in range(2):
        sampler.load_state_dict(state)
        assert list(sampler) == rest
    sampler.load_state_dict(state)
    next(iter(sampler))
    assert len(list(sampler)) == 30  # a loaded position holds once; then an epoch begins at its beginning
    assert torch.equal(state["uv"], torch.stack([U, V], 1))
    state["uv"] += 1  # nor does the sampler keep it
    assert torch.equal(sampler.uv, torch.stack([U, V], 1))


@pytest.mark.parametrize("at", [1, 2])
def test_nothing_is_lost_where_embed_is_interrupted(at):
    calls = []

    def embed(rows):
        calls.append(rows)
        if len(calls) == at:
            raise KeyboardInterrupt
        return lookup(rows)
    sampler = ContrastiveBatchSampler(N, B, k=10, embed=embed)
    with pytest.raises(KeyboardInterrupt):
        list(sampler)
    batches = list(ContrastiveBatchSampler(N, B, k=10, embed=lookup))
    again = ContrastiveBatchSampler(N, B, k=10, embed=lookup)
    again.load_state_dict(sampler.state_dict())
    assert list(again) == batches[10 * (at - 1):]


# ---------------------------------------------------------------------------- bad input

def test_bad_arguments_are_refused():
    make = ContrastiveBatchSampler
    for size in (1, 21):
        refused(lambda: make(20, size), f"batch_size is {size} with 20 samples", "from 2 to 20")
    for k in (0, 6):
        refused(lambda: make(20, 4, k=k), f"k is {k} with 20 samples in batches of 4", "from 1 to 5")
    for window in (3, 21):
        refused(lambda: make(20, 4, window=window), f"window is {window}", "from 4 to 20")
    refused(lambda: make(20, 4, window=10, k=3), "window is 10 and k 3", "give k, or a window")
    assert make(20, 4, window=10, k=2).k == make(20, 4, window=10).k == 2 and make(20, 4).k == 5 and make(500, 4).k == 40
    refused(lambda: make(20, 4, "hard"), "method is 'hard'", "'spectral'", "'osgd'")
    refused(lambda: make(20, 4, q=2), "'spectral'", "q 2", "'osgd'")
    refused(lambda: make(20, 4, lowest=True), "'spectral'", "lowest True", "'osgd'")
    for q in (0, 6):
        refused(lambda: make(20, 4, "osgd", q=q), f"q is {q} with k = 5", "from 1 to 5")
    assert make(20, 4, "osgd").q == 1 and make(500, 4, "osgd").q == 4
    refused(lambda: make(20, 4, temperature=0), "temperature is 0", "> 0")
    refused(lambda: make(20., 4), "number of samples is 20.0", "an integer")
    refused(lambda: make(20, 4, window=8.5), "window is 8.5", "an integer")
    refused(lambda: make(20, 4, seed=None), "seed is None", "an integer")
    refused(lambda: make(20, 4, loss="clip"), "loss is 'clip'", "'infonce'")
    labels = torch.arange(20) // 2
    refused(lambda: make(20, 4, exclude=labels[:7]), "exclude is (7,)", "for 20 samples", "one integer for each")
    refused(lambda: make(20, 4, exclude=labels.view(10, 2)), "exclude is (10, 2)", "one integer for each")
    refused(lambda: make(20, 4, exclude=labels.float()), "torch.float32", "one integer for each sample")
    refused(lambda: make(20, 4, exclude=["cat"] * 20), "something else than numbers", "one integer for each", "return_inverse")
    refused(lambda: make(1040, 8, k=130, exclude=torch.arange(1040)), "windows of 1040 samples", "at most 128")
    refused(lambda: make(20, 4, exclude=labels, refine=False), "refine False", "refine=True")
    for ceiling in (0, 1.5):
        refused(lambda: make(20, 4, ceiling=ceiling), f"ceiling is {ceiling}", "0.999")
    for wrong in ({"exclude": labels}, {"ceiling": 0.9}):
        refused(lambda: make(20, 4, "osgd", **wrong), "'osgd'", "neither exclude nor ceiling", "'spectral'")
    for rank, world in ((2, 2), (-1, 2), (0, 0), (0, 6)):
        refused(lambda: make(20, 4, rank=rank, world_size=world), f"rank is {rank} and world_size {world}", "<= 5")


def test_bad_embeddings_are_refused():
    sampler = ContrastiveBatchSampler(N, B)
    refused(lambda: sampler.update([1, 2], U[:2], V[:3]), "(2, 32)", "(3, 32)", "[n, d]")
    refused(lambda: sampler.update([1, 2, 3], U[:2], V[:2]), "indices is (3,) torch.int64", "(2, 32)")
    refused(lambda: sampler.update([1., 2.], U[:2], V[:2]), "torch.float32", "int64")
    for wrong in (-1, N):
        refused(lambda: sampler.update([wrong], U[:1], V[:1]), f"to {wrong}", f"0 to {N - 1}")
    sampler.update([1, 2], U[:2], V[:2])
    refused(lambda: sampler.update([1, 2], U[:2, :7], V[:2, :7]), "(2, 7)", "[m, 32]")
    sampler.update(torch.arange(N), U, V * float("nan"))
    refused(lambda: next(iter(sampler)), "v has 240 of 240 rows", "NaN")
    sampler.embed = lookup
    refused(lambda: sampler.update([1, 2], U[:2], V[:2]), "embed", "leave out")
    sampler.embed = lambda rows: (U[rows[1:]], V[rows[1:]])
    refused(lambda: next(iter(sampler)), "239 rows for 240 indices", "one for each")
    for wrong in (None, U[:2], (U, V, U)):
        sampler.embed = lambda rows: wrong
        refused(lambda: next(iter(sampler)), f"embed gave {type(wrong).__name__}", "(u, v)")
    sampler.embed = lambda rows: (U[rows], V[rows][:, 1:])
    refused(lambda: next(iter(sampler)), "(240, 32)", "(240, 31)")


def test_a_state_of_another_sampler_is_refused():
    state = ContrastiveBatchSampler(N, B, seed=4).state_dict()
    refused(lambda: ContrastiveBatchSampler(N, B).load_state_dict(state), "seed is 0", "with 4")
    refused(lambda: ContrastiveBatchSampler(N + 1, B, seed=4).load_state_dict(state), "num_samples is 241", "with 240")
    refused(lambda: ContrastiveBatchSampler(N, 4, seed=4).load_state_dict(state), "batch_size is 4", "with 8")
    for other, part in (({"method": "osgd"}, "method is osgd"), ({"k": 7}, "k is 7"), ({"temperature": 1.}, "temperature is 1.0"),
                        ({"refine": False}, "refine is False"), ({"ceiling": 0.5}, "ceiling is 0.5"), ({"loss": "infonce"}, "loss is infonce"),
                        ({"exclude": LABEL}, "exclude is not that"), ({"embed": lookup}, "without embed")):
        refused(lambda: ContrastiveBatchSampler(N, B, seed=4, **other).load_state_dict(state), part)
    osgd = ContrastiveBatchSampler(N, B, "osgd", q=2).state_dict()
    refused(lambda: ContrastiveBatchSampler(N, B, "osgd").load_state_dict(osgd), "q is 3", "with 2")
    refused(lambda: ContrastiveBatchSampler(N, B, seed=4, world_size=2).load_state_dict(state), "world_size is 2", "with 1")
    del state["k"], state["rest"]
    refused(lambda: ContrastiveBatchSampler(N, B, seed=4).load_state_dict(state), "no k, rest", "state_dict")


# ---------------------------------------------------------------------------- the README's recipes

TEXT = RECIPES.split("### Recipes\n")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
SENTENCES = '''
import pickle
import torch
import recipe


class Pairs:  # as datasets.Dataset: columns of texts, of some rows a dictionary
    anchor, positive = ([f"{word} {i % 40}" for i in range(400)] for word in ("what is", "it is"))

    def __len__(self):
        return 400

    def __getitem__(self, rows):
        assert all(type(row) is int for row in rows)
        return {"anchor": [self.anchor[i] for i in rows], "positive": [self.positive[i] for i in rows]}


class Encoder:
    table = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))

    def encode(self, texts, convert_to_tensor, show_progress_bar):
        return self.table[[int(text.split()[-1]) for text in texts]]


recipe.model = Encoder()
make = pickle.loads(pickle.dumps(recipe.hard_batches))  # as its training arguments are saved
sampler = make(Pairs(), batch_size=10, drop_last=False, valid_label_columns=["label"],
               generator=torch.Generator().manual_seed(7), seed=0)
sampler.set_epoch(1)
batches = list(sampler)
assert len(batches) == len(sampler) == 40 and sorted(sum(batches, [])) == list(range(400)) and sampler.seed == 7
alike = sum(len({i % 40 for i in batch}) == 1 for batch in batches)
assert alike > 30, alike  # ten samples of each text: together they are the hardest batches
assert make(Pairs(), batch_size=10, drop_last=True).seed == 0
'''


def test_the_recipes_run_as_they_stand(tmp_path):
    assert len(BLOCKS) == 3 and all(len(block.strip().splitlines()) <= 14 for block in BLOCKS)
    tmp_path.joinpath("samplers.py").write_text(SOURCE)
    scripts = ["own_loop.py", "image_text.py", "recipe.py", "use.py"]
    for name, text in zip(scripts, [*BLOCKS, SENTENCES]):
        tmp_path.joinpath(name).write_text(text)
    run = "import runpy, sys; [runpy.run_path(script, run_name='__main__') for script in sys.argv[1:]]"  # torch once
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", run, *scripts], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
