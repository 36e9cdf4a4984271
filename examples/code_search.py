"""Text to code, in a loop of one's own: which body belongs to a docstring of Python's standard library?

    python examples/code_search.py    # random and hard batches, three seeds each; draws runs/code_search.png
"""
import ast
import copy
import re
import sys
import sysconfig
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not needed beside a copy of samplers.py
from cli import COLOURS, canvas, save_figure
from samplers import ContrastiveBatchSampler, batch_losses

# Temperature and learning rate: of those tried the best for random batches.
BATCH_SIZE, TEMPERATURE, LEARNING_RATE, DIM, BUCKETS = 32, 0.1, 0.01, 128, 2 ** 15
SKIPPED = set("site-packages dist-packages test tests encodings pydoc_data idlelib distutils lib2to3".split())


def standard_library() -> dict[str, list[tuple[str, str]]]:
    """(first paragraph of the docstring, body) of each function that has both, by module."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for top in sorted(path for path in root.iterdir() if path.name not in SKIPPED):
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top] * (top.suffix == ".py"):
            source = path.read_text(encoding="utf-8", errors="replace")
            if SKIPPED & set(path.relative_to(root).parts) or '"""' not in source:
                continue
            lines = source.splitlines()
            for node in ast.walk(ast.parse(source)):
                text = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node)
                if text and len(node.body) > 1:
                    body = "\n".join(lines[node.body[0].end_lineno:node.end_lineno])
                    pair = " ".join(text.split("\n\n")[0].split()), body
                    found.setdefault(str(path.relative_to(root)), []).append(pair)
    return found


def pairs(held_out: int = 1000) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs (text, code) to train on and to test: no module, text or code in both, nor twice in the test."""
    train, test, known, modules = [], [], set(), standard_library()
    for module in sorted(modules, key=lambda name: zlib.crc32(name.encode())):
        testing = len(test) < held_out
        for pair in modules[module]:
            if known.isdisjoint(pair):
                (test if testing else train).append(pair)
                known.update(pair if testing else ())
    return train, test[:held_out]


def same(*columns: tuple[str, ...]) -> torch.Tensor:
    """Numbers [n], one for rows with an equal text in a column, or linked by such: no negatives."""
    n = len(columns[0])
    nodes = [np.unique(column, return_inverse=True)[1] + n * i for i, column in enumerate(columns, 1)]
    edges = np.tile(np.arange(n), len(nodes)), np.concatenate(nodes)  # of a graph of rows and texts
    graph = coo_array((np.ones(len(edges[0])), edges), shape=2 * [n * (len(nodes) + 1)])
    return torch.from_numpy(connected_components(graph, directed=False)[1][:n])


def hashed(texts: tuple[str, ...]) -> torch.Tensor:
    """The first 128 distinct words of each text, those inside names too, as numbers [n, 128]; 0: no word."""
    words = [dict.fromkeys(re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", text) or [""]) for text in texts]
    numbers = [torch.tensor([1 + zlib.crc32(w.lower().encode()) % BUCKETS for w in some]) for some in words]
    return torch.nn.utils.rnn.pad_sequence(numbers, batch_first=True)[:, :128]


def train(method: str, seed: int, epochs: int, exclude: torch.Tensor, *data: torch.Tensor) -> np.ndarray:
    """Steps, seconds (selection counted, evaluation not), MRR and R@1 after each epoch, [epochs, 4]."""
    texts, codes, test_texts, test_codes = data
    torch.manual_seed(seed)
    of_text = torch.nn.EmbeddingBag(1 + BUCKETS, DIM, mode="mean", sparse=True, padding_idx=0)
    of_code = copy.deepcopy(of_text)  # a word starts as the same in both
    optimizer = torch.optim.SparseAdam([of_text.weight, of_code.weight], lr=LEARNING_RATE)
    hard = {"exclude": exclude, "temperature": TEMPERATURE} if method == "spectral" else {}
    sampler = ContrastiveBatchSampler(len(texts), BATCH_SIZE, method, seed=seed, **hard)
    curve, seconds = [], 0.0
    for epoch in range(epochs):
        began = time.process_time()
        for rows in sampler:
            u, v = of_text(texts[rows]), of_code(codes[rows])  # [B, DIM]
            optimizer.zero_grad()
            batch_losses(u, v, torch.arange(len(rows))[None], TEMPERATURE, "infonce").mean().backward()
            optimizer.step()
            sampler.update(rows, u, v)  # what the next epoch's batches are chosen by
        seconds += time.process_time() - began
        scores = F.normalize(of_text(test_texts)).detach() @ F.normalize(of_code(test_codes)).detach().T
        rank = (scores >= scores.diagonal()[:, None]).sum(1).float()
        curve.append((len(sampler) * (epoch + 1), seconds, (1 / rank).mean(), (rank == 1).float().mean()))
    return np.array(curve)


def main(epochs: int = 10, seeds: int = 3, limit: int | None = None, out: Path = Path("runs")) -> dict:
    """The curves [seeds, epochs, 4] of random and hard batches, printed and drawn; of `limit` pairs."""
    torch.set_num_threads(1)
    (texts, codes), tests = (tuple(zip(*part[:limit])) for part in pairs())
    data, exclude = [hashed(part) for part in (texts, codes, *tests)], same(texts, codes)
    curves, (figure, axes) = {}, canvas(1, 2, 6, 2.5, sharey=True)
    for method in ("random", "spectral"):
        curves[method] = np.stack([train(method, seed, epochs, exclude, *data) for seed in range(seeds)])
        for steps, seconds, mrr, first in curves[method].mean(0):
            print(f"{method:8} {steps:5.0f} steps {seconds:5.1f} s  MRR {mrr:.3f}  R@1 {100 * first:4.1f} %")
        for axis, x, label in zip(axes[0], curves[method].mean(0).T, ("steps", "seconds")):
            axis.plot(x, curves[method].mean(0)[:, 2], color=COLOURS[method], label=method)
            axis.set(xlabel=label, ylabel="MRR")
    axes[0][0].legend()
    out.mkdir(parents=True, exist_ok=True)
    save_figure(figure, out / "code_search")
    return curves


if __name__ == "__main__":
    main()
