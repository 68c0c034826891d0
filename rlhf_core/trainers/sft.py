"""Supervised fine-tuning: cross-entropy of the completion tokens, each token of a batch weighing the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from rlhf_core.data import Example, collate
from rlhf_core.masking import loss_weights
from rlhf_core.ops import token_logprobs_and_entropy
from rlhf_core.trainers.common import Metrics, TrainConfig, Trainer, micro_batches, option, to_device


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    lr: float = option(2e-5, "peak learning rate of AdamW")
    max_length: int = option(1024, "tokens of prompt and completion together; what is longer is cut")


class SFTTrainer(Trainer):
    """model: Transformer; examples: `Example`s. Metrics: loss, mean_token_accuracy, entropy, num_tokens."""

    algorithm = "sft"
    main_metric = "loss"

    def losses(self, batch: list[Example], metrics: Metrics) -> Iterator[Tensor]:
        tokens = to_device(collate(batch, self.pad_id), self.device)
        weights = loss_weights(tokens.target_mask)  # (B, T)
        for part, w in micro_batches(self.config.micro_batch_size, tokens, weights):
            hidden = self.model.trunk(part.input_ids)  # (B, T, D); padding is on the right, where no real token looks
            logits = self.model.logits(hidden[part.target_mask])  # (N, V): whole, as the accuracy looks at them too
            targets = part.targets[part.target_mask]  # (N,)
            metrics.add("mean_token_accuracy", logits.detach().argmax(dim=-1) == targets)
            logprobs, entropy = token_logprobs_and_entropy(logits, targets, inplace_backward=True)
            metrics.add("loss", -logprobs)
            metrics.add("entropy", entropy)
            yield -(logprobs * w[part.target_mask]).sum()

    def step(self, batch: list[Example]) -> dict[str, float]:
        # A first token with nothing before it is no target.
        num_tokens = sum(len(completion) - (not prompt) for prompt, completion in batch)
        return super().step(batch) | {"num_tokens": num_tokens}
