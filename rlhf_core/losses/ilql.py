"""Implicit language Q-learning: the values of tokens from text whose reward is known (ILQL: Snell et al. 2022).

A token is an action, what stands before it the state: Q(s_t, a_t) and V(s_t) are read before token t, reward r_t comes
after it, as in `ops.gae`. Beside these losses the Q heads have CQL's (Kumar et al. 2020), the cross-entropy of their
values with the data's tokens: -log softmax(Q(s_t, .))[a_t], which is `ops.linear_token_logprobs` of a head.
"""

import torch
from torch import Tensor

MAX_WEIGHT = 100.0  # of a token in the cloning loss, as in IQL's own experiments


def transitions(values: Tensor, scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards (M,) and next values V(s_{t+1}) (M,) of N sequences, one after the other.

    values: (M,) V(s_t). scores: (N,) the reward of each sequence, which comes after its last token. lengths: (N,) int64
    tokens of each, M in all; one without tokens has no place for its score. After a last token the value is 0.
    """
    last = (lengths.cumsum(0) - 1)[lengths > 0]
    rewards = torch.zeros_like(values).index_copy(0, last, scores[lengths > 0].to(values.dtype))
    return rewards, values.roll(-1).index_fill(0, last, 0.0)


def q_loss(q: Tensor, rewards: Tensor, next_values: Tensor, *, gamma: float) -> Tensor:
    """Bellman error (r_t + gamma V(s_{t+1}) - Q(s_t, a_t))^2 (Kostrikov et al. 2021, IQL, eq. 6), unreduced.

    The value learns nothing from it. gamma: discount, in [0, 1].
    """
    return (rewards + gamma * next_values.detach() - q) ** 2


def expectile_loss(values: Tensor, target_q: Tensor, *, expectile: float) -> Tensor:
    """|expectile - 1(u < 0)| u^2, where u = target_q - values (IQL, eq. 5), unreduced; the target learns nothing.

    Its minimum is a mean of Q over the data's actions for 0.5, and nears their maximum for 1: in (0, 1).
    """
    u = target_q.detach() - values
    return torch.where(u < 0, 1 - expectile, expectile) * u**2


def cloning_loss(logprobs: Tensor, advantages: Tensor, *, beta: float) -> Tensor:
    """-exp(beta A) log pi(a_t | s_t) (AWAC: Nair et al. 2020; IQL, eq. 7), unreduced; A learns nothing.

    beta: per unit of reward, at least 0; 0: plain cloning of the data. The weight is at most 100.
    """
    return -(beta * advantages.detach()).exp().clamp(max=MAX_WEIGHT) * logprobs
