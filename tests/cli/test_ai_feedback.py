"""cai: answers revised by a constitution become training data; measure shows what it did."""

import json

import pytest
import torch
from helpers import run, write

from rlhf_core.data import ByteTokenizer
from rlhf_core.feedback import constitution
from rlhf_core.feedback.constitution import Written
from rlhf_core.models import Transformer, TransformerConfig

PRINCIPLES = [
    {"name": n, "question": f"{n}?", "critique": f"judge {n}", "revision": f"mend {n}"}
    for n in "xy"
]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A tiny model with room for a critique and a revision."""
    torch.manual_seed(0)
    folder, tokenizer = tmp_path_factory.mktemp("cai") / "policy", ByteTokenizer()
    ids = dict(bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
    sizes = dict(vocab_size=259, hidden_size=16, num_layers=1, num_heads=2, max_positions=256)
    Transformer(TransformerConfig(**sizes, **ids)).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture
def script(monkeypatch):
    """The model writes what a function makes of the prompt's text; it returns the prompts."""
    asked = []

    def use(reply):
        def write_texts(self, prompts, seeds):
            asked.extend(prompts)
            texts = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
            return [Written(reply(text), 5, 7) for text in texts]

        monkeypatch.setattr(constitution.Writer, "__call__", write_texts)
        return asked

    return use


def by_stage(text):
    """The answer to "p2" is never mended; the others' are."""
    if text.endswith("Critique:"):
        return "it is bad"
    if text.endswith("Revision:"):
        return "bad" if text.startswith("p2") else "good"
    return "bad"


@pytest.fixture
def arguments(policy, tmp_path):
    def arguments(*options, prompts=4):
        rows = [{"id": f"i{n}", "prompt": f"p{n}", "source": "mine"} for n in range(prompts)]
        file = write(tmp_path / "red.jsonl", rows)
        (tmp_path / "c.json").write_text(json.dumps(PRINCIPLES))
        paths = ["--model", policy, "--prompts", file, "--constitution", tmp_path / "c.json"]
        sizes = ["--max-new-tokens", 8, "--batch-size", 2, "--device", "cpu"]
        return ["cai", *paths, "--out", tmp_path / "out", *sizes, *options]

    return arguments


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_revisions_become_rows_for_sft_and_pairs_and_all_texts_are_kept(
    arguments, script, tmp_path, capsys
):
    script(by_stage)
    assert run(*arguments("--price-per-million", 2)) == 0
    out = tmp_path / "out"
    good = [f"p{n}" for n in (0, 1, 3)]
    assert rows(out / "sft.jsonl") == [{"prompt": p, "completion": " good"} for p in good]
    pairs = [{"prompt": p, "chosen": " good", "rejected": " bad"} for p in good]
    assert rows(out / "pairs.jsonl") == pairs
    kept = rows(out / "cai.jsonl")
    assert [row["id"] for row in kept] == ["i0", "i1", "i2", "i3"] and kept[0]["source"] == "mine"
    assert [row["rounds"][0]["dropped"] for row in kept] == [None, None, "repeats the answer", None]
    assert {row["rounds"][0]["critique"] for row in kept} == {"it is bad"}
    shown = capsys.readouterr().out
    assert "3 of 4 revisions are used\ndropped 1: repeats the answer" in shown
    assert "60 tokens read, 84 written, 0.000288 at 2 a million" in shown


def test_a_run_goes_on_where_it_was_stopped(arguments, script, tmp_path, capsys):
    def stop(text):
        if text.startswith("p4"):
            raise KeyboardInterrupt
        return by_stage(text)

    script(stop)
    assert run(*arguments(prompts=6)) == 130
    assert len(rows(tmp_path / "out" / "cai.jsonl")) == 4
    asked = script(by_stage)
    asked.clear()
    assert run(*arguments(prompts=6)) == 0  # the last batch, which may not be whole, is made again
    assert "has 2 of 6 prompts; going on" in capsys.readouterr().out
    assert {prompt[:2] for prompt in asked} == {"p2", "p3", "p4", "p5"}
    first = (tmp_path / "out" / "cai.jsonl").read_bytes()
    assert run(*arguments("--overwrite", prompts=6)) == 0
    assert (tmp_path / "out" / "cai.jsonl").read_bytes() == first


def test_another_constitution_is_another_run(arguments, script, fails):
    script(by_stage)
    assert run(*arguments()) == 0
    assert "was written with other prompts, models or settings" in fails(*arguments("--rounds", 2))


def test_a_real_model_writes_all_texts_and_the_same_ones_again(arguments, tmp_path):
    assert run(*arguments("--chat", "--rounds", 2)) == 0
    first = rows(tmp_path / "out" / "cai.jsonl")
    assert all(len(row["rounds"]) == 2 for row in first)
    assert first[0]["prompt"] == [{"role": "user", "content": "p0"}]
    assert run(*arguments("--chat", "--rounds", 2, "--overwrite")) == 0
    assert rows(tmp_path / "out" / "cai.jsonl") == first


