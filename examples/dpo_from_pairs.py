"""DPO on preference pairs: supervised fine-tuning on both sides of the pairs, then DPO.

It prints the policy's answers before and after DPO, and the share of pairs whose chosen answer
has the higher implicit reward.
"""

import torch

from rlhf_core import (
    ByteTokenizer,
    DPOConfig,
    DPOTrainer,
    Preference,
    SFTConfig,
    SFTTrainer,
    Text,
    Transformer,
    TransformerConfig,
    encode_preference,
    encode_text,
    generate,
)

torch.manual_seed(0)
tokenizer = ByteTokenizer()
policy = Transformer(
    TransformerConfig(tokenizer.vocab_size, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
)
rows = [
    ("can you help? ", "gladly!", "no way."),
    ("are you there? ", "yes, gladly!", "who asks?"),
] * 32

texts = [Text(prompt, answer) for prompt, *answers in rows for answer in answers]
examples = [encode_text(text, tokenizer, max_length=64) for text in texts]
SFTTrainer(policy, examples, SFTConfig(lr=3e-3, batch_size=32, epochs=40)).train()


def answers():
    ids = torch.tensor([tokenizer.encode_prompt("can you help? ")])
    generator = torch.Generator().manual_seed(1)
    sampled = generate(policy, ids, max_new_tokens=16, num_samples=8, generator=generator)
    rows = zip(sampled.response_ids, sampled.response_mask)
    return [tokenizer.decode(ids[mask].tolist()) for ids, mask in rows]


print("before:", answers())
pairs = [encode_preference(Preference(*row), tokenizer, max_length=64) for row in rows]
history = DPOTrainer(policy, pairs, DPOConfig(lr=1e-4, batch_size=16, epochs=8)).train()
print("after: ", answers())
first, last = (history[i]["rewards/accuracies"] for i in (0, -1))
print(f"accuracy of the implicit reward: {first} -> {last}")
