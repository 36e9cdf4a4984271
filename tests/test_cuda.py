"""What only a GPU can show: the captured step, selection and evaluation there.  Run: python -m pytest
tests/test_cuda.py

Without a CUDA GPU all of it skips; tests/test_step.py holds on the CPU what can be held there.
"""
import copy
from pathlib import Path

import pytest
import torch

import samplers
import train
from lars import LARS
from model import ContrastiveModel
from retrieval import recalibrate, retrieval_metrics
from rivals import released_spectral

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU on this machine")
FEW = "--limit 256 --epochs 8 --batch-size 16 --k 4 --warmup-epochs 1 --log-every 5".split()


def run(tmp_path: Path, name: str, *words: str) -> dict:
    """The checkpoint of a run on generated images."""
    few = [word for word in FEW if "random" not in words or word not in ("--k", "4")]
    out = tmp_path / name
    train.train(train.settle([*few, *words, "--data-dir", str(tmp_path / "data"), "--out-dir", str(out)]))
    return torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)


def assert_same(a, b, where: str = "checkpoint") -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("seconds_training", "seconds_selecting"):
                assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, where


@pytest.mark.parametrize("words", [
    "--sampler random --objective simclr", "--sampler random --objective sogclr",
    "--sampler refined --objective dcl",
    "--sampler spectral --objective hcl", "--sampler osgd --q 2 --objective sogclr --embeddings free",
    "--sampler spectral --embeddings list"])
def test_a_graph_gives_the_weights_of_eager_steps_also_after_a_resume(tmp_path, words):
    words = words.split()
    eager = run(tmp_path, "eager", *words, "--step", "eager", "--max-steps", "20")
    assert_same(run(tmp_path, "graph", *words, "--step", "graph", "--max-steps", "20"), eager)
    run(tmp_path, "resumed", *words, "--max-steps", "9")
    resumed = run(tmp_path, "resumed", *words, "--max-steps", "20", "--resume")
    for saved in eager, resumed:
        del saved["journal"]["log"]  # the stop wrote a line of its own
    assert_same(resumed, eager)


def test_images_too_many_for_the_device_stay_outside(tmp_path, monkeypatch):
    words = "--sampler", "refined", "--max-steps", "20"
    inside = run(tmp_path, "inside", *words)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    assert_same(run(tmp_path, "outside", *words), inside)


@pytest.mark.parametrize("objective", ["simclr", "sogclr", "hcl", "dcl"])
def test_no_step_waits_for_the_device(objective, tmp_path):
    knobs = train.settle(["--objective", objective, "--sampler", "refined", "--batch-size", "32"])
    device = torch.device("cuda", 0)
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8, device=device)
    sampler = samplers.ContrastiveBatchSampler(64, 32)
    step = train.Step(knobs, images, device, sampler.update)
    for number in range(8):
        rows, uniform = torch.randperm(64)[:32], torch.rand(64, train.NUM_UNIFORM)
        if number > train.WARM:  # before that libraries start up, and the capture itself waits
            torch.cuda.set_sync_debug_mode("error")
        try:
            step(rows, uniform, 0.1)
            if number == train.WARM + 1:
                step.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert step.graph is not None and len(step.read_losses()) == 9


def pairs(n: int = 640, d: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(n // 16, d, generator=generator).repeat(16, 1)
    u, v = (centres + torch.randn(n, d, generator=generator) for _ in range(2))
    return u, v


@pytest.fixture
def exact():
    """Products in float32, whatever a run before this test has set."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def test_the_gpu_chooses_as_the_cpu_does(exact):
    u, v = pairs()
    cuda = u.cuda(), v.cuda()
    generator = torch.Generator()
    batches = samplers.random_batches(640, 32, generator.manual_seed(0))
    for loss in samplers.LOSSES:
        here, there = (samplers.batch_losses(*x, batches, loss=loss) for x in ((u, v), cuda))
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)
    assert torch.equal(samplers.osgd_batches(*cuda, 32, 10, 3).cpu(), samplers.osgd_batches(u, v, 32, 10, 3))
    drawn = [samplers.osgd_batches_with_replacement(*x, 32, 40, 4, generator=generator.manual_seed(0)).cpu()
             for x in ((u, v), cuda)]
    assert torch.equal(*drawn)
    random = samplers.batch_losses(u, v, batches).mean()
    groups = torch.arange(640) // 4
    for options in {}, {"refine": True}, {"refine": True, "exclude": groups}, {
            "refine": True, "relative_margin": 0.1}, "released":
        choose = samplers.spectral_batches
        if options == "released":
            choose, options = released_spectral, {"temperature": 0.1}
        here, there = (choose(*x, 32, 20, generator=generator.manual_seed(0), **options)
                       for x in ((u, v), cuda))
        assert there.is_cuda and torch.equal(there.cpu().flatten().sort().values, torch.arange(640))
        excess = [(samplers.batch_losses(u, v, x.cpu()).mean() - random).item() for x in (here, there)]
        assert excess[1] == pytest.approx(excess[0], rel=0.05)


def test_lars_is_that_of_the_cpu(exact):
    """A tensor as learning rate has operations of its own there."""
    ends = []
    for device, lr in ("cpu", 0.3), ("cuda", torch.tensor(0.3, device="cuda")):
        torch.manual_seed(0)
        model = ContrastiveModel()
        gradients = [torch.randn_like(p) for p in model.parameters()]
        model.to(device)
        optimizer = LARS(model.parameters(), lr, weight_decay=0.01)
        for _ in range(4):
            for p, gradient in zip(model.parameters(), gradients):
                p.grad = gradient.to(device, copy=True)
            optimizer.step()
        ends.append([p.detach().cpu() for p in model.parameters()])
    for here, there in zip(*ends):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-5)


def test_evaluation_is_that_of_the_cpu(exact):
    u, v = pairs()
    for name, value in retrieval_metrics(u.cuda(), v.cuda()).items():
        assert value == pytest.approx(retrieval_metrics(u, v)[name], abs=5e-3), name
    torch.manual_seed(0)
    model = ContrastiveModel()
    twin = copy.deepcopy(model).cuda()
    batches = torch.randn(4, 32, 3, 32, 32)  # of two views of 16 images
    recalibrate(model, batches)
    recalibrate(twin, batches.cuda())
    for (name, here), there in zip(model.named_buffers(), twin.buffers()):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-2, atol=1e-3, msg=name)
