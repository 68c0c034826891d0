"""Iterated RLHF with a judge, which can be a program, a model behind an API or a person.

Each round samples pairs from the policy, trains a new reward model on all pairs so far, and runs
PPO against it. The script prints the policy's Elo rating after each round.
"""

import torch

from rlhf_core import ByteTokenizer, PPOConfig, RewardConfig, Transformer, TransformerConfig
from rlhf_core.trainers import IteratedRLHFConfig, SamplingConfig, iterated_rlhf

torch.manual_seed(0)
tokenizer = ByteTokenizer()
policy = Transformer(
    TransformerConfig(tokenizer.vocab_size, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
)


def judge(prompts, first, second):
    """For each prompt, the probability that the first response is better: it has more vowels."""
    vowels = [[sum(c in "aeiou" for c in text) for text in texts] for texts in (first, second)]
    return [(a > b) + (a == b) / 2 for a, b in zip(*vowels)]


config = IteratedRLHFConfig(
    rounds=3,
    sampling=SamplingConfig(num_samples=4, response_length=12, batch_size=64),
    reward=RewardConfig(lr=1e-3, epochs=4),
    ppo=PPOConfig(lr=1e-3, epochs=4, response_length=12, temperature=1.0, kl_coef=0.01),
)
prompts = [tokenizer.encode_prompt("say something: ")] * 128
options = dict(judge=judge, eval_prompts=prompts[:64], tokenizer=tokenizer)
for number, report in enumerate(iterated_rlhf(policy, prompts, config, **options), 1):
    elo = report["elo"][-1]
    print(f"round {number}: {report['pairs']} pairs, Elo {elo:.0f} (the first policy has 0)")
