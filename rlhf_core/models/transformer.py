"""A decoder-only transformer with a KV cache. Its config makes it a GPT-2, a Llama, a Gemma, ...

GPT-2 has learned positions, LayerNorm, GELU and biases (Radford et al. 2019). Llama has rotary
positions, RMSNorm, SwiGLU and grouped key/value heads (Touvron et al. 2023). The other families are
Llamas with a few switches: see families.py. Left out: files (hub.py) and sampling (generation.py).

Dropout is on in train mode. Trainers keep models in eval mode unless their config sets dropout.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_core.checks import at_least_float32
from rlhf_core.models.config import TransformerConfig
from rlhf_core.models.gather import check_whole
from rlhf_core.models.lora import merged_state
from rlhf_core.models.packed_attention import additive, parts_of
from rlhf_core.models.pretrained import Pretrained
from rlhf_core.models.rope import rope_tables
from rlhf_core.ops.decode_attention import decode_attention
from rlhf_core.ops.gated_activation import ACTIVATIONS, gated_activation
from rlhf_core.ops.linear_logprobs import (
    Losses,
    TokenStatistics,
    linear_token_logprobs_and_entropy,
    linear_token_loss,
)
from rlhf_core.ops.linear_loss import LogitLosses, linear_loss
from rlhf_core.ops.logprobs import token_logprobs_and_entropy
from rlhf_core.ops.rms_norm import rms_norm
from rlhf_core.ops.rotary import rotary, rotary_factors

LOGITS_AT_ONCE = 2**24
# Queries of a head up to which attention is computed in float32 on CPU: PyTorch's backward pass in
# 16 bits takes up to three times as long.
SHORT_HEAD = 192 * 64


class KVCache:
    """Keys and values of `batch_size` sequences of at most `max_length` tokens, in all layers.

    A layer with a window keeps only as many tokens as its window, S, and token t at index t % S.
    The other layers keep all. Row n has lengths[n] tokens. What is at an index without a token is
    undefined and never read.

    Attributes:
        stores: By window: the keys and values, each (layers, N, Hkv, S, K), of all its layers.
        layers: By layer: its keys and values, each (N, Hkv, S, K), views of `stores`.
        shared: Of layers without a window: keys and values (layers, M, Hkv, P, K), and number (M,),
            of the first tokens of the rows, which N / M rows share. `stores` hold the tokens after
            them, from index 0 on. None: `stores` hold all.
        lagging: The cache of a `MaskedPolicy`'s lagging copy.
    """

    shared: tuple[Tensor, Tensor, Tensor] | None = None
    lagging: KVCache | None = None

    def __init__(
        self,
        config: TransformerConfig,
        batch_size: int,
        max_length: int,
        like: Tensor,
        shared_length: int = 0,
    ):
        """shared_length: P of `shared`, which has no memory here."""
        self.config, self.max_length = config, max_length
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=like.device)
        self.stores: dict[int | None, tuple[Tensor, Tensor]] = {}
        for window in set(config.windows):
            S = max_length - shared_length if window is None else min(window, max_length)
            count = config.windows.count(window)
            shape = (count, batch_size, config.num_kv_heads, S, config.head_dim)
            self.stores[window] = like.new_empty(shape), like.new_empty(shape)
        pairs = {window: zip(*stores) for window, stores in self.stores.items()}
        self.layers: list[tuple[Tensor, Tensor]] = [next(pairs[x]) for x in config.windows]

    def continued(self, samples: int, max_length: int) -> KVCache:
        """Return a cache of `samples` rows for each of these rows, which share its tokens.

        Layers without a window read them here, so this cache must not change any more. The others
        copy them.
        """
        like, N = next(iter(self.stores.values()))[0], len(self.lengths) * samples
        cache = KVCache(self.config, N, max_length, like, self.max_length)
        cache.lengths[:] = self.lengths.repeat_interleave(samples)
        for window, pair in self.stores.items():
            if window is None:
                cache.shared = *pair, self.lengths
                continue
            for store, rows in zip(cache.stores[window], pair):
                store[:, :, :, : rows.shape[3]] = rows.repeat_interleave(samples, dim=1)
        if self.lagging is not None:
            cache.lagging = self.lagging.continued(samples, max_length)
        return cache

    def shared_in(self, layer: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys and values (M, Hkv, P, K) and number (M,) of a layer's shared tokens, if any."""
        if self.shared is None or self.config.windows[layer] is not None:
            return None
        keys, values, lengths = self.shared
        at = self.config.windows[:layer].count(None)
        return keys[at], values[at], lengths

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Store the tokens of k and v (N, Hkv, T, K)."""
        for store, x in zip(self.layers[layer], (k, v)):
            S = store.shape[2]
            if x.shape[2] > S:  # index i gets the last of the tokens i, i + S, i + 2 S, ...
                last = self.lengths[:, None] - 1  # (N, 1)
                at = last - (last - torch.arange(S, device=x.device)) % S  # (N, S)
                x = x.take_along_dim(at.clamp_min(0)[:, None, :, None], dim=2)
            store[:, :, : x.shape[2]] = x

    def replace(self, slots: list[int], other: KVCache) -> None:
        """Take keys and values of the rows `slots` from a cache of the same model and size.

        The rows share equally many tokens, and are all that read these tokens.
        """
        for window, pair in self.stores.items():
            for i, (store, rows) in enumerate(zip(pair, other.stores[window])):
                if window is None and self.shared is not None:
                    lengths = self.shared[2]
                    owners = torch.tensor(slots) // (len(self.lengths) // len(lengths))
                    first = int(lengths[owners[0]])
                    self.shared[i][:, owners, :, :first] = rows[:, :, :, :first]
                    rows = rows[:, :, :, first : first + store.shape[3]]
                store[:, slots, :, : rows.shape[3]] = rows
        if self.lagging is not None:
            self.lagging.replace(slots, other.lagging)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.hidden_size, sum(config.qkv_sizes), bias=config.qkv_bias)
        self.out = nn.Linear(config.qkv_sizes[0], config.hidden_size, bias=config.out_bias)
        if config.qk_norm:
            whole, head = config.qkv_sizes[:2], (config.head_dim, config.head_dim)
            q_size, k_size = whole if config.qk_norm_whole else head
            norm = RMSNormPlusOne if config.norm == "rmsnorm_plus_one" else RMSNorm
            self.q_norm = norm(q_size, eps=config.norm_eps)
            self.k_norm = norm(k_size, eps=config.norm_eps)

    def forward(
        self,
        x: Tensor,
        rope,
        mask: Tensor | Callable[..., Tensor] | None,
        cache: KVCache | None,
        layer: int,
        read: Tensor | None,
    ) -> Tensor:
        """mask: A bias (B, 1, T, T), or `Parts.attend` with the biases of the parts."""
        q, k, v = self._project(x)  # (B, T, H, K)
        if rope is not None:
            q, k = rotary(q, *rope), rotary(k, *rope)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, K)
        if cache is not None:
            cache.fill(layer, k, v)
        if self.config.attention_softcap is not None:
            y = self._capped_attention(q, k, v, mask)
        elif callable(mask):
            y = mask(self._attention, q, k, v)
        else:
            y = self._attention(q, k, v, mask)
        return self.out(_only(y.transpose(1, 2).flatten(2), read))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if q.is_cpu and q.shape[2:].numel() <= SHORT_HEAD:
            wide = at_least_float32(q, k, v)
            with torch.autocast("cpu", enabled=False):
                return self._fused_attention(*wide, mask).to(q.dtype)
        return self._fused_attention(q, k, v, mask)

    def _fused_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask if mask is None else mask.to(q.dtype),
            dropout_p=self.config.attention_dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=self.config.attention_scale,
            enable_gqa=self.config.num_kv_heads < self.config.num_heads,
        )  # (B, H, T, K)

    def _capped_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attention with `attention_softcap`. It makes all (T, T) scores of a head."""
        config = self.config
        q = q.unflatten(1, (config.num_kv_heads, -1))  # (B, Hkv, H / Hkv, T, K)
        scale = config.attention_scale or config.head_dim**-0.5
        scores = q @ k[:, :, None].transpose(-1, -2) * scale
        scores = _softcap(scores, config.attention_softcap) + mask[:, :, None]
        p = at_least_float32(scores)[0].softmax(-1).to(q.dtype)
        p = F.dropout(p, config.attention_dropout, self.training)
        return (p @ v[:, :, None]).flatten(1, 2)  # (B, H, T, K)

    def decode(self, x: Tensor, rope, cache: KVCache, layer: int, slots: Tensor) -> Tensor:
        """Attend from x (B, D), the next token of cache rows `slots`, to the tokens before it."""
        config, (q, k, v) = self.config, self._project(x)
        if rope is not None and config.partial_rotary_factor != 1:
            rope = rotary_factors(*(t[cache.lengths[slots]][:, None].to(x.dtype) for t in rope))
            q, k, rope = rotary(q, *rope), rotary(k, *rope), None
        if config.attention_scale is not None:
            q = q * (config.attention_scale * math.sqrt(config.head_dim))
        options = dict(window=config.windows[layer], softcap=config.attention_softcap)
        options["shared"] = cache.shared_in(layer)
        store = *cache.layers[layer], cache.lengths, slots
        y = decode_attention(q, k, v, *store, rope=rope, **options)
        return self.out(y.flatten(1))  # (B, H, K) -> (B, D)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (..., D) to q (..., H, K), k and v (..., Hkv, K)."""
        config, qkv = self.config, self.qkv(x)
        if config.qk_norm_whole:
            q, k, v = qkv.split(config.qkv_sizes, dim=-1)
            parts = self.q_norm(q), self.k_norm(k), v
            return tuple(part.unflatten(-1, (-1, config.head_dim)) for part in parts)
        heads, kv = qkv.unflatten(-1, (-1, config.head_dim)), config.num_kv_heads
        q, k, v = heads.split((config.num_heads, kv, kv), dim=-2)
        return (self.q_norm(q), self.k_norm(k), v) if config.qk_norm else (q, k, v)


