"""Generalised advantage estimation (Schulman et al. 2016, eq. 16) over masked sequences.

Reward r_t arrives after token t, and V_t is read before it. Over the counted tokens of a row:

    delta_t = r_t + gamma * V_{t+1} - V_t
    A_t     = delta_t + gamma * lam * A_{t+1}
    returns = A + V

Gaps in the mask are skipped, as if the row were compacted. After the last counted token A is 0 and
V is 0, or `last_values` for a row that was truncated rather than ended.

Sequences are rows of a (B, T) tensor, or packed: (N,) tokens, where sequence b is
[cu_seqlens[b], cu_seqlens[b + 1]). `ppo_advantages` does everything between the rollout and the PPO
epochs: rewards from KL and score, then the above, then whitening.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.checks import (
    at_least_float32,
    check_alike,
    check_float,
    check_mask,
    describe,
    resolve,
    values_may_be_read,
)
from rlhf_core.masking import last_token_index, whiten
from rlhf_core.ops.derivatives import gradients, needs_reference
from rlhf_core.ops.kl import check_estimator, kl_estimate


def gae_reference(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    last_values: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition: the recursion, column by column. Packed sequences are unpacked first."""
    if cu_seqlens is not None:
        rows = (unpack(x, cu_seqlens) for x in (rewards, values, mask))
        out = gae_reference(*rows, gamma, lam, last_values, None)
        return tuple(pack(x, cu_seqlens, len(rewards)) for x in out)
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    next_advantage = rewards.new_zeros(len(rewards))  # (B,)
    next_value = torch.zeros_like(next_advantage) if last_values is None else last_values
    columns = [rewards[:, :0]]  # so that cat has an input if T is 0
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
    def forward(ctx, impl, rewards, values, mask, gamma, lam, last_values, cu_seqlens):
        ctx.save_for_backward(mask, cu_seqlens)
        ctx.impl, ctx.gamma, ctx.lam = impl, gamma, lam
        ctx.has_last_values = last_values is not None
        ctx.num_sequences = len(rewards) if cu_seqlens is None else len(cu_seqlens) - 1
        return impl.gae_fwd(rewards, values, mask, gamma, lam, last_values, cu_seqlens)

    @staticmethod
    def backward(ctx, dadvantages, dreturns):
        mask, cu_seqlens = ctx.saved_tensors
        if needs_reference(dadvantages, dreturns):
            needs = *ctx.needs_input_grad[1:3], ctx.needs_input_grad[6]
            # The op is linear: its gradient is the same at any input, so at 0.
            tokens = torch.zeros_like(dreturns).requires_grad_()
            last_values = tokens.new_zeros(ctx.num_sequences, requires_grad=True)
            drewards, dvalues, dlast_values = gradients(
                lambda r, v, last: gae_reference(r, v, mask, ctx.gamma, ctx.lam, last, cu_seqlens),
                (tokens, tokens, last_values),
                needs,
                (dadvantages, dreturns),
            )
            return None, drewards, dvalues, None, None, None, dlast_values, None
        dadvantages, dreturns = dadvantages.contiguous(), dreturns.contiguous()
        drewards, dvalues, dlast_values = ctx.impl.gae_bwd(
            dadvantages, dreturns, mask, ctx.gamma, ctx.lam, ctx.has_last_values, cu_seqlens
        )
        return None, drewards, dvalues, None, None, None, dlast_values, None


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of every counted token.

    Args:
        rewards, values: (B, T) floats, or (N,) packed; masked positions may hold anything.
        response_mask: (B, T) or (N,) bool, True where a token counts, the EOS included.
        gamma, lam: discount and GAE's lambda, both in [0, 1].
        last_values: (B,) value after a row's last counted token; None: 0, the episode has ended.
        cu_seqlens: (B + 1,) integers for packed input: the start of each sequence and the end of
            the last. Tokens outside all sequences give 0.
        backend: "reference", "cpp", "triton", or None for the best one on the device.

    Returns:
        (advantages, returns), shaped like rewards, float32 (float64 for float64 input), exactly 0
        where the mask is False.

    Raises:
        ValueError or TypeError: with the offending value.
    """
    num_sequences, cu_seqlens = _check(
        {"rewards": rewards, "values": values}, response_mask, gamma, lam, cu_seqlens
    )
    if last_values is None:
        rewards, values = at_least_float32(rewards, values)
    else:
        check_float("last_values", last_values)
        _check_per_sequence("last_values", last_values, num_sequences, rewards)
        rewards, values, last_values = at_least_float32(rewards, values, last_values)
        last_values = last_values.contiguous()
    impl = resolve(backend, rewards, values, last_values)
    if impl is None:
        return gae_reference(rewards, values, response_mask, gamma, lam, last_values, cu_seqlens)
    rewards, values, mask = rewards.contiguous(), values.contiguous(), response_mask.contiguous()
    return _GAE.apply(
        impl, rewards, values, mask, float(gamma), float(lam), last_values, cu_seqlens
    )


class Advantages(NamedTuple):
    """The training signal of PPO, all (B, T) or (N,), exactly 0 where the mask is False."""

    advantages: Tensor
    returns: Tensor  # advantages before whitening, plus values
    rewards: Tensor  # -kl_coef * kl, and the score on the last counted token
    kl: Tensor  # per-token estimate of KL(policy || reference), nats


def ppo_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    response_mask: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str = "k1",
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = True,
    kl: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> Advantages:
    """Advantages, returns, rewards and KL of PPO for language models, from one pass.

    The formulas are in `ppo_advantages_unfused`, which runs if an input requires a gradient.

    Args:
        scores: (B,), one per sequence; ignored for a sequence without counted tokens. Or (B, T),
            one per token, which uses the unfused form.
        logprobs, ref_logprobs, values: (B, T) floats, or (N,) packed; logprobs in nats. Masked
            positions may hold anything.
        response_mask: (B, T) or (N,) bool, True where a token counts, the EOS included.
        kl_coef: weight of the KL penalty in the rewards; higher keeps the policy closer.
        kl_estimator: "k1", "k2", "k3" or "abs"; see `kl_estimate`.
        gamma, lam: discount and GAE's lambda, both in [0, 1].
        whiten: give the advantages mean 0 and variance 1 over all counted tokens. For a shard of a
            larger batch pass False, and whiten with the combined `masking.Moments`.
        kl: (B, T), for example from `full_kl`, replaces the estimate; uses the unfused form.
        cu_seqlens: (B + 1,) integers for packed input, see `gae`.
        backend: "reference", "cpp", "triton", or None for the best one on the device.

    Returns:
        `Advantages`, float32 (float64 for float64 input).

    Raises:
        ValueError or TypeError: with the offending value.
    """
    token_scores = {"scores": scores} if scores.ndim == 2 else {}
    tokens = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "values": values, **token_scores}
    if kl is not None:
        tokens["kl"] = kl
    num_sequences, cu_seqlens = _check(tokens, response_mask, gamma, lam, cu_seqlens)
    check_float("scores", scores)
    if not token_scores:
        _check_per_sequence("scores", scores, num_sequences, logprobs)
    check_estimator(kl_estimator)
    inputs = at_least_float32(scores, logprobs, ref_logprobs, values)
    impl = resolve(backend, *inputs, kl)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if impl is None or needs_grad or token_scores or kl is not None:
        settings = (kl_coef, kl_estimator, gamma, lam, whiten, kl, cu_seqlens, backend)
        return ppo_advantages_unfused(*inputs, response_mask, *settings)
    inputs = (x.contiguous() for x in (*inputs, response_mask))
    settings = (float(kl_coef), kl_estimator, float(gamma), float(lam), whiten, cu_seqlens)
    return Advantages(*impl.ppo_advantages_fwd(*inputs, *settings))


def ppo_advantages_unfused(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    kl_estimator: str,
    gamma: float,
    lam: float,
    whitened: bool,
    kl: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str | None,
) -> Advantages:
    """`ppo_advantages` in separate steps: its reference, and the version with a gradient."""
    if cu_seqlens is not None:
        rows = (unpack(x, cu_seqlens) for x in (logprobs, ref_logprobs, values, mask))
        kl = None if kl is None else unpack(kl, cu_seqlens)
        settings = (kl_coef, kl_estimator, gamma, lam, whitened, kl, None, backend)
        results = ppo_advantages_unfused(scores, *rows, *settings)
        return Advantages(*(pack(x, cu_seqlens, len(mask)) for x in results))
    if kl is None:
        kl = kl_estimate(logprobs, ref_logprobs, estimator=kl_estimator, mask=mask, backend=backend)
    else:
        kl = kl.to(logprobs.dtype).masked_fill(~mask, 0)
    rewards = -kl_coef * kl
    if scores.ndim == 2:
        rewards = rewards + scores.masked_fill(~mask, 0)
    elif rewards.numel():
        score = torch.where(mask.any(dim=1), scores, 0)[:, None]  # (B, 1)
        rewards = rewards.scatter_add(1, last_token_index(mask)[:, None], score)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam, backend=backend)
    return Advantages(whiten(advantages, mask) if whitened else advantages, returns, rewards, kl)


def unpack(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Packed (N,) as rows (B, T), T the longest sequence, padded with 0 or False."""
    index, inside = _layout(cu_seqlens)
    return x[index].masked_fill(~inside, 0)


