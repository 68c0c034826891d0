"""Generalised advantage estimation in Triton: one program per row, one launch, associative scans along time.

Every recursion here is affine, x' = a x + u, and a masked position is the identity (a = 1, u = 0), so gaps cost nothing
to skip. The forward runs backwards in time over reversed indices (`associative_scan(reverse=True)` gives wrong results,
triton issue 4362); its backward is the adjoint and runs forwards. What a token needs from its counted neighbour is a
scan over inputs loaded one position further on. Rows longer than a block carry the state from block to block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024


@triton.jit
def _then(a1, u1, a2, u2):
    return a1 * a2, a2 * u1 + u2


@triton.jit
def _scan(a, u, carry, BLOCK: tl.constexpr):
    """State after each element, from the state `carry` before the first; and the state after the last."""
    a, u = tl.associative_scan((a, u), 0, _then)
    state = a * carry + u
    return state, tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, state, 0.0), 0)


@triton.jit(do_not_specialize=["T"])
def gae_fwd_kernel(
    rewards_ptr, values_ptr, mask_ptr, last_values_ptr, advantages_ptr, returns_ptr,
    T, gamma, lam,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = row * T
    next_value, next_advantage = 0.0, 0.0  # at the first token after the block, in time
    if last_values_ptr is not None:
        next_value = tl.load(last_values_ptr + row)
    for start in range(0, T, BLOCK):
        t = T - 1 - start - tl.arange(0, BLOCK)
        counted = tl.load(mask_ptr + base + t, mask=t >= 0, other=0) != 0
        follows = tl.load(mask_ptr + base + t + 1, mask=(t >= -1) & (t + 1 < T), other=0) != 0
        r = tl.load(rewards_ptr + base + t, mask=counted, other=0.0)
        v = tl.load(values_ptr + base + t, mask=counted, other=0.0)
        v_follows = tl.load(values_ptr + base + t + 1, mask=follows, other=0.0)

        v_next, next_value = _scan(tl.where(follows, 0.0, 1.0), v_follows, next_value, BLOCK)
        delta = r + gamma * v_next - v
        a = tl.where(counted, gamma * lam, 1.0)
        advantage, next_advantage = _scan(a, tl.where(counted, delta, 0.0), next_advantage, BLOCK)
        advantage = tl.where(counted, advantage, 0.0)
        tl.store(advantages_ptr + base + t, advantage, mask=t >= 0)
        tl.store(returns_ptr + base + t, advantage + v, mask=t >= 0)


@triton.jit(do_not_specialize=["T"])
def gae_bwd_kernel(
    dadvantages_ptr, dreturns_ptr, mask_ptr, drewards_ptr, dvalues_ptr, dlast_values_ptr,
    T, gamma, lam,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = row * T
    before = 0.0  # ddelta of the last counted token before the block
    for start in range(0, T + 1, BLOCK):  # t = T is no token: there the state before it is that of the last counted one
        t = start + tl.arange(0, BLOCK)
        counted = tl.load(mask_ptr + base + t, mask=t < T, other=0) != 0
        precedes = tl.load(mask_ptr + base + t - 1, mask=(t >= 1) & (t <= T), other=0) != 0
        da = tl.load(dadvantages_ptr + base + t, mask=counted, other=0.0)
        dr = tl.load(dreturns_ptr + base + t, mask=counted, other=0.0)
        g_before = tl.load(dadvantages_ptr + base + t - 1, mask=precedes, other=0.0)
        g_before += tl.load(dreturns_ptr + base + t - 1, mask=precedes, other=0.0)

        ddelta_before, before = _scan(tl.where(precedes, gamma * lam, 1.0), g_before, before, BLOCK)
        ddelta = da + dr + gamma * lam * ddelta_before
        tl.store(drewards_ptr + base + t, tl.where(counted, ddelta, 0.0), mask=t < T)
        tl.store(dvalues_ptr + base + t, tl.where(counted, dr - ddelta + gamma * ddelta_before, 0.0), mask=t < T)
        if dlast_values_ptr is not None:
            tl.store(dlast_values_ptr + row + (t - T), gamma * ddelta_before, mask=t == T)


def gae_fwd(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, last_values: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (B, T) like rewards and values; last_values (B,). Contiguous, float32 and bool."""
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    B, T = rewards.shape
    if rewards.numel():
        with torch.cuda.device_of(rewards):
            gae_fwd_kernel[(B,)](
                rewards, values, mask.view(torch.uint8), last_values, advantages, returns,
                T, gamma, lam,
                BLOCK=_block(T),
            )  # fmt: skip
    return advantages, returns


def gae_bwd(
    dadvantages: Tensor, dreturns: Tensor, mask: Tensor, gamma: float, lam: float, has_last_values: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(drewards, dvalues, dlast_values or None); a row without a counted token gives its last value no gradient."""
    drewards, dvalues = torch.empty_like(dadvantages), torch.empty_like(dadvantages)
    B, T = dadvantages.shape
    dlast_values = torch.empty(B, dtype=torch.float32, device=dadvantages.device) if has_last_values else None
    if B:
        with torch.cuda.device_of(dadvantages):
            gae_bwd_kernel[(B,)](
                dadvantages, dreturns, mask.view(torch.uint8), drewards, dvalues, dlast_values,
                T, gamma, lam,
                BLOCK=_block(T + 1),
            )  # fmt: skip
    return drewards, dvalues, dlast_values


def _block(length: int) -> int:
    return min(MAX_BLOCK, max(32, triton.next_power_of_2(length)))
