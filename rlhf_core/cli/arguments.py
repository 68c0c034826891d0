"""Arguments that several commands share: configs, files, devices, prompts and rewards."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import math
import os
import sys
import types
import typing
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from rlhf_core import distributed, locks
from rlhf_core.cli.config_file import options_of
from rlhf_core.data import Tokenizer, encode_prompt_row, load_tokenizer, read_prompt_rows
from rlhf_core.data.chat import Content, texts_of
from rlhf_core.data.collate import unknown_id
from rlhf_core.data.examples import Prompt
from rlhf_core.data.parallel import Parallel
from rlhf_core.data.readers import FIELDS, PromptRow
from rlhf_core.evaluation.report import PAGE, try_report
from rlhf_core.feedback.ai_judge import AIJudge
from rlhf_core.feedback.answers import KINDS, AnswerReward
from rlhf_core.feedback.constitution import read_principles
from rlhf_core.feedback.endpoint import Endpoint
from rlhf_core.feedback.judges import Judge
from rlhf_core.feedback.rewards import no_hard_exit
from rlhf_core.files import check_replaceable, check_writable, parse_json
from rlhf_core.integrations import vllm
from rlhf_core.integrations.trackers import TRACKERS, Trackers
from rlhf_core.models import Transformer, load_reward
from rlhf_core.models.gather import whole
from rlhf_core.models.heads import AGGREGATES
from rlhf_core.models.hub import stored_dtype
from rlhf_core.models.lora import is_adapter, read_adapter_config
from rlhf_core.models.shard import mesh_of
from rlhf_core.options import Options, describe
from rlhf_core.training.config import TrainConfig
from rlhf_core.training.run_file import recording
from rlhf_core.training.run_log import summarize

C = typing.TypeVar("C", bound=Options)
ENGINE_OPTIONS = ("engine_folder", "engine_requests", "engine_timeout", "engine_tolerance")
JUDGE_OPTIONS = (
    *("principles", "max_failures", "clamp"),
    *("judge_cache", "judge_key_env", "judge_timeout"),  # of a URL
)
MODEL = "model folder in the Hugging Face layout, or owner/name of one on its hub"


class Command(typing.NamedTuple):
    """A command: its arguments, and the function that runs it."""

    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]


# ---- configs


def add_config(parser: ArgumentParser, config: type[Options], without: Sequence[str] = ()) -> None:
    """Add an argument for each field of a config, grouped by the classes that declare them."""
    hints, groups = typing.get_type_hints(config), {}
    for field in dataclasses.fields(config):
        if field.name in without:
            continue
        owner = next(c for c in reversed(config.__mro__) if field.name in _declared(c))
        if owner not in groups:
            title = (owner.__doc__ or "").split("\n")[0].rstrip(".")
            groups[owner] = parser.add_argument_group(title)
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # X | None
            kind = typing.get_args(kind)[0]
        if kind is bool:
            options: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif typing.get_origin(kind) is tuple:
            options = {"nargs": "+", "metavar": "STRING"}
        else:
            options = {
                "type": seed if field.name == "seed" else kind,
                "metavar": field.name.upper(),
                "choices": field.metadata.get("choices"),
            }
        flag = field.metadata["flag"] or "--" + field.name.replace("_", "-")
        text = describe(field).replace("%", "%%")
        options |= {"dest": field.name, "default": field.default, "help": text}
        groups[owner].add_argument(flag, **options)


def _declared(owner: type) -> dict[str, Any]:
    return owner.__dict__.get("__dataclass_fields__", {})


def config_of(config: type[C], arguments: Namespace) -> C:
    """The config with the values of the arguments."""
    given = vars(arguments)
    names = (field.name for field in dataclasses.fields(config))
    return config(**{name: given[name] for name in names if name in given})


def seed(text: str) -> int:
    """A seed of at most 64 bits."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number of 64 bits, got {text}")
    return value


