"""All of DPO on one page: two log-probs for each completion, one loss, one optimizer.

It uses the library's model and ops, and no trainer class. It leaves out what a real run needs:
supervised fine-tuning before DPO, micro-batches, packed rows, a learning-rate schedule,
evaluation, checkpoints and checks. rlhf_core/algorithms/dpo.py has those.

The policy starts from random weights and learns to prefer polite answers. At loss log 2 = 0.693
it prefers neither. Paper: Rafailov et al. 2023.
"""

import copy

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from rlhf_core import ByteTokenizer, Transformer, TransformerConfig
from rlhf_core.ops import token_logprobs

BETA = 0.1  # larger: the policy stays nearer to the reference
LR = 1e-4
STEPS = 60
BATCH = 8  # pairs

torch.manual_seed(0)
tokenizer = ByteTokenizer()
policy = Transformer(
    TransformerConfig(tokenizer.vocab_size, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
)
reference = copy.deepcopy(policy).requires_grad_(False)  # pi_ref: the policy before training
optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)

verbs = ("help", "wait", "listen", "explain", "begin", "stop", "answer", "look")
pairs = [  # prompt, chosen, rejected
    (f"can you {verb}? ", opening, closing)
    for verb in verbs
    for opening in ("gladly!", "of course!", "yes, sure.")
    for closing in ("no way.", "who asks?", "not now.")
]
train, held_out = pairs[9:], pairs[:9]  # the verb "help" is held out


def completion_logps(model, prompts, completions):
    """log pi(y | x) (B,): the log-probs of the completion's tokens, summed, EOS included."""
    prompt_ids = [tokenizer.encode_prompt(text) for text in prompts]
    answer_ids = [[*tokenizer.encode(text), *tokenizer.eos_ids[:1]] for text in completions]
    rows = [torch.tensor(x + y) for x, y in zip(prompt_ids, answer_ids)]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id)  # (B, T)
    at = torch.arange(ids.shape[1])
    start = torch.tensor([len(x) for x in prompt_ids])[:, None]
    end = torch.tensor([len(row) for row in rows])[:, None]
    mask = (at >= start) & (at < end)  # (B, T), True = a completion token
    logits = model(ids)  # (B, T, V); padding is on the right, so no real token sees it
    return token_logprobs(logits[:, :-1], ids[:, 1:], mask=mask[:, 1:]).sum(dim=1)


def margins(batch):
    """beta (log-ratio of chosen - log-ratio of rejected) (B,)."""
    prompts, chosen, rejected = zip(*batch)
    log_ratios = []
    for completions in (chosen, rejected):
        with torch.no_grad():
            ref_logps = completion_logps(reference, prompts, completions)
        log_ratios.append(completion_logps(policy, prompts, completions) - ref_logps)
    return BETA * (log_ratios[0] - log_ratios[1])


for step in range(STEPS):
    batch = [train[i] for i in torch.randperm(len(train))[:BATCH].tolist()]
    loss = -F.logsigmoid(margins(batch)).mean()  # DPO, eq. 7
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    if step % 10 == 0 or step == STEPS - 1:
        with torch.no_grad():
            margin = margins(held_out).mean()
        print(f"step {step:2d}  loss {loss:.3f}  margin of held-out pairs {margin:.3f}")
