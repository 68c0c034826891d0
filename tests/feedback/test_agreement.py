"""Agreement coefficients against published tables and independent libraries, and the report."""

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest

from rlhf_core.data.formats import read_rows
from rlhf_core.feedback.agreement import (
    LEVELS,
    Ratings,
    agreement_report,
    cohen_kappa,
    fleiss_kappa,
    from_counts,
    gwet_ac1,
    interval,
    kendall_w,
    krippendorff_alpha,
    percent_agreement,
    scott_pi,
    threshold_label,
    verdict,
)

COEFFICIENTS = (
    percent_agreement, cohen_kappa, scott_pi, fleiss_kappa, krippendorff_alpha, gwet_ac1, kendall_w
)  # fmt: skip
TEXTBOOK = [[1, 1, 0, 1, 0], [1, 1, 1, 1, 0]]
_ = None
KRIPPENDORFF_2011 = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]
FLEISS_1971 = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def close(value, **precision):
    return pytest.approx(value, **(precision or dict(abs=1e-6)))


@pytest.fixture(scope="module")
def expected(data_dir):
    return json.loads((data_dir / "feedback" / "expected.json").read_text())


@pytest.fixture(scope="module")
def pandalm(data_dir):
    file = data_dir / "labels" / "pandalm_3annotators.jsonl.gz"
    return list(zip(*(row["labels"] for _, row in read_rows(file, 2**24))))


# ---- published values


def test_the_textbook_example():
    assert cohen_kappa(TEXTBOOK) == close(0.5454545454545454)
    assert scott_pi(TEXTBOOK) == close(0.523809523809524)
    assert krippendorff_alpha(TEXTBOOK) == close(0.5714285714285714)
    assert percent_agreement(TEXTBOOK) == close(0.8)
    report = agreement_report(TEXTBOOK)
    assert (report["label"], report["verdict"]) == ("review", "undecided")
    assert [row["item"] for row in report["confusing_items"]] == [2]
    assert report["confusing_items"][0]["entropy"] == close(1)  # bits


def test_krippendorffs_table_with_missing_labels():
    want = [0.743421052631579, 0.8153875037548814, 0.8491071428571428, 0.7974027747116121]
    for level, value in zip(LEVELS, want, strict=True):
        assert krippendorff_alpha(KRIPPENDORFF_2011, level=level) == close(value), level
    assert fleiss_kappa(KRIPPENDORFF_2011) == close(0.76117, abs=5e-6)  # irrCAC, five digits
    assert gwet_ac1(KRIPPENDORFF_2011) == close(0.77544, abs=5e-6)


def test_fleiss_table_from_its_counts():
    ratings = from_counts(FLEISS_1971)
    assert len(ratings) == 14 and {len(labels) for labels in ratings} == {10}
    assert fleiss_kappa(ratings) == close(0.20993070442195522)
    assert scott_pi(ratings) == fleiss_kappa(ratings)  # nothing is missing


@pytest.mark.parametrize(
    "table, kappa, ac1, pi",
    [
        ([[40, 9], [6, 45]], 0.6995192307692307, 0.70075, 0.6992481203007519),
        ([[80, 10], [5, 5]], 0.318181818181818, 0.808, 0.31428571428571417),
        ([[45, 15], [25, 15]], 0.13043478260869554, 0.26606, 0.12087912087912075),
        ([[25, 35], [5, 35]], 0.25925925925925924, 0.20792, 0.19191919191919188),
    ],
)
def test_tables_on_which_kappa_and_ac1_differ(table, kappa, ac1, pi):
    ratings = from_counts(table)
    assert cohen_kappa(ratings) == close(kappa)
    assert scott_pi(ratings) == close(pi)
    assert gwet_ac1(ratings) == close(ac1, abs=5e-6)


def test_rankings_with_and_without_ties():
    assert kendall_w([[1, 2, 3, 4, 5], [2, 1, 3, 5, 4], [1, 3, 2, 4, 5], [1, 2, 4, 3, 5]]) == close(
        0.8125
    )
    assert kendall_w([[1, 2, 2, 4], [1, 1, 3, 4], [2, 1, 3, 3]]) == close(0.8271604938271608)
    assert kendall_w([[1, 2, 3, None], [10, 20, 30, 5]]) == 1  # the item that one did not rank
    assert kendall_w([[1, 2, 3], [3, 2, 1]]) == 0


def test_weighted_kappas_of_likert_labels(expected):
    group = expected["likert8_weighted_kappa"]
    ratings = group["ratings"]
    assert cohen_kappa(ratings) == close(group["unweighted"])
    for weights in ("linear", "quadratic"):
        assert cohen_kappa(ratings, weights=weights) == close(group[weights])
    for level in ("ordinal", "interval"):
        assert krippendorff_alpha(ratings, level=level) == close(group[f"alpha_{level}"])


