"""Direct preference optimisation: the policy against a frozen reference on pairs, no reward model, no sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.data import Pair, TokenBatch, collate_pairs
from rlhf_core.losses import dpo_loss, preferred
from rlhf_core.models import Transformer
from rlhf_core.ops import linear_token_logprobs_and_entropy
from rlhf_core.trainers.common import Metrics, TrainConfig, Trainer, frozen_copy, micro_batches, option, to_device


@dataclass(frozen=True)
class DPOConfig(TrainConfig):
    lr: float = option(1e-6, "peak learning rate of AdamW")
    beta: float = option(0.1, "strength of the implicit KL penalty, > 0")
    max_length: int = option(1024, "tokens of prompt and completion together; what is longer is cut")

    def __post_init__(self):
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, got {self.beta}")


class DPOTrainer(Trainer):
    """model: Transformer; examples: `Pair`s; reference: the model as it is now, unless given.

    Metrics: loss, rewards/{chosen,rejected,accuracies,margins}, logps/{chosen,rejected}, entropy.
    """

    algorithm = "dpo"
    main_metric = "rewards/accuracies"

    def __init__(
        self, model: Transformer, examples, config: DPOConfig, *, reference: Transformer | None = None, **options
    ):
        super().__init__(model, examples, config, **options)
        self.reference = frozen_copy(model if reference is None else reference)

    def losses(self, batch: list[Pair], metrics: Metrics) -> Iterator[Tensor]:
        pairs = to_device(collate_pairs(batch, self.pad_id), self.device)  # (B, 2, T)
        for (part,) in micro_batches(self.config.micro_batch_size, pairs):
            part = TokenBatch(*(x.flatten(0, 1) for x in part))  # (2B, T), chosen and rejected alternate
            logprobs, entropy = completion_logprobs(self.model, part)
            with torch.no_grad():
                ref_logprobs, _ = completion_logprobs(self.reference, part)
            chosen_logps, rejected_logps = logprobs.sum(dim=1).view(-1, 2).unbind(dim=1)  # (B,)
            ref_chosen_logps, ref_rejected_logps = ref_logprobs.sum(dim=1).view(-1, 2).unbind(dim=1)
            loss, stats = dpo_loss(
                chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=self.config.beta
            )
            metrics.add("loss", loss)
            metrics.add("rewards/chosen", stats.chosen_rewards)
            metrics.add("rewards/rejected", stats.rejected_rewards)
            metrics.add("rewards/accuracies", preferred(stats.chosen_rewards, stats.rejected_rewards))
            metrics.add("rewards/margins", stats.chosen_rewards - stats.rejected_rewards)
            metrics.add("logps/chosen", chosen_logps)
            metrics.add("logps/rejected", rejected_logps)
            metrics.add("entropy", entropy, part.target_mask)
            yield loss.sum() / len(batch)


def completion_logprobs(model: Transformer, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy (B, T) of the targets, 0 where they do not count."""
    hidden = model.trunk(tokens.input_ids)  # padding is on the right, where no real token looks
    return linear_token_logprobs_and_entropy(hidden, model.head_weight, tokens.targets, mask=tokens.target_mask)
