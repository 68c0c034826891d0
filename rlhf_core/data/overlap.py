"""Texts that overlap: near duplicates, and test texts that training data holds.

Texts become words, and words become 64-bit hashes of n-grams, so that a million texts fit in
memory. A word is a run of letters and digits. Scripts without blanks (Chinese, Japanese, Thai, Lao,
Khmer, Burmese) count each character as a word.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_LETTER = re.compile(rf"[{_UNSPACED}]")
_ODD = np.random.default_rng(0).integers(2**63, size=64, dtype=np.uint64) * np.uint64(
    2
) + np.uint64(1)
SHINGLE = 5  # words
JACCARD = 0.8
MAX_CANDIDATES = 20_000_000  # pairs of texts that `near_duplicates` compares at most
_AT_ONCE = 2**22  # n-grams that are compared at once


def normalized(text: str) -> str:
    """The text in Unicode's form NFKC, without case, with single blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """The words of a normalized text, without punctuation."""
    return _WORD.findall(text)


def count_words(text: str) -> int:
    """The number of words between blanks; of characters if most are of scripts without blanks."""
    letters = 0 if text.isascii() else len(_LETTER.findall(text))
    return letters if 2 * letters > len(text) else len(text.split())


def ngrams(texts: Sequence[list[str]], n: int, short: bool) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (S,) uint64 of the n-grams of texts, text by text, and their number (N,) in each.

    short: A text of fewer than n words, but at least one, has one n-gram: all its words. Otherwise
        it has none.
    """
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    padded = np.where(lengths > 0, np.maximum(lengths, n), 0) if short else lengths
    counts = np.maximum(padded - n + 1, 0)
    places = _starts(padded).repeat(lengths) + _within(lengths)
    hashes = np.zeros(padded.sum() + n, dtype=np.uint64)
    # 1 is added because 0 is the padding.
    flat = (zlib.crc32(word.encode()) + 1 for text in texts for word in text)
    hashes[places] = np.fromiter(flat, np.uint64, len(places))
    starts = _starts(padded).repeat(counts) + _within(counts)
    total = np.zeros(len(starts), dtype=np.uint64)
    for k in range(n):
        total += hashes[starts + k] * _ODD[k]
    return total ^ (total >> np.uint64(29)), counts


def _starts(counts: np.ndarray) -> np.ndarray:
    return counts.cumsum() - counts


def _within(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... for each of the groups, which have these sizes."""
    return np.arange(counts.sum()) - _starts(counts).repeat(counts)


class Near(NamedTuple):
    """Pairs of near duplicates.

    pairs: (P, 2), the lower index first, in order.
    complete: Whether all pairs were compared that could be near duplicates.
    """

    pairs: np.ndarray
    complete: bool


def near_duplicates(
    hashes: np.ndarray, counts: np.ndarray, max_candidates: int = MAX_CANDIDATES
) -> Near:
    """Pairs of texts whose sets of shingles have a Jaccard similarity of at least 0.8, exactly.

    An inverted index with prefix filtering finds the candidates: two such sets share one of the
    rarest shingles of each (Chaudhuri et al. 2006, Bayardo et al. 2007, Xiao et al. 2008).

    Args:
        hashes: (S,) uint64, the shingles of every text, as of `ngrams`.
        counts: (N,) their number in each text.
        max_candidates: Stop after this many comparisons. Only data with a great many similar texts,
            such as a template with one word that changes, have more.
    """
    # Most shingles are in one text alone. They count, but need no place in the index.
    low = hashes.astype(np.uint32)
    ordered = np.sort(low)
    again = _distinct(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    parts = (low[i : i + _AT_ONCE] for i in range(0, len(low), _AT_ONCE))
    repeated = np.concatenate([np.zeros(0, dtype=bool), *(_find(again, x)[1] for x in parts)])
    del low
    text = np.arange(len(counts), dtype=np.int64).repeat(counts)[repeated]
    values, shingle = np.unique(hashes[repeated], return_inverse=True)
    total = max(len(values), 1)
    alone = counts - np.bincount(text, minlength=len(counts))
    # The others as one sorted list of text * total + shingle. The rarest have the lowest numbers.
    keys = _distinct(np.sort(text * total + shingle))
    text, shingle = np.divmod(keys, total)
    frequency = np.bincount(shingle, minlength=total)
    rank = np.empty(total, dtype=np.int64)
    rank[np.argsort(frequency, kind="stable")] = np.arange(total)
    keys = np.sort(text * total + rank[shingle])
    text, shingle = np.divmod(keys, total)
    indexed = np.bincount(text, minlength=len(counts))
    sizes = alone + indexed
    # Sets of a and b >= a elements need at least 2a J / (1 + J) in common, and b J. So the first
    # one that they share comes within the first a - 2a J / (1 + J) + 1 elements of the smaller set
    # and the first b - b J + 1 of the larger one.
    place, size = alone[text] + _within(indexed), sizes[text]
    in_smaller = place <= size - np.ceil(2 * JACCARD / (1 + JACCARD) * size - 1e-9)
    kept = place <= size - np.ceil(JACCARD * size - 1e-9)
    text, shingle, in_smaller = text[kept], shingle[kept], in_smaller[kept]
    order = np.lexsort((sizes[text], shingle))
    text, shingle, in_smaller = text[order], shingle[order], in_smaller[order]
    found, compared, ahead = [], 0, 1
    active = np.flatnonzero(in_smaller)
    while len(active):
        active = active[active + ahead < len(text)]
        small, large = text[active], text[active + ahead]
        same = shingle[active] == shingle[active + ahead]
        close = same & (sizes[small] >= JACCARD * sizes[large] - 1e-9)
        active, small, large = active[close], small[close], large[close]
        if compared + len(active) > max_candidates:
            break
        compared += len(active)
        codes = np.minimum(small, large) * len(counts) + np.maximum(small, large)
        codes = _distinct(np.sort(codes))
        found.append(_similar(codes, keys, total, indexed, sizes))
        ahead += 1
    codes = _distinct(np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *found])))
    return Near(np.stack(np.divmod(codes, max(len(counts), 1)), axis=1), not len(active))


