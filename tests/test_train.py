"""Training: what is chosen, saved, resumed, told and refused.  Run: python -m pytest tests/test_train.py"""
import fcntl
import json
import multiprocessing
import os
import pwd
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import cli
import runfolder
import train
from rivals import released_spectral
from samplers import ContrastiveBatchSampler, batch_losses


def quick(leaves, out, *flags):
    """Command line of a run of 3 epochs of 5 steps, saved every quarter of a second besides."""
    return ["--data-dir", leaves, "--out-dir", str(out), "--limit", "40", "--batch-size", "8",
            "--epochs", "3", "--warmup-epochs", "1", "--log-every", "2", "--checkpoint-minutes", "0.004",
            *flags]


SELDOM = "--checkpoint-minutes", "10"  # for runs that are not killed: writing 90 MB takes longer than a step

# A server that has imported all once and forks a child for each run: a child starts in milliseconds.
FOLDERS = *map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH", "")
os.environ["PYTHONPATH"] = os.pathsep.join(FOLDERS)
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train", "torch.utils.tensorboard", "test_train"])


def child(argv, output, prepare=None, *arguments):
    """A run of train.py whose output goes into a file; prepare(*arguments) is called before it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore it
    torch.set_num_threads(1)
    train.VALIDATION_IMAGES = 64  # most of these runs' time otherwise
    os.fsync = lambda _: None  # a killed process loses nothing that it wrote, and disks take most of the time
    sys.stdout = sys.stderr = open(output, "a")
    if prepare:
        prepare(*arguments)
    sys.exit(cli.run(train.main, "train.py", argv))


def start(argv, output, *prepare):
    process = PROCESSES.Process(target=child, args=(argv, output, *prepare))
    process.start()
    return process


def finish(process):
    process.join(120)
    return process.exitcode


def wait_for(what, process):
    while not what() and process.is_alive():
        time.sleep(0.005)


def text(path):
    return path.read_text() if path.exists() else ""


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def equal(a, b):
    """Whether two checkpoints hold the same bits, times aside."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if not str(k).startswith("seconds"))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ------------------------------------------------------------------------------------------------ saved
@pytest.mark.parametrize("sampler, objective, unselected", [  # epochs of random batches
    ("random", "sogclr", 3), ("osgd --k 5 --q 3", "simclr", 0), ("spectral --k 4", "sogclr", 0),
    ("refined --k 4", "dcl", 1), ("refined --k 4 --embeddings fresh", "simclr", 0),
    ("spectral --k 4 --embeddings list", "hcl", 0)])
def test_killed_and_resumed_run_is_the_same_bit_for_bit(sampler, objective, unselected, leaves, tmp_path):
    flags = ["--sampler", *sampler.split(), "--objective", objective]
    whole = start(quick(leaves, tmp_path / "whole", *flags, *SELDOM), tmp_path / "whole.txt")
    dice, killed, argv = random.Random(sampler), 0, quick(leaves, tmp_path / "parts", *flags)
    saved = tmp_path / "parts" / "checkpoint.pt"
    for attempt in range(3):
        process = start(argv + ["--resume"] * (attempt > 0), tmp_path / "parts.txt")
        if attempt < 2:
            before = saved.stat().st_mtime_ns if saved.exists() else 0
            wait_for(lambda: saved.exists() and saved.stat().st_mtime_ns > before, process)
            time.sleep(dice.uniform(0, 0.2))
            process.kill()
            killed += finish(process) == -signal.SIGKILL
        else:
            assert finish(process) == 0, text(tmp_path / "parts.txt")
    assert finish(whole) == 0 and killed  # the last one may come too late
    a, b = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert a["journal"]["step"] == 15 and equal(a, b) and not list((tmp_path / "parts").glob(".*.tmp"))
    logs = [[{k: v for k, v in json.loads(line).items() if "seconds" not in k}
             for line in (tmp_path / x / "log.jsonl").read_text().splitlines()] for x in ("whole", "parts")]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [5, 10, 15]
    assert [line["chosen_loss"] is None for line in logs[0]] == [i < unselected for i in range(3)]
    if not unselected:
        assert all(line["chosen_loss"] > line["random_loss"] for line in logs[0])
    if objective == "sogclr":
        assert a["sogclr"]["log_u"].isfinite().any() and a["sogclr"]["log_u"].shape == (40,)


