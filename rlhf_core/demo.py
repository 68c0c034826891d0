"""SFT, preference pairs, reward model, PPO and DPO on a task whose gold score is known.

The embedded task is a grammar of replies to how-to questions. Its gold rule rewards the right
answer, courtesy and brevity. `--real DIR` uses a pretrained story model and prompts from stories;
gold is the mean VADER valence of the continuation's words (Hutto & Gilbert 2014). Training never
sees the gold score, only pairs labelled by it.
"""

from __future__ import annotations

import copy
import gzip
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rlhf_core.data import (
    ByteTokenizer,
    Example,
    Pair,
    Sample,
    Text,
    Tokenizer,
    encode_text,
    load_tokenizer,
    read_texts,
)
from rlhf_core.evaluation import Evaluation, evaluate_policy, win_rate
from rlhf_core.evaluation.report import PAGE, try_report
from rlhf_core.evaluation.summary import Outcomes, by_score, dump_samples, summarize
from rlhf_core.feedback.rewards import Scorer
from rlhf_core.files import Replacement, dump_json, replacing
from rlhf_core.models import RewardModel, Transformer, TransformerConfig
from rlhf_core.rollout import sample
from rlhf_core.trainers import (
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf_core.training.reference import frozen_copy

# ---- the embedded task

ANSWERS = {
    "wash a car": "use soap",
    "cook rice": "boil it",
    "grow herbs": "give sun",
    "calm a dog": "pet it",
    "open a jar": "tap it",
    "catch a mouse": "get a cat",
}
QUESTIONS = ("how do i {}?", "how can i {}?", "how to {}?")
QUESTIONS += ("help me {}.", "what helps to {}?", "i want to {}.")
COURTEOUS, RUDE = ("sure! ", "glad to. "), ("ugh. ", "meh. ")
FILLER = (" you know.", " well well.")
CLOSING = (" good luck!", " enjoy!")
EVASIVE = ("no idea", "ask a pal")
_PHRASES = (*ANSWERS.values(), *COURTEOUS, *RUDE, *FILLER, *CLOSING, *EVASIVE)
_WORDS = set(re.findall(r"[a-z]+", " ".join(_PHRASES)))


def random_reply(thing: str, rng: random.Random) -> str:
    """A reply of mixed quality, for the supervised data."""
    kind = rng.random()
    if kind < 0.5:
        answer = ANSWERS[thing]
    else:
        answer = rng.choice(list(ANSWERS.values()) if kind < 0.9 else EVASIVE)
    opening = rng.choice(("", "", *COURTEOUS, *RUDE))
    filler = "".join(rng.choices(FILLER, k=rng.choice((0, 1, 2))))
    return f"{opening}{answer}.{filler}{rng.choice(('', '', *CLOSING))}"


def reply_score(prompt: str, reply: str) -> float:
    """The gold rule.

    +2 for the right answer, +1 for a courteous and -1 for a rude opening, +1 for a friendly
    closing, -1 for every filler phrase and for every misspelt word.
    """
    thing = next(thing for thing in ANSWERS if thing in prompt)
    courtesy = reply.startswith(COURTEOUS) - reply.startswith(RUDE) + reply.endswith(CLOSING)
    padding = sum(reply.count(phrase) for phrase in FILLER)
    misspelt = sum(word not in _WORDS for word in re.findall(r"[a-z]+", reply))
    return float(2 * (ANSWERS[thing] in reply) + courtesy - padding - misspelt)


# ---- a task, embedded or real


@dataclass
class Task:
    """The models, data and settings of the chain."""

    name: str
    gold: Callable[[list[str], list[str]], list[float]]  # (prompts, responses) -> scores
    tokenizer: Tokenizer
    policy: Transformer  # untrained if there are sft_examples, else pretrained
    sft_examples: list[Example]
    prompts: list[list[int]]
    eval_prompts: list[list[int]]
    eos_ids: tuple[int, ...]
    response_length: int
    label_noise: float  # share of pairs with swapped labels
    sft: SFTConfig | None
    reward: RewardConfig
    ppo: PPOConfig
    dpo: DPOConfig


def replies_task(seed: int) -> Task:
    """The embedded task: bytes as tokens, a Transformer from scratch."""
    rng = random.Random(seed)
    tokenizer = ByteTokenizer()
    cases = [(question, thing) for question in QUESTIONS for thing in ANSWERS]
    rng.shuffle(cases)
    held_out, train = cases[:9], cases[9:]

    def prompt(case: tuple[str, str]) -> list[int]:
        return tokenizer.encode_prompt(case[0].format(case[1]) + "\n")

    def gold(prompts: list[str], responses: list[str]) -> list[float]:
        return [reply_score(*row) for row in zip(prompts, responses)]

    texts = [
        Text(question.format(thing) + "\n", random_reply(thing, rng))
        for question, thing in rng.choices(train, k=4096)
    ]
    torch.manual_seed(seed)
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=96,
        num_layers=3,
        num_heads=4,
        intermediate_size=256,
        max_positions=160,
        bos_id=tokenizer.bos_id,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
    )
    return Task(
        name="replies",
        gold=gold,
        tokenizer=tokenizer,
        policy=Transformer(config),
        sft_examples=[encode_text(text, tokenizer, 160) for text in texts],
        prompts=[prompt(case) for case in rng.choices(train, k=6144)],
        eval_prompts=[prompt(case) for case in held_out * 30],
        eos_ids=tokenizer.eos_ids,
        response_length=48,
        label_noise=0.03,
        sft=SFTConfig(lr=3e-3, batch_size=64, epochs=4, warmup_steps=20, seed=seed),
        reward=RewardConfig(lr=1e-3, batch_size=64, epochs=3, warmup_steps=10, seed=seed),
        ppo=PPOConfig(
            lr=1e-4, max_steps=50, kl_coef=0.1, temperature=1.0, response_length=48, seed=seed
        ),
        dpo=DPOConfig(lr=1e-4, batch_size=64, beta=0.5, seed=seed),
    )


