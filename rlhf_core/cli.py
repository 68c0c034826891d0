"""`rlhf-core sft|reward|ppo|dpo|kto|merge|generate|bench|demo|info`: arguments in, the library's functions called,
errors without a traceback. A trainer's options are the fields of its config."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path

import rlhf_core

USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, PermissionError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for a run that diverged, 2 for bad input, 130 for an interrupt."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except USER_ERRORS as error:
        print(f"rlhf-core {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"rlhf-core {arguments.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:
        kept = f"{interrupt} with --resume" if str(interrupt) else "the model was not saved"
        print(f"rlhf-core {arguments.command}: interrupted, {kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlhf-core", description="Reinforcement learning from human feedback.")
    parser.add_argument("--version", action="version", version=rlhf_core.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        return sub

    from rlhf_core.trainers import DPOConfig, KTOConfig, PPOConfig, RewardConfig, SFTConfig

    texts = "JSONL[.gz] with messages, prompt and completion (or response), question and answer, or text"
    pairs = "JSONL[.gz] with prompt, chosen and rejected, or chosen and rejected conversations"
    lists = f"{pairs}, and a margin; or prompt (or messages), responses and their ranks"
    for name, run, config, data, help in (
        ("sft", _sft, SFTConfig, texts, "supervised fine-tuning"),
        ("reward", _reward, RewardConfig, lists, "train a reward model on preference pairs or ranked lists"),
        ("dpo", _dpo, DPOConfig, pairs, "direct preference optimisation"),
        ("kto", _kto, KTOConfig, "JSONL[.gz] with prompt, completion (or response) and label", "KTO: no pairs needed"),
        ("ppo", _ppo, PPOConfig, None, "PPO against a reward model"),
    ):
        sub = command(name, run, help)
        sub.add_argument("--model", required=True, type=Path, help="model folder in the Hugging Face layout")
        if data is None:
            sub.add_argument("--reward-model", required=True, type=Path, help="folder that `rlhf-core reward` wrote")
            sub.add_argument(
                "--prompts", required=True, type=Path, help="JSONL[.gz] with prompt or messages, or .txt, one a line"
            )
            sub.add_argument(
                "--eos-ids", type=int, nargs="+", help="token ids that end a response; default: model's and tokenizer's"
            )
        else:
            sub.add_argument("--data", required=True, type=Path, help=data)
            sub.add_argument("--eval-data", type=Path, help="evaluate on this file")
            sub.add_argument("--eval-fraction", type=float, default=0.1, help="without --eval-data: share held out")
        sub.add_argument("--out", required=True, type=Path, help="folder for the model, its config and metrics.jsonl")
        there = sub.add_mutually_exclusive_group()
        there.add_argument("--overwrite", action="store_true", help="write into --out even if it is not empty")
        there.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out; same --model")
        sub.add_argument("--skip-bad", action="store_true", help="drop bad lines and count them instead of stopping")
        sub.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda where there is one")
        lora = sub.add_argument_group(
            "LoRA", "--out then holds adapters in PEFT's layout, and names --model as their base"
        )
        lora.add_argument("--lora-rank", type=int, help="train adapters of this rank; the weights stay as they are")
        lora.add_argument("--lora-alpha", type=float, help="they are scaled by this / rank; default: 16")
        lora.add_argument("--lora-dropout", type=float, help="of their input; needs --dropout; default: 0")
        lora.add_argument("--lora-targets", nargs="+", metavar="MODULE", help="such as q_proj v_proj; default: all")
        _add_config(sub, config)

    sub = command("merge", _merge, "fold the adapters of a folder into the weights of their base: a plain model")
    sub.add_argument("--model", required=True, type=Path, help="folder of adapters")
    sub.add_argument("--out", required=True, type=Path, help="folder for the model")
    sub.add_argument("--overwrite", action="store_true", help="write into --out even if it is not empty")

    sub = command("generate", _generate, "sample from a model")
    sub.add_argument("--model", required=True, type=Path, help="model folder in the Hugging Face layout")
    sub.add_argument("--prompt", required=True, nargs="+", help="one or more prompts")
    sub.add_argument(
        "--chat", action="store_true", help="each prompt is what a user says, in the model's chat template"
    )
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
    sub.add_argument("--seed", type=int, default=0, help="of sampling")
    sub.add_argument("--device", default=None, help="cpu, cuda, ...; default: cuda where there is one")

    sub = command("demo", _demo, "SFT, reward model, PPO and DPO on a task whose gold score is known")
    sub.add_argument("--real", type=Path, metavar="DIR", help="use the story model and data in DIR")
    sub.add_argument("--out", type=Path, help="folder for everything; default: runs/demo or runs/demo-real")
    sub.add_argument("--seed", type=int, default=0, help="of everything")

    from rlhf_core.benchmarks import OPS

    sub = command("bench", _bench, "check the ops against float64, then time them against their baselines")
    sub.add_argument("--op", nargs="+", choices=OPS, default=OPS, help="which ones")
    sub.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    sub.add_argument("--sweep", action="store_true", help="how time grows with vocabulary, rows and length instead")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write every figure")
    sub.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the roofline, or the growth of --sweep")

    command("info", _info, "versions, backends with reasons, CPU features")
    return parser


def _add_config(parser: argparse.ArgumentParser, config: type) -> None:
    """One option for each field of a config dataclass, its default and its help."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):  # X | None
            kind = typing.get_args(kind)[0]
        options = {"action": "store_true"} if kind is bool else {"type": kind, "metavar": field.name.upper()}
        parser.add_argument(
            "--" + field.name.replace("_", "-"), default=field.default, help=field.metadata["help"], **options
        )


