"""Diversity of responses, by hand."""

import pytest

from rlhf_core.feedback.diversity import diversity


def test_distinct_n_grams_and_the_similarity_of_groups_by_hand():
    """No n-gram spans two responses; repeats count once in a set, but each time in a share."""
    groups = [[[5, 6, 2], [5, 6, 5, 6, 2]], [[5, 2], [7]]]
    got = diversity(groups)
    # 5 6 2, 5 6 5 6 2, 5 2, 7: 11 tokens, 4 distinct. 56 62, 56 65 56 62, 52: 7 pairs, 4 distinct.
    # Sets {5 6 2 56 62} and {5 6 2 56 65 62}: 5 of 6. {5 2 52} and {7}: 0 of 4.
    assert got == {
        "diversity/distinct_1": 4 / 11,
        "diversity/distinct_2": 4 / 7,
        "diversity/self_similarity": pytest.approx(5 / 12),
    }


def test_the_similarity_is_the_mean_over_all_pairs_of_a_group():
    """1/3, 1 and 1/3 of sets {5 6 56} and {5}."""
    assert diversity([[[5, 6], [5], [5, 6]]])["diversity/self_similarity"] == pytest.approx(5 / 9)
    assert diversity([[[5, 6, 5]] * 4])["diversity/self_similarity"] == 1
    assert diversity([[[5], [6]]])["diversity/self_similarity"] == 0


def test_single_responses_have_no_similarity_and_single_tokens_no_pairs():
    assert diversity([[[5]], [[6]], [[5]]]) == {"diversity/distinct_1": 2 / 3}
