"""Learning rates by model size: how far each one moves a model in a short run on stories.

    OMP_NUM_THREADS=1 python -m benchmarks.learning.settings --data DIR --sizes 260k 4m 30m

260k is the pretrained stories260k; the others are pretrained here on TinyStories. PPO and GRPO
train on gold itself, the valence of the words; DPO and reward models on pairs that gold labels; SFT
on solutions of GSM8K, which are unlike stories. Results in --out with the same settings are kept.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_core.data import Text, encode_text, load_tokenizer, read_texts
from rlhf_core.demo import Task, evaluated, labelled_pairs, split, stories_task
from rlhf_core.files import read_json, write_json
from rlhf_core.models import RewardModel, Transformer, TransformerConfig
from rlhf_core.trainers import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

LENGTH, PROMPT, RESPONSE = 64, 16, 32  # tokens of a text, a prompt and a response
STORIES = Path("text", "tinystories.jsonl.gz")


class Size(NamedTuple):
    """A model and how much it trains. Learning rates are those tried, by method."""

    shape: dict | None  # None: stories260k
    pretraining: dict
    steps: int  # of SFT, reward, DPO and GRPO, with 32 texts, pairs or responses each
    rollouts: int  # of PPO, with 32 responses and 16 updates each
    lrs: dict[str, tuple[float, ...]]


SIZES = {
    "260k": Size(
        None, {}, 30, 8,
        {
            "sft": (1e-5, 1e-3, 3e-3),
            "reward": (1e-5, 5e-4, 2e-3),
            "dpo": (1e-6, 1e-4, 1e-3),
            "ppo": (3e-6, 1e-4, 3e-4, 1e-3),
            "grpo": (1e-6, 1e-4, 5e-4, 2e-3),
        },
    ),
    "4m": Size(
        dict(hidden_size=256, num_layers=3, num_heads=4),
        dict(lr=2e-3, batch_size=16, epochs=1, warmup_steps=10),
        15, 4,
        {
            "sft": (2e-5, 3e-4, 1e-3),
            "reward": (2e-5, 1e-4, 5e-4),
            "dpo": (1e-6, 3e-5, 1e-4),
            "ppo": (3e-6, 3e-5, 1e-4),
            "grpo": (1e-6, 1e-4, 5e-4),
        },
    ),
    "30m": Size(
        dict(hidden_size=512, num_layers=6, num_heads=8),
        dict(lr=1e-3, batch_size=16, max_steps=50, warmup_steps=5),
        6, 2,
        {
            "sft": (3e-4,),
            "reward": (5e-4,),
            "dpo": (3e-5, 1e-4),
            "ppo": (3e-5,),
            "grpo": (1e-4,),
        },
    ),
}  # fmt: skip


def start(size: Size, data: Path, folder: Path) -> Task:
    """The task of the size's model, which is pretrained, or read from the folder."""
    task, shape = stories_task(data, 0), size.shape
    if shape is not None:
        tokenizer = load_tokenizer(data / "tokenizers" / "minimind")
        stories = read_texts(data / STORIES)
        if not (folder / "config.json").exists():
            ids = dict(eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
            torch.manual_seed(0)
            sizes = dict(vocab_size=tokenizer.vocab_size, max_positions=LENGTH, **shape, **ids)
            model = Transformer(TransformerConfig(**sizes))
            examples = [encode_text(story, tokenizer, LENGTH) for story in stories[:-200]]
            config = SFTConfig(lr_schedule="cosine", **size.pretraining)
            SFTTrainer(model, examples, config, tokenizer=tokenizer, out=folder).train()
        prompts = [tokenizer.encode_prompt(story.completion)[:PROMPT] for story in stories]
        fields = dict(prompts=prompts[:-200] * 2, eval_prompts=prompts[-200:] * 4)
        policy = Transformer.from_pretrained(folder)
        task = replace(
            task, policy=policy, tokenizer=tokenizer, eos_ids=tokenizer.eos_ids, **fields
        )
    task.policy.eval().requires_grad_(False)
    return replace(task, eval_prompts=task.eval_prompts[:200], response_length=RESPONSE)


class Start(NamedTuple):
    """What the methods of a size start from."""

    task: Task
    pairs: list
    held_out_pairs: list
    texts: list
    held_out_texts: list


def prepared(task: Task, data: Path, steps: int) -> Start:
    few = replace(task, prompts=task.prompts[: steps * 32 * 3 // 2])
    pairs, _ = labelled_pairs(few, task.policy, 0)
    solutions = read_texts(data / "sft" / "gsm8k_test.jsonl.gz")
    texts = [encode_text(Text("", x.completion), task.tokenizer, LENGTH) for x in solutions]
    return Start(task, *split(pairs), texts[200:], texts[:200])


def sft(start: Start, policy: Transformer, **settings) -> dict:
    config = SFTConfig(batch_size=32, **settings)
    trainer = SFTTrainer(policy, start.texts, config, eval_examples=start.held_out_texts)
    before = trainer.evaluate()["eval_loss"]
    return {"before": before, "after": trainer.train()[-1]["eval_loss"]}


def reward(start: Start, policy: Transformer, **settings) -> dict:
    torch.manual_seed(0)
    model, config = RewardModel.from_model(policy), RewardConfig(batch_size=32, **settings)
    trainer = RewardTrainer(model, start.pairs, config, eval_examples=start.held_out_pairs)
    before = trainer.evaluate()["eval_accuracy"]
    return {"before": before, "after": trainer.train()[-1]["eval_accuracy"]}


def dpo(start: Start, policy: Transformer, **settings) -> dict:
    config = DPOConfig(batch_size=32, **settings)
    DPOTrainer(policy, start.pairs, config, reference=start.task.policy).train()
    return gold(start.task, policy)


def sampled(trainer: type, config: Callable) -> Callable:
    """PPO or GRPO against gold."""

    def run(start: Start, policy: Transformer, **settings) -> dict:
        task = start.task
        options = config(temperature=1.0, response_length=RESPONSE, **settings)
        fixed = dict(reference=task.policy, tokenizer=task.tokenizer, eos_ids=task.eos_ids)
        trainer(policy, task.prompts, options, reward=task.gold, **fixed).train()
        return gold(task, policy)

    return run


def gold(task: Task, policy: Transformer) -> dict:
    found = evaluated(task, task.policy, policy, 0)
    return {"after": found.scores.mean().item(), "kl": found.kl.mean().item()}


METHODS = {
    "sft": sft,
    "reward": reward,
    "dpo": dpo,
    "ppo": sampled(PPOTrainer, PPOConfig),
    "grpo": sampled(GRPOTrainer, GRPOConfig),
}
FIXED = {
    "ppo": dict(kl_coef=0.06, batch_size=32),
    "grpo": dict(kl_coef=0.2, batch_size=4, num_samples=8),
}
MEASURE = {"sft": "held-out loss", "reward": "held-out accuracy"}  # gold of the others


def learn(name: str, data: Path, methods: list[str], folder: Path) -> list[dict]:
    """Run the methods of a size that have no result in the folder; all results."""
    size, results, prepare = SIZES[name], [], None
    for method in methods:
        steps = size.rollouts if method == "ppo" else size.steps
        for lr in size.lrs[method]:
            settings = {"lr": lr, "max_steps": steps, **FIXED.get(method, {})}
            file = folder / f"{method}-{lr:g}.json"
            if not (file.exists() and read_json(file)["settings"] == settings):
                if prepare is None:
                    prepare = prepared(start(size, data, folder / "base"), data, size.steps)
                    base = gold(prepare.task, prepare.task.policy)["after"]
                policy = copy.deepcopy(prepare.task.policy).requires_grad_(True)
                started = time.process_time()
                found = {"before": base, **METHODS[method](prepare, policy, **settings)}
                seconds = time.process_time() - started
                write_json(file, {"settings": settings, **found, "seconds": seconds})
            results.append({"size": name, "method": method, **read_json(file)})
            print(line(results[-1]), flush=True)
    return results


def line(result: dict) -> str:
    """A row of the Markdown table."""
    settings, kl = result["settings"], result.get("kl")
    moved = f"{result['before']:.3f} -> {result['after']:.3f}"
    measure = MEASURE.get(result["method"], "gold")
    columns = [result["size"], result["method"], f"{settings['lr']:g}", str(settings["max_steps"])]
    columns += [measure, moved, "" if kl is None else f"{kl:.4f}", f"{result['seconds']:.0f}"]
    return f"| {' | '.join(columns)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.settings", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="as for rlhf-core demo --real")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/settings"))
    arguments = parser.parse_args()
    print("| size | method | lr | steps | measure | before -> after | KL, nats | s |")
    print("|---|---|---:|---:|---|---:|---:|---:|")
    for name in arguments.sizes:
        learn(name, arguments.data, arguments.methods, arguments.out / name)


if __name__ == "__main__":
    main()
