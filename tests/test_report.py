"""Tests of report.py on made-up result files.  Run: pytest tests/test_report.py"""
import errno
import json
import os
import re
import sys
from xml.etree import ElementTree

import pytest

import cli
import report
from test_synthetic import lost

PNG = b"a picture"
MADE = {"command": "python made_up.py", "time": "2026-03-04T05:06:07+0000", "commit": "0123456789abc+changes",
        "device": "cpu (two cores)"}


def claim(text, measured, interval, verdict, **more):
    return {"claim": text, "measured": measured, "measured_interval": interval, "verdict": verdict,
            "form": "<= 1 & inf", "asked_by": "paper"} | more


def row(group, difference, interval, verdict, seeds=3):
    return {"group": group, "seeds": seeds, "images": 1000, "R1": 0.4321, "R1_interval": [0.41, 0.45],
            "interval_over": "images", "difference": difference, "difference_interval": interval,
            "verdict": verdict}


EVALUATION = {**MADE, "dataset": "deadleaves", "baseline": "random", "two views": [
    row("osgd", -0.02, [-0.03, -0.01], "worse"), row("random", None, None, "baseline"),
    row("refined", 0.031, [0.011, 0.052], "better"), row("spectral", 0.01, [-0.01, 0.03], "not settled")],
    "cost": [{"group": "osgd", "images_ratio": None, "images_ratio_interval": [0.97, None], "gain": 0.01,
              "gain_interval": [-0.01, 0.0345]}]}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


@pytest.fixture
def full(tmp_path):
    """Folders with a result of every kind."""
    results, runs = tmp_path / "results", tmp_path / "runs"
    for name in {name for _, name, *_ in report.ROWS}:
        write(results / f"synthetic/{name}.json", {**MADE, "experiment": name, "about": "It.", "claims": [
            claim(f"{name} <b>rises</b>", 0.43219, [0.41, None], "holds"),
            claim("step size 0.5, to 0.01: OSGD (6) in steps", 7.654, [7.5, 7.8], "does not hold"),
            claim(f"{name} is open: OSGD inf", None, [None, 2.0], "not settled", asked_by="us")]})
        write(results / f"synthetic/{name}.png", PNG)
    write(results / "quick/retrieval.json", EVALUATION)
    write(results / "quick/curve.png", PNG)
    write(results / "samplers.json", MADE | {"samplers": [{"sampler": "refined", "loss": 3.46, "MB": None}]})
    for name, r1 in ("quick-random", 0.4444), ("quick-refined", 0.4777):
        write(runs / name / "result.json", {"R1": r1, "R5": 0.8765, "step": 640, "seconds_training": 41.0,
                                            "seconds_selecting": 7300.0})
    return results, runs