@pytest.mark.parametrize("objective, of", [("dcl", "dcl"), ("simclr", "nt_xent"), ("sogclr", "nt_xent")])
def test_osgd_scores_a_batch_by_what_is_trained_on(objective, of, leaves, tmp_path, monkeypatch):
    chosen, choose = {"dcl": [], "nt_xent": []}, ContrastiveBatchSampler._choose

    def remembered(self):
        out = choose(self)
        u, v, rows, _, local = self.last
        for loss, same in chosen.items():
            order = batch_losses(u, v, local, 1.0, loss).argsort(stable=True)
            same.append([rows[x].tolist() for x in local[order[-7:]]] == out)
        return out
    monkeypatch.setattr(ContrastiveBatchSampler, "_choose", remembered)
    train.main(quick(leaves, tmp_path / "run", "--objective", objective, "--sampler", "osgd", "--k", "10",
                     "--q", "7", "--batch-size", "4", "--temperature", "1", "--max-steps", "14", *SELDOM))
    assert {loss for loss, same in chosen.items() if all(same)} == {of}


def trained_on(leaves, out, monkeypatch, *flags):
    """Batches that a run trains on, [steps, B], and the embeddings u, v of all images, as often as taken."""
    take, embed_images, batches, embedded = train.Step.__call__, train.embed_images, [], []

    def step(self, rows, *more):
        batches.append(rows)
        take(self, rows, *more)

    def embedding(self, images, rows, *more):
        uv = embed_images(self, images, rows, *more)
        if len(images) == 24:  # of training
            assert rows.tolist() == list(range(24))
            embedded.append(uv)
        return uv
    with monkeypatch.context() as patch:
        patch.setattr(train.Step, "__call__", step)
        patch.setattr(train, "embed_images", embedding)
        patch.setattr(train, "VALIDATION_IMAGES", 64)
        patch.setattr(os, "fsync", lambda _: None)
        assert cli.run(train.main, "train.py", quick(leaves, out, *flags, *SELDOM)) == 0
    return torch.stack(batches), embedded


def test_the_released_batches_are_trained_on(leaves, tmp_path, monkeypatch, one_thread):
    flags = "--sampler spectral-released --k 2 --embeddings list --limit 24 --batch-size 6".split()
    flags += ["--max-steps"]
    batches, embedded = trained_on(leaves, tmp_path / "whole", monkeypatch, *flags, "7")
    expected = []
    for epoch, (u, v) in enumerate(embedded):
        dice = torch.Generator().manual_seed(epoch)
        for window in torch.randperm(24, generator=dice).split(12):
            expected += window[released_spectral(u[window], v[window], 6, 2, 0.1, dice)]
    assert len(embedded) == 2 and torch.equal(batches, torch.stack(expected)[:7])
    # Stopped within a window of the second epoch, whose next one is chosen on the embeddings of before.
    begun, _ = trained_on(leaves, tmp_path / "parts", monkeypatch, *flags, "5")
    rest, again = trained_on(leaves, tmp_path / "parts", monkeypatch, *flags, "7", "--resume")
    assert torch.equal(torch.cat([begun, rest]), batches) and not again
    a, b = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert a.pop("journal")["step"] == b.pop("journal")["step"] == 7 and equal(a, b)


