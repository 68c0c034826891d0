"""Options from --config FILE, from the run.json that --resume continues, and from --preset."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_core.cli.parser import Parser
from rlhf_core.cli.presets import settings
from rlhf_core.files import read_object, read_text, require, short
from rlhf_core.options import did_you_mean
from rlhf_core.training import run_file

UNSET: list = []  # a list, which the action "extend" copies


def add_config_file(parser: ArgumentParser) -> None:
    help = (
        "options from a .yaml, .toml or .json file, such as another run's run.json; those of the "
        "command line override them"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help=help)


def expanded(parser: ArgumentParser, command: str, argv: Sequence[str]) -> list[str]:
    """The command line, with the options of its preset and file before its own.

    A preset on the command line wins over the file, and the file over a preset that it names.

    Raises:
        ValueError: the file has an unknown option or a bad value; the message names both.
    """
    if not {"--config", "--resume", "--preset"} & {text.partition("=")[0] for text in argv}:
        return list(argv)
    given = _given(parser, argv)
    file = given.get("config")
    if file is None and "resume" in given and "out" in given:
        file = given["out"] / run_file.NAME
        needed = [action.dest for action in parser._actions if action.required]
        if not file.is_file():
            if not given.keys() >= set(needed):
                raise FileNotFoundError(
                    f"{file}: there is no run to resume. Choose the --out of a run, or give all "
                    "options of one by an older version"
                )
            file = None
    actions = {x.dest: x for x in parser._actions if x.option_strings and x.dest != "config"}
    overridden = set(given)
    for group in parser._mutually_exclusive_groups:
        names = {action.dest for action in group._group_actions}
        overridden |= names if names & given.keys() else set()
    options = {}
    for name, value in (read_options(file, command) if file else {}).items():
        dest = str(name).replace("-", "_")
        if dest not in actions:
            near = did_you_mean(str(name), actions)
            raise ValueError(f"{file}: {command} has no option {name!r}{near}")
        options[dest] = value
    below, above = (settings(layer.get("preset"), command) for layer in (options, given))
    tokens = []
    for dest, value in (below | options | above).items():
        if dest not in overridden:
            tokens += _tokens(file, actions[dest], value)
    return [*tokens, *argv]


def options_of(arguments: Namespace) -> dict[str, Any]:
    """The options of a run as JSON, from which `expanded` makes the same command line."""
    left_out = ("config", "resume", "overwrite", "command_line")
    options = {name: x for name, x in vars(arguments).items() if name not in left_out}
    for name, value in options.items():
        pairs = isinstance(value, list) and all(isinstance(x, tuple) for x in value)
        if value and pairs:  # NAME=VALUE each
            options[name] = dict(value)
    return json.loads(json.dumps(options, default=str))


def read_options(file: Path, command: str) -> dict[str, Any]:
    """The options in a file; those of a run.json must be of the same command."""
    found = read_object(file) if file.suffix.lower() == ".json" else _parsed(file)
    if isinstance(found, dict) and isinstance(found.get("options"), dict):
        algorithm = str(found.get("algorithm")).replace("_", "-")
        if algorithm != command:
            raise ValueError(f"{file}: the options of {algorithm}, not of {command}")
        found = found["options"]
    if not isinstance(found, dict):
        raise ValueError(f"{file}: must hold options with their values, got {short(found)}")
    return found


def _parsed(file: Path) -> Any:
    """The value in a YAML or TOML file."""
    suffix = file.suffix.lower()
    if suffix in (".yaml", ".yml"):
        yaml = require("yaml", "train")
        parse, error_type = yaml.safe_load, yaml.YAMLError
    elif suffix == ".toml":
        toml = require("tomllib" if sys.version_info >= (3, 11) else "tomli", "train")
        parse, error_type = toml.loads, toml.TOMLDecodeError
    else:
        raise ValueError(f"{file}: --config takes a .yaml, .toml or .json file")
    try:
        return parse(read_text(file))
    except error_type as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{file}: not valid {suffix[1:].upper()}: {text}") from None


def _given(parser: ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """The options on the command line alone: no defaults, and nothing is required."""
    required = [x for x in (*parser._actions, *parser._mutually_exclusive_groups) if x.required]
    for part in required:
        part.required = False
    names = [action.dest for action in parser._actions]
    found = vars(parser.parse_args(argv, Namespace(**dict.fromkeys(names, UNSET))))
    for part in required:
        part.required = True
    return {name: value for name, value in found.items() if value is not UNSET}


def _tokens(file: Path | None, action: Action, value: Any) -> list[str]:
    """An option and its value as on a command line; none if it is unset.

    Raises:
        ValueError: the option does not take the value.
    """
    flag = action.option_strings[0]
    if value in (None, [], {}):
        return []
    if action.nargs == 0 and isinstance(value, bool):  # a switch
        off = [name for name in action.option_strings if name.startswith("--no-")]
        return [flag] if value else off
    if isinstance(value, dict) and action.nargs == "+":  # NAME=VALUE each
        value = [f"{name}={json.dumps(item)}" for name, item in value.items()]
    elif isinstance(value, dict):  # FIELD=COLUMN,...
        value = ",".join(f"{name}={item}" for name, item in value.items())
    tokens = [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    probe = Parser(add_help=False, exit_on_error=False)
    probe._add_action(copy.copy(action))
    try:
        _, rest = probe.parse_known_args(tokens)
    except argparse.ArgumentError as error:
        raise ValueError(f"{file}: {error}") from None
    if rest or (isinstance(value, list) and action.nargs is None):
        raise ValueError(f"{file}: argument {flag}: takes one value, got {short(value)}")
    return tokens
