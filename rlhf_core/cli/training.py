"""The commands that train: one line for each method in the tables below."""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from rlhf_core import data, distributed, trainers
from rlhf_core.algorithms.iterated_rlhf import iterated_rlhf_with_people
from rlhf_core.cli import annotation
from rlhf_core.cli import arguments as shared
from rlhf_core.cli.arguments import MODEL, Command
from rlhf_core.cli.config_file import add_config_file
from rlhf_core.cli.presets import add_preset, settings
from rlhf_core.data import Tokenizer, encode_text, read_texts
from rlhf_core.data.collate import length
from rlhf_core.data.store import join, select
from rlhf_core.data.tokenizer import other_token
from rlhf_core.feedback.annotation.people import People
from rlhf_core.feedback.judges import RewardJudge
from rlhf_core.feedback.rewards import Scorer
from rlhf_core.models import ILQLModel, RewardModel, Transformer
from rlhf_core.models.gather import is_sharded
from rlhf_core.models.ilql import has_values
from rlhf_core.models.lora import LoRAConfig, add_adapters, is_reward_model
from rlhf_core.options import Options
from rlhf_core.policy_gradient.config import PolicyGradientConfig
from rlhf_core.training import checkpoint
from rlhf_core.training.rounds import SETTINGS
from rlhf_core.training.trainer import Trainer

TEXTS = (
    "JSONL, JSON, CSV or Parquet with messages; prompt and completion (or response); question and "
    "answer; conversations (ShareGPT); instruction, input and output (Alpaca); or text"
)
LABELLED = "JSONL, JSON, CSV or Parquet with prompt and completion, or messages; and label"
SCORED = "JSONL, JSON, CSV or Parquet with prompt and completion, or messages; and reward"
PAIRS = (
    "JSONL, JSON, CSV or Parquet with prompt, chosen and rejected; or chosen and rejected "
    "conversations; optionally label_smoothing"
)
LISTS = f"{PAIRS} and margin; or prompt, responses and their ranks; or prompt, steps and labels"


class OnData(NamedTuple):
    """A method that learns from a file of examples."""

    trainer: type[Trainer]
    config: type[Options]
    load: Callable[..., nn.Module]  # the model of --model, given its path and a mesh
    reader: Callable
    encode: Callable
    data: str  # help of --data
    add_arguments: Callable[[ArgumentParser], None] | None = None  # that no other method has
    # From this method, its config, the arguments, tokenizer and model: the method with the reader
    # and the encoder that they ask for, and further options of the trainer.
    prepare: Callable[..., tuple[OnData, dict]] | None = None


class OnPrompts(NamedTuple):
    """A method that samples responses to prompts; train is a trainer, or a function of rounds."""

    train: type[Trainer] | Callable
    config: type[Options]
    judged: bool = False  # whether it takes a judge


def _reward_model(source: Path, mesh: DeviceMesh | None) -> RewardModel:
    if is_reward_model(source):
        return RewardModel.from_pretrained(source, mesh=mesh)
    return RewardModel.from_model(Transformer.from_pretrained(source, mesh=mesh), share_trunk=True)


def _ilql_model(source: Path, mesh: DeviceMesh | None) -> ILQLModel:
    if has_values(source):
        return ILQLModel.from_pretrained(source, mesh=mesh)
    return ILQLModel(Transformer.from_pretrained(source, mesh=mesh))


def _add_criteria(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--criteria",
        type=shared.named_weight,
        nargs="+",
        metavar="NAME=WEIGHT",
        help="score several criteria, such as helpful=1 harmless=2, which the rows label by "
        "criterion, or by chosen_ratings and rejected_ratings; the score is the weighted sum. "
        "Default: those of --model",
    )


def _with_criteria(
    method: OnData,
    config: trainers.RewardConfig,
    arguments: Namespace,
    tokenizer: Tokenizer,
    model: RewardModel,
) -> tuple[OnData, dict]:
    """The method with a reader of the model's criteria, those of --criteria if there are any."""
    if arguments.criteria is not None:
        model.set_criteria(shared.by_name(arguments.criteria))
    reader = partial(method.reader, criteria=tuple(model.criteria))
    return method._replace(reader=reader), {}


