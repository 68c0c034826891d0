"""The parser of every command: no abbreviations, short errors, and suggestions for wrong names.

`add_indexed` fills one for `--help` alone, from the options that index.py wrote to options.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rlhf_core.options import did_you_mean

INDEX = Path(__file__).with_name("options.json")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a default unless there is none or the help mentions it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        unset = any(action.default is value for value in (None, (), False))
        if unset or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Looks for unknown options first, because they are often misspelt required ones."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        for text in args[: args.index("--") if "--" in args else None]:
            option = re.match(r"--?[A-Za-z][\w-]*(?==|\Z)", text)
            if option and option[0] not in self._option_string_actions:
                near = did_you_mean(option[0], self._option_string_actions)
                self.error(f"there is no option {option[0]}{near}")
        return super().parse_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            valid = ", ".join(map(str, action.choices))
            near = did_you_mean(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"must be one of {valid}, got {value!r}{near}")

    def error(self, message: str) -> NoReturn:
        usage = f"usage: {self.prog} [options]; `{self.prog} --help` lists them"
        self.exit(2, f"{usage}\n{self.prog}: error: {message}\n")


def add_indexed(command: str, parser: Parser) -> None:
    """Add a command's options to its parser, as far as its help needs them.

    Raises:
        OSError, ValueError, LookupError: options.json cannot be read, or lacks the command.
    """
    index = json.loads(INDEX.read_text(encoding="utf-8"))
    rows, entry = index["rows"], index["commands"][command]
    groups: list[Any] = [parser, parser]  # positionals and options
    groups += [parser.add_argument_group(*texts) for texts in entry["groups"]]
    exclusive: dict[int, Any] = {}
    for number, place, choice in entry["options"]:
        container = groups[place]
        if choice is not None:
            if choice not in exclusive:
                required = entry["exclusive"][choice]
                exclusive[choice] = container.add_mutually_exclusive_group(required=required)
            container = exclusive[choice]
        row = dict(rows[number])
        if isinstance(row.get("metavar"), list):
            row["metavar"] = tuple(row["metavar"])  # argparse takes no list
        if row.get("action") == "on or off":
            row["action"] = argparse.BooleanOptionalAction
        container.add_argument(*row.pop("flags"), **row)
