"""The bare side: a hand-written loop over transformers models without anything optional.

It computes logits of completion tokens only, no metrics and no entropy. It needs no attention mask
for padding on the right, uses fused AdamW, and in PPO samples with `generate` and its cache. It has
no fused code beyond that of torch and transformers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.task import Task, Turn


def train(task: Task, turn: Turn) -> None:
    globals()[f"_{task.method}"](task, turn)


def _load(name: str, folder: str, *, frozen: bool = False, **options):
    import transformers

    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, **options)
    model.config.use_cache = False
    return model.eval().requires_grad_(not frozen)  # eval: without dropout


def _policy(task: Task, **kwargs):
    return _load("GPT2LMHeadModel", task.policy, **kwargs)


def _scorer(task: Task, **kwargs):
    return _load("GPT2ForSequenceClassification", task.reward, num_labels=1, **kwargs)


class _Optimizer:
    def __init__(self, task: Task, *models):
        self.parameters = [p for model in models for p in model.parameters()]
        self.adam = torch.optim.AdamW(
            self.parameters,
            lr=task.lr,
            betas=task.betas,
            eps=task.adam_eps,
            weight_decay=0.0,
            fused=True,
        )
        self.max_grad_norm = None if task.method == "ppo" else task.max_grad_norm

    def step(self, loss: Tensor) -> None:
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.adam.step()


def _pad(task: Task, rows: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """Ids (B, T) of (prompt, completion) rows, padded on the right, and where completions are."""
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.full((len(rows), width), task.pad_id)
    counted = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(rows):
        ids[row, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
        counted[row, len(prompt) : len(prompt) + len(completion)] = True
    return ids, counted


def _negative_logprobs(model, ids: Tensor, counted: Tensor) -> Tensor:
    """Negative log-probs (N,) of the counted tokens."""
    hidden = model.transformer(input_ids=ids).last_hidden_state[:, :-1][counted[:, 1:]]
    return F.cross_entropy(model.lm_head(hidden), ids[:, 1:][counted[:, 1:]], reduction="none")


def _sft(task, turn):
    model = _policy(task)
    optimizer = _Optimizer(task, model)
    turn(math.nan)
    for batch in task.batches():
        ids, counted = _pad(task, [(row.prompt, row.chosen) for row in batch])
        loss = _negative_logprobs(model, ids, counted).mean()
        optimizer.step(loss)
        turn(loss.item())


def _dpo(task, turn):
    model, reference = _policy(task), _policy(task, frozen=True)
    optimizer = _Optimizer(task, model)
    turn(math.nan)
    for batch in task.batches():
        both = [(row.prompt, row.chosen) for row in batch] + [
            (row.prompt, row.rejected) for row in batch
        ]
        ids, counted = _pad(task, both)
        with torch.no_grad():
            expected = _negative_logprobs(reference, ids, counted)
        better = expected - _negative_logprobs(model, ids, counted)  # log-ratios of the tokens
        rewards = task.beta * better.new_zeros(len(ids)).index_add(
            0, counted.nonzero()[:, 0], better
        )
        chosen, rejected = rewards.chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
        optimizer.step(loss)
        turn(loss.item())


def _reward(task, turn):
    model = _scorer(task)
    optimizer = _Optimizer(task, model)
    turn(math.nan)
    for batch in task.batches():
        both = [(row.prompt, row.chosen) for row in batch] + [
            (row.prompt, row.rejected) for row in batch
        ]
        ids, _ = _pad(task, both)
        last = torch.tensor([len(prompt) + len(completion) - 1 for prompt, completion in both])
        hidden = model.transformer(input_ids=ids).last_hidden_state[torch.arange(len(ids)), last]
        chosen, rejected = model.score(hidden)[:, 0].chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
        optimizer.step(loss)
        turn(loss.item())


def _ppo(task, turn):
    policy, reference = _policy(task), _policy(task, frozen=True)
    critic, reward = _scorer(task), _scorer(task, frozen=True)
    optimizer = _Optimizer(task, policy, critic)
    P, R, B = task.prompt_length, task.completion_length, task.batch_size
    sampling = dict(
        max_new_tokens=R, min_new_tokens=R, do_sample=True, top_k=0, top_p=1.0, use_cache=True
    )
    turn(math.nan)
    for number, batch in enumerate(task.batches()):
        prompts = torch.tensor(
            [[task.pad_id] * (P - len(row.prompt)) + row.prompt for row in batch]
        )
        seen = torch.tensor(
            [[0] * (P - len(row.prompt)) + [1] * (len(row.prompt) + R) for row in batch]
        )  # (B, P + R)
        positions = (seen.cumsum(dim=1) - 1).clamp_min(0)
        with torch.no_grad():
            ids = policy.generate(
                prompts,
                attention_mask=seen[:, :P],
                temperature=task.temperature,
                pad_token_id=task.pad_id,
                **sampling,
            )
            if number == 0:
                ids = torch.cat((prompts, torch.tensor([row.chosen for row in batch])), dim=1)

        def hidden(model, index=slice(None), ids=ids, seen=seen, positions=positions):
            inputs = dict(
                input_ids=ids[index], attention_mask=seen[index], position_ids=positions[index]
            )
            return model.transformer(**inputs).last_hidden_state

        def logprobs(model, index=slice(None), ids=ids, hidden=hidden):
            logits = model.lm_head(hidden(model, index)[:, P - 1 : -1]) / task.temperature
            return -F.cross_entropy(
                logits.transpose(1, 2), ids[index, P:], reduction="none"
            )  # (B, R)

        def values(index=slice(None), hidden=hidden):
            return critic.score(hidden(critic, index)[:, P - 1 : -1])[..., 0]  # (B, R)

        with torch.no_grad():
            old_logprobs, old_values = logprobs(policy), values()
            rewards = -task.kl_coef * (old_logprobs - logprobs(reference))
            rewards[:, -1] += reward.score(hidden(reward)[:, -1])[:, 0]
            advantages, running = torch.zeros_like(rewards), 0.0
            for t in reversed(range(R)):
                next_value = old_values[:, t + 1] if t + 1 < R else 0.0
                running = (
                    rewards[:, t]
                    + task.gamma * next_value
                    - old_values[:, t]
                    + task.gamma * task.lam * running
                )
                advantages[:, t] = running
            returns = advantages + old_values
            advantages = (advantages - advantages.mean()) * torch.rsqrt(
                advantages.var(correction=0) + 1e-8
            )

        losses = []
        for _ in range(task.ppo_epochs):
            for index in torch.randperm(B).chunk(task.minibatches):
                A, old = advantages[index], old_values[index]
                ratio = (logprobs(policy, index) - old_logprobs[index]).exp()
                clipped_ratio = ratio.clamp(1 - task.clip_range, 1 + task.clip_range)
                policy_loss = -torch.minimum(ratio * A, clipped_ratio * A).mean()
                new = values(index)
                clipped = old + (new - old).clamp(-task.value_clip_range, task.value_clip_range)
                errors = torch.maximum((new - returns[index]) ** 2, (clipped - returns[index]) ** 2)
                loss = policy_loss + task.vf_coef * 0.5 * errors.mean()
                optimizer.step(loss)
                losses.append(loss.item())
        turn(sum(losses) / len(losses))