def _similar(
    codes: np.ndarray, keys: np.ndarray, total: int, indexed: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Those pairs, coded as first * number of texts + second, whose sets are similar enough."""
    starts, kept = _starts(indexed), []
    step = max(1, _AT_ONCE // int(indexed.max(initial=1)))
    for at in range(0, len(codes), step):
        part = codes[at : at + step]
        first, second = np.divmod(part, len(sizes))
        owner = np.arange(len(part)).repeat(indexed[first])
        places = starts[first].repeat(indexed[first]) + _within(indexed[first])
        _, shared = _find(keys, keys[places] + (second - first)[owner] * total)
        both = np.bincount(owner[shared], minlength=len(part))
        kept.append(part[both >= JACCARD * (sizes[first] + sizes[second] - both) - 1e-9])
    return np.concatenate([np.zeros(0, dtype=np.int64), *kept])


def _distinct(ordered: np.ndarray) -> np.ndarray:
    """The distinct values of a sorted array. numpy's unique hashes them, which is slower."""
    new = np.ones(len(ordered), dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return ordered[new]


def _find(index: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of values in a sorted array, and for which of them it has one."""
    places = np.searchsorted(index, values)
    inside = places < len(index)
    inside[inside] = index[places[inside]] == values[inside]
    return places, inside


class Leaks:
    """Finds which test texts occur in training texts, and which training texts hold them.

    A test text leaks if it shares a run of 13 words with a training text. One of fewer than 13
    words must share 8, and one of fewer than 8 must be equal.

    Args:
        tests: The words of each test text.
        n: Words of a run, for all test texts. Shorter texts never leak.
    """

    def __init__(self, tests: Sequence[list[str]], n: int | None = None):
        self.tests, self.short = tests, n is None
        sizes = [n or (13 if len(text) >= 13 else 8) for text in tests]
        self.groups = {
            size: [i for i, own in enumerate(sizes) if own == size] for size in sorted(set(sizes))
        }
        self.grams = {
            size: self._ngrams([tests[i] for i in self.groups[size]], size) for size in self.groups
        }
        self.index = {size: np.unique(hashes) for size, (hashes, _) in self.grams.items()}
        self.seen = {size: np.zeros(len(index), bool) for size, index in self.index.items()}

    def _ngrams(self, texts: Sequence[list[str]], size: int) -> tuple[np.ndarray, np.ndarray]:
        return ngrams(texts, size, short=self.short and size == 8)

    def add(self, texts: Sequence[list[str]]) -> np.ndarray:
        """Whether each training text, as words, shares a run with a test text (N,)."""
        holds = np.zeros(len(texts), dtype=bool)
        for size, index in self.index.items():
            hashes, counts = self._ngrams(texts, size)
            places, hit = _find(index, hashes)
            self.seen[size][places[hit]] = True
            holds[np.arange(len(texts)).repeat(counts)[hit]] = True
        return holds

    def coverage(self) -> np.ndarray:
        """The share of each test text's words (N,) within runs that training texts hold."""
        shares = np.zeros(len(self.tests))
        for size, (hashes, counts) in self.grams.items():
            seen = self.seen[size][np.searchsorted(self.index[size], hashes)]
            lengths = np.array([len(self.tests[i]) for i in self.groups[size]], dtype=np.int64)
            begin = (_starts(lengths).repeat(counts) + _within(counts))[seen]
            end = np.minimum(begin + size, (_starts(lengths) + lengths).repeat(counts)[seen])
            change = np.zeros(lengths.sum() + 1, dtype=np.int64)
            np.add.at(change, begin, 1)
            np.add.at(change, end, -1)
            covered = np.bincount(
                np.arange(len(lengths)).repeat(lengths),
                weights=change.cumsum()[:-1] > 0,
                minlength=len(lengths),
            )
            shares[self.groups[size]] = covered / np.maximum(lengths, 1)
        return shares
