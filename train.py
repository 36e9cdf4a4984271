"""Pre-train a ResNet-18 by contrastive learning on mini-batches that are chosen, not only drawn.

    python train.py                                                # generated images, minutes on a laptop
    python train.py --dataset tinyimagenet --sampler osgd --k 1500 --q 150         # the paper's settings
    python train.py --dataset cifar100 --sampler spectral --objective sogclr
    python train.py --dataset folder --data-dir ~/photos --image-size 64
    torchrun --nproc_per_node 8 train.py --dataset cifar100        # 8 GPUs, a mini-batch each
    tensorboard --logdir runs                                      # watch

A run writes its folder (--out-dir): config.json, log.jsonl (a line an epoch), checkpoint.pt, result.json and
TensorBoard's events. Ctrl-C saves; the same command with --resume goes on bit for bit.
"""
import functools
import math
import os
import shlex
import signal
import sys
import time
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
from augment import NUM_UNIFORM, augment, views_of
from cli import Stop, parse, pick_device, progress, provenance, run
from lars import LARS, warmup_cosine
from model import ContrastiveModel, SogCLRLoss, dcl, embed, hcl, nt_xent
from retrieval import retrieval_metrics
from rivals import released_spectral
from runfolder import (
    Journal, agreed, free_folder, locked, one_before_others, read_checkpoint, signals_caught,
    write_checkpoint)
from samplers import ContrastiveBatchSampler, of_all_processes

