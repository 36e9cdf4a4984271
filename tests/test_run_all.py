"""Tests of run_all.sh, on a stand-in for Python that notes its calls.  Run: pytest tests/test_run_all.py"""
import os
import shlex
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
case $1$2 in
  -c*torch*) cat gpus 2>/dev/null || echo 0; exit ;;
  -c*version_info*) exec python3 "$@" ;;
esac
echo "$*" >>calls
echo "${CUDA_VISIBLE_DEVICES-none} ${OMP_NUM_THREADS-none} $(date +%s%N) ${PIP_USER-}${PIP_TARGET-}" >>devices
all=$* out="" name=""
while [ $# -gt 0 ]; do
  case $1 in --out | --out-dir) out=$2 ;; --experiment) name=$2 ;; esac
  shift
done
case $all in
  *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *+cpu*) mkdir -p .venv/lib/python3/site-packages/torch-2.14.1+cpu.dist-info ;;
  *--force*) [ -e fail-pip ] || rm -r .venv/lib ;;
  train.py*) mkdir -p "$out"; touch "$out/checkpoint.pt" ;;
esac
echo "it says $all"
for word in hang-* fail-*; do
  case $word-$all in
    hang-\** | fail-\**) ;;
    hang-*"${word#hang-}"*"${word#hang-}"*)
      trap 'echo saved; exit' INT TERM HUP
      while sleep 0.1; do :; done ;;
    fail-*"${word#fail-}"*"${word#fail-}"*) echo "it broke"; exit 1 ;;
  esac
done
case $all in
  -c*) sleep ${STEP_SECONDS:-0} ;;
  train.py*) sleep ${STEP_SECONDS:-0}; date +%s%N >"$out/result.json" ;;
  synthetic.py*) mkdir -p "$out"; for kind in json png; do echo "$all" >"$out/$name.$kind"; done ;;
  retrieval.py*) mkdir -p "$out"; for name in retrieval.json curve.png; do echo "$all" >"$out/$name"; done ;;
  bench.py*) mkdir -p results; echo "$all" >"$out" ;;
