"""kl_estimate (k3) against the same formula in eager PyTorch and under torch.compile, on CPU.

Bytes: forward reads two float32 tensors and writes one. The floor is the time of adding the two into a third.
"""

import functools

import common
import pytest
import torch

from rlhf_core import kl_estimate

SHAPES = [(8, 1024), (64, 512), (512, 4096)]


def eager(logprobs, ref_logprobs, mask):
    d = logprobs - ref_logprobs
    return (torch.exp(-d) - 1 + d) * mask


def case(shape: tuple[int, int]):
    torch._dynamo.reset()
    logprobs, ref_logprobs, total = torch.randn(3, *shape).unbind()
    mask = torch.rand(shape) < 0.9
    compiled = torch.compile(eager, dynamic=False)
    variants = {
        common.OURS: lambda: kl_estimate(logprobs, ref_logprobs, estimator="k3", mask=mask),
        "eager": lambda: eager(logprobs, ref_logprobs, mask),
        "compile": lambda: compiled(logprobs, ref_logprobs, mask),
        common.FLOOR: lambda: torch.add(logprobs, ref_logprobs, out=total),
    }
    return variants, 3 * 4 * logprobs.numel()


CASES = {f"k3 fwd {shape}": functools.partial(case, shape) for shape in SHAPES}


@pytest.mark.parametrize("name", CASES)
def test_kl_estimate(benchmark, name):
    common.run(benchmark, *CASES[name]())


if __name__ == "__main__":
    common.table(CASES)
