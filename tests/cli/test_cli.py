"""The program: exit statuses, usage, `--help`, and errors in one line that names what is wrong."""

import dataclasses
import errno
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import TEXTS, run, write

from rlhf_core import cli
from rlhf_core.cli import arguments as shared
from rlhf_core.cli import sampling, training
from rlhf_core.feedback.candidates import SamplingConfig
from rlhf_core.models import hub
from rlhf_core.options import describe

CONFIGS = {name: method.config for name, method in (training.ON_DATA | training.ON_PROMPTS).items()}
CONFIGS["best-of-n"] = SamplingConfig


# ---- as a program


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        [sys.executable, "-P", "-m", "rlhf_core"],
        [sys.executable, "-P", "-m", "rlhf_core.cli"],
        [Path(sys.executable).with_name("rlhf-core")],
    ],
    ids=["rlhf_core", "rlhf_core.cli", "rlhf-core"],
)
def test_as_a_program_an_error_is_one_line_and_status_two(program, tmp_path):
    if not shutil.which(program[0]):
        pytest.skip(f"{program[0]} is not installed")
    command = [*program, "generate", "--model", tmp_path, "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("rlhf-core generate: error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path):
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    command += ["-m", "rlhf_core", "info"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rlhf_core" in done.stdout and "reference" in done.stdout


# ---- usage and help


@pytest.mark.parametrize("arguments", [[], ["fly"], ["sft"], ["generate", "--model", "x"]], ids=str)
def test_wrong_usage_is_status_two(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        run(*arguments)
    assert raised.value.code == 2 and "usage: rlhf-core" in capsys.readouterr().err


@pytest.fixture
def help_of(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "2000")  # an option's help is one line

    def help_of(*command):
        with pytest.raises(SystemExit) as raised:
            run(*command, "--help")
        assert raised.value.code == 0
        return capsys.readouterr().out

    return help_of


def flat(text):
    return " ".join(text.split())


def test_every_command_is_listed_with_what_it_does(help_of):
    shown = flat(help_of())
    assert all(f"{name} {help}" in shown for name, help in cli.COMMANDS.items())
    assert {*training.COMMANDS, *sampling.COMMANDS} < set(cli.COMMANDS)


@pytest.mark.parametrize("heading", cli.GROUPS)
def test_the_list_of_commands_is_that_of_their_modules(heading):
    module, commands = cli.GROUPS[heading]
    assert list(importlib.import_module(f"rlhf_core.cli.{module}").COMMANDS) == list(commands)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--help", "--version", "fly"])
def test_help_and_version_need_no_torch(option):
    code = (
        "import sys; from rlhf_core.cli import main\n"
        f"try: main([{option!r}])\n"
        "finally: assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "Assertion" not in done.stderr and done.returncode == (2 if option == "fly" else 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["GRPO"], "got 'GRPO'; did you mean grpo?"),
        (["sft", "--learning-rate=1"], "there is no option --learning-rate; did you mean --lr?"),
        (["sft", "--output-dir", "x"], "there is no option --output-dir; did you mean --out?"),
        (["grpo", "--beta", 1], "there is no option --beta; did you mean --kl-coef?"),
        (["dpo", "--loss", "sigmoid"], "one of dpo, robust, ipo, "),
        (["dpo", "--loss", "sigmoid"], "got 'sigmoid'; did you mean dpo?"),
        (["ppo", "--precision", "bf16"], "got 'bf16'; did you mean bfloat16?"),
        (["ppo", "--precision", "fp32"], "got 'fp32'; did you mean float32?"),
        (["sft", "--batch", 4], "there is no option --batch; did you mean --"),  # no abbreviation
        (["sft", "--zzz"], "there is no option --zzz\n"),
        (["generate", "--", "--model"], "the following arguments are required"),
    ],
)
def test_an_unknown_name_is_answered_with_the_one_that_was_meant(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        run(*arguments)
    error = capsys.readouterr().err
    assert raised.value.code == 2 and message in error and error.count("\n") == 2


def test_a_value_may_start_with_a_dash(fails, tmp_path):
    paths = ["--model", tmp_path / "absent", "--prompt", "-x y"]
    assert "absent" in fails("generate", *paths, "--stop=--model", "--seed", -1)


@pytest.mark.parametrize("command", CONFIGS)
def test_every_option_of_a_config_appears_once_in_the_group_of_its_class(command, help_of):
    """With its meaning, and its choices or interval and its default."""
    shown, config = help_of(command), CONFIGS[command]
    title = None
    for field in dataclasses.fields(config):
        flag = field.metadata["flag"] or f"--{field.name.replace('_', '-')}"
        lines = re.findall(rf"^  {flag}(?: |$|,).*", shown, flags=re.M)
        assert len(lines) == 1, flag
        assert flat(describe(field)) in flat(shown), flag
        owner = next(
            base
            for base in reversed(config.__mro__)
            if field.name in vars(base).get("__dataclass_fields__", {})
        )
        title = owner.__doc__.split("\n")[0].rstrip(".")
        assert shown.count(f"\n{title}:\n") == 1, title
    assert title is not None


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_default_is_stated_once_and_only_where_it_says_something(command, help_of):
    for text in flat(help_of(command)).split("options:")[1].split(" --")[1:]:
        assert text.count("default:") <= 1 and "(default: False)" not in text
        assert "None:" in text or "(default: None)" not in text


def test_help_names_choices_intervals_and_defaults(help_of):
    shown = flat(help_of("dpo"))
    assert "(one of sigmoid, " in shown or "(one of dpo, " in shown
    assert "--beta BETA" in shown and "implicit KL penalty" in shown and "(> 0; default" in shown
    assert "{mean,worst,uncertainty}" in help_of("ppo")


# ---- errors and interrupts


@pytest.mark.parametrize("missing", ["--model", "--data"])
def test_a_missing_path_is_named(missing, folders, fails, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "one"}\n')
    paths = {"--model": folders / "policy", "--data": data, missing: tmp_path / "absent"}
    arguments = [x for pair in paths.items() for x in pair]
    assert str(tmp_path / "absent") in fails("sft", *arguments, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_model_file_that_holds_no_object_is_named(name, folders, fails, tmp_path):
    shutil.copytree(folders / "policy", tmp_path / "model")
    (tmp_path / "model" / name).write_text("[1]")
    line = fails("generate", "--model", tmp_path / "model", "--prompt", "x")
    assert f"{tmp_path / 'model' / name}: must hold a JSON object, got [1]" in line


def test_the_error_for_an_unknown_model_shows_the_form_of_a_hub_id(fails):
    line = fails("generate", "--model", "gpt2-medium", "--prompt", "x")
    assert "did you mean openai-community/gpt2-medium? That needs rlhf-core[hub]" in line
    line = fails("generate", "--model", "nope", "--prompt", "x")
    assert "nope: no such folder, and not a Hugging Face hub repository such as owner/name" in line


@pytest.mark.parametrize(
    "options, remedy",
    [
        (["--lora-alpha", 4], "the --lora options need --lora-rank"),
        (["--lora-rank", 2, "--lora-dropout", 0.1], "--lora-dropout needs --dropout"),
        (["--lr", -1], "lr must be > 0, got -1.0"),
        (["--eval-fraction", 2], "--eval-fraction must be in [0, 1), got 2.0"),
        (["--device", "cpu", "--out", "{full}"], "Choose another --out, or pass --overwrite"),
        (["--resume"], "there is no checkpoint to resume from"),
    ],
)
def test_an_error_states_what_would_be_right(options, remedy, folders, fails, tmp_path):
    data, full = write(tmp_path / "data.jsonl", TEXTS), folders / "policy"
    paths = ["--model", folders / "policy", "--data", data, "--out", tmp_path / "out"]
    assert remedy in fails("sft", *paths, *(full if x == "{full}" else x for x in options))


def test_a_full_disk_is_an_error_in_one_line(train, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(hub.TensorWriter, "write", full)
    assert train("sft", TEXTS) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    file = tmp_path / "out" / "model.safetensors"
    assert line == f"rlhf-core sft: error: {file}: not written: No space left on device"


def test_an_interrupt_mentions_the_model_only_where_one_is_trained(
    folders, train, capsys, monkeypatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shared, "load_tokenizer", interrupt)
    assert run("generate", "--model", folders / "policy", "--prompt", "x") == 130
    assert capsys.readouterr().err == "rlhf-core generate: interrupted\n"
    assert train("sft", TEXTS) == 130
    assert capsys.readouterr().err == "rlhf-core sft: interrupted; the model was not saved\n"
    monkeypatch.setattr(cli, "_parser", interrupt)  # while it imports
    assert run("info") == 130 and capsys.readouterr().err == "rlhf-core: interrupted\n"


def test_a_run_that_diverges_has_status_one(train, capsys, monkeypatch):
    def diverge(*_, **__):
        raise FloatingPointError("step 1: loss is nan")

    monkeypatch.setattr(training.Trainer, "train", diverge)
    assert train("sft", TEXTS) == 1
    assert "rlhf-core sft: error: step 1: loss is nan\n" in capsys.readouterr().err
