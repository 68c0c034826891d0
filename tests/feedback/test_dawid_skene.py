"""Dawid and Skene's estimates: their own data, simulated annotators, guessers."""

import json
import math

import numpy as np
import pytest

from rlhf_core.feedback.dawid_skene import _chi_squared_95, dawid_skene


def test_the_patients_of_dawid_and_skene_1979(data_dir):
    group = json.loads((data_dir / "feedback" / "expected.json").read_text())["dawid_skene_1979"]
    patients = group["responses{patient:{observer:[labels]}}"]
    rows = [
        (patient, observer, label)
        for patient, observers in patients.items()
        for observer, labels in observers.items()
        for label in labels
    ]
    result = dawid_skene(rows)
    assert result.labels == group["labels"] and len(result.labels) == 45
    assert result.priors == pytest.approx(group["priors_plain_EM"], abs=1e-6)
    assert result.priors == pytest.approx(list(group["priors_crowdkit"].values()), abs=0.005)
    want = np.array(group["confusion_observer_1"])
    assert result.confusion[0] == pytest.approx(want, abs=1e-6)
    assert result.converged and result.guessers == []


def simulated(accuracies, items=400, categories=3, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(categories, size=items)
    rows = [
        (i, name, int(truth[i] if rng.random() < accuracy else rng.integers(categories)))
        for name, accuracy in accuracies.items()
        for i in range(items)
    ]
    return truth.tolist(), rows


def test_the_planted_confusions_priors_and_likelihood_are_found():
    truth, rows = simulated({"ann": 0.95, "ben": 0.4, "cy": 0.4, "di": 0.4})
    result = dawid_skene(rows)
    right = np.mean([a == b for a, b in zip(result.labels, truth)])
    votes = {i: [label for item, _, label in rows if item == i] for i in range(400)}
    majority = np.mean([max(set(v), key=v.count) == truth[i] for i, v in votes.items()])
    assert right > majority + 0.05
    for a, accuracy in enumerate((0.95, 0.4, 0.4, 0.4)):
        want = accuracy * np.eye(3) + (1 - accuracy) / 3
        assert result.confusion[a] == pytest.approx(want, abs=0.12)
    assert result.soft_labels.sum(axis=1) == pytest.approx(1)
    assert result.annotators == ["ann", "ben", "cy", "di"]
    by_hand = 0.0  # the likelihood from the estimates
    for votes_of_item in votes.values():
        chances = result.priors.copy()
        for a, label in enumerate(votes_of_item):
            chances = chances * result.confusion[a, :, label]
        by_hand += math.log(chances.sum())
    assert result.log_likelihood == pytest.approx(by_hand, abs=1e-3)  # before the last step


def test_annotators_who_guess_are_named_and_one_who_errs_in_a_fixed_way_is_not():
    _, rows = simulated({"good": 0.9, "fair": 0.7, "random": 0.0, "other": 0.8})
    rows += [(i, "always 1", 1) for i in range(400)]
    swapped = {0: 2, 1: 1, 2: 0}
    rows += [(i, "swaps", swapped[label]) for i, name, label in rows if name == "good"]
    result = dawid_skene(rows)
    assert result.guessers == ["random", "always 1"]
    share = dict(zip(result.annotators, result.information))
    assert share["always 1"] == pytest.approx(0, abs=1e-12) and share["swaps"] > 0.5


def test_an_annotator_with_few_labels_is_not_judged():
    _, rows = simulated({"good": 0.95, "fair": 0.8, "other": 0.8}, categories=2)
    result = dawid_skene([*rows, (0, "new", 0), (1, "new", 1)])
    assert "new" not in result.guessers


def test_repeated_missing_and_equal_labels():
    result = dawid_skene([("i", "a", 1), ("i", "a", 1), ("i", "b", 0), ("j", "b", None)])
    assert result.items == ["i"] and result.categories == [0, 1] and result.labels == [1]
    by_name = [{"label": 1, "annotator": "a", "item": "i"}, ("i", "b", 0, "further columns")]
    assert dawid_skene(by_name).annotators == ["a", "b"]
    same = dawid_skene([(i, a, "x") for i in range(9) for a in "ab"])
    assert same.soft_labels.tolist() == [[1.0]] * 9 and same.guessers == []
    assert same.log_likelihood == 0 and np.isfinite(same.information).all()


def test_it_reports_when_it_has_not_converged():
    _, rows = simulated({"a": 0.6, "b": 0.5, "c": 0.4})
    short = dawid_skene(rows, max_iterations=2)
    assert not short.converged and short.iterations == 2
    assert dawid_skene(rows).log_likelihood > short.log_likelihood
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        dawid_skene(rows, max_iterations=0)


@pytest.mark.parametrize("rows", [[], [("i", "a", None)]])
def test_no_labels_are_refused(rows):
    with pytest.raises(ValueError, match="there are no labels"):
        dawid_skene(rows)


def test_the_percentile_of_chi_squared():
    """The table's values (one degree is the approximation's worst)."""
    for degrees, want in ((1, 3.841), (4, 9.488), (49, 66.339)):
        assert _chi_squared_95(degrees) == pytest.approx(want, rel=0.03)
    assert _chi_squared_95(0) == 0