def test_the_real_labels_of_three_annotators(expected, pandalm):
    group = expected["pandalm"]
    for pair, value in group["cohen"].items():
        two = [pandalm[int(i) - 1] for i in pair.split("-")]
        assert cohen_kappa(two) == close(value)
        assert percent_agreement(two) == close(group["agreement"][pair])
    assert fleiss_kappa(pandalm) == close(group["fleiss"])
    assert krippendorff_alpha(pandalm) == close(group["krippendorff_nominal"])
    multi = group["nltk_multi_pi(avg pairwise S/pi/kappa)"]
    assert scott_pi(pandalm) == close(multi["pi"])
    assert cohen_kappa(pandalm) == close(multi["kappa"])
    ac1 = group["irrCAC"]["gwet_ac1"]["coefficient_value"]
    assert gwet_ac1(pandalm) == close(ac1, abs=5e-6)
    low, high, undefined = interval(krippendorff_alpha, pandalm, resamples=500)
    want, tolerance = group["alpha_bootstrap_ci95_over_items_2000"], group["tolerance_ci"]
    assert [low, high] == close(want, abs=tolerance) and undefined == 0
    report = agreement_report(pandalm, resamples=50)
    assert report["split_items"] == group["split_items"]
    assert report["unanimous_items"] == group["unanimous"]
    assert report["label"] == report["verdict"] == "golden"


# ---- undefined, missing, skewed


def test_labels_that_are_all_equal_have_no_coefficient_but_full_agreement():
    same = [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert percent_agreement(same) == 1
    assert [f(same) for f in COEFFICIENTS[1:]] == [None] * 6
    assert gwet_ac1(same, categories=[0, 1]) == 1
    report = agreement_report(same, resamples=20)
    kappa = report["coefficients"]["cohen_kappa"]
    assert kappa["value"] is kappa["low"] is None and kappa["undefined_resamples"] == 20
    assert "all equal" in kappa["reason"]
    assert (report["label"], report["verdict"]) == (None, "undecided")
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    "ratings, reason",
    [
        ([[1, 2, 1]], "one annotator"),
        ([[1, 2, None], [None, None, 1]], "no item has labels of two annotators"),
    ],
)
def test_without_overlap_nothing_is_defined_and_the_report_says_why(ratings, reason):
    assert [f(ratings) for f in COEFFICIENTS] == [None] * 7
    report = agreement_report(ratings, level="ordinal", times=ratings, resamples=10)
    assert report["drift"] == [] and report["verdict"] == "undecided"
    assert all(reason in entry["reason"] for entry in report["coefficients"].values())
    json.dumps(report, allow_nan=False)


def test_a_missing_label_is_never_a_category():
    ratings = [[1, 1, 2], [1, 1, None], [None, 1, 2]]
    assert krippendorff_alpha(ratings) == 1
    assert krippendorff_alpha([[1, 1, 2], [1, 1, math.nan], [math.nan, 1, 2]]) == 1
    assert krippendorff_alpha(np.array([[1, 1, 2], [1, 1, np.nan], [np.nan, 1, 2]])) == 1
    assert krippendorff_alpha([[0, 1], [1, 0]]) == -0.5


def test_one_disagreement_in_skewed_labels():
    ratings = [
        [3, 3, 3, 3, 3], [3, 3, 3, 3, 3], [3, 3, None, None, 3], [3, 3, 3, 3, 1],
        [3, None, 3, 3, 3],
    ]  # fmt: skip
    assert krippendorff_alpha(ratings) == close(0)
    assert fleiss_kappa(ratings) == close(-0.04167, abs=5e-6)
    assert gwet_ac1(ratings) == close(0.91334, abs=5e-6)


def test_the_report_warns_where_skewed_labels_mislead_kappa():
    report = agreement_report(from_counts([[80, 10], [5, 5]]), resamples=50)
    assert report["label"] == "rewrite"
    assert report["coefficients"]["gwet_ac1"]["value"] == close(0.808)
    (warning,) = report["warnings"]
    assert "88% are 0. So cohen_kappa is 0.318 and gwet_ac1 0.808" in warning
    balanced = agreement_report(from_counts([[40, 9], [6, 45]]), resamples=50)
    assert balanced["warnings"] == []


# ---- from the definitions


def table_of(seed=0, annotators=4, items=30, labels=4):
    rng = np.random.default_rng(seed)
    table = rng.integers(labels, size=(annotators, items)).tolist()
    return [[None if rng.random() < 0.3 else x for x in row] for row in table]


