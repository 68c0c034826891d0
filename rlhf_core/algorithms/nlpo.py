"""NLPO: PPO limited to tokens that an earlier policy finds likely (Ramamurthy et al. 2022, alg. 1).

At every token the policy's distribution is restricted to the top-p set of a lagging copy and
renormalized. Responses are sampled from that distribution, and log-probs, entropy, ratio and KL
belong to it. The saved model is the policy alone; sampling it with top_p differs only by the lag.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_core.algorithms.ppo import PPOConfig, PPOTrainer
from rlhf_core.models import Transformer, eval_mode
from rlhf_core.models.lagging import follow, weights
from rlhf_core.models.masked import MaskedHead, MaskedPolicy
from rlhf_core.options import option
from rlhf_core.rollout import Rollout, response_hidden


@dataclass(frozen=True)
class NLPOConfig(PPOConfig):
    """The mask of NLPO."""

    mask_top_p: float = option(
        0.9,
        "tokens outside the lagging policy's top-p set are masked; higher masks fewer",
        within="(0, 1]",
    )
    mask_every: int = option(
        10, "rollouts between updates of the lagging policy", within="[1, inf)"
    )

    def __post_init__(self):
        super().__post_init__()
        sampled = self.kl_estimator != "full"
        self.check(("kl_estimator", sampled, "k1, k2, k3 or abs: NLPO masks the vocabulary"))


class NLPOTrainer(PPOTrainer):
    """Arguments and metrics as for `PPOTrainer`."""

    algorithm = "nlpo"

    def __init__(self, model: Transformer, examples, config: NLPOConfig, **options):
        if options.get("engine") is not None:
            raise ValueError("nlpo samples from a masked policy, which no engine serves: pass none")
        if config.rollout_dtype is not None:
            raise ValueError(
                f"nlpo samples from a masked policy, which has no decoding steps in rollout_dtype "
                f"{config.rollout_dtype}: unset it"
            )
        super().__init__(model, examples, config, **options)
        self.masked = MaskedPolicy(model, config.mask_top_p, config.temperature)

    @property
    def sampled_policy(self) -> nn.Module:
        return self.masked

    def head(self, rollout: Rollout) -> MaskedHead:
        """The masked head, in float32, for the rollout's tokens."""
        lagging, full_precision = (
            self.masked.lagging,
            torch.autocast(self.device.type, enabled=False),
        )
        with torch.no_grad(), eval_mode(lagging), full_precision:
            return MaskedHead(self.masked, response_hidden(lagging, rollout))

    def step(self, batch: list[list[int]]) -> dict[str, float]:
        """One step of PPO; every mask_every steps the lagging policy catches up."""
        report = super().step(batch)
        if (self.steps_done + 1) % self.config.mask_every == 0:
            follow(self.masked.lagging, self.model)
        return report

    def state(self) -> dict[str, Tensor]:
        lagging = weights(self.masked.lagging, self.model)
        return super().state() | {f"lagging:{name}": x for name, x in lagging.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        for name, x in weights(self.masked.lagging, self.model).items():
            x.copy_(state[f"lagging:{name}"])