def read(folders):
    """The page's words, the cells of its tables by row, and how many pictures it has; all is within it."""
    page = report.build(*folders)
    root = ElementTree.fromstring(page)
    pictures = [image.get("src").startswith("data:image/png;base64,") for image in root.iter("img")]
    words = " ".join(root.find("body").itertext())
    assert all(pictures) and not re.search("<script|<link|href|url\\(", page) and 'name="viewport"' in page
    assert not re.search(r"\b(nan|inf|infinity)\b|∞", words, re.IGNORECASE)
    return words, [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")], len(pictures)


def test_the_first_screen(full):
    text, rows, _ = read(full)
    parts = ["Your runs on generated images: after random batches 43.2 % of 1,000 images find their other "
             "view first (R@1), 43.2 % after osgd, 43.2 % after refined, 43.2 % after spectral ones (3",
             "your runs: images, seconds", "Recorded runs on generated images: R@1 of 1,000", "What holds",
             "All of it"]
    assert sorted(parts, key=text.index) == parts
    begin, end = (next(i for i, x in enumerate(rows) if x[0] == y) for y in ("verdict", "run"))
    first = rows[begin:end][:13]
    assert first[1] == ["What the paper claims"] and len(rows[begin + 12]) == 3 < len(rows[begin + 13])
    words = "Generated images: osgd batches gain points of R@1 over random ones"
    assert first[2] == ["✗ does not hold", words, "-2.0 [-3.0 to -1.0]"]
    assert first[4] == ["✗ does not hold", report.ROWS[0][2], "7.65 [7.5 to 7.8]"]  # the one that is named
    assert first[5] == ["✓ holds", report.ROWS[1][2], "0.432 [0.41 to –]"]  # else the first
    asked = first.index(["What we asked beyond it"])
    assert first[asked + 1][0] == "✓ holds" and "refined" in first[asked + 1][1]
    assert first[asked + 2:] == [["? not settled", report.ROWS[6][2], "– [– to 2]"]]


def test_all_of_it_is_there(full):
    words, rows, pictures = read(full)
    for expected in (["✓ holds", "toy <b>rises</b>", "0.432 [0.41 to –]", "<= 1 & –"],
                     ["refined", "3", "1,000", "43.2 [41.0 to 45.0]", "3.1 [1.1 to 5.2]", "better"],
                     ["osgd", "– [0.97 to –]", "1.0 [-1.0 to 3.5]"], ["refined", "3.46", "–"],
                     ["quick-refined", "47.8", "87.6", "640", "41", "7,300"],
                     [str(full[0] / "samplers.json"), *MADE.values()]):
        assert expected in rows, expected
    assert pictures == 2 + 1 + 8 and "Not there yet: nothing; bash run_all.sh" in words


def test_one_seed_settles_nothing_and_the_newest_evaluation_leads(full):
    rows = [row("random", None, None, "baseline", 1), row("osgd", 0.05, [0.04, 0.06], "not settled", 1)]
    write(full[0] / "cifar100/retrieval.json",
          EVALUATION | {"dataset": "cifar100", "two views": rows, "time": "2026-03-05T05:06:07+0000"})
    words, rows, _ = read(full)
    assert "osgd ones (one seed, which settles nothing)." in words
    assert not any("Cifar100: osgd" in cell for cells in rows for cell in cells)


def test_of_retrieval_s_own_folder_and_of_one_group(full):
    one = [row("refined", None, None, "baseline", 1) | {"R1_inner_product": 0.2345}]
    write(full[0] / "retrieval.json", EVALUATION | {
        "two views": one, "cost": [{"group": "refined", "target": 0.4567}],
        "time": "2026-03-05T05:06:07+0000"})
    words, rows, _ = read(full)
    assert "find their other view first (R@1) (one seed, which settles nothing)." in words
    assert any("23.4" in cells or "23.5" in cells for cells in rows) and ["refined", "45.7"] in rows


def test_nothing_there_is_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.Stop, match="results/report.html: No such file or directory"):
        report.main([])
    (tmp_path / "results").mkdir()
    report.main([])
    assert capsys.readouterr().out == "results/report.html\n"
    words = (tmp_path / "results/report.html").read_text()
    assert "None of your runs has been trained and evaluated yet: bash run_all.sh does it." in words
    assert "Not there yet: results/samplers.json, results/synthetic/toy.json, " in words
    assert "Recorded runs" in words


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]"])
def test_damaged_results_are_one_line(content, full):
    write(full[0] / "cifar100/retrieval.json", content)
    with pytest.raises(cli.Stop, match="damaged or of another version .*--fresh"):
        report.main(["--results", str(full[0]), "--runs", str(full[1])])


@pytest.mark.parametrize("kind", ["full", "pipe"])
def test_lost_output_costs_no_report(kind, full, monkeypatch):
    monkeypatch.setattr(sys, "stdout", lost(kind))
    assert cli.run(report.main, "report.py", ["--results", str(full[0]), "--runs", str(full[1])]) == 0
    assert (full[0] / "report.html").read_text().endswith("</html>\n")


def test_a_full_disk_leaves_the_report_that_was_there(full, monkeypatch, capsys):
    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    write(full[0] / "report.html", b"the last one")
    monkeypatch.setattr(os, "fsync", no_space)
    assert cli.run(report.main, "report.py", ["--results", str(full[0])]) == 2
    err = capsys.readouterr().err
    assert "No space left on device; free some space" in err and err.count("\n") == 1
    assert (full[0] / "report.html").read_bytes() == b"the last one" and not list(full[0].glob(".*"))
