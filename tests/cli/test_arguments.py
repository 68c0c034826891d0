"""Arguments that several commands share: files, devices, seeds, reward models and functions."""

import errno
import json
import re
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import PAIRS, TEXTS, run, write

from rlhf_core.cli import arguments as shared
from rlhf_core.data import ByteTokenizer
from rlhf_core.models import Transformer, TransformerConfig

# ---- files


class Fake(SimpleNamespace):
    __hash__ = object.__hash__


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


@pytest.mark.parametrize("ids, eos_ids, bos_id", [([0, 9], (), None), ([0], (9,), 0), ([], (), 9)])
def test_all_ids_of_a_row_are_looked_at_if_the_tokenizer_has_one_too_many(ids, eos_ids, bos_id):
    """Though it has no more ids than the model."""
    vocabulary = {str(i): i for i in ids}
    tokenizer = Fake(
        vocab_size=len(ids), eos_ids=eos_ids, bos_id=bos_id, vocabulary=lambda: vocabulary
    )
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=9))
    with pytest.raises(ValueError, match="token id 9, but the model has ids 0 to 8"):
        shared.known([0, 9], model, tokenizer)
    assert shared.known([0, 8], model, tokenizer) == [0, 8]


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


@pytest.mark.parametrize(
    "weights, message",
    [
        (["a=1", "a=2"], "criterion 'a' has two weights; give it one"),
        (["a=1"], "reward: there is no criterion 'a'; the model has one score, without criteria"),
        (["a=1", 2], "--reward-weights has numbers and NAME=WEIGHT. Give a number for each"),
    ],
)
def test_weights_of_criteria_need_a_model_that_has_them(weights, message, folders, sample, capsys):
    options = ["--reward-model", folders / "reward", "--reward-weights", *weights]
    assert sample("ppo", *options) == 2
    assert message in capsys.readouterr().err


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


# ---- judges

KEY = "sk-of-a-judge"


def later(body):
    """The judge's verdict on a question: the answer that comes later in the alphabet."""
    question = body["messages"][0]["content"]
    answers = re.search(r"\(A\):\n(.*)\n\nAnswer \(B\):\n(.*)\n\n", question, re.DOTALL)
    return "(A)" if answers[1] > answers[2] else "(B)"


