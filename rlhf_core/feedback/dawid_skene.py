"""Dawid and Skene's model: the true label of each item, and how each annotator errs.

An annotator gives label l to an item whose true label is j with probability confusion[j, l],
independently of all others. Labels and confusions are estimated together, by EM. The labels that
result are probabilities, which a preference pair takes as its `label_smoothing`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhf_core.feedback.agreement import categories_of

MIN_INFORMATION = 0.02  # share of the labels' entropy, below which an annotator guesses


class DawidSkene(NamedTuple):
    """Estimates for N items, A annotators and K categories.

    Attributes:
        items, annotators: in the order of their first label.
        categories: the distinct labels, sorted.
        soft_labels: (N, K) probability that each category is the true label.
        confusion: (A, K, K) probability of each label (last) for each true label. A row is uniform
            where the annotator saw no item with that true label.
        priors: (K,) probability of each true label.
        information: (A,) mutual information of the true label and the annotator's, as a share of
            the true label's entropy: 0 is a guess, 1 is never wrong, or always in the same way.
        guessers: annotators whose labels carry no information, see `dawid_skene`.
        log_likelihood: of all labels, in nats.
        iterations: steps of EM.
        converged: whether the last step changed the log-likelihood by less than the tolerance.
    """

    items: list
    annotators: list
    categories: list
    soft_labels: np.ndarray
    confusion: np.ndarray
    priors: np.ndarray
    information: np.ndarray
    guessers: list
    log_likelihood: float
    iterations: int
    converged: bool

    @property
    def labels(self) -> list:
        """The most probable category of each item."""
        return [self.categories[k] for k in self.soft_labels.argmax(axis=1)]


def dawid_skene(
    labels: Iterable[Sequence | Mapping],
    *,
    tolerance: float = 1e-9,
    max_iterations: int = 1000,
) -> DawidSkene:
    """Fit the model to rows of item, annotator and label, by EM from the majority vote.

    An annotator guesses if the G-test at 5 % finds no relation between the true labels and
    theirs, or if the relation explains less than 2 % of the labels' entropy. Annotators with so
    few labels that the test could not find a half of that entropy are not judged.

    Args:
        labels: rows, in this order or with these names; an annotator may label an item several
            times. A missing label (None, NaN) is left out.
        tolerance: EM stops when a step raises the log-likelihood by less, in nats per label.
        max_iterations: the most steps of EM.

    Raises:
        ValueError: there is no label, or one that is not hashable.

    Source: Dawid & Skene 1979, "Maximum likelihood estimation of observer error-rates".
    """
    names = ("item", "annotator", "label")
    rows = [[row[x] for x in names] if isinstance(row, Mapping) else row[:3] for row in labels]
    rows = [row for row in rows if row[2] is not None and row[2] == row[2]]
    categories = categories_of(label for _, _, label in rows)
    if not rows:
        raise ValueError("there are no labels")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    items, item = _indexed(row[0] for row in rows)
    annotators, annotator = _indexed(row[1] for row in rows)
    code_of = {label: code for code, label in enumerate(categories)}
    label = np.array([code_of[row[2]] for row in rows])
    given = annotator * len(categories) + label
    N, A, K, count = len(items), len(annotators), len(categories), len(rows)

    def summed(index: np.ndarray, columns: Iterable[np.ndarray], size: int) -> np.ndarray:
        """Sums (size, columns) of the values with each index, of each column (count,)."""
        sums = [np.bincount(index, column, minlength=size) for column in columns]
        return np.stack(sums, axis=1)

    soft_labels = summed(item, (label == k for k in range(K)), N)
    soft_labels /= soft_labels.sum(axis=1, keepdims=True)  # the votes
    log_likelihood, converged, iterations = -math.inf, False, 0
    while not converged and iterations < max_iterations:
        iterations += 1
        seen = summed(given, (share[item] for share in soft_labels.T), A * K)
        seen = seen.reshape(A, K, K).swapaxes(1, 2)  # annotator, true label, label
        totals = seen.sum(axis=2, keepdims=True)
        confusion = np.divide(seen, totals, out=np.full(seen.shape, 1 / K), where=totals > 0)
        priors = soft_labels.mean(axis=0)
        with np.errstate(divide="ignore"):
            logs = np.log(confusion)
            by_label = (logs[:, k].ravel()[given] for k in range(K))
            joint = np.log(priors) + summed(item, by_label, N)
        top = joint.max(axis=1, keepdims=True)
        evidence = top + np.log(np.exp(joint - top).sum(axis=1, keepdims=True))
        soft_labels = np.exp(joint - evidence)
        before, log_likelihood = log_likelihood, float(evidence.sum())
        converged = log_likelihood - before < tolerance * count
    information = _information(confusion, priors)
    entropy = -float(priors[priors > 0] @ np.log(priors[priors > 0]))
    noise = _chi_squared_95((K - 1) ** 2) / (2 * np.bincount(annotator))
    floor = np.maximum(noise, MIN_INFORMATION * entropy)
    guesses = (information < floor) & (noise < entropy / 2)
    return DawidSkene(
        items,
        annotators,
        categories,
        soft_labels,
        confusion,
        priors,
        information / entropy if entropy else information,
        [name for name, guess in zip(annotators, guesses) if guess],
        log_likelihood,
        iterations,
        converged,
    )


def _indexed(values: Iterable[Hashable]) -> tuple[list, np.ndarray]:
    """The distinct values in the order of their first appearance, and the index of each."""
    index: dict[Hashable, int] = {}
    indices = np.array([index.setdefault(value, len(index)) for value in values])
    return list(index), indices


def _information(confusion: np.ndarray, priors: np.ndarray) -> np.ndarray:
    """Mutual information (A,), in nats, of the true label and each annotator's label."""
    joint = priors[:, None] * confusion
    apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=2, keepdims=True)
    terms = joint * np.log(np.divide(joint, apart, out=np.ones_like(joint), where=joint > 0))
    return terms.sum(axis=(1, 2)).clip(0)


def _chi_squared_95(degrees: int) -> float:
    """The 95th percentile of the chi-squared distribution (Wilson & Hilferty 1931)."""
    if not degrees:
        return 0.0
    part = 2 / (9 * degrees)
    return degrees * (1 - part + 1.6449 * math.sqrt(part)) ** 3