def _add_teacher(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--context",
        type=Path,
        metavar="FILE",
        help="what the teacher reads in front of each prompt: text, which is a system message in "
        "front of messages, or messages in a .json file",
    )
    parser.add_argument(
        "--teacher", type=Path, help=f"{MODEL}, with the tokenizer of --model; default: --model"
    )
    shared.add_eos_ids(parser)


def _with_teacher(
    method: OnData,
    config: trainers.DistillConfig,
    arguments: Namespace,
    tokenizer: Tokenizer,
    model: Transformer,
) -> tuple[OnData, dict]:
    """The method with an encoder that puts --context before the teacher's prompts; the teacher."""
    if arguments.context is None and arguments.teacher is None:
        raise ValueError("there is nothing to distill. Pass --context, --teacher or both")
    if arguments.eos_ids is not None and not config.samples:
        raise ValueError("--eos-ids ends sampled responses, and --responses is data")
    context = None if arguments.context is None else data.read_context(arguments.context)
    options: dict = {"eos_ids": shared.eos_ids_of(arguments, model, tokenizer)}
    if arguments.teacher is not None:
        theirs = shared.tokenizer_of(arguments, arguments.teacher)
        if fault := other_token(tokenizer, theirs):
            raise ValueError(
                f"--teacher {arguments.teacher}: {fault} in its tokenizer. Teacher and --model "
                "must have the same tokens"
            )
        teacher = Transformer.from_pretrained(arguments.teacher, mesh=shared.mesh_for(config))
        options["teacher"] = teacher.to(shared.device_of(arguments))
    if config.samples:
        encode = lambda row, tokenizer, _: data.encode_prompt_in_context(row, tokenizer, context)  # noqa: E731
        return method._replace(reader=data.read_prompt_rows, encode=encode), options
    return method._replace(encode=partial(data.encode_in_context, context=context)), options


ON_DATA = {
    "sft": OnData(
        trainers.SFTTrainer, trainers.SFTConfig, Transformer.from_pretrained,
        read_texts, encode_text, TEXTS,
    ),
    "reward": OnData(
        trainers.RewardTrainer, trainers.RewardConfig, _reward_model,
        data.read_comparisons, data.encode_preference, LISTS, _add_criteria, _with_criteria,
    ),
    "dpo": OnData(
        trainers.DPOTrainer, trainers.DPOConfig, Transformer.from_pretrained,
        data.read_preferences, data.encode_preference, PAIRS,
    ),
    "kto": OnData(
        trainers.KTOTrainer, trainers.KTOConfig, Transformer.from_pretrained,
        data.read_labelled, data.encode_labelled, LABELLED,
    ),
    "distill": OnData(
        trainers.DistillTrainer, trainers.DistillConfig, Transformer.from_pretrained,
        read_texts, data.encode_in_context,
        f"{TEXTS}. Where responses are sampled: prompts, as for ppo", _add_teacher, _with_teacher,
    ),
    "ilql": OnData(
        trainers.ILQLTrainer, trainers.ILQLConfig, _ilql_model,
        data.read_scored, data.encode_scored, SCORED,
    ),
}  # fmt: skip
ON_PROMPTS = {
    "ppo": OnPrompts(trainers.PPOTrainer, trainers.PPOConfig),
    "a2c": OnPrompts(trainers.A2CTrainer, trainers.A2CConfig),
    "nlpo": OnPrompts(trainers.NLPOTrainer, trainers.NLPOConfig),
    "trpo": OnPrompts(trainers.TRPOTrainer, trainers.TRPOConfig),
    "grpo": OnPrompts(trainers.GRPOTrainer, trainers.GRPOConfig),
    "online-dpo": OnPrompts(trainers.OnlineDPOTrainer, trainers.OnlineDPOConfig, judged=True),
    "iterated-dpo": OnPrompts(trainers.iterated_dpo, trainers.IteratedDPOConfig, judged=True),
    "rft": OnPrompts(trainers.rft, trainers.RFTConfig),
}


