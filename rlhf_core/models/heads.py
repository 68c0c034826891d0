"""Scalar heads on a trunk: RewardModel, EnsembleReward of several, and ValueModel, the critic.

A reward model of several criteria has a head for each. Its score is their weighted sum.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import Self

from rlhf_core.checks import check_own
from rlhf_core.masking import last_token_index
from rlhf_core.models import hub
from rlhf_core.models.config import check_criteria
from rlhf_core.models.gather import copy_of, is_sharded, is_wrapped, reshard, whole_tensor
from rlhf_core.models.lora import freeze_base, has_adapters
from rlhf_core.models.pretrained import Pretrained
from rlhf_core.models.transformer import Transformer, TransformerConfig, Trunk, TrunkModel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class _ScalarHead(Pretrained, TrunkModel):
    is_language_model = False
    criteria: Mapping[str, float] = {}

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.trunk = Trunk(config)
        self.score = _fresh_head(config)

    @classmethod
    def from_model(cls, model: Transformer | _ScalarHead, share_trunk: bool = False) -> Self:
        """Return a new model on a copy of `model`'s trunk, or on the trunk itself.

        It gets a copy of the scalar head of `model`, or else a fresh head. A critic's head is the
        weighted sum of those of a reward model of several criteria. A copied trunk trains, even if
        `model` is frozen, because a critic can start from a frozen reward model. If it has
        adapters, only these and the head train. A shared trunk trains as before.
        """
        check_own(model)
        reshard(model)
        with torch.device("meta"):
            new = cls(model.config)
        new.trunk = model.trunk if share_trunk else copy_of(model.trunk)
        scalar = isinstance(model, _ScalarHead)
        head = copy_of(model.score) if scalar else _fresh_head(model.config)
        new.score = head.to(new.trunk.embed.weight).requires_grad_(True)
        if isinstance(model, RewardModel) and isinstance(new, RewardModel):
            new.of_steps, new.criteria = model.of_steps, model.criteria
        elif scalar and model.criteria:
            _mix(new.score, [list(model.criteria.values())])
        if not share_trunk:
            freeze_base(new) if has_adapters(new) else new.requires_grad_(True)
        return new

    @classmethod
    def _load_base(cls, path: Path, dtype: torch.dtype, mesh: DeviceMesh | None):
        if hub.has_scalar_head(path):
            return hub.load(cls, path, dtype, mesh)
        return cls.from_model(hub.load(Transformer, path, dtype, mesh), share_trunk=True)

    @torch.no_grad()
    def normalize(self, mean: float | Tensor, std: float) -> None:
        """Change the head to give (score - mean) / std. It then has a bias.

        mean: A number, or (K,) of the criteria. They share std, so that no ranking changes.
        """
        reshard(self)
        weight = self.score.weight
        if self.score.bias is None:
            zero = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
            # FSDP does not add up the gradient of a weight that it did not cut.
            self.score.bias = nn.Parameter(zero, weight.requires_grad and not is_sharded(self))
        self.score.bias.sub_(mean).div_(std)
        weight.div_(std)

    def read(self, hidden: Tensor) -> Tensor:
        """Apply the head to hidden states (..., D). Returns (...) float32, also under autocast."""
        return self.combine(self.read_each(hidden))

    def read_each(self, hidden: Tensor) -> Tensor:
        """Return the scores (..., K) of the criteria, or of the one head, also under autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.to(self.score.weight.dtype))

    def combine(self, each: Tensor) -> Tensor:
        """Return the score (...) float32: the weighted sum of those of the criteria (..., K)."""
        if not self.criteria:
            return each[..., 0].to(torch.float32, copy=True)  # FSDP warns of views
        weights = torch.tensor(list(self.criteria.values()), device=each.device)
        return (each.float() * weights).sum(dim=-1)


