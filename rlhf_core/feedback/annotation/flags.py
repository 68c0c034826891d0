"""Signs, while people label, that a person or the guidelines need attention.

A flag is a reason to talk with somebody, not a verdict: its text gives the count behind it.
"""

from __future__ import annotations

import datetime
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_core.feedback.agreement import krippendorff_alpha
from rlhf_core.feedback.annotation.items import Item, is_right, outcomes
from rlhf_core.feedback.annotation.labels import Contents, read_labels
from rlhf_core.files import shown

CHARACTERS_PER_SECOND = 100  # of text; 1,200 words a minute, which nobody reads
LOW_AGREEMENT = 0.4  # the threshold below which guidelines are to be rewritten
_SESSION_PAUSE = 1800  # seconds without a label that end a session

Row = dict[str, Any]


def summary(db: Path) -> dict[str, Any]:
    """What has been labelled so far, what looks wrong, and whether to pause: for JSON.

    Returns:
        `items` and `labels`, their numbers; `annotators`: for each person the numbers of labels,
        skips, and gold questions answered and missed, the median milliseconds of an item, and
        flags as text; `alpha`: Krippendorff's alpha of all labels, or None; `warnings` as text.
    """
    contents = read_labels(db)
    rows_of: dict[str, list[Row]] = defaultdict(list)
    for row in contents.rows:
        rows_of[row["annotator"]].append(row)
    agreed = _agreed_with_others(contents)
    people = {name: _person(contents, rows, agreed) for name, rows in sorted(rows_of.items())}
    alpha, warnings = _agreement(contents)
    return {
        "items": sum(not item.ranks for item in contents.items.values()),
        "labels": len(contents.labels()),
        "annotators": people,
        "alpha": alpha,
        "warnings": warnings,
    }


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The summary as lines of text."""
    lines = [f"{report['labels']} labels of {report['items']} items"]
    for name, person in report["annotators"].items():
        pace = (
            "" if person["median_ms"] is None else f", {person['median_ms'] / 1000:.1f} s an item"
        )
        lines.append(f"{name}: {person['labels']} labels, {person['skips']} skips{pace}")
        lines += [f"{name}: {flag}" for flag in person["flags"]]
    if report["alpha"] is not None:
        lines.append(f"Krippendorff's alpha: {report['alpha']:.2f}")
    return lines + [f"warning: {text}" for text in report["warnings"]]


def _person(contents: Contents, rows: Sequence[Row], agreed: dict[str, float]) -> dict[str, Any]:
    labels = [row for row in rows if row["kind"] == "label"]
    gold = [row for row in labels if row["gold"]]
    mode, items = contents.settings.mode, contents.items
    missed = [row for row in gold if not is_right(items[row["item"]], mode, row["choice"])]
    times = [row["ms"] for row in labels if row["ms"] is not None]
    flags = [
        _missed_gold(len(missed), len(gold)),
        _haste(items, labels),
        _one_side(mode, labels),
        _fatigue(labels, agreed),
    ]
    return {
        "labels": len(labels) - len(gold),
        "skips": len(rows) - len(labels),
        "gold": len(gold),
        "gold_missed": len(missed),
        "median_ms": statistics.median(times) if times else None,
        "flags": [flag for flag in flags if flag],
    }


def _missed_gold(missed: int, asked: int) -> str:
    """At least 3 questions, and more than 3 in 10 missed."""
    few = asked < 3 or missed <= 0.3 * asked
    return "" if few else f"missed {missed} of {asked} gold questions"


def _haste(items: dict[Any, Item], labels: Sequence[Row]) -> str:
    """At least 3 labels, and more than 1 in 10, faster than their texts can be read."""
    timed = [row for row in labels if row["ms"] is not None]
    fast = sum(
        row["ms"] < 1000 * _characters(items[row["item"]]) / CHARACTERS_PER_SECOND for row in timed
    )
    if fast < 3 or fast <= 0.1 * len(timed):
        return ""
    return f"{fast} of {len(timed)} labels came faster than anybody reads the texts"


def _characters(item: Item) -> int:
    texts = [item.prompt, *item.responses]
    return sum(
        len(text) if isinstance(text, str) else sum(len(turn["content"]) for turn in text)
        for text in texts
    )


def _one_side(mode: str, labels: Sequence[Row]) -> str:
    """The choices of the left and the right one differ, by a binomial test at 0.001."""
    if mode not in ("pair", "likert8"):
        return ""
    chose_left = [
        outcomes(mode, row["choice"])[0, 1] - 1 == row["shown"][0]
        for row in labels
        if row["shown"] and outcomes(mode, row["choice"])[0, 1] in (1, 2)
    ]
    left, n = sum(chose_left), len(chose_left)
    if n == 0 or binomial_p(left, n) >= 0.001:
        return ""
    side, count = ("left", left) if 2 * left > n else ("right", n - left)
    return f"chose the {side} answer in {count} of {n} items (binomial p {binomial_p(left, n):.1g})"


def binomial_p(successes: int, n: int) -> float:
    """Two-sided p of an exact binomial test against one half."""
    tail = sum(math.comb(n, k) for k in range(min(successes, n - successes) + 1))
    return min(1.0, 2 * tail / 2**n)


def _fatigue(labels: Sequence[Row], agreed: dict[str, float]) -> str:
    """The last third of sessions against the first: slower by half, or 20 points less agreement.

    Sessions of at least 30 labels count.
    """
    first: list[Row] = []
    last: list[Row] = []
    for session in _sessions(labels):
        third = len(session) // 3
        if third >= 10:
            first += session[:third]
            last += session[-third:]
    found = []
    paces = [
        _mean([row["ms"] for row in part if row["ms"] is not None], statistics.median)
        for part in (first, last)
    ]
    if None not in paces and paces[1] > 1.5 * paces[0]:
        found.append(
            f"{paces[0] / 1000:.1f} s an item at first, {paces[1] / 1000:.1f} s at the end"
        )
    shares = [
        _mean([agreed[row["id"]] for row in part if row["id"] in agreed]) for part in (first, last)
    ]
    if None not in shares and shares[1] < shares[0] - 0.2:
        found.append(
            f"agreed with others in {shares[0]:.0%} at first, in {shares[1]:.0%} at the end"
        )
    return f"may be tired, within a session: {'; '.join(found)}" if found else ""


def _sessions(labels: Sequence[Row]) -> list[list[Row]]:
    sessions: list[list[Row]] = []
    before = -math.inf
    for row in labels:
        now = datetime.datetime.fromisoformat(row["time"]).timestamp()
        if now - before > _SESSION_PAUSE:
            sessions.append([])
        sessions[-1].append(row)
        before = now
    return sessions


def _mean(values: Sequence[float], mean=statistics.fmean) -> float | None:
    return mean(values) if values else None


# ---- agreement


def _votes(contents: Contents) -> dict[tuple, dict[str, Row]]:
    """For each two responses of an item that somebody compared: person to (row, outcome)."""
    votes: dict[tuple, dict[str, Any]] = defaultdict(dict)
    if contents.settings.mode != "write":
        for row in contents.labels():
            for pair, outcome in outcomes(contents.settings.mode, row["choice"]).items():
                votes[row["item"], pair][row["annotator"]] = (row, outcome)
    return votes


def _agreed_with_others(contents: Contents) -> dict[str, float]:
    """For each label that others gave, too: the share of comparisons in which they agree."""
    pairs: dict[str, list[bool]] = defaultdict(list)
    for given in _votes(contents).values():
        for person, (row, outcome) in given.items():
            pairs[row["id"]] += [
                outcome == theirs for other, (_, theirs) in given.items() if other != person
            ]
    return {name: statistics.fmean(values) for name, values in pairs.items() if values}


def _agreement(contents: Contents) -> tuple[float | None, list[str]]:
    """Krippendorff's alpha of all comparisons, and a warning where it stays low.

    It stays low if it is at most 0.4 in both halves of the comparisons that two people made, of
    which there are at least 20.
    """
    shared = [
        (name, {person: outcome for person, (_, outcome) in given.items()})
        for name, given in _votes(contents).items()
        if len(given) > 1
    ]
    half = len(shared) // 2
    alpha, *halves = (_alpha(part) for part in (shared, shared[:half], shared[half:]))
    if len(shared) < 20 or not all(x is not None and x <= LOW_AGREEMENT for x in halves):
        return alpha, []
    split = [shown(item) for (item, _), given in shared if len(set(given.values())) > 1]
    examples = ", ".join(dict.fromkeys(split[-5:]))
    return alpha, [
        f"agreement stays low (alpha {halves[0]:.2f}, then {halves[1]:.2f}). Pause, talk about "
        f"items such as {examples}, and add them to the guidelines as corner cases"
    ]


def _alpha(shared: Sequence[tuple[Any, dict[str, Any]]]) -> float | None:
    people = sorted({person for _, given in shared for person in given})
    if not people:
        return None
    return krippendorff_alpha([[given.get(name) for _, given in shared] for name in people])
