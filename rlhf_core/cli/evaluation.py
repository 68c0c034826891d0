"""The commands that compare policies and show runs."""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.cli import arguments as shared
from rlhf_core.cli.arguments import MODEL, Command
from rlhf_core.cli.feedback import margins_of
from rlhf_core.data import (
    Prompt,
    PromptRow,
    Sample,
    Text,
    encode_prompt_row,
    encode_text,
    read_prompt_rows,
    read_samples,
)
from rlhf_core.data.chat import texts_of
from rlhf_core.data.formats import names_in
from rlhf_core.data.readers import iterate_preferences
from rlhf_core.evaluation.calibration import (
    Accuracy,
    accuracy_by_subset,
    both_orders,
    measure_calibration,
)
from rlhf_core.evaluation.comparisons import checked_outcomes
from rlhf_core.evaluation.policies import EvaluationConfig, sample_policy
from rlhf_core.evaluation.summary import (
    Outcomes,
    by_score,
    cluster_of,
    dump_samples,
    mean_text,
    summarize,
)
from rlhf_core.feedback.candidates import fit_prompts
from rlhf_core.feedback.judges import Judge, JudgeScorer, judged_in_both_orders
from rlhf_core.feedback.rewards import Scorer, scores_of
from rlhf_core.files import Replacement, dump_json, read_object, short, write_json
from rlhf_core.models import Transformer
from rlhf_core.training.checkpoint import digest
from rlhf_core.training.reference import model_digest

SAMPLES, SETTINGS, JUDGEMENTS = "samples.jsonl", "settings.json", "judgements.json"
RESULT = "evaluation.json"
CALIBRATION = ("ece", "mce", "brier", "log_loss", "temperature")  # that both orders leave


def _add_evaluate(parser: ArgumentParser) -> None:
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "--policy", type=Path, nargs="+", help=f"policies to compare: each a {MODEL}"
    )
    subject.add_argument(
        "--samples",
        type=Path,
        help="file of policy, prompt and response, and perhaps score, to compare without models",
    )
    subject.add_argument(
        "--pairs", type=Path, help="file of prompt, chosen and rejected, to test --reward-model on"
    )
    parser.add_argument(
        "--reference",
        help="the policy to compare with, which KL is measured from and whose Elo rating is 0: a "
        "model folder; with --samples, a policy's name, by default the first one",
    )
    parser.add_argument("--subset", metavar="COLUMN", help="with --pairs: a report for each value")
    parser.add_argument(
        "--out", required=True, type=Path, help=f"folder for {RESULT} and {SAMPLES}"
    )
    parser.add_argument("--overwrite", action="store_true", help="start again in a used --out")
    shared.add_prompts_and_reward(parser, judged=True, required=False)
    shared.add_skip_bad(parser)
    shared.add_device(parser)
    shared.add_config(parser, EvaluationConfig)


def run_evaluate(arguments: Namespace) -> None:
    """Compare policies, or given samples, or test a reward model on pairs."""
    subject = next(x for x in ("policy", "samples", "pairs") if getattr(arguments, x) is not None)
    _check_options(arguments, subject)
    arguments.resume = subject == "policy" and (arguments.out / SETTINGS).is_file()
    with shared.held_out(arguments):
        if subject == "pairs":
            result = _evaluate_pairs(arguments)
        elif subject == "samples":
            result = _evaluate_samples(arguments)
        else:
            result = _Evaluation(arguments).run()
        write_json(arguments.out / RESULT, result)
    lines = _pair_lines(result) if subject == "pairs" else _policy_lines(result)
    print("\n".join(lines))
    print(f"written to {arguments.out / RESULT}")


def _check_options(arguments: Namespace, subject: str) -> None:
    """Raise ValueError if an option is missing, or does not belong to what is evaluated."""
    needed = {"policy": ("reference", "prompts"), "samples": (), "pairs": ("reward_model",)}
    unused = {
        "policy": ("subset",),
        "samples": ("prompts", "subset"),
        "pairs": ("prompts", "reference", "reward_function", "reward_answer", "judge"),
    }
    for name in needed[subject]:
        if getattr(arguments, name) is None:
            raise ValueError(f"--{subject} needs --{name.replace('_', '-')}")
    shared.check_unused(arguments, unused[subject], f"does not go with --{subject}")


# ---- policies


class _Text(str):
    """A prompt as text, with the columns of its row for a judge or reward."""

    columns: dict[str, Any]

    def __new__(cls, text: str, columns: dict[str, Any]) -> _Text:
        self = super().__new__(cls, text)
        self.columns = columns
        return self


