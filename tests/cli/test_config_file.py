"""--config and --resume: options from a file, those of the command line first."""

import hashlib
import json
import sys

import pytest
from helpers import PAIRS, SMALL, TEXTS, run, write

from rlhf_core.cli import arguments as shared
from rlhf_core.cli import config_file

FIVES = "def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n"


def read(out):
    return json.loads((out / "run.json").read_text())


@pytest.fixture
def sft(folders, tmp_path):
    """Runs `sft` with the given options only; its files are those of `options`."""
    data = write(tmp_path / "data.jsonl", TEXTS)
    options = {"model": str(folders / "policy"), "data": str(data), "batch_size": 4}
    options |= {"max_steps": 2, "device": "cpu", "lr": 0.01}
    return options, lambda *given: run("sft", *given)


def same(a, b):
    names = ("metrics.jsonl", "model.safetensors")
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def as_yaml(options):
    return "".join(f"{name.replace('_', '-')}: {value}\n" for name, value in options.items())


def as_toml(options):
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in options.items())


# ---- the same run


def test_run_json_repeats_its_run_exactly_and_options_override_it(sft, tmp_path):
    options, train = sft
    (tmp_path / "a.json").write_text(json.dumps(options))
    a, b, c = (tmp_path / name for name in "abc")
    assert train("--config", tmp_path / "a.json", "--out", a, "--dropout", "--no-dropout") == 0
    assert train("--config", a / "run.json", "--out", b) == 0
    assert same(a, b)
    changed = {"out"}
    before, after = read(a)["options"], read(b)["options"]
    assert {name for name in before if before[name] != after[name]} == changed
    assert train("--config", a / "run.json", "--out", c, "--lr", 0.1, "--seed", 1) == 0
    assert read(c)["options"]["lr"] == 0.1 and not same(a, c)
    assert train("--config", a / "run.json") == 2  # its own folder is not empty


@pytest.mark.parametrize("name, write_as", [("x.yaml", as_yaml), ("x.toml", as_toml)])
def test_yaml_and_toml_are_read(name, write_as, sft, tmp_path):
    if name == "x.yaml":
        pytest.importorskip("yaml")
    options, train = sft
    options |= {"lr": "1e-2", "template_date": "2024-12-31"}  # YAML 1.1 reads 1e-2 as text
    (tmp_path / name).write_text(write_as(options))
    assert train("--config", tmp_path / name, "--out", tmp_path / "out") == 0
    assert read(tmp_path / "out")["options"]["lr"] == 0.01
    assert read(tmp_path / "out")["options"]["template_date"] == "2024-12-31"


def test_every_kind_of_option_survives_the_file(folders, sample, tmp_path):
    """Lists, columns, a function, switches on and off; and an exclusive option overrides."""
    (tmp_path / "reward.py").write_text(FIVES)
    file = write(tmp_path / "rows.jsonl", [{"question": x} for x in ("one", "two")])
    given = ["--reward-function", f"{tmp_path / 'reward.py'}:score", "--no-normalize"]
    given += ["--num-samples", 2, "--eos-ids", 3, 4, "--columns", "prompt=question"]
    given += ["--skip-bad", "--stop", "-", "."]
    paths = ["--model", folders / "policy", "--prompts", file, "--response-length", 4]
    assert run("grpo", *paths, *SMALL, *given, "--out", tmp_path / "a") == 0
    assert run("grpo", "--config", tmp_path / "a" / "run.json", "--out", tmp_path / "b") == 0
    options = read(tmp_path / "a")["options"]
    assert options["columns"] == {"prompt": "question"} and options["eos_ids"] == [3, 4]
    assert options == read(tmp_path / "b")["options"] | {"out": str(tmp_path / "a")}
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    other = ["--reward-model", folders / "reward", "--out", tmp_path / "c"]
    assert run("grpo", "--config", tmp_path / "a" / "run.json", *other) == 0
    assert read(tmp_path / "c")["options"]["reward_function"] is None


def test_template_variables_keep_their_types(tmp_path):
    parser = config_file.Parser()
    config_file.add_config_file(parser)
    shared.add_template(parser)
    line = ["--template-vars", "a=false", "b=x", 'c="1"', "d=[1]", "--template-date", "2024-12-31"]
    arguments = parser.parse_args(line)
    options = config_file.options_of(arguments)
    assert options["template_vars"] == {"a": False, "b": "x", "c": "1", "d": [1]}
    (tmp_path / "x.json").write_text(json.dumps(options))
    again = config_file.expanded(parser, "x", ["--config", str(tmp_path / "x.json")])
    assert config_file.options_of(parser.parse_args(again)) == options


def test_generate_takes_a_config_too(folders, tmp_path, capsys):
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"model": str(folders / "policy"), "prompt": "a", "temperature": 0}))
    options = ["--max-new-tokens", 3]
    assert run("generate", "--config", file, *options) == 0
    shown = capsys.readouterr().out
    assert run("generate", "--model", folders / "policy", "--prompt", "a", "--temperature", 0,
               *options) == 0  # fmt: skip
    assert capsys.readouterr().out == shown


