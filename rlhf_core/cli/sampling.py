"""The commands that sample from a model or rewrite its folder: generate, best-of-n, merge."""

from __future__ import annotations

import contextlib
import itertools
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rlhf_core.cli import arguments as shared
from rlhf_core.cli.arguments import MODEL, Command
from rlhf_core.cli.config_file import add_config_file
from rlhf_core.data import (
    Candidates,
    Prompt,
    Ranking,
    encode_preference,
    encode_prompt,
    load_tokenizer,
    read_candidates,
    read_prompt_rows,
)
from rlhf_core.data.chat import Content
from rlhf_core.data.collate import left_pad
from rlhf_core.evaluation import best_of_n_kl
from rlhf_core.feedback.candidates import ALL_TIED, SamplingConfig, best_of_n, prompts_for
from rlhf_core.feedback.judges import JudgeScorer
from rlhf_core.feedback.rewards import Scorer
from rlhf_core.files import dump_rows, read_json, replacing, write_rows
from rlhf_core.generation import generate
from rlhf_core.locks import check_free, hold
from rlhf_core.masking import tied
from rlhf_core.models import ILQLModel, RewardModel, Transformer
from rlhf_core.models.ilql import has_values
from rlhf_core.models.lora import CONFIG_FILE, is_reward_model, merge_adapters


def _add_generate(parser: ArgumentParser) -> None:
    add_config_file(parser)
    parser.add_argument(
        "--model", required=True, type=Path, nargs="+", help=f"{MODEL}; several answer in turn"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", nargs="+", help="one or more prompts")
    shared.add_prompts(parser, source=source)
    parser.add_argument("--out", type=Path, help="JSONL file for the responses; default: print")
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    batch_size = shared.between(int, 1)
    parser.add_argument("--batch-size", type=batch_size, default=16, help="prompts at a time")
    shared.add_skip_bad(parser)
    parser.add_argument(
        "--chat", action="store_true", help="put each prompt into the model's chat template as user"
    )
    beta = shared.between(float, 0)
    parser.add_argument(
        "--beta", type=beta, help="ILQL: weight of the values; default: as trained; 0: none"
    )
    parser.add_argument("--num-samples", type=int, default=1, help="responses to each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest response")
    parser.add_argument("--min-new-tokens", type=int, default=0, help="shortest response")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, help="sample among the k most likely tokens")
    parser.add_argument(
        "--top-p", type=float, help="sample among the top tokens whose probability reaches this"
    )
    parser.add_argument(
        "--min-p", type=float, help="sample among tokens this likely, relative to the best one"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: fewer repeated tokens"
    )
    shared.add_eos_ids(parser)
    shared.add_template(parser)
    parser.add_argument(
        "--stop", nargs="+", default=(), metavar="STRING", help="strings that end a response"
    )
    parser.add_argument("--seed", type=shared.seed, default=0, help="seed of sampling")
    shared.add_device(parser)


def run_generate(arguments: Namespace) -> None:
    """Print responses to the prompts, or write them to a file."""
    if arguments.out is None:
        if arguments.overwrite:
            raise ValueError("--overwrite needs --out")
        _generate(arguments)
        return
    with _held_file(arguments):
        _generate(arguments)


