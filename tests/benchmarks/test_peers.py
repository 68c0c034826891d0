"""The comparison with TRL and a bare loop: all sides train the same, and the table is right."""

import dataclasses
import itertools
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.peers import __main__ as runner
from benchmarks.peers import bare, half_billion, ours, theirs
from benchmarks.peers.task import METHODS, Task
from rlhf_core import PPOConfig, SFTConfig

ROOT = Path(__file__).parents[2]
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
    """The loss of every step. The first call of the turn, before any step, has none."""
    found = []
    torch.manual_seed(0)
    side.train(task, found.append)
    assert math.isnan(found[0])
    return found[1:]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo", "reward"])
def test_our_trainer_and_the_bare_loop_have_the_same_losses(method, tmp_path):
    pytest.importorskip("transformers")
    task = make(method, tmp_path)
    expected = losses(bare, task)
    assert len(expected) == task.steps and len(set(expected)) == task.steps
    torch.testing.assert_close(losses(ours, task), expected, rtol=0, atol=2e-6)


@pytest.mark.slow
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


def test_every_batch_has_the_same_lengths_and_no_padding_token(tmp_path):
    task = make("dpo", tmp_path)
    lengths = [[tuple(map(len, vars(row).values())) for row in batch] for batch in task.batches()]
    assert len(lengths) == task.steps and all(batch == lengths[0] for batch in lengths)
    assert max(lengths[0]) == lengths[0][0] == (8, 12, 12) and len(set(lengths[0])) > 1
    tokens = [token for row in task.examples() for part in vars(row).values() for token in part]
    assert min(tokens) >= 0 and max(tokens) < task.pad_id == 60
    assert {len(row.chosen) for row in make("ppo", tmp_path).examples()} == {12}
    path = tmp_path / "task.json"
    task.save(path)
    assert Task.load(path) == task


def test_both_trainers_get_the_same_settings(tmp_path):
    """Values differ from all defaults, so that a missing one is noticed."""
    settings = dict(
        lr=3e-4, adam_eps=1e-7, max_grad_norm=0.5, steps=7, seed=5, ppo_epochs=3, minibatches=2,
        temperature=0.6, kl_coef=0.07, clip_range=0.3, value_clip_range=0.4, vf_coef=0.2,
        gamma=0.9, lam=0.8, batch_size=4,
    )  # fmt: skip
    task = Task("ppo", str(tmp_path), **settings)
    mine = PPOConfig(**ours.ppo_options(task))
    hers = theirs.options(task) | theirs.ppo_options(task)
    assert mine.batch_size == hers["per_device_train_batch_size"] == 4
    assert hers["gradient_accumulation_steps"] == 1
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


