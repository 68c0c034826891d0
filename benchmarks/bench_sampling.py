"""sample_tokens against softmax + multinomial, and against compiled exponential noise + argmax.

Both baselines truncate like Hugging Face, with topk and a sort, and return the log-prob of the
drawn token. Bytes: the logits once. Truncation reads them again, mostly from a cache.
"""

import functools
import math

import torch

from rlhf_core import sample_tokens
from rlhf_core.benchmarks import common
from rlhf_core.benchmarks.common import OURS, Case
from rlhf_core.ops.sampling import sample_tokens_reference

TRUNCATIONS = {"all": {}, "top_k 50": dict(top_k=50), "top_p 0.9": dict(top_p=0.9)}
BARS = {  # on a CPU, V > 10^4
    "all": {"eager": 10, "compile": 3},
    "top_k 50": {"eager": 5},
    "top_p 0.9": {"eager": 5},
}


def truncated(logits, top_k=None, top_p=None):
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    return logits


def eager(logits, **truncation):
    log_p = torch.log_softmax(truncated(logits, **truncation), -1, dtype=torch.float32)
    tokens = torch.multinomial(log_p.exp(), 1)
    return tokens[:, 0], log_p.gather(-1, tokens)[:, 0]


def exponential(logits, **truncation):
    """argmax(p / noise), as in vLLM and gpt-fast: no cumulative sum, no synchronisation."""
    log_p = torch.log_softmax(truncated(logits, **truncation), -1, dtype=torch.float32)
    tokens = (log_p.exp() / torch.empty_like(log_p).exponential_()).argmax(-1, keepdim=True)
    return tokens[:, 0], log_p.gather(-1, tokens)[:, 0]


def case(
    kind: str, dtype: str, shape: tuple[int, int], device: str, size: common.Size, grows=None
) -> Case:
    B, V = shape
    logits = (2 * torch.randn(shape, device=device)).to(getattr(torch, dtype))
    seeds, counters = (
        torch.arange(B, device=device),
        torch.zeros(B, dtype=torch.int64, device=device),
    )
    truncation = TRUNCATIONS[kind]

    def check(found):
        rows = common.some_rows(B, 64)
        settings = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None} | truncation
        tokens, logprobs, _ = sample_tokens_reference(
            logits[rows].double(), seeds[rows], counters[rows], **settings
        )
        same = found.tokens[rows] == tokens  # a draw within rounding of a border may differ
        assert same.sum() >= len(same) - 1, f"{(~same).sum()} of {len(same)} tokens differ"
        common.assert_close(found.logprobs[rows][same], logprobs[same])

    variants = {OURS: functools.partial(sample_tokens, logits, seeds, counters, **truncation)}
    variants["eager"] = functools.partial(eager, logits, **truncation)
    if size != "tiny":
        torch.compiler.reset()  # or dynamo stops, because all cases compile the same function
        variants["compile"] = functools.partial(common.compiled(exponential), logits, **truncation)
    num_bytes = logits.numel() * logits.element_size()
    variants[common.FLOOR] = common.traffic(num_bytes, device)
    full_size = device == "cpu" and size == "full" and V > 10_000
    return Case(
        variants,
        check=check,
        bytes=num_bytes,
        bars=BARS[kind] if full_size else {},
        avx2=full_size,
        grows=grows,
    )


def cases(size: str, device: str) -> dict:
    if size == "sweep":
        return {
            f"{kind} float32 (16, {2**k})": functools.partial(
                case, kind, "float32", (16, 2**k), device, size, grows=(f"V, {kind}, 16 rows", 2**k)
            )
            for kind in TRUNCATIONS
            for k in range(10, 19, 2)
        }
    shapes = [("float32", (3, 257)), ("bfloat16", (2, 4099))]
    if isinstance(size, common.Shape):
        shapes = [(size.dtype, (size.B, size.V))]
    elif size == "full":
        shapes = [
            ("float32", (64, 512)),
            ("float32", (16, 50257)),
            ("bfloat16", (16, 50257)),
            ("float32", (8, 32000)),
        ]
    return {
        f"{kind} {dtype} {shape}": functools.partial(case, kind, dtype, shape, device, size)
        for dtype, shape in shapes
        for kind in TRUNCATIONS
    }


def test_sampling(benchmark, name):
    common.record(benchmark, "sampling", name)
