"""Token ids to batches. Only this file shifts completions into targets.

A *group* is a prompt with its completions, which share it: it is stored and computed once. A row
holds one group, or several with packing. Rows are padded on the right, prompts for generation on
the left. Masks come from lengths, never from `ids != pad_id`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, compress
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.data.examples import Example, Pair, Ranked, Steps

GROUPS = (Example, Pair, Ranked, Steps)


class TokenBatch(NamedTuple):
    """R rows of T tokens that hold N sequences with M targets. All integers are int64.

    A sequence is a prompt with one completion; a group lists its best completion first. Targets are
    the completion tokens in the loss, sequence after sequence. Indices count the R * T tokens.

    Attributes:
        input_ids: (R, T).
        positions: (R, T), see `Trunk.forward`. None if every row is one sequence.
        visible: (R, T, T) bool, see `Trunk.forward`. None if every row is one sequence.
        last: (N,) index of the last token of each sequence.
        read: (M,) index of the token before each target, whose hidden state predicts the target.
        targets: (M,) token ids.
        lengths: (N,) number of targets of each sequence.
    """

    input_ids: Tensor
    positions: Tensor | None
    visible: Tensor | None
    last: Tensor
    read: Tensor
    targets: Tensor
    lengths: Tensor


def collate(
    examples: Sequence[Example | Pair | Ranked | Steps], pad_id: int, *, packing: int | None = None
) -> TokenBatch:
    """Return a batch in which a completion sees its prompt, but no other completion.

    Args:
        examples: Examples or solutions, one completion each, or pairs or ranked lists.
        pad_id: Token id of padding; any id works.
        packing: Put groups, which do not see each other, into rows of at most this many tokens, or
            of the longest group's. None means one row for each group.
    """
    groups = [as_group(example) for example in examples]
    sizes = [len(prompt) + sum(map(len, completions)) for prompt, completions, _ in groups]
    rows = [[g] for g in range(len(groups))] if packing is None else _pack(sizes, packing)
    width = max(sum(sizes[g] for g in row) for row in rows)
    ids, positions, segments, stems = [], [], [], []  # of each of the R * T tokens
    sequences: list[list] = [[] for _ in groups]  # of each group: (last, read, targets)
    for r, row in enumerate(rows):
        segment = 0
        for g in row:
            prompt, completions, masks = groups[g]
            # Prompts and completions are segments. A completion also sees its prompt, the stem.
            segment = stem = segment + 1
            ids += prompt
            positions += range(len(prompt))
            segments += [stem] * len(prompt)
            before = len(ids) - 1
            skip = not prompt  # the first token of a row without a prompt is not a target
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
    packed = len(last) > len(rows)

    def in_rows(column: list[int]) -> Tensor:
        return torch.tensor(column).view(len(rows), width)

    return TokenBatch(
        in_rows(ids),
        in_rows(positions) if packed else None,
        _visible(in_rows(segments), in_rows(stems)) if packed else None,
        torch.tensor(last),
        torch.tensor(list(chain.from_iterable(read)), dtype=torch.long),
        torch.tensor(list(chain.from_iterable(targets)), dtype=torch.long),
        torch.tensor(list(map(len, targets))),
    )


def grouped(prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[Ranked]:
    """Return groups of adjacent completions to equal prompts, in their order."""
    groups: list[Ranked] = []
    for prompt, completion in zip(prompts, completions):
        if not groups or groups[-1].prompt_ids != prompt:
            groups.append(Ranked(prompt, []))
        groups[-1].completions_ids.append(completion)
    return groups


def left_pad(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return prompt ids (B, P) padded on the left and their mask (B, P) bool, True = real token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor(list(map(len, prompts)))
    return ids, torch.arange(width) >= width - lengths[:, None]


def length(example: Example | Pair | Ranked | Steps) -> int:
    """Number of positions that a model needs: those of the prompt and its longest completion.

    A teacher's prompt counts if it is longer.
    """
    prompt, completions, _ = as_group(example)
    teacher_prompt = getattr(example, "teacher_prompt_ids", None) or []
    return max(len(prompt), len(teacher_prompt)) + max(map(len, completions))


def as_taught(example: Example) -> Example:
    """The example as its teacher reads it, with the same targets."""
    prompt, mask = example.teacher_prompt_ids, example.completion_mask
    if prompt is None:
        return example
    if not example.prompt_ids and prompt and example.completion_ids:
        # The student cannot predict the first token of a row without a prompt.
        mask = [False, *(mask or [True] * len(example.completion_ids))[1:]]
    return Example(prompt, example.completion_ids, mask)


def count_targets(example: Example | Pair | Ranked | Steps) -> int:
    """Number of tokens in the loss: those of completions that count and that follow a token."""
    prompt, completions, masks = as_group(example)
    counted = (mask or [True] * len(ids) for ids, mask in zip(completions, masks))
    return sum(sum(mask[not prompt :]) for mask in counted)


def misfit(example: Example | Pair | Ranked | Steps) -> str | None:
    """Describe the first inconsistency in an example. None if there is none."""
    _, completions, masks = as_group(example)
    if not completions:
        return "has no completion"
    if len(masks) != len(completions):
        return f"has {len(masks)} masks for {len(completions)} completions"
    for ids, mask in zip(completions, masks):
        if mask is not None and len(mask) != len(ids):
            return f"has a mask of {len(mask)} for {len(ids)} tokens"
    smoothing = getattr(example, "label_smoothing", None)
    if smoothing is not None and not 0 <= smoothing < 0.5:
        return f"has label_smoothing {smoothing!r}, which is not in [0, 0.5)"
    if not isinstance(example, Steps):
        return None
    if len(example.labels) != count_targets(example):
        return f"has {len(example.labels)} labels for {count_targets(example)} steps"
    wrong = (label for label in example.labels if not 0 <= label <= 1)
    return next((f"has label {label!r}, which is not in [0, 1]" for label in wrong), None)


def unknown_id(
    example: Example | Pair | Ranked | Steps | Sequence[int], vocab_size: int
) -> str | None:
    """Describe the first token id, of an example or a prompt, that a model does not have, or None.

    Args:
        vocab_size: Number of ids of the model, from 0 on.
    """
    rows: list = [example]
    if isinstance(example, GROUPS):
        prompt, completions, _ = as_group(example)
        rows = [prompt, *completions, getattr(example, "teacher_prompt_ids", None) or []]
    for ids in rows:
        if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
            bad = next(i for i in ids if not 0 <= i < vocab_size)
            return (
                f"has token id {bad}, but the model has ids 0 to {vocab_size - 1}: the tokenizer "
                "belongs to another model, or needs --embedding-resize"
            )
    return None


def as_group(
    example: Example | Pair | Ranked | Steps,
) -> tuple[list[int], list[list[int]], list[list[bool] | None]]:
    """Return prompt, completions and their masks. A mask of None means that all tokens count."""
    if isinstance(example, Pair):
        return example.prompt_ids, example.completions_ids, example.masks or [None, None]
    if isinstance(example, Ranked):
        return example.prompt_ids, example.completions_ids, [None] * len(example.completions_ids)
    return example.prompt_ids, [example.completion_ids], [example.completion_mask]


def _pack(sizes: list[int], limit: int) -> list[list[int]]:
    """Assign groups to rows of at most `limit` tokens or the longest group. Returns their indices.

    First fit decreasing (Johnson et al. 1974), at capacities of one to two longest groups. The
    result with the fewest R * T tokens wins, or the narrowest one, because attention spans a row.
    """
    capacities = [max(sizes)]
    if max(sizes) < limit:
        capacities += [min(max(sizes) * quarters // 4, limit) for quarters in range(5, 9)]
    packings = [_first_fit_decreasing(sizes, capacity) for capacity in capacities]

    def area(rows: list[list[int]]) -> int:
        return len(rows) * max(sum(sizes[g] for g in row) for row in rows)

    return min(packings, key=area)


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
    """(R, T, T) bool: a token sees itself and earlier tokens of its segment and of its stem."""
    own = segments[:, :, None] == segments[:, None, :]
    return (own | (stems[:, :, None] == segments[:, None, :])).tril_()
