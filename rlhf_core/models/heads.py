"""Scalar heads on a trunk: RewardModel scores a sequence, ValueModel every position of it."""

from __future__ import annotations

import copy
import os

import torch
from torch import Tensor, nn

from rlhf_core.masking import last_token_index
from rlhf_core.models.transformer import Transformer, TransformerConfig, Trunk


class _ScalarHead(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.trunk = Trunk(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.normal_(self.score.weight, std=(config.hidden_size + 1) ** -0.5)  # Stiennon et al. 2020

    @property
    def config(self) -> TransformerConfig:
        return self.trunk.config

    @classmethod
    def from_model(cls, model: Transformer | _ScalarHead):
        """A new model on a copy of `model`'s trunk, with its head where it has a scalar one, else a fresh one.

        All of it trains, also where `model` is frozen: a critic starts from a reward model that nobody trains.
        """
        new = cls(model.config)
        new.trunk = copy.deepcopy(model.trunk)
        if isinstance(model, _ScalarHead):
            new.score = copy.deepcopy(model.score)
        return new.to(next(model.parameters())).requires_grad_(True)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, dtype: torch.dtype = torch.float32):
        """Read a folder in the Hugging Face layout of a sequence classifier with one label. Errors: `hub.load`."""
        from rlhf_core.models import hub

        return hub.load(cls, path, dtype)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write the Hugging Face layout of a sequence classifier with one label."""
        from rlhf_core.models import hub

        hub.save(self, path)


class RewardModel(_ScalarHead):
    """Trunk + linear head, read at the last real token."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores (B,) float32 of sequences (B, T); attention_mask (B, T) bool says where each one ends."""
        hidden = self.trunk(input_ids, attention_mask)  # (B, T, D)
        last = last_token_index(attention_mask)
        return self.score(hidden[torch.arange(len(last), device=last.device), last])[:, 0].float()


class ValueModel(_ScalarHead):
    """Trunk + linear head at every position: the critic."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values (B, T) float32; entry t has read tokens 0..t, so it values the state before token t + 1."""
        return self.score(self.trunk(input_ids, attention_mask))[..., 0].float()
