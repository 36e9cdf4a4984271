"""Runs compared: groups of seeds, differences with intervals over seeds and images, cost along training.

    python compare.py results/runs.json.gz                   # tables and figure of recorded runs, no training
    python compare.py results/runs.json.gz --baseline "random, dcl, batch-size 128, epochs 24" --out elsewhere

The files come from retrieval.py --export, which compares runs by the same functions.
"""
import glob
import gzip
import itertools
import json
import math
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit  # of Student's t; train.py would wait half a second for scipy.stats

import cli
from cli import Stop

KNOBS = {
    "baseline": (None, str, "group that the others are compared with, by its name in the table (default: "
                 "random batches, simclr if there)"),
    "target": (None, "float > 0 < 1", "R@1 to reach, between 0 and 1 (default: what the baseline ends at)"),
    "out": ("results", str, "folder of what is written"),
}
NAMES = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "mrr": "MRR", "R1_inner_product": "inner",
         "linear": "linear", "knn": "20 NN", **{f"severity_{s}": f"sev{s}" for s in range(1, 6)}}
NOT_COMPARED = {"seed", "data_dir", "out_dir", "device", "precision", "compile", "step", "resume",
                "max_steps", "log_every", "checkpoint_minutes"}
SAME_VIEWS = ("dataset", "source_size", "image_size", "crop_scale", "jitter", "skip_broken")
FEWEST = 20  # images that a verdict takes
DASHES = "-", "--", ":", "-.", (0, (6, 1)), (0, (1, 4)), (0, (6, 2, 1, 2, 1, 2)), (0, (2, 1))


# -------------------------------------------------------------------------------- runs and files
class Run(NamedTuple):
    folder: Path
    knobs: dict      # of config.json
    made_by: dict    # result.json: commit, device, versions and more
    log: list[dict]  # a line an epoch
    # By title of a table: images, their number; images_digest; values by score, in 0 to 1, of each image
    # [images] or the mean alone [1], the first, of `parts` zeros and ones, judges; scores, of
    # each {"mean", "se"}, its standard error over the images (not in older files).
    scores: dict[str, dict] = {}


def read_runs(words: list[str]) -> list[Run]:
    """The finished runs in these folders, or in those that match a pattern with * ? [. Raises Stop."""
    if not words:
        raise Stop("name the folders of finished runs, for example: python retrieval.py runs/quick-*")
    folders, runs = [], []
    for word in words:
        path = cli.expand(word)
        root = next(x for x in (path, *path.parents) if x.is_dir())  # taken as it is, no pattern
        rest = f"{path.relative_to(root)}/"
        found = sorted(root / x for x in glob.glob(rest, root_dir=root)) if glob.has_magic(rest) else [path]
        if not found:
            raise Stop(f"{word} matches no folder: give folders that hold a result.json")
        folders += [x for x in map(Path, found) if not x.is_file()]  # which the shell's * gives, too
    if not folders:
        raise Stop(f"{words[0]} is no folder: give folders that hold a result.json")
    for folder in folders:
        try:
            config, made_by = (json.loads((folder / x).read_text()) for x in ("config.json", "result.json"))
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            processes = config.get("processes", 1)
            knobs = config["knobs"] | ({"processes": processes} if processes > 1 else {})
            runs.append(Run(folder, knobs, made_by, log))
        except (OSError, ValueError, KeyError) as error:
            raise Stop(f"no finished run in {folder} ({error}): give folders that hold a result.json, or "
                       "finish the run with train.py --resume") from None
    return runs


