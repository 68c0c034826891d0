"""run.json: what it says of a run that goes on, ends, fails or resumes, and what it leaves out."""

import contextlib
import datetime
import functools
import json
import os
import signal
import subprocess

import pytest
import torch
from helpers import make_ppo, make_trainer, tiny

from rlhf_core import __version__, backends
from rlhf_core.data import ByteTokenizer
from rlhf_core.trainers import RFTConfig, rft
from rlhf_core.training import run_file
from rlhf_core.training.run_file import ORDER, masked, recording

SECRET = "hf_marker_0123456789"


def read(out):
    return json.loads((out / "run.json").read_text())


def sft(out, **config):
    others = dict(out=out, tokenizer=ByteTokenizer())
    return make_trainer("sft", batch_size=2, others=others, **config)


def at_step(trainer, number, action):
    """Call the action at the start of a step."""
    step = trainer.step

    def stepped(batch):
        if trainer.steps_done == number - 1:
            action()
        return step(batch)

    trainer.step = stepped


def length(prompts, responses):
    return [float(len(ids)) for ids in responses]


# ---- what it says


def test_a_run_is_described_while_it_goes_on_and_when_it_has_ended(tmp_path):
    trainer, during = sft(tmp_path, seed=3), []
    at_step(trainer, 3, lambda: during.append(read(tmp_path)))
    trainer.train()
    run = read(tmp_path)
    assert list(run) == [name for name in ORDER if name in run]
    assert run["algorithm"] == "sft" and run["seed"] == 3 and run["device"] == "cpu"
    assert run["options"]["batch_size"] == 2 and run["examples"] == {"train": 8, "eval": 0}
    assert run["models"]["0 Transformer"]["hidden_size"] == 16 and len(run["tokenizer"]) == 64
    assert run["versions"]["torch"] == torch.__version__
    assert run["versions"]["rlhf_core"] == __version__
    assert run["threads"] == torch.get_num_threads() and run["cpu"]["model"]
    assert run["backend"]["name"] == backends.of_device("cpu").name
    assert run["command"]  # that of the test
    start, end = (datetime.datetime.fromisoformat(run[name]) for name in ("start", "end"))
    assert start.utcoffset() == datetime.timedelta(0) and start <= end
    assert (run["status"], run["steps_done"], run["total_steps"]) == ("finished", 4, 4)
    (before,) = during
    assert (before["status"], before["steps_done"]) == ("running", 0) and "end" not in before
    same = run.keys() - {"status", "steps_done", "end"}
    assert {name: before[name] for name in same} == {name: run[name] for name in same}


@pytest.mark.parametrize(
    "error, status, text",
    [(KeyError("x"), "failed", "'x'"), (ValueError("no"), "failed", "step 2: no; the state is")],
)
def test_a_run_that_fails_says_why(error, status, text, tmp_path):
    trainer = sft(tmp_path)

    def fail():
        raise error

    at_step(trainer, 2, fail)
    with pytest.raises(type(error)):
        trainer.train()
    run = read(tmp_path)
    assert run["status"] == status and run["error"].startswith(text) and run["steps_done"] == 1


