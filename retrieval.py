"""What training was worth: retrieval of partner views, with uncertainty; runs compared on the same images.

    python retrieval.py runs/quick-*                           # a table; files in results/
    python retrieval.py runs/* --recalibrate --curve --probe   # runs that differ in seed alone are a group
    python retrieval.py runs/a --corruptions official --data-dir data    # with a -C set in it
    python retrieval.py runs/* --export results/runs.json.gz   # for compare.py: the same again, no training

Each run's scores are kept beside its checkpoint, in results.json: the same call again only reads them. --out
gets retrieval.json (all that is printed, and more) and the figures of --curve and --histograms.
"""
import functools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import cli
import compare
import corruptions
import data
from augment import views_of
from cli import Stop
from model import ContrastiveModel, embed, unit

KNOBS = {
    "data_dir": (None, str, "folder of the data, and of the -C sets (default: the run's own)"),
    "limit": (None, "int >= 2 <= 10000000", "validation images, spread over the classes (default: all; of "
              "deadleaves 1000)"),
    "repeats": (3, "int >= 1 <= 1000", "draws of the two views"),
    "corruptions": (None, ("built-in", "official"), "also find the partner among an image's own corruptions, "
                    "fourteen of ours or those of CIFAR-100-C or Tiny-ImageNet-C"),
    "corruption_limit": (None, "int >= 1 <= 10000000", "images of that task (default: all; deadleaves 40)"),
    "probe": (False, bool, "also accuracy by the encoder's features: a linear classifier, 20 neighbours"),
    "recalibrate": (False, bool, "all of it also with batch norm's statistics anew from training batches"),
    "recalibrate_batches": (64, "int >= 1 <= 100000", "how many, of the run's batch size"),
    "histograms": (False, bool, "also the losses of random and of spectral batches of training images"),
    "seed": (0, "int >= 0 < 4294967296", "fixes views, corruptions and batches, the same for every run"),
    "device": ("auto", str, "cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"),
    "curve": (False, bool, "also R@1 along training, from log.jsonl, and the cost to reach --target"),
    "export": (None, str, "file for compare.py, FILE.json.gz: all that its tables and curves are made of"),
    **compare.KNOBS,
}
LOSSES, MOST = "batch losses", 4096  # the task of --histograms, and its images
MADE_BY = ("retrieval", "corruptions", "model", "augment", "data", "deadleaves", "samplers")  # scores


