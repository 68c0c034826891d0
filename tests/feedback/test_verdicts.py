"""Verdicts in replies: a failure is never a tie, and log-probs of the verdict's token are read."""

import math

import pytest

from rlhf_core.feedback.verdicts import Reply, find_verdict, probability_of_first

REPLIES = {
    "A": "A",
    "(B)": "B",
    " A.": "A",
    "[[B]]": "B",
    "**A**": "A",
    "Winner: tie": "tie",
    "Tie.": "tie",
    "B is better than A because": "B",
    "Response A wins": "A",
    "(A) It answers the question.": "A",
    "The better answer is (B).": "B",
    "Both are fine. Final verdict: [[A]]": "A",
    '{"winner": "A", "why": "long and tru': "A",
    '```json\n{"verdict": "B"}\n```': "B",
    "INCORRECT": None,
    "": None,
    "null": None,
    '{"winner": null, "why": "answer: A"}': None,
    "I refuse": None,
    "As an AI I cannot choose": None,
    "A better answer would cite a source": None,
    "A and B are alike": None,
    "(A) and (B) are alike": None,
    "Not A": None,
    "[[A]] or [[B]]": None,
    "Winner: A. Winner: B.": None,
    "C": None,
}


@pytest.mark.parametrize("text, verdict", REPLIES.items())
def test_only_a_statement_is_a_verdict(text, verdict):
    found = find_verdict(text)
    assert (found and found[0]) == verdict


def test_the_replies_of_other_tools_faults_are_read_right(expected):
    replies = expected["judge"]["replies"]
    assert len(replies) == 9
    for text, right in replies.items():
        if right == "not CORRECT (taosmd #176)":
            assert find_verdict(text, ("CORRECT", "INCORRECT")) == ("INCORRECT", 0)
            assert find_verdict(text) is None
            continue
        found = find_verdict(text)
        assert (found[0] if found else "failure") == right.split()[0], text


def p(text, *tokens):
    return probability_of_first(Reply(text, tokens))


def test_the_log_probs_of_the_verdicts_token_decide():
    log = math.log
    assert p("A", ("A", {"A": log(0.6), "B": log(0.2)})) == pytest.approx(0.75)
    assert p("(B)", ("(", {}), ("B", {"A": log(0.3), "B": log(0.5)}), (")", {})) == pytest.approx(
        0.375
    )
    article = [
        ("The", {}),
        (" answer", {"A": 0.0}),
        (" is", {}),
        (" B", {" A": log(0.1), " B": -1}),
    ]
    assert p("The answer is B", *article) == pytest.approx(0.1 / (0.1 + math.exp(-1)))
    variants = {"A": log(0.25), " A": log(0.25), "B": log(0.25)}  # of one option
    assert p("A", ("A", variants)) == pytest.approx(2 / 3)


def test_an_option_outside_the_listed_tokens_has_at_most_what_they_leave():
    log = math.log
    assert p("A", ("A", {"A": log(0.9)})) == pytest.approx(0.9)
    assert p("B", ("B", {"B": log(0.5), "x": log(0.1)})) == pytest.approx(0.1 / 0.6)
    assert p("A", ("A", {"x": -1.0, "y": -2.0})) == 1  # not even itself


def test_without_log_probs_a_verdict_is_certain_and_a_tie_is_one_half():
    assert [p(text) for text in ("A", "B", "tie", "?")] == [1, 0, 0.5, None]
    assert p("A", ("A", {"A": 5.0})) == 1  # no log-prob
