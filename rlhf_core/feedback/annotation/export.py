"""Labels of several people to rows that train models, in the columns that TRL uses, too.

A ranking counts as a comparison of each two of its responses. Votes on a comparison become one
winner; ties, comparisons without a winner, and those on which people agree too little are left out,
and counted by reason.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rlhf_core.data.chat import Content
from rlhf_core.feedback.annotation.items import Item
from rlhf_core.feedback.annotation.labels import Comparison, Contents, Vote
from rlhf_core.feedback.dawid_skene import dawid_skene

FORMATS = ("preference", "ranked", "kto", "sft")
AGGREGATES = ("majority", "dawid-skene")
_NO_WINNER = {
    0: "ties",
    "both_bad": "both bad",
    "split": "without a majority",
    "low": "below the minimum agreement",
}

_SAME = 1e-5  # shares that differ by less lead to no winner

Row = dict[str, Any]


class Decision(NamedTuple):
    """What people decided about two responses of an item.

    Attributes:
        pair: The places of the responses in the item.
        winner: 1, 2, or a key of _NO_WINNER.
        agreement: Share of the votes for this outcome, or its probability under Dawid and Skene.
        smoothing: Probability that the loser is the better one, under Dawid and Skene; else None.
        votes: One vote a person.
    """

    item: Item
    pair: tuple[int, int]
    winner: int | str
    agreement: float
    smoothing: float | None
    votes: list[Vote]


def export_rows(
    contents: Contents, format: str, aggregate: str = "majority", min_agreement: float = 0.0
) -> tuple[list[Row], Counter[str]]:
    """Rows in one of FORMATS, in the order of the data, and what was left out, by reason.

    Args:
        contents: A database of labels.
        format: "preference": prompt, chosen, rejected, a margin from Likert labels, and with
            "dawid-skene" a label_smoothing. "ranked": prompt, responses, ranks. "kto": prompt,
            completion, label. "sft": prompt, completion, from texts that people wrote.
        aggregate: "majority" takes the most frequent outcome, "dawid-skene" the most likely one.
        min_agreement: Comparisons with less agreement are left out; from 0 to 1.

    Raises:
        ValueError: The mode of the labels does not fit the format, or no row is left.
    """
    mode = contents.settings.mode
    if (format == "sft") != (mode == "write"):
        wanted = "write" if format == "sft" else "pair, likert8 or rank"
        raise ValueError(f"--format {format} needs labels of --mode {wanted}, these are of {mode}")
    left_out: Counter[str] = Counter()
    if format == "sft":
        rows = _written(contents)
    else:
        decisions = _decide(contents, aggregate, min_agreement)
        make = {"preference": _preferences, "ranked": _rankings, "kto": _desirable}[format]
        rows = make(contents, decisions, left_out)
    if not rows:
        reasons = describe(left_out) or "there are no labels yet"
        raise ValueError(f"no row is left to export: {reasons}. Label more items")
    return rows, left_out


def describe(left_out: Counter[str]) -> str:
    """Counts by reason as text: "1 both bad, 2 ties"."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()) if count)


# ---- votes to decisions


def _decide(contents: Contents, aggregate: str, min_agreement: float) -> list[Decision]:
    """A decision on every comparison that anybody made, in the order of the data."""
    votes = contents.votes()
    shares = (_shares if aggregate == "majority" else _probabilities)(votes)
    position = {name: i for i, name in enumerate(contents.items)}
    decisions = []
    for name, pair in sorted(votes, key=lambda key: (position[key[0]], key[1])):
        (winner, most), *others = Counter(shares[name, pair]).most_common(2)
        if others and most - others[0][1] < _SAME:
            winner = "split"
        elif winner in (1, 2) and most < min_agreement:
            winner = "low"
        smoothing = None
        if aggregate == "dawid-skene" and winner in (1, 2):
            loser = shares[name, pair].get(3 - winner, 0.0)
            smoothing = loser / (loser + most)
        item = contents.items[name]
        decisions.append(Decision(item, pair, winner, most, smoothing, votes[name, pair]))
    return decisions


