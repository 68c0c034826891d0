"""One decoder-only transformer whose config spans GPT-2 and Llama, with a KV cache.

GPT-2: learned positions, LayerNorm, GELU, biases (Radford et al. 2019). Llama: rotary positions, RMSNorm, SwiGLU,
grouped key/value heads (Touvron et al. 2023). Left out: everything about files (hub.py) and sampling (generation.py).

Dropout follows `module.train()`; the trainers keep models in eval mode unless their config asks for it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    norm: str = "rmsnorm"  # "rmsnorm" | "layernorm"
    norm_eps: float = 1e-5
    activation: str = "silu"  # "silu" | "gelu" | "gelu_tanh"
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = True  # the output head is the embedding
    dropout: float = 0.0  # probability, active in train mode only
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()  # every id that ends a response
    pad_id: int | None = None

    def __post_init__(self):
        fill = object.__setattr__
        if self.head_dim is None:
            if self.num_heads < 1 or self.hidden_size % self.num_heads:
                raise ValueError(f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}")
            fill(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_kv_heads is None:
            fill(self, "num_kv_heads", self.num_heads)
        if self.intermediate_size is None:
            fill(self, "intermediate_size", 4 * self.hidden_size)
        for name, allowed in (
            ("positions", ("rope", "learned")),
            ("norm", ("rmsnorm", "layernorm")),
            ("activation", tuple(ACTIVATIONS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        return (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim)


class KVCache:
    """Keys and values of the tokens seen so far, in one allocation for max_length tokens of every layer."""

    def __init__(self, config: TransformerConfig, batch_size: int, max_length: int, like: Tensor):
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)  # (L, B, Hkv, S, K)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, Hkv, T, K) after the tokens seen so far; return all of that layer, (B, Hkv, length + T, K)."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.hidden_size, sum(config.qkv_sizes), bias=config.attention_bias)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, rope, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        B, T, _ = x.shape
        parts = self.qkv(x).split(self.config.qkv_sizes, dim=-1)
        q, k, v = (part.view(B, T, -1, self.config.head_dim).transpose(1, 2) for part in parts)  # (B, H, T, K)
        if rope is not None:
            q, k = _rotate(q, *rope), _rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.config.dropout if self.training else 0.0,
            is_causal=mask is None and T > 1,
            enable_gqa=self.config.num_kv_heads < self.config.num_heads,
        )  # (B, H, T, K)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gated, self.activation = config.gated_mlp, ACTIVATIONS[config.activation]
        width = config.intermediate_size
        self.up = nn.Linear(config.hidden_size, width * (1 + self.gated), bias=config.mlp_bias)  # gate, then up
        self.down = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.down(self.activation(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm1, self.attn = _norm(config), Attention(config)
        self.norm2, self.mlp = _norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x), rope, mask, cache, layer))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Trunk(nn.Module):
    """Everything below the head: token ids to hidden states."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.position = nn.Embedding(config.max_positions, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = _norm(config)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        """GPT-2's initialisation: normal(0, 0.02), what writes to the residual stream scaled by 1/sqrt(2 layers)."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            for linear in (module.attn.out, module.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * self.config.num_layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, D) after the last norm.

        Args:
            input_ids: (B, T).
            attention_mask: (B, S) bool, True = real token, over the cached tokens and these, S = cache.length + T.
                None means that every token is real, or that padding is on the right: a causal model's real
                tokens never see it, and positions count from the left all the same.
            cache: filled by this call; input_ids then holds the new tokens only.
        """
        T = input_ids.shape[1]
        seen = 0 if cache is None else cache.length
        S = seen + T
        if self.config.max_positions < S:
            raise ValueError(f"sequence of {S} tokens is longer than the model's {self.config.max_positions} positions")
        if attention_mask is None:
            positions = torch.arange(seen, S, device=input_ids.device)  # (T,)
        else:
            if attention_mask.shape != (len(input_ids), S):
                raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, not {(len(input_ids), S)}")
            positions = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)[:, seen:]  # (B, T)
        mask = _visible(attention_mask, T, S, input_ids.device)

        x = self.embed(input_ids)  # (B, T, D)
        rope = None
        if self.config.positions == "learned":
            x = x + self.position(positions)
        else:
            rope = _rope(positions, self.config, x.dtype)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache, layer)
        if cache is not None:
            cache.length = S
        return self.norm(x)


class Transformer(nn.Module):
    """A causal language model: trunk + output head, the embedding itself where `tie_embeddings`."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.trunk = Trunk(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=0.02)

    @property
    def config(self) -> TransformerConfig:
        return self.trunk.config

    @property
    def head_weight(self) -> Tensor:
        """(V, D): logits = hidden @ head_weight.T."""
        return self.trunk.embed.weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V); arguments as for `Trunk.forward`."""
        return self.logits(self.trunk(input_ids, attention_mask, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(hidden, self.head_weight)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, dtype: torch.dtype = torch.float32) -> Transformer:
        """Read a folder in the Hugging Face layout: config.json and *.safetensors. Errors: see `hub.load`."""
        from rlhf_core.models import hub

        return hub.load(cls, path, dtype)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write config.json and model.safetensors in the Hugging Face layout."""
        from rlhf_core.models import hub

        hub.save(self, path)


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Dropout off in all of them; afterwards each is in the mode it was in, also after an error."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, mode in zip(models, modes):
            model.train(mode)


def _norm(config: TransformerConfig) -> nn.Module:
    return {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}[config.norm](config.hidden_size, eps=config.norm_eps)


def _visible(attention_mask: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
    """Which of S keys each of the last T tokens sees, (B, 1, T, S) or (T, S); None where plain causality says it."""
    if attention_mask is None and T in (1, S):
        return None
    keys = torch.arange(S, device=device)
    queries = keys[S - T :, None]  # (T, 1)
    visible = keys <= queries
    if attention_mask is None:
        return visible
    # A padding token sees itself: a softmax over nothing would be NaN, and NaN spreads through 0 * NaN.
    return (visible & attention_mask[:, None, None, :]) | (keys == queries)


def _rope(positions: Tensor, config: TransformerConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (1 or B, 1, T, K) of the rotary embedding (Su et al. 2021), Llama's half-split order."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    angles = positions[..., None] / config.rope_theta**exponent  # (..., T, K/2)
    angles = torch.cat((angles, angles), dim=-1)
    angles = angles[None, None] if positions.ndim == 1 else angles[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
