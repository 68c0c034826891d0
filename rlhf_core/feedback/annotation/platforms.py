"""Tasks for Label Studio and Argilla, and labels back from their exports.

Tasks hold the texts and nothing else: no model, and the responses in an order by the item's digest.
On the way back, the texts say which response was left, so that a platform may reorder nothing
without notice. Left out: requests to a server; both platforms read and write files.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from rlhf_core.data.chat import Content
from rlhf_core.feedback.annotation.items import (
    MAX_RATING,
    Item,
    display_order,
    unblind,
    unblind_ratings,
)
from rlhf_core.feedback.annotation.labels import Settings, iso, seconds_of
from rlhf_core.files import Replacement, dump_json, read_json, shown

PLATFORMS = ("label-studio", "argilla")
_PAIR = {"left": 1, "right": 2, "tie": 0, "both_bad": "both_bad"}
_PAIR_TEXTS = {
    "left": "Left is better",
    "right": "Right is better",
    "tie": "Tie",
    "both_bad": "Both are bad",
}
_STEPS = ("much better", "better", "slightly better", "barely better")
_SIDES = [f"left is {step}" for step in _STEPS] + [f"right is {step}" for step in _STEPS[::-1]]
_LIKERT = {str(i): f"{i}: {text}" for i, text in enumerate(_SIDES, start=1)}

_PROMPT = """\
  <Header value="Prompt" size="5"/>
  <Text name="prompt" value="$prompt"/>
"""
_PAIRWISE = """\
  <Pairwise name="better" toName="left,right"/>
  <Header value="Click on the better answer, or choose:" size="5"/>
  <Choices name="neither" toName="prompt" choice="single" showInline="true">
    <Choice value="Tie" alias="tie"/>
    <Choice value="Both are bad" alias="both_bad"/>
  </Choices>
"""
_RANK = """\
  <List name="answers" value="$answers" title="Drag the best answer to the top"/>
  <Ranker name="rank" toName="answers"/>
"""
_ANSWERS = """\
  <List name="answers" value="$answers" title="Answers of models"/>
"""
_WRITE = """\
  <TextArea name="text" toName="prompt" rows="8" maxSubmissions="1"/>
