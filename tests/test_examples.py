"""Every example runs unchanged, without data, and its printed result improves."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
GAINS = {  # example -> pattern of a number before and after in its output
    "best_of_n": r"best of 1: (\S+),.*best of 64: (\S+),",
    "dpo_from_pairs": r"reward: (\S+) -> (\S+)\n",
    "dpo_from_scratch": r"step  0.*pairs (\S+)\n.*step 59.*pairs (\S+)\n",
    "grpo_with_checkable_answers": r"(\S+) -> (\S+)\n",
    "iterated_rlhf_with_a_judge": r"round 1:.*Elo (\S+) .*round 3:.*Elo (\S+) ",
    "ppo_from_scratch": r"step   1  score (\S+) .*step  40  score (\S+) ",
    "ppo_with_several_rewards": r"score (\S+),.*score (\S+),",
}


def test_every_example_is_here():
    assert {file.stem for file in FOLDER.glob("*.py")} == set(GAINS)


@pytest.mark.parametrize("name", GAINS)
def test_example_runs_and_gets_better(name, tmp_path):
    command = [sys.executable, "-P", str(FOLDER / f"{name}.py")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    before, after = map(float, re.search(GAINS[name], run.stdout, flags=re.DOTALL).groups())
    assert after > before
    assert not list(tmp_path.iterdir())


def test_from_scratch_examples_stay_short():
    for name, limit in (("ppo", 120), ("dpo", 80)):
        text = (FOLDER / f"{name}_from_scratch.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= limit
