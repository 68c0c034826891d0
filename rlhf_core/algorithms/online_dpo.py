"""Online DPO: each step learns from the policy's own samples, labelled by a reward or a judge.

Guo et al. 2024; Calandriello et al. 2024. Every loss and option of DPO works here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_core import distributed
from rlhf_core.algorithms.dpo import DPOConfig, DPOTrainer
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
from rlhf_core.training.config import PRINT_SAMPLES, SAMPLE_EVERY
from rlhf_core.training.reference import Reference


@dataclass(frozen=True)
class OnlineDPOConfig(DPOConfig, SamplingConfig):
    """DPO's options, with batch_size in prompts, and those of sampling."""

    num_samples: int = option(
        2, "responses to each prompt; the best and the worst are the pair", within="[2, inf)"
    )
    sample_every: int = option(10, SAMPLE_EVERY, within="[0, inf)")
    print_samples: bool = option(False, PRINT_SAMPLES)

    def __post_init__(self):
        super().__post_init__()
        unset = self.reference_logprobs is None
        self.check(("reference_logprobs", unset, "unset: samples are not known in advance"))


class OnlineDPOTrainer(DPOTrainer):
    """Trains a Transformer on prompts (lists of token ids).

    Metrics: DPO's, response_length, and objective/{scores,margin,ties} of the samples: the mean
    score (one half with a judge), the mean of best minus worst, and the share of prompts whose
    responses tie; objective/failures, the share of responses that a judge could not score, which
    count in no mean; and those of `diversity`. A step without pairs changes nothing and has no
    metrics of DPO.
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
        eval_examples: Sequence[Sequence[int]] = (),
        eval_judge: Judge | None = None,
        engine: Engine | None = None,
        **options,
    ):
        """
        Args:
            examples: prompts, as for PPO.
            reward, judge: one of them. A judge maps (prompts, first, second, **columns) to the
                probability that each first response is better, 0.5 for a tie. Responses that tie
                are no pair.
            eos_ids, tokenizer, reference, eval_examples, eval_judge, engine: as for PPO.
        """
        if len(examples):
            examples = prompts_for(model, examples, config).prompts
        if len(eval_examples):
            eval_examples = prompts_for(model, eval_examples, config).prompts
        super().__init__(model, examples, config, eval_examples=eval_examples, **options)
        self.eval_judge, self.engine = eval_judge, engine
        if judge is not None:
            self.main_metric = super().main_metric  # a judge's mean score is always one half
        scorer = dict(reward=reward, judge=judge, tokenizer=self.tokenizer)
        self.scorer = make_scorer(model, self.examples, config, **scorer)
        if len(eval_examples):
            self.eval_reference = self.reference or Reference(model)
            self.scorer.check_columns(eval_examples)
        self.eos_ids = model.config.eos_ids if eos_ids is None else tuple(eos_ids)
        self.generator = torch.Generator().manual_seed(config.seed)

    def fixed_models(self) -> list:
        return [*super().fixed_models(), *self.scorer.models]

    def settings(self) -> dict:
        return {"eos_ids": self.eos_ids}

    def step(self, batch: list[list[int]]) -> dict[str, float]:
        """Sample responses to the prompts, and take a step of DPO on the pairs among them."""
        options = dict(eos_ids=self.eos_ids, tokenizer=self.tokenizer, generator=self.generator)
        options["engine"] = self.engine
        samples = candidates(self.model, batch, self.scorer, self.config, **options)
        rows = samples.rows()
        self.note_samples(*rows)
        if not distributed.rank():  # every rank holds all responses
            self.tokens += sum(map(len, rows[1]))
        pairs, report = samples.pairs(), sample_metrics(samples)
        if not pairs:
            self.warn_once(ALL_TIED)
            return report | {"lr": self.optimizer.param_groups[0]["lr"]}
        return super().step(pairs) | report


def sample_metrics(samples: Candidates) -> dict[str, float]:
    """The metrics of samples, see `OnlineDPOTrainer`."""
    lengths = [len(ids) for responses in samples.responses for ids in responses]
    margins, failed = samples.margins(), samples.scores.isnan()
    means = {"objective/scores": samples.scores, "objective/margin": margins}
    return {
        **{name: x.nanmean().item() for name, x in means.items() if not failed.all()},
        "objective/ties": (margins == 0).double().mean().item(),
        "objective/failures": failed.double().mean().item(),
        "response_length": sum(lengths) / len(lengths),
        **diversity(samples.responses),
    }
