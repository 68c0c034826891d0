"""Sample a policy's responses, score them, and estimate their KL to a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.data import Tokenizer
from rlhf_core.feedback.candidates import LONG_PROMPTS, ON_LONG_PROMPT
from rlhf_core.feedback.rewards import Reward, Scorer
from rlhf_core.models import Transformer, eval_mode
from rlhf_core.ops import kl_estimate
from rlhf_core.options import Options, option
from rlhf_core.rollout import response_logprobs, sample


@dataclass(frozen=True)
class EvaluationConfig(Options):
    """How policies are sampled to be compared."""

    num_samples: int = option(1, "responses to each prompt", within="[1, inf)")
    max_new_tokens: int = option(128, "longest response, tokens", within="[1, inf)")
    temperature: float = option(
        1.0, "temperature of sampling; 0 is greedy and has no KL", within="[0, inf)"
    )
    on_long_prompt: str = option("drop", ON_LONG_PROMPT, choices=LONG_PROMPTS)
    batch_size: int = option(
        16, "prompts sampled at a time, and rows scored at a time", within="[1, inf)"
    )
    seed: int = option(0, "seed of sampling")


class Responses(NamedTuple):
    """n responses to each of B prompts, grouped by prompt."""

    ids: list[list[int]]  # (B n,) EOS included
    kl: Tensor  # (B n,) nats per response: the unbiased estimate (k1); NaN at temperature 0
    lengths: Tensor  # (B n,) tokens of a response, EOS included


class Evaluation(NamedTuple):
    """N responses, grouped by prompt."""

    responses: list[str]
    scores: Tensor  # (N,)
    kl: Tensor  # (N,) as in `Responses`
    lengths: Tensor  # (N,)
    response_ids: list[list[int]]


@torch.no_grad()
def sample_policy(
    policy: Transformer,
    reference: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    temperature: float = 1.0,
    eos_ids: tuple[int, ...] | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> Responses:
    """Sample responses to every prompt (token ids) and estimate their KL to the reference.

    A response's seed depends on its place and on `seed`, so batch_size changes nothing but
    rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**63 - 1, (len(prompts), num_samples), generator=generator)
    ids, kls, lengths = [], [], []
    with eval_mode(policy, reference):
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            rollout = sample(
                policy,
                prompts[part],
                max_new_tokens=max_new_tokens,
                num_samples=num_samples,
                temperature=temperature,
                eos_ids=eos_ids,
                seeds=seeds[part].flatten(),
            )
            mask, kl = rollout.response_mask, rollout.logprobs.new_tensor(torch.nan)
            if temperature > 0:
                ref_logprobs, _ = response_logprobs(reference, rollout, temperature)
                kl = kl_estimate(rollout.logprobs, ref_logprobs, mask=mask).sum(dim=1)
            kls.append(kl.expand(len(mask)))
            lengths.append(mask.sum(dim=1))
            ids += rollout.responses()
    return Responses(ids, torch.cat(kls).cpu(), torch.cat(lengths).cpu())


def evaluate_policy(
    policy: Transformer,
    reference: Transformer,
    prompts: Sequence[Sequence[int]],
    reward: Reward | Sequence[tuple[Reward, float]],
    tokenizer: Tokenizer,
    *,
    batch_size: int = 128,
    **options,
) -> Evaluation:
    """Sample responses to every prompt, score them and estimate their KL to the reference.

    Prompts and reward are those of `best_of_n`: the reward is a RewardModel, an EnsembleReward, a
    callable, or a list of (reward, weight). Options are those of `sample_policy`.
    """
    pad_id = policy.config.pad_id or 0
    scorer = Scorer(reward, tokenizer=tokenizer, pad_id=pad_id, batch_size=batch_size)
    scorer.check_vocabulary(policy)
    scorer.check_columns(prompts)
    found = sample_policy(policy, reference, prompts, batch_size=batch_size, **options)
    repeated = [x for x in prompts for _ in range(len(found.ids) // len(prompts))]
    scores = scorer(repeated, found.ids)
    responses = [tokenizer.decode(ids) for ids in found.ids]
    return Evaluation(responses, scores, found.kl, found.lengths, found.ids)
