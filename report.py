"""One page of what was found: results/report.html, a single file, and results/report.md with the same.

    python report.py [--results results] [--runs runs]

Every number is read from the files that the other scripts wrote; what is missing is named with the command that makes it.
"""
import argparse
import base64
import html
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import torch

from cli import Stop, provenance, write_atomically
from compare import NAMES, interval_over

EXPERIMENTS = {  # of synthetic.py, and the statement of the paper that each puts to the test
    "toy": "Four samples in the plane: high-loss batches need far fewer steps than random ones, the fewer the closer to the optimum.",
    "optima": "The full batch, and all N choose B batches together, end at the simplex ETF (d ≥ N−1) or the cross-polytope (d = N/2).",
    "convergence": "Training on high-loss batches comes near the optimum in fewer steps than SGD.",
    "subsets": "A strict subset of the batches does not have the full batch's optimum.",
    "histograms": "Spectral clustering finds batches of higher loss than shuffling does.",
    "temperature": "The theory is at temperature 1: does the lead of chosen batches last below it? (Not in the paper.)",
    "scaling": "How does the lead of chosen batches grow with the number of samples? (Not in the paper.)",
}
PICTURES = {"curve": "R@1 of partner views along training, against steps and against seconds",
            "neighbours": "the images nearest to a few, by each sampler's embedding"}
