"""Iterated RLHF with a judge, who may be a program, a model behind an API or a person: rounds of pairs from the policy,
a new reward model from all pairs so far, and PPO against it. Prints the Elo rating of the policy after each round.
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
    """How probable it is that the first response is the better one: here the one with more vowels."""
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
    print(
        f"round {number}: {report['pairs']} pairs, Elo {report['elo'][-1]:.0f} where the first policy has 0"
    )
