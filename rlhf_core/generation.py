"""Batched sampling with a KV cache, returning the log-probs of the distribution sampled from.

Left out: beam search. A rollout engine can stand in for `generate`: prompts in, a Generation out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.models import KVCache, Transformer, eval_mode


class Generation(NamedTuple):
    """Sampled responses; R is the length of the longest one."""

    response_ids: Tensor  # (B, R) int64, 0 or the model's pad_id after the end
    response_mask: Tensor  # (B, R) bool, True up to the end, EOS included
    logprobs: Tensor  # (B, R) float32 nats under the distribution sampled from, 0 after the end


@torch.no_grad()
def generate(
    model: Transformer,
    prompt_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_ids: tuple[int, ...] | None = None,
    generator: torch.Generator | None = None,
) -> Generation:
    """Sample a response to every prompt; dropout is off whatever mode the model is in.

    Args:
        prompt_ids: (B, P) int64, left-padded.
        attention_mask: (B, P) bool, True = real token; None means no padding.
        max_new_tokens: longest response.
        temperature: logits are divided by it; 0 is greedy, whose log-probs are 0 (all mass on one token).
        top_k: sample among the k most likely tokens; None for all.
        top_p: sample among the fewest tokens that hold this much probability (Holtzman et al. 2020); None for all.
        eos_ids: ids that end a response; None takes the model's own, () none.
        generator: source of randomness, on the model's device; None for torch's global one.

    Raises:
        ValueError for an argument out of range, padding on the right, or a sequence beyond the model's positions;
        FloatingPointError where the logits are not finite.
    """
    B, P = prompt_ids.shape
    config, device = model.config, prompt_ids.device
    if not temperature >= 0 or math.isinf(temperature):
        raise ValueError(f"temperature must be finite and >= 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if max_new_tokens < 1 or P < 1:
        raise ValueError(f"need a prompt and at least one new token, got P = {P}, max_new_tokens = {max_new_tokens}")
    if P + max_new_tokens > config.max_positions:
        raise ValueError(
            f"{P} prompt + {max_new_tokens} new tokens exceed the model's {config.max_positions} positions"
        )
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ValueError("prompts must be padded on the left: attention_mask ends with False in a row")
    if attention_mask is not None and attention_mask.all():
        attention_mask = None  # no padding: attention needs no mask

    stops = torch.tensor(config.eos_ids if eos_ids is None else eos_ids, device=device, dtype=torch.long)
    pad_id = config.pad_id or 0
    ids = prompt_ids.new_full((B, max_new_tokens), pad_id)
    mask = torch.zeros(B, max_new_tokens, dtype=torch.bool, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    seen = None if attention_mask is None else torch.cat((attention_mask, torch.ones_like(mask)), dim=1)  # (B, P + R)
    cache = KVCache(config, B, P + max_new_tokens, model.head_weight)
    alive = torch.ones(B, dtype=torch.bool, device=device)
    new_ids = prompt_ids
    with eval_mode(model):
        for t in range(max_new_tokens):
            hidden = model.trunk(new_ids, None if seen is None else seen[:, : P + t], cache)[:, -1]  # (B, D)
            token, logprob = _sample(model.logits(hidden).float(), temperature, top_k, top_p, generator)
            ids[:, t] = token.where(alive, pad_id)
            logprobs[:, t] = logprob.where(alive, 0.0)
            mask[:, t] = alive
            alive = alive & ~torch.isin(token, stops)
            if not alive.any():
                break
            new_ids = ids[:, t : t + 1]
    if not logprobs.isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
    return Generation(ids[:, : t + 1], mask[:, : t + 1], logprobs[:, : t + 1])


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """One token and its log-prob for every row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1), logits.new_zeros(len(logits))
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(dim=-1)
        beyond = p.cumsum(dim=-1) - p >= top_p  # the tokens before this one hold enough
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -math.inf)
    logprobs = logits.log_softmax(dim=-1)
    # Inverse of the cumulative distribution: one uniform a row, where torch.multinomial draws V exponentials. In
    # float64 the cumulative sum keeps every token's share; its last entry is the total, whatever the rounding.
    cdf = logprobs.double().exp().cumsum(dim=-1)
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device, generator=generator)
    token = torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True).clamp_max(logits.shape[-1] - 1)  # (B, 1)
    return token[:, 0], logprobs.gather(-1, token)[:, 0]