def pack(x: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Rows (B, T) as packed (N,): the inverse of `unpack`, 0 outside all sequences."""
    index, inside = _layout(cu_seqlens)
    index = index.where(inside, num_tokens).flatten()  # padding goes to one extra element
    return x.new_zeros(num_tokens + 1).scatter(0, index, x.flatten())[:num_tokens]


def _layout(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each row position in the packed tensor, and whether it is a token, both (B, T)."""
    starts, lengths = cu_seqlens[:-1, None], cu_seqlens.diff()[:, None]
    t = torch.arange(int(lengths.max()) if len(lengths) else 0, device=cu_seqlens.device)
    inside = t < lengths
    return (starts + t).where(inside, 0), inside


def _check(
    tokens: dict[str, Tensor], mask: Tensor, gamma: float, lam: float, cu_seqlens: Tensor | None
):
    """Number of sequences, and cu_seqlens in the launchers' format; raises on invalid input."""
    (first_name, first), *_ = tokens.items()
    for name, x in tokens.items():
        check_float(name, x)
        check_alike(name, x, first_name, first)
    check_mask(first, mask, "response_mask")
    for name, x in (("gamma", gamma), ("lam", lam)):
        if not 0 <= x <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {x}")
    if first.ndim != (2 if cu_seqlens is None else 1):
        layout = "(B, T)" if cu_seqlens is None else "(N,) with cu_seqlens"
        raise ValueError(f"{first_name} must be {layout}, got {tuple(first.shape)}")
    if cu_seqlens is None:
        return len(first), None
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {describe(cu_seqlens)}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or cu_seqlens.device != first.device:
        raise ValueError(
            f"cu_seqlens must be (B + 1,) on {first.device}, "
            f"got {tuple(cu_seqlens.shape)} on {cu_seqlens.device}"
        )
    if values_may_be_read(cu_seqlens):
        bounds = [0, *cu_seqlens.tolist(), len(first)]
        if bounds != sorted(bounds):
            raise ValueError(
                f"cu_seqlens must rise from >= 0 to <= {len(first)}, got {cu_seqlens.tolist()}"
            )
    return len(cu_seqlens) - 1, cu_seqlens.to(torch.int64).contiguous()


def _check_per_sequence(name: str, x: Tensor, num_sequences: int, tokens: Tensor) -> None:
    if x.shape != (num_sequences,) or x.device != tokens.device:
        raise ValueError(
            f"{name} must be ({num_sequences},) on {tokens.device}, "
            f"got {tuple(x.shape)} on {x.device}"
        )
