"""docs/correctness.md names tests that exist; properties in it that belong to no single part."""

import ast
import functools
import re
from pathlib import Path

import pytest
import torch
from helpers import tiny

from rlhf_core.data import Example, Pair
from rlhf_core.models import RewardModel, Transformer
from rlhf_core.trainers import (
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

ROOT = Path(__file__).parents[1]
TABLE = {
    int(number): set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", tests))
    for number, tests in re.findall(
        r"^\| (\d+) \|.*\|(.*)\|$", (ROOT / "docs/correctness.md").read_text(), re.MULTILINE
    )
}


@functools.cache
def functions_of(file):
    """Docstrings of the file's test functions, by name; none for a file that does not exist."""
    path = ROOT / file
    tree = ast.parse(path.read_text(encoding="utf-8") if path.is_file() else "")
    return {x.name: ast.get_docstring(x) or "" for x in tree.body if isinstance(x, ast.FunctionDef)}


def test_every_row_is_held_by_tests_that_exist():
    assert list(TABLE) == list(range(1, 62)) and all(TABLE.values())
    named = sorted({pointer for tests in TABLE.values() for pointer in tests})
    assert not [f"{file}::{name}" for file, name in named if name not in functions_of(file)]


def test_a_test_that_names_a_row_is_in_it():
    missing, named = [], 0
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        file = path.relative_to(ROOT).as_posix()
        for name, docstring in functions_of(file).items():
            for rows in re.findall(r"\bRows? (\d+(?:(?:, | and )\d+)*)", docstring):
                for row in re.findall(r"\d+", rows):
                    named += 1
                    if (file, name) not in TABLE[int(row)]:
                        missing.append(f"row {row} lacks {file}::{name}")
    assert not missing and named > 60


# ---- properties of no single part

PAIRS = [Pair([7 + i % 4], [5, 2], [6, *range(3, 3 + i % 5), 2]) for i in range(6)]
EXAMPLES = [Example(pair.prompt_ids, pair.rejected_ids) for pair in PAIRS]


def ppo(model, reward):
    config = PPOConfig(batch_size=6, response_length=6, temperature=2.0, missing_eos_penalty=1.0)
    return PPOTrainer(model, [pair.prompt_ids for pair in PAIRS], config, reward=reward)


@pytest.mark.parametrize("kind", ["sft", "sft packed", "dpo", "reward", "ppo"])
def test_which_token_pads_changes_nothing_also_where_it_is_the_end(kind):
    """Row 9: rows of unequal length, all metrics and the weights after a step."""
    results = []
    for pad_id in (0, 2):
        model = tiny(RewardModel if kind == "reward" else Transformer, pad_id=pad_id)
        if kind == "ppo":
            trainer = ppo(model, tiny(RewardModel, pad_id=pad_id))
        elif kind in ("dpo", "reward"):
            trainer_type, config = {
                "dpo": (DPOTrainer, DPOConfig()),
                "reward": (RewardTrainer, RewardConfig()),
            }[kind]
            trainer = trainer_type(model, PAIRS, config)
        else:
            trainer = SFTTrainer(
                model, EXAMPLES, SFTConfig(lr=1e-3, packing=kind == "sft packed", max_length=20)
            )
        metrics = trainer.step(trainer.examples)
        weights = [parameter.detach().clone() for parameter in trainer.trained_parameters()]
        results.append(({name: x for name, x in metrics.items() if name != "eps"}, weights))
    (metrics, weights), (same_metrics, same_weights) = results
    assert same_metrics == metrics
    assert all(torch.equal(x, y) for x, y in zip(weights, same_weights, strict=True))
    if kind == "ppo":
        assert 0 < metrics["val/num_eos_tokens"] < 6  # some rows end and are padded
    if kind == "sft":
        assert metrics["num_tokens"] == sum(len(example.completion_ids) for example in EXAMPLES)


def test_a_reward_model_scores_without_its_dropout():
    """Row 3: also one passed in train mode."""
    reward = tiny(RewardModel, dropout=0.5).train()
    trainer = ppo(tiny(), reward)
    rollout = trainer.sample(trainer.examples)
    assert (
        torch.equal(
            trainer.score(rollout, rollout.prompts()), trainer.score(rollout, rollout.prompts())
        )
        and not reward.training
    )


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_a_step_in_micro_batches_is_the_step_at_once(kind):
    """Row 16, through the optimiser: gradients are added up, then clipped as one."""
    trainer_type, config, examples = {
        "sft": (SFTTrainer, SFTConfig, EXAMPLES),
        "reward": (RewardTrainer, RewardConfig, PAIRS),
        "dpo": (DPOTrainer, DPOConfig, PAIRS),
    }[kind]
    results = []
    for size in (None, 1, 4):
        model = tiny(RewardModel if kind == "reward" else Transformer)
        trainer = trainer_type(
            model, examples, config(lr=1e-3, micro_batch_size=size, max_grad_norm=1e-3)
        )
        metrics = trainer.step(examples)
        assert metrics["grad_norm"] > 1e-2
        results.append(
            (metrics, [p.grad for p in trainer.trained_parameters() if p.grad is not None])
        )
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-7)
