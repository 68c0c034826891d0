"""Sample a policy's responses, score them, and estimate their KL to a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.data import Tokenizer, columns_of
from rlhf_core.feedback.rewards import columns_for
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
    reward: Callable[..., Sequence[float]],
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    eos_ids: tuple[int, ...] | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> Evaluation:
    """Sample a response to every prompt, score it and estimate its KL to the reference.

    Prompts and reward are those of `best_of_n`; the reward is a callable.

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
            columns = columns_for(reward, 2, columns_of(batch))
            returned = reward([tokenizer.decode(ids) for ids in batch], texts, **columns)
            scores.append(torch.as_tensor(returned, dtype=torch.float32))
    return Evaluation(
        responses, torch.cat(scores), torch.cat(kls).cpu(), torch.cat(lengths).cpu(), response_ids
    )
