"""How far annotators agree: coefficients, bootstrap intervals, and what to do with the labels.

Every coefficient takes ratings: a list for each annotator of the label of each item, None (or NaN)
where it is missing. Labels are any hashable values; weights and levels above nominal need numbers.
A coefficient is None where it is undefined: where no item has two labels, or where chance alone
explains the agreement, because all labels are equal. dawid_skene.py models each annotator's errors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from rlhf_core.files import short

MAX_CATEGORIES = 1000
LEVELS = ("nominal", "ordinal", "interval", "ratio")
THRESHOLDS = {"golden": 0.8, "train": 0.6, "review": 0.4}  # label: kappa must be above
MIN_BLOCK = 20  # items in a block of time, below which an interval says little
NEXT = {
    "golden": "use the labels for training, for evaluation and as gold questions",
    "train": "train on the labels",
    "review": "look at the confusing items before you train on the labels",
    "rewrite": "rewrite the guidelines, with the confusing items as examples, and label again",
    "undecided": "label more items: these are too few, or too alike, to decide",
}


class Ratings:
    """Ratings as arrays. Items with equal labels share a row, and `weights` says how many they are.

    Attributes:
        annotators: number of annotators.
        categories: the K distinct labels, sorted.
        codes: (P, annotators) index of each label in categories, -1 where it is missing.
        row_of: (N,) row of each item.
        weights: (P,) number of items with these labels.
        tally: (P, K) number of labels of each category.
        sizes: (P,) number of labels.
        agreement: (P,) share of equal labels among every two of them, 0 if there are no two.
        pairs: (Q, 2) the annotators who have labelled a common item.
        pair, left, right: (C,) cells of the pairs' tables that are not empty: the index in pairs,
            and the categories that the two annotators gave.
        two_row, two_cell: (E,) row and cell of every two labels of a row.
    """

    def __init__(self, ratings: Sequence[Sequence[Hashable | None]]):
        lists = [x.tolist() if hasattr(x, "tolist") else x for x in ratings]
        for i, labels in enumerate(lists):
            if not isinstance(labels, list | tuple):
                raise ValueError(
                    f"ratings must hold a list of labels for each annotator, got {short(labels)}"
                )
            if len(labels) != len(lists[0]):
                raise ValueError(
                    f"annotator 0 has {len(lists[0])} labels and annotator {i} has {len(labels)}. "
                    "Write None where a label is missing"
                )
        self.categories = categories_of(x for labels in lists for x in labels)
        K = len(self.categories)
        if not K:
            raise ValueError("there are no labels to compare")
        self.annotators = len(lists)
        index = {label: code for code, label in enumerate(self.categories)}
        codes = np.array([[index.get(x, -1) for x in labels] for labels in lists]).T
        self.codes, row_of = np.unique(codes, axis=0, return_inverse=True)
        self.row_of = row_of.reshape(-1)
        self.weights = np.bincount(self.row_of).astype(float)
        row, annotator = np.nonzero(self.codes >= 0)
        label, P = self.codes[row, annotator], len(self.codes)
        self.tally = np.bincount(row * K + label, minlength=P * K).reshape(P, K).astype(float)
        self.sizes = self.tally.sum(axis=1)
        equal = (self.tally * (self.tally - 1)).sum(axis=1)
        self.agreement = equal / (self.sizes * (self.sizes - 1)).clip(1)
        one, other = _every_two(self.sizes.astype(int))
        both = annotator[one] * self.annotators + annotator[other]
        pairs, pair = np.unique(both, return_inverse=True)
        self.pairs = np.stack(np.divmod(pairs, self.annotators), axis=1)
        tables = (len(pairs), K, K)
        cells = np.ravel_multi_index((pair, label[one], label[other]), tables)
        cells, self.two_cell = np.unique(cells, return_inverse=True)
        self.pair, self.left, self.right = np.unravel_index(cells, tables)
        self.two_row = row[one]

    @staticmethod
    def of(ratings: Sequence[Sequence[Hashable | None]] | Ratings) -> Ratings:
        return ratings if isinstance(ratings, Ratings) else Ratings(ratings)

    def weighted(self, weights: np.ndarray) -> Ratings:
        """The same rows with other numbers of items."""
        other = copy.copy(self)
        other.weights = weights.astype(float)
        return other

    def cells(self) -> np.ndarray:
        """Number of items (C,) in each cell of the pairs' tables."""
        return np.bincount(self.two_cell, self.weights[self.two_row], minlength=len(self.pair))

    def numbers(self, purpose: str) -> np.ndarray:
        """The categories (K,) as float64. ValueError names the first that is not a number."""
        for label in self.categories:
            if not isinstance(label, Real) or not math.isfinite(label):
                raise ValueError(f"{purpose} needs labels that are numbers, got {short(label)}")
        return np.array(self.categories, dtype=float)

    def shares(self, at_least: int) -> np.ndarray:
        """Mean share (K,) of each category in the items with at least this number of labels."""
        totals = np.where(self.sizes >= at_least, self.weights / self.sizes.clip(1), 0) @ self.tally
        return totals / totals.sum()


