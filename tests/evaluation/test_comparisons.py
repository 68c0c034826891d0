"""Win rates with errors, tests, sample sizes and length control."""

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.evaluation import comparisons
from rlhf_core.evaluation.comparisons import (
    bootstrap,
    clustered_error,
    compare,
    comparisons_needed,
    flip_rate,
    length_controlled_win_rate,
)
from rlhf_core.significance import sign_test, wilson_interval


def close(got, want, tolerance=1e-6):
    assert_close(
        torch.tensor(got, dtype=torch.float64),
        torch.tensor(want, dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
    )


def test_win_rates_agree_with_statsmodels(expected):
    for case in expected["win_rate"]["cases"]:
        wins, losses, ties = (case[name] for name in ("wins", "losses", "ties"))
        found = compare([1.0] * wins + [0.0] * losses + [0.5] * ties)
        assert (found.wins, found.losses, found.ties) == (wins, losses, ties)
        close(found.rate, case["win_rate_ties_half"])
        close(found.standard_error, case["standard_error"])
        if not wins + losses:
            assert found.sign_test is None and found.interval[0] < 0.5 < found.interval[1]
            continue
        close(found.sign_test, case["sign_test_p"])
        decided = wins + losses
        close(wilson_interval(wins, decided), case["wilson95_without_ties"])
        if not ties:
            close(found.interval, case["wilson95_without_ties"])


def against_llama(pandalm, labels):
    """(item, instruction, outcome of llama-7b, its characters, the other's), by the labels."""
    for row in pandalm:
        players = row["models"].split("_")
        if "llama-7b" in players:
            me = players.index("llama-7b") + 1
            lengths = [len(str(row[f"response{i}"])) for i in (me, 3 - me)]
            for label in labels(row):
                outcome = 0.5 if label == 0 else float(label == me)
                yield row["id"], row["instruction"], outcome, *lengths


def test_errors_clustered_by_prompt_agree_with_statsmodels(expected, pandalm):
    """Three labels of one item, and items of one instruction, are no independent votes."""
    want = expected["win_rate_clustered"]
    items, instructions, outcomes, *_ = zip(*against_llama(pandalm, lambda row: row["labels"]))
    sizes = len(outcomes), len(set(items)), len(set(instructions))
    assert sizes == (want["n_labels"], want["items"], want["instructions"])
    close(clustered_error(outcomes, None), want["se_naive"])
    by_item = want["se_clustered_by_item(with/without small-sample correction)"]
    for clusters, both in ((items, by_item), (instructions, want["se_clustered_by_instruction"])):
        close([clustered_error(outcomes, clusters, small) for small in (True, False)], both)
    found = compare(outcomes, instructions)
    close(found.rate, want["win_rate"])
    close(found.standard_error / want["se_naive"], 30.126885072369783 / 12.135910451845294)
    low, high = found.interval
    assert 0.05 < (high - low) / 2 < 0.07 and found.effective < len(outcomes) / 5


def test_values_of_one_cluster_have_no_error():
    with pytest.raises(ValueError, match=r"at least two clusters \(prompts\), got 1"):
        clustered_error([1.0, 0.0], ["a", "a"])
    found = compare([1.0, 0.0, 1.0], ["a", "a", "a"])
    assert found.standard_error is None and found.effective == 1


def test_mcnemars_exact_test_counts_what_one_model_alone_solved(expected):
    group = expected["mcnemar_paired_accuracy"]
    _, only_first, only_second, _ = group["table(both right, only A, only B, none)"]
    close(sign_test(only_first, only_second), group["exact_p"])
    close(sign_test(only_second, only_first), group["exact_p"])


def test_comparisons_needed_agree_with_the_normal_approximation(expected):
    for case in expected["how_many_comparisons"]:
        rate = case["true_win_rate"]
        assert comparisons_needed(rate, case["power"], case["alpha"]) == case["n"]
        assert comparisons_needed(1 - rate) == case["n"]
    assert comparisons_needed(0.55, power=0.9) > 783 > comparisons_needed(0.55, alpha=0.1)
    with pytest.raises(ValueError, match="no number of comparisons"):
        comparisons_needed(0.5)


def test_length_control_agrees_with_statsmodels(expected, pandalm):
    want = expected["length_controlled_win_rate"]
    rows = list(against_llama(pandalm, lambda row: [row["majority"]]))
    _, instructions, outcomes, mine, theirs = zip(*rows)
    found = length_controlled_win_rate(outcomes, mine, theirs)
    assert len(rows) == want["n"]
    close(compare(outcomes).rate, want["win_rate"])
    close(found.rate, want["length_controlled_win_rate"])
    close([found.intercept, found.slope], want["intercept_and_length_coef"])
    assert found.slope_p == pytest.approx(want["length_coef_p"], rel=1e-6)
    close(sum(mine) / len(rows) - sum(theirs) / len(rows), want["mean_length_difference"])
    close(found.interval, want["bootstrap_ci95"], tolerance=0.01)
    alpaca = want["alpaca_eval_functions"]  # regularised
    close(found.rate, alpaca["alpaca_C100"], tolerance=1e-4)
    close(found.rate, alpaca["alpaca_cv5"], tolerance=2e-3)
    clustered = length_controlled_win_rate(outcomes, mine, theirs, instructions)
    assert clustered.rate == found.rate and clustered.slope_p > found.slope_p
    assert clustered.interval[0] < found.interval[0] < found.interval[1] < clustered.interval[1]


@pytest.mark.parametrize(
    "outcomes, lengths, message",
    [
        ([1, 1, 1, 1], [4, 1, 2, 3], "no finite coefficients"),
        ([1, 0, 1, 0], [9, 1, 8, 2], "no finite coefficients"),
        ([1, 0, 1, 0], [4, 4, 4, 4], "do not vary"),
        ([1, 0, 2, 0], [4, 4, 4, 4], r"outcome 2 is 2.0; it must be in \[0, 1\]"),
    ],
)
def test_length_control_refuses_what_has_no_answer(outcomes, lengths, message):
    with pytest.raises(ValueError, match=message):
        length_controlled_win_rate(outcomes, lengths, [3, 3, 3, 3])


def test_the_bootstrap_finds_the_error_of_a_mean_also_in_blocks(monkeypatch):
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    mean = lambda weights: weights @ values / len(values)  # noqa: E731
    for block in (2**24, 10_000):
        monkeypatch.setattr(comparisons, "_BLOCK", block)
        samples = bootstrap(mean, 200, 4000, seed=0)
        assert samples.shape == (4000,) and len(samples.unique()) == 4000
        assert samples.std().item() == pytest.approx(clustered_error(values, None), rel=0.05)


def test_flips_count_only_answers_that_were_right():
    right, after = [True] * 8 + [False] * 2, [True] * 6 + [False] * 2 + [True, False]
    found = flip_rate(right, after)
    assert (found.flipped, found.corrected) == (0.25, 0.5)
    assert found.flipped_interval == wilson_interval(2, 8)
    assert flip_rate([False], [True]) == (None, None, 1.0)


def test_shares_and_levels_out_of_range_are_refused():
    for wrong in ((3, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="successes in"):
            wilson_interval(*wrong)
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        comparisons_needed(0.6, power=1)
