"""token_logprobs against log_softmax + gather (eager, torch.compile), TRL's formula and Liger.

Bytes: the forward pass reads B*T*V logits once. Forward + backward reads them twice and writes as
many. The sweep shows how the time of forward + entropy grows with V and with the number of rows.
"""

import functools

import torch

from rlhf_core import token_logprobs, token_logprobs_and_entropy
from rlhf_core.benchmarks import common
from rlhf_core.benchmarks.common import OURS, Case

BARS = {  # on a CPU, by kind and dtype: baseline -> lowest ratio
    ("fwd", "float32"): {"eager": 6, "compile": 2.5, "floor": 1 / 1.3},
    ("fwd", "bfloat16"): {"eager": 10, "compile": 3},
    ("fwd + entropy", "float32"): {"compile": 2.5},
    ("fwd + entropy", "bfloat16"): {"compile": 2.5},
    ("fwd + bwd", "float32"): {"compile": 2.5},
    ("fwd + bwd", "bfloat16"): {"compile": 2.5},
    ("fwd + bwd in place", "float32"): {"compile": 3},
    ("fwd + bwd in place", "bfloat16"): {"compile": 3},
}
BOTH = "fwd + bwd + entropy"
H200_MS = {("fwd + entropy", 151936): 0.61, ("fwd + bwd", 128256): 1.57}


def eager(logits, targets):
    return torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, targets[..., None])[..., 0]


def eager_entropy(logits, targets):
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    return log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def trl(logits, targets):
    """TRL's formula saves memory. It loops over sequences; 16-bit ones go through log_softmax."""
    if logits.dtype == torch.float32:
        chosen = logits.gather(-1, targets[..., None])[..., 0]
        return chosen - torch.stack([torch.logsumexp(row, -1) for row in logits])
    rows = (torch.log_softmax(z, -1).gather(-1, y[:, None])[:, 0] for z, y in zip(logits, targets))
    return torch.stack(list(rows))


def trl_entropy(logits, targets):
    """TRL's entropy, in chunks of 128 rows: logsumexp minus the mean logit."""
    entropies = []
    for z in logits.flatten(0, 1).split(128):
        entropies.append(torch.logsumexp(z, -1) - (torch.softmax(z, -1) * z).sum(-1))
    return trl(logits, targets), torch.cat(entropies).view(targets.shape)


def case(
    kind: str, dtype: str, shape: tuple[int, int, int], device: str, size: common.Size, grows=None
) -> Case:
    B, T, V = shape
    logits = (2 * torch.randn(shape, device=device)).to(getattr(torch, dtype))
    targets = torch.randint(V, (B, T), device=device)
    backward, with_entropy, tiny = "bwd" in kind, "entropy" in kind, size == "tiny"
    upstream = list(torch.randn(1 + with_entropy, B, T, device=device))
    rows = common.some_rows(B * T)
    ours, plain, theirs = token_logprobs, eager, trl
    if with_entropy:
        ours, plain, theirs = token_logprobs_and_entropy, eager_entropy, trl_entropy

    def wrap(f, z=logits):
        if not backward:
            return functools.partial(f, z, targets)
        z = z.detach().requires_grad_()
        return common.call_and_grad(functools.partial(f, z, targets), [z], *upstream)

    def truth():
        z = logits.flatten(0, 1)[rows].double().requires_grad_()
        exact = functools.partial(eager64, z, targets.flatten()[rows])
        if not backward:
            return exact()[: 1 + with_entropy]
        return common.call_and_grad(exact, [z], *(x.flatten()[rows].double() for x in upstream))()

    # In place, a call's gradient becomes the next call's logits. No time depends on the values.
    measured = (
        functools.partial(token_logprobs, inplace_backward=True)
        if kind.endswith("in place")
        else ours
    )
    variants = {OURS: wrap(measured, logits.clone() if kind.endswith("in place") else logits)}
    if tiny or not kind.endswith("in place"):
        variants["eager"] = wrap(plain)
    if not tiny:
        variants["compile"] = wrap(common.compiled(plain))
    if not backward and not grows:
        variants["TRL"] = wrap(theirs)
    if (
        device == "cuda"
        and (liger := common.peer("liger_kernel.transformers"))
        and not with_entropy
        and not tiny
    ):
        loss = liger.LigerCrossEntropyLoss(reduction="none")
        # Liger writes its gradient over the logits, so that it needs a copy.
        variants["Liger"] = wrap(
            lambda z, y: -loss(z.flatten(0, 1), y.flatten()).view(B, T), logits.clone()
        )
    num_bytes = (3 if backward else 1) * logits.numel() * logits.element_size()
    variants[common.FLOOR] = common.traffic(num_bytes, device)
    full_size = device == "cpu" and size == "full"
    return Case(
        variants,
        truth,
        rows,
        bytes=num_bytes,
        bars=BARS[kind, dtype] if full_size else {},
        h200_ms=H200_MS.get((kind, V)) if size == "full" else None,
        avx2=full_size and not kind.endswith("in place") and V == 50257,
        grows=grows,
    )