"""

Row = dict[str, Any]


# ---- to a platform


def write_tasks(
    platform: str, items: Sequence[Item], settings: Settings, out: Path, config: Path
) -> None:
    """Write tasks for one of PLATFORMS to `out`, and the settings of its project to `config`."""
    tasks, made = (label_studio if platform == "label-studio" else argilla)(items, settings)
    with Replacement(out.parent) as files:
        for path, value in ((config, made), (out, tasks)):
            file = files.open(path.name)
            file.write(value.encode()) if isinstance(value, str) else dump_json(file, value)


def label_studio(items: Sequence[Item], settings: Settings) -> tuple[list[Row], str]:
    """Tasks for Label Studio, and the labelling configuration to paste into its project."""
    if settings.criteria and settings.mode == "rank":
        raise ValueError(
            "Label Studio rates no answers of a list. Remove --criteria, or use --format argilla"
        )
    tasks = []
    for item in items:
        order = display_order(settings.seed, item.id, "label-studio", len(item.responses))
        data: Row = {"item": item.id, "prompt": _as_text(item.prompt)}
        texts = [_as_text(item.responses[i]) for i in order]
        if settings.mode in ("pair", "likert8"):
            data["left"], data["right"] = texts
        else:
            data["answers"] = [
                {"id": str(place), "title": f"Answer {place}", "body": text}
                for place, text in enumerate(texts, start=1)
            ]
        tasks.append({"data": data})
    return tasks, _label_studio_view(settings, any(item.responses for item in items))


def _label_studio_view(settings: Settings, has_answers: bool) -> str:
    """The XML of a labelling interface."""
    if settings.mode == "rank":
        body = _RANK
    elif settings.mode == "write":
        body = _ANSWERS * has_answers + _WRITE
    else:
        columns = "".join(_column(side, settings.criteria) for side in ("left", "right"))
        choice = _PAIRWISE if settings.mode == "pair" else _likert()
        body = f'  <View style="display: flex; gap: 2em">\n{columns}  </View>\n{choice}'
    return f"<View>\n{_PROMPT}{body}</View>\n"


def _column(side: str, criteria: Sequence[str]) -> str:
    ratings = "".join(
        f'      <Header value={quoteattr(criterion)} size="5"/>\n'
        f'      <Rating name={quoteattr(f"{criterion}:{side}")} toName="{side}" '
        f'maxRating="{MAX_RATING}" required="true"/>\n'
        for criterion in criteria
    )
    return (
        f'    <View style="flex: 1">\n      <Header value="{side.title()} answer" size="5"/>\n'
        f'      <Text name="{side}" value="${side}"/>\n{ratings}    </View>\n'
    )


def _likert() -> str:
    choices = "".join(f'    <Choice value="{text}" alias="{i}"/>\n' for i, text in _LIKERT.items())
    options = 'toName="prompt" choice="single-radio" required="true"'
    return f'  <Choices name="choice" {options}>\n{choices}  </Choices>\n'


def argilla(items: Sequence[Item], settings: Settings) -> tuple[list[Row], Row]:
    """Records for Argilla (`dataset.records.from_json`), and settings (`Settings.from_json`)."""
    most = max(len(item.responses) for item in items)
    if settings.mode in ("pair", "likert8"):
        names = ["left", "right"]
    else:
        names = [f"answer_{place}" for place in range(1, most + 1)]
    records = []
    for item in items:
        order = display_order(settings.seed, item.id, "argilla", len(item.responses))
        texts = {name: _as_text(item.responses[i]) for name, i in zip(names, order)}
        texts = {"prompt": _as_text(item.prompt)} | texts
        records.append({"id": str(item.id), "fields": texts, "metadata": {"item": item.id}})
    fields = [
        _part(name, {"type": "text", "use_markdown": False}, required=name == "prompt")
        for name in ("prompt", *names)
    ]
    questions = [_argilla_question(settings.mode, names)]
    ratings = {"type": "rating", "options": [{"value": i} for i in range(1, MAX_RATING + 1)]}
    questions += [
        _part(f"{criterion}_{name}", ratings) for criterion in settings.criteria for name in names
    ]
    return records, {"fields": fields, "questions": questions, "allow_extra_metadata": True}


def _argilla_question(mode: str, names: Sequence[str]) -> Row:
    if mode == "rank":
        texts = {name: name.replace("_", " ").capitalize() for name in names}
        return _part("rank", _options("ranking", texts))
    if mode == "write":
        return _part("text", {"type": "text", "use_markdown": False})
    return _part("choice", _options("label_selection", _PAIR_TEXTS if mode == "pair" else _LIKERT))


def _part(name: str, settings: Row, required: bool = True) -> Row:
    title = name.replace("_", " ").capitalize()
    return {"name": name, "title": title, "required": required, "settings": settings}


def _options(kind: str, texts: dict[str, str]) -> Row:
    options = [{"value": value, "text": text} for value, text in texts.items()]
    return {"type": kind, "options": options}


def _as_text(content: Content) -> str:
    """A conversation as text, with the role before each turn."""
    if isinstance(content, str):
        return content
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in content)


# ---- from a platform


def read_platform(path: Path, items: dict[str | int, Item], settings: Settings) -> list[Row]:
    """Labels in an export of Label Studio (JSON) or Argilla (`records.to_json`).

    Returns:
        Rows for `LabelStore.add_imported`.

    Raises:
        ValueError: The file is neither, or an entry of it is not about an item of these.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not all(isinstance(x, dict) for x in entries):
        raise ValueError(f"{path}: must hold a JSON list of tasks or records, got {shown(entries)}")
    rows: list[Row] = []
    for i, entry in enumerate(entries, start=1):
        try:
            if "annotations" in entry:
                rows += _from_label_studio(entry, items, settings)
            elif "responses" in entry:
                rows += _from_argilla(entry, items, settings)
            else:
                raise ValueError(
                    "has neither annotations (Label Studio's JSON) nor responses (Argilla's)"
                )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fault = error if type(error) is ValueError else f"field {error} is missing or wrong"
            raise ValueError(f"{path}: entry {i}: {fault}") from None
    return rows


def _item_of(name: Any, items: dict[str | int, Item]) -> Item:
    if type(name) not in (str, int) or name not in items:
        raise ValueError(
            f"item {shown(name)} is not in the database. Import into the --db of its data"
        )
    return items[name]


def _order_of(item: Item, texts: Sequence[str]) -> list[int]:
    """The responses' numbers in the order of these texts."""
    known = [_as_text(response) for response in item.responses]
    if sorted(texts) != sorted(known):
        raise ValueError(f"the answers of item {shown(item.id)} differ from those in the database")
    return [known.index(text) for text in texts]


