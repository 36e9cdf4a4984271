"""Tests of run_all.sh on a stand-in for Python that notes what it was asked to do.  Run: pytest test_run_all.py"""
import ast
import fcntl
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import plan
from model import ContrastiveModel

HERE = Path(__file__).parents[1]
CODE = [path.name for path in HERE.glob("*.py") if not path.name.startswith("test_")] + ["synthetic.py", "report.py"]
# Writes what the real commands would. A file fail-WORD lets the commands fail that hold the word, hang-WORD lets them hang
# once their checkpoint is written.
PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then exec python3 "$@"; fi
echo "$*" >>calls
echo "${CUDA_VISIBLE_DEVICES-none} $(date +%s%N)" >>devices
all=$* out="" name=""
while [ $# -gt 0 ]; do
  case $1 in --out | --out-dir) out=$2 ;; --experiment) name=$2 ;; esac
  shift
done
case $all in
  *plan*) cat; exit ;;
  train.py*) mkdir -p "$out"; touch "$out/checkpoint.pt" ;;
esac
for word in hang-* fail-*; do
  case $word-$all in
    hang-\\**) ;;
    hang-*"${word#hang-}"*"${word#hang-}"*) exec sleep 30 ;;
    fail-*"${word#fail-}"*"${word#fail-}"*) echo "it broke"; exit 1 ;;
  esac
done
case $all in
  train.py*) sleep ${STEP_SECONDS:-0}; date +%s%N >"$out/result.json" ;;
  synthetic.py*) mkdir -p "$out"; touch "$out/$name.json" "$out/$name.png" ;;
  retrieval.py*) mkdir -p "$out"; touch "$out/retrieval.json" "$out/curve.png" "$out/neighbours.png" ;;
  bench.py*) mkdir -p results; touch "$out" ;;