def stories_task(data: Path, seed: int) -> Task:
    """The stories260k model on TinyStories prompts; gold is 10 times the words' mean valence."""
    valence = {}
    with gzip.open(data / "lexicons" / "vader_lexicon.txt.gz", "rt", encoding="utf-8") as file:
        for line in file:
            word, score = line.split("\t")[:2]
            valence[word] = float(score)

    def gold(prompts: list[str], responses: list[str]) -> list[float]:
        words = [re.findall(r"[a-z']+", response.lower()) for response in responses]
        sums = [sum(valence.get(word, 0.0) for word in row) for row in words]
        return [10 * total / max(len(row), 1) for total, row in zip(sums, words)]

    model = data / "models" / "stories260k"
    tokenizer = load_tokenizer(model)
    stories = read_texts(data / "text" / "tinystories.jsonl.gz")
    prompts = [tokenizer.encode_prompt(story.completion)[:16] for story in stories]
    return Task(
        name="stories",
        gold=gold,
        tokenizer=tokenizer,
        policy=Transformer.from_pretrained(model),
        sft_examples=[],
        prompts=prompts[:-200] * 2,
        eval_prompts=prompts[-200:] * 4,
        eos_ids=(1, 2),
        response_length=64,
        label_noise=0.0,
        sft=None,
        reward=RewardConfig(lr=5e-4, batch_size=64, epochs=3, seed=seed),
        ppo=PPOConfig(
            lr=1e-4, max_steps=50, kl_coef=0.06, temperature=1.0, response_length=64, seed=seed
        ),
        dpo=DPOConfig(lr=1e-4, batch_size=64, seed=seed),
    )


# ---- the chain


