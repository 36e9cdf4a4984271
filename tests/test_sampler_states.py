"""Tests of ContrastiveBatchSampler's states, threads and processes.

    python -m pytest tests/test_sampler_states.py
"""
import faulthandler
import functools
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from samplers import ContrastiveBatchSampler, select_by_loss, spectral_batches
from test_batch_sampler import (LABEL, METHODS, B, N, U, V, flat, hardness, lookup, make, methods, saved,
                                shuffled, train)
from test_samplers import refused


# ---------------------------------------------------------------------------- ahead, and resuming
@methods
@pytest.mark.parametrize("n", [240, 245])
def test_ahead_gives_the_same_batches_and_so_does_a_resumed_run(method, n):
    build, threads = functools.partial(ContrastiveBatchSampler, n, B, method, seed=3, **METHODS[method]), 0
    whole = train(build(), 120)
    assert train(build(ahead=True), 120) == whole
    for stop in 0, 7, 30, 31, 44, 55, 59, 60, 61, 73, 88, 89, 90, 119:  # epochs' ends, middles of windows
        first = build(ahead=stop % 2 == 0)
        assert train(first, stop) == whole[:stop]
        threads += first.solved is not None
        again = build(ahead=stop % 3 > 0)
        train(again, 40)  # whatever it did before
        again.load_state_dict(saved(first))
        assert train(again, 120 - stop) == whole[stop:]
    assert (threads > 0) == (method == "spectral" or callable(method))


@pytest.mark.parametrize("stop", [0, 7, 29, 30, 31, 47])
def test_ahead_of_a_list_gives_the_same_batches_and_so_does_a_resumed_run(stop):
    """The list's embeddings are new in each epoch: what is chosen ahead is chosen on them."""
    def build(ahead):
        def embed(rows):
            return U[rows] + sampler.epoch, V[rows] + sampler.epoch
        sampler = make(k=10, seed=3, embed=embed, at_once=True, ahead=ahead)
        return sampler
    whole, first, again = train(build(False), 90), build(True), build(True)
    assert train(first, stop) == whole[:stop]
    assert (first.solved is not None) == (stop in (7, 31, 47))
    again.load_state_dict(saved(first))
    assert train(again, 90 - stop) == whole[stop:]


@methods
def test_what_was_fetched_and_not_trained_on_comes_again(method):
    whole = train(make(method, embed=lookup, **METHODS[method]), 90)
    for given, behind in (35, 0), (35, 3), (60, 4), (60, 12):
        sampler = make(method, embed=lookup, **METHODS[method])
        train(sampler, given)
        state, again = saved(sampler, behind=behind), make(method, embed=lookup, **METHODS[method])
        again.load_state_dict(state)
        assert train(again, 90 - given + behind) == whole[given - behind:]
    loader, trained = DataLoader(torch.arange(N), batch_sampler=sampler, num_workers=2), 0
    sampler.set_epoch(1)
    for trained, rows in enumerate(loader, 1):
        if trained == 8:
            break
    again.load_state_dict(saved(sampler, behind=sampler.step - trained))
    assert method in ("osgd", "osgd-replacement") or train(again, 22) == whole[38:60]
    refused(lambda: sampler.state_dict(behind=-1), "behind is -1", f"0 to {sampler.step}")
    refused(lambda: make(method).state_dict(behind=1), "behind is 1", "0 to 0")


def test_a_resumed_run_keeps_what_was_embedded_at_once():
    calls = []

    def build():
        return make(k=10, at_once=True, embed=lambda rows: calls.append(rows) or lookup(rows))
    whole, first, again = train(build(), 60), build(), build()
    calls.clear()
    train(first, 13)
    again.load_state_dict(saved(first))
    assert train(again, 17) == whole[13:30] and len(calls) == 1
    assert train(again, 30) == whole[30:] and len(calls) == 2


def test_a_state_is_a_copy():
    sampler = make(k=10)
    train(sampler, 30)
    batches = iter(sampler)
    next(batches)
    state = sampler.state_dict()
    uv, rest = state["uv"].clone(), list(batches)
    sampler.update(torch.arange(N), V, U)
    for _ in range(2):
        sampler.load_state_dict(state)
        assert list(sampler) == rest
    assert torch.equal(state["uv"], uv)
    state["uv"] += 1  # nor does the sampler keep it
    assert torch.equal(sampler.uv, uv)


@pytest.mark.parametrize("where", ["embed", "method"])
@pytest.mark.parametrize("method", ["spectral", "osgd-replacement", shuffled])
def test_nothing_is_lost_where_choosing_is_interrupted(method, where, monkeypatch):
    build = functools.partial(make, method, embed=lookup, **METHODS[method])
    whole = train(build(), 60)
    for at in 1, 2, 3:
        def interrupted(call, *words):
            calls.append(call(*words))
            if len(calls) == at:
                raise KeyboardInterrupt
            return calls[-1]
        sampler, calls, given = build(), [], []
        with monkeypatch.context() as patch:
            if where == "embed":
                sampler.embed = functools.partial(interrupted, lookup)
            elif method == shuffled:
                sampler.method = functools.wraps(shuffled)(functools.partial(interrupted, shuffled))
            else:
                call = spectral_batches if method == "spectral" else select_by_loss
                patch.setattr(f"samplers.{call.__name__}", functools.partial(interrupted, call))
            with pytest.raises(KeyboardInterrupt):
                for rows in sampler:
                    given.append(rows)
        again = build()
        again.load_state_dict(saved(sampler))
        assert train(again, 60 - len(given)) == whole[len(given):]


