"""Distillation: the divergence between the next-token distributions of a teacher and a student."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_core.checks import at_least_float32
from rlhf_core.ops import full_kl

DIVERGENCES = ("forward", "reverse")


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str = "forward",
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Tensor:
    """Exact KL between teacher and student for every position (...), in nats, with gradient.

    Forward is KL(teacher || student), the loss of context distillation (Askell et al. 2021): the
    student covers whatever the teacher may say. Reverse is KL(student || teacher): the student
    keeps to what the teacher finds likely (Gu et al. 2023, Agarwal et al. 2023).

    Args:
        logits, teacher_logits: (..., V) of the student, and of the teacher without gradient.
        divergence: "forward" or "reverse".
        temperature: > 0; both distributions are softmax(logits / temperature).
        top_k: The teacher's k < V most likely tokens count one by one, and all others together as
            one event, which gives a lower bound of the KL. None: the whole vocabulary.

    Raises:
        ValueError: An unknown divergence, or a top_k that is not in [1, V).
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if top_k is not None:
        logits, teacher_logits = top_and_rest(logits, teacher_logits, top_k, temperature)
    both = (teacher_logits, logits) if divergence == "forward" else (logits, teacher_logits)
    return full_kl(*both, temperature=temperature)


def top_and_rest(
    logits: Tensor, teacher_logits: Tensor, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Logits (..., k + 1) of the teacher's k most likely tokens, and of any other token, for both.

    Divided by the temperature, their softmax has the probabilities of these k + 1 events.
    """
    V = logits.shape[-1]
    if not 1 <= k < V:
        raise ValueError(f"top_k must be in [1, {V}) for {V} tokens, got {k}")
    top = teacher_logits.topk(k, dim=-1).indices  # (..., k)

    def events(x: Tensor) -> Tensor:
        (x,) = at_least_float32(x)
        others = x.scatter(-1, top, -torch.inf) / temperature
        rest = others.logsumexp(dim=-1, keepdim=True) * temperature
        return torch.cat((x.gather(-1, top), rest), dim=-1)

    return events(logits), events(teacher_logits)
