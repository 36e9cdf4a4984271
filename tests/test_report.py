"""Tests of report.py on made-up result files.  Run: pytest tests/test_report.py"""
import base64
import html.parser
import json
import re

import pytest

import cli
import report

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVO"
                       "RK5CYII=")
MADE = {"command": "python made_up.py", "time": "2026-03-04T05:06:07+0000", "commit": "0123456789abc+changes",
        "device": "cpu (two cores)"}


def claim(text, measured, interval, verdict, **more):
    return {"claim": text, "measured": measured, "interval": interval, "verdict": verdict,
            "form": "<= 1 & inf"} | more


def row(group, difference, interval, verdict, seeds=3):
    return {"group": group, "seeds": seeds, "images": 1000, "R1": 0.4321, "R1_interval": [0.41, 0.45],
            "difference": difference, "difference_interval": interval, "verdict": verdict,
            "seconds_training": 1234.4, "seconds_selecting": 5.0}


EVALUATION = {**MADE, "dataset": "deadleaves", "baseline": "random", "two views": [
    row("osgd", -0.02, [-0.03, -0.01], "worse"), row("random", None, None, "baseline"),
    row("refined", 0.031, [0.011, 0.052], "better"), row("spectral", 0.01, [-0.01, 0.03], "not settled")],
    "cost": [{"group": "osgd", "steps_ratio": None, "steps_ratio_interval": [0.97, None], "seconds_ratio": 1,
              "seconds_ratio_interval": None, "gain": 0.01, "gain_interval": [-0.01, 0.0345]}]}



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
    write(results / "samplers.json", {**MADE, "k": 40, "batch_size": 32, "samplers": [
        {"embeddings": "clustered", "sampler": "refined", "loss": 3.4567, "excess": 1.97, "relative": 1.9,
         "ms": 88.4, "of_eigh": 0.49, "MB": None}]})
    for name, r1 in ("quick-random", 0.4444), ("quick-refined", 0.4777):
        write(runs / name / "config.json", {})
        write(runs / name / "result.json", {**MADE, "R1": r1, "R5": 0.8765, "step": 640,
                                            "seconds_training": 41.0, "seconds_selecting": 7300.0})
    return results, runs


class Reader(html.parser.HTMLParser):
    """What a reader sees; refuses tags that do not match and anything that is not within the page."""
    def __init__(self, page):
        super().__init__()
        self.open, self.words, self.rows, self.pictures = [], [], [], 0
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe") and "href" not in dict(attributes)
        if tag == "img":
            assert dict(attributes)["src"].startswith("data:image/png;base64,")
            self.pictures += 1
        elif tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, words):
        if "style" not in self.open:
            self.words.append(words)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += words


def read(folders):
    page = report.build(*folders)
    assert "url(" not in page and 'name="viewport"' in page
    reader = Reader(page)
    assert not re.search(r"\b(nan|inf|infinity)\b|∞", " ".join(reader.words), re.IGNORECASE)
    return reader


def missing(reader):
    start = reader.rows.index(["", "", "made by"])
    return [row[0].rsplit("/", 2)[1:] + row[1:] for row in reader.rows[start + 1:]]


def test_the_first_screen(full):
    reader = read(full)
    text = " ".join(reader.words)
    parts = ["Your runs on generated images: after training on random batches 43.2 % of 1,000 images find "
             "their other view first (R@1), 43.2 % after osgd, 43.2 % after refined, 43.2 % after spectral "
             "ones (3 seeds).", "R@1 along training", "What holds", "Four points in the plane, on",
             "Losses of mini-batches", "All of it"]
    assert sorted(parts, key=text.index) == parts
    first = reader.rows[:[row[-1] for row in reader.rows].index("selecting")]
    assert first[1] == ["What the paper claims"] and len(first) == 3 + 10
    words = "Generated images: osgd batches gain points of R@1 over random ones"
    assert first[2] == ["✗ does not hold", words, "-2.0 [-3.0 to -1.0]"]
    assert first[4] == ["✗ does not hold", report.ROWS[0][2], "7.65 [7.5 to 7.8]"]  # the one that is named
    assert first[5] == ["✓ holds", report.ROWS[1][2], "0.432 [0.41 or more]"]  # else the first
    asked = first.index(["What we asked beyond it"])
    assert first[asked + 1][0] == "✓ holds" and "refined" in first[asked + 1][1]
    assert first[asked + 2] == ["? not settled", report.ROWS[6][2], "– [up to 2]"]


