"""`rlhf-core sft|reward|ppo|dpo|...|best-of-n|merge|generate|bench|demo|info`: arguments in, a function of commands.py
called, errors without a traceback. A trainer's options are the fields of its config."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path

import rlhf_core
from rlhf_core import commands

USER_ERRORS = (ValueError, OSError, ImportError)

MODEL = "model folder in the Hugging Face layout, or owner/name of one on its hub"
TEXTS = (
    "JSONL[.gz] with messages, prompt and completion (or response), question and answer, or text"
)
LABELLED = "JSONL[.gz] with prompt and completion (or response), or messages, and label"
SCORED = "JSONL[.gz] with prompt and completion (or response), or messages, and reward, a number"
PAIRS = "JSONL[.gz] with prompt, chosen and rejected, or chosen and rejected conversations"
LISTS = f"{PAIRS}, and a margin; or prompt (or messages), responses and their ranks; or prompt, steps and labels"

# Methods by command: <name>Trainer with <name>Config, or in rounds a function with <name>Config.
ON_DATA = {  # name, what --data is, its reader and encoder, help
    "sft": ("SFT", TEXTS, "read_texts", "encode_text", "supervised fine-tuning"),
    "reward": (
        "Reward",
        LISTS,
        "read_comparisons",
        "encode_preference",
        "a reward model, from preferences",
    ),
    "dpo": (
        "DPO",
        PAIRS,
        "read_preferences",
        "encode_preference",
        "direct preference optimisation",
    ),
    "kto": ("KTO", LABELLED, "read_labelled", "encode_labelled", "KTO: no pairs needed"),
    "ilql": (
        "ILQL",
        SCORED,
        "read_scored",
        "encode_scored",
        "ILQL: offline RL on text with rewards",
    ),
}
ON_PROMPTS = {  # name, help
    "ppo": ("PPO", "PPO against a reward model"),
    "a2c": ("A2C", "A2C: PPO with one pass over each rollout, and no clip"),
    "nlpo": ("NLPO", "NLPO: PPO that may write only what a lagging copy holds likely"),
    "grpo": ("Group", "without a critic: GRPO, RLOO, REINFORCE++, ReMax by --advantage"),
    "online-dpo": ("OnlineDPO", "DPO on its own samples, which a reward model labels"),
}
IN_ROUNDS = {  # name, function, help
    "iterated-dpo": ("IteratedDPO", "iterated_dpo", "the same in rounds of sampling and DPO"),
    "rft": (
        "RFT",
        "rft",
        "rejection sampling: SFT on the best of the policy's own samples, in rounds",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a run that diverged, 2 for bad input, 130 for an interrupt."""
    name = "rlhf-core"
    try:
        arguments = _parser().parse_args(argv)
        name = f"{name} {arguments.command}"
        arguments.run(arguments)
    except BrokenPipeError:  # `| head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except USER_ERRORS as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from rlhf_core.trainers.common import RewardError

        if not isinstance(error, RewardError):
            raise
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        kept = f", {interrupt} with --resume" if str(interrupt) else ""
        if not kept and name.split()[-1] in (*ON_DATA, *ON_PROMPTS, *IN_ROUNDS):
            kept = ", the model was not saved"
        print(f"{name}: interrupted{kept}", file=sys.stderr)
        return 130
    return 0


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a default where it says something that the help does not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        nothing = action.default in (None, ()) and "None" not in action.help
        if nothing or action.default is False or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlhf-core", description="Reinforcement learning from human feedback."
    )
    parser.add_argument("--version", action="version", version=rlhf_core.__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=help, formatter_class=_Help)
        sub.set_defaults(run=run)
        return sub

    from rlhf_core import trainers
    from rlhf_core.trainers.config import OnPolicyConfig

    runs = commands.train_on_data, commands.train_on_prompts, commands.train_in_rounds
    for run, methods in zip(runs, (ON_DATA, ON_PROMPTS, IN_ROUNDS)):
        for name, (kind, *parts, help) in methods.items():
            sub, config = command(name, run, help), getattr(trainers, f"{kind}Config")
            sub.set_defaults(method=(kind, *parts))
            sub.add_argument("--model", required=True, type=Path, help=MODEL)
            if methods is ON_DATA:
                sub.add_argument("--data", required=True, type=Path, help=parts[0])
                sub.add_argument("--eval-data", type=Path, help="evaluate on this file")
                sub.add_argument(
                    "--eval-fraction",
                    type=float,
                    default=0.1,
                    help="without --eval-data: share held out",
                )
            else:
                _add_prompts_and_reward(sub, judged=name in ("online-dpo", "iterated-dpo"))
            if issubclass(config, OnPolicyConfig):
                sub.add_argument("--ptx-data", type=Path, help=f"for --ptx-coef: {TEXTS}")
            _add_run(sub)
            _add_config(
                sub, config, without=() if methods is ON_DATA else ("eval_every",)
            )  # which takes examples

    sub = command(
        "best-of-n",
        commands.best_of_n,
        "sample, keep each prompt's response that a reward model likes best",
    )
    sub.add_argument("--model", required=True, type=Path, help=MODEL)
    _add_prompts_and_reward(sub)
    sub.add_argument(
        "--out", required=True, type=Path, help="JSONL file for prompt, completion and score"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace --out")
    sub.add_argument(
        "--skip-bad", action="store_true", help="drop bad lines and count them instead of stopping"
    )
    sub.add_argument(
        "--device", default=None, help="cpu, cuda, ...; default: cuda where there is one"
    )
    _add_config(sub, trainers.SamplingConfig)

    sub = command(
        "merge",
        commands.merge,
        "fold a folder's adapters into the weights of their base: a plain model",
    )
    sub.add_argument("--model", required=True, type=Path, help="folder of adapters")
    sub.add_argument("--out", required=True, type=Path, help="folder for the model")
    sub.add_argument(
        "--overwrite", action="store_true", help="write into --out even if it is not empty"
    )

    sub = command("generate", commands.generate, "sample from a model")
    sub.add_argument("--model", required=True, type=Path, help=MODEL)
    sub.add_argument("--prompt", required=True, nargs="+", help="one or more prompts")
    sub.add_argument(
        "--chat",
        action="store_true",
        help="each prompt is what a user says, in the model's chat template",
    )
    sub.add_argument(
        "--beta",
        type=float,
        help="ILQL: weight of the values; default: that of its training; 0: none",
    )
    sub.add_argument("--num-samples", type=int, default=1, help="responses to each prompt")
    sub.add_argument("--max-new-tokens", type=int, default=64, help="longest response")
    sub.add_argument("--min-new-tokens", type=int, default=0, help="shortest response")
    sub.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    sub.add_argument("--top-k", type=int, help="sample among the k most likely tokens")
    sub.add_argument(
        "--top-p", type=float, help="sample among the fewest tokens that hold this probability"
    )
    sub.add_argument(
        "--min-p",
        type=float,
        help="sample among tokens at least so probable, relative to the best one",
    )
    sub.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: fewer tokens a second time"
    )
    sub.add_argument(
        "--eos-ids",
        type=int,
        nargs="+",
        help="token ids that end a response; default: model's and tokenizer's",
    )
    sub.add_argument(
        "--stop",
        nargs="+",
        default=(),
        metavar="STRING",
        help="strings that end a response, and stay in",
    )
    sub.add_argument("--seed", type=_seed, default=0, help="of sampling")
    sub.add_argument(
        "--device", default=None, help="cpu, cuda, ...; default: cuda where there is one"
    )

    sub = command(
        "demo", commands.demo, "SFT, reward model, PPO and DPO on a task whose gold score is known"
    )
    sub.add_argument("--real", type=Path, metavar="DIR", help="use the story model and data in DIR")
    sub.add_argument(
        "--out", type=Path, help="folder for everything; default: runs/demo or runs/demo-real"
    )
    sub.add_argument("--seed", type=_seed, default=0, help="of everything")

    from rlhf_core.benchmarks import OPS

    sub = command(
        "bench",
        commands.bench,
        "check the ops against float64, then time them against their baselines",
    )
    sub.add_argument("--op", nargs="+", choices=OPS, default=OPS, help="which ones")
    sub.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    sub.add_argument(
        "--sweep",
        action="store_true",
        help="how time grows with vocabulary, rows and length instead",
    )
    sub.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    sub.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the roofline, or the growth of --sweep"
    )

    command("info", commands.info, "versions, backends with reasons, CPU features")
    return parser


