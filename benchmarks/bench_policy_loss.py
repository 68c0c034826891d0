"""ppo_loss with statistics, forward + backward, against the chain of PyTorch ops that it fuses.

The chain runs eagerly and under torch.compile. Bytes: six float32 tensors (log-probs and values,
old and new, advantages, returns) and the mask are read, two gradients written.
"""

import functools

import torch

from rlhf_core import ppo_loss
from rlhf_core.benchmarks import common
from rlhf_core.benchmarks.common import OURS, Case

CLIP, VALUE_CLIP, VF_COEF = 0.2, 0.2, 0.1


def ours(logprobs, values, old_logprobs, advantages, old_values, returns, mask):
    coefficients = dict(clip_range=CLIP, value_clip_range=VALUE_CLIP, vf_coef=VF_COEF)
    return ppo_loss(
        logprobs, old_logprobs, advantages, values, old_values, returns, mask, **coefficients
    )


def chain(logprobs, values, old_logprobs, advantages, old_values, returns, mask):
    """The same loss and statistics. Masked positions must hold finite numbers."""
    count = mask.sum()

    def mean(x):
        return (x * mask).sum() / count

    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)
    near = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    far_error, near_error = (values - returns) ** 2, (near - returns) ** 2
    policy_loss = mean(torch.maximum(unclipped, clipped))
    value_loss = mean(torch.maximum(far_error, near_error)) / 2
    with torch.no_grad():
        stats = [
            mean(ratio - 1 - log_ratio),
            mean(clipped > unclipped),
            mean(near_error > far_error),
            mean(ratio),
        ]
        stats += [mean(ratio**2), count]
    return policy_loss + VF_COEF * value_loss, policy_loss.detach(), value_loss.detach(), *stats


def case(shape: tuple[int, int], device: str, size: common.Size) -> Case:
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0], 1), device=device)
    mask = torch.arange(shape[1], device=device) < lengths
    data = [torch.randn(shape, device=device) for _ in range(6)]
    data[2] = data[0] + 0.2 * data[2]  # old log-probs, near the new ones

    def wrap(f, data=data):
        leaves = [x.detach().requires_grad_() for x in data[:2]]
        count = mask.sum().to(leaves[0].dtype)  # makes the gradients of a mean near 1
        return common.call_and_grad(functools.partial(f, *leaves, *data[2:], mask), leaves, count)

    def truth():
        return [x.flatten() for x in wrap(chain, [x.double() for x in data])()]

    num_bytes = (8 * 4 + 1) * mask.numel()
    variants = {OURS: wrap(ours), "eager": wrap(chain)}
    if size != "tiny":
        variants["compile"] = wrap(common.compiled(chain))
    variants[common.FLOOR] = common.traffic(num_bytes, device)
    bars = {"eager": 5, "compile": 2} if device == "cpu" and size == "full" else {}
    return Case(
        variants, truth, bytes=num_bytes, bars=bars, h200_ms=0.03 if shape == (8, 1024) else None
    )


def cases(size: str, device: str) -> dict:
    if size == "sweep":
        return {}
    shape = (3, 70) if size == "tiny" else (64, 512) if device == "cpu" else (8, 1024)
    shape = size[:2] if isinstance(size, common.Shape) else shape
    return {f"ppo_loss fwd + bwd {shape}": functools.partial(case, shape, device, size)}


def test_policy_loss(benchmark, name):
    common.record(benchmark, "policy_loss", name)
