"""The command line `rlhf-core`: each group of commands is a table in a file of its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import rlhf_core
from rlhf_core.cli import sampling, tools, training
from rlhf_core.cli.arguments import Help
from rlhf_core.feedback.rewards import RewardError

COMMANDS = training.COMMANDS | sampling.COMMANDS | tools.COMMANDS
BAD_INPUT = (ValueError, OSError, ImportError, RewardError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 1 for a run that diverged, 2 for bad input, 130 for an interrupt.
    """
    name = "rlhf-core"
    try:
        arguments = _parser().parse_args(argv)
        name = f"{name} {arguments.command}"
        COMMANDS[arguments.command].run(arguments)
    except BrokenPipeError:  # `| head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BAD_INPUT as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        note = f"; {interrupt}, continue with --resume" if str(interrupt) else ""
        if not note and name.split()[-1] in training.COMMANDS:
            note = "; the model was not saved"
        print(f"{name}: interrupted{note}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    description = "Reinforcement learning from human feedback."
    parser = argparse.ArgumentParser(prog="rlhf-core", description=description)
    parser.add_argument("--version", action="version", version=rlhf_core.__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(
            name, help=command.help, description=command.help, formatter_class=Help
        )
        command.add_arguments(sub)
    return parser
