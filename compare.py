"""Runs compared: groups of seeds, differences with intervals over seeds and images, cost along training.

    python compare.py results/runs.json.gz                   # tables and figure of recorded runs, no training
    python compare.py results/runs.json.gz --baseline "random, batch-size 128" --target 0.5 --out elsewhere

The files come from retrieval.py --export, which compares runs by the same functions.
"""
import glob
import gzip
import json
import math
import os
import signal
import sys
import textwrap
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit  # of Student's t; train.py would wait half a second for scipy.stats

import cli
from cli import Stop

KNOBS = {
    "baseline": (None, str, "group that the others are compared with, by its name in the table (default: "
                 "random batches, simclr)"),
    "target": (None, "float > 0 < 1", "R@1 to reach, between 0 and 1 (default: what the baseline ends at)"),
    "out": ("results", str, "folder of what is written"),
}
NAMES = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "mrr": "MRR", "linear": "linear probe",
         "knn": "20 nearest neighbours", **{f"severity_{s}": f"R@1, severity {s}" for s in range(1, 6)},
         "R1_inner_product": "R@1, inner product"}
NOT_COMPARED = {"seed", "data_dir", "out_dir", "device", "compile", "step", "resume", "max_steps",
                "log_every", "checkpoint_minutes"}
SAME_VIEWS = ("dataset", "source_size", "image_size", "crop_scale", "jitter", "skip_broken")
KINDS = {"seed": int, "batch_size": int, "image_size": int, "limit": (int, type(None)), "sampler": str,
         "objective": str} | dict.fromkeys(SAME_VIEWS, object)  # of the knobs that are needed
LOGGED = ("step", "R1", "seconds_training", "seconds_selecting")  # in each line of log.jsonl
DRAWS = 20_000  # of seeds, for ratios
FEWEST = 20  # images that a verdict takes


# -------------------------------------------------------------------------------- runs and files
class Run(NamedTuple):
    folder: Path
    knobs: dict      # of config.json
    made_by: dict    # result.json: commit, device, versions and more
    log: list[dict]  # a line an epoch
    # By title of a table: images, their number; images_digest; values, by score in 0 to 1 of each image
    # [images] or the mean alone [1], the first being what runs are judged by, of an image the mean of
    # `parts` zeros and ones; scores, means and standard errors of these and more.
    scores: dict[str, dict] = {}


def checked(run: Run) -> Run:
    """The run; raises ValueError, KeyError or TypeError where something is not as train.py wrote it."""
    if not run.log or not all(isinstance(run.knobs[name], kind) for name, kind in KINDS.items()) \
            or not all(math.isfinite(line[name]) for line in run.log for name in LOGGED):
        raise ValueError
    return run


def read_runs(words: list[str]) -> list[Run]:
    """The finished runs in these folders; a word that is no folder may be a pattern with * ? [. Raises Stop.
    Folders that are called .old-... are those of former code: no pattern takes them."""
    if not words:
        raise Stop("name the folders of finished runs, for example: python retrieval.py runs/quick-*")
    folders, runs = {}, []
    for word in words:
        found = [str(cli.expand(word))]
        if glob.has_magic(word) and not Path(found[0]).is_dir():
            found = [x for x in sorted(glob.glob(found[0]))
                     if Path(x).is_dir() and ".old-" not in Path(x).name]
        if not found:
            raise Stop(f"{word} matches no folder: give folders that hold a result.json")
        folders |= {Path(x).resolve(): Path(x) for x in found}
    for folder in folders.values():
        try:
            config, made_by = (json.loads((folder / x).read_text()) for x in ("config.json", "result.json"))
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            runs.append(checked(Run(folder, config["knobs"], made_by, log)))
            if not isinstance(runs[-1].knobs["data_dir"], str):
                raise ValueError
        except OSError:
            raise Stop(f"no finished run in {folder}: give folders that hold a result.json, or finish the "
                       "run with train.py --resume") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Stop(f"{folder}: its config.json, result.json or log.jsonl is not of train.py or damaged: "
                       "leave it out") from None
    return runs


