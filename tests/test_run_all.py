"""Tests of run_all.sh, on a stand-in for Python that notes its calls.  Run: pytest tests/test_run_all.py"""
import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
# Writes what the real commands would; a file fail-WORD lets the commands that hold the word fail, hang-WORD
# lets them hang once their checkpoint is written; PyTorch has as many GPUs as the file gpus says.
PYTHON = r"""#!/usr/bin/env bash
case $1$2 in -c*torch*) cat gpus 2>/dev/null || echo 0; exit ;; -c*) exec python3 "$@" ;; esac
echo "$*" >>calls
echo "${CUDA_VISIBLE_DEVICES-none} ${OMP_NUM_THREADS-none} $(date +%s%N) ${PIP_USER-}${PIP_TARGET-}" >>devices
all=$* out="" name=""
while [ $# -gt 0 ]; do
  case $1 in --out | --out-dir) out=$2 ;; --experiment) name=$2 ;; esac
  shift
done
case $all in
  *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  train.py*) mkdir -p "$out"; touch "$out/checkpoint.pt" ;;
esac
echo "it says $all"
for word in hang-* fail-*; do
  case $word-$all in
    hang-\**) ;;
    hang-*"${word#hang-}"*"${word#hang-}"*)
      trap 'echo saved; exit' INT TERM HUP
      while sleep 0.1; do :; done ;;
    fail-*"${word#fail-}"*"${word#fail-}"*) echo "it broke"; exit 1 ;;
  esac
done
case $all in
  train.py*) sleep ${STEP_SECONDS:-0}; date +%s%N >"$out/result.json" ;;
  synthetic.py*) mkdir -p "$out"; for kind in json png; do echo "$all" >"$out/$name.$kind"; done ;;
  retrieval.py*) mkdir -p "$out"; for name in retrieval.json curve.png; do echo "$all" >"$out/$name"; done ;;
  bench.py*) mkdir -p results; echo "$all" >"$out" ;;
esac
"""
SETTINGS = ("DATA_DIR DATASETS SAMPLERS OBJECTIVES SEEDS TRAIN_FLAGS PYTHON OMP_NUM_THREADS "
            "CUDA_VISIBLE_DEVICES")
RUNS = [f"quick-{sampler}" for sampler in ("random", "osgd", "spectral", "refined")]
EXPERIMENTS = ["toy", "angle", "optima", "convergence", "subsets", "histograms"]


@pytest.fixture
def repo(tmp_path):
    shutil.copy(HERE / "run_all.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("torch\n")
    program(tmp_path / "fake", PYTHON)
    return tmp_path


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def environment(repo, **more):
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS.split()}
    return kept | {"RUN_PYTHON": "./fake", "PATH": f"{repo}:{os.environ['PATH']}"} | more


