"""rlhf-core audit: the table, the files it writes, the exit status."""

import json

import pytest
from helpers import PAIRS, run, write

from rlhf_core.data import read_preferences

BAD = [
    *PAIRS,
    {"prompt": "p", "chosen": "a", "rejected": " "},
    "{",
    {"prompt": "p", "chosen": "a"},
    PAIRS[0] | {"extra": [1]},
    {"prompt": "mail a@b.com", "chosen": "a", "rejected": "b"},
]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_audit_prints_its_checks_and_writes_figures_and_findings(tmp_path, capsys):
    data, figures = write(tmp_path / "pairs.jsonl", BAD), tmp_path / "new" / "audit.json"
    assert run("audit", data, "--json", figures) == 0
    shown = capsys.readouterr().out
    assert "! empty                1  an answer is empty: row 11\n" in shown
    assert "! length_bias     longer answer chosen 7.69% (words" in shown
    report = json.loads(figures.read_text())
    assert report["rows"] == 15 and report["flagged"]["unreadable"] == 2
    failed = ["unreadable", "empty", "duplicate", "personal", "length_bias"]
    assert report["failed"] == failed and report["duplicates"]["rows"] == 1
    findings = report["findings"]["unreadable"]
    assert [finding["row"] for finding in findings] == [12, 13]
    assert findings[1]["reason"] == (
        f"{data}:13: field 'rejected' is missing; the line has 'prompt', 'chosen'"
    )


def test_fix_keeps_rows_whole_and_gives_a_reason_for_every_other(tmp_path, capsys):
    data, out = write(tmp_path / "pairs.jsonl", BAD), tmp_path / "good.jsonl"
    assert run("audit", data, "--fix", out) == 0
    assert lines(out) == [*PAIRS, BAD[-1]]
    assert len(read_preferences(out)) == 11
    dropped = lines(tmp_path / "good.dropped.jsonl")
    assert [row["row"] for row in dropped] == [11, 12, 13, 14]
    assert dropped[0] == {"row": 11, "reasons": ["empty: rejected empty"], "data": BAD[10]}
    assert dropped[1]["data"] is None and dropped[1]["reasons"][0].startswith("unreadable: ")
    assert dropped[3]["reasons"] == ["duplicate: row 1 has the same prompt and answers"]
    assert dropped[3]["data"] == BAD[13]
    assert f"kept 11 rows in {out}; 4 in {tmp_path}/good.dropped.jsonl" in capsys.readouterr().out
    assert run("audit", data, "--fix", out, "--overwrite", "--drop", "personal") == 0
    assert lines(out) == [*PAIRS, BAD[10], BAD[13]]


def test_fail_on_gives_status_1_for_the_checks_it_names(tmp_path, capsys):
    data = write(tmp_path / "pairs.jsonl", BAD)
    assert run("audit", data, "--fail-on", "leak", "contradiction") == 0
    for checks in (["empty", "leak"], ["any"]):
        with pytest.raises(SystemExit) as stop:
            run("audit", data, "--fail-on", *checks)
        assert "rlhf-core audit: failed on " in stop.value.code and "empty" in stop.value.code


@pytest.mark.parametrize("row", [{"prompt": "SAY 3."}, {"question": "say 3"}, PAIRS[3]])
def test_leaks_of_prompts_and_of_pairs_are_found(tmp_path, row):
    data, figures = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "audit.json"
    test = write(tmp_path / "test.jsonl", [row, row | {"chosen": "z", "rejected": "q"}])
    assert run("audit", data, "--against", test, "--json", figures) == 0
    leaks = json.loads(figures.read_text())["findings"]["leak"]
    assert [leak["row"] for leak in leaks] == [4]


def test_test_prompts_within_the_answers_are_found(tmp_path):
    turns = [{"role": "user", "content": "say 3"}]
    row = {
        name: [*turns, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")
    }
    data, test = write(tmp_path / "a.jsonl", [row]), write(tmp_path / "b.jsonl", [row])
    with pytest.raises(SystemExit):
        run("audit", data, "--against", test, "--fail-on", "leak")


def test_equal_and_empty_conversations_are_findings_not_errors(tmp_path, capsys):
    def row(chosen, rejected):
        user = {"role": "user", "content": "hi"}
        answers = {"chosen": chosen, "rejected": rejected}
        return {
            name: [user, {"role": "assistant", "content": text}] for name, text in answers.items()
        }

    data = write(tmp_path / "a.jsonl", [row("a", "a"), row("a", ""), row("a", "b")])
    assert run("audit", data, "--fix", tmp_path / "b.jsonl") == 0
    assert lines(tmp_path / "b.jsonl") == [row("a", "b")]
    reasons = [row["reasons"][0].partition(":")[0] for row in lines(tmp_path / "b.dropped.jsonl")]
    assert reasons == ["equal", "empty"]


def test_a_reward_model_flags_the_rows_that_it_ranks_the_other_way(folders, tmp_path):
    """It flags one of a pair and its reverse."""
    swapped = {"chosen": PAIRS[0]["rejected"], "rejected": PAIRS[0]["chosen"]}
    rows = [PAIRS[0], PAIRS[0] | swapped] * 20
    data, figures = write(tmp_path / "pairs.jsonl", rows), tmp_path / "audit.json"
    options = ["--reward-model", folders / "reward", "--flip-margin", 0, "--device", "cpu"]
    assert run("audit", data, *options, "--json", figures) == 0
    report = json.loads(figures.read_text())
    assert report["flagged"]["flipped"] == 20 and report["reward_margin"]["accuracy"] == 0.5
    assert len({finding["row"] % 2 for finding in report["findings"]["flipped"]}) == 1


def test_bad_input_is_one_line(tmp_path, fails):
    data = write(tmp_path / "pairs.jsonl", BAD)
    assert f"{tmp_path}/no.jsonl: no such file" in fails("audit", tmp_path / "no.jsonl")
    line = fails("audit", data, "--fix", data, "--overwrite")
    assert f"{data} is the data itself. Choose another file" in line
    same = ["--json", tmp_path / "y.jsonl", "--fix", tmp_path / "y.jsonl"]
    assert "y.jsonl is also written by --fix" in fails("audit", data, *same)
    line = fails("audit", data, "--json", write(tmp_path / "x.json", []))
    assert f"{tmp_path}/x.json exists. Choose another file, or pass --overwrite" in line
    line = fails("audit", data, "--fix", tmp_path / "x.jsonl.gz")
    assert "is written as plain text. Choose a name without .gz" in line
    line = fails("audit", write(tmp_path / "b.jsonl", ["{"]), "--fix", tmp_path / "f.jsonl")
    assert "no usable line" in line
    line = fails("audit", write(tmp_path / "c.jsonl", [BAD[10]]), "--fix", tmp_path / "f.jsonl")
    assert "--drop would leave no row" in line and not (tmp_path / "f.jsonl").exists()