def export(runs: list[Run]) -> bytes:
    """A compressed file of all that tables and curves are made of, without paths of this machine."""
    def first(task: dict) -> list[int]:  # small integers: a tenth of the bytes
        return np.rint(next(iter(task["values"].values())) * task["parts"]).astype(int).tolist()
    records = [{"name": run.folder.name, "log": run.log,
                "knobs": {name: x for name, x in run.knobs.items() if name not in ("data_dir", "out_dir")},
                "made_by": {x: run.made_by.get(x) for x in ("commit", "device", "time", "versions")},
                "scores": {title: task | {"values": first(task)} for title, task in run.scores.items()}}
               for run in runs]
    return gzip.compress(json.dumps({"runs": records}).encode(), mtime=0)


def read_file(path: Path) -> list[Run]:
    """The runs that export() wrote; of all scores but the first the means alone. Raises Stop."""
    def values(task: dict) -> dict[str, np.ndarray]:
        means = {name: np.array([x["mean"]]) for name, x in task["scores"].items() if name in NAMES}
        return means | {next(iter(means)): np.array(task["values"]) / task["parts"]}
    try:
        return [checked(Run(Path(x["name"]), x["knobs"], x["made_by"], x["log"],
                            {title: task | {"values": values(task)} for title, task in x["scores"].items()}))
                for x in json.loads(gzip.decompress(path.read_bytes()))["runs"]]
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise Stop(f"{path}: {error.strerror}; give a file that retrieval.py --export wrote") from None
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise Stop(f"{path} is damaged or not of retrieval.py --export: give another one") from None


# -------------------------------------------------------------------------------- groups
def group_runs(runs: list[Run]) -> dict[str, list[int]]:
    """Positions of the runs that differ in seed alone, by the knobs in which groups differ. Raises Stop."""
    for run in runs:
        for name in SAME_VIEWS:
            one, other = runs[0].knobs[name], run.knobs[name]
            if one != other:
                raise Stop(f"{runs[0].folder} has {name} {one} and {run.folder} {other}: they see other "
                           "views, so give them apart")
    # What a run of an older commit has no word of counts as absent; a run may have been stopped or extended.
    knobs = [{name: x for name, x in {**run.knobs, "steps": run.log[-1]["step"]}.items()
              if name not in NOT_COMPARED and x not in (None, False)} for run in runs]
    groups, named = {}, {}
    for i in sorted(range(len(runs)), key=lambda i: runs[i].knobs["seed"]):
        groups.setdefault(json.dumps(knobs[i], sort_keys=True), []).append(i)
    order = dict.fromkeys(["sampler", "objective", "embeddings", "select_after", "k", "q", *runs[0].knobs,
                           *(name for own in knobs for name in own)])
    for members in sorted(groups.values(), key=min):
        own, peers, words = knobs[members[0]], [knobs[x[0]] for x in groups.values()], []
        for name in order:  # no more words than it takes to tell groups apart
            x = own.get(name)
            others = [peer for peer in peers if peer.get(name) != x]
            if name == "sampler" or others and x not in (None, "simclr"):
                words.append(x if isinstance(x, str) else name.replace("_", "-") + f" {x}" * (x is not True))
            peers = [peer for peer in peers if peer.get(name) == x]
        name = ", ".join(words)
        named[name if name not in named else f"{name} ({len(named)})"] = members
        for i, j in zip(members, members[1:]):
            if runs[i].knobs["seed"] == runs[j].knobs["seed"]:
                raise Stop(f"{runs[i].folder} and {runs[j].folder} are runs of the same settings and seed "
                           f"{runs[i].knobs['seed']}: leave one out")
    return named