def test_what_a_run_tells(leaves, tmp_path):
    flags = "--sampler osgd-replacement --k 5 --q 3 --lowest --select-after 1 --max-steps 6".split()
    runs = [start(quick(leaves, tmp_path / seed, *flags, *SELDOM, "--seed", seed), tmp_path / "out.txt")
            for seed in "01"]
    assert [finish(run) for run in runs] == [0, 0], text(tmp_path / "out.txt")
    a, b = (checkpoint(tmp_path / seed) for seed in "01")
    assert not any(equal(a[x], b[x]) for x in ("model", "sampler", "embedding", "augmenting"))
    config, result = (json.loads((tmp_path / "0" / x).read_text()) for x in ("config.json", "result.json"))
    assert config["knobs"]["k"] == 5 and config["knobs"]["lowest"] and result["step"] == 6
    assert {"python", "torch", "torchvision"} <= config["versions"].keys()
    assert {"command", "commit", "device", "time"} <= config.keys() and config.keys() <= result.keys()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / "0"))
    events.Reload()
    tags = events.Tags()
    assert {"loss", "learning_rate", "images_per_second", "validation/R1", "seconds/selecting",
            "batch_loss_mean/chosen", "batch_loss_mean/random"} <= set(tags["scalars"])
    assert {"augmented_pairs", "batches/hardest_left_random_right"} <= set(tags["images"])
    assert {"batch_loss/chosen", "batch_loss/random"} <= set(tags["histograms"])
    # the lowest were taken: below random ones of the same embeddings
    chosen, drawn = (events.Scalars(f"batch_loss_mean/{x}")[0].value for x in ("chosen", "random"))
    assert chosen < drawn


def interrupted(number, part):
    """Windows are embedded in four parts; in the middle of the second window a signal comes."""
    train.EMBED_PIXELS, embed_images, parts = 8 * 32**2, train.embed_images, []

    def embed_and_signal(*arguments):
        parts.append(0)
        if len(parts) == part:
            os.kill(os.getpid(), number)
        return embed_images(*arguments)
    train.embed_images = embed_and_signal


FRESH = "--k", "4", "--embeddings", "fresh"


