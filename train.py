"""Pre-train a ResNet-18 by contrastive learning on mini-batches that are chosen, not only drawn.

    python train.py                                                            # embedded data, minutes on a laptop
    python train.py --dataset tinyimagenet --sampler osgd --k 1500 --q 150     # the paper's settings
    python train.py --dataset cifar100 --sampler spectral --objective sogclr
    python train.py --dataset folder --data-dir ~/photos --image-size 64
    tensorboard --logdir runs                                                  # watch

A run writes its folder (--out-dir): config.json, log.jsonl (a line per epoch), checkpoint.pt, result.json and
TensorBoard's events. Ctrl-C saves; the same command with --resume goes on bit for bit.
"""
import contextlib
import errno
import functools
import io
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid

import data
from augment import augment
from cli import Stop, parse, pick_device, provenance, write_atomically
from lars import LARS, warmup_cosine
from model import ContrastiveModel, SogCLRLoss, embed, hcl, nt_xent
from retrieval import retrieval_metrics
from samplers import batch_losses, random_batches, random_batches_with_replacement, select_by_loss, spectral_batches

# ------------------------------------------------------------------------------------------------- knobs
# name: (default, allowed, what it does). The command line is made from this table. A default of None is filled
# in by the data set or by another knob, as its line says.
KNOBS = {
    # data
    "dataset": ("deadleaves", tuple(data.SOURCE_SIZE), "images to train on; deadleaves is generated, cifar100 and tinyimagenet "
                "download when absent, folder reads any images under --data-dir"),
    "data_dir": ("data", str, "folder (or zip file) of the data; decoded images are cached beside them"),
    "limit": (None, "int >= 2", "use only the first n training images, spread over the classes; of deadleaves, make n"),
    "source_size": (None, "int >= 1 <= 4096", "side to which images are brought once, before augmentation (default: the "
                    "data set's own; folder 8/7 of the image size)"),
    "skip_broken": (False, bool, "leave out images that cannot be decoded instead of stopping, and count them"),
    # augmentation
    "image_size": (None, "int >= 8 <= 2048", "side of the augmented views, pixels"),
    "crop_scale": (None, "float > 0 <= 1", "smallest share of the image's area that a random crop keeps"),
    "jitter": (None, "float >= 0 <= 2", "strength of the colour jitter; 1 is (0.4, 0.4, 0.2, 0.1)"),
    # choosing mini-batches
    "sampler": ("spectral", ("random", "osgd", "osgd-replacement", "spectral", "refined"), "random: a permutation cut into "
                "batches (Algorithm 4); osgd: of each k batches of a permutation the q of highest loss (6); "
                "osgd-replacement: of k batches drawn anew at each selection (5); spectral: windows of k*B images "
                "cut into batches of similar ones (1); refined: those, exchanging images until harder still"),
    "embeddings": (None, ("fresh", "free"), "what is selected on. fresh: embedded anew at each selection; free: what the steps "
                   "themselves computed when they last saw each image, the first epoch random (default: refined free, "
                   "others fresh)"),
    "k": (None, "int >= 1", "batches looked at in one selection (default: osgd 1500, others 40; deadleaves 32)"),
    "q": (None, "int >= 1", "batches kept of each k by osgd (default: 150; deadleaves 8); spectral and refined keep all k"),
    "lowest": (False, bool, "osgd keeps the batches of lowest loss instead"),
    "select_after": (0, "int >= 0", "random batches for the first n epochs: hard ones pay once random ones are easy"),
    "batch_size": (32, "int >= 2", "images in a mini-batch, B"),
    # objective
    "objective": ("simclr", ("simclr", "sogclr", "hcl"), "simclr: NT-Xent; sogclr: global loss with running "
                  "estimates; hcl: NT-Xent with hard negatives weighted up"),
    "temperature": (0.1, "float > 0", "divides the cosine similarities, in the loss and in selection"),
    "gamma": (0.9, "float >= 0 <= 1", "sogclr: weight of the newest value in the running estimates"),
    "tau_plus": (0.1, "float >= 0 < 1", "hcl: prior probability that a negative is of the same class"),
    "beta": (1.0, "float >= 0", "hcl: exponent of the negatives' weights"),
    # network and optimiser
    "small_stem": (False, bool, "3x3 stem without max-pool: better and slower on small images"),
    "epochs": (None, "int >= 1", "an epoch is floor(N/B) steps whatever the sampler"),
    "warmup_epochs": (None, "int >= 0", "epochs of linear warm-up before half a cosine down to 0"),
    "lr": (None, "float > 0 <= 1e30", "peak learning rate (default: by --lr-scaling)"),
    "lr_scaling": ("sqrt", ("sqrt", "linear"), "peak learning rate 0.075*sqrt(B) or 0.075*B/256"),
    "weight_decay": (1e-6, "float >= 0 <= 1", "LARS's weight decay"),
    # the run
    "seed": (0, "int >= 0 < 4294967296", "fixes weights, batches and augmentation on one machine"),
    "device": ("auto", str, "cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"),
    "compile": (False, bool, "torch.compile the network: pays on long runs"),
    "out_dir": (None, str, "run folder (default: runs/DATASET-SAMPLER-OBJECTIVE-seedSEED)"),
    "resume": (False, bool, "go on from the run folder's checkpoint"),
    "max_steps": (None, "int >= 1", "stop early, after this many steps in all; the schedule stays that of --epochs"),
    "log_every": (20, "int >= 1 <= 100000", "steps between progress lines; the device is read only there"),
    "checkpoint_minutes": (10.0, "float >= 0", "save at least this often, besides the end of every epoch"),
}
# The embedded data's numbers were chosen on the random sampler alone: of 2,048 images at crop scale 0.5 and half the
# jitter, its loss falls below 1.5 in the 4th epoch and to 1.0 in the 10th, after less than three minutes on two cores.
PAPER = {"image_size": 224, "crop_scale": 0.08, "jitter": 1.0, "epochs": 100, "warmup_epochs": 10}
DATASET_DEFAULTS = {"cifar100": PAPER, "tinyimagenet": PAPER, "folder": PAPER, "deadleaves": {
    "limit": 2048, "image_size": 32, "crop_scale": 0.5, "jitter": 0.5, "epochs": 10, "warmup_epochs": 1}}
