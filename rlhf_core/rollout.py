"""Prompts to rollouts, and what a model says of a rollout's tokens: log-probs, entropy, values.

The response's token t sits at position P + t of the sequence; what predicts it, and the value of the state before it,
is read at position P - 1 + t.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_core.data.collate import left_pad
from rlhf_core.generation import generate
from rlhf_core.models import Transformer, ValueModel
from rlhf_core.models.transformer import Trunk
from rlhf_core.ops import full_kl, linear_token_logprobs_and_entropy

FULL_KL_LOGITS = 2**22  # of each model at a time: 16 MB


class Rollout(NamedTuple):
    """Prompts and sampled responses: B sequences, P prompt and R response tokens at most."""

    prompt_ids: Tensor  # (B, P) int64, left-padded
    prompt_mask: Tensor  # (B, P) bool, True = real token
    response_ids: Tensor  # (B, R) int64, right-padded
    response_mask: Tensor  # (B, R) bool, True = counts, EOS included
    logprobs: Tensor  # (B, R) float32, recorded while sampling, of the distribution sampled from

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
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    eos_ids: Sequence[int] | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Sample `num_samples` responses to every prompt (lists of token ids), those of a prompt one after the other.

    Arguments as for `generate`. What scores a rollout knows the temperature only, so truncation warns, once.
    """
    if not (top_k is top_p is min_p is None):
        _warn_of_truncation()
    device = model.head_weight.device
    prompt_ids, prompt_mask = (x.to(device) for x in left_pad(prompts, model.config.pad_id or 0))
    response = generate(
        model,
        prompt_ids,
        attention_mask=prompt_mask,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        eos_ids=eos_ids,
        seeds=seeds,
        generator=generator,
    )
    prompt_ids, prompt_mask = (
        x.repeat_interleave(num_samples, dim=0) for x in (prompt_ids, prompt_mask)
    )
    return Rollout(
        prompt_ids, prompt_mask, response.response_ids, response.response_mask, response.logprobs
    )


@functools.cache
def _warn_of_truncation() -> None:
    warnings.warn(
        "rollouts sampled with top_k, top_p or min_p: their log-probs are those of the truncated distribution, while "
        "`response_logprobs`, and so PPO's ratio and KL, take softmax(logits / temperature)",
        stacklevel=3,
    )


def response_hidden(trunk: Trunk, rollout: Rollout) -> Tensor:
    """Hidden states (N, D) that the N counted response tokens are predicted from, row by row, with gradient.

    Prompt and response of a row stand side by side, padded on the right as far as the longest needs: then attention
    needs no mask, which is its fast path.
    """
    ids, mask, device = rollout.input_ids, rollout.response_mask, rollout.input_ids.device
    prompts = rollout.prompt_mask.sum(dim=1, keepdim=True)  # (B, 1)
    T = max(
        int((prompts + mask.sum(dim=1, keepdim=True)).max()) - 1, 1
    )  # a last token predicts none
    P, R = rollout.prompt_ids.shape[1], mask.shape[1]
    place = (
        torch.arange(T, device=device) + P - prompts
    )  # (B, T) of the T tokens in the rollout's own order
    read = (
        torch.arange(len(ids), device=device)[:, None] * T
        + prompts
        - 1
        + torch.arange(R, device=device)
    )  # (B, R)
    return trunk(ids.gather(1, place.clamp_max(ids.shape[1] - 1)), read=read[mask])


def response_logprobs(
    model: Transformer,
    rollout: Rollout,
    temperature: float = 1.0,
    hidden: Tensor | None = None,
    loss_of: Callable[[Tensor, slice], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy (B, R) of the response tokens under softmax(logits / temperature), with gradient.

    hidden: what `response_hidden` gives for the model's trunk, where the caller has it.
    loss_of: as for `linear_token_logprobs_and_entropy`; the rows are the tokens under the mask.
    """
    mask = rollout.response_mask
    hidden = response_hidden(model.trunk, rollout) if hidden is None else hidden
    logprobs, entropy = linear_token_logprobs_and_entropy(
        hidden,
        model.head_weight,
        rollout.response_ids[mask],
        temperature=temperature,
        loss_of=loss_of,
    )
    return scatter(logprobs, mask), scatter(entropy, mask)


def response_full_kl(
    model: Transformer,
    reference: Transformer,
    rollout: Rollout,
    temperature: float,
    hidden: Tensor,
    ref_hidden: Tensor,
) -> Tensor:
    """Exact KL(model || reference) (B, R) over the vocabulary at every response token, with gradient to the model.

    hidden, ref_hidden: what `response_hidden` gives for the two trunks. Logits exist for some tokens at a time, and are
    computed again for the backward.
    """

    def kl_of(h: Tensor, r: Tensor) -> Tensor:
        with torch.no_grad():
            ref_logits = reference.logits(r)
        return full_kl(model.logits(h), ref_logits, temperature=temperature)

    size = max(1, FULL_KL_LOGITS // model.config.vocab_size)
    parts = []
    for h, r in zip(hidden.split(size), ref_hidden.split(size)):
        parts.append(
            checkpoint(kl_of, h, r, use_reentrant=False) if torch.is_grad_enabled() else kl_of(h, r)
        )
    return scatter(torch.cat(parts), rollout.response_mask)


def response_values(critic: ValueModel, rollout: Rollout, hidden: Tensor | None = None) -> Tensor:
    """Values (B, R) of the states before the response tokens, 0 where the mask is False, with gradient; hidden as for
    `response_logprobs`."""
    hidden = response_hidden(critic.trunk, rollout) if hidden is None else hidden
    return scatter(critic.read(hidden), rollout.response_mask)


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Values (N,) to the N True places of a mask (B, R), 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