# ---- errors


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.yaml", "learning_rte: 1", "x.yaml: sft has no option 'learning_rte'"),
        ("x.json", '{"lr_shedule": 1}', "'lr_shedule'; did you mean lr_schedule?"),
        ("x.json", '{"lr": "fast"}', "x.json: argument --lr: invalid float value: 'fast'"),
        ("x.json", '{"lr_schedule": "up"}', "x.json: argument --lr-schedule: must be one of"),
        ("x.json", '{"lr": [1, 2]}', "x.json: argument --lr: takes one value, got [1, 2]"),
        ("x.json", '{"lr": true}', "x.json: argument --lr: invalid float value: 'True'"),
        ("x.json", '{"dropout": "yes"}', "x.json: argument --dropout"),
        ("x.json", '{"lr": 1', "x.json:1: not valid JSON"),
        ("x.json", "[]", "x.json: must hold a JSON object, got []"),
        ("x.yaml", "a: [", "x.yaml: not valid YAML: "),
        ("x.yaml", "- a", "x.yaml: must hold options with their values, got ['a']"),
        ("x.toml", "a = ", "x.toml: not valid TOML: "),
        ("x.ini", "", "x.ini: --config takes a .yaml, .toml or .json file"),
        ("x.json", '{"algorithm": "dpo", "options": {}}', "the options of dpo, not of sft"),
        ("x.json", "{}", "the following arguments are required: --model, --data, --out"),
    ],
)
def test_an_error_in_the_file_names_it_and_the_option(name, text, message, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    try:
        status = run("sft", "--config", tmp_path / name)
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and "Traceback" not in error


def test_a_missing_reader_names_the_extra(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.yaml").write_text("lr: 1")
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert run("sft", "--config", tmp_path / "x.yaml") == 2
    assert "pip install 'rlhf-core[train]'" in capsys.readouterr().err


# ---- resume


def test_resume_needs_only_out(sft, tmp_path, capsys):
    options, train = sft
    (tmp_path / "x.json").write_text(
        json.dumps(options | {"lr_schedule": "constant", "eval_fraction": 0})
    )
    config = ["--config", tmp_path / "x.json"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert train(*config, "--max-steps", 3, "--out", whole) == 0
    assert train(*config, "--save-every", 1, "--out", out) == 0
    assert train("--resume", "--out", out, "--lr", 0.1) == 2
    assert "was written with lr=0.01, this run has 0.1" in capsys.readouterr().err
    assert train("--resume", "--out", out, "--max-steps", 3) == 0
    assert same(whole, out) and read(out)["options"]["max_steps"] == 3
    data = tmp_path / "data.jsonl"
    write(data, TEXTS[::-1])
    assert train("--resume", "--out", out) == 2
    assert "a run with different examples" in capsys.readouterr().err
    assert train("--resume", "--out", tmp_path / "none") == 2
    assert f"{tmp_path / 'none' / 'run.json'}: there is no run to resume" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["ppo", "rft"])
def test_methods_that_sample_resume_with_out_alone(command, folders, sample, tmp_path):
    options = ["--reward-model", folders / "reward", "--save-every", 1, "--epochs", 3]
    grow = ["--rounds", 2] if command == "rft" else ["--lr-schedule", "constant"]
    start = ["--rounds", 1] if command == "rft" else grow
    more = grow if command == "rft" else ["--max-steps", 3]
    assert sample(command, *options, *grow, *more, out="whole") == 0
    assert sample(command, *options, *start) == 0
    assert run(command, "--resume", "--out", tmp_path / "out", *more) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]


def test_the_data_is_listed_with_its_digest_and_what_was_dropped_and_cut(train, tmp_path):
    data = write(tmp_path / "data.jsonl", [*TEXTS, {"text": "x" * 60}, {"no": 1}])
    evaluated = write(tmp_path / "eval.jsonl", TEXTS[:2])
    options = ["--skip-bad", "--max-length", 30, "--eval-data", evaluated]
    assert train("sft", data, *options) == 0
    first, second = read(tmp_path / "out")["data"]
    assert first["path"] == str(data) and (first["rows"], first["dropped"]) == (11, 1)
    assert first["cut"] == 1 and second["rows"] == 2 and second["cut"] == 0
    assert first["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()


def test_a_run_that_fails_before_it_starts_writes_nothing(train, tmp_path):
    assert train("dpo", [*PAIRS, {"no": 1}]) == 2
    assert not (tmp_path / "out").exists()


def test_the_parser_is_as_before_after_a_file_was_read(sft, tmp_path, capsys):
    """What is required is required again."""
    (tmp_path / "x.json").write_text(json.dumps({"lr": 0.1}))
    parser = config_file.Parser(prog="x")
    config_file.add_config_file(parser)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--out", required=True)
    line = config_file.expanded(parser, "x", ["--config", str(tmp_path / "x.json")])
    assert line[0] == "--lr=0.1"
    with pytest.raises(SystemExit):
        parser.parse_args(line)
    assert "required: --out" in capsys.readouterr().err
