"""The README's code runs as printed."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_readme_block_runs(block):
    exec(compile(block, str(README), "exec"), {})


def test_readme_tour_runs_and_learns(capsys):
    """The first block prints the score before and after PPO."""
    torch.manual_seed(0)
    exec(compile(BLOCKS[0], str(README), "exec"), {})
    before, after = map(float, capsys.readouterr().out.split("->"))
    assert after > before + 0.2


def test_readme_file_map_names_every_module():
    root = README.parent
    text = README.read_text(encoding="utf-8")
    for file in sorted(root.glob("rlhf_core/**/*.py")):
        if file.name != "__init__.py":
            assert file.name in text, f"{file} is missing from the README's file map"
