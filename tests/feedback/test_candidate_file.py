"""Candidates: seeds and log-probs of answers, merging, gibberish, pairs, and files cut anywhere."""

import json

import pytest
import torch
from helpers import PROMPTS, Letters, tiny

from rlhf_core.data import PromptRow
from rlhf_core.feedback.candidate_file import (
    Source,
    appending,
    candidate_row,
    gibberish,
    merged,
    pair_rows,
    prompt_rows,
    sampled,
)
from rlhf_core.feedback.candidates import SamplingConfig

CONFIG = SamplingConfig(response_length=4, batch_size=3, seed=1)


def source(name="m", seed=0, temperatures=(0.7, 1.5), num_samples=2):
    return Source(name, tiny(seed=seed), Letters(), (2, 3), PROMPTS, temperatures, num_samples)


def answers(sources, config=CONFIG, first=0):
    return [row for _, batch in sampled(sources, config, first) for row in batch]


def answer(text, **fields):
    return {"text": text, "logprob": -2.0, "tokens": 2, "ended": True} | fields


# ---- sampling


def test_every_model_answers_every_prompt_at_every_temperature():
    rows = answers([source("a"), source("b", seed=1, temperatures=(0,), num_samples=1)])
    assert len(rows) == len(PROMPTS)
    for row in rows:
        made_of = [(x["model"], x["temperature"]) for x in row]
        assert made_of == [("a", 0.7)] * 2 + [("a", 1.5)] * 2 + [("b", 0)]
    seeds = [x["seed"] for row in rows for x in row]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**53


def test_answers_do_not_depend_on_the_batch_and_depend_on_the_seed():
    def texts(**options):
        config = SamplingConfig(**(dict(response_length=4, batch_size=3, seed=1) | options))
        return [[x["text"] for x in row] for row in answers([source()], config)]

    assert texts() == texts(batch_size=8) != texts(seed=2)
    assert answers([source()], first=3) == answers([source()])[3:]


def test_the_log_prob_is_the_models_own_at_temperature_1():
    own = source(temperatures=(2.0,), num_samples=1)
    for prompt, (row,) in zip(PROMPTS, answers([own])):
        ids = ["abcdefghijkl".index(letter) for letter in row["text"]]
        ids += [2, 3][:1] * (row["tokens"] - len(ids))  # EOS is not in the text
        totals = []
        for eos in (2, 3) if row["ended"] else (0,):
            response = [*ids[:-1], eos] if row["ended"] else ids
            logits = own.model(torch.tensor([[*prompt, *response]]))[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
            totals.append(sum(logits[at, i].item() for at, i in zip(places, response)))
        assert any(abs(row["logprob"] - total) < 2e-4 for total in totals)
        assert row["ended"] or row["tokens"] == 4


# ---- rows


def test_equal_texts_are_merged_and_counted():
    found = merged([answer("a", seed=1), answer("b"), answer("a", seed=2)])
    assert [(x["text"], x["count"]) for x in found] == [("a", 2), ("b", 1)]
    assert found[0]["seed"] == 1


def test_gibberish_is_unlikely_or_unfinished():
    assert gibberish(answer("a"), least=-1.0) is None
    assert gibberish(answer("a"), least=-0.9) == "low log-prob"
    assert gibberish(answer("a", ended=False), least=-1.0) == "no EOS"
    assert gibberish(answer("a", ended=False), least=None) is None


def test_dropped_answers_stay_in_the_row_with_a_reason():
    both = [answer("a"), answer("b", ended=False)]
    assert "dropped" not in candidate_row({"id": 0}, both)
    row = candidate_row({"id": 0}, both, least=-5)
    assert [x["text"] for x in row["responses"]] == ["a"]
    assert [(x["text"], x["reason"]) for x in row["dropped"]] == [("b", "no EOS")]


def test_pairs_are_the_first_answer_against_each_other_distinct_one():
    others = [answer("a"), answer("b", seed=5), answer("b"), answer(" "), answer("c", ended=False)]
    rows = pair_rows({"id": 0}, [answer("a"), *others])
    assert [(x["chosen"], x["rejected"]) for x in rows] == [("a", "b"), ("a", "c")]
    assert rows[0]["rejected_by"]["seed"] == 5 and rows[0]["rejected_by"]["count"] == 2
    assert len(pair_rows({}, [answer("a"), *others], least=-5)) == 1
    assert pair_rows({}, [answer(""), *others]) == []


def test_rows_keep_ids_and_other_columns(tmp_path):
    columns = {"content_warning": True, "chosen": "x", "messages": []}
    rows = {0: PromptRow("p", columns | {"id": "a"}), 5: PromptRow("q", {})}
    assert prompt_rows(tmp_path, rows, "r") == [
        {"id": "a", "prompt": "p", "content_warning": True, "run": "r"},
        {"id": 5, "prompt": "q", "run": "r"},
    ]
    rows[7] = PromptRow("s", {"id": "a"})
    with pytest.raises(ValueError, match='id "a" of prompt 7 is not a new text or number'):
        prompt_rows(tmp_path, rows, "r")


# ---- the file

BEGUN = [{"id": f"i{n}", "prompt": "é", "run": "r1"} for n in range(5)]


def append(out, begun=BEGUN):
    """Write rows: prompt n has n % 3 of them, so that some have none."""
    with appending(out, begun, 2) as (write, first):
        for start in range(first, 5, 2):
            batch = range(start, min(start + 2, 5))
            write([begun[n] | {"text": f"{n}.{k}"} for n in batch for k in range(n % 3)])
    return first


def test_a_file_cut_at_any_byte_is_completed_to_the_same_bytes(tmp_path):
    out = tmp_path / "c.jsonl"
    assert append(out) == 0
    whole = out.read_bytes()
    assert [json.loads(x)["text"] for x in whole.splitlines()] == ["1.0", "2.0", "2.1", "4.0"]
    starts = set()
    for size in range(0, len(whole) + 1, 3):
        out.write_bytes(whole[:size])
        starts.add(append(out))
        assert out.read_bytes() == whole
    assert starts == {0, 2, 4}


@pytest.mark.parametrize(
    "text", ["hello", '{"id": "i0"}\n', '{"id": "x", "run": "r1"}\n', "[1]\n", '{"id": []}\n']
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, text):
    out = tmp_path / "c.jsonl"
    out.write_text(text)
    with pytest.raises(ValueError, match="Choose another --out, or pass --overwrite"):
        append(out)
    assert out.read_text() == text


def test_a_file_of_another_run_is_named(tmp_path):
    append(tmp_path / "c.jsonl")
    begun = [row | {"run": "r2"} for row in BEGUN]
    with pytest.raises(ValueError, match=r'settings \(run "r1", now "r2"\)'):
        append(tmp_path / "c.jsonl", begun)


def test_a_link_is_not_followed(tmp_path):
    target = tmp_path / "target"
    target.write_text("kept")
    (tmp_path / "c.jsonl").symlink_to(target)
    with pytest.raises(OSError):
        append(tmp_path / "c.jsonl")
    assert target.read_text() == "kept"
