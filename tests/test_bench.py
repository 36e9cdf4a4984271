"""Tests of bench.py: its tables at small sizes, and wrong input in one line.

    python -m pytest tests/test_bench.py
"""
import json

import numpy as np
import pytest
import torch

import bench
import train
from cli import Stop
from deadleaves import deadleaves
from model import ContrastiveModel
from test_samplers import clustered


def test_samplers_table_has_all_that_is_asked(tmp_path, capsys):
    u, v, labels = clustered(8, 32, 0.8)
    other = bench.read_samplers(bench.samplers.__file__)
    sets = {"a": (u, v, labels), "b": (u[:128], v[:128], None)}
    bench.bench_samplers("made up", sets, [128], size=8, k=8, file_order=True, other=other, rounds=1,
                         out=tmp_path / "samplers.json")
    record, printed = json.loads((tmp_path / "samplers.json").read_text()), capsys.readouterr().out
    rows = {(row["embeddings"], row["sampler"]): row for row in record["samplers"]}
    random, refined = rows["a", "random"], rows["a", "refined"]
    assert rows["a", "refined, exclude=labels"]["same_class"] < random["same_class"] < refined["same_class"]
    assert refined["loss"] > rows["a", "released spectral"]["loss"] > random["loss"]
    assert random["excess"] == 0 and rows["a", "released spectral"]["relative"] == 1
    assert rows["b", "in file order"]["over_file_order"] == 0 and rows["b", "refined"]["same_class"] is None
    assert ("b", "refined, exclude=labels") not in rows
    assert record["growth"][0]["pairs"] == 128 and {"commit", "command", "device"} <= record.keys()
    assert all({"loss", "excess", "relative", "ms", "of_eigh", "MB"} <= row.keys() for row in rows.values())
    assert rows["a", "refined, against"]["loss"] == refined["loss"]  # the same file
    assert "refined: 1.000 of the excess of refined, against at " in printed
    assert all(sampler in printed for _, sampler in rows)


class SmallStep:
    """What bench.py asks of train.py's step, of three operations."""
    def __init__(self, knobs: dict, images: torch.Tensor, device: torch.device):
        self.knobs, self.images, self.x = knobs, images, torch.zeros(2)
        self.model = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.place = torch.zeros(1)
        made.append(self)

    def __call__(self, rows: torch.Tensor, uniform: torch.Tensor, lr: float) -> None:
        self.given = rows, uniform
        for _ in range(3):
            self.x.add_(1)


made = []


def test_step_says_time_and_arithmetic(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "Step", SmallStep)
    def seconds(*functions, **options) -> list[float]:
        return [made[-1].knobs["batch_size"] / 64] * len(functions)
    monkeypatch.setattr(bench, "seconds", seconds)
    bench.main(["step", "--image-size", "32", "64", "--out", str(tmp_path / "new/step.json")])
    record, printed = json.loads((tmp_path / "new/step.json").read_text()), capsys.readouterr().out
    shapes = [(row["pixels"], row["B"]) for row in record["steps"]]
    assert shapes == [(32, 32), (32, 128), (64, 32), (64, 128)]
    for row, small in zip(record["steps"], made):
        B, (rows, uniform) = row["B"], small.given
        assert small.knobs["image_size"] == row["pixels"] and small.knobs["step"] == "eager"
        assert rows.unique().numel() == B and rows.max() < len(small.images)
        assert uniform.shape == (2 * B, bench.NUM_UNIFORM) and 0 <= uniform.min() <= uniform.max() < 1
        assert row["ms"] == 1000 * B / 64 and row["images/s"] == 64 and row["operations"] == 4
        forward = 2 * B * row["pixels"]**2 * 4 * 2 * 3 * 9  # backward: the kernel's gradient, as much
        assert row["TFLOP/s"] == pytest.approx(2 * forward / (B / 64) / 1e12)
        assert row["product_TFLOP/s"] == pytest.approx(2 * 2048**3 / (B / 64) / 1e12)
        assert row["of_product"] == pytest.approx(forward / 2048**3)
    assert record["paper_hours"]["eager"] == {"own size": pytest.approx((937_200 + 1_875_000) * 0.5 / 3600)}
    assert "own size" in printed and "images/s" in printed and {"commit", "device"} <= record.keys()


