"""What training was worth: retrieval of partner views, with uncertainty; runs compared on the same images.

    python retrieval.py runs/quick-*                           # a table; files in results/
    python retrieval.py 'runs/*-seed?' --recalibrate --curve   # quoted globs will do; groups differ by seed
    python retrieval.py runs/a runs/b --corruptions built-in --probe --histograms
    python retrieval.py runs/a --corruptions official --data-dir data    # with a -C set in it
    python retrieval.py runs/* --export results/runs.json.gz   # for compare.py: the same again, no training

Each run's scores are kept beside its checkpoint, in results.json and results.npz: the same call again only
reads them. --out gets retrieval.json (all that is printed, and more), the figure neighbours (.png and .pdf),
with --curve also curve, and with --histograms also histograms.
"""
import functools
import io
import json
import math
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import cli
import compare
import corruptions
import data
from augment import views_of
from cli import Stop
from model import ContrastiveModel, embed

KNOBS = {
    "data_dir": (None, str, "folder of the data, and of the -C sets (default: the run's own)"),
    "limit": (None, "int >= 2 <= 10000000", "validation images of the two-view task, spread over the classes "
              "(default: all; deadleaves makes 1000, or as many as are asked for)"),
    "repeats": (3, "int >= 1 <= 1000", "draws of the two views"),
    "corruptions": (None, ("built-in", "official"), "also find the partner among an image's own corrupted "
                    "versions. built-in: fourteen of ours; official: CIFAR-100-C or Tiny-ImageNet-C"),
    "corruption_limit": (None, "int >= 1 <= 10000000", "images of that task (default: all; deadleaves 40)"),
    "probe": (False, bool, "also the encoder's features: accuracy of 20 neighbours, of a linear classifier"),
    "recalibrate": (False, bool, "report everything also with batch norm's statistics taken anew from random "
                    "training batches"),
    "recalibrate_batches": (64, "int >= 1 <= 100000", "how many, of the run's batch size"),
    "histograms": (False, bool, "also the losses of random and of spectral batches of training images"),
    "seed": (0, "int >= 0 < 4294967296", "fixes views, corruptions and batches, the same for every run"),
    "device": ("auto", str, "cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"),
    "curve": (False, bool, "also R@1 along training, from log.jsonl, and the cost to reach --target"),
    "export": (None, str, "file for compare.py, FILE.json.gz: all that its tables and curves are made of"),
    **compare.KNOBS,
}
LOSSES, MOST = "batch losses", 4096  # the task of --histograms, and its images
QUERIES, NEAREST = 4, 5  # of the picture of neighbours
# Scores depend on these files; batch losses on samplers.py as well.
MADE_BY = ("retrieval.py", "corruptions.py", "model.py", "augment.py", "data.py", "deadleaves.py")