def _add_run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--out", required=True, type=Path, help="folder for the model, its config and metrics.jsonl"
    )
    there = sub.add_mutually_exclusive_group()
    there.add_argument(
        "--overwrite", action="store_true", help="write into --out even if it is not empty"
    )
    there.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in --out; same --model"
    )
    sub.add_argument(
        "--skip-bad", action="store_true", help="drop bad lines and count them instead of stopping"
    )
    sub.add_argument(
        "--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda where there is one"
    )
    lora = sub.add_argument_group(
        "LoRA", "--out then holds adapters in PEFT's layout, and names --model as their base"
    )
    lora.add_argument(
        "--lora-rank", type=int, help="train adapters of this rank; the weights stay as they are"
    )
    lora.add_argument(
        "--lora-alpha", type=float, help="they are scaled by this / rank; default: 16"
    )
    lora.add_argument(
        "--lora-dropout", type=float, help="of their input; needs --dropout; default: 0"
    )
    lora.add_argument(
        "--lora-targets", nargs="+", metavar="MODULE", help="such as q_proj v_proj; default: all"
    )


def _add_prompts_and_reward(sub: argparse.ArgumentParser, judged: bool = False) -> None:
    from rlhf_core.models.heads import AGGREGATES

    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--reward-model", type=Path, nargs="+", help="folders that `rlhf-core reward` wrote"
    )
    source.add_argument(
        "--reward-function",
        metavar="FILE.py:NAME",
        help="a function: lists of prompts and responses, strings, to a number for each response",
    )
    if judged:
        source.add_argument(
            "--judge",
            metavar="FILE.py:NAME",
            help="a function: lists of prompts, first and second responses to how probably the first is better",
        )
    several = sub.add_mutually_exclusive_group()
    several.add_argument(
        "--reward-weights", type=float, nargs="+", help="of several: their weighted sum"
    )
    several.add_argument("--reward-ensemble", choices=AGGREGATES, help="of several: default mean")
    sub.add_argument(
        "--reward-coef", type=float, help="ensemble uncertainty: weight of the variance taken off"
    )
    sub.add_argument(
        "--prompts",
        required=True,
        type=Path,
        help="JSONL[.gz] with messages, prompt, question or text, or .txt, one a line",
    )
    sub.add_argument(
        "--eos-ids",
        type=int,
        nargs="+",
        help="token ids that end a response; default: model's and tokenizer's",
    )


def _add_config(parser: argparse.ArgumentParser, config: type, without: Sequence[str] = ()) -> None:
    """One option for each field of a config dataclass, its default and its help."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # X | None
            kind = typing.get_args(kind)[0]
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
        else:
            options = {
                "type": _seed if field.name == "seed" else kind,
                "metavar": field.name.upper(),
            }
        if field.name not in without:
            parser.add_argument(
                "--" + field.name.replace("_", "-"),
                default=field.default,
                help=field.metadata["help"],
                **options,
            )


def _seed(text: str) -> int:
    seed = int(text)
    if not -(2**63) <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number of 64 bits, got {text}")
    return seed


if __name__ == "__main__":
    sys.exit(main())
