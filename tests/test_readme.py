"""The README stays short and its code runs as printed."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_readme_block_runs(block):
    exec(compile(block, str(README), "exec"), {})


def test_readme_tour_runs_and_learns(capsys):
    """The first block prints the score before and after PPO."""
    torch.manual_seed(0)
    exec(compile(BLOCKS[0], str(README), "exec"), {})
    before, after = map(float, capsys.readouterr().out.split("->"))
    assert after > before + 0.2


def test_readme_is_short():
    assert len(TEXT.splitlines()) <= 200 and len(TEXT.split()) <= 2000


def test_readme_map_names_every_folder():
    for folder in ROOT.glob("rlhf_core/*/"):
        if (folder / "__init__.py").is_file() and not folder.is_symlink():
            assert f"rlhf_core/{folder.name}/" in TEXT, f"{folder} is missing from the README's map"
