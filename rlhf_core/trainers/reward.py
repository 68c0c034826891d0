"""Reward model from preference pairs: Bradley-Terry, both completions in one forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rlhf_core.data import Pair, collate_pairs
from rlhf_core.losses import bradley_terry_loss, preferred
from rlhf_core.trainers.common import Metrics, TrainConfig, Trainer, micro_batches, option, to_device


@dataclass(frozen=True)
class RewardConfig(TrainConfig):
    lr: float = option(1e-4, "peak learning rate of AdamW")
    max_length: int = option(1024, "tokens of prompt and completion together; what is longer is cut")


class RewardTrainer(Trainer):
    """model: RewardModel; examples: `Pair`s. Metrics: loss, accuracy (a tie is one half), margin, mean_reward."""

    algorithm = "reward"
    main_metric = "accuracy"

    def losses(self, batch: list[Pair], metrics: Metrics) -> Iterator[Tensor]:
        pairs = to_device(collate_pairs(batch, self.pad_id), self.device)  # (B, 2, T)
        for (part,) in micro_batches(self.config.micro_batch_size, pairs):
            scores = self.model(part.input_ids.flatten(0, 1), part.attention_mask.flatten(0, 1)).view(-1, 2)  # (B, 2)
            chosen, rejected = scores.unbind(dim=1)
            loss = bradley_terry_loss(chosen, rejected)
            metrics.add("loss", loss)
            metrics.add("accuracy", preferred(chosen, rejected))
            metrics.add("margin", chosen - rejected)
            metrics.add("mean_reward", scores)
            yield loss.sum() / len(batch)
