"""Faults of preference data: biases, repeated and contradictory rows, leaks, personal data.

`PairAudit` reads a file of pairs. It imports no model: a reward model's scores come in as numbers.
"""

from __future__ import annotations

import hashlib
import operator
import re
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_core.data.chat import Content, texts_of
from rlhf_core.data.examples import Pair, Ranked
from rlhf_core.data.overlap import (
    SHINGLE,
    Leaks,
    count_words,
    near_duplicates,
    ngrams,
    normalized,
    words,
)
from rlhf_core.data.readers import Preference
from rlhf_core.data.store import Block, ExampleStore, select
from rlhf_core.losses import preferred
from rlhf_core.significance import sign_test, wilson_interval


def differing(examples: Sequence[Pair] | Sequence[Ranked], name: str) -> Sequence:
    """The pairs or ranked lists whose completions are not all equal; warns if some are.

    Equal completions teach nothing, and their rounding noise would train.

    Raises:
        ValueError: none is left.
    """
    stored = isinstance(examples, ExampleStore)
    places = examples.where(Block.may_repeat) if stored else range(len(examples))
    alike = {i for i in places if _all_alike(examples[i].completions_ids)}
    if not alike:
        return examples
    if len(alike) == len(examples):
        raise ValueError(f"the completions are identical in all {len(examples)} {name}")
    warnings.warn(
        f"dropped {len(alike)} of {len(examples)} {name}, whose completions are identical "
        "(perhaps only up to max_length)",
        stacklevel=4,
    )
    return select(examples, [i for i in range(len(examples)) if i not in alike])


def _all_alike(completions: list[list[int]]) -> bool:
    return all(x == completions[0] for x in completions)


def length_bias(examples: list[Pair] | list[Ranked], scores: Tensor) -> dict[str, float]:
    """Whether a reward model confuses length with quality.

    Args:
        examples: pairs or ranked lists.
        scores: (N,) of every completion, in order.

    Returns:
        length_correlation, of score and length (tokens, EOS included), and
        accuracy_where_shorter_won, over pairs whose better completion is the shorter one. Undefined
        values are left out.
    """
    lengths = [len(ids) for example in examples for ids in example.completions_ids]
    pairs, first = [], 0
    for example in examples:
        end = first + len(example.completions_ids)
        pairs += [
            (i, j) for i in range(first, end) for j in range(i + 1, end) if lengths[i] < lengths[j]
        ]
        first = end
    report, both = {}, torch.stack([scores, torch.tensor(lengths, dtype=scores.dtype)])
    if both.std(dim=1, correction=0).all():
        report["length_correlation"] = torch.corrcoef(both)[0, 1].item()
    if pairs:
        better, worse = torch.tensor(pairs).unbind(dim=1)
        report["accuracy_where_shorter_won"] = (
            preferred(scores[better], scores[worse]).mean().item()
        )
    return report


# ---- the audit of a file of pairs

