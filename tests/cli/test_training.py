"""The commands that train: from files to files, interrupted and resumed, with adapters."""

import csv
import json
import shutil
import signal
import sys
from collections import Counter

import pytest
import torch
from helpers import PAIRS, SMALL, TEXTS, run, write

from rlhf_core.cli.training import _split
from rlhf_core.data import ByteTokenizer, Example, Pair
from rlhf_core.models import RewardModel, Transformer, TransformerConfig
from rlhf_core.models.hub import stored_dtype
from rlhf_core.models.lora import has_adapters
from rlhf_core.trainers import PPOTrainer, SFTTrainer
from rlhf_core.training.trainer import Trainer

CHATS = [
    {
        "messages": [
            {"role": role, "content": text} for role, text in (("user", "1"), ("assistant", "2"))
        ]
    }
] * 10
on_rows = pytest.mark.parametrize(
    "command, rows", [("sft", TEXTS), ("reward", PAIRS), ("dpo", PAIRS)]
)


def config_in(folder):
    run = json.loads((folder / "run.json").read_text())
    return run["options"] | {"algorithm": run["algorithm"]}


def metrics_in(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def moved(folders, out, cls=Transformer):
    """Whether the model in a folder differs from the policy."""
    before, after = Transformer.from_pretrained(folders / "policy"), cls.from_pretrained(out)
    return not torch.equal(after.trunk.embed.weight, before.trunk.embed.weight)


# ---- on a file of examples


@on_rows
def test_a_trainer_turns_a_file_into_a_model(command, rows, folders, train, tmp_path, capsys):
    assert train(command, rows, "--eval-fraction", 0.2, "--lr", 0.01) == 0
    out, shown = tmp_path / "out", capsys.readouterr().out
    assert "8 to train on, 2 held out" in shown and "eval_loss" in shown
    assert f"written to {out}" in shown and len(metrics_in(out)) == 2
    config = config_in(out)
    assert config["algorithm"] == command and config["lr"] == 0.01 and config["batch_size"] == 4
    assert moved(folders, out, RewardModel if command == "reward" else Transformer)
    assert (out / "tokenizer_config.json").is_file()


def test_rows_of_a_prompt_are_held_out_together_in_all_files():
    pairs = [Pair([1, 5 + i % 10], [2], [3, i]) for i in range(40)]
    more = [Pair([1, 5 + i % 20], [2], [4, i]) for i in range(20)]
    (first, second), held = _split([pairs, more], 0.25, seed=0)
    trained = {tuple(row.prompt_ids) for row in [*first, *second]}
    apart = {tuple(row.prompt_ids) for row in [*held[0], *held[1]]}
    assert len(held[0]) == 8 and len(held[1]) >= 4 and not trained & apart
    assert sorted(map(str, [*first, *held[0]])) == sorted(map(str, pairs))
    assert sorted(map(str, [*second, *held[1]])) == sorted(map(str, more))


def test_rows_without_a_prompt_are_held_out_one_by_one():
    rows = [Example([1], [i, 2]) for i in range(40)]
    ((training,), (held,)) = _split([rows], 0.25, seed=0)
    assert len(held) == 10 and sorted([*training, *held]) == rows


def test_a_prompt_that_all_rows_share_is_held_out_by_rows_with_a_warning():
    rows = [Example([1, 7], [i, 2]) for i in range(40)]
    with pytest.warns(UserWarning, match="each prompt has more than 10 of 40 rows"):
        ((training,), (held,)) = _split([rows], 0.25, seed=0)
    assert len(held) == 10 and sorted([*training, *held]) == rows


def test_a_reward_model_learns_from_ranked_lists_and_from_pairs_with_margins(train, capsys):
    ranked = [
        {"prompt": f"say {i}", "responses": ["no", "yes", "so"], "ranks": [2, 0, 1]}
        for i in range(10)
    ]
    pairs = [row | {"margin": 0.5} for row in PAIRS]
    for name, data in (("lists", ranked), ("pairs", pairs)):
        assert train("reward", data, out=name) == 0
        shown = capsys.readouterr().out
        assert "9 to train on, 1 held out" in shown
        assert "length_correlation" in shown and "score_std" in shown
    with pytest.warns(UserWarning, match=r"centering_coef=0\.1 has no effect on ranked lists"):
        assert train("reward", ranked, "--centering-coef", 0.1, out="centered") == 0


def test_kto_turns_labels_into_a_model(train, tmp_path, capsys):
    rows = [
        {"prompt": f"say {i}", "response": " yes" if i % 2 else " no", "label": i % 2 == 1}
        for i in range(10)
    ]
    assert train("kto", rows, "--eval-fraction", 0.2, "--undesirable-weight", 2) == 0
    shown = capsys.readouterr().out
    assert "8 to train on, 2 held out" in shown
    assert "rewards/undesirable" in shown and "eval_loss" in shown
    assert config_in(tmp_path / "out")["undesirable_weight"] == 2
    Transformer.from_pretrained(tmp_path / "out")


def test_ilql_turns_rewards_into_a_model_that_generate_reads(train, tmp_path, capsys):
    rows = [{"prompt": f"say {i}", "response": " yes", "reward": i % 2} for i in range(10)]
    assert train("ilql", rows) == 0
    options = ["--prompt", "a", "--max-new-tokens", 3, "--beta", 2]
    assert run("generate", "--model", tmp_path / "out", *options) == 0


@pytest.fixture
def context(tmp_path):
    file = tmp_path / "context.txt"
    file.write_text("Be kind.\n")
    return file


@pytest.mark.parametrize("context_tokens, rows", [(9, TEXTS), (17, CHATS)])
def test_distill_puts_a_context_into_the_weights(
    context_tokens, rows, context, train, folders, tmp_path, capsys
):
    """In front of plain text it is a prefix, in front of messages a system message."""
    lengths = ["--max-length", 40, "--lr", 0.01, "--eval-fraction", 0.2]
    assert train("distill", rows, "--context", context, *lengths) == 0
    assert "8 to train on, 2 held out" in capsys.readouterr().out
    first, last = metrics_in(tmp_path / "out")
    assert first["kl"] > 0 and last["eval_kl"] > 0 and moved(folders, tmp_path / "out")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["options"]["context"] == str(context) and run["algorithm"] == "distill"
    assert train("distill", rows, "--context", context, "--max-length", 9, out="short") == 2
    assert f"data.jsonl:1: the context has {context_tokens} tokens" in capsys.readouterr().err


def test_distill_cuts_prompts_but_not_the_context(context, train, tmp_path, capsys):
    rows = [{"prompt": "p" * n, "completion": "c"} for n in (5, 27, 28, 40)]
    options = ["--context", context, "--max-length", 39, "--eval-fraction", 0]
    assert train("distill", rows, *options) == 0
    assert "2 of 4 rows" in capsys.readouterr().err  # 1 + 9 + 27 + 2 tokens fit
    assert json.loads((tmp_path / "out" / "run.json").read_text())["data"][0]["cut"] == 2


def test_distill_learns_from_a_teacher_with_more_layers(train, tmp_path, capsys):
    torch.manual_seed(3)
    sizes = dict(vocab_size=259, hidden_size=32, num_layers=2, num_heads=2, max_positions=16)
    Transformer(TransformerConfig(**sizes)).save_pretrained(tmp_path / "teacher")
    ByteTokenizer().save(tmp_path / "teacher")
    options = ["--teacher", tmp_path / "teacher", "--kl-top-k", 50, "--divergence", "reverse"]
    assert train("distill", TEXTS, *options) == 0
    assert metrics_in(tmp_path / "out")[0]["kl"] > 0
    long = [{"prompt": "p" * 30, "completion": "c"}]
    assert train("distill", [*TEXTS, *long], *options, out="cut") == 0
    assert "1 of 11 rows" in capsys.readouterr().err


@pytest.mark.parametrize("responses", ["student", "teacher"])
def test_distill_samples_responses_to_prompts(responses, context, train, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\nfour\n")
    options = ["--context", context, "--responses", responses, "--response-length", 4]
    options += ["--batch-size", 2, "--eval-data", prompts, "--eos-ids", 258, 65]
    options += ["--lr-schedule", "constant"]
    assert train("distill", prompts, *options, "--save-every", 1, "--max-steps", 1) == 0
    assert train("distill", prompts, *options, "--max-steps", 2, "--resume") == 0
    first, last = metrics_in(tmp_path / "out")
    assert first["response_length"] <= 4 and last["eval_kl"] > 0
    assert (tmp_path / "out" / "samples.jsonl").read_text().count("\n") == 2


def test_distill_names_what_is_wrong(context, fails, folders, tmp_path):
    data = write(tmp_path / "data.jsonl", TEXTS)
    arguments = ["--model", folders / "policy", "--data", data, "--out", tmp_path / "out", *SMALL]

    def error(*options):
        return fails("distill", *arguments, "--overwrite", *options)

    assert "nothing to distill. Pass --context, --teacher or both" in error()
    assert "no-such" in error("--context", tmp_path / "no-such")
    assert "--eos-ids ends sampled responses" in error("--context", context, "--eos-ids", 1)
    assert "kl_top_k must be below" in error("--context", context, "--kl-top-k", 259)
    messages = tmp_path / "context.json"
    messages.write_text('[{"role": "user", "content": "a"}]')
    assert f"{data}:1: the context is a conversation" in error("--context", messages)


def test_distill_refuses_a_teacher_with_another_tokenizer(data_dir, fails, folders, tmp_path):
    data = write(tmp_path / "data.jsonl", TEXTS)
    teacher = data_dir / "models" / "stories260k"
    line = fails(
        *("distill", "--model", folders / "policy", "--teacher", teacher, "--data", data),
        *("--out", tmp_path / "out", *SMALL),
    )
    assert f"--teacher {teacher}: token 'byte 0' with id 0 does not exist in its tokenizer" in line


def test_distill_takes_adapters(context, train, tmp_path):
    assert train("distill", TEXTS, "--context", context, "--lora-rank", 2, "--lr", 0.01) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_dpo_takes_its_loss_and_warns_of_an_option_without_effect(train, tmp_path):
    options = ["--loss", "simpo", "--average", "--beta", 2, "--gamma", 0.5]
    assert train("dpo", PAIRS, *options) == 0
    config = config_in(tmp_path / "out")
    assert config["loss"] == "simpo" and config["average"] and config["gamma"] == 0.5
    with pytest.warns(UserWarning, match=r"gamma=0\.5 has no effect on loss 'dpo'"):
        assert train("dpo", PAIRS, "--gamma", 0.5, out="dpo") == 0


def test_dpo_reads_reference_log_probs_that_an_earlier_run_wrote(train, tmp_path, capsys):
    file = tmp_path / "cache" / "logprobs"
    options = ["--reference-logprobs", file]
    assert train("dpo", PAIRS, *options) == 0
    written = file.read_bytes()
    assert train("dpo", PAIRS, *options, "--seed", 1, "--beta", 0.2, out="second") == 0
    assert file.read_bytes() == written
    assert train("dpo", PAIRS, *options, "--precision", "bfloat16", out="third") == 2
    assert f"{file}: made with another precision" in capsys.readouterr().err


@on_rows
def test_evaluation_encodes_examples_like_training(command, rows, train, tmp_path):
    """Row 32: on the same file, cut to the same length, with the same weights: the same loss."""
    data = write(tmp_path / "data.jsonl", rows)
    options = ["--eval-data", data, "--lr", 1e-30, "--batch-size", 10, "--max-steps", 1]
    assert train(command, data, *options, "--max-length", 9) == 0
    (line,) = metrics_in(tmp_path / "out")
    evaluated = {name: value for name, value in line.items() if name.startswith("eval_")}
    assert "eval_loss" in evaluated and evaluated["eval_loss"] != 0
    trained = {name: line[name.removeprefix("eval_")] for name in evaluated}
    assert evaluated == pytest.approx(trained, abs=1e-5)


def test_eval_data_is_evaluated_and_nothing_held_out(train, tmp_path, capsys):
    assert train("sft", TEXTS, "--eval-data", write(tmp_path / "b.jsonl", TEXTS[:3])) == 0
    assert "10 to train on, 3 held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lr", "0"], "lr must be > 0"),
        (["--eval-fraction", "1"], "--eval-fraction must be in [0, 1), got 1.0"),
    ],
)
def test_an_option_out_of_range_is_named(options, message, train, tmp_path, capsys):
    assert train("sft", TEXTS, *options) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


