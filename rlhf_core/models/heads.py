"""Scalar heads on a trunk: RewardModel scores a sequence, ValueModel every position of it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from rlhf_core.masking import last_token_index
from rlhf_core.models.hub import Pretrained
from rlhf_core.models.lora import freeze_base, has_adapters
from rlhf_core.models.transformer import Transformer, TransformerConfig, Trunk


class _ScalarHead(Pretrained, nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.trunk = Trunk(config)
        self.score = _fresh_head(config)

    @property
    def config(self) -> TransformerConfig:
        return self.trunk.config

    @classmethod
    def from_model(cls, model: Transformer | _ScalarHead, share_trunk: bool = False):
        """A new model on a copy of `model`'s trunk, or on that trunk itself, with its head where it has a scalar one,
        else a fresh one.

        A copy trains also where `model` is frozen (a critic starts from a reward model that nobody trains): all of it,
        or, where it has adapters, those and the head. A shared trunk trains as it did.
        """
        with torch.device("meta"):
            new = cls(model.config)
        new.trunk = model.trunk if share_trunk else copy.deepcopy(model.trunk)
        head = copy.deepcopy(model.score) if isinstance(model, _ScalarHead) else _fresh_head(model.config)
        new.score = head.to(new.trunk.embed.weight).requires_grad_(True)
        if not share_trunk:
            freeze_base(new) if has_adapters(new) else new.requires_grad_(True)
        return new

    @torch.no_grad()
    def normalize(self, mean: float, std: float) -> None:
        """Fold (score - mean) / std into the head, which then has a bias."""
        if self.score.bias is None:
            self.score.bias = nn.Parameter(self.score.weight.new_zeros(1), self.score.weight.requires_grad)
        self.score.bias.sub_(mean).div_(std)
        self.score.weight.div_(std)

    def read(self, hidden: Tensor) -> Tensor:
        """The head on hidden states (..., D): (...) float32, under autocast too."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.to(self.score.weight.dtype))[..., 0].float()


class RewardModel(_ScalarHead):
    """Trunk + linear head, read at the last real token."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores (B,) float32 of sequences (B, T); attention_mask (B, T) bool says where each one ends."""
        B, T = input_ids.shape
        last = torch.arange(B, device=input_ids.device) * T + last_token_index(attention_mask)
        return self.read(self.trunk(input_ids, attention_mask, read=last))


class ValueModel(_ScalarHead):
    """Trunk + linear head at every position: the critic."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values (B, T) float32; entry t has read tokens 0..t, so it values the state before token t + 1."""
        return self.read(self.trunk(input_ids, attention_mask))


def _fresh_head(config: TransformerConfig) -> nn.Linear:
    head = nn.Linear(config.hidden_size, 1, bias=False)
    nn.init.normal_(head.weight, std=(config.hidden_size + 1) ** -0.5)  # Stiennon et al. 2020
    return head