def between(kind: Callable[[str], float], low: float, high: float = math.inf) -> Callable:
    """The type of an argument: a finite number from low to high."""
    bounds = f"from {low} to {high}"
    if high == math.inf:
        bounds = "finite and " * (kind is float) + f"at least {low}"

    def number(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    return number


# ---- files and devices


def add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if available")


def device_of(arguments: Namespace) -> torch.device:
    """The device of --device; ValueError if it cannot hold a tensor."""
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # fails on "meta", which stores nothing
        return probe.device
    except (RuntimeError, AssertionError) as error:  # unknown, or this torch is built without it
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def add_save_dtype(parser: ArgumentParser) -> None:
    help = "dtype of the weights in --out; same: that of --model's files, or of its base"
    choices = ("float32", "bfloat16", "float16", "same")
    parser.add_argument("--save-dtype", choices=choices, default="float32", help=help)


def save_dtype_of(arguments: Namespace) -> torch.dtype:
    """The dtype that --save-dtype names."""
    if arguments.save_dtype != "same":
        return getattr(torch, arguments.save_dtype)
    source = arguments.model
    return stored_dtype(read_adapter_config(source).base if is_adapter(source) else source)


def add_log(parser: ArgumentParser) -> None:
    help = (
        "also send the metrics to these trackers; each but csv needs its package, such as "
        "rlhf-core[wandb]"
    )
    # torchrun takes "--log" for the start of its own --log-dir, so there is a second name.
    names = ("--log", "--log-to")
    parser.add_argument(*names, nargs="+", action="extend", choices=TRACKERS, help=help)


def add_template(parser: ArgumentParser) -> None:
    help = "what a chat template writes as today's date, for a run that resumes on another day"
    parser.add_argument("--template-date", type=_date, metavar="YYYY-MM-DD", help=help)
    help = "variables of the chat template, such as enable_thinking=false; values are JSON or text"
    parser.add_argument(
        "--template-vars", type=variable, nargs="+", default=(), metavar="NAME=VALUE", help=help
    )


def tokenizer_of(arguments: Namespace, model: Path | str | None = None) -> Tokenizer:
    """The tokenizer of --model, or of another one, with the options of its chat template."""
    variables = dict(arguments.template_vars)
    return load_tokenizer(model or arguments.model, arguments.template_date, variables)


def variable(text: str) -> tuple[str, Any]:
    """The name and value of NAME=VALUE. The value is JSON or text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, parse_json(value)
    except ValueError:
        return name, value


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a date such as 2024-12-31, got {text}") from None


def add_skip_bad(parser: ArgumentParser) -> None:
    help = "drop and count bad lines instead of stopping"
    parser.add_argument("--skip-bad", action="store_true", help=help)


def add_columns(parser: ArgumentParser) -> None:
    help = (
        "columns of the data with other names, as FIELD=COLUMN, such as "
        "prompt=question,completion=answer; for every file of rows that the command reads"
    )
    parser.add_argument("--columns", type=_columns, metavar="FIELD=COLUMN,...", help=help)


def _columns(text: str) -> dict[str, str]:
    columns = {}
    for part in text.split(","):
        field, equals, column = part.partition("=")
        if not equals or not column or field in columns:
            raise argparse.ArgumentTypeError(
                f"must be FIELD=COLUMN,..., each field once, got {text!r}"
            )
        if field not in FIELDS:
            fields = ", ".join(FIELDS)
            raise argparse.ArgumentTypeError(f"field {field!r} is not one of {fields}")
        columns[field] = column
    return columns


def known(item: Any, model: Any, tokenizer: Tokenizer) -> Any:
    """An example or the ids of a prompt. ValueError if they have an id that the model does not."""
    size = model.config.vocab_size
    if _number_of_ids(tokenizer) > size and (fault := unknown_id(item, size)):
        raise ValueError(f"the encoded row {fault}")
    return item


@functools.lru_cache(maxsize=8)
def _number_of_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest id that it encodes to; more than `vocab_size` if ids are left out.

    The ids of its configuration count too, because they need not be in its vocabulary.
    """
    named = (i for i in (tokenizer.bos_id, *tokenizer.eos_ids) if i is not None)
    return 1 + max(max(tokenizer.vocabulary().values(), default=-1), *named, -1)


def read(
    reader: Callable,
    path: Path,
    arguments: Namespace,
    encode: Callable,
    notes: Sequence[list | dict] = (),
) -> list:
    """The encoded rows of a file; reports lines that --skip-bad drops. notes: See `Parallel`."""
    dropped = []
    on_bad = dropped.append if arguments.skip_bad else None
    items = reader(path, on_bad, Parallel(encode, notes), arguments.columns)
    if hasattr(arguments, "files"):
        facts = {"path": str(path), "sha256": _sha256(path), "rows": len(items)}
        arguments.files.append({**facts, "dropped": len(dropped)})
    if dropped:
        count = f"{len(dropped)} bad line{'s' * (len(dropped) > 1)}"
        print(f"dropped {count}, the first: {dropped[0]}", file=sys.stderr)
    return items


def progress(rows: Iterable, name: str, total: int | None = None) -> Iterable:
    """The rows, counted by a bar on a terminal."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):  # tqdm, which is optional
            from tqdm import tqdm

            return tqdm(rows, desc=name, total=total, unit=" rows", file=sys.stderr)
    return rows


def check_new_file(out: Path, overwrite: bool, data: Path | None = None) -> None:
    """Raise OSError unless `out` is a new file, or one that --overwrite may replace.

    data: The file that is read, which is never replaced.
    """
    check_replaceable(out)
    if data is not None and out.exists() and out.samefile(data):
        raise FileExistsError(f"{out} is the data itself. Choose another file")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists. Choose another file, or pass --overwrite")
    check_writable(out.parent)


def check_unused(arguments: Namespace, names: Iterable[str], reason: str) -> None:
    """Raise ValueError if one of these options is given, with the reason behind its name."""
    for name in names:
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} {reason}")


@contextlib.contextmanager
def held_out(arguments: Namespace) -> Iterator[None]:
    """Hold the folder --out. Raises OSError if another run holds it, or it may not be written."""
    out, resume = arguments.out, getattr(arguments, "resume", False)
    with contextlib.ExitStack() as stack:
        with distributed.together():
            if not distributed.rank():
                check_writable(out)
                stack.enter_context(locks.hold(out))
                used = any(file.name != locks.NAME for file in out.iterdir())
                if used and not (arguments.overwrite or resume):
                    message = "is not empty. Choose another --out, or pass --overwrite"
                    raise FileExistsError(f"{out} {message}")
        yield


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


@contextlib.contextmanager
def recorded(arguments: Namespace) -> Iterator[None]:
    """Hold --out as `held_out`, describe the run in its run.json, and at the end in a report."""
    if arguments.template_date is None:  # fixed now, so that the same options give the same run
        arguments.template_date = datetime.datetime.now().date()
    facts = {"command": arguments.command_line, "options": options_of(arguments)}
    facts["data"] = arguments.files = []  # `read` adds what it has read
    logs = () if distributed.rank() else arguments.log or ()
    with Trackers(logs, arguments.out) as arguments.on_step:
        with held_out(arguments), contextlib.ExitStack() as stack:
            if not distributed.rank():
                stack.enter_context(recording(arguments.out, **facts))
            yield
        if not distributed.rank():
            try_report([arguments.out], arguments.out / PAGE, arguments.out.name)


def absolute_paths(arguments: Namespace) -> None:
    """Make paths absolute, because a reward may call os.chdir; an owner/name on the hub stays."""
    for name, value in vars(arguments).items():
        hub = name in ("model", "teacher", "reward_model", "policy", "measure")
        several = isinstance(value, list)
        paths = [_absolute(x, hub) for x in (value if several else [value])]
        setattr(arguments, name, paths if several else paths[0])
    for name in ("reward_function", "harm_function", "judge"):
        value = getattr(arguments, name, None)
        if value is None:
            continue
        if value.rpartition(":")[0].endswith(".py") or (name == "judge" and Path(value).is_dir()):
            setattr(arguments, name, os.path.abspath(value))


def _absolute(value: Any, hub: bool) -> Any:
    """The value, or its absolute path; what does not exist may be the name of a hub repository."""
    plain = not isinstance(value, Path) or (hub and not value.exists())
    return value if plain else value.absolute()


# ---- prompts and rewards


def add_prompts(
    parser: ArgumentParser, candidates: bool = False, required: bool = True, source: Any = None
) -> None:
    """Add --prompts, or --candidates in its place. source: A group of other options instead."""
    source = source or parser.add_mutually_exclusive_group(required=required)
    if candidates:
        help = "rank the answers in this file, as `rlhf-core candidates` writes it"
        source.add_argument("--candidates", type=Path, metavar="FILE", help=help)
    source.add_argument(
        "--prompts",
        type=Path,
        help="JSONL, JSON, CSV or Parquet with messages, prompt, question, text, conversations or "
        "instruction; or .txt, one prompt per line",
    )
    add_columns(parser)


def text_of(prompt: Content) -> str:
    """A prompt as a reward function or a judge reads it, where no tokenizer renders it."""
    return "\n\n".join(texts_of(prompt))


def add_prompts_and_reward(
    parser: ArgumentParser,
    judged: bool = False,
    candidates: bool = False,
    required: bool = True,
    people: bool = False,
) -> None:
    add_prompts(parser, candidates, required)
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument(
        "--reward-model", type=Path, nargs="+", help="folders written by `rlhf-core reward`"
    )
    source.add_argument(
        "--reward-function",
        metavar="FILE.py:NAME",
        help="a function from lists of prompts and responses (strings) to one number per response; "
        "parameters named like other columns of the prompts get these",
    )
    source.add_argument(
        "--reward-answer",
        choices=KINDS,
        help="1 if the final answer of a response, a number or a letter from A to E, is that of "
        "the prompt's column `answer`, else 0",
    )
    if people:
        source.add_argument(
            "--db", type=Path, help="people label, on a page of this run: their database of labels"
        )
    if judged:
        add_judge(source)
        add_judge_options(parser)
    several = parser.add_mutually_exclusive_group()
    several.add_argument(
        "--reward-weights",
        type=_reward_weight,
        nargs="+",
        metavar="WEIGHT | NAME=WEIGHT",
        help="for a weighted sum of reward models; or new weights of a reward model's criteria",
    )
    several.add_argument(
        "--reward-ensemble", choices=AGGREGATES, help="how reward models combine; default: mean"
    )
    parser.add_argument(
        "--reward-coef", type=float, help="weight of the variance in the ensemble `uncertainty`"
    )
    add_eos_ids(parser)
    add_template(parser)


def named_weight(text: str) -> tuple[str, float]:
    """The criterion and the weight of NAME=WEIGHT; a NAME alone has weight 1."""
    name, _, weight = text.rpartition("=") if "=" in text else (text, "", "1")
    try:
        return name, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NAME=WEIGHT, got {text!r}") from None


def by_name(weights: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The weight of each criterion. Raises ValueError if a name has two."""
    names = [name for name, _ in weights]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"criterion {repeated[0]!r} has two weights; give it one")
    return dict(weights)


