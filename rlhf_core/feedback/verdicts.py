"""The verdict in a judge's reply: which of two options it names, or a tie.

Only a statement of a verdict counts: JSON, [[A]], "Winner: A", or a reply that starts with the
option. Anything else, such as a refusal or two verdicts that differ, is no verdict, never a tie.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

TIE = "tie"
_TIES = r"(?i:tied?|draw|equal)"
_NAMES = r"(?i:winner|verdict|better|answer|choice|preference)"
_STATED = r"\b(?i:winner|verdict|(?:better|best) (?:one|answer|response)|answer|choice|preference)"
_SIDE = r"(?i:(?:answer|response|option|assistant)\s+)?"
# What may follow an option. "A" is also an article, and "(A) and (B) are alike" names neither.
_END = (
    r"(?=\s*(?:$|[.:;!\n]|,? (?i:because|since|as)\b|(?i:wins|(?:is|was) "
    r"(?:(?:the|much|clearly|slightly) )*(?:better|best|winner|preferable))\b)"
    r"|(?<=[\])])\s+(?!(?i:and|or|nor|is|are)\b))"
)


class Reply(NamedTuple):
    """What a model wrote, and for each token its text and the log-probs (nats) of likely tokens."""

    text: str
    tokens: Sequence[tuple[str, Mapping[str, float]]] = ()


def find_verdict(text: str, options: Sequence[str] = ("A", "B")) -> tuple[str, int] | None:
    """The option that a reply names, or `TIE`, and where in the text; None for no verdict."""
    patterns = _patterns(tuple(options))
    if text.lstrip("` \n").removeprefix("json").lstrip().startswith("{"):
        patterns = patterns[:1]  # other fields of the object may quote anything
    for pattern in patterns:
        found = {
            match["verdict"] if match["verdict"] in options else TIE: match.start("verdict")
            for match in pattern.finditer(text)
        }
        if found:
            return found.popitem() if len(found) == 1 else None
    return None


@functools.cache
def _patterns(options: tuple[str, ...]) -> list[re.Pattern]:
    names = "|".join(map(re.escape, options))
    one = rf"(?P<verdict>{names}|{_TIES})(?!\w)"
    marked = rf"[\[(\"'*]*{one}[\])\"'*]*{_END}"
    return [
        re.compile(rf'"{_NAMES}"\s*:\s*"[\s\[(]*{one}'),
        re.compile(rf"\[\[\s*{one}\s*\]\]"),
        re.compile(rf"{_STATED}\W{{0,3}}\s*(?::|=|\bis\b:?)\s*{_SIDE}{marked}"),
        re.compile(rf"\A\s*{_SIDE}{marked}"),
    ]


def probability_of_first(reply: Reply, options: tuple[str, str] = ("A", "B")) -> float | None:
    """The probability that the first option is better, or None for a reply without a verdict.

    It is that of the first option's token against the second's, where the verdict stands. An option
    outside the listed tokens has at most the probability of the rarest of them, and at most what
    all of them leave, and counts with that. Without log-probs a verdict is 1, 0 or a tie.
    """
    verdict = find_verdict(reply.text, options)
    if verdict is None:
        return None
    option, place = verdict
    if option == TIE:
        return 0.5
    listed = _listed_at(reply.tokens, place)
    likely = [sum(p for token, p in listed.items() if _bare(token) == name) for name in options]
    if not likely[options.index(option)]:
        return float(option == options[0])
    unlisted = min(*listed.values(), max(0.0, 1 - sum(listed.values())))
    first, second = (p or unlisted for p in likely)
    return first / (first + second)


def _listed_at(tokens: Sequence[tuple[str, Mapping[str, float]]], place: int) -> dict[str, float]:
    """The probabilities of the likely tokens at a character of the reply."""
    end = 0
    for text, logprobs in tokens:
        end += len(text)
        if place < end:
            return {token: math.exp(x) for token, x in logprobs.items() if x <= 0}
    return {}


def _bare(token: str) -> str:
    return token.strip(" \n\t([\"'*])")
