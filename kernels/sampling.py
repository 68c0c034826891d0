"""Sampling in Triton: one program per row finds its maximum, its mass and then its token.

`rlhf_core.ops.sampling` defines the distribution. The mass of a block is always summed in the same
way and blocks are added in order. The search for the token therefore reproduces exactly the total
from which its fraction was taken. A truncation threshold is found by bisection over the bits of a
float32, which sort like its values, with one read of the row per bit. It stops once a single value
is left, so after about log2 V + 4 reads unless values tie.

Left out: several programs per row. A decoding step has few rows, and a single multiprocessor reads
each from L2.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhf_core.kernels.logprobs import LN_2, LOG2_E, row_max, stride_unit, strides


@triton.jit
def _exponentials(row_ptr, cols, V, least, m, scale):
    """exp((z - m) / temperature) of logits >= least, 0 of others, NaN of NaN."""
    z = tl.load(row_ptr + cols, mask=cols < V, other=-float("inf")).to(tl.float32)
    return tl.where(z < least, 0.0, tl.exp2((z - m) * scale))


@triton.jit
def _held(row_ptr, V, least, m, scale, BLOCK: tl.constexpr):
    """The mass of the logits >= least, in float64."""
    mass = tl.zeros([], tl.float64)
    for start in range(0, V, BLOCK):
        e = _exponentials(row_ptr, start + tl.arange(0, BLOCK), V, least, m, scale)
        mass += tl.sum(e, 0).to(tl.float64)
    return mass


@triton.jit
def _as_ordered(bits):
    """The bits of a float32 as an int32 that sorts like the float; its own inverse."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _threshold(row_ptr, V, need, least, m, scale, OF_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest value >= least such that the logits >= value have mass, or number, `need`."""
    cols = tl.arange(0, BLOCK)
    low = _as_ordered(least.to(tl.int32, bitcast=True)).to(tl.int64)
    high = _as_ordered(m.to(tl.int32, bitcast=True)).to(tl.int64) + 1
    reach_low, reach_high = V, 0
    while (high - low > 1) & (reach_low - reach_high > 1):
        middle = low + (high - low) // 2
        value = _as_ordered(middle.to(tl.int32)).to(tl.float32, bitcast=True)
        mass, count = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
        for start in range(0, V, BLOCK):
            z = tl.load(row_ptr + start + cols, mask=start + cols < V, other=-float("inf"))
            z = z.to(tl.float32)
            count += (z >= value).to(tl.int32)  # value is above low, so it is not -inf
            if OF_MASS:
                mass += tl.where(z >= value, tl.exp2((z - m) * scale), 0.0)
        reach = tl.sum(count, 0)
        enough = reach >= need
        if OF_MASS:
            enough = tl.sum(mass, 0).to(tl.float64) >= need
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        reach_low = tl.where(enough, reach, reach_low)
        reach_high = tl.where(enough, reach_high, reach)
    return _as_ordered(low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["z_sb", "top_k"])
def sample_tokens_fwd_kernel(
    logits_ptr, seeds_ptr, counters_ptr, tokens_ptr, logprobs_ptr, full_logprobs_ptr,
    V, z_sb: tl.int64, temperature, top_k, top_p, log_min_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * z_sb * UNIT
    scale = tl.div_rn(LOG2_E, temperature)
    m = row_max(row_ptr, V, BLOCK)
    least = tl.full([], -float("inf"), tl.float32)
    total = _held(row_ptr, V, least, m, scale, BLOCK)  # NaN if the row is not a distribution
    kept = total
    valid = total == total
    if TOP_K:
        least = _threshold(row_ptr, V, top_k, least, m, scale, False, BLOCK)
        if TOP_P:
            kept = _held(row_ptr, V, least, m, scale, BLOCK)
    if TOP_P:
        least = _threshold(row_ptr, V, kept * top_p, least, m, scale, True, BLOCK)
    if MIN_P:
        least = tl.maximum(least, tl.fma(temperature, log_min_p, m))
    if TOP_K or TOP_P or MIN_P:
        kept = _held(row_ptr, V, least, m, scale, BLOCK)

    c = tl.load(counters_ptr + row)
    word, _, _, _ = tl.philox(
        tl.load(seeds_ptr + row), (c & 0xFFFFFFFF).to(tl.uint32), (c >> 32).to(tl.uint32), 0, 0
    )
    at = kept * ((word.to(tl.float64) + 0.5) / 4294967296.0)
    cols = tl.arange(0, BLOCK)
    start = 0
    before = tl.zeros([], tl.float64)
    e = _exponentials(row_ptr, cols, V, least, m, scale)
    mass = tl.sum(e, 0)
    while (start + BLOCK < V) & (before + mass <= at):
        before += mass.to(tl.float64)
        start += BLOCK
        e = _exponentials(row_ptr, start + cols, V, least, m, scale)
        mass = tl.sum(e, 0)
    beyond = before + tl.cumsum(e, 0) > at
    first = tl.min(tl.where(beyond & (e > 0), cols, BLOCK), 0)
    last = tl.max(tl.where(e > 0, cols, 0), 0)  # if rounding leaves no element beyond
    token = tl.where(valid, start + tl.where(first < BLOCK, first, last), 0)

    x = (tl.load(row_ptr + token).to(tl.float32) - m) * scale
    logprob = (x - tl.log2(kept.to(tl.float32))) * LN_2
    logprob = tl.where(valid, tl.where(logprob > 0, 0.0, logprob), float("nan"))
    tl.store(tokens_ptr + row, token)
    tl.store(logprobs_ptr + row, logprob)
    if full_logprobs_ptr is not None:
        logprob = (x - tl.log2(total.to(tl.float32))) * LN_2
        logprob = tl.where(valid, tl.where(logprob > 0, 0.0, logprob), float("nan"))
        tl.store(full_logprobs_ptr + row, logprob)


def sample_tokens_fwd(
    logits: Tensor,
    seeds: Tensor,
    counters: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(tokens, logprobs, full_logprobs), each (B,), of logits (B, V).

    full_logprobs is None if there is no truncation.
    """
    B, V = logits.shape
    tokens = torch.empty_like(seeds)
    logprobs = torch.empty_like(seeds, dtype=torch.float32)
    full_logprobs = None if top_k is top_p is min_p is None else torch.empty_like(logprobs)
    if B == 0:
        return tokens, logprobs, full_logprobs
    rows = logits[None]
    unit = stride_unit(rows)
    with torch.cuda.device_of(logits):
        sample_tokens_fwd_kernel[(B,)](
            logits, seeds, counters, tokens, logprobs, full_logprobs,
            V, strides(rows, unit)[1], temperature, top_k or 0, top_p or 0.0, math.log(min_p or 1),
            TOP_K=top_k is not None, TOP_P=top_p is not None, MIN_P=min_p is not None, UNIT=unit,
            BLOCK=min(2048, max(256, triton.next_power_of_2(V))), num_warps=4 if unit == 16 else 8,
        )  # fmt: skip
    return tokens, logprobs, full_logprobs
