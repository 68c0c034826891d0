"""Collation: a target is read at the token before it; a token sees its own sequence only."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.data import Example, Pair, Ranked, collate
from rlhf_core.data.collate import count_targets, left_pad, length


def ids(rng, low, high):
    return [rng.randrange(10) for _ in range(rng.randint(low, high))]


def examples(rng, n=7):
    for i in range(n):
        completion = ids(rng, 1, 6)
        yield Example(
            ids(rng, 0, 6),
            completion,
            [rng.random() < 0.5 for _ in completion] if i % 3 == 0 else None,
        )


def pairs(rng, n=7):
    return [Pair(ids(rng, 0, 6), ids(rng, 1, 6), ids(rng, 1, 6)) for _ in range(n)]


def lists(rng, n=7):
    return [
        Ranked(ids(rng, 0, 6), [ids(rng, 1, 6) for _ in range(rng.randrange(2, 6))])
        for _ in range(n)
    ]


def sequences(rows):
    """Prompt, completion and mask of each sequence of examples, pairs or ranked lists."""
    for row in rows:
        completions = (
            row.completions_ids
            if isinstance(row, Ranked)
            else row[1 : 3 if isinstance(row, Pair) else 2]
        )
        for completion in completions:
            mask = row.completion_mask if isinstance(row, Example) else None
            yield row.prompt_ids, completion, mask or [True] * len(completion)


def seen(batch, index):
    """Ids of the tokens that token `index` of the R * T sees, and their positions."""
    row, column = divmod(index, batch.input_ids.shape[1])
    if batch.visible is None:
        return batch.input_ids[row, : column + 1].tolist(), list(range(column + 1))
    visible = batch.visible[row, column]
    return batch.input_ids[row, visible].tolist(), batch.positions[row, visible].tolist()


@pytest.mark.parametrize("make", [examples, pairs, lists])
@settings(max_examples=50, derandomize=True, deadline=None)
@given(packing=st.none() | st.integers(1, 100), pad_id=st.integers(0, 9), seed=st.integers(0, 999))
def test_a_target_is_read_where_its_own_sequence_up_to_it_is_seen(make, packing, pad_id, seed):
    """Rows 9, 14 and 30: ids that equal the padding count like others; neighbours are unseen."""
    rows = list(make(random.Random(seed)))
    batch = collate(rows, pad_id, packing=packing)
    read, targets = iter(batch.read.tolist()), iter(batch.targets.tolist())
    ends = zip(batch.last.tolist(), batch.lengths.tolist())
    for (prompt, completion, mask), (last, count) in zip(sequences(rows), ends, strict=True):
        whole = prompt + completion
        assert seen(batch, last) == (whole, list(range(len(whole))))
        # Nothing precedes a first token, so that it is not a target.
        counted = [k for k, m in enumerate(mask, len(prompt)) if m and k > 0]
        assert count == len(counted)
        for k in counted:
            assert seen(batch, next(read)) == (whole[:k], list(range(k)))
            assert next(targets) == whole[k]
    assert next(read, None) is None and next(targets, None) is None


@pytest.mark.parametrize("make", [examples, pairs])
def test_packed_rows_hold_every_group_once_within_the_limit_and_little_padding(make):
    rows = list(make(random.Random(0), n=40))
    sizes = [
        len(row.prompt_ids) + sum(map(len, row[1:3] if isinstance(row, Pair) else row[1:2]))
        for row in rows
    ]
    shapes = {
        limit: tuple(collate(rows, 0, packing=limit).input_ids.shape)
        for limit in (None, 1, 20, 100)
    }
    assert shapes[None] == (40, max(sizes)) and 40 * max(sizes) > 1.4 * sum(sizes)
    assert shapes[1][1] == max(sizes) and shapes[20][1] <= 20 and shapes[100][1] <= 2 * max(sizes)
    assert math.prod(shapes[100]) < 1.07 * sum(sizes)


def test_every_token_sees_itself():
    """Also padding: a token that saw nothing would become NaN."""
    batch = collate(list(pairs(random.Random(0))), 0, packing=100)
    assert batch.visible.diagonal(dim1=1, dim2=2).all() and not batch.visible.triu(1).any()


def test_a_row_of_one_sequence_needs_no_mask():
    rows = [Example([5], [6, 2]), Example([5, 7], [2])]
    for packing in (None, 3):  # no two fit into a row
        batch = collate(rows, 0, packing=packing)
        assert batch.visible is None and batch.positions is None
        assert batch.input_ids.tolist() == [[5, 6, 2], [5, 7, 2]]


def test_a_pair_holds_its_prompt_once():
    batch = collate([Pair([5, 6], [7, 2], [8])], 0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 2, 8]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert batch.read.tolist() == [1, 2, 1] and batch.targets.tolist() == [7, 2, 8]


def test_an_example_without_a_target_keeps_its_place():
    batch = collate([Example([], [4]), Example([3], [5, 2], [False, False]), Example([3], [2])], 0)
    assert batch.lengths.tolist() == [0, 0, 1]
    assert batch.targets.tolist() == [2] and batch.targets.dtype == torch.long
    assert collate([Example([], [4])], 0).read.dtype == torch.long


def test_count_targets_and_length_are_those_of_the_collated_example():
    rng = random.Random(0)
    for row in examples(rng, 40):
        batch = collate([row], 0)
        assert count_targets(row) == len(batch.targets) and length(row) == batch.input_ids.shape[1]
    for row in [*pairs(rng), *lists(rng)]:
        assert count_targets(row) == len(collate([row], 0).targets)
        assert length(row) == collate([row], 0).positions.max() + 1


def test_left_pad_ends_every_row_at_the_same_column():
    ids, mask = left_pad([[1, 2, 3], [4], [5, 9]], 9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4], [9, 5, 9]]
    assert mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]