@pytest.mark.slow
def test_the_scripts_import_neither_trl_nor_transformers_at_the_top():
    code = """
import sys
for name in ("trl", "transformers", "datasets", "accelerate"):
    sys.modules[name] = None
from benchmarks.peers import __main__, bare, ours, theirs
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_worker_trains_in_its_own_process_and_reports_time_and_memory():
    settings = TINY | dict(prompt_length=8, completion_length=12)
    del settings["vocab_size"]
    result = runner.compare("reward", 61, ("ours",), 2, sys.executable, **settings)
    side = result["sides"]["ours"]
    assert len(side["seconds"]) == len(side["losses"]) == 3 and min(side["seconds"]) > 0
    assert side["peak_bytes"] >= side["ready_bytes"] > 0 and "rlhf_core" in side["versions"]
    assert runner.row(result).startswith("| reward, 61 | ")


@pytest.mark.slow
def test_the_error_of_a_worker_is_reported():
    with pytest.raises(RuntimeError, match="192 tokens, but the model has 8 positions"):
        runner.compare(
            "sft", 61, ("ours",), 1, sys.executable, max_positions=8, num_layers=1, hidden_size=16
        )


def test_the_table_marks_missed_bars_and_different_losses():
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
        "| sft, 50257 | 2 | 100% | 8 | 1 | 4.00 (3.5) | 0.50 (1.0, missed) | 100 | 0.50 | 200 "
        "| 0.67 | first 0.0e+00, last 0.0e+00 |"
    )
    sides["theirs"] = side([6, 6, 6], 240, loss=1.1)
    assert runner.row(result) == (
        "| sft, 50257 | 2 | 100% | 6 | 1 | 3.00 (3.5, missed) | 0.50 (1.0, missed) | 100 "
        "| 0.71 missed | 200 | 0.83 missed | DIFFER: first 1.0e-01, last 0.0e+00 |"
    )
    assert set(runner.BARS) == set(runner.BARE_BARS) == set(METHODS)


@pytest.mark.slow
def test_parity_is_measured_and_holds():
    from benchmarks.peers import parity

    logit, gradient, tokens, same = parity.compare(*parity.FAMILIES["Qwen3"])
    assert 0 < logit < 1e-5 and 0 < gradient < 1e-4
    assert (tokens, same) == (64, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["benchmarks.peers", "benchmarks.peers.generation"], ids=lambda name: name
)
def test_it_runs_from_a_clone(module):
    if module.endswith("generation"):
        pytest.importorskip("transformers")
    command = [sys.executable, "-m", module]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m {module}" in done.stdout and "--rounds" in done.stdout


def test_a_comparison_without_ours_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers", "--sides", "bare"])
    with pytest.raises(SystemExit):
        runner.main()
    assert "--sides needs ours" in capsys.readouterr().err


def test_peers_and_learning_are_not_installed(tmp_path, monkeypatch):
    """They are evidence, not library: setup.py lists the package of the op benchmarks only."""
    asked = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: asked.update(options))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    packages = set(asked["packages"])
    assert {"rlhf_core", "rlhf_core.ops", "rlhf_core.benchmarks", "rlhf_core.kernels"} <= packages
    assert not [name for name in packages if "peers" in name or "learning" in name]


def test_the_arithmetic_of_half_a_billion_weights_is_counted(tmp_path):
    """Seven matrices a layer, a pair's prompt once; head and end of the last block: completions."""
    sizes = dict(family="qwen2", num_layers=2, num_kv_heads=1, intermediate_size=40)
    task = make("dpo", tmp_path, lora_rank=2, **sizes, shortest=1.0, steps=1)
    tokens, counted = 3 * (8 + 12 + 12), 3 * (12 + 12)
    keys_values, others = 2 * 16 * 8, 16 * 16 * 2 + 3 * 16 * 40
    once = 2 * (tokens * (2 * keys_values + others) + counted * (others + 61 * 16))
    adapters = 2 * 2 * (tokens * (2 * 24 * 2 + 32 * 2 + 56 * 3) + counted * (32 * 2 + 56 * 3))
    assert half_billion.arithmetic(task) == (3 * once + 3 * adapters, 0)
    cached = dataclasses.replace(task, cached_reference=True)
    assert half_billion.arithmetic(cached) == (2 * once + 3 * adapters, 0)
    group = make("grpo", tmp_path, lora_rank=2, samples=2, **sizes, shortest=1.0, steps=1)
    # Two samples have as many tokens as a pair.
    assert half_billion.arithmetic(group) == (2 * once + 3 * adapters, once + adapters)
    layer = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 40
    assert half_billion.reading(group) == 12 * (2 * layer + 61 * 16) * 4
    assert half_billion.reading(task) == 0
    # PPO trains policy and critic. The reference's forward pass has the head, and the
    # reward model's reads three tokens.
    rollout = make("ppo", tmp_path, lora_rank=2, **sizes, shortest=1.0, steps=1)
    tokens, counted = 3 * (8 + 12), 3 * 12
    trunk, reward = (2 * (tokens * (2 * keys_values + others) + n * others) for n in (counted, 3))
    head = 2 * counted * 61 * 16
    adapters = 2 * 2 * (tokens * (2 * 24 * 2 + 32 * 2 + 56 * 3) + counted * (32 * 2 + 56 * 3))
    known = 3 * (trunk + head) + 2 * trunk + reward + 6 * adapters
    assert half_billion.arithmetic(rollout) == (known, trunk + head + adapters)
    assert half_billion.reading(rollout) == half_billion.reading(group)


def test_every_method_of_half_a_billion_weights_has_bars_and_one_update_per_rollout():
    dtypes = half_billion.FLOOR_BARS
    assert set(half_billion.BARS) == set(itertools.product(half_billion.METHODS, dtypes))
    name, settings = half_billion.settings_of("ppo", "bfloat16")
    task = Task(name, "", **settings)
    assert PPOConfig(**ours.ppo_options(task)).one_update
    assert theirs.ppo_options(task)["num_mini_batches"] == 1 == task.ppo_epochs


