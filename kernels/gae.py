"""Generalised advantage estimation in Triton: one program per sequence, one launch.

Every recursion here is affine, x' = a x + u, so associative scans along time compute it. A masked
position is the identity (a = 1, u = 0), so skipping gaps costs nothing. The forward scan runs back
in time over reversed indices, because `associative_scan(reverse=True)` gives wrong results (triton
issue 4362). The backward pass is the adjoint and scans forwards. A token gets values of its counted
neighbour from a scan over inputs loaded one position further on. For sequences longer than a block,
the state is carried from block to block.

Positions index the flat tensor: row b of (B, T) is [b T, b T + T), and cu_seqlens bounds packed
sequences. `ppo_advantages_fwd` adds the KL penalty and the score before the scan; after it the last
program to arrive whitens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_core.kernels.arrival import arrives_last, counter
from rlhf_core.kernels.kl import kl_value


@triton.jit
def _then(a1, u1, a2, u2):
    return a1 * a2, a2 * u1 + u2


@triton.jit
def _scan(a, u, carry, BLOCK: tl.constexpr):
    """State after each element, and after the last; `carry` is the state before the first."""
    a, u = tl.associative_scan((a, u), 0, _then)
    state = a * carry + u
    return state, tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, state, 0.0), 0)


@triton.jit
def _sequence(cu_seqlens_ptr, T):
    """This program's sequence [begin, end), and the range [first, stop) that it must write.

    The range also covers packed tokens before the first and after the last sequence.
    """
    row = tl.program_id(0).to(tl.int64)
    begin, end = row * T, row * T + T
    first, stop = begin, end
    if cu_seqlens_ptr is not None:
        # Bad bounds give wrong numbers; without the limits they would give wild reads and writes.
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + row), 0), T)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + row + 1), 0), T)
        first = tl.where(row == 0, 0, begin)
        stop = tl.where(row == tl.num_programs(0) - 1, T, end)
    return row, begin, end, first, stop


@triton.jit
def _counted(mask_ptr, at, begin, end):
    return tl.load(mask_ptr + at, mask=(at >= begin) & (at < end), other=0) != 0


@triton.jit
def _advantages(
    r, values_ptr, mask_ptr, at, counted, begin, end, next_value, next_advantage, gamma, lam,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Advantages, returns, and state for the block before this one; blocks run back in time."""
    v = tl.load(values_ptr + at, mask=counted, other=0.0)
    follows = _counted(mask_ptr, at + 1, begin, end)
    v_follows = tl.load(values_ptr + at + 1, mask=follows, other=0.0)
    v_next, next_value = _scan(tl.where(follows, 0.0, 1.0), v_follows, next_value, BLOCK)
    delta = r + gamma * v_next - v
    a = tl.where(counted, gamma * lam, 1.0)
    advantage, next_advantage = _scan(a, tl.where(counted, delta, 0.0), next_advantage, BLOCK)
    advantage = tl.where(counted, advantage, 0.0)
    return advantage, advantage + v, next_value, next_advantage