def export(runs: list[Run]) -> bytes:
    """A compressed file of all that tables and curves are made of, without paths of this machine."""
    def short(task: dict) -> dict:  # of the first score small integers: a tenth of the bytes
        first = np.rint(next(iter(task["values"].values())) * task["parts"]).astype(int).tolist()
        return {x: task[x] for x in ("images", "images_digest", "parts", "scores")} | {"values": first}
    records = [{"name": run.folder.name, "log": run.log,
                "knobs": {name: x for name, x in run.knobs.items() if name not in ("data_dir", "out_dir")},
                "made_by": {x: run.made_by.get(x) for x in ("commit", "device", "time", "versions")},
                "scores": {title: short(task) for title, task in run.scores.items()}} for run in runs]
    return gzip.compress(json.dumps({"runs": records}).encode(), mtime=0)


def read_file(path: Path) -> list[Run]:
    """The runs that export() wrote; of all scores but the first the means alone. Raises Stop."""
    def values(task: dict) -> dict[str, np.ndarray]:
        means = {name: np.array([x["mean"]]) for name, x in task["scores"].items() if name in NAMES}
        return means | {next(iter(means)): np.array(task["values"]) / task["parts"]}
    try:
        return [Run(Path(x["name"]), x["knobs"], x["made_by"], x["log"],
                    {title: task | {"values": values(task)} for title, task in x["scores"].items()})
                for x in json.loads(gzip.decompress(path.read_bytes()))["runs"]]
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError) as error:
        raise Stop(f"{path} cannot be read ({error}): give a file that retrieval.py --export wrote") from None


# -------------------------------------------------------------------------------- groups
def settings(run: Run) -> dict:
    """The knobs that tell runs apart; what a run of an older commit has no word of counts as absent."""
    return {name: x for name, x in run.knobs.items() if name not in NOT_COMPARED and x not in (None, False)}


def group_runs(runs: list[Run]) -> dict[str, list[int]]:
    """Positions of the runs that differ in seed alone, by the knobs in which groups differ. Raises Stop."""
    for name in SAME_VIEWS:
        if other := [run.folder for run in runs if run.knobs[name] != runs[0].knobs[name]]:
            raise Stop(f"{runs[0].folder} and {other[0]} differ in {name}, so in views: give them apart")
    knobs = [settings(run) | {"steps": run.log[-1]["step"]} for run in runs]  # it may have been stopped
    groups, named = {}, {}
    for i in sorted(range(len(runs)), key=lambda i: runs[i].knobs["seed"]):
        groups.setdefault(json.dumps(knobs[i], sort_keys=True), []).append(i)
    order = dict.fromkeys(["sampler", "objective", "embeddings", "batch_size", "lr", "select_after", "k", "q",
                           *(name for own in knobs for name in own)])
    chosen = [own for own in knobs if own["sampler"] != "random"]  # which alone has no embeddings
    differ = {name for name, those in (("objective", knobs), ("embeddings", chosen), ("batch_size", knobs))
              if len({own.get(name) for own in those}) > 1}
    for members in sorted(groups.values(), key=min):
        own, peers, words = knobs[members[0]], [knobs[x[0]] for x in groups.values()], []
        rates = {peer.get("lr") for peer in knobs if peer["batch_size"] == own["batch_size"]}
        for name in order:  # these three where any runs differ; of others what it takes to tell groups apart
            x = own.get(name)
            alike = [peer for peer in peers if peer.get(name) == x]
            told = len(alike) < len(peers) or name == "lr" and len(rates) > 1 or (
                name in differ and (name != "embeddings" or own["sampler"] != "random"))
            if name == "sampler" or told and x not in (None, "simclr"):
                value = f" {x:.4g}" if isinstance(x, float) else f" {x}"
                words.append(x if isinstance(x, str) else name.replace("_", "-") + value * (x is not True))
            peers = alike
        name = ", ".join(words)
        named[name if name not in named else f"{name} ({len(named)})"] = members
        for one, other in itertools.pairwise(runs[i] for i in members):
            if one.knobs["seed"] == other.knobs["seed"]:
                raise Stop(f"{one.folder} and {other.folder} have the same settings and seed: leave one out")
    return named


