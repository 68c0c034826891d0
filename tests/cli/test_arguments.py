"""Arguments that several commands share: files, devices, seeds, reward models and functions."""

import errno
import json
import re
import tempfile
from pathlib import Path

import pytest
from helpers import PAIRS, TEXTS, run, write

# ---- files


@pytest.mark.parametrize(
    "command, good, bad, message",
    [
        ("sft", TEXTS, {"prompt": "p", "completion": True}, "'completion' must be a string"),
        ("sft", TEXTS, "{not json", "not valid JSON"),
        ("reward", PAIRS, {"prompt": "p", "chosen": "a"}, "field 'rejected' is missing"),
        (
            "dpo",
            PAIRS,
            {"prompt": "p", "chosen": "a", "rejected": "a"},
            "'chosen' and 'rejected' are equal",
        ),
    ],
)
def test_a_bad_line_stops_the_run_with_file_line_and_field_or_is_dropped(
    command, good, bad, message, train, tmp_path, capsys
):
    data = write(tmp_path / "data.jsonl", [*good[:3], bad, *good[3:]])
    assert train(command, data) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{data}:4: " in line and message in line
    assert not (tmp_path / "out").exists()
    assert train(command, data, "--skip-bad") == 0
    shown = capsys.readouterr()
    assert "dropped 1 bad line" in shown.err and f"{data}:4: " in shown.err
    assert "9 to train on, 1 held out" in shown.out


def test_an_out_folder_that_is_not_empty_needs_overwrite(train, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    assert train("sft", TEXTS) == 2
    error = capsys.readouterr().err
    assert f"{out} is not empty. Choose another --out, or pass --overwrite" in error
    assert [file.name for file in out.iterdir()] == ["mine"]
    assert train("sft", TEXTS, "--overwrite") == 0
    assert (out / "mine").exists() and (out / "model.safetensors").exists()


@pytest.mark.parametrize("command", ["sft", "ppo", "rft", "best-of-n", "merge"])
def test_an_out_that_cannot_be_written_is_reported_before_anything_is_read(
    command, fails, tmp_path
):
    file, absent = write(tmp_path / "file", ["in the way"]), tmp_path / "absent"
    sources = {"sft": ["--data", absent], "merge": []}
    source = sources.get(command, ["--reward-model", absent, "--prompts", absent])
    line = fails(command, *source, "--model", absent, "--out", file / "new" / "out")
    assert f"{file} is not a directory" in line and file.read_text() == "in the way\n"


def test_a_read_only_disk_is_reported_before_anything_is_read(fails, tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    absent = tmp_path / "absent"
    line = fails("sft", "--model", absent, "--data", absent, "--out", tmp_path / "new")
    assert f"{tmp_path}: read-only file system" in line


# ---- devices and seeds


@pytest.mark.parametrize("device", ["abacus", "meta"])
def test_a_device_that_cannot_hold_a_tensor_is_named(device, train, tmp_path, capsys):
    assert train("sft", TEXTS, "--device", device) == 2
    assert f"rlhf-core sft: error: --device {device}: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sft", "generate"])
def test_a_seed_beyond_64_bits_is_refused(command, capsys):
    with pytest.raises(SystemExit) as raised:
        run(command, "--seed", 2**63)
    assert raised.value.code == 2
    message = f"argument --seed: must be a whole number of 64 bits, got {2**63}"
    assert message in capsys.readouterr().err


# ---- rewards


def test_each_reward_model_needs_a_weight(folders, sample, capsys):
    models = ["--reward-model", folders / "reward", "--reward-weights", 1]
    assert sample("ppo", *models, 2) == 2
    assert "there are 2 --reward-weights for 1 reward models; give one" in capsys.readouterr().err
    assert sample("ppo", *models, "--reward-coef", 0.5) == 2
    assert "--reward-coef 0.5 contradicts --reward-weights" in capsys.readouterr().err


def test_a_policy_is_not_taken_for_a_reward_model(folders, sample, capsys):
    assert sample("ppo", "--reward-model", folders / "policy") == 2
    assert "not a reward model" in capsys.readouterr().err


FUNCTIONS = """
from __future__ import annotations

from dataclasses import dataclass

import beside


@dataclass
class Row:
    text: str


def length(prompts, responses):
    assert beside.here and Row("x").text
    assert all(isinstance(text, str) for text in (*prompts, *responses))
    return [len(response) for response in responses]


def longer(prompts, first, second):
    return [(len(a) > len(b)) + (len(a) == len(b)) / 2 for a, b in zip(first, second)]


def breaks(prompts, responses):
    raise KeyError("unknown prompt")


number = 3
"""


def test_stop_ends_responses_in_training_and_best_of_n(folders, sample, tmp_path):
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    (tmp_path / "beside.py").write_text("here = True")
    function = ["--reward-function", f"{tmp_path / 'functions.py'}:length"]
    stop = ["--stop", *"abcdefghijklmnopqrstuvwxyz"]
    paths = ["--model", folders / "policy", "--prompts", write(tmp_path / "p.txt", ["one"])]
    options = [*stop, "--num-samples", 4, "--device", "cpu", "--out", tmp_path / "best.jsonl"]
    assert run("best-of-n", *paths, *function, *options) == 0
    assert re.fullmatch(
        r"[^a-z]*[a-z]?", json.loads((tmp_path / "best.jsonl").read_text())["completion"]
    )
    assert sample("grpo", *function, *stop, "--num-samples", 2, "--response-length", 40) == 0


@pytest.mark.parametrize("command", ["ppo", "grpo", "online-dpo", "rft", "best-of-n"])
def test_a_reward_may_be_a_function_in_a_file(command, folders, sample, tmp_path):
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    (tmp_path / "beside.py").write_text("here = True")
    function = ["--reward-function", f"{tmp_path / 'functions.py'}:length"]
    if command == "best-of-n":
        paths = ["--model", folders / "policy", "--prompts", write(tmp_path / "p.txt", ["one"])]
        options = ["--response-length", 4, "--num-samples", 2, "--device", "cpu"]
        assert run(command, *paths, *options, *function, "--out", tmp_path / "best.jsonl") == 0
        row = json.loads((tmp_path / "best.jsonl").read_text())
        assert row["score"] == len(row["completion"])
        return
    options = ["--num-samples", 2] * (command != "ppo")
    assert sample(command, *function, *options) == 0
    if command == "online-dpo":
        judge = ["--judge", f"{tmp_path / 'functions.py'}:longer"]
        assert sample(command, *judge, *options, out="judged") == 0


@pytest.mark.parametrize(
    "function, more, message",
    [
        ("functions.py", [], "--reward-function must be FILE.py:NAME, got 'functions.py'"),
        ("nothing.py:length", [], "nothing.py"),
        ("functions.py:number", [], "functions.py has no function 'number'"),
        ("functions.py:other", [], "functions.py has no function 'other'"),
        ("bad.py:length", [], "bad.py raised NameError"),
        ("functions.py:breaks", [], "raised KeyError('unknown prompt'); it also raises on row 0"),
        ("functions.py:length", ["--reward-weights", 1], "--reward-weights needs --reward-model"),
    ],
)
def test_a_reward_function_that_is_missing_or_raises_is_named(
    function, more, message, sample, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("functions.py").write_text(FUNCTIONS.replace("import beside", ""))
    Path("bad.py").write_text("length = width")
    assert sample("grpo", "--num-samples", 2, "--reward-function", function, *more) == 2
    assert message in capsys.readouterr().err