# ------------------------------------------------------------------------------------------------ knobs
# Each --sampler is what ContrastiveBatchSampler is made with. A new one is a line here: its method may be a
# function (u, v, batch_size, k, temperature, generator) -> batches [m, B] of the window's rows.
SAMPLERS = {
    "random": {"method": "random"},
    "osgd": {"method": "osgd"},
    "osgd-replacement": {"method": "osgd-replacement"},
    "spectral": {"method": "spectral", "refine": False},
    "refined": {"method": "spectral", "refine": True},
    "spectral-released": {"method": released_spectral},
}
# name: (default, allowed, what it does). The command line is made from this table. None is filled in by the
# data set or by another knob, as its line says.
KNOBS = {
    # data
    "dataset": ("deadleaves", tuple(data.SOURCE_SIZE), "deadleaves is generated, cifar100 and tinyimagenet "
                "download when absent, folder reads any images under --data-dir"),
    "data_dir": ("data", str, "folder (or zip file) of the data; decoded images are cached beside them"),
    "limit": (None, "int >= 2", "the first n images, spread over the classes; of deadleaves, make n"),
    "source_size": (None, "int >= 1 <= 4096", "side to which images are brought once, before augmentation "
                    "(default: the data set's own; folder 8/7 of the image size)"),
    "skip_broken": (False, bool, "leave out and count images that cannot be decoded, instead of stopping"),
    # augmentation
    "image_size": (None, "int >= 8 <= 2048", "side of the augmented views, pixels"),
    "crop_scale": (None, "float > 0 <= 1", "smallest share of the image's area that a random crop keeps"),
    "jitter": (None, "float >= 0 <= 2", "strength of the colour jitter; 1 is (0.4, 0.4, 0.2, 0.1)"),
    # choosing mini-batches
    "sampler": (None, tuple(SAMPLERS), "random: a permutation cut into batches (Algorithm 4); osgd: of "
                "each k batches of a permutation the q of highest loss (6); osgd-replacement: of k batches "
                "drawn anew (5); spectral: windows of k*B images cut into batches of similar ones (1); "
                "refined: those, exchanging images until harder still; spectral-released: (1) as released"),
    "embeddings": (None, ("fresh", "free", "list"), "what is selected on. fresh: each window embedded when "
                   "its turn comes; list: all images when a permutation is drawn, as the authors' code does; "
                   "free: what the steps computed when they last saw each image, the first epoch random "
                   "(default: refined free, others fresh)"),
    "k": (None, "int >= 1", "batches a selection looks at (default: osgd 1500, others 40; deadleaves half of "
          "all, at most 40)"),
    "q": (None, "int >= 1", "batches that osgd keeps of k (default: 150; deadleaves k / 4); others keep all"),
    "lowest": (False, bool, "osgd keeps the batches of lowest loss instead"),
    "select_after": (0, "int >= 0", "random batches for n epochs, then chosen ones"),
    "batch_size": (None, "int >= 2", "images in a mini-batch, B"),
    # objective
    "objective": (None, ("simclr", "sogclr", "hcl", "dcl"), "simclr: NT-Xent; sogclr: global loss with "
                  "running estimates; hcl: hard negatives weighted up; dcl: NT-Xent, no positive below"),
    "temperature": (0.1, "float > 0", "divides the cosine similarities, in the loss and in selection"),
    "gamma": (0.9, "float >= 0 <= 1", "sogclr: weight of the newest value in the running estimates"),
    "tau_plus": (0.1, "float >= 0 < 1", "hcl: prior probability that a negative is of the same class"),
    "beta": (1.0, "float >= 0", "hcl: exponent of the negatives' weights"),
    # network and optimiser
    "small_stem": (False, bool, "3x3 stem without max-pool: better and slower on small images"),
    "epochs": (None, "int >= 1", "an epoch is floor(N / B) steps, whatever the sampler; B of all processes"),
    "warmup_epochs": (None, "int >= 0", "epochs of linear warm-up before half a cosine down to 0"),
    "lr": (None, "float > 0 <= 1e30", "peak learning rate (default: by --lr-scaling; deadleaves twice that)"),
    "lr_scaling": ("sqrt", ("sqrt", "linear"), "peak learning rate 0.075*sqrt(B) or 0.075*B/256, "
                   "with B of all processes"),
    "momentum": (0.9, "float >= 0 < 1", "LARS's momentum"),
    "weight_decay": (1e-6, "float >= 0 <= 1", "LARS's weight decay"),
    "trust_coefficient": (0.001, "float > 0 <= 1", "a layer's step at rate 1, as a share of its weights"),
    "precision": (None, ("bfloat16", "float32"), "of the network's products (default: bfloat16 on CUDA, "
                  "float32 elsewhere: only some processors are faster in bfloat16)"),
    # the run
    "seed": (0, "int >= 0 < 4294967296", "fixes weights, batches and augmentation on one machine"),
    "device": ("auto", str, "cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"),
    "step": ("auto", ("auto", "graph", "eager", "compile"), "graph: a step is one CUDA graph, the same to "
             "the bit; compile: by torch.compile, for long runs; auto: graph on CUDA, eager elsewhere"),
    "out_dir": (None, str, "run folder (default: runs/DATASET-SAMPLER-OBJECTIVE-seedSEED)"),
    "resume": (False, bool, "go on from the run folder's checkpoint"),
    "max_steps": (None, "int >= 1", "stop early, after n steps in all; the schedule stays that of --epochs"),
    "log_every": (20, "int >= 1 <= 100000", "steps between progress lines; the device is read only there"),
    "checkpoint_minutes": (10.0, "float >= 0", "save at least this often, besides the end of every epoch"),
}
# The generated images' crops and jitter were chosen on random batches alone, for a loss that is low after ten
# epochs; the rest by R@1: results/README.md.
PAPER = {"image_size": 224, "crop_scale": 0.08, "jitter": 1.0, "sampler": "spectral", "batch_size": 32,
         "objective": "simclr", "epochs": 100, "warmup_epochs": 10}
QUICK = {"limit": 2048, "image_size": 32, "crop_scale": 0.5, "jitter": 0.5, "sampler": "refined",
         "batch_size": 128, "objective": "dcl", "epochs": 10, "warmup_epochs": 1}
DATASET_DEFAULTS = {"cifar100": PAPER, "tinyimagenet": PAPER, "folder": PAPER, "deadleaves": QUICK}
FREE_ON_RESUME = {"data_dir", "out_dir", "device", "precision", "step", "resume", "max_steps", "log_every",
                  "checkpoint_minutes"}
VALIDATION_IMAGES = 1000  # of the quick two-view retrieval at the end of each epoch
EMBED_PIXELS = 2**20  # at a time, on a CPU: for its caches, and to tell something every few seconds
WARM = 3  # eager steps before a graph is captured: they make the optimiser's buffers and the libraries' own