def _shares(votes: dict[Comparison, list[Vote]]) -> dict[Comparison, dict[int | str, float]]:
    """The share of votes for each outcome of each comparison."""
    shares = {}
    for key, given in votes.items():
        counts = Counter(outcome for _, outcome in given)
        shares[key] = {outcome: count / len(given) for outcome, count in counts.items()}
    return shares


def _probabilities(votes: dict[Comparison, list[Vote]]) -> dict[Comparison, dict[int | str, float]]:
    """The probability of each outcome of each comparison, after Dawid and Skene."""
    rows = [(key, row["annotator"], vote) for key, given in votes.items() for row, vote in given]
    fit = dawid_skene(rows)
    soft = (dict(zip(fit.categories, row)) for row in fit.soft_labels.tolist())
    return dict(zip(fit.items, soft))


def _won(decisions: Sequence[Decision], left_out: Counter[str]) -> Iterator[Decision]:
    """The decisions with a winner and two answers that are not empty; the rest is counted."""
    for decision in decisions:
        reason = _NO_WINNER.get(decision.winner)
        if not all(_has_text(decision.item.responses[i]) for i in decision.pair):
            reason = "with an empty answer"
        if reason is None:
            yield decision
        else:
            left_out[reason] += 1


# ---- decisions to rows


def _preferences(
    contents: Contents, decisions: Sequence[Decision], left_out: Counter[str]
) -> list[Row]:
    rows = []
    for item, pair, winner, agreement, smoothing, votes in _won(decisions, left_out):
        places = dict(zip(("chosen", "rejected"), pair if winner == 1 else pair[::-1]))
        row: Row = {"id": _comparison_id(item, pair), "prompt": item.prompt}
        row |= {name: _completion(item.prompt, item.responses[i]) for name, i in places.items()}
        if contents.settings.mode == "likert8":
            row["margin"] = _margin(winner, [label["choice"] for label, _ in votes])
        row["votes"] = dict(_votes(votes, ("chosen", "rejected"), winner))
        row["agreement"] = round(agreement, 6)
        if smoothing is not None:
            row["label_smoothing"] = round(smoothing, 6)
        for name, i in places.items():
            if "model" in item.sources[i]:
                row[f"{name}_model"] = item.sources[i]["model"]
            if contents.settings.criteria:
                row[f"{name}_ratings"] = _mean_ratings(contents, votes, i)
        rows.append(row)
    return rows


def _comparison_id(item: Item, pair: tuple[int, int]) -> str | int:
    """The item's id; in a list, with the numbers of the two responses, as for items of pairs."""
    if len(item.responses) == 2:
        return item.id
    return f"{item.row}:{item.numbers[pair[0]]}-{item.numbers[pair[1]]}"


def _margin(winner: int | str, choices: Sequence[int]) -> float:
    """Mean steps of the 8-point scale by which the winner is better: 0 (barely) to 3 (much).

    Source: Llama 2 (Touvron et al. 2023), whose reward model has a margin for each of four steps.
    """
    steps = [4 - choice if choice <= 4 else 5 - choice for choice in choices]  # > 0: the first won
    return max(0.0, statistics.fmean(steps) * (1 if winner == 1 else -1))


def _mean_ratings(contents: Contents, votes: Sequence[Vote], place: int) -> dict[str, float]:
    given = [label["ratings"] for label, _ in votes if label["ratings"]]
    return {
        name: statistics.fmean(ratings[name][place] for ratings in given)
        for name in contents.settings.criteria
        if given
    }


class _Standing:
    """How the responses to one prompt did, by the response's number in the row.

    Attributes:
        points: Comparisons won minus lost.
        votes: Of single people, in all comparisons of the response.
        compared: Number of comparisons.
    """

    def __init__(self, prompt: Content):
        self.prompt = prompt
        self.texts: dict[int, Content] = {}
        self.points: Counter[int] = Counter()
        self.votes: dict[int, Counter[str]] = defaultdict(Counter)
        self.compared = 0


