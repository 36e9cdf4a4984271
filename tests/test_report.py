"""Tests of report.py on made-up result files.  Run: pytest test_report.py"""
import base64
import html.parser
import json
import re
from pathlib import Path

import pytest

import report

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")
MADE = {"command": "python made_up.py --quick", "commit": "0123456789abcdef0123456789abcdef01234567+changes", "device": "cpu (two cores)",
        "versions": {"torch": "2.14.1"}, "time": "2026-03-04T05:06:07+0000"}


def claim(text, measured, interval, verdict):
    return {"claim": text, "measured": measured, "interval": interval, "allowed": [0, 1], "form": "<= 1 & more", "verdict": verdict}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def write_run(folder, name, sampler, seed, r1):
    write(folder / name / "config.json", {})
    write(folder / name / "result.json", {
        **MADE, "R1": r1, "R5": 0.8765, "loss": 1.2345, "step": 640, "seconds_training": 41.0, "seconds_selecting": 7300.0,
        "validation_images": 1000, "knobs": {"dataset": "deadleaves", "objective": "simclr", "sampler": sampler, "seed": seed, "k": 32,
                                             "embeddings": "fresh", "select_after": 0, "epochs": 10, "out_dir": name}})


@pytest.fixture
def full(tmp_path):
    """A folder with a result of every kind."""
    results, runs = tmp_path / "results", tmp_path / "runs"
    for name in report.EXPERIMENTS:
        write(results / f"synthetic/{name}.json", {**MADE, "claims": [
            claim(f"{name} <b>rises</b> | falls", 0.4321, [0.41, None], "holds"),
            claim(f"{name} is refuted", 7.654, [7.5, 7.8], "does not hold"),
            claim(f"{name} is open", None, [None, 2.0], "not settled")]})
        write(results / f"synthetic/{name}.png", PNG)
    write(results / "samplers.json", {**MADE, "k": 40, "batch_size": 32, "temperature": 0.1, "embeddings": "made up", "samplers": [
        {"embeddings": "clustered", "sampler": "refined", "loss": 3.4567, "excess": 1.97, "relative": 1.9, "ms": 88.4, "of_eigh": 0.49,
         "MB": None}], "growth": [{"pairs": 10000, "random": 1.9, "windows": 3.4, "all": 3.8, "seconds": 1.91, "us_a_pair": 191.0, "MB": 68}]})
    write_run(runs, "quick-random", "random", 0, 0.4444)
    write_run(runs, "quick-refined", "refined", 0, 0.4777)
    write(runs / ".steps/bench", b"finished 2026-03-04T05:06:07+0000 in 61 s\npython bench.py samplers\n1 2 bench.py\n")
    for name, seconds in ("toy", 150), ("optima", 89):
        write(runs / f".steps/synthetic-{name}", f"finished 2026-03-04T05:06:07+0000 in {seconds} s\npython synthetic.py --quick\n".encode())
    write(runs / ".steps/cifar100-osgd-simclr", b"begun\npython train.py --dataset cifar100 --out-dir runs/cifar100-osgd-simclr\n")
    write(runs / ".steps/cifar100-osgd-simclr.log", b"finished or not\n\n")
    return results, runs


class Reader(html.parser.HTMLParser):
    """Refuses tags that do not match, and notes attributes and text."""
    def __init__(self):
        super().__init__()
        self.open, self.attributes, self.text, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read_page(blocks, folder):
    reader = Reader()
    page = report.as_html(blocks, folder)
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader, page


