"""What training was worth: retrieval of partner views, with uncertainty, and runs compared on the same images and views.

    python retrieval.py runs/quick-*                                 # a table; files in results/
    python retrieval.py 'runs/*-seed?' --recalibrate --curve         # quoted globs will do; groups are runs that differ in seed
    python retrieval.py runs/a runs/b --corruptions built-in --probe
    python retrieval.py runs/a --corruptions official --data-dir data   # CIFAR-100-C or Tiny-ImageNet-C lies in data/

Each run's scores are kept beside its checkpoint, in results.json and results.npz: the same call again only reads them.
--out gets retrieval.json (all that is printed, and more), neighbours.png and .pdf, and with --curve curve.png and .pdf.
"""
import functools
import io
import json
import math
import os
import signal
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compare
import corruptions
import data
from augment import MEAN, STD, augment
from cli import Stop, parse, pick_device, provenance, write_atomically
from cli import save_figure as save
from model import ContrastiveModel, embed
from probe import probe

KNOBS = {
    "data_dir": (None, str, "folder of the data, and of the -C sets (default: the run's own)"),
    "limit": (None, "int >= 2 <= 10000000", "validation images of the two-view task, spread over the classes (default: all; "
              "deadleaves makes 1000, or as many as are asked for)"),
    "repeats": (3, "int >= 1 <= 1000", "draws of the two views"),
    "corruptions": (None, ("built-in", "official"), "also find the partner among an image's own corrupted versions. built-in: "
                    "fourteen of our own, made on the fly; official: CIFAR-100-C or Tiny-ImageNet-C"),
    "corruption_limit": (None, "int >= 1 <= 10000000", "images of that task (default: all; deadleaves 40)"),
    "probe": (False, bool, "also the encoder's features: accuracy of 20 nearest neighbours and of a linear classifier"),
    "recalibrate": (False, bool, "report everything also with batch norm's statistics taken anew from random training batches"),
    "recalibrate_batches": (64, "int >= 1 <= 100000", "how many, of the run's batch size"),
    "seed": (0, "int >= 0 < 4294967296", "fixes views, corruptions and batches, the same for every run"),
    "device": ("auto", str, "cpu, cuda, cuda:1, ...; auto takes CUDA where there is one"),
    "baseline": (None, str, "group that the others are compared with, by its name in the table (default: random batches, simclr)"),
    "curve": (False, bool, "also R@1 along training, from each run's log.jsonl, and the cost to reach --target"),
    "target": (None, "float > 0 < 1", "R@1 to reach, between 0 and 1 (default: the baseline's mean at its end)"),
    "out": ("results", str, "folder of the table and the figures"),
}
QUERIES, NEAREST = 4, 5  # of the picture of neighbours
MADE_BY = "retrieval.py", "corruptions.py", "probe.py", "model.py", "augment.py", "data.py", "deadleaves.py"  # what scores depend on