esac
"""
RUNS = ["quick-random", "quick-osgd", "quick-spectral", "quick-refined"]


@pytest.fixture
def repo(tmp_path):
    """A copy of the script beside files of code that are only names."""
    for name in CODE:
        (tmp_path / name).write_text(f"# {name}\n")
    shutil.copy(HERE / "run_all.sh", tmp_path)
    (tmp_path / "fake").write_text(PYTHON)
    (tmp_path / "fake").chmod(0o755)
    return tmp_path


def command(*words):
    return ["bash", "run_all.sh", *words]


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if name not in
            ("DATA_DIR", "DATASETS", "SAMPLERS", "OBJECTIVES", "SEEDS", "TRAIN_FLAGS", "PYTHON")}
    return kept | {"RUN_PYTHON": "./fake", "CUDA_VISIBLE_DEVICES": ""} | more


def with_gpus(repo, visible, says="0", code=0):
    """Variables of an environment whose nvidia-smi answers so."""
    (repo / "nvidia-smi").write_text(f"#!/bin/sh\necho {says}; exit {code}\n")
    (repo / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{repo}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": visible}


def run(repo, *words, **more):
    """Exit code, lines printed for steps (act, name, reason), stderr; and what was asked of Python."""
    (repo / "calls").write_text("")
    done = subprocess.run(command(*words), cwd=repo, capture_output=True, text=True, timeout=60, env=environment(**more))
    lines = [line[3:].split(" ", 1) for line in done.stdout.splitlines() if line.startswith("== ")]
    steps = {rest.split(": ")[0]: (act, rest.split(": ", 1)[1]) for act, rest in lines if ": " in rest}
    return done.returncode, steps, done.stderr, (repo / "calls").read_text().splitlines()


def test_all_of_it_and_then_nothing(repo):
    code, steps, _, calls = run(repo)
    assert code == 0
    assert calls[0] == "synthetic.py --quick --experiment toy --out results/synthetic"  # the first picture
    assert [call.split()[0] for call in calls] == ["synthetic.py"] * 7 + ["train.py"] * 4 + ["retrieval.py", "bench.py", "report.py"]
    assert {name for name in steps if name.startswith("quick")} == set(RUNS)
    assert steps.pop("report") == ("run", "anew each time")
    assert all(why == "first time" and act == "run" for name, (act, why) in steps.items() if name != "setup")
    code, steps, _, calls = run(repo)
    assert code == 0 and calls == ["report.py"] and steps.pop("report") == ("run", "anew each time")
    assert all(act == "skip" for act, _ in steps.values()) and steps["quick-osgd"][1].startswith("finished 2")


def test_changed_code_is_named_and_old_runs_are_kept(repo):
    run(repo)
    before = (repo / "runs/quick-random/result.json").read_text()
    (repo / "lars.py").write_text("other\n")
    code, steps, _, calls = run(repo)
    assert code == 0
    assert steps["quick-random"] == ("run", "lars.py changed; the run that was there goes to runs/quick-random.old-1")
    assert (repo / "runs/quick-random.old-1/result.json").read_text() == before
    assert steps["synthetic-toy"][0] == "skip" and steps["bench"] == ("run", "lars.py changed")  # it trains
    assert steps["retrieval-deadleaves"][1].startswith("runs/quick-osgd/result.json runs/quick-random/result.json")
    assert not any("--resume" in call for call in calls)
    (repo / "cli.py").write_text("other\n")
    (repo / "samplers.py").write_text("other\n")
    _, steps, _, _ = run(repo, "synthetic", "train")
    assert steps["synthetic-toy"] == ("run", "cli.py samplers.py changed")
    assert steps["quick-random"][1].endswith("runs/quick-random.old-2")


def test_changed_command_and_lost_output(repo):
    run(repo)
    _, steps, _, calls = run(repo, "train", TRAIN_FLAGS="--epochs 3")
    assert steps["quick-osgd"][1].startswith("its command changed; ") and "--epochs 3" in calls[0]
    run(repo, "train")
    (repo / "results/synthetic/toy.json").unlink()
    (repo / "results/synthetic/scaling.png").write_text("half a pict")
    _, steps, _, calls = run(repo, "synthetic")
    assert steps["synthetic-toy"] == ("run", "gone or not as it was made: results/synthetic/toy.json") and len(calls) == 2
    assert steps["synthetic-scaling"] == ("run", "gone or not as it was made: results/synthetic/scaling.png")
    for name in "retrieval.json", "neighbours.png":
        (repo / "results/quick" / name).write_text('{"cut')
    (repo / "results/samplers.json").write_text("")
    assert run(repo, "synthetic", "retrieval", "bench")[1]["bench"][0] == "skip"  # nothing else was ever in it
    (repo / "results/samplers.json").write_text("{")
    (repo / "results/quick/retrieval.json").write_text('{"cut')
    (repo / "results/quick/neighbours.png").unlink()
    (repo / "runs/quick-random/result.json").write_text("{")
    _, steps, _, calls = run(repo, "synthetic", "train", "bench", "retrieval")
    assert [call.split()[0] for call in calls] == ["train.py", "bench.py", "retrieval.py"] and calls[0].endswith("--resume")
    assert steps["bench"][1] == "gone or not as it was made: results/samplers.json"
    (repo / "moved data").mkdir()  # where the data lie is no setting of a run
    _, steps, _, calls = run(repo, "train", DATA_DIR="moved data")
    assert not calls and steps["quick-osgd"][0] == "skip"


def test_a_run_made_by_hand_is_kept(repo):
    (repo / "runs/quick-osgd").mkdir(parents=True)
    (repo / "runs/quick-osgd/checkpoint.pt").write_text("hours")
    _, steps, _, _ = run(repo, "train")
    assert steps["quick-osgd"][1] == "first time; the run that was there goes to runs/quick-osgd.old-1"
    assert (repo / "runs/quick-osgd.old-1/checkpoint.pt").read_text() == "hours"


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_failing_run_is_named_and_the_others_go_on(repo, jobs):
    (repo / "fail-osgd").touch()
    code, _, error, calls = run(repo, "--jobs", jobs)
    assert code == 1
    assert "FAILED quick-osgd (exit code 1)" in error and "failed: quick-osgd; the others are done" in error
    assert ("it broke" in error) == (jobs == "2")  # else its output was seen
    assert (repo / "runs/.steps/quick-osgd.log").exists() == (jobs == "2")
    assert calls[-1] == "report.py"
    retrieval = next(call for call in calls if call.startswith("retrieval.py"))
    assert "runs/quick-osgd" not in retrieval and "runs/quick-refined" in retrieval
    (repo / "fail-osgd").unlink()
    code, steps, _, calls = run(repo)
    assert code == 0 and steps["quick-osgd"] == ("resume", "begun and not finished") and calls[0].endswith("--resume")
    assert steps["retrieval-deadleaves"] == ("run", "its command changed")


def test_tests_that_fail(repo):
    (repo / "fail-pytest").touch()
    apart = "test_train.py test_data.py test_run_all.py test_bench.py"  # a process of their own
    both = [f"-m pytest -q {apart}", "-m pytest -q " + " ".join(f"--ignore={name}" for name in apart.split())]
    assert all((HERE / name).exists() for name in apart.split())
    code, steps, error, calls = run(repo, "test")
    assert code == 1 and steps["test"] == ("run", "anew each time") and sorted(calls, reverse=True) == both
    assert f"failed: test test ({apart}); the others" in error
    (repo / "fail-pytest").unlink()
    assert run(repo, "test")[0] == 0
    (repo / "fail-test_train.py test").touch()  # the one process alone
    code, _, error, _ = run(repo, "test")
    assert code == 1 and f"failed: test ({apart}); the others" in error
    (repo / "fail-test_train.py test").rename(repo / "fail---ignore")
    code, _, error, _ = run(repo, "test")
    assert code == 1 and "failed: test; the others" in error


def test_retrieval_without_runs(repo):
    code, _, error, calls = run(repo, "retrieval")
    assert code == 1 and not calls and "FAILED retrieval-deadleaves" in error and "first: bash run_all.sh --quick train\n" in error
    _, _, error, _ = run(repo, "--full", "--own-size", "retrieval", DATASETS="cifar100")
    assert "FAILED retrieval-cifar100-own" in error and "first: bash run_all.sh --full --own-size train\n" in error


@pytest.mark.parametrize("where, kind, code, jobs", [
    *((where, signal.SIGINT, 130, "1") for where in ("histograms", "quick-osgd", "retrieval", "bench")),
    ("quick-osgd", signal.SIGINT, 130, "2"), ("quick-osgd", signal.SIGTERM, 143, "1"), ("quick-osgd", signal.SIGKILL, -9, "1")])
def test_interrupted_and_gone_on_with(repo, where, kind, code, jobs):
    (repo / f"hang-{where}").touch()
    (repo / "calls").write_text("")
    with subprocess.Popen(command("--jobs", jobs), cwd=repo, env=environment(), start_new_session=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True,  # also where these tests were started in the background:
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        until = time.time() + 20
        while where not in (repo / "calls").read_text() or jobs == "2" and "refined" not in (repo / "calls").read_text():
            assert time.time() < until
            time.sleep(0.02)
        time.sleep(0.1)
        sent = time.time()
        os.killpg(process.pid, kind)  # as the terminal does
        output = process.communicate()[0]
        assert process.returncode == code and time.time() - sent < 5
        assert kind == signal.SIGKILL or "the same command goes on from here" in output
    if kind != signal.SIGKILL:
        with pytest.raises(ProcessLookupError):  # nothing is left behind
            os.killpg(process.pid, 0)
    assert "report.py" not in (repo / "calls").read_text()
    (repo / f"hang-{where}").unlink()
    code, steps, _, calls = run(repo)
    name = {"histograms": "synthetic-histograms", "retrieval": "retrieval-deadleaves"}.get(where, where)
    assert code == 0
    assert steps[name] == ("resume" if where == "quick-osgd" else "run", "begun and not finished")
    assert steps["synthetic-toy"][0] == "skip"


def test_a_signal_to_the_script_alone_ends_its_command(repo):
    for word, name in ("quick-osgd", "train"), ("pytest", "test"):
        (repo / f"hang-{word}").touch()
        (repo / "calls").write_text("")
        with subprocess.Popen(command(name), cwd=repo, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL) as process:
            until = time.time() + 20
            while word not in (repo / "calls").read_text():
                assert time.time() < until
                time.sleep(0.02)
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 143
        with pytest.raises(ProcessLookupError):  # nothing is left behind
            os.killpg(process.pid, 0)


def test_a_run_that_waits_for_its_turn_is_not_begun(repo):
    run(repo, "train")
    (repo / "lars.py").write_text("other\n")
    (repo / "hang-train.py").touch()
    (repo / "calls").write_text("")
    with subprocess.Popen(command("--jobs", "2", "train"), cwd=repo, env=environment(), start_new_session=True, stdout=subprocess.PIPE,
                          text=True) as process:
        until = time.time() + 20
        while (repo / "calls").read_text().count("train.py") < 2:
            assert time.time() < until
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=5)[0]
    assert [line.split()[2] for line in output.splitlines() if line.startswith("== run quick")] == ["quick-random:", "quick-osgd:"]
    assert sorted(path.name for path in (repo / "runs").glob("*.old-*")) == ["quick-osgd.old-1", "quick-random.old-1"]
    assert [(repo / "runs/.steps" / name).read_text().split()[0] for name in RUNS] == ["begun"] * 2 + ["finished"] * 2


def imports(name, seen):
    """All files of ours that the file `name` imports, itself included."""
    if name not in seen:
        seen.add(name)
        for node in ast.walk(ast.parse((HERE / name).read_text())):
            for module in [x.name for x in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []:
                if (HERE / f"{module}.py").exists():
                    imports(f"{module}.py", seen)
    return seen


def test_a_step_depends_on_all_the_code_it_imports(repo):
    """But for what only looks on, and must not cost anybody a night's training."""
    run(repo)
    for step, script, but in (("synthetic-toy", "synthetic.py", set()), ("retrieval-deadleaves", "retrieval.py", set()),
                              ("quick-osgd", "train.py", {"retrieval.py", "compare.py", "corruptions.py", "figures.py", "probe.py"}),
                              ("bench", "bench.py", {"synthetic.py", "theory.py", "figures.py", "compare.py", "corruptions.py", "probe.py"})):
        lines = [line for line in (repo / "runs/.steps" / step).read_text().splitlines()[2:] if not line.startswith("made ")]
        assert {line.split(" ", 2)[2] for line in lines if not line.endswith(".json")} == imports(script, set()) - but, step


