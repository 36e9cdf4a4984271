"""Training by several processes, with gloo on the CPU.  Run: python -m pytest tests/test_processes.py"""
import os
import signal
import socket
import sys
import time

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import data
import train
from augment import augment
from lars import LARS
from model import ContrastiveModel, SogCLRLoss, nt_xent
from test_train import PROCESSES, checkpoint, child, equal, finish, refusal, start, text, wait_for


pytestmark = pytest.mark.usefixtures("one_thread")  # as the children: rounding is the same


def few(leaves, out, *flags):
    """Command line of a run of 2 epochs of 3 steps of two batches."""
    return ["--data-dir", leaves, "--out-dir", str(out), "--limit", "24", "--batch-size", "4",
            "--epochs", "2", "--warmup-epochs", "0", "--log-every", "2", *flags]


def one_of_two(rank, port, record):
    """Makes the process one of two, as torchrun does, and notes what its steps are given."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                   "MASTER_PORT": str(port)}
    steps, step, write = [], train.Step.__call__, data.write_cache

    def noting(self, *given):
        step(self, *given)
        steps.append(given)
        torch.save(steps, f"{record}{rank}.pt")

    def writing(stem, *what):
        print(f"process {rank} makes the cache")
        write(stem, *what)
    if record:
        train.Step.__call__, data.write_cache = noting, writing


def start_two(argv, output, record=""):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    return [start(argv, output, one_of_two, rank, port, record) for rank in range(2)]


@pytest.mark.parametrize("sampler, objective", [
    ("random", "simclr"), ("spectral --k 3 --embeddings free", "sogclr"), ("spectral --k 3", "simclr"),
    ("osgd --k 6 --q 2", "sogclr")])
def test_two_processes_equal_one_that_adds_the_gradients(sampler, objective, leaves, tmp_path):
    words = "--sampler", *sampler.split(), "--objective", objective
    folder = str(tmp_path / "data") if sampler == "random" else leaves
    argv, out = few(folder, tmp_path / "run", *words), tmp_path / "out.txt"
    assert [finish(p) for p in start_two(argv, out, tmp_path / "rank")] == [0, 0], text(out)
    assert "on cpu, 2 processes, peak learning rate 0.424; " in text(out)
    assert "process 1 makes the cache" not in text(out)
    assert sampler != "random" or text(out).count("process 0 makes the cache") == 2  # of both splits
    both = list(zip(*(torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))))
    saved, knobs = checkpoint(tmp_path / "run"), train.settle(argv)
    assert len(both) == 6

    images, _, _ = train.load_images(knobs, torch.device("cpu"), 2)
    torch.manual_seed(0)
    model, sogclr = ContrastiveModel(views=2), SogCLRLoss(24)
    model.to(memory_format=torch.channels_last)
    optimizer, uv, losses = LARS(model.parameters(), lr=0), torch.zeros(24, 2, 128), []
    for batches in both:
        assert len({*torch.cat([rows for rows, _, _ in batches]).tolist()}) == 8  # no image twice in a step
        for rows, uniform, lr in batches:
            views = augment(images[rows].repeat(2, 1, 1, 1), 32, uniform, (0.5, 1.0), 0.5)
            z1, z2 = model(views.contiguous(memory_format=torch.channels_last)).chunk(2)
            losses.append(nt_xent(z1, z2) if objective == "simclr" else sogclr(z1, z2, rows))
            losses[-1].div(2).backward()
            uv[rows] = torch.stack([z1, z2], 1).detach()
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    assert both[0][0][2] == pytest.approx(0.15 * 8 ** 0.5)  # of the batches of a step together
    for name, weight in model.named_parameters():
        torch.testing.assert_close(saved["model"][name], weight.detach(), rtol=1e-5, atol=1e-5)
    logged = [line["loss"] for line in saved["journal"]["log"]]
    assert logged == pytest.approx(torch.stack(losses).view(2, 6).mean(1).tolist(), abs=1e-4)
    if objective == "sogclr":
        torch.testing.assert_close(saved["sogclr"]["log_u"], sogclr.log_u, rtol=1e-4, atol=1e-4)
    if "free" in sampler:
        assert saved["sampler"]["seen"].all()
        torch.testing.assert_close(saved["sampler"]["uv"], uv, rtol=1e-3, atol=1e-3)
    if "osgd" not in sampler:  # an epoch is a partition
        epochs = [torch.cat([rows for batches in both[i:i + 3] for rows, _, _ in batches]) for i in (0, 3)]
        assert all(torch.equal(epoch.sort().values, torch.arange(24)) for epoch in epochs)


def test_killed_and_resumed_two_processes_are_the_same_bit_for_bit(leaves, tmp_path, capsys):
    flags, out = ("--sampler", "spectral", "--k", "3", "--objective", "sogclr"), tmp_path / "out.txt"
    whole = start_two(few(leaves, tmp_path / "whole", *flags), out)
    argv = few(leaves, tmp_path / "parts", *flags, "--checkpoint-minutes", "0")
    parts = start_two(argv, out)
    wait_for((tmp_path / "parts" / "checkpoint.pt").exists, parts[0])
    for process in parts:
        process.kill()
    assert [finish(p) for p in parts] == [-signal.SIGKILL] * 2
    assert checkpoint(tmp_path / "parts")["journal"]["step"] < 6
    assert "processes: 2 there, 1 now" in refusal(capsys, *argv, "--resume")
    assert [finish(p) for p in (*whole, *start_two(argv + ["--resume"], out))] == [0] * 4, text(out)
    assert equal(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))


# ------------------------------------------------------------------------------------------------ torchrun
def work(argv, folder):
    """What torchrun starts; it leaves its id, and whether it saw the checkpoint when it left."""
    rank, write = os.environ["RANK"], train.write_checkpoint

    def slowly(*arguments):  # as to a slow disk
        time.sleep(0.5)
        write(*arguments)
    train.write_checkpoint = slowly
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    try:
        child(argv, folder / "out.txt")
    finally:
        (folder / f"left{rank}").write_text(str((folder / "run" / "checkpoint.pt").exists()))


def agent(argv, folder):
    """torchrun --nproc_per_node 2, whose processes are forked."""
    sys.stdout = sys.stderr = open(folder / "out.txt", "a")
    config = LaunchConfig(1, 1, 2, run_id=str(os.getpid()), rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          start_method="fork", max_restarts=0, monitor_interval=0.1)
    elastic_launch(config, work)(argv, folder)


def torchrun(argv, folder):
    process = PROCESSES.Process(target=agent, args=(argv, folder))
    process.start()
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_of_torchrun_saves(number, leaves, tmp_path):
    fresh = "--k", "3", "--embeddings", "fresh"
    argv = few(leaves, tmp_path / "run", *fresh, "--limit", "2048")  # 256 steps an epoch
    process = torchrun(argv, tmp_path)
    wait_for(lambda: "loss" in text(tmp_path / "out.txt"), process)
    if number == signal.SIGINT:  # a terminal sends it to all, and torchrun once more
        for rank in range(2):
            os.kill(int(text(tmp_path / f"pid{rank}")), number)
        time.sleep(0.3)
    os.kill(process.pid, number)
    finish(process)
    assert [text(tmp_path / f"left{rank}") for rank in range(2)] == ["True", "True"]
    said, step = text(tmp_path / "out.txt"), checkpoint(tmp_path / "run")["journal"]["step"]
    assert said.count(f"saved at step {step}; go on with: torchrun --nproc_per_node 2 ") == 1
    assert "Error" not in said.split("saved at")[0]


def test_several_machines_are_told_of_all(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "torchrun --nproc_per_node 2" in str(train.interrupted(7, signal.SIGTERM, 0, 2))
    assert "on each machine" in str(train.interrupted(7, signal.SIGTERM, 0, 4))


def test_a_process_that_dies_takes_the_others_down(leaves, tmp_path):
    process = torchrun(few(leaves, tmp_path / "run", "--sampler", "random", "--epochs", "9000"), tmp_path)
    wait_for(lambda: "loss" in text(tmp_path / "out.txt"), process)
    began, pids = time.time(), [int(text(tmp_path / f"pid{rank}")) for rank in range(2)]
    os.kill(pids[1], signal.SIGKILL)
    assert finish(process) == 1 and time.time() - began < 60
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    said = text(tmp_path / "out.txt")  # by torchrun, or by the survivor if that was faster
    assert any(reason in said for reason in ("SIGKILL", "exitcode: -9", "by peer", "Broken pipe")), said


def test_torchruns_processes_refuse_in_one_line(leaves, tmp_path):
    argv = few(leaves, tmp_path / "run", "--sampler", "random", "--batch-size", "16")
    finish(torchrun(argv, tmp_path))
    line = "--batch-size 16 in each of 2 processes is more than the 24 training images"
    assert text(tmp_path / "out.txt").count(line) == 1 and not (tmp_path / "run").exists()
    argv += ["--dataset", "folder", "--data-dir", str(tmp_path / "absent")]  # of which the first is to read
    assert [finish(p) for p in start_two(argv, tmp_path / "two.txt")] == [2, 2]  # none by a lost connection
    lines = text(tmp_path / "two.txt").splitlines()
    assert len(lines) == 2 and all("absent" in line for line in lines)  # torchrun ends the other one sooner