# Row checks flag rows. The others compare all chosen answers with all rejected ones.
ROW_CHECKS = {
    "unreadable": "the row cannot be read",
    "empty": "an answer is empty",
    "equal": "the answers are equal",
    "duplicate": "an earlier row is equal",
    "near_duplicate": "an earlier prompt is nearly equal",
    "contradiction": "another row prefers the other answer",
    "cycle": "rows of the prompt prefer a to b, b to c and c to a",
    "leak": "a test prompt is in the prompt",
    "personal": "e-mail address, phone or card number",
    "flipped": "the reward model prefers the rejected answer clearly",
    "sycophancy": "chosen agrees with a wrong equation, or contradicts a right one",
}
BIAS_CHECKS = ("length_bias", "format_bias", "agreement_bias")
CHECKS = (*ROW_CHECKS, *BIAS_CHECKS)
DROPPED = ("unreadable", "empty", "equal", "duplicate", "contradiction", "leak")
P_VALUE, EFFECT = 0.001, 0.02  # a bias has a smaller p, and shows in more than this share of rows
FORMATS: dict[str, Callable[[str], object]] = {
    "list": re.compile(r"(?m)^\s*(?:[-*•]|\d+[.)])\s+\S").search,
    "bold": lambda text: "**" in text,
    "heading": re.compile(r"(?m)^#{1,6}\s").search,
    "code": lambda text: "```" in text,
    "question_end": lambda text: text.rstrip().endswith("?"),
    "exclamation": lambda text: "!" in text,
}
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@(?:[\w-]+\.)+[a-z]{2,}", re.IGNORECASE)
_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d{1,3}(?:[ .-]?\(\d{1,4}\))?(?:[ .-]?\d{2,4}){2,5}"
    r"|\(\d{3}\)[ .-]?\d{3}[ .-]\d{4}|\d{3}[ .-]\d{3}[ .-]\d{4})(?![\w-])"
)
_CARD = re.compile(r"(?<![\d.-])[2-6](?:[ -]?\d){12,18}(?![\d-])")
_CLAIM = re.compile(
    r"\b(?:i (?:think|believe|know|heard|read|thought)|i'?m (?:sure|certain|convinced)|in my "
    r"(?:opinion|view)|every(?:body|one) knows|told me that|you(?:'re| are) wrong|are you sure|"
    r"isn't it|right\?)"
)
_AGREES = re.compile(
    r"\W*(?:yes\b|exactly|absolutely|i agree|(?:that'?s|that is) (?:right|correct|true)|you(?:'re| "
    r"are) (?:\w+ )?(?:right|correct)|good point|(?:i apologi[sz]e|my apologies|(?:i'm )?sorry)\b"
    r".{0,40}\byou(?:'re| are) (?:\w+ )?(?:right|correct))"
)
_CONTRADICTS = re.compile(
    r"\W*(?:no\b|actually\b|not (?:quite|exactly|really)|i disagree|i (?:don't|do not) (?:agree|"
    r"think|believe)|that isn't|(?:that'?s|that is) (?:not|wrong|incorrect|false|a (?:common )?"
    r"(?:error|mistake|myth))|you(?:'re| are) (?:\w+ )?(?:wrong|mistaken|"
    r"incorrect)|i(?:'m| am) afraid|i (?:have|need) to correct)"
)
_NUMBER = r"(-?\d{1,9}(?:\.\d{1,9})?)"
_EQUATION = re.compile(
    rf"(?<![\d.+*/^-])(?<![\d+*/^-] ){_NUMBER} ?([-+*x×/÷]) ?{_NUMBER} ?(?:=|is|equals) ?"
    rf"{_NUMBER}(?! ?[-+*x×/÷^\d]|\.\d)"
)
_OPERATORS = {"+": operator.add, "-": operator.sub, "/": operator.truediv, "÷": operator.truediv}
_OPERATORS |= dict.fromkeys("*x×", operator.mul)
_AT_ONCE = 1024  # rows whose words are hashed together