def _add_data_arguments(method: OnData, parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, help=MODEL)
    parser.add_argument(
        "--data", required=True, type=Path, nargs="+", metavar="FILE", help=method.data
    )
    parser.add_argument(
        "--data-weights", type=float, nargs="+", metavar="WEIGHT",
        help="share of each --data file in an epoch; default: all rows of all files",
    )  # fmt: skip
    parser.add_argument("--eval-data", type=Path, help="file to evaluate on")
    parser.add_argument(
        "--eval-fraction", type=float, default=0.1, help="without --eval-data: share held out"
    )
    if method.add_arguments is not None:
        method.add_arguments(parser)
    shared.add_columns(parser)
    shared.add_template(parser)
    if method.trainer is not trainers.ILQLTrainer:  # whose Q heads have a row for each id
        parser.add_argument(
            "--embedding-resize",
            action="store_true",
            help="add the ids of the tokenizer that --model lacks, such as those of ChatML on a "
            "base model; new rows start at the mean of the old ones",
        )
    _add_run(parser)
    _add_lora(parser)
    shared.add_config(parser, method.config)


def _add_prompt_arguments(method: OnPrompts, parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, help=MODEL)
    shared.add_prompts_and_reward(parser, method.judged)
    if issubclass(method.config, PolicyGradientConfig):
        parser.add_argument("--ptx-data", type=Path, help=f"examples for --ptx-coef: {TEXTS}")
    parser.add_argument(
        "--eval-prompts",
        type=Path,
        metavar="FILE",
        help="held-out prompts: reward, KL and length of the answers every --eval-every steps, or "
        "after each round",
    )
    parser.add_argument(
        "--eval-judge",
        metavar="FILE.py:NAME | DIR | URL#MODEL",
        help="a judge, as --judge takes it, that compares these answers with the reference's",
    )
    if not method.judged:  # with a --judge they are there already
        shared.add_judge_options(parser)
    parser.add_argument(
        "--pretraining-eval",
        type=Path,
        metavar="FILE",
        help="texts, as for sft, whose loss in nats per token shows what the model forgets: before "
        "the first step, after the last one, and every --eval-every steps",
    )
    _add_run(parser)
    if method.train is not trainers.NLPOTrainer:  # which samples from a masked policy
        shared.add_engine(parser)
    _add_lora(parser)
    shared.add_config(parser, method.config)


PARTS = {  # fields of IteratedRLHFConfig that hold a config, and the command that lists its options
    "sampling": (trainers.SamplingConfig, "best-of-n"),
    "reward": (trainers.RewardConfig, "reward"),
    "ppo": (trainers.PPOConfig, "ppo"),
}


def _add_iterated_rlhf(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, help=MODEL)
    shared.add_prompts_and_reward(parser, judged=True, people=True)
    people = parser.add_argument_group("people", "who label with --db")
    annotation.add_people(people)
    people.add_argument(
        "--wait-labels",
        type=shared.between(int, 1),
        metavar="N",
        help="labels of a round after which it goes on; default: when nobody has an item left",
    )
    parser.add_argument("--pairs", type=Path, help=f"earlier pairs to learn from, too: {PAIRS}")
    parser.add_argument(
        "--eval-prompts", type=Path, help="prompts whose answers rate the policies of all rounds"
    )
    for name, (_, command) in PARTS.items():
        parser.add_argument(
            f"--{name}", type=shared.variable, nargs="+", default=(), metavar="NAME=VALUE",
            help=f"options of {name}, such as batch_size=8: see `rlhf-core {command} --help`",
        )  # fmt: skip
    _add_run(parser)
    shared.add_engine(parser)
    shared.add_config(parser, trainers.IteratedRLHFConfig, without=PARTS)