FREE_ON_RESUME = {"data_dir", "out_dir", "device", "compile", "resume", "max_steps", "log_every", "checkpoint_minutes"}
VALIDATION_IMAGES = 1000  # of the quick two-view retrieval at the end of each epoch


def settle(argv: list[str]) -> dict:
    """All knobs with their values from the command line's words; raises Stop where they do not go together."""
    knobs, given = parse(argv, __doc__, KNOBS, DATASET_DEFAULTS)
    sampler, quick = knobs["sampler"], knobs["dataset"] == "deadleaves"
    partition = sampler in ("spectral", "refined")
    needless = {"random": {"k", "q", "lowest", "select_after", "embeddings"}, "osgd-replacement": {"embeddings"}
                }.get(sampler, {"q", "lowest"} if partition else set()) & given
    if needless:
        raise Stop(f"--{min(needless).replace('_', '-')} means nothing to --sampler {sampler}: leave it out")
    knobs["embeddings"] = knobs["embeddings"] or ("free" if sampler == "refined" else "fresh")
    if partition:
        knobs["k"] = knobs["q"] = knobs["k"] or (32 if quick else 40)
    elif sampler != "random":
        knobs["k"] = knobs["k"] or (32 if quick else 1500)
        knobs["q"] = knobs["q"] or min(knobs["k"], 8 if quick else 150)
        if knobs["q"] > knobs["k"]:
            raise Stop(f"--q {knobs['q']} is more than --k {knobs['k']}: give --q at most {knobs['k']}, or a larger --k")
    if knobs["warmup_epochs"] >= knobs["epochs"]:
        if "warmup_epochs" in given:
            raise Stop(f"--warmup-epochs {knobs['warmup_epochs']}: give fewer than --epochs {knobs['epochs']}")
        knobs["warmup_epochs"] = knobs["epochs"] // 10  # a run shorter than the default warm-up
    b = knobs["batch_size"]
    knobs["lr"] = knobs["lr"] or (0.075 * math.sqrt(b) if knobs["lr_scaling"] == "sqrt" else 0.075 * b / 256)
    if knobs["dataset"] == "folder":  # 256 for 224, as is usual
        knobs["source_size"] = knobs["source_size"] or -(-knobs["image_size"] * 8 // 7)
    knobs["out_dir"] = knobs["out_dir"] or "runs/{dataset}-{sampler}-{objective}-seed{seed}".format(**knobs)
    return knobs


# ------------------------------------------------------------------------------------------------- choosing
def side_by_side(images: Tensor, *batches: Tensor) -> Tensor:
    """One picture [3, h, w] uint8 of mini-batches beside one another."""
    grids = [make_grid(images[rows.to(images.device)], nrow=8, pad_value=255) for rows in batches]
    return torch.cat(grids, dim=2).cpu()


def select(knobs: dict, n: int, epoch: int, order: Tensor, seen: Tensor, embed_samples, generator: torch.Generator):
    """The next mini-batches to train on.

    order [<= n]: what is left of the permutation that is consumed k batches at a time.  seen [n]: for free embeddings,
    those that there are; the others come first, in random batches.  embed_samples(index) -> u, v.  Returns batches [m, B] on the CPU, the new order, and None for random batches or
    a dict: `chosen` [m], the losses of the batches; `random` [k], those of the random batches `random_batches` [k, B]
    of the same embeddings (for osgd the k that it chose from).
    """
    sampler, b, k, q, temperature = (knobs[x] for x in ("sampler", "batch_size", "k", "q", "temperature"))
    if sampler == "random" or epoch < knobs["select_after"]:
        return random_batches(n, b, generator), order, None
    if sampler == "osgd-replacement":
        candidates, local = random_batches_with_replacement(k, n, b, generator).unique(return_inverse=True)
    else:
        if len(order) < k * b:
            order = torch.randperm(n, generator=generator)
            if knobs["embeddings"] == "free" and not seen.all():
                order = order[seen[order].byte().argsort(stable=True)]
                first = min(-(-int((~seen).sum()) // b), n // b) * b
                return order[:first].view(-1, b), order[first:], None
        candidates, order = order[:k * b], order[k * b:]
        local = torch.arange(k * b).view(k, b)
    u, v = embed_samples(candidates)
    local = local.to(u.device)
    if sampler in ("spectral", "refined"):
        chosen = spectral_batches(u, v, b, k, temperature, generator, refine=sampler == "refined")
    else:
        chosen = select_by_loss(u, v, local, q, temperature, knobs["lowest"])
    scores = {"chosen": batch_losses(u, v, chosen, temperature), "random": batch_losses(u, v, local, temperature),
              "random_batches": candidates[local.cpu()]}
    return candidates[chosen.cpu()], order, scores


# ------------------------------------------------------------------------------------------------- the run
def train(knobs: dict) -> None:
    run = Path(knobs["out_dir"]).expanduser()
    checkpoint_path, log_path = run / "checkpoint.pt", run / "log.jsonl"
    try:
        if knobs["resume"] and not checkpoint_path.exists():
            raise Stop(f"--resume: there is no checkpoint in {run}; leave --resume out to start it, or give its --out-dir")
        if not knobs["resume"] and checkpoint_path.exists():
            raise Stop(f"{run} holds a run already: add --resume to go on with it, or give another --out-dir")
        there = next(path for path in (run, *run.absolute().parents) if path.exists())
        if not (there.is_dir() and os.access(there, os.W_OK)):  # said before minutes of decoding, not after
            raise OSError(errno.EACCES, f"{there} is not a folder that can be written")
    except OSError as error:
        raise Stop(f"--out-dir {run}: {error.strerror}; give another folder") from None

    # device
    device = pick_device(knobs["device"])
    cuda = device.type == "cuda"
    if cuda:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.deterministic = True  # the same seed, the same weights
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=cuda)

    # data
    load = functools.partial(data.load, knobs["dataset"], data_dir=knobs["data_dir"], source_size=knobs["source_size"],
                             skip_broken=knobs["skip_broken"])
    try:
        images, labels = load("train", num_images=knobs["limit"])
        val_images, val_labels = load("val", num_images=VALIDATION_IMAGES)
    except (ValueError, OSError) as error:
        raise Stop(str(error)) from None
    except MemoryError:
        raise Stop("the data do not fit into memory while they are made: give a smaller --limit or --source-size") from None
    if knobs["limit"] and knobs["limit"] < len(images):
        images = images[data.limit_indices(labels, knobs["limit"])]
    val_images = val_images[data.limit_indices(val_labels, min(VALIDATION_IMAGES, len(val_images)))]
    n, b, k = len(images), knobs["batch_size"], knobs["k"]
    if b > n:
        raise Stop(f"--batch-size {b} is more than the {n:,} training images: give "
                   + (f"--batch-size at most {n}" if n > 1 else "more images"))
    if k and k * b > n and knobs["sampler"] != "osgd-replacement":  # which draws each batch from all images
        raise Stop(f"--k {k} batches of {b} need {k * b:,} images, there are {n:,}: give --k at most {n // b}")
    if cuda and images.nbytes < torch.cuda.mem_get_info(device)[0] // 2:
        images, val_images = images.to(device), val_images.to(device)

    def views(pictures: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        batch = pictures[index.to(pictures.device, non_blocking=True)]
        if batch.device != device:  # a set too large for the device: only a pinned copy does not wait for it
            batch = batch.pin_memory().to(device, non_blocking=True)
        batch = augment(batch, knobs["image_size"], generator, (knobs["crop_scale"], 1.0), knobs["jitter"])
        return batch.contiguous(memory_format=torch.channels_last)

    # network, objective, optimiser, schedule
    torch.manual_seed(knobs["seed"])
    model = ContrastiveModel(knobs["small_stem"]).to(device, memory_format=torch.channels_last)
    network = torch.compile(model, dynamic=False) if knobs["compile"] else model
    sogclr = SogCLRLoss(n if knobs["objective"] == "sogclr" else 0, knobs["temperature"], knobs["gamma"]).to(device)
    objective = {"simclr": lambda z1, z2, index: nt_xent(z1, z2, knobs["temperature"]), "sogclr": sogclr,
                 "hcl": lambda z1, z2, index: hcl(z1, z2, knobs["temperature"], knobs["tau_plus"], knobs["beta"])
                 }[knobs["objective"]]
    optimizer = LARS(model.parameters(), knobs["lr"], weight_decay=knobs["weight_decay"])
    steps_per_epoch = n // b
    total_steps = knobs["epochs"] * steps_per_epoch
    last_step = min(total_steps, knobs["max_steps"] or total_steps)
    # Two generators, so that what a sampler draws does not change how the training views are augmented.
    choosing, augmenting = (torch.Generator().manual_seed(2 * knobs["seed"] + i) for i in range(2))

    # All that a checkpoint holds besides weights, optimiser and generators.
    state = {"step": 0, "order": torch.empty(0, dtype=torch.int64), "batches": torch.empty(0, b, dtype=torch.int64),
             "seconds_training": 0.0, "seconds_selecting": 0.0, "loss_sum": 0.0, "loss_count": 0,
             "chosen": [], "random": [], "log": [], "seen": torch.zeros(n, dtype=torch.bool)}
    free = knobs["embeddings"] == "free"
    if free:  # the last projections of each sample's two views
        state["projections"] = torch.zeros(n, 2, model.head[-1].num_features, device=device)
    settings = {name: value for name, value in knobs.items() if name not in FREE_ON_RESUME} | {"images": n}
    record = {"knobs": knobs, "images": n, "validation_images": len(val_images), "steps": total_steps, "resumed": [],
              **provenance(device)}
    if knobs["resume"]:
        try:
            saved = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
            record = json.loads((run / "config.json").read_text())
            differences = [f"{name}: {saved['settings'].get(name)} there, {value} now" for name, value in settings.items()
                           if saved["settings"].get(name) != value]
            if differences:
                raise Stop(f"--resume: {run} was started with other settings ({'; '.join(differences)}); give those, "
                           "or another --out-dir")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            sogclr.load_state_dict(saved["sogclr"])
            choosing.set_state(saved["choosing"])
            augmenting.set_state(saved["augmenting"])
            state = saved["state"]
            if free:
                state["projections"] = state["projections"].to(device)
        except Stop:
            raise
        except OSError as error:
            raise Stop(f"--resume: {error.filename}: {error.strerror}") from None
        except Exception as error:  # torch.load fails in many ways on a damaged file
            raise Stop(f"--resume: {checkpoint_path} cannot be used ({type(error).__name__}): it is damaged or not of this "
                       "program; give another --out-dir to start anew") from None
        if state["step"] >= last_step and (run / "result.json").exists():
            print(f"{run} is finished: step {state['step']}")
            return
        record["resumed"].append({"step": state["step"], **provenance(device)})
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "result.json").unlink(missing_ok=True)  # of a run that is now extended
    except OSError as error:
        raise Stop(f"--out-dir {run}: {error.strerror}; give another folder") from None
    write_atomically(run / "config.json", json.dumps(record, indent=1).encode())
    write_atomically(log_path, "".join(json.dumps(line) + "\n" for line in state["log"]).encode())
    from torch.utils.tensorboard import SummaryWriter  # takes a second: after all that can be refused
    board = SummaryWriter(run, purge_step=state["step"] + 1)

    interrupted = []
    def on_signal(number, frame):
        interrupted.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the program at once
    handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def tick(what: str) -> None:
        """Add the seconds since the last tick to `what`; on CUDA the work behind them is waited for."""
        nonlocal ticked
        if cuda:
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if what in state:
            state[what] += now - ticked
        ticked = now

    def read_losses() -> float:
        """Bring the losses of the steps since the last call from the device; returns their mean."""
        nonlocal unread
        losses = recent[:unread].tolist()
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise Stop(f"the loss is {loss} at step {state['step'] - unread + i + 1}: try a lower --lr, a higher "
                           "--temperature or more --warmup-epochs", code=1)
        state["loss_sum"], state["loss_count"] = state["loss_sum"] + sum(losses), state["loss_count"] + unread
        unread = 0
        return sum(losses) / max(len(losses), 1)

    def save() -> None:
        read_losses()  # nothing that has diverged is saved
        buffer = io.BytesIO()
        torch.save({"settings": settings, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "sogclr": sogclr.state_dict(), "choosing": choosing.get_state(), "augmenting": augmenting.get_state(),
                    "state": state}, buffer)
        write_atomically(checkpoint_path, buffer.getbuffer())

    def leave() -> None:
        save()
        command = shlex.join([sys.executable, *sys.argv] + ["--resume"] * ("--resume" not in sys.argv))
        raise Stop(f"\nsaved at step {state['step']}; go on with: {command}", code=128 + interrupted[0])

    if state["step"] == 0:
        pairs = torch.stack([views(images, torch.arange(min(b, n)), torch.Generator().manual_seed(i)) for i in range(2)], 1)
        board.add_image("augmented_pairs", make_grid(pairs.flatten(0, 1), nrow=8, normalize=True), 0)
    def embed_pictures(pictures: Tensor, index: Tensor, generator: torch.Generator, stop=lambda: False):
        with autocast():
            u, v = embed(network, lambda part: views(pictures, part, generator), index, stop=stop)
        if not (u.isfinite().all() and v.isfinite().all()):
            raise Stop(f"the embeddings are not finite after step {state['step']}: try a lower --lr, a higher --temperature "
                       "or more --warmup-epochs", code=1)
        return u, v

    recent, unread = torch.zeros(knobs["log_every"], device=device), 0
    ticked = saved_at = time.perf_counter()
    rate_step, rate_seconds = state["step"], state["seconds_training"]
    print(f"{n:,} images, {steps_per_epoch} steps an epoch, {total_steps:,} steps on {device}; {run}", flush=True)
    try:
        while state["step"] < last_step:
            step = state["step"]

            # choose
            if len(state["batches"]) == 0:
                read_losses()
                tick("seconds_training")
                before = choosing.get_state()
                try:
                    state["batches"], state["order"], scores = select(
                        knobs, n, step // steps_per_epoch, state["order"], state["seen"],
                        (lambda index: state["projections"][index.to(device)].unbind(1)) if free else
                        (lambda index: embed_pictures(images, index, choosing, stop=lambda: interrupted)), choosing)
                except KeyboardInterrupt:
                    choosing.set_state(before)
                    leave()
                if scores:
                    for kind in ("chosen", "random"):
                        board.add_histogram(f"batch_loss/{kind}", scores[kind].cpu(), step + 1)
                        board.add_scalar(f"batch_loss_mean/{kind}", scores[kind].mean().item(), step + 1)
                        state[kind].append(scores[kind].mean().item())
                    if len(state["chosen"]) == 1:  # one picture an epoch
                        hardest = state["batches"][scores["chosen"].argmax().item()]
                        board.add_image("batches/hardest_left_random_right",
                                        side_by_side(images, hardest, scores["random_batches"][0]), step + 1)
                tick("seconds_selecting")
            index, state["batches"] = state["batches"][0], state["batches"][1:]

            # step
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(step, total_steps, knobs["warmup_epochs"] * steps_per_epoch, knobs["lr"])
            with autocast():
                z1, z2 = network(views(images, index.repeat(2), augmenting)).chunk(2)
            on_device = index.to(device, non_blocking=True)
            loss = objective(z1, z2, on_device)
            if free:
                state["projections"].index_copy_(0, on_device, torch.stack([z1, z2], 1).detach().float())
                state["seen"][index] = True
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            recent[unread] = loss.detach()
            unread += 1
            state["step"] = step = step + 1

            # report
            epoch_ends = step % steps_per_epoch == 0 or step == last_step
            if unread == knobs["log_every"] or epoch_ends or interrupted:
                mean_loss, lr = read_losses(), optimizer.param_groups[0]["lr"]
                tick("seconds_training")
                spent = state["seconds_training"] + state["seconds_selecting"]
                rate = (step - rate_step) * b / max(state["seconds_training"] - rate_seconds, 1e-9)
                rate_step, rate_seconds = step, state["seconds_training"]
                left = spent / step * (last_step - step)
                print(f"epoch {(step - 1) // steps_per_epoch + 1}/{knobs['epochs']} step {step}/{last_step} loss {mean_loss:.3f} "
                      f"lr {lr:.3f} {rate:.0f} images/s selecting {state['seconds_selecting'] / spent:.0%} "
                      f"left {int(left // 60)}:{int(left % 60):02d}", flush=True)
                for name, value in (("loss", mean_loss), ("learning_rate", lr), ("images_per_second", rate),
                                    ("seconds/selecting", state["seconds_selecting"]),
                                    ("seconds/training", state["seconds_training"])):
                    board.add_scalar(name, value, step)
            if epoch_ends:
                fixed = torch.Generator().manual_seed(0)  # the same views every time, in every run
                metrics = retrieval_metrics(*embed_pictures(val_images, torch.arange(len(val_images)), fixed))
                line = {"epoch": step / steps_per_epoch, "step": step, "seconds_training": state["seconds_training"],
                        "seconds_selecting": state["seconds_selecting"], "loss": state["loss_sum"] / state["loss_count"],
                        **{f"{kind}_loss": sum(state[kind]) / len(state[kind]) if state[kind] else None
                           for kind in ("chosen", "random")},
                        "R1": (metrics["u2v_R1"] + metrics["v2u_R1"]) / 2, "R5": (metrics["u2v_R5"] + metrics["v2u_R5"]) / 2}
                state["log"].append(line)
                state.update(loss_sum=0.0, loss_count=0, chosen=[], random=[])
                write_atomically(log_path, "".join(json.dumps(line) + "\n" for line in state["log"]).encode())
                for name in ("R1", "R5"):
                    board.add_scalar(f"validation/{name}", line[name], step)
                print(f"epoch {line['epoch']:g}: loss {line['loss']:.3f}, R@1 {line['R1']:.1%}, R@5 {line['R5']:.1%} "
                      f"of {len(val_images)} validation images", flush=True)
            if epoch_ends or time.perf_counter() - saved_at > 60 * knobs["checkpoint_minutes"]:
                save()
                saved_at = time.perf_counter()
            if interrupted:
                leave()
            if epoch_ends:
                tick("other")
    except OSError as error:  # TensorBoard's writer reports a full disk so
        raise Stop(f"cannot write to {run}: {error.strerror or error}; free some space and go on with --resume") from None
    finally:
        with contextlib.suppress(OSError):
            board.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if state["log"]:
        result = {**state["log"][-1], **record}
        write_atomically(run / "result.json", json.dumps(result, indent=1).encode())


def main(argv: list[str]) -> int:
    try:
        train(settle(argv))
    except Stop as stop:
        print(stop if stop.code > 2 else f"train.py: error: {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:  # before there is anything to save
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