def test_hours_of_the_twelve_runs():
    # Six times 100 epochs of 1,562 and of 3,125 steps.
    hours = bench.paper_hours({32: 1.0, 64: 2.0, 224: 10.0})  # ms
    assert hours["224 px"] == pytest.approx(600 * 4687 * 10 / 3.6e6)
    assert hours["own size"] == pytest.approx(600 * (1562 + 3125 * 2) / 3.6e6)
    assert bench.paper_hours({32: 1.0}) == {} and list(bench.paper_hours({64: 2.0, 224: 10.0})) == ["224 px"]


def test_functions_take_turns():
    order = []
    took = bench.seconds(lambda: order.append("a"), lambda: order.append("b"), rounds=2, calls=2)
    assert order == ["a", "a", "b", "b"] * 3 and len(took) == 2 and min(took) > 0


def test_peak_is_what_was_added():
    result, MB = bench.peak(lambda: torch.ones(2**24).sum().item())
    assert result == 2**24 and (MB is None or 60 < MB < 100)


def test_same_class():
    assert bench.same_class(torch.tensor([[1, 1, 2], [3, 3, 3]])) == pytest.approx((1 / 3 + 1) / 2)


def test_embeddings_of_a_run_are_of_its_network_and_images(tmp_path):
    knobs = {"dataset": "deadleaves", "data_dir": str(tmp_path), "sampler": "random", "objective": "simclr",
             "seed": 0, "limit": 48, "batch_size": 8, "source_size": None, "image_size": 16,
             "crop_scale": 1.0, "jitter": 0.0, "skip_broken": False, "small_stem": False}
    model = ContrastiveModel()
    last = {"epoch": 1, "step": 6, "loss": 1, "R1": 0.1, "seconds_training": 1, "seconds_selecting": 0}
    torch.save({"settings": knobs, "model": model.state_dict()}, tmp_path / "checkpoint.pt")
    for name, content in ("config.json", {"knobs": knobs}), ("result.json", last), ("log.jsonl", last):
        (tmp_path / name).write_text(json.dumps(content))
    u, v, labels = bench.embed_run(str(tmp_path), None, 48)
    images, expected = deadleaves("train", 48, 0)
    assert u.shape == v.shape == (48, 128) and torch.equal(labels.sort()[0], expected.sort()[0])
    assert not torch.equal(labels, expected)  # in a random order
    u, v = (torch.nn.functional.normalize(x, dim=1) for x in (u, v))
    own, other = (u * v).sum(1).mean(), (u * v.roll(1, 0)).sum(1).mean()
    assert own > other + 0.05  # the two views are of one image


def refused(argv: list[str], *words: str) -> None:
    with pytest.raises(Stop) as stop:
        bench.main(argv)
    message = str(stop.value)
    assert stop.value.code == 2 and "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("arrays, words", [
    (None, ["cannot be read", "NAME_u"]), ({}, ["it has none"]), ({"x": np.ones((3, 2))}, ["(x)", "NAME_u"]),
    ({"a_u": np.ones((3, 2))}, ["a_u is without a_v"]),
    ({"u": np.full(3, None)}, ["cannot be read (ValueError)"]),  # a pickle, which could run anything
    ({"u": np.ones((3, 2)), "v": np.ones((4, 2))}, ["u is (3, 2)", "v is (4, 2)"]),
    ({"u": np.ones((3, 2)), "v": np.ones((3, 2)), "labels": np.ones(2)}, ["labels is (2,)"]),
    ({"u": np.ones((3, 2)), "v": np.ones((3, 2))}, ["3 pairs", "1,280"])])
def test_bad_embeddings_are_one_line(arrays, words, tmp_path):
    path = tmp_path / "e.npz"
    np.savez(path, **arrays) if arrays is not None else path.write_bytes(b"")
    refused(["samplers", "--embeddings", str(path)], *words)


@pytest.mark.parametrize("argv, words", [
    (["samplers", "--pairs", "1000"], ["--pairs 1000", "1280"]),
    (["samplers", "--run", "nowhere"], ["nowhere", "result.json"]),
    (["samplers", "--embeddings", "nowhere.npz"], ["nowhere.npz", "FileNotFoundError"]),
    (["samplers", "--against", "nowhere.py"], ["--against nowhere.py", "give a samplers.py"]),
    (["samplers", "--against", bench.data.__file__], ["it has no spectral_batches"]),
    (["samplers", "--run", "a", "--embeddings", "b"], ["not allowed with", "--help"]),
    (["samplers", "--out", "/proc/nowhere/x.json"], ["/proc/nowhere"]),
    (["step", "--image-size", "4"], ["--image-size 4", ">= 8"]), (["speed"], ["speed", "samplers"])])
def test_bad_input_is_one_line(argv, words):
    refused(argv, *words)