# -------------------------------------------------------------------------------- metrics
@torch.no_grad()
def partner_ranks(u: Tensor, v: Tensor, cosine: bool = True) -> Tensor:
    """Ranks from 1, int64 [2, N]: of v_i among all v by similarity with u_i, and of u_i among all u with v_i.

    u, v: [N, D].  cosine=False: similarity is the inner product, as in the paper's released script.  What is
    as near as the partner, up to rounding, counts as nearer.  N^2 D operations and 64 MB (float64: 128)
    besides copies of u and v.  Raises ValueError for unequal shapes or embeddings that are not finite. """
    if u.ndim != 2 or u.shape != v.shape or len(u) == 0:
        raise ValueError(f"u {tuple(u.shape)} and v {tuple(v.shape)}: give two [N, D] tensors of one shape")
    if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
        raise ValueError("u or v holds NaN or infinity: embed with a model whose loss is finite")
    u, v = (x if x.dtype == torch.float64 else x.float() for x in (u, v))
    # One factor for all rows changes no rank, and products stay in range.
    tiny = torch.finfo(u.dtype).tiny
    u, v = (unit(x) if cosine else x / x.abs().max().clamp(min=tiny) for x in (u, v))
    rounding = (8 + u.shape[1] ** 0.5) * torch.finfo(u.dtype).eps * u.norm(dim=1).max() * v.norm(dim=1).max()
    n, bound = len(u), (u * v).sum(1) - rounding
    ranks = u.new_zeros(2, n)  # counts are exact up to 2^24
    rows = max(1, 2 ** 23 // n)
    scratch, ones = u.new_empty(2, min(rows, n), n), u.new_ones(n)
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False  # too coarse
    # One product serves both directions; counting by products is faster than by sums.
    for i in range(0, n, rows):
        s, nearer = scratch[:, :len(u[i:i + rows])]
        torch.mm(u[i:i + rows], v.T, out=s)
        torch.ge(s, bound[i:i + rows, None], out=nearer)
        ranks[0, i:i + rows] = nearer @ ones
        ranks[1] += ones[:len(s)] @ s.ge_(bound)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    return ranks.long().clamp(min=1)


def retrieval_metrics(u: Tensor, v: Tensor) -> dict[str, float]:
    """How well the partner of each row is found among all rows of the other view, by cosine similarity.

    Returns u2v_R1, u2v_R5, u2v_R10 (shares between 0 and 1), u2v_mean_rank, u2v_median_rank (from 1; the
    mean of the middle two where N is even), u2v_mrr (mean reciprocal rank), and the same with v2u_.  Ties
    count against the model.  u, v and errors: see partner_ranks. """
    found = {}
    for name, r in zip(("u2v", "v2u"), partner_ranks(u, v).cpu().numpy()):
        found |= {f"{name}_R{k}": (r <= k).mean() for k in (1, 5, 10)}
        found |= {f"{name}_mean_rank": r.mean(), f"{name}_median_rank": np.median(r),
                  f"{name}_mrr": (1 / r).mean()}
    return {name: float(x) for name, x in found.items()}


# -------------------------------------------------------------------------------- a run's scores
def load_checkpoint(path: Path, knobs: dict) -> ContrastiveModel:
    """The network of a checkpoint, in eval mode; knobs: of the run's config.json. Raises Stop."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        settings = saved["settings"]
        model = ContrastiveModel(knobs["small_stem"])
        model.load_state_dict(saved["model"])
    except Exception as error:  # torch.load fails in many ways on a damaged file
        raise Stop(f"{path} cannot be used ({type(error).__name__}): absent, damaged or not of train.py; "
                   "give another run, or train it again") from None
    if differ := [name for name in knobs if name in settings and settings[name] != knobs[name]]:
        raise Stop(f"{path} is of another run than config.json ({', '.join(differ)}): put back its own")
    return model.eval()


def load(run: compare.Run, split: str, folder: Path, limit: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Images and labels of a split of the run's data; rows of `limit` of them, spread over the classes."""
    knobs, number = run.knobs, {"num_images": limit} if limit else {}
    images, labels = data.load(knobs["dataset"], split, folder, source_size=knobs["source_size"],
                               skip_broken=knobs["skip_broken"], **number)
    return images, labels, data.limit_indices(labels, min(limit or len(images), len(images)))


def recalibrate(model: nn.Module, batches) -> None:
    """Batch norm's statistics anew from batches [2B, C, H, W], each view apart, as in training."""
    update_bn((half for batch in batches for half in batch.chunk(2)), model)


def plan(run: compare.Run, knobs: dict) -> dict[str, dict]:
    """What is to be computed of a run: settings by the title of the table that the scores go to."""
    dataset, name = run.knobs["dataset"], knobs["corruptions"]
    quick = dataset == "deadleaves"
    limit = knobs["limit"] or (1000 if quick else None)
    tasks = {"two views": {"repeats": knobs["repeats"]}}
    if name == "official":
        if dataset not in corruptions.OFFICIAL:
            raise Stop(f"--corruptions official: there is none of {dataset}; give --corruptions built-in")
        name = corruptions.OFFICIAL[dataset][0]
    if name:
        tasks[f"corruptions, {name}"] = {"images": knobs["corruption_limit"] or (40 if quick else limit)}
    tasks |= {"probe": {}} if knobs["probe"] else {}
    common = {"limit": limit, "seed": knobs["seed"], "recalibrate_batches": 0}
    settings = {LOSSES: {"task": LOSSES, **common}} if knobs["histograms"] else {}
    settings |= {title: {"task": title, **own, **common} for title, own in tasks.items()}
    if knobs["recalibrate"]:
        batches = {"recalibrate_batches": knobs["recalibrate_batches"]}
        settings |= {f"{title}, recalibrated": settings[title] | batches for title in tasks}
    return settings


def compute(run: compare.Run, wanted: dict[str, dict], folder: Path, val: tuple,
            device: torch.device) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Title and values [m, n] of n images, by score, whose means are the scores, the first of zeros and ones,
    of each of the settings `wanted`. val: load() of the validation images in folder."""
    knobs, (mean, std) = run.knobs, data.STATISTICS[run.knobs["dataset"]]
    views = functools.partial(views_of, mean=mean, std=std, device=device, size=knobs["image_size"],
                              crop_scale=knobs["crop_scale"], jitter=knobs["jitter"])
    model = load_checkpoint(run.folder / "checkpoint.pt", knobs).to(device, memory_format=torch.channels_last)
    images, labels, rows = val
    seed, recalibrated = next(iter(wanted.values()))["seed"], 0
    if any(s["recalibrate_batches"] or s["task"] in ("probe", LOSSES) for s in wanted.values()):
        train_images, train_labels, train_rows = load(run, "train", folder, knobs["limit"])
    if any("built-in" in s["task"] for s in wanted.values()):
        corrupted = corruptions.built_in(images, seed)
    elif any("corruptions" in s["task"] for s in wanted.values()):  # checked before anything is computed
        corrupted = corruptions.official(knobs["dataset"], folder, len(images), images.shape[-1])
    for title, s in wanted.items():
        name = f"{run.folder}: {title}"
        if s["recalibrate_batches"] != recalibrated:
            recalibrated, generator = s["recalibrate_batches"], torch.Generator().manual_seed(seed)
            view, tick = views(train_images, generator), cli.progress(name, recalibrated, "batches")
            orders = (torch.randperm(len(train_rows), generator=generator) for _ in range(recalibrated))

            def batches():
                for i, order in enumerate(orders):
                    tick(i)
                    yield view(train_rows[order[:knobs["batch_size"]]].repeat(2))
            recalibrate(model, batches())
        if s["task"] == "two views":
            found, first, tick = [], [], cli.progress(name, s["repeats"] * len(rows), "images")
            for repeat in range(s["repeats"]):
                u, v = embed(model, views(images, torch.Generator().manual_seed(1000 * seed + repeat)), rows,
                             on_chunk=lambda done: tick(repeat * len(rows) + done))
                found.append(partner_ranks(u, v))
                first.append(partner_ranks(u, v, cosine=False) == 1)
            r, first = (torch.cat(x).cpu().numpy() for x in (found, first))  # [2 repeats, n]
            yield title, {"R1": r <= 1, "R5": r <= 5, "R10": r <= 10, "mrr": 1 / r, "R1_inner_product": first,
                          "rank": r}
        elif s["task"] == LOSSES:
            few = train_rows[data.limit_indices(train_labels[train_rows], max(MOST, knobs["batch_size"]))]
            yield title, corruptions.batch_losses(model, views, train_images, few, knobs["batch_size"],
                                                  knobs["temperature"], seed, name)
        elif s["task"] == "probe":
            x, val_x = (corruptions.features(model.encoder, *which, knobs["image_size"], mean, std, device)
                        for which in ((train_images, train_rows), (images, rows)))
            y, val_y = train_labels[train_rows].to(device), labels[rows].to(device)
            yield title, corruptions.probe(x, y, val_x, val_y, seed, name)
        else:
            few = rows[data.limit_indices(labels[rows], min(s["images"] or len(rows), len(rows)))]
            ranks = corruptions.own_versions(model, views, few, corrupted, seed, name)  # [5, 2, n, C]
            by_severity = np.moveaxis(ranks, 2, -1).reshape(5, -1, len(few))
            r = by_severity.reshape(-1, len(few))
            yield title, {"R1": r == 1, **{f"severity_{i}": x == 1 for i, x in enumerate(by_severity, 1)},
                          "mrr": 1 / r}


def looks(images: Tensor, labels: Tensor, rows: Tensor) -> str:
    """A digest of these images and labels."""
    return data.fingerprint(images[rows], labels[rows])


def evaluate(run: compare.Run, knobs: dict, device: torch.device) -> compare.Run:
    """The run with its scores, from results.json beside its checkpoint or computed and kept there, by the
    settings and images; those of another checkpoint or of other code are dropped. Raises Stop."""
    settings, folder = plan(run, knobs), cli.expand(knobs["data_dir"] or run.knobs["data_dir"])
    path, began = run.folder / "results.json", time.perf_counter()
    try:
        val = load(run, "val", folder, settings["two views"]["limit"])
        images, of_training = looks(*val), ""
        if knobs["recalibrate"] or knobs["probe"] or knobs["histograms"]:
            of_training = looks(*load(run, "train", folder, run.knobs["limit"]))
        published = []
        if knobs["corruptions"] == "official":
            found = (folder / corruptions.OFFICIAL[run.knobs["dataset"]][0]).glob("*")
            published = [(x.name, x.stat().st_size, x.stat().st_mtime_ns) for x in sorted(found)]
        code = data.digest(b"".join(Path(__file__).with_name(f"{x}.py").read_bytes() for x in MADE_BY))
        made_from = [(run.folder / "checkpoint.pt").stat().st_mtime_ns, code]
        kept = json.loads(path.read_text()) if path.exists() else {}
        kept = kept["scores"] if kept.get("made_from") == made_from else {}
        keys = {}
        for title, s in settings.items():
            trained = s["recalibrate_batches"] or s["task"] in ("probe", LOSSES)
            seen = {**s, "images_digest": images, "of_training": of_training * bool(trained),
                    "published": data.digest(published * ("corruptions" in title))}
            keys[title] = " ".join(f"{name}={x}" for name, x in seen.items())
        missing = {title: s for title, s in settings.items() if keys[title] not in kept}
        if not missing:
            cli.say(f"{run.folder}: read from results.json")
        made_by = cli.provenance(device)
        for title, values in compute(run, missing, folder, val, device) if missing else ():
            first, n = next(iter(values)), len(next(iter(values.values()))[0])
            scores = {name: x.mean(0) for name, x in values.items()}  # of each image
            what = f"{n:,} {'batches' if title == LOSSES else 'images'}: {compare.NAMES.get(first, first)}"
            kept[keys[title]] = {
                "images": n, "images_digest": images, "parts": len(values[first]), **made_by,
                "scores": {name: {
                    "mean": float(x.mean()), "se": float(x.std(ddof=len(x) > 1) / math.sqrt(len(x)))}
                    for name, x in scores.items()},
                "values": {name: x.tolist() for name, x in scores.items()}}
            cli.write_atomically(path, json.dumps({"made_from": made_from, "scores": kept}).encode())
            seconds = time.perf_counter() - began
            cli.say(f"{run.folder}: {title}, {what} {scores[first].mean():.3f} ({seconds:.0f} s)")
            began = time.perf_counter()
    except (ValueError, OSError) as error:
        raise Stop(f"{run.folder}: {error}") from None
    return run._replace(scores={
        title: kept[key] | {"values": {name: np.array(x) for name, x in kept[key]["values"].items()}}
        for title, key in keys.items()})


def main(argv: list[str]) -> None:
    knobs, _ = cli.parse(argv, __doc__, KNOBS, {}, "runs")
    device, runs = cli.pick_device(knobs["device"]), compare.read_runs(knobs["runs"])
    groups = compare.baseline_first(compare.group_runs(runs), runs, knobs["baseline"])
    out = compare.made(knobs["out"])
    runs = [evaluate(run, knobs, device) for run in runs]
    losses = [run.scores.pop(LOSSES, None) for run in runs]
    record = {"knobs": knobs, **cli.provenance(device), "dataset": runs[0].knobs["dataset"],
              "baseline": next(iter(groups)),
              "groups": {group: [str(runs[i].folder) for i in members] for group, members in groups.items()}}
    record |= compare.show(runs, groups, knobs["target"], out / "curve" if knobs["curve"] else None)
    if knobs["histograms"]:
        of_runs = {f"{group}, seed {runs[i].knobs['seed']}": losses[i]["values"]
                   for group, members in groups.items() for i in members}
        cli.save_figure(corruptions.draw_histograms(of_runs), out / "histograms")
        record["histograms"] = {name: {kind: [round(x, 4) for x in own[kind].tolist()] for kind in own}
                                for name, own in of_runs.items()}
    cli.write_atomically(out / "retrieval.json", json.dumps(record, indent=1).encode())
    if knobs["export"]:
        cli.write_atomically(cli.expand(knobs["export"]), compare.export(runs))
    cli.say(f"\n{out / 'retrieval.json'}, figures beside it")


if __name__ == "__main__":
    sys.exit(cli.run(main, "retrieval.py"))