def baseline_first(groups: dict[str, list[int]], runs: list[Run], name: str | None) -> dict[str, list[int]]:
    """The groups, first the baseline: the one that is named, or random with NT-Xent. Raises Stop."""
    plain = {group.replace(",", ""): group for group in groups}  # commas need not be typed
    if name and name.replace(",", "") not in plain:
        raise Stop(f"--baseline {name}: no such group{cli.nearest(name, groups)}")
    usual = [group for group, members in groups.items()
             if [runs[members[0]].knobs[x] for x in ("sampler", "objective")] == ["random", "simclr"]]
    baseline = plain[name.replace(",", "")] if name else (usual or list(groups))[0]
    return {baseline: groups[baseline], **groups}


# -------------------------------------------------------------------------------- uncertainty
def interval(groups: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean and 95 % interval over seeds and images of a sum of means.

    groups: scores [S, n] of independent groups of S seeds on the same n images: one group; a group of paired
    differences; or a group and the negative of another. What images and what seeds add to the variance has
    degrees of freedom of its own, so half-widths by Student's t are added in squares (Zou and Donner,
    Statistics in Medicine 2008), which is wide enough for two seeds as well. Where a group has one seed,
    nothing is said about other seeds. Few seeds can agree by luck: no interval is narrower than the images
    alone make it. """
    by_image = sum(x.mean(0) for x in groups)  # [n]
    n, several = len(by_image), [x for x in groups if len(x) > 1]
    images, t = (by_image.var(ddof=1) / n, stdtrit(n - 1, 0.975)) if n > 1 else (0.0, 0.0)
    seeds = sum(stdtrit(len(x) - 1, 0.975) ** 2 * x.mean(1).var(ddof=1) / len(x) for x in several)
    # What images and seeds do together is in the scatter of the seeds already: the images' share is the rest.
    together = (x - x.mean(0) - x.mean(1, keepdims=True) + x.mean() for x in several)
    rest = images - sum(x.var() / (len(x) - 1) / max(n - 1, 1) for x in together)
    half = max(math.sqrt(seeds + t ** 2 * max(0.0, rest)), t * math.sqrt(images))
    return float(by_image.mean()), float(by_image.mean() - half), float(by_image.mean() + half)


def difference(x: dict[int, np.ndarray], y: dict[int, np.ndarray]) -> list[np.ndarray]:
    """Mean x less mean y for interval(), of scores [n] by seed: paired by common seeds, two or all of
    one's."""
    common = sorted(x.keys() & y.keys())
    if len(common) > 1 or common and min(len(x), len(y)) == 1:
        return [np.stack([x[s] - y[s] for s in common])]
    x, y = np.stack(list(x.values())), np.stack(list(y.values()))
    return [x, -y] if min(len(x), len(y)) > 1 else [x.mean(0, keepdims=True) - y.mean(0, keepdims=True)]


def verdict(low: float, high: float) -> str:
    """Of the interval of a difference; nan: not settled."""
    return "better" if low > 0 else "worse" if high < 0 else "not settled"


# -------------------------------------------------------------------------------- tables
def table(title: str, runs: list[Run], groups: dict[str, list[int]]) -> list[dict]:
    """A row for each group: its scores with intervals, and the first score less that of the first group."""
    images, names = runs[0].scores[title]["images"], list(runs[0].scores[title]["values"])
    by_seed = {group: {runs[i].knobs["seed"]: runs[i].scores[title]["values"] for i in members}
               for group, members in groups.items()}
    baseline, rows = next(iter(groups)), []
    for group, own in by_seed.items():
        row = {"group": group, "seeds": len(own), "images": images,
               "interval_over": "seeds and images" if len(own) > 1 else "images"}
        for name in names:
            values = [x[name] for x in own.values()]
            row[name] = float(np.mean([x.mean() for x in values]))
            if len(values[0]) == images:
                low, high = interval([np.stack(values)])[1:]
                row[f"{name}_interval"] = [max(0.0, low), min(1.0, high)]
        change = difference(*({seed: x[names[0]] for seed, x in y.items()} for y in (own, by_seed[baseline])))
        row["difference"], *row["difference_interval"] = interval(change)
        row["difference_seeds"] = min(map(len, change))
        paired = len(change) == 1 and own.keys() & by_seed[baseline].keys()
        row["difference_over"] = ("seeds and images" if row["difference_seeds"] > 1 else "images") + \
            ", paired by seed" * bool(paired)
        # Another seed can turn what one seed shows, and what a handful of images show is chance.
        settled = row["difference_seeds"] > 1 and images >= FEWEST
        row["verdict"] = verdict(*row["difference_interval"]) if settled else "not settled"
        if group == baseline:
            row |= dict.fromkeys(x for x in row if x.startswith("difference")) | {"verdict": "baseline"}
        rows.append(row | {x: float(np.mean([runs[i].log[-1][x] for i in groups[group]]))
                           for x in ("seconds_training", "seconds_selecting")})
    return rows


