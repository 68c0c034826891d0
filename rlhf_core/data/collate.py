"""Token ids to batches, and the one place that shifts completions into targets.

A row holds a *group*, a prompt with its completions, or with packing several of them: a prompt is stored, and computed,
once for all that continue it. Rows are padded on the right, prompts for generation on the left; what is real is known
from lengths, never from `ids != pad_id`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, compress
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.data.encode import Example, Pair, Ranked, Steps


class TokenBatch(NamedTuple):
    """R rows of T tokens that hold N sequences (a prompt with one completion; of a group the best one first) with M
    targets, the completion tokens that count, sequence after sequence. `last` and `read` index the R * T tokens."""

    input_ids: Tensor  # (R, T) int64
    positions: (
        Tensor | None
    )  # (R, T) int64 and (R, T, T) bool, see `Trunk.forward`; None: a row is one sequence
    visible: Tensor | None
    last: Tensor  # (N,) the last token of each sequence
    read: Tensor  # (M,) the token before each target, whose hidden state predicts it
    targets: Tensor  # (M,)
    lengths: Tensor  # (N,) how many targets each sequence has


def collate(
    examples: Sequence[Example | Pair | Ranked | Steps], pad_id: int, *, packing: int | None = None
) -> TokenBatch:
    """Batch of examples, or of pairs or ranked lists, whose completions see their prompt but not each other.

    packing: rows of up to so many tokens, or of the longest group's, take up several groups, which see nothing of each
        other; None: a row for each group.
    """
    groups = [as_group(example) for example in examples]
    sizes = [len(prompt) + sum(map(len, completions)) for prompt, completions, _ in groups]
    rows = [[g] for g in range(len(groups))] if packing is None else _pack(sizes, packing)
    width = max(sum(sizes[g] for g in row) for row in rows)
    ids, positions, segments, stems = [], [], [], []  # of R * T tokens
    sequences: list[list] = [[] for _ in groups]  # of each group: last, read, targets
    for r, row in enumerate(rows):
        segment = 0
        for g in row:
            prompt, completions, masks = groups[g]
            segment = stem = (
                segment + 1
            )  # a prompt is a segment, and so is a completion; it also sees its stem
            ids += prompt
            positions += range(len(prompt))
            segments += [stem] * len(prompt)
            before = len(ids) - 1
            skip = not prompt  # a first token that nothing precedes is no target
            for completion, mask in zip(completions, masks):
                segment += 1
                read = [before, *range(len(ids), len(ids) + len(completion) - 1)]
                counts = [True] * len(completion) if mask is None else mask
                ids += completion
                positions += range(len(prompt), len(prompt) + len(completion))
                segments += [segment] * len(completion)
                kept = counts[skip:]
                pick = (list(compress(x[skip:], kept)) for x in (read, completion))
                sequences[g].append((len(ids) - 1 if completion else before, *pick))
            stems += [stem] * sizes[g]
        padding = (r + 1) * width - len(ids)
        for column, filler in ((ids, pad_id), (positions, 0), (segments, 0), (stems, 0)):
            column += [filler] * padding
    last, read, targets = zip(*chain.from_iterable(sequences))
    shape, packed = (len(rows), width), len(last) > len(rows)
    return TokenBatch(
        torch.tensor(ids).view(shape),
        torch.tensor(positions).view(shape) if packed else None,
        _visible(torch.tensor(segments).view(shape), torch.tensor(stems).view(shape))
        if packed
        else None,
        torch.tensor(last),
        torch.tensor(list(chain.from_iterable(read)), dtype=torch.long),
        torch.tensor(list(chain.from_iterable(targets)), dtype=torch.long),
        torch.tensor(list(map(len, targets))),
    )


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """prompt_ids (B, P) with padding on the left and their mask (B, P) bool, True = real token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    return ids, torch.arange(width) >= width - lengths[:, None]


def length(example: Example | Pair | Ranked | Steps) -> int:
    """Tokens of the prompt and its longest completion: how many positions a model needs."""
    prompt, completions, _ = as_group(example)
    return len(prompt) + max(map(len, completions))


def count_targets(example: Example) -> int:
    """Tokens in the loss: those of the completion that count, but for a first token that nothing precedes."""
    counted = example.completion_mask or [True] * len(example.completion_ids)
    return sum(counted[not example.prompt_ids :])


def misfit(example: Example | Pair | Ranked | Steps) -> str | None:
    """What in an example does not fit together, in words."""
    _, completions, masks = as_group(example)
    if not completions:
        return "has no completion"
    if len(masks) != len(completions):
        return f"has {len(masks)} masks for {len(completions)} completions"
    for ids, mask in zip(completions, masks):
        if mask is not None and len(mask) != len(ids):
            return f"has a mask of {len(mask)} for {len(ids)} tokens"
    if not isinstance(example, Steps):
        return None
    if len(example.labels) != count_targets(example):
        return f"has {len(example.labels)} labels for {count_targets(example)} steps"
    wrong = [label for label in example.labels if not 0 <= label <= 1]
    return f"has label {wrong[0]!r}, not in [0, 1]" if wrong else None


def as_group(
    example: Example | Pair | Ranked | Steps,
) -> tuple[list[int], list[list[int]], list[list[bool] | None]]:
    """Prompt, completions and their masks; None: all of its tokens count."""
    if isinstance(example, Pair):
        return example.prompt_ids, example.completions_ids, example.masks or [None, None]
    if isinstance(example, Ranked):
        return example.prompt_ids, example.completions_ids, [None] * len(example.completions_ids)
    return example.prompt_ids, [example.completion_ids], [example.completion_mask]


def _pack(sizes: list[int], limit: int) -> list[list[int]]:
    """Indices of groups, those of a row together, at most `limit` tokens or the longest group in each.

    First fit decreasing (Johnson et al. 1974), for the capacity from one to two longest groups that leaves the fewest
    R * T tokens; the shorter of two, as a token looks along its whole row.
    """
    longest = max(sizes)
    capacities = [
        longest,
        *(min(longest * quarters // 4, limit) for quarters in range(5, 9) if longest < limit),
    ]
    packings = [_first_fit_decreasing(sizes, capacity) for capacity in capacities]
    return min(
        packings, key=lambda rows: len(rows) * max(sum(sizes[g] for g in row) for row in rows)
    )


def _first_fit_decreasing(sizes: list[int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for g in sorted(range(len(sizes)), key=lambda g: -sizes[g]):
        r = next((r for r, left in enumerate(room) if left >= sizes[g]), len(rows))
        if r == len(rows):
            rows.append([])
            room.append(capacity)
        rows[r].append(g)
        room[r] -= sizes[g]
    return rows


def _visible(segments: Tensor, stems: Tensor) -> Tensor:
    """(R, T, T) bool: a token sees those before it and itself, of its own segment and of its stem."""
    own = segments[:, :, None] == segments[:, None, :]
    return (own | (stems[:, :, None] == segments[:, None, :])).tril_()