def eager64(z, targets):
    log_p = torch.log_softmax(z, -1)
    return log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def overhead(device: str) -> Case:
    """The cost of a call with almost nothing to compute."""
    logits, targets = torch.randn(2, 4, 64, device=device), torch.randint(64, (2, 4), device=device)

    def truth():
        return [eager64(logits.double(), targets)[0].flatten()]

    variants = {
        OURS: lambda: token_logprobs(logits, targets),
        "eager": lambda: eager(logits, targets),
    }
    return Case(variants, truth, bars={"eager": 1}, latency=True)


def cases(size: str, device: str) -> dict:
    kinds = ["fwd", "fwd + entropy", "fwd + bwd", "fwd + bwd in place"]
    dtypes = ["float32", "bfloat16"]
    if size == "sweep":
        rows, V = (64, 32768) if device == "cpu" else (4096, 131072)
        grid = [
            (f"V, {dtype}, {rows} rows", dtype, rows, 2**k, 2**k)
            for dtype in dtypes
            for k in range(10, 19, 2)
        ]
        grid += [
            (f"rows, float32, V = {V}", "float32", n, V, n)
            for n in (rows // 16, rows // 4, rows, rows * 4)
        ]
        return {
            f"fwd + entropy {dtype} ({n}, {v})": functools.partial(
                case, "fwd + entropy", dtype, (1, n, v), device, size, grows=(panel, x)
            )
            for panel, dtype, n, v, x in grid
        }
    if isinstance(size, common.Shape):
        runs = [(kind, size.dtype, size[:3]) for kind in [*kinds, BOTH]]
    elif size == "tiny":
        runs = [
            (kind, dtype, shape)
            for kind in [*kinds, BOTH]
            for dtype in dtypes
            for shape in [(2, 3, 257), (1, 2, 4099)]
        ]
    elif device == "cpu":
        shapes = [(8, 128, 50257), (4, 512, 32000)]
        runs = [(kind, dtype, shape) for shape in shapes for kind in kinds for dtype in dtypes]
    else:
        runs = [
            ("fwd", "bfloat16", (8, 1024, 151936)),
            ("fwd + entropy", "bfloat16", (8, 1024, 151936)),
        ]
        runs += [(kind, "bfloat16", (8, 1024, 128256)) for kind in kinds]
        runs += [(kind, "float32", (8, 1024, 50257)) for kind in kinds[:3]]
    found = {
        f"{kind} {dtype} {shape}": functools.partial(case, kind, dtype, shape, device, size)
        for kind, dtype, shape in runs
    }
    if isinstance(size, common.Shape):
        return found
    return found | {"call overhead (2, 4, 64)": functools.partial(overhead, device)}


def test_logprobs(benchmark, name):
    common.record(benchmark, "logprobs", name)
