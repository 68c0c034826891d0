"""ILQL (Snell et al. 2022): offline reinforcement learning on text with known rewards.

Nothing is sampled. The language model learns to imitate the data, and its value heads learn what
each token is worth. Sampling combines both and exceeds the data's reward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_core.data import Example
from rlhf_core.data.collate import count_targets
from rlhf_core.losses import cloning_loss, expectile_loss, q_loss, transitions
from rlhf_core.models import ILQLModel
from rlhf_core.models.lagging import follow, weights
from rlhf_core.options import option
from rlhf_core.training.completions import target_hidden
from rlhf_core.training.config import MAX_LENGTH, TrainConfig
from rlhf_core.training.metrics import Metrics
from rlhf_core.training.trainer import Trainer


@dataclass(frozen=True)
class ILQLConfig(TrainConfig):
    """Losses of ILQL."""

    lr: float = option(1e-4, "peak learning rate of AdamW", within="(0, inf)")
    gamma: float = option(0.99, "discount per token", within="[0, 1]")
    expectile: float = option(
        0.7, "expectile of Q that V estimates: 0.5 is the mean, 1 the maximum", within="(0, 1)"
    )
    cql_coef: float = option(
        0.1,
        "weight of the Q heads' cross-entropy, which lowers Q for tokens the data lacks",
        within="[0, inf)",
    )
    bc_coef: float = option(
        1.0,
        "weight of behaviour cloning, the language model's own loss; 0 learns from Q alone",
        within="[0, inf)",
    )
    bc_beta: float = option(
        0.0,
        "cloned tokens are weighted by exp(bc_beta * advantage) (AWAC), per unit of reward; 0 "
        "weights them equally",
        within="[0, inf)",
    )
    target_rate: float = option(
        0.005, "share of the way that the target heads follow the Q heads per step", within="(0, 1]"
    )
    beta: float = option(
        1.0,
        "weight of the values in the logits for sampling, per unit of reward; saved with the model",
        within="[0, inf)",
    )
    max_length: int = option(1024, MAX_LENGTH, within="[2, inf)")

    def __post_init__(self):
        super().__post_init__()
        self.warn_unused(("bc_beta", self.bc_coef > 0, "because bc_coef is 0"))


class ILQLTrainer(Trainer):
    """Trains an ILQLModel on `Example`s with a reward.

    Metrics: loss and its parts loss/{q,v,cql,bc} before their weights; q (the lower target), value
    and advantage of the data's tokens; entropy of the language model.
    """

    algorithm = "ilql"
    model_type = ILQLModel
    kinds = (Example,)
    needs = "reward"

    def __init__(self, model: ILQLModel, examples, config: ILQLConfig, **options):
        super().__init__(model, examples, config, **options)
        model.beta = config.beta

    def fault(self, example: Example) -> str | None:
        if example.reward is not None and math.isfinite(example.reward):
            return None
        return f"has reward {example.reward!r}, not a finite number"

    def losses(self, batch: list[Example], metrics: Metrics) -> Iterator[Tensor]:
        config, model = self.config, self.model
        num_tokens = self.total(sum(map(count_targets, batch)))
        for part, tokens in self.parts(batch, packing=config.max_length):
            scores = torch.tensor([x.reward for x in part], device=self.device)  # (B,)
            actions = tokens.targets
            with self.autocast():
                hidden = target_hidden(model, tokens)  # (M, D)
                logprobs, entropy, _ = model.lm.token_logprobs(hidden, actions)
                cql = -sum(head.token_logprobs(hidden, actions) for head in model.q)
            q = torch.stack([head.of_tokens(hidden, actions) for head in model.q])  # (2, M)
            with torch.no_grad():
                target_q = torch.minimum(
                    *(head.of_tokens(hidden, actions) for head in model.target_q)
                )  # (M,)
            values = model.values(hidden)
            rewards, next_values = transitions(values, scores, tokens.lengths)
            terms = {
                "q": q_loss(q, rewards, next_values, gamma=config.gamma).sum(dim=0),
                "v": expectile_loss(values, target_q, expectile=config.expectile),
                "cql": cql,
                "bc": cloning_loss(logprobs, target_q - values, beta=config.bc_beta),
            }
            loss = (
                terms["q"]
                + terms["v"]
                + config.cql_coef * terms["cql"]
                + config.bc_coef * terms["bc"]
            )  # (M,)
            metrics.add("loss", loss)
            for name, term in terms.items():
                metrics.add(f"loss/{name}", term)
            metrics.add("q", target_q)
            metrics.add("value", values)
            metrics.add("advantage", target_q - values)
            metrics.add("entropy", entropy)
            yield loss.sum() / num_tokens

    def step(self, batch: list[Example]) -> dict[str, float]:
        metrics = super().step(batch)
        follow(self.model.target_q, self.model.q, self.config.target_rate)
        return metrics

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"target_q.{name}": x for name, x in self.targets().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        for name, x in self.targets().items():
            x.copy_(state[f"target_q.{name}"])

    def targets(self) -> dict[str, Tensor]:
        """The weights of the target heads."""
        return weights(self.model.target_q, self.model.q)
