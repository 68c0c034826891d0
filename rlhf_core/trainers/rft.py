"""Rejection sampling: the policy is fine-tuned on the best of its own samples (RAFT: Dong et al. 2023; Touvron et al.
2023, sec. 3.2.3), or on every different one that is good enough (RFT: Yuan et al. 2023). In the second round and later
the policy that the round before has left is sampled from, and trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rlhf_core.data import Example, Tokenizer
from rlhf_core.models import Transformer
from rlhf_core.trainers.common import Trainer
from rlhf_core.trainers.config import option
from rlhf_core.trainers.rounds import goes_on, run_rounds
from rlhf_core.trainers.scoring import Reward
from rlhf_core.trainers.selection import Candidates, SamplingConfig, candidates, scorer_of
from rlhf_core.trainers.sft import SFTConfig, SFTTrainer


@dataclass(frozen=True)
class RFTConfig(SFTConfig, SamplingConfig):
    """Of the fields of SFT epochs and max_steps are those of a round, batch_size is also that of prompts to sample."""

    rounds: int = option(1, "times that the policy is sampled and fine-tuned")
    threshold: float | None = option(
        None, "learn every different response that scores so much; None: each prompt's best"
    )

    def __post_init__(self):
        super().__post_init__()
        SamplingConfig.__post_init__(self)
        self.check_positive("rounds")


def rft(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: RFTConfig,
    *,
    reward: Reward | Sequence[tuple[Reward, float]],
    eos_ids: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
    out: str | os.PathLike | None = None,
    resume: bool = False,
) -> list[dict]:
    """Train the model in place on the best of its own samples; returns the metrics of each round.

    prompts: lists of token ids. reward, eos_ids, tokenizer: as for `PPOTrainer`.
    out: folder for the model, metrics.jsonl with a line a round, and each round's SFT in round-1, round-2, ...
    resume: go on from what is in `out`; model, prompts and config as at first.

    Metrics: those of SFT's last step; of the samples objective/scores, their mean, and objective/best, that of each
    prompt's best; examples, how many were learned from.
    """
    scorer = scorer_of(model, config, reward=reward, tokenizer=tokenizer)
    Trainer(
        model, prompts, config, out=out
    )  # refuses what it refuses before anything is sampled or written

    def train_round(seed: int, folder: Path | None, history: list[dict]) -> dict:
        generator = torch.Generator().manual_seed(seed)
        found = candidates(model, prompts, scorer, config, eos_ids=eos_ids, generator=generator)
        examples = kept(found, config.threshold)
        trainer = SFTTrainer(
            model, examples, replace(config, seed=seed), tokenizer=tokenizer, out=folder
        )
        report = goes_on(trainer).train()[-1]
        scores = {
            "objective/scores": found.scores.mean().item(),
            "objective/best": found.best()[1].mean().item(),
        }
        return {**report, **scores, "examples": len(examples)}

    fixed = list(prompts), eos_ids, *scorer.models
    out = None if out is None else Path(out)
    return run_rounds(
        "rft", model, config, train_round, fixed=fixed, tokenizer=tokenizer, out=out, resume=resume
    )


def kept(found: Candidates, threshold: float | None) -> list[Example]:
    """What is learned: each prompt's best response, or without repetition all that score at least threshold."""
    if threshold is None:
        return [Example(*row) for row in zip(found.prompts, found.best()[0])]
    rows = zip(found.prompts, found.responses, found.scores.tolist())
    good = [
        (prompt, ids)
        for prompt, texts, scores in rows
        for ids, s in zip(texts, scores)
        if s >= threshold
    ]
    if not good:
        raise ValueError(f"no response scores {threshold}, the best one {found.scores.max():.6g}")
    return [
        Example(*map(list, row)) for row in dict.fromkeys((tuple(p), tuple(ids)) for p, ids in good)
    ]