def settle(argv: list[str]) -> dict:
    """All knobs, with values from the command line's words; raises Stop where they do not go together."""
    knobs, given = parse(argv, __doc__, KNOBS, DATASET_DEFAULTS)
    sampler, quick = knobs["sampler"], knobs["dataset"] == "deadleaves"
    method = SAMPLERS[sampler]["method"]
    by_loss = method in ("osgd", "osgd-replacement")
    needless = given & (set() if by_loss else {"q", "lowest"})
    if method == "random":
        needless |= given & {"k", "select_after", "embeddings"}
    if needless:
        raise Stop(f"--{min(needless).replace('_', '-')} means nothing to --sampler {sampler}: leave it out")
    knobs["embeddings"] = knobs["embeddings"] or ("free" if sampler == "refined" else "fresh")
    if method != "random":
        every = knobs["limit"] // knobs["batch_size"] if quick else 0
        half = min(40, max(1, min(2, every), every // 2)) if quick else None
        knobs["k"] = knobs["k"] or half or (1500 if by_loss else 40)
    if by_loss:
        knobs["q"] = knobs["q"] or (max(1, knobs["k"] // 4) if quick else min(knobs["k"], 150))
        if knobs["q"] > knobs["k"]:
            raise Stop(f"--q {knobs['q']} is more than --k {knobs['k']}: give at most that, or a larger --k")
    if knobs["warmup_epochs"] >= knobs["epochs"]:
        if "warmup_epochs" in given:
            raise Stop(f"--warmup-epochs {knobs['warmup_epochs']}: give less than --epochs {knobs['epochs']}")
        knobs["warmup_epochs"] = knobs["epochs"] // 10  # a run shorter than the default warm-up
    together = knobs["batch_size"] * int(os.environ.get("WORLD_SIZE", 1))  # of a step: a batch a process
    scale = math.sqrt(together) if knobs["lr_scaling"] == "sqrt" else together / 256
    knobs["lr"] = knobs["lr"] or 0.075 * scale * (1 + quick)
    on_cuda = knobs["device"] != "cpu" and torch.cuda.is_available()
    knobs["precision"] = knobs["precision"] or ("bfloat16" if on_cuda else "float32")
    if knobs["dataset"] == "folder":  # 256 for 224, as is usual
        knobs["source_size"] = knobs["source_size"] or -(-knobs["image_size"] * 8 // 7)
    knobs["out_dir"] = knobs["out_dir"] or "runs/{dataset}-{sampler}-{objective}-seed{seed}".format(**knobs)
    return knobs


# ------------------------------------------------------------------------------------------------ one step
class Step:
    """One training step, augment -> model -> objective -> LARS: eager or, on CUDA, replayed as one graph.

    knobs: as settle gives them.  images: uint8 [N, 3, H, W], on the device where they fit.  see(rows, z1, z2)
    is given the projections [B, D] of each step.  What changes from step to step stands in tensors that are
    written before it, so that a graph holds nothing of the past.
    """

    def __init__(self, knobs: dict, images: Tensor, device: torch.device, see=None):
        torch.manual_seed(knobs["seed"])
        self.images, self.device, self.see, self.graph, self.done = images, device, see, None, 0
        self.bfloat16 = knobs["precision"] == "bfloat16"
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        self.model = ContrastiveModel(knobs["small_stem"], views=2)
        self.network = self.model.to(device, memory_format=torch.channels_last)
        self.graphed = device.type == "cuda" and self.processes == 1 and knobs["step"] != "eager"
        if knobs["step"] == "compile":
            self.forward = torch.compile(self.forward, dynamic=False)
        mean, std = data.STATISTICS[knobs["dataset"]]
        look = {"size": knobs["image_size"], "jitter": knobs["jitter"], "mean": mean, "std": std}
        self.augment = functools.partial(augment, crop_scale=(knobs["crop_scale"], 1.0), **look)
        self.views = functools.partial(views_of, crop_scale=knobs["crop_scale"], device=device, **look)
        if self.processes > 1:  # buffers are rank 0's where they count: in eval mode, and in a checkpoint
            warnings.filterwarnings("ignore", "`broadcast_buffers`")  # its successor is not in older versions
            self.network = DistributedDataParallel(self.network, broadcast_buffers=False)
        temperature, estimates = knobs["temperature"], len(images) if knobs["objective"] == "sogclr" else 0
        self.sogclr = SogCLRLoss(estimates, temperature, knobs["gamma"]).to(device)
        self.objective = {
            "simclr": lambda z1, z2, rows: nt_xent(z1, z2, temperature),
            "dcl": lambda z1, z2, rows: dcl(z1, z2, temperature),
            "hcl": lambda z1, z2, rows: hcl(z1, z2, temperature, knobs["tau_plus"], knobs["beta"]),
            "sogclr": self.sogclr}[knobs["objective"]]
        batch = knobs["batch_size"]
        self.rows = torch.zeros(batch, dtype=torch.int64, device=device)
        self.pictures = torch.zeros(batch, *images.shape[1:], dtype=torch.uint8, device=device)
        self.uniform = torch.zeros(2 * batch, NUM_UNIFORM, device=device)
        self.lr, self.losses = torch.zeros((), device=device), torch.zeros(knobs["log_every"], device=device)
        self.place = torch.zeros(1, dtype=torch.int64, device=device)  # of the next loss
        self.optimizer = LARS(self.model.parameters(), self.lr, *(
            knobs[x] for x in ("momentum", "weight_decay", "trust_coefficient")))

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def __call__(self, rows: Tensor, uniform: Tensor, lr: float) -> None:
        """One step on the images `rows` [B] int64; uniform [2B, NUM_UNIFORM]: all that is random in it."""
        def put(target: Tensor, value: Tensor) -> None:  # only a pinned copy does not wait for the device
            target.copy_(value.pin_memory() if self.device.type == "cuda" else value, non_blocking=True)
        put(self.rows, rows)
        put(self.uniform, uniform)
        self.lr.fill_(lr)
        if self.images.device == self.device:
            torch.index_select(self.images, 0, self.rows, out=self.pictures)
        else:
            put(self.pictures, self.images[rows])
        if self.graphed and self.graph is None and self.done == WARM:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.run()
        self.done += 1
        if self.graph:
            self.graph.replay()
        else:
            self.run()

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss and both views' projections [B, D]."""
        views = self.augment(self.pictures.repeat(2, 1, 1, 1), source=self.uniform)
        with self.autocast():
            z1, z2 = self.network(views.contiguous(memory_format=torch.channels_last)).chunk(2)
        return self.objective(z1, z2, self.rows), z1, z2

    def run(self) -> None:
        """All that a graph holds."""
        loss, z1, z2 = self.forward()
        if self.see:
            self.see(self.rows, z1.detach(), z2.detach())
        if self.processes > 1 and len(self.sogclr.log_u):
            rows, estimates = of_all_processes(self.rows), of_all_processes(self.sogclr.log_u[self.rows])
            self.sogclr.log_u.index_copy_(0, rows, estimates)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.losses.index_copy_(0, self.place, loss.detach()[None].float())
        self.place += 1

    def read_losses(self) -> list[float]:
        """The losses of the steps since the last call, means over the processes. Waits for the device."""
        losses = self.losses[:self.place]
        if self.processes > 1 and len(losses):
            dist.all_reduce(losses)
        self.place.zero_()
        return (losses / self.processes).tolist()

    def share_buffers(self) -> None:
        """All processes, which embed, get the running statistics of the first, which saves."""
        for buffer in self.model.buffers() if self.processes > 1 else ():
            dist.broadcast(buffer, 0)

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "sogclr": self.sogclr.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.optimizer.param_groups[0]["lr"] = self.lr  # the tensor that a graph reads
        self.sogclr.load_state_dict(state["sogclr"])


# ------------------------------------------------------------------------------------------------ the set-up
def use_repeatable_kernels() -> None:
    """CUDA's: the same seed, the same weights; and fast ones where float32 is left."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.deterministic = True


def start_process(knobs: dict) -> tuple[int, int, torch.device]:
    """Rank and number of the processes that torchrun started, or 0 and 1, and the device."""
    name = knobs["device"]
    rank, processes = (int(os.environ.get(x, default)) for x, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if processes > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(name)
    if knobs["step"] == "graph" and (device.type != "cuda" or processes > 1):
        raise Stop(f"--step graph takes one process on a CUDA GPU, not {processes} on {device}: leave it out")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        use_repeatable_kernels()
    if processes > 1 and not dist.is_initialized():  # one may wait while another decodes the images
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    return rank, processes, device


def load_images(knobs: dict, device: torch.device, processes: int) -> tuple[Tensor, Tensor, str]:
    """Training and validation images, uint8 [N, 3, H, W], on the device if they fit; the former's digest."""
    load = functools.partial(data.load, knobs["dataset"], data_dir=knobs["data_dir"],
                             source_size=knobs["source_size"], skip_broken=knobs["skip_broken"])

    def read() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        try:
            return *load("train", num_images=knobs["limit"]), *load("val", num_images=VALIDATION_IMAGES)
        except (PermissionError, FileNotFoundError) as error:
            why = f"{error.filename} cannot be read ({error.strerror}): give another --data-dir"
        except (ValueError, OSError) as error:
            why = str(error)
        except MemoryError:
            why = "no memory to make the data in: give a smaller --limit or --source-size"
        raise Stop(why)
    images, labels, val_images, val_labels = one_before_others(read)
    if knobs["limit"] and knobs["limit"] < len(images):
        rows = data.limit_indices(labels, knobs["limit"])
        images, labels = images[rows], labels[rows]
    val_images = val_images[data.limit_indices(val_labels, min(VALIDATION_IMAGES, len(val_images)))]
    digest = data.fingerprint(images, labels)
    n, b, k = len(images), knobs["batch_size"], knobs["k"]
    if b * processes > n:
        raise Stop(f"--batch-size {b}" + f" in each of {processes} processes" * (processes > 1)
                   + f" is more than the {n:,} training images: give "
                   + (f"--batch-size at most {n // processes}" if n > processes else "more images"))
    from_all = SAMPLERS[knobs["sampler"]]["method"] == "osgd-replacement"  # each batch is
    if k and k * b > n and not from_all:
        raise Stop(f"--k {k} batches of {b} need {k * b:,} images of {n:,}: give --k at most {n // b}")
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
        images, val_images = images.to(device), val_images.to(device)
    return images, val_images, digest


def embed_images(step: Step, images: Tensor, rows: Tensor, chunk: int,
                 generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Projections u, v [m, D] of two fresh views of images[rows [m]], with the weights of the moment."""
    with step.autocast():
        tick = progress("embedding", len(rows), "images")  # of a selection a chunk comes here at a time
        u, v = embed(step.model, step.views(images, generator), rows, chunk, tick)
    if not (u.isfinite().all() and v.isfinite().all()):
        raise Stop("the embeddings are not finite: try a lower --lr, a higher --temperature or more "
                   "--warmup-epochs", code=1)
    return u, v


def interrupted(step: int, number: int, rank: int, processes: int) -> BaseException:
    """What ends a run that was saved at this step after the signal `number`; the first process says so."""
    words = [sys.executable]
    if processes > 1:
        words = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", str(processes))]
    command = shlex.join([*words, *sys.argv] + ["--resume"] * ("--resume" not in sys.argv))
    if rank:
        return SystemExit(128 + number)
    if processes > int(os.environ.get("LOCAL_WORLD_SIZE", processes)):  # several machines
        command = "the same command on each machine, and --resume"
    return Stop(f"\nsaved at step {step}; go on with: {command}", 128 + number)


# ------------------------------------------------------------------------------------------------ the run
def train(knobs: dict) -> None:
    folder = free_folder(knobs["out_dir"], knobs["resume"])
    rank, processes, device = start_process(knobs)
    images, val_images, digest = load_images(knobs, device, processes)
    n, b = len(images), knobs["batch_size"]
    journal, caught, cuda = Journal(folder, knobs, device, n, rank, processes), [], device.type == "cuda"
    state, warmup_steps = journal.state, knobs["warmup_epochs"] * journal.epoch_steps
    chunk = 1024 if cuda else min(256, max(8, EMBED_PIXELS // knobs["image_size"] ** 2))
    # Apart from each other and from the sampler's, so that what is chosen does not change the training views.
    embedding, augmenting = (torch.Generator().manual_seed(2 * knobs["seed"] + i) for i in range(2))

    def embed_rows(rows: Tensor) -> tuple[Tensor, Tensor]:  # of a window, one call after another
        if agreed(caught, device):
            raise KeyboardInterrupt
        uv = embed_images(step, images, rows, chunk, embedding)
        journal.embedding(len(rows) * processes)
        return uv

    sampler = ContrastiveBatchSampler(
        n, b, **SAMPLERS[knobs["sampler"]], k=knobs["k"], q=knobs["q"], lowest=knobs["lowest"],
        temperature=knobs["temperature"], loss="dcl" if knobs["objective"] == "dcl" else "nt_xent",
        seed=knobs["seed"], random_epochs=knobs["select_after"], embed_size=chunk, ahead=cuda,
        embed=None if knobs["embeddings"] == "free" else embed_rows, at_once=knobs["embeddings"] == "list",
        rank=rank, world_size=processes)
    step = Step(knobs, images, device, sampler.update if knobs["embeddings"] == "free" else None)
    settings = {name: value for name, value in knobs.items() if name not in FREE_ON_RESUME}
    settings |= {"images": n, "digest": digest, "processes": processes}
    record = {"knobs": knobs, "images": n, "validation_images": len(val_images), "steps": journal.total_steps,
              "processes": processes, "resumed": [], **provenance(device)}
    if knobs["resume"]:
        saved = read_checkpoint(folder, settings)
        step.load_state_dict(saved)
        sampler.load_state_dict(saved["sampler"])
        embedding.set_state(saved["embedding"])
        augmenting.set_state(saved["augmenting"])
        state |= saved["journal"]
        if state["step"] >= journal.last_step and (folder / "result.json").exists():
            journal.say(f"{folder} is finished: step {state['step']}")
            return
        record = journal.resumed(record)

    def save() -> None:
        if rank == 0:  # all processes hold the same
            write_checkpoint(folder, {
                "settings": settings, **step.state_dict(), "sampler": sampler.state_dict(), "journal": state,
                "embedding": embedding.get_state(), "augmenting": augmenting.get_state()})

    with signals_caught(caught), locked(folder, rank), journal.open(record):
        together = f", {processes} processes, peak learning rate {knobs['lr']:.3g}" * (processes > 1)
        journal.say(f"{n:,} images, {journal.epoch_steps} steps an epoch, {journal.total_steps:,} steps on "
                    f"{device}{together}; {folder}")
        if state["step"] == 0:
            journal.pairs(step.views(images, torch.Generator())(torch.arange(min(b, 8)).repeat(2)))
        batches, saved_at, lr, stop = iter(sampler), time.perf_counter(), 0.0, False
        while state["step"] < journal.last_step and not stop:

            # choose
            if chooses := len(sampler.pending) < processes:
                step.share_buffers()
                before = embedding.get_state()
                journal.selecting(n if sampler.at_once else min(n, sampler.k * b))
            try:
                rows = next(batches, None)
            except KeyboardInterrupt:  # of embed_rows
                embedding.set_state(before)
                stop = True
                break
            if rows is None:  # the epoch has ended
                batches = iter(sampler)
                continue
            if chooses:
                journal.window(sampler.window_losses(), images)
                journal.tick("seconds_selecting")

            # step
            lr = warmup_cosine(state["step"], journal.total_steps, warmup_steps, knobs["lr"])
            uniform = torch.rand(processes, 2 * b, NUM_UNIFORM, generator=augmenting)[rank]
            step(torch.tensor(rows), uniform, lr)
            state["step"] += 1

            # log, save
            due = journal.due
            # To ask other processes is to wait for a GPU.
            stop = (due or not cuda or processes == 1 or state["step"] % 20 == 0) and agreed(caught, device)
            if due or stop:
                journal.report(step.read_losses(), lr)
                if journal.epoch_ends and rank == 0:
                    same_views = torch.Generator().manual_seed(0)  # in every run
                    u, v = embed_images(step, val_images, torch.arange(len(val_images)), chunk, same_views)
                    journal.epoch(retrieval_metrics(u, v), len(val_images))
                if journal.epoch_ends or time.perf_counter() - saved_at > 60 * knobs["checkpoint_minutes"]:
                    save()
                    saved_at = time.perf_counter()
                journal.tick()
        if stop:
            journal.report(step.read_losses(), lr)  # nothing that has diverged is saved
            save()
            if processes > 1:
                dist.barrier()  # torchrun ends all of them when one has ended
            raise interrupted(state["step"], (caught or [signal.SIGTERM])[0], rank, processes)


def main(argv: list[str]) -> None:
    try:
        train(settle(argv))
    except Stop:
        if int(os.environ.get("RANK", 0)):
            time.sleep(5)  # the first process says the same, and torchrun then ends this one
        raise
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run(main, "train.py"))
