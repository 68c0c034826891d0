"""Iterated DPO: each round samples all prompts once and runs DPO on the pairs.

Xu et al. 2023; Xiong et al. 2024. Every loss and option of DPO works here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_core.algorithms.dpo import WITHOUT_REFERENCE, DPOTrainer
from rlhf_core.algorithms.online_dpo import OnlineDPOConfig, sample_metrics
from rlhf_core.data import Example, Tokenizer
from rlhf_core.feedback.candidates import ALL_TIED, candidates, make_scorer, prompts_for
from rlhf_core.feedback.judges import Judge
from rlhf_core.feedback.rewards import Reward
from rlhf_core.generation import Engine
from rlhf_core.models import Transformer
from rlhf_core.options import option
from rlhf_core.training.reference import frozen_copy
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
class IteratedDPOConfig(OnlineDPOConfig):
    """Online DPO's options; epochs and max_steps are those of a round."""

    rounds: int = option(3, "rounds of sampling and DPO", within="[1, inf)")
    sample_every: int = option(1, SAMPLE_ROUNDS, within="[0, inf)")
    reference_policy: str = option(
        "round",
        "DPO's reference: the policy at the start of the round, or the first policy",
        choices=("round", "first"),
    )

    def __post_init__(self):
        super().__post_init__()
        self.check(
            ("keep_best", self.keep_best is None, "unset: round-N holds each round's model"),
        )
        self.warn_unused(("reference_policy", self.has_reference, "without a reference"))

    @property
    def has_reference(self) -> bool:
        return not self.reference_free and self.loss not in WITHOUT_REFERENCE


def iterated_dpo(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: IteratedDPOConfig,
    *,
    reward: Reward | Sequence[tuple[Reward, float]] | None = None,
    judge: Judge | None = None,
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
    """Train the model in place by rounds of DPO on its own samples; returns each round's metrics.

    Arguments as for `OnlineDPOTrainer`; eval_prompts, eval_judge, out, resume and on_step as for
    `rft`.
    Metrics: those of DPO's last step and of all samples of the round, and the number of pairs.
    """
    scorer = make_scorer(model, prompts, config, reward=reward, judge=judge, tokenizer=tokenizer)
    keeps_first = config.has_reference and config.reference_policy == "first"
    first = frozen_copy(model) if keeps_first else None
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
        pairs = samples.pairs()
        if not pairs:
            raise ValueError(ALL_TIED)
        dpo_config, options = with_seed(config, seed), dict(reference=first, out=folder)
        trainer = resumed(DPOTrainer(model, pairs, dpo_config, **options, **checked))
        report = trainer.train()[-1] | sample_metrics(samples) | {"pairs": len(pairs)}
        return report | evaluate()

    options = dict(scorer=scorer, tokenizer=tokenizer, out=out, resume=resume, on_step=on_step)
    fixed = dict(prompts=list(prompts), eos_ids=eos_ids)
    return run_rounds("iterated_dpo", model, config, train_round, fixed=fixed, **options)
