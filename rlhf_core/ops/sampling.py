"""One token per row of logits, drawn by one uniform number of its own, with its log-probs; no gradient.

    u = (w + 0.5) / 2^32, w the first word of Philox4x32-10 (Salmon et al. 2011): key seeds[b], counter counters[b]
    x = logits / temperature,  p = softmax(x)
    kept: the top_k largest p; of these the fewest that hold >= top_p of what they hold together (Holtzman et al. 2020);
          of these the ones with p >= min_p max(p) (Nguyen et al. 2024); always with all that tie with the last one kept
    token = the first j in order of the vocabulary with sum of kept p_0 .. p_j > u * sum of kept p
    logprobs = log(p_token / sum of kept p),  full_logprobs = log p_token

So a row's draw depends on its logits, its seed and its counter, whatever else is in the batch and wherever it runs;
backends differ only where u falls within rounding of the border between two tokens. All that is kept lies above one
threshold, which the fused backends search for: nothing is sorted, and no noise is drawn but u.

Left out: a temperature per row, and logits processors, which belong before this.
"""

import math
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf_core import backends
from rlhf_core.checks import check_float, describe
from rlhf_core.ops.logprobs import token_logprobs

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


class Sample(NamedTuple):
    """A token per row and what it was worth, in nats."""

    tokens: Tensor  # (B,) int64
    logprobs: (
        Tensor  # (B,) under the distribution sampled from: temperature, truncation, renormalised
    )
    full_logprobs: Tensor  # (B,) under softmax(logits / temperature); the same tensor where nothing is truncated


def sample_tokens_reference(
    logits: Tensor,
    seeds: Tensor,
    counters: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The definition, in float64: (tokens, logprobs, full_logprobs, or None where nothing is truncated)."""
    z = logits.double()
    largest = z.amax(dim=-1, keepdim=True)
    kept = z >= truncation_threshold(z, temperature, top_k, top_p, min_p)
    p = ((z - largest) / temperature).exp()  # (B, V), relative to the largest
    cdf = (p * kept).cumsum(dim=-1)
    total = cdf[:, -1:]
    tokens = torch.searchsorted(
        cdf, uniform(seeds, counters)[:, None] * total, right=True
    ).clamp_max(z.shape[-1] - 1)
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
    """(B, 1): kept are the logits z (B, V), float32 or float64, that reach it."""
    ordered = _descending(z)
    threshold = ordered[:, -1:]
    if top_k is not None:
        threshold = ordered[:, top_k - 1 : top_k]
    if top_p is not None:
        p = ((ordered - ordered[:, :1]) / temperature).exp() * (ordered >= threshold)
        held = p.cumsum(dim=-1)
        last = (held < top_p * held[:, -1:]).sum(
            dim=-1, keepdim=True
        )  # those before it hold too little
        threshold = torch.maximum(threshold, ordered.gather(-1, last))
    if min_p is not None:
        threshold = torch.maximum(threshold, ordered[:, :1] + temperature * math.log(min_p))
    return threshold


def _descending(z: Tensor) -> Tensor:
    """Every row sorted, the largest first: on a CPU by numpy, many times faster than torch, which sorts indices too."""
    if z.is_cpu and not torch.compiler.is_compiling():
        return torch.from_numpy(np.sort(z.detach().numpy(), axis=-1)).flip(-1)
    return z.sort(dim=-1, descending=True).values


def uniform(seeds: Tensor, counters: Tensor) -> Tensor:
    """(B,) float64 in (0, 1), of which every row has its own: the centre of one of 2^32 equal intervals."""
    words = philox(counters & WORD, counters >> 32 & WORD, 0, 0, seeds & WORD, seeds >> 32 & WORD)
    return (words[0].double() + 0.5) / 2**32


def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10: the four words of a counter and the two of a key, int64 in [0, 2^32), to four random ones."""
    for i in range(PHILOX_ROUNDS):
        (high0, low0), (high1, low1) = (
            _multiply(m, c) for m, c in zip(PHILOX_MULTIPLIERS, (c0, c2))
        )
        key0, key1 = ((k + i * weyl) & WORD for k, weyl in zip((k0, k1), PHILOX_WEYL))
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
    return c0, c1, c2, c3


def _multiply(m: int, x):
    """Both words of a product of two words, without passing 63 bits."""
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
    """Draw a token from every row of softmax(logits / temperature), truncated where asked.

    Args:
        logits: (B, V) float32, bfloat16, float16 (float64 through the reference), never modified; strided rows, such as
            those of logits[:, -1], cost no copy.
        seeds: (B,) int64, the generator's key: one stream of numbers per seed.
        counters: (B,) int64, which number of its stream a row is drawn with, as the position of the token.
        temperature: finite and >= 0; 0 takes the most likely token, the first of several.
        top_k: keep the k most likely tokens; None for all.
        top_p: in (0, 1]; then keep the fewest most likely ones that hold this part of what is left; None or 1 for all.
        min_p: in [0, 1]; then keep those at least min_p times as likely as the most likely one; None or 0 for all.
        backend: "reference", "cpp", "triton", or None for the best one on the device.

    Returns:
        Sample: log-probs in float32 (float64 for float64 logits), <= 0. At temperature 0 the logprobs are 0 (all mass
        on one token) and the full ones those of softmax(logits). A row that is no distribution, with NaN, +inf or
        nothing but -inf, gives token 0 and NaN: looking would synchronise with a GPU and is left to the caller.

    Raises:
        ValueError or TypeError with the offending values.
    """
    _check(logits, seeds, counters, temperature, top_k, top_p, min_p)
    V = logits.shape[-1]
    impl = backends.resolve(backend, logits)
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
                f"{name} must be ({logits.shape[0]},), as there are rows, got {tuple(x.shape)}"
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
