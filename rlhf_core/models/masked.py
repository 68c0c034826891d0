"""A policy limited to tokens that an earlier copy finds likely (NLPO, Ramamurthy et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_core.models.lagging import lagging_copy
from rlhf_core.models.transformer import KVCache, Transformer, Trunk, TrunkModel, in_chunks
from rlhf_core.ops import token_logprobs_and_entropy
from rlhf_core.ops.linear_logprobs import TokenStatistics
from rlhf_core.ops.sampling import truncation_threshold


class MaskedPolicy(TrunkModel):
    """A policy that gives tokens outside the top-p set of a lagging copy the probability 0.

    `generate` can sample from it. It has the trunk of the policy.
    """

    def __init__(self, policy: Transformer, top_p: float, temperature: float):
        super().__init__()
        self.policy, self.lagging = policy, lagging_copy(policy)
        self.top_p, self.temperature = top_p, temperature
        self.train(policy.training)  # `eval_mode` restores the mode of this module in both

    @property
    def trunk(self) -> Trunk:
        return self.policy.trunk

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **packing: Tensor
    ) -> Tensor:
        """Return hidden states of the policy, as `Transformer.hidden_states`."""
        return self.policy.hidden_states(input_ids, attention_mask, **packing)

    def prefill(self, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        """Return logits (B, V) as `Transformer.prefill`. Adds `cache.lagging`."""
        cache.lagging = self.lagging.new_cache(len(cache.lengths), cache.max_length)
        hidden = self.policy.trunk.prefill(input_ids, lengths, cache)
        return self.logits(hidden, self.lagging.trunk.prefill(input_ids, lengths, cache.lagging))

    def decode(self, token_ids: Tensor, cache: KVCache, slots: Tensor) -> Tensor:
        """Return logits (B, V) as `Transformer.decode`."""
        hidden = self.policy.trunk.decode(token_ids, cache, slots)
        return self.logits(hidden, self.lagging.trunk.decode(token_ids, cache.lagging, slots))

    def logits(self, hidden: Tensor, lagging: Tensor, taken: Tensor | None = None) -> Tensor:
        """Return logits (N, V), -inf outside the mask, of hidden states (N, D) of both models.

        The mask is computed in float32, also under autocast.

        Args:
            taken: (N,) sampled tokens. They stay allowed even if the copy now rounds differently.
        """
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            z = self.lagging.logits(lagging).float()
            allowed = z >= truncation_threshold(z, self.temperature, None, self.top_p, None)
            if taken is not None:
                allowed.scatter_(1, taken[:, None], True)
        return self.policy.logits(hidden).masked_fill(~allowed, -math.inf)


class MaskedHead:
    """The head of a MaskedPolicy for given tokens, with the methods of `Transformer`."""

    def __init__(self, policy: MaskedPolicy, lagging: Tensor):
        """lagging: (N, D) hidden states of the lagging copy at the tokens."""
        self.policy, self.lagging = policy, lagging

    def token_logprobs(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0
    ) -> TokenStatistics:
        """Return log-probs and entropy (N,) under the masked distribution."""

        def statistics(*rows: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.policy.logits(*rows)
            return token_logprobs_and_entropy(logits, rows[-1], temperature=temperature)

        vocab_size = self.policy.config.vocab_size
        return TokenStatistics(*in_chunks(statistics, vocab_size, hidden, self.lagging, targets))

    def token_loss(
        self, hidden: Tensor, targets: Tensor, losses: Callable, *, temperature: float = 1.0, **_
    ) -> tuple[Tensor, ...]:
        """As `Transformer.token_loss`, with all tokens in one chunk."""
        tokens = self.token_logprobs(hidden, targets, temperature=temperature)
        return losses(tokens, slice(None))
