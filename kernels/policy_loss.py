"""PPO's loss in Triton: gradients, loss and statistics in one pass and one launch.

The formulas are those of `rlhf_core.ops.policy_loss`. A program handles a block of tokens. For the
mean of sequence means it handles a whole row and first counts its length. It stores the gradients
and its sums; the last program to arrive adds up all sums. The number of tokens is known only then,
so the gradients lack that factor, which is returned as `scale`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_core.kernels.arrival import arrives_last, counter
from rlhf_core.kernels.kl import SERIES_BELOW, k3_series

MAX_LOG_RATIO = tl.constexpr(20.0)
# Sums of a program: the statistics in their order, then the loss, then its share of the divisor.
COUNT, LOSS, DIVISOR, NUM_SUMS = (tl.constexpr(n) for n in (9, 10, 11, 16))
BLOCK = 512


@triton.jit
def _max(a, b):
    """max(a, b), and its gradients with respect to a and b: half each on a tie, as in torch."""
    from_a = tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))
    return tl.where((a > b) | (a != a), a, b), from_a, 1.0 - from_a


@triton.jit
def _finish(sums_ptr, loss_ptr, scale_ptr, stats_ptr, BLOCK: tl.constexpr):
    """Add up the sums (NUM_SUMS, programs) of all programs and store the results."""
    num_programs = tl.num_programs(0)
    lanes = tl.arange(0, NUM_SUMS)
    row_ptr = sums_ptr + lanes.to(tl.int64)[:, None] * num_programs
    parts = tl.zeros([NUM_SUMS, BLOCK], tl.float32)
    for start in range(0, num_programs, BLOCK):
        program = start + tl.arange(0, BLOCK)[None, :]
        inside = program < num_programs
        parts += tl.load(row_ptr + program, mask=inside, other=0.0, cache_modifier=".cg")
    sums = tl.sum(parts, 1)
    count = tl.sum(tl.where(lanes == COUNT, sums, 0.0), 0)
    scale = tl.div_rn(1.0, tl.maximum(tl.sum(tl.where(lanes == DIVISOR, sums, 0.0), 0), 1.0))
    tl.store(scale_ptr, scale)
    tl.store(loss_ptr, tl.sum(tl.where(lanes == LOSS, sums, 0.0), 0) * scale)
    means = tl.where(lanes == COUNT, sums, sums / tl.maximum(count, 1.0))
    tl.store(stats_ptr + lanes, means, mask=lanes <= COUNT)


@triton.jit(do_not_specialize=["n", "length"])
def ppo_loss_fwd_kernel(
    logprobs_ptr, old_logprobs_ptr, advantages_ptr, values_ptr, old_values_ptr, returns_ptr,
    entropy_ptr, mask_ptr, weights_ptr, loss_ptr, scale_ptr, stats_ptr,
    dlogprobs_ptr, dvalues_ptr, dentropy_ptr, sums_ptr, counter_ptr,
    n, length, ratio_min, ratio_max, value_clip_range, vf_coef, entropy_coef, dual_clip,
    SEQUENCE_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    begin = program * length
    end = tl.minimum(begin + length, n)
    cols = tl.arange(0, BLOCK)
    share = 1.0  # weight of a token
    if SEQUENCE_MEAN:
        tokens = 0
        for start in range(begin, end, BLOCK):
            at = start + cols
            tokens += tl.sum((tl.load(mask_ptr + at, mask=at < end, other=0) != 0).to(tl.int32), 0)
        share = tl.div_rn(1.0, tl.maximum(tokens, 1).to(tl.float32))

    lanes = tl.arange(0, NUM_SUMS)
    sums = tl.zeros([NUM_SUMS], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + cols
        inside = at < end
        counted = tl.load(mask_ptr + at, mask=inside, other=0) != 0
        weight = share
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + at, mask=counted, other=0.0)
        weight = tl.where(counted, weight, 0.0)

        log_ratio = tl.load(logprobs_ptr + at, mask=counted, other=0.0)
        log_ratio -= tl.load(old_logprobs_ptr + at, mask=counted, other=0.0)
        A = tl.load(advantages_ptr + at, mask=counted, other=0.0)
        capped = tl.where(log_ratio > MAX_LOG_RATIO, MAX_LOG_RATIO, log_ratio)
        capped = tl.where(capped < -MAX_LOG_RATIO, -MAX_LOG_RATIO, capped)
        ratio = tl.exp(capped)
        clamped = tl.where(ratio < ratio_min, ratio_min, ratio)
        clamped = tl.where(ratio > ratio_max, ratio_max, clamped)
        unclipped, clipped = -A * ratio, -A * clamped
        policy, from_unclipped, from_clipped = _max(unclipped, clipped)
        passes = from_unclipped + tl.where(clamped == ratio, from_clipped, 0.0)
        dpolicy = tl.where(capped == log_ratio, unclipped * passes, 0.0)
        dual_clipped = tl.zeros([BLOCK], tl.int1)
        if dual_clip is not None:
            dual_clipped = (A < 0) & (policy > -A * dual_clip)
            policy = tl.where(dual_clipped, -A * dual_clip, policy)
            dpolicy = tl.where(dual_clipped, 0.0, dpolicy)
        tl.store(dlogprobs_ptr + at, tl.where(counted, dpolicy * weight, 0.0), mask=inside)
        loss = policy

        value = tl.zeros([BLOCK], tl.float32)
        value_clipped = tl.zeros([BLOCK], tl.int1)
        if values_ptr is not None:
            v = tl.load(values_ptr + at, mask=counted, other=0.0)
            target = tl.load(returns_ptr + at, mask=counted, other=0.0)
            value, dvalue = (v - target) * (v - target), v - target
            if value_clip_range is not None:
                old = tl.load(old_values_ptr + at, mask=counted, other=0.0)
                bound = tl.where(v > old + value_clip_range, old + value_clip_range, v)
                bound = tl.where(v < old - value_clip_range, old - value_clip_range, bound)
                near = bound - target
                value_clipped = near * near > value
                value, from_far, from_near = _max(value, near * near)
                dvalue = dvalue * from_far + tl.where(bound == v, near * from_near, 0.0)
            value *= 0.5
            loss += vf_coef * value
            dvalue = tl.where(counted, vf_coef * dvalue * weight, 0.0)
            tl.store(dvalues_ptr + at, dvalue, mask=inside)

        entropy = tl.zeros([BLOCK], tl.float32)
        if entropy_ptr is not None:
            entropy = tl.load(entropy_ptr + at, mask=counted, other=0.0)
            loss -= entropy_coef * entropy
            tl.store(dentropy_ptr + at, -entropy_coef * weight, mask=inside)

        direct = ratio - 1 - log_ratio
        direct = tl.where(direct < 0, 0.0, direct)  # rounding only; unlike maximum(), keeps NaN
        approx_kl = tl.where(tl.abs(log_ratio) < SERIES_BELOW, k3_series(-log_ratio), direct)
        one = counted.to(tl.float32)
        sums += tl.where(lanes == 0, tl.sum(policy, 0), 0.0)
        sums += tl.where(lanes == 1, tl.sum(value, 0), 0.0)
        sums += tl.where(lanes == 2, tl.sum(entropy, 0), 0.0)
        sums += tl.where(lanes == 3, tl.sum(approx_kl, 0), 0.0)
        sums += tl.where(lanes == 4, tl.sum((clipped > unclipped).to(tl.float32), 0), 0.0)
        sums += tl.where(lanes == 5, tl.sum(value_clipped.to(tl.float32), 0), 0.0)
        sums += tl.where(lanes == 6, tl.sum(ratio * one, 0), 0.0)
        sums += tl.where(lanes == 7, tl.sum(ratio * ratio * one, 0), 0.0)
        sums += tl.where(lanes == 8, tl.sum(dual_clipped.to(tl.float32), 0), 0.0)
        sums += tl.where(lanes == COUNT, tl.sum(one, 0), 0.0)
        sums += tl.where(lanes == LOSS, tl.sum(loss * weight, 0), 0.0)
    if weights_ptr is None:
        divisor = tl.sum(tl.where(lanes == COUNT, sums, 0.0), 0)
        if SEQUENCE_MEAN:
            divisor = tl.minimum(divisor, 1.0)
        sums = tl.where(lanes == DIVISOR, divisor, sums)
    tl.store(sums_ptr + program + lanes.to(tl.int64) * tl.num_programs(0), sums)

    if arrives_last(counter_ptr):
        _finish(sums_ptr, loss_ptr, scale_ptr, stats_ptr, BLOCK // NUM_SUMS)


def ppo_loss_fwd(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor,
    weights: Tensor | None,
    sequence_mean: bool,
    clip_low: float,
    clip_high: float,
    value_clip_range: float | None,
    vf_coef: float,
    entropy_coef: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(loss (), scale (), stats (10,), dlogprobs, dvalues or None, dentropy or None).

    All inputs are contiguous (B, T). Multiply the gradients by `scale`: 1 with `weights`, otherwise
    one over the number of counted tokens, or of sequences that have any. A CUDA graph keeps the
    coefficients of its capture.
    """
    B, T = logprobs.shape
    by_row = sequence_mean and weights is None
    length = T if by_row else BLOCK
    num_programs = max(1, B if by_row else triton.cdiv(B * T, BLOCK))  # 1 stores an empty loss
    loss, scale, stats, sums = (
        torch.empty(shape, dtype=torch.float32, device=logprobs.device)
        for shape in ((), (), (COUNT.value + 1,), (NUM_SUMS.value, num_programs))
    )
    dlogprobs, dvalues, dentropy = (
        None if x is None else torch.empty_like(x) for x in (logprobs, values, entropy)
    )
    with torch.cuda.device_of(logprobs):
        ppo_loss_fwd_kernel[(num_programs,)](
            logprobs, old_logprobs, advantages, values, old_values, returns, entropy,
            mask.view(torch.uint8), weights, loss, scale, stats,
            dlogprobs, dvalues, dentropy, sums, counter(logprobs), B * T, length,
            1 - clip_low, 1 + clip_high, value_clip_range, vf_coef, entropy_coef, dual_clip,
            SEQUENCE_MEAN=by_row, BLOCK=BLOCK,
        )  # fmt: skip
    return loss, scale, stats, dlogprobs, dvalues, dentropy