@pytest.mark.parametrize("asked", [False, True])
def test_what_a_thread_cannot_use_is_said_in_its_turn(asked):
    sampler = make(k=10, ahead=True)
    sampler.update(torch.arange(N), U, V)
    batches = iter(sampler)
    next(batches)
    sampler.uv[sampler.rest[80:]] = torch.nan  # the third window's, which is begun with the eleventh batch
    for _ in range(10):
        next(batches)
    if asked:
        refused(lambda: list(batches), "u has 80 of 80 rows", "NaN")
    sampler.update(torch.arange(N), U, V)
    assert flat(sampler) == list(range(N))  # a new epoch, to which that means nothing


# ---------------------------------------------------------------------------- processes
@pytest.mark.parametrize("method", ["spectral", "osgd"])
@pytest.mark.parametrize("world", [2, 3, 4])  # 30 batches in windows of 7
def test_ranks_share_one_partition(world, method):
    build = functools.partial(make, method, k=7, embed=lookup)
    parts = [train(build(rank=r, world_size=world), 90 // world) for r in range(world)]
    whole, given, each = train(build(), 90), [b for step in zip(*parts) for b in step], 30 // world * world
    assert given[:each] == whole[:each]
    assert method == "osgd" or given[each:2 * each] == whole[30:30 + each]  # begun anew: no sample twice


def deal(sampler, rank: int, every: int) -> list:
    """What a process trains on in three epochs, if it takes a batch of each `every` and updates then."""
    epochs = []
    for _ in range(3):
        epochs.append([])
        for i, rows in enumerate(sampler):
            if i % every == rank % every:
                mine = rows
            if i % every == every - 1:  # the step
                epochs[-1].append(mine)
                if sampler.embed is None:
                    sampler.update(mine, *lookup(torch.tensor(mine) % N))
    return epochs


def two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(100, exit=True)  # a process that waits for ever fails
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    noise = torch.Generator().manual_seed(rank)  # views are drawn at random: no two processes embed alike

    def embed(rows):
        return tuple(x[rows % N] + 0.5 * torch.randn(len(rows), 32, generator=noise) for x in (U, V))

    def drawn(u, v, batch_size, k, temperature, generator):
        return spectral_batches(u, v, batch_size, k, temperature, noise)
    given = {}
    for name, words in WAYS.items():
        words = {key: {"embed": embed, "drawn": drawn}.get(value, value) for key, value in words.items()}
        for every, place in (1, {"rank": rank, "world_size": 2}), (2, {}):  # dealt out by us, and by the loop
            sampler = ContrastiveBatchSampler(N + 8, B, k=7, **words, **place)  # 31 batches: one is left over
            given[name, every] = deal(sampler, rank, every), sampler.uv, sampler.state_dict()["rest"]
    torch.save(given, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


WAYS = {"free": {}, "ahead": {"ahead": True}, "osgd": {"method": "osgd", "q": 3}, "fresh": {"embed": "embed"},
        "at once": {"embed": "embed", "at_once": True}, "drawn": {"method": "drawn"},
        "fresh osgd": {"method": "osgd", "q": 3, "embed": "embed"}}


def test_two_processes_choose_the_same_batches_and_share_embeddings(tmp_path):
    train(make(k=10, ahead=True), 60)  # a thread before the fork
    method = "fork" if sys.platform == "linux" else "spawn"  # torch is there already
    torch.multiprocessing.start_processes(two_processes, (str(tmp_path),), nprocs=2, start_method=method)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (name, every), (ours, uv, rest) in first.items():
        theirs, their_uv, their_rest = second[name, every]
        assert torch.equal(rest, their_rest) and (uv is None or torch.equal(uv, their_uv))
        for epoch, batches in enumerate(a + b for a, b in zip(ours, theirs)):
            assert len(batches) == 30
            if "osgd" not in name or epoch == 0 and name == "osgd":
                assert len(set(flat(batches))) == 30 * B  # no sample twice
            assert len({tuple(x) for x in batches}) == 30  # rank 0's, and none is given to both
        last = [[row % N for row in x] for x in ours[2] + theirs[2]]
        assert hardness(last) > (0.7 if "osgd" in name else 1.3)
    assert sum(uv is not None for _, uv, _ in first.values()) == 10


def test_a_state_of_another_sampler_is_refused():
    state = make(seed=4).state_dict()
    for words, *parts in [
        ({"seed": 0}, "seed is 0", "seed 4"), ({"num_samples": N + 1}, "num_samples is 241", "samples 240"),
        ({"batch_size": 4}, "batch_size is 4", "8"), ({"method": "osgd"}, "method is 'osgd'", "'spectral'"),
        ({"method": shuffled}, "'shuffled'"), ({"k": 7}, "k is 7"), ({"temperature": 1}, "temperature is 1."),
        ({"refine": False}, "refine is False"), ({"relative_margin": 0.5}, "relative_margin is"),
        ({"loss": "infonce"}, "loss is 'infonce'"), ({"exclude": LABEL}, "exclude is ["),
        ({"embed": lookup}, "embed is 'given'"), ({"random_epochs": 1}, "random_epochs is 1"),
        ({"world_size": 2}, "world_size is 2", "world_size 1"),
    ]:
        words = {"num_samples": N, "batch_size": B, "seed": 4} | words
        refused(lambda: ContrastiveBatchSampler(**words).load_state_dict(state), *parts)
    osgd = make("osgd", q=2).state_dict()
    refused(lambda: make("osgd").load_state_dict(osgd), "q is 3", "q 2")
    make(seed=4, ahead=True).load_state_dict(state)