def _reward_weight(text: str) -> float | tuple[str, float]:
    return named_weight(text) if "=" in text else float(text)


def add_judge(parser: Any) -> None:
    parser.add_argument(
        "--judge",
        metavar="FILE.py:NAME | DIR | URL#MODEL",
        help="a function from lists of prompts, first and second responses to the probability that "
        "each first one is better, None for a failure; a model folder; or the URL of an "
        "OpenAI-compatible endpoint, such as http://localhost:8000/v1#name",
    )


def add_judge_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("judge", "options of a judge that is a model or a URL")
    group.add_argument(
        "--principles",
        type=Path,
        metavar="FILE",
        help="questions that decide which answer is better: JSON list, or text with one per line",
    )
    group.add_argument(
        "--max-failures",
        type=float,
        metavar="SHARE",
        help="share of failed comparisons above which the run stops; default: 0.05",
    )
    group.add_argument(
        "--clamp",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="limits of the probability that an answer is better, such as 0.4 0.6 for a judge that "
        "is too sure",
    )
    group.add_argument(
        "--judge-cache",
        type=Path,
        metavar="DIR",
        help="keeps replies of a URL, so that none is paid twice; default: judge-cache in --out",
    )
    group.add_argument(
        "--judge-key-env",
        metavar="NAME",
        help="environment variable with the API key of a URL; default: OPENAI_API_KEY",
    )
    group.add_argument(
        "--judge-timeout",
        type=float,
        metavar="SECONDS",
        help="without data, after which a request to a URL is tried again; default: 60",
    )