VERDICTS = {"holds": "✓ holds", "does not hold": "✗ does not hold", "not settled": "? not settled"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; } h3 { margin-top: 2rem; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; }
th, td { padding: .25rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { background: #f4f4f4; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.long { min-width: 11rem; white-space: normal; } td.command { min-width: 18rem; white-space: normal; } pre { background: #f4f4f4; padding: .5rem .7rem; font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.holds { color: #00684a; } .contradicted { color: #a33b00; font-weight: 600; }
summary { cursor: pointer; }
"""


# ------------------------------------------------------------------------------------------------- a page, written twice
def as_html(blocks: list[tuple], folder: Path) -> str:
    """The page as one file: blocks are (kind, ...) as made by the functions below; figures lie in `folder`."""
    body = []
    for kind, *rest in blocks:
        if kind == "figure":
            image, caption = base64.b64encode((folder / rest[0]).read_bytes()).decode(), html.escape(rest[1])
            body.append(f'<figure><img src="data:image/png;base64,{image}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
        elif kind == "table":
            head, rows, fold = rest
            lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows)
            table = (f'<div class="scroll"><table><thead><tr>{"".join(f"<th>{html.escape(x)}</th>" for x in head)}</tr></thead>\n'
                     f"<tbody>{lines}</tbody></table></div>")
            body.append(f"<details><summary>{html.escape(fold)}</summary>{table}</details>" if fold else table)
        else:
            body.append(f"<{kind}>{html.escape(rest[0])}</{kind}>")
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
            f'initial-scale=1"><title>{html.escape(blocks[0][1])}</title><style>{STYLE}</style></head>\n<body>\n'
            + "\n".join(body) + "\n</body></html>\n")


def cell(text: str) -> str:
    kind = {VERDICTS["holds"]: "holds", VERDICTS["does not hold"]: "contradicted"}.get(text)
    figures = r"[-−–]?([\d,.]+(e[-+]?\d+)?|∞)?"
    kind = kind or ("number" if re.fullmatch(rf"{figures}( %| s| min| h| to {figures})?", text) else "command" if text.startswith("python ") else
                    "long" if len(text) > 24 else "")
    return f'<td class="{kind}">{html.escape(text)}</td>' if kind else f"<td>{html.escape(text)}</td>"


def as_markdown(blocks: list[tuple]) -> str:
    """The same page as Markdown, its figures as links relative to it."""
    plain = lambda text: re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)
    body = []
    for kind, *rest in blocks:
        if kind == "pre":
            body.append(f"```\n{rest[0]}\n```")
        elif kind == "figure":
            body.append(f"![{plain(rest[1])}](<{rest[0]}>)")
        elif kind != "table":  # a heading or a paragraph
            body.append("#" * int(kind.strip("hp") or 0) + " " * (kind != "p") + plain(rest[0]))
        else:
            head, rows, fold = rest
            body.append("\n".join([f"{plain(fold)}:\n"] * bool(fold) + [f"| {' | '.join(map(plain, row))} |" for row in
                                                                      (head, ["---"] * len(head), *rows)]).replace("\\-", "-"))
    return "\n\n".join(body) + "\n"


# ------------------------------------------------------------------------------------------------- numbers in words
def number(x: float | None) -> str:
    """Three digits; None, which stands for what is not finite, as a dash."""
    return "–" if x is None or not math.isfinite(x) else f"{x:.0f}" if 1000 <= abs(x) < 1e6 else f"{x:.3g}"


def span(interval) -> str:
    low, high = interval
    return f"{'−∞' if low is None else number(low)} to {'∞' if high is None else number(high)}"


def short(commit: str) -> str:
    return re.sub(r"^([0-9a-f]{10})[0-9a-f]+", r"\1", commit)


def clock(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


# ------------------------------------------------------------------------------------------------- what the files say
def claim_rows(claims: list[dict]) -> list[list[str]]:
    return [[VERDICTS[c["verdict"]], c["claim"], number(c["measured"]), span(c["interval"]), c["form"]] for c in claims]


CLAIM = ["verdict", "claim", "measured", "95 % interval", "expected"]


def again(command: str) -> str:
    """The call of run_all.sh that makes what the command of one of its steps makes."""
    stage = (command.split() + ["", ""])[1].removesuffix(".py")
    mode = "" if "quick" in command or stage not in ("synthetic", "train", "retrieval") else "--full "
    return f"bash run_all.sh {mode}{'--own-size ' * bool(re.search(r'-(32px|64px|own)( |$)', command))}{stage}"


def tally(claims: list[dict]) -> str:
    return f"{len(claims)} claims: " + ", ".join(f"{sum(c['verdict'] == v for c in claims)} {plural}" for v, plural in
                                                zip(VERDICTS, ("hold", "do not hold", "not settled")))


def build(results: Path, runs_folder: Path) -> list[tuple]:
    """The page's blocks, from what lies in the two folders."""
    missing, sources, claims, body = [], [], {}, []
    def source(what: str, record: dict) -> None:
        sources.append([what, record.get("time", "–")[:16].replace("T", " "), short(record.get("commit", "–")),
                        record.get("device", "–"), record.get("versions", {}).get("torch", "–"), record.get("command", "–")])

    def section(path: Path, made_by: str, tell) -> None:
        """Puts tell(the JSON of the file) on the page; a file that is absent, damaged or foreign is named instead."""
        lengths, known = [(x, len(x)) for x in (sources, body)], dict(claims)
        try:
            tell(json.loads(path.read_text()))
        except FileNotFoundError:
            missing.append((str(path), "not there", made_by))
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            for x, length in lengths:
                del x[length:]
            claims.clear()
            claims.update(known)
            missing.append((str(path), "cannot be read", made_by))

    def figure(path: Path, caption: str, made_by: str) -> None:
        missing.append((str(path), "not there", made_by)) if not path.is_file() else body.append(
            ("figure", os.path.relpath(path, results), caption))

    # theory
    body.append(("h2", "The theory, on free embeddings"))
    for name, statement in EXPERIMENTS.items():
        made_by = "bash run_all.sh synthetic"

        def theory(record: dict) -> None:
            table = ("table", CLAIM, claim_rows(record["claims"]), tally(record["claims"]))
            source(f"synthetic {name}", record)
            body.extend([("h3", name.capitalize()), ("p", statement)])
            figure(results / f"synthetic/{name}.png", f"{name}: {tally(record['claims'])}", made_by)
            body.extend([table, ("pre", record["command"])])
            claims[name] = record["claims"]
        section(results / f"synthetic/{name}.json", made_by, theory)

    # training
    body.append(("h2", "Training on chosen batches"))
    steps = {}  # of run_all.sh, by name: the lines of its stamp
    for stamp in sorted((runs_folder / ".steps").glob("[!.]*")):
        lines = stamp.read_text(errors="replace").splitlines() if stamp.is_file() and not stamp.name.endswith(".log") else []
        if len(lines) > 1:
            steps[stamp.name] = lines
    rows = []
    for folder in sorted(path for path in runs_folder.glob("*") if (path / "config.json").exists() and ".old-" not in path.name):
        def run(r: dict) -> None:
            row = [folder.name, f"{100 * r['R1']:.1f} %", f"{100 * r['R5']:.1f} %", number(r["loss"]), f"{r['step']:,}", clock(r["seconds_training"]),
                   clock(r["seconds_selecting"]), f"{r['validation_images']:,}"]
            source(f"run {folder.name}", r)
            rows.append(row)
        made_by = again(steps[folder.name][1]) if folder.name in steps else "the command of its config.json, with --resume"
        section(folder / "result.json", made_by, run)
    if not rows:
        missing.append((f"{runs_folder}/*/result.json", "no finished run", "bash run_all.sh train"))
    else:
        body.append(("p", "R@1 and R@5 are those of finding an image's second view among all validation images that a run looks at. The loss is "
                     "that of the batches trained on, so it does not compare samplers. One draw of views, and no interval: for that see the comparisons below."))
        body.append(("table", ["run", "R@1", "R@5", "loss, last epoch", "steps", "training", "selecting", "validation images"], rows, ""))
    due = {}  # what there is to evaluate, and how
    for name, (_, command, *_) in steps.items():
        if dataset := re.match(r"python train\.py .*--dataset (\S+)", command):
            where = "quick" if dataset[1] == "deadleaves" else dataset[1] + "-own" * name.endswith("px")
            due[results / where / "retrieval.json"] = again(command).removesuffix("train") + "retrieval"
    for path in sorted({*results.glob("retrieval.json"), *results.glob("*/retrieval.json"), *due}) or [results / "quick/retrieval.json"]:
        made_by = due.get(path, "bash run_all.sh retrieval")

        def evaluated(record: dict) -> None:
            where = "generated images" if record["dataset"] == "deadleaves" else record["dataset"]
            if path.parent.name != record["dataset"]:
                where += f", {path.parent.name}"
            source(f"retrieval, {where}", record)
            for picture in ["curve"] * ("cost" in record) + ["neighbours"]:
                figure(path.parent / f"{picture}.png", f"{where}: {PICTURES[picture]}", made_by)
            retrieval(record, where, body, claims)
        section(path, made_by, evaluated)

    # samplers
    body.append(("h2", "The samplers"))

    def samplers(record: dict) -> None:
        source("samplers", record)
        body.append(("p", f"Windows of k = {record['k']} batches of {record['batch_size']}, temperature {record['temperature']}, embeddings: "
                     f"{record['embeddings']}. Excess: mean batch loss over that of random batches; relative: to that of the paper's released method. "
                     "Medians over seeds."))
        body.append(("table", ["embeddings", "sampler", "mean loss", "excess", "relative", "ms a window", "of one eigh", "MB"],
                     [[r["embeddings"], r["sampler"], *(number(r[x]) for x in ("loss", "excess", "relative", "ms", "of_eigh", "MB"))]
                      for r in record["samplers"]], ""))
        body.append(("p", "All pairs as one window, refined; embeddings made up of clusters:"))
        body.append(("table", ["pairs", "loss, random", "windows of k", "all", "seconds", "µs a pair", "MB"],
                     [[f"{r['pairs']:,}", *(number(r[x]) for x in ("random", "windows", "all", "seconds", "us_a_pair", "MB"))]
                      for r in record["growth"]], ""))
        body.append(("pre", record["command"]))
    section(results / "samplers.json", "bash run_all.sh bench", samplers)

    # costs
    body.append(("h2", "Costs"))
    stages = {}
    for name, lines in steps.items():
        found = re.fullmatch(r"finished (\S+) in (\d+) s", lines[0])
        if lines[0] == "begun":
            missing.append((f"{runs_folder}/.steps/{name}", "begun, not finished: if the page has anything of it, it is older", again(lines[1])))
        if found:
            stages.setdefault(again(lines[1]).split()[-1], []).append((name, found[1], int(found[2])))
    if stages:
        body.append(("p", "Seconds that a step took when it last ran to its end; of an interrupted run, from where it went on."))
        rows = [[stage, name, when[:16].replace("T", " "), clock(s)] for stage, steps in stages.items() for name, when, s in steps]
        stages["all"] = sum(stages.values(), [])
        body.append(("table", ["stage", "steps", "took"], [[stage, str(len(x)), clock(sum(s for *_, s in x))] for stage, x in stages.items()], ""))
        body.append(("table", ["stage", "step", "finished", "took"], rows, "each step"))
    else:
        missing.append((f"{runs_folder}/.steps", "no finished step", "bash run_all.sh"))

    # the first screen, last, as it sums up the rest
    found = [(name, c) for name, x in claims.items() for c in x]
    contrary, open_ = ([[f"{name}: {c['claim']}", *claim_rows([c])[0][2:]] for name, c in found if c["verdict"] == verdict]
                       for verdict in ("does not hold", "not settled"))
    lead = [("h1", "Mini-batches worth training on: what was found"),
            ("p", f"Made {time.strftime('%Y-%m-%d %H:%M %Z')} by report.py of commit {short(provenance(torch.device('cpu'))['commit'])} from {len(sources)} result files. "
                  + (tally([c for _, c in found]) + "." if found else "")),
            ("table", ["put to the test", *VERDICTS], [[name, *(str(sum(c["verdict"] == v for c in x)) for v in VERDICTS)]
                                                     for name, x in claims.items()], ""),
            ("h2", "What contradicts the paper"),
            ("p", "Claims, the paper's and what follows from it, of which the measured interval lies outside of what they allow." if contrary
             else "No claim was found not to hold." if found else "No claim has been put to the test yet.")]
    lead += [("table", CLAIM[1:], rows, fold) for rows, fold in
             ((contrary, ""), (open_, f"Not settled: {len(open_)} claims whose interval lies on both sides, or that rest on one seed")) if rows]
    if missing:
        lead += [("h2", "What is missing"), ("table", ["file", "", "made by"], [list(row) for row in missing], "")]
    body += [("h2", "What was run"), ("table", ["what", "when", "commit", "device", "torch", "command"], sources, "")]
    return lead + body


def retrieval(record: dict, where: str, body: list, claims: dict) -> None:
    """What retrieval.py found: a table a task, and for each group but the baseline the claim that it is better.

    Other seeds can turn what one seed found, so an interval over images alone settles nothing.
    """
    tasks = {title: rows for title, rows in record.items() if isinstance(rows, list) and rows and "difference" in rows[0]}
    for title, rows in tasks.items():
        scores = [name for name in rows[0] if f"{name}_interval" in rows[0] and name != "difference"]
        show = lambda row, name: "" if row[name] is None else "{:.1f} [{:.1f} to {:.1f}]".format(*(100 * x for x in (row[name], *row[f"{name}_interval"])))
        body += [("h3", f"{where}: {title}"), ("p", f"In percent, with 95 % intervals over {interval_over(rows)}; {rows[0]['images']:,} images; "
                                               f"difference: of {NAMES[scores[0]]} to {record['baseline']}'s."),
                 ("table", ["", "seeds", "difference", *(NAMES[name] for name in scores), "training", "selecting"],
                  [[row["group"], str(row["seeds"]), *(show(row, name) for name in ["difference", *scores]), clock(row["seconds_training"]),
                    clock(row["seconds_selecting"])] for row in rows], "")]
        claims[f"retrieval, {where}"] = claims.get(f"retrieval, {where}", []) + [{
            "claim": f"{title}: {row['group']} finds more partners first than {record['baseline']} at equal steps",
            "measured": 100 * row["difference"], "interval": [100 * x for x in row["difference_interval"]],
            "form": f"points > 0; interval over {row['difference_over']}; seeds: {row['difference_seeds']}",
            "verdict": {"better": "holds", "worse": "does not hold"}.get(row["verdict"], "not settled")
            if "seeds" in row["difference_over"] else "not settled"} for row in rows if row["difference"] is not None]
    if record.get("cost"):
        reached = lambda x: "not reached" if number(x) == "–" else number(x)
        points = lambda x: None if x is None else 100 * x
        gain = lambda row: number(points(row["gain"])) + (f" [{span(map(points, x))}]" if (x := row["gain_interval"]) else "")
        ratio = lambda row, name: reached(row[name]) + (f" [{span(x)}]" if (x := row[f"{name}_interval"]) else "")
        body += [("p", f"Cost to reach the R@1 of {record['baseline']}, along training, and its ratio to {record['baseline']}'s, with 95 % intervals "
                       f"over seeds, up to ∞ where some draws of the seeds do not reach it; and the R@1, in points, less {record['baseline']}'s after as "
                       "many seconds as that took in all. Seconds are those of the machine as busy as it was; of one seed, nothing is settled:"),
                 ("table", ["", "target, %", "steps", "ratio", "seconds", "ratio", "at equal seconds"],
                  [[row["group"], f"{100 * row['target']:.1f}", reached(row["steps"]), ratio(row, "steps_ratio"), reached(row["seconds"]),
                    ratio(row, "seconds_ratio"), gain(row)] for row in record["cost"]], "")]
    if tasks:
        body.append(("table", CLAIM, claim_rows(claims[f"retrieval, {where}"]), tally(claims[f"retrieval, {where}"])))
    body.append(("pre", record["command"]))


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the results, and of the report (default: results)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    words = parser.parse_args(argv)
    try:
        words.results.mkdir(parents=True, exist_ok=True)
        blocks = build(words.results, words.runs)
        write_atomically(words.results / "report.html", as_html(blocks, words.results).encode())
        write_atomically(words.results / "report.md", as_markdown(blocks).encode())
    except (Stop, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    print(words.results / "report.html", words.results / "report.md", sep=", ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