# ---- adapters


@pytest.mark.slow
def test_adapters_are_trained_read_by_the_next_command_and_merged(folders, train, tmp_path):
    """SFT, then DPO of its adapters; a reward model; PPO on one trunk: every folder reads back."""
    lora = ["--lora-rank", 2, "--lora-alpha", 4, "--lora-targets", "q_proj", "down_proj"]
    sft, dpo, rm, ppo = (tmp_path / name for name in ("sft", "dpo", "rm", "ppo"))
    assert train("sft", TEXTS, *lora, "--lr", 0.05, out="sft") == 0
    config = json.loads((sft / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["target_modules"] == ["q_proj", "down_proj"]
    assert config["base_model_name_or_path"] == str(folders / "policy")
    assert not (sft / "config.json").exists()
    pairs = write(tmp_path / "pairs.jsonl", PAIRS)
    assert run("dpo", "--model", sft, "--data", pairs, "--out", dpo, *SMALL, "--lr", 0.05) == 0
    assert train("reward", PAIRS, *lora, "--lr", 0.05, out="rm") == 0
    paths = ["--model", dpo, "--reward-model", rm, "--prompts", pairs, "--out", ppo]
    assert run("ppo", *paths, *SMALL, "--response-length", 4, "--critic", "head") == 0
    base = Transformer.from_pretrained(folders / "policy")
    kinds = {sft: Transformer, dpo: Transformer, rm: RewardModel, ppo: Transformer}
    for folder, cls in kinds.items():
        model = cls.from_pretrained(folder)
        qkv = model.trunk.blocks[0].attn.qkv
        assert torch.equal(qkv.weight, base.trunk.blocks[0].attn.qkv.weight)
        assert qkv.adapters["q_proj"].lora_B.any()
        assert run("merge", "--model", folder, "--out", tmp_path / "merged", "--overwrite") == 0
        merged, ids = cls.from_pretrained(tmp_path / "merged"), torch.arange(3, 9)[None]
        assert not has_adapters(merged)
        torch.testing.assert_close(merged.trunk(ids), model.trunk(ids), rtol=0, atol=1e-5)
    assert (ppo / "critic" / "adapter_config.json").exists()
    assert run("generate", "--model", ppo, "--prompt", "a", "--max-new-tokens", 3) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--lora-alpha", 4], "the --lora options need --lora-rank"),
        (["--lora-rank", 2, "--lora-dropout", 0.1], "--lora-dropout needs --dropout"),
        (
            ["--lora-rank", 2, "--lora-targets", "query"],
            "no module 'query' to adapt, only down_proj, gate_proj",
        ),
        (["--lora-rank", 0], "rank must be a whole number > 0, got 0"),
    ],
)
def test_a_lora_option_without_what_it_needs_is_refused(options, message, train, capsys):
    assert train("sft", TEXTS, *options) == 2
    assert message in capsys.readouterr().err


