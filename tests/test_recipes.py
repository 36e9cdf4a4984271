"""The READMEs' recipes with samplers.py run as they stand there, beside that file alone.

    python -m pytest tests/test_recipes.py
"""
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]


def test_the_recipes_run_as_they_stand(tmp_path):
    pages = [HERE / "README.md", *sorted(HERE.glob("examples/**/README.md"))]
    blocks = [block for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
              if re.search(r"^(from|import) samplers\b", block, re.M)]
    assert blocks
    (tmp_path / "samplers.py").write_text((HERE / "samplers.py").read_text())
    lines = ["import runpy"]
    for number, block in enumerate(blocks):
        (tmp_path / f"recipe{number}.py").write_text(block)
        lines.append(f"runpy.run_path('recipe{number}.py', run_name='__main__')")
    (tmp_path / "all.py").write_text("\n".join(lines))  # one process: torch is imported once
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "all.py"], cwd=tmp_path, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
