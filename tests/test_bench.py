"""Tests of bench.py: its tables at small sizes, and wrong input in one line.  Run: pytest test_bench.py"""
import json

import numpy as np
import pytest
import torch

import bench
import report
from test_samplers import clustered


def test_samplers_table_has_all_that_is_asked(tmp_path, capsys):
    u, v, labels = clustered(8, 32, 0.8)
    bench.bench_samplers("made up", {"a": (u, v, labels), "b": (u[:128], v[:128], None)}, [128], str(tmp_path / "samplers.json"),
                         batch_size=8, k=8, file_order=True, rounds=1)
    record, printed = json.loads((tmp_path / "samplers.json").read_text()), capsys.readouterr().out
    rows = {(row["embeddings"], row["sampler"]): row for row in record["samplers"]}
    assert rows["a", "refined, exclude=labels"]["same_class"] < rows["a", "random"]["same_class"] < rows["a", "refined"]["same_class"]
    assert rows["a", "refined"]["loss"] > rows["a", "released spectral"]["loss"] > rows["a", "random"]["loss"]
    assert rows["a", "random"]["excess"] == 0 and rows["a", "released spectral"]["relative"] == 1
    assert rows["b", "in file order"]["over_file_order"] == 0 and ("b", "refined, exclude=labels") not in rows
    assert record["growth"][0]["pairs"] == 128 and {"commit", "command", "versions", "device"} <= record.keys()
    head, lines = next(block[1:3] for block in report.build(tmp_path, tmp_path) if block[0] == "table" and block[1][0] == "embeddings")
    assert [tuple(line[:2]) for line in lines] == list(rows) and all(len(line) == len(head) for line in lines)  # the report reads it
    assert "of refined's excess at" in printed and all(sampler in printed for _, sampler in rows)


def test_same_class():
    assert bench.same_class(torch.tensor([[1, 1, 2], [3, 3, 3]])) == pytest.approx((1 / 3 + 1) / 2)


@pytest.mark.parametrize("arrays, words", [
    (None, ["cannot be read", "NAME_u"]), ({}, ["it has none"]), ({"x": np.ones((3, 2))}, ["(x)", "NAME_u"]),
    ({"a_u": np.ones((3, 2))}, ["a_u is without a_v"]), ({"u": np.ones((3, 2)), "v": np.ones((4, 2))}, ["(3, 2)", "(4, 2)"]),
    ({"u": np.ones((3, 2)), "v": np.ones((3, 2))}, ["3 pairs", "1,280"])])
def test_bad_embeddings_are_one_line(arrays, words, tmp_path, capsys):
    path = tmp_path / "e.npz"
    np.savez(path, **arrays) if arrays is not None else path.write_bytes(b"")
    assert bench.main(["samplers", "--embeddings", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bench.py: error: ") and err.count("\n") == 1 and all(word in err for word in words), err


@pytest.mark.parametrize("argv, words", [(["--pairs", "1000"], ["--pairs 1000", "1280"]), (["--run", "nowhere"], ["nowhere", "result.json"]),
                                         (["--embeddings", "nowhere.npz"], ["nowhere.npz", "not there"])])
def test_bad_input_is_one_line(argv, words, capsys):
    assert bench.main(["samplers", *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(word in err for word in words), err
