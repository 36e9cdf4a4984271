"""Tests of losses, optimiser, training.  Run: pytest test_train.py

reference.npz holds inputs and expected values, computed independently in float64; its keys' prefixes name them.
"""
import copy
import fcntl
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.models import resnet18

import data
import train
from augment import augment
from lars import LARS, warmup_cosine
from model import ContrastiveModel, SmallMapConv2d, SogCLRLoss, embed, hcl, infonce, nt_xent
from samplers import all_batches

HERE = Path(__file__).parents[1]
REFERENCE = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(HERE / "tests" / "reference.npz").items()}
close = dict(rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- losses
def test_nt_xent_reference_and_closed_forms():
    torch.testing.assert_close(nt_xent(REFERENCE["ntxent_z1"], REFERENCE["ntxent_z2"], 0.1), REFERENCE["ntxent_loss"], **close)
    same = torch.ones(5, 3)
    assert nt_xent(same, same).item() == pytest.approx(math.log(9))  # nine equal logits
    axes = torch.eye(4, dtype=torch.float64)  # one logit 1/t against six of 0
    assert nt_xent(7 * axes, axes, 0.5).item() == pytest.approx(math.log(1 + 6 * math.exp(-2)))


def test_infonce_reference_and_closed_forms():
    u, v = REFERENCE["infonce_u"], REFERENCE["infonce_v"]
    torch.testing.assert_close(infonce(u, v), REFERENCE["infonce_full"], **close)
    for size in 2, 3:
        batches = all_batches(len(u), size)
        torch.testing.assert_close(infonce(u[batches], v[batches]).mean(), REFERENCE[f"infonce_ncb{size}"], **close)
    n = 6  # at the simplex ETF
    etf = torch.linalg.cholesky(torch.eye(n, dtype=torch.float64) * (n / (n - 1) + 1e-12) - 1 / (n - 1))
    assert infonce(etf, etf).item() == pytest.approx(2 * math.log(1 + (n - 1) * math.exp(-n / (n - 1))), abs=1e-6)


def test_sogclr_reference():
    loss = SogCLRLoss(24, temperature=0.1, gamma=0.9).double()
    for z, index, expected, gradient, u in zip(*(REFERENCE[f"sogclr_{x}"] for x in ("z", "index", "loss", "grad", "u"))):
        z = z.clone().requires_grad_()
        value = loss(z[0], z[1], index)
        value.backward()
        torch.testing.assert_close(value.detach(), expected, **close)
        torch.testing.assert_close(z.grad, gradient, **close)
        torch.testing.assert_close(loss.u, u, rtol=1e-9, atol=1e-6)
    assert "u" in loss.state_dict()


def test_sogclr_first_visit_is_per_sample():
    """A batch half new and half seen must treat each sample by its own history."""
    torch.manual_seed(0)
    loss = SogCLRLoss(6, gamma=0.5).double()
    z = torch.randn(2, 4, 8, dtype=torch.float64)
    loss(z[0], z[1], torch.tensor([0, 1, 2, 3]))
    before, fresh = loss.u.clone(), SogCLRLoss(6, gamma=0.5).double()
    w = torch.randn(2, 4, 8, dtype=torch.float64)
    loss(w[0], w[1], torch.tensor([2, 3, 4, 5]))
    fresh(w[0], w[1], torch.tensor([2, 3, 4, 5]))
    torch.testing.assert_close(loss.u[:2], before[:2])
    torch.testing.assert_close(loss.u[2:4], (before[2:4] + fresh.u[2:4]) / 2)
    torch.testing.assert_close(loss.u[4:], fresh.u[4:])


def test_hcl_reference_and_limits():
    z1, z2 = REFERENCE["hcl_z1"], REFERENCE["hcl_z2"]
    torch.testing.assert_close(hcl(z1, z2, 0.1, 0.1, 1.0), REFERENCE["hcl_loss"], **close)
    torch.testing.assert_close(hcl(z1, z2, 0.1, 0.0, 0.0), nt_xent(z1, z2, 0.1))  # no weights, no debiasing
    axes = torch.eye(3, dtype=torch.float64)  # (4 - 0.5*4*e) / 0.5 < 0, so the floor 4/e holds
    assert hcl(axes, axes, 1.0, 0.5, 1.0).item() == pytest.approx(math.log1p(4 * math.exp(-1) / math.e))


@pytest.mark.parametrize("loss", [nt_xent, hcl, lambda a, b: SogCLRLoss(9)(a, b, torch.arange(len(a)))])
def test_losses_refuse_wrong_shapes(loss):
    for a, b in [(torch.ones(3, 2), torch.ones(4, 2)), (torch.ones(1, 2), torch.ones(1, 2)), (torch.ones(3), torch.ones(3))]:
        with pytest.raises(ValueError, match="B, D"):
            loss(a, b)
    with pytest.raises(ValueError, match="tau_plus is 1"):
        hcl(torch.ones(3, 2), torch.ones(3, 2), tau_plus=1)


# ------------------------------------------------------------------------------------------------- network
def test_network():
    model = ContrastiveModel()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 128)
    assert model.encoder(torch.randn(2, 3, 32, 32)).shape == (2, 512)
    assert all(block.bn2.weight.abs().max() == 0 for layer in (model.encoder.layer1, model.encoder.layer4) for block in layer)
    assert [tuple(p.shape) for p in model.head.parameters()] == [(2048, 512), (2048,), (2048,), (128, 2048)]
    small = ContrastiveModel(small_stem=True).encoder
    assert small.layer1(small.maxpool(small.relu(small.bn1(small.conv1(torch.randn(1, 3, 32, 32)))))).shape == (1, 64, 32, 32)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side, words", [
    *((side, {"stride": stride}) for side in ((1, 1), (2, 2), (1, 2), (2, 1)) for stride in (1, 2)), ((3, 2), {"stride": 2}), ((5, 5), {}),
    ((2, 2), {"stride": (2, 1)}), ((2, 2), {"bias": True}), ((2, 2), {"padding": 2}), ((2, 2), {"padding": 2, "dilation": 2}),
    ((2, 2), {"groups": 2}), ((1, 1), {"kernel_size": 1, "padding": 0}), ((2, 2), {"padding_mode": "replicate"})])
