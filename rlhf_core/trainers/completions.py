"""Log-probs of given completions, and the cross-entropy, from the hidden states at their tokens alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from rlhf_core.data import TokenBatch
from rlhf_core.losses import regularized_cross_entropy
from rlhf_core.models import Transformer
from rlhf_core.models.transformer import Trunk
from rlhf_core.ops import linear_token_logprobs_and_entropy, linear_token_statistics
from rlhf_core.trainers.common import Metrics


def read_hidden(trunk: Trunk, tokens: TokenBatch, where: Tensor) -> Tensor:
    """Hidden states (len(where), D) at those of the batch's R * T tokens."""
    return trunk(tokens.input_ids, positions=tokens.positions, visible=tokens.visible, read=where)


def target_logprobs(model: Transformer, tokens: TokenBatch, **options) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy (M,) of the targets; options as for `linear_token_logprobs_and_entropy`."""
    hidden = read_hidden(model.trunk, tokens, tokens.read)  # (M, D)
    return linear_token_logprobs_and_entropy(hidden, model.head_weight, tokens.targets, **options)


def sequence_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums (B, K) of the runs of `lengths` (B, K) values, in float64 and always in the same order."""
    sums = torch.segment_reduce(values.double(), "sum", lengths=lengths.flatten(), unsafe=True)
    return sums.to(values.dtype).view(lengths.shape)


def sequence_means(values: Tensor, lengths: Tensor) -> Tensor:
    """Means (B, K) of the same runs, 0 of an empty one."""
    return sequence_sums(values, lengths) / lengths.clamp_min(1)


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
    hidden, weight = (
        read_hidden(model.trunk, tokens, tokens.read),
        model.head_weight,
    )  # (M, D), (V, D)
    regularized = label_smoothing or z_coef
    if (
        regularized
    ):  # neither the mean of the logits nor the logit of the target takes the other logits
        target_logits = (hidden * embedding(tokens.targets, weight)).sum(dim=-1)
        mean_logits = (hidden * weight.mean(dim=0)).sum(dim=-1)

    def losses(logprobs, rows=slice(None)):
        if not regularized:
            return -logprobs
        weights = dict(label_smoothing=label_smoothing, z_coef=z_coef)
        return regularized_cross_entropy(
            logprobs, target_logits[rows], mean_logits[rows], **weights
        )

    def loss_of(logprobs, rows=slice(None)):
        return losses(logprobs, rows).sum() / max(num_tokens, 1)

    logprobs, entropy, likeliest = linear_token_statistics(
        hidden, weight, tokens.targets, loss_of=loss_of
    )
    if metrics is not None:
        metrics.add("loss", losses(logprobs))
        metrics.add("mean_token_accuracy", likeliest)
        metrics.add("entropy", entropy)
        if regularized:
            metrics.add("nll", -logprobs)
    return loss_of(logprobs)