def test_online_dpo_learns_from_a_judge_at_a_url(sample, judge_server, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    server = judge_server(later)
    (tmp_path / "principles.txt").write_text("Which is kinder?\nWhich is shorter?\n")
    judge = ["--judge", f"{server.url}#tiny", "--principles", tmp_path / "principles.txt"]
    judge += ["--judge-key-env", "MY_KEY"]
    assert sample("online-dpo", *judge, "--num-samples", 2) == 0
    _, headers, body = server.requests[0]
    assert headers["Authorization"] == f"Bearer {KEY}" and body["model"] == "tiny"
    questions = [body["messages"][0]["content"] for _, _, body in server.requests]
    assert len(questions) % 4 == 0  # two principles, two orders
    assert sum("kinder" in x for x in questions) == sum("shorter" in x for x in questions)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert all(KEY.encode() not in file.read_bytes() for file in files)
    kept = list((tmp_path / "out" / "judge-cache").rglob("*.json"))
    asked = len(server.requests)
    assert len(kept) == len({*questions}) == asked
    assert sample("online-dpo", *judge, "--num-samples", 2, "--overwrite") == 0
    assert len(server.requests) == asked  # all are in the cache


@pytest.fixture
def best_of_n(folders, tmp_path):
    """Runs best-of-n by a judge into tmp_path / best.jsonl, and returns its status."""

    def best_of_n(judge, *options):
        prompts, out = write(tmp_path / "p.txt", ["one", "two"]), tmp_path / "best.jsonl"
        paths = ["--model", folders / "policy", "--prompts", prompts, "--out", out]
        sizes = ["--response-length", 8, "--num-samples", 3, "--device", "cpu"]
        return run("best-of-n", *paths, *sizes, "--judge", judge, *options)

    return best_of_n


def test_best_of_n_by_a_url_keeps_its_replies_beside_the_file(best_of_n, judge_server, tmp_path):
    assert best_of_n(judge_server(later).url) == 0
    assert len((tmp_path / "best.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "best.jsonl.judge-cache").is_dir()


def test_candidates_are_ranked_by_a_judge(folders, judge_server, tmp_path):
    rows = [{"id": 1, "prompt": "p", "responses": [{"text": x} for x in ("a", "b", "aa")]}]
    paths = ["--model", folders / "policy", "--candidates", write(tmp_path / "c.jsonl", rows)]
    paths += ["--out", tmp_path / "best.jsonl", "--device", "cpu"]
    assert run("best-of-n", *paths, "--judge", judge_server(later).url) == 0
    assert json.loads((tmp_path / "best.jsonl").read_text())["completion"] == "b"


def test_a_model_folder_judges_and_a_question_that_it_cannot_hold_is_a_failure(
    best_of_n, folders, capsys
):
    assert best_of_n(folders / "policy") == 2
    assert "tokens, the judge 64 positions" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="failed"):
        assert best_of_n(folders / "policy", "--max-failures", 1) == 2
    assert "every comparison by the judge failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--judge", "nowhere"], "--judge nowhere: no such folder. Give a model folder, FILE.py:"),
        (["--judge", "ftp://x"], "ftp://x: no such folder"),
        (["--judge", "https://u:pw@x"], "the judge's URL at x may hold no password"),
        (["--judge", "judge.py"], "--judge must be FILE.py:NAME"),
        (
            ["--judge", "judge.py:f", "--principles", "p.txt"],
            "--principles needs a model or a URL as --judge, got ",
        ),
        (["--judge", ".", "--judge-timeout", 3], "--judge-timeout needs a URL as --judge, got "),
        (
            ["--reward-function", "a.py:f", "--max-failures", 0.1],
            "--max-failures needs --judge",
        ),
        (["--judge", "http://x", "--max-failures", 2], "max_failures must be a share, got 2.0"),
        (["--judge", "http://x", "--clamp", 0.6, 0.7], "clamp must be a range around 0.5"),
        (["--judge", "http://x", "--judge-timeout", 0], "timeout must be positive"),
        (["--judge", "http://x", "--principles", "absent.json"], "absent.json: no such file"),
    ],
)
def test_a_bad_judge_is_named(options, message, fails, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = ["--model", folders / "policy", "--prompts", write(tmp_path / "p.txt", ["one"])]
    line = fails("online-dpo", *paths, "--out", tmp_path / "out", "--device", "cpu", *options)
    assert message in line and "pw" not in line


@pytest.mark.slow
@pytest.mark.parametrize("command, step", [("online-dpo", "step 2: "), ("iterated-dpo", "")])
def test_a_judge_that_fails_too_often_stops_the_run_which_goes_on_with_resume(
    command, step, sample, folders, judge_server, tmp_path, capsys
):
    """The judge fails half-way. The resumed run is that of a judge that never failed."""
    server = judge_server(later)
    options = ["--judge", server.url, "--num-samples", 2]
    prompts = [f"p{i}" for i in range(8)]  # in two steps
    assert sample(command, *options, prompts=prompts, out="whole") == 0

    def breaks(body):
        fails = len(server.requests) > 8  # 4 of 8 comparisons in both orders
        return "I refuse" if fails else later(body)

    server.replies = breaks
    server.requests.clear()
    assert sample(command, *options, prompts=prompts) == 2
    error = capsys.readouterr().err
    assert f"error: {step}the judge failed in 2 of 6 comparisons, more than max_fail" in error
    assert "no verdict; the reply is 'I refuse'" in error
    server.replies = later
    assert sample(command, *options, "--resume", prompts=prompts) == 0
    unmoved = folders / "policy" / "model.safetensors"
    whole, resumed = (tmp_path / out / "model.safetensors" for out in ("whole", "out"))
    assert whole.read_bytes() == resumed.read_bytes() != unmoved.read_bytes()


# ---- engines

SAMPLERS = ["ppo", "a2c", "grpo", "online-dpo", "iterated-dpo", "rft", "best-of-n", "iterated-rlhf"]


def tiny_policy(folders):
    return Transformer.from_pretrained(folders / "policy")


@pytest.fixture
def served(folders, sample, tmp_path):
    """Runs a command that samples, with a reward model and further options."""

    def served(command, *options):
        reward = ["--reward-model", folders / "reward"]
        prompts = write(tmp_path / "prompts.txt", ["one", "two"])
        paths = ["--model", folders / "policy", "--prompts", prompts, "--out", tmp_path / "out"]
        cpu = ["--device", "cpu", *options]
        if command == "best-of-n":
            return run(command, *paths, *reward, "--num-samples", 2, "--response-length", 4, *cpu)
        if command != "iterated-rlhf":
            return sample(command, *reward, *options)
        parts = ["--sampling", "response_length=4", "--reward", "max_steps=1"]
        parts += ["--ppo", "max_steps=1", "response_length=4", "--rounds", 1]
        return run(command, *paths, *reward, *parts, *cpu)

    return served


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("command", SAMPLERS)
def test_an_engine_samples_for_every_command(command, folders, served, engine_server):
    server = engine_server(tiny_policy(folders), tokenizer=ByteTokenizer())
    assert served(command, "--engine", server.url, "--engine-requests", 2) == 0
    assert any("seed" in (body or {}) for _, body in server.requests)
    assert 0 < server.most <= 2


def test_an_engine_samples_candidates(folders, engine_server, tmp_path):
    server = engine_server(tiny_policy(folders))
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "ab"}, {"prompt": "c"}])
    options = ["--prompts", prompts, "--max-new-tokens", 4, "--device", "cpu"]
    policy = folders / "policy"
    lines = []
    for name, engine in (("own", []), ("served", ["--engine", server.url])):
        out = tmp_path / f"{name}.jsonl"
        assert run("candidates", "--model", policy, *options, "--out", out, *engine) == 0
        lines.append([json.loads(line)["responses"] for line in out.read_text().splitlines()])
    assert lines[0] == lines[1] and any("seed" in (body or {}) for _, body in server.requests)


