"""Generalised advantage estimation in Triton: one program per sequence, one launch, associative scans along time.

Every recursion here is affine, x' = a x + u, and a masked position is the identity (a = 1, u = 0), so gaps cost nothing
to skip. The forward runs backwards in time over reversed indices (`associative_scan(reverse=True)` gives wrong results,
triton issue 4362); its backward is the adjoint and runs forwards. What a token needs from its counted neighbour is a
scan over inputs loaded one position further on. Sequences longer than a block carry the state from block to block.

Positions are those in the flat tensor: row b of (B, T) is [b T, b T + T), a packed sequence what cu_seqlens says.
`ppo_advantages_fwd` puts KL and score before the scan, and whitening, by the last program to arrive, behind it.
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
    """State after each element, from the state `carry` before the first; and the state after the last."""
    a, u = tl.associative_scan((a, u), 0, _then)
    state = a * carry + u
    return state, tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, state, 0.0), 0)


@triton.jit
def _sequence(cu_seqlens_ptr, T):
    """This program's sequence [begin, end), and [first, stop) to write: packed tokens of no sequence come with it."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = row * T, row * T + T
    first, stop = begin, end
    if cu_seqlens_ptr is not None:
        begin, end = tl.load(cu_seqlens_ptr + row), tl.load(cu_seqlens_ptr + row + 1)
        first = tl.where(row == 0, 0, begin)
        stop = tl.where(row == tl.num_programs(0) - 1, T, end)
    return row, begin, end, first, stop


@triton.jit
def _counted(mask_ptr, at, begin, end):
    return tl.load(mask_ptr + at, mask=(at >= begin) & (at < end), other=0) != 0


@triton.jit
def _advantages(
    r,
    values_ptr,
    mask_ptr,
    at,
    counted,
    begin,
    end,
    next_value,
    next_advantage,
    gamma,
    lam,
    BLOCK: tl.constexpr,
):
    """Advantages and returns of a block that runs backwards in time, and the state for the block before it."""
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
    next_value, next_advantage = 0.0, 0.0  # at the first token after the block, in time
    if last_values_ptr is not None:
        next_value = tl.load(last_values_ptr + row)
    for start in range(first, stop, BLOCK):
        at = stop - 1 - (start - first) - tl.arange(0, BLOCK)
        counted = _counted(mask_ptr, at, begin, end)
        r = tl.load(rewards_ptr + at, mask=counted, other=0.0)
        advantage, ret, next_value, next_advantage = _advantages(
            r,
            values_ptr,
            mask_ptr,
            at,
            counted,
            begin,
            end,
            next_value,
            next_advantage,
            gamma,
            lam,
            BLOCK,
        )
        tl.store(advantages_ptr + at, advantage, mask=at >= first)
        tl.store(returns_ptr + at, ret, mask=at >= first)


