"""Runs compared: groups of seeds, paired differences with intervals over seeds and images, curves, a picture of neighbours.

Used by retrieval.py. Scores are numpy arrays, higher is better: [n] of one run's n images, [S, n] of a group of S seeds.
"""
import glob
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import Stop, nearest
from cli import COLOURS, canvas

NAMES = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "mrr": "MRR", "linear": "linear probe", "knn": "20 nearest neighbours",
         **{f"severity_{s}": f"R@1, severity {s}" for s in range(1, 6)}}
NOT_COMPARED = {"seed", "data_dir", "out_dir", "device", "compile", "resume", "max_steps", "log_every", "checkpoint_minutes"}
SAME_VIEWS = ("dataset", "source_size", "image_size", "crop_scale", "jitter", "skip_broken")
LOGGED = "step", "R1", "seconds_training", "seconds_selecting"  # in each line of log.jsonl
DRAWS, OF_IMAGES = 100_000, 4000  # of the bootstrap: of seeds, whose tails are long, and among them different ones of images
FEWEST = 20  # images that a verdict takes


# ------------------------------------------------------------------------------------------------- runs and groups
class Run(NamedTuple):
    folder: Path
    knobs: dict   # of config.json
    result: dict  # result.json: the last line of the log, and more
    log: list     # of dicts, one an epoch


def read_runs(words: list[str]) -> list[Run]:
    """The finished runs in these folders; words with * ? [ are patterns. Raises Stop where some cannot be compared."""
    if not words:
        raise Stop("name the folders of finished runs, for example: python retrieval.py runs/quick-*")
    folders = {}
    for word in words:
        found = [str(Path(word).expanduser())]
        if glob.has_magic(word):  # .old-: run_all.sh's, of other code
            found = [x for x in sorted(glob.glob(found[0])) if Path(x).is_dir() and ".old-" not in Path(x).name]
        if not found:
            raise Stop(f"{word} matches no folder: give folders that hold a result.json")
        folders |= {Path(x).resolve(): Path(x) for x in found}
    runs = []
    for folder in folders.values():
        try:
            texts = [(folder / name).read_text() for name in ("config.json", "result.json", "log.jsonl")]
            run = Run(folder, json.loads(texts[0])["knobs"], json.loads(texts[1]), list(map(json.loads, texts[2].splitlines())))
            if not {"sampler", "objective", "seed", "data_dir", "limit", "batch_size", *SAME_VIEWS} <= run.knobs.keys() or \
                    not run.log or not all(math.isfinite(line[x]) for line in run.log for x in LOGGED) or \
                    not {"seconds_training", "seconds_selecting"} <= run.result.keys() or \
                    [type(run.knobs[x]) for x in ("data_dir", "seed", "batch_size", "image_size")] != [str, int, int, int] or \
                    not isinstance(run.knobs["limit"], (int, type(None))):
                raise ValueError
        except OSError:
            raise Stop(f"no finished run in {folder}: give folders that hold a result.json, or finish the run with "
                       "train.py --resume") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise Stop(f"{folder}: its config.json, result.json or log.jsonl is not of train.py or damaged: leave it out") from None
        runs.append(run)
        for name in SAME_VIEWS:
            if run.knobs[name] != runs[0].knobs[name]:
                raise Stop(f"{runs[0].folder} has {name} {runs[0].knobs[name]} and {folder} {run.knobs[name]}: they see other views, so "
                           "give them apart")
    return runs