esac
"""
GIVEN = "DATA_DIR DATASETS SAMPLERS OBJECTIVES SEEDS TRAIN_FLAGS PYTHON OMP_NUM_THREADS CUDA_VISIBLE_DEVICES"
RUNS = [f"quick-{sampler}-dcl" for sampler in ("random", "osgd", "spectral", "refined")]
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
    kept = {name: value for name, value in os.environ.items() if name not in GIVEN.split()}
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
    return [" ".join(shlex.split(line)[1:]) for line in out.splitlines() if not line.startswith("==")]


def test_paths_are_from_where_the_caller_is(repo):
    (repo / "there/images").mkdir(parents=True)
    more = environment(repo, DATA_DIR="images", RUN_PYTHON="../fake")
    done = subprocess.run(["bash", "../run_all.sh", "train"], cwd=repo / "there", env=more, timeout=60)
    lines = (repo / "calls").read_text().splitlines()
    assert done.returncode == 0 and len(lines) == 4
    assert all(f" --data-dir {repo}/there/images --out-dir runs/" in line for line in lines)


def nothing_left_of(group):
    """Whether no process of a group lives on; ended ones may wait for their parent."""
    time.sleep(0.2)
    lines = subprocess.run("cat /proc/[0-9]*/stat", shell=True, capture_output=True, text=True).stdout
    stats = [line.rsplit(")", 1)[1].split() for line in lines.splitlines()]
    return not any(stat[2] == str(group) and stat[0] != "Z" for stat in stats)


def test_all_of_it_and_then_nothing(repo):
    code, out, _, calls = run(repo, "--jobs", "1")
    assert code == 0 and calls[0] == "synthetic.py --quick --experiment toy --out results/synthetic"
    assert [call.split()[0] for call in calls] == [
        "synthetic.py", *["train.py"] * 4, "retrieval.py", *["synthetic.py"] * 5, "bench.py", "report.py"]
    to_come = " ".join(RUNS[2:] + ["retrieval-quick"] + EXPERIMENTS[1:] + ["bench", "report"])
    assert f"minute 0: {RUNS[1]}; to come: {to_come} \n" in out
    assert calls[5].endswith(" ".join(f"runs/{name}" for name in sorted(RUNS)))
    assert "== runs/.logs/report.log ends: it says report.py\n" in out
    code, out, _, calls = run(repo)
    assert code == 0 and calls == ["report.py"] and out.count(" is there\n") == 12


def test_fresh_moves_away_and_starts_over(repo):
    run(repo)
    before = (repo / f"runs/{RUNS[0]}/result.json").read_text()
    lines = listed(repo, "--fresh")
    assert len(lines) == 13 and "--resume" not in " ".join(lines) and not list(repo.glob("old-*"))
    code, _, _, calls = run(repo, "--fresh", "train", "synthetic", "bench", SAMPLERS="random")
    assert code == 0 and len(calls) == 8 and not any("--resume" in call for call in calls)
    old, = repo.glob("old-*")
    assert (old / f"runs/{RUNS[0]}/result.json").read_text() == before
    assert (old / "results/synthetic/toy.png").exists() and (repo / f"runs/{RUNS[1]}/result.json").exists()
    assert (old / "results/samplers.json").exists() and (repo / "results/quick/curve.png").exists()


def test_quick_results_are_no_full_ones(repo):
    program(repo / "examples/code_search.py", "")
    calls = run(repo, "synthetic", "examples")[3]
    assert calls[-3] == "-m pip install -q -r requirements-examples.txt"
    assert set(calls[-2:]) == {"examples/code_search.py", "-m pytest -q examples"}
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
    assert code == 1 and "\nit broke\n" in out and (repo / log).read_text().endswith("it broke\n")
    assert error.endswith(f"failed, as told in {log}; the others are done\n")
    evaluated, = (call for call in calls if call.startswith("retrieval.py"))
    assert calls[-1] == "report.py" and RUNS[1] not in evaluated and RUNS[3] in evaluated
    (repo / "fail-osgd").unlink()
    code, _, _, calls = run(repo)
    assert code == 0 and len(calls) == 3 and calls[0].endswith("--resume") and RUNS[1] in calls[1]


def test_the_tests_in_two_processes(repo):
    first, second = listed(repo, "test")
    apart = first.removeprefix("-m pytest -q ").split()
    assert second == "-m pytest -q test_samplers.py tests " + " ".join(f"--ignore={name}" for name in apart)
    assert {f"tests/{path.name}" for path in (HERE / "tests").glob("test_*.py")} > set(apart)
    (repo / "fail---ignore").touch()
    code, out, error, calls = run(repo, "test", "--jobs", "1")
    assert code == 1 and len(calls) == 2 and f"test-1.log ends: it says -m pytest -q {apart[0]}" in out
    assert "failed, as told in runs/.logs/test-2.log;" in error


@pytest.mark.parametrize("where, kill, kind, code, jobs", [
    ("toy", os.killpg, signal.SIGINT, 130, "1"), ("osgd", os.killpg, signal.SIGINT, 130, "2"),
    ("osgd", os.kill, signal.SIGTERM, 143, "2"), ("osgd", os.killpg, signal.SIGHUP, 129, "1"),
    ("osgd", os.killpg, signal.SIGKILL, -9, "1")])
def test_interrupted_and_gone_on_with(repo, where, kill, kind, code, jobs):
    (repo / f"hang-{where}").touch()
    (repo / "calls").write_text("")
    process = subprocess.Popen(["bash", "run_all.sh", "--jobs", jobs], cwd=repo, env=environment(repo),
                               start_new_session=True, text=True, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    give_up = time.time() + 20
    while where not in (repo / "calls").read_text():
        assert time.time() < give_up
        time.sleep(0.02)
    time.sleep(0.1)
    kill(process.pid, kind)  # killpg: as the terminal does
    error = process.communicate(timeout=5)[1]
    assert process.returncode == code and nothing_left_of(process.pid)
    if kind != signal.SIGKILL:
        log, = (repo / "runs/.logs").glob(f"*{where}*")
        assert log.read_text().endswith("saved\n") and "interrupted; the same command goes" in error
    (repo / f"hang-{where}").unlink()
    code, out, _, calls = run(repo)
    assert code == 0 and where in calls[0] and calls[0].endswith("--resume") == (where == "osgd")


def test_the_papers_runs(repo):
    (repo / "data/CIFAR-100-C").mkdir(parents=True)
    lines = listed(repo, "--full", "train", "retrieval")
    assert [lines.pop(i).split()[-3:] for i in (0, 8)] == [
        [name, "train", "data"] for name in ("cifar100", "tinyimagenet")]  # decoded before the runs
    assert [line.split()[-1] for line in lines[:16]] == [
        f"runs/{d}-{s}-{o}" for d in ("cifar100", "tinyimagenet") for o in ("simclr", "sogclr")
        for s in ("random", "osgd", "spectral-released", "spectral")]
    assert ["--embeddings list" in line for line in lines[:16]] == 4 * [False, True, True, True]
    assert "--corruptions official" in lines[16] and "--out results/cifar100 " in lines[16]
    assert "--corruptions built-in" in lines[17]
    chosen = {"SAMPLERS": "refined", "OBJECTIVES": "simclr", "SEEDS": "0 1", "TRAIN_FLAGS": "--epochs 3"}
    lines = listed(repo, "--full", "--own-size", "train", "retrieval", **chosen)
    del lines[3], lines[0]  # which decode
    assert [line.split()[-1] for line in lines[:4]] == [
        f"runs/own-{d}-refined-simclr{s}" for d in ("cifar100", "tinyimagenet") for s in ("", "-1")]
    assert "--seed 1 --image-size 64 --epochs 3 --data-dir data " in lines[3]
    assert lines[4].endswith("--out results/own-cifar100 runs/own-cifar100-*")
    for name in "-random-dcl", "-random-dcl-1", "-random-dcl-seed0", "-random-dcl-seed1":  # two of train.py's
        (repo / f"runs/cifar100{name}").mkdir(parents=True)
        (repo / f"runs/cifar100{name}/result.json").write_text("1")
    words = listed(repo, "--full", "retrieval")[0].split()
    assert {x for x in words if "runs/" in x} == {f"runs/cifar100-random-dcl{s}" for s in ("", "-1")}


@pytest.mark.parametrize("name", ["tiny-imagenet-200-half.zip", "cifar-100-python.tar.gz"])
def test_full_is_the_default_with_a_gpu_and_data(repo, name):
    more, folder = {"DATA_DIR": "more [1] data"}, repo / "more [1] data"
    folder.mkdir()
    (repo / "gpus").write_text("2")
    assert len(listed(repo, "train", **more)) == 4
    _, out, _, _ = run(repo, "--dry-run", "train", **more)
    assert shlex.split(out.splitlines()[1])[-3] == str(folder)  # after --data-dir, to be pasted
    (folder / name).touch()
    assert len(listed(repo, "train", **more)) == 18 and len(listed(repo, "train", "--quick", **more)) == 4
    _, out, _, calls = run(repo, "train", SAMPLERS="random", DATASETS="cifar100", STEP_SECONDS="1", **more)
    assert out.startswith("== The paper's twelve runs and four: about 27 hours")
    assert calls[0].endswith(f"; data.load(*sys.argv[1:]) cifar100 train {folder}")
    assert f"--data-dir {folder} --out" in calls[1]
    times = [int(line.split()[2]) for line in (repo / "devices").read_text().splitlines()]
    assert times[1] - times[0] > 1e9 > times[2] - times[1]  # decoded first, then side by side
    (repo / "gpus").write_text("0")  # as PyTorch says
    assert len(listed(repo, "train", **more)) == 4


@pytest.mark.parametrize("gpus, devices, threads", [("0", "none", "1"), ("2", "3 5", "none")])
def test_a_run_a_gpu_or_a_run_a_core_of_one_thread(repo, gpus, devices, threads):
    (repo / "gpus").write_text(gpus)
    program(repo / "nproc", "#!/bin/sh\necho 2\n")
    more = {"CUDA_VISIBLE_DEVICES": "3,5"} if gpus == "2" else {}
    assert run(repo, "train", STEP_SECONDS="1", **more)[0] == 0
    on, each, times, *_ = zip(*(line.split() for line in (repo / "devices").read_text().splitlines()))
    assert {*on} == {*devices.split()} and {*each} == {threads} and len(on) == 4
    assert int(times[1]) - int(times[0]) < 1e9 <= int(times[2]) - int(times[0])  # two at a time


def test_setup_and_a_setup_that_fails(repo):
    mine = {"RUN_PYTHON": "", "PYTHON": "./fake"}
    (repo / "fail-pip").touch()
    code, _, error, _ = run(repo, "setup", **mine)
    assert code == 2 and error.count("\n") == 1 and "no packages, as told above" in error
    (repo / "fail-pip").unlink()
    (repo / ".venv/bin/python").unlink()
    (repo / ".venv/bin/python").symlink_to("/no/such/python")  # of a Python that is gone
    code, _, error, calls = run(repo, "setup", PIP_USER="1", PIP_TARGET="/elsewhere", **mine)
    assert code == 0 and not error and calls == [
        "-m venv .venv", "-m pip install -q torch==2.14.1+cpu torchvision==0.29.1+cpu",
        "-m pip install -q -r requirements.txt"]
    assert {line.split()[-1] for line in (repo / "devices").read_text().splitlines()} == {"0"}
    assert not run(repo, "setup", **mine)[3]
    (repo / "requirements.txt").write_text("torch\nnumpy\n")
    program(repo / "nvidia-smi", "#!/bin/sh\necho NVIDIA-SMI has failed\n")
    assert len(run(repo, "setup", **mine)[3]) == 3 and not run(repo, "setup", **mine)[3]


def test_a_gpu_that_came_after_the_setup(repo):
    mine = {"RUN_PYTHON": "", "PYTHON": "./fake"}
    run(repo, "setup", **mine)
    program(repo / "nvidia-smi", "#!/bin/sh\necho GPU 0: one\n")
    anew = ["-m venv .venv", "-m pip install -q --force-reinstall -r requirements.txt"]
    (repo / "fail-pip").touch()
    assert run(repo, "setup", **mine)[::3] == (2, anew)
    (repo / "fail-pip").unlink()
    code, out, _, calls = run(repo, "setup", **mine)
    assert code == 0 and calls == anew
    assert out.startswith("== setup: packages into .venv, some minutes; anew, as there is a GPU now\n")
    (repo / ".venv/lib/python3/site-packages/torch-2.14.1+cpu.dist-info").mkdir(parents=True)
    assert not run(repo, "setup", **mine)[3]  # of an index that has no other: not anew each time
    (repo / "requirements.txt").write_text("torch\nnumpy\n")
    assert run(repo, "setup", **mine)[3] == ["-m venv .venv", "-m pip install -q -r requirements.txt"]


def test_no_venv_can_be_made(repo):
    code, _, error, _ = run(repo, "setup", RUN_PYTHON="", PYTHON="/bin/false")
    assert code == 2 and error.count("\n") == 1 and "install python3-venv, or name one" in error
    shutil.copytree(repo, repo / "a:b")
    code, _, error, _ = run(repo / "a:b", "setup", RUN_PYTHON="")
    assert code == 2 and error.count("\n") == 1 and "in a path with a colon: rename a folder of" in error


@pytest.mark.parametrize("words, more, said", [
    ("trian", {}, "trian is no stage and no option"), ("train --fast", {}, "--fast is no stage"),
    ("train", {"SEEDS": "0 x"}, "SEEDS=0 x: give whole numbers"),
    *((f"--jobs {n}", {}, f"--jobs {n}: give 1 or more") for n in ("", "0", "two", "-1")),
    ("", {"DATA_DIR": "nowhere"}, "nowhere is no folder; make it"), ("--own-size", {}, "add --full"),
    ("", {"DATASETS": "cifar100"}, "add --full"), ("", {"RUN_PYTHON": "/bin/false"}, "cannot import torch")])
def test_one_line_and_exit_code_2(repo, words, more, said):
    code, _, error, calls = run(repo, *words.split(), **more)
    assert code == 2 and not calls and said in error and error.count("\n") == 1
    assert not (repo / "runs").exists()


def test_help_names_every_stage_and_option(repo):
    code, out, error, _ = run(repo, "--help")
    assert code == 0 and not error
    for word in ("setup test synthetic train bench retrieval report examples --full --quick --own-size "
                 "--fresh --jobs --dry-run RUN_PYTHON " + GIVEN.split("OMP")[0]).split():
        assert word in out


def test_what_is_measured_on_a_gpu(repo):
    """Four runs side by side, which go on when called again, and are evaluated once all have ended."""
    (repo / "results").mkdir()
    shutil.copy(HERE / "results/gpu.sh", repo / "results")
    broken = repo / "fail-sampler spectral"
    for attempt in range(2):
        (repo / "calls").write_text("")
        if attempt == 0:
            broken.touch()
        else:
            broken.unlink()
        more = environment(repo, PYTHON="./fake", FLAGS="--device x")
        subprocess.run(["bash", "results/gpu.sh", "runs", "out", "."], cwd=repo, timeout=60, env=more,
                       capture_output=True)
        calls = (repo / "calls").read_text().splitlines()
        trained = [call for call in calls if call.startswith("train.py")]
        assert len(trained) == 4 and all(" --device x " in call for call in trained)
        assert all(call.endswith("--resume") == bool(attempt) for call in trained)
        assert [call.split()[0] for call in calls if "retrieval" in call] == ["retrieval.py"] * attempt
    done = subprocess.run(["bash", "results/gpu.sh"], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 2 and "gpu.sh runs OUT DATA" in done.stdout
