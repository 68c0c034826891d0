"""Scalar heads on a trunk: RewardModel scores a sequence or its steps, EnsembleReward is several of them, ValueModel
values every position."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_core.masking import last_token_index
from rlhf_core.models import hub
from rlhf_core.models.lora import freeze_base, has_adapters
from rlhf_core.models.pretrained import Pretrained
from rlhf_core.models.transformer import Transformer, TransformerConfig, Trunk, TrunkModel


class _ScalarHead(Pretrained, TrunkModel):
    is_language_model = False

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.trunk = Trunk(config)
        self.score = _fresh_head(config)

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
        head = (
            copy.deepcopy(model.score)
            if isinstance(model, _ScalarHead)
            else _fresh_head(model.config)
        )
        new.score = head.to(new.trunk.embed.weight).requires_grad_(True)
        if isinstance(model, RewardModel) and isinstance(new, RewardModel):
            new.of_steps = model.of_steps
        if not share_trunk:
            freeze_base(new) if has_adapters(new) else new.requires_grad_(True)
        return new

    @classmethod
    def _load_base(cls, path: Path, dtype: torch.dtype):
        if hub.has_scalar_head(path):
            return hub.load(cls, path, dtype)
        return cls.from_model(hub.load(Transformer, path, dtype), share_trunk=True)

    @torch.no_grad()
    def normalize(self, mean: float, std: float) -> None:
        """Fold (score - mean) / std into the head, which then has a bias."""
        if self.score.bias is None:
            self.score.bias = nn.Parameter(
                self.score.weight.new_zeros(1), self.score.weight.requires_grad
            )
        self.score.bias.sub_(mean).div_(std)
        self.score.weight.div_(std)

    def read(self, hidden: Tensor) -> Tensor:
        """The head on hidden states (..., D): (...) float32, under autocast too."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.to(self.score.weight.dtype))[..., 0].float()


class RewardModel(_ScalarHead):
    """Trunk + linear head, read at the last real token.

    of_steps: its scores are those of steps (a process reward model), not of responses; its folder says which.
    """

    of_steps = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores (B,) float32 of sequences (B, T); attention_mask (B, T) bool says where each one ends."""
        B, T = input_ids.shape
        last = torch.arange(B, device=input_ids.device) * T + last_token_index(attention_mask)
        return self.read(self.trunk(input_ids, attention_mask, read=last))

    def scores(self, tokens) -> Tensor:
        """Scores (N,) float32 of the sequences of a `data.TokenBatch`."""
        return self.read(self._hidden(tokens, tokens.last))

    def token_scores(self, tokens) -> Tensor:
        """Scores (M,) float32 of a `data.TokenBatch` up to each target, which is counted in: of steps, where the mask
        counts their last tokens. Each prompt has one completion."""
        return self.read(self._hidden(tokens, tokens.read + 1))

    def _hidden(self, tokens, where: Tensor) -> Tensor:
        return self.trunk(
            tokens.input_ids, positions=tokens.positions, visible=tokens.visible, read=where
        )


AGGREGATES = ("mean", "worst", "uncertainty")


class EnsembleReward(nn.Module):
    """Several reward models that score as one (Coste et al. 2023), with the methods of `RewardModel`.

    Of the models' scores `mean` takes the mean, `worst` the least, and `uncertainty` the mean less `coef` times the
    variance, all per sequence or step. The scores should be on one scale, as training leaves them.
    """

    def __init__(
        self, models: Sequence[RewardModel], aggregate: str = "mean", coef: float | None = None
    ):
        super().__init__()
        if len(models) < 2:
            raise ValueError(f"an ensemble has at least 2 reward models, got {len(models)}")
        sizes = [model.config.vocab_size for model in models]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"reward models of one ensemble read the same token ids; their vocabularies have {sizes}"
            )
        if len({model.of_steps for model in models}) > 1:
            of_steps = [i for i, model in enumerate(models) if model.of_steps]
            raise ValueError(
                f"of the reward models of one ensemble {of_steps} score steps, the others responses"
            )
        if aggregate not in AGGREGATES:
            raise ValueError(
                f"the ensemble must be one of {', '.join(AGGREGATES)}, got {aggregate!r}"
            )
        if aggregate == "uncertainty" and coef is None:
            raise ValueError(
                "the ensemble 'uncertainty' needs a coefficient, the weight of the variance"
            )
        if aggregate != "uncertainty" and coef is not None:
            raise ValueError(
                f"the coefficient {coef} has no effect: it goes with the ensemble 'uncertainty' alone"
            )
        if coef is not None and not 0 < coef < math.inf:
            raise ValueError(f"the coefficient must be a finite number > 0, got {coef}")
        self.models, self.aggregate, self.coef = nn.ModuleList(models), aggregate, coef
        self.config, self.of_steps = models[0].config, models[0].of_steps

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores (B,) as from `RewardModel`."""
        return self._joined([model(input_ids, attention_mask) for model in self.models])

    def scores(self, tokens) -> Tensor:
        """Scores (N,) as from `RewardModel`."""
        return self._joined([model.scores(tokens) for model in self.models])

    def token_scores(self, tokens) -> Tensor:
        """Scores (M,) as from `RewardModel`."""
        return self._joined([model.token_scores(tokens) for model in self.models])

    def _joined(self, scores: list[Tensor]) -> Tensor:
        each = torch.stack(scores)
        if self.aggregate == "worst":
            return each.amin(dim=0)
        mean = each.mean(dim=0)
        return mean if self.coef is None else mean - self.coef * each.var(dim=0, correction=0)


def load_reward(
    sources: Sequence[str | os.PathLike], aggregate: str | None = None, coef: float | None = None
) -> RewardModel | EnsembleReward:
    """The reward model of a folder, or the ensemble of several, by default their mean."""
    models = [RewardModel.from_pretrained(source) for source in sources]
    if len(models) > 1:
        return EnsembleReward(models, aggregate or "mean", coef)
    for name, value in (("ensemble", aggregate), ("coefficient", coef)):
        if value is not None:
            raise ValueError(
                f"there is one reward model alone, so the {name} {value!r} has no effect"
            )
    return models[0]


class ValueModel(_ScalarHead):
    """Trunk + linear head at every position: the critic."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values (B, T) float32; entry t has read tokens 0..t, so it values the state before token t + 1."""
        return self.read(self.trunk(input_ids, attention_mask))


def _fresh_head(config: TransformerConfig) -> nn.Linear:
    head = nn.Linear(config.hidden_size, 1, bias=False)
    nn.init.normal_(head.weight, std=(config.hidden_size + 1) ** -0.5)  # Stiennon et al. 2020
    return head