@triton.jit(do_not_specialize=["T"])
def gae_fwd_kernel(
    rewards_ptr, values_ptr, mask_ptr, last_values_ptr, cu_seqlens_ptr, advantages_ptr, returns_ptr,
    T, gamma, lam,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, begin, end, first, stop = _sequence(cu_seqlens_ptr, T)
    next_value, next_advantage = 0.0, 0.0  # at the first token after the block in time
    if last_values_ptr is not None:
        next_value = tl.load(last_values_ptr + row)
    for start in range(first, stop, BLOCK):
        at = stop - 1 - (start - first) - tl.arange(0, BLOCK)
        counted = _counted(mask_ptr, at, begin, end)
        r = tl.load(rewards_ptr + at, mask=counted, other=0.0)
        advantage, ret, next_value, next_advantage = _advantages(
            r, values_ptr, mask_ptr, at, counted, begin, end, next_value, next_advantage,
            gamma, lam, BLOCK,
        )  # fmt: skip
        tl.store(advantages_ptr + at, advantage, mask=at >= first)
        tl.store(returns_ptr + at, ret, mask=at >= first)


@triton.jit(do_not_specialize=["T"])
def gae_bwd_kernel(
    dadvantages_ptr, dreturns_ptr, mask_ptr, cu_seqlens_ptr,
    drewards_ptr, dvalues_ptr, dlast_values_ptr,
    T, gamma, lam,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, begin, end, first, stop = _sequence(cu_seqlens_ptr, T)
    before = 0.0  # ddelta of the last counted token before the block
    # Include `stop`, which is not a token: the state before it is that of the last counted token.
    for start in range(first, stop + 1, BLOCK):
        at = start + tl.arange(0, BLOCK)
        counted = _counted(mask_ptr, at, begin, end)
        precedes = _counted(mask_ptr, at - 1, begin, end)
        da = tl.load(dadvantages_ptr + at, mask=counted, other=0.0)
        dr = tl.load(dreturns_ptr + at, mask=counted, other=0.0)
        g_before = tl.load(dadvantages_ptr + at - 1, mask=precedes, other=0.0)
        g_before += tl.load(dreturns_ptr + at - 1, mask=precedes, other=0.0)

        ddelta_before, before = _scan(tl.where(precedes, gamma * lam, 1.0), g_before, before, BLOCK)
        ddelta = da + dr + gamma * lam * ddelta_before
        tl.store(drewards_ptr + at, tl.where(counted, ddelta, 0.0), mask=at < stop)
        dv = tl.where(counted, dr - ddelta + gamma * ddelta_before, 0.0)
        tl.store(dvalues_ptr + at, dv, mask=at < stop)
        if dlast_values_ptr is not None:
            tl.store(dlast_values_ptr + row + (at - stop), gamma * ddelta_before, mask=at == stop)


@triton.jit
def _join(n, mean, m2, count, x, sq):
    """Moments (n, mean, m2) combined with a block of parts (Chan, Golub & LeVeque 1979, eq. 2.1).

    A part has `count` values with mean x and squared deviations sq. The mean is refined once, so
    that parts without variance combine to exactly zero variance.
    """
    total = tl.sum(count, 0)
    divisor = tl.maximum(total, 1.0)
    center = tl.sum(count * x, 0) / divisor
    center += tl.sum(count * (x - center), 0) / divisor
    sq = tl.sum(sq + count * (x - center) * (x - center), 0)
    delta = center - mean
    share = tl.div_rn(total, tl.maximum(n + total, 1.0))  # exactly 1 if n is 0
    return n + total, mean + delta * share, m2 + sq + delta * delta * n * share


@triton.jit
def _whiten(advantages_ptr, mask_ptr, cu_seqlens_ptr, moments_ptr, T, BLOCK: tl.constexpr):
    num_programs = tl.num_programs(0)
    n, mean, m2 = 0.0, 0.0, 0.0
    for start in range(0, num_programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < num_programs
        count = tl.load(moments_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
        x = tl.load(moments_ptr + num_programs + at, mask=inside, other=0.0, cache_modifier=".cg")
        sq_ptr = moments_ptr + 2 * num_programs + at
        sq = tl.load(sq_ptr, mask=inside, other=0.0, cache_modifier=".cg")
        n, mean, m2 = _join(n, mean, m2, count, x, sq)
    scale = tl.rsqrt(m2 / tl.maximum(n, 1.0) + 1e-8)
    begin, end = tl.full([], 0, tl.int64), num_programs.to(tl.int64) * T
    if cu_seqlens_ptr is not None:
        begin, end = tl.load(cu_seqlens_ptr), tl.load(cu_seqlens_ptr + num_programs)
    for start in range(begin, end, 4 * BLOCK):
        at = start + tl.arange(0, 4 * BLOCK)
        counted = _counted(mask_ptr, at, begin, end)
        advantage = tl.load(advantages_ptr + at, mask=counted, other=0.0, cache_modifier=".cg")
        tl.store(advantages_ptr + at, (advantage - mean) * scale, mask=counted)


@triton.jit(do_not_specialize=["T"])
def ppo_advantages_fwd_kernel(
    scores_ptr, logprobs_ptr, ref_ptr, values_ptr, mask_ptr, cu_seqlens_ptr,
    advantages_ptr, returns_ptr, rewards_ptr, kl_ptr, moments_ptr, counter_ptr,
    T, kl_coef, gamma, lam,
    ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, begin, end, first, stop = _sequence(cu_seqlens_ptr, T)
    score = tl.load(scores_ptr + row)  # 0 once the last counted token has received it
    next_value, next_advantage = 0.0, 0.0
    n, mean, m2 = 0.0, 0.0, 0.0
    for start in range(first, stop, BLOCK):
        at = stop - 1 - (start - first) - tl.arange(0, BLOCK)
        counted = _counted(mask_ptr, at, begin, end)
        logprob = tl.load(logprobs_ptr + at, mask=counted, other=0.0)
        d = logprob - tl.load(ref_ptr + at, mask=counted, other=0.0)
        kl = kl_value(d, ESTIMATOR)
        last = tl.max(tl.where(counted, at, -1), 0)
        r = tl.where(counted, tl.where(at == last, score, 0.0) - kl_coef * kl, 0.0)
        score = tl.where(last >= 0, 0.0, score)
        advantage, ret, next_value, next_advantage = _advantages(
            r, values_ptr, mask_ptr, at, counted, begin, end, next_value, next_advantage,
            gamma, lam, BLOCK,
        )  # fmt: skip
        zeros = tl.zeros([BLOCK], tl.float32)
        n, mean, m2 = _join(n, mean, m2, counted.to(tl.float32), advantage, zeros)
        tl.store(advantages_ptr + at, advantage, mask=at >= first)
        tl.store(returns_ptr + at, ret, mask=at >= first)
        tl.store(rewards_ptr + at, r, mask=at >= first)
        tl.store(kl_ptr + at, kl, mask=at >= first)

    if moments_ptr is not None:  # whiten
        num_programs = tl.num_programs(0)
        tl.store(moments_ptr + row, n)
        tl.store(moments_ptr + num_programs + row, mean)
        tl.store(moments_ptr + 2 * num_programs + row, m2)
        if arrives_last(counter_ptr):
            _whiten(advantages_ptr, mask_ptr, cu_seqlens_ptr, moments_ptr, T, BLOCK)


def gae_fwd(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    last_values: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), shaped like rewards and values: (B, T), or (N,) if packed.

    mask: same shape; last_values: (B,); cu_seqlens: (B + 1,). All are contiguous, of float32, bool
    or int64. Packed tokens outside all sequences give 0.
    """
    B, T = _shape(rewards, cu_seqlens)
    advantages, returns = _outputs(2, rewards, B)
    if B and T:
        with torch.cuda.device_of(rewards):
            gae_fwd_kernel[(B,)](
                rewards, values, mask.view(torch.uint8), last_values, cu_seqlens,
                advantages, returns, T, gamma, lam, **_tile(T),
            )  # fmt: skip
    return advantages, returns


def gae_bwd(
    dadvantages: Tensor,
    dreturns: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    has_last_values: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(drewards, dvalues, dlast_values or None).

    A sequence without counted tokens gives its last value no gradient.
    """
    B, T = _shape(dadvantages, cu_seqlens)
    drewards, dvalues = _outputs(2, dadvantages, B)
    dlast_values = dadvantages.new_empty(B) if has_last_values else None
    if B:
        with torch.cuda.device_of(dadvantages):
            gae_bwd_kernel[(B,)](
                dadvantages, dreturns, mask.view(torch.uint8), cu_seqlens,
                drewards, dvalues, dlast_values, T, gamma, lam, **_tile(T),
            )  # fmt: skip
    return drewards, dvalues, dlast_values


def ppo_advantages_fwd(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    estimator: str,
    gamma: float,
    lam: float,
    whiten: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(advantages, returns, rewards, kl), shaped like logprobs, from a single launch.

    logprobs: (B, T), or (N,) if packed; scores: (B,). One program does the whitening, an extra read
    and write of the advantages. That is cheaper than a second launch for the usual tens of
    thousands of tokens, and takes fractions of a millisecond for millions. A CUDA graph keeps the
    kl_coef, gamma and lam of its capture.
    """
    B, T = _shape(logprobs, cu_seqlens)
    advantages, returns, rewards, kl = _outputs(4, logprobs, B)
    if B and T:
        moments = logprobs.new_empty((3, B)) if whiten else None
        with torch.cuda.device_of(logprobs):
            ppo_advantages_fwd_kernel[(B,)](
                scores, logprobs, ref_logprobs, values, mask.view(torch.uint8), cu_seqlens,
                advantages, returns, rewards, kl, moments, counter(logprobs) if whiten else None,
                T, kl_coef, gamma, lam,
                ESTIMATOR=estimator, **_tile(T),
            )  # fmt: skip
    return advantages, returns, rewards, kl


def _shape(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """Number of sequences, and of tokens in each; if packed, of tokens in total."""
    return x.shape if cu_seqlens is None else (len(cu_seqlens) - 1, len(x))


def _outputs(number: int, like: Tensor, num_sequences: int) -> list[Tensor]:
    # Without sequences no program runs that could write zeros.
    make = torch.empty_like if num_sequences else torch.zeros_like
    return [make(like) for _ in range(number)]


def _tile(length: int) -> dict[str, int]:
    # Only two sizes, so that a new length does not recompile the kernel.
    return {"BLOCK": 32, "num_warps": 1} if length <= 32 else {"BLOCK": 1024, "num_warps": 8}
