"""Signs, while people label, that a person or the guidelines need attention.

A flag is a reason to talk with somebody, not a verdict: its text gives the count behind it.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_core.data.chat import texts_of
from rlhf_core.feedback.agreement import krippendorff_alpha
from rlhf_core.feedback.annotation.items import Item, is_right, outcomes
from rlhf_core.feedback.annotation.labels import Contents, Vote, read_labels, seconds_of
from rlhf_core.files import shown
from rlhf_core.significance import sign_test

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
        seconds = None if person["median_ms"] is None else person["median_ms"] / 1000
        pace = "" if seconds is None else f", {seconds:.1f} s an item"
        lines.append(f"{name}: {person['labels']} labels, {person['skips']} skips{pace}")
    if report["alpha"] is not None:
        lines.append(f"Krippendorff's alpha: {report['alpha']:.2f}")
    return lines + alert_lines(report)


def alert_lines(report: dict[str, Any]) -> list[str]:
    """Flags and warnings alone, as lines of text."""
    people = report["annotators"].items()
    flags = [f"{name} {flag}" for name, person in people for flag in person["flags"]]
    return [f"warning: {text}" for text in flags + report["warnings"]]


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
    return f"gave {fast} of {len(timed)} labels faster than anybody reads the texts"


def _characters(item: Item) -> int:
    return sum(len(text) for part in (item.prompt, *item.responses) for text in texts_of(part))


def _one_side(mode: str, labels: Sequence[Row]) -> str:
    """The choices of the left and the right one differ, by a binomial test at 0.001."""
    if mode not in ("pair", "likert8"):
        return ""
    winners = [(outcomes(mode, row["choice"])[0, 1], row["shown"]) for row in labels]
    chose_left = [(1, 2).index(x) == shown[0] for x, shown in winners if shown and x in (1, 2)]
    left, right = sum(chose_left), len(chose_left) - sum(chose_left)
    p = sign_test(left, right)
    if p is None or p >= 0.001:
        return ""
    side = "left" if left > right else "right"
    n = left + right
    return f"chose the {side} answer in {max(left, right)} of {n} items (binomial p {p:.1g})"


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
    signs = []
    paces = [[row["ms"] for row in part if row["ms"] is not None] for part in (first, last)]
    if all(paces):
        early, late = (statistics.median(part) / 1000 for part in paces)
        if late > 1.5 * early:
            signs.append(f"{early:.1f} s an item at first, {late:.1f} s at the end")
    shares = [[agreed[row["id"]] for row in part if row["id"] in agreed] for part in (first, last)]
    if all(shares):
        early, late = map(statistics.fmean, shares)
        if late < early - 0.2:
            signs.append(f"agreed with others in {early:.0%} at first, in {late:.0%} at the end")
    return f"may be tired, within a session: {'; '.join(signs)}" if signs else ""


def _sessions(labels: Sequence[Row]) -> list[list[Row]]:
    sessions: list[list[Row]] = []
    before = -math.inf
    for row in labels:
        now = seconds_of(row["time"])
        if now - before > _SESSION_PAUSE:
            sessions.append([])
        sessions[-1].append(row)
        before = now
    return sessions


# ---- agreement


def _agreed_with_others(contents: Contents) -> dict[str, float]:
    """For each label that others gave, too: the share of comparisons in which they agree."""
    agreed: dict[str, list[bool]] = defaultdict(list)
    for votes in contents.votes().values():
        for row, outcome in votes:
            agreed[row["id"]] += [outcome == theirs for other, theirs in votes if other is not row]
    return {name: statistics.fmean(values) for name, values in agreed.items() if values}


def _agreement(contents: Contents) -> tuple[float | None, list[str]]:
    """Krippendorff's alpha of all comparisons, and a warning where it stays low.

    It stays low if it is at most 0.4 in both halves of the comparisons that two people made, of
    which there are at least 20.
    """
    shared = {key: votes for key, votes in contents.votes().items() if len(votes) > 1}
    votes, half = list(shared.values()), len(shared) // 2
    alpha, *halves = map(_alpha, (votes, votes[:half], votes[half:]))
    if len(shared) < 20 or not all(x is not None and x <= LOW_AGREEMENT for x in halves):
        return alpha, []
    split = [shown(item) for (item, _), given in shared.items() if len({x for _, x in given}) > 1]
    examples = ", ".join(dict.fromkeys(split[-5:]))
    return alpha, [
        f"agreement stays low (alpha {halves[0]:.2f}, then {halves[1]:.2f}). Pause, talk about "
        f"items such as {examples}, and add them to the guidelines as corner cases"
    ]


def _alpha(comparisons: Sequence[Sequence[Vote]]) -> float | None:
    outcomes_of = [{row["annotator"]: outcome for row, outcome in votes} for votes in comparisons]
    people = sorted({name for given in outcomes_of for name in given})
    if not people:
        return None
    return krippendorff_alpha([[given.get(name) for given in outcomes_of] for name in people])