def _from_label_studio(task: Row, items: dict, settings: Settings) -> Iterator[Row]:
    data = task["data"]
    item = _item_of(data["item"], items)
    for annotation in task["annotations"]:
        updated = iso(seconds_of(annotation.get("updated_at") or annotation["created_at"]))
        by = annotation["completed_by"]
        by = (by.get("email") or by["id"]) if isinstance(by, dict) else by
        if not isinstance(by, str | int):
            raise ValueError(f"field 'completed_by' must be a name or an id, got {shown(by)}")
        seconds = annotation.get("lead_time")
        row = {
            "id": f"label-studio:{annotation['id']}:{updated}",
            "item": item.id,
            "annotator": str(by),
            "time": updated,
            "ms": None if seconds is None else round(1000 * seconds),
        }
        if annotation.get("was_cancelled") or not annotation["result"]:
            yield row | {"kind": "skip"}
            continue
        values = {part["from_name"]: part["value"] for part in annotation["result"]}
        if settings.mode in ("pair", "likert8"):
            order = _order_of(item, [data["left"], data["right"]])
        else:
            order = _order_of(item, [answer["body"] for answer in data.get("answers", ())])
        choice, ratings = _label_studio_choice(values, settings, len(order))
        yield row | _meaning(item, settings, order, choice, ratings)


def _label_studio_choice(values: Row, settings: Settings, count: int) -> tuple[Any, Row]:
    """The choice and the ratings in an annotation's parts, as shown."""
    ratings = {
        criterion: [values[f"{criterion}:{side}"]["rating"] for side in ("left", "right")]
        for criterion in settings.criteria
    }
    if settings.mode == "pair":
        neither = values.get("neither", {}).get("choices")
        name = neither[0] if neither else values["better"]["selected"]
        return _PAIR.get(name, name), ratings
    if settings.mode == "likert8":
        return int(values["choice"]["choices"][0].partition(":")[0]), ratings
    if settings.mode == "rank":
        best_first = values["rank"]["ranker"]
        if isinstance(best_first, dict):
            (best_first,) = (ids for name, ids in best_first.items() if name != "_")
        return [best_first.index(str(place)) + 1 for place in range(1, count + 1)], ratings
    text = values["text"]["text"]
    return text if isinstance(text, str) else "\n".join(text), ratings


def _from_argilla(record: Row, items: dict, settings: Settings) -> Iterator[Row]:
    item = _item_of(record["metadata"]["item"], items)
    fields = {name: x for name, x in record["fields"].items() if name != "prompt" and x is not None}
    order = _order_of(item, list(fields.values()))
    given: dict[str, Row] = defaultdict(dict)  # user -> question -> value
    for question, answers in record["responses"].items():
        for answer in answers or ():
            given[answer["user_id"]][question] = answer["value"]
    updated = iso(seconds_of(record["updated_at"]) if record.get("updated_at") else time.time())
    for user, values in given.items():
        ratings = {
            criterion: [values[f"{criterion}_{name}"] for name in fields]
            for criterion in settings.criteria
        }
        choice = _argilla_choice(values, settings, list(fields))
        row = _meaning(item, settings, order, choice, ratings)
        digest = hashlib.sha256(f"{user} {item.id} {json.dumps(row)}".encode()).hexdigest()[:24]
        yield row | {
            "id": f"argilla:{digest}",
            "item": item.id,
            "annotator": str(user),
            "time": updated,
        }


def _argilla_choice(values: Row, settings: Settings, names: list[str]) -> Any:
    if settings.mode == "pair":
        return _PAIR.get(values["choice"], values["choice"])
    if settings.mode == "likert8":
        return int(values["choice"])
    if settings.mode == "write":
        return values["text"]
    ranked = values["rank"]  # names from best to worst, or objects with value and rank
    ranks = {
        (x["value"] if isinstance(x, dict) else x): (x["rank"] if isinstance(x, dict) else place)
        for place, x in enumerate(ranked, start=1)
    }
    dense = sorted({ranks[name] for name in names})  # lists may be shorter than the longest one
    return [dense.index(ranks[name]) + 1 for name in names]


def _meaning(item: Item, settings: Settings, order: list[int], choice: Any, ratings: Row) -> Row:
    """The columns of a label that the choice fills."""
    return {
        "choice": unblind(settings.mode, choice, order),
        "ratings": unblind_ratings(ratings, settings.criteria, order),
        "shown": order,
    }
