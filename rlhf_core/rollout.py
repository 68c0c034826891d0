"""Prompts to rollouts, and what a model says of a rollout's tokens: log-probs, entropy, values.

The response's token t sits at position P + t of the sequence; what predicts it, and the value of the state before it,
is read at position P - 1 + t.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.data.collate import left_pad
from rlhf_core.generation import generate
from rlhf_core.models import Transformer, ValueModel
from rlhf_core.ops import linear_token_logprobs_and_entropy


class Rollout(NamedTuple):
    """Prompts and sampled responses: B sequences, P prompt and R response tokens at most."""

    prompt_ids: Tensor  # (B, P) int64, left-padded
    prompt_mask: Tensor  # (B, P) bool, True = real token
    response_ids: Tensor  # (B, R) int64, right-padded
    response_mask: Tensor  # (B, R) bool, True = counts, EOS included
    logprobs: Tensor  # (B, R) float32, recorded while sampling

    @property
    def input_ids(self) -> Tensor:
        """(B, P + R)."""
        return torch.cat((self.prompt_ids, self.response_ids), dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """(B, P + R) bool."""
        return torch.cat((self.prompt_mask, self.response_mask), dim=1)

    def prompts(self) -> list[list[int]]:
        """Token ids of every prompt, without padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.prompt_ids, self.prompt_mask)]

    def responses(self) -> list[list[int]]:
        """Token ids of every response, without padding, EOS included."""
        return [ids[mask].tolist() for ids, mask in zip(self.response_ids, self.response_mask)]


def sample(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    eos_ids: tuple[int, ...] | None = None,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Sample one response to every prompt (lists of token ids); arguments as for `generate`."""
    device = model.head_weight.device
    prompt_ids, prompt_mask = (x.to(device) for x in left_pad(prompts, model.config.pad_id or 0))
    response = generate(
        model,
        prompt_ids,
        attention_mask=prompt_mask,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eos_ids=eos_ids,
        generator=generator,
    )
    return Rollout(prompt_ids, prompt_mask, *response)


def response_logprobs(model: Transformer, rollout: Rollout, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy (B, R) of the response tokens under softmax(logits / temperature), with gradient."""
    P = rollout.prompt_ids.shape[1]
    hidden = model.trunk(rollout.input_ids, rollout.attention_mask)[:, P - 1 : -1]  # (B, R, D)
    return linear_token_logprobs_and_entropy(
        hidden, model.head_weight, rollout.response_ids, temperature=temperature, mask=rollout.response_mask
    )


def response_values(critic: ValueModel, rollout: Rollout) -> Tensor:
    """Values (B, R) of the states before the response tokens, 0 where the mask is False, with gradient."""
    P = rollout.prompt_ids.shape[1]
    values = critic(rollout.input_ids, rollout.attention_mask)[:, P - 1 : -1]
    return values.masked_fill(~rollout.response_mask, 0)
