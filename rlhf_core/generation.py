"""Batched sampling with a KV cache, returning the log-probs of the distribution sampled from.

The prompts go through the model once, whatever the number of samples of each; then one token a step for every row that
has not ended. A row that has is left out of the batch, so that the work follows the tokens made. On CUDA a step is one
graph launch, and ends are looked for every few steps.

Left out: beam search, and parameters that differ between rows. A rollout engine can stand in for `generate`: prompts
in, a Generation out.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf_core.data import Tokenizer
from rlhf_core.models import KVCache, Transformer, eval_mode
from rlhf_core.models.packed_decode import PackedModel, packed
from rlhf_core.ops import token_logprobs
from rlhf_core.ops.sampling import sample_tokens

# How often a step's tokens are looked at for ends: for that the host must wait for a GPU.
STEPS_PER_CHECK = {"cpu": 1, "cuda": 16}
PACKED_FROM = (
    2**16
)  # weights that a layer has at least to be packed: smaller ones lie in a core's cache


class Generation(NamedTuple):
    """N = B * num_samples responses, those of a prompt one after the other; R is the length of the longest one."""

    response_ids: Tensor  # (N, R) int64, 0 or the model's pad_id after the end
    response_mask: Tensor  # (N, R) bool, True up to the end, EOS included
    logprobs: Tensor  # (N, R) float32 nats under the distribution sampled from, 0 after the end
    full_logprobs: (
        Tensor  # (N, R) the same under softmax(logits / temperature), as training recomputes them
    )


@torch.no_grad()
def generate(
    model: Transformer,
    prompt_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_ids: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Generation:
    """Sample responses to every prompt; dropout is off whatever mode the model is in.

    The distribution sampled from is made of the logits in this order: repetition_penalty, min_new_tokens, temperature,
    top_k, top_p, min_p (see `ops.sample_tokens`). `full_logprobs` leave out all of these but the temperature, and are
    the same tensor as `logprobs` where there is nothing to leave out.

    Args:
        prompt_ids: (B, P) int64, left-padded.
        attention_mask: (B, P) bool, True = real token; None means no padding.
        max_new_tokens: longest response.
        min_new_tokens: so many tokens at least come before one of eos_ids, which have no probability until then, and a
            stop string that is complete with fewer ends nothing.
        num_samples: responses to each prompt.
        temperature: logits are divided by it; 0 is greedy, whose log-probs are 0 (all mass on one token) and whose full
            ones are those of softmax(logits).
        top_k, top_p, min_p: sample among the most likely tokens only; None for all.
        repetition_penalty: divides the positive and multiplies the negative logits of every token that the prompt or
            the response holds already (Keskar et al. 2019, section 4.1); 1 changes nothing.
        eos_ids: ids that end a response; None takes the model's own, () none.
        stop_strings: a response also ends with the token that completes one of these in its text, which the prompt is
            no part of. That token and those before it stay in the response.
        tokenizer: decodes responses to look for stop_strings.
        seeds: (N,) int64; a row's tokens depend on its prompt, its seed and the options alone, up to the rounding of
            logits in batches of another size. None draws them from `generator`.
        generator: source of the seeds; None for torch's global one.

    Raises:
        ValueError or TypeError for an argument out of range, an empty prompt, padding not on the left, or a sequence
        beyond the model's positions; FloatingPointError where logits are not finite, with the row and its token.
    """
    device, config, n = model.head_weight.device, model.config, num_samples
    prompt_ids, prompt_lengths = _right_padded(prompt_ids, attention_mask)
    B, P = prompt_ids.shape
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 1),
        ("min_new_tokens", min_new_tokens, 0),
        ("num_samples", num_samples, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if min_new_tokens > max_new_tokens:
        raise ValueError(
            f"min_new_tokens {min_new_tokens} is beyond max_new_tokens {max_new_tokens}"
        )
    if P + max_new_tokens > config.max_positions:
        raise ValueError(
            f"row {int(prompt_lengths.argmax())}: {P} prompt + {max_new_tokens} new tokens exceed the model's "
            f"{config.max_positions} positions"
        )
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty must be finite and > 0, got {repetition_penalty}")
    stops = _Stops(
        config.eos_ids if eos_ids is None else eos_ids, stop_strings, tokenizer, min_new_tokens
    )
    if any(not 0 <= token < config.vocab_size for token in stops.eos_ids):
        raise ValueError(
            f"eos_ids {sorted(stops.eos_ids)} are not all ids of a vocabulary of {config.vocab_size}"
        )
    if seeds is None:
        where = device if generator is None else generator.device
        seeds = torch.randint(2**63 - 1, (B * n,), generator=generator, device=where)
    elif seeds.shape != (B * n,):
        raise ValueError(
            f"seeds have shape {tuple(seeds.shape)}, but there are {B} prompts x {n} samples"
        )

    with eval_mode(model), _packed_weights(model) as runs:
        cache = KVCache(config, B * n, P + max_new_tokens, model.head_weight)
        logits = runs.prefill(prompt_ids, prompt_lengths, cache)  # (B, V)
        step = DecodeStep(
            runs,
            cache,
            prompt_ids.repeat_interleave(n, dim=0),
            seeds.to(device),
            max_new_tokens,
            min_new_tokens=min_new_tokens,
            eos_ids=stops.eos_ids,
            repetition_penalty=repetition_penalty,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
        step.draw(logits.repeat_interleave(n, dim=0) if n > 1 else logits)
        lengths = _run(step, stops, max_new_tokens)
    return step.result(torch.tensor(lengths, device=device), config.pad_id or 0)


class DecodeStep:
    """One step of every row that has not been dropped: run the model on the last token, draw the next one.

    What a step reads and writes stays in the same memory until rows are dropped, so that a CUDA graph can replay it.
    """

    def __init__(
        self,
        model: Transformer | PackedModel,
        cache: KVCache,
        prompt_ids: Tensor,
        seeds: Tensor,
        max_new_tokens: int,
        *,
        min_new_tokens: int,
        eos_ids: set[int],
        repetition_penalty: float,
        **sampling,
    ):
        N, P = prompt_ids.shape
        self.model, self.cache, self.sampling = model, cache, sampling
        self.penalty, self.min_new_tokens = repetition_penalty, min_new_tokens
        self.eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long, device=prompt_ids.device)
        self.altered = (
            repetition_penalty != 1 or min_new_tokens > 0
        )  # the logits, before they are sampled from
        plain = sampling["temperature"] > 0 and all(
            sampling[name] is None for name in ("top_k", "top_p", "min_p")
        )
        # What a row has not reached yet repeats its prompt's first token, which the penalty counts anyway.
        self.ids = torch.cat(
            (prompt_ids, prompt_ids[:, :1].expand(-1, max_new_tokens)), dim=1
        )  # (N, P + R)
        self.response_ids = self.ids[:, P:]
        self.logprobs = prompt_ids.new_zeros(N, max_new_tokens, dtype=torch.float32)
        self.full_logprobs = (
            self.logprobs if plain and not self.altered else torch.zeros_like(self.logprobs)
        )
        self._go_on_with(
            torch.stack((torch.arange(N, device=seeds.device), seeds, seeds * 0, seeds * 0))
        )

    def __call__(self) -> None:
        self.draw(self.model.decode(self.last, self.cache, self.slots))

    def draw(self, logits: Tensor) -> None:
        """The next token of every row from its logits (B, V)."""
        altered = self._altered(logits) if self.altered else logits
        tokens, logprobs, full_logprobs = sample_tokens(
            altered, self.seeds, self.counters, **self.sampling
        )
        if self.altered:
            full_logprobs = token_logprobs(
                logits, tokens, temperature=self.sampling["temperature"] or 1.0
            )
        at = self.slots, self.counters
        self.response_ids[at] = tokens
        self.logprobs[at] = logprobs.float()
        if self.full_logprobs is not self.logprobs:
            self.full_logprobs[at] = full_logprobs.float()
        self.last.copy_(tokens)
        self.counters += 1

    def _altered(self, logits: Tensor) -> Tensor:
        if self.penalty != 1:
            seen = self.ids[self.slots]  # (B, P + R)
            z = logits.gather(1, seen)
            logits = logits.scatter(1, seen, torch.where(z > 0, z / self.penalty, z * self.penalty))
        if self.min_new_tokens:
            early = (self.counters < self.min_new_tokens)[:, None]
            logits = logits.index_copy(
                1, self.eos_ids, logits[:, self.eos_ids].masked_fill(early, -math.inf)
            )
        return logits

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only, of those that are left."""
        self._go_on_with(self.rows.index_select(1, torch.tensor(rows, device=self.rows.device)))

    def _go_on_with(self, rows: Tensor) -> None:
        """rows (4, B): where they are in what is above, their seeds, last tokens, and how many they have drawn."""
        self.rows = rows
        self.slots, self.seeds, self.last, self.counters = rows.unbind()

    def result(self, lengths: Tensor, pad_id: int) -> Generation:
        """lengths: (N,) of the responses."""
        R = int(lengths.max())
        mask = torch.arange(R, device=lengths.device) < lengths[:, None]
        logprobs = self.logprobs[:, :R].where(mask, 0)
        full = (
            logprobs
            if self.full_logprobs is self.logprobs
            else self.full_logprobs[:, :R].where(mask, 0)
        )
        if not logprobs.isfinite().all():
            row, step = (~logprobs.isfinite()).nonzero()[0].tolist()
            raise FloatingPointError(
                f"row {row}: the model's logits are not finite at token {step} of the response"
            )
        return Generation(self.response_ids[:, :R].where(mask, pad_id), mask, logprobs, full)