def test_a_run_that_a_signal_stops_is_interrupted_and_resumes_with_its_first_start(tmp_path):
    trainer = sft(tmp_path)
    at_step(trainer, 2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    run = read(tmp_path)
    assert (run["status"], run["steps_done"]) == ("interrupted", 2) and "step 2" in run["error"]
    fields = run | {"start": "2020-01-01T00:00:00+00:00", "command": ["first"]}
    (tmp_path / "run.json").write_text(json.dumps(fields))
    for _ in range(2):
        again = sft(tmp_path, save_every=1)
        again.resume()
        again.train()
    run = read(tmp_path)
    assert run["start"] == fields["start"] and run["command"] == ["first"]
    assert [part["steps_done"] for part in run["resumed"]] == [2, 4] and "error" not in run
    assert run["status"] == "finished" and run["end"] > fields["start"]
    sft(tmp_path).train()
    assert "resumed" not in read(tmp_path)  # a new run


def test_a_signal_in_the_last_step_leaves_a_finished_run(tmp_path):
    trainer = sft(tmp_path)
    at_step(trainer, 4, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.train()
    assert read(tmp_path)["status"] == "finished"


def test_a_new_run_replaces_the_description_by_an_older_version(tmp_path):
    (tmp_path / "train_config.json").write_text("{}")
    sft(tmp_path).train()
    assert not (tmp_path / "train_config.json").exists()


def test_rounds_are_described_in_their_folder_and_each_round_in_its_own(tmp_path):
    config = RFTConfig(rounds=2, response_length=4, num_samples=2, batch_size=4)
    rft(tiny(), [[5], [6]] * 2, config, reward=length, out=tmp_path)
    run, last = read(tmp_path), read(tmp_path / "round-2")
    assert (run["algorithm"], run["status"], run["steps_done"]) == ("rft", "finished", 2)
    assert run["options"]["num_samples"] == 2 and run["total_steps"] == 2
    assert run["feedback"]["0"]["name"].endswith("length") and len(run["feedback"]["0"]["source"])
    assert (last["algorithm"], last["status"], last["options"]["seed"]) == ("sft", "finished", 2)


def test_rounds_of_an_older_version_resume_from_their_train_config(tmp_path):
    def rounds(number, **options):
        config = RFTConfig(rounds=number, response_length=4, num_samples=2, batch_size=4)
        return rft(tiny(), [[5], [6]] * 2, config, reward=length, out=tmp_path, **options)

    rounds(1)
    (tmp_path / "rounds.json").rename(tmp_path / "train_config.json")
    (tmp_path / "run.json").unlink()
    assert len(rounds(2, resume=True)) == 2
    assert (tmp_path / "rounds.json").exists() and read(tmp_path)["status"] == "finished"


def test_nested_recordings_are_one_and_the_outer_facts_win(tmp_path):
    with recording(tmp_path, options={"all": 1}) as outer, recording(tmp_path) as inner:
        assert inner is outer
        inner.start({"options": {}, "steps_done": 0, "device": "cpu"}, resumed=False)
    assert read(tmp_path)["options"] == {"all": 1}
    with recording(tmp_path) as other:
        assert other is not outer  # and it leaves the file alone unless it starts
    assert read(tmp_path)["options"] == {"all": 1}


def test_a_repository_is_named_by_its_commit_and_whether_it_has_changes(tmp_path):
    assert run_file._git(str(tmp_path)) is None

    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "a")
    head = git("rev-parse", "HEAD").stdout.strip()
    probe = run_file._git.__wrapped__  # without its cache
    assert probe(str(tmp_path)) == {"commit": head, "dirty": False}
    (tmp_path / "a").write_text("2")
    assert probe(str(tmp_path)) == {"commit": head, "dirty": True}


# ---- what it does not say


def test_secrets_of_the_environment_and_credentials_of_urls_are_masked(tmp_path, monkeypatch):
    (tmp_path / "key").touch()
    for name, value in {
        "HF_TOKEN": SECRET,
        "my_api_key": "marker2",
        "TOKENIZERS_PARALLELISM": "false",
        "SSH_KEY_FILE": str(tmp_path / "key"),
    }.items():
        monkeypatch.setenv(name, value)
    value = {"a": [f"--key={SECRET}", "marker2marker2", "false", 1, None], "b": (str(tmp_path),)}
    want = {"a": ["--key=***", "******", "false", 1, None], "b": [str(tmp_path)]}
    assert masked(value) == want
    assert masked(str(tmp_path / "key")) == str(tmp_path / "key")
    url = "https://me:pass@host/v1?to=a@b and http://host/x@y"
    assert masked(url) == "https://***@host/v1?to=a@b and http://host/x@y"


@pytest.mark.parametrize("method", ["rft", "ppo"])
@pytest.mark.parametrize("fails", [False, True])
def test_no_file_of_a_run_holds_a_key_of_the_environment(fails, method, tmp_path, monkeypatch):
    """Not even that of a reward that holds it, or whose error shows it."""
    for name in ("HF_TOKEN", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setattr("sys.argv", ["train.py", f"--token={SECRET}"])

    def score(prompts, responses, key):
        if fails:
            raise ValueError(f"401 for {key}")
        return length(prompts, responses)

    reward = functools.partial(score, key=os.environ["OPENAI_API_KEY"])
    shape = dict(response_length=4, batch_size=4, save_every=1)
    with pytest.raises(RuntimeError, match=SECRET) if fails else contextlib.nullcontext():
        if method == "rft":
            config = RFTConfig(num_samples=2, **shape)
            rft(tiny(), [[5], [6]] * 2, config, reward=reward, out=tmp_path)
        else:
            make_ppo(reward=reward, others=dict(out=tmp_path), minibatch_size=4, **shape).train()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2 and not any(SECRET.encode() in path.read_bytes() for path in files)
    saved = "checkpoint-error" if fails else "checkpoint-2"
    assert method == "rft" or (tmp_path / saved / "state.safetensors") in files
    run = read(tmp_path)
    assert run["command"] == ["train.py", "--token=***"]
    assert run["status"] == ("failed" if fails else "finished")
    assert not fails or "401 for ***" in run["error"]
