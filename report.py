"""One page of what was found, results/report.html: a single file that needs nothing else.

    python report.py [--results results] [--runs runs]

Every number is read from the files that the other scripts wrote; what is missing is named with what makes it.
"""
import base64
import html
import json
import math
import re
import sys
from pathlib import Path

import cli

KNOBS = {"results": ("results", str, "folder of the results, and of the report"),
         "runs": ("runs", str, "folder of the training runs")}
ASKED = {"paper": "What the paper claims", "us": "What we asked beyond it"}
MARKS = {"holds": "✓ holds", "does not hold": "✗ does not hold", "not settled": "? not settled"}
CLAIM = {"verdict": "", "claim": "claim", "measured": "measured [95 % interval]", "form": "expected"}
SECONDS = {"seconds_training": "seconds training", "seconds_selecting": "selecting"}
# The first table: who asks, the experiment, the claim in words, and which of its claims has the number.
ROWS = [
    ("paper", "toy", "Four points in the plane: so many times fewer steps on hard batches", r"0\.5.* 0\.01:"),
    ("paper", "angle", "All small batches together have the full batch's optimum: degrees apart", "same"),
    ("paper", "optima", "Trained on all small batches, embeddings end there: relative distance", "all N"),
    ("paper", "subsets", "Trained on fixed small batches, they end above it: by so much loss", "fixed"),
    ("paper", "convergence", "Hard batches come near the optimum in so many times fewer steps", r"\(6\).*st"),
    ("paper", "histograms", "Spectral batches have a higher loss than shuffled ones: by", "spectral.*SGD"),
    ("us", "convergence", "So many times less work, when all pairs looked at count", r"\(6\).*pairs"),
    ("us", "temperature", "The lead at temperature 0.1, as a share of that at 1", r"\(6\).* x temperature"),
    ("us", "scaling", "The lead grows with the number of samples: so many times", r"\(6\)")]
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 0 auto; padding: 0 1rem; }
h1 { line-height: 1.2; } img { max-width: 100%; } figure { margin: 1rem 0; } .box { overflow-x: auto; }
figcaption { color: #555; font-size: .9rem; } summary { cursor: pointer; padding: .4rem 0; }
table { border-collapse: collapse; font-size: .9rem; } th { background: #f4f4f4; }
th, td { padding: .3rem .5rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
td { min-width: 3.5rem; } td.long { min-width: 9rem; overflow-wrap: anywhere; }
td.no { color: #a33b00; font-weight: 600; } td.yes { color: #00684a; }
"""


def text(x) -> str:
    """For the page; what is not finite is a dash."""
    return html.escape(re.sub(r"[-−+]?(\b(nan|inf|infinity)\b|∞)", "–", str(x)))


def number(x: float | None, percent: bool = False) -> str:
    """Three digits, or a percentage; a dash for what is not finite."""
    if x is None or not math.isfinite(x):
        return "–"
    if percent:
        return f"{100 * x:.1f}"
    return "<0.0001" if 0 < abs(x) < 1e-4 else f"{x:,.0f}" if 1000 <= abs(x) < 1e6 else f"{x:.3g}"


def show(row: dict, name: str) -> str:
    """A cell: words, a verdict with its mark, or a number with its interval, of which an end may be open."""
    if isinstance(row[name], str):
        return MARKS.get(row[name], row[name])
    percent = re.fullmatch("R1|R5|R10|mrr|severity.*|linear|knn|difference|gain", name) is not None
    low, high = (number(x, percent) for x in row.get(f"{name}_interval") or (None, None))
    ends = f"up to {high}" if low == "–" else f"{low} or more" if high == "–" else f"{low} to {high}"
    return number(row[name], percent) + f" [{ends}]" * (low != high)


def table(columns: dict[str, str], rows: list) -> str:
    """Columns of these names and headings; a row of words alone is a heading. Scrolls in its own box."""
    def cell(x: str) -> str:
        kind = {"✓": "yes", "✗": "no"}.get(x[:1], "long" if len(x) > 24 else "")
        return f'<td class="{kind}">{text(x)}</td>'
    lines = ["".join(f"<th>{text(x)}</th>" for x in columns.values())]
    for row in rows:
        lines.append(f'<th colspan="{len(columns)}">{text(row)}</th>' if isinstance(row, str) else
                     "".join(cell(show(row, name)) for name in columns))
    return f'<div class="box"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def figure(path: Path, caption: str) -> str:
    """The picture, within the page; nothing where there is none."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return (f'<figure><img src="data:image/png;base64,{data}" alt="{text(caption)}">'
            f"<figcaption>{text(caption)}</figcaption></figure>")


def fold(title: str, *parts: str) -> str:
    return f"<details><summary>{text(title)}</summary>{''.join(parts)}</details>"


def claims_of(record: dict, by: str) -> list[dict]:
    """The claims of an experiment that the paper ("paper") or this repository ("us") asks about."""
    return [claim | {"measured_interval": claim["interval"]} for claim in record["claims"]
            if claim.get("asked_by", "paper") == by]


def experiment(record: dict, folder: Path) -> str:
    """All claims of an experiment of synthetic.py."""
    name, verdicts = record["experiment"], [claim["verdict"] for claim in record["claims"]]
    counts = ", ".join(f"{verdicts.count(verdict)} × {verdict}" for verdict in MARKS if verdict in verdicts)
    rows = [row for by, title in ASKED.items() for row in [title, *claims_of(record, by)]]
    return fold(f"{name}: {counts}", figure(folder / f"{name}.png", record["about"]), table(CLAIM, rows))


def headline(record: dict) -> tuple[str, list[dict]]:
    """A sentence on an evaluation by retrieval.py, and for each sampler the claim that it is better."""
    where = {"deadleaves": "generated images"}.get(record["dataset"], record["dataset"])
    base, *others = sorted(record["two views"], key=lambda row: row["difference"] is not None)
    verdicts = {"better": "holds", "worse": "does not hold", "not settled": "not settled"}
    claims = [{
        "asked_by": "us" if "refined" in row["group"] else "paper", "verdict": verdicts[row["verdict"]],
        "claim": f"{where.capitalize()}: {row['group']} batches gain points of R@1 over {base['group']} ones",
        "measured": show(row, "difference")} for row in others]
    rates = ", ".join(f"{number(row['R1'], True)} % after {row['group']}" for row in others)
    seeds = f"{base['seeds']} seeds" if base["seeds"] > 1 else "one seed, which settles nothing"
    return (f"Your runs on {where}: after training on {base['group']} batches {number(base['R1'], True)} % "
            f"of {base['images']:,} images find their other view first (R@1), {rates} ones "
            f"({seeds}).", claims)


def evaluation(record: dict, folder: Path) -> str:
    """All scores of an evaluation."""
    base, parts = record["baseline"], [f"<p>{text(headline(record)[0])}</p>"]
    parts += [figure(folder / f"{name}.png", name) for name in ("curve", "neighbours", "histograms")]
    for title, rows in record.items():
        if isinstance(rows, list) and rows and "difference" in rows[0]:
            scores = {x: x for x in rows[0] if f"{x}_interval" in rows[0] and x != "difference"}
            columns = {"group": "", "seeds": "seeds", "difference": f"less {base}'s", "verdict": ""}
            parts += [f"<h4>{text(title)}: {rows[0]['images']:,} images, in percent</h4>",
                      table(columns | scores | SECONDS, rows)]
    columns = {"group": "to reach its last R@1", "steps_ratio": f"steps, of {base}'s",
               "seconds_ratio": f"seconds, of {base}'s", "gain": "points of R@1 at equal seconds"}
    parts += ["<h4>Cost</h4>", table(columns, record.get("cost", []))]
    return fold(f"runs on {record['dataset']}: all scores", *parts)


def samplers(record: dict, folder: Path) -> str:
    """The table of bench.py."""
    columns = "embeddings", "sampler", "loss", "excess", "relative", "ms", "of_eigh", "MB"
    return fold(f"samplers: windows of {record['k']} batches of {record['batch_size']}",
                table({x: x for x in columns}, record["samplers"]))


def build(results: Path, runs: Path) -> str:
    """The page, from what lies in the two folders; a file that cannot be used costs its own part alone."""
    missing, sources, details, records, ended = [], [], [], {}, []

    def read(path: Path, stage: str, tell) -> None:
        try:
            record = json.loads(path.read_text())
            source = {"file": str(path)} | {x: record[x] for x in ("command", "time", "commit", "device")}
            details.append(tell(record, path.parent))
            records[path] = record
            sources.append(source)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            why = "not there" if isinstance(error, FileNotFoundError) else "cannot be read"
            missing.append({"file": str(path), "why": why, "made by": f"bash run_all.sh {stage}"})

    def run(record: dict, folder: Path) -> str:
        ended.append({"run": folder.name} | {x: record[x] for x in ("R1", "R5", "step", *SECONDS)})
        return ""
    for path in sorted(results.glob("*/retrieval.json")) or [results / "quick/retrieval.json"]:
        read(path, "retrieval", evaluation)
    own = max(records, key=lambda path: records[path]["time"], default=None)
    for name in dict.fromkeys(name for _, name, *_ in ROWS):
        read(results / f"synthetic/{name}.json", "synthetic", experiment)
    read(results / "samplers.json", "bench", samplers)
    for path in sorted(runs.glob("*/config.json")):
        read(path.with_name("result.json"), "train", run)

    sentence, claims = headline(records[own]) if own else (
        "None of your runs has been trained and evaluated yet: bash run_all.sh does it.", [])
    for by, name, words, pattern in ROWS:
        some = claims_of(records.get(results / f"synthetic/{name}.json", {"claims": []}), by)
        some = [claim for claim in some if re.search(pattern, claim["claim"])] or some
        claims += [claim | {"asked_by": by, "claim": words} for claim in some[:1]]
    claims = sorted(claims, key=lambda claim: [*ASKED].index(claim["asked_by"]))[:10]
    rows = [row for by in ASKED for row in [ASKED[by], *(x for x in claims if x["asked_by"] == by)]]
    recorded = sorted((Path(__file__).parent / "results/full").glob("*.png"))
    made_by = {x: x for x in ("file", "command", "time", "commit", "device")}
    title = "Mini-batches worth training on"
    return "\n".join([
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body><h1>{title}</h1><p>{text(sentence)}</p>",
        figure(own.parent / "curve.png", "R@1 along training, by steps and by seconds") if own else "",
        "<h2>What holds</h2>", table({x: CLAIM[x] for x in ("verdict", "claim", "measured")}, rows),
        figure(results / "synthetic/toy.png", "Four points in the plane, on their way to the optimum"),
        figure(results / "synthetic/histograms.png", "Losses of mini-batches, by who chose them"),
        "<h2>All of it</h2>", *details,
        fold("runs", table({"run": "", "R1": "R@1 (%)", "R5": "R@5 (%)", "step": "steps"} | SECONDS, ended)),
        fold("longer runs, recorded in this repository", *(figure(path, path.stem) for path in recorded)),
        fold("what made these numbers", table(made_by, sources)),
        fold(f"missing: {len(missing)} files", table({"file": "", "why": "", "made by": "made by"}, missing)),
        "</body></html>\n"])


def main(argv: list[str]) -> None:
    knobs, _ = cli.parse(argv, __doc__, KNOBS, {})
    results, runs = cli.expand(knobs["results"]), cli.expand(knobs["runs"])
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cli.Stop(f"--results {results}: {error.strerror}; give a folder") from None
    cli.write_atomically(results / "report.html", build(results, runs).encode())
    print(results / "report.html")


if __name__ == "__main__":
    sys.exit(cli.run(main, "report.py"))
