"""Prompts and decoding steps of a model as one C++ call each.

The hundred small operations of `Transformer.decode` cost more than the arithmetic of a small model,
and a tenth of the time of a large one. The C++ code packs the weights of a small model, with its
adapters folded in. It reads those of other models where they are, and leaves their prompts to
`Transformer`, which is the definition. `Transformer` also runs the models that are left out here:
on GPUs, with hooks, under autocast, or with a switch of `PLAIN`.
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
    RMSNorm,
    RMSNormPlusOne,
    Transformer,
    Trunk,
    TrunkModel,
)
from rlhf_core.ops.linear_rows import MOST_ROWS, linear_rows, quantize_rows

READ_FROM = 2**16  # with fewer weights a layer is in a core's cache, and F.linear is as fast
PANEL = 32  # kPanel in csrc/kernels.h
# Each thread reads all packed weights. With more, splitting every layer over threads is as fast.
MOST_PACKED = 2**22
PLAIN = (  # fields of a TransformerConfig that must have their defaults
    "full_layers", "local_rope_theta", "unrotated_layers", "partial_rotary_factor", "norm_places",
    "qk_norm_whole", "attention_scale", "attention_softcap", "embed_scale", "residual_scale",
    "logit_divisor", "logit_softcap",
)  # fmt: skip
PARTS = {Transformer, Trunk, Block, Attention, MLP, LoRALinear, Adapter, nn.ModuleList}
PARTS |= {nn.Linear, RMSNorm, RMSNormPlusOne, nn.LayerNorm, nn.Embedding, nn.Dropout}
PARTS |= {nn.ModuleDict}


@contextlib.contextmanager
def packed_for_decoding(
    model: TrunkModel, rows: int, weight_dtype: str | None = None
) -> Iterator[TrunkModel | PackedModel]:
    """Yield the model in its fastest form: a PackedModel, or the model as it is.

    On CPUs, the linear layers and the head of other models go through `linear_rows`, so that a few
    rows cost about one read of the weights.

    weight_dtype: "int8" for steps that read weights of 8 bits, see `PackedModel`.

    Raises:
        ValueError: the model has no steps with such weights.
    """
    launch = getattr(backends.resolve(None, model.trunk.embed.weight), "packed_decode_fwd", None)
    if weight_dtype is not None:
        if reason := _no_int8(model, launch is not None):
            raise ValueError(f"weight_dtype {weight_dtype}: {reason}. Leave it out")
        yield PackedModel(model, launch, int8=True)
        return
    if launch is not None and _fits(model, rows):
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
            setattr(owner, method, partial(linear_rows, weight=weight, bias=bias))
        yield model
    finally:
        for owner, method, _, _ in layers:
            owner.__dict__.pop(method, None)  # uncovers the method of the class


class PackedModel:
    """`prefill` and `decode` of a Transformer, up to rounding. No row depends on other rows.

    With `int8`, `decode` multiplies by copies of the linear layers and the head in 8 bits, see
    `quantize_rows`. Embeddings, norms, adapters and prompts keep the weights as they are.
    """

    def __init__(self, model: Transformer, launch: Callable[..., Tensor], *, int8: bool = False):
        config, size = model.config, sum(x.numel() for _, x in _weights(model))
        self.model, self.launch, self.int8 = model, launch, int8
        self.embedding = model.trunk.embed.weight.detach().contiguous()
        small = size <= MOST_PACKED and self.embedding.dtype == torch.float32 and not int8
        self.packed_size = size if small else 0
        self.rank = 0  # the largest of a layer's adapters together
        self.kept: list[Tensor] = []  # what the addresses point to
        self.weights = torch.tensor(self._addresses(), dtype=torch.long)
        self.sizes = (config.num_heads, config.intermediate_size, self.rank, config.activation)
        self.sizes += (config.gated_mlp, config.norm_eps, self.packed_size)

    def prefill(self, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        if not self.packed_size:
            return self.model.prefill(input_ids, lengths, cache)
        return self._run(input_ids, lengths, cache, torch.arange(len(input_ids)))

    def decode(self, token_ids: Tensor, cache: KVCache, slots: Tensor) -> Tensor:
        return self._run(token_ids, None, cache, slots)

    def _run(
        self, token_ids: Tensor, counts: Tensor | None, cache: KVCache, slots: Tensor
    ) -> Tensor:
        trunk, rope = self.model.trunk, (None, None)
        if trunk.config.positions == "rope":
            rope = trunk._rope_tables(cache.max_length, slots.device)
        window = trunk.config.sliding_window  # of all layers
        store, shared = cache.stores[window], cache.shared or (None, None, None)
        limit = cache.max_length if cache.shared is None else store[0].shape[3]
        return self.launch(
            token_ids.contiguous(), counts, self.embedding, self.weights, *store, cache.lengths,
            slots.contiguous(), *rope, window, limit, *shared, *self.sizes,
        )  # fmt: skip

    @torch.no_grad()
    def _addresses(self) -> list[int]:
        """The addresses of the weights, in the order of ModelWeights and LayerWeights."""
        trunk, model = self.model.trunk, self.model
        position = trunk.position.weight if trunk.config.positions == "learned" else None
        addresses = [self._address(self.embedding), self._address(position)]
        addresses += self._norm(trunk.norm) + self._linear(model.head_weight, None)
        for block in trunk.blocks:
            attention, mlp = block.attn, block.mlp
            addresses += self._norm(block.norm1) + self._layer(attention.qkv)
            for name in ("q_norm", "k_norm"):
                addresses += self._norm(getattr(attention, name, None))[:1]
            addresses += self._layer(attention.out) + self._norm(block.norm2)
            addresses += self._layer(mlp.up) + self._layer(mlp.down)
        return addresses

    def _address(self, x: Tensor | None) -> int:
        if x is None:
            return 0
        self.kept.append(x.contiguous())
        return self.kept[-1].data_ptr()

    def _norm(self, norm: nn.Module | None) -> list[int]:
        if norm is None:
            return [0, 0]
        weight, bias = norm.weight.float(), getattr(norm, "bias", None)
        weight = weight + 1 if isinstance(norm, RMSNormPlusOne) else weight
        return [self._address(weight), self._address(None if bias is None else bias.float())]

    def _layer(self, layer: nn.Linear) -> list[int]:
        adapters = layer.adapters if isinstance(layer, LoRALinear) else {}
        if not adapters:
            return self._linear(layer.weight, layer.bias)
        if self.packed_size:
            return self._linear(layer.weight + layer.product(), layer.bias)
        a = torch.cat([adapters[name].lora_A for name in layer.sizes if name in adapters])
        b, start = a.new_zeros(len(layer.weight), len(a)), 0
        for name, rows in zip(layer.sizes, b.split(list(layer.sizes.values()))):
            if name in adapters:
                factor = adapters[name].lora_B
                rows[:, start : start + factor.shape[1]] = factor * adapters[name].config.scale
                start += factor.shape[1]
        return self._linear(layer.weight, layer.bias, a, b)

    def _linear(
        self, weight: Tensor, bias: Tensor | None, a: Tensor | None = None, b: Tensor | None = None
    ) -> list[int]:
        """Addresses of a layer with adapters that add b a x, a (rank, in) and b (out, rank).

        b is packed: its rows are so short that sums over their lanes would take most of the time.
        """
        scales, b = None, None if b is None else _panels(b, None)
        if self.packed_size:
            weight, bias = _panels(weight, bias), None
        if self.int8:
            weight, scales = quantize_rows(weight)
            bias = None if bias is None else bias.float()
        rank = 0 if a is None else len(a)
        self.rank = max(self.rank, rank)
        return [*(self._address(x) for x in (weight, bias, scales, a, b)), rank]


def _weights(model: Transformer) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _no_int8(model: TrunkModel, compiled: bool) -> str:
    """Why the model has no decoding steps with weights of 8 bits, or ""."""
    if model.device.type != "cpu":
        return f"only CPUs decode with it, and the model is on {model.device}"
    if not _fits(model, 1):
        return f"a GPT-2 or Llama without hooks decodes with it, not this {type(model).__name__}"
    return "" if compiled else "it needs the C++ backend, see `rlhf-core info`"


def _fits(model: Transformer, rows: int) -> bool:
    config, modules = model.config, list(model.modules())
    dtype = model.trunk.embed.weight.dtype
    return (
        config.long_from >= config.max_positions
        and all(getattr(config, name) == getattr(TransformerConfig, name) for name in PLAIN)
        and config.activation in ("silu", "gelu_tanh")
        and all(
            type(x) in PARTS and not x._forward_hooks and not x._forward_pre_hooks for x in modules
        )
        and not torch.is_autocast_enabled("cpu")
        and dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (dtype == torch.float32 or rows <= MOST_ROWS)  # else torch's product is faster
        and all(
            type(x) in (Tensor, nn.Parameter) and x.is_cpu and ("lora_" in name or x.dtype == dtype)
            for name, x in _weights(model)
        )
    )


def _panels(weight: Tensor, bias: Tensor | None) -> Tensor:
    """(out, in) to (out / PANEL, 1 + in, PANEL), zero-padded: a panel's bias, then its weights."""
    rows = F.pad(weight, (1, 0, 0, -len(weight) % PANEL))
    if bias is not None:
        rows[: len(bias), 0] = bias
    return rows.unflatten(0, (-1, PANEL)).transpose(1, 2)
