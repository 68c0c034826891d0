"""--preset: which values it gives, and that options and files override them."""

import json
import re
import warnings
from pathlib import Path

import pytest
from helpers import TEXTS, run, write

from rlhf_core.cli import MODULES, presets, training
from rlhf_core.cli.training import ON_DATA, ON_PROMPTS

COMMANDS = list(presets.PRESETS)
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "settings.md"


def options_in(out):
    return json.loads((out / "run.json").read_text())["options"]


def test_every_training_command_has_presets():
    training = {name for name, module in MODULES.items() if module == "training"}
    assert training == {*COMMANDS, "iterated-rlhf"}  # which takes those of its parts


@pytest.mark.parametrize("size", presets.SIZES)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_method_has_a_valid_preset_of_every_size_without_idle_options(command, size):
    values = presets.PRESETS[command][size]
    config = (ON_DATA | ON_PROMPTS)[command].config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert vars(config(**values)).items() >= values.items()
    assert values["lr"] == presets.settings(size, command)["lr"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_guide_lists_the_values(command):
    (row,) = re.findall(rf"^\| `{command}` \| (.*) \|$", GUIDE.read_text(), re.MULTILINE)
    for size, cell in zip(presets.SIZES, row.split(" | "), strict=True):
        listed = {name: float(value) for name, value in re.findall(r"(\w+) (\S+?)(?:,|$)", cell)}
        values = presets.PRESETS[command][size]
        assert listed == {n: x for n, x in values.items() if n not in presets._LARGE}


@pytest.mark.parametrize("command", COMMANDS)
def test_larger_models_get_lower_learning_rates(command):
    rates = [presets.PRESETS[command][size]["lr"] for size in presets.SIZES]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]


def test_a_preset_sets_options_that_others_override_and_run_json_records_both(folders, tmp_path):
    data = write(tmp_path / "data.jsonl", TEXTS)
    small = ["--max-steps", 1, "--device", "cpu"]
    paths = ["--model", folders / "policy", "--data", data]
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    assert run("sft", *paths, *small, "--preset", "tiny", "--batch-size", 4, "--out", first) == 0
    options = options_in(first)
    tiny, large = (presets.settings(size, "sft") for size in ("tiny", "1b"))
    assert options["preset"] == "tiny" and options["lr"] == tiny["lr"]
    assert options["batch_size"] == 4 != tiny["batch_size"]
    # The file repeats the run, also its own value of an option that its preset sets.
    assert run("sft", "--config", first / "run.json", "--out", again) == 0
    assert options_in(again) == options | {"out": str(again)}
    # A preset of the command line wins over the file.
    config = ["--config", first / "run.json", "--preset", "1b", "--lr", 0.5]
    assert run("sft", *config, "--out", other) == 0
    changed = {"preset": "1b", "out": str(other)} | large | {"lr": 0.5}
    assert options_in(other) == options | changed


def test_a_file_may_name_a_preset_and_override_it(folders, tmp_path):
    data = write(tmp_path / "data.jsonl", TEXTS)
    values = {"model": str(folders / "policy"), "data": str(data), "max_steps": 1}
    values |= {"preset": "1b", "lr": 0.25}
    (tmp_path / "x.json").write_text(json.dumps(values))
    assert run("sft", "--config", tmp_path / "x.json", "--out", tmp_path / "out") == 0
    expected = presets.settings("1b", "sft") | {"lr": 0.25, "preset": "1b"}
    assert options_in(tmp_path / "out").items() >= expected.items()


@pytest.mark.parametrize("value", ["huge", ["tiny"], 1])
def test_an_unknown_preset_is_refused_with_those_there_are(value, tmp_path, capsys):
    (tmp_path / "x.json").write_text(json.dumps({"preset": value}))
    assert run("sft", "--config", tmp_path / "x.json", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "x.json: argument --preset: " in error and "Traceback" not in error
    if value == "huge":
        assert "must be one of tiny, small, 100m, 1b, got 'huge'" in error


def test_the_parts_of_iterated_rlhf_take_the_presets_of_their_commands(
    folders, tmp_path, monkeypatch
):
    configs = []
    monkeypatch.setattr(training, "_run_iterated_rlhf", lambda config, _: configs.append(config))
    prompts = write(tmp_path / "prompts.txt", ["one"])
    paths = ["--model", folders / "policy", "--prompts", prompts, "--out", tmp_path / "out"]
    given = ["--reward-model", folders / "reward", "--preset", "tiny", "--ppo", "max_steps=5"]
    assert run("iterated-rlhf", *paths, *given) == 0
    for name, part in (("reward", configs[0].reward), ("ppo", configs[0].ppo)):
        assert vars(part).items() >= presets.settings("tiny", name).items()
    assert configs[0].ppo.max_steps == 5