@pytest.fixture(scope="module")
def whole(leaves, tmp_path_factory):
    """What a run that was left alone saves at its end."""
    folder = tmp_path_factory.mktemp("whole")
    argv = quick(leaves, folder / "run", *FRESH, *SELDOM)
    assert finish(start(argv, folder / "out.txt", interrupted, 0, 0)) == 0
    return checkpoint(folder / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_and_the_run_resumes(number, leaves, whole, tmp_path):
    argv, out = quick(leaves, tmp_path / "run", *FRESH, *SELDOM), tmp_path / "out.txt"
    within_a_window = number == signal.SIGINT
    process = start(argv, out, interrupted, number, 7 if within_a_window else 0)
    if not within_a_window:
        wait_for(lambda: "loss" in text(out), process)
        os.kill(process.pid, number)
    assert finish(process) == 128 + number, text(out)
    assert "--resume" in text(out).splitlines()[-1] and checkpoint(tmp_path / "run")["journal"]["step"] < 15
    if number in (signal.SIGINT, signal.SIGHUP):  # the others are saved alike
        assert finish(start(argv + ["--resume"], out, interrupted, number, 0)) == 0
        assert equal(whole, checkpoint(tmp_path / "run"))


def broken_output(kind):
    if kind == "full":
        sys.stdout = sys.stderr = open("/dev/full", "w")
    else:
        reader, writer = os.openpty() if kind == "terminal" else os.pipe()
        os.close(reader)  # as `| head -1` does, or who closes the window
        sys.stdout = sys.stderr = open(writer, "w")


@pytest.mark.parametrize("kind", ["full", "pipe", "terminal"])
def test_lost_output_costs_no_run(kind, leaves, tmp_path):
    argv = quick(leaves, tmp_path / "run", "--sampler", "random", "--max-steps", "3", *SELDOM)
    process = start(argv, tmp_path / "out.txt", broken_output, kind)
    assert finish(process) == 0 and checkpoint(tmp_path / "run")["journal"]["step"] == 3


def nowhere_at_home(folder):
    """No entry in passwd, no HOME, and a terminal that knows ASCII alone."""
    def nobody(_):
        raise KeyError
    pwd.getpwuid = pwd.getpwnam = nobody
    os.environ.pop("HOME", None)
    os.chdir(folder)
    sys.stdout = sys.stderr = open("out.txt", "w", encoding="ascii")


def test_odd_homes_and_paths(leaves, tmp_path):
    (tmp_path / "~nobody").symlink_to(leaves)
    argv = quick("~nobody", "~nobody2/\u03bb", "--k", "4", "--max-steps", "1", *SELDOM)
    process = start(argv, tmp_path / "first.txt", nowhere_at_home, tmp_path)
    assert finish(process) == 0, text(tmp_path / "out.txt")
    assert "~nobody2/\\u03bb" in text(tmp_path / "out.txt")
    assert (tmp_path / "~nobody2" / "\u03bb" / "checkpoint.pt").exists()


def draw_under(backend, path):
    assert "matplotlib" not in sys.modules
    os.environ["MPLBACKEND"] = backend
    cli.save_figure(cli.canvas(1, 1, 2, 1)[0], path)
    sys.exit(0)


def test_figures_are_drawn_whatever_a_notebook_left(tmp_path):
    out, path = tmp_path / "out.txt", tmp_path / "figure"
    process = start([], out, draw_under, "module://inline_of_a_notebook", path)
    assert finish(process) == 0 and path.with_suffix(".png").stat().st_size > 1000, text(out)


# ------------------------------------------------------------------------------------------------ refusals
def refusal(capsys, *argv):
    """The one line that a refused command prints; exit code 2."""
    assert cli.run(train.main, "train.py", list(argv)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("train.py: error: ") and err.count("\n") == 1, err
    return err


def test_two_processes_in_one_folder(leaves, tmp_path, capsys):
    argv = quick(leaves, tmp_path, "--sampler", "random", "--max-steps", "1", *SELDOM)
    with open(tmp_path / ".lock", "w") as held:  # as an orphan of a killed script would
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another process is training in" in refusal(capsys, *argv)
    assert finish(start(argv, tmp_path / "out.txt")) == 0


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**24, 2**24))


def test_checkpoint_troubles(leaves, tmp_path, capsys):
    run, full = tmp_path / "run", tmp_path / "full.txt"
    assert finish(start(quick(leaves, run, "--k", "4", "--max-steps", "5"), tmp_path / "out.txt")) == 0
    argv = quick(leaves, run, "--k", "4")
    line = refusal(capsys, *argv)
    assert "--resume" in line and "--out-dir" in line
    line = refusal(capsys, *argv, "--resume", "--temperature", "0.2", "--objective", "sogclr")
    assert "temperature: 0.1 there, 0.2 now" in line and "objective: dcl there, sogclr now" in line
    assert "seed" not in line and "digest: " not in line.split("; digest: of")[0]
    # a full disk: the write fails half-way, the checkpoint of before stands
    before = (run / "checkpoint.pt").read_bytes()
    assert finish(start(argv + ["--resume"], full, small_files)) == 2
    last = text(full).splitlines()[-1]
    assert "cannot write" in last and "checkpoint.pt" in last and "free some space" in last
    assert (run / "checkpoint.pt").read_bytes() == before and not list(run.glob(".*tmp"))
    for damage in (before[:1000], b"", before[:-5000]):
        (run / "checkpoint.pt").write_bytes(damage)
        assert "damaged" in refusal(capsys, *argv, "--resume")
    (run / "checkpoint.pt").unlink()  # what it found must not be overwritten
    (run / "result.json").write_bytes(found := b"{}")
    assert "without its checkpoint" in refusal(capsys, *argv, "--seed", "5")
    assert (run / "result.json").read_bytes() == found


