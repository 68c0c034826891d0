"""Held-out prompts: what a policy answers to them while it trains.

The answers have seeds of their own, the same in every evaluation. So evaluations differ by the
policy alone, and a run takes the same steps, bit by bit, with them and without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from rlhf_core.data import Tokenizer
from rlhf_core.feedback.judges import Judge, JudgeScorer, judged_in_both_orders
from rlhf_core.feedback.rewards import Scorer
from rlhf_core.generation import Engine
from rlhf_core.models import eval_mode
from rlhf_core.ops import kl_estimate
from rlhf_core.rollout import response_logprobs, sample
from rlhf_core.training.metrics import Metrics
from rlhf_core.training.reference import Reference


@torch.no_grad()
def evaluate_answers(
    policy: nn.Module,
    prompts: Sequence[list[int]],
    config: Any,
    *,
    scorer: Scorer | JudgeScorer,
    reference: Reference | None,
    judge: Judge | None = None,
    eos_ids: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    engine: Engine | None = None,
) -> tuple[dict[str, float], tuple[list, list, list]]:
    """Sample an answer to every prompt, and measure it.

    Args:
        config: response_length, temperature, stop_strings, batch_size and seed of the sampling.
        scorer: of a reward. One of a judge is as the judge.
        reference: the answers' KL to it is estimated; the judge compares with its answers.
        judge: compares the answers with the reference's in both orders.
        autocast: makes the context of the forward passes of the reference.
        engine: samples the policy's answers in place of `generate`.

    Returns:
        The metrics: eval_reward, the mean score; eval_spread, the standard deviation between the
        models of an ensemble; eval_kl in nats per answer; eval_length in tokens; eval_win_rate by
        the judge, a tie is one half. Those without a source are left out. And prompts, answers, and
        their scores or the judge's probabilities; empty without both.
    """
    if isinstance(scorer, JudgeScorer):
        judge = judge or scorer.judge
    generator = torch.Generator().manual_seed(config.seed)
    seeds = torch.randint(2**63 - 1, (len(prompts),), generator=generator)
    metrics, answers, scores = Metrics(), [], []
    for start in range(0, len(prompts), config.batch_size):
        part = slice(start, start + config.batch_size)
        options: dict[str, Any] = dict(
            max_new_tokens=config.response_length,
            temperature=config.temperature,
            stop_strings=config.stop_strings,
            eos_ids=eos_ids,
            tokenizer=tokenizer,
            seeds=seeds[part],
        )
        with eval_mode(policy):
            rollout = sample(policy, prompts[part], engine=engine, **options)
        responses, mask = rollout.responses(), rollout.response_mask
        answers += responses
        metrics.add("eval_length", mask.sum(dim=1))
        if isinstance(scorer, Scorer):
            found = scorer(prompts[part], responses)
            metrics.add("eval_reward", found)
            spread = scorer.spread(prompts[part], responses)
            if spread is not None:
                metrics.add("eval_spread", spread)
            scores += found.tolist()
        if reference is None:
            continue
        with reference.policy() as other, autocast():
            ref_logprobs, _ = response_logprobs(other, rollout, config.temperature)
            old = sample(other, prompts[part], **options).responses() if judge else []
        kl = kl_estimate(rollout.logprobs, ref_logprobs, mask=mask).sum(dim=1)
        metrics.add("eval_kl", kl)
        if judge is not None:
            wins = judged_in_both_orders(judge, prompts[part], responses, old, tokenizer=tokenizer)
            metrics.add("eval_win_rate", wins.nan_to_num(), ~wins.isnan())
            if isinstance(scorer, JudgeScorer):
                scores += wins.tolist()
    return metrics.means(), (list(prompts), answers[: len(scores)], scores)
