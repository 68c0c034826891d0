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


def full_case(kind: str, dtype: str, shape: tuple[int, int, int], device: str, tiny: bool) -> Case:
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

    def check():
        z, ref = (x.flatten(0, 1)[rows].double() for x in (logits, ref_logits))
        truth = eager_full(z.requires_grad_(), ref)
        common.assert_close(full_kl(logits, ref_logits).flatten()[rows], truth)
        if backward:
            (want,) = torch.autograd.grad(truth, z, upstream.flatten()[rows].double())
            common.assert_close(wrap(full_kl)()[0].flatten(0, 1)[rows], want)

    num_bytes = (5 if backward else 2) * logits.numel() * logits.element_size()
    variants = {OURS: wrap(full_kl), "eager": wrap(eager_full)}
    if not tiny:
        variants["compile"] = wrap(common.compiled(eager_full))
    variants[common.FLOOR] = common.traffic(num_bytes, device)
    bars = {"compile": 2.5} if device == "cpu" and not tiny else {}
    return Case(variants, check, bytes=num_bytes, bars=bars, h200_ms=H200_MS.get((kind, shape[-1])))


def eager_k3(logprobs, ref_logprobs, mask):
    d = logprobs - ref_logprobs
    return (torch.exp(-d) - 1 + d) * mask


def k3_case(shape: tuple[int, int], device: str, tiny: bool) -> Case:
    logprobs, ref_logprobs = torch.randn(2, *shape, device=device).unbind()
    mask = torch.rand(shape, device=device) < 0.9
    ours = functools.partial(kl_estimate, estimator="k3")

    def check():
        truth = eager_k3(logprobs.double(), ref_logprobs.double(), mask)
        common.assert_close(ours(logprobs, ref_logprobs, mask=mask), truth)

    variants = {
        OURS: lambda: ours(logprobs, ref_logprobs, mask=mask),
        "eager": lambda: eager_k3(logprobs, ref_logprobs, mask),
    }
    if not tiny:
        variants["compile"] = functools.partial(
            common.compiled(eager_k3), logprobs, ref_logprobs, mask
        )
    num_bytes = (3 * 4 + 1) * logprobs.numel()
    variants[common.FLOOR] = common.traffic(num_bytes, device)
    return Case(variants, check, bytes=num_bytes)


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
    found = {
        f"{kind} {dtype} {shape}": functools.partial(full_case, kind, dtype, shape, device, tiny)
        for kind in ("full fwd", "full fwd + bwd")
        for dtype in (dtypes if device == "cpu" or tiny else dtypes[1:])
        for shape in shapes
    }
    for shape in [(3, 70)] if tiny else [(8, 1024), (512, 4096)]:
        found[f"k3 fwd float32 {shape}"] = functools.partial(k3_case, shape, device, tiny)
    return found


def test_kl(benchmark, name):
    common.record(benchmark, "kl", name)
