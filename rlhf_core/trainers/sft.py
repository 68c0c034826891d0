"""Supervised fine-tuning: cross-entropy of the completion tokens, each token of a batch weighing the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rlhf_core.data import Example
from rlhf_core.data.collate import count_targets
from rlhf_core.ops import linear_token_statistics
from rlhf_core.trainers.common import Metrics, TrainConfig, Trainer, option, read_hidden


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    lr: float = option(2e-5, "peak learning rate of AdamW")
    max_length: int = option(1024, "tokens of prompt and completion together; what is longer is cut")
    packing: bool = option(False, "several sequences in a row of at most max_length: less padding, the same loss")


class SFTTrainer(Trainer):
    """model: Transformer; examples: `Example`s. Metrics: loss, mean_token_accuracy, entropy, num_tokens."""

    algorithm = "sft"
    main_metric = "loss"

    def losses(self, batch: list[Example], metrics: Metrics) -> Iterator[Tensor]:
        num_tokens = max(sum(map(count_targets, batch)), 1)

        def loss_of(logprobs, rows=slice(None)):
            return -logprobs.sum() / num_tokens

        packing = self.config.max_length if self.config.packing else None
        for tokens in self.token_batches(batch, packing=packing):
            with self.autocast():
                hidden = read_hidden(self.model.trunk, tokens, tokens.read)  # (M, D)
                logprobs, entropy, likeliest = linear_token_statistics(
                    hidden, self.model.head_weight, tokens.targets, loss_of=loss_of
                )
            metrics.add("mean_token_accuracy", likeliest)
            metrics.add("loss", -logprobs)
            metrics.add("entropy", entropy)
            yield loss_of(logprobs)

    def step(self, batch: list[Example]) -> dict[str, float]:
        return super().step(batch) | {"num_tokens": sum(map(count_targets, batch))}