# ---- interrupted


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sft", "reward", "dpo", "ppo"])
def test_an_interrupted_run_continues_with_resume(command, folders, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the first of two steps. Options and model must be those of the checkpoint."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    data = write(tmp_path / "data.jsonl", TEXTS if command == "sft" else PAIRS)
    source = ["--data", data]
    if command == "ppo":
        source = ["--prompts", data, "--response-length", 4, "--reward-model", folders / "reward"]

    def step_twice(out, *options, model=folders / "policy"):
        return run(command, "--model", model, *source, "--out", out, *SMALL, *options)

    def fails_with(message, *options, **others):
        assert step_twice(out, *options, **others) == 2
        assert message in capsys.readouterr().err

    rate = ("--lr", 0.05)
    assert step_twice(whole, *rate) == 0
    fails_with("there is no checkpoint to resume from", *rate, "--resume")
    owner = PPOTrainer if command == "ppo" else Trainer
    step = owner.step
    with monkeypatch.context() as patch:
        patch.setattr(
            owner, "step", lambda *args: signal.raise_signal(signal.SIGINT) or step(*args)
        )
        assert step_twice(out, *rate) == 130
    error = capsys.readouterr().err
    assert "interrupted; " in error and f"{out / 'checkpoint'}-1" in error and "--resume" in error
    fails_with("written with lr=0.05, this run has 0.1", "--lr", 0.1, "--resume")
    if command == "dpo":  # whose reference is the model that the run started from
        fails_with("a run with different frozen weights", *rate, "--resume", model=whole)
    assert step_twice(out, *rate, "--resume") == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert len(metrics_in(out)) == 2
    with pytest.raises(SystemExit):
        step_twice(out, "--resume", "--overwrite")


# ---- on prompts


def test_ppo_turns_prompts_into_a_policy_and_a_critic(folders, sample, tmp_path, capsys):
    """Every token ends the response, so that the options of EOS are seen."""
    options = ["--ppo-epochs", 1, "--missing-eos-penalty", 1, "--eos-ids", *range(259)]
    assert sample("ppo", "--reward-model", folders / "reward", *options) == 0
    assert "objective/scores" in capsys.readouterr().out
    out = tmp_path / "out"
    line = metrics_in(out)[0]
    assert line["response_length"] == 1 and line["val/num_eos_tokens"] == 4
    assert config_in(out)["missing_eos_penalty"] == 1
    assert Transformer.from_pretrained(out) and (out / "critic" / "model.safetensors").is_file()
    assert run("generate", "--model", out, "--prompt", "hi", "--max-new-tokens", 2) == 0


def test_prompts_are_read_from_json_lines_too(folders, tmp_path, capsys):
    paths = ["--model", folders / "policy", "--reward-model", folders / "reward"]
    paths += ["--prompts", write(tmp_path / "p.jsonl", TEXTS), "--out", tmp_path / "out"]
    options = ["--response-length", 4, "--num-samples", 2, "--no-normalize"]
    assert run("grpo", *paths, *SMALL, *options) == 0
    assert f"10 prompts; written to {tmp_path / 'out'}" in capsys.readouterr().out
    config = config_in(tmp_path / "out")
    assert config["normalize"] is False  # an option that is on can be turned off


RLOO = ["--num-samples", 2, "--advantage", "rloo", "--kl-coef", 0.1, "--kl-estimator", "full"]


@pytest.mark.parametrize(
    "command, options",
    [
        ("a2c", []),
        ("nlpo", []),
        ("trpo", ["--max-kl", 0.01, "--fisher-share", 0.5]),
        ("grpo", RLOO),
        ("ppo", ["--reward-ensemble", "worst"]),
        ("ppo", ["--reward-weights", 1, -0.5, "--kl-target", 3, "--whiten-scores", "running"]),
        ("ppo", ["--process-rewards", "--reward-weights", 1, 1]),
        ("ppo", ["--ptx-coef", 0.5]),
    ],
)
def test_methods_that_sample_take_several_rewards_and_texts(
    command, options, folders, sample, tmp_path
):
    reward = folders / ("process" if "--process-rewards" in options else "reward")
    several = any("--reward" in str(option) for option in options)
    more = ["--reward-model", *[reward] * (1 + several)]
    more += ["--ptx-data", write(tmp_path / "texts.jsonl", TEXTS)] * ("--ptx-coef" in options)
    assert sample(command, *more, *options) == 0
    lines = metrics_in(tmp_path / "out")
    assert lines and ("loss/ptx" in lines[0]) == ("--ptx-coef" in options)
    Transformer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("command", ["ppo", "grpo", "online-dpo", "iterated-dpo", "rft"])
def test_methods_that_sample_report_diversity_and_forgetting(command, folders, sample, tmp_path):
    texts = ["--pretraining-eval", write(tmp_path / "texts.jsonl", TEXTS)]
    options = ["--reward-model", folders / "reward", "--lr", 0.01, "--max-steps", 1, *texts]
    options += ["--num-samples", 2] * (command != "ppo") + ["--rounds", 1] * (
        command == "iterated-dpo"
    )
    assert sample(command, *options) == 0
    last = metrics_in(tmp_path / "out")[-1]
    names = {name for name in last if name.startswith(("diversity/", "pretraining/"))}
    wanted = {"diversity/distinct_1", "diversity/distinct_2", "pretraining/loss"}
    wanted |= {"diversity/self_similarity"} if command != "ppo" else set()
    assert names == wanted | {"pretraining/loss_before"}
    assert last["pretraining/loss_before"] != last["pretraining/loss"]


@pytest.mark.parametrize(
    "command",
    [
        "online-dpo",
        pytest.param("iterated-dpo", marks=pytest.mark.slow),
        pytest.param("rft", marks=pytest.mark.slow),
    ],
)
def test_methods_that_choose_among_samples_turn_prompts_into_a_policy(
    command, folders, sample, tmp_path, capsys
):
    options = ["--reward-model", folders / "reward", "--num-samples", 3, "--lr", 0.01]
    assert sample(command, *options) == 0
    out, shown = tmp_path / "out", capsys.readouterr().out
    assert "objective/scores" in shown and f"4 prompts; written to {out}" in shown
    config = config_in(out)
    assert config["algorithm"] == command.replace("-", "_") and config["num_samples"] == 3
    assert moved(folders, out)
    assert run("generate", "--model", out, "--prompt", "hi", "--max-new-tokens", 2) == 0
    if command != "online-dpo":
        weights = (out / "model.safetensors").read_bytes()
        assert sample(command, *options) == 2 and "is not empty" in capsys.readouterr().err
        assert sample(command, *options, "--rounds", 4, "--resume") == 0
        assert len(metrics_in(out)) == 4
        assert (out / "model.safetensors").read_bytes() != weights


# ---- iterated RLHF


@pytest.fixture
def iterated(folders, tmp_path):
    """Runs iterated RLHF on four prompts, into tmp_path / out."""

    def iterated(*options, out="out"):
        prompts = write(tmp_path / "prompts.txt", ["one", "two", "three", "four"])
        small = ["--sampling", "response_length=4", "--reward", "lr=0.01", "batch_size=4"]
        small += ["--ppo", "lr=0.01", "batch_size=4", "response_length=4", "--device", "cpu"]
        paths = ["--model", folders / "policy", "--prompts", prompts, "--out", tmp_path / out]
        return run("iterated-rlhf", *paths, *small, *options)

    return iterated


@pytest.mark.slow
def test_iterated_rlhf_learns_from_a_gold_reward_and_resumes(iterated, folders, tmp_path, capsys):
    (tmp_path / "gold.py").write_text(
        "def gold(prompts, responses): return [sum(map(ord, x)) for x in responses]\n"
    )
    options = ["--reward-function", f"{tmp_path}/gold.py:gold"]
    options += ["--pairs", write(tmp_path / "pairs.jsonl", PAIRS)]
    options += ["--eval-prompts", write(tmp_path / "eval.txt", ["five", "six"])]
    assert iterated(*options, "--rounds", 2, "--log", "csv", out="whole") == 0
    shown, whole = capsys.readouterr().out, tmp_path / "whole"
    assert "Elo ratings of the first policy and each round's: 0, " in shown
    assert f"4 prompts; written to {whole}" in shown
    lines = metrics_in(whole)
    assert [line["round"] for line in lines] == [1, 2] and len(lines[1]["elo"]) == 3
    elo = [float(table_in(whole)[1][f"elo/{i}"]) for i in range(3)]
    assert elo == lines[1]["elo"]
    assert 10 < lines[0]["pairs"] <= 14 and lines[0]["pairs"] < lines[1]["pairs"] <= 18
    assert moved(folders, whole) and (whole / "tokenizer_config.json").is_file()
    assert iterated(*options, "--rounds", 1) == 0
    assert run("iterated-rlhf", "--resume", "--out", tmp_path / "out", "--rounds", 2) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]
    (tmp_path / "gold.py").write_text("def gold(prompts, responses): return [0] * len(responses)\n")
    assert run("iterated-rlhf", "--resume", "--out", tmp_path / "out", "--rounds", 3) == 2
    assert "feedback.judge" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--ppo", "learning_rate=1"], "--ppo: PPOConfig has no option 'learning_rate'; did you"),
        (["--reward", "epochs=2.5"], "--reward: epochs must be a whole number, got 2.5"),
        (["--sampling", "num_samples=1"], "sampling.num_samples must be at least 2"),
    ],
)
def test_a_bad_option_of_a_part_of_iterated_rlhf_is_named(options, message, iterated, capsys):
    assert iterated("--judge", "judge.py:judge", *options) == 2
    assert message in capsys.readouterr().err


