"""Fisher products, natural gradients and the line search, each against an independent result."""

import copy
import math

import pytest
import torch
from helpers import GPT2, PROMPTS, adapted, snapshot, tiny
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from rlhf_core.models import transformer
from rlhf_core.ops.kl import full_kl_reference
from rlhf_core.policy_gradient import trust_region
from rlhf_core.policy_gradient.trust_region import (
    Outcome,
    call_with,
    compare,
    conjugate_gradients,
    fisher_product,
    flat,
    line_search,
    natural_step,
    trained_weights,
)
from rlhf_core.rollout import response_hidden, response_logprobs, sample
from rlhf_core.training.metrics import Metrics

T = 0.8
CAPPED = dict(attention_softcap=3.0, logit_softcap=5.0, norm="rmsnorm_plus_one", norm_places="both")
MODELS = {
    "llama": tiny,
    "gpt2": lambda: tiny(**GPT2),
    "untied, grouped heads": lambda: tiny(tie_embeddings=False, num_heads=4, num_kv_heads=2),
    "capped": lambda: tiny(**CAPPED),
    "adapters": adapted,
}


def rollout_of(model):
    """Responses to PROMPTS of several lengths."""
    generator = torch.Generator().manual_seed(1)
    return sample(model, PROMPTS, max_new_tokens=5, temperature=1.5, generator=generator)


def in_float64(name):
    """A model of MODELS in float64, a rollout, and a vector for its weights."""
    model = MODELS[name]()
    rollout = rollout_of(model)
    size = sum(p.numel() for p in trained_weights(model.double()).values())
    return model, rollout, torch.randn(size, dtype=torch.float64)


def logits_of(model, rollout):
    return model.logits(response_hidden(model, rollout))


# ---- Fisher products


@pytest.mark.parametrize("name", MODELS)
def test_a_fisher_product_is_one_with_the_hessian_of_the_exact_kl(name):
    """The KL of the old policy to the new one, differentiated twice in float64."""
    model, rollout, v = in_float64(name)
    weights = list(trained_weights(model).values())
    old = logits_of(model, rollout).detach()
    with sdpa_kernel(SDPBackend.MATH):
        kl = full_kl_reference(old, logits_of(model, rollout), T, None).mean()
        gradient = torch.autograd.grad(kl, weights, create_graph=True)
        want = flat(torch.autograd.grad(flat(gradient) @ v, weights))
    got = fisher_product(model, rollout, v, tokens=len(old), temperature=T)
    assert got.dtype == torch.float64
    assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())
    assert all(p.grad is None for p in model.parameters())


def test_it_is_one_with_the_mean_outer_product_of_the_scores():
    """E[s s^T] v with the score s of every token of the vocabulary, one by one."""
    model, rollout, v = in_float64("llama")
    weights, want = list(trained_weights(model).values()), torch.zeros_like(v)
    log_p = (logits_of(model, rollout) / T).log_softmax(-1)
    for row in log_p:
        for entry in row:
            score = flat(torch.autograd.grad(entry, weights, retain_graph=True))
            want += entry.exp().detach() * score * (score @ v) / len(log_p)
    got = fisher_product(model, rollout, v, tokens=len(log_p), temperature=T)
    assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


@pytest.mark.parametrize("logits_at_once", [2**22, 60])  # 60: five tokens
def test_micro_batches_chunks_and_checkpointing_change_no_product(logits_at_once, monkeypatch):
    model, rollout, v = in_float64("llama")
    options = dict(tokens=int(rollout.response_mask.sum()), temperature=T)
    want = fisher_product(model, rollout, v, **options)
    for module in (transformer, trust_region):
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", logits_at_once)
    model.prepare_training(freeze_layers=0, activation_checkpointing=True)
    got = fisher_product(model, rollout, v, micro_batch_size=3, **options)
    assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_frozen_weights_have_no_part_in_a_product():
    model, rollout, _ = in_float64("untied, grouped heads")
    whole = dict(trained_weights(model))
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)  # the hidden states do not depend on it
    options = dict(tokens=7, temperature=T)
    own = torch.randn(model.lm_head.weight.numel(), dtype=torch.float64)
    got = fisher_product(model, rollout, own, **options)
    model.requires_grad_(True)
    spread = [torch.zeros_like(p) for p in whole.values()]
    place = list(whole).index("lm_head.weight")
    spread[place] = own.view_as(spread[place])
    want = fisher_product(model, rollout, flat(spread), **options)
    start = sum(p.numel() for p in list(whole.values())[:place])
    assert_close(got, want[start : start + own.numel()], rtol=1e-9, atol=1e-12)


def test_call_with_leaves_the_model_as_it_is():
    model, other = tiny(), tiny(seed=1)
    rollout, before = rollout_of(model), snapshot(model)
    weights = {name: (lambda x=x: x) for name, x in trained_weights(other).items()}
    assert_close(call_with(model, weights, logits_of, rollout), logits_of(other, rollout))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


# ---- directions


def spd(size, seed=0):
    """A symmetric, positive definite matrix in float64."""
    torch.manual_seed(seed)
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T + torch.eye(size)


