"""Slices of batches: every row once and in order, fields without a tensor left alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_core.data.batches import micro_batches, rows, to_device


class Batch(NamedTuple):
    first: Tensor
    second: Tensor | None
    third: Tensor


def batch(n=5):
    return Batch(torch.arange(n), None, torch.arange(2 * n).view(n, 2))


def test_rows_index_every_tensor_and_keep_the_type():
    got = rows(batch(), torch.tensor([3, 0]))
    assert isinstance(got, Batch) and got.second is None
    assert got.first.tolist() == [3, 0] and got.third.tolist() == [[6, 7], [0, 1]]
    assert rows(batch(), slice(1, 3)).first.tolist() == [1, 2]


def test_micro_batches_hold_every_row_once_side_by_side():
    weights = torch.arange(5) * 10
    for size, lengths in ((2, [2, 2, 1]), (5, [5]), (9, [5]), (1, [1] * 5), (None, [5])):
        parts = list(micro_batches(size, batch(), weights))
        assert [len(part) for _, part in parts] == lengths
        assert torch.equal(torch.cat([part.third for part, _ in parts]), batch().third)
        assert torch.equal(torch.cat([part for _, part in parts]), weights)
        assert all(torch.equal(part.first * 10, weight) for part, weight in parts)
    assert [len(part) for (part,) in micro_batches(3, weights)] == [3, 2]


def test_to_device_moves_every_tensor():
    moved = to_device(batch(), torch.device("meta"))
    assert isinstance(moved, Batch) and moved.second is None
    assert moved.first.device.type == moved.third.device.type == "meta"
