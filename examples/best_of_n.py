"""Best-of-n needs no training: sample n responses and keep the one with the highest reward.

From one set of samples it prints the expected reward for each n, and the KL to the policy.
"""

import torch

from rlhf_core import ByteTokenizer, Transformer, TransformerConfig
from rlhf_core.evaluation import best_of_n_curve, best_of_n_kl
from rlhf_core.trainers import SamplingConfig, best_of_n

torch.manual_seed(0)
tokenizer = ByteTokenizer()
policy = Transformer(
    TransformerConfig(tokenizer.vocab_size, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
)


def vowels(prompts, responses):
    return [sum(c in "aeiou" for c in response) for response in responses]


prompts = [tokenizer.encode_prompt(f"say {thing}: ") for thing in ("this", "that")]
config = SamplingConfig(num_samples=64, response_length=16)
candidates = best_of_n(policy, prompts, config, reward=vowels, tokenizer=tokenizer)
answers, scores = candidates.best()
for prompt, ids, score in zip(prompts, answers, scores.tolist()):
    print(f"{tokenizer.decode(prompt)}{tokenizer.decode(ids)!r} scores {score:.0f}")
curve = best_of_n_curve(candidates.scores, candidates.scores)
for n in (1, 4, 16, 64):
    print(f"best of {n}: {curve[n - 1]:.2f}, {best_of_n_kl(n):.2f} nats from the policy")
