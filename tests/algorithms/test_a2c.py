"""A2C: one unclipped step of the policy gradient per rollout."""

import pytest
import torch
from helpers import PROMPTS, experience_of, fives, forward, gradients, rollout_of, tiny
from torch.testing import assert_close

from rlhf_core.masking import masked_mean
from rlhf_core.trainers import A2CConfig, A2CTrainer


def test_a2c_is_one_step_of_the_policy_gradient():
    """Its gradient is that of -A log p and of the value error, with nothing clipped."""
    torch.manual_seed(5)
    config = A2CConfig(batch_size=8, response_length=6, temperature=1.0, lr=1e-3)
    trainer = A2CTrainer(tiny(), PROMPTS, config, reward=fives)
    rollout = rollout_of(trainer)
    old = experience_of(trainer, rollout)
    columns = trainer.predict(rollout)
    old = old._replace(
        old_logprobs=columns.logprobs, old_values=columns.values + 10
    )  # any clip would bind
    _, metrics, got = gradients(trainer, rollout, old)
    trainer.optimizer.zero_grad()
    found, mask = forward(trainer, rollout), rollout.response_mask
    error = (found.values - old.returns) ** 2 / 2
    masked_mean(-old.advantages * found.logprobs + 0.1 * error, mask).backward()
    assert_close(got, [p.grad for p in trainer.trained_parameters()], rtol=1e-4, atol=1e-6)
    assert metrics["policy/clipfrac_avg"] == metrics["val/clipfrac_avg"] == 0


def test_a2c_takes_one_optimiser_step_per_rollout_and_learns():
    config = A2CConfig(
        batch_size=32,
        response_length=6,
        temperature=1.0,
        lr=2e-2,
        lr_schedule="constant",
        kl_coef=0,
    )
    torch.manual_seed(5)
    trainer, steps = A2CTrainer(tiny(), PROMPTS * 100, config, reward=fives), []
    optimize = trainer.optimize
    trainer.optimize = lambda *arguments: steps.append(1) or optimize(*arguments)
    history = trainer.train()
    assert len(steps) == len(history) == 25
    assert history[-1]["objective/scores"] > history[0]["objective/scores"] + 2


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(ppo_epochs=2), "ppo_epochs must be 1 in A2C; otherwise use PPO, got 2"),
        (dict(minibatch_size=4), "minibatch_size must be None in A2C; otherwise use PPO, got 4"),
        (dict(dropout=True), "dropout must be False in A2C; otherwise use PPO, got True"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_what_would_make_it_ppo_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        A2CConfig(**options)