class PairAudit:
    """Reads preference pairs one by one, and keeps counts and hashes instead of texts.

    `findings` has the flagged rows of each row check, by their number from 1, with the reason. Call
    `add` or `add_unreadable` for each row, then `report`.

    Args:
        against: Test prompts, which training prompts must not hold; see `Leaks`.
    """

    def __init__(self, against: Sequence[Content] = ()):
        self.rows = 0
        self.findings: dict[str, dict[int, str]] = {name: {} for name in ROW_CHECKS}
        self.numbers = array("q")  # of the rows that are read
        self.keys = array("Q")  # hashes of prompt, chosen and rejected, three for each row
        self.lengths = array("l")  # characters of chosen and rejected, two for each row
        self.words = Counter[int]()  # sign of the difference in numbers of words
        self.alike = 0  # rows whose answers are equal without case and blanks
        # Rows where only chosen, and where only rejected, has a property.
        self.formats = {name: [0, 0] for name in FORMATS}
        self.agreement = [0, 0]  # it agrees with a claim that the other answer contradicts
        self.against = Leaks([words(normalized("\n".join(texts_of(prompt)))) for prompt in against])
        self.waiting: list[tuple[int, int, list[str]]] = []  # number, distinct prompt, its words
        self.prompts: dict[int, int] = {}  # hash of a prompt -> its place among the distinct ones
        self.shingles, self.shingle_counts = array("Q"), array("l")

    def add_unreadable(self, reason: str) -> None:
        """Count a row that cannot be read."""
        self.rows += 1
        self.findings["unreadable"][self.rows] = reason

    def add(self, pair: Preference) -> None:
        """Count a row, whose answers may be empty or equal."""
        self.rows += 1
        number, texts = self.rows, ["\n".join(texts_of(content)) for content in pair[:3]]
        forms = [normalized(text) for text in texts]
        key, chosen_key, rejected_key = keys = [_hash(form) for form in forms]
        self.numbers.append(number)
        self.keys.extend(keys)
        self.lengths.extend(map(len, texts[1:]))
        difference = count_words(texts[1]) - count_words(texts[2])
        self.words[(difference > 0) - (difference < 0)] += 1
        empty = [name for name, form in zip(("chosen", "rejected"), forms[1:]) if not form]
        if empty:
            self.findings["empty"][number] = f"{' and '.join(empty)} empty"
        elif texts[1].strip() == texts[2].strip():
            self.findings["equal"][number] = ROW_CHECKS["equal"]
        self.alike += chosen_key == rejected_key
        for name, has in FORMATS.items():
            one, other = bool(has(texts[1])), bool(has(texts[2]))
            self.formats[name][other] += one != other
        if personal := [
            f"{kind} in {name}"
            for name, text in zip(("prompt", "chosen", "rejected"), texts)
            for kind in personal_data(text)
        ]:
            self.findings["personal"][number] = ", ".join(personal)
        self._add_claims(number, pair.prompt, forms)
        if key not in self.prompts or self.against.tests:
            self.waiting.append((number, key, words(forms[0])))
            if len(self.waiting) == _AT_ONCE:
                self._hash_waiting()

    def _hash_waiting(self) -> None:
        """Hash the words of the last prompts."""
        for (number, *_), leaks in zip(
            self.waiting, self.against.add([text for *_, text in self.waiting])
        ):
            if leaks:
                self.findings["leak"][number] = (
                    "the prompt shares a run of words with a test prompt"
                )
        new = []
        for _, key, text in self.waiting:
            if key not in self.prompts:
                self.prompts[key] = len(self.prompts)
                new.append(text)
        hashes, counts = ngrams(new, SHINGLE, short=True)
        self.shingles.frombytes(hashes.tobytes())
        self.shingle_counts.extend(counts.tolist())
        self.waiting.clear()

    def _add_claims(self, number: int, prompt: Content, forms: list[str]) -> None:
        """Compare how both answers open after a user's claim, and check equations."""
        claim = forms[0] if isinstance(prompt, str) else normalized(prompt[-1]["content"])
        claim = claim.rpartition("human:")[2].replace("’", "'")
        equations = [match.groups() for match in _EQUATION.finditer(claim)]
        if not equations and not _CLAIM.search(claim):
            return
        openings = [form[:200].replace("’", "'") for form in forms[1:]]
        agrees, contradicts = (
            [bool(pattern.match(text)) for text in openings] for pattern in (_AGREES, _CONTRADICTS)
        )
        self.agreement[0] += agrees[0] and contradicts[1]
        self.agreement[1] += contradicts[0] and agrees[1]
        for left, sign, right, result in equations:
            if sign in "/÷" and float(right) == 0:
                continue
            true = _OPERATORS[sign](Fraction(left), Fraction(right)) == Fraction(result)
            if (contradicts if true else agrees)[0] and not (agrees if true else contradicts)[0]:
                verb = "contradicts" if true else "agrees with"
                self.findings["sycophancy"][number] = (
                    f"chosen {verb} {left} {sign} {right} = {result}"
                )

    def report(
        self, margins: Sequence[float] | None = None, flip_margin: float = 1.0
    ) -> dict[str, Any]:
        """Every check's figures, as JSON.

        Args:
            margins: The reward model's score of chosen minus that of rejected, for each row that
                was read, in order. It must not have been trained on these rows.
            flip_margin: A row is likely flipped if its margin is below minus this. The scores of
                our reward models have standard deviation 1.
        """
        self._hash_waiting()
        keys = np.array(self.keys, dtype=np.uint64).reshape(-1, 3)
        report: dict[str, Any] = {
            "rows": self.rows,
            "length_bias": self._length_bias(),
            "format_bias": {
                name: _sides(counts, EFFECT * len(keys)) for name, counts in self.formats.items()
            },
            "agreement_bias": _sides(self.agreement, 0),
            "duplicates": self._duplicates(keys),
            "intransitive": self._intransitive(keys),
            "contamination": self._contamination(),
            "reward_margin": self._margins(margins, flip_margin),
        }
        report["flagged"] = {name: len(rows) for name, rows in self.findings.items()}
        report["failed"] = [name for name in ROW_CHECKS if self.findings[name]]
        report["failed"] += [name for name in BIAS_CHECKS if _is_biased(report[name])]
        return report

    def _length_bias(self) -> dict[str, Any]:
        """Whether the longer answer tends to be the chosen one; a tie counts one half."""
        lengths = np.array(self.lengths, dtype=np.int64).reshape(-1, 2)
        difference = np.sort(lengths[:, 0] - lengths[:, 1])
        n, longer, shorter = len(lengths), int((difference > 0).sum()), int((difference < 0).sum())
        ties = n - longer - shorter
        # P(d + d' > 0) of two rows, +1/2 P(d + d' = 0): the AUC of d against -d.
        above = n - np.searchsorted(difference, -difference, side="right")
        level = n - np.searchsorted(difference, -difference, side="left") - above
        share = (longer + ties / 2) / max(n, 1)
        p, decided = sign_test(longer, shorter), longer + shorter
        return {
            "n": n,
            "longer_chosen_chars": share,
            "longer_chosen_words": (self.words[1] + self.words[0] / 2) / max(n, 1),
            "ties": ties,
            "wilson95_without_ties": wilson_interval(longer, decided) if decided else None,
            "sign_test_p": p,
            "median_chars_chosen_rejected": [float(np.median(x)) for x in lengths.T] if n else None,
            "auc_length_difference": float(above.sum() + level.sum() / 2) / max(n, 1) ** 2,
            "biased": p is not None and p < P_VALUE and abs(share - 0.5) > EFFECT,
        }

    def _duplicates(self, keys: np.ndarray) -> dict[str, Any]:
        """Equal rows, equal prompts and nearly equal prompts."""
        _, first, row_of = np.unique(_mixed(keys), return_index=True, return_inverse=True)
        earlier = first[row_of]
        for at in np.flatnonzero(earlier < np.arange(len(keys))).tolist():
            reason = f"row {self.numbers[earlier[at]]} has the same prompt and answers"
            self.findings["duplicate"][self.numbers[at]] = reason
        places = np.array([self.prompts[key] for key in keys[:, 0].tolist()], dtype=np.int64)
        rows = np.bincount(places, minlength=len(self.prompts))
        hashes = np.frombuffer(self.shingles, dtype=np.uint64)
        near = near_duplicates(hashes, np.array(self.shingle_counts, dtype=np.int64))
        one, other = near.pairs.T
        # Each near duplicate refers to the first prompt of those that are like it.
        like = np.arange(len(self.prompts))
        np.minimum.at(like, other, one)
        while (like[like] != like).any():
            like = like[like]
        firsts = np.zeros(len(self.prompts), dtype=np.int64)
        firsts[places[::-1]] = np.array(self.numbers, dtype=np.int64)[::-1]
        for at in np.flatnonzero(like[places] != places).tolist():
            reason = f"the prompt is nearly that of row {firsts[like[places[at]]]}"
            self.findings["near_duplicate"][self.numbers[at]] = reason
        in_pairs = rows > 1
        in_pairs[near.pairs.flatten()] = True
        return {
            "rows": len(keys) - len(first),
            "prompts": len(keys) - len(self.prompts),
            "equal_answers": self.alike,
            "near_prompt_pairs": int((rows * (rows - 1) // 2).sum() + rows[one] @ rows[other]),
            "rows_in_near_pairs": int(rows[in_pairs].sum()),
            "all_pairs_compared": near.complete,
        }

    def _intransitive(self, keys: np.ndarray) -> dict[str, int]:
        """Rows that contradict each other, directly or in a circle."""
        numbers, reverse = np.array(self.numbers, dtype=np.int64), keys[:, [0, 2, 1]]
        proper = keys[:, 1] != keys[:, 2]
        against = np.isin(_mixed(keys), _mixed(reverse)) & proper
        for number in numbers[against].tolist():
            self.findings["contradiction"][number] = (
                "another row has the same prompt and answers with the order reversed"
            )
        left = keys[proper & ~against]
        _, group, size = np.unique(left[:, 0], return_inverse=True, return_counts=True)
        several = left[size[group] >= 3]
        found = preference_cycles(map(tuple, several.tolist()))
        for at in np.flatnonzero(proper & ~against).tolist() if found["edges"] else ():
            if tuple(keys[at].tolist()) in found["edges"]:
                self.findings["cycle"][self.numbers[at]] = ROW_CHECKS["cycle"]
        return {
            "contradicting_rows": int(against.sum()),
            "triples_without_ties": found["triples_without_ties"],
            "cyclic": found["cyclic"],
        }

    def _contamination(self) -> dict[str, int]:
        coverage = self.against.coverage()
        return {
            "test_rows": len(coverage),
            "rows_with_a_shared_ngram": int((coverage > 0).sum()),
            "rows_half_covered": int((coverage >= 0.5).sum()),
            "rows_fully_covered": int((coverage >= 1).sum()),
        }

    def _margins(self, margins: Sequence[float] | None, flip_margin: float) -> dict[str, Any]:
        if margins is None:
            return {}
        for number, margin in zip(self.numbers, margins, strict=True):
            if margin < -flip_margin:
                self.findings["flipped"][number] = f"reward margin {margin:.3g}"
        x = np.asarray(margins, dtype=np.float64)
        accuracy = float(((x > 0) + (x == 0) / 2).mean())
        return {"accuracy": accuracy, "mean": float(x.mean()), "flip_margin": flip_margin}


def preference_cycles(edges: Iterable[tuple[Any, Any, Any]]) -> dict[str, Any]:
    """Circles among preferences, such as a over b, b over c, c over a.

    Args:
        edges: (prompt, winner, loser) of hashable values. Answers that have both won against each
            other tie.

    Returns:
        triples_without_ties, the number of three answers to a prompt that were all compared;
        cyclic, the number of those that form a circle; edges, the set of edges in circles of three.
        A longer circle whose answers were all compared holds one of three.
    """
    beaten: dict[Any, dict[Any, set]] = {}
    for prompt, winner, loser in edges:
        beaten.setdefault(prompt, {}).setdefault(winner, set()).add(loser)
        beaten[prompt].setdefault(loser, set())
    transitive, cyclic, circles = 0, 0, set()
    for prompt, losers in beaten.items():
        clear = {a: {b for b in below if a not in losers[b]} for a, below in losers.items()}
        for a, below in clear.items():
            for b in below:
                transitive += len(below & clear[b])  # a over b over c, and a over c
                for c in clear[b]:
                    if a in clear[c]:
                        cyclic += 1  # found from a, from b and from c
                        circles |= {(prompt, a, b), (prompt, b, c), (prompt, c, a)}
    return {
        "triples_without_ties": transitive + cyclic // 3,
        "cyclic": cyclic // 3,
        "edges": circles,
    }


def personal_data(text: str) -> list[str]:
    """The kinds of personal data that a text seems to hold.

    E-mail addresses; phone numbers with +country or in North American form; card numbers whose
    check digit is right. Names and addresses are not found.
    """
    kinds = ["e-mail address"] * bool("@" in text and _EMAIL.search(text))
    kinds += ["phone number"] * bool(_PHONE.search(text))
    cards = (re.sub(r"[ -]", "", match[0]) for match in _CARD.finditer(text))
    return kinds + ["card number"] * any(map(_passes_luhn, cards))


def _passes_luhn(digits: str) -> bool:
    doubled = [sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2]]
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mixed(keys: np.ndarray) -> np.ndarray:
    """One hash (N,) for each row of three hashes, which are random already."""
    factors = np.array([1, 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], dtype=np.uint64)
    return (keys * factors).sum(axis=1, dtype=np.uint64)


def _sides(counts: list[int], least: float) -> dict[str, Any]:
    """Counts of rows whose answers differ in a property. least: A difference to ignore."""
    only_chosen, only_rejected = counts
    p = sign_test(only_chosen, only_rejected)
    biased = p is not None and p < P_VALUE and abs(only_chosen - only_rejected) > least
    sides = {"only_chosen": only_chosen, "only_rejected": only_rejected}
    return {**sides, "sign_test_p": p, "biased": biased}


def _is_biased(figures: dict[str, Any]) -> bool:
    return figures["biased"] if "biased" in figures else any(map(_is_biased, figures.values()))
