"""Sizes and switches of a transformer: what the families differ in."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F

from rlhf_core.models.rope import check_scaling

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of a Transformer; the defaults make a small Llama."""

    vocab_size: int
    hidden_size: int = 64  # D
    num_layers: int = 2
    num_heads: int = 4  # H
    num_kv_heads: int | None = None  # None: as many as num_heads
    head_dim: int | None = None  # K; None: hidden_size / num_heads
    intermediate_size: int | None = None  # width of the MLP; None: 4 * hidden_size
    max_positions: int = 512  # longest sequence, prompt and response together
    positions: str = "rope"  # "rope" | "learned"
    rope_theta: float = 10000.0
    rope_scaling: dict | None = (
        None  # in config.json's words, with a "rope_type", see models/rope.py
    )
    sliding_window: int | None = (
        None  # a token sees this many, itself included; None: all before it
    )
    norm: str = "rmsnorm"  # "rmsnorm" | "layernorm"
    norm_eps: float = 1e-5
    activation: str = "silu"  # "silu" | "gelu" | "gelu_tanh"
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head's query and key
    mlp_bias: bool = False
    tie_embeddings: bool = True  # the output head is the embedding
    dropout: float = 0.0  # of the embeddings and of what a block adds to them, in train mode only
    attention_dropout: float = 0.0  # of attention's weights
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()  # every id that ends a response
    pad_id: int | None = None
    family: str | None = field(
        default=None, compare=False
    )  # written as one of these, see hub.py; None: the first that fits

    def __post_init__(self):
        for name, allowed in (
            ("positions", ("rope", "learned")),
            ("norm", ("rmsnorm", "layernorm")),
            ("activation", tuple(ACTIVATIONS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_positions")
        may_be_none = ("num_kv_heads", "head_dim", "intermediate_size", "sliding_window")
        for name in (*sizes, *may_be_none):
            value = getattr(self, name)
            if value is None and name in may_be_none:
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number > 0, got {value!r}")
        for name in ("rope_theta", "norm_eps", "dropout", "attention_dropout"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        fill = object.__setattr__
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}"
                )
            fill(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_kv_heads is None:
            fill(self, "num_kv_heads", self.num_heads)
        if self.intermediate_size is None:
            fill(self, "intermediate_size", 4 * self.hidden_size)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")
        if self.rope_scaling is not None:
            check_scaling(self.rope_scaling)

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        return (
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
