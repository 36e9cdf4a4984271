"""Two-view retrieval: its metrics, and runs compared by them.

    python retrieval.py runs/quick-*        # a table, and results/curve.png: R@1 against steps and seconds
"""
import argparse
import json
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# One colour a sampler in every figure; distinct also without colour vision (Okabe and Ito).
COLOURS = {"random": "#555555", "osgd": "#E69F00", "osgd-replacement": "#CC79A7", "spectral": "#0072B2",
           "refined": "#009E73"}


@torch.no_grad()
def retrieval_metrics(u: Tensor, v: Tensor) -> dict[str, float]:
    """How well the partner of each row is found among all rows of the other view, by cosine similarity.

    u, v: [N, D], row i of one the partner of row i of the other; need not be normalised.  Returns u2v_R1, u2v_R5,
    u2v_R10 (shares between 0 and 1), u2v_mean_rank, u2v_median_rank (from 1; the mean of the middle two where N
    is even), u2v_mrr (mean reciprocal rank), and the same with v2u_.  Ties count against the model.
    Memory stays below 64 MB.  Raises ValueError for unequal shapes or embeddings that are not finite.
    """
    if u.ndim != 2 or u.shape != v.shape or len(u) == 0:
        raise ValueError(f"u {tuple(u.shape)} and v {tuple(v.shape)}: give two [N, D] tensors of one shape")
    if not (torch.isfinite(u).all() and torch.isfinite(v).all()):
        raise ValueError("u or v holds NaN or infinity: embed with a model whose loss is finite")
    u, v = F.normalize(u, dim=1), F.normalize(v, dim=1)
    metrics = {}
    for name, query, gallery in (("u2v", u, v), ("v2u", v, u)):
        ranks = []
        for rows in torch.arange(len(u), device=u.device).split(max(1, 2 ** 23 // len(u))):
            s = query[rows] @ gallery.T
            # The partner itself is one of those counted, so ranks start at 1.
            ranks.append((s >= s.gather(1, rows[:, None])).sum(1))
        rank = torch.cat(ranks).double()
        metrics |= {f"{name}_R{k}": (rank <= k).double().mean().item() for k in (1, 5, 10)}
        metrics |= {f"{name}_mean_rank": rank.mean().item(), f"{name}_median_rank": rank.quantile(0.5).item(),
                    f"{name}_mrr": (1 / rank).mean().item()}
    return metrics


def compare(runs: list[Path], figure: Path) -> str:
    """A Markdown table of finished runs, a line each, and a figure of their R@1 against steps and against seconds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    table = ["| run | R@1 | R@5 | loss, last epoch | seconds training | seconds selecting |", "|---|---|---|---|---|---|"]
    canvas, axes = plt.subplots(1, 2, figsize=(7, 2.8), sharey=True, layout="constrained")
    for run in runs:
        result = json.loads((run / "result.json").read_text())
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        table.append(f"| {run.name} | {result['R1']:.1%} | {result['R5']:.1%} | {result['loss']:.2f} | "
                     f"{result['seconds_training']:.0f} | {result['seconds_selecting']:.0f} |")
        sampler = result["knobs"]["sampler"]
        seconds = [line["seconds_training"] + line["seconds_selecting"] for line in log]
        for axis, x in zip(axes, ([line["step"] for line in log], seconds)):
            axis.plot(x, [100 * line["R1"] for line in log], color=COLOURS.get(sampler, "black"), label=run.name)
    axes[0].set(xlabel="steps", ylabel="two-view R@1 (%)")
    axes[1].set(xlabel="seconds, training + selecting")
    axes[0].legend(frameon=False)
    figure.parent.mkdir(parents=True, exist_ok=True)
    temporary = figure.with_name(f".{figure.name}")
    canvas.savefig(temporary, dpi=150, format=figure.suffix[1:])
    os.replace(temporary, figure)
    return "\n".join(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders that train.py wrote")
    parser.add_argument("--out", type=Path, default=Path("results/curve.png"), help="the figure, .png or .pdf (default: %(default)s)")
    knobs = parser.parse_args()
    missing = [str(run) for run in knobs.runs if not (run / "result.json").exists()]
    if missing:
        print(f"retrieval.py: error: no finished run in {', '.join(missing)}: give folders that hold a result.json, "
              "or finish the run with train.py --resume", file=sys.stderr)
        return 2
    if knobs.out.suffix not in (".png", ".pdf"):
        print(f"retrieval.py: error: --out {knobs.out}: give a name that ends in .png or .pdf", file=sys.stderr)
        return 2
    print(compare(knobs.runs, knobs.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
