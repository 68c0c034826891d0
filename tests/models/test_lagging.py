"""Lagging copies: they do not train, follow by a share, and hold the frozen weights only once."""

import pytest
import torch
from helpers import adapted, snapshot, tiny

from rlhf_core.models.lagging import follow, lagging_copy, weights


@torch.no_grad()
def moved(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(1.0)


def test_a_copy_computes_the_same_and_has_no_parameters():
    model, ids = tiny(), torch.tensor([[5, 7, 9]])
    slow = lagging_copy(model)
    assert torch.equal(slow(ids), model(ids)) and not list(slow.parameters())
    before = slow(ids)
    moved(model)
    assert torch.equal(slow(ids), before) and not torch.equal(model(ids), before)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_it_moves_towards_the_model_by_the_share(share):
    model = tiny()
    slow = lagging_copy(model)
    before = snapshot(slow)
    moved(model)
    follow(slow, model, share)
    for name, weight in weights(slow, model).items():
        torch.testing.assert_close(weight, before[name] + share)
    assert weights(slow, model).keys() == dict(model.named_parameters()).keys()


def test_frozen_weights_are_shared_and_not_stored_again():
    model = adapted()
    slow = lagging_copy(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert weights(slow, model).keys() == names and all("lora_" in name for name in names)
    buffers = dict(slow.named_buffers())
    for name, parameter in model.named_parameters():
        shares = buffers[name].data_ptr() == parameter.data_ptr()
        assert shares == (name not in names), name
