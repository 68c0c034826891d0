"""What the commands of `rlhf-core` do with the arguments that cli.py has read: folders and files to the library's
functions, and what these return to folders, files and the terminal.

`arguments.method` is what the tables in cli.py say of a method, without its help.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import platform
import sys
from pathlib import Path

import rlhf_core


def _config(config: type, arguments):
    given = vars(arguments)
    return config(
        **{
            field.name: given[field.name]
            for field in dataclasses.fields(config)
            if field.name in given
        }
    )


def _read(reader, path: Path, arguments, encode) -> list:
    dropped = []
    items = reader(path, dropped.append if arguments.skip_bad else None, encode)
    if dropped:
        print(f"bad lines dropped: {len(dropped)}, the first: {dropped[0]}", file=sys.stderr)
    return items


def _fresh_out(arguments) -> None:
    from rlhf_core.files import check_writable

    out = arguments.out
    resume = getattr(arguments, "resume", False)  # of the trainers
    if out.is_dir() and any(out.iterdir()) and not (arguments.overwrite or resume):
        raise FileExistsError(f"{out} is not empty; choose another --out or pass --overwrite")
    check_writable(out)


def _device(arguments):
    import torch

    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # "meta" holds nothing
        return probe.device
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # no such device, or one that this torch is built without
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def train_on_data(arguments) -> None:
    """File -> examples, model -> trainer, train, print the last metrics."""
    import torch

    from rlhf_core import data, trainers
    from rlhf_core.models import ILQLModel, RewardModel, Transformer
    from rlhf_core.models.ilql import has_values
    from rlhf_core.models.lora import is_reward_model

    kind, _, reader, encoder = arguments.method
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
        model = {"Reward": RewardModel.from_model, "ILQL": ILQLModel}.get(
            kind, lambda plain: plain
        )(model)
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
        order = torch.randperm(
            len(examples), generator=torch.Generator().manual_seed(config.seed)
        ).tolist()
        count = int(len(examples) * arguments.eval_fraction)
        held_out, examples = (
            [examples[i] for i in order[:count]],
            [examples[i] for i in order[count:]],
        )
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
    _print_result(
        trainer.train()[-1], arguments.out, f"{len(examples)} to train on, {len(held_out)} held out"
    )


def _add_adapters(model, arguments) -> None:
    """Those that the --lora options ask for."""
    from rlhf_core.models.lora import LoRAConfig, add_adapters

    options = dict(
        alpha=arguments.lora_alpha,
        dropout=arguments.lora_dropout,
        target_modules=arguments.lora_targets,
    )
    options = {name: value for name, value in options.items() if value is not None}
    if arguments.lora_rank is None:
        if options:
            raise ValueError("the options --lora-... have no effect without --lora-rank")
        return
    if arguments.lora_dropout and not arguments.dropout:
        raise ValueError(
            "--lora-dropout has no effect without --dropout, which turns the model's own on, too"
        )
    base = (
        arguments.model.resolve() if arguments.model.exists() else arguments.model
    )  # a folder, or a hub id
    add_adapters(model, LoRAConfig(rank=arguments.lora_rank, base=str(base), **options))


def _print_result(metrics: dict[str, float], out: Path, note: str) -> None:
    for name, value in metrics.items():
        print(f"{name:<28} {value:.6g}")
    print(f"{note}; written to {out}")


def _eos_ids(arguments, model, tokenizer) -> tuple[int, ...]:
    return tuple(arguments.eos_ids or dict.fromkeys((*model.config.eos_ids, *tokenizer.eos_ids)))


def _reward_of(arguments, device) -> dict:
    """What the --reward options name, or --judge, as the methods that sample take it."""
    from rlhf_core.models import load_reward

    weights, folders = arguments.reward_weights, arguments.reward_model
    if folders is None:
        for name in ("reward_weights", "reward_ensemble", "reward_coef"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} has no effect without --reward-model")
        if arguments.reward_function is not None:
            return {"reward": _function("--reward-function", arguments.reward_function)}
        return {"judge": _function("--judge", arguments.judge)}
    if weights is None:
        return {
            "reward": load_reward(folders, arguments.reward_ensemble, arguments.reward_coef).to(
                device
            )
        }
    if arguments.reward_coef is not None:
        raise ValueError(
            f"--reward-coef {arguments.reward_coef} has no effect with --reward-weights"
        )
    if len(weights) != len(folders):
        raise ValueError(f"--reward-weights are {len(weights)} for {len(folders)} reward models")
    return {
        "reward": [
            (load_reward([folder]).to(device), weight) for folder, weight in zip(folders, weights)
        ]
    }


def _function(option: str, text: str):
    """The function that FILE.py:NAME names; the file is executed, and may import what lies beside it."""
    file, _, name = text.rpartition(":")
    if not file.endswith(".py") or not name:
        raise ValueError(f"{option} must be FILE.py:NAME, got {text!r}")
    spec = importlib.util.spec_from_file_location(f"_rlhf_core_{Path(file).stem}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(file).resolve().parent))
    try:
        spec.loader.exec_module(module)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{option}: {file} raised {error!r}") from error
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{option}: {file} has no function {name!r}")
    return getattr(module, name)


def _prompted(arguments, config) -> tuple:
    """What the methods that sample take: the model, rows of a prompt as read and as ids, and options."""
    import torch

    from rlhf_core.data import encode_prompt, load_tokenizer, read_prompts
    from rlhf_core.models import Transformer

    torch.manual_seed(config.seed)
    tokenizer, device = load_tokenizer(arguments.model), _device(arguments)
    model = Transformer.from_pretrained(arguments.model).to(device)
    rows = _read(
        read_prompts,
        arguments.prompts,
        arguments,
        lambda prompt: (prompt, encode_prompt(prompt, tokenizer)),
    )
    eos_ids = _eos_ids(arguments, model, tokenizer)
    return model, rows, dict(eos_ids=eos_ids, tokenizer=tokenizer, **_reward_of(arguments, device))


def train_on_prompts(arguments) -> None:
    """Prompts and a reward to a trainer, train, print the last metrics."""
    from rlhf_core import trainers
    from rlhf_core.data import encode_text, read_texts

    (kind,) = arguments.method
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


def train_in_rounds(arguments) -> None:
    """The same for a function that trains in rounds."""
    from rlhf_core import trainers

    kind, method = arguments.method
    config = _config(getattr(trainers, f"{kind}Config"), arguments)
    _fresh_out(arguments)
    model, rows, options = _prompted(arguments, config)
    _add_adapters(model, arguments)
    folder = dict(out=arguments.out, resume=arguments.resume)
    history = getattr(trainers, method)(
        model, [ids for _, ids in rows], config, **folder, **options
    )
    _print_result(history[-1], arguments.out, f"{len(rows)} prompts")


def best_of_n(arguments) -> None:
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


def merge(arguments) -> None:
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


def generate(arguments) -> None:
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
            raise ValueError(
                f"--beta has no effect: {arguments.model} is no folder that `rlhf-core ilql` wrote"
            )
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


def demo(arguments) -> None:
    from rlhf_core import demo as chain
    from rlhf_core.files import check_writable

    real = arguments.real is not None
    out = arguments.out or Path("runs") / ("demo-real" if real else "demo")
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    task = (
        chain.stories_task(arguments.real, arguments.seed)
        if real
        else chain.replies_task(arguments.seed)
    )
    print(chain.run(task, out, arguments.seed))
    print(f"models, metrics and this report are in {out}")


def bench(arguments) -> None:
    from rlhf_core.benchmarks import common

    size, device = "sweep" if arguments.sweep else "full", _device(arguments).type
    failed = common.run(arguments.op, size, device, arguments.json, arguments.plot)
    if failed:
        sys.exit(f"rlhf-core bench: {failed} cases gave wrong results and were not timed")


def info(arguments) -> None:
    import importlib.metadata

    import numpy
    import torch

    print(
        f"rlhf_core {rlhf_core.__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    print(
        f"torch {torch.__version__}, numpy {numpy.__version__}, {torch.get_num_threads()} threads"
    )
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
