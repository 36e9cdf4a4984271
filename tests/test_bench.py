"""Tests of bench.py, its tables at small sizes, and wrong input in one line:
python -m pytest tests/test_bench.py
"""
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import train
from cli import Stop
from deadleaves import deadleaves
from model import ContrastiveModel
from test_samplers import clustered


def test_samplers_table_has_all_that_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "B", 8)
    monkeypatch.setattr(bench, "K", 8)
    u, v, labels = clustered(8, 32, 0.8)
    np.savez(tmp_path / "e.npz", a_u=u, a_v=v, a_labels=labels, u=u[:128], v=v[:128])
    bench.main(["samplers", "--embeddings", str(tmp_path / "e.npz"), "--against", bench.samplers.__file__,
                "--pairs", "1280", "--out", str(tmp_path / "new/samplers.json")])
    record, printed = json.loads((tmp_path / "new/samplers.json").read_text()), capsys.readouterr().out
    rows = {(row["embeddings"], row["sampler"]): row for row in record["samplers"]}
    random, released, refined = (rows["a", x] for x in ("random", "released spectral", "refined"))
    assert refined["loss"] > released["loss"] > random["loss"]
    assert refined["excess"] == refined["loss"] - random["loss"] and released["relative"] == 1
    assert rows["a", "refined, exclude=labels"]["same_class"] < random["same_class"] < refined["same_class"]
    assert random["same_class"] == pytest.approx(31 / 255, abs=0.01)  # classes of 32 of 256
    assert rows["embeddings", "refined"]["same_class"] is None
    assert ("embeddings", "refined, exclude=labels") not in rows
    assert record["one_window"]["pairs"] == 1280 and record["k"] == record["batch_size"] == 8
    assert {"commit", "command", "device"} <= record.keys() and {"ms", "of_eigh", "MB"} <= random.keys()
    assert rows["a", "refined, against"]["loss"] == refined["loss"]  # the same file
    assert all(sampler in printed for _, sampler in rows)


def test_short_run_gives_views_of_its_images_by_its_network(monkeypatch):
    model = ContrastiveModel()

    def trained(argv: list[str]) -> None:
        knobs = train.settle(argv)
        assert (knobs["sampler"], knobs["limit"], knobs["max_steps"]) == ("random", 48, 128)
        out = Path(knobs["out_dir"])
        out.mkdir()
        torch.save({"model": model.state_dict(), "settings": {}}, out / "checkpoint.pt")
        for name, content in ("config.json", {"knobs": knobs}), ("result.json", {}), ("log.jsonl", {}):
            (out / name).write_text(json.dumps(content))
    monkeypatch.setattr(train, "main", trained)
    u, v, labels = bench.embed_short_run(48, torch.device("cpu"))
    _, expected = deadleaves("train", 48, 0)
    assert u.shape == v.shape == (48, 128) and torch.equal(labels.sort()[0], expected.sort()[0])
    assert not torch.equal(labels, expected)  # in a random order
    model.head[-1].running_mean += 100
    assert bench.embed_short_run(48, torch.device("cpu"))[0].mean() < u.mean() - 1


class SmallStep:
    """What bench.py asks of train.py's step, of three operations."""
    made = []
    def __init__(self, knobs: dict, images: torch.Tensor, device: torch.device):
        self.knobs, self.images, self.x, self.place = knobs, images, torch.zeros(2), torch.zeros(1)
        self.model = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.made.append(self)

    def __call__(self, rows: torch.Tensor, uniform: torch.Tensor, lr: float) -> None:
        self.given = rows, uniform
        self.x.add_(1).add_(1).add_(1)