def interval_over(rows: list[dict]) -> str:
    """What the intervals of the rows of table() are over, in words."""
    over = {row["interval_over"] for row in rows}
    return " (several seeds) or ".join(sorted(over, reverse=True)) + " (one seed)" * ("images" in over)


def aligned(lines: list[list[str]]) -> str:
    """Columns side by side, the first one on the left; the first line is the head, broken into short ones."""
    head = [textwrap.wrap(cell, 9, break_long_words=False, break_on_hyphens=False) for cell in lines[0]]
    height = max(map(len, head))
    lines = [*zip(*([""] * (height - len(cell)) + cell for cell in head)), *lines[1:]]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
                     for line in lines)


def spread(mean: float | None, ends: list | None = None, form: str = ".1f", scale: float = 100) -> str:
    """A number and its interval to read, shares in percent; None: never."""
    x, *ends = ["never" if y is None else format(scale * y, form) for y in (mean, *(ends or ()))]
    return x + f" [{', '.join(ends)}]" * bool(ends)


def table_text(rows: list[dict]) -> str:
    """The rows of table() to read, in percent."""
    names = [name for name in rows[0] if name in NAMES]
    severities = [name for name in names if name.startswith("severity")]
    single = [name for name in names[1:] if name not in severities]
    lines = [["", "seeds", f"{NAMES[names[0]]} (%)", f"less {rows[0]['group']}'s", "", "seconds (selecting)",
              *["at severity 1 to 5"] * bool(severities), *(NAMES[name] for name in single)]]
    for row in rows:
        seeds = row["difference_seeds"] or row["seeds"]  # which can be fewer
        marks = f" ({seeds})" * (seeds < row["seeds"]) + "*" * (seeds == 1)
        change = row["difference"], row["difference_interval"], "+.1f"
        seconds = row["seconds_training"] + row["seconds_selecting"], row["seconds_selecting"]
        lines.append([row["group"], f"{row['seeds']}{marks}",
                      spread(row[names[0]], row[f"{names[0]}_interval"]),
                      "" if row is rows[0] else spread(*change), row["verdict"],
                      "{:,.0f} ({:,.0f})".format(*seconds),
                      *[" ".join(spread(row[name]) for name in severities)] * bool(severities),
                      *(spread(row[name]) for name in single)])
    cells = "".join(line[1] for line in lines[1:])
    return aligned(lines) + "\n(n) seeds that the difference rests on" * ("(" in cells) + \
        "\n* over images only: another seed can turn it" * ("*" in cells)