def baseline_first(groups: dict[str, list[int]], runs: list[Run], name: str | None) -> dict[str, list[int]]:
    """The groups, first the baseline: the one that is named, or random, best with NT-Xent. Raises Stop."""
    if name and name not in groups:
        raise Stop(f"--baseline {name}: no such group{cli.nearest(name, groups)}")
    knobs = {group: runs[members[0]].knobs for group, members in groups.items()}
    baseline = name or min(groups, key=lambda x: (
        knobs[x]["sampler"] != "random", knobs[x]["objective"] != "simclr"))
    return {baseline: groups[baseline], **groups}


# -------------------------------------------------------------------------------- uncertainty
def interval(groups: list[np.ndarray]) -> tuple[float, float, float]:
    """Mean and 95 % interval over seeds and images of a sum of means.

    groups: scores [S, n] of independent groups of S seeds on the same n images: one group; a group of paired
    differences; or a group and the negative of another. What images and what seeds add to the variance has
    degrees of freedom of its own, so half-widths by Student's t are added in squares (Zou and Donner,
    Statistics in Medicine 2008). One seed says nothing about others; few can agree by luck, so no interval is
    narrower than the images alone make it. """
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
    """Mean x less mean y for interval(), of scores [n] by seed: paired by two common seeds, or one's only."""
    common = sorted(x.keys() & y.keys())
    if len(common) > 1 or common and min(len(x), len(y)) == 1:
        return [np.stack([x[s] - y[s] for s in common])]
    x, y = np.stack(list(x.values())), np.stack(list(y.values()))
    return [x, -y] if min(len(x), len(y)) > 1 else [x.mean(0, keepdims=True) - y.mean(0, keepdims=True)]


# -------------------------------------------------------------------------------- tables
def table(title: str, runs: list[Run], groups: dict[str, list[int]]) -> list[dict]:
    """A row for each group: its scores with intervals, and the first score less that of the first group."""
    images = runs[0].scores[title]["images"]
    names = [x for x in runs[0].scores[title]["values"] if x in NAMES]
    by_seed, rows = {group: {runs[i].knobs["seed"]: runs[i].scores[title]["values"] for i in members}
                     for group, members in groups.items()}, []
    for group, own in by_seed.items():
        row = {"group": group, "seeds": len(own), "images": images}
        for name in names:
            values = [x[name] for x in own.values()]
            row[name] = float(np.mean([x.mean() for x in values]))
            if len(values[0]) == images:
                low, high = interval([np.stack(values)])[1:]
                row[f"{name}_interval"] = [max(0.0, low), min(1.0, high)]
        first = [{seed: x[names[0]] for seed, x in y.items()} for y in (own, by_seed[next(iter(groups))])]
        mean, low, high = interval(change := difference(*first))
        seeds = min(map(len, change))
        row |= {"difference": mean, "difference_interval": [low, high], "difference_seeds": seeds,
                "verdict": "better" if low > 0 else "worse" if high < 0 else "not settled"}
        if seeds == 1 or images < FEWEST:  # another seed can turn it; few images show chance
            row["verdict"] = "not settled"
        if not rows:
            row |= dict.fromkeys(x for x in row if x.startswith("difference")) | {"verdict": "baseline"}
        rows.append(row | {x: float(np.mean([runs[i].log[-1][x] for i in groups[group]]))
                           for x in ("seconds_training", "seconds_selecting")})
    return rows