def test_dry_run_runs_nothing(repo):
    (repo / "fake").write_text(PYTHON.replace("cat; exit", "cat >plan; exit"))
    before = {path for path in repo.rglob("*")}
    code, _, _, calls = run(repo, "--dry-run")
    assert code == 0 and calls == ["plan.py --jobs 1"]
    assert {path for path in repo.rglob("*")} - before == {repo / "calls", repo / "plan", repo / "devices"}
    lines = [line.split("\t") for line in (repo / "plan").read_text().splitlines() if line]
    assert len(lines) == 14 and {line[0] for line in lines} == {"run"}
    assert lines[8][1] == "quick-osgd" and lines[8][4].startswith("train.py --dataset deadleaves --sampler osgd")
    run(repo, "train")
    (repo / "model.py").write_text("other\n")
    run(repo, "--dry-run", "train")
    lines = [line.split("\t") for line in (repo / "plan").read_text().splitlines() if line]
    assert lines[0][2].startswith("model.py changed; ") and lines[0][3].isdigit()  # seconds of the last time
    assert (repo / "runs/quick-osgd/result.json").exists()
    run(repo)
    run(repo, "--dry-run", "retrieval")
    assert (repo / "plan").read_text().startswith("skip")
    (repo / "lars.py").write_text("other\n")
    run(repo, "--dry-run", "train", "retrieval")
    assert "\tits runs change\t" in (repo / "plan").read_text().splitlines()[4]
    run(repo, "--dry-run", "test", "report")
    assert [line.split("\t") for line in (repo / "plan").read_text().splitlines() if line] == [
        ["run", "test", "anew each time", "", "-m pytest -q --ignore=test_train.py --ignore=test_data.py --ignore=test_run_all.py --ignore=test_bench.py "], ["run", "report", "anew each time", "", "report.py "]]


