"""Generalised advantage estimation (Schulman et al. 2016, eq. 16) over masked sequences.

Reward r_t arrives after token t and V_t is read before it. Over the counted tokens of a row, in order:

    delta_t = r_t + gamma * V_{t+1} - V_t
    A_t     = delta_t + gamma * lam * A_{t+1}
    returns = A + V

A gap in the mask is skipped as if the row were compacted. Beyond the last counted token A is 0 and V is 0, or
`last_values` for a row that was cut off rather than ended.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhf_core import backends
from rlhf_core.checks import at_least_float32, check_alike, check_float, check_mask


def gae_reference(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, last_values: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition: the recursion, one column at a time."""
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    next_advantage = rewards.new_zeros(len(rewards))  # (B,)
    next_value = torch.zeros_like(next_advantage) if last_values is None else last_values
    columns = [rewards[:, :0]]  # so that there is something to join where T is 0
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(counts, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(counts, values[:, t], next_value)
        columns.append(next_advantage[:, None])
    advantages = torch.cat(columns[::-1], dim=1)  # (B, T)
    advantages = advantages.masked_fill(~mask, 0)
    return advantages, advantages + values


class _GAE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, impl, rewards, values, mask, gamma, lam, last_values):
        ctx.save_for_backward(mask)
        ctx.impl, ctx.gamma, ctx.lam, ctx.has_last_values = impl, gamma, lam, last_values is not None
        return impl.gae_fwd(rewards, values, mask, gamma, lam, last_values)

    @staticmethod
    @once_differentiable
    def backward(ctx, dadvantages, dreturns):
        (mask,) = ctx.saved_tensors
        drewards, dvalues, dlast_values = ctx.impl.gae_bwd(
            dadvantages.contiguous(), dreturns.contiguous(), mask, ctx.gamma, ctx.lam, ctx.has_last_values
        )
        return None, drewards, dvalues, None, None, None, dlast_values


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every counted token.

    Args:
        rewards, values: (B, T) floats; masked positions may hold anything.
        response_mask: (B, T) bool, True where a token counts, the EOS included.
        gamma, lam: discount and GAE's lambda, both in [0, 1].
        last_values: (B,) value of the state after a row's last counted token; None means 0 (the episode ended).
        backend: "reference", "cpp", "triton", or None for the best one on the device.

    Returns:
        (advantages, returns), both (B, T) float32 (float64 for float64 input), exactly 0 where the mask is False.

    Raises:
        ValueError or TypeError with the offending values.
    """
    for name, x in (("rewards", rewards), ("values", values)):
        check_float(name, x)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be (B, T), got {tuple(rewards.shape)}")
    check_alike("values", values, "rewards", rewards)
    check_mask(rewards, response_mask, "response_mask")
    for name, x in (("gamma", gamma), ("lam", lam)):
        if not 0 <= x <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {x}")
    if last_values is None:
        rewards, values = at_least_float32(rewards, values)
    else:
        check_float("last_values", last_values)
        check_alike("last_values", last_values, "a column of rewards", rewards.new_empty(len(rewards)))
        rewards, values, last_values = at_least_float32(rewards, values, last_values)
        last_values = last_values.contiguous()
    impl = backends.resolve(backend, rewards)
    if impl is None:
        return gae_reference(rewards, values, response_mask, gamma, lam, last_values)
    rewards, values, mask = rewards.contiguous(), values.contiguous(), response_mask.contiguous()
    return _GAE.apply(impl, rewards, values, mask, float(gamma), float(lam), last_values)
