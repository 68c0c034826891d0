"""One token per row of logits, drawn with one uniform number, and its log-probs. No gradient.

    u = (w + 0.5) / 2^32, w the first word of Philox4x32-10 (Salmon et al. 2011) with key seeds[b]
        and counter counters[b]
    x = logits / temperature,  p = softmax(x)
    top_k keeps the k largest p
    top_p keeps the smallest set of top tokens of these whose share of their total probability
        reaches top_p (Holtzman et al. 2020)
    min_p keeps those of these with p >= min_p max(p) (Nguyen et al. 2024)
    tokens that tie with the last kept one are kept too
    token = the first j in order of the vocabulary with sum of kept p_0 .. p_j > u * sum of kept p
    logprobs = log(p_token / sum of kept p),  full_logprobs = log p_token

A row's draw thus depends only on its logits, seed and counter, not on the batch or the device.
Backends differ only if u is within rounding of the border between two tokens. All kept logits lie
above one threshold. The fused backends search for it without sorting, and draw no noise but u.

Left out: a temperature per row, and logits processors, which the caller applies before.
"""

import math
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_core.checks import check_float, describe, resolve, values_may_be_read
from rlhf_core.ops.logprobs import token_logprobs

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


class Sample(NamedTuple):
    """A token per row and its log-probs in nats."""

    tokens: Tensor  # (B,) int64
    logprobs: Tensor  # (B,) of the distribution sampled from: truncated and renormalised
    full_logprobs: Tensor  # (B,) of softmax(logits / temperature); same tensor without truncation


