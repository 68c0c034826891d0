"""Losses and log-probs of given completions, from the hidden states at their tokens alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_core.data import Pair, TokenBatch
from rlhf_core.data.store import has
from rlhf_core.losses import regularized_cross_entropy
from rlhf_core.models import Transformer
from rlhf_core.models.transformer import TrunkModel
from rlhf_core.ops.linear_logprobs import Losses, TokenStatistics
from rlhf_core.training.metrics import Metrics


def target_hidden(model: TrunkModel, tokens: TokenBatch) -> Tensor:
    """Hidden states (M, D) that predict the batch's M targets."""
    where = dict(positions=tokens.positions, visible=tokens.visible, read=tokens.read)
    return model.hidden_states(tokens.input_ids, **where)


def target_logprobs(model: Transformer, tokens: TokenBatch) -> Tensor:
    """Log-probs (M,) of the targets."""
    return model.token_logprobs(target_hidden(model, tokens), tokens.targets).logprobs


def target_loss(
    model: Transformer,
    tokens: TokenBatch,
    losses: Losses,
    sizes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The loss () and further outputs that `losses` makes of the targets' log-probs.

    losses, sizes: as for `ops.linear_token_loss`.
    """
    hidden = target_hidden(model, tokens)
    return model.token_loss(hidden, tokens.targets, losses, sizes=sizes)


def label_smoothing_of(pairs: list[Pair], default: float, device: torch.device) -> Tensor | float:
    """The label smoothing (B,) of the pairs, `default` where one has none, or only the default."""
    own = [pair.label_smoothing for pair in pairs]
    if all(smoothing is None for smoothing in own):
        return default
    return torch.tensor([default if x is None else x for x in own], device=device)


def warn_of_label_smoothing(pairs: Sequence[Pair], loss: str) -> None:
    """Warn if a pair has a label smoothing, which `loss` does not use."""
    if has(pairs, "label_smoothing"):
        message = f"label_smoothing of the pairs has no effect on loss {loss!r}"
        warnings.warn(message, stacklevel=3)


def sequence_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums (B, K) over runs of `lengths` (B, K) values, in float64 and in a fixed order."""
    sums = torch.segment_reduce(values.double(), "sum", lengths=lengths.flatten(), unsafe=True)
    return sums.to(values.dtype).view(lengths.shape)


def sequence_means(values: Tensor, lengths: Tensor) -> Tensor:
    """Means (B, K) over the same runs; 0 for an empty one."""
    return sequence_sums(values, lengths) / lengths.clamp_min(1)


def completion_loss(
    model: Transformer,
    tokens: TokenBatch,
    num_tokens: int,
    metrics: Metrics,
    *,
    label_smoothing: float = 0.0,
    z_coef: float = 0.0,
) -> Tensor:
    """Cross-entropy () summed over a micro-batch's targets, divided by `num_tokens`.

    Call it under `Trainer.autocast`.

    Args:
        num_tokens: targets of the whole batch.
        metrics: gets loss, mean_token_accuracy, entropy, and nll where the loss is regularized.
        label_smoothing, z_coef: as for `regularized_cross_entropy`.
    """
    hidden = target_hidden(model, tokens)  # (M, D)
    regularized = label_smoothing or z_coef

    def losses(read: TokenStatistics, rows: slice, *logits: Tensor) -> tuple[Tensor, ...]:
        loss = nll = -read.logprobs
        if regularized:
            coefs = dict(label_smoothing=label_smoothing, z_coef=z_coef)
            loss = regularized_cross_entropy(read.logprobs, *logits, **coefs)
        return loss.sum() / num_tokens, loss, read.likeliest, read.entropy, nll

    extras = model.target_and_mean_logits(hidden, tokens.targets) if regularized else ()  # (M,)
    loss, *outputs = model.token_loss(hidden, tokens.targets, losses, likeliest=True, extras=extras)
    for name, values in zip(("loss", "mean_token_accuracy", "entropy", "nll"), outputs):
        if name != "nll" or regularized:
            metrics.add(name, values)
    return loss
