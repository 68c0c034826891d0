"""Reward models, from pairs (Bradley-Terry or hinge), ranked lists (Plackett-Luce) or steps.

All completions of a prompt share one forward. After the last step scores of pairs and lists are
normalized, and checked for length bias. A process reward model learns whether each step of a
solution is right; its scores stay log-odds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core import distributed
from rlhf_core.data import Pair, Ranked, Steps, TokenBatch
from rlhf_core.data.quality import differing, length_bias
from rlhf_core.data.store import join, kinds_of
from rlhf_core.losses import (
    bradley_terry_loss,
    centering_loss,
    margin_ranking_loss,
    plackett_luce_loss,
    preferred,
    process_reward_loss,
)
from rlhf_core.masking import masked_moments
from rlhf_core.models import RewardModel, eval_mode
from rlhf_core.options import option
from rlhf_core.training.completions import label_smoothing_of, warn_of_label_smoothing
from rlhf_core.training.config import MAX_LENGTH, TrainConfig
from rlhf_core.training.metrics import Metrics
from rlhf_core.training.trainer import Trainer

KINDS = {Pair: "pairs", Ranked: "ranked lists", Steps: "solutions in steps"}
USUAL_MARGIN = {"bradley_terry": 0.0, "margin_ranking": 1.0}


@dataclass(frozen=True)
class RewardConfig(TrainConfig):
    """Loss of reward models."""

    lr: float = option(1e-4, "peak learning rate of AdamW", within="(0, inf)")
    loss: str = option(
        "bradley_terry",
        "of pairs; margin_ranking is a hinge. Ranked lists use Plackett-Luce",
        choices=tuple(USUAL_MARGIN),
    )
    label_smoothing: float = option(
        0.0,
        "bradley_terry: share of pairs assumed to be labelled wrongly; a pair's own "
        "label_smoothing comes first",
        within="[0, 0.5)",
    )
    centering_coef: float = option(
        0.0,
        "weight of the squared sum of a pair's scores, which keeps them near 0",
        within="[0, inf)",
    )
    length_alpha: float = option(
        0.0,
        "part of a score that each token of a completion explains by itself, so that the model "
        "need not learn it; higher favours shorter completions. Not for steps",
        within="[0, inf)",
    )
    max_length: int = option(1024, MAX_LENGTH, within="[2, inf)")

    def __post_init__(self):
        super().__post_init__()
        smooths = self.loss == "bradley_terry"
        self.warn_unused(("label_smoothing", smooths, f"on loss {self.loss!r}"))


class RewardTrainer(Trainer):
    """Trains a RewardModel on `Pair`s (margin 0 unless given; margin_ranking: 1), `Ranked`s or
    `Steps`.

    Metrics of pairs, and of all pairs in ranked lists: loss, mean_reward, accuracy (a tie counts
    one half), margin. The last step adds score_mean and score_std over the training data, which
    become 0 and 1, and the `length_bias` on the evaluation examples, or on the training data
    without them. Metrics of steps: loss, mean_reward, labels (their mean), accuracy of the score's
    sign against labels above one half.
    """

    algorithm = "reward"
    main_metric = "accuracy"
    model_type = RewardModel
    kinds = tuple(KINDS)

    def __init__(self, model: RewardModel, examples, config: RewardConfig, **options):
        super().__init__(model, examples, config, **options)
        kind, *others = kinds_of(examples) | kinds_of(self.eval_examples)
        if others:
            named = " and ".join(sorted(KINDS[x] for x in (kind, *others)))
            raise ValueError(f"the examples are {named}; train and evaluate on one kind")
        pairs = kind is Pair
        config.check(
            ("loss", pairs or config.loss == "bradley_terry", f"the default on {KINDS[kind]}")
        )
        for name in ("label_smoothing", "centering_coef"):
            config.warn_unused((name, pairs, f"on {KINDS[kind]}"))
        config.warn_unused(("length_alpha", kind is not Steps, f"on {KINDS[Steps]}"))
        self.learns_steps = model.of_steps = kind is Steps
        if kind is not Steps:
            self.examples = differing(self.examples, KINDS[kind])
            self.eval_examples = differing(self.eval_examples, f"evaluation {KINDS[kind]}")
        if pairs and config.loss != "bradley_terry":
            warn_of_label_smoothing(join([self.examples, self.eval_examples]), config.loss)

    def losses(
        self, batch: list[Pair] | list[Ranked] | list[Steps], metrics: Metrics
    ) -> Iterator[Tensor]:
        if self.learns_steps:
            losses_of, count = self.step_losses, sum(len(example.labels) for example in batch)
        else:
            losses_of, count = self.order_losses, len(batch)
        for part, tokens in self.parts(batch, packing=self.config.max_length):
            loss = losses_of(part, tokens, metrics)
            metrics.add("loss", loss)
            yield loss.sum() / self.total(count)

    def step_losses(self, part: list[Steps], tokens: TokenBatch, metrics: Metrics) -> Tensor:
        """Losses (M,) of the steps."""
        with self.autocast():
            scores = self.model.token_scores(tokens)  # (M,)
        labels = scores.new_tensor([label for example in part for label in example.labels])
        right, wrong = preferred(scores, -scores), preferred(-scores, scores)
        metrics.add("accuracy", right.where(labels > 0.5, wrong))
        metrics.add("mean_reward", scores)
        metrics.add("labels", labels)
        return process_reward_loss(scores, labels)

    def order_losses(
        self, part: list[Pair] | list[Ranked], tokens: TokenBatch, metrics: Metrics
    ) -> Tensor:
        """Losses (B,) of the pairs or lists."""
        scores = self.scores(tokens)  # (N,)
        counts = [len(example.completions_ids) for example in part]
        counts = torch.tensor(counts, device=scores.device)
        mask = torch.arange(counts.amax(), device=scores.device) < counts[:, None]  # (B, K)
        scores = scores.new_zeros(mask.shape).masked_scatter(mask, scores)
        by_length = self.config.length_alpha * torch.zeros_like(scores).masked_scatter(
            mask, tokens.lengths.to(scores.dtype)
        )  # (B, K), what the lengths explain
        if isinstance(part[0], Ranked):
            loss = plackett_luce_loss(scores + by_length, mask)
        else:
            lead = by_length[:, 0] - by_length[:, 1]
            loss = self.pair_losses(*scores.unbind(dim=1), part, lead)
        K = scores.shape[1]
        better, worse = torch.triu_indices(K, K, 1, device=scores.device)
        both = mask[:, better] & mask[:, worse]  # (B, K (K - 1) / 2)
        metrics.add("accuracy", preferred(scores[:, better], scores[:, worse]), both)
        metrics.add("margin", scores[:, better] - scores[:, worse], both)
        metrics.add("mean_reward", scores, mask)
        return loss

    def pair_losses(
        self, chosen: Tensor, rejected: Tensor, pairs: list[Pair], lead: Tensor | float = 0.0
    ) -> Tensor:
        """Losses (B,) of the pairs' scores (B,), of which chosen leads by `lead` (B,) already."""
        config, usual = self.config, USUAL_MARGIN[self.config.loss]
        margins = (pair.margin for pair in pairs)
        margin = (
            chosen.new_tensor([usual if margin is None else margin for margin in margins]) - lead
        )
        if config.loss == "bradley_terry":
            smoothing = label_smoothing_of(pairs, config.label_smoothing, self.device)
            loss = bradley_terry_loss(chosen, rejected, margin=margin, label_smoothing=smoothing)
        else:
            loss = margin_ranking_loss(chosen, rejected, margin=margin)
        if config.centering_coef:
            loss = loss + config.centering_coef * centering_loss(chosen, rejected)
        return loss

    def scores(self, tokens: TokenBatch) -> Tensor:
        """The score (N,) of each sequence."""
        with self.autocast():
            return self.model.scores(tokens)

    def last_metrics(self) -> dict[str, float]:
        if self.learns_steps:
            return {}
        scores = self.scores_of(self.examples)
        mean, std = scores.mean().item(), scores.std(correction=0).item()
        if not masked_moments(scores, torch.ones_like(scores, dtype=torch.bool)).variance:
            scores, std = torch.full_like(scores, mean), 0.0
        bias_of, bias_scores = self.examples, scores
        if len(self.eval_examples):
            bias_of, bias_scores = self.eval_examples, self.scores_of(self.eval_examples)
        return {"score_mean": mean, "score_std": std, **length_bias(bias_of, bias_scores)}

    def finish(self, last: dict[str, float]) -> None:
        """Normalize scores to mean 0 and deviation 1 over the training data; not those of steps."""
        if not self.learns_steps:
            if "score_mean" not in last:  # a finished run, resumed without a further step
                last = self.last_metrics()
            self.model.normalize(last["score_mean"], last["score_std"] or 1.0)

    @torch.no_grad()
    def scores_of(self, examples: list[Pair] | list[Ranked]) -> Tensor:
        """Scores (N,) float64, on the CPU, of every completion."""
        size, scores = self.config.batch_size, []
        with eval_mode(self.model):
            for start in range(0, len(examples), size):
                batch = list(examples[start : start + size])
                parts = self.parts(batch, packing=self.config.max_length)
                scores += distributed.gather((self.scores(tokens),) for _, tokens in parts)
        return torch.cat(scores).double().cpu()
