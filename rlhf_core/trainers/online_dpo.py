"""DPO on the policy's own samples, labelled by a reward or a judge.

Online: each step samples anew (Guo et al. 2024; Calandriello et al. 2024). Iterated: each round samples all prompts
once and is a run of DPO on them (Xu et al. 2023; Xiong et al. 2024). Every loss and option of DPO's works in both.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rlhf_core.data import Tokenizer
from rlhf_core.models import Transformer
from rlhf_core.trainers.common import Trainer
from rlhf_core.trainers.config import option
from rlhf_core.trainers.dpo import WITHOUT_REFERENCE, DPOConfig, DPOTrainer
from rlhf_core.trainers.reference import frozen_copy
from rlhf_core.trainers.rounds import goes_on, run_rounds
from rlhf_core.trainers.scoring import Reward
from rlhf_core.trainers.selection import Candidates, Judge, SamplingConfig, candidates, scorer_of


@dataclass(frozen=True)
class OnlineDPOConfig(DPOConfig, SamplingConfig):
    """DPO's fields, batch_size in prompts; of more than two samples the best and the worst are the pair."""

    num_samples: int = option(2, "responses to each prompt, at least 2")

    def __post_init__(self):
        super().__post_init__()
        SamplingConfig.__post_init__(self)
        self.check(("num_samples", self.num_samples >= 2, "at least 2 for a pair"))
        self.check_effective(("reference_logprobs", False, "on samples, being of given pairs"))


class OnlineDPOTrainer(DPOTrainer):
    """model: Transformer; examples: prompts as lists of token ids; reference, eos_ids, tokenizer: as for PPO.

    reward, judge: one of them; a judge is a callable (prompts, first, second) -> how probable it is for each that the
    first response is the better one, 0.5 for a tie. Responses that tie are no pair, and a step without pairs moves
    nothing and has no metrics of DPO's.

    Metrics: DPO's; of the samples objective/{scores,margin,ties}: mean score (by a judge one half), mean of best minus
    worst, share of prompts whose responses tie; response_length.
    """

    algorithm = "online_dpo"
    main_metric = "objective/scores"
    kinds = ()

    def __init__(
        self,
        model: Transformer,
        examples: Sequence[Sequence[int]],
        config: OnlineDPOConfig,
        *,
        reward: Reward | Sequence[tuple[Reward, float]] | None = None,
        judge: Judge | None = None,
        eos_ids: Sequence[int] | None = None,
        **options,
    ):
        super().__init__(model, examples, config, **options)
        if judge is not None:
            self.main_metric = (
                super().main_metric
            )  # the mean of a judge's scores is always one half
        self.scorer = scorer_of(model, config, reward=reward, judge=judge, tokenizer=self.tokenizer)
        self.eos_ids = model.config.eos_ids if eos_ids is None else tuple(eos_ids)
        self.generator = torch.Generator().manual_seed(config.seed)

    def settings(self) -> dict:
        return {"eos_ids": self.eos_ids}

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"sampling": self.generator.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        self.generator.set_state(state["sampling"])

    def step(self, batch: list[list[int]]) -> dict[str, float]:
        options = dict(eos_ids=self.eos_ids, generator=self.generator)
        found = candidates(self.model, batch, self.scorer, self.config, **options)
        pairs, report = found.pairs(), sample_metrics(found)
        if not pairs:
            return report | {"lr": self.optimizer.param_groups[0]["lr"]}
        return super().step(pairs) | report


@dataclass(frozen=True)
class IteratedDPOConfig(OnlineDPOConfig):
    """epochs and max_steps are those of a round."""

    rounds: int = option(3, "times that the policy is sampled and trained by DPO on the pairs")
    reference_policy: str = option(
        "round", "what DPO compares with: round, the policy at the round's start, or first"
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("rounds")
        self.check_choices(reference_policy=("round", "first"))
        without = self.reference_free or self.loss in WITHOUT_REFERENCE
        self.check_effective(("reference_policy", not without, "where there is no reference"))


def iterated_dpo(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    config: IteratedDPOConfig,
    *,
    reward: Reward | Sequence[tuple[Reward, float]] | None = None,
    judge: Judge | None = None,
    eos_ids: Sequence[int] | None = None,
    tokenizer: Tokenizer | None = None,
    out: str | os.PathLike | None = None,
    resume: bool = False,
) -> list[dict]:
    """Train the model in place by rounds of DPO on its own samples; returns the metrics of each round.

    Arguments as for `OnlineDPOTrainer` and, out and resume, for `rft`. Metrics: those of DPO's last step, those of all
    the round's samples, and pairs, how many there were to learn from.
    """
    scorer = scorer_of(model, config, reward=reward, judge=judge, tokenizer=tokenizer)
    first = frozen_copy(model) if config.reference_policy == "first" else None
    Trainer(
        model, prompts, config, out=out
    )  # refuses what it refuses before anything is sampled or written

    def train_round(seed: int, folder: Path | None, history: list[dict]) -> dict:
        generator = torch.Generator().manual_seed(seed)
        found = candidates(model, prompts, scorer, config, eos_ids=eos_ids, generator=generator)
        pairs = found.pairs()
        if not pairs:
            raise ValueError("the responses to every prompt score alike: there is nothing to learn")
        trainer = DPOTrainer(
            model,
            pairs,
            replace(config, seed=seed),
            reference=first,
            tokenizer=tokenizer,
            out=folder,
        )
        return goes_on(trainer).train()[-1] | sample_metrics(found) | {"pairs": len(pairs)}

    fixed = list(prompts), eos_ids, *scorer.models
    out = None if out is None else Path(out)
    return run_rounds(
        "iterated_dpo",
        model,
        config,
        train_round,
        fixed=fixed,
        tokenizer=tokenizer,
        out=out,
        resume=resume,
    )


def sample_metrics(found: Candidates) -> dict[str, float]:
    """Of the samples, see `OnlineDPOTrainer`."""
    lengths = [len(ids) for texts in found.responses for ids in texts]
    margins = found.margins()
    return {
        "objective/scores": found.scores.mean().item(),
        "objective/margin": margins.mean().item(),
        "objective/ties": (margins == 0).double().mean().item(),
        "response_length": sum(lengths) / len(lengths),
    }