def categories_of(labels: Iterable[Hashable | None]) -> list:
    """The distinct labels without None and NaN, sorted by value, or as text where types mix."""
    try:
        distinct = {label for label in labels if label is not None and label == label}
    except TypeError as error:
        raise ValueError(f"a label must be text or a number: {error}") from None
    if len(distinct) > MAX_CATEGORIES:
        raise ValueError(
            f"there are {len(distinct)} different labels, more than {MAX_CATEGORIES}. Round "
            "numbers to fewer values; free text has no agreement"
        )
    try:
        return sorted(distinct)  # type: ignore[type-var]
    except TypeError:
        return sorted(distinct, key=lambda label: (type(label).__name__, repr(label)))


def _every_two(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of every two labels of a row, where the labels are stored row by row."""
    starts, twos = np.cumsum(sizes) - sizes, [np.empty((2, 0), dtype=int)]
    for size in np.unique(sizes):
        start = starts[sizes == size]
        twos += [np.stack([start + i, start + j]) for i, j in zip(*np.triu_indices(size, 1))]
    one, other = np.concatenate(twos, axis=1)
    return one, other


# ---- coefficients


def percent_agreement(ratings) -> float | None:
    """Share of equal labels among every two labels of an item; mean over items with two or more."""
    x = Ratings.of(ratings)
    compared = np.where(x.sizes > 1, x.weights, 0)
    return float(compared @ x.agreement / compared.sum()) if compared.any() else None


def cohen_kappa(ratings, weights: str | None = None) -> float | None:
    """Cohen's kappa of two annotators; for more, the mean over the pairs for which it is defined.

    Args:
        ratings: see the top of this file. A pair is compared on the items that both labelled.
        weights: None counts every disagreement alike. linear and quadratic count the distance of
            the two numbers, or its square.

    Source: Cohen 1960; with weights, Cohen 1968.
    """
    kappas = _kappas_of_pairs(Ratings.of(ratings), weights)
    kappas = kappas[~np.isnan(kappas)]
    return float(kappas.mean()) if len(kappas) else None


def _kappas_of_pairs(x: Ratings, weights: str | None) -> np.ndarray:
    """Cohen's kappa (Q,) of each pair of annotators; NaN where it is undefined."""
    if weights not in (None, "linear", "quadratic"):
        raise ValueError(f"weights must be None, linear or quadratic, got {weights!r}")
    distances = _distances(x, weights or "nominal", f"weights={weights!r}")
    Q, K, items = len(x.pairs), len(x.categories), x.cells()

    def marginal(codes: np.ndarray) -> np.ndarray:
        return np.bincount(x.pair * K + codes, items, minlength=Q * K).reshape(Q, K)

    left, right = marginal(x.left), marginal(x.right)
    observed = np.bincount(x.pair, items * distances[x.left, x.right], minlength=Q)
    expected = ((left @ distances) * right).sum(axis=1)
    with np.errstate(all="ignore"):
        kappas = 1 - observed * left.sum(axis=1) / expected
    return np.where(((left + right) > 0).sum(axis=1) > 1, kappas, np.nan)


def scott_pi(ratings) -> float | None:
    """Scott's pi of two annotators; of more, Fleiss' kappa on the items with two labels or more.

    Source: Scott 1955.
    """
    return _pi(Ratings.of(ratings), at_least=2)


def fleiss_kappa(ratings) -> float | None:
    """Fleiss' kappa for any number of annotators, who may differ from item to item.

    With missing labels, items with one label count for the shares of the categories (Gwet 2014).

    Source: Fleiss 1971.
    """
    return _pi(Ratings.of(ratings), at_least=1)


def _pi(x: Ratings, at_least: int) -> float | None:
    observed = percent_agreement(x)
    if observed is None:
        return None
    shares = x.shares(at_least)
    return _beyond_chance(observed, shares @ shares) if (shares > 0).sum() > 1 else None


def gwet_ac1(ratings, categories: Sequence[Hashable] | None = None) -> float | None:
    """Gwet's AC1, whose chance agreement stays low where one label is frequent.

    Args:
        ratings: see the top of this file.
        categories: the labels that could have been given; default: those that were.

    Raises:
        ValueError: a label is not among the categories.

    Source: Gwet 2008.
    """
    x = Ratings.of(ratings)
    possible = set(x.categories if categories is None else categories)
    for label in x.categories:
        if label not in possible:
            raise ValueError(
                f"label {short(label)} is not one of the categories {short(categories)}"
            )
    observed = percent_agreement(x)
    if observed is None or len(possible) < 2:
        return None
    shares = x.shares(at_least=1)
    return _beyond_chance(observed, shares @ (1 - shares) / (len(possible) - 1))


def _beyond_chance(observed: float, expected: float) -> float:
    return float((observed - expected) / (1 - expected))


def krippendorff_alpha(ratings, level: str = "nominal") -> float | None:
    """Krippendorff's alpha: 1 is agreement, 0 is chance. Items with one label do not count.

    Args:
        ratings: see the top of this file.
        level: how far two labels differ: nominal (equal or not), ordinal (ranks between them),
            interval (squared difference) or ratio (squared relative difference, labels >= 0).

    Source: Krippendorff 2011, "Computing Krippendorff's alpha-reliability".
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    x = Ratings.of(ratings)
    pairable = np.where(x.sizes > 1, x.weights, 0)
    totals = pairable @ x.tally
    if (totals > 0).sum() < 2:
        return None
    distances = _distances(x, level, f"level={level!r}", totals)
    weights = pairable / (x.sizes - 1).clip(1)
    coincidences = x.tally.T @ (x.tally * weights[:, None]) - np.diag(weights @ x.tally)
    observed = (coincidences * distances).sum()
    return float(1 - observed * (totals.sum() - 1) / (totals @ distances @ totals))


def kendall_w(ratings) -> float | None:
    """Kendall's coefficient of concordance W of rankings, corrected for ties: 1 is one order.

    Args:
        ratings: the rank, or any score, that each annotator gives to each item. Items that are not
            ranked by all annotators are left out.

    Source: Kendall & Babington Smith 1939; ties, Kendall 1948.
    """
    x = Ratings.of(ratings)
    x.numbers("kendall_w")
    complete = x.sizes == x.annotators
    codes, counts = x.codes[complete], x.weights[complete]
    m, n = x.annotators, counts.sum()
    ranks, ties, K, all_tied = np.zeros(len(codes)), 0.0, len(x.categories), True
    for column in codes.T:
        tied = np.bincount(column, counts, minlength=K)
        ranks += _midranks(tied)[column]
        ties += (tied**3 - tied).sum()
        all_tied &= (tied > 0).sum() < 2
    if m < 2 or all_tied:
        return None
    spread = counts @ (ranks - counts @ ranks / n) ** 2
    return float(12 * spread / (m**2 * (n**3 - n) - m * ties))


def _midranks(totals: np.ndarray) -> np.ndarray:
    """Mean rank (K,) of each category, up to a constant, from the number of labels in each."""
    return np.cumsum(totals) - totals / 2


def _distances(
    x: Ratings, metric: str, purpose: str, totals: np.ndarray | None = None
) -> np.ndarray:
    """How far every two categories differ, (K, K). Ordinal ranks need the totals (K,)."""
    if metric == "nominal":
        return 1.0 - np.eye(len(x.categories))
    values = x.numbers(purpose)
    if metric == "ordinal":
        values = _midranks(totals)
    gaps = np.abs(values[:, None] - values)
    if metric == "ratio":
        if values[0] < 0:
            raise ValueError(f"{purpose} needs labels of at least 0, got {values[0]:g}")
        sums = values[:, None] + values
        gaps = np.divide(gaps, sums, out=gaps, where=sums > 0)  # 0 and 0 do not differ
    return gaps if metric == "linear" else gaps**2


def from_counts(
    table: Sequence[Sequence[int]], *, two_annotators: bool | None = None
) -> list[list[int | None]]:
    """Ratings that have the counts of a published table. The labels are 0, 1, ...

    Args:
        table: either (items, categories), how many annotators gave this label to this item, as in
            Fleiss 1971; or, for two annotators, (categories, categories), how many items got this
            label from the first and that label from the second.
        two_annotators: which of the two it is; default: a table of 2 x 2 is one of two annotators.

    Raises:
        ValueError: a count is not a whole number of at least 0, or the shape does not fit.
    """
    counts = np.array(table)
    if counts.ndim != 2 or counts.dtype.kind not in "iu" or (counts < 0).any():
        raise ValueError(f"table must be rows of whole numbers of at least 0, got {short(table)}")
    if two_annotators is None:
        two_annotators = counts.shape == (2, 2)
    if two_annotators:
        if counts.shape[0] != counts.shape[1]:
            raise ValueError(f"the table of two annotators must be square, got {counts.shape}")
        cells = np.indices(counts.shape).reshape(2, -1)
        return np.repeat(cells, counts.ravel(), axis=1).tolist()
    rows = [np.repeat(np.arange(counts.shape[1]), row).tolist() for row in counts]
    width = max(map(len, rows), default=0)
    return [[row[i] if i < len(row) else None for row in rows] for i in range(width)]


# ---- intervals and thresholds


class Interval(NamedTuple):
    """A bootstrap interval; None if no resample had a value. undefined: how many had none."""

    low: float | None
    high: float | None
    undefined: int


def interval(
    coefficient: Callable[..., float | None],
    ratings,
    *,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    **options,
) -> Interval:
    """The percentile bootstrap interval of a coefficient over items (Efron 1979).

    Args:
        coefficient: one of this file's.
        ratings: see the top of this file.
        resamples: how many times the items are drawn with replacement.
        seed: of the draws.
        confidence: the share of the resamples within the interval.
        **options: of the coefficient, such as level.
    """
    draws = _resample(lambda x: [coefficient(x, **options)], Ratings.of(ratings), resamples, seed)
    return _interval_of(draws[:, 0], confidence)


def _resample(statistics: Callable, x: Ratings, resamples: int, seed: int) -> np.ndarray:
    """The statistics (resamples, S) of items drawn with replacement; NaN where undefined."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    generator, N = np.random.default_rng(seed), int(x.weights.sum())
    draws = (generator.multinomial(N, x.weights / N) for _ in range(resamples))
    return np.array([statistics(x.weighted(draw)) for draw in draws], dtype=float)


def _interval_of(draws: np.ndarray, confidence: float = 0.95) -> Interval:
    defined = draws[~np.isnan(draws)]
    undefined = len(draws) - len(defined)
    if not len(defined):
        return Interval(None, None, undefined)
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail]).tolist()
    return Interval(low, high, undefined)