class MLP(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.gated, self.activation = config.gated_mlp, config.activation
        width = config.intermediate_size
        rows = 2 * width if self.gated else width  # gate, then up
        self.up = nn.Linear(config.hidden_size, rows, bias=config.mlp_bias)
        self.down = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down(gated_activation(self.up(x), self.activation))
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        pre, post = config.norm_places != "post", config.norm_places != "pre"
        self.norm1 = _norm(config) if pre else nn.Identity()
        self.attn = Attention(config)
        self.post_norm1 = _norm(config) if post else None
        self.norm2 = _norm(config) if pre else nn.Identity()
        self.mlp = MLP(config)
        self.post_norm2 = _norm(config) if post else None
        self.residual_scale = config.residual_scale
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, *context) -> Tensor:
        """Map (B, T, D) to (B, T, D), or to (M, D) of the tokens at `read`, the last of `context`.

        context: The other arguments of `Attention.forward`.
        """
        y = self._finish(self.attn(_normed(self.norm1, x), *context), self.post_norm1)
        x = _only(x, context[-1]) + self.dropout(y)
        return x + self.dropout(self._finish(self.mlp(_normed(self.norm2, x)), self.post_norm2))

    def decode(self, x: Tensor, *context) -> Tensor:
        """Map (B, D) to (B, D). context: The other arguments of `Attention.decode`."""
        x = x + self._finish(self.attn.decode(_normed(self.norm1, x), *context), self.post_norm1)
        return x + self._finish(self.mlp(_normed(self.norm2, x)), self.post_norm2)

    def _finish(self, y: Tensor, post_norm: nn.Module | None) -> Tensor:
        """Map the output of attention or MLP to what it adds to the residual stream."""
        if post_norm is not None:
            y = post_norm(y)
        return y if self.residual_scale == 1 else y * self.residual_scale


