"""Exports: the winner of the votes, the columns of our readers and of TRL, nothing dropped."""

import pytest
from helpers import write

from rlhf_core.data import (
    Candidates,
    read_comparisons,
    read_labelled,
    read_preferences,
    read_texts,
)
from rlhf_core.feedback.annotation.export import describe, export_rows
from rlhf_core.feedback.annotation.items import make_items
from rlhf_core.feedback.annotation.labels import Contents, Settings


def contents(mode, choices, rows=None, criteria=(), ratings=None):
    """A database with these choices: item -> the choice of each person."""
    rows = rows or [
        Candidates(name, f"question {name}", [{"text": f"{name}{x}", "model": x} for x in "ab"])
        for name in choices
    ]
    items = {item.id: item for item in make_items(rows, mode)}
    labels = [
        {
            "kind": "label",
            "gold": 0,
            "item": name,
            "annotator": f"person{i}",
            "choice": choice,
            "ratings": ratings,
        }
        for name, given in choices.items()
        for i, choice in enumerate(given)
    ]
    return Contents(Settings(mode, criteria), items, labels)


def test_the_majority_wins_and_everything_else_is_counted():
    choices = {
        "w": [2, 2, 1, 0],
        "l": [1, 1],
        "t": [0, 0, 1],
        "s": [1, 2],
        "b": ["both_bad", "both_bad", 2],
    }
    rows, left_out = export_rows(contents("pair", choices), "preference")
    assert rows[0] == {
        "id": "w",
        "prompt": "question w",
        "chosen": "wb",
        "rejected": "wa",
        "votes": {"chosen": 2, "rejected": 1, "tie": 1, "both_bad": 0},
        "agreement": 0.5,
        "chosen_model": "b",
        "rejected_model": "a",
    }
    assert [row["id"] for row in rows] == ["w", "l"]
    assert describe(left_out) == "1 both bad, 1 ties, 1 without a majority"
    rows, left_out = export_rows(contents("pair", choices), "preference", min_agreement=0.6)
    assert [row["id"] for row in rows] == ["l"]
    assert left_out["below the minimum agreement"] == 1


def test_reliable_people_outvote_those_who_guess_under_dawid_and_skene():
    truth = [1, 2] * 20
    good = [truth, truth[:1] + truth[1:]]
    bad = [[1] * 40, [1] * 40, [1] * 40]  # three people who always say 1
    choices = {f"p{i:02}": [x[i] for x in [*good, *bad]] for i in range(40)}
    majority, _ = export_rows(contents("pair", choices), "preference")
    weighted, _ = export_rows(contents("pair", choices), "preference", "dawid-skene")
    assert all(row["chosen"].endswith("a") for row in majority)
    assert [row["chosen"][-1] for row in weighted] == ["ab"[x - 1] for x in truth]
    assert min(row["agreement"] for row in weighted) > 0.95
    assert all(row["label_smoothing"] == round(1 - row["agreement"], 6) for row in weighted)
    assert "label_smoothing" not in majority[0]


def test_the_margin_is_the_mean_distance_on_the_scale():
    choices = {"a": [1], "b": [8, 7], "c": [4], "d": [3, 4, 8]}
    rows, _ = export_rows(contents("likert8", choices), "preference")
    assert [(row["chosen"], row["margin"]) for row in rows] == [
        *(("aa", 3.0), ("bb", 2.5), ("ca", 0.0), ("da", 0.0))
    ]


def test_a_ranking_is_a_preference_of_each_two_responses():
    row = Candidates("r", "q", [{"text": x} for x in "abc"])
    found = contents("rank", {"r": [[2, 1, 2], [3, 1, 2]]}, [row])
    rows, left_out = export_rows(found, "preference")
    assert [(row["id"], row["chosen"], row["rejected"]) for row in rows] == [
        *(("r:0-1", "b", "a"), ("r:1-2", "b", "c"))
    ]
    assert describe(left_out) == "1 without a majority"  # a against c: a tie, and c