def add_eos_ids(parser: ArgumentParser) -> None:
    help = "token ids that end a response; default: those of model and tokenizer"
    parser.add_argument("--eos-ids", type=int, nargs="+", help=help)


def eos_ids_of(arguments: Namespace, model: Transformer, tokenizer) -> tuple[int, ...]:
    own = dict.fromkeys((*model.config.eos_ids, *tokenizer.eos_ids))
    return tuple(arguments.eos_ids or own)


def dates(tokenizer: Tokenizer) -> dict[str, str]:
    """The dates that the tokenizer's chat template writes: a run that resumes must share them."""
    return getattr(tokenizer, "template_dates", {})


def prompted(
    arguments: Namespace, config: Options, texts: bool = True
) -> tuple[Transformer, Sequence, dict]:
    """The policy, the rows of --prompts, and the options of methods that sample.

    texts: A row is the prompt and its token ids; else the token ids alone, in flat arrays.
    """
    torch.manual_seed(config.seed)
    tokenizer = tokenizer_of(arguments)
    device, mesh = device_of(arguments), mesh_for(config)
    model = Transformer.from_pretrained(arguments.model, mesh=mesh).to(device)

    def encode(row: PromptRow) -> tuple[Content, Prompt] | Prompt:
        ids = known(encode_prompt_row(row, tokenizer), model, tokenizer)
        return (row.prompt, ids) if texts else ids

    rows = read(read_prompt_rows, arguments.prompts, arguments, encode, [dates(tokenizer)])
    eos_ids = eos_ids_of(arguments, model, tokenizer)
    if not isinstance(config, TrainConfig):  # the reward is a judge, which rank 0 asks alone
        mesh = None
    options = reward_of(arguments, device, mesh) | engine_of(arguments, model, tokenizer)
    return model, rows, dict(eos_ids=eos_ids, tokenizer=tokenizer, **options)


