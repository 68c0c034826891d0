"""Prompts and decoding steps of a small model as one C++ call each, on a copy of its weights.

If all weights are in a core's cache, the hundred small operations of `Transformer.decode` cost more
than their arithmetic. Adapters are folded into the copy. `Transformer` is the definition. It also
runs the models that are left out here: on GPUs, in 16 bits, with hooks, under autocast, with more
than `MOST_WEIGHTS` weights, learned positions, longrope, LayerNorm, a plain MLP, or a switch of
`PLAIN`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_core import backends
from rlhf_core.models.config import TransformerConfig
from rlhf_core.models.lora import Adapter, LoRALinear
from rlhf_core.models.transformer import (
    MLP,
    Attention,
    Block,
    KVCache,
    Transformer,
    Trunk,
    TrunkModel,
)
from rlhf_core.ops.linear_rows import linear_rows

READ_FROM = 2**16  # with fewer weights a layer is in a core's cache, and F.linear is as fast
FEW_ROWS = 16  # up to here reading float32 weights takes longer than multiplying by them
PANEL = 32  # kPanel in csrc/kernels.h
# Each thread reads all weights. With more weights, splitting every layer over threads is as fast.
MOST_WEIGHTS = 2**22
PLAIN = (  # fields of a TransformerConfig that must have their defaults
    "full_layers", "local_rope_theta", "unrotated_layers", "partial_rotary_factor", "norm",
    "norm_places", "activation", "gated_mlp", "qk_norm_whole", "attention_scale",
    "attention_softcap", "embed_scale", "residual_scale", "logit_divisor", "logit_softcap",
)  # fmt: skip
PARTS = {Transformer, Trunk, Block, Attention, MLP, LoRALinear, Adapter, nn.ModuleList}
PARTS |= {nn.Linear, nn.RMSNorm, nn.Embedding, nn.Dropout, nn.ModuleDict}


@contextlib.contextmanager
def packed_for_decoding(model: TrunkModel, rows: int) -> Iterator[TrunkModel | PackedModel]:
    """Yield the model in its fastest form: a small model as a PackedModel, any other as it is.

    On CPUs, the linear layers and the head of other models go through `linear_rows`, so that a few
    rows cost about one read of the weights. With more than FEW_ROWS rows, arithmetic takes longer
    than that, and float32 layers use copies of their weights in oneDNN's own layout.
    """
    launch = getattr(backends.resolve(None, model.trunk.embed.weight), "packed_decode_fwd", None)
    if launch is not None and _fits(model):
        yield PackedModel(model, launch)
        return
    layers = []
    for module in model.modules() if launch is not None else ():
        if not isinstance(module, Transformer):  # the model, or a part of it
            continue
        layers.append((module, "project", module.head_weight, None))
        for linear in module.trunk.modules():
            if type(linear) in (nn.Linear, LoRALinear):
                method = "forward" if type(linear) is nn.Linear else "base"
                layers.append((linear, method, linear.weight, linear.bias))
    layers = [layer for layer in layers if layer[2].numel() >= READ_FROM]
    try:
        for owner, method, weight, bias in layers:
            is_copied = rows > FEW_ROWS and weight.dtype == torch.float32
            linear = _copied_linear(weight, bias) if is_copied else None
            linear = linear or partial(linear_rows, weight=weight, bias=bias)
            setattr(owner, method, linear)
        yield model
    finally:
        for owner, method, _, _ in layers:
            owner.__dict__.pop(method, None)  # uncovers the method of the class


def _copied_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """The layer on a copy of its weight in oneDNN's layout; None without oneDNN."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    weight = torch.ops.mkldnn._reorder_linear_weight(weight)
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda x: linear(x, weight, bias, "none", [], "")


class PackedModel:
    """`prefill` and `decode` of a Transformer, up to rounding. No row depends on other rows."""

    def __init__(self, model: Transformer, launch: Callable[..., Tensor]):
        config = model.config
        self.launch, self.weights = launch, _weights(model)
        self.embedding = model.trunk.embed.weight.contiguous()
        self.rope_tables, self.window = model.trunk._rope_tables, config.sliding_window
        self.sizes = config.num_heads, config.intermediate_size, config.qk_norm, config.norm_eps

    def prefill(self, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        samples = len(cache.lengths) // len(input_ids)
        logits = self._run(input_ids, lengths, cache, torch.arange(0, len(cache.lengths), samples))
        if samples > 1:
            for store in cache.stores[self.window]:
                filled = store[:, :, :, : input_ids.shape[1]]
                rows = filled.unflatten(1, (-1, samples))  # (L, B, N / B, Hkv, P, K)
                rows[:, :, 1:] = rows[:, :, :1]
            cache.lengths[:] = lengths.repeat_interleave(samples)
        return logits

    def decode(self, token_ids: Tensor, cache: KVCache, slots: Tensor) -> Tensor:
        return self._run(token_ids, None, cache, slots)

    def _run(
        self, token_ids: Tensor, counts: Tensor | None, cache: KVCache, slots: Tensor
    ) -> Tensor:
        rope, store = self.rope_tables(cache.max_length, slots.device), cache.stores[self.window]
        return self.launch(
            token_ids.contiguous(), counts, self.embedding, self.weights, *store, cache.lengths,
            slots.contiguous(), *rope, self.window, cache.max_length, *self.sizes,
        )  # fmt: skip


def _fits(model: Transformer) -> bool:
    config, modules = model.config, list(model.modules())
    weights = [*model.parameters(), *model.buffers()]
    return (
        config.positions == "rope"
        and config.long_from >= config.max_positions
        and all(getattr(config, name) == getattr(TransformerConfig, name) for name in PLAIN)
        and sum(x.numel() for x in weights) <= MOST_WEIGHTS
        and all(x.dtype == torch.float32 for x in weights)
        and all(
            type(x) in PARTS and not x._forward_hooks and not x._forward_pre_hooks for x in modules
        )
        and not torch.is_autocast_enabled("cpu")
    )


@torch.no_grad()
def _weights(model: Transformer) -> Tensor:
    parts = []
    for block in model.trunk.blocks:
        attention, mlp = block.attn, block.mlp
        parts += [block.norm1.weight, _linear(attention.qkv)]
        if model.config.qk_norm:
            parts += [attention.q_norm.weight, attention.k_norm.weight]
        parts += [_linear(attention.out), block.norm2.weight, _linear(mlp.up), _linear(mlp.down)]
    parts += [model.trunk.norm.weight, _panels(model.head_weight, None)]
    return torch.cat([part.flatten() for part in parts])


def _linear(layer: nn.Linear) -> Tensor:
    adapted = isinstance(layer, LoRALinear)
    return _panels(layer.weight + layer.product() if adapted else layer.weight, layer.bias)


def _panels(weight: Tensor, bias: Tensor | None) -> Tensor:
    """(out, in) to (out / PANEL, 1 + in, PANEL), zero-padded: a panel's bias, then its weights."""
    rows = F.pad(weight, (1, 0, 0, -len(weight) % PANEL))
    if bias is not None:
        rows[: len(bias), 0] = bias
    return rows.unflatten(0, (-1, PANEL)).transpose(1, 2)
