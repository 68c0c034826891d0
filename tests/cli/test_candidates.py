"""rlhf-core candidates, template-pairs, and best-of-n of a file of candidates."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import PAIRS, run, write

from rlhf_core.data import read_candidates, read_preferences

PROMPTS = [{"id": f"q{i}", "prompt": f"say {i}", "answer": i} for i in range(6)]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def arguments(folders, tmp_path):
    """The command line of `candidates`, into tmp_path / name."""

    def arguments(*options, out="c.jsonl", prompts=PROMPTS):
        file = write(tmp_path / "prompts.jsonl", prompts)
        paths = ["--model", folders / "policy", "--prompts", file, "--out", tmp_path / out]
        return ["candidates", *paths, "--max-new-tokens", 4, "--device", "cpu", *options]

    return arguments


def test_candidates_are_written_read_and_ranked(arguments, folders, train, tmp_path, capsys):
    out, best = tmp_path / "c.jsonl", tmp_path / "best.jsonl"
    options = ["--temperature", 0.7, 1.5, "--batch-size", 4]
    assert run(*arguments(*options, "--model", folders / "policy", folders / "policy")) == 0
    assert f"6 rows from 6 prompts; written to {out}" in capsys.readouterr().out
    rows = lines(out)
    assert [(row["id"], row["answer"]) for row in rows] == [(f"q{i}", i) for i in range(6)]
    for row in rows:
        assert sum(x["count"] for x in row["responses"]) == 8
        assert {x["model"] for x in row["responses"]} == {str(folders / "policy")}
    assert [len(row.responses) for row in read_candidates(out)] == [
        len(x["responses"]) for x in rows
    ]

    reward = ["--model", folders / "policy", "--reward-model", folders / "reward"]
    ranked = ["best-of-n", *reward, "--candidates", out, "--device", "cpu"]
    assert run(*ranked, "--out", best, "--skip-bad") == 0
    texts = [[x["text"] for x in row["responses"]] for row in rows]
    assert all(row["completion"] in own for row, own in zip(lines(best), texts))
    assert run(*ranked, "--out", tmp_path / "pairs.jsonl", "--pairs", "--skip-bad") == 0
    pairs = read_preferences(tmp_path / "pairs.jsonl")
    assert [pair.chosen for pair in pairs] == [row["completion"] for row in lines(best)]
    assert all(pair.margin > 0 for pair in pairs)
    assert train("reward", tmp_path / "pairs.jsonl", "--eval-fraction", 0) == 0


def test_a_second_run_goes_on_and_other_settings_are_refused(arguments, fails, tmp_path, capsys):
    out = tmp_path / "c.jsonl"
    assert run(*arguments("--batch-size", 2)) == 0
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.index(b"q3") + 20])
    capsys.readouterr()
    assert run(*arguments("--batch-size", 2)) == 0
    assert "has the answers to 2 of 6 prompts; going on" in capsys.readouterr().out
    assert out.read_bytes() == whole
    for other in (["--seed", 1], ["--temperature", 0.5], ["--drop-gibberish"]):
        line = fails(*arguments("--batch-size", 2, *other))
        assert "was written with other prompts, models or settings" in line
    line = fails(*arguments("--batch-size", 2, prompts=PROMPTS[::-1]))
    assert "other prompts, models or settings" in line and out.read_bytes() == whole
    assert run(*arguments("--batch-size", 2, "--seed", 1, "--overwrite")) == 0
    assert out.read_bytes() != whole


@pytest.mark.slow
def test_a_killed_run_is_completed_to_the_same_bytes(arguments, tmp_path):
    prompts = [{"prompt": f"say {i}"} for i in range(80)]
    assert run(*arguments("--batch-size", 2, prompts=prompts)) == 0
    out = tmp_path / "killed.jsonl"
    command = arguments("--batch-size", 2, out=out.name, prompts=prompts)
    process = subprocess.Popen([sys.executable, "-m", "rlhf_core", *map(str, command)])
    until = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size > 3_000) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    whole = (tmp_path / "c.jsonl").read_bytes()
    assert 3_000 < out.stat().st_size < len(whole)
    assert run(*command) == 0
    assert out.read_bytes() == whole


def test_gibberish_is_dropped_with_a_report(arguments, tmp_path, capsys):
    assert run(*arguments("--drop-gibberish", "--min-logprob", -100)) == 0
    shown = capsys.readouterr().out
    rows = lines(tmp_path / "c.jsonl")
    dropped = [x for row in rows for x in row["dropped"]]
    assert dropped and {x["reason"] for x in dropped} == {"no EOS"}
    assert f"dropped {sum(x['count'] for x in dropped)} answers: no EOS" in shown


def test_a_better_models_answers_are_chosen_over_the_policys(arguments, folders, tmp_path, train):
    options = ["--chosen-from", folders / "policy", "--temperature", 1.2]
    assert run(*arguments(*options, out="pairs.jsonl")) == 0
    rows = lines(tmp_path / "pairs.jsonl")
    assert {row["id"] for row in rows} == {f"q{i}" for i in range(6)}
    assert {row["chosen_by"]["temperature"] for row in rows} == {0.0}
    assert {row["rejected_by"]["temperature"] for row in rows} == {1.2}
    assert len({row["chosen"] for row in rows if row["id"] == "q0"}) == 1
    assert train("dpo", tmp_path / "pairs.jsonl") == 0


def test_bad_input_of_candidates_is_one_line(arguments, fails, tmp_path):
    assert "--temperature: must be finite and at least 0, got -1" in fails(
        *arguments("--temperature", -1)
    )
    assert "num_samples must be at least 1, got 0" in fails(*arguments("--num-samples", 0))
    twice = [PROMPTS[0], PROMPTS[0]]
    assert 'id "q0" of prompt 1 is not a new' in fails(*arguments(prompts=twice))
    (tmp_path / "c.jsonl").unlink(missing_ok=True)
    (tmp_path / "c.jsonl").mkdir()
    assert f"{tmp_path}/c.jsonl is a directory" in fails(*arguments())


def test_template_pairs_are_read_by_dpo(tmp_path, fails, train, capsys):
    out, padded = tmp_path / "s.jsonl", tmp_path / "p.jsonl"
    assert run("template-pairs", "sycophancy", "--out", out) == 0
    assert len(read_preferences(out)) == 240 and train("dpo", out) == 0
    assert run("template-pairs", "sycophancy", "--out", out, "--chat", "--overwrite") == 0
    assert read_preferences(out)[0].prompt[0]["role"] == "user"
    for data in (PAIRS, [{"prompt": "p", "completion": " yes"}]):
        file = write(tmp_path / "data.jsonl", data)
        assert run("template-pairs", "padding", "--data", file, "--out", padded, "--overwrite") == 0
        assert all(row.chosen == " yes" for row in read_preferences(padded))
    assert "--data is required for padding" in fails("template-pairs", "padding", "--out", out)
    assert f"{out} exists" in fails("template-pairs", "sycophancy", "--out", out)


def test_models_that_read_different_prompts_answer_only_those_that_all_read(
    arguments, folders, data_dir, tmp_path, capsys
):
    """The policy has 64 positions and a token for each byte, the stories model has 512."""
    prompts = ["one", "x" * 61, "two", "three"]
    models = ["--model", folders / "policy", data_dir / "models" / "stories260k"]
    prompts = [{"prompt": prompt} for prompt in prompts]
    with pytest.warns(UserWarning, match="1 of 4 prompts have more than 60 tokens"):
        assert run(*arguments(*models, "--temperature", 1, prompts=prompts)) == 0
    rows = lines(tmp_path / "c.jsonl")
    assert [(row["id"], row["prompt"]) for row in rows] == [(0, "one"), (2, "two"), (3, "three")]
    assert all(len({x["model"] for x in row["responses"]}) == 2 for row in rows)