@triton.jit(do_not_specialize=["T"])
def gae_bwd_kernel(
    dadvantages_ptr, dreturns_ptr, mask_ptr, cu_seqlens_ptr, drewards_ptr, dvalues_ptr, dlast_values_ptr,
    T, gamma, lam,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, begin, end, first, stop = _sequence(cu_seqlens_ptr, T)
    before = 0.0  # ddelta of the last counted token before the block
    for start in range(
        first, stop + 1, BLOCK
    ):  # `stop` is no token: the state before it is the last counted one's
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
    """Moments (n, mean, m2) joined with those of a block of parts (Chan, Golub & LeVeque 1979, eq. 2.1).

    A part is `count` values of mean x and squared deviations sq. Means are refined once, so that parts without any
    variance come out without any.
    """
    total = tl.sum(count, 0)
    divisor = tl.maximum(total, 1.0)
    center = tl.sum(count * x, 0) / divisor
    center += tl.sum(count * (x - center), 0) / divisor
    sq = tl.sum(sq + count * (x - center) * (x - center), 0)
    delta = center - mean
    share = tl.div_rn(total, tl.maximum(n + total, 1.0))  # exactly 1 where n is 0
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
        sq = tl.load(
            moments_ptr + 2 * num_programs + at, mask=inside, other=0.0, cache_modifier=".cg"
        )
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
    score = tl.load(scores_ptr + row)  # until the last counted token has got it
    next_value, next_advantage = 0.0, 0.0
    n, mean, m2 = 0.0, 0.0, 0.0
    for start in range(first, stop, BLOCK):
        at = stop - 1 - (start - first) - tl.arange(0, BLOCK)
        counted = _counted(mask_ptr, at, begin, end)
        d = tl.load(logprobs_ptr + at, mask=counted, other=0.0) - tl.load(
            ref_ptr + at, mask=counted, other=0.0
        )
        kl = kl_value(d, ESTIMATOR)
        last = tl.max(tl.where(counted, at, -1), 0)
        r = tl.where(counted, tl.where(at == last, score, 0.0) - kl_coef * kl, 0.0)
        score = tl.where(last >= 0, 0.0, score)
        advantage, ret, next_value, next_advantage = _advantages(
            r,
            values_ptr,
            mask_ptr,
            at,
            counted,
            begin,
            end,
            next_value,
            next_advantage,
            gamma,
            lam,
            BLOCK,
        )
        n, mean, m2 = _join(
            n, mean, m2, counted.to(tl.float32), advantage, tl.zeros([BLOCK], tl.float32)
        )
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
    """(advantages, returns), like rewards and values (B, T) or (N,) packed; last_values (B,), cu_seqlens (B + 1,).

    All contiguous, float32, bool and int64. Packed tokens of no sequence give 0.
    """
    B, T = _shape(rewards, cu_seqlens)
    advantages, returns = _outputs(2, rewards, B)
    if B and T:
        with torch.cuda.device_of(rewards):
            gae_fwd_kernel[(B,)](
                rewards, values, mask.view(torch.uint8), last_values, cu_seqlens, advantages, returns,
                T, gamma, lam,
                **_tile(T),
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
    """(drewards, dvalues, dlast_values or None); a sequence of no counted token gives its last value no gradient."""
    B, T = _shape(dadvantages, cu_seqlens)
    drewards, dvalues = _outputs(2, dadvantages, B)
    dlast_values = (
        torch.empty(B, dtype=torch.float32, device=dadvantages.device) if has_last_values else None
    )
    if B:
        with torch.cuda.device_of(dadvantages):
            gae_bwd_kernel[(B,)](
                dadvantages, dreturns, mask.view(torch.uint8), cu_seqlens, drewards, dvalues, dlast_values,
                T, gamma, lam,
                **_tile(T),
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
    """(advantages, returns, rewards, kl), like logprobs (B, T) or (N,) packed; scores (B,). All in one launch.

    Whitening is the work of one program, an extra read and write of the advantages: cheap beside a second launch for
    the tens of thousands of tokens that are common, fractions of a millisecond for millions.
    A CUDA graph keeps the numbers kl_coef, gamma and lam that it was captured with.
    """
    B, T = _shape(logprobs, cu_seqlens)
    advantages, returns, rewards, kl = _outputs(4, logprobs, B)
    if B and T:
        moments = (
            torch.empty((3, B), dtype=torch.float32, device=logprobs.device) if whiten else None
        )
        with torch.cuda.device_of(logprobs):
            ppo_advantages_fwd_kernel[(B,)](
                scores, logprobs, ref_logprobs, values, mask.view(torch.uint8), cu_seqlens,
                advantages, returns, rewards, kl, moments, counter(logprobs) if whiten else None,
                T, kl_coef, gamma, lam,
                ESTIMATOR=estimator, **_tile(T),
            )  # fmt: skip
    return advantages, returns, rewards, kl


def _shape(x: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """Sequences, and tokens of each; or of all together where they are packed."""
    return x.shape if cu_seqlens is None else (len(cu_seqlens) - 1, len(x))


def _outputs(number: int, like: Tensor, num_sequences: int) -> list[Tensor]:
    make = (
        torch.empty_like if num_sequences else torch.zeros_like
    )  # no sequence, no program to write a 0
    return [make(like) for _ in range(number)]


def _tile(length: int) -> dict[str, int]:
    # Two sizes, so that a new length does not compile anew.
    return {"BLOCK": 32, "num_warps": 1} if length <= 32 else {"BLOCK": 1024, "num_warps": 8}