def threshold_label(kappa: float) -> str:
    """golden above 0.8, train above 0.6, review above 0.4, else rewrite. See `NEXT`."""
    return next((label for label, above in THRESHOLDS.items() if kappa > above), "rewrite")


def verdict(
    kappa: float | None, low: float | None, high: float | None, undefined: float = 0.0
) -> str:
    """The `threshold_label` of kappa if its whole interval has that label, else undecided.

    undefined: share of the resamples without a value; above 5 % the interval says too little.
    """
    if kappa is None or low is None or high is None or undefined > 0.05:
        return "undecided"
    labels = {threshold_label(x) for x in (low, kappa, high)}
    return labels.pop() if len(labels) == 1 else "undecided"


# ---- the report


def agreement_report(
    ratings,
    *,
    level: str = "nominal",
    annotators: Sequence | None = None,
    items: Sequence | None = None,
    times: Sequence[Sequence[float | None]] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    most: int = 20,
) -> dict[str, Any]:
    """Everything about the agreement of some ratings, as JSON values without NaN.

    Args:
        ratings: see the top of this file.
        level: as for `krippendorff_alpha`. label and verdict are those of Cohen's kappa for two
            annotators and of Fleiss' for more; above nominal, those of Krippendorff's alpha.
        annotators, items: their names; default: 0, 1, ...
        times: when each label was given, as numbers, in the shape of ratings.
        resamples, seed: of the bootstrap, as for `interval`.
        most: how many confusing items to list.

    Returns:
        items, labels, categories (label to count), unanimous_items, split_items, level;
        coefficients, each with value, low, high, undefined_resamples, and a reason where there is
        no value; based_on, the coefficient of label and verdict; warnings; pairs of annotators;
        annotators, each against the majority of the others; confusing_items by entropy in bits;
        drift, up to ten blocks of at least 20 items by the time of their last label, if there are
        two or more.
    """
    x = Ratings.of(ratings)
    names = [*map(_plain, range(x.annotators) if annotators is None else annotators)]
    ids = range(len(x.row_of)) if items is None else items
    if len(names) != x.annotators or len(ids) != len(x.row_of):
        raise ValueError(
            f"the ratings are of {x.annotators} annotators and {len(x.row_of)} items, but there "
            f"are names of {len(names)} and {len(ids)}"
        )
    coefficients = _coefficients_at(level)
    count = len(coefficients)

    def statistics(some: Ratings) -> list:
        return [*(f(some) for f in coefficients.values()), *_kappas_of_pairs(some, None)]

    values = np.array(statistics(x), dtype=float).tolist()
    bounds = [_interval_of(draws) for draws in _resample(statistics, x, resamples, seed).T]
    entries = {name: _entry(x, *both) for name, *both in zip(coefficients, values, bounds)}
    based_on = "krippendorff_alpha"
    if level == "nominal":
        based_on = "cohen_kappa" if x.annotators == 2 else "fleiss_kappa"
    kappa, low, high, _, undefined = entries[based_on].values()
    drift = []
    if times is not None:
        drift = _drift(x, times, coefficients[based_on], resamples, seed)
    totals, distinct = x.weights @ x.tally, (x.tally > 0).sum(axis=1)
    return {
        "items": len(x.row_of),
        "labels": int(totals.sum()),
        "categories": {str(label): int(n) for label, n in zip(x.categories, totals)},
        "unanimous_items": int(x.weights[(distinct == 1) & (x.sizes > 1)].sum()),
        "split_items": int(x.weights[distinct > 1].sum()),
        "level": level,
        "coefficients": entries,
        "based_on": based_on,
        "label": None if kappa is None else threshold_label(kappa),
        "verdict": verdict(kappa, low, high, undefined / resamples),
        "warnings": _warnings(x, based_on, entries, drift),
        "pairs": _pairs(x, names, values[count:], bounds[count:]),
        "annotators": [_against_the_others(x, a) | {"annotator": n} for a, n in enumerate(names)],
        "confusing_items": _confusing(x, ids, names, most),
        "drift": drift,
    }


