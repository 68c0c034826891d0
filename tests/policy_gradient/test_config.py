"""The options of methods that sample."""

import math
import warnings

import pytest

from rlhf_core.trainers import GRPOConfig, PPOConfig


def test_the_default_estimator_depends_on_where_the_kl_enters():
    assert PPOConfig().estimator == "k1" and PPOConfig(kl_in="loss").estimator == "k3"
    assert PPOConfig(kl_in="loss", kl_estimator="k2").estimator == "k2"


def test_sizes_of_rollout_and_update():
    assert (PPOConfig().rollout_size, PPOConfig().update_size) == (64, 16)
    assert PPOConfig(batch_size=6).update_size == 2 and PPOConfig(minibatch_size=5).update_size == 5
    grpo = GRPOConfig(batch_size=3, num_samples=4)
    assert grpo.rollout_size == grpo.update_size == 12 and grpo.one_update
    assert not GRPOConfig(ppo_epochs=2).one_update and not GRPOConfig(minibatch_size=8).one_update
    assert PPOConfig(clip_range=0.1).clip_ranges == (0.1, 0.1)
    assert PPOConfig(clip_range=0.1, clip_range_high=0.3).clip_ranges == (0.1, 0.3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=0), "temperature must be > 0, got 0"),
        (dict(ppo_epochs=0), "ppo_epochs must be at least 1, got 0"),
        (dict(response_length=0), "response_length must be at least 1, got 0"),
        (dict(max_prompt_length=0), "max_prompt_length must be at least 1, got 0"),
        (dict(clip_range=0), "clip_range must be > 0, got 0"),
        (dict(kl_coef=math.nan), "kl_coef must be at least 0 and finite, got nan"),
        (dict(minibatch_size=5, batch_size=4), "minibatch_size must be from 1 to 4, got 5"),
        (dict(reference_ema=1.0), r"reference_ema must be in \(0, 1\), got 1.0"),
        (
            dict(kl_in="loss", kl_estimator="abs"),
            "kl_estimator must be one with the KL's gradient when kl_in is loss, got 'abs'",
        ),
        (dict(dual_clip=1.0), "dual_clip must be > 1, got 1.0"),
        (dict(score_clip=0.0), "score_clip must be > 0, got 0.0"),
        (dict(whiten_scores="yes"), "whiten_scores must be one of none, batch, running, got 'yes'"),
        (dict(ptx_coef=-1.0), "ptx_coef must be at least 0, got -1.0"),
        (
            dict(kl_target=6.0, kl_horizon=63),
            "kl_horizon must be at least the rollout's 64 responses, got 63",
        ),
        (
            dict(overlong_buffer=9, response_length=8),
            "overlong_buffer must be at most response_length 8, got 9",
        ),
        (dict(importance_floor=0.0), "importance_floor must be > 0, got 0.0"),
        (
            dict(importance_cap=2.0, importance_floor=2.0),
            "importance_floor must be less than importance_cap 2.0, got 2.0",
        ),
        (dict(importance_level="word"), "importance_level must be one of token, sequence, got"),
        (dict(importance_mode="clip"), "importance_mode must be one of truncate, mask, got 'clip'"),
        (dict(length_penalty=math.nan), "length_penalty must be finite, got nan"),
        (dict(missing_eos_penalty=math.inf), r"missing_eos_penalty must be .*, got inf"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**options)


def test_clip_ranges_have_an_effect_with_dropout():
    """Dropout moves the ratio away from 1 already in the only update."""
    one_update = dict(ppo_epochs=1, minibatch_size=64, dropout=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PPOConfig(**one_update, clip_range=0.1, dual_clip=3.0, value_clip_range=0.3)
    with pytest.warns(UserWarning, match=r"^max_approx_kl=0\.1 has no effect with one update"):
        PPOConfig(**one_update, max_approx_kl=0.1)