def group_runs(runs: list[Run]) -> dict[str, list[int]]:
    """Positions of the runs that differ in seed alone, by a name made of the knobs in which the groups differ."""
    groups = {}
    # What a run of an older commit has no word of counts as absent; steps: those made, as a run may have been stopped or extended.
    knobs = [{k: v for k, v in {**run.knobs, "steps": run.log[-1]["step"]}.items() if k not in NOT_COMPARED and v not in (None, False)}
             for run in runs]
    for i in sorted(range(len(runs)), key=lambda i: runs[i].knobs["seed"]):
        groups.setdefault(json.dumps(knobs[i], sort_keys=True), []).append(i)
    groups = dict(sorted(groups.items(), key=lambda x: min(x[1])))
    order = dict.fromkeys(("sampler", "objective", "embeddings", "select_after", "k", "q", *runs[0].knobs, "steps"))
    named = {}
    for members in groups.values():
        own, peers, words = knobs[members[0]], [knobs[x[0]] for x in groups.values()], []
        for knob in (k for k in order if k not in NOT_COMPARED):
            value = own.get(knob)
            if knob == "sampler" or (any(x.get(knob) != value for x in peers) and value not in (None, False, 0, "simclr")):
                words.append(value if isinstance(value, str) else knob.replace("_", "-") + ("" if value is True else f" {value}"))
            peers = [x for x in peers if x.get(knob) == value]  # the name says no more than it takes to tell groups apart
        name = " ".join(words)
        named[name if name not in named else f"{name} ({len(named)})"] = members
        for i, j in zip(members, members[1:]):
            if runs[i].knobs["seed"] == runs[j].knobs["seed"]:
                raise Stop(f"{runs[i].folder} and {runs[j].folder} are runs of the same settings and seed {runs[i].knobs['seed']}: "
                           "leave one out")
    return named


def pick_baseline(groups: dict[str, list[int]], runs: list[Run], name: str | None) -> str:
    """The name of the group that others are compared with: as given, or random batches with NT-Xent, or the first."""
    if name and name not in groups:
        raise Stop(f"--baseline {name}: no such group{nearest(name, groups)}")
    return name or next((g for g, x in groups.items() if runs[x[0]].knobs["sampler"] == "random"
                         and runs[x[0]].knobs["objective"] == "simclr"), next(iter(groups)))


# ------------------------------------------------------------------------------------------------- uncertainty
def seed_weights(n: int, generator: np.random.Generator) -> np.ndarray:
    """Weights [DRAWS, n] of n seeds, each row with sum 1, for a bootstrap that keeps its promise with as few as two seeds.

    Resampling two or three seeds gives intervals far too narrow. Gaussian multipliers (a wild bootstrap) divided by the
    root of a chi-square spread the mean of n numbers exactly as Student's t with n-1 degrees of freedom.
    """
    if n == 1:
        return np.ones((DRAWS, 1))
    g = generator.standard_normal((DRAWS, n))
    g -= g.mean(1, keepdims=True)
    return 1 / n + g / np.sqrt(n * generator.chisquare(n - 1, (DRAWS, 1)))


