"""One page of what was found, results/report.html: a single file that needs nothing else.

    python report.py [--results results] [--runs runs]

Every number is read from the files that the other scripts wrote; what is missing is named.
"""
import base64
import html
import json
import math
import re
import sys
from pathlib import Path

import cli
import compare

KNOBS = {"results": ("results", str, "folder of the results, and of the report"),
         "runs": ("runs", str, "folder of the training runs")}
ASKED = {"paper": "What the paper claims", "us": "What we asked beyond it"}
MARKS = {"holds": "✓ holds", "does not hold": "✗ does not hold", "not settled": "? not settled"}
# The first table: who asks, the experiment, the claim in words, and which of its claims has the number.
ROWS = [
    ("paper", "toy", "Four points in the plane: so many times fewer steps on hard batches", r"0\.5.* 0\.01:"),
    ("paper", "angle", "All small batches together have the full batch's optimum: degrees apart", "same"),
    ("paper", "optima", "Trained on all small batches, embeddings end there: relative distance", "all N"),
    ("paper", "subsets", "Trained on fixed small batches, they end above it: by so much loss", "fixed"),
    ("paper", "convergence", "Hard batches come near the optimum in so many times fewer steps", r"\(6\).*st"),
    ("paper", "histograms", "Spectral batches have a higher loss than shuffled ones: by", "spectral.*random"),
    ("us", "convergence", "So many times less work, when all pairs looked at count", r"\(6\).*pairs"),
    ("us", "temperature", "The lead at temperature 0.1, as a share of that at 1", r"\(6\).* x temperature"),
    ("us", "scaling", "The lead grows with the number of samples: so many times", r"\(6\)")]
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 0 1rem; }
img { max-width: 100%; } figure { margin: 1rem 0; } .box { overflow-x: auto; } table { font-size: .9rem; }
th, td { padding: .3rem .5rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
"""


def text(x) -> str:
    """For the page; what is not finite is a dash."""
    return html.escape(re.sub(r"[-−+]?(\b(nan|inf|infinity)\b|∞)", "–", str(x)))


def number(x: float | None, percent: bool) -> str:
    """Three digits, or a percentage; a dash for what is not finite."""
    if x is None or not math.isfinite(x):
        return "–"
    if percent:
        return f"{100 * x:.1f}"
    return "<0.0001" if 0 < abs(x) < 1e-4 else f"{x:,.0f}" if 1000 <= abs(x) < 1e6 else f"{x:.3g}"


def show(row: dict, name: str) -> str:
    """A cell: words, a verdict with its mark, or a number with its interval."""
    value = row.get(name)
    if isinstance(value, str):
        return MARKS.get(value, value)
    percent = re.fullmatch("R1.*|R5|mrr|severity.*|linear|knn|difference|gain|target", name) is not None
    low, high = (number(x, percent) for x in row.get(f"{name}_interval") or (None, None))
    return number(value, percent) + f" [{low} to {high}]" * (low != high)


def table(rows: list, columns: str = "") -> str:
    """Columns of these names, else all; a row of words alone is a heading. Scrolls in its own box."""
    names = columns.split() or [name for name in rows[0] if not re.search("_(interval|over|seeds)$", name)]
    lines = ["".join(f"<th>{text(name.replace('_', ' '))}</th>" for name in names)]
    for row in rows:
        lines.append(f'<th colspan="{len(names)}">{text(row)}</th>' if isinstance(row, str) else
                     "".join(f"<td>{text(show(row, name))}</td>" for name in names))
    return f'<div class="box"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def figure(path: Path, caption: str) -> str:
    """The picture, within the page; nothing where there is none."""
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return (f'<figure><img src="data:image/png;base64,{data}" alt="{text(caption)}"/>'
            f"<figcaption>{text(caption)}</figcaption></figure>")


def fold(title: str, *parts: str) -> str:
    return f"<details><summary>{text(title)}</summary>{''.join(parts)}</details>"


def headline(record: dict) -> tuple[str, list[dict]]:
    """A sentence on an evaluation by retrieval.py, and of several seeds for each sampler the claim that it is
    better: one seed settles nothing."""
    where = "generated images" if record["dataset"] == "deadleaves" else record["dataset"]
    base, *others = sorted(record["two views"], key=lambda row: row["difference"] is not None)
    verdicts = {"better": "holds", "worse": "does not hold"}
    claims = [{
        "asked_by": "us" if "refined" in row["group"] else "paper", "measured": show(row, "difference"),
        "verdict": verdicts.get(row["verdict"], "not settled"),
        "claim": f"{where.capitalize()}: {row['group']} batches gain points of R@1 over {base['group']} ones"}
        for row in others if base["seeds"] > 1 and not row["group"].startswith("random")]
    rates = ", ".join(f"{number(row['R1'], True)} % after {row['group']}" for row in others)
    rates = f", {rates} ones" if rates else ""
    seeds = f"{base['seeds']} seeds" if base["seeds"] > 1 else "one seed, which settles nothing"
    return (f"Your runs on {where}: after {base['group']} batches {number(base['R1'], True)} % of "
            f"{base['images']:,} images find their other view first (R@1){rates} ({seeds}).", claims)


def recorded() -> tuple[str, str]:
    """The runs that this repository holds, if it does: their figure, and their table, folded."""
    folder = Path(__file__).parent / "results"
    if not (folder / "runs.json.gz").is_file():
        return "", ""
    runs = compare.read_file(folder / "runs.json.gz")
    groups = compare.baseline_first(compare.group_runs(runs), runs, None)
    rows = compare.table("two views", runs, groups)
    title = f"Recorded runs on generated images: R@1 of {rows[0]['images']:,} after whole schedules"
    return (figure(folder / "full/schedules.png", f"{title}, by their seconds"), fold(
        title, table(rows, "group seeds R1 difference verdict seconds_training seconds_selecting")))


def detail(record: dict, path: Path) -> str:
    """All numbers and figures of one result file, folded."""
    pictures = "*.png" if path.stem == "retrieval" else f"{path.stem}.png"
    columns = {"claims": "verdict claim measured form"}
    tables = [f"<h4>{text(title)}</h4>" + table(rows, columns.get(title, ""))
              for title, rows in record.items() if isinstance(rows, list) and rows and title != "numbers"]
    return fold(f"{path.parent.name}/{path.stem}: {record.get('about', 'all scores')}",
                *(figure(x, x.stem) for x in sorted(path.parent.glob(pictures))), *tables)


def build(results: Path, runs: Path) -> str:
    """The page, from what lies in the two folders."""
    wanted = [*sorted([*results.glob("retrieval.json"), *results.glob("*/retrieval.json")]),
              results / "samplers.json",
              *(results / f"synthetic/{name}.json" for name in dict.fromkeys(row[1] for row in ROWS))]
    records = {path: json.loads(path.read_text()) for path in wanted if path.is_file()}
    sentence, claims = "None of your runs has been trained and evaluated yet: bash run_all.sh does it.", []
    own = max((path for path in records if path.name == "retrieval.json"),
              key=lambda path: records[path]["time"], default=None)
    if own:
        sentence, claims = headline(records[own])
    theory = []
    for by, name, words, pattern in ROWS:
        every = records.get(results / f"synthetic/{name}.json", {"claims": []})["claims"]
        some = [claim for claim in every if claim["asked_by"] == by]
        some = [claim for claim in some if re.search(pattern, claim["claim"])] or some
        theory += [claim | {"claim": words} for claim in some[:1]]
    claims = (claims[:3] + theory)[:10]  # what a person takes in: of the reader's samplers three
    rows = [row for by in ASKED for row in [ASKED[by], *(x for x in claims if x["asked_by"] == by)]]
    ended = [{"run": path.parent.name} | json.loads(path.read_text())
             for path in sorted(runs.glob("*/result.json"))]
    sources = [{"file": str(path)} | record for path, record in records.items()]
    missing = ", ".join(str(path) for path in wanted if path not in records)
    title, evidence = "Mini-batches worth training on", recorded()
    return "\n".join([
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"/><title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
        f"<style>{STYLE}</style></head><body><h1>{title}</h1><p>{text(sentence)}</p>",
        figure(own.parent / "curve.png", "R@1 along training, your runs: images, seconds") if own else "",
        evidence[0],
        "<h2>What holds, with 95 % intervals</h2>", table(rows, "verdict claim measured"),
        "<h2>All of it</h2>", evidence[1], *(detail(record, path) for path, record in records.items()),
        fold("runs", table(ended, "run R1 R5 step seconds_training seconds_selecting")),
        fold("what made these numbers", table(sources, "file command time commit device")),
        f"<p>Not there yet: {text(missing or 'nothing')}; bash run_all.sh makes it (temperature and scaling: "
        "with --full)</p></body></html>\n"])


def main(argv: list[str]) -> None:
    knobs, _ = cli.parse(argv, __doc__, KNOBS, {})
    results, runs = cli.expand(knobs["results"]), cli.expand(knobs["runs"])
    try:
        page = build(results, runs)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise cli.Stop(f"a .json below {results} or {runs} is damaged or of another version ({error!r}): "
                       "bash run_all.sh --fresh makes all of them anew") from None
    cli.write_atomically(results / "report.html", page.encode(errors="replace"))
    cli.say(str(results / "report.html"))


if __name__ == "__main__":
    sys.exit(cli.run(main, "report.py"))
