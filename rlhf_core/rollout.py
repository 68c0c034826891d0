"""Rollouts: prompts with sampled responses, and a model's log-probs, entropy and values of them.

Response token t sits at position P + t of the sequence. Its prediction, and the value of the state
before it, are read at position P - 1 + t.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core import distributed
from rlhf_core.data import Tokenizer
from rlhf_core.data.collate import collate, grouped, left_pad, unknown_id
from rlhf_core.generation import Engine, Generation, draw_seeds, generate
from rlhf_core.models import Transformer, ValueModel
from rlhf_core.models.gather import whole
from rlhf_core.models.packed_attention import packing_pays
from rlhf_core.models.transformer import TrunkModel, in_chunks
from rlhf_core.ops import full_kl


class Rollout(NamedTuple):
    """Prompts and sampled responses: B sequences, P prompt and R response tokens at most."""

    prompt_ids: Tensor  # (B, P) int64, left-padded
    prompt_mask: Tensor  # (B, P) bool, True = real token
    response_ids: Tensor  # (B, R) int64, right-padded
    response_mask: Tensor  # (B, R) bool, True = counts, EOS included
    logprobs: Tensor  # (B, R) float32, recorded while sampling, of the distribution sampled from
    ended: Tensor  # (B,) bool, whether EOS or a stop string ended the response: it is not truncated

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
        return _unpadded(self.prompt_ids, self.prompt_mask)

    def responses(self) -> list[list[int]]:
        """Token ids of every response, without padding, EOS included."""
        return _unpadded(self.response_ids, self.response_mask)


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[counts].tolist() for row, counts in zip(ids.cpu(), mask.cpu())]


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
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    engine: Engine | None = None,
    weight_dtype: str | None = None,
) -> Rollout:
    """Sample `num_samples` responses to every prompt of token ids, grouped by prompt.

    Arguments as for `generate`. Truncation (top_k, top_p, min_p) warns once, because
    `response_logprobs` knows the temperature only. Several processes share the prompts; each gets
    all responses, which are those of a single process.

    engine: samples in place of `generate`, after it has got the model's weights. With several
        processes, only the first one calls it.
    weight_dtype: as for `generate`, and so not with an engine. The log-probs are those of the
        distribution sampled from, which `response_logprobs` of the model differ from.
    """
    if engine is not None and weight_dtype is not None:
        raise ValueError(f"weight_dtype {weight_dtype} is for `generate`; the engine has its own")
    if not (top_k is top_p is min_p is None):
        _warn_of_truncation()
    for i, prompt in enumerate(prompts):
        if fault := unknown_id(prompt, model.config.vocab_size):
            raise ValueError(f"prompt {i} {fault}")
    pad_id, n = model.config.pad_id or 0, len(prompts) * num_samples
    if seeds is None:
        seeds = draw_seeds(n, generator, model.device)
    if seeds.shape != (n,):
        raise ValueError(
            f"seeds have shape {tuple(seeds.shape)}, but there are {len(prompts)} prompts x "
            f"{num_samples} samples"
        )
    options: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        eos_ids=model.config.eos_ids if eos_ids is None else eos_ids,
        stop_strings=stop_strings,
        tokenizer=tokenizer,
    )

    def generated(model: Transformer, own: slice) -> tuple[Tensor, ...]:
        """Columns of the responses to some prompts."""
        prompt_ids, prompt_mask = (x.to(model.device) for x in left_pad(prompts[own], pad_id))
        response = generate(
            model,
            prompt_ids,
            attention_mask=prompt_mask,
            seeds=seeds[own.start * num_samples : own.stop * num_samples],
            weight_dtype=weight_dtype,
            **options,
        )
        return _columns(response)

    with whole(model) as plain:
        if engine is None:
            parts = (generated(plain, own) for own in distributed.shares(len(prompts)))
            ids, mask, logprobs, ended = distributed.gather(parts)
        else:
            response = _sampled_by(engine, plain, prompts, seeds, options)
            ids, mask, logprobs, ended = (x.to(model.device) for x in _columns(response))
    prompt_ids, prompt_mask = (
        x.to(model.device).repeat_interleave(num_samples, dim=0) for x in left_pad(prompts, pad_id)
    )
    return Rollout(prompt_ids, prompt_mask, ids.where(mask, pad_id), mask, logprobs, ended)


def _columns(response: Generation) -> tuple[Tensor, ...]:
    """The ids, mask, log-probs and ends of responses."""
    return response.response_ids, response.response_mask, response.logprobs, response.ended


def _sampled_by(
    engine: Engine,
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    seeds: Tensor,
    options: dict[str, Any],
) -> Generation:
    """What the engine samples. The first process asks it, and tells the others."""
    response = None
    with distributed.together(local=True):
        if not distributed.rank():
            engine.load(model)
            response = engine.generate(prompts, seeds=seeds.tolist(), **options)
    return distributed.from_rank_0(response)


def join(*rollouts: Rollout) -> Rollout:
    """One rollout of all rows, padded to the longest prompt and the longest response."""
    P, R = (max(x[i].shape[1] for x in rollouts) for i in (0, 2))

    def padded(rollout: Rollout) -> Rollout:
        before, after = P - rollout.prompt_ids.shape[1], R - rollout.response_ids.shape[1]
        prompt = (F.pad(x, (before, 0)) for x in rollout[:2])
        response = (F.pad(x, (0, after)) for x in rollout[2:5])
        return Rollout(*prompt, *response, rollout.ended)

    return Rollout(*map(torch.cat, zip(*map(padded, rollouts))))


@functools.cache
def _warn_of_truncation() -> None:
    warnings.warn(
        "rollouts sampled with top_k, top_p or min_p have log-probs of the truncated distribution, "
        "but `response_logprobs`, and so PPO's ratio and KL, use softmax(logits / temperature)",
        stacklevel=3,
    )


def response_hidden(model: TrunkModel, rollout: Rollout) -> Tensor:
    """Hidden states (N, D) that predict the N counted response tokens, row by row, with gradient.

    Each row's prompt and response are moved next to each other and padded on the right, so that
    attention needs no mask, which is its fast path. On CPU the rows are packed instead where that
    costs less: adjacent rows share an equal prompt, and padding is left out.
    """
    ids, mask, device = rollout.input_ids, rollout.response_mask, rollout.input_ids.device
    prompts = rollout.prompt_mask.sum(dim=1, keepdim=True)  # (B, 1)
    lengths = prompts + mask.sum(dim=1, keepdim=True)
    # The last token of a row predicts nothing, so it is left out.
    T = max(int(lengths.max()) - 1, 1)
    if device.type == "cpu":
        again = (rollout.prompt_ids[1:] == rollout.prompt_ids[:-1]).all(dim=1)  # (B - 1,)
        tokens = int(lengths.sum() - (prompts[1:, 0] * again).sum())
        if packing_pays(model.config, (len(ids), T), tokens):
            groups = grouped(rollout.prompts(), rollout.responses())
            batch = collate(groups, model.config.pad_id or 0, packing=tokens)
            packed = dict(positions=batch.positions, visible=batch.visible)
            return model.hidden_states(batch.input_ids, read=batch.read, **packed)
    P, R = rollout.prompt_ids.shape[1], mask.shape[1]
    place = torch.arange(T, device=device) + P - prompts  # (B, T) where the T tokens are in `ids`
    starts = torch.arange(len(ids), device=device)[:, None] * T + prompts - 1
    read = starts + torch.arange(R, device=device)  # (B, R)
    return model.hidden_states(ids.gather(1, place.clamp_max(ids.shape[1] - 1)), read=read[mask])


def response_logprobs(
    model: Transformer, rollout: Rollout, temperature: float = 1.0, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy (B, R) of the response tokens under softmax(logits / temperature).

    Both have a gradient. hidden: the model's `response_hidden`, if the caller has it.
    """
    mask = rollout.response_mask
    hidden = response_hidden(model, rollout) if hidden is None else hidden
    tokens = model.token_logprobs(hidden, rollout.response_ids[mask], temperature=temperature)
    return scatter(tokens.logprobs, mask), scatter(tokens.entropy, mask)


def response_full_kl(
    model: Transformer,
    reference: Transformer,
    rollout: Rollout,
    temperature: float,
    hidden: Tensor,
    ref_hidden: Tensor,
) -> Tensor:
    """Exact KL(model || reference) (B, R) over the vocabulary, with gradient to the model.

    hidden, ref_hidden: `response_hidden` of the two models.
    """

    def kl_of(h: Tensor, r: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            ref_logits = reference.logits(r)
        return (full_kl(model.logits(h), ref_logits, temperature=temperature),)

    (kl,) = in_chunks(kl_of, model.config.vocab_size, hidden, ref_hidden)
    return scatter(kl, rollout.response_mask)


def response_values(critic: ValueModel, rollout: Rollout, hidden: Tensor | None = None) -> Tensor:
    """Values (B, R) of the states before the response tokens, 0 under a False mask, with gradient.

    hidden: the critic's `response_hidden`, if the caller has it.
    """
    hidden = response_hidden(critic, rollout) if hidden is None else hidden
    return scatter(critic.read(hidden), rollout.response_mask)


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """Place values (N,) at the N True positions of a mask (B, R), and 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