def sample_tokens_reference(
    logits: Tensor,
    seeds: Tensor,
    counters: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The definition, in float64: (tokens, logprobs, full_logprobs or None without truncation)."""
    z = logits.double()
    largest = z.amax(dim=-1, keepdim=True)
    kept = z >= truncation_threshold(z, temperature, top_k, top_p, min_p)
    p = ((z - largest) / temperature).exp()  # (B, V), relative to the largest
    cdf = (p * kept).cumsum(dim=-1)
    total = cdf[:, -1:]
    draws = uniform(seeds, counters)[:, None] * total
    tokens = torch.searchsorted(cdf, draws, right=True).clamp_max(z.shape[-1] - 1)
    tokens = tokens.where(total.isfinite(), 0)
    dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
    chosen = (z.gather(-1, tokens) - largest) / temperature
    logprobs = (chosen - total.log())[:, 0].to(dtype)
    if top_k is None and top_p is None and min_p is None:
        return tokens[:, 0], logprobs, None
    return tokens[:, 0], logprobs, (chosen - p.sum(dim=-1, keepdim=True).log())[:, 0].to(dtype)


def truncation_threshold(
    z: Tensor, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> Tensor:
    """Threshold (B, 1): logits z (B, V), float32 or float64, are kept if they are >= it."""
    ordered = _descending(z)
    threshold = ordered[:, -1:]
    if top_k is not None:
        threshold = ordered[:, top_k - 1 : top_k]
    if top_p is not None:
        p = ((ordered - ordered[:, :1]) / temperature).exp() * (ordered >= threshold)
        mass = p.cumsum(dim=-1)
        # Index of the token with which the mass reaches top_p.
        last = (mass < top_p * mass[:, -1:]).sum(dim=-1, keepdim=True)
        threshold = torch.maximum(threshold, ordered.gather(-1, last))
    if min_p is not None:
        threshold = torch.maximum(threshold, ordered[:, :1] + temperature * math.log(min_p))
    return threshold


def _descending(z: Tensor) -> Tensor:
    """Rows sorted, largest first. On CPU numpy is many times faster: torch also sorts indices."""
    if z.is_cpu and values_may_be_read(z):
        return torch.from_numpy(np.sort(z.detach().numpy(), axis=-1)).flip(-1)
    return z.sort(dim=-1, descending=True).values


def uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """Numbers (B,) float64 in (0, 1), one per row: the centre of one of 2^32 equal intervals."""
    words = philox(counters & WORD, counters >> 32 & WORD, 0, 0, seeds & WORD, seeds >> 32 & WORD)
    return (words[0].double() + 0.5) / 2**32


def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: four random words of a counter c and a key k, int64 in [0, 2^32)."""
    for i in range(PHILOX_ROUNDS):
        (high0, low0), (high1, low1) = (
            _multiply(m, c) for m, c in zip(PHILOX_MULTIPLIERS, (c0, c2))
        )
        key0, key1 = ((k + i * weyl) & WORD for k, weyl in zip((k0, k1), PHILOX_WEYL))
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
    return c0, c1, c2, c3


def _multiply(m: int, x):
    """High and low word of a product of two words, computed within 63 bits."""
    low = m * (x & 0xFFFF)
    high = m * (x >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    seeds: Tensor,
    counters: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    backend: str | None = None,
) -> Sample:
    """A token from every row of softmax(logits / temperature), optionally truncated.

    Args:
        logits: (B, V) float32, bfloat16 or float16, never modified; float64 uses the reference.
            Strided rows, such as those of logits[:, -1], need no copy.
        seeds: (B,) int64, the generator's key: one stream of numbers per seed.
        counters: (B,) int64, index into the row's stream, such as the position of the token.
        temperature: finite and >= 0; higher is more random. 0 takes the most likely token, the
            first on a tie.
        top_k: >= 1; keep the k most likely tokens. None for all.
        top_p: in (0, 1]; keep the smallest set of top tokens whose probability (after top_k)
            reaches top_p. None or 1 for all.
        min_p: in [0, 1]; keep tokens at least min_p times as likely as the most likely one. None
            or 0 for all.
        backend: "reference", "cpp", "triton", or None for the best one on the device.

    Returns:
        A `Sample`, log-probs in float32 (float64 for float64 logits), <= 0. At temperature 0
        logprobs are 0 (all mass on one token) and full_logprobs are those of softmax(logits). A row
        with NaN, +inf or only -inf gives token 0 and log-prob NaN. The caller must check for it,
        because a check would synchronise with the GPU.

    Raises:
        ValueError or TypeError: with the offending value.
    """
    _check(logits, seeds, counters, temperature, top_k, top_p, min_p)
    V = logits.shape[-1]
    impl = resolve(backend, logits)
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
        full_logprobs = token_logprobs(logits, tokens, backend=backend)
        return Sample(tokens.where(full_logprobs.isfinite(), 0), full_logprobs * 0, full_logprobs)
    top_k = None if top_k is None or top_k >= V else int(top_k)
    top_p = None if top_p is None or top_p == 1 else float(top_p)
    min_p = None if min_p is None or min_p == 0 else float(min_p)
    if impl is None:
        launch = sample_tokens_reference
    else:
        launch = impl.sample_tokens_fwd
        if logits.stride(-1) != 1:
            logits = logits.contiguous()
    seeds, counters = seeds.contiguous(), counters.contiguous()
    tokens, logprobs, full_logprobs = launch(
        logits, seeds, counters, float(temperature), top_k, top_p, min_p
    )
    return Sample(tokens, logprobs, logprobs if full_logprobs is None else full_logprobs)


def _check(logits, seeds, counters, temperature, top_k, top_p, min_p):
    check_float("logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be (B, V) with V > 0, got {tuple(logits.shape)}")
    for name, x in (("seeds", seeds), ("counters", counters)):
        if not isinstance(x, Tensor) or x.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {describe(x)}")
        if x.shape != logits.shape[:1]:
            raise ValueError(
                f"{name} must be ({logits.shape[0]},), one per row of logits, got {tuple(x.shape)}"
            )
        if not (x.is_cpu and logits.is_cpu) and x.device != logits.device:
            raise ValueError(f"{name} are on {x.device}, logits on {logits.device}")
    for name, x in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)):
        if not isinstance(x, Real) and not (x is None and name != "temperature"):
            raise TypeError(f"{name} must be a number, got {describe(x)}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and >= 0, got {temperature}")
    if top_k is not None and not isinstance(top_k, Integral):
        raise TypeError(f"top_k must be an integer, got {describe(top_k)}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be in [0, 1], got {min_p}")
