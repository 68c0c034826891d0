"""Learning rates by model size, and TRPO's max_kl: how far each moves a model in a short run.

    OMP_NUM_THREADS=1 python -m benchmarks.learning.settings --data DIR --sizes 260k 4m 30m
    OMP_NUM_THREADS=1 python -m benchmarks.learning.settings --data DIR --sizes 135m --model MODEL

260k is the pretrained stories260k, and 135m a model of the user's, such as SmolLM2-135M-Instruct;
the others are pretrained here on TinyStories. PPO, TRPO and GRPO train on gold itself, the valence
of the words; DPO and reward models on pairs that gold labels; SFT on solutions of GSM8K, which are
unlike stories. METHOD-lora trains adapters of rank 16 instead of the weights.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_core import trainers
from rlhf_core.data import Text, Tokenizer, encode_text, load_tokenizer, read_texts
from rlhf_core.demo import Task, evaluated, labelled_pairs, split, stories_task
from rlhf_core.models import RewardModel, Transformer, TransformerConfig
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.training.trainer import Trainer

LENGTH, PROMPT, RESPONSE = 64, 16, 32  # tokens of a text, a prompt and a response
BATCH = 32  # texts, pairs or responses of a step
LORA = "-lora"  # ends the name of a method that trains adapters


class Size(NamedTuple):
    """A model and how much it trains."""

    shape: dict | None  # None: a pretrained checkpoint
    pretraining: dict
    steps: int
    rollouts: int  # steps of PPO, with 16 updates each, and of TRPO
    rates: dict[str, tuple[float, ...]]  # method -> values of its PACE, else of lr, to try
    held_out: int = 200  # texts or prompts to evaluate on


SIZES = {
    "260k": Size(
        None, {}, 30, 8,
        dict(
            sft=(1e-5, 1e-3, 3e-3), reward=(1e-5, 5e-4, 2e-3), dpo=(1e-6, 1e-4, 1e-3),
            ppo=(3e-6, 1e-4, 3e-4, 1e-3), trpo=(1e-4, 1e-3, 3e-3, 1e-2),
            grpo=(1e-6, 1e-4, 2e-4, 5e-4, 2e-3),
        ),
    ),
    "4m": Size(
        dict(hidden_size=256, num_layers=3, num_heads=4),
        dict(lr=2e-3, epochs=1, warmup_steps=10), 15, 4,
        dict(
            sft=(2e-5, 3e-4, 1e-3), reward=(2e-5, 1e-4, 5e-4), dpo=(1e-6, 3e-5, 1e-4),
            ppo=(3e-6, 3e-5, 1e-4), trpo=(1e-3, 3e-3), grpo=(1e-6, 1e-4, 5e-4),
        ),
    ),
    "30m": Size(
        dict(hidden_size=512, num_layers=6, num_heads=8),
        dict(lr=1e-3, max_steps=50, warmup_steps=5), 6, 2,
        dict(
            sft=(3e-4,), reward=(5e-4,), dpo=(3e-5, 1e-4), ppo=(3e-5,), trpo=(3e-3,),
            grpo=(1e-4,),
        ),
    ),
    "135m": Size(
        None, {}, 4, 1,
        {
            "sft": (2e-5, 1e-4, 5e-4), "reward": (2e-4,), "dpo": (5e-7, 3e-6, 1e-5, 3e-5),
            "ppo": (3e-6, 1e-5, 3e-5), "grpo": (1e-6, 1e-5, 3e-5, 1e-4),
            "sft-lora": (2e-4, 1e-3), "dpo-lora": (3e-4,), "grpo-lora": (1e-3,),
        },
        held_out=64,
    ),
}  # fmt: skip
GIVEN = "135m"  # the size whose checkpoint is --model
FIXED = {
    "ppo": dict(kl_coef=0.06, batch_size=BATCH),
    "trpo": dict(kl_coef=0.06, batch_size=BATCH, lr=1e-4, cg_damping=0.01),
    "grpo": dict(kl_coef=0.2, batch_size=BATCH // 8, num_samples=8),
}
PACE = {"trpo": "max_kl"}  # what sets the steps of the policy, where it is not lr
MEASURES = {"sft": "eval_loss", "reward": "eval_accuracy"}  # gold of the others


class Start(NamedTuple):
    """What the methods of a size start from."""

    task: Task  # with the pretrained policy
    gold: float  # of that policy
    pairs: tuple[list, list]  # to train on, and held out
    texts: tuple[list, list]


def prepare(size: Size, data: Path, model: Path | None = None) -> Start:
    """The start of a size: the checkpoint `model`, else stories260k or a model pretrained here."""
    task = stories_task(data, 0)
    if model is not None or size.shape is not None:
        tokenizer = load_tokenizer(model or data / "tokenizers" / "minimind")
        stories = read_texts(data / "text" / "tinystories.jsonl.gz")
        prompts = [tokenizer.encode_prompt(story.completion)[:PROMPT] for story in stories]
        train, held_out = prompts[: -size.held_out], prompts[-size.held_out :]
        if model is None:
            examples = [encode_text(x, tokenizer, LENGTH) for x in stories[: -size.held_out]]
            policy = pretrained(size, tokenizer, examples)
        else:
            policy = Transformer.from_pretrained(model)
        fields = dict(prompts=train * 2, eval_prompts=held_out, eos_ids=tokenizer.eos_ids)
        task = replace(task, policy=policy, tokenizer=tokenizer, **fields)
    task.policy.eval().requires_grad_(False)
    task = replace(task, eval_prompts=task.eval_prompts[: size.held_out], response_length=RESPONSE)
    few = replace(task, prompts=task.prompts[: size.steps * BATCH * 3 // 2])  # some pairs tie
    pairs, _ = labelled_pairs(few, task.policy, 0)
    solutions = read_texts(data / "sft" / "gsm8k_test.jsonl.gz")
    texts = [encode_text(Text("", x.completion), task.tokenizer, LENGTH) for x in solutions]
    before = gold(task, task.policy)["after"]
    return Start(task, before, split(pairs), (texts[size.held_out :], texts[: size.held_out]))


def pretrained(size: Size, tokenizer: Tokenizer, examples: list) -> Transformer:
    torch.manual_seed(0)
    ids = dict(eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
    shape = dict(vocab_size=tokenizer.vocab_size, max_positions=LENGTH, **size.shape)
    model = Transformer(TransformerConfig(**shape, **ids))
    config = trainers.SFTConfig(lr_schedule="cosine", batch_size=16, **size.pretraining)
    trainers.SFTTrainer(model, examples, config).train()
    return model


def gold(task: Task, policy: Transformer) -> dict[str, float]:
    """Gold on the held-out prompts, and the KL to the task's policy in nats per response."""
    found = evaluated(task, task.policy, policy, 0)
    return {"after": found.scores.mean().item(), "kl": found.kl.mean().item()}


