"""From candidates over the browser's protocol to a policy: a planted preference is recovered."""

import json
import os
import signal

import pytest
from helpers import label_printed_links, model_folders, run, write

from rlhf_core.cli import annotation
from rlhf_core.feedback.annotation import people
from rlhf_core.feedback.annotation.labels import open_store
from rlhf_core.trainers import PPOTrainer

NAMES = [first + last for first in "ABCDE" for last in ("nn", "da", "lo", "my")]
HELD_OUT = "E"  # no reward model learns from prompts that start with it
ANSWERS = ["hello", "hi you", "go away", "not now"]
FAST = ["--device", "cpu", "--batch-size", 16, "--log-every", 1000]


def kind(text):
    """The planted preference: an answer that greets."""
    return text.startswith("h")


@pytest.fixture
def sft(tmp_path):
    """A policy that greets every second time, and prompts."""
    model_folders(tmp_path)
    rows = [{"prompt": f"{name}: ", "completion": x} for name in NAMES for x in ANSWERS]
    write(tmp_path / "texts.jsonl", rows)
    write(tmp_path / "prompts.jsonl", [{"prompt": f"{name}: "} for name in NAMES])
    data = ["--data", tmp_path / "texts.jsonl", "--eval-fraction", 0]
    options = [*data, "--lr", 0.02, "--epochs", 25, "--out", tmp_path / "sft", *FAST]
    assert run("sft", "--model", tmp_path / "policy", *options) == 0
    return tmp_path


@pytest.fixture
def sample_people(folders, tmp_path):
    """A run with people, as arguments."""
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "one"}])
    files = ["--model", folders / "policy", "--prompts", prompts, "--db", tmp_path / "l.sqlite"]
    return ["iterated-rlhf", *files, "--port", 0, "--out", tmp_path / "out"]


def share_of_kind(folder, model):
    out = folder / f"{model}.jsonl"
    prompts = ["--prompts", folder / "prompts.jsonl", "--num-samples", 8, "--max-new-tokens", 12]
    assert run("generate", "--model", folder / model, *prompts, "--out", out) == 0
    texts = [json.loads(line)["response"] for line in out.read_text().splitlines()]
    return sum(map(kind, texts)) / len(texts)


@pytest.mark.slow
def test_labels_of_a_planted_preference_recover_it(sft, monkeypatch):
    prompts = ["--prompts", sft / "prompts.jsonl", "--max-new-tokens", 12]
    sampling = ["--temperature", 1, "--num-samples", 8, "--device", "cpu"]
    candidates = sft / "c.jsonl"
    assert run("candidates", "--model", sft / "sft", *prompts, *sampling, "--out", candidates) == 0
    stop = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    label_printed_links(monkeypatch, annotation, kind, then=stop)
    db = ["--db", sft / "l.sqlite"]
    assert run("annotate", "--data", candidates, *db, "--port", 0) == 130

    export = ["export", *db, "--format", "preference", "--out"]
    assert run(*export, sft / "pairs.jsonl") == 0
    lines = (sft / "pairs.jsonl").read_text().splitlines(keepends=True)
    held_out = [line for line in lines if json.loads(line)["prompt"][0] == HELD_OUT]
    write(sft / "train.jsonl", [line.strip() for line in lines if line not in held_out])
    write(sft / "test.jsonl", [line.strip() for line in held_out])
    data = [
        "--model",
        sft / "sft",
        "--data",
        sft / "train.jsonl",
        "--eval-data",
        sft / "test.jsonl",
    ]
    assert run("reward", *data, "--lr", 0.01, "--epochs", 6, "--out", sft / "rm", *FAST) == 0
    assert run("dpo", *data, "--lr", 0.002, "--epochs", 3, "--out", sft / "dpo", *FAST) == 0
    last = json.loads((sft / "rm" / "metrics.jsonl").read_text().splitlines()[-1])
    assert len(held_out) > 10 and last["eval_accuracy"] >= 0.8
    assert share_of_kind(sft, "dpo") > share_of_kind(sft, "sft") + 0.2

    assert run(*export, sft / "again.jsonl") == 0
    assert (sft / "again.jsonl").read_bytes() == (sft / "pairs.jsonl").read_bytes()


@pytest.mark.slow
def test_iterated_rlhf_asks_people_in_every_round_and_resumes_while_it_waits(sft, monkeypatch):
    out = sft / "out"
    sizes = ["--sampling", "response_length=12", "num_samples=4", "--device", "cpu"]
    sizes += ["--reward", "lr=0.01", "epochs=4"]
    sizes += ["--ppo", "response_length=12", "lr=0.001", "epochs=4", "batch_size=10"]
    prompts = ["--model", sft / "sft", "--prompts", sft / "prompts.jsonl", "--rounds", 2]
    stop = lambda *texts, **options: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    monkeypatch.setattr(people, "print", stop, raising=False)
    db = ["--db", sft / "l.sqlite", "--port", 0, "--log", "csv"]
    assert run("iterated-rlhf", *prompts, *db, *sizes, "--out", out) == 130

    label_printed_links(monkeypatch, people, kind)
    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("iterated-rlhf", "--resume", "--out", out) == 130
    pairs = (out / "round-1" / "pairs.jsonl").read_bytes()
    with open_store(sft / "l.sqlite", annotators=["annotator"]) as store:  # somebody thinks again
        store.add("annotator", {"id": "undo", "choice": "undo"})
    assert run("iterated-rlhf", "--resume", "--out", out) == 0
    assert (out / "round-1" / "pairs.jsonl").read_bytes() == pairs
    first, last = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert [line.split(",")[0] for line in (out / "metrics.csv").open()] == ["step", "1", "2"]
    assert "elo" not in first and last["pairs"] > first["pairs"] > 20
    assert last["elo"][0] == 0 and last["elo_lower"][1] < last["elo"][1] < last["elo_upper"][1]
    assert last["elo"][1] > 0 and last["reward/accuracy"] > 0.8
    assert share_of_kind(sft, "out") > share_of_kind(sft, "sft")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--overlap", 2], "--overlap 2 needs as many annotators, got 1"),
        (["--annotators", "ann", "ann"], "--annotators must be different names, got ann ann"),
        (["--eval-prompts", "p.jsonl"], "--eval-prompts needs a judge or a reward, not --db"),
        (["--reward-weights", 1], "--reward-weights needs --reward-model"),
    ],
)
def test_options_that_do_not_fit_people_are_refused(sample_people, fails, options, message):
    assert message in fails(*sample_people, *options)
