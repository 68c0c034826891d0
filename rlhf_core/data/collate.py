"""Token ids to padded batches, and the one place that shifts labels into targets.

Sequences are right-padded, prompts for generation left-padded. Masks come from lengths, never from `ids != pad_id`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.data.readers import Preference, Text
from rlhf_core.data.tokenizer import Tokenizer
from rlhf_core.masking import IGNORE_INDEX


class Example(NamedTuple):
    """A tokenised prompt (BOS included) and completion (EOS included)."""

    prompt_ids: list[int]
    completion_ids: list[int]


class Pair(NamedTuple):
    """A tokenised prompt with the completion that was preferred and the one that was not."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class TokenBatch(NamedTuple):
    """Right-padded sequences: (B, T), or (B, 2, T) for pairs, chosen first.

    targets[..., t] is the token after input_ids[..., t]; target_mask is True where that token belongs to a completion.
    """

    input_ids: Tensor
    attention_mask: Tensor  # bool, True = real token
    targets: Tensor  # IGNORE_INDEX where target_mask is False
    target_mask: Tensor  # bool


def encode_text(text: Text, tokenizer: Tokenizer, max_length: int) -> Example:
    """Tokenise; the completion ends with EOS. See `fit` for what max_length cuts."""
    prompt, (completion,) = _encode(text.prompt, [text.completion], tokenizer, max_length)
    return Example(prompt, completion)


def encode_preference(preference: Preference, tokenizer: Tokenizer, max_length: int) -> Pair:
    """Tokenise; both completions end with EOS. See `fit` for what max_length cuts."""
    texts = [preference.chosen, preference.rejected]
    prompt, (chosen, rejected) = _encode(preference.prompt, texts, tokenizer, max_length)
    return Pair(prompt, chosen, rejected)


def fit(
    prompt: list[int], completions: list[list[int]], max_length: int, bos_id: int | None = None
) -> tuple[list[int], list[list[int]]]:
    """Cut a sequence to max_length tokens: first the prompt, down to half of max_length; then the end of the
    completion, which loses its EOS, for it did not end there."""
    longest = max(map(len, completions))
    prompt = cut_prompt(prompt, max(max_length - longest, max_length // 2), bos_id)
    return prompt, [completion[: max_length - len(prompt)] for completion in completions]


def cut_prompt(prompt: list[int], length: int, bos_id: int | None) -> list[int]:
    """The last `length` tokens of a prompt, whose end matters most; a BOS stays in front."""
    if len(prompt) <= length:
        return prompt
    start = [bos_id] if prompt[0] == bos_id else []
    return start + prompt[len(prompt) - length + len(start) :]


def collate(examples: Sequence[Example], pad_id: int) -> TokenBatch:
    """Batch (B, T) of examples."""
    rows = [(example.prompt_ids, example.completion_ids) for example in examples]
    return _pad(rows, pad_id)


def collate_pairs(pairs: Sequence[Pair], pad_id: int) -> TokenBatch:
    """Batch (B, 2, T) of pairs, [:, 0] chosen and [:, 1] rejected."""
    rows = [(pair.prompt_ids, completion) for pair in pairs for completion in (pair.chosen_ids, pair.rejected_ids)]
    return TokenBatch(*(x.unflatten(0, (-1, 2)) for x in _pad(rows, pad_id)))


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """prompt_ids (B, P) with padding on the left and their mask (B, P) bool, True = real token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, torch.arange(width) >= width - lengths[:, None]


def _encode(prompt: str, completions: list[str], tokenizer: Tokenizer, max_length: int):
    ended = [tokenizer.encode_completion(text) + list(tokenizer.eos_ids[:1]) for text in completions]
    return fit(tokenizer.encode_prompt(prompt), ended, max_length, tokenizer.bos_id)


def _pad(rows: list[tuple[list[int], list[int]]], pad_id: int) -> TokenBatch:
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORE_INDEX)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, start:end] = input_ids[row, start:end]
        attention_mask[row, :end] = True
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]  # the shift: a token is the target of the position before it
    return TokenBatch(input_ids, attention_mask, targets, targets != IGNORE_INDEX)