def test_lists_are_ranked_by_the_comparisons_won():
    rows = [
        Candidates("r", "q", [{"text": x} for x in "abcd"]),
        Candidates("s", "q", [{"text": x} for x in "ab"]),
    ]
    found = contents("rank", {"r": [[3, 1, 2, 2]], "s": [[1, 1]]}, rows)
    ranked, left_out = export_rows(found, "ranked")
    votes = ranked[0].pop("votes")
    assert votes[0] == {"won": 3, "lost": 0, "tie": 0, "both_bad": 0}
    assert votes[1] == {"won": 1, "lost": 1, "tie": 1, "both_bad": 0}
    assert ranked == [{"id": "r", "prompt": "q", "responses": ["b", "c", "a"], "ranks": [1, 2, 3]}]
    assert describe(left_out) == "2 tied answers"
    pairs = {"r:0-1": [2], "r:0-2": [2], "r:1-2": [1]}
    ranked, _ = export_rows(
        contents("pair", pairs, [rows[0]._replace(responses=rows[0].responses[:3])]), "ranked"
    )
    assert ranked[0]["responses"] == ["b", "c", "a"]
    pairs["r:1-2"] = [1, 2]
    with pytest.raises(
        ValueError, match="no row is left to export: 1 lists with an undecided pair"
    ):
        export_rows(
            contents("pair", pairs, [rows[0]._replace(responses=rows[0].responses[:3])]), "ranked"
        )


def test_kto_takes_what_won_more_often_than_it_lost():
    row = Candidates("r", "q", [{"text": x} for x in "abc"])
    rows, left_out = export_rows(contents("rank", {"r": [[1, 2, 3]]}, [row]), "kto")
    assert rows[0].pop("votes") == {"won": 2, "lost": 0, "tie": 0, "both_bad": 0}
    assert rows[1].pop("votes") == {"won": 0, "lost": 2, "tie": 0, "both_bad": 0}
    assert rows == [
        {"id": "r:0", "prompt": "q", "completion": "a", "label": True},
        {"id": "r:2", "prompt": "q", "completion": "c", "label": False},
    ]
    assert describe(left_out) == "1 answers that won as often as they lost"


def test_conversations_get_messages_and_ratings_their_means():
    turns = [{"role": "user", "content": "hi"}]
    row = Candidates("p", turns, [{"text": "a"}, {"text": "b"}])
    ratings = {"kind": [5, 2]}
    rows, _ = export_rows(contents("pair", {"p": [2, 2]}, [row], ("kind",), ratings), "preference")
    assert rows[0]["chosen"] == [{"role": "assistant", "content": "b"}]
    assert (rows[0]["chosen_ratings"], rows[0]["rejected_ratings"]) == ({"kind": 2}, {"kind": 5})


def test_reward_models_of_criteria_read_the_ratings(tmp_path):
    """People chose the answer that they rated less kind and, in the mean, as brief."""
    row = Candidates("p", "q", [{"text": "a"}, {"text": "b"}])
    ratings = {"kind": [5, 2], "brief": [3, 3]}
    labels = contents("likert8", {"p": [7, 8]}, [row], ("kind", "brief"), ratings)
    rows, _ = export_rows(labels, "preference")
    (found,) = read_comparisons(write(tmp_path / "a.jsonl", rows), criteria=("kind", "brief"))
    assert (found.chosen, found.criteria, found.margin) == ("b", {"kind": False}, None)
    (plain,) = read_comparisons(tmp_path / "a.jsonl")
    assert (plain.chosen, plain.criteria, plain.margin) == ("b", None, 2.5)


def test_empty_answers_are_left_out_because_readers_refuse_them():
    row = Candidates("p", "q", [{"text": "a"}, {"text": " "}])
    with pytest.raises(ValueError, match="no row is left to export: 1 with an empty answer"):
        export_rows(contents("pair", {"p": [1]}, [row]), "preference")


def test_the_readers_read_every_format(tmp_path):
    row = Candidates("r", "q", [{"text": x} for x in "abc"])
    ranked = contents("rank", {"r": [[1, 2, 3]]}, [row])
    written = contents("write", {"w": ["Mine.", "Yours."]})
    for found, format, reader, n in (
        (ranked, "preference", read_preferences, 3),
        (contents("likert8", {"a": [1]}), "preference", read_preferences, 1),
        (ranked, "ranked", read_comparisons, 1),
        (ranked, "kto", read_labelled, 2),
        (written, "sft", read_texts, 2),
    ):
        rows, _ = export_rows(found, format)
        assert len(reader(write(tmp_path / f"{format}.jsonl", rows))) == n
        assert export_rows(found, format)[0] == rows
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "preference.jsonl"))
    assert loaded["train"].num_rows == 1


def test_a_mode_without_the_format_is_named():
    with pytest.raises(ValueError, match="--format sft needs labels of --mode write, these are of"):
        export_rows(contents("pair", {"p": [1]}), "sft")
    with pytest.raises(ValueError, match="no row is left to export: there are no labels yet"):
        export_rows(contents("pair", {"p": []}), "preference")
