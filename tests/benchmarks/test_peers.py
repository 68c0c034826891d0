"""The comparison with TRL and a bare loop: all sides train the same thing, and the table says what was measured."""

import math
import subprocess
import sys

import pytest
import torch

from rlhf_core import PPOConfig, SFTConfig
from benchmarks.peers import __main__ as runner
from benchmarks.peers import bare, ours, theirs
from benchmarks.peers.task import METHODS, Task

TINY = dict(
    vocab_size=61,
    batch_size=3,
    steps=3,
    num_layers=2,
    hidden_size=16,
    num_heads=2,
    max_positions=32,
)


def make(method, folder, **settings):
    task = Task(
        method,
        str(folder),
        **TINY | dict(prompt_length=8, completion_length=12, lr=1e-3) | settings,
    )
    task.write()
    return task


def losses(side, task):
    """Of every step; the first turn, before any, brings none."""
    found = []
    torch.manual_seed(0)
    side.train(task, found.append)
    assert math.isnan(found[0])
    return found[1:]


@pytest.mark.parametrize("method", ["sft", "dpo", "reward"])
def test_our_trainer_and_the_bare_loop_have_the_same_losses(method, tmp_path):
    pytest.importorskip("transformers")
    task = make(method, tmp_path)
    expected = losses(bare, task)
    assert len(expected) == task.steps and len(set(expected)) == task.steps
    torch.testing.assert_close(losses(ours, task), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("minibatches", [1, 3])
def test_ppo_on_the_same_responses_has_the_same_loss(minibatches, tmp_path):
    pytest.importorskip("transformers")
    task = make("ppo", tmp_path, minibatches=minibatches, temperature=0.7)
    expected = losses(bare, task)
    found = losses(ours, task)
    assert len(found) == len(expected) == task.steps
    if minibatches == 1:  # several are drawn, by each side its own
        assert found[0] == pytest.approx(expected[0], abs=2e-6)
        assert found[1] != found[0]  # the responses given are those of the first step alone


def test_every_batch_has_the_lengths_asked_for_and_no_padding_token(tmp_path):
    task = make("dpo", tmp_path)
    lengths = [
        [(len(row.prompt), len(row.chosen), len(row.rejected)) for row in batch]
        for batch in task.batches()
    ]
    assert len(lengths) == task.steps and all(batch == lengths[0] for batch in lengths)
    assert max(lengths[0]) == lengths[0][0] == (8, 12, 12) and len(set(lengths[0])) > 1
    tokens = [
        token
        for row in task.examples()
        for part in (row.prompt, row.chosen, row.rejected)
        for token in part
    ]
    assert min(tokens) >= 0 and max(tokens) < task.pad_id == 60
    assert {len(row.chosen) for row in make("ppo", tmp_path).examples()} == {12}
    path = tmp_path / "task.json"
    task.save(path)
    assert Task.load(path) == task


def test_both_trainers_get_the_same_settings(tmp_path):
    """Values that differ from all defaults, so that one that is not handed on is seen."""
    settings = dict(
        lr=3e-4, adam_eps=1e-7, max_grad_norm=0.5, steps=7, seed=5, ppo_epochs=3, minibatches=2, temperature=0.6,
        kl_coef=0.07, clip_range=0.3, value_clip_range=0.4, vf_coef=0.2, gamma=0.9, lam=0.8, batch_size=4,
    )  # fmt: skip
    task = Task("ppo", str(tmp_path), **settings)
    mine, hers = (
        PPOConfig(**ours.ppo_options(task)),
        theirs.options(task) | theirs.ppo_options(task),
    )
    assert (
        mine.batch_size == hers["per_device_train_batch_size"] == 4
        and hers["gradient_accumulation_steps"] == 1
    )
    assert mine.minibatch_size * hers["num_mini_batches"] == mine.batch_size
    assert mine.max_steps * mine.batch_size == hers["total_episodes"] == 28
    for name, other in {
        "lr": "learning_rate",
        "adam_eps": "adam_epsilon",
        "weight_decay": "weight_decay",
        "lr_schedule": "lr_scheduler_type",
        "ppo_epochs": "num_ppo_epochs",
        "response_length": "response_length",
        "temperature": "temperature",
        "kl_coef": "kl_coef",
        "kl_estimator": "kl_estimator",
        "clip_range": "cliprange",
        "value_clip_range": "cliprange_value",
        "vf_coef": "vf_coef",
        "gamma": "gamma",
        "lam": "lam",
        "missing_eos_penalty": "missing_eos_penalty",
    }.items():
        assert getattr(mine, name) == hers[other] == settings.get(name, hers[other]), name
    task = Task("sft", str(tmp_path), **settings)
    mine, hers = SFTConfig(**ours.options(task)), theirs.options(task)
    assert mine.max_grad_norm == hers["max_grad_norm"] == 0.5
    assert (hers["bf16"], hers["gradient_checkpointing"]) == (False, False)
    assert theirs.method_options(task)["max_length"] == 192
    group = torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
    assert group["betas"] == task.betas == (hers["adam_beta1"], hers["adam_beta2"])


def test_the_scripts_need_neither_trl_nor_transformers_to_be_read():
    code = """
import sys
for name in ("trl", "transformers", "datasets", "accelerate"):
    sys.modules[name] = None
from benchmarks.peers import __main__, bare, ours, theirs
"""
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_worker_trains_in_a_process_of_its_own_and_says_what_it_took():
    settings = TINY | dict(prompt_length=8, completion_length=12)
    del settings["vocab_size"]
    result = runner.compare("reward", 61, ("ours",), 2, sys.executable, **settings)
    side = result["sides"]["ours"]
    assert len(side["seconds"]) == len(side["losses"]) == 3 and min(side["seconds"]) > 0
    assert side["peak_bytes"] >= side["ready_bytes"] > 0 and "rlhf_core" in side["versions"]
    assert runner.row(result).startswith("| reward, 61 | ")


def test_a_worker_that_fails_says_why():
    with pytest.raises(RuntimeError, match="192 tokens, the model 8 positions"):
        runner.compare(
            "sft", 61, ("ours",), 1, sys.executable, max_positions=8, num_layers=1, hidden_size=16
        )


def test_the_table_says_which_bars_are_missed_and_which_losses_differ():
    def side(seconds, peak, loss=1.0):
        return {
            "seconds": [9, *seconds],
            "losses": [loss, 2.0],
            "ready_bytes": 10**8,
            "peak_bytes": peak * 10**6,
        }

    sides = {
        "ours": side([1, 2, 3], 200),
        "theirs": side([8, 8, 8], 300),
        "bare": side([1, 1, 1], 200),
    }
    result = {"method": "sft", "vocab_size": 50257, "sides": sides}
    assert runner.row(result) == (
        "| sft, 50257 | 2 | 100% | 8 | 1 | 4.00 (3.5) | 0.50 (1.0, missed) | 100 | 0.50 | 200 | 0.67 "
        "| first 0.0e+00, last 0.0e+00 |"
    )
    sides["theirs"] = side([6, 6, 6], 240, loss=1.1)
    assert runner.row(result) == (
        "| sft, 50257 | 2 | 100% | 6 | 1 | 3.00 (3.5, missed) | 0.50 (1.0, missed) | 100 | 0.71 missed | 200 "
        "| 0.83 missed | DIFFER: first 1.0e-01, last 0.0e+00 |"
    )
    assert set(runner.BARS) == set(runner.BARE_BARS) == set(METHODS)


def test_parity_is_measured_and_holds():
    from benchmarks.peers import parity

    logit, gradient, tokens, same = parity.compare(*parity.FAMILIES["Qwen3"])
    assert 0 < logit < 1e-5 and 0 < gradient < 1e-4
    assert (tokens, same) == (64, True)