def test_step_says_time_and_arithmetic(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Step", SmallStep)
    monkeypatch.setattr(
        bench, "seconds", lambda *x, **_: [SmallStep.made[-1].knobs["batch_size"] / 64] * len(x))
    bench.main(["step", "--out", str(tmp_path / "step.json")])
    record = json.loads((tmp_path / "step.json").read_text())
    assert [(x["pixels"], x["B"]) for x in record["steps"]] == [(32, 32), (32, 128), (64, 32), (64, 128)]
    for row, small in zip(record["steps"], SmallStep.made):
        B, (rows, uniform) = row["B"], small.given
        assert small.knobs["image_size"] == row["pixels"] and small.knobs["step"] == "eager"
        assert rows.unique().numel() == B and rows.max() < len(small.images)
        assert uniform.shape == (2 * B, bench.NUM_UNIFORM) and 0 <= uniform.min() <= uniform.max() < 1
        assert row["ms"] == 1000 * B / 64 and row["images/s"] == 64 and row["operations"] == 4
        forward = 2 * B * row["pixels"]**2 * 4 * 2 * 3 * 9  # backward: the kernel's gradient, as much
        assert row["TFLOP/s"] == pytest.approx(2 * forward / (B / 64) / 1e12)
        assert row["product_TFLOP/s"] == pytest.approx(2 * 2048**3 / (B / 64) / 1e12)
        assert row["of_product"] == pytest.approx(forward / 2048**3)
    assert record["paper_hours"]["eager"] == {"own size": pytest.approx(600 * 4687 * 0.5 / 3600)}
    hours = bench.paper_hours({32: 1.0, 64: 2.0, 224: 10.0})  # six times 100 epochs of 1,562 and 3,125 steps
    assert hours == pytest.approx({"224 px": 600 * 46870 / 3.6e6, "own size": 600 * (1562 + 6250) / 3.6e6})


def test_functions_take_turns_and_peak_is_what_was_added():
    order = []
    took = bench.seconds(lambda: order.append("a"), lambda: order.append("b"), rounds=2, calls=2)
    assert order == ["a", "a", "b", "b"] * 3 and len(took) == 2 and min(took) > 0
    MB = bench.peak(lambda: torch.ones(2**24).sum(), torch.device("cpu"))
    assert MB is None or 60 < MB < 100


PAIRS = {"a_u": np.ones((1280, 2)), "a_v": np.ones((1280, 2))}


@pytest.mark.parametrize("arrays, words", [
    (None, ["No data left", "NAME_u"]), ({"x": np.ones(3)}, ["no NAME_u"]), ({"a_u": PAIRS["a_u"]}, ["a_v"]),
    ({"a_u": np.full(3, None)}, ["allow_pickle"]),  # a pickle could run anything
    ({**PAIRS, "a_v": np.ones((1281, 2))}, ["a has 1280", "do not fit"]),
    ({**PAIRS, "a_v": np.ones((1280, 3))}, ["(1280, 3)", "of one shape"]),
    ({**PAIRS, "a_labels": np.ones(2)}, ["do not fit"]),
    ({"a_u": np.ones((3, 2)), "a_v": np.ones((3, 2))}, ["3 pairs", "1280"]),
    ({**PAIRS, "a_u": np.full((1280, 2), np.nan)}, ["1280 rows with NaN"])])
def test_bad_embeddings_are_one_line(arrays, words, tmp_path):
    path = tmp_path / "e.npz"
    np.savez(path, **arrays) if arrays is not None else path.write_bytes(b"")
    test_bad_input_is_one_line(["samplers", "--embeddings", str(path)], words)


@pytest.mark.parametrize("argv, words", [
    (["samplers", "--embeddings", "nowhere.npz"], ["nowhere.npz", "No such file"]),
    (["samplers", "--against", "nowhere.py"], ["nowhere.py"]),
    (["samplers", "--run", "nowhere"], ["nowhere", "give folders that hold a result.json"]),
    (["samplers", "--against", bench.cli.__file__], ["spectral_batches", "give a samplers.py"]),
    (["samplers", "--against", "README.md"], ["README.md", "SyntaxError"]),
    (["step", "--out", "/proc/nowhere/x.json"], ["/proc/nowhere"]),
    (["step", "--image-size", "4"], ["--image-size 4", ">= 8"]), (["speed"], ["speed", "samplers"])])
def test_bad_input_is_one_line(argv, words):
    with pytest.raises(Stop) as stop:
        bench.main(argv)
    message = str(stop.value)
    assert stop.value.code == 2 and "\n" not in message and all(word in message for word in words), message
