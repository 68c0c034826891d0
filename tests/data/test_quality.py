"""Length bias: correlation over all completions, accuracy where the shorter one is better."""

import pytest
import torch

from rlhf_core.data import Pair, Ranked
from rlhf_core.data.quality import length_bias

SHORTER_LOSES = Pair([7], [5, 5, 2], [6, 2])
SHORTER_WINS = Pair([7], [5, 2], [6, 6, 6, 2])
EQUAL = Pair([7], [5, 2], [6, 2])


def test_a_score_that_is_the_length_has_correlation_1_and_is_wrong_on_shorter_winners():
    pairs = [SHORTER_LOSES, SHORTER_WINS, EQUAL]
    found = length_bias(pairs, torch.tensor([3.0, 2, 2, 4, 2, 2]))
    assert found == {"length_correlation": pytest.approx(1), "accuracy_where_shorter_won": 0}
    found = length_bias(pairs, -torch.tensor([3.0, 2, 2, 4, 2, 2]))
    assert found == {"length_correlation": pytest.approx(-1), "accuracy_where_shorter_won": 1}


def test_accuracy_counts_only_pairs_whose_better_completion_is_shorter():
    scores = torch.tensor([0.0, 9, 1, 0])  # the longer one of the first pair is better: no matter
    assert length_bias([SHORTER_LOSES, SHORTER_WINS], scores)["accuracy_where_shorter_won"] == 1
    halved = torch.tensor([1.0, 0, 0, 1])
    assert length_bias([SHORTER_WINS, SHORTER_WINS], halved)["accuracy_where_shorter_won"] == 0.5


def test_a_ranked_list_gives_all_its_pairs():
    """Best first, of lengths 2, 3 and 1: the first is shorter than the second only."""
    ranked = [Ranked([7], [[5, 2], [6, 6, 2], [2]])]
    assert length_bias(ranked, torch.tensor([2.0, 3, 1]))["accuracy_where_shorter_won"] == 0
    assert length_bias(ranked, torch.tensor([3.0, 2, 9]))["accuracy_where_shorter_won"] == 1


def test_undefined_values_are_left_out():
    assert length_bias([EQUAL], torch.tensor([0.0, 1])) == {}  # all lengths are equal
    assert length_bias([SHORTER_LOSES], torch.tensor([1.0, 1])) == {}  # all scores are equal