LORA = dict(family="qwen2", num_layers=1, num_kv_heads=1, intermediate_size=40, lora_rank=2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_groups_train_on_our_side(precision, tmp_path):
    task = make("grpo", tmp_path, precision=precision, **LORA)
    first, *_ = found = losses(ours, task)
    assert len(found) == task.steps and abs(first) < 0.02  # advantages of a group add up to 0


@pytest.mark.parametrize("cached_reference", [False, True])
def test_adapters_train_on_our_side(cached_reference, tmp_path):
    task = make("dpo", tmp_path, cached_reference=cached_reference, **LORA)
    first, *later = losses(ours, task)
    assert first == pytest.approx(math.log(2)) and len(set(later)) == 2


def test_ppo_with_new_adapters_starts_at_the_loss_of_whole_weights(tmp_path):
    task = make("ppo", tmp_path, ppo_epochs=1, **LORA)
    first, *later = losses(ours, task)
    assert first == pytest.approx(losses(ours, dataclasses.replace(task, lora_rank=0))[0], abs=1e-6)
    assert len(set(later)) == 2 and first > 0.01  # the value loss: the policy's part is 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_ppo_with_adapters_has_the_first_loss_of_trl(precision, tmp_path):
    pytest.importorskip("trl.experimental.ppo")
    pytest.importorskip("peft")
    task = make("ppo", tmp_path, precision=precision, ppo_epochs=1, **LORA)
    expected = losses(theirs, task)
    assert len(set(expected)) == task.steps
    tolerance = half_billion.LOSS_TOLERANCE[precision]
    assert losses(ours, task)[0] == pytest.approx(expected[0], abs=tolerance)


def test_the_table_of_half_a_billion_weights_has_shares_of_the_floor():
    rates = [{"float32": 2e9, "bfloat16": 1e9, "read": 5e9}] * 2

    def side(seconds, peak):
        found = {"cpu_seconds": [9, seconds], "losses": [1.0, 2.0], "rates": rates}
        return found | {"ready_bytes": 10**8, "peak_bytes": peak * 10**6}

    sides = {"ours": side(10, 200), "theirs": side(15, 220)}
    settings = dict(method="sft", dtype="bfloat16", layers=2, vocab_size=61)
    settings |= dict(flop=(16e9, 0), bytes_read=0)
    assert half_billion.row({"sides": sides, **settings}) == (
        "| sft, bfloat16, 2, 61 | 10 | 8 | 0.80 (0.7) | 1.0 (2.0 in float32) | 5.0 | 15 "
        "| 1.50 (2.0, missed) | 100 | 0.83 missed | 200 | 0.91 missed | first 0.0e+00 |"
    )
    assert half_billion.row({"sides": {"ours": side(10, 200)}, **settings}) == (
        "| sft, bfloat16, 2, 61 | 10 | 8 | 0.80 (0.7) | 1.0 (2.0 in float32) | 5.0 |  |  "
        "| 100 |  | 200 |  | first 0.0e+00 |"
    )


def test_a_method_that_a_model_size_lacks_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers", "--model-size", "0.5b", "--methods", "reward"])
    with pytest.raises(SystemExit):
        runner.main()
    assert "--model-size 0.5b has no reward" in capsys.readouterr().err


@pytest.mark.slow
def test_ppo_runs_in_the_other_interpreter_and_without_trl_if_that_has_no_ppo(
    tmp_path, monkeypatch, capsys
):
    other = tmp_path / "python"
    other.symlink_to(sys.executable)
    (tmp_path / "peft.py").touch()
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = []

    def compare(method, vocab_size, sides, rounds, python, **settings):
        found.append((method, sides, python))
        return {}

    monkeypatch.setattr(runner, "compare", compare)
    monkeypatch.setattr(half_billion, "row", str)
    options = ["--methods", "grpo", "ppo", "--dtypes", "float32", "--ppo-python", str(other)]
    monkeypatch.setattr(sys, "argv", ["peers", "--model-size", "0.5b", *options])
    runner.main()
    assert found == [
        ("grpo", ["ours", "theirs"], sys.executable),
        ("ppo", ["ours"], str(other)),
    ]
    expected = "trl.experimental.ppo is not installed, so TRL is left out of ppo\n"
    assert capsys.readouterr().out.startswith(expected)
