"""A training run's folder: who may write to it, its checkpoint, the signals that save it, and its journal on
the terminal, in log.jsonl and for TensorBoard. train.py is what runs.
"""
import contextlib
import fcntl
import io
import json
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.utils import make_grid

from cli import Stop, clock, expand, progress, say, write_atomically


def free_folder(out_dir: str, resume: bool) -> Path:
    """The folder of a run; raises Stop, before minutes of decoding, where it cannot be trained in."""
    folder = expand(out_dir)
    checkpoint = folder / "checkpoint.pt"
    try:
        if (folder / "result.json").exists() and not checkpoint.exists():
            raise Stop(f"{folder} holds a finished run without its checkpoint: give another --out-dir, or "
                       "remove that folder")
        if resume and not checkpoint.exists():
            raise Stop(f"--resume: there is no checkpoint in {folder}; leave --resume out to start it, or "
                       "give its --out-dir")
        if not resume and checkpoint.exists():
            raise Stop(f"{folder} holds a run already: add --resume to go on, or give another --out-dir")
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        str(folder).encode()  # TensorBoard knows no other names
    except (OSError, UnicodeError) as error:
        raise Stop(f"--out-dir {folder}: {error}; give another folder") from None
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise Stop(f"--out-dir {folder}: {there} is not a folder that can be written; give another folder")
    return folder


@contextlib.contextmanager
def locked(folder: Path, rank: int):
    """The folder for this process alone until it ends, however it ends; of several for the first."""
    if rank:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Stop(f"another process is training in {folder}: let it end, or end it; or give another "
                           "--out-dir") from None
        (folder / "result.json").unlink(missing_ok=True)  # of a run that is now extended
    except OSError as error:
        raise Stop(f"--out-dir {folder}: {error.strerror}; give another folder") from None
    with lock:
        yield


def write_checkpoint(folder: Path, content: dict) -> None:
    torch.save(content, buffer := io.BytesIO())
    write_atomically(folder / "checkpoint.pt", buffer.getbuffer())


def read_checkpoint(folder: Path, settings: dict) -> dict:
    """What a checkpoint holds; raises Stop where it is damaged or of a run with other settings."""
    path = folder / "checkpoint.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        there = saved["settings"]
        differences = [f"{name}: {there.get(name)} there, {value} now" for name, value in settings.items()
                       if there.get(name) != value]
    except OSError as error:
        raise Stop(f"--resume: {error.filename}: {error.strerror}") from None
    except Exception as error:  # torch.load fails in many ways on a damaged file
        raise Stop(f"--resume: {path} cannot be used ({type(error).__name__}): it is damaged or not of this "
                   "program; give another --out-dir to start anew") from None
    if differences:
        raise Stop(f"--resume: {folder} was started with other settings ({'; '.join(differences)}; "
                   "digest: of the images); give those, or another --out-dir")
    return saved


@contextlib.contextmanager
def signals_caught(caught: list[int]):
    """`caught` gets the number of a signal that asks for an end. A second one ends the program at once, but
    not one of several processes: torchrun sends them what the terminal has sent them already."""
    def on_signal(number, frame):
        caught.append(number)
        if not dist.is_initialized():
            signal.signal(number, signal.SIG_DFL)
    asking = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1  # which schedulers send
    before = {number: signal.signal(number, on_signal) for number in asking
              if signal.getsignal(number) != signal.SIG_IGN}  # as nohup leaves SIGHUP
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agreed(wish: list | bool, device: torch.device) -> bool:
    """Whether any of the processes wishes it, which all ask at the same place."""
    if dist.is_initialized():
        dist.all_reduce(wishes := torch.tensor(int(bool(wish)), device=device))
        return bool(wishes)
    return bool(wish)


def one_before_others(read: Callable):
    """read() in the first process of each machine, then in the others, which find what it has made. A Stop of
    one is raised in all."""
    if not dist.is_initialized():
        return read()
    found, first = None, os.environ.get("LOCAL_RANK", "0") == "0"
    for turn in True, False:
        why, whys = None, [None] * dist.get_world_size()
        try:
            found = read() if first == turn else found
        except Stop as stop:
            why = str(stop)
        dist.all_gather_object(whys, why)
        if any(whys):
            raise Stop(next(filter(None, whys)))
    return found


