"""The command line: each command from files to files, and errors in one line that names what is wrong."""

import json
import subprocess
import sys

import pytest
import torch

from rlhf_core import backends, cli
from rlhf_core.data import ByteTokenizer
from rlhf_core.models import RewardModel, Transformer, TransformerConfig

TEXTS = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(10)]
PAIRS = [{"prompt": f"say {i}", "chosen": " yes", "rejected": " no way"} for i in range(10)]
SMALL = ["--batch-size", "4", "--max-steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy and a reward model, tiny, with a byte tokenizer."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    tokenizer = ByteTokenizer()
    sizes = dict(vocab_size=259, hidden_size=16, num_layers=1, num_heads=2, max_positions=64)
    ids = dict(bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
    policy = Transformer(TransformerConfig(**sizes, **ids))
    for model, name in ((policy, "policy"), (RewardModel.from_model(policy), "reward")):
        model.save_pretrained(root / name)
        tokenizer.save(root / name)
    return root


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def train(command, folders, data, out, *more):
    return run(command, "--model", folders / "policy", "--data", data, "--out", out, *SMALL, *more)


# ---- what works


def test_info_lists_versions_and_backends(capsys):
    assert run("info") == 0
    shown = capsys.readouterr().out
    for name, available, reason in backends.status():
        assert f"{name:<10} {'yes' if available else 'no':<4} {reason}" in shown
    assert torch.__version__ in shown and "tokenizers" in shown


def test_generate_goes_on_from_every_prompt(folders, capsys):
    arguments = ["generate", "--model", folders / "policy", "--prompt", "one", "a longer one", "--max-new-tokens", 5]
    shown = []
    for more in (["--temperature", 0], ["--temperature", 0], ["--seed", 1], ["--top-k", 1], ["--top-p", 1e-6]):
        assert run(*arguments, *more) == 0
        shown.append(capsys.readouterr().out)
    greedy = shown[0]
    assert "one" in greedy and "a longer one" in greedy
    assert shown[1] == shown[3] == shown[4] == greedy != shown[2]
    assert run(*arguments, "--temperature", 0, "--eos-ids", *range(259)) == 0
    assert len(capsys.readouterr().out) < len(greedy)


@pytest.mark.parametrize("command, rows", [("sft", TEXTS), ("reward", PAIRS), ("dpo", PAIRS)])
def test_a_trainer_goes_from_files_to_a_model(command, rows, folders, tmp_path, capsys):
    data, out = write(tmp_path / "data.jsonl", rows), tmp_path / "out"
    assert train(command, folders, data, out, "--eval-fraction", 0.2, "--lr", 0.01) == 0
    shown = capsys.readouterr().out
    assert "8 to train on, 2 held out" in shown and f"written to {out}" in shown and "eval_loss" in shown
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    config = json.loads((out / "train_config.json").read_text())
    assert config["algorithm"] == command and config["lr"] == 0.01 and config["batch_size"] == 4
    model = (RewardModel if command == "reward" else Transformer).from_pretrained(out)
    before = Transformer.from_pretrained(folders / "policy")
    assert not torch.equal(model.trunk.embed.weight, before.trunk.embed.weight)
    assert (out / "tokenizer_config.json").is_file()


def test_eval_data_is_evaluated_and_nothing_held_out(folders, tmp_path, capsys):
    data, other = write(tmp_path / "a.jsonl", TEXTS), write(tmp_path / "b.jsonl", TEXTS[:3])
    assert train("sft", folders, data, tmp_path / "out", "--eval-data", other) == 0
    assert "10 to train on, 3 held out" in capsys.readouterr().out


@pytest.mark.parametrize("name, rows", [("p.jsonl", TEXTS), ("p.txt", ["one", "two", "three", "four"])])
def test_ppo_goes_from_prompts_to_a_policy_and_a_critic(name, rows, folders, tmp_path, capsys):
    prompts, out = write(tmp_path / name, rows), tmp_path / "out"
    models = ["--model", folders / "policy", "--reward-model", folders / "reward"]
    options = ["--response-length", 4, "--ppo-epochs", 1, "--missing-eos-penalty", 1, "--eos-ids", *range(259)]
    assert run("ppo", *models, "--prompts", prompts, "--out", out, *SMALL, *options) == 0
    assert "objective/scores" in capsys.readouterr().out
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert line["response_length"] == 1 and line["val/num_eos_tokens"] == 4  # whatever comes ends the response
    assert json.loads((out / "train_config.json").read_text())["missing_eos_penalty"] == 1
    assert Transformer.from_pretrained(out) and (out / "critic" / "model.safetensors").is_file()
    assert run("generate", "--model", out, "--prompt", "hi", "--max-new-tokens", 2) == 0


# ---- what does not


def fails(capsys, *arguments):
    """The one line of the error, on stderr."""
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if "error" in line]
    assert line.startswith(f"rlhf-core {arguments[0]}: error: ") and "Traceback" not in shown.err
    return line


@pytest.mark.parametrize(
    "command, good, bad, message",
    [
        ("sft", TEXTS, {"prompt": "p", "completion": True}, "field 'completion' must be a string, got true"),
        ("sft", TEXTS, "{not json", "not valid JSON"),
        ("reward", PAIRS, {"prompt": "p", "chosen": "a"}, "field 'rejected' is missing"),
        ("dpo", PAIRS, {"prompt": "p", "chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are equal"),
    ],
)
def test_a_bad_line_stops_with_file_line_and_field_or_is_dropped(
    command, good, bad, message, folders, tmp_path, capsys
):
    data, out = write(tmp_path / "data.jsonl", [*good[:3], bad, *good[3:]]), tmp_path / "out"
    arguments = [command, "--model", folders / "policy", "--data", data, "--out", out, *SMALL]
    line = fails(capsys, *arguments)
    assert f"{data}:4: " in line and message in line
    assert not out.exists()
    assert run(*arguments, "--skip-bad") == 0
    shown = capsys.readouterr()
    assert "bad lines dropped: 1" in shown.err and f"{data}:4: " in shown.err
    assert "9 to train on, 1 held out" in shown.out


def test_an_out_folder_that_holds_something_is_refused_unless_told(folders, tmp_path, capsys):
    data, out = write(tmp_path / "data.jsonl", TEXTS), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    arguments = ["sft", "--model", folders / "policy", "--data", data, "--out", out, *SMALL]
    assert f"{out} is not empty" in fails(capsys, *arguments)
    assert [file.name for file in out.iterdir()] == ["mine"]
    assert run(*arguments, "--overwrite") == 0
    assert (out / "mine").exists() and (out / "model.safetensors").exists()


@pytest.mark.parametrize("missing", ["--model", "--data"])
def test_a_path_that_is_not_there_is_named(missing, folders, tmp_path, capsys):
    paths = {"--model": folders / "policy", "--data": write(tmp_path / "data.jsonl", TEXTS)}
    paths[missing] = tmp_path / "absent"
    arguments = [x for pair in paths.items() for x in pair]
    assert str(tmp_path / "absent") in fails(capsys, "sft", *arguments, "--out", tmp_path / "out", *SMALL)


def test_a_policy_is_no_reward_model(folders, tmp_path, capsys):
    prompts = write(tmp_path / "p.txt", ["one"])
    models = ["--model", folders / "policy", "--reward-model", folders / "policy"]
    line = fails(capsys, "ppo", *models, "--prompts", prompts, "--out", tmp_path / "out", *SMALL)
    assert "not a reward model" in line


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lr", "0"], "lr must be > 0"),
        (["--eval-fraction", "1"], "--eval-fraction must be in [0, 1), got 1.0"),
        (["--device", "abacus"], "--device abacus: "),
    ],
)
def test_an_option_out_of_range_is_named(options, message, folders, tmp_path, capsys):
    data = write(tmp_path / "data.jsonl", TEXTS)
    arguments = ["--model", folders / "policy", "--data", data, "--out", tmp_path / "out"]
    assert message in fails(capsys, "sft", *arguments, *SMALL, *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["fly"], ["sft"], ["generate", "--model", "x"]], ids=str)
def test_wrong_usage_is_status_two(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        run(*arguments)
    assert raised.value.code == 2 and "usage: rlhf-core" in capsys.readouterr().err


def test_every_option_of_a_trainer_says_what_it_is(capsys):
    for command, option, text in (("ppo", "--kl-coef", "weight of the KL"), ("dpo", "--beta", "implicit KL penalty")):
        with pytest.raises(SystemExit) as raised:
            run(command, "--help")
        shown = " ".join(capsys.readouterr().out.split())
        assert raised.value.code == 0 and option in shown and text in shown


def test_as_a_program_an_error_is_one_line_and_status_two(tmp_path):
    command = [sys.executable, "-m", "rlhf_core.cli", "generate", "--model", str(tmp_path), "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("rlhf-core generate: error: ") and done.stderr.count("\n") == 1