@pytest.mark.parametrize("level", LEVELS)
def test_alpha_is_its_definition_by_pairs_of_labels(level):
    ratings = table_of()
    units = [[x for x in unit if x is not None] for unit in zip(*ratings)]
    units = [unit for unit in units if len(unit) > 1]
    pool = [x for unit in units for x in unit]

    def distance(a, b):
        if level == "nominal":
            return Fraction(a != b)
        if level == "interval":
            return Fraction((a - b) ** 2)
        if level == "ratio":
            return Fraction(a - b, a + b) ** 2 if a + b else Fraction(0)
        low, high = min(a, b), max(a, b)
        between = sum(low <= x <= high for x in pool)
        return (between - Fraction(pool.count(a) + pool.count(b), 2)) ** 2

    observed = sum(
        sum(distance(a, b) for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1)
        for unit in units
    ) / len(pool)
    pairs = len(pool) * (len(pool) - 1)
    expected = sum(distance(a, b) for a, b in itertools.permutations(pool, 2)) / pairs
    want = 1 - observed / expected
    assert krippendorff_alpha(ratings, level=level) == close(float(want), abs=1e-12)


def test_cohens_kappa_of_many_is_the_mean_over_pairs_on_their_common_items():
    ratings = table_of()
    pairs = list(itertools.combinations(ratings, 2))
    for weights in (None, "linear", "quadratic"):
        want = np.mean([cohen_kappa(pair, weights) for pair in pairs])
        assert cohen_kappa(ratings, weights) == close(want, abs=1e-12)
    report = agreement_report(ratings, resamples=5)
    kappas = [pair["cohen_kappa"]["value"] for pair in report["pairs"]]
    assert kappas == close([cohen_kappa(pair) for pair in pairs], abs=1e-12)
    both = sum(a is not None and b is not None for a, b in zip(ratings[1], ratings[3]))
    assert report["pairs"][4]["annotators"] == [1, 3] and report["pairs"][4]["items"] == both


def test_nothing_depends_on_the_order_or_the_names_of_the_labels():
    ratings, rng = table_of(), np.random.default_rng(1)
    names = {None: None, 0: ("x", 1), 1: "b", 2: 7.5, 3: False}
    order = rng.permutation(30)
    renamed = [[names[row[i]] for i in order] for row in ratings]
    for coefficient in COEFFICIENTS[:-1]:
        assert coefficient(renamed) == close(coefficient(ratings), abs=1e-12)
        assert coefficient(ratings[::-1]) == close(coefficient(ratings), abs=1e-12)
    json.dumps(agreement_report(renamed, resamples=5), allow_nan=False)


def test_each_annotator_is_compared_with_the_majority_of_the_others():
    ratings = [
        ["a", "a", "b", "a"],
        ["a", "b", "b", "a"],
        ["a", "b", "a", None],
        ["b", "b", "a", _],
    ]
    # The others' majority for the first annotator: a, b, a, a; for the last: a, b, b, a.
    report = agreement_report(ratings, annotators=["w", "x", "y", "z"], resamples=5)
    rows = {row["annotator"]: row for row in report["annotators"]}
    assert rows["w"] == dict(annotator="w", labels=4, compared=4, with_majority=0.5)
    assert rows["z"] == dict(
        annotator="z", labels=3, compared=3, with_majority=pytest.approx(1 / 3)
    )
    tied = agreement_report([["a", "a"], ["b", "a"], ["a", "a"]], resamples=5)["annotators"]
    assert [row["compared"] for row in tied] == [1, 2, 1]


# ---- intervals


def test_the_interval_resamples_items():
    """The bootstrap's spread of a mean is known: here of the share of items that agree."""
    ratings = [[0] * 400, [0] * 300 + [1] * 100]
    low, high, undefined = interval(percent_agreement, ratings, resamples=2000, seed=3)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert [low, high] == close([0.75 - half, 0.75 + half], abs=0.006) and undefined == 0
    narrow = interval(percent_agreement, ratings, confidence=0.5, seed=3)
    assert low < narrow.low < narrow.high < high


def test_equal_seeds_give_equal_intervals():
    kappas = [interval(cohen_kappa, TEXTBOOK, seed=seed, resamples=50) for seed in (1, 1, 2)]
    assert kappas[0] == kappas[1] and kappas[1] != kappas[2]
    linear = interval(cohen_kappa, [[1, 2, 3, 1], [1, 2, 2, 3]], weights="linear", resamples=50)
    assert linear != interval(cohen_kappa, [[1, 2, 3, 1], [1, 2, 2, 3]], resamples=50)