# ---- several data files, and the dtype of the weights


def test_several_data_files_are_joined_or_mixed(train, tmp_path, monkeypatch, fails, folders):
    start, seen = SFTTrainer.__init__, {}

    def watched(self, model, examples, config, *, eval_examples, **options):
        for name, rows in (("train", examples), ("eval", eval_examples)):
            seen[name] = [bytes(row.completion_ids[:-1]).decode() for row in rows]
        start(self, model, examples, config, eval_examples=eval_examples, **options)

    monkeypatch.setattr(SFTTrainer, "__init__", watched)
    other = [{"prompt": "p", "completion": f"b{i}"} for i in range(30)]
    files = [write(tmp_path / "a.jsonl", TEXTS), write(tmp_path / "b.jsonl", other)]
    assert train("sft", TEXTS, "--data", *files, out="joined") == 0
    joined = {name: sorted(rows) for name, rows in seen.items()}
    assert [len(joined[name]) for name in ("train", "eval")] == [36, 4]
    assert sorted(joined["train"] + joined["eval"]) == sorted(
        [row["completion"] for row in TEXTS + other]
    )
    weights = ["--data-weights", 0.75, 0.25]
    assert train("sft", TEXTS, "--data", *files, *weights, out="mixed") == 0
    rows = Counter(seen["train"])
    assert {name: count for name, count in rows.items() if name[0] != "b"} == dict.fromkeys(
        [name for name in joined["train"] if name[0] != "b"], 3
    )  # 27 of the 36 from 9 rows
    assert sorted(name for name in rows if name[0] == "b") and rows.total() == 36
    assert sorted(seen["eval"]) == joined["eval"] and not rows.keys() & set(seen["eval"])
    command = ["sft", "--model", folders / "policy", "--out", tmp_path / "out", "--data"]
    assert "1 weights for 2 data files" in fails(*command, *files, "--data-weights", 1)
    missing = fails(*command, "org/name")
    assert "org/name: no such file or directory. Rows are read from JSON lines" in missing