def run_iterated_rlhf(arguments: Namespace) -> None:
    """Read prompts, judge and model, train in rounds, print the last metrics."""
    resume_after_restart(arguments)
    parts = {}
    for name, (config_type, _) in PARTS.items():
        given = settings(arguments.preset, name) | dict(getattr(arguments, name))
        if name == "sampling":
            given = {"num_samples": 2} | given
        try:
            parts[name] = config_type(**given)
        except (TypeError, ValueError) as error:
            raise ValueError(f"--{name}: {error}") from None
    config = trainers.IteratedRLHFConfig(arguments.rounds, **parts, seed=arguments.seed)
    if arguments.db is not None:
        annotation.check_people(arguments)
        for name in ("pairs", "eval_prompts"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs a judge or a reward, not --db")
    with shared.recorded(arguments):
        _run_iterated_rlhf(config, arguments)


def _run_iterated_rlhf(config: trainers.IteratedRLHFConfig, arguments: Namespace) -> None:
    dtype = shared.save_dtype_of(arguments)
    people = arguments.db is not None
    model, rows, options = shared.prompted(arguments, config, texts=people)
    tokenizer = options["tokenizer"]
    notes = [shared.dates(tokenizer)]
    if "reward" in options:
        pad_id, size = tokenizer.pad_id, config.sampling.batch_size
        reward = options.pop("reward")
        scorer = Scorer(reward, tokenizer=tokenizer, pad_id=pad_id, batch_size=size)
        scorer.check_vocabulary(model)
        options["judge"] = RewardJudge(scorer)
    if arguments.pairs is not None:
        limit = min(config.reward.max_length, model.config.max_positions)

        def encode_pair(row: data.Preference):
            return shared.known(data.encode_preference(row, tokenizer, limit), model, tokenizer)

        options["pairs"] = shared.read(
            data.read_preferences, arguments.pairs, arguments, encode_pair, notes
        )
    if arguments.eval_prompts is not None:
        encode = lambda row: shared.known(data.encode_prompt_row(row, tokenizer), model, tokenizer)  # noqa: E731
        path = arguments.eval_prompts
        options["eval_prompts"] = shared.read(data.read_prompt_rows, path, arguments, encode, notes)
    options |= dict(out=arguments.out, resume=arguments.resume, on_step=arguments.on_step)
    train, prompts = trainers.iterated_rlhf, [ids for _, ids in rows] if people else rows
    if people:
        names = ("db", "annotators", "overlap", "wait_labels", "host", "port")
        given = {name: getattr(arguments, name) for name in names}
        train = iterated_rlhf_with_people
        options["people"] = People(prompts=[text for text, _ in rows], **given)
    history = train(model, prompts, config, **options)
    _save_as(dtype, model, arguments.out)
    note = f"{len(rows)} prompts"
    if "elo" in history[-1]:
        ratings = ", ".join(f"{rating:.0f}" for rating in history[-1]["elo"])
        note = f"Elo ratings of the first policy and each round's: {ratings}\n{note}"
    shared.print_result(history, arguments.out, note)


def _add_run(parser: ArgumentParser) -> None:
    add_config_file(parser)
    add_preset(parser)
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="folder for the model, run.json, metrics.jsonl and report.html",
    )
    shared.add_log(parser)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--overwrite", action="store_true", help="write into --out even if it is not empty"
    )
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out from its newest checkpoint, with its options",
    )
    shared.add_save_dtype(parser)
    shared.add_skip_bad(parser)
    shared.add_device(parser)


def _add_lora(parser: ArgumentParser) -> None:
    lora = parser.add_argument_group(
        "LoRA", "--out then holds adapters in PEFT's layout, with --model as their base"
    )
    lora.add_argument("--lora-rank", type=int, help="train adapters of this rank, not the weights")
    lora.add_argument(
        "--lora-alpha", type=float, help="adapters are scaled by this / rank; default: 16"
    )
    lora.add_argument(
        "--lora-dropout", type=float, help="of the adapters' input, with --dropout; default: 0"
    )
    lora.add_argument(
        "--lora-targets", nargs="+", metavar="MODULE", help="such as q_proj v_proj; default: all"
    )


def _resize_embedding(model: nn.Module, tokenizer: Tokenizer, arguments: Namespace) -> None:
    """Give the model all ids of the tokenizer, if --embedding-resize asks for it."""
    if not getattr(arguments, "embedding_resize", False):
        return
    size = model.config.vocab_size
    if arguments.lora_rank is not None:
        raise ValueError(
            "--embedding-resize changes the base model, which --lora-rank does not save. Train all "
            "weights, or resize and save the base model first"
        )
    if tokenizer.vocab_size <= size:
        ids = f"the model has {size} ids, the tokenizer {tokenizer.vocab_size}"
        print(f"--embedding-resize has no effect: {ids}", file=sys.stderr)
        return
    model.resize_embeddings(tokenizer.vocab_size)