@pytest.mark.parametrize("command", [*SAMPLERS, "candidates"])
def test_a_bad_engine_is_named_and_nothing_is_written(
    command, folders, served, engine_server, tmp_path, capsys
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    other = engine_server(Transformer(TransformerConfig(260, 16, 1, 2, max_positions=64)))
    for options, message in (
        (["--engine", "localhost"], "an engine's URL must be http(s)://HOST[:PORT]"),
        (["--engine", closed], "Is a vLLM server running there?"),
        (["--engine", other.url], "has more token ids than the policy, which has 259"),
        (["--engine-requests", 2], "--engine-requests needs --engine"),
    ):
        if command == "candidates":
            prompts = write(tmp_path / "prompts.txt", ["ab"])
            given = ["--model", folders / "policy", "--prompts", prompts, "--out", tmp_path / "out"]
            assert run(command, *given, "--max-new-tokens", 4, *options) == 2
        else:
            assert served(command, *options) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert message in line
        assert {path.name for path in tmp_path.iterdir()} == {"prompts.txt"}


def test_an_engine_has_one_model_to_sample_from(folders, engine_server, tmp_path, capsys):
    server = engine_server(tiny_policy(folders))
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "ab"}])
    both = [folders / "policy"] * 2
    options = ["--prompts", prompts, "--out", tmp_path / "out", "--engine", server.url]
    assert run("candidates", "--model", *both, *options) == 2
    assert "--engine serves one --model, got 2" in capsys.readouterr().err
    ranked = write(tmp_path / "ranked.jsonl", [{"prompt": "a", "responses": ["b", "c"]}])
    reward = ["--reward-model", folders / "reward", "--candidates", ranked]
    options = ["--model", folders / "policy", *reward, *options[2:]]
    assert run("best-of-n", *options) == 2
    assert "--engine samples nothing with --candidates" in capsys.readouterr().err