# -------------------------------------------------------------------------------- along training
def first_at(target: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x [E] at which y [D, E] first reaches target [D], between epochs by a straight line; else infinite."""
    hit = y >= target[:, None]
    row, i = np.arange(len(y)), hit.argmax(1)
    j = np.maximum(i - 1, 0)
    rise = y[row, i] - y[row, j]
    share = np.where(rise > 0, (target - y[row, j]) / np.where(rise > 0, rise, 1), 1)
    return np.where(hit.any(1), x[j] + share * (x[i] - x[j]), np.inf)


def curves(runs: list[Run], groups: dict[str, list[int]]) -> dict[str, dict]:
    """By group, from log.jsonl: seeds; steps [E]; seconds of training and selecting, and R1, [S][E] each."""
    found = {}
    for group, members in groups.items():
        logs = [{line["step"]: line for line in runs[i].log} for i in members]
        steps = sorted(set.intersection(*map(set, logs)))  # of all, wherever one was stopped
        seconds = [[log[x]["seconds_training"] + log[x]["seconds_selecting"] for x in steps] for log in logs]
        found[group] = {"seeds": [runs[i].knobs["seed"] for i in members], "steps": steps, "seconds": seconds,
                        "R1": [[log[x]["R1"] for x in steps] for log in logs]}
    return found


def seed_weights(seeds: list[int]) -> np.ndarray:
    """Weights [1 + DRAWS, S] of seeds, of sum 1, the first the plain mean; the same for the same seeds.

    Resampling two or three seeds gives intervals far too narrow. Gaussian multipliers (a wild bootstrap)
    divided by the root of a chi-square spread the mean of n numbers as Student's t with n - 1 degrees of
    freedom does. """
    n, generator = len(seeds), np.random.default_rng([0, *seeds])
    g = generator.standard_normal((DRAWS, n))
    g = (g - g.mean(1, keepdims=True)) / np.sqrt(n * generator.chisquare(max(n - 1, 1), (DRAWS, 1)))
    return 1 / n + np.concatenate([np.zeros((1, n)), g])


def cost(found: dict[str, dict], target: float | None) -> list[dict]:
    """A row for each group of curves(), the first being the baseline: steps and seconds at which its mean
    curve first reaches the target; their ratios to the baseline's; and "gain", by difference() its R@1 after
    the baseline's seconds (or at its end, where that is sooner) less that of the baseline.

    target None: what the baseline's mean curve ends at, in each draw of seeds its own. Where the baseline
    does not reach a given target its whole run counts: ratios are at most too large. Seconds are the mean
    over seeds: how they differ is the machine's doing. Intervals where both groups have several seeds; None:
    not reached. """
    def along(group: dict) -> tuple[np.ndarray, ...]:
        return (seed_weights(group["seeds"]) @ np.array(group["R1"]), np.array(group["steps"], float),
                np.mean(group["seconds"], 0))

    def finite(x):
        return [finite(y) for y in x] if np.ndim(x) else float(x) if np.isfinite(x) else None
    baseline = next(iter(found.values()))
    y, *base = along(baseline)
    goal = np.full(len(y), target) if target else y[:, -1]
    rows = []
    for name, group in found.items():
        drawn, *own = along(group)
        several = min(len(group["seeds"]), len(baseline["seeds"])) > 1
        row = {"group": name, "seeds": len(group["seeds"]), "target": finite(goal[0])}
        for axis, x, other in zip(("steps", "seconds"), own, base):
            reached = first_at(goal, drawn, x)
            ratio = reached / np.minimum(first_at(goal, y, other), other[-1])
            method = "lower" if np.isinf(ratio).any() else "linear"
            ends = np.quantile(ratio[1:], (0.025, 0.975), method=method)
            row |= {axis: finite(reached[0]), f"{axis}_ratio": finite(ratio[0]),
                    f"{axis}_ratio_interval": finite(ends) if several else None}
        after = {seed: np.array([np.interp(base[1][-1], own[1], r, left=np.nan)])
                 for seed, r in zip(group["seeds"], group["R1"])}
        gain, *ends = finite(interval(difference(after, {seed: np.array(r[-1:]) for seed, r in
                                                         zip(baseline["seeds"], baseline["R1"])})))
        rows.append(row | {"gain": gain, "gain_interval": ends if several and gain is not None else None})
    return rows


def cost_text(rows: list[dict]) -> str:
    """The rows of cost() to read."""
    whose = f"{rows[0]['group']}'s"
    lines = [["", "seeds", f"steps to {spread(rows[0]['target'])} %", f"of {whose}", "seconds", f"of {whose}",
              f"R@1 less {whose} after its seconds"]]
    for row in rows:
        line = [row["group"], str(row["seeds"])]
        for axis in ("steps", "seconds"):
            ratio = spread(row[f"{axis}_ratio"], row[f"{axis}_ratio_interval"], ".2f", 1)
            needless = row is rows[0] or row[axis] is None and ratio.count("never") != 2
            line += [spread(row[axis], None, ",.0f", 1), "" if needless else ratio]
        gain = row is not rows[0] and row["gain"] is not None
        lines.append([*line, spread(row["gain"], row["gain_interval"], "+.1f") if gain else ""])
    return aligned(lines)


def draw_curves(found: dict[str, dict], samplers: list[str], target: float):
    """R@1 against steps and seconds; a line is the mean over seeds, a band from the lowest to the highest.
    samplers: of each group, for its colour."""
    figure, axes = cli.canvas(1, 2, 7.2, 3.0, sharey=True)
    for i, ((group, x), sampler) in enumerate(zip(found.items(), samplers)):
        style = ("-", "--", ":", "-.")[samplers[:i].count(sampler) % 4]  # of the variants of one sampler
        y, colour = 100 * np.array(x["R1"]), cli.COLOURS.get(sampler, "black")
        for axis, at in zip(axes[0], (x["steps"], np.mean(x["seconds"], 0))):
            axis.plot(at, y.mean(0), style, color=colour, label=group)
            axis.fill_between(at, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)
    for axis, label in zip(axes[0], ("steps", "seconds of training and selecting")):
        axis.axhline(100 * target, color="black", linewidth=0.6, linestyle=":")
        axis.set(xlabel=label)
    several = max(len(x["seeds"]) for x in found.values()) > 1
    axes[0, 0].set(ylabel="two-view R@1 (%)",
                   title="mean over seeds; band: lowest to highest" if several else "one seed")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=min(4, len(found)))
    return figure


# -------------------------------------------------------------------------------- the command
def writable(out: str, others: list[Path]) -> Path:
    """The folder --out, made if need be. Raises Stop where it or one of the others cannot be written."""
    folder = cli.expand(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Stop(f"--out {folder}: {error.strerror}; give another folder") from None
    for one in (folder, *others):
        if not os.access(one, os.W_OK):
            raise Stop(f"{one} cannot be written; allow it" + "; or give another --out" * (one == folder))
    return folder


def show(runs: list[Run], groups: dict[str, list[int]], target: float | None, curve: Path | None) -> dict:
    """Print the table of each task that all runs have done; with `curve` also the cost along training, drawn
    into that file. Returns the rows, by title."""
    record = {}
    for title in [x for x in runs[0].scores if all(x in run.scores for run in runs)]:
        for run in runs:
            if run.scores[title]["images_digest"] != runs[0].scores[title]["images_digest"]:
                raise Stop(f"{run.folder} and {runs[0].folder} were evaluated on different images: give one "
                           "--data-dir for all")
        rows = record[title] = table(title, runs, groups)
        print(f"\n{title}, {rows[0]['images']:,} images; 95 % intervals over {interval_over(rows)}\n\n"
              + table_text(rows))
    if curve:
        found = record["curves"] = curves(runs, groups)
        rows = record["cost"] = cost(found, target)
        print("\nalong training, on the R@1 in log.jsonl; 95 % intervals over seeds, where there are several"
              f"\n\n{cost_text(rows)}")
        samplers = [runs[members[0]].knobs["sampler"] for members in groups.values()]
        cli.save_figure(draw_curves(found, samplers, rows[0]["target"]), curve)
    return record


def main(argv: list[str]) -> None:
    knobs, _ = cli.parse(argv, __doc__, KNOBS, {}, "files")
    if not knobs["files"]:
        raise Stop("name a file of retrieval.py --export, such as: python compare.py results/runs.json.gz")
    runs = [run for word in knobs["files"] for run in read_file(cli.expand(word))]
    groups = baseline_first(group_runs(runs), runs, knobs["baseline"])
    out = writable(knobs["out"], [])
    show(runs, groups, knobs["target"], out / "curve")
    print(f"\n{out / 'curve.png'}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # its output may be cut, as by head
    sys.exit(cli.run(main, "compare.py"))