def _coefficients_at(level: str) -> dict[str, Callable[[Ratings], float | None]]:
    coefficients: dict[str, Callable[[Ratings], float | None]] = {
        "percent_agreement": percent_agreement,
        "cohen_kappa": cohen_kappa,
        "scott_pi": scott_pi,
        "fleiss_kappa": fleiss_kappa,
        "gwet_ac1": gwet_ac1,
        "krippendorff_alpha": partial(krippendorff_alpha, level=level),
    }
    if level != "nominal":
        for weights in ("linear", "quadratic"):
            coefficients[f"cohen_kappa_{weights}"] = partial(cohen_kappa, weights=weights)
        coefficients["kendall_w"] = kendall_w
    return coefficients


def _entry(x: Ratings, value: float, bounds: Interval) -> dict[str, Any]:
    """A coefficient with its interval, or the reason why it has no value."""
    low, high, undefined = bounds
    entry = {"value": value, "low": low, "high": high, "reason": None}
    if math.isnan(value):
        reason = "the labels to compare are all equal, so chance alone explains the agreement (0/0)"
        if x.annotators < 2:
            reason = "there is one annotator, and agreement needs two"
        elif not len(x.pairs):
            reason = "no item has labels of two annotators"
        entry = {"value": None, "low": None, "high": None, "reason": reason}
    return entry | {"undefined_resamples": undefined}


