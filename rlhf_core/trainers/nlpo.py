"""NLPO (Ramamurthy et al. 2022, algorithm 1): PPO that may write only what an earlier policy holds likely.

At every token the policy's distribution is cut to the top-p set of a copy of it, which follows every few rollouts, and
renormalised. That is what is sampled from, and what log-probs, entropy, ratio and KL are of. What is saved is the
policy alone: sampling from it with top_p is the same but for the copy's lag.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_core.models import KVCache, Transformer, TransformerConfig, eval_mode
from rlhf_core.models.lagging import follow, lagging_copy, weights
from rlhf_core.ops import token_logprobs_and_entropy
from rlhf_core.ops.sampling import truncation_threshold
from rlhf_core.rollout import Rollout, response_hidden, scatter
from rlhf_core.trainers.config import option
from rlhf_core.trainers.ppo import PPOConfig, PPOTrainer

LOGITS_AT_ONCE = 2**22  # of each of the two models: 16 MB


@dataclass(frozen=True)
class NLPOConfig(PPOConfig):
    mask_top_p: float = option(
        0.9, "the likeliest tokens of the lagging policy that hold this probability are allowed"
    )
    mask_every: int = option(10, "rollouts between its updates to the policy")

    def __post_init__(self):
        super().__post_init__()
        self.check(
            ("mask_top_p", 0 < self.mask_top_p <= 1, "in (0, 1]"),
            ("mask_every", self.mask_every >= 1, "at least 1"),
            (
                "kl_estimator",
                self.kl_estimator != "full",
                "one of sampled tokens, as NLPO cuts the vocabulary",
            ),
        )


class MaskedPolicy(nn.Module):
    """A policy whose tokens outside the top-p set of a lagging copy have no probability; `generate` takes it."""

    def __init__(self, policy: Transformer, top_p: float, temperature: float):
        super().__init__()
        self.policy, self.lagging = policy, lagging_copy(policy)
        self.top_p, self.temperature = top_p, temperature
        self.train(
            policy.training
        )  # as `eval_mode` gives both of them back the mode of this module

    @property
    def config(self) -> TransformerConfig:
        return self.policy.config

    @property
    def head_weight(self) -> Tensor:
        return self.policy.head_weight

    def prefill(self, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        """As for `Transformer`; the cache takes up a second one, of the copy."""
        _, N, _, S, _ = cache.keys.shape
        cache.lagging = KVCache(self.config, N, S, cache.keys)
        hidden = self.policy.trunk.prefill(input_ids, lengths, cache)
        return self.logits(hidden, self.lagging.trunk.prefill(input_ids, lengths, cache.lagging))

    def decode(self, token_ids: Tensor, cache: KVCache, slots: Tensor) -> Tensor:
        hidden = self.policy.trunk.decode(token_ids, cache, slots)
        return self.logits(hidden, self.lagging.trunk.decode(token_ids, cache.lagging, slots))

    def logits(self, hidden: Tensor, lagging: Tensor, taken: Tensor | None = None) -> Tensor:
        """Hidden states (N, D) of the two -> (N, V), -inf outside the mask, which is a float32 one under autocast too.

        taken: (N,) tokens that were sampled, and so are allowed whatever the copy rounds to now.
        """
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            z = self.lagging.logits(lagging).float()
            allowed = z >= truncation_threshold(z, self.temperature, None, self.top_p, None)
            if taken is not None:
                allowed.scatter_(1, taken[:, None], True)
        return self.policy.logits(hidden).masked_fill(~allowed, -math.inf)


class NLPOTrainer(PPOTrainer):
    """Arguments and metrics as for `PPOTrainer`."""

    algorithm = "nlpo"

    def __init__(self, model: Transformer, examples, config: NLPOConfig, **options):
        super().__init__(model, examples, config, **options)
        self.masked = MaskedPolicy(model, config.mask_top_p, config.temperature)

    @property
    def sampled(self) -> nn.Module:
        return self.masked

    def step(self, batch: list[list[int]]) -> dict[str, float]:
        report = super().step(batch)
        if (self.steps_done + 1) % self.config.mask_every == 0:
            follow(self.masked.lagging, self.model)
        return report

    def response_logprobs(
        self, rollout: Rollout, hidden: Tensor, loss_of: Callable | None = None
    ) -> tuple[Tensor, Tensor]:
        """Masked; logits exist for some tokens at a time, and are computed again for the backward."""
        copy, full = self.masked.lagging, torch.autocast(self.device.type, enabled=False)
        with torch.no_grad(), eval_mode(copy), full:
            lagging = response_hidden(copy.trunk, rollout)  # (N, D)

        def statistics(hidden: Tensor, lagging: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.masked.logits(hidden, lagging, taken)
            return token_logprobs_and_entropy(logits, taken, temperature=self.config.temperature)

        size = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        taken = rollout.response_ids[rollout.response_mask]  # (N,)
        parts = [
            checkpoint(statistics, *part, use_reentrant=False)
            if torch.is_grad_enabled()
            else statistics(*part)
            for part in zip(hidden.split(size), lagging.split(size), taken.split(size))
        ]
        logprobs, entropy = (torch.cat(column) for column in zip(*parts))
        return scatter(logprobs, rollout.response_mask), scatter(entropy, rollout.response_mask)

    def state(self) -> dict[str, Tensor]:
        masking = weights(self.masked.lagging, self.model)
        return super().state() | {f"lagging:{name}": x for name, x in masking.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        for name, x in weights(self.masked.lagging, self.model).items():
            x.copy_(state[f"lagging:{name}"])
