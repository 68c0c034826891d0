"""full_kl against two log_softmax and a sum, and kl_estimate (k3) against its formula.

The baselines run eagerly and under torch.compile. Bytes: the forward pass of full_kl reads both
logits once. Forward + backward reads them twice and writes the gradient of the policy's logits.
kl_estimate reads two float32 tensors and the mask, and writes one tensor.
"""

import functools

import torch

from rlhf_core import full_kl, kl_estimate
from rlhf_core.benchmarks import common
from rlhf_core.benchmarks.common import OURS, Case

H200_MS = {("full fwd + bwd", 128256): 2.8}


def eager_full(logits, ref_logits):
    log_p = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    log_q = torch.log_softmax(ref_logits, -1, dtype=log_p.dtype)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def full_case(
    kind: str, dtype: str, shape: tuple[int, int, int], device: str, size: common.Size
) -> Case:
    rows = common.some_rows(shape[0] * shape[1])
    logits = (2 * torch.randn(shape, device=device)).to(getattr(torch, dtype))
    ref_logits = (logits + 0.1 * torch.randn(shape, device=device)).to(logits.dtype)
    upstream = torch.randn(shape[:-1], device=device)
    backward = "bwd" in kind

    def wrap(f):
        if not backward:
            return functools.partial(f, logits, ref_logits)
        z = logits.detach().requires_grad_()
        return common.call_and_grad(functools.partial(f, z, ref_logits), [z], upstream)

    def truth():
        z, ref = (x.flatten(0, 1)[rows].double() for x in (logits, ref_logits))
        exact = functools.partial(eager_full, z.requires_grad_(), ref)
        if not backward:
            return [exact()]
        return common.call_and_grad(exact, [z], upstream.flatten()[rows].double())()

    num_bytes = (5 if backward else 2) * logits.numel() * logits.element_size()
    variants = {OURS: wrap(full_kl), "eager": wrap(eager_full)}
    if size != "tiny":
        variants["compile"] = wrap(common.compiled(eager_full))
    variants[common.FLOOR] = common.traffic(num_bytes, device)
    bars = {"compile": 2.5} if device == "cpu" and size == "full" else {}
    h200_ms = H200_MS.get((kind, shape[-1])) if size == "full" else None
    return Case(variants, truth, rows, bytes=num_bytes, bars=bars, h200_ms=h200_ms)


def eager_k3(logprobs, ref_logprobs, mask):
    d = logprobs - ref_logprobs
    return (torch.exp(-d) - 1 + d) * mask


def k3_case(kind: str, shape: tuple[int, int], device: str, size: common.Size) -> Case:
    logprobs, ref_logprobs = torch.randn(2, *shape, device=device).unbind()
    mask = torch.rand(shape, device=device) < 0.9
    upstream, backward = torch.randn(shape, device=device), "bwd" in kind

    def wrap(f, *data):
        if not backward:
            return functools.partial(f, *data, mask)
        x = data[0].detach().requires_grad_()
        return common.call_and_grad(
            functools.partial(f, x, *data[1:], mask), [x], upstream.to(x.dtype)
        )

    def ours(logprobs, ref_logprobs, mask):
        return kl_estimate(logprobs, ref_logprobs, estimator="k3", mask=mask)

    def truth():
        exact = wrap(eager_k3, logprobs.double(), ref_logprobs.double())()
        return [x.flatten() for x in (exact if backward else [exact])]

    data = logprobs, ref_logprobs
    variants = {OURS: wrap(ours, *data), "eager": wrap(eager_k3, *data)}
    if size != "tiny":
        variants["compile"] = wrap(common.compiled(eager_k3), *data)
    num_bytes = ((5 if backward else 3) * 4 + 1) * logprobs.numel()
    variants[common.FLOOR] = common.traffic(num_bytes, device)
    return Case(variants, truth, bytes=num_bytes)


def cases(size: str, device: str) -> dict:
    if size == "sweep":
        return {}
    tiny = size == "tiny"
    dtypes = ["float32", "bfloat16"]
    shapes = (
        [(2, 3, 257), (1, 2, 4099)]
        if tiny
        else [(8, 128, 50257) if device == "cpu" else (8, 1024, 128256)]
    )
    dtypes = dtypes if device == "cpu" or tiny else dtypes[1:]
    k3_kinds, k3_shapes = ["k3 fwd"], [(8, 1024), (512, 4096)]
    if tiny:
        k3_kinds, k3_shapes = ["k3 fwd", "k3 fwd + bwd"], [(3, 70)]
    if isinstance(size, common.Shape):
        dtypes, shapes = [size.dtype], [size[:3]]
        k3_kinds, k3_shapes = ["k3 fwd", "k3 fwd + bwd"], [size[:2]]
    found = {
        f"{kind} {dtype} {shape}": functools.partial(full_case, kind, dtype, shape, device, size)
        for kind in ("full fwd", "full fwd + bwd")
        for dtype in dtypes
        for shape in shapes
    }
    return found | {
        f"{kind} float32 {shape}": functools.partial(k3_case, kind, shape, device, size)
        for kind in k3_kinds
        for shape in k3_shapes
    }


def test_kl(benchmark, name):
    common.record(benchmark, "kl", name)
