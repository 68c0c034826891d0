"""The KL between teacher and student, whole and of the most likely tokens."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_core.losses import distillation_loss

N, V = 5, 9


def logits(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    return 2 * torch.randn(N, V, dtype=dtype)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a)


def by_hand(student, teacher, divergence, temperature, top_k):
    """The definition, number by number, with one event for all tokens that are not the top k."""
    losses = []
    for s, t in zip(student.tolist(), teacher.tolist()):
        events = []
        top = sorted(range(V), key=lambda i: -t[i])[: V if top_k is None else top_k]
        for z in (s, t):
            e = [math.exp(x / temperature) for x in z]
            p = [e[i] / sum(e) for i in top]
            rest = [e[i] / sum(e) for i in range(V) if i not in top]
            events.append(p + ([sum(rest)] if rest else []))
        q, p = events
        losses.append(kl(p, q) if divergence == "forward" else kl(q, p))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("top_k", [None, 1, 3, V - 1])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_loss_and_gradient_are_those_by_hand_in_float64(divergence, temperature, top_k):
    student, teacher = logits(0), logits(1)
    options = dict(divergence=divergence, temperature=temperature, top_k=top_k)
    leaf = student.clone().requires_grad_()
    loss = distillation_loss(leaf, teacher, **options)
    assert_close(loss.detach(), by_hand(student, teacher, *options.values()), rtol=1e-10, atol=0)
    loss.sum().backward()
    step = 1e-6
    for i in range(V):  # central differences
        moved = torch.zeros(V, dtype=torch.float64)
        moved[i] = step
        up, down = (by_hand(student + sign * moved, teacher, *options.values()) for sign in (1, -1))
        assert_close(leaf.grad[:, i], (up - down) / (2 * step), rtol=1e-5, atol=1e-8)


def test_float32_and_bfloat16_are_near_float64():
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-6)):
        student, teacher = logits(0, dtype), logits(1, dtype)
        for top_k in (None, 3):
            got = distillation_loss(student, teacher, top_k=top_k)
            want = by_hand(student.double(), teacher.double(), "forward", 1.0, top_k)
            assert got.dtype == torch.float32
            assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_the_top_tokens_bound_the_kl_from_below():
    student, teacher = logits(0), logits(1)
    losses = [distillation_loss(student, teacher, top_k=k) for k in range(1, V)]
    losses.append(distillation_loss(student, teacher))
    for fewer, more in itertools.pairwise(losses):
        assert (fewer <= more + 1e-12).all()
    assert_close(losses[-2], losses[-1])  # the rest is one token


def test_equal_distributions_have_no_loss_and_no_gradient():
    teacher = logits(0)
    student = (teacher + 3).requires_grad_()  # a shift of all logits changes nothing
    for options in (dict(), dict(divergence="reverse"), dict(top_k=2)):
        loss = distillation_loss(student, teacher, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), student)
        assert loss.abs().max() < 1e-12 and gradient.abs().max() < 1e-12


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(divergence="both"), "divergence must be one of forward, reverse, got 'both'"),
        (dict(top_k=V), rf"top_k must be in \[1, {V}\) for {V} tokens, got {V}"),
        (dict(top_k=0), r"top_k must be in \[1, "),
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=0.0, top_k=2), "temperature"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(logits(0), logits(1), **options)