def _run(step: DecodeStep, stops: _Stops, max_new_tokens: int) -> list[int]:
    """Step until every row has ended; the first token has been drawn. Returns the lengths of the responses."""
    device = step.slots.device.type
    left = list(
        range(len(step.slots))
    )  # the slots of the step's rows, known without asking the device
    lengths = [0] * len(left)  # 0: the row goes on
    every, checked, run = STEPS_PER_CHECK.get(device, 1), 0, None
    for drawn in range(1, max_new_tokens + 1):
        if stops and (drawn % every == 0 or drawn == max_new_tokens):
            tails = step.response_ids[:, max(0, checked + 1 - stops.width) : drawn][
                step.slots
            ].tolist()
            for slot, tail in zip(left, tails):
                if stops.strings or not stops.eos_ids.isdisjoint(tail):  # most steps end few rows
                    lengths[slot] = lengths[slot] or stops.end(tail, drawn, drawn - checked)
            checked = drawn
            going = [row for row, slot in enumerate(left) if not lengths[slot]]
            if not going:
                break
            if len(going) < len(left) and (
                every == 1 or 2 * len(going) <= len(left)
            ):  # a graph is captured for a size
                step.keep(going)
                left, run = [left[row] for row in going], None
        if drawn == max_new_tokens:
            break
        if run is None:
            step()  # before it is captured too: its kernels are compiled when they first run
            run = _captured(step) if device == "cuda" else step
        else:
            run()
    return [length or max_new_tokens for length in lengths]


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """Replays the step as one CUDA graph; the step itself where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        warnings.warn(
            f"generate: no CUDA graph, each step launches its kernels: {error}", stacklevel=2
        )
        return step
    return graph.replay


class _Stops:
    """What ends a response: ids, and strings in its text."""

    def __init__(
        self,
        eos_ids: Sequence[int],
        strings: Sequence[str],
        tokenizer: Tokenizer | None,
        least: int,
    ):
        if isinstance(strings, str) or not all(strings):
            raise ValueError(
                f"stop_strings must be a sequence of strings that are not empty, got {strings!r}"
            )
        if strings and tokenizer is None:
            raise ValueError("stop_strings need a tokenizer")
        self.eos_ids, self.strings, self.tokenizer, self.least = (
            set(eos_ids),
            tuple(strings),
            tokenizer,
            least,
        )
        # Tokens that have text hold a byte at least; and one more, as a decoder may strip the first one of a space.
        self.width = 1 + max((len(string.encode()) for string in strings), default=0)

    def __bool__(self) -> bool:
        return bool(self.eos_ids or self.strings)

    def end(self, tail: list[int], drawn: int, new: int) -> int:
        """Where a response of `drawn` tokens, of which `tail` are the last, ends in the last `new` ones; 0: nowhere."""
        for behind in reversed(range(new)):  # the tokens after the one looked at
            upto = len(tail) - behind
            if tail[upto - 1] in self.eos_ids:
                return drawn - behind
            if self.strings and drawn - behind >= self.least:
                before, text = (
                    self.tokenizer.decode(tail[max(0, upto - self.width) : end])
                    for end in (upto - 1, upto)
                )
                fixed = len(
                    before.rstrip("\ufffd")
                )  # a character that is not complete may yet become another
                if any(
                    text.find(string, max(0, fixed + 1 - len(string))) >= 0
                    for string in self.strings
                ):
                    return drawn - behind
        return 0


@contextlib.contextmanager
def _packed_weights(model: Transformer) -> Iterator[Transformer | PackedModel]:
    """What runs in its place: a small model packed whole; else itself, where on a CPU its linear layers, and the head,
    work on copies of their float32 weights in oneDNN's own layout.

    A few rows then cost about one read of the weights, which `F.linear` takes several times as long for.
    """
    if small := packed(model):
        yield small
        return
    layers = []
    if model.head_weight.is_cpu and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        models = [
            module for module in model.modules() if isinstance(module, Transformer)
        ]  # it, or those it is made of
        layers = [
            (module, "forward", module.weight, module.bias)
            for language_model in models
            for module in language_model.trunk.modules()
            if type(module) is nn.Linear
        ]
        layers += [
            (language_model, "logits", language_model.head_weight, None)
            for language_model in models
        ]
        layers = [
            layer
            for layer in layers
            if layer[2].dtype == torch.float32 and layer[2].numel() >= PACKED_FROM
        ]
    try:
        for owner, method, weight, bias in layers:
            setattr(owner, method, _packed_linear(weight, bias))
        yield model
    finally:
        for owner, method, _, _ in layers:
            owner.__dict__.pop(method, None)  # the class's own is behind it


def _packed_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    weight, linear = (
        torch.ops.mkldnn._reorder_linear_weight(weight),
        torch.ops.mkldnn._linear_pointwise,
    )
    return lambda x: linear(x, weight, bias, "none", [], "")


def _right_padded(prompt_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Prompts (B, P) padded on the left to prompts followed by copies of their first token, and their lengths (B,)."""
    B, P = prompt_ids.shape
    if B == 0:
        raise ValueError("there are no prompts")
    if attention_mask is None:
        attention_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    if attention_mask.shape != prompt_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, prompt_ids {tuple(prompt_ids.shape)}"
        )
    lengths = attention_mask.sum(dim=1)
    if not lengths.all():
        raise ValueError(f"row {int(lengths.argmin())}: the prompt is empty")
    at = torch.arange(P, device=prompt_ids.device)
    if not torch.equal(attention_mask, at >= P - lengths[:, None]):
        row = int((attention_mask != (at >= P - lengths[:, None])).any(dim=1).int().argmax())
        raise ValueError(
            f"row {row}: prompts must be padded on the left, this one's attention_mask is not"
        )
    ids = prompt_ids.gather(1, (at + P - lengths[:, None]) % P)
    return ids.where(at < lengths[:, None], ids[:, :1])[:, : int(lengths.max())], lengths