def test_numbers_verdicts_and_commands_are_there(full):
    blocks = report.build(*full)
    reader, page = read_page(blocks, full[0])
    text = "\n".join(reader.text)
    for expected in ("0.432", "0.41 to ∞", "−∞ to 2", "7.65", "7 hold, 7 do not hold, 7 not settled", "44.4 %", "47.8 %", "87.6 %", "41 s", "2.0 h",
                     "3.46", "88.4", "10,000", "1.91", "61 s", "python made_up.py --quick", "0123456789+changes", "2026-03-04 05:06"):
        assert expected in text, expected
    tables = {block[1][0]: block for block in blocks if block[0] == "table"}
    assert tables["run"][1:3] == (["run", "R@1", "R@5", "loss, last epoch", "steps", "training", "selecting", "validation images"],
                                  [[name, r1, "87.6 %", "1.23", "640", "41 s", "2.0 h", "1,000"] for name, r1 in
                                   (("quick-random", "44.4 %"), ("quick-refined", "47.8 %"))])
    assert tables["embeddings"][1:3] == (["embeddings", "sampler", "mean loss", "excess", "relative", "ms a window", "of one eigh", "MB"],
                                         [["clustered", "refined", "3.46", "1.97", "1.9", "88.4", "0.49", "–"]])
    assert [block[2] for block in blocks if block[0] == "table" and block[1][0] == "stage"] == [
        [["bench", "1", "61 s"], ["synthetic", "2", "4 min"], ["all", "3", "5 min"]],
        [["bench", "bench", "2026-03-04 05:06", "61 s"], ["synthetic", "synthetic-optima", "2026-03-04 05:06", "89 s"],
         ["synthetic", "synthetic-toy", "2026-03-04 05:06", "2 min"]]]
    assert ["run quick-random", "2026-03-04 05:06", "0123456789+changes", "cpu (two cores)", "2.14.1", "python made_up.py --quick"] in tables["what"][2]
    assert "<b>rises</b>" not in page and "&lt;b&gt;rises&lt;/b&gt; | falls" in page
    assert "<=" not in re.sub(r"<style>.*</style>", "", page) and "&lt;= 1 &amp; more" in page
    assert [row[2] for block, after in zip(blocks, blocks[1:]) if block == ("h2", "What is missing") for row in after[2]] == [
        "bash run_all.sh --full retrieval", "bash run_all.sh --full train"]  # the latter begun and not finished
    markdown = report.as_markdown(blocks)
    for expected in ("0.432", "44.4 %", "toy is refuted", "![", "](<synthetic/toy.png>)", r"\<b\>rises\</b\> \| falls"):
        assert expected in markdown, expected
    for block in re.split(r"\n\n", markdown):  # each row of a table as wide as its head
        rows = [re.sub(r"\\.", "", line).count("|") for line in block.splitlines() if line.startswith("|")]
        assert len(set(rows)) <= 1


def test_the_page_needs_nothing_else(full):
    reader, page = read_page(report.build(*full), full[0])
    assert not reader.tags & {"script", "link", "iframe", "object", "base"} and "@import" not in page and "url(" not in page
    for name, value in reader.attributes:
        assert name != "href" and (name != "src" or value.startswith("data:image/png;base64,"))
    assert page.count("<img") == len(report.EXPERIMENTS) and ("name", "viewport") in reader.attributes


def contradictions(blocks):
    start = blocks.index(("h2", "What contradicts the paper"))
    end = next(i for i, block in enumerate(blocks) if i > start and block[0] == "h2")
    return [[row[0] for row in block[2]] for block in blocks[start:end] if block[0] == "table"], blocks[start:end]


def test_contradictions_come_from_the_data(full):
    results, runs = full
    refuted, unsettled = contradictions(report.build(results, runs))[0]
    assert refuted == [f"{name}: {name} is refuted" for name in report.EXPERIMENTS]
    assert len(unsettled) == len(report.EXPERIMENTS)
    path = results / "synthetic/toy.json"
    record = json.loads(path.read_text())
    record["claims"][0]["verdict"] = "does not hold"
    write(path, record)
    assert "toy: toy <b>rises</b> | falls" in contradictions(report.build(results, runs))[0][0]
    for name in report.EXPERIMENTS:
        write(results / f"synthetic/{name}.json", {**MADE, "claims": [claim("fine", 1.0, [1, 1], "holds")]})
    tables, blocks = contradictions(report.build(results, runs))
    assert not tables and ("p", "No claim was found not to hold.") in blocks


def row(group, difference, interval, verdict, over="seeds and images, paired by seed"):
    return {"group": group, "seeds": 3, "images": 1000, "interval_over": "seeds and images", "difference_over": over, "difference_seeds": 3, "R1": 0.4321,
            "R1_interval": [0.41, 0.45], "difference": difference, "difference_interval": interval, "verdict": verdict,
            "seconds_training": 41.0, "seconds_selecting": 5.0}


