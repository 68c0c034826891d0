"""What is checked as a run goes: a failing step names itself, the row and the likely causes, and leaves its state."""

import json
import math

import pytest
import torch

from rlhf_core.data import Example
from rlhf_core.models import Transformer, TransformerConfig
from rlhf_core.models.safetensors import read_tensors
from rlhf_core.trainers import PPOConfig, PPOTrainer, SFTConfig, SFTTrainer, on_policy

PROMPTS = [[5], [6], [7], [8], [9], [10], [5, 6], [7, 8]]
NAN = math.nan


def tiny():
    torch.manual_seed(0)
    sizes = dict(vocab_size=12, hidden_size=16, num_layers=2, num_heads=2, max_positions=32)
    return Transformer(TransformerConfig(**sizes, eos_ids=(2,), pad_id=0))


def ppo(out=None, reward=lambda prompts, responses: [1.0] * len(prompts), **config):
    settings = (
        dict(batch_size=4, minibatch_size=2, ppo_epochs=2, response_length=5, lr=1e-3) | config
    )
    return PPOTrainer(tiny(), PROMPTS, PPOConfig(**settings), reward=reward, out=out)


def snapshot(trainer):
    return [x.clone() for model in trainer.trained_models() for x in model.state_dict().values()]


class Failing:
    """A reward that is fine for one step, and then does what it is told with the row whose prompt is `row`."""

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
    real = on_policy.kl_estimate
    monkeypatch.setattr(
        on_policy, "kl_estimate", lambda *args, **kwargs: real(*args, **kwargs) - 0.5
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

    def then_breaks(losses):
        norm = optimize(losses)
        calls.append(norm)
        if len(calls) == 2:
            with torch.no_grad():
                trainer.model.trunk.embed.weight[7] = NAN
        return norm

    monkeypatch.setattr(trainer, "optimize", then_breaks)


FAILURES = {  # of the reward, or done to the trainer after its first step; the error's type, what it says
    "a score that is NaN": (lambda scores: [*scores[:2], NAN, 1.0], ValueError, r"reward of row 2 is nan; prompt \["),
    "scores of another number": (lambda scores: scores[1:], ValueError, "returned 3 rows for 4 responses"),
    "a reward that raises": (raising(OSError("offline")), RuntimeError, r"OSError.*row 0 alone: prompt \[\d"),
    "k3 below zero": (negative, FloatingPointError, r"k3 is -0\.\d+ < 0 at row 0, token 0: .*RLHF_CORE_BACKEND"),
    "a policy that moves": (moving, FloatingPointError, r"ratio .*not 1 and 0; nothing updated. Likely causes: the"),
    "weights that diverge": (diverging, FloatingPointError, r"logprobs is nan at row \d, token \d: the weights have"),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_step_names_itself_row_and_causes_and_leaves_its_state(
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
            before.extend(snapshot(trainer))
            if done_to_trainer:
                fail(trainer, monkeypatch)
        return step(batch)

    monkeypatch.setattr(trainer, "step", watched)
    with pytest.raises(
        error, match=rf"(?s)^step 2: .*{message}.*; the state is in .*checkpoint-error$"
    ):
        trainer.train()
    header, tensors = read_tensors(tmp_path / "checkpoint-error")
    assert json.loads(header["run"])["steps_done"] == trainer.steps_done == 1
    assert not (tmp_path / "checkpoint").exists()
    if not done_to_trainer:  # and nothing was trained on it
        assert all(torch.equal(x, y) for x, y in zip(snapshot(trainer), before, strict=True))
        assert torch.equal(tensors["weight:0.trunk.embed.weight"], trainer.model.trunk.embed.weight)


def test_an_evaluation_that_fails_leaves_the_state_of_the_step_before_it(tmp_path, monkeypatch):
    row = Example([1, 2], [3])
    settings = dict(batch_size=1, max_steps=1, save_every=1)
    trainer = SFTTrainer(tiny(), [row], SFTConfig(**settings), eval_examples=[row], out=tmp_path)
    monkeypatch.setattr(trainer, "evaluate", lambda: raising(ValueError("no"))(None))
    with pytest.raises(ValueError, match=r"step 1: no; the state is in .*checkpoint-error$"):
        trainer.train()
    assert json.loads(read_tensors(tmp_path / "checkpoint-error")[0]["run"])["steps_done"] == 1


def test_an_error_of_any_other_kind_leaves_the_state_and_stays_what_it_was(tmp_path, monkeypatch):
    class Power(Exception):
        pass

    error = Power("out")
    trainer = ppo(tmp_path)
    monkeypatch.setattr(trainer, "step", lambda batch: raising(error)(batch))
    with pytest.raises(Power) as caught:
        trainer.train()
    assert caught.value is error and (tmp_path / "checkpoint-error").exists()


def test_without_a_folder_the_step_is_named_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"step 1: the reward of row 0 is nan; prompt [^;]*$"):
        ppo(reward=lambda prompts, responses: [NAN] * len(prompts)).train()
    assert not list(tmp_path.iterdir())


def test_data_without_a_token_to_learn_is_refused():
    def trainer(examples):
        return SFTTrainer(tiny(), examples, SFTConfig(lr=1e-2, batch_size=2))

    masked = [
        Example([5], [6, 2], [False, False]),
        Example([], [6]),
        Example([5], []),
    ]  # no prompt: nothing precedes
    with pytest.raises(
        ValueError, match="none of the 3 examples has a token to learn: every completion is masked"
    ):
        trainer(masked)
    with pytest.raises(ValueError, match="there are no examples to train on"):
        trainer([])
    history = trainer([*masked, Example([5], [6, 2], [False, True])]).train()
    assert sum(line["num_tokens"] for line in history) == 1
    assert all(math.isfinite(value) for line in history for value in line.values())