# -------------------------------------------------------------------------------- metrics
@torch.no_grad()
def partner_ranks(u: Tensor, v: Tensor, cosine: bool = True) -> Tensor:
    """Ranks from 1, int64 [2, N]: of v_i among all v by similarity with u_i, and of u_i among all u with v_i.

    u, v: [N, D]; need not be normalised.  cosine=False: similarity is the inner product, as in the paper's
    released script.  What is as near as the partner, up to rounding, counts as nearer.  N^2 D operations and
    64 MB (float64: 128) besides copies of u and v.  Raises ValueError for unequal shapes or embeddings that
    are not finite. """
    if u.ndim != 2 or u.shape != v.shape or len(u) == 0:
        raise ValueError(f"u {tuple(u.shape)} and v {tuple(v.shape)}: give two [N, D] tensors of one shape")
    if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
        raise ValueError("u or v holds NaN or infinity: embed with a model whose loss is finite")
    u, v = (x if x.dtype == torch.float64 else x.float() for x in (u, v))
    u, v = (F.normalize(x, dim=1) if cosine else x for x in (u, v))
    rounding = (8 + u.shape[1] ** 0.5) * torch.finfo(u.dtype).eps * u.norm(dim=1).max() * v.norm(dim=1).max()
    n, bound = len(u), (u * v).sum(1) - rounding
    ranks = u.new_zeros(2, n)  # counts are exact up to 2^24
    rows = max(1, 2 ** 23 // n)
    scratch, ones = u.new_empty(2, min(rows, n), n), u.new_ones(n)
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False  # too coarse
    try:
        # One product serves both directions; counting by products is faster than by sums.
        for i in range(0, n, rows):
            s, nearer = scratch[:, :len(u[i:i + rows])]
            torch.mm(u[i:i + rows], v.T, out=s)
            torch.ge(s, bound[i:i + rows, None], out=nearer)
            ranks[0, i:i + rows] = nearer @ ones
            ranks[1] += ones[:len(s)] @ s.ge_(bound)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    return ranks.long().clamp(min=1)


def rank_values(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Of ranks [..., 2, N] the values [..., N] (of medians [..., 1]) whose means are retrieval_metrics."""
    values = {}
    for name, r in zip(("u2v", "v2u"), np.moveaxis(ranks, -2, 0)):
        values |= {f"{name}_R{k}": r <= k for k in (1, 5, 10)}
        values |= {f"{name}_mean_rank": r, f"{name}_median_rank": np.median(r, axis=-1, keepdims=True),
                   f"{name}_mrr": 1 / r}
    return values


def retrieval_metrics(u: Tensor, v: Tensor) -> dict[str, float]:
    """How well the partner of each row is found among all rows of the other view, by cosine similarity.

    Returns u2v_R1, u2v_R5, u2v_R10 (shares between 0 and 1), u2v_mean_rank, u2v_median_rank (from 1; the
    mean of the middle two where N is even), u2v_mrr (mean reciprocal rank), and the same with v2u_.  Ties
    count against the model.  u, v and errors: see partner_ranks. """
    return {name: float(x.mean()) for name, x in rank_values(partner_ranks(u, v).cpu().numpy()).items()}


# -------------------------------------------------------------------------------- tasks
# Each gives arrays that all scores can be computed from, and which are kept. views(images, generator):
# views_of() of the run; name: of the progress. The others are in corruptions.py.
def two_views(model: nn.Module, views: Callable, images: Tensor, rows: Tensor, repeats: int, seed: int,
              name: str) -> dict[str, np.ndarray]:
    """ranks [repeats, 2, n] of the partner views of images[rows]; first_by_inner_product, whether they are
    first by that, likewise; and neighbours [Q, 5], of a few the nearest in the first draw."""
    ranks, first, tick = [], [], cli.progress(name, repeats * len(rows), "images")
    for repeat in range(repeats):
        u, v = embed(model, views(images, torch.Generator().manual_seed(1000 * seed + repeat)), rows,
                     on_chunk=lambda done: tick(repeat * len(rows) + done))
        ranks.append(partner_ranks(u, v))
        first.append(partner_ranks(u, v, cosine=False) == 1)
        if repeat == 0:
            query = F.normalize(u[query_rows(len(rows)).to(u.device)], dim=1)
            nearest = (query @ F.normalize(v, dim=1).T).topk(min(NEAREST, len(v)), dim=1).indices
    return {"ranks": torch.stack(ranks).cpu().numpy().astype(np.int32),
            "first_by_inner_product": torch.stack(first).cpu().numpy(),
            "neighbours": nearest.cpu().numpy().astype(np.int32)}


def query_rows(n: int) -> Tensor:
    """Which of n images have their neighbours drawn: some, spread over all."""
    return torch.linspace(0, n - 1, min(QUERIES, n)).round().long()


def score_values(task: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Values [m, n] of n images, by score: its mean is the score. Those of compare.NAMES are in 0 to 1; the
    first is what runs are judged by, of zeros and ones. In m, draws of views come first."""
    if task == LOSSES:
        return {kind: x[None] for kind, x in arrays.items()}
    if task == "probe":
        return {"linear": arrays["correct"][1:], "knn": arrays["correct"][:1]}
    ranks = arrays["ranks"]
    if task == "two views":
        r = ranks.reshape(-1, ranks.shape[-1])
        return {**{f"R{k}": r <= k for k in (1, 5, 10)}, "mrr": 1 / r,
                "R1_inner_product": arrays["first_by_inner_product"].reshape(r.shape), **rank_values(ranks)}
    by_severity = np.moveaxis(ranks, 2, -1).reshape(5, -1, ranks.shape[2])  # [5, 2C, n]
    r = by_severity.reshape(-1, ranks.shape[2])
    return {"R1": r == 1, **{f"severity_{s}": x == 1 for s, x in enumerate(by_severity, 1)}, "mrr": 1 / r}


def summary(values: dict[str, np.ndarray], draws: int) -> dict[str, dict]:
    """Mean of each score, and its standard errors over images and over draws of views; None where there is
    one."""
    def error(x: np.ndarray) -> float | None:
        return float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None
    return {name: {"mean": float(x.mean(0).mean()), "se_images": error(x.mean(0)),
                   "se_draws": error(x.reshape(draws, -1).mean(1))} for name, x in values.items()}


# -------------------------------------------------------------------------------- a run's scores
def load_checkpoint(path: Path, knobs: dict) -> ContrastiveModel:
    """The network of a checkpoint, in eval mode; knobs: of the run's config.json. Raises Stop."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        settings, weights = dict(saved["settings"]), saved["model"]
        differences = [f"{name} {x} there, {knobs[name]} in config.json" for name, x in settings.items()
                       if name in knobs and knobs[name] != x]
        model = ContrastiveModel(settings["small_stem"])
        if not differences:
            model.load_state_dict(weights)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise Stop(f"{path}: {error.strerror}; give folders of runs that train.py wrote") from None
    except Exception as error:  # torch.load fails in many ways on a damaged file
        raise Stop(f"{path} cannot be used ({type(error).__name__}): it is damaged or not of train.py; give "
                   "another run, or train it again") from None
    if differences:
        raise Stop(f"{path} is the checkpoint of another run ({'; '.join(differences)}): put back the one "
                   "that belongs there")
    return model.eval()


def load(run: compare.Run, split: str, folder: Path, limit: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Images and labels of a split of the run's data, and the rows of `limit` of them, spread over the
    classes."""
    knobs, number = run.knobs, {"num_images": limit} if limit else {}
    images, labels = data.load(knobs["dataset"], split, folder, source_size=knobs["source_size"],
                               skip_broken=knobs["skip_broken"], **number)
    return images, labels, data.limit_indices(labels, min(limit or len(images), len(images)))


def data_folder(run: compare.Run, knobs: dict) -> Path:
    return cli.expand(knobs["data_dir"] or run.knobs["data_dir"])


def views_by(run: compare.Run, device: torch.device) -> Callable:
    """views(images, generator): views_of, as the run's training made them."""
    mean, std = data.STATISTICS[run.knobs["dataset"]]
    return functools.partial(views_of, mean=mean, std=std, device=device, size=run.knobs["image_size"],
                             crop_scale=run.knobs["crop_scale"], jitter=run.knobs["jitter"])


@functools.cache
def code(*more: str) -> str:
    """Digest of the code that scores depend on: kept ones of other code are computed anew."""
    return data.digest(b"".join(Path(__file__).with_name(name).read_bytes() for name in (*MADE_BY, *more)))


def plan(run: compare.Run, knobs: dict) -> dict[str, dict]:
    """What is to be computed of a run: settings by the title of the table that the scores go to."""
    dataset, quick = run.knobs["dataset"], run.knobs["dataset"] == "deadleaves"
    limit = knobs["limit"] or (1000 if quick else None)
    tasks = {"two views": {"repeats": knobs["repeats"]}}
    if knobs["corruptions"]:
        official = knobs["corruptions"] == "official"
        if official and dataset not in corruptions.OFFICIAL:
            raise Stop(f"--corruptions official: there is no published set of {dataset}; give --corruptions "
                       "built-in")
        name = corruptions.OFFICIAL[dataset][0] if official else "built-in"
        tasks[f"corruptions, {name}"] = {"images": knobs["corruption_limit"] or (40 if quick else limit)}
    tasks |= {"probe": {}} if knobs["probe"] else {}
    common = {"limit": limit, "seed": knobs["seed"], "recalibrate_batches": 0, "code": code()}
    settings = {title: {"task": title, **own, **common} for title, own in tasks.items()}
    if knobs["recalibrate"]:
        batches = {"recalibrate_batches": knobs["recalibrate_batches"]}
        settings |= {f"{title}, recalibrated": settings[title] | batches for title in tasks}
    losses = {LOSSES: {"task": LOSSES, **common, "code": code("samplers.py")}}
    return losses | settings if knobs["histograms"] else settings


def settle(run: compare.Run, knobs: dict) -> tuple[dict[str, dict], Path, tuple, tuple]:
    """plan(), with all else that the scores depend on; the folder of the data; load() of train and val."""
    settings, folder = plan(run, knobs), data_folder(run, knobs)
    trains = {x for x, s in settings.items() if s["recalibrate_batches"] or s["task"] in ("probe", LOSSES)}
    published, train = "", (None, None, None)
    try:
        clean = corruptions.clean_folder(folder)
        val = load(run, "val", clean, settings["two views"]["limit"])
        if trains:
            train = load(run, "train", clean, run.knobs["limit"])
        if knobs["corruptions"] == "official":
            published = corruptions.digest(corruptions.published(run.knobs["dataset"], folder))
        checkpoint = (run.folder / "checkpoint.pt").stat()
    except (ValueError, OSError) as error:
        raise Stop(f"{run.folder}: {error}") from None

    def looks(images: Tensor, labels: Tensor, rows: Tensor) -> str:
        some = images[rows[::max(1, len(rows) // 256)]]
        return data.digest(some.numpy().tobytes() + labels[rows].numpy().tobytes())
    val_digest, train_digest = looks(*val), looks(*train) if trains else ""
    for title, s in settings.items():
        s |= {"checkpoint": f"{checkpoint.st_size} {checkpoint.st_mtime_ns}", "images_digest": val_digest}
        s |= {"train_digest": train_digest} if title in trains else {}
        s |= {"published": published} if "corruptions" in title else {}
    return settings, folder, train, val


def compute(run: compare.Run, wanted: dict[str, dict], folder: Path, train: tuple, val: tuple,
            device: torch.device) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Title and arrays of each of the settings `wanted`, by title. The others are what settle() gives."""
    knobs, views, path = run.knobs, views_by(run, device), run.folder / "checkpoint.pt"
    model = load_checkpoint(path, knobs).to(device, memory_format=torch.channels_last)
    (train_images, train_labels, train_rows), (images, labels, rows) = train, val
    seed, recalibrated = next(iter(wanted.values()))["seed"], 0
    if any("built-in" in s["task"] for s in wanted.values()):
        corrupted = corruptions.built_in(images, seed)
    elif any("corruptions" in s["task"] for s in wanted.values()):  # checked before anything is computed
        corrupted = corruptions.official(knobs["dataset"], folder, labels, images.shape[-1])
    for title, s in wanted.items():
        name = f"{run.folder}: {title}"
        if s["recalibrate_batches"] != recalibrated:
            recalibrated, generator = s["recalibrate_batches"], torch.Generator().manual_seed(seed)
            view, tick = views(train_images, generator), cli.progress(name, recalibrated, "batches")
            orders = (torch.randperm(len(train_rows), generator=generator) for _ in range(recalibrated))
            update_bn((half for i, order in enumerate(orders)  # each view apart, as in training
                       for half in (tick(i) or view(train_rows[order[:knobs["batch_size"]]].repeat(2))).chunk(2)),
                      model)
        if s["task"] == "two views":
            yield title, two_views(model, views, images, rows, s["repeats"], seed, name)
        elif s["task"] == LOSSES:
            few = train_rows[data.limit_indices(train_labels[train_rows], max(MOST, knobs["batch_size"]))]
            yield title, corruptions.batch_losses(model, views, train_images, few, knobs["batch_size"],
                                                  knobs["temperature"], seed, name)
        elif s["task"] == "probe":
            sets = [(train_images, train_rows, train_labels), (images, rows, labels)]
            yield title, corruptions.probe(model.encoder, sets, knobs["image_size"],
                                           data.STATISTICS[knobs["dataset"]], device, seed, name)
        else:
            few = rows[data.limit_indices(labels[rows], min(s["images"] or len(rows), len(rows)))]
            yield title, corruptions.own_versions(model, views, few, corrupted, seed, name)


def kept(run: compare.Run, settings: dict[str, dict]) -> tuple[dict[str, dict], dict[str, np.ndarray]]:
    """Records and arrays in results.json and .npz that are whole, and of this checkpoint and code."""
    valid = {(s["checkpoint"], x) for s in settings.values() for x in (code(), code("samplers.py"))}
    try:
        with np.load(run.folder / "results.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in file}
        record = {key: entry for key, entry in json.loads((run.folder / "results.json").read_text()).items()
                  if (entry["settings"]["checkpoint"], entry["settings"]["code"]) in valid
                  and any(name.startswith(f"{key}/") for name in arrays)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, BadZipFile, zlib.error):
        return {}, {}
    return record, {name: x for name, x in arrays.items() if name.split("/")[0] in record}


def evaluate(run: compare.Run, knobs: dict, device: torch.device) -> tuple[compare.Run, dict[str, dict]]:
    """The run with its scores, and by title the arrays that they come from: from results.json and .npz
    beside the checkpoint, or computed and kept there. Raises Stop."""
    settings, *where = settle(run, knobs)
    keys = {title: " ".join(f"{name}={x}" for name, x in s.items()) for title, s in settings.items()}
    record, arrays = kept(run, settings)
    missing = {title: s for title, s in settings.items() if keys[title] not in record}
    if not missing:
        print(f"{run.folder}: read from results.json", flush=True)
    began = time.perf_counter()
    try:
        for title, found in compute(run, missing, *where, device) if missing else ():
            values = score_values(settings[title]["task"], found)
            scores = summary(values, settings[title].get("repeats", 1))
            n = len(next(iter(values.values()))[0])
            record[keys[title]] = {"settings": settings[title], "images": n, "scores": scores,
                                   **cli.provenance(device)}
            arrays |= {f"{keys[title]}/{name}": x for name, x in found.items()}
            np.savez_compressed(buffer := io.BytesIO(), **arrays)
            cli.write_atomically(run.folder / "results.npz", buffer.getbuffer())
            cli.write_atomically(run.folder / "results.json", json.dumps(record, indent=1).encode())
            means = [(compare.NAMES.get(name, name), x["mean"]) for name, x in scores.items()]
            words = "batches: {} {:.3f}, {} {:.3f}" if title == LOSSES else "images: {} {:.1%}"
            print(f"{run.folder}: {title}, {n:,} {words.format(*sum(means, ()))} "
                  f"({time.perf_counter() - began:.0f} s)", flush=True)
            began = time.perf_counter()
    except (ValueError, OSError) as error:
        raise Stop(f"{run.folder}: {error}") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise Stop(f"{run.folder}: its images do not fit into memory: give a smaller --limit or another "
                   "--device") from None
    by_title = {title: {name.split("/")[1]: x for name, x in arrays.items() if name.startswith(f"{key}/")}
                for title, key in keys.items()}
    of_tables = {}
    for title in [x for x in keys if x != LOSSES]:
        values, entry = score_values(settings[title]["task"], by_title[title]), record[keys[title]]
        of_tables[title] = {"images": entry["images"], "images_digest": settings[title]["images_digest"],
                            "values": {x: y.mean(0) for x, y in values.items() if x in compare.NAMES},
                            "parts": len(next(iter(values.values()))), "scores": entry["scores"]}
    return run._replace(scores=of_tables), by_title


# -------------------------------------------------------------------------------- figures
def few_views(run: compare.Run, knobs: dict, images: Tensor, rows: Tensor,
              few: list[int]) -> dict[int, np.ndarray]:
    """Of some of images[rows], by position, both views of the first draw of two_views(), [2, S, S, 3] in 0
    to 1."""
    view = views_by(run, torch.device("cpu"))(images, torch.Generator().manual_seed(1000 * knobs["seed"]))
    mean, std = (np.array(x) for x in data.STATISTICS[run.knobs["dataset"]])
    position, pictures = {rows[i].item(): i for i in few}, {}

    def keeping(index: Tensor) -> Tensor:
        batch, half = view(index), len(index) // 2
        for at, row in enumerate(index[:half].tolist()):
            if row in position:
                pair = batch[[at, at + half]].permute(0, 2, 3, 1).numpy() * std + mean
                pictures.setdefault(position[row], pair.clip(0, 1))
        return batch
    # embed() draws all the same views again; the network is none.
    embed(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), keeping, rows,
          on_chunk=cli.progress("views of the picture of neighbours", len(rows), "images"))
    return pictures


def draw_neighbours(nearest: dict[str, np.ndarray], run: compare.Run, knobs: dict):
    """The second views nearest to the first views of a few images: the partner framed in green, another
    image of its class in orange.  nearest: by the name of a line, indices [Q, 5]; run: one of those, for its
    views."""
    clean, limit = corruptions.clean_folder(data_folder(run, knobs)), plan(run, knobs)["two views"]["limit"]
    images, labels, rows = load(run, "val", clean, limit)
    queries, labels = query_rows(len(rows)).tolist(), labels[rows].tolist()
    few = sorted({*queries, *(i for x in nearest.values() for i in x.ravel().tolist())})
    pictures = few_views(run, knobs, images, rows, few)

    def framed(picture: np.ndarray, colour: tuple) -> np.ndarray:
        edge = max(2, len(picture) // 12)
        frame = np.ones((len(picture) + 4 * edge, len(picture) + 4 * edge, 3))
        frame[edge:-edge, edge:-edge] = colour
        frame[2 * edge:-2 * edge, 2 * edge:-2 * edge] = picture
        return frame
    white, green, orange = (1, 1, 1), (0, 0.62, 0.45), (0.9, 0.62, 0)
    lines = len(nearest) + 1
    figure, axes = cli.canvas(lines, len(queries), 7.2, 0.4 + 1.5 * lines / len(queries))
    for j, query in enumerate(queries):
        axes[0, j].imshow(framed(pictures[query][0], white))
        for axis, found in zip(axes[1:, j], nearest.values()):
            colours = [orange if labels[i] == labels[query] else white for i in found[j]]
            axis.imshow(np.concatenate([framed(pictures[i][1], green if i == query else colour)
                                        for i, colour in zip(found[j], colours)], 1))
    for axis, name in zip(axes[:, 0], ("view 1 of", *nearest)):
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.suptitle("five nearest second views; green: the partner, orange: another of its class", fontsize=8)
    return figure


def main(argv: list[str]) -> None:
    knobs, _ = cli.parse(argv, __doc__, KNOBS, {}, "runs")
    device, runs = cli.pick_device(knobs["device"]), compare.read_runs(knobs["runs"])
    groups = compare.baseline_first(compare.group_runs(runs), runs, knobs["baseline"])
    exports = [cli.expand(knobs["export"])] if knobs["export"] else []
    out = compare.writable(knobs["out"], [run.folder for run in runs] + [path.parent for path in exports])
    runs, found = zip(*(evaluate(run, knobs, device) for run in runs))
    record = {"knobs": knobs, **cli.provenance(device), "dataset": runs[0].knobs["dataset"],
              "baseline": next(iter(groups)),
              "groups": {group: [str(runs[i].folder) for i in members] for group, members in groups.items()}}
    record |= compare.show(runs, groups, knobs["target"], out / "curve" if knobs["curve"] else None)
    for path in exports:
        cli.write_atomically(path, compare.export(runs))
    names = {i: f"{group}, seed {runs[i].knobs['seed']}" for group, x in groups.items() for i in x}
    nearest = {names[x[0]] if len(x) > 1 else group: found[x[0]]["two views"]["neighbours"]
               for group, x in groups.items()}
    figures = {"neighbours": draw_neighbours(nearest, runs[0], knobs)}
    if knobs["histograms"]:
        losses = {name: found[i][LOSSES] for i, name in names.items()}
        figures["histograms"] = corruptions.draw_histograms(losses)
        record["histograms"] = {name: {kind: [round(x, 4) for x in own[kind].tolist()] for kind in own}
                                for name, own in losses.items()}
    for name, figure in figures.items():
        cli.save_figure(figure, out / name)
    cli.write_atomically(out / "retrieval.json", json.dumps(record, indent=1).encode())
    drawn = [out / f"{name}.png" for name in ["curve"] * knobs["curve"] + [*figures]]
    print(f"\n{', '.join(map(str, [*drawn, out / 'retrieval.json', *exports]))}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # its output may be cut, as by head
    sys.exit(cli.run(main, "retrieval.py", when_interrupted="interrupted; what was computed is kept"))
