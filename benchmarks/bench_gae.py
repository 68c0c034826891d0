"""gae against the usual loops over time, vectorised over the batch in numpy and in PyTorch, on CPU.

Bytes: reads rewards, values (float32) and the mask (bool), writes advantages and returns. The loops get the easier
problem, a mask without gaps. The floor is the time of adding rewards and values into two tensors.
"""

import functools

import common
import numpy as np
import pytest
import torch

from rlhf_core import gae

SHAPES = [(8, 1024), (64, 512), (512, 2048)]
GAMMA, LAM = 0.99, 0.95


def loop(rewards, values, mask, zeros, stack):
    """One step per column; masked columns only ever follow the counted ones, where rewards and values are 0."""
    advantage, next_value, columns = zeros, zeros, []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        advantage = (delta + GAMMA * LAM * advantage) * mask[:, t]
        next_value = values[:, t]
        columns.append(advantage)
    advantages = stack(columns[::-1], 1)
    return advantages, advantages + values


def case(shape: tuple[int, int]):
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0], 1))
    mask = torch.arange(shape[1]) < lengths
    rewards, values = torch.randn(shape) * mask, torch.randn(shape) * mask
    arrays = [x.numpy() for x in (rewards, values, mask)]
    first, second = torch.empty(shape), torch.empty(shape)
    zeros = np.zeros(shape[0], dtype=np.float32)
    variants = {
        common.OURS: lambda: gae(rewards, values, mask, gamma=GAMMA, lam=LAM),
        "numpy loop": lambda: loop(*arrays, zeros, np.stack),
        "torch loop": lambda: loop(rewards, values, mask, torch.zeros(shape[0]), torch.stack),
        common.FLOOR: lambda: (torch.add(rewards, values, out=first), torch.add(rewards, values, out=second)),
    }
    return variants, (4 * 4 + 1) * rewards.numel()


CASES = {f"fwd {shape}": functools.partial(case, shape) for shape in SHAPES}


@pytest.mark.parametrize("name", CASES)
def test_gae(benchmark, name):
    common.run(benchmark, *CASES[name]())


if __name__ == "__main__":
    common.table(CASES)
