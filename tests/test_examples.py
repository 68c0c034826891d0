"""Every example runs unchanged, without data, and its printed result improves.

gsm8k_reward.py holds a reward for the command line.
"""

import gzip
import itertools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import model_folders, run, write

FOLDER = Path(__file__).parents[1] / "examples"
GAINS = {  # example -> pattern of a number before and after in its output
    "best_of_n": r"best of 1: (\S+),.*best of 64: (\S+),",
    "dpo_from_pairs": r"reward: (\S+) -> (\S+)\n",
    "dpo_from_scratch": r"step  0.*pairs (\S+)\n.*step 59.*pairs (\S+)\n",
    "grpo_with_checkable_answers": r"(\S+) -> (\S+)\n",
    "iterated_rlhf_with_a_judge": r"round 1:.*Elo (\S+) .*round 3:.*Elo (\S+) ",
    "ppo_from_scratch": r"step   1  score (\S+) .*step  40  score (\S+) ",
    "ppo_with_several_rewards": r"score (\S+),.*score (\S+),",
    "three_policies": r"early .*Elo (\S+) .*late .*Elo (\S+) ",
    "rlaif_with_a_stub_judge": r"(\S+) -> (\S+)\n",
}


def test_every_example_is_here():
    assert {file.stem for file in FOLDER.glob("*.py")} == {*GAINS, "gsm8k_reward"}


@pytest.fixture
def gsm8k(data_dir):
    """GSM8K's test split, whose answers end with their number."""
    return data_dir / "sft" / "gsm8k_test.jsonl.gz"


def test_gsm8k_reward_is_that_of_the_final_number(gsm8k):
    score = runpy.run_path(str(FOLDER / "gsm8k_reward.py"))["score"]
    with gzip.open(gsm8k, "rt", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in file]
    assert set(score(answers, answers, answers)) == {1.1}
    assert set(score(answers, [text + "7" for text in answers], answers)) == {0.1}
    rows = {"#### 1,234.50 eggs": 1.1, "#### 3 #### $1234.5": 1.1, "1234.5": 0.0, "#### many": 0.0}
    assert score([""] * 4, list(rows), ["so #### 1234.50"] * 4) == list(rows.values())


def test_grpo_runs_on_gsm8k_from_the_command_line(gsm8k, tmp_path):
    with gzip.open(gsm8k, "rt", encoding="utf-8") as file:
        rows = write(tmp_path / "rows.jsonl", list(itertools.islice(file, 8)))
    policy = model_folders(tmp_path) / "policy"
    options = ["--reward-function", f"{FOLDER / 'gsm8k_reward.py'}:score", "--response-length", 8]
    options += ["--batch-size", 2, "--num-samples", 2, "--max-steps", 2, "--device", "cpu"]
    options += ["--on-long-prompt", "truncate", "--out", tmp_path / "grpo"]
    with pytest.warns(UserWarning, match="on_long_prompt"):
        assert run("grpo", "--model", policy, "--prompts", rows, *options) == 0
    lines = (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["reward"] for line in lines] == [0, 0]  # of a random policy


@pytest.mark.parametrize("name", GAINS)
def test_example_runs_and_gets_better(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    before, after = map(float, re.search(GAINS[name], shown, flags=re.DOTALL).groups())
    assert after > before
    assert not list(tmp_path.iterdir())


def test_an_example_runs_as_a_program_from_any_folder(tmp_path):
    command = [sys.executable, "-P", str(FOLDER / "best_of_n.py")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0 and "best of 64:" in run.stdout, run.stderr


def test_from_scratch_examples_stay_short():
    for name, limit in (("ppo", 120), ("dpo", 80)):
        text = (FOLDER / f"{name}_from_scratch.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= limit
