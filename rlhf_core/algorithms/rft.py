"""Rejection sampling: SFT on the policy's own best samples, in rounds.

RAFT (Dong et al. 2023; Touvron et al. 2023, section 3.2.3) keeps the best response to each prompt,
RFT (Yuan et al. 2023) every distinct one above a threshold. Each round samples from the policy that
the round before has trained, and trains it further.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_core.algorithms.sft import SFTConfig, SFTTrainer
from rlhf_core.data import Example, Tokenizer
from rlhf_core.feedback.candidates import (
    ALL_TIED,
    Candidates,
    SamplingConfig,
    candidates,
    make_scorer,
    prompts_for,
)
from rlhf_core.feedback.diversity import diversity
from rlhf_core.feedback.judges import Judge
from rlhf_core.feedback.rewards import Reward
from rlhf_core.generation import Engine
from rlhf_core.models import Transformer
from rlhf_core.options import option
from rlhf_core.training.config import PRINT_SAMPLES
from rlhf_core.training.rounds import (
    SAMPLE_ROUNDS,
    held_out,
    log_samples,
    resumed,
    run_rounds,
    with_seed,
)
from rlhf_core.training.run_log import OnStep
from rlhf_core.training.trainer import Trainer


@dataclass(frozen=True)
class RFTConfig(SFTConfig, SamplingConfig):
    """SFT's options, per round, and those of sampling; batch_size is also that of sampling."""

    rounds: int = option(1, "rounds of sampling and SFT", within="[1, inf)")
    sample_every: int = option(1, SAMPLE_ROUNDS, within="[0, inf)")
    print_samples: bool = option(False, PRINT_SAMPLES)
    threshold: float | None = option(
        None, "keep every distinct response with at least this score; unset: each prompt's best"
    )

    def __post_init__(self):
        super().__post_init__()
        self.check(
            ("keep_best", self.keep_best is None, "unset: round-N holds each round's model"),
        )


def rft(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: RFTConfig,
    *,
    reward: Reward | Sequence[tuple[Reward, float]],
    eos_ids: Sequence[int] | None = None,
    eval_prompts: Sequence[Sequence[int]] = (),
    eval_judge: Judge | None = None,
    pretraining_examples: Sequence[Example] = (),
    tokenizer: Tokenizer | None = None,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    on_step: OnStep | None = None,
    engine: Engine | None = None,
) -> list[dict]:
    """Train the model in place on the best of its own samples; returns each round's metrics.

    Metrics: those of SFT's last step and of `diversity`; objective/scores and objective/best, the
    mean score of all samples and of each prompt's best; examples, the number kept.

    Args:
        prompts: lists of token ids.
        reward, eos_ids, pretraining_examples, tokenizer: as for `PPOTrainer`.
        eval_prompts, eval_judge: held-out prompts, answered after every round, and the judge that
            compares the answers with the first policy's; see `evaluate_answers`.
        out: folder for the model, metrics.jsonl with a line per round, and each round's SFT in
            round-1, round-2, ...
        resume: continue the run in `out`, with the original model, prompts and config.
        on_step: called as on_step(metrics, round) after each round of this process; see `Trainer`.
        engine: as for `PPOTrainer`.
    """
    scorer = make_scorer(model, prompts, config, reward=reward, tokenizer=tokenizer)
    out = None if out is None else Path(out)
    checked = dict(pretraining_examples=pretraining_examples, tokenizer=tokenizer)
    # It checks the arguments before anything is sampled.
    Trainer(model, prompts, config, out=out, on_step=on_step, **checked)
    prompts = prompts_for(model, prompts, config).prompts
    where = dict(judge=eval_judge, eos_ids=eos_ids, tokenizer=tokenizer, engine=engine)
    evaluate = held_out(model, eval_prompts, config, scorer=scorer, **where)

    def train_round(seed: int, folder: Path | None, history: list[dict]) -> dict:
        generator = torch.Generator().manual_seed(seed)
        options = dict(eos_ids=eos_ids, tokenizer=tokenizer, generator=generator, engine=engine)
        samples = candidates(model, prompts, scorer, config, **options)
        log_samples(out, len(history) + 1, samples, config, tokenizer)
        examples = kept(samples, config.threshold)
        if config.threshold is None and config.num_samples > 1 and not samples.margins().any():
            warnings.warn(ALL_TIED, stacklevel=2)
        sft_config = with_seed(config, seed)
        trainer = resumed(SFTTrainer(model, examples, sft_config, out=folder, **checked))
        return trainer.train()[-1] | {
            "objective/scores": samples.scores.mean().item(),
            "objective/best": samples.best()[1].mean().item(),
            "examples": len(examples),
            **diversity(samples.responses),
            **evaluate(),
        }

    options = dict(scorer=scorer, tokenizer=tokenizer, out=out, resume=resume, on_step=on_step)
    fixed = dict(prompts=list(prompts), eos_ids=eos_ids)
    return run_rounds("rft", model, config, train_round, fixed=fixed, **options)


def kept(samples: Candidates, threshold: float | None) -> list[Example]:
    """The examples to learn: each prompt's best response, or all distinct ones above threshold."""
    if threshold is None:
        return [Example(*row) for row in zip(samples.prompts, samples.best()[0])]
    good = {
        (tuple(prompt), tuple(ids)): None
        for prompt, responses, scores in zip(*samples._replace(scores=samples.scores.tolist()))
        for ids, score in zip(responses, scores)
        if score >= threshold
    }
    if not good:
        raise ValueError(
            f"no response scores at least {threshold}; the best scores {samples.scores.max():.6g}"
        )
    return [Example(list(prompt), list(ids)) for prompt, ids in good]
