"""The READMEs' recipes with samplers.py run as they stand there, beside that file alone.

    python -m pytest tests/test_recipes.py
"""
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]
# hard_batches is for sentence-transformers: it is called as that calls it, on data like its own.
SENTENCES = '''
import pickle
import torch


class Pairs:  # as datasets.Dataset: columns of texts, of some rows a dictionary
    anchor, positive = ([f"{word} {i % 40}" for i in range(400)] for word in ("what is", "it is"))

    def __len__(self):
        return 400

    def __getitem__(self, rows):
        assert all(type(row) is int for row in rows)
        return {"anchor": [self.anchor[i] for i in rows], "positive": [self.positive[i] for i in rows]}


class Encoder:
    table = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))

    def encode(self, texts, convert_to_tensor, show_progress_bar):
        return self.table[[int(text.split()[-1]) for text in texts]]


recipe.model = Encoder()
make = pickle.loads(pickle.dumps(recipe.hard_batches))  # as its training arguments are saved
sampler = make(Pairs(), batch_size=10, drop_last=False, valid_label_columns=["label"],
               generator=torch.Generator().manual_seed(7), seed=0)
sampler.set_epoch(1)
batches = list(sampler)
assert sorted(sum(batches, [])) == list(range(400)) and len(sampler) == 40 and sampler.seed == 7
alike = sum(len({i % 40 for i in batch}) == 1 for batch in batches)
assert alike > 30, alike  # ten samples of each text: together they are the hardest batches
assert make(Pairs(), batch_size=10, drop_last=True).seed == 0
'''


def test_the_recipes_run_as_they_stand(tmp_path):
    pages = [HERE / "README.md", *sorted(HERE.glob("examples/**/README.md"))]
    blocks = [block for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
              if re.search(r"^(from|import) samplers\b", block, re.M)]
    assert blocks
    (tmp_path / "samplers.py").write_text((HERE / "samplers.py").read_text())
    lines = ["import runpy"]
    for number, block in enumerate(blocks):
        (tmp_path / f"recipe{number}.py").write_text(block)
        if "def hard_batches" in block:
            lines += [f"import recipe{number} as recipe", SENTENCES]
        else:
            lines.append(f"runpy.run_path('recipe{number}.py', run_name='__main__')")
    (tmp_path / "all.py").write_text("\n".join(lines))  # one process: torch is imported once
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "all.py"], cwd=tmp_path, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
