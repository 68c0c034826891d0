"""gae against loops over time, and ppo_advantages against the chain of ops that it fuses.

The loops are written in numpy, in PyTorch and in TRL's layout. They get the easier problem, a mask
without gaps. Those of numpy and PyTorch have time first, (T, B), so that a step is one contiguous
row. The sweep shows how the time grows with T.

Bytes: gae reads rewards, values (float32) and the mask (bool), and writes advantages and returns.
ppo_advantages reads two log-probs instead of rewards, and also writes rewards and KL.
"""

import functools

import numpy as np
import torch

from rlhf_core import gae, kl_estimate, ppo_advantages
from rlhf_core.benchmarks import common
from rlhf_core.benchmarks.common import OURS, Case
from rlhf_core.masking import last_token_index, whiten

GAMMA, LAM, KL_COEF = 0.99, 0.95, 0.05


def loop(rewards, values, mask, advantages):
    """GAE on (T, B), in numpy or torch; returns (B, T) views.

    Masked steps come last in each column and hold 0.
    """
    advantage, next_value = 0 * rewards[0], 0 * rewards[0]
    for t in reversed(range(len(rewards))):
        advantage = rewards[t] + GAMMA * next_value - values[t] + GAMMA * LAM * advantage
        advantage = advantage * mask[t]
        next_value = values[t]
        advantages[t] = advantage
    return advantages.T, (advantages + values).T


def trl_loop(rewards, values):
    """TRL's loop: columns of (B, T), stacked at the end."""
    T, advantage, columns = rewards.shape[1], 0, []
    for t in reversed(range(T)):
        next_value = values[:, t + 1] if t < T - 1 else 0.0
        advantage = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * LAM * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def inputs(shape: tuple[int, int], device: str):
    """Rewards and values, which are 0 where the mask is False, and the mask."""
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0], 1), device=device)
    mask = torch.arange(shape[1], device=device) < lengths
    return torch.randn(shape, device=device) * mask, torch.randn(shape, device=device) * mask, mask


def gae_case(shape: tuple[int, int], device: str, size: common.Size, grows=None) -> Case:
    rewards, values, mask = inputs(shape, device)
    ours = functools.partial(gae, rewards, values, mask, gamma=GAMMA, lam=LAM)
    by_time = [x.t().contiguous() for x in (rewards, values, mask)]

    def truth():
        return gae(rewards.double(), values.double(), mask, gamma=GAMMA, lam=LAM)

    num_bytes = (4 * 4 + 1) * rewards.numel()
    variants = {OURS: ours, "torch (T, B)": lambda: loop(*by_time, torch.empty_like(by_time[0]))}
    if device == "cpu":
        arrays = [x.numpy() for x in by_time]
        variants["numpy (T, B)"] = lambda: loop(*arrays, np.empty_like(arrays[0]))
    variants["TRL"] = lambda: trl_loop(rewards, values)
    variants[common.FLOOR] = common.traffic(num_bytes, device)
    bars = (
        {"torch (T, B)": 20, "numpy (T, B)": 20, "TRL": 100}
        if device == "cpu" and size == "full"
        else {}
    )
    return Case(variants, truth, bytes=num_bytes, bars=bars, grows=grows)


def ppo_advantages_case(shape: tuple[int, int], device: str) -> Case:
    logprobs, values, mask = inputs(shape, device)
    ref_logprobs, scores = (
        logprobs + 0.1 * torch.randn(shape, device=device),
        torch.randn(shape[0], device=device),
    )
    last, rows = last_token_index(mask), torch.arange(shape[0], device=device)

    def chain(scores, logprobs, ref_logprobs, values):
        kl = kl_estimate(logprobs, ref_logprobs, mask=mask)
        rewards = -KL_COEF * kl
        rewards[rows, last] += scores
        advantages, returns = gae(rewards, values, mask, gamma=GAMMA, lam=LAM)
        return whiten(advantages, mask), returns, rewards, kl

    data = (scores, logprobs, ref_logprobs, values)
    ours = functools.partial(ppo_advantages, *data, mask, kl_coef=KL_COEF, gamma=GAMMA, lam=LAM)

    def truth():
        return chain(*(x.double() for x in data))

    num_bytes = (7 * 4 + 1) * values.numel()
    variants = {
        OURS: ours,
        "chain": lambda: chain(*data),
        common.FLOOR: common.traffic(num_bytes, device),
    }
    return Case(variants, truth, bytes=num_bytes, h200_ms=0.006 if shape == (8, 1024) else None)


def cases(size: str, device: str) -> dict:
    if size == "sweep":
        grid = [(64, 2**k) for k in range(5, 13)]
        return {
            f"gae fwd {shape}": functools.partial(
                gae_case, shape, device, size, grows=("T, 64 rows", shape[1])
            )
            for shape in grid
        }
    shapes = (
        [size[:2]]
        if isinstance(size, common.Shape)
        else [(3, 70), (2, 1)]
        if size == "tiny"
        else [(64, 512), (256, 1024)]
        if device == "cpu"
        else [(8, 1024), (64, 512)]
    )
    found = {
        f"gae fwd {shape}": functools.partial(gae_case, shape, device, size) for shape in shapes
    }
    shape = shapes[0]
    return found | {
        f"ppo_advantages {shape}": functools.partial(ppo_advantages_case, shape, device)
    }


def test_gae(benchmark, name):
    common.record(benchmark, "gae", name)
