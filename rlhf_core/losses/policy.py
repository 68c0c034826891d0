"""PPO's clipped losses per token (Schulman et al. 2017). Reduction is the caller's: see `masking.loss_weights`."""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # e^20 is far beyond any clip range; e^89 would overflow and make 0 * inf of a zero advantage


class PolicyStats(NamedTuple):
    """All (B, R), detached, 0 where the mask is False."""

    ratio: Tensor
    approx_kl: Tensor  # estimate of KL(old || new): ratio - 1 - log_ratio (Schulman 2020, k3)
    clipped: Tensor  # 1 where the clipped branch is the larger loss


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float
) -> tuple[Tensor, PolicyStats]:
    """Clipped surrogate loss (B, R) of each token, eq. 7, and its statistics; 0 where the mask is False.

    Args:
        logprobs, old_logprobs: (B, R) of the current policy and of the one that sampled, nats.
        advantages: (B, R).
        mask: (B, R) bool, True where a token counts.
        clip_range: half-width of the ratio's interval around 1, > 0.
    """
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0)
    advantages = advantages.masked_fill(~mask, 0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(unclipped, clipped)  # on a tie, ratio 1 for one, both halves of the gradient flow
    with torch.no_grad():
        stats = PolicyStats(
            ratio.masked_fill(~mask, 0),
            (ratio - 1 - log_ratio).clamp_min(0),
            (clipped > unclipped).float(),
        )
    return loss, stats


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Half the squared error (B, R) of the worse of the value and its clipped form, and where clipping bound.

    The value may move `clip_range` away from `old_values` before it stops being rewarded, as in PPO's first release
    (openai/baselines ppo2). All tensors (B, R); 0 where the mask is False.
    """
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    unclipped, clipped = (values - returns) ** 2, (near - returns) ** 2
    return torch.maximum(unclipped, clipped) / 2, (clipped > unclipped).float()
