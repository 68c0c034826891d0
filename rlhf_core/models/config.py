"""The config of a transformer: the sizes and switches in which the families differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral

from rlhf_core.files import short
from rlhf_core.models.rope import check_rope
from rlhf_core.ops.gated_activation import ACTIVATIONS

MAX_SIZE, MAX_LENGTH = 2**24, 2**31  # so that no number of elements overflows


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of a Transformer. The defaults make a small Llama.

    Attributes:
        vocab_size: Number of token ids, V.
        hidden_size: Width of the residual stream, D.
        num_layers: Number of blocks.
        num_heads: Number of query heads, H.
        num_kv_heads: Number of key and value heads. None means num_heads.
        head_dim: Width of a head, K. None means hidden_size / num_heads.
        intermediate_size: Width of the MLP. None means 4 * hidden_size.
        max_positions: Longest sequence, prompt and response together.
        positions: "rope" or "learned".
        rope_theta: Base of the rotary frequencies.
        rope_scaling: As in config.json, with a "rope_type": see models/rope.py.
        sliding_window: How many tokens a token sees, itself included. None means all before it.
        full_layers: Layers that see all tokens in spite of sliding_window.
        local_rope_theta: rope_theta of layers with a window, which no rope_scaling changes. None
            means that all layers are alike.
        unrotated_layers: Layers without rotary positions.
        partial_rotary_factor: The share of each head that is rotated, from its first element on.
        norm: "rmsnorm", "rmsnorm_plus_one" (the stored weight is the factor minus 1) or
            "layernorm".
        norm_places: Whether norms are at the inputs ("pre") or at the outputs ("post") of attention
            and MLP, or at "both".
        norm_eps: Added to the variance before the square root.
        activation: "silu", "gelu" or "gelu_tanh".
        gated_mlp: Compute down(act(gate(x)) * up(x)) instead of down(act(up(x))).
        qkv_bias: Whether the query, key and value projections have biases.
        out_bias: Whether the output projection of attention has a bias.
        qk_norm: Apply RMSNorm to the query and key of each head.
        qk_norm_whole: Let qk_norm treat the queries of all heads as one vector, and all keys.
        attention_scale: Factor of the attention scores. None means head_dim ** -0.5.
        attention_softcap: Limit c of the attention scores, which become c tanh(scores / c).
        embed_scale: Factor of the embeddings, rounded to their dtype.
        residual_scale: Factor of the outputs of attention and MLP in the residual stream.
        logit_divisor: The logits are divided by it, before logit_softcap applies.
        logit_softcap: Limit c of the logits, which become c tanh(logits / c).
        mlp_bias: Whether the linear layers of the MLP have biases.
        tie_embeddings: Use the embedding as the output head.
        dropout: On the embeddings and on the outputs of attention and MLP, in train mode.
        attention_dropout: On the attention weights, in train mode.
        bos_id: Token id that starts a sequence.
        eos_ids: All token ids that end a response.
        pad_id: Token id of padding.
        family: Which family's files to write: see families.py. None means the first that fits.
    """

    vocab_size: int
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_positions: int = 512
    positions: str = "rope"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    unrotated_layers: tuple[int, ...] = ()
    partial_rotary_factor: float = 1.0
    norm: str = "rmsnorm"
    norm_places: str = "pre"
    norm_eps: float = 1e-5
    activation: str = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    logit_softcap: float | None = None
    mlp_bias: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    attention_dropout: float = 0.0
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    family: str | None = field(default=None, compare=False)

    def __post_init__(self):
        for name, allowed in (
            ("positions", ("rope", "learned")),
            ("norm", ("rmsnorm", "rmsnorm_plus_one", "layernorm")),
            ("norm_places", ("pre", "post", "both")),
            ("activation", tuple(ACTIVATIONS)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {short(value)}")
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions")
        may_be_none = ("num_kv_heads", "head_dim", "intermediate_size", "sliding_window")
        for name in (*sizes, *may_be_none):
            value = getattr(self, name)
            if value is None and name in may_be_none:
                continue
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number > 0, got {short(value)}")
            limit = MAX_LENGTH if name in ("max_positions", "sliding_window") else MAX_SIZE
            if value > limit:
                raise ValueError(f"{name} must be at most {limit}, got {short(value)}")
        for name in ("rope_theta", "norm_eps", "dropout", "attention_dropout"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {short(value)}")
            if "dropout" in name and value > 1:
                raise ValueError(f"{name} must be at most 1, got {short(value)}")
        factors = ("partial_rotary_factor", "embed_scale", "residual_scale", "logit_divisor")
        may_be_none = ("local_rope_theta", "attention_scale", "attention_softcap", "logit_softcap")
        for name in (*factors, *may_be_none):
            value = getattr(self, name)
            if value is None and name in may_be_none:
                continue
            if not _is_number(value) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a finite number > 0, got {short(value)}")
        switches = ("gated_mlp", "qkv_bias", "out_bias", "qk_norm", "mlp_bias", "tie_embeddings")
        for name in (*switches, "qk_norm_whole"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {short(getattr(self, name))}")
        fill = object.__setattr__
        if self.head_dim is None:
            self._check_multiple("hidden_size", "num_heads")
            fill(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_kv_heads is None:
            fill(self, "num_kv_heads", self.num_heads)
        if self.intermediate_size is None:
            fill(self, "intermediate_size", 4 * self.hidden_size)
        if self.attention_scale == self.head_dim**-0.5:
            fill(self, "attention_scale", None)
        self._check_multiple("num_heads", "num_kv_heads")
        for name in ("full_layers", "unrotated_layers"):
            layers = getattr(self, name)
            if not isinstance(layers, tuple) or not all(
                type(i) is int and 0 <= i < self.num_layers for i in layers
            ):
                raise ValueError(f"{name} must be indices of layers, got {short(layers)}")
        if sum(self.qkv_sizes) > MAX_SIZE:
            raise ValueError(
                f"head_dim {self.head_dim} with {self.num_heads} heads makes {sum(self.qkv_sizes)} "
                f"rows of queries, keys and values, more than {MAX_SIZE}"
            )
        rotated = self.rotary_dim
        if self.positions == "rope" and (rotated % 2 or not 0 < rotated <= self.head_dim):
            raise ValueError(
                f"rotary positions need an even number of elements of a head, got {rotated}"
                f" of head_dim {self.head_dim}"
            )
        if self.positions == "rope":
            check_rope(self)
        for name in ("bos_id", "pad_id"):
            value = getattr(self, name)
            if value is not None and not _is_id(value):
                raise ValueError(f"{name} must be a token id, got {short(value)}")
        if not isinstance(self.eos_ids, tuple | list) or not all(map(_is_id, self.eos_ids)):
            raise ValueError(f"eos_ids must be token ids, got {short(self.eos_ids)}")
        if self.pad_id is not None and self.pad_id >= self.vocab_size:
            raise ValueError(
                f"pad_id {self.pad_id} is not in the vocabulary of {self.vocab_size}: choose "
                "another id, any will do"
            )

    def _check_multiple(self, name: str, of: str) -> None:
        value, divisor = getattr(self, name), getattr(self, of)
        if value % divisor:
            raise ValueError(f"{name} {value} is not a multiple of {of} {divisor}")

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Widths of all queries, keys and values of a token."""
        kv = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv, kv

    @property
    def rotary_dim(self) -> int:
        """How many elements of each head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def long_from(self) -> int:
        """The longest sequence that has longrope's short factors: any one without longrope."""
        scaling = self.rope_scaling or {}
        if self.positions != "rope" or scaling.get("rope_type") != "longrope":
            return MAX_LENGTH
        return scaling.get("original_max_position_embeddings") or self.max_positions

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of each layer."""
        full = range(self.num_layers) if self.sliding_window is None else self.full_layers
        return tuple(None if i in full else self.sliding_window for i in range(self.num_layers))

    @cached_property
    def ropes(self) -> tuple[str | None, ...]:
        """The rotary frequencies of each layer, "global" or "local". None means no rotation."""
        unrotated = self.unrotated_layers if self.positions == "rope" else range(self.num_layers)
        local = self.local_rope_theta is not None
        return tuple(
            None if i in unrotated else "local" if local and window else "global"
            for i, window in enumerate(self.windows)
        )


def check_criteria(criteria: Mapping[str, float]) -> None:
    """Raise ValueError unless these are names with finite weights, which are not all 0."""
    if not isinstance(criteria, Mapping) or not criteria:
        raise ValueError(f"criteria must be names with weights, got {short(criteria)}")
    for name, weight in criteria.items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"the name of a criterion must be text, got {short(name)}")
        if not _is_number(weight) or not math.isfinite(weight):
            raise ValueError(f"criterion {name!r} must have a finite weight, got {short(weight)}")
    if not any(criteria.values()):
        raise ValueError("the criteria all have weight 0, so every score would be 0")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_id(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 <= value < 2**63
