"""CISPO (MiniMax-M1 2025): REINFORCE with clipped importance weights."""

from torch import Tensor

from rlhf_core.ops.policy_loss import MAX_LOG_RATIO


def cispo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_ranges: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """-sg(clip(ratio, 1 - low, 1 + high)) A log p per token (MiniMax-M1, eq. 4 and 5).

    The clip bounds a token's weight, and not its gradient: PPO's clipped tokens learn nothing,
    these still do.

    Args:
        logprobs: (B, R), nats, of the policy, with gradient.
        old_logprobs, advantages: (B, R), fixed.
        mask: (B, R) bool, True where a token counts; elsewhere inputs may hold anything.
        clip_ranges: (low, high); a low of at least 1 never clips.

    Returns:
        The loss (B, R), 0 where the mask is False; and (B, R) bool, whether the weight is clipped.
    """
    logprobs, old_logprobs, advantages = (
        x.masked_fill(~mask, 0) for x in (logprobs, old_logprobs, advantages)
    )
    low, high = clip_ranges
    log_ratio = logprobs.detach() - old_logprobs
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weights = ratio.clamp(1 - low, 1 + high)
    return -weights * advantages * logprobs, weights != ratio
