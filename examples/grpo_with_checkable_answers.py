"""GRPO on answers that a program can check: the reward is 1 for a right answer, else 0.

It needs no critic and no reward model. The policy first learns from guesses what an answer looks
like. The script prints the share of right answers in the first and the last rollout.
"""

import random

import torch

from rlhf_core import (
    ByteTokenizer,
    SFTConfig,
    SFTTrainer,
    Text,
    Transformer,
    TransformerConfig,
    encode_text,
)
from rlhf_core.trainers import GRPOConfig, GRPOTrainer

torch.manual_seed(0)
random.seed(0)
tokenizer = ByteTokenizer()
policy = Transformer(
    TransformerConfig(tokenizer.vocab_size, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
)
question = "a number that 7 divides: "
guesses = [Text(question, str(random.randrange(10, 100))) for _ in range(1024)]
examples = [encode_text(text, tokenizer, max_length=64) for text in guesses]
SFTTrainer(policy, examples, SFTConfig(lr=3e-3, batch_size=32, epochs=2)).train()


def right(prompts, responses):
    return [float(response.isdecimal() and int(response) % 7 == 0) for response in responses]


prompts = [tokenizer.encode_prompt(question)] * 8
config = GRPOConfig(lr=1e-3, batch_size=8, num_samples=16, epochs=30, response_length=3)
history = GRPOTrainer(policy, prompts, config, reward=right, tokenizer=tokenizer).train()
print(history[0]["reward"], "->", history[-1]["reward"])
