"""Sign tests and intervals against scipy 1.12.0 and statsmodels 0.15.0."""

import math

import pytest

from rlhf_core.significance import sign_test, wilson_interval


@pytest.mark.parametrize(
    "wins, losses, p",
    [
        (60, 40, 0.056887933640980784),
        (10, 0, 0.001953125),
        (30, 55, 0.008836205876094518),
        (371, 417, 0.10886295890472901),
        (1, 1, 1.0),
    ],
)
def test_a_sign_test_is_the_exact_binomial_test(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p, rel=1e-9)


def test_a_sign_test_of_a_million_is_the_normal_distribution():
    z = 2000 / math.sqrt(1e6)
    expected = math.erfc((z - 1 / math.sqrt(1e6)) / math.sqrt(2))
    assert sign_test(501_000, 499_000) == pytest.approx(expected, rel=1e-4)


def test_wilson_intervals_stay_within_0_and_1():
    assert wilson_interval(60, 100) == pytest.approx([0.5020025867910618, 0.6905987135675411])
    assert wilson_interval(10, 10) == pytest.approx([0.7224672001371106, 1.0])