def images(folder, count):
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(folder / f"{i}.png")
    return folder


FOLDER = "--dataset folder --sampler random --image-size 32 --batch-size 4 --max-steps 1".split()


def test_resume_refuses_other_data(tmp_path, capsys):
    pictures = images(tmp_path / "pictures", 12)
    argv = [*FOLDER, "--data-dir", str(pictures), "--out-dir", str(tmp_path / "run")]
    assert finish(start(argv, tmp_path / "out.txt")) == 0
    pictures.rename(tmp_path / "moved")
    argv[argv.index(str(pictures))] = str(tmp_path / "moved")
    again = start([*argv, "--resume", "--max-steps", "2"], tmp_path / "out.txt")
    assert finish(again) == 0  # the same, elsewhere, which an evaluation is told
    assert str(tmp_path / "moved") in (tmp_path / "run" / "config.json").read_text()
    for i in range(12):  # in any split
        Image.new("RGB", (40, 40), (i, 0, 1)).save(tmp_path / "moved" / f"{i}.png")
    line = refusal(capsys, *argv, "--resume", "--max-steps", "3")
    assert "digest: " in line and "images: " not in line


@pytest.mark.parametrize("flags", [["--sampler", "random"], ["--k", "1", "--log-every", "50"]])
def test_divergence_stops(flags, leaves, tmp_path):
    argv = quick(leaves, tmp_path / "run", "--lr", "1e30", "--warmup-epochs", "0", *flags)
    assert finish(start(argv, tmp_path / "out.txt")) == 1
    last = text(tmp_path / "out.txt").splitlines()[-1]
    assert "finite" in last or "step" in last and "--lr" in last
    if (tmp_path / "run" / "checkpoint.pt").exists():  # whatever was saved is from before
        assert all(torch.isfinite(w).all() for w in checkpoint(tmp_path / "run")["model"].values())


@pytest.mark.parametrize("argv, words", [
    ("--k 100000", "100000 at most"),
    ("--sampler osgd --q 9 --k 4", "--q 9 --k 4"),
    ("--batch-size 1", "--batch-size 1: int >= 2"),
    ("--batch-size 100000", "100000 at most"),
    ("--dataset cifar10", "cifar10 did you mean cifar100?"),
    ("--sampler spektral", "spektral did you mean spectral?"),
    ("--sample osgd", "--sample did you mean --sampler?"),
    ("--image-size 0", "--image-size 0: >= 8"),
    ("--epochs -3", "--epochs -3: >= 1"),
    ("--epochs many", "--epochs many: int"),
    ("--temperature 0", "--temperature 0: > 0"),
    ("--temperature nan", "--temperature nan"),
    ("--lowest", "--lowest refined"),
    ("--sampler random --k 8", "--k random"),
    ("--sampler random --embeddings free", "--embeddings leave it out"),
    ("--seed " + "9" * 30, "--seed"),
    ("--image-size 1000000", "--image-size 1000000: <= 2048"),
    ("--device meta", "meta cpu"),
    ("--sampler spectral --k 8 --q 2", "--q leave it out"),
    ("--warmup-epochs 30 --epochs 20", "--warmup-epochs 30: 20"),
    ("--device tpu9", "tpu9 cpu"),
    ("--step graph --device cpu", "graph CUDA leave it out"),
    ("--dataset folder --data-dir /nowhere", "/nowhere give another --data-dir"),
    ("--resume", "no checkpoint"),
    ("--k", "--k --help"),
])
def test_bad_input_is_one_line(argv, words, leaves, tmp_path, capsys):
    line = refusal(capsys, "--data-dir", leaves, "--out-dir", str(tmp_path / "run"), *argv.split())
    assert all(word in line for word in words.split()), line
    assert not (tmp_path / "run").exists()


