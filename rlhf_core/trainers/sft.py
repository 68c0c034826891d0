"""Supervised fine-tuning: cross-entropy of the completion tokens, or of the whole text, each token of a batch weighing
the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import embedding

from rlhf_core.data import Example, TokenBatch
from rlhf_core.data.collate import count_targets
from rlhf_core.losses import regularized_cross_entropy
from rlhf_core.models import Transformer
from rlhf_core.ops import linear_token_statistics
from rlhf_core.trainers.common import Metrics, TrainConfig, Trainer, check_options, option, read_hidden


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    lr: float = option(2e-5, "peak learning rate of AdamW")
    max_length: int = option(1024, "tokens of prompt and completion together; what is longer is cut")
    packing: bool = option(False, "several sequences in a row of at most max_length: less padding, the same loss")
    whole_text: bool = option(False, "every token but the first trains: the prompt's, and those of all turns")
    label_smoothing: float = option(0.0, "share of a target's probability spread over the vocabulary, in [0, 1)")
    z_coef: float = option(0.0, "z-loss: weight of the squared log of the softmax's normaliser; PaLM: 1e-4")

    def __post_init__(self):
        super().__post_init__()
        check_options(
            self,
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("z_coef", self.z_coef >= 0, "at least 0"),
        )


class SFTTrainer(Trainer):
    """model: Transformer; examples: `Example`s.

    Metrics: loss, mean_token_accuracy, entropy, num_tokens; with label_smoothing or z_coef also nll, the cross-entropy.
    """

    algorithm = "sft"
    main_metric = "loss"

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
            if not any(row.prompt_ids or row.completion_mask for row in examples):
                raise ValueError("whole_text has no effect: every example is a completion without prompt")
            examples, eval_examples = (list(map(whole, rows)) for rows in (examples, eval_examples))
        super().__init__(model, examples, config, eval_examples=eval_examples, **options)
        if not any(map(count_targets, examples)):
            raise ValueError(f"none of the {len(examples)} examples has a token to learn: every completion is masked")

    def losses(self, batch: list[Example], metrics: Metrics) -> Iterator[Tensor]:
        config, num_tokens = self.config, sum(map(count_targets, batch))
        weights = dict(label_smoothing=config.label_smoothing, z_coef=config.z_coef)
        for tokens in self.token_batches(batch, packing=config.max_length if config.packing else None):
            with self.autocast():
                yield completion_loss(self.model, tokens, num_tokens, metrics, **weights)

    def step(self, batch: list[Example]) -> dict[str, float]:
        return super().step(batch) | {"num_tokens": sum(map(count_targets, batch))}


def completion_loss(
    model: Transformer,
    tokens: TokenBatch,
    num_tokens: int,
    metrics: Metrics | None = None,
    *,
    label_smoothing: float = 0.0,
    z_coef: float = 0.0,
) -> Tensor:
    """The loss () of a micro-batch: the sum over its targets, divided by the `num_tokens` of the whole batch; to be
    called under `Trainer.autocast`. The weights are those of `regularized_cross_entropy`."""
    hidden, weight = read_hidden(model.trunk, tokens, tokens.read), model.head_weight  # (M, D), (V, D)
    regularized = label_smoothing or z_coef
    if regularized:  # neither the mean of the logits nor the logit of the target takes the other logits
        target_logits = (hidden * embedding(tokens.targets, weight)).sum(dim=-1)
        mean_logits = (hidden * weight.mean(dim=0)).sum(dim=-1)

    def losses(logprobs, rows=slice(None)):
        if not regularized:
            return -logprobs
        weights = dict(label_smoothing=label_smoothing, z_coef=z_coef)
        return regularized_cross_entropy(logprobs, target_logits[rows], mean_logits[rows], **weights)

    def loss_of(logprobs, rows=slice(None)):
        return losses(logprobs, rows).sum() / max(num_tokens, 1)

    logprobs, entropy, likeliest = linear_token_statistics(hidden, weight, tokens.targets, loss_of=loss_of)
    if metrics is not None:
        metrics.add("loss", losses(logprobs))
        metrics.add("mean_token_accuracy", likeliest)
        metrics.add("entropy", entropy)
        if regularized:
            metrics.add("nll", -logprobs)
    return loss_of(logprobs)


def whole(example: Example) -> Example:
    """The same tokens, all of them to learn."""
    return Example([], [*example.prompt_ids, *example.completion_ids])