def _config(config: type, arguments: argparse.Namespace):
    return config(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(config)})


def _read(reader, path: Path, arguments: argparse.Namespace, encode) -> list:
    dropped = []
    items = reader(path, dropped.append if arguments.skip_bad else None, encode)
    if dropped:
        print(f"bad lines dropped: {len(dropped)}, the first: {dropped[0]}", file=sys.stderr)
    return items


def _fresh_out(arguments: argparse.Namespace) -> None:
    out = arguments.out
    resume = getattr(arguments, "resume", False)  # of the trainers
    if out.is_dir() and any(out.iterdir()) and not (arguments.overwrite or resume):
        raise FileExistsError(f"{out} is not empty; choose another --out or pass --overwrite")


def _device(arguments: argparse.Namespace):
    import torch

    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such device, or one that this torch is built without
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def _train_on_file(arguments: argparse.Namespace, config_type: type, reader, encode, model_type, trainer_type) -> None:
    """What sft, reward, dpo and kto share: file -> examples, model -> trainer, train, print the last metrics."""
    import torch

    from rlhf_core.data import load_tokenizer
    from rlhf_core.models import RewardModel, Transformer

    config = _config(config_type, arguments)
    _fresh_out(arguments)
    torch.manual_seed(config.seed)
    tokenizer = load_tokenizer(arguments.model)
    model = Transformer.from_pretrained(arguments.model)
    if model_type is RewardModel:
        model = RewardModel.from_model(model)
    _add_adapters(model, arguments)
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
    trainer = trainer_type(
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


def _sft(arguments: argparse.Namespace) -> None:
    from rlhf_core.data import encode_text, read_texts
    from rlhf_core.models import Transformer
    from rlhf_core.trainers import SFTConfig, SFTTrainer

    _train_on_file(arguments, SFTConfig, read_texts, encode_text, Transformer, SFTTrainer)


def _reward(arguments: argparse.Namespace) -> None:
    from rlhf_core.data import encode_preference, read_comparisons
    from rlhf_core.models import RewardModel
    from rlhf_core.trainers import RewardConfig, RewardTrainer

    _train_on_file(arguments, RewardConfig, read_comparisons, encode_preference, RewardModel, RewardTrainer)


def _dpo(arguments: argparse.Namespace) -> None:
    from rlhf_core.data import encode_preference, read_preferences
    from rlhf_core.models import Transformer
    from rlhf_core.trainers import DPOConfig, DPOTrainer

    _train_on_file(arguments, DPOConfig, read_preferences, encode_preference, Transformer, DPOTrainer)


def _kto(arguments: argparse.Namespace) -> None:
    from rlhf_core.data import encode_labelled, read_labelled
    from rlhf_core.models import Transformer
    from rlhf_core.trainers import KTOConfig, KTOTrainer

    _train_on_file(arguments, KTOConfig, read_labelled, encode_labelled, Transformer, KTOTrainer)


def _eos_ids(arguments: argparse.Namespace, model, tokenizer) -> tuple[int, ...]:
    return tuple(arguments.eos_ids or dict.fromkeys((*model.config.eos_ids, *tokenizer.eos_ids)))


def _ppo(arguments: argparse.Namespace) -> None:
    import torch

    from rlhf_core.data import encode_prompt, load_tokenizer, read_prompts
    from rlhf_core.models import RewardModel, Transformer
    from rlhf_core.trainers import PPOConfig, PPOTrainer

    config = _config(PPOConfig, arguments)
    _fresh_out(arguments)
    torch.manual_seed(config.seed)
    tokenizer, device = load_tokenizer(arguments.model), _device(arguments)
    model = Transformer.from_pretrained(arguments.model).to(device)
    _add_adapters(model, arguments)
    trainer = PPOTrainer(
        model,
        _read(read_prompts, arguments.prompts, arguments, lambda prompt: encode_prompt(prompt, tokenizer)),
        config,
        reward=RewardModel.from_pretrained(arguments.reward_model).to(device),
        eos_ids=_eos_ids(arguments, model, tokenizer),
        tokenizer=tokenizer,
        out=arguments.out,
    )
    if arguments.resume:
        trainer.resume()
    _print_result(trainer.train()[-1], arguments.out, f"{len(trainer.examples)} prompts")


def _merge(arguments: argparse.Namespace) -> None:
    from rlhf_core.data import load_tokenizer
    from rlhf_core.files import read_json
    from rlhf_core.models import RewardModel, Transformer
    from rlhf_core.models.lora import CONFIG_FILE, merge_adapters

    _fresh_out(arguments)
    tokenizer, file = load_tokenizer(arguments.model), arguments.model / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file, so there are no adapters to merge")
    model_type = RewardModel if read_json(file).get("task_type") == "SEQ_CLS" else Transformer
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
    from rlhf_core.models import Transformer

    device = _device(arguments)
    tokenizer = load_tokenizer(arguments.model)
    model = Transformer.from_pretrained(arguments.model).to(device)
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

    real = arguments.real is not None
    out = arguments.out or Path("runs") / ("demo-real" if real else "demo")
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
