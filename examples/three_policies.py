"""Did training help, and can the difference be trusted? Three policies answer the same prompts.

The report is that of `rlhf-core evaluate`: errors are clustered by prompt.
"""

import copy

import torch

from rlhf_core import ByteTokenizer, GRPOConfig, GRPOTrainer, Transformer, TransformerConfig
from rlhf_core.data import Sample
from rlhf_core.evaluation.policies import sample_policy
from rlhf_core.evaluation.summary import by_score, summarize

torch.manual_seed(0)
tokenizer = ByteTokenizer()
sizes = dict(hidden_size=64, num_layers=2, num_heads=2, max_positions=64)
ids = dict(eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
model = Transformer(TransformerConfig(tokenizer.vocab_size, **sizes, **ids))


def letters(prompts, responses):
    return [float(sum(c.isascii() and c.isalpha() for c in response)) for response in responses]


prompts = [f"say {i}: " for i in range(16)]
encoded = [tokenizer.encode_prompt(prompt) for prompt in prompts]
policies = {"start": copy.deepcopy(model)}
for name, epochs in (("early", 4), ("late", 12)):
    config = GRPOConfig(epochs=epochs, batch_size=8, response_length=12, lr=3e-3)
    model = copy.deepcopy(policies["start"])
    GRPOTrainer(model, encoded, config, reward=letters, tokenizer=tokenizer).train()
    policies[name] = model

samples = []
for name, policy in policies.items():
    found = sample_policy(policy, policies["start"], encoded, max_new_tokens=12, num_samples=4)
    texts = [tokenizer.decode(ids) for ids in found.ids]
    repeated = [prompt for prompt in prompts for _ in range(4)]
    scores = letters(repeated, texts)
    samples += map(Sample, [name] * len(texts), repeated, texts, scores, found.kl.tolist())

report = summarize(samples, "start", by_score)
for policy in report["policies"]:
    score, kl, elo = (policy[x] for x in ("score", "kl", "elo"))
    print(
        f"{policy['name']:<6} score {score['mean']:.2f} ± {score['standard_error']:.2f}, "
        f"KL {round(kl['mean'], 2) + 0:.2f}, Elo {elo['rating']:.0f} ± {elo['standard_error']:.0f}"
    )
for row in report["comparisons"]:
    low, high = row["interval"]
    print(
        f"{row['policy']} wins {row['rate']:.2f} [{low:.2f}, {high:.2f}] against {row['against']}"
    )
