"""The masked policy: no probability outside the lagging copy's top-p set, and one distribution."""

import pytest
import torch
from helpers import tiny
from torch.testing import assert_close

from rlhf_core.generation import generate
from rlhf_core.models.lagging import follow
from rlhf_core.models.masked import MaskedHead, MaskedPolicy

IDS = torch.tensor([[5, 7, 9, 4], [8, 6, 1, 10]])


@torch.no_grad()
def masked(top_p=0.6):
    """A policy that has moved away from its copy."""
    policy = MaskedPolicy(tiny(noise=0.4), top_p, temperature=0.8)
    for parameter in policy.policy.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return policy


def hidden_of(policy):
    model = policy.policy
    return tuple(m.hidden_states(IDS).flatten(0, 1) for m in (model, policy.lagging))


@torch.no_grad()
@pytest.mark.parametrize("top_p", [0.3, 0.6, 1.0])
def test_the_mask_is_the_top_p_set_of_the_copy(top_p):
    policy = masked(top_p)
    mine, slow = hidden_of(policy)
    allowed = policy.logits(mine, slow).isfinite()
    p = (policy.lagging.logits(slow) / 0.8).softmax(-1)
    ranked, order = p.sort(dim=-1, descending=True)
    before = ranked.cumsum(-1) - ranked  # probability of the tokens that are likelier
    want = torch.zeros_like(allowed).scatter(1, order, before < top_p)
    assert torch.equal(allowed, want) and allowed.any(-1).all()
    assert allowed.all() == (top_p == 1)
    kept = policy.logits(mine, slow)[allowed]
    assert torch.equal(kept, policy.policy.logits(mine)[allowed])


@torch.no_grad()
def test_a_taken_token_stays_allowed():
    policy = masked(0.3)
    mine, slow = hidden_of(policy)
    taken = policy.logits(mine, slow).argmin(dim=-1)  # outside the mask
    logits = policy.logits(mine, slow, taken)
    assert logits[range(8), taken].isfinite().all()
    assert (logits.isfinite().sum(-1) == policy.logits(mine, slow).isfinite().sum(-1) + 1).all()


@torch.no_grad()
def test_sampled_tokens_are_allowed_and_have_the_log_probs_of_the_head():
    policy = masked(0.5)
    generator = torch.Generator().manual_seed(0)
    response = generate(
        policy, IDS, max_new_tokens=6, temperature=0.8, eos_ids=(), generator=generator
    )
    ids = torch.cat((IDS, response.response_ids), dim=1)
    mine, slow = (m.hidden_states(ids)[:, 3:-1].flatten(0, 1) for m in (policy, policy.lagging))
    targets = response.response_ids.flatten()
    got = MaskedHead(policy, slow).token_logprobs(mine, targets, temperature=0.8)
    assert got.logprobs.isfinite().all()
    assert_close(got.logprobs, response.logprobs.flatten(), rtol=0, atol=1e-5)
    log_p = (policy.logits(mine, slow, targets) / 0.8).log_softmax(-1)
    assert_close(got.entropy, -(log_p.exp() * log_p).nan_to_num(0).sum(-1), rtol=0, atol=1e-5)


def test_gradients_reach_the_policy_and_not_the_copy():
    policy = masked()
    mine, slow = hidden_of(policy)
    targets = policy.logits(mine, slow).argmax(dim=-1)
    losses = lambda tokens, rows: (-tokens.logprobs[rows].sum(),)  # noqa: E731
    (loss,) = MaskedHead(policy, slow).token_loss(mine, targets, losses)
    loss.backward()
    assert all(p.grad is not None for p in policy.policy.parameters())
    assert not list(policy.lagging.parameters())


@torch.no_grad()
def test_the_mask_follows_the_policy_when_the_copy_does():
    policy = masked(0.5)
    follow(policy.lagging, policy.policy)
    mine, _ = hidden_of(policy)
    top = policy.policy.logits(mine).argmax(dim=-1)
    assert policy.logits(mine, mine)[range(8), top].isfinite().all()
