"""What a run checks: a failing step names itself, the row and the likely causes,
and saves its state."""

import json
import math

import pytest
import torch
from helpers import snapshot, tiny
from torch.testing import assert_close

from rlhf_core.data import Example
from rlhf_core.models.safetensors import read_tensors
from rlhf_core.policy_gradient import trainer as policy_gradient
from rlhf_core.trainers import PPOConfig, PPOTrainer, SFTConfig, SFTTrainer
from rlhf_core.training.checkpoint import find

PROMPTS = [[5], [6], [7], [8], [9], [10], [5, 6], [7, 8]]
NAN = math.nan


def ppo(out=None, reward=lambda prompts, responses: [1.0] * len(prompts), **config):
    settings = (
        dict(batch_size=4, minibatch_size=2, ppo_epochs=2, response_length=5, lr=1e-3) | config
    )
    return PPOTrainer(tiny(), PROMPTS, PPOConfig(**settings), reward=reward, out=out)


def weights(trainer):
    return [snapshot(model) for model in trainer.trained_models()]


class Failing:
    """A reward that works for one step and then fails as `fail` does."""

    def __init__(self, fail):
        self.calls, self.fail = 0, fail

    def __call__(self, prompts, responses):
        self.calls += 1
        scores = [1.0] * len(prompts)
        return scores if self.calls == 1 else self.fail(scores)


def raising(error):
    def fail(scores):
        raise error

    return fail


def negative(trainer, monkeypatch):
    real = policy_gradient.kl_estimate
    monkeypatch.setattr(
        policy_gradient, "kl_estimate", lambda *args, **kwargs: real(*args, **kwargs) - 0.5
    )


def moving(trainer, monkeypatch):
    predict = trainer.predict

    def then_moves(rollout):
        columns = predict(rollout)
        with torch.no_grad():
            trainer.model.trunk.embed.weight.mul_(1.5)
        return columns

    monkeypatch.setattr(trainer, "predict", then_moves)


def diverging(trainer, monkeypatch):
    """The policy's weights turn NaN after the rollout, in the middle of the updates."""
    optimize, calls = trainer.optimize, []

    def then_breaks(*arguments):
        norm = optimize(*arguments)
        calls.append(norm)
        if len(calls) == 2:
            with torch.no_grad():
                trainer.model.trunk.embed.weight[7] = NAN
        return norm

    monkeypatch.setattr(trainer, "optimize", then_breaks)


# What fails: the reward, or something done to the trainer after its first step; the error and what
# its message says.
FAILURES = {
    "a score that is NaN": (
        lambda scores: [*scores[:2], NAN, 1.0],
        ValueError,
        r"reward of row 2 is nan; prompt \[",
    ),
    "too few scores": (lambda scores: scores[1:], ValueError, "returned 3 rows for 4 responses"),
    "a reward that raises": (
        raising(OSError("offline")),
        RuntimeError,
        r"OSError.*row 0 alone: prompt \[\d",
    ),
    "k3 below zero": (
        negative,
        FloatingPointError,
        r"k3 is -0\.\d+ < 0 at row 0, token 0.*RLHF_CORE_BACKEND",
    ),
    "a policy that moves": (
        moving,
        FloatingPointError,
        r"ratio .*not 1 and 0; no weight was updated. Likely causes: the",
    ),
    "weights that diverge": (
        diverging,
        FloatingPointError,
        r"logprobs is nan at row \d, token \d: the weights have",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_step_names_itself_its_row_and_likely_causes_and_saves_the_state(
    failure, tmp_path, monkeypatch
):
    fail, error, message = FAILURES[failure]
    done_to_trainer = fail in (negative, moving, diverging)
    trainer = ppo(
        tmp_path, kl_estimator="k3", **({} if done_to_trainer else dict(reward=Failing(fail)))
    )
    step, before = trainer.step, []

    def watched(batch):
        if trainer.steps_done == 1:
            before.extend(weights(trainer))
            if done_to_trainer:
                fail(trainer, monkeypatch)
        return step(batch)

    monkeypatch.setattr(trainer, "step", watched)
    with pytest.raises(
        error, match=rf"(?s)^step 2: .*{message}.*; the state is saved in .*checkpoint-error$"
    ):
        trainer.train()
    header, tensors = read_tensors(tmp_path / "checkpoint-error" / "state.safetensors")
    assert json.loads(header["run"])["steps_done"] == trainer.steps_done == 1
    assert not find(tmp_path)
    if not done_to_trainer:  # nothing was trained on a bad reward
        assert_close(weights(trainer), before, rtol=0, atol=0)
        assert torch.equal(tensors["weight:0.trunk.embed.weight"], trainer.model.trunk.embed.weight)


def test_an_evaluation_that_fails_saves_the_state_before_it(tmp_path, monkeypatch):
    row = Example([1, 2], [3])
    settings = dict(batch_size=1, max_steps=1, save_every=1)
    trainer = SFTTrainer(tiny(), [row], SFTConfig(**settings), eval_examples=[row], out=tmp_path)
    monkeypatch.setattr(trainer, "evaluate", lambda: raising(ValueError("no"))(None))
    with pytest.raises(ValueError, match=r"step 1: no; the state is saved in .*checkpoint-error$"):
        trainer.train()
    header, _ = read_tensors(tmp_path / "checkpoint-error" / "state.safetensors")
    assert json.loads(header["run"])["steps_done"] == 1


def test_any_other_error_saves_the_state_and_keeps_its_type(tmp_path, monkeypatch):
    class Power(Exception):
        pass

    error = Power("out")
    trainer = ppo(tmp_path)
    monkeypatch.setattr(trainer, "step", lambda batch: raising(error)(batch))
    with pytest.raises(Power) as caught:
        trainer.train()
    assert caught.value is error and (tmp_path / "checkpoint-error").exists()


def test_without_a_folder_the_error_names_the_step_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"step 1: the reward of row 0 is nan; prompt [^;]*$"):
        ppo(reward=lambda prompts, responses: [NAN] * len(prompts)).train()
    assert not list(tmp_path.iterdir())


def test_data_without_a_token_to_learn_is_refused():
    def trainer(examples):
        return SFTTrainer(tiny(), examples, SFTConfig(lr=1e-2, batch_size=2))

    # All masked; no token before the first one; empty.
    masked = [Example([5], [6, 2], [False, False]), Example([], [6]), Example([5], [])]
    message = "none of the 3 examples has a token to learn: every completion is masked"
    with pytest.raises(ValueError, match=message):
        trainer(masked)
    with pytest.raises(ValueError, match="there are no examples to train on"):
        trainer([])
    history = trainer([*masked, Example([5], [6, 2], [False, True])]).train()
    assert sum(line["num_tokens"] for line in history) == 1
    assert all(math.isfinite(value) for line in history for value in line.values())