def test_conjugate_gradients_solve():
    A, b = spd(12), torch.randn(12, dtype=torch.float64)
    x, Ax = conjugate_gradients(lambda v: A @ v, b, 40, tolerance=1e-12)
    assert_close(x, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-10)
    assert_close(Ax, b, rtol=1e-8, atol=1e-10)
    x, Ax = conjugate_gradients(lambda v: A @ v, b, 3)
    assert_close(A @ x, Ax, rtol=1e-8, atol=1e-10)  # also before it has converged


def test_conjugate_gradients_stop_where_the_residual_is_small():
    """As many iterations as the matrix has different eigenvalues."""
    values, calls = torch.tensor([1.0, 1.0, 5.0, 5.0, 9.0], dtype=torch.float64), []

    def product(v):
        calls.append(1)
        return values * v

    x, _ = conjugate_gradients(product, torch.arange(1.0, 6.0, dtype=torch.float64), 10)
    assert_close(x, torch.arange(1.0, 6.0, dtype=torch.float64) / values)
    assert len(calls) == 3
    x, Ax = conjugate_gradients(product, torch.zeros(5, dtype=torch.float64), 10)
    assert not x.any() and not Ax.any() and len(calls) == 3


def test_the_natural_gradient_of_a_categorical_policy_is_the_centred_reward():
    """F = diag(p) - p p^T and g = p (r - E r), so F^-1 g = r up to a constant (Kakade 2001)."""
    logits = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64)
    p, r = logits.softmax(0), torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    fisher = p.diag() - p.outer(p)
    step = natural_step(
        lambda v: fisher @ v, p * (r - p @ r), max_kl=0.02, damping=1e-12, iterations=20
    )
    assert_close(step / step.norm(), (r - r.mean()) / (r - r.mean()).norm(), rtol=1e-6, atol=1e-6)
    assert step @ fisher @ step / 2 == pytest.approx(0.02, rel=1e-6)


def test_damping_turns_a_step_to_the_gradient_and_counts_in_its_length():
    A, g = spd(6), torch.randn(6, dtype=torch.float64)
    step = natural_step(lambda v: A @ v, g, max_kl=0.5, damping=1e6, iterations=20)
    assert_close(step / step.norm(), g / g.norm(), rtol=1e-3, atol=1e-3)
    damped = A + 1e6 * torch.eye(6, dtype=torch.float64)
    assert step @ damped @ step / 2 == pytest.approx(0.5, rel=1e-6)


def test_without_a_gradient_there_is_no_step():
    step = natural_step(lambda v: v, torch.zeros(3), max_kl=0.1, damping=0.1, iterations=5)
    assert torch.equal(step, torch.zeros(3))


# ---- lengths


def search(measure, **options):
    """A line search from [1, -0.0] along [8, 8]; its result, and where the weights end."""
    model = nn.Module()
    model.x = nn.Parameter(torch.tensor([1.0, -0.0]))
    settings = dict(max_kl=1.0, tries=4, backtrack=0.5)
    found = line_search(
        model,
        torch.tensor([8.0, 8.0]),
        lambda start: Outcome(*measure(start["x"], model.x), Metrics()),
        **(settings | options),
    )
    return found, model.x.detach()


def test_the_longest_step_within_the_kl_that_gains_is_taken():
    (part, outcome), x = search(lambda start, x: (float((x - start).detach().norm()) / 5, 1.0))
    assert part == 0.25 and x.tolist() == [3.0, 2.0]  # 1 and 0.5 are too far
    assert outcome.kl == pytest.approx(math.sqrt(8) / 5)
    (part, _), x = search(lambda start, x: (0.0, 3.5 - float((x - start).detach()[0])))
    assert part == 0.25 and x.tolist() == [3.0, 2.0]  # longer ones lose
    (part, _), _ = search(lambda start, x: (1.0, 1e-9))  # the bounds: max_kl itself will do
    assert part == 1


@pytest.mark.parametrize("kl, gain", [(1.01, 1.0), (0.1, 0.0), (0.1, math.nan), (math.nan, 1.0)])
def test_a_search_that_fails_leaves_the_weights_bit_by_bit(kl, gain):
    tried = []
    found, x = search(lambda start, x: tried.append(x.tolist()) or (kl, gain))
    assert found == (0.0, None) and len(tried) == 4
    assert x.tolist() == [1.0, 0.0] and x.signbit().tolist() == [False, True]


@pytest.mark.parametrize("model", [tiny, adapted, lambda: tiny(**CAPPED)])
def test_two_policies_are_compared_by_exact_kl_and_log_probs(model, monkeypatch):
    monkeypatch.setattr(transformer, "LOGITS_AT_ONCE", 60)
    model = model()
    rollout, old = rollout_of(model), copy.deepcopy(model)
    start = {name: p.detach().clone() for name, p in trained_weights(model).items()}
    with torch.no_grad():
        for p in trained_weights(model).values():
            p.add_(torch.randn_like(p) * 0.1)
        log_p, log_q = ((logits_of(m, rollout).double() / T).log_softmax(-1) for m in (old, model))
        want = [response_logprobs(m, rollout, T) for m in (old, model)]
    kl, *found = compare(model, start, rollout, T)
    assert_close(kl.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-4, atol=1e-5)
    assert_close(found, want)
    assert not kl.requires_grad and kl.mean() > 1e-3