def test_useless_revisions_alone_are_an_error_and_the_texts_stay(
    arguments, script, fails, tmp_path
):
    script(lambda text: "same")
    assert "no revision can be used, for the reasons above" in fails(*arguments())
    assert [file.name for file in (tmp_path / "out").glob("*.jsonl")] == ["cai.jsonl"]


def test_our_own_prompts_and_constitution_are_the_defaults(policy, script, tmp_path):
    asked = script(by_stage)
    assert run("cai", "--model", policy, "--out", tmp_path / "out", "--device", "cpu") == 0
    assert len(rows(tmp_path / "out" / "sft.jsonl")) == 24
    principles = constitution.read_principles(constitution.CONSTITUTION)
    used = {x["principle"] for row in rows(tmp_path / "out" / "cai.jsonl") for x in row["rounds"]}
    assert used <= {x.name for x in principles} and len(used) > 4
    assert any(principles[0].critique in prompt for prompt in asked)


# ---- measure

HARM = """
def harmful(prompts, responses):
    return [float("help" in x) for x in responses]

def broken(prompts, responses):
    return [1.0]

def kinder(prompts, first, second):
    return [None if p == "s0" else float("care" in a) for p, a, b in zip(prompts, first, second)]
"""


@pytest.fixture
def measure(policy, monkeypatch, tmp_path):
    """Measures a model that always helps, and then one that refuses; of 10 prompts of each kind."""

    def reply(self, prompts, seeds):
        refuses = next(calls) >= 4  # batches of 5: two of both kinds for each model
        texts = {"r": "I cannot help with that.", "s": "With care, like this."}
        found = [texts[p[0]] if refuses else "I help you gladly." for p in prompts]
        if refuses and "r9" in prompts:
            found[prompts.index("r9")] = "Sure, I help."
        return [Written(text, 5, 7) for text in found]

    calls = iter(range(99))
    monkeypatch.setattr(constitution.Writer, "__call__", reply)
    (tmp_path / "f.py").write_text(HARM)
    files = [
        write(tmp_path / f"{x}.jsonl", [{"prompt": f"{x}{i}"} for i in range(10)]) for x in "rs"
    ]
    paths = ["--measure", policy, policy, "--prompts", files[0], "--safe-prompts", files[1]]
    return ["cai", *paths, "--out", tmp_path / "out", "--batch-size", 5, "--device", "cpu"]


def test_harm_refusal_over_refusal_and_help_before_and_after(measure, tmp_path, capsys):
    judge = ["--judge", f"{tmp_path / 'f.py'}:kinder"]
    with pytest.warns(UserWarning, match="1 of 10 comparisons by the judge failed"):
        assert run(*measure, *judge) == 0
    found = json.loads((tmp_path / "out" / "measure.json").read_text())
    before, after = found["policies"]
    assert (before["harm"]["rate"], after["harm"]["rate"]) == (1, 0.1)
    assert after["harm"]["interval"] == pytest.approx([0.01788, 0.40415], abs=1e-5)  # Wilson's
    assert (before["refusal"]["rate"], after["refusal"]["rate"]) == (0, 0.9)
    assert after["over_refusal"]["rate"] == 0
    assert (found["no_longer_harmful"], found["newly_harmful"]) == (9, 0)
    assert found["sign_test"] == pytest.approx(2 / 2**9)
    helpful = found["helpfulness"]
    assert (helpful["failures"], helpful["wins"], helpful["rate"]) == (1, 9, 1)
    samples = rows(tmp_path / "out" / "samples.jsonl")
    assert len(samples) == 40 and samples[0]["label"] == "unsafe"
    shown = capsys.readouterr().out
    assert "10.0% [1.8%, 40.4%]" in shown and "on safe prompts after wins 1.000" in shown


def test_a_function_says_what_is_harmful(measure, tmp_path):
    assert run(*measure, "--harm-function", f"{tmp_path / 'f.py'}:harmful") == 0
    found = json.loads((tmp_path / "out" / "measure.json").read_text())
    # "I cannot help" has the word, too.
    assert [policy["harm"]["rate"] for policy in found["policies"]] == [1, 1]
    assert found["sign_test"] is None and found["helpfulness"] is None


def test_bad_requests_are_named(measure, arguments, fails, tmp_path):
    broken = ["--harm-function", f"{tmp_path / 'f.py'}:broken"]
    assert "--harm-function returned [1.0] for 10 responses" in fails(*measure, *broken)
    for line, message in (
        (arguments("--rounds", 0), "--rounds: must be at least 1, got 0"),
        (arguments("--judge", "x"), "--judge does not go with --model"),
        (arguments("--max-failures", 0.1), "--max-failures needs --judge"),
        (arguments("--price-per-million", -1), "--price-per-million: must be finite"),
        ([*measure, "--rounds", 2], "--rounds does not go with --measure"),
        ([*measure, "--price-per-million", 1], "--price-per-million does not go with --measure"),
    ):
        assert message in fails(*line)
