"""PPO on your own reward functions: a weighted sum of two callables, with the KL kept at a target.

It prints the mean score, the KL and its coefficient in the first and the last step.
"""

import torch

from rlhf_core import ByteTokenizer, PPOConfig, PPOTrainer, Transformer, TransformerConfig

torch.manual_seed(0)
tokenizer = ByteTokenizer()
policy = Transformer(
    TransformerConfig(tokenizer.vocab_size, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
)


def letters(prompts, responses):
    """One number for each response: the share of its characters that are lower-case letters."""
    return [
        sum(c in "abcdefghijklmnopqrstuvwxyz" for c in text) / max(len(text), 1)
        for text in responses
    ]


def brief(prompts, responses):
    return [-len(text) / 12 for text in responses]


kl = dict(kl_coef=0.02, kl_target=4.0, kl_horizon=256)  # target in nats, horizon in responses
config = PPOConfig(lr=3e-3, batch_size=32, epochs=16, response_length=12, temperature=1.0, **kl)
prompts = [tokenizer.encode_prompt("say something: ")] * 32
history = PPOTrainer(
    policy, prompts, config, reward=[(letters, 1.0), (brief, 0.1)], tokenizer=tokenizer
).train()
for step in (history[0], history[-1]):
    score, kl, coef = (step[f"objective/{name}"] for name in ("scores", "kl", "kl_coef"))
    print(f"score {score:.3f}, KL {kl:.2f} nats, kl_coef {coef:.4f}")
