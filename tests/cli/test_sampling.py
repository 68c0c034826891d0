"""generate, best-of-n and merge."""

import json

import pytest
from helpers import PAIRS, TEXTS, run, write

from rlhf_core.data import ByteTokenizer
from rlhf_core.models import ILQLModel, Transformer

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
    assert shown("--num-samples", 2).count("one") > plain.count("one") == 1
    for more in (["--min-p", 0.99], ["--repetition-penalty", 1e4], ["--top-p", 0.1]):
        assert shown(*more) != plain == shown()
    ends = ("--eos-ids", *range(64, 259))
    assert len(shown(*ends, "--min-new-tokens", 12)) > len(shown(*ends))
    assert len(shown("--stop", *map(chr, range(33, 127)))) < len(plain)


@pytest.mark.parametrize("beta", ["-1", "inf", "nan"])
def test_a_beta_out_of_range_is_refused(beta, folders, fails, tmp_path):
    ILQLModel(Transformer.from_pretrained(folders / "policy")).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    line = fails("generate", "--model", tmp_path, "--prompt", "x", "--beta", beta)
    assert f"--beta must be finite and at least 0, got {float(beta)}" in line


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