class Trunk(nn.Module):
    """Everything below the head: token ids to hidden states.

    With `checkpointing`, a block keeps only its input for the backward pass and recomputes the rest
    (Chen et al. 2016).
    """

    checkpointing = False

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.position = nn.Embedding(config.max_positions, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = _norm(config)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        """Initialise as GPT-2: std 0.02, divided by sqrt(2 layers) before residual additions."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, Block):
            for linear in (module.attn.out, module.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * self.config.num_layers))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        visible: Tensor | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states (B, T, D) after the last norm, or (M, D) of the tokens at `read`.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T) bool, True = real token. Positions count real tokens. None means
                that all tokens are real, or that padding is on the right, unseen by real tokens.
            positions: (B, T) int64, the position of each token in its sequence, for rows that hold
                several sequences. Use it with `visible`, instead of attention_mask.
            visible: (B, T, T) bool, True where a token sees another token (last axis) or itself.
            read: (M,) int64, indices of the wanted tokens among the B * T. The last block computes
                only keys and values of the others, which saves most of its time if M is small.
        """
        T, device = input_ids.shape[1], input_ids.device
        mask = None
        if visible is not None:
            mask = visible
        elif attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                shapes = f"{tuple(attention_mask.shape)}, not {tuple(input_ids.shape)}"
                raise ValueError(f"attention_mask has shape {shapes}")
            positions = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)  # (B, T)
            # Padding tokens see themselves: a softmax over nothing is NaN, and 0 * NaN spreads it.
            itself = torch.eye(T, dtype=torch.bool, device=device)
            mask = _causal(T, device) & attention_mask[:, None, :] | itself
        else:
            positions = torch.arange(T, device=device)[None]  # (1, T)
        inputs, packed = (input_ids, positions, mask, read), visible is not None
        x = self._run(*inputs, packed=packed)
        if self.config.long_from >= T:
            return x
        # longrope: a token's own position decides, as when the next one is sampled. Later tokens
        # and other rows do not, so each token keeps the log-prob that it was sampled with.
        every = torch.ones((), dtype=torch.bool, device=device)
        long = self._run(*inputs, packed=packed, long=every)
        early = positions.expand(input_ids.shape) < self.config.long_from  # (B, T)
        return torch.where(_only(early[..., None], read), x, long)

    def prefill(self, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        """Return hidden states (B, D) of the last tokens of B prompts, and fill the cache.

        Args:
            input_ids: (B, P), padded on the right.
            lengths: (B,) int64, the number of real tokens of each prompt, at least 1.
            cache: Empty, of B rows.
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        B, P = input_ids.shape
        last = torch.arange(B, device=input_ids.device) * P + lengths - 1
        cache.lengths[:] = lengths
        long = lengths > self.config.long_from
        long = long[:, None, None, None] if self.config.long_from < P else None
        return self._run(input_ids, positions, None, last, cache, long=long)

    def decode(self, token_ids: Tensor, cache: KVCache, slots: Tensor) -> Tensor:
        """Append one token (B,) to the cache rows `slots` (B,). Return its hidden states (B, D)."""
        x = self._embed(token_ids)  # (B, D)
        if self.config.positions == "learned":
            x = x + self.position(cache.lengths[slots])
        ropes = {
            kind: kind and self._rope_tables(cache.max_length, x.device, kind)
            for kind in set(self.config.ropes)
        }
        for layer, block in enumerate(self.blocks):
            x = block.decode(x, ropes[self.config.ropes[layer]], cache, layer, slots)
        cache.lengths[slots] += 1
        return self.norm(x)

    def _run(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        read: Tensor | None,
        cache: KVCache | None = None,
        packed: bool = False,
        long: Tensor | None = None,
    ) -> Tensor:
        """mask: (B, T, T) bool as `visible`. None means causal. packed: Rows hold several sequences
        and can therefore be longer than max_positions. long: () or (B, 1, 1, 1) bool, True for rows
        that have the long factors of longrope."""
        config, (B, T) = self.config, input_ids.shape
        limit = config.max_positions
        if limit < T and not packed:
            raise ValueError(f"sequence of {T} tokens is longer than the model's {limit} positions")
        parts = parts_of(mask, config) if packed else None
        masks = {window: self._mask(mask, window, positions, T) for window in set(config.windows)}
        if parts is not None:  # all rows become one, (1, B * T)
            input_ids, positions = input_ids.reshape(1, -1), positions.reshape(1, -1)
        x = self._embed(input_ids)  # (B, T, D)
        if config.positions == "learned":
            x = x + self.position(positions)
        biases, ropes = {}, {None: None}  # made once for all layers of a kind
        for window, visible in masks.items():
            if parts is not None:
                biases[window] = partial(parts.attend, biases=parts.biases(visible, x.dtype))
            else:
                biases[window] = None if visible is None else additive(visible, x.dtype)[:, None]
        for kind in set(config.ropes) - {None}:
            tables = self._rope_tables(min(T, limit), x.device, kind)
            rows = [table[positions][:, :, None] for table in tables]
            if long is not None and kind == "global":
                tables = self._rope_tables(min(T, limit), x.device, "long")
                long_rows = [table[positions][:, :, None] for table in tables]
                rows = [torch.where(long, *pair) for pair in zip(long_rows, rows)]
            ropes[kind] = rotary_factors(*(row.to(x.dtype) for row in rows))
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            rope, bias = ropes[config.ropes[layer]], biases[config.windows[layer]]
            context = rope, bias, cache, layer, read if layer == len(self.blocks) - 1 else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *context, use_reentrant=False)
            else:
                x = block(x, *context)
        return self.norm(x if read is not None else x.view(B, T, -1))  # FSDP2 takes no view

    def _embed(self, token_ids: Tensor) -> Tensor:
        x, scale = self.embed(token_ids), self.config.embed_scale
        return x if scale == 1 else x * float(torch.tensor(scale, dtype=x.dtype, device="cpu"))

    def _mask(
        self, mask: Tensor | None, window: int | None, positions: Tensor, T: int
    ) -> Tensor | None:
        """Return `mask` within a window, (B, T, T) bool.

        None stands for a causal mask without a window, which attention needs no bias for.
        """
        windowed = window is not None and window < T
        if mask is None and (windowed or self.config.attention_softcap is not None):
            mask = _causal(T, positions.device)[None]
        if windowed:
            mask = mask & (positions[:, :, None] - positions[:, None, :] < window)
        return mask

    def _rope_tables(
        self, length: int, device: torch.device, kind: str = "global"
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin (S, K/2) float32 of at least `length` positions. They are cached."""
        tables = self._tables.get(kind)
        if tables is None or len(tables[0]) < length or tables[0].device != device:
            size = min(self.config.max_positions, 1 << (length - 1).bit_length())
            cos, sin = rope_tables(self.config, size, kind)
            tables = self._tables[kind] = cos.to(device), sin.to(device)
        return tables


class TrunkModel(nn.Module):
    """A model with a `trunk`. Code outside models/ reaches the trunk through these methods only."""

    @property
    def config(self) -> TransformerConfig:
        return self.trunk.config

    @property
    def device(self) -> torch.device:
        return self.trunk.embed.weight.device

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **packing: Tensor
    ) -> Tensor:
        """Return hidden states (B, T, D), or (M, D) at `read`. Arguments as in `Trunk.forward`."""
        return self.trunk(input_ids, attention_mask, **packing)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """Return an empty cache for `batch_size` sequences of at most `max_length` tokens."""
        return KVCache(self.config, batch_size, max_length, self.trunk.embed.weight)

    @torch.no_grad()
    def resize_embeddings(self, vocab_size: int) -> None:
        """Add rows to the embedding, and to an untied head, each the mean of the rows before.

        Raises:
            ValueError: The model has more ids already, or adapters, whose files lack new rows.
        """
        check_whole(self, "Add tokens before you shard it")
        trunk, old = self.trunk, self.config.vocab_size
        if vocab_size < old:
            raise ValueError(f"vocab_size {vocab_size} is smaller than the model's {old}")
        if any("lora_" in name for name, _ in self.named_parameters()):
            raise ValueError("a model with adapters cannot get new ids; merge the adapters first")
        for table in (trunk.embed, getattr(self, "lm_head", None)):
            if table is not None:
                weight = table.weight
                new = weight.mean(dim=0, keepdim=True).expand(vocab_size - old, -1)
                table.weight = nn.Parameter(torch.cat((weight, new)), weight.requires_grad)
        trunk.embed.num_embeddings = vocab_size
        trunk.config = replace(trunk.config, vocab_size=vocab_size)

    def shares_trunk_with(self, other: TrunkModel) -> bool:
        """Whether both models have one trunk, so that they have the same hidden states."""
        return self.trunk is other.trunk

    def prepare_training(self, *, freeze_layers: int, activation_checkpointing: bool) -> None:
        """Set activation checkpointing. Freeze embeddings and the lowest `freeze_layers` blocks.

        With freeze_layers = 0 nothing is frozen.
        """
        trunk = self.trunk
        if freeze_layers > len(trunk.blocks):
            raise ValueError(
                f"freeze_layers is {freeze_layers}, but the model has {len(trunk.blocks)} blocks"
            )
        trunk.checkpointing = activation_checkpointing
        if freeze_layers:
            embeddings = [trunk.embed, getattr(trunk, "position", None)]
            for part in (*embeddings, *trunk.blocks[:freeze_layers]):
                if part is not None:
                    part.requires_grad_(False)