def test_the_plan_of_the_papers_runs(repo, monkeypatch, capsys):
    """Against arithmetic by hand; the times of a step (0.1 s), a view (1 ms) and a window (19 ms) are given."""
    with FlopCounterMode(display=False) as counter:
        ContrastiveModel().encoder(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() == pytest.approx(2 * plan.FORWARD * 224 ** 2, rel=0.01)
    (repo / "fake").write_text(PYTHON.replace("cat; exit", "cat >plan; exit"))
    run(repo, "--dry-run", "--full", "train", "retrieval")
    monkeypatch.setattr(sys, "stdin", io.StringIO((repo / "plan").read_text()))
    monkeypatch.setattr(plan, "measure", lambda *_: (0.1, 1e-3))
    monkeypatch.setattr(plan, "repeated", lambda *_: 0.019)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan.plan(jobs=1)
    text = capsys.readouterr().out
    counts = {line.split()[0]: line.split()[1:] for line in text.split("\nrun ")[-1].splitlines() if line[:4] in ("cifa", "tiny")}
    assert len(counts) == 12
    steps, view = 100 * (100_000 // 32), 2 * 1.82e9  # of Tiny ImageNet
    for sampler, embedded in ("random", 0), ("osgd", 2 * 32 * 10), ("spectral", 2 * 32):  # views a step
        flop = view * steps * (3 * 64 + embedded)
        assert counts[f"tinyimagenet-{sampler}-simclr"][:4] == [f"{steps:,}", "64", f"{embedded:,}", f"{flop:.1e}"]
    hours = {line.split("runs/")[1].split()[0]: line.split()[1] for line in text.splitlines() if line.startswith("run ") and "train.py" in line}
    validation = 2 * 1000 / 3125  # views a step
    assert hours["tinyimagenet-random-simclr"] == f"{steps * (0.1 + validation * 1e-3) / 3600:.1f}"
    assert hours["tinyimagenet-osgd-simclr"] == f"{steps * (0.1 + (validation + 640) * 1e-3) / 3600:.1f}"
    assert hours["tinyimagenet-spectral-simclr"] == f"{steps * (0.1 + (validation + 64) * 1e-3 + 0.019 / 40) / 3600:.1f}"
    total = sum(2 * view * n * (3 * 3 * 64 + 640 + 64) for n in (100 * (50_000 // 32), steps))  # both objectives
    assert f"{total:.1e}" == "4.4e+18" in text and "cifar100 154 MB, tinyimagenet 1,229 MB" in text


def test_dry_run_of_full_runs_says_which_are_evaluated_anew(repo):
    own = "--full", "--own-size", "train", "retrieval"
    run(repo, *own, DATASETS="cifar100 tinyimagenet", OBJECTIVES="simclr")
    (repo / "fake").write_text(PYTHON.replace("cat; exit", "cat >plan; exit"))
    planned = lambda **more: run(repo, "--dry-run", *own, OBJECTIVES="simclr", **more) and {
        line.split("\t")[1]: tuple(line.split("\t")[::2][:2]) for line in (repo / "plan").read_text().splitlines() if line}
    assert {act for act, _ in planned().values()} == {"skip"}
    (repo / "runs/.steps/cifar100-osgd-simclr-32px").unlink()
    assert planned()["retrieval-cifar100-own"] == ("run", "its runs change")
    assert planned()["retrieval-tinyimagenet-own"][0] == "skip"


def test_setup_says_why(repo):
    (repo / ".venv/bin").mkdir(parents=True)
    (repo / ".venv/made-by-run_all.sh").touch()
    shutil.copy(repo / "fake", repo / ".venv/bin/python")  # a Python without the packages
    (repo / "requirements.txt").write_text("torch\n")

    def reason(**more):
        code, steps, error, calls = run(repo, "--dry-run", RUN_PYTHON="", **more)
        assert code == 0 and not error and bool(calls) == (steps["setup"][0] == "skip")
        return steps["setup"][1]
    assert reason() == "begun and not finished; so there are no estimates"
    shutil.copy(repo / "requirements.txt", repo / ".venv/complete")
    (repo / ".venv/cpu-only").touch()
    gpu = with_gpus(repo, "0")
    assert reason() == "the packages are there" and reason(**gpu) == "there is a GPU now; so there are no estimates"
    (repo / "requirements.txt").write_text("torch\nnumpy\n")
    assert reason() == "requirements.txt changed; so there are no estimates"
    shutil.rmtree(repo / ".venv")
    assert reason() == "first time; so there are no estimates"


def test_setup_without_packages_to_be_had(repo):
    """pip fails: one line more, exit code 2, and nothing that a later call takes for a whole .venv."""
    (repo / "requirements.txt").write_text("no-such-package-of-ours==1\n")
    code, steps, error, _ = run(repo, "setup", RUN_PYTHON="", PIP_NO_INDEX="1")
    assert code == 2 and steps["setup"] == ("run", "first time (some minutes)")
    assert error.splitlines()[-1].startswith("run_all.sh: error: pip could not install") and not (repo / ".venv/complete").exists()


def test_full_plan(repo):
    (repo / "fake").write_text(PYTHON.replace("cat; exit", "cat >plan; exit"))
    (repo / "data/CIFAR-100-C").mkdir(parents=True)
    run(repo, "--dry-run", "--full", "train", "retrieval")
    lines = [line.split("\t") for line in (repo / "plan").read_text().splitlines() if line]
    assert [line[1] for line in lines[:12]] == [f"{d}-{s}-{o}" for d in ("cifar100", "tinyimagenet") for o in ("simclr", "sogclr")
                                               for s in ("random", "osgd", "spectral")]
    assert "--corruptions official" in lines[12][4] and "--out results/cifar100" in lines[12][4]
    assert "--corruptions built-in" in lines[13][4]
    run(repo, "--dry-run", "--full", "--own-size", "train", SAMPLERS="refined", SEEDS="0 1", OBJECTIVES="simclr")
    lines = [line.split("\t") for line in (repo / "plan").read_text().splitlines() if line]
    assert [line[1] for line in lines] == [f"{d}-refined-simclr{s}{p}" for d, p in (("cifar100", "-32px"), ("tinyimagenet", "-64px"))
                                           for s in ("", "-seed1")]
    assert "--image-size 64 " in lines[3][4] and "--seed 1" in lines[3][4]


def planned_runs(repo, **more):
    done = subprocess.run(command("--dry-run", "train"), cwd=repo, capture_output=True, text=True, timeout=60,
                          env={name: value for name, value in environment(**more).items() if value is not None})
    assert done.returncode == 0 and not done.stderr
    return done.stdout.count("train.py")


def test_full_is_the_default_with_a_gpu_and_data(repo):
    (repo / "data/Tiny-ImageNet-C").mkdir(parents=True)
    gpu = with_gpus(repo, "0")
    assert len(run(repo, "train", **gpu)[3]) == 4
    for name in "tiny-imagenet-200-half.zip", "cifar-100-python.tar.gz":
        (repo / "data" / name).touch()
        assert planned_runs(repo, **gpu) == 12
        code, _, error, calls = run(repo, "train", "--quick", **gpu)
        assert code == 0 and not error and not calls
        (repo / "data" / name).unlink()


@pytest.mark.parametrize("says, code", [("NVIDIA-SMI has failed because it could not talk to the driver", 9), ("0", 0)])
def test_a_gpu_counts_where_it_answers(repo, says, code):
    (repo / "data/cifar-100-python").mkdir(parents=True)
    for visible, runs in ((None, 12), ("0", 12), ("-1", 4), ("", 4)):
        assert planned_runs(repo, **with_gpus(repo, visible, says, code)) == (4 if code else runs)


def test_a_run_that_is_still_trained_is_left_alone(repo):
    run(repo, "train")
    (repo / "lars.py").write_text("other\n")
    with open(repo / "runs/quick-osgd/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, steps, error, _ = run(repo, "train")
    assert code == 1 and "another process is training in runs/quick-osgd" in error and "failed: quick-osgd;" in error
    assert not (repo / "runs/quick-osgd.old-1").exists() and (repo / "runs/quick-random.old-1").exists()


def test_jobs_are_dealt_to_the_gpus(repo):
    code, _, _, calls = run(repo, "train", **with_gpus(repo, "3,5"), STEP_SECONDS="2")
    devices, times = zip(*(line.split() for line in (repo / "devices").read_text().splitlines()))
    assert code == 0 and len(calls) == 4
    assert sorted(devices) == ["3", "3", "5", "5"]
    assert int(times[1]) - int(times[0]) < 2e9 <= int(times[2]) - int(times[0])  # two at a time
    assert (repo / "runs/.steps/quick-random.log").exists()


@pytest.mark.parametrize("words, said", [
    (["trian"], "trian is no stage; stages: setup test synthetic train retrieval bench report"),
    (["train", "--fast"], "--fast is no option; options: --full"), (["--jobs", "0"], "--jobs 0: give a number"),
    (["--jobs"], "--jobs without a number: give"), (["--jobs", "99999999999999999999"], "--jobs 99999999999999999999: give"), (["--jobs", "two"], "--jobs two: give a number")])
def test_wrong_usage(repo, words, said):
    code, _, error, calls = run(repo, *words)
    assert code == 2 and not calls and said in error and error.count("\n") == 1 and not (repo / "runs").exists()


def test_data_dir_where_cd_prints(repo):
    (repo / "moved data").mkdir()
    assert f"--data-dir {repo / 'moved data'} " in "\n".join(run(repo, "train", DATA_DIR="moved data", CDPATH=".")[3])


def test_wrong_data_dir(repo):
    code, _, error, calls = run(repo, DATA_DIR="nowhere")
    assert code == 2 and not calls and error == "run_all.sh: error: DATA_DIR is no folder; make it, or leave it out for data/\n"


@pytest.mark.parametrize("words, more, said", [
    ((), {"DATASETS": "cifar100"}, "add --full"), (("--own-size",), {}, "add --full"),
    ((), {"RUN_PYTHON": "no-such-python"}, "RUN_PYTHON is no program")])
def test_what_does_not_go_together(repo, words, more, said):
    code, _, error, calls = run(repo, "--quick", *words, **more)
    assert code == 2 and not calls and said in error and error.count("\n") == 1


def test_a_venv_of_somebody_else_is_kept(repo):
    (repo / ".venv").mkdir()
    (repo / ".venv/mine").touch()
    done = subprocess.run(command("setup"), cwd=repo, capture_output=True, text=True, env=environment(RUN_PYTHON=""))
    assert done.returncode == 2 and ".venv is not of this script" in done.stderr and (repo / ".venv/mine").exists()


def test_help_names_every_stage_and_option(repo):
    done = subprocess.run(command("--help"), cwd=repo, capture_output=True, text=True, env=environment())
    assert done.returncode == 0
    for word in ("setup", "test", "synthetic", "train", "retrieval", "bench", "report", "--full", "--quick", "--dry-run", "--jobs N", "DATA_DIR"):
        assert word in done.stdout
    assert not (repo / "calls").exists()