def test_all_of_it_is_there(full):
    reader = read(full)
    for expected in (["✓ holds", "toy <b>rises</b>", "0.432 [0.41 or more]", "<= 1 & –"],
                     ["refined", "3", "3.1 [1.1 to 5.2]", "better", "43.2 [41.0 to 45.0]", "1,234", "5"],
                     ["osgd", "– [0.97 or more]", "1", "1.0 [-1.0 to 3.5]"],
                     ["clustered", "refined", "3.46", "1.97", "1.9", "88.4", "0.49", "–"],
                     ["quick-refined", "47.8", "87.6", "640", "41", "7,300"],
                     [str(full[0] / "samplers.json"), *MADE.values()]):
        assert expected in reader.rows, expected
    assert reader.words.count("toy: 1 × holds, 1 × does not hold, 1 × not settled") == 1
    assert reader.pictures >= 8 + 2 + 2 and not missing(reader)  # the first screen's, once more below


def test_one_seed_settles_nothing_and_the_newest_evaluation_leads(full):
    rows = [row("random", None, None, "baseline", 1), row("osgd", 0.05, [0.04, 0.06], "not settled", 1)]
    write(full[0] / "cifar100/retrieval.json",
          EVALUATION | {"dataset": "cifar100", "two views": rows, "time": "2026-03-05T05:06:07+0000"})
    reader = read(full)
    assert "osgd ones (one seed, which settles nothing)." in " ".join(reader.words)
    assert reader.rows[2] == ["? not settled", "Cifar100: osgd batches gain points of R@1 over random ones",
                              "5.0 [4.0 to 6.0]"]


def test_nothing_there_is_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report.main([])
    assert capsys.readouterr().out == "results/report.html\n"
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["report.html"]
    reader = Reader((tmp_path / "results/report.html").read_text())
    assert "None of your runs has been trained and evaluated yet: bash run_all.sh does it." in reader.words
    assert ["quick", "retrieval.json", "not there", "bash run_all.sh retrieval"] in missing(reader)
    assert ["synthetic", "toy.json", "not there", "bash run_all.sh synthetic"] in missing(reader)


@pytest.mark.parametrize("path, change", [
    ("runs/quick-random/result.json", {"R1": ...}), ("runs/quick-random/result.json", {"commit": ...}),
    ("results/synthetic/toy.json", {"claims": None}), ("results/synthetic/toy.json", {"command": ...}),
    ("results/synthetic/toy.json", {"claims": [{"claim": "half", "verdict": "holds"}]}),
    ("results/samplers.json", {"k": ...}), ("results/samplers.json", {"samplers": [{"sampler": "random"}]}),
    ("results/quick/retrieval.json", {"two views": [{"difference": 1, "R1": 0}]}),
    ("results/quick/retrieval.json", {"cost": [{"group": "osgd"}]}),
    ("results/quick/retrieval.json", b'{"cut')])
def test_a_foreign_file_costs_its_own_part_alone(full, path, change):
    path = full[0].parent / path
    if isinstance(change, dict):
        change = {k: x for k, x in (json.loads(path.read_text()) | change).items() if x is not ...}
    write(path, change)
    reader = read(full)
    assert [[path.parent.name, path.name, "cannot be read"]] == [line[:3] for line in missing(reader)]
    assert {"optima <b>rises</b>", "quick-refined"} <= {*reader.words} and "half" not in reader.words


def test_wrong_usage(tmp_path):
    with pytest.raises(cli.Stop, match="--out: unknown"):
        report.main(["--out", "x"])
    (tmp_path / "file").touch()
    with pytest.raises(cli.Stop, match="file: File exists; give a folder"):
        report.main(["--results", str(tmp_path / "file")])