class _Evaluation:
    """Policies that answer the same prompts. What is in --out already is not sampled again."""

    def __init__(self, arguments: Namespace):
        self.arguments, self.config = arguments, shared.config_of(EvaluationConfig, arguments)
        self.device, path = shared.device_of(arguments), Path(arguments.reference)
        self.folders = [path.absolute() if path.exists() else path, *arguments.policy]
        self.names = _names(self.folders)
        self.tokenizer, *others = [shared.tokenizer_of(arguments, x) for x in self.folders]
        self.reference = self._load(self.folders[0])
        self.rows, self.prompts = self._read_prompts()
        for folder, tokenizer in zip(arguments.policy, others):
            ids = (encode_prompt_row(row, self.tokenizer) for row in self.rows)
            if any(encode_prompt_row(row, tokenizer) != x for row, x in zip(self.rows, ids)):
                raise ValueError(
                    f"{folder}: encodes the prompts otherwise than {self.folders[0]}, so that it "
                    "has no KL to it. Sample both on their own, and compare them with --samples"
                )
        source = _source_of(arguments)
        self.judge, self.scorer = source.get("judge"), None
        if "reward" in source:
            pad_id, size = self.reference.config.pad_id or 0, self.config.batch_size
            options = dict(tokenizer=self.tokenizer, pad_id=pad_id, batch_size=size)
            self.scorer = Scorer(source["reward"], **options)
            self.scorer.check_vocabulary(self.reference)
            self.scorer.check_columns(self.prompts)
        self.settings, self.digests, self.samples = self._settings(), {}, []
        if arguments.resume and not arguments.overwrite:
            self._read_earlier()

    def run(self) -> dict[str, Any]:
        """Sample every policy, and compare them."""
        out = self.arguments.out
        for name, folder in zip(self.names, self.folders):
            model = self.reference if name == self.names[0] else self._load(folder)
            found = model_digest(model)
            if self.digests.get(name, found) != found:
                raise ValueError(
                    f"{out / SETTINGS}: {name} was another model (digest {self.digests[name]:.8}, "
                    f"now {found:.8}). Choose another --out, or pass --overwrite"
                )
            if name in self.digests:
                print(f"{name}: sampled by an earlier run", file=sys.stderr)
                continue
            new = self._sample(name, folder, model)
            self.samples += new
            self.digests[name] = found
            with Replacement(out) as files:
                if self.arguments.overwrite:
                    files.remove(JUDGEMENTS)
                dump_samples(files.open(SAMPLES), self.samples)
                dump_json(files.open(SETTINGS), self.settings | {"policies": self.digests})
            print(f"{name}: {len(new)} responses sampled", file=sys.stderr)
        outcomes = by_score if self.scorer else None
        if self.judge is not None:
            texts = {
                cluster_of(row.prompt): _Text(self.tokenizer.decode(ids), row.columns)
                for row, ids in zip(self.rows, self.prompts)
            }
            outcomes = _judging(self.judge, texts, out / JUDGEMENTS)
        used = [sample for sample in self.samples if sample.policy in self.names]
        result = summarize(used, self.names[0], outcomes, self.config.seed)
        return {"settings": self.settings, **_counts(self.judge), **result}

    def _load(self, folder: Path) -> Transformer:
        return Transformer.from_pretrained(folder).to(self.device)

    def _read_prompts(self) -> tuple[list[PromptRow], list[Prompt]]:
        """The rows, and the token ids, of prompts that leave room for a response."""
        positions, new = self.reference.config.max_positions, self.config.max_new_tokens
        if new >= positions:
            raise ValueError(
                f"max_new_tokens {new} leaves no room for a prompt in {positions} positions"
            )

        def encode(row: PromptRow) -> tuple[PromptRow, Prompt]:
            ids = encode_prompt_row(row, self.tokenizer)
            return row, shared.known(ids, self.reference, self.tokenizer)

        rows = shared.read(read_prompt_rows, self.arguments.prompts, self.arguments, encode)
        bos_id = self.reference.config.bos_id
        encoded = [ids for _, ids in rows]
        places, prompts = fit_prompts(encoded, positions - new, bos_id, self.config)
        return [rows[i][0] for i in places], list(prompts)

    def _settings(self) -> dict[str, Any]:
        """What all samples and scores depend on."""
        config, source = self.config, self.scorer or (self.judge and JudgeScorer(self.judge, 2))
        return {
            "reference": model_digest(self.reference),
            "prompts": digest(repr(self.prompts)),
            "num_samples": config.num_samples,
            "max_new_tokens": config.max_new_tokens,
            "temperature": config.temperature,
            "seed": config.seed,
            "eos_ids": self.arguments.eos_ids,
            "judge": self.arguments.judge,
            "source": source and source.describe(),
            "reward_models": [model_digest(model) for model in source.models] if source else [],
        }

    def _read_earlier(self) -> None:
        """Read the samples of a run that was interrupted, or of other policies."""
        out = self.arguments.out
        then = read_object(out / SETTINGS)
        for name, now in self.settings.items():
            if then.get(name) != now:
                raise ValueError(
                    f"{out / SETTINGS}: {name} was {short(then.get(name))}, now {short(now)}. "
                    "Choose another --out, or pass --overwrite"
                )
        self.digests, count = then.get("policies"), len(self.prompts) * self.config.num_samples
        if not isinstance(self.digests, dict):
            raise ValueError(f"{out / SETTINGS}: damaged: policies must be an object")
        self.samples = read_samples(out / SAMPLES)
        counts = Counter(sample.policy for sample in self.samples)
        for name in self.digests:
            if counts[name] != count:
                raise ValueError(
                    f"{out / SAMPLES}: has {counts[name]} responses of {name}, not {count}. "
                    "Choose another --out, or pass --overwrite"
                )

    def _sample(self, name: str, folder: Path, model: Transformer) -> list[Sample]:
        config, sizes = self.config, model.config
        longest = max(map(len, self.prompts)) + config.max_new_tokens
        if sizes.max_positions < longest or sizes.vocab_size != self.reference.config.vocab_size:
            raise ValueError(
                f"{folder}: has {sizes.max_positions} positions and {sizes.vocab_size} tokens, but "
                f"the longest prompt with its response has {longest}, and the reference knows "
                f"{self.reference.config.vocab_size}. Remove long prompts, lower "
                "--max-new-tokens, or compare with --samples"
            )
        found = sample_policy(
            model,
            self.reference,
            self.prompts,
            max_new_tokens=config.max_new_tokens,
            num_samples=config.num_samples,
            temperature=config.temperature,
            eos_ids=shared.eos_ids_of(self.arguments, model, self.tokenizer),
            batch_size=config.batch_size,
            seed=config.seed,
        )
        places = [i for i in range(len(self.prompts)) for _ in range(config.num_samples)]
        scores, criteria = [None] * len(places), [None] * len(places)
        if self.scorer:
            prompts = [self.prompts[i] for i in places]
            scores, criteria = _scored(self.scorer, prompts, found.ids)
        kls = [None if math.isnan(kl) else kl for kl in found.kl.tolist()]
        texts = map(self.tokenizer.decode, found.ids)
        return [
            Sample(name, self.rows[i].prompt, *known, self.rows[i].columns.get("label"), each)
            for i, *known, each in zip(places, texts, scores, kls, found.lengths.tolist(), criteria)
        ]


