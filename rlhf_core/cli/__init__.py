"""The command line `rlhf-core`: each group of commands is a table in a file of its own."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence

import rlhf_core
from rlhf_core.cli import evaluation, feedback, sampling, tools, training
from rlhf_core.cli.arguments import Help, absolute_paths
from rlhf_core.feedback.rewards import RewardError
from rlhf_core.training import signals

GROUPS = (training, sampling, feedback, evaluation, tools)
COMMANDS = {name: command for group in GROUPS for name, command in group.COMMANDS.items()}
BAD_INPUT = (ValueError, OSError, ImportError, RewardError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 1 for a run that diverged, 2 for bad input, and 128 plus the signal's
        number for a signal: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
    name = "rlhf-core"
    plain, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        arguments = _parser().parse_args(argv)
        name = f"{name} {arguments.command}"
        absolute_paths(arguments)
        with signals.handled(signals.stop_at_once):
            COMMANDS[arguments.command].run(arguments)
    except BrokenPipeError:  # `| head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BAD_INPUT as error:
        print(f"{name}: error: {_text(error)}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        note = f"; {interrupt}" if str(interrupt) else ""
        if note.startswith("; step"):
            note += ", continue with --resume"
        elif not note and name.split()[-1] in training.COMMANDS:
            note = "; the model was not saved"
        stopped = isinstance(interrupt, signals.Stopped)
        word = f"stopped by {signal.Signals(interrupt.signum).name}" if stopped else "interrupted"
        with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
            print(f"{name}: {word}{note}", file=sys.stderr)
        return interrupt.code if stopped else 130
    finally:
        warnings.formatwarning = plain
    return 0


def _warning(message, category, filename, lineno, line=None) -> str:
    return f"rlhf-core: warning: {message}\n"


def _text(error: Exception) -> str:
    """The error's message; the operating system's errors start with the path that is at fault."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return str(error)


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