def _add_adapters(model: Transformer, arguments: Namespace) -> None:
    """Add the adapters that the --lora options ask for."""
    options = {
        "alpha": arguments.lora_alpha,
        "dropout": arguments.lora_dropout,
        "target_modules": arguments.lora_targets,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if arguments.lora_rank is None:
        if options:
            raise ValueError("the --lora options need --lora-rank")
        return
    if arguments.lora_dropout and not arguments.dropout:
        raise ValueError("--lora-dropout needs --dropout, which also turns on the model's own")
    # A folder is stored with its full path, a hub id as it is.
    base = arguments.model.resolve() if arguments.model.exists() else arguments.model
    add_adapters(model, LoRAConfig(rank=arguments.lora_rank, base=str(base), **options))


def resume_after_restart(arguments: Namespace) -> None:
    """Let a run that torchrun has started again continue from its newest checkpoint."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return
    out = arguments.out
    begun = bool(checkpoint.find(out)) or (out / SETTINGS).is_file()
    arguments.resume = distributed.from_rank_0(begun)
    arguments.overwrite = not arguments.resume  # what there is, this run has written


def train_on_data(method: OnData, arguments: Namespace) -> None:
    """Read examples and model, train, print the last metrics."""
    resume_after_restart(arguments)
    config = shared.config_of(method.config, arguments)
    with shared.recorded(arguments):
        _train_on_data(method, config, arguments)


def _train_on_data(method: OnData, config: Options, arguments: Namespace) -> None:
    torch.manual_seed(config.seed)
    dtype = shared.save_dtype_of(arguments)
    tokenizer = shared.tokenizer_of(arguments)
    mesh = shared.mesh_for(config)
    if getattr(arguments, "embedding_resize", False):
        mesh = None  # whole weights get the new rows, and are cut later
    model = method.load(arguments.model, mesh=mesh)
    _resize_embedding(model, tokenizer, arguments)
    _add_adapters(getattr(model, "lm", model), arguments)
    options: dict = {}
    if method.prepare is not None:
        method, options = method.prepare(method, config, arguments, tokenizer, model)
    readers = (model, options.get("teacher", model))
    max_length = min(config.max_length, *(x.config.max_positions for x in readers))

    def load(path: Path) -> Sequence:
        cut = []

        def encode(row):
            example = shared.known(method.encode(row, tokenizer, max_length), model, tokenizer)
            # A row that fills max_length was cut if it would be longer with more room.
            if length(example) == max_length:
                cut.append(length(method.encode(row, tokenizer, max_length + 1)) > max_length)
            return example

        notes = [cut, shared.dates(tokenizer)]
        examples = shared.read(method.reader, path, arguments, encode, notes)
        arguments.files[-1]["cut"] = sum(cut)
        if any(cut):
            found = (
                f"{sum(cut)} of {len(examples)} rows of {path} are longer than {max_length} tokens"
            )
            limit = (
                "see --max-length" if max_length == config.max_length else "the model takes no more"
            )
            print(f"{found} and were cut; {limit}", file=sys.stderr)
        return examples

    sources = [load(path) for path in arguments.data]
    if arguments.eval_data is not None:
        held_out = load(arguments.eval_data)
    else:
        sources, splits = _split(sources, arguments.eval_fraction, config.seed)
        held_out = join(splits)
    if arguments.data_weights is None:
        examples = join(sources)
    else:
        examples = data.mix(sources, arguments.data_weights, config.seed)
    trainer = method.trainer(
        model.to(shared.device_of(arguments)),
        examples,
        config,
        eval_examples=held_out,
        tokenizer=tokenizer,
        out=arguments.out,
        on_step=arguments.on_step,
        **options,
    )
    if arguments.resume:
        trainer.resume()
    history = trainer.train()
    _save_as(dtype, model, arguments.out)
    note = f"{len(examples)} to train on, {len(held_out)} held out"
    shared.print_result(history, arguments.out, note)


def _save_as(dtype: torch.dtype, model: nn.Module, out: Path) -> None:
    """Write the model again, unless it has this dtype: trainers save what they hold in memory."""
    if dtype != next(model.parameters()).dtype and (is_sharded(model) or not distributed.rank()):
        model.save_pretrained(out, dtype)


def _split(sources: list[Sequence], fraction: float, seed: int) -> tuple[list, list]:
    """Each source's training and held-out examples, drawn at random.

    All examples of a prompt are on one side, or the held-out ones would be known. A prompt with
    more examples than may be held out is trained on.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"--eval-fraction must be in [0, 1), got {fraction}")
    is_held: dict[Hashable, bool] = {}
    training, held_out = [], []
    for number, source in enumerate(sources):
        prompts = [_prompt_key(example, (number, i)) for i, example in enumerate(source)]
        sizes, room = Counter(prompts), int(len(source) * fraction)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(source), generator=generator).tolist()
        left = room
        for prompt in (prompts[i] for i in order):
            if prompt not in is_held:
                is_held[prompt] = sizes[prompt] <= left
                left -= sizes[prompt] if is_held[prompt] else 0
        held = [i for i in order if is_held[prompts[i]]]
        if room and not held:
            warnings.warn(
                f"each prompt has more than {room} of {len(source)} rows, so --eval-fraction "
                f"{fraction} holds out rows of prompts that are trained on, too; --eval-data takes "
                "a file with other prompts",
                stacklevel=2,
            )
            held = order[:room]
        apart = set(held)
        training.append(select(source, [i for i in order if i not in apart]))
        held_out.append(select(source, held))
    return training, held_out


