"""Copies of frozen weights: made once, never stale, and without effect on any bit."""

import contextlib

import pytest
import torch
from helpers import KINDS, make_trainer, rows, snapshot, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_core.models import ILQLModel, Transformer
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.models.low_precision import FrozenCopies

IDS = torch.tensor([[5, 3, 7, 4]])


def adapted(kind="sft", **options):
    model = tiny(KINDS[kind][2], **options)
    torch.manual_seed(1)
    add_adapters(model, LoRAConfig(rank=2))
    return model


class Casts(TorchDispatchMode):
    """Counts the tensors of at least 100 numbers that become bfloat16."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(
    "kind, options",
    [("sft", {}), ("sft", dict(label_smoothing=0.1, z_coef=0.01)), ("dpo", {}), ("reward", {})],
)
@pytest.mark.parametrize("tied", [True, False])
def test_copies_change_no_bit_of_a_run(kind, options, tied, monkeypatch):
    def trained():
        model = adapted(kind, tie_embeddings=tied)
        trainer = make_trainer(kind, model, precision="bfloat16", max_steps=3, **options)
        history = trainer.train()
        return [x["loss"] for x in history], snapshot(trainer.model)

    losses, weights = trained()
    monkeypatch.setattr(FrozenCopies, "used_by", lambda self, model: contextlib.nullcontext())
    losses_without, weights_without = trained()
    assert losses == losses_without
    assert all(torch.equal(weights[name], weights_without[name]) for name in weights_without)


def test_frozen_weights_are_copied_in_the_first_step_only():
    trainer = make_trainer("sft", adapted(), precision="bfloat16")
    frozen = {tuple(p.shape) for p in trainer.model.parameters() if not p.requires_grad}
    trained = {tuple(p.shape) for p in trainer.trained_parameters()}
    counts = []
    for _ in range(2):
        with Casts() as casts:
            trainer.step(rows("sft"))
        counts.append(sum(shape in frozen - trained for shape in casts.shapes))
    assert counts[0] > 4 and counts[1] == 0


def test_a_weight_that_changed_or_trains_again_is_not_read_from_its_copy():
    model, copies = adapted(), FrozenCopies(torch.bfloat16)
    inner = model.trunk.blocks[0].mlp.down

    def logits():
        with torch.no_grad(), copies.used_by(model), torch.autocast("cpu", torch.bfloat16):
            return model(IDS)

    before = logits()
    with torch.no_grad():
        inner.weight.mul_(-3)
        model.head_weight.mul_(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(IDS)
    assert torch.equal(logits(), expected) and not torch.equal(expected, before)

    inner.weight.requires_grad_()
    with copies.used_by(model), torch.autocast("cpu", torch.bfloat16):
        model(IDS).sum().backward()
    assert inner.weight.grad.abs().sum() > 0


def test_the_weights_come_back_after_an_error():
    model = adapted()
    weights = dict(model.named_parameters())
    with pytest.raises(KeyError), FrozenCopies(torch.bfloat16).used_by(model):
        assert model.trunk.blocks[0].mlp.up.weight.dtype == torch.bfloat16
        assert model.trunk.embed.weight.dtype == torch.float32
        raise KeyError
    assert all(weights[name] is p for name, p in model.named_parameters())
    assert model.head_copy is None


def test_weights_that_train_or_have_another_dtype_stay():
    for model in (tiny(Transformer), tiny(Transformer).requires_grad_(False).bfloat16()):
        weights = dict(model.named_parameters())
        with FrozenCopies(torch.bfloat16).used_by(model):
            assert all(weights[name] is p for name, p in model.named_parameters())
            assert model.head_copy is None


def test_heads_that_compute_in_float32_keep_their_weights():
    model = ILQLModel(adapted()).requires_grad_(False)
    heads = {id(p) for part in (model.q, model.v) for p in part.parameters()}
    trunk = {id(p) for p in model.trunk.parameters()}
    with FrozenCopies(torch.bfloat16).used_by(model):
        now = {id(p) for p in model.parameters()}
        assert heads <= now and not trunk <= now
