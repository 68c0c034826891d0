r"""A reward for questions with a known answer: is a response's final answer the right one?

Numbers are compared by value: $1,234.50 equals 1234.5, and \frac{1}{2} equals 0.5. Left out:
formulas, such as x^2 + 1, and units.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from rlhf_core.feedback.rewards import describe_function
from rlhf_core.files import shown

_NUMBER = re.compile(
    r"(?<![\w.])[-\u2212+]?\$?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"  # 1,234.5 or 1234.5 or .5
    r"(?:[eE][-+]?\d{1,2}(?!\d)|\s?/\s?\d+(?![\d.]))?"  # 1e5 or 1/2
)
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]+)\}\{([^{}]+)\}")
_DECORATION = re.compile(
    r"\\text\w*\{[^{}]*\}|\\math\w+|\\[!,;: $%]|\\left|\\right|[$%{}\s]|\\[()\[\]]"
)
_CHOICES = "ABCDE"
_SAID = re.compile(r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?\**\(?([A-E])\b", re.IGNORECASE)
_ALONE = re.compile(r"\s*\(?([A-E])\)?\s*(?:[.:)]|$)")
_ENCLOSED = re.compile(r"\(([A-E])\)")
_LAST = re.compile(r"\b([A-E])[\s.)*]*$")


def final_number(text: str) -> Fraction | None:
    r"""Return the number that a text ends up with, or None.

    It is that in the last \boxed{}; else the first one after the last "####"; else the last number
    of the text. A marker without a number means that there is none.
    """
    boxed = _boxed(text)
    if boxed is not None:
        inner = _DECORATION.sub("", _FRACTION.sub(r"(\1)/(\2)", boxed)).rpartition("=")[2]
        return _value(re.sub(r"\(([^()]*)\)", r"\1", inner), whole=True)
    _, marker, after = text.rpartition("####")
    numbers = [match[0] for match in _NUMBER.finditer(after)]
    if not numbers:
        return None
    return _value(numbers[0 if marker else -1])


def final_choice(text: str) -> str | None:
    r"""Return the letter from A to E that a text chooses, or None.

    It is that in the last \boxed{}; else the one after the last "####"; else the last one after
    "answer is", "answer:", "option" or "choice"; else the text's only word, or its first one before
    a dot, colon or bracket; else the last one in brackets; else the text's last word.
    """
    boxed, (_, marker, after) = _boxed(text), text.rpartition("####")
    if boxed is not None or marker:
        inner = after if boxed is None else re.sub(r"\\(?:text|math)\w*", "", boxed)
        found = re.match(r"[\s({]*([A-E])(?![A-Za-z])", inner)
        return found[1] if found else None
    for found in (
        [match for match in _SAID.findall(text) if match in _CHOICES][-1:],
        [match[1] for match in [_ALONE.match(text)] if match],
        _ENCLOSED.findall(text)[-1:],
        _LAST.findall(text),
    ):
        if found:
            return found[0]
    return None


KINDS: dict[str, Callable[[str], Any]] = {"number": final_number, "choice": final_choice}
NAMES: dict[Any, str] = {"number": "a number", "choice": "a letter from A to E"}


class AnswerReward:
    """A reward callable: `right` for a response with the answer of its row, else less.

    The rows need a column `answer`: a number, a letter, or a text that ends up with one, such as a
    solution of GSM8K.
    """

    def __init__(
        self,
        kind: str | Callable[[str], Any] = "number",
        *,
        right: float = 1.0,
        wrong: float = 0.0,
        unanswered: float = 0.0,
    ):
        """
        Args:
            kind: "number", see `final_number`; "choice", see `final_choice`; or a function from a
                response to its answer, None for none, such as one that runs the code in it. Its
                answer must equal that of the row; of texts, white space at the ends is ignored.
            right, wrong, unanswered: Scores of a right answer, a wrong one, and none.
        """
        if not callable(kind) and kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, or a function, got {kind!r}")
        for name, score in (("right", right), ("wrong", wrong), ("unanswered", unanswered)):
            if not math.isfinite(score):
                raise ValueError(f"{name} must be a finite number, got {score}")
        self.kind, self.scores = kind, (right, wrong, unanswered)
        self.read = kind if callable(kind) else KINDS[kind]

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], answer: Sequence[Any]
    ) -> list[float]:
        """Return a score for each response. answer: the column of that name.

        Raises:
            ValueError: A row has no answer, or the responses are token ids.
        """
        return [self._score(*row) for row in zip(responses, answer, strict=True)]

    def _score(self, response: str, answer: Any) -> float:
        if not isinstance(response, str):
            raise ValueError("answers are found in text: pass a tokenizer")
        right, wrong, unanswered = self.scores
        found = self.read(response)
        if found is None:
            return unanswered
        found, truth = (
            x.strip() if isinstance(x, str) else x for x in (found, self._truth(answer))
        )
        return right if found == truth else wrong

    def _truth(self, answer: Any) -> Any:
        """The right answer, from a row's column."""
        truth = answer
        if not callable(self.kind):
            plain = isinstance(answer, str | int | float) and not isinstance(answer, bool)
            truth = self.read(str(answer)) if plain else None
        if truth is None:
            wanted = NAMES.get(self.kind, "a value")
            raise ValueError(f"column 'answer' must hold {wanted}, got {shown(answer)}")
        return truth

    def describe(self) -> dict[str, Any]:
        """What reward it is, as JSON, see `describe_function`."""
        kind = describe_function(self.kind) if callable(self.kind) else self.kind
        return {"name": type(self).__name__, "kind": kind, "scores": self.scores}


def _boxed(text: str) -> str | None:
    r"""The content of the last \boxed{}, or None. Braces in it may be nested."""
    _, marker, after = text.rpartition("\\boxed{")
    depth = 1
    for i, char in enumerate(after if marker else ""):
        depth += (char == "{") - (char == "}")
        if not depth:
            return after[:i]
    return None


def _value(text: str, whole: bool = False) -> Fraction | None:
    """The number that a text spells. whole: The text must be nothing else."""
    if whole and not _NUMBER.fullmatch(text):
        return None
    plain = re.sub(r"[$,\s+]", "", text).replace("\u2212", "-")
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None
