"""A mixture has the asked shares, repeats no example without need, and depends on its seed only."""

from collections import Counter

import pytest

from rlhf_core.data import mix

A, B, C = ([f"{name}{i}" for i in range(n)] for name, n in (("a", 6), ("b", 20), ("c", 4)))


def test_a_mixture_has_the_shares_of_its_weights_and_the_size_of_all_sources():
    for weights, counts in (
        ((1, 1, 1), [10, 10, 10]),
        ((0.7, 0.2, 0.1), [21, 6, 3]),
        ((2, 3, 2), [9, 13, 8]),  # 8.57, 12.86 and 8.57: the first two lost most to rounding
        ((6, 20, 4), [6, 20, 4]),
    ):
        mixed = Counter(row[0] for row in mix([A, B, C], weights))
        assert [mixed[name] for name in "abc"] == counts


def test_no_example_occurs_twice_unless_its_source_is_too_small():
    times = Counter(mix([A, B, C], [0.5, 0.4, 0.1], seed=3))  # 15, 12 and 3 examples
    assert sorted(times[row] for row in A) == [2, 2, 2, 3, 3, 3]
    assert {times[row] for row in B + C} == {0, 1}
    assert sum(times[row] for row in B) == 12 and sum(times[row] for row in C) == 3


def test_an_equal_seed_gives_equal_examples():
    drawn = [mix([A, B], [1, 1], seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="there are 1 weights for 2 data files"):
        mix([A, B], [1])
    for weights in ([0, 1], [float("nan"), 1], [-1, 1]):
        with pytest.raises(ValueError, match="must be positive numbers, got"):
            mix([A, B], weights)
    with pytest.raises(ValueError, match="data file 2 of 2 has no examples to train on"):
        mix([A, []], [1, 1])
