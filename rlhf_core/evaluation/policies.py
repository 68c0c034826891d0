"""Sample a policy's responses, score them, and estimate their KL to a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.data import Tokenizer
from rlhf_core.models import Transformer, eval_mode
from rlhf_core.ops import kl_estimate
from rlhf_core.rollout import response_logprobs, sample


class Evaluation(NamedTuple):
    """N responses, one for each prompt."""

    responses: list[str]
    scores: Tensor  # (N,)
    kl: Tensor  # (N,) nats per response: the unbiased estimate (k1), summed over its tokens
    lengths: Tensor  # (N,) tokens of a response, EOS included
    response_ids: list[list[int]]


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
    """Sample a response to every prompt (token ids), score it and estimate its KL to the reference.

    A prompt's seed depends on its place in the list and on `seed`, so batch_size changes nothing
    but rounding.
    """
    seeds = torch.randint(2**63 - 1, (len(prompts),), generator=torch.Generator().manual_seed(seed))
    responses, scores, kls, lengths, response_ids = [], [], [], [], []
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
            ref_logprobs, _ = response_logprobs(reference, rollout, temperature)
            kls.append(
                kl_estimate(rollout.logprobs, ref_logprobs, mask=rollout.response_mask).sum(dim=1)
            )
            lengths.append(rollout.response_mask.sum(dim=1))
            response_ids += rollout.responses()
            texts = [tokenizer.decode(ids) for ids in response_ids[start:]]
            responses += texts
            scores.append(
                torch.as_tensor(
                    reward([tokenizer.decode(ids) for ids in batch], texts), dtype=torch.float32
                )
            )
    return Evaluation(
        responses, torch.cat(scores), torch.cat(kls).cpu(), torch.cat(lengths).cpu(), response_ids
    )