class RewardModel(_ScalarHead):
    """A trunk and a linear head, read at the last real token.

    Attributes:
        of_steps: Whether it scores steps (a process reward model). Saved with the model.
        criteria: The weight of each criterion in the score, by its name, in the order of the heads.
            Saved with the model. Empty if there is one score; see `set_criteria`.
    """

    of_steps = False

    @torch.no_grad()
    def set_criteria(self, criteria: Mapping[str, float]) -> None:
        """Give a model of one score a head for each criterion, or new weights to one of several.

        Each new head is a copy of the present one.

        Args:
            criteria: A finite weight for each name. Weight 0: learned, but not part of the score.

        Raises:
            ValueError: A name or a weight is not valid, or the model has other criteria.
        """
        check_criteria(criteria)
        if self.criteria and self.criteria.keys() != criteria.keys():
            raise ValueError(
                f"the model scores {', '.join(self.criteria)}, not {', '.join(criteria)}. Name its "
                "criteria, or start from a model of one score"
            )
        if not self.criteria:
            if is_wrapped(self):
                raise ValueError("the model is sharded. Set its criteria before")
            _mix(self.score, [[1.0]] * len(criteria))
        self.criteria = {name: float(criteria[name]) for name in self.criteria or criteria}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return scores (B,) float32 of sequences (B, T) with attention_mask (B, T) bool."""
        B, T = input_ids.shape
        last = torch.arange(B, device=input_ids.device) * T + last_token_index(attention_mask)
        return self.read(self.hidden_states(input_ids, attention_mask, read=last))

    def scores(self, tokens) -> Tensor:
        """Return scores (N,) float32 of the sequences of a `data.TokenBatch`."""
        return self.combine(self.scores_each(tokens))

    def scores_each(self, tokens) -> Tensor:
        """Return scores (N, K) of the sequences by each criterion; K is 1 without criteria."""
        return self.read_each(self._hidden(tokens, tokens.last))

    def token_scores(self, tokens) -> Tensor:
        """Return scores (M,) float32 at the targets of a `data.TokenBatch`: the ends of steps.

        Each prompt must have one completion.
        """
        return self.read(self._hidden(tokens, tokens.read + 1))

    def _hidden(self, tokens, where: Tensor) -> Tensor:
        return self.hidden_states(
            tokens.input_ids, positions=tokens.positions, visible=tokens.visible, read=where
        )


AGGREGATES = ("mean", "worst", "uncertainty")


class EnsembleReward(nn.Module):
    """Several reward models that score as one (Coste et al. 2023). Methods as in `RewardModel`.

    The models should have one scale, as after training.

    Args:
        models: At least 2, with one vocabulary, all for steps or all for responses.
        aggregate: "mean", "worst" (the minimum), or "uncertainty" (the mean minus coef * variance).
        coef: Weight of the variance, > 0. Only for "uncertainty".
    """

    def __init__(
        self, models: Sequence[RewardModel], aggregate: str = "mean", coef: float | None = None
    ):
        super().__init__()
        if len(models) < 2:
            raise ValueError(f"an ensemble needs at least 2 reward models, got {len(models)}")
        sizes = [model.config.vocab_size for model in models]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"reward models of an ensemble must have one vocabulary, got sizes {sizes}"
            )
        if len({model.of_steps for model in models}) > 1:
            of_steps = [i for i, model in enumerate(models) if model.of_steps]
            raise ValueError(
                f"reward models {of_steps} of the ensemble score steps, the others responses"
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
                f"the coefficient {coef} has no effect: only the ensemble 'uncertainty' uses it"
            )
        if coef is not None and not 0 < coef < math.inf:
            raise ValueError(f"the coefficient must be a finite number > 0, got {coef}")
        self.models, self.aggregate, self.coef = nn.ModuleList(models), aggregate, coef
        self.config, self.of_steps = models[0].config, models[0].of_steps

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return scores (B,) as `RewardModel.forward`."""
        return self._combine([model(input_ids, attention_mask) for model in self.models])

    def scores(self, tokens) -> Tensor:
        """Return scores (N,) as `RewardModel.scores`."""
        return self._combine([model.scores(tokens) for model in self.models])

    def token_scores(self, tokens) -> Tensor:
        """Return scores (M,) as `RewardModel.token_scores`."""
        return self._combine([model.token_scores(tokens) for model in self.models])

    def _combine(self, scores: list[Tensor]) -> Tensor:
        each = torch.stack(scores)
        if self.aggregate == "worst":
            return each.amin(dim=0)
        mean = each.mean(dim=0)
        return mean if self.coef is None else mean - self.coef * each.var(dim=0, correction=0)


def load_reward(
    sources: Sequence[str | os.PathLike],
    aggregate: str | None = None,
    coef: float | None = None,
    weights: Mapping[str, float] | None = None,
    mesh: DeviceMesh | None = None,
) -> RewardModel | EnsembleReward:
    """Load one reward model, or an ensemble of several, which gives their mean by default.

    weights: New weights of criteria that every model has, by name. Others keep theirs.
    mesh: As for `from_pretrained`.
    """
    models = [RewardModel.from_pretrained(source, mesh=mesh) for source in sources]
    for source, model in zip(sources, models) if weights else ():
        for name in weights.keys() - model.criteria.keys():
            known = ", ".join(model.criteria) or "one score, without criteria"
            raise ValueError(f"{source}: there is no criterion {name!r}; the model has {known}")
        model.set_criteria({**model.criteria, **weights})
    if len(models) > 1:
        return EnsembleReward(models, aggregate or "mean", coef)
    for name, value in (("ensemble", aggregate), ("coefficient", coef)):
        if value is not None:
            raise ValueError(f"the {name} {value!r} has no effect on a single reward model")
    return models[0]


class ValueModel(_ScalarHead):
    """The critic: a trunk and a linear head at every position."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return values (B, T) float32. Entry t is the value of the state after tokens 0 to t."""
        return self.read(self.hidden_states(input_ids, attention_mask))


def _mix(head: nn.Linear, weights: list[list[float]]) -> None:
    """Replace the head's rows by weighted sums of them, which are whole on every rank."""
    for name, rows in head.named_parameters():
        whole = whole_tensor(rows)
        mixed = whole.new_tensor(weights) @ whole
        setattr(head, name, nn.Parameter(mixed, rows.requires_grad))
    head.out_features = len(weights)


def _fresh_head(config: TransformerConfig) -> nn.Linear:
    head = nn.Linear(config.hidden_size, 1, bias=False)
    nn.init.normal_(head.weight, std=(config.hidden_size + 1) ** -0.5)  # Stiennon et al. 2020
    return head
