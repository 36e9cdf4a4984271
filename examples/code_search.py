"""Text to code, in a loop of one's own: which body belongs to a docstring of Python's standard library?

    python examples/code_search.py    # random and hard batches, three seeds each; draws runs/code_search.png
"""
import ast
import re
import sys
import sysconfig
import time
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # not needed beside a copy of samplers.py
from cli import COLOURS, canvas, save_figure
from samplers import ContrastiveBatchSampler

BATCH_SIZE, TEMPERATURE, LEARNING_RATE = 32, 0.1, 0.01  # the best that were tried for random batches
DIM, BUCKETS = 128, 2 ** 15
# Installed packages, tests, tables, and what newer Pythons lack.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data",
            "idlelib", "distutils", "lib2to3"}


def standard_library() -> dict[str, list[tuple[str, str]]]:
    """(first paragraph of the docstring, body) of each function that has both, by module."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for top in sorted(path for path in root.iterdir() if path.name not in LEFT_OUT):
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top] * (top.suffix == ".py"):
            source = path.read_text(encoding="utf-8", errors="replace")
            if LEFT_OUT & set(path.relative_to(root).parts) or '"""' not in source:
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
    """Pairs (text, code) to train on and to test; no module is in both, nor a text or a code, and none of
    these is twice in the test."""
    train, test, known, modules = [], [], set(), standard_library()
    for module in sorted(modules, key=lambda name: zlib.crc32(name.encode())):
        testing = len(test) < held_out
        for pair in modules[module]:
            if known.isdisjoint(pair):
                (test if testing else train).append(pair)
                known.update(pair if testing else ())
    return train, test[:held_out]


def same(*columns: tuple[str, ...]) -> Tensor:
    """A number for each row, int64 [n]: one for rows that have an equal text in a column, or are linked by
    others that do. The sampler's exclude: none of them is a negative of another."""
    n = len(columns[0])
    nodes = [np.unique(column, return_inverse=True)[1] + n * (i + 1) for i, column in enumerate(columns)]
    edges = np.tile(np.arange(n), len(nodes)), np.concatenate(nodes)  # of a graph of rows and texts
    graph = coo_array((np.ones(len(edges[0])), edges), shape=2 * [n * (len(nodes) + 1)])
    return torch.from_numpy(connected_components(graph, directed=False)[1][:n])


def hashed(texts: tuple[str, ...]) -> list[Tensor]:
    """The words of each text, those inside names too, as numbers below BUCKETS."""
    words = [re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", text) or [""] for text in texts]
    return [torch.tensor([*{zlib.crc32(w.lower().encode()) % BUCKETS: 0 for w in found}]) for found in words]


def encode(encoder: nn.EmbeddingBag, bags: list[Tensor]) -> Tensor:
    """Unit vectors [m, DIM] of m texts."""
    starts = torch.tensor([0, *map(len, bags[:-1])]).cumsum(0)
    return F.normalize(encoder(torch.cat(bags), starts))


def train(method: str, seed: int, epochs: int, data: list[list[Tensor]], exclude: Tensor) -> np.ndarray:
    """Steps, seconds (selection counted, evaluation not), MRR and R@1 after each epoch, [epochs, 4]."""
    torch.manual_seed(seed)
    texts, codes, test_texts, test_codes = data
    of_text, of_code = encoders = [nn.EmbeddingBag(BUCKETS, DIM, mode="mean", sparse=True) for _ in range(2)]
    of_code.load_state_dict(of_text.state_dict())  # a word starts as the same in both
    optimizer = torch.optim.SparseAdam([e.weight for e in encoders], lr=LEARNING_RATE)
    hard = {"exclude": exclude, "temperature": TEMPERATURE} if method == "spectral" else {}
    sampler = ContrastiveBatchSampler(len(texts), BATCH_SIZE, method, seed=seed, **hard)
    curve, seconds, target = [], 0.0, torch.arange(BATCH_SIZE)
    for epoch in range(epochs):
        began = time.process_time()
        for rows in sampler:
            u, v = encode(of_text, [texts[i] for i in rows]), encode(of_code, [codes[i] for i in rows])
            logits = u @ v.T / TEMPERATURE
            loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            sampler.update(rows, u, v)  # what the next epoch's batches are chosen by
        seconds += time.process_time() - began
        with torch.no_grad():
            scores = encode(of_text, test_texts) @ encode(of_code, test_codes).T
        rank = (scores >= scores.diagonal()[:, None]).sum(1).float()
        curve.append((len(sampler) * (epoch + 1), seconds, (1 / rank).mean(), (rank == 1).float().mean()))
    return np.array(curve)


def main(epochs: int = 10, seeds: int = 3, limit: int | None = None, out: Path = ROOT / "runs") -> dict:
    """The curves [seeds, epochs, 4] of random and hard batches, printed and drawn; of `limit` pairs."""
    torch.set_num_threads(1)
    (texts, codes), tests = (tuple(zip(*part[:limit])) for part in pairs())
    data, exclude = [hashed(part) for part in (texts, codes, *tests)], same(texts, codes)
    print(f"{len(texts)} pairs to train on, {len(tests[0])} to find, batches of {BATCH_SIZE}")
    curves = {}
    for method in ("random", "spectral"):
        curves[method] = np.stack([train(method, seed, epochs, data, exclude) for seed in range(seeds)])
        for steps, seconds, mrr, first in curves[method].mean(0):
            print(f"{method:8} {steps:5.0f} steps {seconds:5.1f} s  MRR {mrr:.3f}  R@1 {100 * first:4.1f} %")
        print(f"{method:8} MRR of each seed:", *curves[method][:, -1, 2].round(3))
    if find_spec("matplotlib"):
        figure, axes = canvas(1, 2, 6, 2.5, sharey=True)
        for method, curve in curves.items():
            for column, axis in enumerate(axes[0]):
                axis.plot(curve[..., column].mean(0), curve[..., 2].mean(0), color=COLOURS[method], label=method)
                axis.set(xlabel=("steps", "seconds")[column], ylabel="MRR" if column == 0 else "")
        axes[0, 0].legend()
        out.mkdir(parents=True, exist_ok=True)
        save_figure(figure, out / "code_search")
    return curves


if __name__ == "__main__":
    main()
