"""From samples to what a comparison shows."""

import math

import pytest
import torch

from rlhf_core.data import Sample
from rlhf_core.evaluation.comparisons import compare, comparisons_needed
from rlhf_core.evaluation.summary import by_score, summarize

SCORES = {"sft": [0, 1, 2, 3, 4, 5], "new": [1, 2, 2, 4, 3, 6], "bad": [0, 0, 0, 0, 0, 0]}
SAMPLES = [
    Sample(policy, f"prompt {i // 2}", "x" * (i + len(policy)), float(score), tokens=i)
    for policy, scores in SCORES.items()
    for i, score in enumerate(scores)
]


def test_every_two_policies_are_compared_clustered_by_prompt():
    found = summarize(SAMPLES, "sft", by_score)
    order = [(row["policy"], row["against"]) for row in found["comparisons"]]
    assert order == [("new", "sft"), ("bad", "sft"), ("bad", "new")]
    row = found["comparisons"][0]
    want = compare([1, 1, 0.5, 1, 0, 1], [0, 0, 1, 1, 2, 2])
    assert {name: row[name] for name in want._fields} == want._asdict()
    assert (row["comparisons"], row["prompts"], row["failures"]) == (6, 3, 0)
    needed = math.ceil(comparisons_needed(want.rate) * 6 / want.effective) - 6
    assert not row["decided"] and row["more_comparisons"] == max(1, needed)
    lost = found["comparisons"][2]  # all of them, but three prompts are few
    assert (lost["rate"], lost["decided"], lost["more_comparisons"]) == (0, False, 2)
    sft, new, bad = (policy["elo"]["rating"] for policy in found["policies"])
    assert sft == 0 and new > 0 > bad
    assert found["policies"][0]["tokens"]["mean"] == 2.5 and found["policies"][0]["kl"] is None


def test_the_order_of_rows_and_the_reference_change_no_comparison():
    found = summarize(SAMPLES, "sft", by_score)
    again = summarize(sorted(SAMPLES, key=lambda x: x.policy), "new", by_score)
    rates = {(x["policy"], x["against"]): x["rate"] for x in found["comparisons"]}
    for row in again["comparisons"]:
        ends = row["policy"], row["against"]
        assert row["rate"] == pytest.approx(rates.get(ends, 1 - rates.get(ends[::-1], 0)))
    ratings = [{x["name"]: x["elo"]["rating"] for x in y["policies"]} for y in (found, again)]
    gaps = [x["new"] - x["bad"] for x in ratings]
    assert gaps[0] == pytest.approx(gaps[1])


def test_failed_judgements_are_left_out_and_counted():
    def outcomes(first, second, pairs):
        found = by_score(first, second, pairs)
        found[:2] = math.nan
        return found

    row = summarize(SAMPLES[:12], "sft", outcomes)["comparisons"][0]
    assert (row["failures"], row["comparisons"], row["rate"]) == (2, 4, 0.625)
    failed = lambda first, second, pairs: torch.full((len(pairs),), math.nan)  # noqa: E731
    with pytest.raises(ValueError, match="every judgement of new against sft failed"):
        summarize(SAMPLES[:12], "sft", failed)


def test_only_prompts_that_both_answered_are_compared():
    fewer = [sample for sample in SAMPLES[:12] if (sample.policy, sample.tokens) != ("new", 1)]
    row = summarize(fewer, "sft", by_score)["comparisons"][0]
    assert (row["comparisons"], row["prompts"]) == (5, 3)


def test_the_frontier_is_that_of_safe_and_unsafe_prompts():
    def answers(policy, safe, unsafe):
        return [
            Sample(
                policy, f"{label} {i}", "I can't help with that." if refuses else "Sure."
            )._replace(label=label)
            for label, refusals in (("safe", safe), ("unsafe", unsafe))
            for i, refuses in enumerate(refusals)
        ]

    samples = answers("a", [0, 0, 0, 1], [1, 1, 1, 0]) + answers("b", [0, 0, 1, 1], [1, 1, 0, 0])
    found = summarize(samples, "a", None)
    points = found["frontier"]["points"]
    assert [(x["harmlessness"], x["helpfulness"]) for x in points] == [(0.75, 0.75), (0.5, 0.5)]
    assert [x["on_frontier"] for x in points] == [True, False]
    assert found["frontier"]["hypervolume"] == pytest.approx(0.5625)
    assert summarize(SAMPLES, "sft", None)["frontier"] is None
