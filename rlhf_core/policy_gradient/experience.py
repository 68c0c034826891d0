"""The columns that a rollout gets before its updates."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Predictions(NamedTuple):
    """The models' predictions of a rollout's tokens before any update, all (B, R) float32."""

    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor  # the log-probs themselves if there is no reference
    kl: Tensor  # per token, by the config's estimator; 0 without a reference
    values: Tensor | None = None  # with a critic


class Experience(NamedTuple):
    """The columns (B, R) that the updates read; they stay fixed while the policy changes."""

    old_logprobs: Tensor | None  # None: those of the one update itself
    advantages: Tensor
    ref_logprobs: Tensor | None
    old_values: Tensor | None = None  # with a critic
    returns: Tensor | None = None
    importance: Tensor | None = None  # with importance_cap; the advantages include them
