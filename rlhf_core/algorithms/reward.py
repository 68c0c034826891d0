"""Reward models, from pairs (Bradley-Terry or hinge), ranked lists (Plackett-Luce) or steps.

All completions of a prompt share one forward. After the last step scores of pairs and lists are
normalized, and checked for length bias. A process reward model learns whether each step of a
solution is right; its scores stay log-odds. A model of several criteria learns from pairs, of which
each says by which criteria it was decided; one that says nothing trains the weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core import distributed
from rlhf_core.data import Pair, Ranked, Steps, TokenBatch
from rlhf_core.data.quality import differing, length_bias
from rlhf_core.data.store import has, join, kinds_of
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

    A model of several criteria has accuracy/NAME, over the pairs that label it, and
    mean_reward/NAME; loss, accuracy and margin are over all labels. Its last step has
    score_mean/NAME and score_std/NAME. Each mean becomes 0. All scores are divided by the root mean
    square of the deviations, so no ranking changes, and weights mean what they did in training.
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
        if model.criteria or (pairs and has(join([examples, self.eval_examples]), "criteria")):
            self._check_criteria(kind)
        if kind is not Steps:
            self.examples = differing(self.examples, KINDS[kind])
            self.eval_examples = differing(self.eval_examples, f"evaluation {KINDS[kind]}")
        if pairs and config.loss != "bradley_terry":
            warn_of_label_smoothing(join([self.examples, self.eval_examples]), config.loss)

    def _check_criteria(self, kind: type) -> None:
        """Raise ValueError unless the pairs label the model's criteria, and all of these."""
        names = self.model.criteria
        if kind is not Pair:
            known = ", ".join(names)
            raise ValueError(f"the model scores {known}: train it on pairs, not {KINDS[kind]}")
        found, held_out = (
            {name for pair in pairs for name in pair.criteria or ()}
            for pairs in (self.examples, self.eval_examples)
        )
        for name in sorted((found | held_out) - names.keys()):
            known = ", ".join(names) or "one score; see RewardModel.set_criteria"
            raise ValueError(f"pairs label criterion {name!r}, but the model has {known}")
        for name in sorted(names.keys() - found):
            raise ValueError(
                f"no training pair labels criterion {name!r}. Add some, or leave it out"
            )

    def losses(
        self, batch: list[Pair] | list[Ranked] | list[Steps], metrics: Metrics
    ) -> Iterator[Tensor]:
        if self.learns_steps:
            losses_of, count = self.step_losses, sum(len(example.labels) for example in batch)
        else:
            losses_of = self.pair_losses if isinstance(batch[0], Pair) else self.list_losses
            count = len(batch)
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

    def list_losses(self, part: list[Ranked], tokens: TokenBatch, metrics: Metrics) -> Tensor:
        """Losses (B,) of ranked lists."""
        scores = self.scores(tokens)[:, 0]  # (N,)
        counts = [len(example.completions_ids) for example in part]
        counts = torch.tensor(counts, device=scores.device)
        mask = torch.arange(counts.amax(), device=scores.device) < counts[:, None]  # (B, K)
        scores = scores.new_zeros(mask.shape).masked_scatter(mask, scores)
        by_length = self.config.length_alpha * torch.zeros_like(scores).masked_scatter(
            mask, tokens.lengths.to(scores.dtype)
        )  # (B, K), what the lengths explain
        K = scores.shape[1]
        better, worse = torch.triu_indices(K, K, 1, device=scores.device)
        both = mask[:, better] & mask[:, worse]  # (B, K (K - 1) / 2)
        metrics.add("accuracy", preferred(scores[:, better], scores[:, worse]), both)
        metrics.add("margin", scores[:, better] - scores[:, worse], both)
        metrics.add("mean_reward", scores, mask)
        return plackett_luce_loss(scores + by_length, mask)

    def pair_losses(self, part: list[Pair], tokens: TokenBatch, metrics: Metrics) -> Tensor:
        """Losses (B,) of pairs: of the score, or the mean over the criteria that a pair labels."""
        B, names = len(part), [None, *self.model.criteria]
        table = self.scores(tokens)  # (2 B, 1 + K)
        labels = [
            (row, names.index(name), int(not chosen))
            for row, pair in enumerate(part)
            for name, chosen in (pair.criteria or {None: True}).items()
        ]
        pairs = [part[row] for row, _, _ in labels]
        row, column, winner = torch.tensor(labels, device=table.device).unbind(dim=1)  # (M,) each
        scores = table.view(B, 2, -1)
        better, worse = scores[row, winner, column], scores[row, 1 - winner, column]
        by_length = self.config.length_alpha * tokens.lengths.view(B, 2)  # what lengths explain
        lead = by_length[row, winner] - by_length[row, 1 - winner]
        accuracy = preferred(better, worse)
        metrics.add("accuracy", accuracy)
        metrics.add("margin", better - worse)
        for i, (suffix, values) in enumerate(zip(self.suffixes, table.unbind(dim=1))):
            metrics.add(f"mean_reward{suffix}", values)
            if i:
                metrics.add(f"accuracy{suffix}", accuracy, column == i)
        shares = table.new_tensor([1 / max(len(pair.criteria or ()), 1) for pair in pairs])
        loss = shares * self.label_losses(better, worse, pairs, lead)
        return loss.new_zeros(B).index_add(0, row, loss)

    def label_losses(
        self, chosen: Tensor, rejected: Tensor, pairs: list[Pair], lead: Tensor
    ) -> Tensor:
        """Losses (M,) of the pairs' scores (M,), of which chosen leads by `lead` (M,) already."""
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

    @property
    def suffixes(self) -> list[str]:
        """What the metrics' names end with, for the score and for each criterion."""
        return ["", *(f"/{name}" for name in self.model.criteria)]

    def scores(self, tokens: TokenBatch) -> Tensor:
        """The score of each sequence, and those by each criterion: (N, 1 + K) float32."""
        with self.autocast():
            each = self.model.scores_each(tokens)
        score = self.model.combine(each)[:, None]
        return torch.cat([score, each.float()], dim=1) if self.model.criteria else score

    def last_metrics(self) -> dict[str, float]:
        if self.learns_steps:
            return {}
        table, report = self.scores_of(self.examples), {}
        for suffix, column in zip(self.suffixes, table.unbind(dim=1)):
            same = not masked_moments(column, torch.ones_like(column, dtype=torch.bool)).variance
            report[f"score_mean{suffix}"] = column.mean().item()
            report[f"score_std{suffix}"] = 0.0 if same else column.std(correction=0).item()
        bias_of, scores = self.examples, table[:, 0]
        if not report["score_std"]:
            scores = torch.full_like(scores, report["score_mean"])
        if len(self.eval_examples):
            bias_of, scores = self.eval_examples, self.scores_of(self.eval_examples)[:, 0]
        bias = length_bias(bias_of, scores)
        if self.model.criteria:  # by which the chosen completion need not have the higher score
            bias.pop("accuracy_where_shorter_won", None)
        return report | bias

    def finish(self, last: dict[str, float]) -> None:
        """Normalize scores to mean 0 and deviation 1 over the training data; not those of steps."""
        if not self.learns_steps:
            if "score_mean" not in last:  # a finished run, resumed without a further step
                last = self.last_metrics()
            heads = self.suffixes[1:] or [""]
            mean, std = ([last[f"score_{x}{head}"] for head in heads] for x in ("mean", "std"))
            pooled = math.hypot(*std) / len(std) ** 0.5
            self.model.normalize(torch.tensor(mean, device=self.device), pooled or 1.0)

    @torch.no_grad()
    def scores_of(self, examples: list[Pair] | list[Ranked]) -> Tensor:
        """The `scores` (N, 1 + K) of every completion, float64, on the CPU."""
        size, scores = self.config.batch_size, []
        with eval_mode(self.model):
            for start in range(0, len(examples), size):
                batch = list(examples[start : start + size])
                parts = self.parts(batch, packing=self.config.max_length)
                scores += distributed.gather((self.scores(tokens),) for _, tokens in parts)
        return torch.cat(scores).double().cpu()
