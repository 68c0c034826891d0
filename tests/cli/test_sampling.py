"""generate, best-of-n and merge."""

import json

import pytest
from helpers import PAIRS, TEXTS, run, tiny, write

from rlhf_core.data import ByteTokenizer

# ---- generate


@pytest.fixture
def generate(folders, capsys):
    """What `generate` prints for two prompts with these options."""

    def generate(*options, prompts=("one", "a longer one")):
        fixed = ["--model", folders / "policy", "--prompt", *prompts, "--device", "cpu"]
        assert run("generate", *fixed, *options) == 0
        return capsys.readouterr().out

    return generate


def test_generate_continues_every_prompt(generate):
    short, greedy = ["--max-new-tokens", 5], ["--max-new-tokens", 5, "--temperature", 0]
    want = generate(*greedy)
    assert "one" in want and "a longer one" in want
    for same in (greedy, [*short, "--top-k", 1], [*short, "--top-p", 1e-6]):
        assert generate(*same) == want
    assert generate(*short, "--seed", 1) != want
    assert len(generate(*greedy, "--eos-ids", *range(259))) < len(want)


def test_every_option_of_generate_reaches_the_sampler(generate):
    def shown(*more):
        fixed = ["--max-new-tokens", 12, "--temperature", 1.5]
        return generate(*fixed, *more, prompts=("one", "two"))

    plain = shown()
    assert shown("--num-samples", 2).count("response") == 2 * plain.count("response") == 4
    for more in (["--min-p", 0.99], ["--repetition-penalty", 1e4], ["--top-p", 0.1]):
        assert shown(*more) != plain == shown()
    ends = ("--eos-ids", *range(64, 259))
    assert len(shown(*ends, "--min-new-tokens", 12)) > len(shown(*ends))
    assert len(shown("--stop", *map(chr, range(33, 127)))) < len(plain)


def read_rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_prompts_of_a_file_are_answered_into_a_file_whatever_the_batch(folders, tmp_path, capsys):
    rows = [{"prompt": "one"}, {"messages": [{"role": "user", "content": "hi"}]}]
    prompts, out = write(tmp_path / "p.jsonl", [*rows, {"text": "three"}]), tmp_path / "new/o.jsonl"
    command = ["generate", "--model", folders / "policy", "--prompts", prompts, "--device", "cpu"]
    command += ["--max-new-tokens", 5, "--num-samples", 2, "--seed", 3, "--out", out]
    assert run(*command) == 0
    assert capsys.readouterr().out == f"6 responses to 3 prompts; written to {out}\n"
    found = read_rows(out)
    assert [row["prompt"] for row in found[::2]] == ["one", rows[1]["messages"], "three"]
    assert [row["sample"] for row in found] == [1, 2] * 3
    for row in found:
        assert (row["model"], row["seed"]) == (str(folders / "policy"), 3)
        assert row["sampling"]["temperature"] == 1 and row["sampling"]["max_new_tokens"] == 5
    assert run(*command) == 2
    assert f"{out} exists. Choose another file, or pass --overwrite" in capsys.readouterr().err
    assert run(*command, "--out", prompts, "--overwrite") == 2
    assert f"{prompts} is the data itself. Choose another file" in capsys.readouterr().err
    assert run(*command, "--overwrite", "--batch-size", 1) == 0
    assert read_rows(out) == found and [x.name for x in out.parent.iterdir()] == ["o.jsonl"]


def test_a_response_stands_apart_from_its_prompt(generate):
    options = ["--max-new-tokens", 4, "--temperature", 0]
    prompt, response, end = generate(*options, prompts=("one",)).partition("\n--- response\n")
    assert prompt == "--- prompt\none" and response and end.endswith("\n")
    shown = generate(*options, "--num-samples", 2, prompts=("one",))
    assert shown == "\n".join(
        [prompt, f"--- response, sample 1\n{end}--- response, sample 2\n{end}"]
    )


def test_several_models_answer_side_by_side(generate, folders, tmp_path):
    other = tmp_path / "other"
    tiny(seed=3, vocab_size=259, max_positions=64).save_pretrained(other)
    ByteTokenizer().save(other)
    options = ["--max-new-tokens", 4, "--temperature", 0]
    models, out = [folders / "policy", other], tmp_path / "o.jsonl"
    shown = generate(*options, "--model", *models)
    alone = [generate(*options, "--model", model).split("--- prompt\n")[1:] for model in models]
    answers = [[text.partition("--- response\n")[2] for text in texts] for texts in alone]
    assert answers[0] != answers[1]
    assert shown == "".join(
        f"--- prompt\n{prompt}\n"
        + "".join(f"--- response of {model}\n{each[i]}" for model, each in zip(models, answers))
        for i, prompt in enumerate(("one", "a longer one"))
    )
    generate(*options, "--model", *models, "--out", out)
    assert [(row["prompt"], row["model"]) for row in read_rows(out)] == [
        (prompt, str(model)) for prompt in ("one", "a longer one") for model in models
    ]


