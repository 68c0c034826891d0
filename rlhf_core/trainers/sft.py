"""Supervised fine-tuning: cross-entropy of the completion tokens, or of the whole text, each token of a batch weighing
the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from rlhf_core.data import Example
from rlhf_core.data.collate import count_targets
from rlhf_core.models import Transformer
from rlhf_core.trainers.common import Metrics, Trainer
from rlhf_core.trainers.completions import completion_loss
from rlhf_core.trainers.config import TrainConfig, option


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    lr: float = option(2e-5, "peak learning rate of AdamW")
    max_length: int = option(
        1024, "tokens of prompt and completion together; what is longer is cut"
    )
    packing: bool = option(
        False, "several sequences in a row of at most max_length: less padding, the same loss"
    )
    whole_text: bool = option(
        False, "every token but the first trains: the prompt's, and those of all turns"
    )
    label_smoothing: float = option(
        0.0, "share of a target's probability spread over the vocabulary, in [0, 1)"
    )
    z_coef: float = option(
        0.0, "z-loss: weight of the squared log of the softmax's normaliser; PaLM: 1e-4"
    )

    def __post_init__(self):
        super().__post_init__()
        self.check(
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("z_coef", self.z_coef >= 0, "at least 0"),
        )


class SFTTrainer(Trainer):
    """model: Transformer; examples: `Example`s.

    Metrics: loss, mean_token_accuracy, entropy, num_tokens; with label_smoothing or z_coef also nll, the cross-entropy.
    """

    algorithm = "sft"
    main_metric = "loss"
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
                raise ValueError(
                    "whole_text has no effect: every example is a completion without prompt"
                )
            examples, eval_examples = (list(map(whole, rows)) for rows in (examples, eval_examples))
        super().__init__(model, examples, config, eval_examples=eval_examples, **options)
        if not any(map(count_targets, examples)):
            raise ValueError(
                f"none of the {len(examples)} examples has a token to learn: every completion is masked"
            )

    def losses(self, batch: list[Example], metrics: Metrics) -> Iterator[Tensor]:
        config, num_tokens = self.config, sum(map(count_targets, batch))
        weights = dict(label_smoothing=config.label_smoothing, z_coef=config.z_coef)
        for tokens in self.token_batches(
            batch, packing=config.max_length if config.packing else None
        ):
            with self.autocast():
                yield completion_loss(self.model, tokens, num_tokens, metrics, **weights)

    def step(self, batch: list[Example]) -> dict[str, float]:
        return super().step(batch) | {"num_tokens": sum(map(count_targets, batch))}


def whole(example: Example) -> Example:
    """The same tokens, all of them to learn."""
    return Example([], [*example.prompt_ids, *example.completion_ids])
