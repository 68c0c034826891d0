"""A2C: one unclipped step of the policy gradient per rollout."""

import pytest
import torch
from helpers import (
    PROMPTS,
    experience_of,
    fives,
    forward,
    gradients,
    input_shapes,
    rollout_of,
    snapshot,
    tiny,
)
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(critic="head"),
        dict(kl_in="loss", kl_estimator="full", kl_coef=0.1),
        dict(critic_warmup_steps=1),
        dict(critic="head", critic_warmup_steps=1),
        dict(importance_cap=1.01),
    ],
    ids=str,
)
def test_the_update_trains_through_the_pass_of_the_predictions(options):
    """Its numbers are those of further passes through policy and critic, which it saves."""
    results, counts = [], []
    for one_pass in (True, False):
        torch.manual_seed(5)
        config = A2CConfig(
            batch_size=8, response_length=6, temperature=1.0, lr=1e-3, max_steps=3, **options
        )
        trainer = A2CTrainer(tiny(), PROMPTS * 3, config, reward=fives)
        predict = trainer.predict

        def predict_only(rollout, trainer=trainer, predict=predict):
            predictions, trainer.held = predict(rollout), None
            return predictions

        if not one_pass:
            trainer.predict = predict_only
        trunks = {trainer.model.trunk, trainer.critic.trunk}
        shapes = [input_shapes(trunk) for trunk in trunks]
        history = [trainer.step(PROMPTS) for _ in range(3)]
        assert trainer.held is None
        weights = [snapshot(trainer.model), snapshot(trainer.critic)]
        results.append((history, weights))
        counts.append(sum(map(len, shapes)))
    for report, other in zip(*(history for history, _ in results)):
        for name in report.keys() - {"eps"}:
            assert report[name] == pytest.approx(other[name], rel=1e-4, abs=2e-6), name
    assert_close(*(weights for _, weights in results), rtol=0, atol=1e-6)
    # Without a run around the steps, a warm-up of the critic does not end. It saves nothing.
    steps = 0 if "critic_warmup_steps" in options else 3
    assert counts[1] - counts[0] == steps * len(trunks)


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