def test_a_prompt_without_room_and_bad_options_of_generate_are_named(folders, fails, tmp_path):
    command = ["generate", "--model", folders / "policy", "--device", "cpu"]
    line = fails(*command, "--prompt", "x", "y" * 50, "--max-new-tokens", 30)
    assert "prompt 2 has 51 tokens, which leave no room for --max-new-tokens 30 in the 64" in line
    assert "--batch-size: must be at least 1, got 0" in fails(
        *command, "--prompt", "x", "--batch-size", 0
    )
    assert "--overwrite needs --out" in fails(*command, "--prompt", "x", "--overwrite")


@pytest.mark.parametrize("beta", ["-1", "inf", "nan"])
def test_a_beta_out_of_range_is_refused(beta, folders, fails):
    line = fails("generate", "--model", folders / "policy", "--prompt", "x", "--beta", beta)
    assert f"--beta: must be finite and at least 0, got {beta}" in line


def test_beta_needs_a_model_with_values(folders, fails):
    line = fails("generate", "--model", folders / "policy", "--prompt", "x", "--beta", 1)
    assert "--beta needs a model trained by ilql" in line


# ---- best-of-n


def test_best_of_n_writes_rows_that_sft_reads(folders, train, tmp_path, capsys):
    prompts = write(tmp_path / "prompts.jsonl", [TEXTS[0], {"prompt": "é"}])
    out = tmp_path / "new" / "best.jsonl"
    models = ["--model", folders / "policy", "--reward-model", folders / "reward"]
    options = ["--prompts", prompts, "--out", out, "--response-length", 4, "--device", "cpu"]
    scores = {}
    for n in (1, 8):
        assert run("best-of-n", *models, *options, "--num-samples", n, "--overwrite") == 0
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["prompt"] for row in found] == ["0 + 1 = ", "é"]
        scores[n] = sum(row["score"] for row in found)
        assert f"of the best of {n} {scores[n] / 2:.6g}" in capsys.readouterr().out
    assert scores[8] > scores[1] and list(out.parent.iterdir()) == [out]
    assert run("best-of-n", *models, *options) == 2
    assert f"{out} exists. Choose another file, or pass --overwrite" in capsys.readouterr().err
    assert train("sft", out, "--eval-fraction", 0) == 0


def test_a_folder_in_the_place_of_a_file_is_reported_before_anything_is_computed(
    folders, fails, train, tmp_path, capsys
):
    """The model is absent, and yet it is --out that the error names."""
    models = ["--model", tmp_path / "absent", "--reward-model", folders / "reward"]
    options = ["--prompts", write(tmp_path / "p.txt", ["one"]), "--overwrite"]
    line = fails("best-of-n", *models, *options, "--out", tmp_path)
    assert f"{tmp_path} is a directory, not a file" in line
    assert train("dpo", PAIRS, "--reference-logprobs", tmp_path) == 2
    message = f"reference_logprobs {tmp_path} is a directory, not a file"
    assert message in capsys.readouterr().err


def test_best_of_n_keeps_the_k_best_with_rank_and_score(folders, fails, tmp_path):
    prompts, out = write(tmp_path / "p.txt", ["one", "two"]), tmp_path / "best.jsonl"
    command = ["best-of-n", "--model", folders / "policy", "--reward-model", folders / "reward"]
    command += ["--prompts", prompts, "--response-length", 4, "--device", "cpu", "--out", out]
    command += ["--num-samples", 5, "--overwrite"]
    assert run(*command, "--keep", 5) == 0
    everything = read_rows(out)
    for of_prompt in (everything[:5], everything[5:]):
        assert [row["rank"] for row in of_prompt] == [1, 2, 3, 4, 5]
        scores = [row["score"] for row in of_prompt]
        assert scores == sorted(scores, reverse=True) and scores[0] > scores[-1]
    for keep in (1, 3):
        assert run(*command, "--keep", keep) == 0
        assert read_rows(out) == [row for row in everything if row["rank"] <= keep]
    assert "--keep must be from 1 to --num-samples 5, got 6" in fails(*command, "--keep", 6)
    assert "--keep 2 contradicts --pairs" in fails(*command, "--keep", 2, "--pairs")


# ---- merge


def test_adapters_are_not_merged_into_their_own_folder(train, fails, tmp_path):
    out, again = tmp_path / "out", tmp_path / "x" / ".." / "out"
    assert train("sft", TEXTS, "--lora-rank", 2) == 0
    before = sorted(out.iterdir())
    (tmp_path / "x").mkdir()
    line = fails("merge", "--model", out, "--out", again, "--overwrite")
    assert f"--out {again} is --model" in line and sorted(out.iterdir()) == before


def test_a_folder_without_adapters_is_not_merged(folders, fails, tmp_path):
    line = fails("merge", "--model", folders / "policy", "--out", tmp_path / "no")
    assert "no adapters to merge" in line
