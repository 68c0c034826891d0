"""Reward model from preference pairs (Bradley-Terry or hinge) or ranked lists (Plackett-Luce): all completions of a
prompt in one forward, behind it. At the end its scores are normalised, and looked at for a bias to long completions.

From solutions whose steps are right or wrong it learns to score steps (a process reward model). These scores stay as
they are: their sigmoid is the probability that the step is right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.data import Pair, Ranked, Steps, TokenBatch
from rlhf_core.evaluation import length_bias
from rlhf_core.losses import (
    bradley_terry_loss,
    centering_loss,
    margin_ranking_loss,
    plackett_luce_loss,
    preferred,
    process_reward_loss,
)
from rlhf_core.models import RewardModel, eval_mode
from rlhf_core.trainers.common import Metrics, Trainer
from rlhf_core.trainers.config import TrainConfig, option

KINDS = {Pair: "pairs", Ranked: "ranked lists", Steps: "solutions in steps"}
LOSSES = {
    "bradley_terry": (bradley_terry_loss, 0.0),
    "margin_ranking": (margin_ranking_loss, 1.0),
}  # usual margin
ALIKE = 1e-5  # scores that vary by less, relative to the largest, vary by rounding: to divide by that would blow it up


@dataclass(frozen=True)
class RewardConfig(TrainConfig):
    lr: float = option(1e-4, "peak learning rate of AdamW")
    loss: str = option(
        "bradley_terry", "bradley_terry (of ranked lists: Plackett-Luce) or margin_ranking (hinge)"
    )
    label_smoothing: float = option(
        0.0, "bradley_terry: share of labels taken to be wrong, in [0, 0.5)"
    )
    centering_coef: float = option(
        0.0, "weight of a pair's squared sum of scores, added to the loss"
    )
    max_length: int = option(
        1024, "tokens of prompt and completion together; what is longer is cut"
    )

    def __post_init__(self):
        super().__post_init__()
        self.check_choices(loss=tuple(LOSSES))
        self.check(
            ("label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)"),
            ("centering_coef", self.centering_coef >= 0, "at least 0"),
        )
        self.check_effective(
            ("label_smoothing", self.loss == "bradley_terry", f"on loss {self.loss!r}")
        )


class RewardTrainer(Trainer):
    """model: RewardModel; examples: `Pair`s, whose margin is 0 (margin_ranking: 1) where they have none, `Ranked`s,
    or `Steps`.

    Metrics: loss, mean_reward; of all pairs, a ranked list being several: accuracy (a tie is one half), margin. Those
    of the last step also tell score_mean and score_std over the training data, as which 0 and 1 count from then on,
    and the `length_bias` on the evaluation examples, or, without these, on the training data. Of steps there are
    accuracy, of a score being above 0 where the label is above one half, and the mean of the labels.
    """

    algorithm = "reward"
    main_metric = "accuracy"
    model_type = RewardModel
    kinds = tuple(KINDS)

    def __init__(self, model: RewardModel, examples, config: RewardConfig, **options):
        super().__init__(model, examples, config, **options)
        kind, *others = {type(row) for row in (*examples, *self.eval_examples)}
        if others:
            named = " and ".join(sorted(KINDS[x] for x in (kind, *others)))
            raise ValueError(f"there are {named}; train and evaluate on one of them")
        of_pairs = ("loss", "label_smoothing", "centering_coef")
        config.check_effective(*((name, kind is Pair, f"on {KINDS[kind]}") for name in of_pairs))
        self.learns_steps = model.of_steps = kind is Steps
        if kind is not Steps and all(
            ids == row.completions_ids[0] for row in examples for ids in row.completions_ids
        ):
            raise ValueError(
                f"of none of the {len(examples)} {KINDS[kind]} do the completions differ"
            )

    def losses(
        self, batch: list[Pair] | list[Ranked] | list[Steps], metrics: Metrics
    ) -> Iterator[Tensor]:
        losses_of = self.step_losses if self.learns_steps else self.order_losses
        count = sum(len(example.labels) for example in batch) if self.learns_steps else len(batch)
        for part, tokens in self.parts(batch, packing=self.config.max_length):
            loss = losses_of(part, tokens, metrics)
            metrics.add("loss", loss)
            yield loss.sum() / count

    def step_losses(self, part: list[Steps], tokens: TokenBatch, metrics: Metrics) -> Tensor:
        """Losses (M,) of the steps."""
        with self.autocast():
            scores = self.model.token_scores(tokens)  # (M,)
        labels = scores.new_tensor([label for example in part for label in example.labels])
        metrics.add(
            "accuracy", preferred(scores, -scores).where(labels > 0.5, preferred(-scores, scores))
        )
        metrics.add("mean_reward", scores)
        metrics.add("labels", labels)
        return process_reward_loss(scores, labels)

    def order_losses(
        self, part: list[Pair] | list[Ranked], tokens: TokenBatch, metrics: Metrics
    ) -> Tensor:
        """Losses (B,) of the pairs or lists."""
        scores = self.scores(tokens)  # (N,)
        counts = torch.tensor(
            [len(example.completions_ids) for example in part], device=scores.device
        )
        mask = torch.arange(counts.amax(), device=scores.device) < counts[:, None]  # (B, K)
        scores = scores.new_zeros(mask.shape).masked_scatter(mask, scores)
        if isinstance(part[0], Ranked):
            loss = plackett_luce_loss(scores, mask)
        else:
            loss = self.pair_losses(*scores.unbind(dim=1), [example.margin for example in part])
        better, worse = torch.triu_indices(*(scores.shape[1:] * 2), 1, device=scores.device)
        both = mask[:, better] & mask[:, worse]  # (B, K (K - 1) / 2)
        metrics.add("accuracy", preferred(scores[:, better], scores[:, worse]), both)
        metrics.add("margin", scores[:, better] - scores[:, worse], both)
        metrics.add("mean_reward", scores, mask)
        return loss

    def pair_losses(self, chosen: Tensor, rejected: Tensor, margins: list[float | None]) -> Tensor:
        """Losses (B,) of scores (B,)."""
        config, (loss_of, usual) = self.config, LOSSES[self.config.loss]
        margin = chosen.new_tensor([usual if margin is None else margin for margin in margins])
        smoothing = {"label_smoothing": config.label_smoothing} if config.label_smoothing else {}
        loss = loss_of(chosen, rejected, margin=margin, **smoothing)
        return (
            loss + config.centering_coef * centering_loss(chosen, rejected)
            if config.centering_coef
            else loss
        )

    def scores(self, tokens: TokenBatch) -> Tensor:
        """One (N,) for each sequence."""
        with self.autocast():
            return self.model.scores(tokens)

    def last_metrics(self) -> dict[str, float]:
        if self.learns_steps:
            return {}
        scores = self.scores_of(self.examples)
        mean, std = scores.mean().item(), scores.std(correction=0).item()
        if std < ALIKE * scores.abs().max():
            scores, std = torch.full_like(scores, mean), 0.0
        held_out = self.eval_examples
        bias = (
            length_bias(held_out, self.scores_of(held_out))
            if len(held_out)
            else length_bias(self.examples, scores)
        )
        return {"score_mean": mean, "score_std": std, **bias}

    def finish(self, last: dict[str, float]) -> None:
        """Normalise the scores to mean 0 and standard deviation 1 over the training data; those of steps stay."""
        if not self.learns_steps:
            last = (
                last if "score_mean" in last else self.last_metrics()
            )  # of a run that goes on only to end
            self.model.normalize(last["score_mean"], last["score_std"] or 1.0)

    @torch.no_grad()
    def scores_of(self, examples: list[Pair] | list[Ranked]) -> Tensor:
        """Scores (N,) in float64, on the CPU, of every completion."""
        size, scores = self.config.batch_size, []
        with eval_mode(self.model):
            for start in range(0, len(examples), size):
                for tokens in self.token_batches(
                    examples[start : start + size], packing=self.config.max_length
                ):
                    scores.append(self.scores(tokens))
        return torch.cat(scores).double().cpu()