def _warnings(x: Ratings, based_on: str, entries: dict, drift: list[dict]) -> list[str]:
    warnings = []
    kappa, ac1 = entries[based_on]["value"], entries["gwet_ac1"]["value"]
    nominal = based_on != "krippendorff_alpha" and kappa is not None and ac1 is not None
    if nominal and threshold_label(kappa) != threshold_label(ac1) and ac1 - kappa > 0.1:
        shares = x.shares(at_least=1)
        warnings.append(
            f"the labels are skewed: {shares.max():.0%} are {x.categories[shares.argmax()]}. So "
            f"{based_on} is {kappa:.3f} and gwet_ac1 {ac1:.3f}. Label more items that may get a "
            "rare label before you trust either"
        )
    if len(set(map(str, x.categories))) < len(x.categories):
        warnings.append("some labels differ only by their type, such as 1 and '1'")
    alone = int(x.weights[x.sizes == 1].sum())
    if alone:
        warnings.append(f"{alone} of {len(x.row_of)} items have one label, which has no partner")
    blocks = [block for block in drift if block["low"] is not None]
    if blocks:
        first, last = blocks[0], blocks[-1]
        if last["high"] < first["low"] or first["high"] < last["low"]:
            warnings.append(
                f"agreement drifts from {first['value']:.3f} in the first block of items to "
                f"{last['value']:.3f} in the last. Check the labels of the worse block"
            )
    return warnings