def run(task: Task, out: Path, seed: int) -> str:
    """Train everything into subfolders of `out`; returns the report, also in out/report.txt."""
    started = time.monotonic()
    lines = []
    base, history = supervised(task, out)
    if history:
        losses = f"{history[0]['loss']:.3f} -> {history[-1]['loss']:.3f}"
        lines.append(f"SFT loss {losses} nats per token")
    pairs, disagreement = labelled_pairs(task, base, seed)
    train_pairs, eval_pairs = split(pairs)
    reward_model, report = fitted_reward_model(task, base, train_pairs, eval_pairs, seed, out)
    lines.append(
        f"reward model: accuracy {report['eval_accuracy']:.3f} on {len(eval_pairs)} held-out pairs "
        f"({len(train_pairs)} to train on, {disagreement:.1%} labelled against gold)"
    )

    ppo_policy, dpo_policy = (copy.deepcopy(base).requires_grad_(True) for _ in range(2))
    options = dict(reference=base, tokenizer=task.tokenizer)
    rl = dict(reward=reward_model, eos_ids=task.eos_ids, out=out / "ppo")
    every = max(1, task.ppo.max_steps // 10)
    ppo = replace(task.ppo, save_every=every, keep=task.ppo.max_steps)
    PPOTrainer(ppo_policy, task.prompts, ppo, **rl, **options).train()
    DPOTrainer(dpo_policy, train_pairs, task.dpo, out=out / "dpo", **options).train()

    policies = {"SFT": base, "PPO": ppo_policy, "DPO": dpo_policy}
    results = {name: evaluated(task, base, policy, seed) for name, policy in policies.items()}
    seconds = f"{time.monotonic() - started:.0f} s"
    lines += [*table(results), "", *samples(task, results), "", seconds]
    on_the_way = {"SFT": results["SFT"]}
    for step in range(every, task.ppo.max_steps, every):
        checkpoint = Transformer.from_pretrained(out / "ppo" / f"checkpoint-{step}")
        on_the_way[f"step {step}"] = evaluated(task, base, checkpoint, seed)
    on_the_way["PPO"] = results["PPO"]
    scorer = Scorer(reward_model, batch_size=128)
    proxy = {name: scorer(task.eval_prompts, x.response_ids) for name, x in on_the_way.items()}
    proxy = {name: x._replace(scores=proxy[name]) for name, x in on_the_way.items()}
    write_evaluation(task, results, out / "policies-by-gold", by_score)
    write_evaluation(task, on_the_way, out / "ppo-by-gold")
    write_evaluation(task, proxy, out / "ppo-by-reward-model")
    report = "\n".join(lines)
    with replacing(out / "report.txt") as file:
        file.write(f"{report}\n".encode())
    parts = (
        "policies-by-gold",
        "ppo-by-gold",
        "ppo-by-reward-model",
        "sft",
        "reward",
        "ppo",
        "dpo",
    )
    folders = [out / part for part in parts if (out / part).is_dir()]
    try_report(folders, out / PAGE, f"From pairs to a better policy: {task.name}")
    return report


def supervised(task: Task, out: Path | None = None) -> tuple[Transformer, list[dict[str, float]]]:
    """The frozen policy that everything starts from, and the metrics of its SFT, if it has any."""
    history = []
    if task.sft is not None:
        options = dict(tokenizer=task.tokenizer, out=out and out / "sft")
        history = SFTTrainer(task.policy, task.sft_examples, task.sft, **options).train()
    return frozen_copy(task.policy), history


def labelled_pairs(task: Task, policy: Transformer, seed: int) -> tuple[list[Pair], float]:
    """Pairs of the policy's samples, labelled by gold with some noise; the share of wrong labels.

    Ties are dropped.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    pairs, wrong = [], 0
    for start in range(0, len(task.prompts), 128):
        prompts = task.prompts[start : start + 128]
        texts = [task.tokenizer.decode(prompt) for prompt in prompts]
        rollout = sample(
            policy,
            prompts,
            max_new_tokens=task.response_length,
            num_samples=2,
            eos_ids=task.eos_ids,
            generator=generator,
        )
        responses = [rollout.responses()[sample::2] for sample in range(2)]
        decoded = [[task.tokenizer.decode(ids) for ids in part] for part in responses]
        scores = [task.gold(texts, part) for part in decoded]
        for prompt, first, second, first_score, second_score in zip(prompts, *responses, *scores):
            if first_score == second_score:
                continue
            flip = rng.random() < task.label_noise
            wrong += flip
            ordered = (first, second) if (first_score > second_score) != flip else (second, first)
            pairs.append(Pair(prompt, *ordered))
    return pairs, wrong / len(pairs)


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """The pairs to train on, and an eighth that is held out."""
    return pairs[len(pairs) // 8 :], pairs[: len(pairs) // 8]


def fitted_reward_model(
    task: Task,
    base: Transformer,
    pairs: list[Pair],
    held_out: list[Pair],
    seed: int,
    out: Path | None = None,
) -> tuple[RewardModel, dict[str, float]]:
    """A reward model trained on the pairs, and the metrics of its last step."""
    torch.manual_seed(seed)
    reward_model = RewardModel.from_model(base)
    options = dict(eval_examples=held_out, tokenizer=task.tokenizer, out=out and out / "reward")
    return reward_model, RewardTrainer(reward_model, pairs, task.reward, **options).train()[-1]


def evaluated(task: Task, base: Transformer, policy: Transformer, seed: int) -> Evaluation:
    """Gold scores of a policy's responses to the held-out prompts, and its KL to the base."""
    options = dict(max_new_tokens=task.response_length, eos_ids=task.eos_ids, seed=seed + 1)
    return evaluate_policy(policy, base, task.eval_prompts, task.gold, task.tokenizer, **options)


def write_evaluation(
    task: Task, results: dict[str, Evaluation], folder: Path, outcomes: Outcomes | None = None
) -> None:
    """Write evaluation.json and samples.jsonl, as `rlhf-core evaluate` does."""
    prompts = [task.tokenizer.decode(prompt) for prompt in task.eval_prompts]
    rows = [
        Sample(name, *row)
        for name, x in results.items()
        for row in zip(prompts, x.responses, x.scores.tolist(), x.kl.tolist(), x.lengths.tolist())
    ]
    with Replacement(folder) as files:
        dump_samples(files.open("samples.jsonl"), rows)
        dump_json(files.open("evaluation.json"), summarize(rows, "SFT", outcomes))


def table(results: dict[str, Evaluation]) -> list[str]:
    """Gold scores with standard error and deviation, KL and win rate against the first row."""
    first = next(iter(results.values()))
    lines = ["", "policy   gold score (± s.e.)   s.d.   KL to SFT, nats   win rate against SFT"]
    for name, result in results.items():
        mean, deviation = float(result.scores.mean()), float(result.scores.std())
        error = deviation / len(result.scores) ** 0.5
        wins = "" if result is first else f"{win_rate(result.scores, first.scores):20.3f}"
        kl = round(float(result.kl.mean()), 2) + 0.0  # not -0.00
        lines.append(f"{name:<6} {mean:12.3f} ± {error:.3f} {deviation:9.3f} {kl:14.2f} {wins}")
    return lines


def samples(task: Task, results: dict[str, Evaluation]) -> list[str]:
    """Three prompts with every policy's response and its gold score."""
    lines = []
    for i in range(3):
        lines.append(f"> {task.tokenizer.decode(task.eval_prompts[i]).strip()}")
        for name, result in results.items():
            response = " ".join(result.responses[i].split())
            lines.append(f"  {name}  {float(result.scores[i]):6.2f}  {response}")
    return lines
