"""accelerate deals the sampler's batches out, its world_size left at 1: python -m pytest -q examples"""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("accelerate")
sys.path.insert(0, str(Path(__file__).parents[1]))
from model import nt_xent
from samplers import ContrastiveBatchSampler, batch_losses, random_batches

N, B, EPOCHS = 512, 16, 3
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).repeat(N // 64, 1)
X += 0.3 * torch.randn(N, 8, generator=torch.Generator().manual_seed(1))  # 64 kinds of 8 samples each


def train(accelerator, way: str) -> tuple[list, list]:
    """The batches that this process chose, and those that it trained on, by epoch."""
    model = nn.Linear(8, 8)

    def views(rows):
        return torch.cat([X[rows] + 0.1 * torch.randn(len(rows), 8) for _ in range(2)])
    embed = {"embed": lambda rows: model(views(rows)).chunk(2), "update": None}[way]
    sampler = ContrastiveBatchSampler(N, B, k=8, embed=embed)
    ready, loader, optimizer = accelerator.prepare(
        model, DataLoader(torch.arange(N), batch_sampler=sampler), torch.optim.SGD(model.parameters(), 0.1))
    chosen, trained = [], []
    for _ in range(EPOCHS):
        trained.append([])
        for rows in loader:
            u, v = ready(views(rows)).chunk(2)
            accelerator.backward(nt_xent(u, v))
            optimizer.step()
            optimizer.zero_grad()
            if way == "update":
                sampler.update(rows, u, v)
            trained[-1].append(rows.tolist())
        chosen.append([batches for *_, batches in sampler.given])
    return chosen, trained


def work(folder: str) -> None:
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(accelerator.process_index)  # views are drawn at random: no two processes embed alike
    found = {way: train(accelerator, way) for way in ("embed", "update")}
    torch.save((accelerator.num_processes, found), f"{folder}/{accelerator.process_index}.pt")
    accelerator.end_training()


def test_two_processes_choose_the_same_batches_and_train_on_each_sample_once(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, __file__, tmp_path], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    (count, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert count == 2
    for way, (chosen, trained) in first.items():
        chosen_there, trained_there = second[way]
        assert chosen == chosen_there
        for a, b in zip(trained, trained_there):
            assert len(a) == len(b) == N // B // 2 and sorted(sum(a + b, [])) == list(range(N))
        last = batch_losses(X, X, torch.tensor(trained[-1] + trained_there[-1])).mean()
        assert last > batch_losses(X, X, random_batches(N, B)).mean() + 0.5


@pytest.mark.parametrize("stop", [10, 32, 45])  # an epoch has 32 batches
def test_a_resumed_loop_goes_on_with_the_batches_that_would_have_come(stop):
    from accelerate import Accelerator

    def make():
        sampler = ContrastiveBatchSampler(N, B, k=8)
        return sampler, Accelerator(cpu=True).prepare(DataLoader(torch.arange(N), batch_sampler=sampler))

    def train(sampler, loader, count):
        trained = []
        while len(trained) < count:
            for rows in loader:
                sampler.update(rows, X[rows], X[rows] + 0.1)
                trained.append(rows.tolist())
                if len(trained) == count:
                    break
        return trained
    whole = train(*make(), 96)
    first, loader = make()
    assert train(first, loader, stop) == whole[:stop]
    sampler, loader = make()
    sampler.load_state_dict(first.state_dict(behind=1 if stop % 32 else 0))  # a batch is fetched ahead
    loader.iteration = sampler.epoch  # accelerate calls set_epoch with it
    assert train(sampler, loader, 96 - stop) == whole[stop:]


if __name__ == "__main__":
    work(sys.argv[1])