# ------------------------------------------------------------------------------------------------- metrics
@torch.no_grad()
def partner_ranks(u: Tensor, v: Tensor) -> Tensor:
    """Ranks from 1, int64 [2, N]: of v_i among all v by cosine similarity with u_i, and of u_i among all u with v_i.

    u, v: [N, D]; need not be normalised.  What is as near as the partner, up to rounding, counts as nearer.  N^2 D
    operations and 64 MB (float64: 128) besides copies of u and v.  Raises ValueError for unequal shapes or embeddings that are not finite.
    """
    if u.ndim != 2 or u.shape != v.shape or len(u) == 0:
        raise ValueError(f"u {tuple(u.shape)} and v {tuple(v.shape)}: give two [N, D] tensors of one shape")
    if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
        raise ValueError("u or v holds NaN or infinity: embed with a model whose loss is finite")
    u, v = (F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1) for x in (u, v))
    n, bound = len(u), (u * v).sum(1) - (8 + u.shape[1] ** 0.5) * torch.finfo(u.dtype).eps
    ranks = u.new_zeros(2, n)  # counts are exact up to 2^24
    rows = max(1, 2 ** 23 // n)
    scratch, ones = u.new_empty(2, min(rows, n), n), u.new_ones(n)
    tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False  # coarser than ties are
    try:
        for i in range(0, n, rows):  # one product serves both directions; counting by products is faster than by sums
            s, nearer = scratch[:, :len(u[i:i + rows])]
            torch.mm(u[i:i + rows], v.T, out=s)
            torch.ge(s, bound[i:i + rows, None], out=nearer)
            ranks[0, i:i + rows] = nearer @ ones
            ranks[1] += ones[:len(s)] @ s.ge_(bound)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    return ranks.long().clamp(min=1)


def retrieval_metrics(u: Tensor, v: Tensor) -> dict[str, float]:
    """How well the partner of each row is found among all rows of the other view; arguments and errors of partner_ranks.

    Returns u2v_R1, u2v_R5, u2v_R10 (shares between 0 and 1), u2v_mean_rank, u2v_median_rank (from 1; the mean of the
    middle two where N is even), u2v_mrr (mean reciprocal rank), and the same with v2u_.  Ties count against the model.
    """
    return rank_metrics(partner_ranks(u, v).cpu().numpy())


def rank_metrics(ranks: np.ndarray) -> dict[str, float]:
    """The metrics of retrieval_metrics of ranks [2, N]."""
    metrics = {}
    for name, rank in zip(("u2v", "v2u"), ranks):
        metrics |= {f"{name}_R{k}": float((rank <= k).mean()) for k in (1, 5, 10)}
        metrics |= {f"{name}_mean_rank": float(rank.mean()), f"{name}_median_rank": float(np.median(rank)),
                    f"{name}_mrr": float((1 / rank).mean())}
    return metrics


def own_version_ranks(u: Tensor, v: Tensor) -> Tensor:
    """partner_ranks [2, N, C] of u, v [N, C, D] where the candidates of each are the C versions of the same image."""
    if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
        raise ValueError("u or v holds NaN or infinity: embed with a model whose loss is finite")
    s = F.normalize(u, dim=2) @ F.normalize(v, dim=2).mT
    bound = s.diagonal(dim1=1, dim2=2) - (8 + u.shape[2] ** 0.5) * torch.finfo(s.dtype).eps
    return torch.stack([(s >= bound[:, :, None]).sum(2), (s >= bound[:, None]).sum(1)])


# ------------------------------------------------------------------------------------------------- the network
def load_checkpoint(path: Path, knobs: dict) -> ContrastiveModel:
    """The network of a run's checkpoint; knobs: those of its config.json. Raises Stop with one line where it cannot be used."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        settings, weights = dict(saved["settings"]), saved["model"]
        differences = [f"{name} {value} there, {knobs[name]} in config.json" for name, value in settings.items()
                       if name in knobs and knobs[name] != value]
        model = ContrastiveModel(settings["small_stem"])
        if not differences:
            model.load_state_dict(weights)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise Stop(f"{path}: {error.strerror}; give folders of runs that train.py wrote") from None
    except Exception as error:  # torch.load fails in many ways on a damaged file
        raise Stop(f"{path} cannot be used ({type(error).__name__}): it is damaged or not of train.py; give another run, or "
                   "train it again") from None
    if differences:
        raise Stop(f"{path} is the checkpoint of another run ({'; '.join(differences)}): put back the one that belongs there")
    return model


@torch.no_grad()
def recalibrate(model: nn.Module, batches) -> None:
    """Batch norm's running statistics := their plain averages over the images of `batches`; nothing else changes.

    batches: iterable of [2B, 3, S, S]. The averages of the batches' means and unbiased variances, which momentum=None would
    give as well, reading a counter from the device in each layer (Izmailov et al., UAI 2018, do so after averaging weights).
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(m, m.training, m.momentum) for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.train()
    for i, batch in enumerate(batches):
        for m in norms:
            m.momentum = 1 / (i + 1)
        model(batch)
    for m, training, momentum in before:
        m.training, m.momentum = training, momentum


def augmented(images: Tensor, generator: torch.Generator, size: int, crop_scale: float, jitter: float, device: torch.device):
    """views(index) -> a random view of each of images[index], [len(index), 3, size, size], as in training."""
    def views(index: Tensor) -> Tensor:
        batch = images[index].to(device, non_blocking=True)
        return augment(batch, size, generator, (crop_scale, 1.0), jitter).contiguous(memory_format=torch.channels_last)
    return views


# ------------------------------------------------------------------------------------------------- tasks
# Each returns arrays that all scores can be computed from, and which are kept. views: augmented(), but for the images and
# the generator.
def two_views(model: nn.Module, images: Tensor, rows: Tensor, views, repeats: int, seed: int) -> dict[str, np.ndarray]:
    """ranks [repeats, 2, n] of the partner views of images[rows], and of a few the nearest in the first draw, [Q, 5]."""
    ranks = []
    for repeat in range(repeats):
        u, v = embed(model, views(images, torch.Generator().manual_seed(1000 * seed + repeat)), rows)
        ranks.append(partner_ranks(u, v))
        if repeat == 0:
            query = F.normalize(u[query_rows(len(rows)).to(u.device)], dim=1)
            nearest = (query @ F.normalize(v, dim=1).T).topk(min(NEAREST, len(v)), dim=1).indices
    return {"ranks": torch.stack(ranks).cpu().numpy().astype(np.int32), "neighbours": nearest.cpu().numpy().astype(np.int32)}


def own_versions(model: nn.Module, rows: Tensor, corrupted, views, seed: int, chunk: int = 64) -> dict[str, np.ndarray]:
    """ranks [5, 2, n, C] among the own corrupted versions of each of the images `rows`, by severity."""
    ranks = []
    for severity in corruptions.SEVERITIES:
        generator, found = torch.Generator().manual_seed(seed), []
        for part in rows.split(chunk):
            pictures = corrupted(part, severity)  # [n, C, 3, H, W]
            u, v = embed(model, views(pictures.flatten(0, 1), generator), torch.arange(pictures.shape[0] * pictures.shape[1]))
            found.append(own_version_ranks(u.unflatten(0, pictures.shape[:2]), v.unflatten(0, pictures.shape[:2])))
        ranks.append(torch.cat(found, 1))
    return {"ranks": torch.stack(ranks).cpu().numpy().astype(np.uint8)}


def image_scores(task: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores of each image [N], higher is better, of what a task returned; the first is the one that runs are judged by."""
    if task == "probe":
        return dict(zip(("linear", "knn"), arrays["correct"][::-1].astype(float)))
    ranks = arrays["ranks"]
    if task == "two views":
        return {**{f"R{k}": (ranks <= k).mean((0, 1)) for k in (1, 5, 10)}, "mrr": (1 / ranks).mean((0, 1))}
    return {"R1": (ranks == 1).mean((0, 1, 3)), **{f"severity_{s}": (r == 1).mean((0, 2)) for s, r in enumerate(ranks, 1)},
            "mrr": (1 / ranks).mean((0, 1, 3))}


def summary(task: str, arrays: dict[str, np.ndarray]) -> dict[str, dict]:
    """For results.json: mean, standard error over images and, of two views, over draws of each score of a task."""
    def entry(x: np.ndarray) -> dict:
        return {"mean": float(x.mean()), "se_images": float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None}
    scores = {name: entry(x) for name, x in image_scores(task, arrays).items()}
    if task == "two views":
        def over_draws(draws: list[float]) -> float | None:
            return float(np.std(draws, ddof=1) / math.sqrt(len(draws))) if len(draws) > 1 else None
        draws = [rank_metrics(r) for r in arrays["ranks"]]
        by_draw = {**{name: [(d[f"u2v_{name}"] + d[f"v2u_{name}"]) / 2 for d in draws] for name in scores},
                   **{name: [d[name] for d in draws] for name in draws[0]}}
        each = lambda r, name: r.astype(float) if name == "mean_rank" else 1 / r if name == "mrr" else r <= int(name[1:])
        scores |= {f"{way}_{name}": entry(each(arrays["ranks"][:, i], name).mean(0)) for i, way in enumerate(("u2v", "v2u"))
                   for name in ("R1", "R5", "R10", "mean_rank", "mrr")}
        scores = {name: {"mean": float(np.mean(x)), "se_images": scores.get(name, {}).get("se_images"), "se_draws": over_draws(x)}
                  for name, x in by_draw.items()}  # of a median over images there is no standard error
    return scores


# ------------------------------------------------------------------------------------------------- a run's scores
def load(run: compare.Run, split: str, folder: Path, limit: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Images and labels of a split of the run's data set, and the rows of the first `limit`, spread over the classes."""
    knobs = run.knobs
    images, labels = data.load(knobs["dataset"], split, folder, source_size=knobs["source_size"], skip_broken=knobs["skip_broken"],
                               **({"num_images": limit} if limit else {}))
    return images, labels, data.limit_indices(labels, min(limit or len(images), len(images)))


def data_folder(run: compare.Run, knobs: dict) -> Path:
    return Path(knobs["data_dir"] or run.knobs["data_dir"]).expanduser()


@functools.cache
def code() -> str:
    """Digest of the code that scores depend on: kept ones of other code are computed anew."""
    return data.digest(b"".join(Path(__file__).with_name(name).read_bytes() for name in MADE_BY))


def plan(run: compare.Run, knobs: dict) -> dict[str, dict]:
    """What is to be computed of a run: settings by the title of the table that the scores go to."""
    quick = run.knobs["dataset"] == "deadleaves"
    limit = knobs["limit"] or (1000 if quick else None)
    tasks = {"two views": {"repeats": knobs["repeats"]}}
    if knobs["corruptions"]:
        if knobs["corruptions"] == "official" and run.knobs["dataset"] not in corruptions.OFFICIAL:
            raise Stop(f"--corruptions official: there is no published set of {run.knobs['dataset']}; give --corruptions built-in")
        name = "built-in" if knobs["corruptions"] == "built-in" else corruptions.OFFICIAL[run.knobs["dataset"]][0]
        tasks[f"corruptions, {name}"] = {"images": knobs["corruption_limit"] or (40 if quick else limit)}
    if knobs["probe"]:
        tasks["probe"] = {}
    return {title + ", recalibrated" * (batches > 0): {"task": title, **own, "limit": limit, "seed": knobs["seed"],
                                                       "recalibrate_batches": batches, "code": code()}
            for batches in (0, *[knobs["recalibrate_batches"]] * knobs["recalibrate"]) for title, own in tasks.items()}


def compute(run: compare.Run, wanted: dict[str, dict], folder: Path, train: tuple, val: tuple, device: torch.device):
    """Yields (title, arrays) of each of the settings `wanted`, by title. folder: of the data; train, val: what load() gives of them."""
    model = load_checkpoint(run.folder / "checkpoint.pt", run.knobs).to(device, memory_format=torch.channels_last)
    size, first = run.knobs["image_size"], next(iter(wanted.values()))
    views = functools.partial(augmented, size=size, crop_scale=run.knobs["crop_scale"], jitter=run.knobs["jitter"], device=device)
    (train_images, train_labels, train_rows), (images, labels, rows) = train, val
    if any("built-in" in s["task"] for s in wanted.values()):
        corrupted = corruptions.built_in(images, first["seed"])
    elif any("corruptions" in s["task"] for s in wanted.values()):  # checked before anything is computed
        corrupted = corruptions.official(run.knobs["dataset"], folder, labels, images.shape[-1])
    recalibrated = 0
    for title, s in wanted.items():
        if s["recalibrate_batches"] != recalibrated:
            recalibrated = s["recalibrate_batches"]
            generator = torch.Generator().manual_seed(s["seed"])
            view, batch_size = views(train_images, generator), run.knobs["batch_size"]
            recalibrate(model, (view(train_rows[torch.randperm(len(train_rows), generator=generator)[:batch_size]].repeat(2))
                                for _ in range(recalibrated)))
        if s["task"] == "two views":
            found = two_views(model, images, rows, views, s["repeats"], s["seed"])
        elif s["task"] == "probe":
            sets = [(train_images, train_rows, train_labels), (images, rows, labels)]
            found = {"correct": probe(model.encoder, sets, size, device, s["seed"])}
        else:
            few = rows[data.limit_indices(labels[rows], min(s["images"] or len(rows), len(rows)))]
            found = own_versions(model, few, corrupted, views, s["seed"])
        yield title, found


def evaluate(run: compare.Run, knobs: dict, device: torch.device) -> dict[str, tuple[str, dict[str, np.ndarray]]]:
    """(digest of the images, arrays) by title, from results.json and .npz beside the checkpoint, or computed and kept there."""
    checkpoint, kept, kept_arrays = (run.folder / name for name in ("checkpoint.pt", "results.json", "results.npz"))
    settings, folder = plan(run, knobs), data_folder(run, knobs)
    trains = {title: s["recalibrate_batches"] > 0 or s["task"] == "probe" for title, s in settings.items()}
    try:
        clean, train = corruptions.clean_folder(folder), (None, None, None)
        val = load(run, "val", clean, settings["two views"]["limit"])
        if any(trains.values()):
            train = load(run, "train", clean, run.knobs["limit"])
        published = corruptions.digest(corruptions.published(run.knobs["dataset"], folder)) if knobs["corruptions"] == "official" else None
    except (ValueError, OSError) as error:
        raise Stop(f"{run.folder}: {error}") from None

    def looks(images: Tensor, labels: Tensor, rows: Tensor) -> str:
        return data.digest(images[rows[::max(1, len(rows) // 256)]].numpy().tobytes() + labels[rows].numpy().tobytes())
    digest, train_digest = looks(*val), looks(*train) if any(trains.values()) else ""
    for title, s in settings.items():
        s |= {"images_digest": digest} | ({"train_digest": train_digest} if trains[title] else {})
        s |= {"published": published} if "corruptions" in title and published else {}
    keys = {title: " ".join(f"{name}={value}" for name, value in s.items()) for title, s in settings.items()}
    try:
        fingerprint = [checkpoint.stat().st_size, checkpoint.stat().st_mtime_ns]
    except OSError as error:
        raise Stop(f"{checkpoint}: {error.strerror}; give folders of runs that train.py wrote") from None
    try:  # of another checkpoint, or not whole: computed anew
        with np.load(kept_arrays, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file}
        record = {key: entry for key, entry in json.loads(kept.read_text()).items()
                  if entry["checkpoint"] == fingerprint and entry["settings"]["code"] == code() and any(name.startswith(f"{key}/") for name in arrays)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
        record, arrays = {}, {}
    arrays = {name: x for name, x in arrays.items() if name.split("/")[0] in record}
    missing = {title: s for title, s in settings.items() if keys[title] not in record}
    if not missing:
        print(f"{run.folder}: read from {kept.name}", flush=True)
    began = time.perf_counter()
    try:
        for title, found in compute(run, missing, folder, train, val, device) if missing else ():
            scores, task = summary(settings[title]["task"], found), settings[title]["task"]
            count = len(next(iter(image_scores(task, found).values())))
            record[keys[title]] = {"settings": settings[title], "checkpoint": fingerprint, "images": count, "images_digest": digest,
                                   "scores": scores, **provenance(device)}
            arrays |= {f"{keys[title]}/{name}": x for name, x in found.items()}
            np.savez_compressed(buffer := io.BytesIO(), **arrays)
            write_atomically(kept_arrays, buffer.getbuffer())
            write_atomically(kept, json.dumps(record, indent=1).encode())
            print(f"{run.folder}: {title}, {count:,} images: {compare.NAMES[next(iter(scores))]} {next(iter(scores.values()))['mean']:.1%} "
                  f"({time.perf_counter() - began:.0f} s)", flush=True)
            began = time.perf_counter()
    except (ValueError, OSError) as error:
        raise Stop(f"{run.folder}: {error}") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise Stop(f"{run.folder}: its images do not fit into memory: give a smaller --limit or another --device") from None
    return {title: (record[key]["images_digest"], {name.split("/")[1]: x for name, x in arrays.items() if name.startswith(f"{key}/")})
            for title, key in keys.items()}


def query_rows(n: int) -> Tensor:
    """Which of n images have their neighbours drawn: some, spread over all."""
    return torch.linspace(0, n - 1, min(QUERIES, n)).round().long()


def neighbours(runs: list[compare.Run], groups: dict[str, list[int]], found: list[dict], knobs: dict):
    """The picture of the images nearest to a few, by the first run of each group, as the views of the first draw."""
    run, limit = runs[0], plan(runs[0], knobs)["two views"]["limit"]
    images, labels, rows = load(run, "val", corruptions.clean_folder(data_folder(run, knobs)), limit)
    nearest = {group + f"\nseed {runs[members[0]].knobs['seed']}" * (len(members) > 1): found[members[0]]["two views"][1]["neighbours"]
               for group, members in groups.items()}
    queries = query_rows(len(rows)).numpy()
    shown = np.unique(np.concatenate([queries, *(x.ravel() for x in nearest.values())]))
    views = augmented(images, torch.Generator().manual_seed(knobs["seed"]), run.knobs["image_size"], run.knobs["crop_scale"],
                      run.knobs["jitter"], torch.device("cpu"))
    few = {}

    class Keep(nn.Module):  # in the place of the network, so that embed() draws the very same views
        start = 0

        def forward(self, batch: Tensor) -> Tensor:
            half = len(batch) // 2
            for i in shown[(shown >= self.start) & (shown < self.start + half)]:
                pair = batch[[i - self.start, i - self.start + half]].permute(0, 2, 3, 1)
                few[i] = (pair * torch.tensor(STD) + torch.tensor(MEAN)).clamp(0, 1).numpy()
            self.start += half
            return batch.new_zeros(len(batch), 1)
    embed(Keep(), views, rows)
    return compare.draw_neighbours(nearest, queries, few, labels[rows].numpy())


def main(argv: list[str]) -> int:
    try:
        knobs, _ = parse(argv, __doc__, KNOBS, {}, "runs")
        device, out = pick_device(knobs["device"]), Path(knobs["out"]).expanduser()
        runs = compare.read_runs(knobs["runs"])
        groups = compare.group_runs(runs)
        baseline = compare.pick_baseline(groups, runs, knobs["baseline"])
        groups = {baseline: groups[baseline], **groups}
        try:
            out.mkdir(parents=True, exist_ok=True)
            for folder in (out, *(run.folder for run in runs)):
                if not os.access(folder, os.W_OK):
                    raise Stop(f"{folder} cannot be written; allow it" + "; or give another --out" * (folder == out))
        except OSError as error:
            raise Stop(f"--out {out}: {error.strerror}; give another folder") from None
        found = [evaluate(run, knobs, device) for run in runs]
        record = {"knobs": knobs, **provenance(device), "dataset": runs[0].knobs["dataset"], "baseline": baseline,
                  "groups": {group: [str(runs[i].folder) for i in members] for group, members in groups.items()}}
        for title in found[0]:
            for run, one in zip(runs, found):
                if one[title][0] != found[0][title][0]:
                    raise Stop(f"{run.folder} and {runs[0].folder} were evaluated on different images: give one --data-dir for all")
            scores = [image_scores(title.removesuffix(", recalibrated"), one[title][1]) for one in found]
            rows = record[title] = compare.table(scores, runs, groups, baseline)
            print(f"\n{title}, {rows[0]['images']:,} images; 95 % intervals over {compare.interval_over(rows)}\n\n{compare.markdown(rows, baseline)}")
        if knobs["curve"]:
            record["curves"] = compare.curves(runs, groups)
            rows = record["cost"] = compare.cost(record["curves"], baseline, knobs["target"])
            print(f"\nalong training, on the R@1 in log.jsonl; 95 % intervals over seeds, "
                  f"where there are several\n\n{compare.cost_markdown(rows, baseline)}")
            save(compare.draw_curves(record["curves"], runs, groups, rows[0]["target"]), out / "curve")
        write_atomically(out / "retrieval.json", json.dumps(record, indent=1).encode())
        save(neighbours(runs, groups, found, knobs), out / "neighbours")
        print(f"\n{', '.join(sorted(str(out / name) for name in ['retrieval.json', 'neighbours.png'] + ['curve.png'] * knobs['curve']))}")
    except Stop as stop:
        print(f"retrieval.py: error: {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("interrupted; what was computed is kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # its output may be cut, as by head
    sys.exit(main(sys.argv[1:]))