@pytest.mark.parametrize(
    "command",
    [
        "sft",
        pytest.param("reward", marks=pytest.mark.slow),
        pytest.param("rft", marks=pytest.mark.slow),
    ],
)
def test_weights_are_saved_in_the_dtype_that_is_asked_for(
    command, train, sample, folders, tmp_path
):
    source = tmp_path / "policy"
    shutil.copytree(folders / "policy", source)
    Transformer.from_pretrained(source).save_pretrained(source, torch.bfloat16)
    options, cls = ["--model", source], RewardModel if command == "reward" else Transformer
    for asked, name in (("same", "bfloat16"), ("float16", "float16"), ("float32", "float32")):
        more = [*options, "--save-dtype", asked, "--max-steps", 1]
        if command == "rft":
            reward = ["--reward-model", folders / "reward", "--rounds", 1]
            assert sample(command, *reward, *more, out=asked) == 0
        else:
            assert train(command, {"sft": TEXTS, "reward": PAIRS}[command], *more, out=asked) == 0
        assert json.loads((tmp_path / asked / "config.json").read_text())["torch_dtype"] == name
        assert stored_dtype(tmp_path / asked) == getattr(torch, name)
    exact = cls.from_pretrained(tmp_path / "float32").state_dict()
    half = cls.from_pretrained(tmp_path / "same").state_dict()
    for name, weight in exact.items():  # rounded once, from the weights that were trained
        assert torch.equal(half[name], weight.bfloat16().float())