def mesh_for(config: Options) -> DeviceMesh | None:
    """The mesh on which the weights of a run are in pieces; None: they are whole."""
    copies = getattr(config, "copies", None)
    if copies is None or distributed.size() == 1:
        return None
    getattr(config, "ppo", config).check_ranks(distributed.size())
    return mesh_of(copies)


def add_engine(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("engine", "a vLLM server that samples from the policy")
    group.add_argument(
        "--engine",
        metavar="URL",
        help="http://HOST:PORT of the server, which loads the policy's weights after each change",
    )
    group.add_argument(
        "--engine-folder",
        type=Path,
        metavar="DIR",
        help="folder for these weights, which the server sees under the same path; default: that "
        "of temporary files",
    )
    group.add_argument(
        "--engine-requests",
        type=between(int, 1),
        metavar="N",
        help="responses that it samples at a time; default: 64",
    )
    group.add_argument(
        "--engine-timeout",
        type=between(float, 1),
        metavar="SECONDS",
        help="longest time of one response; default: 600",
    )
    group.add_argument(
        "--engine-tolerance",
        type=between(float, 0),
        metavar="NATS",
        help="largest difference between its log-probs and the policy's after loading; higher for "
        "a server in bfloat16; default: 1e-4",
    )


def engine_of(arguments: Namespace, model: Transformer, tokenizer: Tokenizer) -> dict:
    """The engine of the arguments, checked and with the model's weights, as an option."""
    if getattr(arguments, "engine", None) is None:
        for name in ENGINE_OPTIONS:
            if getattr(arguments, name, None) is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs --engine")
        return {}
    given = {name: getattr(arguments, name) for name in ENGINE_OPTIONS}
    options = {name.removeprefix("engine_"): x for name, x in given.items() if x is not None}
    engine = vllm.Engine(arguments.engine, **options)
    with whole(model) as policy:
        if not distributed.rank():  # which speaks to the engine for all
            engine.start(policy, tokenizer)
    return {"engine": engine}


def reward_of(arguments: Namespace, device: torch.device, mesh: DeviceMesh | None = None) -> dict:
    """The reward or judge of the arguments, as the methods that sample take it.

    mesh: on which the weights of reward models are in pieces.
    """
    weights, folders = arguments.reward_weights, arguments.reward_model
    check_judge_options(arguments)
    if folders is None:
        for name in ("reward_weights", "reward_ensemble", "reward_coef"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs --reward-model")
        if getattr(arguments, "db", None) is not None:  # people are asked
            return {}
        if arguments.reward_answer is not None:
            return {"reward": AnswerReward(arguments.reward_answer)}
        if arguments.reward_function is not None:
            return {"reward": function_of("--reward-function", arguments.reward_function)}
        return {"judge": judge_of(arguments.judge, arguments, device)}
    named = [weight for weight in weights or () if isinstance(weight, tuple)]
    if weights is None or named:
        if named != (weights or []):
            raise ValueError(
                "--reward-weights has numbers and NAME=WEIGHT. Give a number for each model, "
                "or NAME=WEIGHT for criteria"
            )
        options = arguments.reward_ensemble, arguments.reward_coef
        reward = load_reward(folders, *options, weights=by_name(named), mesh=mesh)
        return {"reward": reward.to(device)}
    if arguments.reward_coef is not None:
        raise ValueError(f"--reward-coef {arguments.reward_coef} contradicts --reward-weights")
    if len(weights) != len(folders):
        raise ValueError(
            f"there are {len(weights)} --reward-weights for {len(folders)} reward models; give one "
            "weight for each model"
        )
    models = [load_reward([folder], mesh=mesh).to(device) for folder in folders]
    return {"reward": list(zip(models, weights))}


def check_judge_options(arguments: Namespace) -> None:
    """Raise ValueError if a judge's option has no judge that it belongs to."""
    given = [getattr(arguments, name, None) for name in ("judge", "eval_judge")]
    sources = [source for source in given if source is not None]
    for name in JUDGE_OPTIONS:
        if getattr(arguments, name, None) is None:
            continue
        option, of_url = f"--{name.replace('_', '-')}", name.startswith("judge_")
        if not sources:
            raise ValueError(f"{option} needs --judge")
        if not any(_is_url(x) or not (of_url or _is_function(x)) for x in sources):
            kind = "a URL" if of_url else "a model or a URL"
            raise ValueError(f"{option} needs {kind} as --judge, got {' and '.join(sources)}")


def _is_url(judge: str) -> bool:
    return judge.startswith(("http://", "https://"))


def _is_function(judge: str) -> bool:
    return judge.partition(":")[0].endswith(".py") and not _is_url(judge)


def judge_of(source: str, arguments: Namespace, device: torch.device, option="--judge") -> Judge:
    """A judge from its source: a function, a model, or an endpoint.

    Args:
        source: The value of `option`, which errors name.
    """
    if _is_function(source):
        return function_of(option, source)
    options = {}
    if arguments.max_failures is not None:
        options["max_failures"] = arguments.max_failures
    if arguments.clamp is not None:
        options["clamp"] = tuple(arguments.clamp)
    if arguments.principles is not None:
        options["principles"] = [x.question for x in read_principles(arguments.principles)]
    if _is_url(source):
        settings = {
            "cache": arguments.judge_cache or _judge_cache(arguments.out),
            "key_env": arguments.judge_key_env,
            "timeout": arguments.judge_timeout,
        }
        settings = {name: value for name, value in settings.items() if value is not None}
        return AIJudge(Endpoint(source, **settings), **options)
    if not Path(source).is_dir():
        raise FileNotFoundError(
            f"{option} {source}: no such folder. Give a model folder, FILE.py:NAME or http(s)://URL"
        )
    model = Transformer.from_pretrained(source).to(device)
    return AIJudge(model, tokenizer=load_tokenizer(source), **options)


def _judge_cache(out: Path) -> Path:
    """The folder for a judge's replies: in the run's folder, or next to its file."""
    return out / "judge-cache" if out.is_dir() else out.with_name(f"{out.name}.judge-cache")


def function_of(option: str, text: str) -> Callable:
    """The function FILE.py:NAME. The file is executed; it may import modules of its folder."""
    file, _, name = text.rpartition(":")
    if not file.endswith(".py") or not name:
        raise ValueError(f"{option} must be FILE.py:NAME, got {text!r}")
    spec = importlib.util.spec_from_file_location(f"_rlhf_core_{Path(file).stem}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(file).resolve().parent))
    try:
        with no_hard_exit():
            spec.loader.exec_module(module)
    except (OSError, KeyboardInterrupt):
        raise
    except BaseException as error:  # sys.exit, too
        raise ValueError(f"{option}: {file} raised {error!r}") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{option}: {file} has no function {name!r}")
    return getattr(module, name)


def print_result(history: list[dict], out: Path, note: str) -> None:
    """Print the means of the last tenth of the steps, and where the model is.

    Evaluations, and other metrics that only the last of several steps has, are as they are.
    """
    last, (recent, means, final) = history[-1], summarize(history)
    unit = "round" if "round" in last else "step"
    steps = f"{unit} {last[unit]}"
    if len(recent) > 1:
        steps = f"mean of {unit}s {recent[0][unit]} to {last[unit]}"
    for title, metrics in ((steps, means), (f"after {unit} {last[unit]}", final)):
        groups = list(dict.fromkeys(name.rpartition("/")[0] for name in metrics))
        names = sorted(metrics, key=lambda name: groups.index(name.rpartition("/")[0]))
        if names:
            print(f"{title}:")
        for name in names:
            value = metrics[name]
            print(f"  {name:<28} {value if isinstance(value, list) else format(value, '.6g')}")
    print(f"{note}; written to {out}")