def aligned(lines: list[list[str]]) -> str:
    """Columns side by side, the first one on the left."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
                     for line in lines)


def plus_minus(mean: float | None, ends: list | None, form: str = ".1f") -> str:
    """A share in percent and half its interval to read, the half that does not stop at 0 or 1."""
    if mean is None:
        return ""
    return f"{100 * mean:{form}}" + (f" ±{100 * max(ends[1] - mean, mean - ends[0]):.1f}" if ends else "")


def table_text(rows: list[dict]) -> str:
    """The rows of table() to read, in percent, with seconds in all and of selecting."""
    first, *others = [name for name in rows[0] if name in NAMES]
    more = [NAMES[name].rjust(4) for name in others]
    lines = [["", "seeds", f"{NAMES[first]} (%)", "difference", "", "seconds", " ".join(more)]]
    for row in rows:
        seeds = row["difference_seeds"] or row["seeds"]  # which can be fewer
        selecting = row["seconds_selecting"]
        lines.append([
            row["group"], f"{row['seeds']}" + f" ({seeds})" * (seeds < row["seeds"]) + "*" * (seeds == 1),
            plus_minus(row[first], row[f"{first}_interval"]),
            plus_minus(row["difference"], row["difference_interval"], "+.1f"), row["verdict"],
            f"{row['seconds_training'] + selecting:,.0f} ({selecting:,.0f})",
            " ".join(f"{100 * row[name]:.1f}".rjust(len(x)) for name, x in zip(others, more))])
    if "severity_1" in others:  # no room
        lines = [line[:5] + line[6:] for line in lines]
    text = aligned(lines) + "\n(n) seeds that the difference rests on" * any("(" in x[1] for x in lines)
    return text + "\n* over images only: another seed can turn it" * any("*" in x[1] for x in lines)


# -------------------------------------------------------------------------------- along training
def curves(runs: list[Run], groups: dict[str, list[int]]) -> dict[str, dict]:
    """By group, from log.jsonl: seeds; R1 [S][E]; images seen [E]; seconds in all [E], their mean."""
    found = {}
    for group, members in groups.items():
        logs = [{line["step"]: line for line in runs[i].log} for i in members]
        own = runs[members[0]].knobs
        steps = sorted(set.intersection(*map(set, logs)))  # of all, wherever one was stopped
        seconds = [[log[x]["seconds_training"] + log[x]["seconds_selecting"] for x in steps] for log in logs]
        found[group] = {"seeds": [runs[i].knobs["seed"] for i in members],
                        "images": [x * own["batch_size"] * own.get("processes", 1) for x in steps],
                        "seconds": np.mean(seconds, 0).tolist(),
                        "R1": [[log[x]["R1"] for x in steps] for log in logs]}
    return found


def first_at(target: float, y: np.ndarray, x: list[float]) -> float | None:
    """x at which y first reaches the target, between epochs by a straight line; None: never."""
    hit = np.flatnonzero(y >= target)
    if not len(hit):
        return None
    i = hit[0]
    return float(np.interp(target, y[i - 1:i + 1], x[i - 1:i + 1]) if i else x[0])


def cost(found: dict[str, dict], target: float | None) -> list[dict]:
    """A row for each group of curves(), the first being the baseline: images seen and seconds at which its
    mean curve first reaches the target (None: what the baseline's ends at), and their ratios to its own, of
    which the whole run counts where it does not reach it; and "gain", with its interval over several seeds,
    R@1 after the baseline's seconds (or at its end, where that is sooner) less that of the baseline."""
    baseline = next(iter(found.values()))
    base, rows = np.mean(baseline["R1"], 0), []
    target = target or float(base[-1])
    ends = {seed: np.array(r[-1:]) for seed, r in zip(baseline["seeds"], baseline["R1"])}
    for name, group in found.items():
        row = {"group": name, "seeds": len(group["seeds"]), "target": target}
        for axis in ("images", "seconds"):
            row[axis] = first_at(target, np.mean(group["R1"], 0), group[axis])
            other = first_at(target, base, baseline[axis]) or baseline[axis][-1]
            row[f"{axis}_ratio"] = None if row[axis] is None else row[axis] / other
        after = {seed: np.array([np.interp(baseline["seconds"][-1], group["seconds"], r, left=np.nan)])
                 for seed, r in zip(group["seeds"], group["R1"])}
        gain, *around = interval(difference(after, ends))
        several = min(len(after), len(ends)) > 1 and math.isfinite(gain)
        rows.append(row | {"gain": gain if math.isfinite(gain) else None,
                           "gain_interval": around if several else None})
    return rows


def cost_text(rows: list[dict]) -> str:
    """The rows of cost() to read."""
    lines = [["", "seeds", "images", "ratio", "seconds", "ratio", "gain"]]
    for row in rows:
        line = [row["group"], str(row["seeds"])]
        for x, ratio in ((row[axis], row[f"{axis}_ratio"]) for axis in ("images", "seconds")):
            line += ["never", ""] if x is None else [f"{x:,.0f}", f"{ratio:.2f}"]
        lines.append([*line, plus_minus(row["gain"], row["gain_interval"], "+.1f")])
    return aligned(lines)


def schedules(runs: list[Run], groups: dict[str, list[int]]) -> dict[str, list[dict]]:
    """The ends of curves() by the settings but for a schedule's length, if any has several whole ones: by
    rising seconds, the last R1 [S]; and "ratio", these seconds to those at which the schedules of the first
    that has several, between two of them by a straight line, end at the same mean (None: none does)."""
    alike, lines = {}, {}
    for group, x in curves(runs, groups).items():
        run = runs[groups[group][0]]
        key = json.dumps({**settings(run), "epochs": None}, sort_keys=True)
        if run.log[-1]["epoch"] >= run.knobs["epochs"]:
            alike.setdefault(key, []).append({
                "group": group, "seconds": x["seconds"][-1], "R1": [r[-1] for r in x["R1"]]})
    for ends in alike.values():
        words = [word for word in ends[0]["group"].split(", ") if not word.startswith(("epochs ", "steps "))]
        name = ", ".join(words)
        lines[name if name not in lines else ends[0]["group"]] = sorted(ends, key=lambda x: x["seconds"])
    first = next((x for x in lines.values() if len(x) > 1), None)
    if first is None:
        return {}
    for end in itertools.chain(*lines.values()):
        mean, means = np.mean(end["R1"]), np.array([np.mean(x["R1"]) for x in first])
        same = first_at(mean, means, [x["seconds"] for x in first]) if mean >= means.min() else None
        end["ratio"] = same and end["seconds"] / same
    return lines


def schedules_text(lines: dict[str, list[dict]]) -> str:
    """The rows of schedules() to read."""
    rows = [["", "seeds", "R@1 (%)", "seconds", "ratio"]]
    for end in itertools.chain(*lines.values()):
        rows.append([end["group"], str(len(end["R1"])), f"{100 * np.mean(end['R1']):.1f}",
                     f"{end['seconds']:,.0f}", f"{end['ratio']:.2f}" if end["ratio"] else ""])
    return aligned(rows)


def draw_schedules(lines: dict[str, list[dict]]):
    """Last R@1 against the seconds of a whole schedule; bars from the lowest seed to the highest."""
    figure, axes = cli.canvas(1, 1, 4.6, 3.2)
    for (name, ends), marker in zip(lines.items(), itertools.cycle("osD^vP")):
        y = [100 * np.array(x["R1"]) for x in ends]
        around = np.transpose([(x.mean() - x.min(), x.max() - x.mean()) for x in y]).clip(0)  # rounding
        axes[0, 0].errorbar([x["seconds"] for x in ends], [x.mean() for x in y], around, label=name,
                            color=cli.COLOURS.get(name.split(", ")[0], "black"), marker=marker, markersize=4,
                            capsize=2)
    axes[0, 0].set(xlabel="seconds of a whole schedule", ylabel="R@1 at its end (%)")
    axes[0, 0].legend()
    return figure


def draw_curves(found: dict[str, dict], samplers: list[str], target: float):
    """R@1 against images seen and seconds; a line is the mean over seeds, a band from the lowest to the
    highest.  samplers: of each group."""
    columns = 2 if len(found) > 1 and max(map(len, found)) < 46 else 1
    figure, axes = cli.canvas(1, 2, 7.2, 2.7 + 0.18 * math.ceil(len(found) / columns), sharey=True)
    for axis, at in zip(axes[0], ("images", "seconds")):
        for i, ((group, x), sampler) in enumerate(zip(found.items(), samplers)):
            style = DASHES[samplers[:i].count(sampler) % len(DASHES)]  # of the variants of one sampler
            y, colour = 100 * np.array(x["R1"]), cli.COLOURS.get(sampler, "black")
            axis.plot(x[at], y.mean(0), linestyle=style, color=colour, label=group)
            axis.fill_between(x[at], y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)
        axis.axhline(100 * target, color="black", linewidth=0.6, linestyle=":")
        axis.set(xlabel="images seen" if at == "images" else "seconds of training and selecting")
    axes[0, 0].set(ylabel="two-view R@1 (%)", title="line: mean over seeds; band: lowest to highest")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=columns)
    return figure


