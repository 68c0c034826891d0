"""linear_token_logprobs against plain PyTorch, which gets only the counted rows, already packed.

"loss fwd + bwd" is linear_token_loss, the mean of -log p with its gradients from one pass. On a GPU
"on chip" is ours with chunk_rows=0, where no logits are in memory.

FLOP: 2NDV for each matrix product over N counted rows. Forward takes one product, forward +
backward three, or two if the head is frozen. The floor is the time of these products alone. Memory
is the peak above the inputs: on a CPU the growth of the process's resident memory, on a GPU the
allocations of torch.
"""

import functools

import torch

from rlhf_core import linear_token_logprobs
from rlhf_core.benchmarks import common
from rlhf_core.benchmarks.common import MEMORY, OURS, Case
from rlhf_core.ops import linear_token_loss

LOSS, ON_CHIP = "loss fwd + bwd", "on chip"
H200_MS = {"fwd": 12, "fwd + bwd": 36, "fwd + bwd, frozen head": 24}


def plain(hidden, weight, targets):
    log_p = torch.log_softmax(
        hidden @ weight.T, -1, dtype=torch.promote_types(hidden.dtype, torch.float32)
    )
    return log_p.gather(-1, targets[:, None])[:, 0]


def plain_loss(hidden, weight, targets):
    return -plain(hidden, weight, targets).mean()


def fused_loss(hidden, weight, targets):
    def losses(found, groups):
        return (-found.logprobs.sum() / len(targets),)

    return linear_token_loss(hidden, weight, targets, losses)[0]


def case(
    kind: str,
    dtype: str,
    shape: tuple[int, int, int],
    V: int,
    counted: float,
    device: str,
    size: common.Size,
) -> Case:
    B, T, D = shape
    hidden = torch.randn(shape, device=device).to(getattr(torch, dtype))
    weight = (torch.randn(V, D, device=device) / D**0.5).to(hidden.dtype)
    targets = torch.randint(V, (B, T), device=device)
    mask = torch.rand(B, T, device=device) < counted
    packed = (hidden[mask], weight, targets[mask])
    products = 1 if kind == "fwd" else 2 if "frozen" in kind else 3

    def wrap(f, hidden, weight, targets, upstream):
        if products == 1:
            return functools.partial(f, hidden, weight, targets)
        hidden, weight = (
            hidden.detach().requires_grad_(),
            weight.detach().requires_grad_(products == 3),
        )
        leaves = [x for x in (hidden, weight) if x.requires_grad]
        return common.call_and_grad(functools.partial(f, hidden, weight, targets), leaves, upstream)

    n, tiny = len(packed[0]), size == "tiny"
    if kind == LOSS:  # n times the gradient of the mean, which would underflow in float16
        upstream = packed_upstream = torch.tensor(float(n), device=device)
        ours, theirs = wrap(fused_loss, *packed, upstream), plain_loss
    else:
        upstream = torch.randn(B, T, device=device)

        def ours_in(chunk_rows):
            f = functools.partial(linear_token_logprobs, mask=mask, chunk_rows=chunk_rows)
            return wrap(f, hidden, weight, targets, upstream)

        ours, theirs = ours_in(None), plain
        packed_upstream = upstream[mask]

    def truth():
        """In pieces, because the logits of all rows may not fit into memory."""
        above = -torch.ones(n, device=device) if kind == LOSS else packed_upstream
        logprobs, dhidden, dweight = [], [], torch.zeros((), device=device)
        for h, y, g in zip(*(x.split(256) for x in (packed[0], packed[2], above))):
            found = wrap(plain, h.double(), weight.double(), y, g.double())()
            found = found if isinstance(found, tuple) else (found,)
            logprobs.append(found[0])
            dhidden += found[1:2]
            dweight = sum(found[2:], dweight)
        first = -torch.cat(logprobs).mean() if kind == LOSS else torch.cat(logprobs)
        return [first, *([torch.cat(dhidden), dweight][: products - 1])] if dhidden else [first]

    def compare(got, want):
        error = (got.double() - want).norm() / want.norm()
        # Rounding alone puts 16-bit logits off by 2^-9 of their value.
        assert error < (1e-5 if dtype == "float32" else 2e-2), f"relative error {error:.1e}"

    logits, dlogits = (
        torch.empty(n, V, device=device, dtype=hidden.dtype),
        torch.ones_like(packed[0])[:, :1].expand(n, V),
    )
    dlogits = dlogits.contiguous() if products > 1 else None

    def floor():
        torch.mm(packed[0], weight.T, out=logits)
        return products > 1 and dlogits @ weight, products > 2 and dlogits.T @ packed[0]

    variants = {OURS: ours, "plain": wrap(theirs, *packed, packed_upstream)}
    if device == "cuda" and kind != LOSS:
        variants[ON_CHIP] = ours_in(0)
    if not tiny:
        variants["compile"] = wrap(common.compiled(theirs), *packed, packed_upstream)
    if (
        device == "cuda"
        and (liger := common.peer("liger_kernel.transformers"))
        and products == 3
        and not tiny
    ):
        reduction = "mean" if kind == LOSS else "sum"
        loss = liger.LigerFusedLinearCrossEntropyLoss(reduction=reduction)
        variants["Liger, one loss"] = wrap(lambda h, w, y: loss(w, h, y), *packed, None)
    variants[common.FLOOR] = floor
    full_size = device == "cpu" and size == "full"
    return Case(
        variants,
        truth,
        mask.flatten(),
        compare,
        flop=2 * n * D * V * products,
        bars={"plain": 1 / 0.7, MEMORY: 4} if full_size and kind == "fwd + bwd" else {},
        h200_ms=H200_MS[kind] if size == "full" else None,
        peaks=["plain", ON_CHIP] if size == "full" else [],
    )


def cases(size: str, device: str) -> dict:
    if size == "sweep":
        return {}
    tiny = size == "tiny"
    shape, V, counted = (
        ((8, 192, 256), 50257, 1 / 3) if device == "cpu" else ((8, 1024, 4096), 128256, 1.0)
    )
    if tiny:
        shape, V, counted = (2, 5, 16), 257, 0.6
    dtype = "float32" if device == "cpu" or tiny else "bfloat16"
    if isinstance(size, common.Shape):
        shape, V, counted, dtype = (size.B, size.T, size.D), size.V, 1.0, size.dtype
    return {
        f"{kind} {dtype} {shape} V {V}": functools.partial(
            case, kind, dtype, shape, V, counted, device, size
        )
        for kind in (H200_MS if size == "full" else [*H200_MS, LOSS])
    }


def test_linear_logprobs(benchmark, name):
    common.record(benchmark, "linear_logprobs", name)
