"""ILQL (Snell et al. 2022): offline reinforcement learning on text whose reward is known; nothing is sampled.

The language model learns to write as the data does, its heads what that is worth; together they write better than it.
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
from rlhf_core.ops import linear_token_logprobs, linear_token_logprobs_and_entropy
from rlhf_core.trainers.common import Metrics, Trainer
from rlhf_core.trainers.completions import read_hidden
from rlhf_core.trainers.config import TrainConfig, option


@dataclass(frozen=True)
class ILQLConfig(TrainConfig):
    lr: float = option(1e-4, "peak learning rate of AdamW")
    gamma: float = option(0.99, "discount a token, in [0, 1]")
    expectile: float = option(
        0.7, "of Q that V is drawn to, in (0, 1): 0.5 its mean, near 1 its maximum"
    )
    cql_coef: float = option(
        0.1, "weight of the Q heads' cross-entropy, which keeps them low for what the data has not"
    )
    bc_coef: float = option(
        1.0, "weight of cloning the data, the language model's own loss; 0: it learns from Q alone"
    )
    bc_beta: float = option(
        0.0, "per unit of reward: cloned tokens weigh exp(this * advantage) (AWAC); 0: all alike"
    )
    target_rate: float = option(
        0.005, "share of the way that the target heads move to the Q heads a step, in (0, 1]"
    )
    beta: float = option(
        1.0,
        "per unit of reward: weight of the values in the logits sampled from, saved; at least 0",
    )
    max_length: int = option(
        1024, "tokens of prompt and completion together; what is longer is cut"
    )

    def __post_init__(self):
        super().__post_init__()
        self.check(
            ("gamma", 0 <= self.gamma <= 1, "in [0, 1]"),
            ("expectile", 0 < self.expectile < 1, "in (0, 1)"),
            ("cql_coef", self.cql_coef >= 0, "at least 0"),
            ("bc_coef", self.bc_coef >= 0, "at least 0"),
            ("bc_beta", self.bc_beta >= 0, "at least 0"),
            ("target_rate", 0 < self.target_rate <= 1, "in (0, 1]"),
            ("beta", self.beta >= 0, "at least 0"),
        )
        self.check_effective(("bc_beta", self.bc_coef, "without bc_coef > 0"))


class ILQLTrainer(Trainer):
    """model: ILQLModel; examples: `Example`s with a reward.

    Metrics: loss and its parts, loss/{q,v,cql} and bc before their weights; of the data's tokens q (the lower of the
    targets), value and advantage; entropy of the language model.
    """

    algorithm = "ilql"
    main_metric = "loss"
    model_type = ILQLModel
    kinds = (Example,)

    def __init__(self, model: ILQLModel, examples, config: ILQLConfig, **options):
        super().__init__(model, examples, config, **options)
        model.beta = config.beta

    def fault(self, example) -> str | None:
        finite = example.reward is not None and math.isfinite(example.reward)
        return None if finite else f"has reward {example.reward!r}, no finite number"

    def losses(self, batch: list[Example], metrics: Metrics) -> Iterator[Tensor]:
        config, model, num_tokens = self.config, self.model, max(sum(map(count_targets, batch)), 1)
        for part, tokens in self.parts(batch, packing=config.max_length):
            scores = torch.tensor([example.reward for example in part], device=self.device)  # (B,)
            actions = tokens.targets
            with self.autocast():
                hidden = read_hidden(model.trunk, tokens, tokens.read)  # (M, D)
                logprobs, entropy = linear_token_logprobs_and_entropy(
                    hidden, model.head_weight, actions
                )
                cql = -sum(
                    linear_token_logprobs(head.features(hidden), head.out.weight, actions)
                    for head in model.q
                )
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
