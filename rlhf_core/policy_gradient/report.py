"""The metrics of a policy-gradient step."""

from __future__ import annotations

from torch import Tensor

from rlhf_core.feedback.rewards import scores_of
from rlhf_core.masking import masked_mean
from rlhf_core.ops import kl_estimate
from rlhf_core.ops.policy_loss import PPOLossStats
from rlhf_core.policy_gradient.experience import Predictions
from rlhf_core.rollout import Rollout
from rlhf_core.training.metrics import Metrics

POLICY_STATISTICS = {  # metric -> field of PPOLossStats
    "policy/approxkl_avg": "approx_kl",
    "policy/clipfrac_avg": "clip_frac",
    "policy/entropy_avg": "entropy",
    "policy/dual_clipfrac_avg": "dual_clip_frac",
    "val/ratio": "ratio",
    "ratio_squared": "ratio_squared",
}
VALUE_STATISTICS = {"val/clipfrac_avg": "value_clip_frac"}


def add_statistics(metrics: Metrics, stats: PPOLossStats, names: dict[str, str]) -> None:
    """Add the named statistics of a loss, weighted by its tokens."""
    for name, field in names.items():
        metrics.add_mean(name, getattr(stats, field), stats.count)


def add_objectives(
    metrics: Metrics,
    rollout: Rollout,
    predictions: Predictions,
    rewards: Tensor,
    shaped: Tensor,
    kl_weight: float,
) -> None:
    """Add the sums over each response: KL, entropy, rewards, length.

    kl_weight: of the KL in the reward, at most 0.
    """
    mask = rollout.response_mask
    kl = kl_estimate(predictions.logprobs, predictions.ref_logprobs, mask=mask)
    kl_reward = predictions.kl.sum(dim=1) * kl_weight
    for name, values in {
        "objective/kl": kl.sum(dim=1),
        "objective/entropy": predictions.entropy.sum(dim=1),
        "objective/non_score_reward": kl_reward,
        "objective/rlhf_reward": scores_of(shaped) + kl_reward,
        "objective/scores": scores_of(rewards),
        "response_length": mask.sum(dim=1).float(),
    }.items():
        metrics.add(name, values)


def add_importance(
    metrics: Metrics, ratio: Tensor, weight: Tensor, mask: Tensor, floor: float, cap: float
) -> None:
    """Add the importance weights, and the shares of ratios beyond the bounds.

    ratio, weight: (B, R) with the mask of the response tokens, or (B, 1), one for a response.
    """
    if ratio.shape[1] == 1:
        mask = mask.any(dim=1, keepdim=True)
    for name, values in {
        "importance/weight": weight,
        "weight_squared": weight**2,
        "importance/above_cap": ratio > cap,
        "importance/below_floor": ratio < floor,
    }.items():
        metrics.add(name, values, mask)


def rollout_mismatch(rollout: Rollout, predictions: Predictions) -> dict[str, float]:
    """Difference between the policy that sampled and the one in training, before its updates.

    In nats per token: the largest and the mean difference of log-probs, and the KL of the first to
    the second by k3.
    """
    mask = rollout.response_mask
    difference = (predictions.logprobs - rollout.logprobs).where(mask, 0).abs()
    kl = kl_estimate(rollout.logprobs, predictions.logprobs, estimator="k3", mask=mask)
    return {
        "val/rollout_mismatch": float(difference.max()),
        "val/rollout_mismatch_mean": float(masked_mean(difference, mask)),
        "val/rollout_kl": float(masked_mean(kl, mask)),
    }