@pytest.mark.parametrize("command", ["grpo", "rft", "online-dpo"])
def test_held_out_prompts_are_evaluated_on_the_way_and_the_best_step_is_kept(
    command, folders, sample, tmp_path
):
    judge = tmp_path / "judge.py"
    judge.write_text("def longer(prompts, one, two):\n    return [0.0 for _ in prompts]\n")
    held_out = write(tmp_path / "held_out.jsonl", [{"prompt": "hello"}, {"prompt": "you"}])
    options = ["--reward-model", folders / "reward", "--num-samples", 2, "--epochs", 2]
    options += ["--eval-prompts", held_out, "--eval-judge", f"{judge}:longer"]
    if command != "rft":
        options += ["--eval-every", 1, "--keep-best", "min:eval_length"]
    assert sample(command, *options) == 0
    lines = metrics_in(tmp_path / "out")
    names = {"eval_reward", "eval_kl", "eval_length", "eval_win_rate"}
    assert all(names <= line.keys() for line in lines)
    assert (tmp_path / "out" / "checkpoint-best" / "config.json").is_file() == (command != "rft")


def test_a_model_may_judge_the_answers_to_held_out_prompts(folders, sample, tmp_path):
    held_out = write(tmp_path / "held_out.jsonl", [{"prompt": "hello"}, {"prompt": "you"}])
    principles = tmp_path / "principles.txt"
    principles.write_text("Which answer is kinder?\n")
    options = ["--reward-model", folders / "reward", "--eval-prompts", held_out]
    options += ["--eval-judge", folders / "policy", "--principles", principles]
    assert sample("grpo", *options, "--num-samples", 2) == 0
    assert 0 <= metrics_in(tmp_path / "out")[-1]["eval_win_rate"] <= 1