def intervals(estimates: list[list[np.ndarray]], seed: int = 0) -> np.ndarray:
    """Mean and 95 % interval [K, 3] over seeds and images of K estimates, by a two-level bootstrap.

    An estimate is a list of independent groups of seeds [S, n] whose means are added up: one group; a group of paired
    differences; or a group and the negative of another. The images are the same for all estimates, and are drawn once
    for all of them, with Rubin's (1981) weights. Where a group has one seed, nothing is said about other seeds. Few
    seeds can agree by luck, so no interval is narrower on either side than the images alone make it.
    """
    generator = np.random.default_rng(seed)
    n = estimates[0][0].shape[1]
    by_image = np.stack([sum(x.mean(0) for x in e) for e in estimates], 1)  # [n, K]
    means = by_image.mean(0)
    around, draws = (by_image - means).astype(np.float32), []
    for part in np.array_split(np.arange(OF_IMAGES), -(-OF_IMAGES * n // 2 ** 22)):
        weights = generator.standard_exponential((len(part), n), dtype=np.float32)
        draws.append(weights / weights.sum(1, keepdims=True) @ around)
    draws, found = np.concatenate(draws).astype(np.float64), []  # [OF_IMAGES, K], about 0
    for k, e in enumerate(estimates):
        # What images and seeds do together is in the scatter of the seeds already: the images' share is what is left.
        together = sum(((x - x.mean(0) - x.mean(1, keepdims=True) + x.mean()) ** 2).sum() / (len(x) * (len(x) - 1) * max(n - 1, 1))
                       for x in e if len(x) > 1)
        alone = by_image[:, k].var(ddof=1) if n > 1 else 0.0
        both = np.resize(draws[:, k] * np.sqrt(max(0.0, 1 - together / alone) if alone else 0.0), DRAWS)
        both += sum(seed_weights(len(x), generator) @ x.mean(1) for x in e)
        (low, high), (least, most) = (np.quantile(x, (0.025, 0.975)) for x in (both, means[k] + draws[:, k]))
        found.append([means[k], min(low, least), max(high, most)])
    return np.array(found)


def difference(x: dict[int, np.ndarray], y: dict[int, np.ndarray]) -> list[np.ndarray]:
    """The estimate of mean x less mean y, scores [n] by seed: paired where they share two seeds or more, or all they have."""
    common = sorted(x.keys() & y.keys())
    if len(common) > 1 or common and min(len(x), len(y)) == 1:
        return [np.stack([x[s] - y[s] for s in common])]
    x, y = np.stack(list(x.values())), np.stack(list(y.values()))
    return [x, -y] if min(len(x), len(y)) > 1 else [x.mean(0, keepdims=True) - y.mean(0, keepdims=True)]


def verdict(low: float, high: float) -> str:
    """Of the interval of a difference; nan: not settled."""
    return "better" if low > 0 else "worse" if high < 0 else "not settled"


def table(scores: list[dict[str, np.ndarray]], runs: list[Run], groups: dict[str, list[int]], baseline: str) -> list[dict]:
    """A row for each group: its scores with intervals, and the difference of the first score to the baseline's."""
    names = list(scores[0])
    by_seed = {g: {runs[i].knobs["seed"]: scores[i] for i in members} for g, members in groups.items()}
    estimates, rows = [], []
    for group, members in groups.items():
        own, base = ({s: x[names[0]] for s, x in by_seed[g].items()} for g in (group, baseline))
        change = difference(own, base)
        estimates += [[np.stack([scores[i][name] for i in members])] for name in names] + [change]
        rows.append({"group": group, "seeds": len(members), "images": len(scores[0][names[0]]),
                     "interval_over": "seeds and images" if len(members) > 1 else "images",
                     "difference_over": ("seeds and images" if min(len(x) for x in change) > 1 else "images")
                     + (", paired by seed" if len(change) == 1 and own.keys() & base.keys() else ""),
                     "difference_seeds": min(map(len, change))})
    found = iter(intervals(estimates).tolist())
    for row, members in zip(rows, groups.values()):
        for name in names:
            row[name], *interval = next(found)
            row[f"{name}_interval"] = [max(0.0, interval[0]), min(1.0, interval[1])]
        row["difference"], *row["difference_interval"] = next(found)
        # Another seed can turn what one seed shows, and what a handful of images show is chance.
        settled = row["difference_seeds"] > 1 and row["images"] >= FEWEST
        row["verdict"] = verdict(*row["difference_interval"]) if settled else "not settled"
        for what in ("seconds_training", "seconds_selecting"):
            row[what] = float(np.mean([runs[i].result[what] for i in members]))
        if row["group"] == baseline:
            row |= {"difference": None, "difference_interval": None, "difference_over": None, "difference_seeds": None, "verdict": "baseline"}
    return rows


def interval_over(rows: list[dict]) -> str:
    """What the intervals of the rows of table() are over, in words."""
    return " (several seeds) or ".join(sorted({row["interval_over"] for row in rows}, reverse=True)) + " (one seed)" * (
        "images" in {row["interval_over"] for row in rows})


def markdown(rows: list[dict], baseline: str) -> str:
    """The rows of table() to read, in percent."""
    names = [name for name in rows[0] if name in NAMES]
    lines = [["", "seeds", *(f"{NAMES[name]} (%)" for name in names), f"{NAMES[names[0]]} less {baseline}'s", "", "training (s)",
              "selecting (s)"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        def cell(name: str, sign: str = "") -> str:
            if row[name] is None:
                return ""
            low, high = row[f"{name}_interval"]
            return f"{100 * row[name]:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"
        seeds, note = row["difference_seeds"] or row["seeds"], " (intervals over images only)" if row["seeds"] == 1 else ""
        if row["seeds"] > seeds:
            note = f" (difference: {seeds})" if seeds > 1 else " (difference over images only)"
        lines.append([row["group"], f"{row['seeds']}{note}", *map(cell, names),
                      cell("difference", "+"), row["verdict"], f"{row['seconds_training']:.0f}", f"{row['seconds_selecting']:.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ------------------------------------------------------------------------------------------------- along training
def first_at(target: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x [D] at which y [D, E] first reaches target [D], between epochs by a straight line; infinite where it never does."""
    hit = y >= target[:, None]
    row, i = np.arange(len(y)), hit.argmax(1)
    j = np.maximum(i - 1, 0)
    rise = y[row, i] - y[row, j]
    share = np.where(rise > 0, (target - y[row, j]) / np.where(rise > 0, rise, 1), 1)
    return np.where(hit.any(1), x[row, j] + share * (x[row, i] - x[row, j]), np.inf)


def curves(runs: list[Run], groups: dict[str, list[int]]) -> dict[str, dict]:
    """By group, from log.jsonl: seeds; steps [E]; seconds of training and selecting, and R1, [S][E] each."""
    found = {}
    for group, members in groups.items():
        logs = [runs[i].log for i in members]
        steps = sorted(set.intersection(*({line["step"] for line in log} for log in logs)))  # of all, wherever one was stopped
        logs = [[{line["step"]: line for line in log}[step] for step in steps] for log in logs]
        found[group] = {"seeds": [runs[i].knobs["seed"] for i in members], "steps": steps,
                        "seconds": [[line["seconds_training"] + line["seconds_selecting"] for line in log] for log in logs],
                        "R1": [[line["R1"] for line in log] for log in logs]}
    return found


def cost(found: dict[str, dict], baseline: str, target: float | None, seed: int = 0) -> list[dict]:
    """A row for each group: steps and seconds at which its mean curve first reaches the target, their ratios to the baseline's, and
    "gain": its R@1 after the baseline's seconds (or at its end, where that is sooner) less that of the baseline.

    target None: what the baseline's mean curve ends at, in each draw of the bootstrap over seeds its own. Where the
    baseline does not reach a given target its whole run counts, so that ratios are at most too large. Seconds are the mean over
    seeds in each draw: how they differ is the machine's doing. A ratio has an interval where both groups have several seeds.
    """
    def draw(group: str, weights: np.ndarray) -> tuple[np.ndarray, ...]:
        steps = np.broadcast_to(np.array(found[group]["steps"], float), (len(weights), len(found[group]["steps"])))
        seconds = np.broadcast_to(np.mean(found[group]["seconds"], 0), steps.shape)
        return weights @ np.array(found[group]["R1"]), steps, seconds

    def weights(group: str) -> np.ndarray:  # the first row is the plain mean; groups of the same seeds get the same weights
        n = len(found[group]["seeds"])
        generator = np.random.default_rng([seed, *found[group]["seeds"]])
        return np.concatenate([np.full((1, n), 1 / n), seed_weights(n, generator)])
    y, steps, seconds = draw(baseline, weights(baseline))
    goal = np.full(len(y), target) if target else y[:, -1]
    base = [np.minimum(first_at(goal, y, x), x[:, -1]) for x in (steps, seconds)]
    rows = []
    for group in found:
        drawn, *x = draw(group, weights(group))
        row = {"group": group, "seeds": len(found[group]["seeds"]), "target": float(goal[0])}
        for name, own, other in zip(("steps", "seconds"), x, base):
            reached = first_at(goal, drawn, own)
            ratio = reached / other
            low, high = np.quantile(ratio[1:], (0.025, 0.975), method="lower" if np.isinf(ratio).any() else "linear")
            several = min(row["seeds"], len(found[baseline]["seeds"])) > 1
            row |= {name: reached[0], f"{name}_ratio": ratio[0], f"{name}_ratio_interval": [low, high] if several else None}
        at_equal_seconds = [np.interp(seconds[0, -1], x[1][0], point, left=np.nan) for point in np.eye(drawn.shape[1])]
        gain = drawn @ np.array(at_equal_seconds) - y[:, -1]
        row |= {"gain": gain[0], "gain_interval": np.quantile(gain[1:], (0.025, 0.975)).tolist() if several else None}
        rows.append({k: finite(v) for k, v in row.items()})
    return rows


def finite(x):
    """For JSON: what is not reached becomes null."""
    if isinstance(x, list):
        return [finite(value) for value in x]
    return (float(x) if np.isfinite(x) else None) if isinstance(x, (float, np.floating)) else x


def cost_markdown(rows: list[dict], baseline: str) -> str:
    def show(x: float | None, form: str) -> str:
        return "not reached" if x is None else format(x, form)
    lines = [["", "seeds", f"steps to R@1 {100 * rows[0]['target']:.1f} %", f"of {baseline}'s", "seconds", f"of {baseline}'s",
              f"R@1 less {baseline}'s at its last second"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        line = [row["group"], str(row["seeds"])]
        for name in ("steps", "seconds"):
            interval = row[f"{name}_ratio_interval"]
            ratio = show(row[f"{name}_ratio"], ".2f") + (f" [{show(interval[0], '.2f')}, {show(interval[1], '.2f')}]" if interval else "")
            line += [show(row[name], ",.0f"), "" if row["group"] == baseline or row[name] is None and not interval else ratio]
        points = [f"{100 * x:+.1f}" for x in (row["gain"], *(row["gain_interval"] or ())) if x is not None]
        lines.append(line + ["" if row["group"] == baseline or not points else points[0] + (f" [{', '.join(points[1:])}]" if points[1:] else "")])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ------------------------------------------------------------------------------------------------- figures
def draw_curves(found: dict[str, dict], runs: list[Run], groups: dict[str, list[int]], target: float):
    """R@1 against steps and against seconds; a line is the mean over seeds, a band goes from the lowest to the highest."""
    figure, axes = canvas(1, 2, 7.2, 3.0, sharey=True)
    used = {}
    for group, x in found.items():
        sampler = runs[groups[group][0]].knobs["sampler"]
        style = ("-", "--", ":", "-.")[used.setdefault(sampler, 0) % 4]  # of the variants of one sampler
        used[sampler] += 1
        y, colour = 100 * np.array(x["R1"]), COLOURS.get(sampler, "black")
        for axis, at in zip(axes[0], (x["steps"], np.mean(x["seconds"], 0))):
            axis.plot(at, y.mean(0), style, color=colour, label=group)
            axis.fill_between(at, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)
    for axis in axes[0]:
        axis.axhline(100 * target, color="black", linewidth=0.6, linestyle=":")
    several = max(len(x["seeds"]) for x in found.values()) > 1
    axes[0, 0].set(xlabel="steps", ylabel="two-view R@1 (%)", title="mean over seeds; band: lowest to highest" if several else "one seed")
    axes[0, 1].set(xlabel="seconds of training and selecting")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(found)))
    return figure


def draw_neighbours(found: dict[str, np.ndarray], queries: np.ndarray, pictures: dict[int, tuple[np.ndarray, np.ndarray]], labels: np.ndarray):
    """The second views nearest to each query's first view, by group: the partner framed in green, the same class in orange.

    found: by group, indices [Q, 5]. queries [Q]; pictures: of each index its two views, [S, S, 3] in 0 to 1.
    """
    def framed(picture: np.ndarray, colour: tuple) -> np.ndarray:
        edge = max(2, len(picture) // 12)
        out = np.ones((len(picture) + 4 * edge, len(picture) + 4 * edge, 3))
        out[edge:-edge, edge:-edge] = colour
        out[2 * edge:-2 * edge, 2 * edge:-2 * edge] = picture
        return out
    white, green, orange = (1, 1, 1), (0, 0.62, 0.45), (0.9, 0.62, 0)
    figure, axes = canvas(len(found) + 1, len(queries), 7.2, 0.4 + 0.5 * (len(found) + 1) * 4 / len(queries) * 0.75)
    for j, query in enumerate(queries):
        axes[0, j].imshow(framed(pictures[query][0], white))
        for line, (group, nearest_rows) in zip(axes[1:, j], found.items()):
            line.imshow(np.concatenate([framed(pictures[i][1], green if i == query else orange if labels[i] == labels[query] else white)
                                        for i in nearest_rows[j]], 1))
            if j == 0:
                line.set_ylabel(group, rotation=0, ha="right", va="center")
    axes[0, 0].set_ylabel("view 1 of", rotation=0, ha="right", va="center")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.suptitle("five nearest second views; green: the partner, orange: another image of its class", fontsize=8)
    return figure