class Transformer(Pretrained, TrunkModel):
    """A causal language model: a trunk and an output head, which is the embedding if tied."""

    head_copy: Tensor | None = None  # of the frozen head, see low_precision.py

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.trunk = Trunk(config)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=0.02)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): logits = hidden @ head_weight.T."""
        return self.trunk.embed.weight if self.config.tie_embeddings else self.lm_head.weight

    @property
    def _head(self) -> Tensor:
        """What makes logits: `head_weight`, or its copy in lower precision."""
        return self.head_weight if self.head_copy is None else self.head_copy

    def plain_copy(self) -> Transformer:
        """Return an equal model in eval mode, without adapters and with a head of its own.

        It shares the memory of all weights that have no adapter, and of a tied head.
        """
        with torch.device("meta"):
            copy = Transformer(replace(self.config, tie_embeddings=False))
        state = merged_state(self) | {"lm_head.weight": self.head_weight.detach()}
        copy.load_state_dict(state, assign=True)
        return copy.requires_grad_(False).eval()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **packing: Tensor
    ) -> Tensor:
        """Return logits (B, T, V). Arguments as in `Trunk.forward`."""
        return self.logits(self.hidden_states(input_ids, attention_mask, **packing))

    def prefill(self, input_ids: Tensor, lengths: Tensor, cache: KVCache) -> Tensor:
        """Return logits (B, V). Arguments as in `Trunk.prefill`."""
        return self.logits(self.trunk.prefill(input_ids, lengths, cache))

    def decode(self, token_ids: Tensor, cache: KVCache, slots: Tensor) -> Tensor:
        """Return logits (B, V). Arguments as in `Trunk.decode`."""
        return self.logits(self.trunk.decode(token_ids, cache, slots))

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., D) to logits (..., V)."""
        return self._scaled(self.project(hidden))

    def _scaled(self, logits: Tensor) -> Tensor:
        """Apply `logit_divisor` and the cap to what the head returns."""
        config = self.config
        if config.logit_divisor != 1:
            logits = logits / config.logit_divisor
        return logits if config.logit_softcap is None else _softcap(logits, config.logit_softcap)

    def project(self, hidden: Tensor) -> Tensor:
        """Multiply hidden states (..., D) by the head, without `logit_divisor` and the cap."""
        return F.linear(hidden, self._head)

    def token_logprobs(
        self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0
    ) -> TokenStatistics:
        """Return log-probs and entropy (N,) float32 of targets under softmax(logits / temperature).

        The (N, V) logits never exist as a whole: see `ops.linear_token_logprobs`.

        Args:
            hidden: (N, D) hidden states that predict the targets.
            targets: (N,) int64 token ids.
        """
        if self.config.logit_softcap is not None:
            return self._capped_statistics(hidden, targets, temperature)
        weight, temperature = self._head, temperature * self.config.logit_divisor
        return TokenStatistics(
            *linear_token_logprobs_and_entropy(hidden, weight, targets, temperature=temperature),
            None,
        )

    def token_loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        losses: Losses,
        *,
        temperature: float = 1.0,
        extras: tuple[Tensor, ...] = (),
        **options,
    ) -> tuple[Tensor, ...]:
        """Return the loss () and other outputs of `losses` for the log-probs of the targets.

        Arguments as in `ops.linear_token_loss`, which also computes the gradient of the loss.
        """
        if self.config.logit_softcap is not None:
            tokens = self._capped_statistics(hidden, targets, temperature)
            loss, *outputs = losses(tokens, slice(None), *extras)
            return loss, *(x.detach() for x in outputs)
        weight, temperature = self._head, temperature * self.config.logit_divisor
        options |= dict(temperature=temperature, extras=extras)
        return linear_token_loss(hidden, weight, targets, losses, **options)

    def logits_loss(self, hidden: Tensor, losses: LogitLosses) -> tuple[Tensor, ...]:
        """Return the loss () and other outputs of `losses` for the logits of hidden states (N, D).

        See `ops.linear_loss`, which also computes the gradient of the loss.
        """

        def of_logits(logits: Tensor, rows: slice) -> tuple[Tensor, ...]:
            return losses(self._scaled(logits), rows)

        return linear_loss(hidden, self._head, of_logits)

    def _capped_statistics(
        self, hidden: Tensor, targets: Tensor, temperature: float
    ) -> TokenStatistics:
        """As `token_logprobs`, for logits that no fused operation can make.

        The backward pass computes a chunk's logits again: four matrix products instead of three.
        """

        def statistics(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
            logits = self.logits(hidden)
            likeliest = logits.gather(1, targets[:, None])[:, 0] == logits.amax(dim=1)
            return *token_logprobs_and_entropy(logits, targets, temperature=temperature), likeliest

        return TokenStatistics(*in_chunks(statistics, self.config.vocab_size, hidden, targets))

    def target_and_mean_logits(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (N,) of the targets and the means (N,) over the vocabulary."""
        if self.config.logit_softcap is not None:

            def pick(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
                logits = self.logits(hidden)
                return logits.gather(1, targets[:, None])[:, 0], logits.mean(dim=1)

            return in_chunks(pick, self.config.vocab_size, hidden, targets)
        weight, divisor = self.head_weight, self.config.logit_divisor
        hidden = hidden if divisor == 1 else hidden / divisor
        target_logits = (hidden * F.embedding(targets, weight)).sum(dim=-1)
        return target_logits, (hidden * weight.mean(dim=0)).sum(dim=-1)


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]], vocab_size: int, *rows: Tensor
) -> tuple[Tensor, ...]:
    """Return `function(*rows)`, which makes logits (N, vocab_size) from tensors with N rows.

    The function is called for chunks of rows with 64 MB of float32 logits. The backward pass
    recomputes the logits.
    """
    size = max(1, LOGITS_AT_ONCE // vocab_size)
    results = [
        checkpoint(function, *part, use_reentrant=False)
        if torch.is_grad_enabled()
        else function(*part)
        for part in zip(*(x.split(size) for x in rows))
    ]
    return tuple(torch.cat(column) for column in zip(*results))


@contextlib.contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put all models into eval mode, and afterwards back into the modes that they had."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, mode in zip(models, modes):
            model.train(mode)


class RMSNorm(nn.RMSNorm):
    """RMSNorm as one op."""

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """dtype: of the result; None for that of x."""
        return rms_norm(x, self.weight, self.eps, dtype=dtype)


class RMSNormPlusOne(RMSNorm):
    """RMSNorm whose factor is 1 + weight, multiplied before the result is rounded (Gemma)."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        (weight,) = at_least_float32(self.weight)
        return rms_norm(x, 1.0 + weight, self.eps, dtype=dtype)


_NORMS = {"rmsnorm": RMSNorm, "rmsnorm_plus_one": RMSNormPlusOne, "layernorm": nn.LayerNorm}


def _norm(config: TransformerConfig) -> nn.Module:
    return _NORMS[config.norm](config.hidden_size, eps=config.norm_eps)


def _only(x: Tensor, read: Tensor | None) -> Tensor:
    """Return x (B, T, D), or its tokens at `read`, (M, D)."""
    return x if read is None else x.flatten(0, 1).index_select(0, read)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Return norm(x) for a linear layer, under autocast in the dtype that the layer casts it to."""
    device = x.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and isinstance(norm, RMSNorm) and x.dtype == torch.float32:
        return norm(x, torch.get_autocast_dtype(device))
    return norm(x)


def _causal(T: int, device: torch.device) -> Tensor:
    return torch.ones(T, T, dtype=torch.bool, device=device).tril()


def _softcap(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x / cap) * cap