def run(repo, *words, **more):
    """Exit code, stdout, stderr, and what was asked of Python."""
    (repo / "calls").write_text("")
    (repo / "devices").write_text("")
    done = subprocess.run(["bash", "run_all.sh", *words], cwd=repo, env=environment(repo, **more), timeout=60,
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr, (repo / "calls").read_text().splitlines()


def listed(repo, *words, **more):
    """The commands that --dry-run lists."""
    code, out, error, calls = run(repo, "--dry-run", *words, **more)
    assert code == 0 and not error and not calls
    return [line.split(" ", 1)[1] for line in out.splitlines() if not line.startswith("==")]


def started(repo, words, until, **more):
    """run_all.sh in a process group of its own, once the calls of Python hold `until`."""
    (repo / "calls").write_text("")
    process = subprocess.Popen(["bash", "run_all.sh", *words], cwd=repo, env=environment(repo, **more),
                               start_new_session=True, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    give_up = time.time() + 20
    while until not in (repo / "calls").read_text():
        assert time.time() < give_up
        time.sleep(0.02)
    time.sleep(0.1)
    return process


def nothing_left_of(group):
    """Whether all processes of a process group end within seconds; ended ones may wait for their parent."""
    give_up = time.time() + 5
    while time.time() < give_up:
        stats = [path.read_text().rsplit(")", 1)[1].split() for path in Path("/proc").glob("[0-9]*/stat")]
        if not any(stat[2] == str(group) and stat[0] != "Z" for stat in stats):
            return True
        time.sleep(0.05)
    return False


# ------------------------------------------------------------------------------- what is done, and again
def test_all_of_it_and_then_nothing(repo):
    code, out, _, calls = run(repo, "--jobs", "1")
    assert code == 0
    assert calls[0] == "synthetic.py --quick --experiment toy --out results/synthetic"  # the first picture
    assert [call.split()[0] for call in calls] == [
        "synthetic.py"] * 6 + ["train.py"] * 4 + ["bench.py", "retrieval.py", "report.py"]
    to_come = " ".join(EXPERIMENTS[2:] + RUNS + ["bench", "retrieval-quick", "report"])
    assert f"minute 0: angle; to come: {to_come}\n" in out
    assert "toy: it says synthetic.py" in out and "report: it says report.py" in out
    assert re.findall("runs/([^ ]*)", calls[-2]) == sorted(RUNS)
    code, out, _, calls = run(repo)
    assert code == 0 and calls == ["report.py"] and out.count("== skip") == 12
    assert "== skip toy: results/synthetic/toy.json is there" in out


def test_fresh_moves_away_and_starts_over(repo):
    run(repo)
    before = (repo / f"runs/{RUNS[0]}/result.json").read_text()
    (repo / "results/report.html").touch()
    assert len(listed(repo, "--fresh")) == 13 and not list(repo.glob("old-*"))
    assert not any("--resume" in line for line in listed(repo, "--fresh"))
    code, _, _, calls = run(repo, "--fresh", "train", "synthetic", SAMPLERS="random")
    assert code == 0 and len(calls) == 7 and not any("--resume" in call for call in calls)
    old, = repo.glob("old-*")
    assert (old / f"runs/{RUNS[0]}/result.json").read_text() == before
    assert (old / "results/synthetic/toy.png").exists() and (repo / f"runs/{RUNS[1]}/result.json").exists()
    assert (repo / f"runs/{RUNS[0]}/result.json").read_text() != before
    (repo / f"runs/{RUNS[1]}/.lock").touch()
    with open(repo / f"runs/{RUNS[1]}/.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, error, calls = run(repo, "--fresh", "train")
    assert code == 2 and not calls and f"a process is training in runs/{RUNS[1]}; end it first\n" in error


def test_runs_are_evaluated_anew_when_there_are_new_ones(repo):
    run(repo, SAMPLERS="random")
    assert "retrieval-quick: results/quick/retrieval.json is there" in run(repo, "retrieval")[1]
    calls = run(repo, "train", "retrieval", SAMPLERS="random osgd")[3]
    assert [call.split()[0] for call in calls] == ["train.py", "retrieval.py"]
    assert f"runs/{RUNS[1]} runs/{RUNS[0]}" in calls[1]


def test_quick_results_are_no_full_ones(repo):
    run(repo, "synthetic")
    assert listed(repo, "--full", "synthetic") == [
        f"synthetic.py --experiment {name} --out results/synthetic"
        for name in EXPERIMENTS + ["temperature", "scaling"]]
    run(repo, "--full", "synthetic")
    assert listed(repo, "--full", "synthetic") == listed(repo, "--quick", "synthetic") == []


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_failing_run_is_named_and_the_others_go_on(repo, jobs):
    (repo / "fail-osgd").touch()
    code, out, error, calls = run(repo, "--jobs", jobs)
    log = f"runs/.logs/{RUNS[1]}.log"
    assert code == 1 and f"FAILED {RUNS[1]}; its output: {log}\n" in error
    assert error.endswith(f"failed: {RUNS[1]}; the others are done\n")
    assert f"{RUNS[1]}: it broke" in out and (repo / log).read_text().endswith("it broke\n")
    assert calls[-1] == "report.py" and RUNS[1] not in calls[-2] and RUNS[3] in calls[-2]
    (repo / "fail-osgd").unlink()
    code, _, _, calls = run(repo)
    assert code == 0 and len(calls) == 3 and calls[0].endswith("--resume") and RUNS[1] in calls[1]


def test_a_lost_reader_costs_no_run(repo):
    (repo / "calls").write_text("")
    subprocess.run("bash run_all.sh | head -n 1", shell=True, cwd=repo, env=environment(repo), timeout=60)
    give_up = time.time() + 20
    while "report.py" not in (repo / "calls").read_text():
        assert time.time() < give_up
        time.sleep(0.1)
    assert all((repo / f"runs/{name}/result.json").exists() for name in RUNS)


# ------------------------------------------------------------------------------- the tests
def test_each_test_file_is_in_one_of_the_two_processes(repo):
    first, second = listed(repo, "test")
    apart = first.removeprefix("-m pytest -q ").split()
    assert second == "-m pytest -q test_samplers.py tests " + " ".join(f"--ignore={name}" for name in apart)
    names = {f"tests/{path.name}" for path in (HERE / "tests").glob("test_*.py")}
    assert names >= set(apart) and [path.name for path in HERE.glob("test_*.py")] == ["test_samplers.py"]


@pytest.mark.parametrize("which", ["fail-train.py tests", "fail---ignore"])
def test_tests_that_fail(repo, which):
    code, out, _, calls = run(repo, "test")
    assert code == 0 and len(calls) == 2 and all(f"\nit says {call}\n" in out for call in calls)
    (repo / which).touch()
    code, out, error, calls = run(repo, "test")
    assert code == 1 and len(calls) == 2 and out.count("it says") == 2 and error.count("FAILED") == 1
    assert f"FAILED test-{'2' if 'ignore' in which else '1'}; its output:" in error


# ------------------------------------------------------------------------------- interruptions
@pytest.mark.parametrize("where, kind, code, jobs", [
    ("histograms", signal.SIGINT, 130, "1"), ("osgd", signal.SIGINT, 130, "2"),
    ("osgd", signal.SIGTERM, 143, "2"), ("osgd", signal.SIGHUP, 129, "1"), ("osgd", signal.SIGKILL, -9, "1")])
def test_interrupted_and_gone_on_with(repo, where, kind, code, jobs):
    (repo / f"hang-{where}").touch()
    process = started(repo, ["--jobs", jobs], where)
    os.killpg(process.pid, kind)  # as the terminal does
    output = process.communicate(timeout=5)[0]
    assert process.returncode == code
    assert kind == signal.SIGKILL or ": saved\n" in output and "interrupted; the same command goes" in output
    assert nothing_left_of(process.pid)
    assert "report.py" not in (repo / "calls").read_text()
    (repo / f"hang-{where}").unlink()
    code, out, _, calls = run(repo)
    assert code == 0 and where in calls[0] and calls[0].endswith("--resume") == (where == "osgd")
    assert "skip toy" in out


@pytest.mark.parametrize("stage, word", [("train", "osgd"), ("test", "pytest"), ("setup", "pip")])
def test_a_signal_to_the_script_alone_ends_its_commands(repo, stage, word):
    (repo / f"hang-{word}").touch()
    more = {"RUN_PYTHON": "", "PYTHON": "./fake"} if stage == "setup" else {}
    process = started(repo, [stage], word, **more)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=5)
    assert process.returncode == 143 and not (repo / ".venv/complete").exists()
    assert nothing_left_of(process.pid)


# ------------------------------------------------------------------------------- what is to be run
def test_dry_run_runs_nothing(repo):
    before = {*repo.rglob("*")}
    assert len(listed(repo)) == 13
    assert {*repo.rglob("*")} - before == {repo / "calls", repo / "devices"}


def test_the_papers_runs(repo):
    (repo / "data/CIFAR-100-C").mkdir(parents=True)
    lines = listed(repo, "--full", "train", "retrieval")
    assert [line.split()[-1] for line in lines[:12]] == [
        f"runs/{d}-{s}-{o}" for d in ("cifar100", "tinyimagenet") for o in ("simclr", "sogclr")
        for s in ("random", "osgd", "spectral")]
    assert "--corruptions official" in lines[12] and "--out results/cifar100 " in lines[12]
    assert "--corruptions built-in" in lines[13]
    lines = listed(repo, "--full", "--own-size", "train", "retrieval", SAMPLERS="refined", SEEDS="0 1",
                   OBJECTIVES="simclr", TRAIN_FLAGS="--epochs 3")
    assert [line.split()[-1] for line in lines[:4]] == [
        f"runs/own-{d}-refined-simclr{s}" for d in ("cifar100", "tinyimagenet") for s in ("", "-seed1")]
    assert "--seed 1 --image-size 64 --epochs 3 --data-dir data " in lines[3]
    assert "--out results/own-cifar100 $(dirname runs/own-cifar100-*/result.json)" in lines[4]


@pytest.mark.parametrize("folder", ["data", "more [1] data"])
def test_full_is_the_default_with_a_gpu_and_data(repo, folder):
    more = {} if folder == "data" else {"DATA_DIR": folder}
    (repo / folder).mkdir()
    (repo / "gpus").write_text("1")
    assert len(listed(repo, "train", **more)) == 4
    for name in "tiny-imagenet-200-half.zip", "cifar-100-python.tar.gz":
        (repo / folder / name).touch()
        assert len(listed(repo, "train", **more)) == 12 and len(listed(repo, "train", "--quick", **more)) == 4
        first = run(repo, "--dry-run", "train", **more)[1].splitlines()[0]
        assert "twelve take about 20 hours of one GPU" in first and "--quick takes ten minutes" in first
        (repo / "gpus").write_text("0")  # as PyTorch says
        assert len(listed(repo, "train", **more)) == 4
        (repo / "gpus").write_text("1")
        (repo / folder / name).unlink()
    run(repo, "train", SAMPLERS="random", **more)
    assert f"--data-dir {repo / folder if more else 'data'} --out" in (repo / "calls").read_text()


@pytest.mark.parametrize("says, code, runs", [
    ("GPU 0: NVIDIA A100 (UUID: GPU-1)", 0, 12), ("No devices were found", 0, 4), ("It has failed", 9, 4)])
def test_before_pytorch_is_there_the_driver_is_asked(repo, says, code, runs):
    (repo / "data/cifar-100-python").mkdir(parents=True)
    program(repo / "nvidia-smi", f"#!/bin/sh\necho '{says}'; exit {code}\n")
    assert len(listed(repo, "train", RUN_PYTHON="")) == runs
    assert len(listed(repo, "train", RUN_PYTHON="", CUDA_VISIBLE_DEVICES="NoDevFiles")) == 4


def test_jobs_are_dealt_to_the_gpus(repo):
    (repo / "gpus").write_text("2")
    code, _, _, calls = run(repo, "train", CUDA_VISIBLE_DEVICES="3,5", STEP_SECONDS="1")
    devices, threads, times, *_ = zip(*(line.split() for line in (repo / "devices").read_text().splitlines()))
    assert code == 0 and sorted(devices) == ["3", "3", "5", "5"] and {*threads} == {"none"}
    assert int(times[1]) - int(times[0]) < 1e9 <= int(times[2]) - int(times[0])  # two at a time


def test_without_a_gpu_a_run_a_core_and_a_thread_a_run(repo):
    program(repo / "nproc", "#!/bin/sh\necho 4\n")
    code, _, _, calls = run(repo, "train", STEP_SECONDS="1")
    devices, threads, times, *_ = zip(*(line.split() for line in (repo / "devices").read_text().splitlines()))
    assert code == 0 and len(calls) == 4 and {*threads} == {"1"} and int(max(times)) - int(min(times)) < 1e9


# ------------------------------------------------------------------------------- the packages
def test_setup_when_it_is_needed(repo):
    def needed(**more):
        return "== setup" in run(repo, "--dry-run", RUN_PYTHON="", **more)[1]
    assert needed()
    program(repo / ".venv/bin/python", PYTHON)
    assert needed()  # half-made
    shutil.copy(repo / "requirements.txt", repo / ".venv/complete")
    assert not needed()
    program(repo / "nvidia-smi", "#!/bin/sh\necho GPU 0: one\n")
    assert not needed()
    (repo / ".venv/cpu-only").touch()
    assert needed()
    (repo / "nvidia-smi").unlink()
    assert not needed()
    (repo / "requirements.txt").write_text("torch\nnumpy\n")
    assert needed()


def test_setup_and_a_setup_that_fails(repo):
    (repo / "fail-pip").touch()
    code, _, error, _ = run(repo, "setup", RUN_PYTHON="", PYTHON="./fake")
    assert code == 2 and not (repo / ".venv/complete").exists()
    assert error.splitlines()[-1].startswith("run_all.sh: error: pip could not install the packages, for the")
    (repo / "fail-pip").unlink()
    user = {"PIP_USER": "1", "PIP_TARGET": "/elsewhere"}  # would keep the packages out of .venv
    code, _, error, calls = run(repo, "setup", RUN_PYTHON="", PYTHON="./fake", **user)
    assert code == 0 and not error and calls == [
        "-m venv .venv", "-m pip install torch==2.14.1+cpu torchvision==0.29.1+cpu",
        "-m pip install -r requirements.txt"]
    assert {line.split()[-1] for line in (repo / "devices").read_text().splitlines()} == {"0"}
    assert (repo / ".venv/complete").read_text() == "torch\n" and (repo / ".venv/cpu-only").exists()
    assert not run(repo, "setup", RUN_PYTHON="", PYTHON="./fake")[3]


def test_no_venv_can_be_made(repo):
    for text in "exit 1", "echo 'no module named ensurepip' >&2; exit 1":
        program(repo / "old", f"#!/bin/sh\n{text}\n")
        code, _, error, _ = run(repo, "setup", RUN_PYTHON="", PYTHON="./old")
        assert code == 2 and error.count("\n") == 1 and "apt-get install python3-venv, or name one" in error
    (repo / ".venv").mkdir()
    (repo / ".venv/mine").touch()
    code, _, error, _ = run(repo, "setup", RUN_PYTHON="")
    assert code == 2 and ".venv is not of this script" in error and (repo / ".venv/mine").exists()
    shutil.copytree(repo, repo / "a:b")
    code, _, error, _ = run(repo / "a:b", "setup", RUN_PYTHON="")
    assert code == 2 and error.count("\n") == 1 and "in a path with a colon: rename a folder of" in error


def test_the_examples(repo):
    (repo / "examples").mkdir()
    for name in "code_search.py", "test_examples.py":
        (repo / "examples" / name).touch()
    program(repo / ".venv/bin/python", PYTHON)
    shutil.copy(repo / "requirements.txt", repo / ".venv/complete")
    assert run(repo, "--jobs", "1", "examples", RUN_PYTHON="")[3] == [
        "-m pip install -r requirements-examples.txt", "examples/code_search.py", "-m pytest -q examples"]


# ------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("words, more, said", [
    ("trian", {}, "trian is no stage; stages: setup test synthetic train"),
    ("train --fast", {}, "--fast is no option; options: --full"), ("--jobs", {}, "--jobs : give 1 to 999"),
    *((f"--jobs {n}", {}, f"--jobs {n}: give 1 to 999") for n in ("0", "two", "1000", "-1")),
    ("", {"DATA_DIR": "nowhere"}, "/nowhere is no folder; make it"), ("--own-size", {}, "add --full"),
    ("", {"DATA_DIR": "~nosuchuser/x"}, "~nosuchuser/x is no folder"),
    ("", {"DATASETS": "cifar100"}, "add --full"),
    ("", {"RUN_PYTHON": "no-such-python"}, "no-such-python is no program"),
    ("", {"RUN_PYTHON": "/bin/false"}, "/bin/false cannot import torch: give it requirements.txt")])
def test_one_line_and_exit_code_2(repo, words, more, said):
    code, _, error, calls = run(repo, *words.split(), **more)
    assert code == 2 and not calls and said in error and error.count("\n") == 1
    assert not (repo / "runs").exists()


def test_paths_are_as_the_caller_sees_them(repo):
    (repo / "more").mkdir()
    (repo / "run").mkdir()
    shutil.move(repo / "run_all.sh", repo / "run")
    done = subprocess.run(["bash", "run/run_all.sh", "--dry-run", "train"], cwd=repo, capture_output=True,
                          text=True, env=environment(repo, DATA_DIR="more", CDPATH="."))
    assert done.stdout.startswith(f"{repo}/./fake train.py") and f"--data-dir {repo}/more " in done.stdout


def test_help_names_every_stage_and_option(repo):
    done = subprocess.run(["bash", "run_all.sh", "--help"], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    for word in ("setup test synthetic train bench retrieval report examples --full --quick --own-size "
                 "--fresh --jobs --dry-run RUN_PYTHON " + SETTINGS.split("OMP")[0]).split():
        assert word in done.stdout