def _standings(decisions: Iterable[Decision]) -> dict[str | int, _Standing]:
    standings: dict[str | int, _Standing] = {}
    for item, pair, winner, *_, votes in decisions:
        standing = standings.setdefault(item.row, _Standing(item.prompt))
        standing.compared += 1
        for place, own, other in ((pair[0], 1, 2), (pair[1], 2, 1)):
            number = item.numbers[place]
            standing.texts[number] = item.responses[place]
            standing.points[number] += (winner == own) - (winner == other)
            standing.votes[number].update(_votes(votes, ("won", "lost"), own))
    return standings


def _votes(votes: Sequence[Vote], names: tuple[str, str], own: int | str) -> Counter[str]:
    """Votes by name: for the response whose outcome is `own`, for the other one, and for none."""
    counts = Counter(outcome for _, outcome in votes)
    keys = (own, 1 if own == 2 else 2, 0, "both_bad")
    return Counter({name: counts[key] for name, key in zip((*names, "tie", "both_bad"), keys)})


def _rankings(
    contents: Contents, decisions: Sequence[Decision], left_out: Counter[str]
) -> list[Row]:
    """Responses by points. Where points are equal, the first response stays.

    A list is left out if people were undecided on a pair of it.
    """
    rows = []
    known = [decision for decision in decisions if decision.winner not in ("split", "low")]
    for name, standing in _standings(known).items():
        texts = {number: standing.texts[number] for number in sorted(standing.texts)}
        if standing.compared < len(texts) * (len(texts) - 1) // 2:
            left_out["lists with an undecided pair"] += 1
            continue
        distinct: dict[int, int] = {}  # points -> number
        for number, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                left_out["answers that are empty or messages"] += 1
            elif standing.points[number] in distinct:
                left_out["tied answers"] += 1
            else:
                distinct[standing.points[number]] = number
        if len(distinct) > 1:
            order = [distinct[points] for points in sorted(distinct, reverse=True)]
            row: Row = {"id": name, "prompt": standing.prompt}
            row |= {"responses": [texts[number] for number in order]}
            row |= {"ranks": list(range(1, len(order) + 1))}
            rows.append(row | {"votes": [dict(standing.votes[number]) for number in order]})
    return rows


def _desirable(
    contents: Contents, decisions: Sequence[Decision], left_out: Counter[str]
) -> list[Row]:
    """A response is desirable if it won more comparisons than it lost."""
    rows = []
    for name, standing in _standings(_won(decisions, left_out)).items():
        for number, text in sorted(standing.texts.items()):
            points = standing.points[number]
            if points == 0:
                left_out["answers that won as often as they lost"] += 1
                continue
            row: Row = {"id": f"{name}:{number}", "prompt": standing.prompt}
            row |= {"completion": _completion(standing.prompt, text), "label": points > 0}
            rows.append(row | {"votes": dict(standing.votes[number])})
    return rows


def _written(contents: Contents) -> list[Row]:
    position = {name: i for i, name in enumerate(contents.items)}
    rows = []
    for label in sorted(contents.labels(), key=lambda row: position[row["item"]]):
        item = contents.items[label["item"]]
        row = {"id": item.id, "prompt": item.prompt}
        row["completion"] = _completion(item.prompt, label["choice"])
        rows.append(row | {"annotator": label["annotator"]})
    return rows


def _completion(prompt: Content, text: Content) -> Content:
    """After a prompt of messages a completion is a message, as TRL wants it."""
    if isinstance(prompt, str) or not isinstance(text, str):
        return text
    return [{"role": "assistant", "content": text}]


def _has_text(content: Content) -> bool:
    return not isinstance(content, str) or bool(content.strip())
