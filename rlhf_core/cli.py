"""`rlhf-core sft|reward|ppo|dpo|...|best-of-n|merge|generate|bench|demo|info`: arguments in, the library's functions
called, errors without a traceback. A trainer's options are the fields of its config."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path

import rlhf_core

USER_ERRORS = (ValueError, OSError, ImportError)

MODEL = "model folder in the Hugging Face layout, or owner/name of one on its hub"
TEXTS = "JSONL[.gz] with messages, prompt and completion (or response), question and answer, or text"
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
    "dpo": ("DPO", PAIRS, "read_preferences", "encode_preference", "direct preference optimisation"),
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
    "rft": ("RFT", "rft", "rejection sampling: SFT on the best of the policy's own samples, in rounds"),
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
    parser = argparse.ArgumentParser(prog="rlhf-core", description="Reinforcement learning from human feedback.")
    parser.add_argument("--version", action="version", version=rlhf_core.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, formatter_class=_Help)
        sub.set_defaults(run=run)
        return sub

    from rlhf_core import trainers
    from rlhf_core.trainers.config import OnPolicyConfig

    for run, methods in ((_train_on_data, ON_DATA), (_train_on_prompts, ON_PROMPTS), (_train_in_rounds, IN_ROUNDS)):
        for name, (kind, *parts, help) in methods.items():
            sub, config = command(name, run, help), getattr(trainers, f"{kind}Config")
            sub.add_argument("--model", required=True, type=Path, help=MODEL)
            if methods is ON_DATA:
                sub.add_argument("--data", required=True, type=Path, help=parts[0])
                sub.add_argument("--eval-data", type=Path, help="evaluate on this file")
                sub.add_argument("--eval-fraction", type=float, default=0.1, help="without --eval-data: share held out")
            else:
                _add_prompts_and_reward(sub)
            if issubclass(config, OnPolicyConfig):
                sub.add_argument("--ptx-data", type=Path, help=f"for --ptx-coef: {TEXTS}")
            _add_run(sub)
            _add_config(sub, config, without=() if methods is ON_DATA else ("eval_every",))  # which takes examples

    sub = command("best-of-n", _best_of_n, "sample, keep each prompt's response that a reward model likes best")
    sub.add_argument("--model", required=True, type=Path, help=MODEL)
    _add_prompts_and_reward(sub)
    sub.add_argument("--out", required=True, type=Path, help="JSONL file for prompt, completion and score")
    sub.add_argument("--overwrite", action="store_true", help="replace --out")
    sub.add_argument("--skip-bad", action="store_true", help="drop bad lines and count them instead of stopping")
    sub.add_argument("--device", default=None, help="cpu, cuda, ...; default: cuda where there is one")
    _add_config(sub, trainers.SamplingConfig)

    sub = command("merge", _merge, "fold the adapters of a folder into the weights of their base: a plain model")
    sub.add_argument("--model", required=True, type=Path, help="folder of adapters")
    sub.add_argument("--out", required=True, type=Path, help="folder for the model")
    sub.add_argument("--overwrite", action="store_true", help="write into --out even if it is not empty")

    sub = command("generate", _generate, "sample from a model")
    sub.add_argument("--model", required=True, type=Path, help=MODEL)
    sub.add_argument("--prompt", required=True, nargs="+", help="one or more prompts")
    sub.add_argument(
        "--chat", action="store_true", help="each prompt is what a user says, in the model's chat template"
    )
    sub.add_argument("--beta", type=float, help="ILQL: weight of the values; default: that of its training; 0: none")
    sub.add_argument("--num-samples", type=int, default=1, help="responses to each prompt")
    sub.add_argument("--max-new-tokens", type=int, default=64, help="longest response")
    sub.add_argument("--min-new-tokens", type=int, default=0, help="shortest response")
    sub.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    sub.add_argument("--top-k", type=int, help="sample among the k most likely tokens")
    sub.add_argument("--top-p", type=float, help="sample among the fewest tokens that hold this probability")
    sub.add_argument("--min-p", type=float, help="sample among tokens at least so probable, relative to the best one")
    sub.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: fewer tokens a second time")
    sub.add_argument(
        "--eos-ids", type=int, nargs="+", help="token ids that end a response; default: model's and tokenizer's"
    )
    sub.add_argument("--stop", nargs="+", default=(), metavar="STRING", help="strings that end a response, and stay in")
    sub.add_argument("--seed", type=_seed, default=0, help="of sampling")
    sub.add_argument("--device", default=None, help="cpu, cuda, ...; default: cuda where there is one")

    sub = command("demo", _demo, "SFT, reward model, PPO and DPO on a task whose gold score is known")
    sub.add_argument("--real", type=Path, metavar="DIR", help="use the story model and data in DIR")
    sub.add_argument("--out", type=Path, help="folder for everything; default: runs/demo or runs/demo-real")
    sub.add_argument("--seed", type=_seed, default=0, help="of everything")

    from rlhf_core.benchmarks import OPS

    sub = command("bench", _bench, "check the ops against float64, then time them against their baselines")
    sub.add_argument("--op", nargs="+", choices=OPS, default=OPS, help="which ones")
    sub.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    sub.add_argument("--sweep", action="store_true", help="how time grows with vocabulary, rows and length instead")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    sub.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the roofline, or the growth of --sweep")

    command("info", _info, "versions, backends with reasons, CPU features")
    return parser


def _add_run(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", required=True, type=Path, help="folder for the model, its config and metrics.jsonl")
    there = sub.add_mutually_exclusive_group()
    there.add_argument("--overwrite", action="store_true", help="write into --out even if it is not empty")
    there.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out; same --model")
    sub.add_argument("--skip-bad", action="store_true", help="drop bad lines and count them instead of stopping")
    sub.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
    lora = sub.add_argument_group("LoRA", "--out then holds adapters in PEFT's layout, and names --model as their base")
    lora.add_argument("--lora-rank", type=int, help="train adapters of this rank; the weights stay as they are")
    lora.add_argument("--lora-alpha", type=float, help="they are scaled by this / rank; default: 16")
    lora.add_argument("--lora-dropout", type=float, help="of their input; needs --dropout; default: 0")
    lora.add_argument("--lora-targets", nargs="+", metavar="MODULE", help="such as q_proj v_proj; default: all")


def _add_prompts_and_reward(sub: argparse.ArgumentParser) -> None:
    from rlhf_core.models.heads import AGGREGATES

    sub.add_argument(
        "--reward-model", required=True, type=Path, nargs="+", help="folders that `rlhf-core reward` wrote"
    )
    several = sub.add_mutually_exclusive_group()
    several.add_argument("--reward-weights", type=float, nargs="+", help="of several: their weighted sum")
    several.add_argument("--reward-ensemble", choices=AGGREGATES, help="of several: default mean")
    sub.add_argument("--reward-coef", type=float, help="ensemble uncertainty: weight of the variance taken off")
    sub.add_argument(
        "--prompts",
        required=True,
        type=Path,
        help="JSONL[.gz] with messages, prompt, question or text, or .txt, one a line",
    )
    sub.add_argument(
        "--eos-ids", type=int, nargs="+", help="token ids that end a response; default: model's and tokenizer's"
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
            options = {"type": _seed if field.name == "seed" else kind, "metavar": field.name.upper()}
        if field.name not in without:
            parser.add_argument(
                "--" + field.name.replace("_", "-"), default=field.default, help=field.metadata["help"], **options
            )


def _seed(text: str) -> int:
    seed = int(text)
    if not -(2**63) <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number of 64 bits, got {text}")
    return seed


def _config(config: type, arguments: argparse.Namespace):
    given = vars(arguments)
    return config(**{field.name: given[field.name] for field in dataclasses.fields(config) if field.name in given})


def _read(reader, path: Path, arguments: argparse.Namespace, encode) -> list:
    dropped = []
    items = reader(path, dropped.append if arguments.skip_bad else None, encode)
    if dropped:
        print(f"bad lines dropped: {len(dropped)}, the first: {dropped[0]}", file=sys.stderr)
    return items


def _fresh_out(arguments: argparse.Namespace) -> None:
    from rlhf_core.files import check_writable

    out = arguments.out
    resume = getattr(arguments, "resume", False)  # of the trainers
    if out.is_dir() and any(out.iterdir()) and not (arguments.overwrite or resume):
        raise FileExistsError(f"{out} is not empty; choose another --out or pass --overwrite")
    check_writable(out)


def _device(arguments: argparse.Namespace):
    import torch

    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # "meta" holds nothing
        return probe.device
    except (RuntimeError, AssertionError) as error:  # no such device, or one that this torch is built without
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def _train_on_data(arguments: argparse.Namespace) -> None:
    """File -> examples, model -> trainer, train, print the last metrics."""
    import torch

    from rlhf_core import data, trainers
    from rlhf_core.models import ILQLModel, RewardModel, Transformer
    from rlhf_core.models.ilql import has_values
    from rlhf_core.models.lora import is_reward_model

    kind, _, reader, encoder, _ = ON_DATA[arguments.command]
    reader, encode = getattr(data, reader), getattr(data, encoder)
    config = _config(getattr(trainers, f"{kind}Config"), arguments)
    _fresh_out(arguments)
    torch.manual_seed(config.seed)
    tokenizer = data.load_tokenizer(arguments.model)
    if kind == "Reward" and is_reward_model(arguments.model):  # what has heads goes on with them
        model = RewardModel.from_pretrained(arguments.model)
    elif kind == "ILQL" and has_values(arguments.model):
        model = ILQLModel.from_pretrained(arguments.model)
    else:
        model = Transformer.from_pretrained(arguments.model)
        model = {"Reward": RewardModel.from_model, "ILQL": ILQLModel}.get(kind, lambda plain: plain)(model)
    _add_adapters(getattr(model, "lm", model), arguments)
    max_length = min(config.max_length, model.config.max_positions)

    def load(path: Path) -> list:
        return _read(reader, path, arguments, lambda row: encode(row, tokenizer, max_length))

    examples = load(arguments.data)
    if arguments.eval_data is not None:
        held_out = load(arguments.eval_data)
    else:
        if not 0 <= arguments.eval_fraction < 1:
            raise ValueError(f"--eval-fraction must be in [0, 1), got {arguments.eval_fraction}")
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(config.seed)).tolist()
        count = int(len(examples) * arguments.eval_fraction)
        held_out, examples = [examples[i] for i in order[:count]], [examples[i] for i in order[count:]]
    trainer = getattr(trainers, f"{kind}Trainer")(
        model.to(_device(arguments)),
        examples,
        config,
        eval_examples=held_out,
        tokenizer=tokenizer,
        out=arguments.out,
    )
    if arguments.resume:
        trainer.resume()
    _print_result(trainer.train()[-1], arguments.out, f"{len(examples)} to train on, {len(held_out)} held out")


def _add_adapters(model, arguments: argparse.Namespace) -> None:
    """Those that the --lora options ask for."""
    from rlhf_core.models.lora import LoRAConfig, add_adapters

    options = dict(alpha=arguments.lora_alpha, dropout=arguments.lora_dropout, target_modules=arguments.lora_targets)
    options = {name: value for name, value in options.items() if value is not None}
    if arguments.lora_rank is None:
        if options:
            raise ValueError("the options --lora-... have no effect without --lora-rank")
        return
    if arguments.lora_dropout and not arguments.dropout:
        raise ValueError("--lora-dropout has no effect without --dropout, which turns the model's own on, too")
    base = arguments.model.resolve() if arguments.model.exists() else arguments.model  # a folder, or a hub id
    add_adapters(model, LoRAConfig(rank=arguments.lora_rank, base=str(base), **options))


def _print_result(metrics: dict[str, float], out: Path, note: str) -> None:
    for name, value in metrics.items():
        print(f"{name:<28} {value:.6g}")
    print(f"{note}; written to {out}")


def _eos_ids(arguments: argparse.Namespace, model, tokenizer) -> tuple[int, ...]:
    return tuple(arguments.eos_ids or dict.fromkeys((*model.config.eos_ids, *tokenizer.eos_ids)))


def _reward_of(arguments: argparse.Namespace, device):
    """What the --reward options name, as a `Scorer` takes it."""
    from rlhf_core.models import load_reward

    weights, folders = arguments.reward_weights, arguments.reward_model
    if weights is None:
        return load_reward(folders, arguments.reward_ensemble, arguments.reward_coef).to(device)
    if arguments.reward_coef is not None:
        raise ValueError(f"--reward-coef {arguments.reward_coef} has no effect with --reward-weights")
    if len(weights) != len(folders):
        raise ValueError(f"--reward-weights are {len(weights)} for {len(folders)} reward models")
    return [(load_reward([folder]).to(device), weight) for folder, weight in zip(folders, weights)]


def _prompted(arguments: argparse.Namespace, config) -> tuple:
    """What the methods that sample take: the model, rows of a prompt as read and as ids, and options."""
    import torch

    from rlhf_core.data import encode_prompt, load_tokenizer, read_prompts
    from rlhf_core.models import Transformer

    torch.manual_seed(config.seed)
    tokenizer, device = load_tokenizer(arguments.model), _device(arguments)
    model = Transformer.from_pretrained(arguments.model).to(device)
    rows = _read(read_prompts, arguments.prompts, arguments, lambda prompt: (prompt, encode_prompt(prompt, tokenizer)))
    eos_ids = _eos_ids(arguments, model, tokenizer)
    return model, rows, dict(reward=_reward_of(arguments, device), eos_ids=eos_ids, tokenizer=tokenizer)


def _train_on_prompts(arguments: argparse.Namespace) -> None:
    """Prompts and a reward to a trainer, train, print the last metrics."""
    from rlhf_core import trainers
    from rlhf_core.data import encode_text, read_texts

    kind, _ = ON_PROMPTS[arguments.command]
    config = _config(getattr(trainers, f"{kind}Config"), arguments)
    _fresh_out(arguments)
    model, rows, options = _prompted(arguments, config)
    _add_adapters(model, arguments)
    if getattr(arguments, "ptx_data", None) is not None:
        limit, tokenizer = model.config.max_positions, options["tokenizer"]
        encode = lambda text: encode_text(text, tokenizer, limit)  # noqa: E731
        options["ptx_examples"] = _read(read_texts, arguments.ptx_data, arguments, encode)
    trainer_type = getattr(trainers, f"{kind}Trainer")
    trainer = trainer_type(model, [ids for _, ids in rows], config, out=arguments.out, **options)
    if arguments.resume:
        trainer.resume()
    _print_result(trainer.train()[-1], arguments.out, f"{len(rows)} prompts")


def _train_in_rounds(arguments: argparse.Namespace) -> None:
    """The same for a function that trains in rounds."""
    from rlhf_core import trainers

    kind, method, _ = IN_ROUNDS[arguments.command]
    config = _config(getattr(trainers, f"{kind}Config"), arguments)
    _fresh_out(arguments)
    model, rows, options = _prompted(arguments, config)
    _add_adapters(model, arguments)
    folder = dict(out=arguments.out, resume=arguments.resume)
    history = getattr(trainers, method)(model, [ids for _, ids in rows], config, **folder, **options)
    _print_result(history[-1], arguments.out, f"{len(rows)} prompts")


def _best_of_n(arguments: argparse.Namespace) -> None:
    from rlhf_core.evaluation import best_of_n_kl
    from rlhf_core.files import check_writable, replacing
    from rlhf_core.trainers import SamplingConfig, best_of_n

    config, out = _config(SamplingConfig, arguments), arguments.out
    if out.is_dir():
        raise IsADirectoryError(f"--out {out} is a folder, not a file")
    if out.exists() and not arguments.overwrite:
        raise FileExistsError(f"{out} is there; choose another --out or pass --overwrite")
    check_writable(out.parent)
    model, rows, options = _prompted(arguments, config)
    found = best_of_n(model, [ids for _, ids in rows], config, **options)
    best, scores = found.best()
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for (prompt, _), ids, score in zip(rows, best, scores.tolist()):
            row = {"prompt": prompt, "completion": options["tokenizer"].decode(ids), "score": score}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(
        f"mean score {found.scores.mean():.6g}, of the best of {config.num_samples} {scores.mean():.6g}, at most "
        f"{best_of_n_kl(config.num_samples):.3g} nats from the policy; {len(rows)} prompts; written to {out}"
    )


def _merge(arguments: argparse.Namespace) -> None:
    from rlhf_core.data import load_tokenizer
    from rlhf_core.files import read_json
    from rlhf_core.models import ILQLModel, RewardModel, Transformer
    from rlhf_core.models.ilql import has_values
    from rlhf_core.models.lora import CONFIG_FILE, merge_adapters

    _fresh_out(arguments)
    if arguments.out.resolve() == arguments.model.resolve():
        raise ValueError(f"--out {arguments.out} is --model: the adapters would be lost")
    tokenizer, file = load_tokenizer(arguments.model), arguments.model / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, so there are no adapters to merge")
    model_type = ILQLModel if has_values(arguments.model) else Transformer
    model_type = RewardModel if read_json(file).get("task_type") == "SEQ_CLS" else model_type
    model = model_type.from_pretrained(arguments.model)
    merge_adapters(model)
    model.save_pretrained(arguments.out)
    tokenizer.save(arguments.out)
    print(f"merged with {read_json(file)['base_model_name_or_path']}; written to {arguments.out}")


def _generate(arguments: argparse.Namespace) -> None:
    import torch

    from rlhf_core.data import encode_prompt, load_tokenizer
    from rlhf_core.data.collate import left_pad
    from rlhf_core.generation import generate
    from rlhf_core.models import ILQLModel, Transformer
    from rlhf_core.models.ilql import has_values

    device = _device(arguments)
    tokenizer = load_tokenizer(arguments.model)
    valued = has_values(arguments.model)
    model = (ILQLModel if valued else Transformer).from_pretrained(arguments.model).to(device)
    if arguments.beta is not None:
        if not valued:
            raise ValueError(f"--beta has no effect: {arguments.model} is no folder that `rlhf-core ilql` wrote")
        if not 0 <= arguments.beta < math.inf:
            raise ValueError(f"--beta must be a finite number, at least 0, got {arguments.beta}")
        model.beta = arguments.beta
    prompts = arguments.prompt
    if arguments.chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    prompts = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    prompt_ids, attention_mask = (x.to(device) for x in left_pad(prompts, tokenizer.pad_id))
    response = generate(
        model,
        prompt_ids,
        attention_mask=attention_mask,
        max_new_tokens=arguments.max_new_tokens,
        min_new_tokens=arguments.min_new_tokens,
        num_samples=arguments.num_samples,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        eos_ids=_eos_ids(arguments, model, tokenizer),
        stop_strings=arguments.stop,
        tokenizer=tokenizer,
        generator=torch.Generator().manual_seed(arguments.seed),
    )
    for row, (ids, mask) in enumerate(zip(response.response_ids, response.response_mask)):
        print(tokenizer.decode(prompts[row // arguments.num_samples] + ids[mask].tolist()))


def _demo(arguments: argparse.Namespace) -> None:
    from rlhf_core import demo
    from rlhf_core.files import check_writable

    real = arguments.real is not None
    out = arguments.out or Path("runs") / ("demo-real" if real else "demo")
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    task = demo.stories_task(arguments.real, arguments.seed) if real else demo.replies_task(arguments.seed)
    print(demo.run(task, out, arguments.seed))
    print(f"models, metrics and this report are in {out}")


def _bench(arguments: argparse.Namespace) -> None:
    from rlhf_core.benchmarks import common

    size, device = "sweep" if arguments.sweep else "full", _device(arguments).type
    failed = common.run(arguments.op, size, device, arguments.json, arguments.plot)
    if failed:
        sys.exit(f"rlhf-core bench: {failed} cases gave wrong results and were not timed")


def _info(arguments: argparse.Namespace) -> None:
    import importlib.metadata

    import numpy
    import torch

    print(f"rlhf_core {rlhf_core.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__}, numpy {numpy.__version__}, {torch.get_num_threads()} threads")
    for name in ("triton", "safetensors", "tokenizers", "jinja2", "tqdm"):
        try:
            print(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            print(name, "not installed")
    rlhf_core.backends.report()
    try:
        from rlhf_core import cpp
    except ImportError:
        return
    for name, value in cpp.cpu_features().items():
        print(f"CPU {name}: {value}")


if __name__ == "__main__":
    sys.exit(main())