def test_a_judge_of_held_out_prompts_needs_these(folders, sample, capsys):
    options = ["--reward-model", folders / "reward", "--eval-judge", "judge.py:longer"]
    assert sample("ppo", *options) == 2
    assert "--eval-judge needs --eval-prompts" in capsys.readouterr().err


# ---- trackers


def table_in(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@on_rows
def test_log_csv_writes_the_metrics_as_a_table(command, rows, train, tmp_path):
    assert train(command, rows, "--log", "csv") == 0
    lines = zip(table_in(tmp_path / "out"), metrics_in(tmp_path / "out"), strict=True)
    assert all(float(row[name]) == x for row, line in lines for name, x in line.items())


@pytest.mark.slow
@pytest.mark.parametrize("command", ["ppo", "grpo", "online-dpo", "iterated-dpo", "rft"])
def test_log_csv_has_a_line_for_each_step_or_round_of_a_method_that_samples(
    command, folders, sample, tmp_path
):
    options = ["--reward-model", folders / "reward", "--epochs", 2, "--log", "csv"]
    options += ["--num-samples", 2] if command != "ppo" else []
    options += ["--rounds", 2] if command in ("iterated-dpo", "rft") else []
    assert sample(command, *options) == 0
    rows, lines = table_in(tmp_path / "out"), metrics_in(tmp_path / "out")
    assert [int(row["step"]) for row in rows] == [1, 2] == list(range(1, len(lines) + 1))
    assert float(rows[1]["objective/scores"]) == lines[1]["objective/scores"]


def test_trackers_are_repeatable_and_a_resumed_run_keeps_them(train, tmp_path):
    options = ["--log", "csv", "--log-to", "csv", "--save-every", 1, "--lr-schedule", "constant"]
    assert train("sft", TEXTS, *options) == 0
    assert config_in(tmp_path / "out")["log"] == ["csv", "csv"]
    assert run("sft", "--resume", "--out", tmp_path / "out", "--max-steps", 3) == 0
    assert [int(row["step"]) for row in table_in(tmp_path / "out")] == [1, 2, 3]


def test_a_config_file_names_trackers_and_the_command_line_overrides_them(
    train, tmp_path, monkeypatch
):
    config = tmp_path / "log.json"
    config.write_text('{"log": ["wandb"]}')
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train("sft", TEXTS, "--config", config) == 2
    assert train("sft", TEXTS, "--config", config, "--log", "csv") == 0
    assert config_in(tmp_path / "out")["log"] == ["csv"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_without_its_package_is_an_error_before_anything_is_written(
    name, folders, tmp_path, fails, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    data = write(tmp_path / "data.jsonl", TEXTS)
    files = ["--model", folders / "policy", "--data", data, "--out", tmp_path / "out"]
    line = fails("sft", *files, "--log", "csv", name)
    assert line.endswith(f"this needs {name!r}: pip install 'rlhf-core[{name}]'")
    assert not (tmp_path / "out").exists()
    line = fails("sft", *files, "--log", "tensorbord")
    assert "one of tensorboard, wandb, trackio, csv, got 'tensorbord'; did you mean" in line
    line = fails("sft", *files, "--report-to", "csv")
    assert line.endswith("there is no option --report-to; did you mean --log?")
