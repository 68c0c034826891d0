"""Shaping of rewards: penalties, scaling and clipping, and coefficients steered to a target."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_core.masking import Moments, last_token_index
from rlhf_core.policy_gradient.experience import Experience


class Coefficient:
    """A coefficient steered so that what it penalizes stays at a target (Ziegler et al. 2019, 2.2).

    value *= 1 + clip(measured / target - 1, +-0.2) * n / horizon after n responses. sign is -1 for
    the coefficient of a bonus.
    """

    def __init__(self, value: float, target: float | None, horizon: int, sign: int = 1):
        self.value, self.target, self.horizon, self.sign = value, target, horizon, sign

    def update(self, measured: float, n: int) -> None:
        if self.target is not None:
            error = min(max(measured / self.target - 1, -0.2), 0.2)
            self.value *= 1 + self.sign * error * n / self.horizon


def penalized(
    rewards: Tensor,
    mask: Tensor,
    ended: Tensor,
    *,
    length_penalty: float,
    missing_eos_penalty: float | None,
    overlong_buffer: int | None,
    response_length: int,
) -> Tensor:
    """Rewards minus the penalties for length, for a missing end and for too long a response.

    Args:
        rewards: (B,) or (B, R).
        mask: (B, R) bool, the response tokens.
        ended: (B,) bool, as in `Rollout`.
        overlong_buffer: the last penalty grows from 0 to 1 over this number of tokens before
            response_length (Yu et al. 2025, eq. 13).
    """
    lengths = mask.sum(dim=1)
    penalty = length_penalty * lengths
    if overlong_buffer is not None:
        beyond = lengths - (response_length - overlong_buffer)
        penalty = penalty + (beyond / overlong_buffer).clamp_min(0)
    if missing_eos_penalty is not None:
        penalty = penalty + missing_eos_penalty * ~ended
    return add_to_last(rewards, -penalty, mask)


def scaled(rewards: Tensor, mask: Tensor, moments: Moments, *, subtract_mean: bool) -> Tensor:
    """Rewards (B,) or (B, R) divided by the scores' standard deviation; by 1 if they are all equal.

    Args:
        mask: (B, R) bool, the response tokens.
        moments: of the scores.
        subtract_mean: also subtract the mean score from each response.
    """
    variance = moments.variance
    scale = torch.rsqrt(variance.where(variance > 0, 1)).float()
    if not subtract_mean:
        return rewards * scale
    mean = (moments.mean.float() * scale).expand(len(mask))
    return add_to_last(rewards * scale, -mean, mask)


def importance_ratio(
    logprobs: Tensor, sampled_logprobs: Tensor, mask: Tensor, level: str
) -> Tensor:
    """p(trained) / p(sampled): (B, R) of every token, or (B, 1) of the response at level sequence.

    Args:
        logprobs, sampled_logprobs: (B, R) log-probs in training and of the sampler.
        mask: (B, R) bool, the response tokens; elsewhere the ratio is 1.
    """
    log_ratio = (logprobs - sampled_logprobs).where(mask, 0)
    return (log_ratio.sum(dim=1, keepdim=True) if level == "sequence" else log_ratio).exp()


def importance_weight(ratio: Tensor, floor: float, cap: float, mode: str) -> Tensor:
    """The ratio within [floor, cap]: beyond, truncated to the bounds or, with mode mask, 0.

    Truncated: Yao et al. 2025 (TIS). Masked: Liu et al. 2025 (MIS), Zhao et al. 2025 (IcePop).
    """
    if mode == "truncate":
        return ratio.clamp(floor, cap)
    return ratio.where((ratio >= floor) & (ratio <= cap), 0)


def weighted(experience: Experience, weight: Tensor) -> Experience:
    """The experience with advantages times importance weights (B, R) or (B, 1)."""
    weight = weight.expand_as(experience.advantages)
    return experience._replace(advantages=experience.advantages * weight, importance=weight)


def add_to_last(rewards: Tensor, amounts: Tensor, mask: Tensor) -> Tensor:
    """Rewards (B,), or the last counted token's rewards of (B, R), plus amounts (B,)."""
    if rewards.ndim == 1:
        return rewards + amounts
    return rewards.scatter_add(1, last_token_index(mask)[:, None], amounts[:, None])