def _generate(arguments: Namespace) -> None:
    prompts: list[Content] = arguments.prompt
    if prompts is None:
        of_row = lambda row: row.prompt  # noqa: E731
        prompts = shared.read(read_prompt_rows, arguments.prompts, arguments, of_row)
    if arguments.chat:
        prompts = [
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
    answers = [_responses(folder, prompts, arguments) for folder in arguments.model]
    options = ("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p")
    options += ("repetition_penalty", "stop", "eos_ids", "beta")
    sampling = {name: getattr(arguments, name) for name in options}
    fixed = {"seed": arguments.seed, "sampling": sampling}
    rows = []
    for i, prompt in enumerate(prompts):
        if arguments.out is None:
            print(f"--- prompt\n{answers[0][i][0]}")
        for folder, (_, responses) in zip(arguments.model, (each[i] for each in answers)):
            for sample, response in enumerate(responses, 1):
                if arguments.out is None:
                    where = f" of {folder}" * (len(answers) > 1)
                    where += f", sample {sample}" * (len(responses) > 1)
                    print(f"--- response{where}\n{response}")
                row = {"prompt": prompt, "response": response, "model": str(folder)}
                rows.append(row | {"sample": sample} | fixed)
    if arguments.out is not None:
        write_rows(arguments.out, rows)
        print(f"{len(rows)} responses to {len(prompts)} prompts; written to {arguments.out}")


def _responses(
    folder: Path, prompts: list[Content], arguments: Namespace
) -> list[tuple[str, list[str]]]:
    """A model's responses to each prompt, after the prompt as the model reads it."""
    device, n = shared.device_of(arguments), arguments.num_samples
    tokenizer = shared.tokenizer_of(arguments, folder)
    valued = has_values(folder)
    model = (ILQLModel if valued else Transformer).from_pretrained(folder).to(device)
    if arguments.beta is not None:
        if not valued:
            raise ValueError(f"--beta needs a model trained by ilql, {folder} has no values")
        model.beta = arguments.beta
    encoded, room = [], model.config.max_positions - arguments.max_new_tokens
    for number, prompt in enumerate(prompts, 1):
        encoded.append(shared.known(encode_prompt(prompt, tokenizer), model, tokenizer))
        if len(encoded[-1]) > room:
            raise ValueError(
                f"prompt {number} has {len(encoded[-1])} tokens, which leave no room for "
                f"--max-new-tokens {arguments.max_new_tokens} in the {model.config.max_positions} "
                f"positions of {folder}. Shorten it, or ask for fewer"
            )
    # Every response has its own seed, so the size of a batch changes nothing but rounding.
    generator = torch.Generator().manual_seed(arguments.seed)
    seeds = torch.randint(2**63 - 1, (len(prompts) * n,), generator=generator)
    found = []
    for start in range(0, len(prompts), arguments.batch_size):
        batch = encoded[start : start + arguments.batch_size]
        prompt_ids, attention_mask = (x.to(device) for x in left_pad(batch, tokenizer.pad_id))
        response = generate(
            model,
            prompt_ids,
            attention_mask=attention_mask,
            max_new_tokens=arguments.max_new_tokens,
            min_new_tokens=arguments.min_new_tokens,
            num_samples=n,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            repetition_penalty=arguments.repetition_penalty,
            eos_ids=shared.eos_ids_of(arguments, model, tokenizer),
            stop_strings=arguments.stop,
            tokenizer=tokenizer,
            seeds=seeds[start * n : (start + len(batch)) * n],
        )
        rows = [ids[mask].tolist() for ids, mask in zip(*response[:2])]
        for i, ids in enumerate(batch):
            text = tokenizer.decode(ids)
            wholes = [tokenizer.decode(ids + row) for row in rows[i * n : (i + 1) * n]]
            # SentencePiece would drop the space before a response that is decoded alone.
            found.append((text, [whole.removeprefix(text) for whole in wholes]))
    return found


@contextlib.contextmanager
def _held_file(arguments: Namespace) -> Iterator[None]:
    """Hold the file --out. Raises OSError if it exists or cannot be written."""
    out = arguments.out
    data = getattr(arguments, "candidates", None) or arguments.prompts
    shared.check_new_file(out, arguments.overwrite, data)
    check_free(out.parent)
    with hold(out.parent, f".{out.name}.lock"):
        yield


def _add_best_of_n(parser: ArgumentParser) -> None:
    add_config_file(parser)
    parser.add_argument("--model", required=True, type=Path, help=MODEL)
    shared.add_prompts_and_reward(parser, judged=True, candidates=True)
    parser.add_argument(
        "--out", required=True, type=Path, help="JSONL file for prompt, completion, score and rank"
    )
    parser.add_argument(
        "--keep", type=int, default=1, metavar="K", help="write the K best, with their ranks"
    )
    parser.add_argument(
        "--pairs",
        action="store_true",
        help="write the best as chosen and the worst as rejected, unless they tie",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out")
    shared.add_skip_bad(parser)
    shared.add_device(parser)
    shared.add_engine(parser)
    shared.add_config(parser, SamplingConfig)


def run_best_of_n(arguments: Namespace) -> None:
    """Write each prompt's best responses to a file."""
    config, keep = shared.config_of(SamplingConfig, arguments), arguments.keep
    if keep < 1 or (keep > config.num_samples and not arguments.candidates):
        raise ValueError(f"--keep must be from 1 to --num-samples {config.num_samples}, got {keep}")
    if keep > 1 and arguments.pairs:
        raise ValueError(f"--keep {keep} contradicts --pairs, which keeps the best and the worst")
    with _held_file(arguments):
        _best_of_n(config, arguments)


def _best_of_n(config: SamplingConfig, arguments: Namespace) -> None:
    out, answers_of = arguments.out, _read_ranked if arguments.candidates else _sample_ranked
    ranked, note = answers_of(config, arguments)
    scored = [row for row in ranked if row[2].isfinite().any()]
    if not scored:
        raise ValueError("every comparison by the judge failed")
    if failed := len(ranked) - len(scored):
        print(f"left out {failed} of {len(ranked)} prompts, on which the judge failed")
    count, best, mean = 0, 0.0, 0.0
    with replacing(out) as file:
        for prompt, answers, scores in scored:
            known = ~scores.isnan()
            answers, scores = list(itertools.compress(answers, known)), scores[known]
            order = scores.argsort(descending=True, stable=True).tolist()
            top, low = order[0], order[-1]
            best, mean = best + float(scores[top]), mean + float(scores.mean())
            rows = [
                {
                    "prompt": prompt,
                    "completion": answers[i],
                    "score": float(scores[i]),
                    "rank": rank,
                }
                for rank, i in enumerate(order[: arguments.keep], 1)
            ]
            if arguments.pairs:
                if tied(scores) or answers[top] == answers[low]:
                    continue
                pair = {"chosen": answers[top], "rejected": answers[low]}
                rows = [{"prompt": prompt, **pair, "margin": float(scores[top] - scores[low])}]
            count += len(rows)
            dump_rows(file, rows)
        if not count:
            raise ValueError(ALL_TIED)
    n, (of_n, bound) = len(scored), note
    print(
        f"mean score {mean / n:.6g}, of the best{of_n} {best / n:.6g}{bound}; "
        f"{count} rows from {n} prompts; written to {out}"
    )


Ranked = list[tuple[Content, list[str], Tensor]]  # prompt, answers, their scores (n,)


def _sample_ranked(config: SamplingConfig, arguments: Namespace) -> tuple[Ranked, list[str]]:
    model, rows, options = shared.prompted(arguments, config)
    places, prompts = prompts_for(model, [ids for _, ids in rows], config)
    samples = best_of_n(model, prompts, config, **options)
    decode, n = options["tokenizer"].decode, config.num_samples
    ranked = [
        (rows[i][0], [decode(ids) for ids in answers], scores)
        for i, answers, scores in zip(places, samples.responses, samples.scores)
    ]
    return ranked, [f" of {n}", f", at most {best_of_n_kl(n):.3g} nats from the policy"]


def _read_ranked(config: SamplingConfig, arguments: Namespace) -> tuple[Ranked, list[str]]:
    """The answers of --candidates with their scores."""
    shared.check_unused(arguments, ["engine"], "samples nothing with --candidates")
    tokenizer, device = shared.tokenizer_of(arguments), shared.device_of(arguments)
    source, size = shared.reward_of(arguments, device), config.batch_size

    def score(ids: Prompt, completions: list[list[int]]) -> Tensor:
        prompts = [ids] * len(completions)
        if "judge" in source:
            return JudgeScorer(source["judge"], len(completions), tokenizer)(prompts, completions)
        options = dict(tokenizer=tokenizer, pad_id=tokenizer.pad_id, batch_size=size)
        return Scorer(source["reward"], **options)(prompts, completions)

    def encode(row: Candidates) -> tuple[Content, list[str], Prompt, list[list[int]]]:
        texts = [x["text"] for x in row.responses if x["text"].strip()]
        if not texts:
            raise ValueError("the row has no answer with text. Remove it, or pass --skip-bad")
        if "judge" in source and len(texts) < 2:
            raise ValueError("the row has one answer, and a judge compares two. Remove the row")
        ids = encode_preference(Ranking(row.prompt, texts), tokenizer, config.max_length)
        return row.prompt, texts, Prompt(ids.prompt_ids), ids.completions_ids

    rows = shared.read(read_candidates, arguments.candidates, arguments, encode)
    ranked = [(prompt, texts, score(ids, completions)) for prompt, texts, ids, completions in rows]
    return ranked, ["", ""]


def _add_merge(parser: ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, help="folder of adapters")
    parser.add_argument("--out", required=True, type=Path, help="folder for the model")
    parser.add_argument(
        "--overwrite", action="store_true", help="write into --out even if it is not empty"
    )
    shared.add_save_dtype(parser)


def run_merge(arguments: Namespace) -> None:
    """Write the plain model that adapters and their base make."""
    with shared.held_out(arguments):
        _merge(arguments)


def _merge(arguments: Namespace) -> None:
    if arguments.out.resolve() == arguments.model.resolve():
        raise ValueError(f"--out {arguments.out} is --model: the adapters would be lost")
    tokenizer, file = load_tokenizer(arguments.model), arguments.model / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist, so there are no adapters to merge")
    model_type = ILQLModel if has_values(arguments.model) else Transformer
    model_type = RewardModel if is_reward_model(arguments.model) else model_type
    model, dtype = model_type.from_pretrained(arguments.model), shared.save_dtype_of(arguments)
    merge_adapters(model)
    model.save_pretrained(arguments.out, dtype)
    tokenizer.save(arguments.out)
    print(f"merged with {read_json(file)['base_model_name_or_path']}; written to {arguments.out}")


COMMANDS = {
    "generate": Command(_add_generate, run_generate),
    "best-of-n": Command(_add_best_of_n, run_best_of_n),
    "merge": Command(_add_merge, run_merge),
}