def test_retrieval_is_judged_by_seeds(full):
    results, runs = full
    write(results / "quick/retrieval.json", {**MADE, "dataset": "deadleaves", "baseline": "random", "groups": {}, "two views": [
        row("random", None, None, "baseline"), row("refined", 0.031, [0.011, 0.052], "better"), row("osgd", -0.02, [-0.03, -0.01], "worse"),
        row("spectral", 0.01, [-0.01, 0.03], "not settled"), row("refined k 64", 0.05, [0.04, 0.06], "better", "images")],
        "cost": [{"group": "osgd", "seeds": 3, "target": 0.44, "steps": None, "steps_ratio": None, "steps_ratio_interval": [0.97, None],
                  "seconds": 12.5, "seconds_ratio": 0.61, "seconds_ratio_interval": None, "gain": 0.0123, "gain_interval": [-0.01, 0.0345]}]})
    (results / "quick/neighbours.png").write_bytes(PNG)
    blocks = report.build(results, runs)
    reader, _ = read_page(blocks, results)
    text = "\n".join(reader.text)
    rows = next(block[2] for block in blocks if block[0] == "table" and block[1][:3] == ["", "seeds", "difference"])
    assert rows[1] == ["refined", "3", "3.1 [1.1 to 5.2]", "43.2 [41.0 to 45.0]", "41 s", "5 s"]
    assert ["osgd", "44.0", "not reached", "not reached [0.97 to ∞]", "12.5", "0.61", "1.23 [-1 to 3.45]"] in [
        row for block in blocks if block[0] == "table" for row in block[2]]
    assert next(block[2][1] for block in blocks if block[0] == "table" and block[3].startswith("4 claims"))[-1] == (
        "points > 0; interval over seeds and images, paired by seed; seeds: 3")
    for expected in ("43.2 [41.0 to 45.0]", "3.1 [1.1 to 5.2]", "not reached [0.97 to ∞]", "12.5", "0.61", "1.23 [-1 to 3.45]", "results/quick/curve.png"):
        assert expected in text, expected
    claims = next(block[2] for block in blocks if block[0] == "table" and block[3].startswith("4 claims"))
    assert [line[0].split(" ", 1)[1] for line in claims] == ["holds", "does not hold", "not settled", "not settled"]
    refuted, _ = contradictions(blocks)[0]
    assert refuted[-1] == "retrieval, generated images, quick: two views: osgd finds more partners first than random at equal steps"


@pytest.mark.parametrize("command, call", [
    ("python synthetic.py --quick --experiment toy --out results/synthetic", "synthetic"),
    ("python synthetic.py --experiment toy --out results/synthetic", "--full synthetic"),
    ("python train.py --dataset deadleaves --out-dir runs/quick-osgd", "train"),
    ("python train.py --image-size 64 --dataset tinyimagenet --out-dir runs/tinyimagenet-osgd-simclr-64px", "--full --own-size train"),
    ("python retrieval.py runs/quick-osgd --out results/quick", "retrieval"),
    ("python retrieval.py runs/cifar100-osgd-simclr-seed1 --out results/cifar100", "--full retrieval"),
    ("python retrieval.py runs/cifar100-osgd-simclr-32px --out results/cifar100-own", "--full --own-size retrieval"),
    ("python bench.py samplers --pairs 10000", "bench")])
def test_what_makes_it_again(command, call):
    assert report.again(command) == f"bash run_all.sh {call}"


def test_what_was_trained_and_not_evaluated(tmp_path):
    for name, dataset in ("cifar100-osgd-simclr", "cifar100"), ("tinyimagenet-osgd-simclr-64px", "tinyimagenet"), ("quick-osgd", "deadleaves"):
        write(tmp_path / f"runs/.steps/{name}", f"finished x in 9 s\npython train.py --dataset {dataset} --out-dir runs/{name}\n".encode())
    blocks = report.build(tmp_path / "results", tmp_path / "runs")
    missing = next(blocks[i + 1][2] for i, block in enumerate(blocks) if block == ("h2", "What is missing"))
    assert [[Path(line[0]).parent.name, line[2]] for line in missing if line[0].endswith("retrieval.json")] == [
        ["cifar100", "bash run_all.sh --full retrieval"], ["quick", "bash run_all.sh retrieval"],
        ["tinyimagenet-own", "bash run_all.sh --full --own-size retrieval"]]


