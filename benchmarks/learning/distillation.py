"""Context distillation on a planted task: a student learns without a context what it did with one.

    OMP_NUM_THREADS=1 python -m benchmarks.learning.distillation --seeds 0 1 2

A byte-level model learns to copy words of four letters, and to write them in capitals after the
context "loud: ". Then it is distilled, without the context, on 512 words. The table is about 128
other words: the KL from the model with the context, in nats per token of the right answer, and the
share of words that are answered in capitals. All ways start from the same model and take as many
steps.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch

from rlhf_core.data import ByteTokenizer, Example, Text, encode_in_context, encode_text
from rlhf_core.models import Transformer, TransformerConfig
from rlhf_core.rollout import sample
from rlhf_core.trainers import DistillConfig, DistillTrainer, SFTConfig, SFTTrainer

CONTEXT, LETTERS, LENGTH, TRAINED, HELD_OUT = "loud: ", "abcdefgh", 4, 512, 128
TOKENIZER, MAX_LENGTH = ByteTokenizer(), 24
SAMPLED = dict(response_length=LENGTH + 1)
WAYS = {  # options of DistillConfig; None is SFT on what the teacher samples
    "forward KL": {},
    "reverse KL": dict(divergence="reverse"),
    "forward KL, 5 tokens and the rest": dict(kl_top_k=5),
    "forward KL, the student's samples": dict(responses="student", **SAMPLED),
    "reverse KL, the student's samples": dict(divergence="reverse", responses="student", **SAMPLED),
    "forward KL, the teacher's samples": dict(responses="teacher", **SAMPLED),
    "SFT on the teacher's samples": None,
}
SETTINGS = dict(lr=1e-3, batch_size=32, epochs=4)


def words(seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(LETTERS) ** LENGTH, generator=generator)[: TRAINED + HELD_OUT]
    places = [len(LETTERS) ** i for i in range(LENGTH)]
    return ["".join(LETTERS[n // place % len(LETTERS)] for place in places) for n in order.tolist()]


def base_model(seed: int, known: list[str]) -> Transformer:
    """A model that copies a word, and writes it in capitals after the context."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=64, num_layers=2, num_heads=4, max_positions=MAX_LENGTH)
    ids = dict(bos_id=TOKENIZER.bos_id, eos_ids=TOKENIZER.eos_ids, pad_id=TOKENIZER.pad_id)
    model = Transformer(TransformerConfig(TOKENIZER.vocab_size, **sizes, **ids))
    texts = [Text(f"{word}=", word) for word in known]
    texts += [Text(f"{CONTEXT}{word}=", word.upper()) for word in known]
    examples = [encode_text(text, TOKENIZER, MAX_LENGTH) for text in texts]
    config = SFTConfig(lr=3e-3, batch_size=64, epochs=15, seed=seed)
    SFTTrainer(model, examples, config).train()
    return model


def lessons(known: list[str]) -> list[Example]:
    texts = [Text(f"{word}=", word.upper()) for word in known]
    return [encode_in_context(text, TOKENIZER, MAX_LENGTH, CONTEXT) for text in texts]


def distilled(base: Transformer, train: list[Example], options: dict | None, seed: int):
    """The student."""
    student = copy.deepcopy(base)
    if options is None:
        generator = torch.Generator().manual_seed(seed)
        prompts = [x.teacher_prompt_ids for x in train]
        samples = sample(base, prompts, max_new_tokens=LENGTH + 1, generator=generator).responses()
        examples = [Example(x.prompt_ids, ids) for x, ids in zip(train, samples)]
        SFTTrainer(student, examples, SFTConfig(**SETTINGS, seed=seed)).train()
    else:
        config = DistillConfig(**SETTINGS, **options, seed=seed)
        DistillTrainer(student, train, config, teacher=base).train()
    return student


def measured(base: Transformer, student: Transformer, held_out: list[Example]) -> list[float]:
    """KL in nats per token, and the share of answers in capitals."""
    config = DistillConfig(batch_size=len(held_out))
    kl = DistillTrainer(student, held_out, config, teacher=base).metrics_of(held_out)["kl"]
    prompts = [x.prompt_ids for x in held_out]
    answers = sample(student, prompts, max_new_tokens=LENGTH + 1, temperature=0.0).responses()
    right = [ids == x.completion_ids for ids, x in zip(answers, held_out)]
    return [kl, sum(right) / len(right)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.distillation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    rows: dict[str, list[list[float]]] = {"before": []} | {name: [] for name in WAYS}
    for seed in parser.parse_args().seeds:
        known = words(seed)
        base = base_model(seed, known[:TRAINED])
        train, held_out = lessons(known[:TRAINED]), lessons(known[TRAINED:])
        rows["before"].append([*measured(base, copy.deepcopy(base), held_out), 0.0])
        for name, options in WAYS.items():
            started = time.process_time()
            student = distilled(base, train, options, seed)
            seconds = time.process_time() - started
            rows[name].append([*measured(base, student, held_out), seconds])
    print("| way | KL, nats per token | in capitals | s |\n|---|---:|---:|---:|")
    for name, found in rows.items():
        kl, share, seconds = map(statistics.mean, zip(*found))
        print(f"| {name} | {kl:.4f} | {share:.2f} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