def test_convolution_of_small_maps_is_the_convolution(side, words, layout):
    torch.manual_seed(0)
    words = {"kernel_size": 3, "padding": 1, "bias": False} | words
    plain, quick = (kind(6, 4, **words).to(torch.float64, memory_format=layout) for kind in (torch.nn.Conv2d, SmallMapConv2d))
    quick.load_state_dict(plain.state_dict())
    x, y = (torch.randn(4, 6, *side, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y.data = x.data.clone()
    a, b = plain(x), quick(y)
    torch.testing.assert_close(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(plain.weight.grad, quick.weight.grad)


def test_network_is_torchvisions():
    torch.manual_seed(0)
    model, plain = ContrastiveModel().encoder.eval(), resnet18(weights=None)
    assert sum(isinstance(m, SmallMapConv2d) for m in model.modules()) == 8
    for name, weight in model.named_parameters():
        if name.endswith("bn2.weight"):  # zero, so that the blocks would do nothing
            torch.nn.init.uniform_(weight, 0.5, 1)
    plain.fc = torch.nn.Identity()
    plain.load_state_dict(model.state_dict())
    for side in 32, 64, 80:
        images = torch.randn(2, 3, side, side)
        torch.testing.assert_close(model(images), plain.eval()(images), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------- optimiser
def test_lars_reference():
    params = [torch.nn.Parameter(REFERENCE[f"lars_p{i}"].clone()) for i in range(3)]
    optimizer = LARS(params, lr=0.3, momentum=0.9, weight_decay=0.01)
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = REFERENCE[f"lars_g{i}"][step].clone()
        optimizer.step()
    for i, p in enumerate(params):
        torch.testing.assert_close(p.data, REFERENCE[f"lars_out{i}"], **close)


def test_lars_without_gradients_zero_norms_and_state():
    torch.manual_seed(0)
    zero, unused, bias = (torch.nn.Parameter(x) for x in (torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2)))
    optimizer = LARS([{"params": [bias, zero]}, {"params": [unused], "lr": 7.0}], lr=0.5)
    zero.grad, bias.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step()
    assert (zero == -0.5).all() and (bias == -0.5).all() and (unused == 1).all()  # |w| = 0: scale 1
    copies = [torch.nn.Parameter(p.detach().clone()) for p in (bias, zero, unused)]
    twin = LARS([{"params": copies[:2]}, {"params": copies[2:], "lr": 7.0}], lr=0.5)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, (b, z) in ((optimizer, (bias, zero)), (twin, copies[:2])):
        z.grad, b.grad = torch.full((2, 2), 3.0), torch.zeros(2)
        o.step()
    torch.testing.assert_close(copies[1], zero, rtol=0, atol=0)
    torch.testing.assert_close(bias.data, torch.full((2,), -0.95))  # momentum alone
    with pytest.raises(ValueError, match="momentum is -1"):
        LARS([zero], lr=1, momentum=-1)


def test_schedule_reference():
    peak = 0.075 * math.sqrt(32)
    for epoch, value in zip(REFERENCE["lr_epoch"].tolist(), REFERENCE["lr_value"].tolist()):
        assert warmup_cosine(epoch, 100, 10, peak) == pytest.approx(value, abs=1e-9)
    assert warmup_cosine(0, 10, 0, 1.0) == 1 and warmup_cosine(10, 10, 0, 1.0) == pytest.approx(0)


# ------------------------------------------------------------------------------------------------- devices
def test_cuda_without_cuda():
    """Fake CUDA tensors raise where devices mix or a value is read back, so neither happens in a step."""
    with FakeTensorMode():
        images = torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8, device="cuda")
        views = [augment(images, 32, torch.Generator(), (0.2, 1.0), 0.5) for _ in range(2)]
        assert views[0].device.type == "cuda" and views[0].shape == (8, 3, 32, 32)
        with torch.device("cuda"):
            model, sogclr, index = ContrastiveModel(), SogCLRLoss(100), torch.arange(8)
        z1, z2 = model(torch.cat(views)).chunk(2)
        for loss in (nt_xent(z1, z2), hcl(z1, z2), sogclr(z1, z2, index)):
            assert loss.device.type == "cuda" and loss.shape == ()
        with pytest.raises(RuntimeError):
            nt_xent(z1, z2.cpu())
        with pytest.raises(DataDependentOutputException):
            bool(z1.sum() > 0)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer = LARS(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.step()


# ------------------------------------------------------------------------------------------------- training
@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    """Data folder with the embedded data's cache."""
    folder = str(tmp_path_factory.mktemp("data"))
    for split, number in (("train", 40), ("train", 2048), ("val", 64), ("val", 1000)):
        data.load("deadleaves", split, folder, num_images=number)
    return folder


def quick(leaves, out, *flags):
    """Command line of a run of 4 epochs of 5 steps, saved every quarter of a second besides."""
    return ["--data-dir", leaves, "--out-dir", str(out), "--limit", "40", "--batch-size", "8", "--epochs", "4",
            "--warmup-epochs", "1", "--log-every", "2", "--checkpoint-minutes", "0.004", *flags]


SELDOM = "--checkpoint-minutes", "10"  # for runs that are not killed: writing 90 MB takes longer than a step

# A server that has imported all once and forks a child for each run: a child starts in milliseconds.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train", "torch.utils.tensorboard", "test_train"])


def child(argv, output, file_size=None):
    torch.set_num_threads(1)
    train.VALIDATION_IMAGES = 64  # most of these runs' time otherwise
    os.fsync = lambda _: None  # a killed process loses nothing that it wrote, and disks take most of the time
    sys.stdout = sys.stderr = open(output, "a")
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.exit(train.main(argv))


def start(argv, output, **limits):
    process = PROCESSES.Process(target=child, args=(argv, output), kwargs=limits)
    process.start()
    return process


def finish(process):
    process.join(120)
    return process.exitcode


def equal(a, b):
    """Whether two checkpoints hold the same bits, times aside."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if not str(k).startswith("seconds"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


SAMPLERS = {"random": [], "osgd": ["--k", "5", "--q", "3"], "spectral": ["--k", "4"],
            "refined": ["--k", "4"], "refined --embeddings fresh": ["--k", "4"],
            "osgd-replacement": ["--k", "5", "--q", "3", "--lowest", "--select-after", "1"]}


@pytest.mark.parametrize("sampler, objective", [
    ("random", "sogclr"), ("osgd", "simclr"), ("spectral", "sogclr"), ("refined", "simclr"), ("refined --embeddings fresh", "simclr")])
def test_killed_and_resumed_run_is_the_same_bit_for_bit(sampler, objective, leaves, tmp_path):
    flags = ["--sampler", *sampler.split(), "--objective", objective, *SAMPLERS[sampler]]
    whole = start(quick(leaves, tmp_path / "whole", *flags, *SELDOM), tmp_path / "whole.txt")
    dice, killed, moments = random.Random(f"{sampler} {objective}"), 0, 3
    argv = quick(leaves, tmp_path / "parts", *flags)
    checkpoint = tmp_path / "parts" / "checkpoint.pt"
    for attempt in range(moments + 1):
        process = start(argv + ["--resume"] * (attempt > 0), tmp_path / "parts.txt")
        if attempt < moments:
            seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
            while process.is_alive() and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > seen):
                time.sleep(0.005)
            time.sleep(dice.uniform(0, 0.2))
            process.kill()
            killed += finish(process) == -signal.SIGKILL
        else:
            assert finish(process) == 0, (tmp_path / "parts.txt").read_text()
    assert finish(whole) == 0 and killed >= 2  # the last one may come too late
    a, b = (torch.load(tmp_path / x / "checkpoint.pt", weights_only=True) for x in ("whole", "parts"))
    assert a["state"]["step"] == 20 and equal(a, b)
    assert not list((tmp_path / "parts").glob("*.tmp"))
    logs = [[{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in
             (tmp_path / x / "log.jsonl").read_text().splitlines()] for x in ("whole", "parts")]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [5, 10, 15, 20]
    unselected = {"random": 4, "refined": 1}.get(sampler, 0)  # epochs; free embeddings are there from the second on
    assert [line["chosen_loss"] is None for line in logs[0]] == [True] * unselected + [False] * (4 - unselected)
    if objective == "sogclr":
        assert a["sogclr"]["u"].shape == (40,) and (a["sogclr"]["u"] > 0).any()


def test_osgd_consumes_a_permutation_k_batches_at_a_time():
    g, n, calls, order = torch.Generator().manual_seed(0), 47, [], torch.empty(0, dtype=torch.int64)
    u, e = torch.randn(2, n, 16, generator=g)
    knobs = dict(sampler="osgd", batch_size=4, k=5, q=2, temperature=0.1, select_after=1, lowest=False, embeddings="fresh")

    def embed(index):
        calls.append(set(index.tolist()))
        return u[index], (u + 0.5 * e)[index]
    seen = torch.zeros(n, dtype=torch.bool)
    assert train.select(knobs, n, 0, order, seen, embed, g)[2] is None and not calls  # --select-after
    for left in (27, 7, 27, 7):
        batches, order, scores = train.select(knobs, n, 1, order, seen, embed, g)
        assert len(order) == left and batches.shape == (2, 4) and set(batches.flatten().tolist()) <= calls[-1]
        assert scores["chosen"].min() >= scores["random"].sort().values[-2] - 1e-6
    assert not calls[0] & calls[1] and not calls[2] & calls[3] and calls[0] != calls[2]
    lowest = train.select(knobs | {"lowest": True}, n, 1, order, seen, embed, g)[2]
    assert lowest["chosen"].max() <= lowest["random"].sort().values[1] + 1e-6


@pytest.mark.parametrize("sampler", ["spectral", "refined"])
def test_partition_trains_on_every_image_of_a_window_once(sampler):
    g, n = torch.Generator().manual_seed(0), 47
    u, e = torch.randn(2, n, 16, generator=g)
    knobs = dict(sampler=sampler, batch_size=4, k=5, q=5, temperature=0.1, select_after=0, lowest=False, embeddings="free")
    order, seen, asked = torch.empty(0, dtype=torch.int64), torch.arange(n) < 30, []

    def embed(index):
        asked.append(index)
        return u[index], (u + 0.5 * e)[index]
    batches, order, scores = train.select(knobs, n, 0, order, seen, embed, g)
    assert scores is None and not asked and set(range(30, 47)) <= set(batches.flatten().tolist())  # those without embeddings first
    seen[batches.flatten()] = True
    batches, order, scores = train.select(knobs, n, 0, order, seen, embed, g)
    assert torch.equal(batches.flatten().sort().values, asked[0].sort().values) and len(order) == 7
    assert scores["chosen"].mean() > scores["random"].mean()


def test_equal_would_notice(leaves, tmp_path):
    runs = [start(quick(leaves, tmp_path / seed, "--sampler", "osgd-replacement", *SAMPLERS["osgd-replacement"],
                        "--seed", seed, "--max-steps", "6"), tmp_path / "out.txt") for seed in "01"]
    assert [finish(run) for run in runs] == [0, 0], (tmp_path / "out.txt").read_text()
    a, b = (torch.load(tmp_path / seed / "checkpoint.pt", weights_only=True) for seed in "01")
    assert not equal(a["model"], b["model"]) and not equal(a["choosing"], b["choosing"])
    assert a["state"]["log"][0]["chosen_loss"] is None  # the first epoch was random
    config = json.loads((tmp_path / "0" / "config.json").read_text())
    assert config["knobs"]["k"] == 5 and config["knobs"]["lowest"] and {"python", "torch", "torchvision"} <= config["versions"].keys()
    assert {"command", "commit", "device", "time"} <= config.keys()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "0"))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "learning_rate", "images_per_second", "validation/R1", "batch_loss_mean/chosen",
            "batch_loss_mean/random"} <= set(tags["scalars"])
    assert {"augmented_pairs", "batches/hardest_left_random_right"} <= set(tags["images"])
    assert {"batch_loss/chosen", "batch_loss/random"} <= set(tags["histograms"])
    # the lowest were taken: below random ones of the same embeddings
    assert events.Scalars("batch_loss_mean/chosen")[0].value < events.Scalars("batch_loss_mean/random")[0].value


@pytest.fixture(scope="module")
def whole(leaves, tmp_path_factory):
    """What a run that was left alone saves at its end."""
    folder = tmp_path_factory.mktemp("whole")
    assert finish(start(quick(leaves, folder / "run", "--k", "4", *SELDOM), folder / "out.txt")) == 0
    return torch.load(folder / "run" / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("moment", ["steps an epoch", "loss"])  # while selecting, and between steps
def test_interrupt_saves_and_resumes(moment, leaves, whole, tmp_path):
    argv = quick(leaves, tmp_path / "run", *SELDOM)
    process = start(argv + ["--k", "4"], tmp_path / "out.txt")
    while moment not in ((tmp_path / "out.txt").read_text() if (tmp_path / "out.txt").exists() else ""):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    assert "--resume" in (tmp_path / "out.txt").read_text().splitlines()[-1]
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["state"]["step"] < 20
    assert finish(start(argv + ["--k", "4", "--resume"], tmp_path / "out.txt")) == 0
    assert equal(whole, torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True))


def refusal(capsys, *argv):
    """The one line that a refused command prints; exit code 2."""
    assert train.main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("train.py: error: ") and err.count("\n") == 1, err
    return err


def test_two_processes_in_one_folder(tmp_path, capsys):
    with open(tmp_path / ".lock", "w") as held:  # as an orphan of a killed script would
        fcntl.flock(held, fcntl.LOCK_EX)
        argv = ["--data-dir", str(tmp_path), "--out-dir", str(tmp_path), "--limit", "64", "--sampler", "random", "--max-steps", "1"]
        assert train.main(argv) == 2
        assert "another process is training in" in capsys.readouterr().err
    assert train.main(argv) == 0


def test_checkpoint_troubles(leaves, tmp_path, capsys):
    run = tmp_path / "run"
    assert finish(start(quick(leaves, run, "--k", "4", "--max-steps", "5"), tmp_path / "out.txt")) == 0
    argv = quick(leaves, run, "--k", "4")
    line = refusal(capsys, *argv)
    assert "--resume" in line and "--out-dir" in line
    line = refusal(capsys, *argv, "--resume", "--temperature", "0.2", "--objective", "sogclr")
    assert "temperature: 0.1 there, 0.2 now" in line and "objective: simclr there, sogclr now" in line and "seed" not in line
    # a full disk: the write fails half-way, the checkpoint of before stands
    before = (run / "checkpoint.pt").read_bytes()
    assert finish(start(argv + ["--resume"], tmp_path / "full.txt", file_size=2 ** 24)) == 2
    last = (tmp_path / "full.txt").read_text().splitlines()[-1]
    assert "cannot write" in last and "checkpoint.pt" in last and "free some space" in last
    assert (run / "checkpoint.pt").read_bytes() == before and not list(run.glob(".*tmp"))
    for damage in (before[:1000], b"", before[:-5000]):
        (run / "checkpoint.pt").write_bytes(damage)
        assert "damaged" in refusal(capsys, *argv, "--resume")
    (run / "checkpoint.pt").unlink()  # what it found must not be overwritten
    (run / "result.json").write_bytes(found := b"{}")
    assert "without its checkpoint" in refusal(capsys, *argv, "--seed", "5")
    assert (run / "result.json").read_bytes() == found


@pytest.mark.parametrize("flags", [["--sampler", "random"], ["--k", "1", "--log-every", "50"]])
def test_divergence_stops(flags, leaves, tmp_path):
    argv = quick(leaves, tmp_path / "run", "--lr", "1e30", "--warmup-epochs", "0", *flags)
    assert finish(start(argv, tmp_path / "out.txt")) == 1
    last = (tmp_path / "out.txt").read_text().splitlines()[-1]
    assert "step" in last and "--lr" in last
    saved = tmp_path / "run" / "checkpoint.pt"
    if saved.exists():  # whatever was saved is from before
        weights = torch.load(saved, weights_only=True)["model"]
        assert all(torch.isfinite(w).all() for w in weights.values())


@pytest.mark.parametrize("argv, words", [
    (["--k", "100000"], ["100000", "at most"]),
    (["--sampler", "osgd", "--q", "9", "--k", "4"], ["--q 9", "--k 4"]),
    (["--batch-size", "1"], ["--batch-size 1", "int >= 2"]),
    (["--batch-size", "100000"], ["100000", "at most"]),
    (["--dataset", "cifar10"], ["cifar10", "did you mean cifar100?"]),
    (["--sampler", "spektral"], ["spektral", "did you mean spectral?"]),
    (["--sample", "osgd"], ["--sample", "did you mean --sampler?"]),
    (["--image-size", "0"], ["--image-size 0", ">= 8"]),
    (["--epochs", "-3"], ["--epochs -3", ">= 1"]),
    (["--epochs", "many"], ["--epochs many", "int"]),
    (["--temperature", "0"], ["--temperature 0", "> 0"]),
    (["--temperature", "nan"], ["--temperature nan"]),
    (["--lowest"], ["--lowest", "spectral"]),
    (["--sampler", "random", "--k", "8"], ["--k", "random"]),
    (["--sampler", "osgd-replacement", "--embeddings", "free"], ["--embeddings", "leave it out"]),
    (["--seed", "9" * 30], ["--seed"]),
    (["--image-size", "1000000"], ["--image-size 1000000", "<= 2048"]),
    (["--device", "meta"], ["meta", "cpu"]),
    (["--sampler", "spectral", "--k", "8", "--q", "2"], ["--q", "leave it out"]),
    (["--warmup-epochs", "30", "--epochs", "20"], ["--warmup-epochs 30", "20"]),
    (["--device", "tpu9"], ["tpu9", "cpu"]),
    (["--resume"], ["no checkpoint"]),
    (["--k"], ["--k", "--help"]),
])
def test_bad_input_is_one_line(argv, words, leaves, tmp_path, capsys):
    line = refusal(capsys, "--data-dir", leaves, "--out-dir", str(tmp_path / "run"), *argv)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_bad_data_is_one_line(tmp_path, capsys):
    def images(folder, count):
        folder.mkdir()
        for i in range(count):
            Image.new("RGB", (40, 40), (i, 0, 0)).save(folder / f"{i}.png")
        return folder
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "note.txt").write_text("no image")
    (images(tmp_path / "broken", 30) / "7.png").write_bytes(b"no image")
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(b"PK" + bytes(1000))
    run = ["--out-dir", str(tmp_path / "run"), "--sampler", "random"]
    for name in "empty", "words", "nowhere":
        assert str(tmp_path / name) in refusal(capsys, *run, "--dataset", "folder", "--data-dir", str(tmp_path / name))
    assert "complete zip" in refusal(capsys, *run, "--dataset", "tinyimagenet", "--data-dir", str(tmp_path))
    broken = [*run, "--dataset", "folder", "--data-dir", str(tmp_path / "broken"), "--image-size", "32", "--batch-size", "8",
              "--max-steps", "1"]
    line = refusal(capsys, *broken)
    assert "7.png" in line and "--skip-broken" in line and not (tmp_path / "run").exists()
    assert train.main([*broken, "--skip-broken"]) == 0
    assert "1 broken" in capsys.readouterr().err


def test_unwritable_out_dir(leaves, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "not a folder" in refusal(capsys, *quick(leaves, tmp_path / "file" / "run", "--k", "4"))


def test_help_names_every_knob(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all("--" + name.replace("_", "-") in text for name in train.KNOBS)


@pytest.mark.parametrize("training", [True, False])
def test_embedding_leaves_no_trace(training):
    torch.manual_seed(0)
    model = ContrastiveModel().train(training)
    model.head[1].eval()  # one module in another mode than the rest
    model(torch.randn(8, 3, 32, 32))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [(m.training, getattr(m, "momentum", None)) for m in model.modules()]
    pictures = torch.randn(6, 3, 32, 32)
    u, v = embed(model, lambda index: pictures[index], torch.arange(6), chunk=4)
    assert u.shape == (6, 128) and not u.requires_grad
    torch.testing.assert_close(u, v)  # the same views both times
    assert modes == [(m.training, getattr(m, "momentum", None)) for m in model.modules()]
    assert all(torch.equal(before[k], value) for k, value in model.state_dict().items())
    torch.testing.assert_close(u, model.eval()(pictures).detach(), rtol=1e-4, atol=1e-4)


def test_embedding_restores_modes_after_an_interrupt():
    model = ContrastiveModel()
    with pytest.raises(KeyboardInterrupt):
        embed(model, lambda index: torch.randn(len(index), 3, 32, 32), torch.arange(6), stop=lambda: True)
    assert all(m.training for m in model.modules())
