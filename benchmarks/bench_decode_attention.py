"""decode_attention against scaled_dot_product_attention on the rows' slots, masked by length.

Each variant also rotates queries and keys and appends to the cache in place. Bytes: every row's
keys and values up to its length, read once. The baselines read all S positions of a row.
"""

import functools

import torch
import torch.nn.functional as F

from rlhf_core import decode_attention
from rlhf_core.benchmarks import common
from rlhf_core.benchmarks.common import OURS, Case

# Rows, query heads, key/value heads, head dim, cache length, shortest row.
SHAPES = {
    "stories": (64, 8, 4, 8, 80, 16),
    "GPT-2": (16, 4, 4, 64, 128, 32),
    "Llama": (8, 8, 4, 64, 192, 64),
    "long": (4, 32, 8, 128, 2048, 2040),
}
BARS = {
    "stories": {"SDPA": 5},
    "GPT-2": {"SDPA": 2},
    "Llama": {"SDPA": 2},
    "long": {"SDPA": 2, "floor": 1 / 1.3},
}


def rotate(x, rope, n):
    cos, sin = (table[n][:, None] for table in rope)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def attend(q, keys, values, slots, n):
    seen = (torch.arange(keys.shape[2], device=q.device) <= n[:, None])[:, None, None]
    cache = keys.index_select(0, slots), values.index_select(0, slots)
    return F.scaled_dot_product_attention(q[:, :, None], *cache, seen, enable_gqa=True)[:, :, 0]


def sdpa(q, k, v, keys, values, lengths, slots, rope):
    n = lengths[slots]
    keys[slots, :, n], values[slots, :, n] = rotate(k, rope, n), v
    return attend(rotate(q, rope, n), keys, values, slots, n)


def case(kind: str, dtype: str, shape: tuple[int, ...], device: str, tiny: bool) -> Case:
    B, H, Hkv, K, S, shortest = shape
    q, k, v = (
        torch.randn(B, H + 2 * Hkv, K, device=device)
        .to(getattr(torch, dtype))
        .split([H, Hkv, Hkv], dim=1)
    )
    keys, values = (torch.randn(B, Hkv, S, K, device=device).to(q.dtype) for _ in range(2))
    lengths, slots = (
        torch.randint(shortest, S, (B,), device=device),
        torch.randperm(B, device=device),
    )
    angles = torch.arange(S, device=device)[:, None] / 1e4 ** (
        torch.arange(0, K, 2, device=device) / K
    )
    args = (q, k, v, keys, values, lengths, slots)
    rope = angles.cos(), angles.sin()

    def ours():
        return decode_attention(*args, rope=rope)

    def check(got):
        n = lengths[slots]
        common.assert_close(keys[slots, :, n], rotate(k.double(), rope, n))
        common.assert_close(
            got, attend(rotate(q.double(), rope, n), keys.double(), values.double(), slots, n)
        )

    num_bytes = 2 * int((lengths + 1).sum()) * Hkv * K * keys.element_size()
    variants = {OURS: ours, "SDPA": functools.partial(sdpa, *args, rope)}
    if not tiny:
        variants["compile"] = functools.partial(common.compiled(sdpa), *args, rope)
    variants[common.FLOOR] = common.traffic(num_bytes, device)
    full = device == "cpu" and not tiny
    return Case(
        variants,
        check=check,
        bytes=num_bytes,
        bars=BARS[kind] if full and dtype == "float32" else {},
        avx2=full,
    )


def cases(size: str, device: str) -> dict:
    if size == "sweep":
        return {}
    shapes = (
        {"short": (3, 4, 2, 8, 20, 0), "odd": (2, 6, 2, 20, 40, 30)} if size == "tiny" else SHAPES
    )
    return {
        f"{kind} {dtype} {shape[:5]}": functools.partial(
            case, kind, dtype, shape, device, size == "tiny"
        )
        for kind, shape in shapes.items()
        for dtype in ("float32", "bfloat16")
    }


def test_decode_attention(benchmark, name):
    common.record(benchmark, "decode_attention", name)
