"""A run that stops and goes on in a new process ends where one that never stopped does, bit by bit.

What is refused to go on, and what is checked as a run goes. The file is also the program of
those processes: `python test_resume.py KIND OUT`.
"""

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.data import Example, Pair
from rlhf_core.models import RewardModel, Transformer, TransformerConfig
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.models.safetensors import read_tensors
from rlhf_core.trainers import (
    DPOConfig,
    DPOTrainer,
    OnlineDPOConfig,
    OnlineDPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
    checkpoint,
)

PAIRS = [Pair([7 + i % 4], [5, 2], [6, *range(3, 3 + i % 5), 2]) for i in range(10)]
EXAMPLES = [Example(pair.prompt_ids, pair.chosen_ids) for pair in PAIRS]
TRAINERS = {
    "sft": (SFTTrainer, SFTConfig),
    "reward": (RewardTrainer, RewardConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "ppo": (PPOTrainer, PPOConfig),
    "online": (OnlineDPOTrainer, OnlineDPOConfig),
}
KINDS = [
    "sft",
    "reward",
    "dpo",
    "dpo-lora",
    "ppo",
    "ppo-head",
    "ppo-lora",
    "ppo-steered",
    "online",
    "online-lora",
]
VARIANTS = {  # of a config
    "head": dict(critic="head"),
    "steered": dict(kl_target=0.5, kl_horizon=50, entropy_coef=0.01, entropy_target=2.0, whiten_scores="running",
                    reference_ema=0.9),
}  # fmt: skip
PPO = dict(minibatch_size=2, ppo_epochs=2, response_length=5)


def tiny(cls=Transformer, seed=0):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=12, hidden_size=16, num_layers=2, num_heads=2, max_positions=32, dropout=0.1
    )
    return cls(TransformerConfig(**sizes, eos_ids=(2,), pad_id=0))


def fives(prompts, responses):
    return [float(response.count(5)) for response in responses]


def build(kind, out=None, seed=0, examples=None, others=None, alpha=16.0, **config):
    """The trainer of a run of two epochs of three steps, with dropout: all of its generators matter."""
    kind, _, variant = kind.partition("-")
    trainer_type, config_type = TRAINERS[kind]
    model = tiny(RewardModel if kind == "reward" else Transformer, seed)
    others = dict(others or {})
    if variant == "lora":
        add_adapters(model, LoRAConfig(rank=2, alpha=alpha, dropout=0.1))
    settings = dict(batch_size=4, epochs=2, lr=1e-2, dropout=True)
    if kind in ("ppo", "online"):
        others = dict(reward=tiny(RewardModel, seed=1)) | others
        settings |= PPO if kind == "ppo" else dict(response_length=5)
        settings |= VARIANTS.get(variant, {})
        examples = [pair.prompt_ids for pair in PAIRS] if examples is None else examples
    elif examples is None:
        examples = EXAMPLES if kind == "sft" else PAIRS
    return trainer_type(model, examples, config_type(**(settings | config)), out=out, **others)


class Stop(Exception):
    """The power goes."""


def run(kind, out, cut=None):
    """Go on from the checkpoint where there is one; stop in the middle of step cut + 1."""
    trainer = build(kind, out, save_every=2)
    if (out / "checkpoint").exists():
        torch.manual_seed(99)  # as if the process had drawn something else before
        trainer.resume()
    step, taken = trainer.step, []

    def stopping(batch):
        if trainer.steps_done == cut:
            raise Stop
        taken.append(trainer.steps_done)
        return step(batch)

    trainer.step = stopping
    try:
        history = trainer.train()
    except Stop:
        return taken
    metrics = [{name: x for name, x in line.items() if name != "eps"} for line in history]
    weights = [model.state_dict() for model in trainer.trained_models()]
    torch.save((taken, metrics, weights), out / "result.pt")


