"""Candidates to items, the units that a person labels; the side on which a response is shown.

A choice means something only together with the order in which the responses were shown. `unblind`
turns it into a statement about the responses in the order of the data.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf_core.data import Candidates
from rlhf_core.data.chat import Content
from rlhf_core.files import shown

MODES = ("pair", "likert8", "rank", "write")
MAX_RATING = 5


class Item(NamedTuple):
    """What a person sees at once.

    Attributes:
        id: The row's id, with the numbers of two responses ("7:0-2") if the row has more pairs.
        row: The row's id in the data.
        numbers: The place in the row of each response.
        responses: Their texts or messages, in the order of the row.
        sources: What the row says about each response, such as its model: never shown.
        ranks: One for each response where the right answer is known (a gold question), else None.
        warning: What to show before the item, or None.
    """

    id: str | int
    row: str | int
    prompt: Content
    numbers: list[int]
    responses: list[Content]
    sources: list[dict[str, Any]]
    ranks: list[float] | None = None
    warning: str | None = None


def make_items(rows: Sequence[Candidates], mode: str, gold: bool = False) -> list[Item]:
    """The items of the rows in a mode. Each pair of distinct texts is an item of "pair", "likert8".

    In "rank" a row is an item without its repeated texts, in "write" a row is an item. A row
    without an id gets a digest of its content. Rows with too few texts, and repeated rows without
    an id, give no item.

    Raises:
        ValueError: Two rows have one id, or a gold row has no right answer.
    """
    items: dict[str | int, Item] = {}
    digests, names = set(), set()
    for row in rows:
        name = row.id
        if name is None:
            content = json.dumps([row.prompt, row.responses], sort_keys=True)
            name = hashlib.sha256(content.encode()).hexdigest()[:12]
            if name in digests:
                continue
            digests.add(name)
        if name in names:
            raise ValueError(f"two rows have the id {shown(name)}. Give each row an id of its own")
        names.add(name)
        texts = [response["text"] for response in row.responses]
        distinct = [i for i, text in enumerate(texts) if text not in texts[:i]]
        if mode in ("pair", "likert8"):
            groups = [list(pair) for pair in itertools.combinations(distinct, 2)]
        else:
            groups = [distinct] if mode == "write" or len(distinct) > 1 else []
        for numbers in groups:
            key = name if len(groups) == 1 else f"{name}:{numbers[0]}-{numbers[1]}"
            ranks = [row.ranks[i] for i in numbers] if gold and row.ranks else None
            if gold and (mode == "write" or ranks is None or len(set(ranks)) == 1):
                raise ValueError(
                    f"gold row {shown(name)} has no right answer. Give it chosen and rejected, or "
                    "responses and ranks; texts to write have none"
                )
            if key in items:
                raise ValueError(f"two items have the id {shown(key)}. Rename one of their rows")
            sources = [{k: v for k, v in row.responses[i].items() if k != "text"} for i in numbers]
            answers = [texts[i] for i in numbers]
            items[key] = Item(key, name, row.prompt, numbers, answers, sources, ranks, row.warning)
    return list(items.values())


# ---- blinding


def display_order(seed: int, item: str | int, annotator: str, count: int) -> list[int]:
    """The responses' numbers from left to right, as this person sees them.

    Two responses are swapped if the first bit of the SHA-256 of the UTF-8 bytes of
    "{seed}:{item}:{annotator}" is 1. More of them are sorted by the SHA-256 of
    "{seed}:{item}:{annotator}:{number}".
    """
    key = f"{seed}:{item}:{annotator}"
    if count == 2:
        return [1, 0] if _sha256(key)[0] & 0x80 else [0, 1]
    return sorted(range(count), key=lambda i: _sha256(f"{key}:{i}"))


def _sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def unblind(mode: str, choice: Any, order: Sequence[int]) -> int | str | list[int]:
    """What a choice about responses shown in this order says about them in the order of the data.

    Args:
        mode: One of MODES.
        choice: "pair": 1 left, 2 right, 0 tie, "both_bad". "likert8": 1 (left is much better) to 8
            (right is much better). "rank": a rank for each response, 1 is the best, ties allowed.
            "write": the text.
        order: From `display_order`.

    Raises:
        ValueError: The mode has no such choice.
    """
    swapped, whole = list(order) == [1, 0], type(choice) is int
    if mode == "pair":
        if choice == "both_bad" or (whole and choice == 0):
            return choice
        if whole and choice in (1, 2):
            return 3 - choice if swapped else choice
        raise ValueError(f'choice must be 1, 2, 0 or "both_bad", got {shown(choice)}')
    if mode == "likert8":
        if not whole or not 1 <= choice <= 8:
            raise ValueError(f"choice must be a whole number from 1 to 8, got {shown(choice)}")
        return 9 - choice if swapped else choice
    if mode == "rank":
        return _reordered(choice, order, len(order), "ranks")
    if not isinstance(choice, str) or not choice.strip():
        raise ValueError(f"text must be a string that is not empty, got {shown(choice)}")
    return choice


def unblind_ratings(
    ratings: Any, criteria: Sequence[str], order: Sequence[int]
) -> dict[str, list[int]]:
    """Ratings of each response by criterion, in the order of the data.

    Args:
        ratings: For each criterion a list: a number from 1 to 5 for each response as shown.
        criteria: Names of the criteria that must be rated.
        order: From `display_order`.

    Raises:
        ValueError: A rating is missing, unknown or out of range.
    """
    given = {} if ratings is None else ratings
    if not isinstance(given, dict) or given.keys() != set(criteria):
        raise ValueError(f"ratings must be given for {list(criteria)}, got {shown(given)}")
    return {
        name: _reordered(given[name], order, MAX_RATING, f"ratings of {name!r}")
        for name in criteria
    }


def _reordered(values: Any, order: Sequence[int], most: int, what: str) -> list[int]:
    """Numbers from 1 to `most`, one for each response as shown, in the order of the data."""
    right = isinstance(values, list) and len(values) == len(order)
    if not right or not all(type(x) is int and 1 <= x <= most for x in values):
        raise ValueError(
            f"{what} must be a list of {len(order)} numbers from 1 to {most}, got {shown(values)}"
        )
    by_number = dict(zip(order, values))
    return [by_number[i] for i in range(len(order))]


# ---- what a choice says


def outcomes(mode: str, choice: Any) -> dict[tuple[int, int], int | str]:
    """For each two responses of an item: 1 or 2 (which is better), 0 (tie) or "both_bad".

    Args:
        mode: "pair", "likert8" or "rank".
        choice: Unblinded.
    """
    if mode == "rank":
        pairs = itertools.combinations(range(len(choice)), 2)
        return {(i, j): _winner(choice[i], choice[j]) for i, j in pairs}
    if mode == "likert8":
        choice = 1 if choice <= 4 else 2
    return {(0, 1): choice}


def _winner(first: float, second: float) -> int:
    return 0 if first == second else 1 if first < second else 2


def is_right(item: Item, mode: str, choice: Any) -> bool:
    """Whether an unblinded choice on a gold question agrees with its ranks."""
    return outcomes(mode, choice) == outcomes("rank", item.ranks)
