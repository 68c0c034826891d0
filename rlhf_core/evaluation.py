"""What a policy's responses are worth: gold scores, KL to a reference, win rate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.data import Tokenizer
from rlhf_core.losses import preferred
from rlhf_core.models import Transformer, eval_mode
from rlhf_core.ops import kl_estimate
from rlhf_core.rollout import response_logprobs, sample


class Evaluation(NamedTuple):
    """N responses, one for each prompt."""

    responses: list[str]
    scores: Tensor  # (N,)
    kl: Tensor  # (N,) nats a response, the unbiased estimate (k1) summed over its tokens


@torch.no_grad()
def evaluate_policy(
    policy: Transformer,
    reference: Transformer,
    prompts: Sequence[Sequence[int]],
    reward: Callable[[list[str], list[str]], Sequence[float]],
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    eos_ids: tuple[int, ...] | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> Evaluation:
    """Sample a response to every prompt (token ids), score it, and estimate KL(policy || reference) from it.

    Every prompt has a seed of its own, from its place in the list and `seed`: batch_size changes nothing but rounding.
    """
    seeds = torch.randint(2**63 - 1, (len(prompts),), generator=torch.Generator().manual_seed(seed))
    responses, scores, kls = [], [], []
    with eval_mode(policy, reference):
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            rollout = sample(
                policy,
                batch,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                eos_ids=eos_ids,
                seeds=seeds[start : start + batch_size],
            )
            logprobs, _ = response_logprobs(policy, rollout, temperature)
            ref_logprobs, _ = response_logprobs(reference, rollout, temperature)
            kls.append(kl_estimate(logprobs, ref_logprobs, mask=rollout.response_mask).sum(dim=1))
            texts = [tokenizer.decode(ids) for ids in rollout.responses()]
            responses += texts
            scores.append(torch.as_tensor(reward([tokenizer.decode(ids) for ids in batch], texts), dtype=torch.float32))
    return Evaluation(responses, torch.cat(scores), torch.cat(kls).cpu())


def win_rate(scores: Tensor, other: Tensor) -> float:
    """Share of rows (N,) where `scores` is higher than `other`; a tie is one half."""
    return float(preferred(scores, other).mean())
