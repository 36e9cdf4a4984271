"""The READMEs' recipes run as they stand, beside samplers.py alone and what they call yours.

    python -m pytest tests/test_recipes.py
"""
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]
YOURS = """
import runpy, torch
images, encoder = torch.randn(384, 16), torch.nn.Linear(16, 8)
optimizer = torch.optim.Adam(encoder.parameters())
def augment(x): return x + 0.1 * torch.randn_like(x)
def update_weights(loss): optimizer.zero_grad(), loss.backward(), optimizer.step()
def loss(u, v): return torch.nn.functional.cross_entropy(u @ v.T, torch.arange(len(u)))
yours = dict(globals())
"""


def test_the_recipes_run_as_they_stand(tmp_path):
    pages = [HERE / "README.md", *sorted(HERE.glob("examples/**/README.md"))]
    blocks = [block for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
              if re.search(r"^(from|import) samplers\b", block, re.M)]
    assert blocks
    (tmp_path / "samplers.py").write_text((HERE / "samplers.py").read_text())
    lines = [YOURS]
    for number, block in enumerate(blocks):
        (tmp_path / f"recipe{number}.py").write_text(block)
        lines.append(f"done = runpy.run_path('recipe{number}.py', yours)")
        lines.append("assert done['sampler'].epoch > 0")
    (tmp_path / "all.py").write_text("\n".join(lines))  # one process: torch is imported once
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "all.py"], cwd=tmp_path, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