def _prompt_key(example: Any, row: Hashable) -> Hashable:
    """Equal for examples of one prompt. Without a prompt, or with BOS alone, it is the row."""
    ids = getattr(example, "prompt_ids", example)
    return hash(tuple(ids)) if len(ids) > 1 else row


def train_on_prompts(method: OnPrompts, arguments: Namespace) -> None:
    """Read prompts, reward and model, train, print the last metrics."""
    resume_after_restart(arguments)
    config = shared.config_of(method.config, arguments)
    with shared.recorded(arguments):
        _train_on_prompts(method, config, arguments)


def _train_on_prompts(method: OnPrompts, config: Options, arguments: Namespace) -> None:
    dtype = shared.save_dtype_of(arguments)
    model, prompts, options = shared.prompted(arguments, config, texts=False)
    _add_adapters(model, arguments)
    positions, tokenizer = model.config.max_positions, options["tokenizer"]
    notes = [shared.dates(tokenizer)]
    limit = min(getattr(config, "max_length", positions), positions)
    encode = lambda text: shared.known(encode_text(text, tokenizer, limit), model, tokenizer)  # noqa: E731
    for name, option in (
        ("ptx_data", "ptx_examples"),
        ("pretraining_eval", "pretraining_examples"),
    ):
        if getattr(arguments, name, None) is not None:
            path = getattr(arguments, name)
            options[option] = shared.read(read_texts, path, arguments, encode, notes)
    options |= dict(out=arguments.out, on_step=arguments.on_step)
    if arguments.eval_prompts is not None:
        encode = lambda row: shared.known(data.encode_prompt_row(row, tokenizer), model, tokenizer)  # noqa: E731
        name = "eval_examples" if isinstance(method.train, type) else "eval_prompts"
        path = arguments.eval_prompts
        options[name] = shared.read(data.read_prompt_rows, path, arguments, encode, notes)
    if arguments.eval_judge is not None:
        if arguments.eval_prompts is None:
            raise ValueError("--eval-judge needs --eval-prompts")
        device = shared.device_of(arguments)
        options["eval_judge"] = shared.judge_of(
            arguments.eval_judge, arguments, device, "--eval-judge"
        )
    if isinstance(method.train, type):
        trainer = method.train(model, prompts, config, **options)
        if arguments.resume:
            trainer.resume()
        history = trainer.train()
    else:
        history = method.train(model, prompts, config, resume=arguments.resume, **options)
    _save_as(dtype, model, arguments.out)
    shared.print_result(history, arguments.out, f"{len(prompts)} prompts")


COMMANDS = (
    {
        name: Command(partial(_add_data_arguments, method), partial(train_on_data, method))
        for name, method in ON_DATA.items()
    }
    | {
        name: Command(partial(_add_prompt_arguments, method), partial(train_on_prompts, method))
        for name, method in ON_PROMPTS.items()
    }
    | {"iterated-rlhf": Command(_add_iterated_rlhf, run_iterated_rlhf)}
)
