"""Attention of packed rows on CPU, part by part, so that it costs what its sequences cost.

A part is a run of tokens each of which sees the one before: a sequence, or a completion that
follows others to the same prompt. Its queries meet the keys that they see, such as those of the
prompt and their own, and not the whole row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_core.models.config import TransformerConfig

CALL = 2**20  # multiplications in the time of a part's call
HEAD = 64  # width of a head from which on attention gets no faster
MASK = 2**8  # multiplications in the time of an element of a mask, 7 ns


class Part(NamedTuple):
    """Adjacent tokens of one row, and the tokens that they see."""

    row: int
    queries: slice  # of the row's tokens
    keys: Tensor  # (S,) int64, the row's tokens that any of the queries sees
    chunks: list[int]  # of the keys, in `Parts.sizes`


class Parts(NamedTuple):
    """The parts of packed rows, row after row, and the chunks that their keys consist of."""

    parts: list[Part]
    sizes: list[int]  # tokens of each chunk; together all tokens of all rows

    def biases(self, visible: Tensor, dtype: torch.dtype) -> list[Tensor | None]:
        """Biases (queries, keys) of the scores of each part for a mask (B, T, T) bool.

        None stands for a causal mask.
        """
        masks = [visible[row, queries][:, keys] for row, queries, keys, _ in self.parts]
        return [None if _is_causal(mask) else additive(mask, dtype) for mask in masks]

    def attend(
        self,
        attention: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        biases: list[Tensor | None],
    ) -> Tensor:
        """Return attention (1, H, B T, K) of all rows, one after the other.

        attention: maps q, k, v and the bias of a part to (1, H, queries, K).
        """
        # Chunks are split once and joined, because the gradient of a slice is as long as the rows.
        queries = q.split([part.queries.stop - part.queries.start for part in self.parts], dim=2)
        keys, values = (x.split(self.sizes, dim=2) for x in (k, v))

        def joined(chunks: tuple[Tensor, ...], part: Part) -> Tensor:
            seen = [chunks[i] for i in part.chunks]
            return seen[0] if len(seen) == 1 else torch.cat(seen, dim=2)

        return torch.cat(
            [
                attention(own, joined(keys, part), joined(values, part), bias)
                for part, own, bias in zip(self.parts, queries, biases)
            ],
            dim=2,
        )


def parts_of(visible: Tensor, config: TransformerConfig) -> Parts | None:
    """Return the parts of rows (B, T, T) bool, see `Trunk.forward`.

    None: on GPU, or if attention along whole rows costs less than the parts' calls.
    """
    B, T = visible.shape[:2]
    if config.attention_softcap is not None or torch.compiler.is_compiling() or not visible.is_cpu:
        return None
    alone = F.pad(~visible.diagonal(-1, dim1=1, dim2=2), (1, 0), value=True)  # (B, T)
    starts = alone.flatten().nonzero()[:, 0].tolist()
    pair = config.num_heads * max(config.head_dim, HEAD)
    if B * T * T * pair < CALL * len(starts):
        return None
    parts, edges = [], {B * T}
    for start, end in zip(starts, [*starts[1:], B * T]):
        row, first = divmod(start, T)
        queries = slice(first, first + end - start)
        seen = visible[row, queries].any(dim=0)
        keys = seen.nonzero()[:, 0]
        # Where a run of keys begins or ends: where `seen` changes.
        changes = F.pad(seen, (1, 0))[:-1] ^ seen
        edges |= {row * T + i for i in changes.nonzero()[:, 0].tolist()} | {start}
        parts.append(Part(row, queries, keys, []))
    work = sum((p.queries.stop - p.queries.start) * len(p.keys) for p in parts)
    if (B * T * T - work) * pair < CALL * len(parts):
        return None
    bounds = sorted(edges)
    chunk_of = {start: i for i, start in enumerate(bounds)}
    for part in parts:
        tokens = (part.row * T + part.keys).tolist()
        part.chunks.extend(chunk_of[token] for token in tokens if token in chunk_of)
    return Parts(parts, [end - start for start, end in pairwise(bounds)])


def packing_pays(config: TransformerConfig, shape: tuple[int, int], tokens: int) -> bool:
    """Whether `tokens` tokens in packed rows cost less on CPU than rows of `shape`, (B, T).

    The rows of `shape` are a sequence each. The packed ones lack their padding, and prompts that
    sequences share.
    """
    (B, T), D, heads = shape, config.hidden_size, config.qkv_sizes
    mlp = (3 if config.gated_mlp else 2) * D * config.intermediate_size
    weights = D * (sum(heads) + heads[0]) + mlp  # of a block
    gain = (B * T - tokens) * weights - B * CALL
    # `collate` makes rows of at most two longest groups.
    return gain * config.num_layers > MASK * tokens * min(tokens, 2 * T)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a mask is True, and minus infinity elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -math.inf)


def _is_causal(mask: Tensor) -> bool:
    return mask.shape[0] == mask.shape[1] and torch.equal(mask, torch.ones_like(mask).tril())