def trainer_of(start: Start, method: str, policy: Transformer, settings: dict) -> Trainer:
    task = start.task
    if method == "sft":
        config, (texts, held_out) = trainers.SFTConfig(batch_size=BATCH, **settings), start.texts
        return trainers.SFTTrainer(policy, texts, config, eval_examples=held_out)
    pairs, held_out = start.pairs
    if method == "reward":
        torch.manual_seed(0)  # of the head
        model, config = (
            RewardModel.from_model(policy),
            trainers.RewardConfig(batch_size=BATCH, **settings),
        )
        return trainers.RewardTrainer(model, pairs, config, eval_examples=held_out)
    if method == "dpo":
        config = trainers.DPOConfig(batch_size=BATCH, **settings)
        return trainers.DPOTrainer(policy, pairs, config, reference=task.policy)
    settings = dict(temperature=1.0, response_length=RESPONSE, **settings)
    fixed = dict(reward=task.gold, reference=task.policy, tokenizer=task.tokenizer)
    fixed["eos_ids"] = task.eos_ids
    if method == "ppo":
        return trainers.PPOTrainer(policy, task.prompts, trainers.PPOConfig(**settings), **fixed)
    if method == "trpo":
        return trainers.TRPOTrainer(policy, task.prompts, trainers.TRPOConfig(**settings), **fixed)
    return trainers.GRPOTrainer(policy, task.prompts, trainers.GRPOConfig(**settings), **fixed)


def train(start: Start, method: str, settings: dict) -> dict[str, float]:
    """Train a copy of the policy; its measure before and after, and of a policy the KL."""
    policy = copy.deepcopy(start.task.policy).requires_grad_(True)
    if method.endswith(LORA):
        torch.manual_seed(0)
        add_adapters(policy, LoRAConfig(rank=16))
        method = method.removesuffix(LORA)
    trainer, measure = trainer_of(start, method, policy, settings), MEASURES.get(method)
    if measure is None:
        trainer.train()
        return {"before": start.gold, **gold(start.task, policy)}
    before = trainer.evaluate()[measure]
    return {"before": before, "after": trainer.train()[-1][measure]}


def rows(name: str, data: Path, methods: list[str], model: Path | None = None) -> Iterator[str]:
    """Run the methods of a size, those it has; the rows of the Markdown table."""
    size = SIZES[name]
    start = prepare(size, data, model)
    for method in (x for x in methods if x in size.rates):
        base = method.removesuffix(LORA)
        steps = size.rollouts if base in ("ppo", "trpo") else size.steps
        fixed = FIXED.get(base, {}) | {"max_steps": steps}
        for rate in size.rates[method]:
            started = time.process_time()
            found = train(start, method, {PACE.get(base, "lr"): rate} | fixed)
            kl = f"{found['kl']:.2f}" if "kl" in found else ""
            columns = [name, method, f"{rate:g}", str(steps), MEASURES.get(base, "gold")]
            columns += [f"{found['before']:.2f}", f"{found['after']:.2f}", kl]
            yield f"| {' | '.join(columns)} | {time.process_time() - started:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.settings", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="as for rlhf-core demo --real")
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=[x for x in SIZES if x != GIVEN]
    )
    methods = list(dict.fromkeys(x for size in SIZES.values() for x in size.rates))
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument(
        "--model", type=Path, help=f"checkpoint of size {GIVEN}, in the Hugging Face layout"
    )
    arguments = parser.parse_args()
    if (GIVEN in arguments.sizes) != (arguments.model is not None):
        parser.error(f"--sizes {GIVEN} and --model, the folder of its checkpoint, need each other")
    print("| size | method | lr or max_kl | steps | measure | before | after | KL, nats | s |")
    print("|---|---|---:|---:|---|---:|---:|---:|---:|")
    for name in arguments.sizes:
        model = arguments.model if name == GIVEN else None
        for row in rows(name, arguments.data, arguments.methods, model):
            print(row, flush=True)


if __name__ == "__main__":
    main()