def test_nothing_there_is_no_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert report.main([]) == 0 and capsys.readouterr().out == "results/report.html, results/report.md\n"
    text = (tmp_path / "results/report.md").read_text()
    for expected in ("results/synthetic/toy.json", "bash run\\_all.sh synthetic", "results/samplers.json", "bash run\\_all.sh bench",
                     "No claim has been put to the test yet", "bash run\\_all.sh train", "bash run\\_all.sh retrieval"):
        assert expected in text, expected
    assert not [path for path in (tmp_path / "results").iterdir() if path.name.startswith(".")]


def test_damaged_and_unfinished_are_named(full):
    results, runs = full
    write(results / "synthetic/toy.json", b'{"claims": [')
    write(results / "synthetic/optima.json", {"claims": []})  # no command
    (results / "synthetic/subsets.png").unlink()
    write(runs / "quick-osgd/config.json", {})
    write_run(runs, "quick-random.old-1", "random", 0, 0.1)
    blocks = report.build(results, runs)
    missing = next(blocks[i + 1][2] for i, block in enumerate(blocks) if block == ("h2", "What is missing"))
    named = {Path(row[0]).relative_to(results.parent).as_posix(): row[1] for row in missing}
    assert named["results/synthetic/toy.json"] == named["results/synthetic/optima.json"] == "cannot be read"
    assert named["runs/quick-osgd/result.json"] == named["results/synthetic/subsets.png"] == "not there"
    reader, page = read_page(blocks, results)
    assert "10.0 %" not in page and "subsets is refuted" in page


@pytest.mark.parametrize("path, change", [
    ("runs/quick-random/result.json", {"step": None}), ("runs/quick-random/result.json", {"R1": None}),
    ("runs/quick-random/result.json", {"versions": None}), ("results/synthetic/toy.json", {"claims": None}),
    ("results/synthetic/toy.json", {"claims": [{"claim": "half a claim", "verdict": "holds"}]}), ("results/synthetic/toy.json", {"claims": [claim("half a claim", 1.0, [0, 2], "perhaps")]}), ("results/samplers.json", {"k": ...}),
    ("results/samplers.json", {"samplers": [{"sampler": "random"}]}), ("results/quick/retrieval.json", {"two views": [{"difference": 1, "R1": 0}]}),
    ("results/quick/retrieval.json", {"cost": [{"group": "osgd"}]})])
def test_a_foreign_file_costs_its_own_section_alone(full, path, change):
    results, runs = full
    write(results / "quick/retrieval.json", {**MADE, "dataset": "deadleaves", "baseline": "random", "two views": [row("random", None, None, "baseline"),
                                                                                           row("osgd", -0.5, [-0.6, -0.4], "worse")]})
    path = results.parent / path
    write(path, {k: x for k, x in (json.loads(path.read_text()) | change).items() if x is not ...})
    blocks = report.build(results, runs)
    missing = next(blocks[i + 1][2] for i, block in enumerate(blocks) if block == ("h2", "What is missing"))
    assert [str(path), "cannot be read"] in [line[:2] for line in missing]
    reader, page = read_page(blocks, results)
    assert "optima is refuted" in page and "quick-refined" in page and "half a claim" not in page
    assert ("osgd finds more" in page) == (path.name != "retrieval.json")  # nor do its claims count


def test_folders_in_the_place_of_files(full):
    results, runs = full
    (results / "synthetic/toy.png").unlink()
    (results / "synthetic/toy.png").mkdir()
    (runs / ".steps/folder").mkdir()
    write(runs / ".steps/odd", b"finished 2026-03-04T05:06:07+0000 in 61\n\n")
    assert "optima is refuted" in read_page(report.build(results, runs), results)[1]


def test_wrong_usage(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        report.main(["--out", "x"])
    assert "--out" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert report.main(["--results", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("report.py: error: ")
