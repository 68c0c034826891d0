"""Writes options.json: the options of every command as data, so that `--help` needs no torch.

`python -m rlhf_core.cli.index` reads them from the commands' own parsers. The file holds what the
help shows and leaves out how a value is read. An option that several commands share is stored once.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from typing import Any

from rlhf_core import cli
from rlhf_core.cli.parser import INDEX
from rlhf_core.files import replacing


def write() -> None:
    """Write the index, as `parser.add_indexed` reads it: a line for each option and command."""
    rows: list[str] = []
    commands = [
        f"{_json(name)}:{_json(_command(cli.parser_of(name), rows))}" for name in cli.COMMANDS
    ]
    options, entries = ",\n".join(rows), ",\n".join(commands)
    with replacing(INDEX) as file:
        file.write(f'{{"rows":[\n{options}\n],\n"commands":{{\n{entries}\n}}}}\n'.encode())


def _command(parser: ArgumentParser, rows: list[str]) -> dict[str, list]:
    groups, exclusive = parser._action_groups, parser._mutually_exclusive_groups
    members = []  # row, group and exclusive group of each option, in the order of the usage
    for action in parser._actions[1:]:  # the first is --help
        row = _json(_row(action))
        if row not in rows:
            rows.append(row)
        place = next(i for i, group in enumerate(groups) if action in group._group_actions)
        choice = next((i for i, x in enumerate(exclusive) if action in x._group_actions), None)
        members.append([rows.index(row), place, choice])
    return {
        "groups": [[group.title, group.description] for group in groups[2:]],
        "exclusive": [group.required for group in exclusive],
        "options": members,
    }


def _row(action) -> dict[str, Any]:
    """The arguments of `add_argument` that the help depends on."""
    default = action.default
    if not isinstance(default, str | int | float | None):
        default = str(default) if default != () else None  # as the help shows it
    row = {"flags": action.option_strings or [action.dest], "default": default}
    row |= {"help": action.help, "metavar": action.metavar, "nargs": action.nargs}
    row["choices"] = action.choices and list(action.choices)
    if action.option_strings and action.dest != row["flags"][0].strip("-").replace("-", "_"):
        row["dest"] = action.dest  # the name of its value
    row["required"] = bool(action.option_strings and action.required) or None
    if action.nargs == 0:  # a switch
        off = [flag for flag in row["flags"] if flag.startswith("--no-")]
        row["flags"] = [flag for flag in row["flags"] if flag not in off]
        row |= {"nargs": None, "action": "on or off" if off else "store_true"}
    return {name: value for name, value in row.items() if value is not None}


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


if __name__ == "__main__":
    write()