# -------------------------------------------------------------------------------- the command
def made(out: str) -> Path:
    """The folder --out, made if need be. Raises Stop."""
    folder = cli.expand(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Stop(f"--out {folder}: {error.strerror}; give another folder") from None
    return folder


def show(runs: list[Run], groups: dict[str, list[int]], target: float | None, curve: Path | None) -> dict:
    """Print the table of each task that all runs have done; with `curve` also the cost along training, drawn
    into that file. Returns the rows, by title."""
    record = {}
    for title in [x for x in runs[0].scores if all(x in run.scores for run in runs)]:
        for run in runs:
            if run.scores[title]["images_digest"] != runs[0].scores[title]["images_digest"]:
                raise Stop(f"{run.folder} and {runs[0].folder} saw different images: give one --data-dir")
        rows = record[title] = table(title, runs, groups)
        over = "seeds and images" if max(row["seeds"] for row in rows) > 1 else "images"
        cli.say(f"\n{title}, {rows[0]['images']:,} images; 95 % intervals over {over}\n\n{table_text(rows)}")
    if curve:
        found = record["curves"] = curves(runs, groups)
        rows = record["cost"] = cost(found, target)
        cli.say(f"\nalong training, to R@1 {rows[0]['target']:.1%} in log.jsonl; gain: R@1 after the "
                f"baseline's seconds less its own\n\n{cost_text(rows)}")
        if len(devices := {str(run.made_by.get("device")) for run in runs}) > 1:
            cli.say(f"\nseconds are of {' and '.join(sorted(devices))}: do not compare them")
        samplers = [runs[members[0]].knobs["sampler"] for members in groups.values()]
        cli.save_figure(draw_curves(found, samplers, rows[0]["target"]), curve)
        if lines := schedules(runs, groups):
            record["schedules"] = lines
            cli.say("\nwhole schedules, drawn in schedules.png; ratio: seconds to those of the first setting "
                    "for the same R@1\n\n" + schedules_text(lines))
            cli.save_figure(draw_schedules(lines), curve.with_name("schedules"))
    return record


def main(argv: list[str]) -> None:
    knobs, _ = cli.parse(argv, __doc__, KNOBS, {}, "files")
    if not knobs["files"]:
        raise Stop("name a file of retrieval.py --export, such as: python compare.py results/runs.json.gz")
    runs = [run for word in knobs["files"] for run in read_file(cli.expand(word))]
    once = {}
    for run in runs:  # two files may hold it
        key = json.dumps([run.knobs, run.log])
        once[key] = run._replace(scores=once.get(key, run).scores | run.scores)
    runs = list(once.values())
    groups = baseline_first(group_runs(runs), runs, knobs["baseline"])
    out = made(knobs["out"])
    show(runs, groups, knobs["target"], out / "curve")
    cli.say(f"\n{out / 'curve.png'}")


if __name__ == "__main__":
    sys.exit(cli.run(main, "compare.py"))
