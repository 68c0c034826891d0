"""The command line: each command from files to files, and errors in one line that names what is wrong."""

import errno
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from rlhf_core import backends, cli, commands
from rlhf_core.data import ByteTokenizer
from rlhf_core.models import ILQLModel, RewardModel, Transformer, TransformerConfig
from rlhf_core.models.lora import has_adapters
from rlhf_core.trainers import PPOTrainer
from rlhf_core.training.trainer import Trainer

TEXTS = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(10)]
PAIRS = [{"prompt": f"say {i}", "chosen": " yes", "rejected": " no way"} for i in range(10)]
SMALL = ["--batch-size", "4", "--max-steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, a reward model and one that scores steps, tiny, with a byte tokenizer."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    tokenizer = ByteTokenizer()
    sizes = dict(vocab_size=259, hidden_size=16, num_layers=1, num_heads=2, max_positions=64)
    ids = dict(bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
    policy = Transformer(TransformerConfig(**sizes, **ids))
    reward, process = (RewardModel.from_model(policy) for _ in range(2))
    process.of_steps = True
    for model, name in ((policy, "policy"), (reward, "reward"), (process, "process")):
        model.save_pretrained(root / name)
        tokenizer.save(root / name)
    return root


def write(path, rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
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
    arguments = [
        "generate",
        "--model",
        folders / "policy",
        "--prompt",
        "one",
        "a longer one",
        "--max-new-tokens",
        5,
    ]
    shown = []
    for more in (
        ["--temperature", 0],
        ["--temperature", 0],
        ["--seed", 1],
        ["--top-k", 1],
        ["--top-p", 1e-6],
    ):
        assert run(*arguments, *more) == 0
        shown.append(capsys.readouterr().out)
    greedy = shown[0]
    assert "one" in greedy and "a longer one" in greedy
    assert shown[1] == shown[3] == shown[4] == greedy != shown[2]
    assert run(*arguments, "--temperature", 0, "--eos-ids", *range(259)) == 0
    assert len(capsys.readouterr().out) < len(greedy)


def test_every_option_of_generate_reaches_the_sampler(folders, capsys):
    def shown(*more):
        arguments = ("--prompt", "one", "two", "--max-new-tokens", 12, "--temperature", 1.5)
        assert run("generate", "--model", folders / "policy", *arguments, *more) == 0
        return capsys.readouterr().out

    plain = shown()
    assert shown("--num-samples", 2).count("one") > plain.count("one") == 1
    for more in (["--min-p", 0.99], ["--repetition-penalty", 1e4], ["--top-p", 0.1]):
        assert shown(*more) != plain == shown()
    ends = ("--eos-ids", *range(64, 259))
    assert len(shown(*ends, "--min-new-tokens", 12)) > len(shown(*ends))
    assert len(shown("--stop", *map(chr, range(33, 127)))) < len(plain)


@pytest.mark.parametrize("command, rows", [("sft", TEXTS), ("reward", PAIRS), ("dpo", PAIRS)])
def test_a_trainer_goes_from_files_to_a_model(command, rows, folders, tmp_path, capsys):
    data, out = write(tmp_path / "data.jsonl", rows), tmp_path / "out"
    assert train(command, folders, data, out, "--eval-fraction", 0.2, "--lr", 0.01) == 0
    shown = capsys.readouterr().out
    assert (
        "8 to train on, 2 held out" in shown
        and f"written to {out}" in shown
        and "eval_loss" in shown
    )
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    config = json.loads((out / "train_config.json").read_text())
    assert config["algorithm"] == command and config["lr"] == 0.01 and config["batch_size"] == 4
    model = (RewardModel if command == "reward" else Transformer).from_pretrained(out)
    before = Transformer.from_pretrained(folders / "policy")
    assert not torch.equal(model.trunk.embed.weight, before.trunk.embed.weight)
    assert (out / "tokenizer_config.json").is_file()


def test_a_reward_model_learns_from_ranked_lists_and_from_pairs_with_margins(
    folders, tmp_path, capsys
):
    ranked = [
        {"prompt": f"say {i}", "responses": ["no", "yes", "so"], "ranks": [2, 0, 1]}
        for i in range(10)
    ]
    pairs = [row | {"margin": 0.5} for row in PAIRS]
    for name, data in (("lists", ranked), ("pairs", pairs)):
        assert (
            train("reward", folders, write(tmp_path / f"{name}.jsonl", data), tmp_path / name) == 0
        )
        shown = capsys.readouterr().out
        assert (
            "9 to train on, 1 held out" in shown
            and "length_correlation" in shown
            and "score_std" in shown
        )
    assert (
        train("reward", folders, tmp_path / "lists.jsonl", tmp_path / "no", "--centering-coef", 0.1)
        == 2
    )
    assert "centering_coef has no effect on ranked lists, got 0.1" in capsys.readouterr().err


def test_kto_goes_from_labels_to_a_model(folders, tmp_path, capsys):
    rows = [
        {"prompt": f"say {i}", "response": " yes" if i % 2 else " no", "label": i % 2 == 1}
        for i in range(10)
    ]
    out = tmp_path / "out"
    options = ["--lr", 0.01, "--eval-fraction", 0.2, "--undesirable-weight", 2]
    assert train("kto", folders, write(tmp_path / "data.jsonl", rows), out, *options) == 0
    shown = capsys.readouterr().out
    assert (
        "8 to train on, 2 held out" in shown
        and "rewards/undesirable" in shown
        and "eval_loss" in shown
    )
    assert json.loads((out / "train_config.json").read_text())["undesirable_weight"] == 2
    Transformer.from_pretrained(out)


def test_dpo_takes_its_loss_and_refuses_what_has_no_effect(folders, tmp_path, capsys):
    data, out = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out"
    options = ["--loss", "simpo", "--average", "--beta", 2, "--gamma", 0.5]
    assert train("dpo", folders, data, out, *options) == 0
    config = json.loads((out / "train_config.json").read_text())
    assert config["loss"] == "simpo" and config["average"] and config["gamma"] == 0.5
    assert train("dpo", folders, data, tmp_path / "no", "--gamma", 0.5) == 2
    assert "gamma has no effect on loss 'dpo', got 0.5" in capsys.readouterr().err


def test_dpo_reads_the_log_probs_of_the_reference_that_an_earlier_run_wrote(
    folders, tmp_path, capsys
):
    data, file = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "cache" / "logprobs"
    for out, more in (("first", []), ("second", ["--seed", 1, "--beta", 0.2])):
        assert train("dpo", folders, data, tmp_path / out, "--reference-logprobs", file, *more) == 0
    assert (
        train(
            "dpo",
            folders,
            data,
            tmp_path / "no",
            "--reference-logprobs",
            file,
            "--precision",
            "bfloat16",
        )
        == 2
    )
    assert f"{file}: made with another precision" in capsys.readouterr().err


@pytest.mark.parametrize("command, rows", [("sft", TEXTS), ("reward", PAIRS), ("dpo", PAIRS)])
def test_what_is_evaluated_is_encoded_like_what_is_trained_on(command, rows, folders, tmp_path):
    """Row 32: on the same file, cut to the same length, with the same weights: the same loss."""
    data = write(tmp_path / "data.jsonl", rows)
    options = [
        "--eval-data",
        data,
        "--lr",
        1e-30,
        "--batch-size",
        10,
        "--max-steps",
        1,
        "--max-length",
        9,
    ]
    assert train(command, folders, data, tmp_path / "out", *options) == 0
    (line,) = map(json.loads, (tmp_path / "out/metrics.jsonl").read_text().splitlines())
    evaluated = {name: value for name, value in line.items() if name.startswith("eval_")}
    assert "eval_loss" in evaluated and evaluated["eval_loss"] != 0
    assert evaluated == pytest.approx(
        {name: line[name.removeprefix("eval_")] for name in evaluated}, abs=1e-5
    )


def test_eval_data_is_evaluated_and_nothing_held_out(folders, tmp_path, capsys):
    data, other = write(tmp_path / "a.jsonl", TEXTS), write(tmp_path / "b.jsonl", TEXTS[:3])
    assert train("sft", folders, data, tmp_path / "out", "--eval-data", other) == 0
    assert "10 to train on, 3 held out" in capsys.readouterr().out


def test_lora_trains_adapters_that_the_next_command_reads_and_merge_folds(
    folders, tmp_path, capsys
):
    """SFT, then DPO of its adapters; a reward model; PPO on one trunk: every folder reads back."""
    texts, pairs = write(tmp_path / "texts.jsonl", TEXTS), write(tmp_path / "pairs.jsonl", PAIRS)
    prompts = write(tmp_path / "prompts.jsonl", PAIRS)
    lora = [
        "--lora-rank",
        2,
        "--lora-alpha",
        4,
        "--lora-targets",
        "q_proj",
        "down_proj",
        "--lr",
        0.05,
    ]
    sft, dpo, rm, ppo = (tmp_path / name for name in ("sft", "dpo", "rm", "ppo"))
    assert train("sft", folders, texts, sft, *lora) == 0
    config = json.loads((sft / "adapter_config.json").read_text())
    assert (
        config["r"] == 2
        and config["lora_alpha"] == 4
        and config["target_modules"] == ["q_proj", "down_proj"]
    )
    assert (
        config["base_model_name_or_path"] == str(folders / "policy")
        and not (sft / "config.json").exists()
    )
    assert run("dpo", "--model", sft, "--data", pairs, "--out", dpo, *SMALL, "--lr", 0.05) == 0
    assert train("reward", folders, pairs, rm, *lora) == 0
    more = ["--response-length", 4, "--critic", "head"]
    arguments = [
        "--model",
        dpo,
        "--reward-model",
        rm,
        "--prompts",
        prompts,
        "--out",
        ppo,
        *SMALL,
        *more,
    ]
    assert run("ppo", *arguments) == 0
    base = Transformer.from_pretrained(folders / "policy")
    for folder, cls in (
        (sft, Transformer),
        (dpo, Transformer),
        (rm, RewardModel),
        (ppo, Transformer),
    ):
        model = cls.from_pretrained(folder)
        assert torch.equal(
            model.trunk.blocks[0].attn.qkv.weight, base.trunk.blocks[0].attn.qkv.weight
        )
        assert model.trunk.blocks[0].attn.qkv.adapters["q_proj"].lora_B.any()
        assert run("merge", "--model", folder, "--out", tmp_path / "merged", "--overwrite") == 0
        merged, ids = cls.from_pretrained(tmp_path / "merged"), torch.arange(3, 9)[None]
        assert not has_adapters(merged)
        torch.testing.assert_close(merged.trunk(ids), model.trunk(ids), rtol=0, atol=1e-5)
    assert (ppo / "critic" / "adapter_config.json").exists()
    assert run("generate", "--model", ppo, "--prompt", "a", "--max-new-tokens", 3) == 0
    assert run("merge", "--model", folders / "policy", "--out", tmp_path / "no") == 2
    assert "no adapters to merge" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sft", "reward", "dpo", "ppo"])
def test_an_interrupted_run_goes_on_with_resume(command, folders, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the first of two steps; what there is to resume, and from which model, is checked."""
    data = write(tmp_path / "data.jsonl", TEXTS if command == "sft" else PAIRS)
    whole, out = tmp_path / "whole", tmp_path / "out"
    more = (
        ["--response-length", 4, "--reward-model", folders / "reward"] if command == "ppo" else []
    )

    def command_line(out, *options, model="policy"):
        data_option = "--prompts" if command == "ppo" else "--data"
        return run(
            command,
            "--model",
            folders / model,
            data_option,
            data,
            "--out",
            out,
            *SMALL,
            *more,
            *options,
        )

    assert command_line(whole, "--lr", 0.05) == 0
    assert (
        command_line(out, "--lr", 0.05, "--resume") == 2
        and "no checkpoint to go on from" in capsys.readouterr().err
    )
    owner = PPOTrainer if command == "ppo" else Trainer
    step = owner.step
    with monkeypatch.context() as patch:
        patch.setattr(
            owner, "step", lambda *args: signal.raise_signal(signal.SIGINT) or step(*args)
        )
        assert command_line(out, "--lr", 0.05) == 130
    assert (
        f"interrupted, step 1 is in {out / 'checkpoint'}, to go on from with --resume"
        in capsys.readouterr().err
    )
    assert (
        command_line(out, "--lr", 0.1, "--resume") == 2
        and "with lr=0.05, not 0.1" in capsys.readouterr().err
    )
    if command == "dpo":
        assert (
            command_line(out, "--lr", 0.05, "--resume", model=whole) == 2
        )  # not the original policy
        assert "the frozen weights of that run were others" in capsys.readouterr().err
    assert command_line(out, "--lr", 0.05, "--resume") == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    with pytest.raises(SystemExit):
        command_line(out, "--resume", "--overwrite")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lora-alpha", 4], "--lora-... have no effect without --lora-rank"),
        (
            ["--lora-rank", 2, "--lora-dropout", 0.1],
            "--lora-dropout has no effect without --dropout",
        ),
        (
            ["--lora-rank", 2, "--lora-targets", "query"],
            "no module 'query' to adapt, only down_proj, gate_proj",
        ),
        (["--lora-rank", 0], "rank must be a whole number > 0, got 0"),
    ],
)
def test_a_lora_option_that_does_nothing_is_refused(options, message, folders, tmp_path, capsys):
    assert (
        train("sft", folders, write(tmp_path / "data.jsonl", TEXTS), tmp_path / "out", *options)
        == 2
    )
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, rows", [("p.jsonl", TEXTS), ("p.txt", ["one", "two", "three", "four"])]
)
def test_ppo_goes_from_prompts_to_a_policy_and_a_critic(name, rows, folders, tmp_path, capsys):
    prompts, out = write(tmp_path / name, rows), tmp_path / "out"
    models = ["--model", folders / "policy", "--reward-model", folders / "reward"]
    options = [
        "--response-length",
        4,
        "--ppo-epochs",
        1,
        "--missing-eos-penalty",
        1,
        "--eos-ids",
        *range(259),
    ]
    assert run("ppo", *models, "--prompts", prompts, "--out", out, *SMALL, *options) == 0
    assert "objective/scores" in capsys.readouterr().out
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert (
        line["response_length"] == 1 and line["val/num_eos_tokens"] == 4
    )  # whatever comes ends the response
    assert json.loads((out / "train_config.json").read_text())["missing_eos_penalty"] == 1
    assert Transformer.from_pretrained(out) and (out / "critic" / "model.safetensors").is_file()
    assert run("generate", "--model", out, "--prompt", "hi", "--max-new-tokens", 2) == 0


@pytest.mark.parametrize(
    "command, options",
    [
        ("a2c", []),
        ("grpo", ["--num-samples", 2]),
        (
            "grpo",
            ["--num-samples", 2, "--advantage", "rloo", "--kl-coef", 0.1, "--kl-estimator", "full"],
        ),
        ("ppo", ["--reward-ensemble", "worst"]),
        ("ppo", ["--reward-weights", 1, -0.5, "--kl-target", 3, "--whiten-scores", "running"]),
        ("ppo", ["--process-rewards", "--reward-weights", 1, 1]),
        ("ppo", ["--ptx-coef", 0.5]),
    ],
)
def test_methods_that_sample_take_several_rewards_and_texts(command, options, folders, tmp_path):
    prompts, out = (
        write(
            tmp_path / "prompts.jsonl",
            [{"prompt": text} for text in ("one", "two", "three", "four")],
        ),
        tmp_path / "out",
    )
    reward = folders / ("process" if "--process-rewards" in options else "reward")
    models = ["--model", folders / "policy", "--reward-model", reward]
    models += [reward] * any("--reward" in str(option) for option in options)
    models += ["--ptx-data", write(tmp_path / "texts.jsonl", TEXTS)] * ("--ptx-coef" in options)
    assert (
        run(
            command,
            *models,
            "--prompts",
            prompts,
            "--out",
            out,
            *SMALL,
            "--response-length",
            4,
            *options,
        )
        == 0
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines and ("loss/ptx" in lines[0]) == ("--ptx-coef" in options)
    Transformer.from_pretrained(out)


def test_a_weight_for_each_reward_model(folders, tmp_path, capsys):
    models = [
        "--model",
        folders / "policy",
        "--reward-model",
        folders / "reward",
        "--reward-weights",
        1,
        2,
    ]
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "one"}])
    assert run("ppo", *models, "--prompts", prompts, "--out", tmp_path / "out", *SMALL) == 2
    assert "--reward-weights are 2 for 1 reward models" in capsys.readouterr().err
    models[-2:] = [1, "--reward-coef", 0.5]
    assert run("ppo", *models, "--prompts", prompts, "--out", tmp_path / "out", *SMALL) == 2
    assert "--reward-coef 0.5 has no effect with --reward-weights" in capsys.readouterr().err


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


@pytest.mark.parametrize("command", ["ppo", "grpo", "online-dpo", "rft", "best-of-n"])
def test_a_reward_may_be_a_function_in_a_file(command, folders, tmp_path, capsys):
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    (tmp_path / "beside.py").write_text("here = True")
    prompts = write(
        tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("one", "two", "three", "four")]
    )
    arguments = [
        "--model",
        folders / "policy",
        "--prompts",
        prompts,
        "--response-length",
        4,
        *SMALL,
    ]
    if command == "best-of-n":
        arguments = [x for x in arguments if x not in ("--max-steps", "2")]
    if command != "ppo":
        arguments += ["--num-samples", 2]
    function = ["--reward-function", f"{tmp_path / 'functions.py'}:length"]
    assert run(command, *arguments, *function, "--out", tmp_path / "out") == 0
    if command == "online-dpo":
        judge = ["--judge", f"{tmp_path / 'functions.py'}:longer"]
        assert run(command, *arguments, *judge, "--out", tmp_path / "judged") == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--reward-function", "functions.py"],
            "--reward-function must be FILE.py:NAME, got 'functions.py'",
        ),
        (["--reward-function", "nothing.py:length"], "nothing.py"),
        (["--reward-function", "functions.py:number"], "functions.py has no function 'number'"),
        (["--reward-function", "functions.py:other"], "functions.py has no function 'other'"),
        (["--reward-function", "bad.py:length"], "bad.py raised NameError"),
        (
            ["--reward-function", "functions.py:breaks"],
            "the reward raised KeyError('unknown prompt'); so it does",
        ),
        (
            ["--reward-function", "functions.py:length", "--reward-weights", 1],
            "--reward-weights has no effect without",
        ),
    ],
)
def test_a_function_that_is_not_there_or_raises_is_told_of(
    options, message, folders, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("functions.py").write_text(
        FUNCTIONS.replace("import beside", "import json as beside; beside.here = True")
    )
    Path("bad.py").write_text("length = width")
    prompts = write(
        tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("one", "two", "three", "four")]
    )
    fixed = [
        "--model",
        folders / "policy",
        "--prompts",
        prompts,
        "--response-length",
        4,
        *SMALL,
        "--num-samples",
        2,
    ]
    assert run("grpo", *fixed, *options, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["online-dpo", "iterated-dpo", "rft"])
def test_methods_that_choose_among_samples_go_from_prompts_to_a_policy(
    command, folders, tmp_path, capsys
):
    prompts, out = write(tmp_path / "prompts.jsonl", TEXTS), tmp_path / "out"
    models = ["--model", folders / "policy", "--reward-model", folders / "reward"]
    options = ["--response-length", 4, "--num-samples", 3, "--lr", 0.01, *SMALL]
    arguments = [command, *models, "--prompts", prompts, "--out", out, *options]
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    assert "objective/scores" in shown and f"10 prompts; written to {out}" in shown
    config = json.loads((out / "train_config.json").read_text())
    assert config["algorithm"] == command.replace("-", "_") and config["num_samples"] == 3
    model, before = (Transformer.from_pretrained(folder) for folder in (out, folders / "policy"))
    assert not torch.equal(model.trunk.embed.weight, before.trunk.embed.weight)
    assert run("generate", "--model", out, "--prompt", "hi", "--max-new-tokens", 2) == 0
    if command != "online-dpo":
        weights = (out / "model.safetensors").read_bytes()
        assert run(*arguments) == 2 and "is not empty" in capsys.readouterr().err
        assert run(*arguments, "--rounds", 4, "--resume") == 0
        assert len((out / "metrics.jsonl").read_text().splitlines()) == 4
        assert (out / "model.safetensors").read_bytes() != weights


def test_best_of_n_writes_rows_that_sft_reads(folders, tmp_path, capsys):
    prompts, out = (
        write(tmp_path / "prompts.jsonl", [TEXTS[0], {"prompt": "é"}]),
        tmp_path / "new" / "best.jsonl",
    )
    models = ["--model", folders / "policy", "--reward-model", folders / "reward"]
    arguments = [
        "best-of-n",
        *models,
        "--prompts",
        prompts,
        "--out",
        out,
        "--response-length",
        4,
        "--device",
        "cpu",
    ]
    scores = {}
    for n in (1, 8):
        assert run(*arguments, "--num-samples", n, "--overwrite") == 0
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["prompt"] for row in found] == ["0 + 1 = ", "é"]
        scores[n] = sum(row["score"] for row in found)
        assert f"of the best of {n} {scores[n] / 2:.6g}" in capsys.readouterr().out
    assert scores[8] > scores[1] and list(out.parent.iterdir()) == [out]
    assert run(*arguments) == 2 and f"{out} is there" in capsys.readouterr().err
    assert train("sft", folders, out, tmp_path / "sft", "--eval-fraction", 0) == 0


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
        (
            "sft",
            TEXTS,
            {"prompt": "p", "completion": True},
            "field 'completion' must be a string, got true",
        ),
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
    assert str(tmp_path / "absent") in fails(
        capsys, "sft", *arguments, "--out", tmp_path / "out", *SMALL
    )


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
        (["--device", "meta"], "--device meta: "),
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
    for command, option, text in (
        ("ppo", "--kl-coef", "weight of the KL"),
        ("dpo", "--beta", "implicit KL penalty"),
    ):
        with pytest.raises(SystemExit) as raised:
            run(command, "--help")
        shown = " ".join(capsys.readouterr().out.split())
        assert raised.value.code == 0 and option in shown and text in shown


def test_a_disk_that_refuses_the_model_is_an_error_in_one_line(
    folders, tmp_path, capsys, monkeypatch
):
    safetensors = pytest.importorskip("safetensors.torch")
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors, "save_file", full)
    data, out = write(tmp_path / "data.jsonl", TEXTS), tmp_path / "out"
    line = fails(capsys, "sft", "--model", folders / "policy", "--data", data, "--out", out, *SMALL)
    assert (
        f"{out}/.model.safetensors" in line
        and "not written: I/O error: No space left on device" in line
    )


@pytest.mark.parametrize("command", ["sft", "ppo", "rft", "best-of-n", "merge", "demo"])
def test_an_out_that_cannot_be_written_is_told_before_anything_is_read(
    command, folders, tmp_path, capsys
):
    file = write(tmp_path / "file", ["in the way"])
    rewards = ["--reward-model", tmp_path / "absent", "--prompts", tmp_path / "absent"]
    sources = {
        "sft": ["--data", tmp_path / "absent"],
        "merge": [],
        "demo": ["--real", tmp_path / "absent"],
    }
    arguments = [
        *sources.get(command, rewards),
        *(["--model", tmp_path / "absent"] if command != "demo" else []),
    ]
    assert f"{file} is not a directory" in fails(
        capsys, command, *arguments, "--out", file / "new" / "out"
    )
    assert file.read_text() == "in the way\n"


def test_a_disk_that_is_read_only_is_told_before_anything_is_read(tmp_path, capsys, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, "Read-only file system", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    arguments = [
        "--model",
        tmp_path / "absent",
        "--data",
        tmp_path / "absent",
        "--out",
        tmp_path / "new",
    ]
    assert f"Read-only file system: '{tmp_path}'" in fails(capsys, "sft", *arguments)


def test_a_file_in_whose_place_a_folder_stands_is_told_before_anything_is_computed(
    folders, tmp_path, capsys
):
    prompts, pairs = write(tmp_path / "p.txt", ["one"]), write(tmp_path / "pairs.jsonl", PAIRS)
    models = [
        "--model",
        tmp_path / "absent",
        "--reward-model",
        folders / "reward",
        "--prompts",
        prompts,
    ]
    line = fails(capsys, "best-of-n", *models, "--out", tmp_path, "--overwrite")
    assert f"--out {tmp_path} is a folder, not a file" in line
    options = ["--reference-logprobs", tmp_path, "--data", pairs, "--out", tmp_path / "out", *SMALL]
    line = fails(capsys, "dpo", "--model", folders / "policy", *options)
    assert f"reference_logprobs {tmp_path} is a folder, not a file" in line


def test_adapters_are_not_merged_into_their_own_folder(folders, tmp_path, capsys):
    lora, out = ["--lora-rank", 2], tmp_path / "out"
    assert train("sft", folders, write(tmp_path / "data.jsonl", TEXTS), out, *lora) == 0
    before = sorted(out.iterdir())
    again = out.parent / "x" / ".." / "out"
    (tmp_path / "x").mkdir()
    assert f"--out {again} is --model" in fails(
        capsys, "merge", "--model", out, "--out", again, "--overwrite"
    )
    assert sorted(out.iterdir()) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_file_of_a_model_that_holds_no_object_is_named(name, folders, tmp_path, capsys):
    shutil.copytree(folders / "policy", tmp_path / "model")
    (tmp_path / "model" / name).write_text("[1]")
    line = fails(capsys, "generate", "--model", tmp_path / "model", "--prompt", "x")
    assert f"{tmp_path / 'model' / name}: must hold a JSON object, got [1]" in line


def test_a_model_that_is_not_there_is_told_with_the_form_of_a_hub_id(capsys):
    line = fails(capsys, "generate", "--model", "nope", "--prompt", "x")
    assert "nope: no such folder, and not a Hugging Face hub repository such as owner/name" in line


@pytest.mark.parametrize("beta", ["-1", "inf", "nan"])
def test_a_beta_out_of_range_is_refused(beta, folders, tmp_path, capsys):
    ILQLModel(Transformer.from_pretrained(folders / "policy")).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    line = fails(capsys, "generate", "--model", tmp_path, "--prompt", "x", "--beta", beta)
    assert f"--beta must be a finite number, at least 0, got {float(beta)}" in line


def test_ctrl_c_tells_of_a_model_only_where_one_is_trained(folders, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "_device", interrupt)
    assert run("generate", "--model", folders / "policy", "--prompt", "x") == 130
    assert capsys.readouterr().err == "rlhf-core generate: interrupted\n"
    assert train("sft", folders, write(tmp_path / "data.jsonl", TEXTS), tmp_path / "out") == 130
    assert capsys.readouterr().err == "rlhf-core sft: interrupted, the model was not saved\n"
    monkeypatch.setattr(cli, "_parser", interrupt)  # while it imports
    assert run("info") == 130 and capsys.readouterr().err == "rlhf-core: interrupted\n"


def help_of(command, capsys):
    with pytest.raises(SystemExit) as raised:
        run(command, "--help")
    assert raised.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["ppo", "grpo", "kto", "generate"])
def test_a_default_is_stated_once_and_only_where_it_says_something(command, capsys):
    for text in help_of(command, capsys).split("options:")[1].split(" --")[1:]:
        assert text.count("default:") <= 1 and "(default: False)" not in text
        assert "None:" in text or "(default: None)" not in text


@pytest.mark.parametrize("command", [*cli.ON_DATA, *cli.ON_PROMPTS, *cli.IN_ROUNDS])
def test_evaluation_on_the_way_is_offered_where_there_are_examples_for_it(command, capsys):
    assert ("--eval-every" in help_of(command, capsys)) == (command in cli.ON_DATA)


def test_an_option_that_is_on_can_be_turned_off(folders, tmp_path):
    prompts, out = write(tmp_path / "p.txt", ["one", "two"]), tmp_path / "out"
    models = ["--model", folders / "policy", "--reward-model", folders / "reward"]
    options = ["--no-normalize", "--num-samples", 2, "--response-length", 4]
    assert run("grpo", *models, "--prompts", prompts, "--out", out, *SMALL, *options) == 0
    assert json.loads((out / "train_config.json").read_text())["normalize"] is False


@pytest.mark.parametrize("command", ["sft", "generate"])
def test_a_seed_beyond_64_bits_is_refused(command, capsys):
    with pytest.raises(SystemExit) as raised:
        run(command, "--seed", 2**63)
    assert raised.value.code == 2
    assert (
        f"argument --seed: must be a whole number of 64 bits, got {2**63}"
        in capsys.readouterr().err
    )


def test_as_a_program_an_error_is_one_line_and_status_two(tmp_path):
    command = [
        sys.executable,
        "-m",
        "rlhf_core.cli",
        "generate",
        "--model",
        str(tmp_path),
        "--prompt",
        "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("rlhf-core generate: error: ") and done.stderr.count("\n") == 1