def test_resamples_without_a_value_are_counted():
    low, high, undefined = interval(cohen_kappa, [[0, 0, 1], [0, 0, 1]], resamples=2000)
    assert (low, high) == (1, 1)
    chance = (2 / 3) ** 3 + (1 / 3) ** 3  # that all three draws have one label
    assert undefined / 2000 == close(chance, abs=0.04)


# ---- thresholds, drift


def test_thresholds_are_exclusive_and_an_interval_over_one_is_undecided():
    kappas = [0.81, 0.8, 0.61, 0.6, 0.41, 0.4, -1]
    labels = ["golden", "train", "train", "review", "review", "rewrite", "rewrite"]
    assert list(map(threshold_label, kappas)) == labels
    assert verdict(0.7, 0.61, 0.8) == "train"
    assert verdict(0.7, 0.6, 0.8) == verdict(0.7, 0.61, 0.81) == "undecided"
    assert verdict(None, None, None) == "undecided"
    assert verdict(1, 1, 1, undefined=0.05) == "golden"
    assert verdict(1, 1, 1, undefined=0.06) == "undecided"
    report = agreement_report([[0, 0, 1], [0, 0, 1]], resamples=100)  # three items prove little
    assert (report["label"], report["verdict"]) == ("golden", "undecided")


def test_labels_that_differ_only_by_type_give_a_warning():
    report = agreement_report([[1, "1", 2, 2], ["1", 1, 2, 2]], resamples=5)
    assert "some labels differ only by their type, such as 1 and '1'" in report["warnings"]


def test_drift_is_found_by_the_time_of_the_last_label():
    rng = np.random.default_rng(0)
    first = rng.integers(2, size=200).tolist()
    second = first[:100] + rng.integers(2, size=100).tolist()  # from item 100 on a guess
    order = rng.permutation(200)
    ratings = [[labels[i] for i in order] for labels in (first, second)]
    times = [[float(i) for i in order], [1000 + float(i) for i in order]]
    report = agreement_report(ratings, times=times, resamples=100)
    assert [block["items"] for block in report["drift"]] == [20] * 10
    assert [block["value"] for block in report["drift"][:5]] == [1] * 5
    assert report["drift"][0]["from"] == 1000 and report["drift"][-1]["to"] == 1199
    assert any("drifts from 1.000" in warning for warning in report["warnings"])
    same = [[0] * 199 + [1]] * 2  # hardly any block has a coefficient
    assert agreement_report(same, times=times, resamples=5)["warnings"] == []
    steady = agreement_report([first, first], times=times, resamples=20)
    assert steady["warnings"] == []


# ---- refused


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: cohen_kappa([[1, 2], [1]]), "annotator 0 has 2 labels and annotator 1 has 1"),
        (lambda: cohen_kappa([1, 2]), "a list of labels for each annotator, got 1"),
        (lambda: cohen_kappa(["ab", "ba"]), "a list of labels for each annotator, got 'ab'"),
        (lambda: cohen_kappa([]), "no labels to compare"),
        (lambda: cohen_kappa([[None], [None]]), "no labels to compare"),
        (lambda: cohen_kappa([[[1]], [[1]]]), "a label must be text or a number"),
        (lambda: cohen_kappa(TEXTBOOK, weights="cubic"), "must be None, linear or quadratic"),
        (lambda: cohen_kappa([["a"], ["b"]], "linear"), "needs labels that are numbers, got 'a'"),
        (
            lambda: krippendorff_alpha(TEXTBOOK, level="log"),
            "level must be one of nominal, ordinal",
        ),
        (lambda: krippendorff_alpha([["a"], ["b"]], "ordinal"), "'ordinal' needs labels that are"),
        (lambda: krippendorff_alpha([[-1], [2]], "ratio"), "needs labels of at least 0, got -1"),
        (lambda: kendall_w([["a"], ["b"]]), "kendall_w needs labels that are numbers"),
        (lambda: gwet_ac1(TEXTBOOK, categories=[1, 2]), "label 0 is not one of the categories"),
        (lambda: from_counts([[1, -1]]), "whole numbers of at least 0"),
        (lambda: from_counts([[1, 2, 3]], two_annotators=True), "must be square"),
        (lambda: interval(cohen_kappa, TEXTBOOK, resamples=0), "resamples must be at least 1"),
        (lambda: agreement_report(TEXTBOOK, times=[[1]]), "times must have the shape"),
        (lambda: agreement_report(TEXTBOOK, annotators="a"), "but there are names of 1 and 5"),
        (lambda: Ratings([list(range(1001))] * 2), "1001 different labels, more than 1000"),
    ],
)
def test_bad_ratings_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