def result(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    taken, metrics, weights = torch.load(out / "result.pt")
    assert [{name: x for name, x in line.items() if name != "eps"} for line in lines] == metrics
    return taken, metrics, weights


def snapshot(trainer):
    return [
        {name: x.clone() for name, x in model.state_dict().items()}
        for model in trainer.trained_models()
    ]


def equal(a, b):
    return all(torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in x | y)


# ---- the same run


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_in_a_new_process_is_the_run_that_never_stopped(kind, tmp_path):
    """Row 31: cut in step 4, so it goes on from step 2, in the middle of an epoch; weights and metrics bit by bit."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(kind, whole)
    assert run(kind, cut, 3) == [0, 1, 2] and not (cut / "result.pt").exists()
    assert (
        len((cut / "metrics.jsonl").read_text().splitlines()) == 3
    )  # one more than the checkpoint knows
    command = [sys.executable, "-P", __file__, kind, str(cut)]
    subprocess.run(command, check=True, timeout=120, env=os.environ | {"PYTHONHASHSEED": "1"})
    (taken, metrics, weights), (all_taken, want_metrics, want) = result(cut), result(whole)
    assert taken == [2, 3, 4, 5] and all_taken == list(range(6))
    assert metrics == want_metrics and [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert equal(weights, want)
    for file in ("model.safetensors", "adapter_model.safetensors", "critic/model.safetensors"):
        assert (
            not (whole / file).exists() or (whole / file).read_bytes() == (cut / file).read_bytes()
        )


def test_a_finished_reward_model_is_the_same_when_its_run_is_resumed(tmp_path):
    """Its scores are normalised at the end, by a bias that the head had not when the run began."""
    done = build("reward", tmp_path, save_every=2)
    done.train()
    again = build("reward", tmp_path, save_every=2)
    again.resume()
    assert again.train() == [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    ids = torch.tensor([[7, 5, 2]])
    for model in (again.model, RewardModel.from_pretrained(tmp_path)):
        assert_close(model.eval()(ids, ids > 0), done.model.eval()(ids, ids > 0), rtol=0, atol=0)


@pytest.mark.parametrize("started", ["from a policy", "from a reward model"])
def test_a_finished_reward_run_goes_on_with_the_scores_as_they_were_learned(started, tmp_path):
    """So it is the run that never stopped, whether the head began with a bias or without one."""
    build("reward", tmp_path / "first").train()

    def reward(out, epochs):
        model = (
            RewardModel.from_pretrained(tmp_path / "first")
            if "reward" in started
            else tiny(RewardModel)
        )
        settings = dict(batch_size=4, epochs=epochs, lr=1e-2, dropout=True, lr_schedule="constant")
        torch.manual_seed(3)
        config = RewardConfig(**settings, save_every=out and 1)
        return RewardTrainer(model, PAIRS, config, out=out and tmp_path / out)

    whole = reward(None, 3)
    want = whole.train()
    reward("out", 1).train()
    longer = reward("out", 3)
    longer.resume()
    got = longer.train()
    assert got[3:] == want[3:] and equal(snapshot(longer), snapshot(whole))
    scores = longer.scores_of(PAIRS)
    assert abs(scores.mean()) < 1e-4 and abs(scores.std(correction=0) - 1) < 1e-4
    longer.train()  # nothing is left to do, and nothing is normalised again
    assert equal(snapshot(longer), snapshot(whole))


def test_a_reward_run_that_goes_on_only_to_end_where_it_was_stopped_is_normalised(tmp_path):
    run("reward", tmp_path, cut=2)
    trainer = build("reward", tmp_path, max_steps=2, save_every=2)
    with pytest.warns(UserWarning, match="linear schedule over 6 steps"):
        trainer.resume()
    trainer.train()
    scores = RewardTrainer(RewardModel.from_pretrained(tmp_path), PAIRS, RewardConfig()).scores_of(
        PAIRS
    )
    assert abs(scores.mean()) < 1e-4 and abs(scores.std(correction=0) - 1) < 1e-4


def test_a_run_that_goes_on_under_another_linear_schedule_is_told(tmp_path):
    build("sft", tmp_path, save_every=1, max_steps=2).train()
    longer = build("sft", tmp_path)
    with pytest.warns(
        UserWarning, match="its 2 steps had .* a linear schedule over 2 steps, .* over 6"
    ):
        longer.resume()
    assert longer.steps_done == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("sft", tmp_path, max_steps=2).resume()  # the same
        for out, options in (
            ("flat", dict(lr_schedule="constant")),
            ("rising", dict(warmup_steps=2)),
        ):
            build("sft", tmp_path / out, save_every=1, max_steps=2, **options).train()
            build(
                "sft", tmp_path / out, **options
            ).resume()  # these steps were as they would be now


def test_a_finished_run_goes_on_where_max_steps_grows(tmp_path):
    options = dict(lr_schedule="constant")
    whole = build("sft", **options)
    whole.train()
    build("sft", tmp_path, save_every=1, max_steps=2, **options).train()
    longer = build("sft", tmp_path, save_every=3, **options)
    longer.resume()
    assert len(longer.train()) == 6 and equal(snapshot(longer), snapshot(whole))
    longer = build("sft", tmp_path, **options)
    longer.resume()
    assert [line["step"] for line in longer.train()] == [1, 2, 3, 4, 5, 6]  # nothing left to do


def test_a_checkpoint_of_adapters_holds_no_other_weights(tmp_path):
    build("dpo-lora", tmp_path, save_every=3).train()
    _, tensors = read_tensors(tmp_path / "checkpoint")
    assert len(tensors) > 4 and all("lora_" in name for name in tensors if name != "generator")


@pytest.mark.parametrize("save_every, want", [(1, [1, 2, 3, 4, 5, 6]), (4, [4, 6]), (None, [])])
def test_checkpoints_come_when_due_and_at_the_end(save_every, want, tmp_path, monkeypatch):
    saved, save = [], checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda trainer: saved.append(trainer.steps_done) or save(trainer)
    )
    build("sft", tmp_path, save_every=save_every).train()
    assert saved == want and (tmp_path / "checkpoint").exists() == bool(want)


def test_a_checkpoint_that_fails_half_way_leaves_the_one_before(tmp_path, monkeypatch):
    options = dict(save_every=2, lr_schedule="constant")
    build("sft", tmp_path, max_steps=2, **options).train()
    before = (tmp_path / "checkpoint").read_bytes()
    trainer = build("sft", tmp_path, **options)
    trainer.resume()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(trainer)
    assert (tmp_path / "checkpoint").read_bytes() == before and not list(tmp_path.glob(".*"))


def test_a_new_run_in_the_same_folder_removes_the_checkpoint_of_the_old_one(tmp_path):
    build("sft", tmp_path, save_every=1).train()
    build("sft", tmp_path).train()
    assert (
        not (tmp_path / "checkpoint").exists()
        and len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    )


# ---- what is not the same run


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("sft", dict(lr=0.1), r"with lr=0\.01, not 0\.1"),
        ("sft", dict(batch_size=5), "with batch_size=4, not 5"),
        ("sft", dict(max_steps=1), "at step 6, this run ends at 1"),
        ("sft", dict(examples=EXAMPLES[::-1]), "the examples of that run were others"),
        ("dpo", dict(seed=1), "the frozen weights of that run were others"),  # of the reference
        ("dpo-lora", dict(seed=1), "the frozen weights of that run were others"),
        ("dpo-lora", dict(alpha=8.0), "with lora="),
        (
            "ppo",
            dict(others=dict(reward=tiny(RewardModel, seed=2))),
            "the frozen weights of that run were others",
        ),
        ("ppo", dict(others=dict(eos_ids=(2, 3))), r"with eos_ids=\[2\], not \[2, 3\]"),
        (
            "online",
            dict(others=dict(reward=tiny(RewardModel, seed=2))),
            "the frozen weights of that run were others",
        ),
        ("online", dict(others=dict(eos_ids=(2, 3))), r"with eos_ids=\[2\], not \[2, 3\]"),
    ],
    ids=str,
)
def test_another_run_is_refused_and_the_trainer_stays_as_it_is(kind, options, message, tmp_path):
    build(kind, tmp_path, save_every=6).train()
    trainer = build(kind, tmp_path, **options)
    before = snapshot(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.resume()
    assert (
        equal(snapshot(trainer), before) and not trainer.steps_done and not trainer.optimizer.state
    )
    trainer = build(kind, tmp_path, log_every=3, save_every=1)
    trainer.resume()
    assert trainer.steps_done == 6


def test_the_reference_of_a_resumed_run_is_the_original_policy(tmp_path):
    trainer = build("dpo", tmp_path, save_every=6)
    before = snapshot(trainer)
    trainer.train()
    resumed = build("dpo", tmp_path)
    resumed.resume()
    assert equal([resumed.reference.model.state_dict()], before) and not equal(
        snapshot(resumed), before
    )


@pytest.mark.parametrize("what", ["missing", "damaged", "other", "metrics"])
def test_a_checkpoint_that_cannot_be_used_is_named(what, tmp_path):
    trainer = build("sft", tmp_path, save_every=6)
    trainer.train()
    file = tmp_path / "checkpoint"
    if what == "missing":
        file.unlink()
    elif what == "damaged":
        file.write_bytes(file.read_bytes()[:-1])
    elif what == "other":
        file.write_bytes((tmp_path / "model.safetensors").read_bytes())
    else:
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:9])
    message = {
        "missing": "checkpoint: no checkpoint to go on from",
        "damaged": "damaged or cut short",
        "other": "no checkpoint of a run",
        "metrics": "metrics.jsonl: ends before step 5, the checkpoint is of 6",
    }
    trainer = build("sft", tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message[what]):
        trainer.resume()
        trainer.train()


def test_an_option_without_effect_is_refused(tmp_path):
    for options, message in (
        (dict(save_every=1), "save_every has no effect without out"),
        (dict(eval_every=1), "eval_every has no effect without evaluation examples"),
        (dict(save_every=0), "save_every must be > 0, got 0"),
        (dict(warmup_steps=-1), "warmup_steps must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            build("sft", **options)
    with pytest.raises(ValueError, match="no out to go on from"):
        build("sft").resume()
    for options, message in (
        (dict(minibatch_size=5), "minibatch_size must be from 1 to 4, got 5"),
        (dict(gamma=1.5), r"gamma must be in \[0, 1\], got 1.5"),
        (dict(kl_coef=math.nan), "kl_coef must be at least 0, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            build("ppo", **options)


# ---- stopped


def test_ctrl_c_ends_the_step_and_leaves_a_checkpoint(tmp_path, capsys):
    whole = build("sft")
    whole.train()
    trainer = build("sft", tmp_path)
    step = trainer.step

    def interrupted(batch):
        if trainer.steps_done == 2:
            signal.raise_signal(signal.SIGINT)
        return step(batch)

    trainer.step = interrupted
    with pytest.raises(KeyboardInterrupt, match=r"step 3 is in .*checkpoint, to go on from"):
        trainer.train()
    assert "Ctrl-C again stops at once" in capsys.readouterr().err
    resumed = build("sft", tmp_path)
    resumed.resume()
    assert (
        resumed.steps_done == 3
        and len(resumed.train()) == 6
        and equal(snapshot(resumed), snapshot(whole))
    )


def test_a_second_ctrl_c_does_not_wait_and_afterwards_all_is_as_before(tmp_path):
    trainer = build("sft", tmp_path)

    def stuck(batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("still running")

    trainer.step = stuck
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not (tmp_path / "checkpoint").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- what is checked as a run goes


def test_a_row_whose_loss_is_no_number_is_named_and_the_state_kept(tmp_path):
    bad = EXAMPLES[4]._replace(prompt_ids=[1])  # a token that no other row has
    trainer = build(
        "sft", tmp_path, examples=[*EXAMPLES[:4], bad, *EXAMPLES[5:]], batch_size=10, dropout=False
    )
    embed = trainer.model.trunk.embed
    embed.register_forward_hook(
        lambda _, ids, hidden: hidden.masked_fill((ids[0] == 1)[..., None], math.nan)
    )
    before = snapshot(trainer)
    with pytest.raises(
        FloatingPointError,
        match=r"step 1: the .* is nan; nothing updated; the loss of example 4 alone",
    ):
        trainer.train()
    assert equal(snapshot(trainer), before) and (tmp_path / "checkpoint-error").exists()
    build("sft", tmp_path, examples=EXAMPLES).train()  # which is no more the run that failed
    assert not (tmp_path / "checkpoint-error").exists()


def test_a_loss_that_is_no_number_stops_also_where_the_gradient_is_finite():
    trainer = build("sft", examples=EXAMPLES)
    before = snapshot(trainer)
    with pytest.raises(FloatingPointError, match="the loss is nan; nothing updated"):
        trainer.optimize(
            iter(
                [trainer.model.trunk.norm.weight.sum(), torch.tensor(math.nan, requires_grad=True)]
            )
        )
    assert equal(snapshot(trainer), before)


def ppo(**options):
    return build("ppo", **(dict(dropout=False, minibatch_size=4, ppo_epochs=1) | options))


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "values", "entropy", "kl"])
def test_what_a_model_says_that_is_no_number_is_named_and_trains_nothing(name, monkeypatch):
    trainer, check = ppo(), PPOTrainer.check

    def broken(self, columns):
        columns[name][1, 0] = math.nan
        check(self, columns)

    monkeypatch.setattr(PPOTrainer, "check", broken)
    before = snapshot(trainer)
    with pytest.raises(FloatingPointError, match=f"step 1: {name} is nan at row 1, token 0"):
        trainer.train()
    assert equal(snapshot(trainer), before)


def test_an_estimate_of_kl_below_zero_is_named():
    trainer = ppo(kl_estimator="k3")
    kl = torch.tensor([[0.0, 1.0], [0.5, -0.1]])
    with pytest.raises(FloatingPointError, match=r"k3 is -0\.1\d* < 0 at row 1, token 1"):
        trainer.check({"kl": kl})
    ppo(kl_estimator="k1").check({"kl": kl})


@pytest.mark.parametrize("dropout", [False, True])
def test_a_policy_that_moves_between_rollout_and_update_is_found_before_it_trains(
    dropout, monkeypatch
):
    """Row 2; with dropout the policy is never the same twice."""
    trainer, predict = ppo(dropout=dropout), PPOTrainer.predict

    def then_moves(self, rollout):
        columns = predict(self, rollout)
        with torch.no_grad():
            self.model.trunk.embed.weight.mul_(1.5)
        return columns

    monkeypatch.setattr(PPOTrainer, "predict", then_moves)
    critic = {name: x.clone() for name, x in trainer.critic.state_dict().items()}
    if dropout:
        trainer.step(trainer.examples[:4])
        return
    with pytest.raises(
        FloatingPointError, match=r"first minibatch has ratio .* not 1 and 0; nothing updated"
    ):
        trainer.step(trainer.examples[:4])
    assert equal([trainer.critic.state_dict()], [critic])


def test_later_minibatches_may_have_any_ratio():
    assert abs(ppo(minibatch_size=1, ppo_epochs=3, lr=0.1).train()[0]["val/ratio"] - 1) > 0.01


def test_an_exception_of_the_reward_names_the_row_that_raises():
    def reward(prompts, responses):
        return [1 / (prompt[0] - 8) for prompt in prompts]

    prompts = [[9], [7], [8], [10]]
    with pytest.raises(
        RuntimeError, match=r"ZeroDivisionError.* on row 2 alone: prompt \[8\]"
    ) as raised:
        ppo(others=dict(reward=reward), examples=prompts).step(prompts)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)

    def together(prompts, responses):
        return [float(4 // (2 - len(prompts) // 2))] * len(prompts)

    with pytest.raises(RuntimeError, match="on all 4 rows at once, on no row alone"):
        ppo(others=dict(reward=together), examples=prompts).step(prompts)


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