def _names(folders: list[Path]) -> list[str]:
    """The ends of the paths, as short as makes them differ."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    twice = next(folder for folder in folders if folders.count(folder) > 1)
    raise ValueError(f"{twice} is given twice, as --reference or --policy. Give each policy once")


# ---- given samples


def _evaluate_samples(arguments: Namespace) -> dict[str, Any]:
    samples = shared.read(read_samples, arguments.samples, arguments, lambda sample: sample)
    names = list(dict.fromkeys(sample.policy for sample in samples))
    reference = names[0] if arguments.reference is None else arguments.reference
    if reference not in names:
        known = ", ".join(names)
        raise ValueError(f"{arguments.samples}: has no policy {reference!r}; its policies: {known}")
    source, outcomes = _source_of(arguments), None
    if "reward" in source:
        found = _scores(arguments, samples, source["reward"])
        samples = [
            sample._replace(score=score, criteria=criteria)
            for sample, score, criteria in zip(samples, *found)
        ]
    if "judge" in source:
        texts = {cluster_of(sample.prompt): shared.text_of(sample.prompt) for sample in samples}
        outcomes = _judging(source["judge"], texts)
    elif all(sample.score is not None for sample in samples):
        outcomes = by_score
    with Replacement(arguments.out) as files:
        files.remove(SETTINGS, JUDGEMENTS)  # of policies that were sampled here
        dump_samples(files.open(SAMPLES), samples)
    settings = {"samples": str(arguments.samples)}
    result = summarize(samples, reference, outcomes, arguments.seed)
    return {"settings": settings, **_counts(source.get("judge")), **result}


def _scores(
    arguments: Namespace, samples: list[Sample], reward: Any
) -> tuple[list[float], list[dict[str, float] | None]]:
    """As `_scored`, by a reward function, which reads texts, or models, which read tokens."""
    scorer = Scorer(reward, batch_size=arguments.batch_size)
    if not scorer.models:
        prompts = [shared.text_of(sample.prompt) for sample in samples]
        return _scored(scorer, prompts, [sample.response for sample in samples])
    tokenizer = shared.tokenizer_of(arguments, arguments.reward_model[0])
    length, rows = min(model.config.max_positions for model in scorer.models), []
    for sample in samples:
        turn = [{"role": "assistant", "content": sample.response}]
        text = Text(sample.prompt, sample.response if isinstance(sample.prompt, str) else turn)
        rows.append(encode_text(text, tokenizer, length))
    return _scored(scorer, [row.prompt_ids for row in rows], [row.completion_ids for row in rows])


# ---- what both share


def _scored(
    scorer: Scorer, prompts: list, responses: list
) -> tuple[list[float], list[dict[str, float] | None]]:
    """The score of each response, and those by each criterion if the rewards have criteria."""
    rewards, criteria = scorer.rewards_and_criteria(prompts, responses)
    columns = zip(*(scores.tolist() for scores in criteria.values()))
    each = [dict(zip(criteria, row)) for row in columns] if criteria else [None] * len(rewards)
    return scores_of(rewards).tolist(), each


def _source_of(arguments: Namespace) -> dict[str, Any]:
    """The reward or judge, if one is given."""
    sources = ("reward_model", "reward_function", "reward_answer", "judge")
    options = ("reward_weights", "reward_ensemble", "reward_coef")
    if all(getattr(arguments, name) is None for name in (*sources, *options)):
        return {}
    return shared.reward_of(arguments, shared.device_of(arguments))


def _counts(judge: Judge | None) -> dict[str, Any]:
    """What an AI judge was asked in this run, and how often it failed or contradicted itself."""
    return {"judge": dict(judge.counts)} if hasattr(judge, "counts") else {}


def _judging(judge: Judge, texts: dict[str, str], file: Path | None = None) -> Outcomes:
    """Outcomes by a judge, who sees every two responses in both orders.

    So a preference for the first response favours nobody.

    Args:
        texts: the prompt of each cluster, as the judge reads it.
        file: keeps the outcomes, so that a run that continues asks only for what is missing or
            has failed.
    """
    kept: dict[str, Any] = read_object(file) if file and file.is_file() else {}

    def outcomes(first: str, second: str, pairs: list[tuple[Sample, Sample]]) -> Tensor:
        known = kept.get(f"{first} against {second}")
        if isinstance(known, list) and len(known) == len(pairs) and None not in known:
            return checked_outcomes(known)
        prompts = [texts[cluster_of(one.prompt)] for one, _ in pairs]
        one, other = ([pair[i].response for pair in pairs] for i in (0, 1))
        found = judged_in_both_orders(judge, prompts, one, other)
        kept[f"{first} against {second}"] = [None if p != p else p for p in found.tolist()]
        if file:
            write_json(file, kept)
        return found

    return outcomes


def _policy_lines(result: dict[str, Any]) -> Iterator[str]:
    """The policies, and the comparisons of every two, as tables."""
    names = [policy["name"] for policy in result["policies"]]
    width = max(map(len, [*names, "policy"]))
    yield f"{'policy':<{width}} {'score':>16} {'KL':>14} {'tokens':>8} {'refusals':>9}  Elo [95 %]"
    for policy in result["policies"]:
        score, kl, tokens, elo = (policy[name] for name in ("score", "kl", "tokens", "elo"))
        rating = f"{elo['rating']:.0f} {_interval(elo['interval'], '.0f')}" if elo else "-"
        tokens = f"{tokens['mean']:.1f}" if tokens else "-"
        yield (
            f"{policy['name']:<{width}} {mean_text(score):>16} {mean_text(kl):>14} {tokens:>8} "
            f"{policy['refusals']['rate']:>9.1%}  {rating}"
        )
        if policy["criteria"]:
            means = (f"{name} {mean_text(found)}" for name, found in policy["criteria"].items())
            yield f"{'':<{width}} {', '.join(means)}"
        if policy["over_refusals"] and policy["refusals_of_unsafe"]:
            over, unsafe = (policy[x]["rate"] for x in ("over_refusals", "refusals_of_unsafe"))
            yield f"{'':<{width}} refuses {over:.1%} of safe and {unsafe:.1%} of unsafe prompts"
    if result["comparisons"]:
        yield ""
    if asked := result.get("judge", {}).get("asked"):
        counts = result["judge"]
        yield (
            f"the judge was asked {asked} times: {counts['failed']} failed, in "
            f"{counts['inconsistent']} the order of the answers decided, and these tie"
        )
    for row in result["comparisons"]:
        length = row["length_controlled"]["rate"]
        at_equal_length = "" if length is None else f", {length:.3f} at equal length"
        p = "" if row["sign_test"] is None else f", sign test p = {row['sign_test']:.2g}"
        yield (
            f"{row['policy']} against {row['against']}: wins {row['rate']:.3f} "
            f"{_interval(row['interval'], '.3f')}{at_equal_length}{p}"
        )
        if row["failures"]:
            yield f"  {row['failures']} judgements failed and are left out"
        if not row["decided"]:
            more = row["more_comparisons"]
            remedy = f"; about {more:,} more comparisons would decide it" if more else ""
            yield f"  undecided after {row['comparisons']:,}{remedy}"


def _interval(bounds: Sequence[float], form: str) -> str:
    low, high = bounds
    return f"[{low:{form}}, {high:{form}}]"


# ---- a reward model


def _evaluate_pairs(arguments: Namespace) -> dict[str, Any]:
    """Accuracy and calibration of a reward model on pairs that people have labelled."""
    dropped: list[Any] = []
    on_bad = dropped.append if arguments.skip_bad else None
    rows = [
        (row, pair)
        for row, pair in iterate_preferences(arguments.pairs, on_bad, arguments.columns)
        if pair.chosen != pair.rejected
    ]
    if not rows:
        raise ValueError(f"{arguments.pairs}: chosen and rejected are equal in every pair")
    pairs, size, score = [pair for _, pair in rows], arguments.batch_size, margins_of(arguments)
    found = [score(pairs[i : i + size]) for i in range(0, len(pairs), size)]
    margins = torch.tensor([margin for part in found for margin in part], dtype=torch.float64)
    lengths = [[sum(map(len, texts_of(x))) for x in (pair.chosen, pair.rejected)] for pair in pairs]
    winners = ["shorter" if a < b else "longer" if a > b else "as long" for a, b in lengths]
    calibration = measure_calibration(*both_orders(margins))._asdict()
    if not 0 < calibration["temperature"] < math.inf:  # every pair is right, or margins are useless
        calibration["temperature"] = None
    accuracy = accuracy_by_subset(margins, ["all"] * len(pairs))["all"]
    result = {
        "reward_model": [str(folder) for folder in arguments.reward_model],
        "file": str(arguments.pairs),
        "bad_rows": len(dropped),
        **accuracy._asdict(),
        "calibration": {name: calibration[name] for name in CALIBRATION},
        "chosen_is": _as_json(accuracy_by_subset(margins, winners)),
    }
    if arguments.subset:
        absent = next((row for row, _ in rows if arguments.subset not in row), None)
        if absent is not None:
            raise ValueError(
                f"{arguments.pairs}: a row has no column {arguments.subset!r}; it has "
                f"{names_in(absent)}"
            )
        subsets = [str(row[arguments.subset]) for row, _ in rows]
        result["subsets"] = _as_json(accuracy_by_subset(margins, subsets))
    return result


def _as_json(subsets: dict[str, Accuracy]) -> dict[str, Any]:
    return {name: accuracy._asdict() for name, accuracy in subsets.items()}


def _pair_lines(result: dict[str, Any]) -> Iterator[str]:
    found = result["calibration"]
    groups = {f"chosen is {name}": row for name, row in result["chosen_is"].items()}
    for name, row in {"all": result, **groups, **result.get("subsets", {})}.items():
        interval = _interval(row["interval"], ".3f")
        yield f"{name:<20} accuracy {row['accuracy']:.3f} {interval} of {row['pairs']} pairs"
    temperature = found["temperature"]
    best = "" if temperature is None else f"; scores divided by {temperature:.3g} fit best"
    yield (
        f"calibration error {found['ece']:.3f}, Brier score {found['brier']:.3f}, log loss "
        f"{found['log_loss']:.3f}{best}"
    )


COMMANDS = {"evaluate": Command(_add_evaluate, run_evaluate)}