class Journal:
    """What a run tells: lines on the terminal, log.jsonl, TensorBoard. Its `state` is part of the checkpoint.

    images: of the training set.  rank: of the process, of so many `processes`; only the first one writes.
    """

    def __init__(self, folder: Path, knobs: dict, device: torch.device, images: int, rank: int = 0,
                 processes: int = 1):
        self.folder, self.knobs, self.device, self.images, self.rank = folder, knobs, device, images, rank
        self.step_images = knobs["batch_size"] * processes
        self.epoch_steps = images // self.step_images
        self.total_steps = knobs["epochs"] * self.epoch_steps
        self.last_step = min(self.total_steps, knobs["max_steps"] or self.total_steps)
        self.state = {"step": 0, "seconds_training": 0.0, "seconds_selecting": 0.0, "loss_sum": 0.0,
                      "loss_count": 0, "chosen": [], "random": [], "log": []}

    @contextlib.contextmanager
    def open(self, record: dict):
        """Writes config.json, and result.json in the end; raises Stop where the disk is full."""
        if self.rank == 0:
            from torch.utils.tensorboard import SummaryWriter  # takes a second: after all that can be refused
            write_atomically(self.folder / "config.json", json.dumps(record, indent=1).encode())
            self._write_log()
            self.board = SummaryWriter(self.folder, purge_step=self.state["step"] + 1)
        self.reported, self.seconds = self.state["step"], self.state["seconds_training"]
        self.estimated = False
        self.began = self.ticked = time.perf_counter()
        try:
            yield
        except OSError as error:  # TensorBoard's writer reports a full disk so
            raise Stop(f"cannot write to {self.folder}: {error.strerror or error}; free some space and go on "
                       "with --resume") from None
        finally:
            if self.rank == 0:
                with contextlib.suppress(OSError):
                    self.board.close()
        if self.state["log"] and self.rank == 0:
            result = {**self.state["log"][-1], **record}
            write_atomically(self.folder / "result.json", json.dumps(result, indent=1).encode())

    def resumed(self, record: dict) -> dict:
        """The record of where the run began, with this process added to it."""
        made_by = {name: record[name] for name in ("command", "commit", "device", "time", "versions")}
        with contextlib.suppress(OSError, ValueError):
            data_dir = record["knobs"]["data_dir"]  # they may have moved
            record = json.loads((self.folder / "config.json").read_text())
            record["knobs"]["data_dir"] = data_dir
        record["resumed"].append({"step": self.state["step"], **made_by})
        return record

    def say(self, line: str) -> None:
        if self.rank == 0:
            say(line)

    def _write_log(self) -> None:
        lines = "".join(json.dumps(line) + "\n" for line in self.state["log"])
        write_atomically(self.folder / "log.jsonl", lines.encode())

    def _scalars(self, **values: float) -> None:
        for name, value in values.items():
            self.board.add_scalar(name.replace("__", "/"), value, self.state["step"])

    def tick(self, what: str = "") -> None:
        """Adds the seconds since the last tick to `what`; on CUDA the work behind them is waited for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if what:
            self.state[what] += now - self.ticked
        self.ticked = now

    @property
    def epoch_ends(self) -> bool:
        return self.state["step"] % self.epoch_steps == 0 or self.state["step"] == self.last_step

    @property
    def due(self) -> bool:
        """Whether a line is due: every --log-every steps, at an epoch's end, and once after five seconds."""
        early = not self.estimated and time.perf_counter() - self.began > 5 and not dist.is_initialized()
        return early or self.epoch_ends or self.state["step"] - self.reported == self.knobs["log_every"]

    def estimate(self, seconds: float) -> None:
        """Says once what is left of the run: before the first step, and where that is more than a day, then
        with what to change."""
        if seconds > 86400 and not self.estimated:  # at 32 px a pixel costs more than at 224
            small = seconds * min(1, (32 / self.knobs["image_size"]) ** 1.8) * min(1, 8192 / self.images)
            most = 8192 // self.knobs["batch_size"]
            fewer = "".join(f" --{x} {most}" for x in ("k", "q") if (self.knobs[x] or 0) > most)
            self.say(f"the whole run takes {seconds / 86400:.0f} days here; --image-size 32 --limit 8192"
                     f"{fewer}: about {max(1, small / 3600):.0f} hours")
        elif self.state["step"] == 0 and not self.estimated:
            self.say(f"the whole run takes about {clock(seconds)} here")
        self.estimated = True

    def pairs(self, views: Tensor) -> None:
        """A picture of the augmented views [2n, 3, S, S] of n images, one above the other."""
        if self.rank == 0:
            self.board.add_image("augmented_pairs", make_grid(views, nrow=len(views) // 2, normalize=True), 0)

    def selecting(self, images: int) -> None:
        """A selection begins, which may embed so many images."""
        self.tick("seconds_training")
        self.embedded, self.show = 0, progress("embedding to select", images, "images")

    def embedding(self, images: int) -> None:
        """So many more images are embedded; the first selection, if it is long, tells how long the run is."""
        self.embedded += images
        if self.rank == 0:
            self.show(self.embedded)
        seconds = time.perf_counter() - self.ticked
        if seconds > 5 and not self.estimated:
            selected = self.knobs["k"] / (self.knobs["q"] or self.knobs["k"])  # of a batch trained on
            images = (self.last_step - self.state["step"]) * self.step_images * (selected + 3)
            self.estimate(seconds / self.embedded * images)  # training on an image takes thrice embedding it

    def window(self, losses: dict[str, Tensor] | None, images: Tensor) -> None:
        """Losses of a selection's chosen and of random batches; once an epoch a picture of one of each."""
        if losses is None or self.rank:
            return
        for kind in ("chosen", "random"):
            self.board.add_histogram(f"batch_loss/{kind}", losses[kind].cpu(), self.state["step"])
            mean = losses[kind].mean().item()
            self._scalars(**{f"batch_loss_mean__{kind}": mean})
            self.state[kind].append(mean)
        if len(self.state["chosen"]) == 1:
            hardest = losses["chosen_rows"][losses["chosen"].argmax().item()]
            grids = [make_grid(images[rows.to(images.device)], nrow=8, pad_value=255)
                     for rows in (hardest, losses["random_rows"][0])]
            picture = torch.cat(grids, dim=2).cpu()
            self.board.add_image("batches/hardest_left_random_right", picture, self.state["step"])

    def report(self, losses: list[float], lr: float) -> None:
        """A line on the steps since the last one. Raises Stop where a loss is not finite."""
        state, step = self.state, self.state["step"]
        for number, loss in enumerate(losses, step - len(losses) + 1):
            if not math.isfinite(loss):
                raise Stop(f"the loss is {loss} at step {number}: try a lower --lr, a higher --temperature "
                           "or more --warmup-epochs", code=1)
            state["loss_sum"] += loss  # one by one: the same to the bit wherever the lines fall
        self.tick("seconds_training")
        if not losses:
            return
        state["loss_count"] += len(losses)
        mean = sum(losses) / len(losses)
        spent = state["seconds_training"] + state["seconds_selecting"]
        rate = len(losses) * self.step_images / max(state["seconds_training"] - self.seconds, 1e-9)
        self.reported, self.seconds = step, state["seconds_training"]
        left = spent / step * (self.last_step - step)
        self.say(f"epoch {(step - 1) // self.epoch_steps + 1}/{self.knobs['epochs']} "
                 f"step {step}/{self.last_step} loss {mean:.3f} lr {lr:.3f} {rate:.0f} images/s "
                 f"selecting {state['seconds_selecting'] / spent:.0%} left {clock(left)}")
        self.estimate(left)
        if self.rank == 0:
            self._scalars(loss=mean, learning_rate=lr, images_per_second=rate,
                          seconds__selecting=state["seconds_selecting"], seconds__training=self.seconds)

    def epoch(self, metrics: dict, images: int) -> None:
        """The line of log.jsonl, of retrieval among so many validation images."""
        state, epoch = self.state, self.state["step"] / self.epoch_steps
        line = {"epoch": epoch, **{x: state[x] for x in ("step", "seconds_training", "seconds_selecting")},
                "loss": state["loss_sum"] / state["loss_count"],
                **{f"{kind}_loss": sum(state[kind]) / len(state[kind]) if state[kind] else None
                   for kind in ("chosen", "random")},
                **{x: (metrics[f"u2v_{x}"] + metrics[f"v2u_{x}"]) / 2 for x in ("R1", "R5")}}
        state["log"].append(line)
        state.update(loss_sum=0.0, loss_count=0, chosen=[], random=[])
        self._write_log()
        self._scalars(validation__R1=line["R1"], validation__R5=line["R5"])
        self.say(f"epoch {round(epoch, 2):g}: loss {line['loss']:.3f}, R@1 {line['R1']:.1%}, "
                 f"R@5 {line['R5']:.1%} of {images} validation images")
