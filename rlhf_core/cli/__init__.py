"""The command line `rlhf-core`: each group of commands is a table in a module of its own.

A module is imported when one of its commands runs, so that `--help` and `--version` are quick. A
command's own `--help` reads the options from options.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence

import rlhf_core
from rlhf_core.cli.parser import Help, Parser, add_indexed
from rlhf_core.locks import check_one_process
from rlhf_core.training import signals

GROUPS = {  # heading -> module, and what each of its commands does
    "train": (
        "training",
        {
            "sft": "supervised fine-tuning",
            "reward": "a reward model, from preferences or labelled steps",
            "dpo": "direct preference optimisation, SimPO, ORPO",
            "kto": "KTO: from single labelled completions",
            "distill": "a prompt's effect, or a larger teacher, into the weights",
            "ilql": "ILQL: offline RL on text with rewards",
            "ppo": "PPO against a reward",
            "a2c": "A2C: PPO with one update per rollout, no clip",
            "nlpo": "NLPO: PPO without unlikely tokens",
            "trpo": "TRPO: steps of the policy within a KL",
            "grpo": "GRPO, RLOO, REINFORCE++, ReMax: no critic",
            "online-dpo": "DPO on new samples in every step",
            "iterated-dpo": "DPO on its own samples, in rounds",
            "rft": "rejection sampling: SFT on its own best samples",
            "iterated-rlhf": "rounds of pairs labelled by people or a judge, reward model, PPO",
        },
    ),
    "sample": (
        "sampling",
        {
            "generate": "sample from a model",
            "best-of-n": "sample, and keep each prompt's response with the highest reward",
            "merge": "fold adapters into the weights of their base: a plain model",
        },
    ),
    "human feedback": (
        "feedback",
        {
            "candidates": "sample answers for people to compare, or pairs with a better model's",
            "template-pairs": "pairs against sycophancy and padding, from templates",
            "audit": "check preference pairs for faults and biases",
            "agreement": "how far annotators agree, and what to do with their labels",
        },
    ),
    "AI feedback": (
        "ai_feedback",
        {"cai": "answers revised by a constitution: rows for sft, pairs, and what they change"},
    ),
    "label": (
        "annotation",
        {
            "annotate": "a page on which people label candidates",
            "export": "labels as training rows, or candidates as another platform's tasks",
            "import-labels": "labels from Label Studio or Argilla",
        },
    ),
    "evaluate": (
        "evaluation",
        {"evaluate": "compare policies, or test a reward model, with honest errors"},
    ),
    "look at runs": (
        "plot",
        {
            "plot": "draw the metrics of one or several runs as curves",
            "report": "write one HTML page about runs, evaluations, agreement and audits",
        },
    ),
    "tools": (
        "tools",
        {
            "demo": "SFT, reward model, PPO and DPO on a task with a known gold score",
            "bench": "check the ops against float64, then time them against their baselines",
            "info": "versions, backends with reasons, CPU features",
        },
    ),
}
COMMANDS = {name: help for _, commands in GROUPS.values() for name, help in commands.items()}
MODULES = {name: module for module, commands in GROUPS.values() for name in commands}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0, 1 for a run that diverged, 2 for bad input, and 128 plus the signal's
        number for a signal: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
    """
    command, name = None, "rlhf-core"
    plain, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        argv = sys.argv[1:] if argv is None else list(argv)
        command = _parser().parse_args(argv[:1]).command
        name = f"{name} {command}"
        if argv[1:] in (["--help"], ["-h"]):
            _print_help(command)
        _run(command, argv[1:])
    except BrokenPipeError:  # `| head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except FloatingPointError as error:
        _print_error(name, error)
        return 1
    except KeyboardInterrupt as interrupt:
        note = f"; {interrupt}" if str(interrupt) else ""
        if note.startswith("; step"):
            note += ", continue with --resume"
        elif not note and MODULES.get(command) == "training":
            note = "; the model was not saved"
        stopped = isinstance(interrupt, signals.Stopped)
        word = f"stopped by {signal.Signals(interrupt.signum).name}" if stopped else "interrupted"
        with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
            print(f"{name}: {word}{note}", file=sys.stderr)
        return interrupt.code if stopped else 130
    except Exception as error:
        if not _is_bad_input(error):
            raise
        _print_error(name, error)
        return 2
    finally:
        warnings.formatwarning = plain
    return 0


def load(name: str):
    """The `Command` of this name; imports its module."""
    return importlib.import_module(f"rlhf_core.cli.{MODULES[name]}").COMMANDS[name]


def _parser() -> argparse.ArgumentParser:
    lines = []
    for heading, (_, commands) in GROUPS.items():
        lines += [f"{heading}:", *(f"  {name:<14} {help}" for name, help in commands.items()), ""]
    parser = Parser(
        prog="rlhf-core",
        usage="rlhf-core COMMAND [options]",
        description="Reinforcement learning from human feedback.\n\n" + "\n".join(lines),
        epilog="`rlhf-core COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=rlhf_core.__version__)
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser


def parser_of(name: str) -> Parser:
    """The parser of a command; imports its module."""
    parser = _empty_parser(name)
    load(name).add_arguments(parser)
    return parser


def _empty_parser(name: str) -> Parser:
    return Parser(prog=f"rlhf-core {name}", description=COMMANDS[name], formatter_class=Help)


def _print_help(name: str) -> None:
    """Print a command's help from the index and exit. Returns if there is no usable index."""
    parser = _empty_parser(name)
    try:
        add_indexed(name, parser)
    except (OSError, ValueError, LookupError, TypeError):
        return
    parser.parse_args(["--help"])


def _run(name: str, options: Sequence[str]) -> None:
    from rlhf_core import distributed
    from rlhf_core.cli.arguments import absolute_paths
    from rlhf_core.cli.config_file import expanded

    parser = parser_of(name)
    arguments = parser.parse_args(expanded(parser, name, options))
    arguments.command_line = ["rlhf-core", name, *options]
    absolute_paths(arguments)
    if MODULES[name] != "training":
        check_one_process()
    else:
        distributed.start()
    with signals.handled(signals.stop_at_once), _quiet_unless_first(), distributed.together():
        load(name).run(arguments)


@contextlib.contextmanager
def _quiet_unless_first() -> Iterator[None]:
    """Print nothing on other ranks than the first; errors are printed afterwards."""
    from rlhf_core import distributed

    with contextlib.ExitStack() as stack:
        if distributed.rank():
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nothing))
            stack.enter_context(contextlib.redirect_stderr(nothing))
        yield


def _is_bad_input(error: Exception) -> bool:
    from rlhf_core.distributed import RankError
    from rlhf_core.feedback.rewards import RewardError
    from rlhf_core.generation import EngineError

    return isinstance(
        error, ValueError | OSError | ImportError | RewardError | EngineError | RankError
    )


def _print_error(name: str, error: Exception) -> None:
    """Print an error. If all ranks have the same one, only the first rank prints it."""
    from rlhf_core import distributed

    if not (distributed.rank() and distributed.is_shared(error)):
        where = f"rank {distributed.rank()}: " if distributed.rank() else ""
        print(f"{name}: error: {where}{_text(error)}", file=sys.stderr)


def _warning(message, category, filename, lineno, line=None) -> str:
    return f"rlhf-core: warning: {message}\n"


def _text(error: Exception) -> str:
    """The error's message; the operating system's errors start with the path that is at fault."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    return str(error)
