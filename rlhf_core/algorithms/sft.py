"""Supervised fine-tuning: cross-entropy of the completion or of the whole text."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from rlhf_core.data import Example
from rlhf_core.data.collate import count_targets
from rlhf_core.data.store import store
from rlhf_core.models import Transformer
from rlhf_core.options import option
from rlhf_core.training.completions import completion_loss
from rlhf_core.training.config import MAX_LENGTH, TrainConfig
from rlhf_core.training.metrics import Metrics
from rlhf_core.training.trainer import Trainer


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Texts and loss of supervised fine-tuning."""

    lr: float = option(2e-5, "peak learning rate of AdamW", within="(0, inf)")
    max_length: int = option(1024, MAX_LENGTH, within="[2, inf)")
    packing: bool = option(
        False, "pack several sequences into rows of at most max_length: less padding, same loss"
    )
    whole_text: bool = option(
        False, "train on every token but the first, also those of prompts and all turns"
    )
    label_smoothing: float = option(
        0.0, "share of a target's probability spread over the vocabulary", within="[0, 1)"
    )
    z_coef: float = option(
        0.0,
        "z-loss: weight of the squared log of the softmax's normalizer; PaLM: 1e-4",
        within="[0, inf)",
    )


class SFTTrainer(Trainer):
    """Trains a Transformer on `Example`s; every target token of a batch has the same weight.

    Metrics: loss, mean_token_accuracy, entropy, num_tokens; with label_smoothing or z_coef also
    nll, the cross-entropy.
    """

    algorithm = "sft"
    kinds = (Example,)

    def __init__(
        self,
        model: Transformer,
        examples: Sequence[Example],
        config: SFTConfig,
        *,
        eval_examples: Sequence[Example] = (),
        **options,
    ):
        if config.whole_text:
            for name, rows in (("example", examples), ("evaluation example", eval_examples)):
                self.check_kinds(name, rows, self.kinds)
            if not any(row.prompt_ids or row.completion_mask for row in examples):
                warnings.warn(
                    "whole_text has no effect: every example is a completion without prompt",
                    stacklevel=2,
                )
            examples = store(map(whole, examples))
            eval_examples = store(map(whole, eval_examples))
        super().__init__(model, examples, config, eval_examples=eval_examples, **options)
        if not any(map(count_targets, examples)):
            raise ValueError(
                f"none of the {len(examples)} examples has a token to learn: every completion is "
                "masked or empty"
            )

    def losses(self, batch: list[Example], metrics: Metrics) -> Iterator[Tensor]:
        config = self.config
        num_tokens = self.total(sum(map(count_targets, batch)))
        packing = config.max_length if config.packing else None
        for _, tokens in self.parts(batch, packing=packing):
            with self.autocast():
                yield completion_loss(
                    self.model,
                    tokens,
                    num_tokens,
                    metrics,
                    label_smoothing=config.label_smoothing,
                    z_coef=config.z_coef,
                )

    def step(self, batch: list[Example]) -> dict[str, float]:
        return super().step(batch) | {"num_tokens": sum(map(count_targets, batch))}


def whole(example: Example) -> Example:
    """The same tokens as one completion, so that all of them are targets."""
    return Example([], [*example.prompt_ids, *example.completion_ids])
