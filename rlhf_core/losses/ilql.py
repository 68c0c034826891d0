"""Implicit language Q-learning from text with known rewards (ILQL: Snell et al. 2022).

A token is an action, and the text before it is the state. Q(s_t, a_t) and V(s_t) are read before
token t, and reward r_t arrives after it, as in `ops.gae`. The Q heads also use the loss of CQL
(Kumar et al. 2020), the cross-entropy of their values with the data's tokens:
-log softmax(Q(s_t, .))[a_t]. It is `ops.linear_token_logprobs` of a head. Losses are unreduced.
"""

import torch
from torch import Tensor

MAX_WEIGHT = 100.0  # maximum weight of a token in the cloning loss, as in IQL's experiments


def transitions(values: Tensor, scores: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards (M,) and next values V(s_{t+1}) (M,) of N concatenated sequences.

    Args:
        values: (M,) V(s_t).
        scores: (N,) reward of each sequence, given after its last token; ignored without tokens.
        lengths: (N,) int64, tokens of each sequence, M in total.

    Returns:
        (rewards, next_values). The value after a sequence's last token is 0.
    """
    last = (lengths.cumsum(0) - 1)[lengths > 0]
    rewards = torch.zeros_like(values).index_copy(0, last, scores[lengths > 0].to(values.dtype))
    return rewards, values.roll(-1).index_fill(0, last, 0.0)


def q_loss(q: Tensor, rewards: Tensor, next_values: Tensor, *, gamma: float) -> Tensor:
    """Bellman error (r_t + gamma V(s_{t+1}) - Q(s_t, a_t))^2 (Kostrikov et al. 2021, IQL, eq. 6).

    All are (M,). gamma: discount, in [0, 1]. next_values get no gradient.
    """
    return (rewards + gamma * next_values.detach() - q) ** 2


def expectile_loss(values: Tensor, target_q: Tensor, *, expectile: float) -> Tensor:
    """|expectile - 1(u < 0)| u^2, where u = target_q - values, both (M,) (IQL, eq. 5).

    expectile: in (0, 1). At 0.5 the minimum is the mean of Q over the data's actions; near 1 it
    approaches their maximum. target_q gets no gradient.
    """
    u = target_q.detach() - values
    return torch.where(u < 0, 1 - expectile, expectile) * u**2


def cloning_loss(logprobs: Tensor, advantages: Tensor, *, beta: float) -> Tensor:
    """-exp(beta A) log pi(a_t | s_t), all (M,) (AWAC: Nair et al. 2020; IQL, eq. 7).

    beta: >= 0, per unit of reward; 0 is plain behaviour cloning, higher favours good actions more.
    The weight exp(beta A) is at most 100. Advantages get no gradient.
    """
    return -(beta * advantages.detach()).exp().clamp(max=MAX_WEIGHT) * logprobs