def _pairs(
    x: Ratings, names: list, kappas: list[float], bounds: list[Interval]
) -> list[dict[str, Any]]:
    """Cohen's kappa of every two annotators with a common item."""
    items = np.bincount(x.pair, x.cells())
    equal = np.bincount(x.pair, x.cells() * (x.left == x.right))
    return [
        {
            "annotators": [names[i], names[j]],
            "items": int(items[q]),
            "percent_agreement": float(equal[q] / items[q]),
            "cohen_kappa": _entry(x, kappas[q], bounds[q]),
        }
        for q, (i, j) in enumerate(x.pairs)
    ]


def _against_the_others(x: Ratings, annotator: int) -> dict[str, Any]:
    """How often a label is the majority of the item's other labels, where they have one."""
    codes = x.codes[:, annotator]
    rows = np.flatnonzero(codes >= 0)
    others, mine = x.tally[rows], (np.arange(len(rows)), codes[rows])
    others[mine] -= 1
    most = others.max(axis=1)
    decided = (most > 0) & ((others == most[:, None]).sum(axis=1) == 1)
    compared = x.weights[rows] @ decided
    agreeing = x.weights[rows] @ (decided & (others[mine] == most))
    return {
        "labels": int(x.weights[rows].sum()),
        "compared": int(compared),
        "with_majority": float(agreeing / compared) if compared else None,
    }


def _confusing(x: Ratings, items: Sequence, names: list, most: int) -> list[dict[str, Any]]:
    """The items whose labels have the highest entropy, in bits."""
    shares = x.tally / x.sizes[:, None].clip(1)
    entropy = -(shares * np.log2(shares, out=np.zeros_like(shares), where=shares > 0)).sum(axis=1)
    order = np.argsort(-entropy[x.row_of], kind="stable")[:most].tolist()
    return [
        {
            "item": _plain(items[i]),
            "entropy": float(entropy[x.row_of[i]]),
            "labels": {
                str(name): _plain(x.categories[code])
                for name, code in zip(names, x.codes[x.row_of[i]])
                if code >= 0
            },
        }
        for i in order
        if (x.tally[x.row_of[i]] > 0).sum() > 1
    ]


def _drift(
    x: Ratings, times: Sequence, coefficient: Callable, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """The coefficient in at most ten blocks of items, by the time of each item's last label."""
    when = np.array(times, dtype=float)  # None becomes NaN
    shape = (x.annotators, len(x.row_of))
    if when.shape != shape:
        raise ValueError(f"times must have the shape of the ratings, {shape}, got {when.shape}")
    last = np.fmax.reduce(when)
    usable = np.flatnonzero((x.sizes[x.row_of] > 1) & ~np.isnan(last))
    ordered = usable[np.argsort(last[usable], kind="stable")]
    count, blocks = min(10, len(ordered) // MIN_BLOCK), []
    for block in np.array_split(ordered, count) if count > 1 else ():
        part = x.weighted(np.bincount(x.row_of[block], minlength=len(x.weights)))
        value = float(np.array(coefficient(part), dtype=float))  # NaN where undefined
        bounds = interval(coefficient, part, resamples=resamples, seed=seed)
        where = {"from": float(last[block[0]]), "to": float(last[block[-1]]), "items": len(block)}
        blocks.append(where | _entry(part, value, bounds))
    return blocks


def _plain(value: Any) -> Any:
    """A label or name as a JSON value."""
    return value if isinstance(value, str | int | float) else str(value)