def test_bad_data_is_one_line(tmp_path, capsys):
    for name in "empty", "words":
        (tmp_path / name).mkdir()
    (tmp_path / "words" / "note.txt").write_text("no image")
    (images(tmp_path / "broken", 12) / "7.png").write_bytes(b"no image")
    (tmp_path / "tiny-imagenet-200.zip").write_bytes(b"PK" + bytes(1000))
    run = [*FOLDER, "--out-dir", str(tmp_path / "run"), "--data-dir"]
    for name in "empty", "words", "nowhere":
        assert str(tmp_path / name) in refusal(capsys, *run, str(tmp_path / name))
    assert "complete zip" in refusal(capsys, *run, str(tmp_path), "--dataset", "tinyimagenet")
    line = refusal(capsys, *run, str(tmp_path / "broken"))
    assert "7.png" in line and "--skip-broken" in line and not (tmp_path / "run").exists()
    assert finish(start([*run, str(tmp_path / "broken"), "--skip-broken"], tmp_path / "out.txt")) == 0
    assert "1 broken" in text(tmp_path / "out.txt")


@pytest.mark.parametrize("name, words", [
    ("file/run", "not a folder"), ("run" * 99, "too long"), ("\udcff", "utf-8")])
def test_unwritable_out_dir(name, words, leaves, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert words in refusal(capsys, *quick(leaves, tmp_path / name, "--k", "4"))


def test_help_names_every_knob(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all("--" + name.replace("_", "-") in shown for name in train.KNOBS)


def test_knobs_go_by_what_a_sampler_does_not_by_its_name(monkeypatch, capsys):
    monkeypatch.setitem(train.KNOBS, "sampler", ("random", ("hard", "osgd-mine"), ""))
    monkeypatch.setattr(train, "SAMPLERS", {"hard": {"method": "osgd"}, "osgd-mine": {"method": print}})
    hard, mine = (train.settle(["--dataset", "cifar100", "--sampler", x]) for x in train.SAMPLERS)
    assert (hard["k"], hard["q"], mine["k"], mine["q"]) == (1500, 150, 40, None)
    with pytest.raises(cli.Stop, match="--q means nothing to --sampler osgd-mine"):
        train.settle(["--sampler", "osgd-mine", "--q", "2"])


def test_windows_of_generated_images_are_half_of_them():
    k = {n: train.settle(["--limit", str(8 * n), "--batch-size", "8"])["k"] for n in (1, 2, 3, 5, 16, 64, 99)}
    assert k == {1: 1, 2: 2, 3: 2, 5: 2, 16: 8, 64: 32, 99: 40}


def test_the_journal_estimates(tmp_path, capsys):
    """Images a second; and the time of a run that is to select first for an hour, after seconds."""
    knobs = train.settle("--dataset tinyimagenet --sampler osgd --k 1500 --q 150 --max-steps 60".split())
    journal = runfolder.Journal(tmp_path, knobs, torch.device("cpu"), 40)
    journal._scalars = lambda **values: None
    journal.reported, journal.seconds, journal.estimated, journal.ticked = 0, 0.0, False, time.perf_counter()
    journal.selecting(48_000)
    journal.ticked -= 1000
    journal.embedding(4)  # 250 s an image; of 10 one is trained on, which takes as long as embedding 3
    days = 250 * 60 * 32 * 13 / 86400
    said = capsys.readouterr().out
    assert f"the whole run takes {days:.0f} days here; --image-size 32 --limit 8192 --k 256: about" in said
    journal.estimated, knobs["q"], knobs["k"] = False, 750, 1500
    journal.estimate(2e6)
    assert "--limit 8192 --k 256 --q 256: about" in capsys.readouterr().out
    journal.estimated = False
    journal.estimate(19_000)
    assert capsys.readouterr().out == "the whole run takes about 5:16:40 here\n"
    journal.state["step"], journal.ticked = 2, time.perf_counter() - 10
    journal.report([1.0, 1.0], 0.1)
    line = capsys.readouterr().out
    assert " 6 images/s " in line and line.count("\n") == 1  # said once
