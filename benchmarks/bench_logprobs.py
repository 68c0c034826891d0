"""token_logprobs against log_softmax + gather, eager and under torch.compile, on CPU.

Bytes: forward reads B*T*V logits once; forward + backward reads them twice and writes as many. The floor is the time of
summing the same logits, as often as the bytes say.
"""

import functools
import itertools

import common
import pytest
import torch

from rlhf_core import token_logprobs, token_logprobs_and_entropy

SHAPES = [(8, 128, 50257), (4, 512, 32000)]
DTYPES = [torch.float32, torch.bfloat16]


def eager(logits, targets):
    return torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, targets[..., None])[..., 0]


def eager_entropy(logits, targets):
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    return log_p.gather(-1, targets[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)


def backward(f, logits, targets, upstream):
    return torch.autograd.grad(f(logits, targets), logits, upstream)


def case(kind: str, shape: tuple[int, int, int], dtype: torch.dtype):
    """The variants of one row of the table, and the bytes that the op has to move."""
    torch._dynamo.reset()
    logits = (2 * torch.randn(shape)).to(dtype)
    targets = torch.randint(shape[-1], shape[:-1])
    words = logits.view(torch.uint8).view(-1)[: logits.numel() * logits.element_size() // 4 * 4].view(torch.float32)
    ours, theirs = (token_logprobs_and_entropy, eager_entropy) if kind == "fwd + entropy" else (token_logprobs, eager)
    wrap, passes = (lambda f: functools.partial(f, logits, targets)), 1
    if kind == "fwd + bwd":
        logits.requires_grad_()
        upstream = torch.randn(shape[:-1])
        wrap, passes = (lambda f: functools.partial(backward, f, logits, targets, upstream)), 3
    variants = {
        common.OURS: wrap(ours),
        "eager": wrap(theirs),
        "compile": wrap(torch.compile(theirs, dynamic=False)),
        common.FLOOR: lambda: [words.sum() for _ in range(passes)],
    }
    return variants, passes * logits.numel() * logits.element_size()


CASES = {
    f"{kind} {str(dtype)[6:]} {shape}": functools.partial(case, kind, shape, dtype)
    for shape, dtype, kind in itertools.product(SHAPES, DTYPES, ["fwd", "fwd + entropy", "fwd + bwd"])
}


@pytest.mark.parametrize("name", CASES)
def test_token_logprobs(benchmark, name):
    common.run(benchmark, *CASES[name]())


if __name__ == "__main__":
    common.table(CASES)
