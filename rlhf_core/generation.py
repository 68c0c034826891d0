"""Batched sampling with a KV cache. Log-probs are those of the distribution sampled from.

Each prompt goes through the model once, and its keys and values are stored once, however many
samples it gets. Then each step produces one token for every unfinished row. Finished rows leave the
batch, so the cost follows the number of tokens generated. On CUDA a step is one graph launch, and
finished rows are removed every few steps.

Left out: beam search and per-row options. An `Engine` can replace `generate`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_core import backends
from rlhf_core.checks import check_own
from rlhf_core.data import Tokenizer
from rlhf_core.models import KVCache, Transformer, eval_mode
from rlhf_core.models.gather import check_whole
from rlhf_core.models.packed_decode import PackedModel, packed_for_decoding
from rlhf_core.ops import token_logprobs
from rlhf_core.ops.sampling import sample_tokens

# Steps between checks for finished rows. A check makes the host wait for the GPU.
STEPS_PER_CHECK = {"cpu": 1, "cuda": 16}
WEIGHT_DTYPES = (None, "int8", "bfloat16")


class Generation(NamedTuple):
    """N = B * num_samples responses, grouped by prompt; R is the length of the longest one."""

    response_ids: Tensor  # (N, R) int64; after the end the model's pad_id, or 0 without one
    response_mask: Tensor  # (N, R) bool, True up to the end, EOS included
    logprobs: Tensor  # (N, R) float32, nats, of the distribution sampled from; 0 after the end
    full_logprobs: Tensor  # (N, R) float32, nats, of softmax(logits / temperature), as in training
    ended: Tensor  # (N,) bool, whether EOS or a stop string ended it, and not max_new_tokens


class EngineError(RuntimeError):
    """An engine cannot go on: it does not answer, or it does not sample from the policy."""


class Engine(Protocol):
    """Another program that samples from the policy, such as `integrations.vllm.Engine`.

    `rollout.sample` calls `load` and then `generate`. Both raise EngineError, or ValueError for
    options that the engine cannot follow.
    """

    def load(self, model: Transformer) -> None:
        """Give the engine the model's weights, unless it has them."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seeds: Sequence[int],
        max_new_tokens: int,
        num_samples: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        min_p: float | None,
        eos_ids: Sequence[int],
        stop_strings: Sequence[str],
        tokenizer: Tokenizer | None,
    ) -> Generation:
        """Sample from the loaded weights; arguments as for `generate`.

        Args:
            prompts: B prompts of token ids.
            seeds: one for each of the B * num_samples rows. A row's tokens depend only on the
                weights, its prompt, its seed and the options, up to rounding.

        Returns:
            As `generate`, on any device.
        """


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
    weight_dtype: str | None = None,
) -> Generation:
    """Sampled responses to every prompt, with their log-probs. Dropout is always off.

    The logits are modified in this order before sampling: repetition_penalty, min_new_tokens,
    temperature, top_k, top_p, min_p (see `ops.sample_tokens`). `full_logprobs` apply only the
    temperature; without any of the other options they are the same tensor as `logprobs`.

    Args:
        prompt_ids: (B, P) int64, left-padded.
        attention_mask: (B, P) bool, True = real token; None means no padding.
        max_new_tokens: maximum response length in tokens, >= 1.
        min_new_tokens: minimum number of tokens before EOS may be sampled. A stop string that is
            complete earlier does not end the response.
        num_samples: responses per prompt, >= 1.
        temperature: >= 0; logits are divided by it. 0 is greedy decoding: `logprobs` are 0 (all
            mass on one token), and `full_logprobs` are those of softmax(logits).
        top_k, top_p, min_p: sample only from the most likely tokens; None for all.
        repetition_penalty: finite and > 0; divides the positive and multiplies the negative logits
            of tokens already in the prompt or response (Keskar et al. 2019, section 4.1). 1: off.
        eos_ids: ids that end a response; None for the model's own, () for none.
        stop_strings: a response also ends with the token that completes one of these strings in
            its text, the prompt excluded. The response keeps that token and those before it.
        tokenizer: decodes responses to find stop_strings; required with them.
        seeds: (N,) int64. A row's tokens depend only on its prompt, its seed and the options, up
            to rounding of the logits in batches of another size. None: drawn from `generator`.
        generator: source of the seeds; None for torch's global one.
        weight_dtype: "int8": on CPUs, decoding steps read copies of the linear layers and of the
            head in 8 bits. "bfloat16": a copy of the model in bfloat16 samples, in which
            adapters stay as they are. Each call makes the copies. They are a slightly different
            model, and all log-probs are that model's. None: the weights as they are.

    Returns:
        A `Generation` of N = B * num_samples responses.

    Raises:
        ValueError or TypeError: an argument out of range, an empty prompt, padding not on the
            left, a sequence longer than the model's positions, or a model that has no decoding
            steps in weight_dtype.
        FloatingPointError: logits that are not finite; the message names the row and the token.
    """
    check_own(model, tokenizer)
    check_whole(model, "Sample from a copy: `with whole(model) as copy`, see models/shard.py")
    device, config, n = model.device, model.config, num_samples
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
        raise ValueError(f"min_new_tokens {min_new_tokens} exceeds max_new_tokens {max_new_tokens}")
    if P + max_new_tokens > config.max_positions:
        raise ValueError(
            f"row {int(prompt_lengths.argmax())}: {P} prompt + {max_new_tokens} new tokens exceed "
            f"the model's {config.max_positions} positions"
        )
    if weight_dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight_dtype must be one of {WEIGHT_DTYPES}, got {weight_dtype!r}")
    if weight_dtype == "bfloat16":
        model, weight_dtype = _in_bfloat16(model), None
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(f"repetition_penalty must be finite and > 0, got {repetition_penalty}")
    stops = Stops(
        config.eos_ids if eos_ids is None else eos_ids, stop_strings, tokenizer, min_new_tokens
    )
    if any(not 0 <= token < config.vocab_size for token in stops.eos_ids):
        raise ValueError(
            f"eos_ids must be in [0, {config.vocab_size}), got {sorted(stops.eos_ids)}"
        )
    if seeds is None:
        seeds = draw_seeds(B * n, generator, device)
    elif seeds.shape != (B * n,):
        raise ValueError(
            f"seeds have shape {tuple(seeds.shape)}, but there are {B} prompts x {n} samples"
        )

    crossings: dict[int, list[int]] = {}
    if config.long_from < P + max_new_tokens:
        for slot, length in enumerate(prompt_lengths.repeat_interleave(n).tolist()):
            if length <= config.long_from:
                crossings.setdefault(config.long_from + 1 - length, []).append(slot)
    with eval_mode(model), packed_for_decoding(model, B * n, weight_dtype) as fast_model:
        # With several samples the rows of a prompt share its keys and values.
        cache = model.new_cache(B, P if n > 1 else P + max_new_tokens)
        logits = fast_model.prefill(prompt_ids, prompt_lengths, cache)  # (B, V)
        if n > 1:
            cache = cache.continued(n, P + max_new_tokens)
        step = DecodeStep(
            fast_model,
            cache,
            prompt_ids.repeat_interleave(n, dim=0),
            seeds.to(device),
            max_new_tokens,
            crossings=crossings,
            min_new_tokens=min_new_tokens,
            eos_ids=stops.eos_ids,
            repetition_penalty=repetition_penalty,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
        step.draw(logits.repeat_interleave(n, dim=0) if n > 1 else logits)
        lengths = torch.tensor(_run(step, stops, max_new_tokens), device=device)
    ended = lengths > 0
    return step.result(lengths.where(ended, max_new_tokens), ended, config.pad_id or 0)


def draw_seeds(count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Seeds (count,) int64 from the generator, or from torch's global one of the device."""
    device = device if generator is None else generator.device
    return torch.randint(2**63 - 1, (count,), generator=generator, device=device)


class DecodeStep:
    """One step of all remaining rows: run the model on the last tokens and draw the next ones.

    A step's inputs and outputs stay in the same memory until rows are dropped, so that a CUDA graph
    can replay it.
    """

    def __init__(
        self,
        model: Transformer | PackedModel,
        cache: KVCache,
        prompt_ids: Tensor,
        seeds: Tensor,
        max_new_tokens: int,
        *,
        crossings: dict[int, list[int]],
        min_new_tokens: int,
        eos_ids: set[int],
        repetition_penalty: float,
        **sampling,
    ):
        """crossings: By number of draws: slots of rows that then have `long_from` + 1 tokens."""
        N, P = prompt_ids.shape
        self.model, self.cache, self.sampling = model, cache, sampling
        self.crossings = crossings
        self.penalty, self.min_new_tokens = repetition_penalty, min_new_tokens
        self.eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long, device=prompt_ids.device)
        self.alters_logits = repetition_penalty != 1 or min_new_tokens > 0
        plain = sampling["temperature"] > 0 and all(
            sampling[name] is None for name in ("top_k", "top_p", "min_p")
        )
        # Unused positions hold the prompt's first token, which the penalty counts anyway.
        self.ids = torch.cat((prompt_ids, prompt_ids[:, :1].expand(-1, max_new_tokens)), dim=1)
        self.response_ids = self.ids[:, P:]
        self.logprobs = prompt_ids.new_zeros(N, max_new_tokens, dtype=torch.float32)
        self.full_logprobs = (
            self.logprobs if plain and not self.alters_logits else torch.zeros_like(self.logprobs)
        )
        self._set_rows(
            torch.stack((torch.arange(N, device=seeds.device), seeds, seeds * 0, seeds * 0))
        )

    def __call__(self) -> None:
        self.draw(self.model.decode(self.last, self.cache, self.slots))

    def draw(self, logits: Tensor) -> None:
        """Draw the next token of every row from its logits (B, V)."""
        altered = self._altered(logits) if self.alters_logits else logits
        tokens, logprobs, full_logprobs = sample_tokens(
            altered, self.seeds, self.counters, **self.sampling
        )
        if self.alters_logits:
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

    def cross(self, drawn: int, slots: list[int]) -> None:
        """Recompute the cache of those of the rows `slots` that pass `long_from` in this step.

        longrope now has other frequencies for all their tokens.
        """
        slots = [slot for slot in self.crossings.get(drawn, ()) if slot in slots]
        if not slots:
            return
        length = self.model.config.long_from + 1 - drawn  # of these prompts
        ids = torch.cat((self.ids[slots, :length], self.response_ids[slots, :drawn]), dim=1)
        part = self.model.new_cache(len(slots), self.cache.max_length)
        self.model.prefill(ids, ids.new_full((len(slots),), ids.shape[1]), part)
        self.cache.replace(slots, part)  # the step appends the last token again

    def keep(self, rows: list[int]) -> None:
        """Keep only these of the remaining rows."""
        self._set_rows(self.rows.index_select(1, torch.tensor(rows, device=self.rows.device)))

    def _set_rows(self, rows: Tensor) -> None:
        """rows (4, B): slots in the (N, ...) tensors, seeds, last tokens, numbers of draws."""
        self.rows = rows
        self.slots, self.seeds, self.last, self.counters = rows.unbind()

    def result(self, lengths: Tensor, ended: Tensor, pad_id: int) -> Generation:
        """The Generation, given the lengths (N,) of the responses and whether they ended."""
        R = int(lengths.max())
        mask = torch.arange(R, device=lengths.device) < lengths[:, None]
        logprobs = self.logprobs[:, :R].where(mask, 0)
        full_logprobs = logprobs
        if self.full_logprobs is not self.logprobs:
            full_logprobs = self.full_logprobs[:, :R].where(mask, 0)
        if not logprobs.isfinite().all():
            row, step = (~logprobs.isfinite()).nonzero()[0].tolist()
            raise FloatingPointError(
                f"row {row}: the model's logits are not finite at token {step} of the response"
            )
        ids = self.response_ids[:, :R].where(mask, pad_id)
        return Generation(ids, mask, logprobs, full_logprobs, ended)


def _run(step: DecodeStep, stops: Stops, max_new_tokens: int) -> list[int]:
    """Step until all rows end. The first token is already drawn.

    Returns:
        Their lengths, 0 for a row that nothing ended.
    """
    device = step.slots.device.type
    slots = list(range(len(step.slots)))  # step.slots, known without waiting for the device
    lengths = [0] * len(slots)  # 0: not finished
    every, checked, run = STEPS_PER_CHECK.get(device, 1), 0, None
    for drawn in range(1, max_new_tokens + 1):
        if stops and (drawn % every == 0 or drawn == max_new_tokens):
            first = max(0, checked + 1 - stops.width)
            tails = step.response_ids[:, first:drawn][step.slots].tolist()
            for slot, tail in zip(slots, tails):
                if stops.strings or not stops.eos_ids.isdisjoint(tail):  # most steps end few rows
                    lengths[slot] = lengths[slot] or stops.end(tail, drawn, drawn - checked)
            checked = drawn
            going = [row for row, slot in enumerate(slots) if not lengths[slot]]
            if not going:
                break
            # A CUDA graph has a fixed batch size, so capture a new one only when the batch halves.
            if len(going) < len(slots) and (every == 1 or 2 * len(going) <= len(slots)):
                step.keep(going)
                slots, run = [slots[row] for row in going], None
        if drawn == max_new_tokens:
            break
        step.cross(drawn, slots)
        if run is None:
            step()  # also before capture: a kernel is compiled when it first runs
            run = _captured(step) if device == "cuda" else step
        else:
            run()
    return lengths


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """A replay of the step as one CUDA graph, or the step itself if it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        warnings.warn(
            f"generate: no CUDA graph, so each step launches its kernels: {error}", stacklevel=2
        )
        return step
    return graph.replay


def check_stop_strings(strings: Sequence[str], tokenizer: Tokenizer | None) -> None:
    """Raise ValueError unless the strings can end a response."""
    if isinstance(strings, str) or not all(x and isinstance(x, str) for x in strings):
        raise ValueError(f"stop_strings must be a sequence of strings, none empty, got {strings!r}")
    if strings and tokenizer is None:
        raise ValueError("stop_strings need a tokenizer: pass tokenizer=")


class Stops:
    """Finds where a response ends: at an EOS id, or where its text completes a stop string."""

    def __init__(
        self,
        eos_ids: Sequence[int],
        strings: Sequence[str],
        tokenizer: Tokenizer | None,
        least: int,
    ):
        check_stop_strings(strings, tokenizer)
        self.eos_ids, self.strings = set(eos_ids), tuple(strings)
        self.tokenizer, self.least = tokenizer, least
        # A token with text has at least one byte. One more, as decoders may strip a leading space.
        self.width = 1 + max((len(string.encode()) for string in strings), default=0)

    def __bool__(self) -> bool:
        return bool(self.eos_ids or self.strings)

    def end(self, tail: list[int], drawn: int, new: int) -> int:
        """Length at which a response of `drawn` tokens ends, or 0. Only its last `new` are tested.

        `tail` holds the response's last tokens, at least the new ones.
        """
        for after in reversed(range(new)):  # number of tokens after the one under test
            upto = len(tail) - after
            if tail[upto - 1] in self.eos_ids:
                return drawn - after
            if self.strings and drawn - after >= self.least:
                before, text = (
                    self.tokenizer.decode(tail[max(0, upto - self.width) : end])
                    for end in (upto - 1, upto)
                )
                fixed = len(before.rstrip("\ufffd"))  # an incomplete character may still change
                if any(
                    text.find(string, max(0, fixed + 1 - len(string))) >= 0
                    for string in self.strings
                ):
                    return drawn - after
        return 0


def _in_bfloat16(model: Transformer) -> Transformer:
    """A copy of the model in bfloat16. It shares the adapters, which keep their dtype."""
    if type(model) is not Transformer:
        reason = f"a {type(model).__name__} has no copy in another dtype"
    elif not backends.multiplies_bfloat16(model.device.type):
        reason = "this CPU has no bfloat16 instructions, so it would be slower"
    else:
        copies = {
            id(x): x if "lora_" in name else x.detach().bfloat16()
            for name, x in model.named_parameters()
        }
        return copy.deepcopy(model, copies)
    raise ValueError(f"weight_dtype bfloat16: {reason}. Leave it out")


def _right_padded(prompt_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Left-padded prompts moved to the left, and their lengths (B,).

    Copies of a prompt's first token fill the places after it.
    """
    B, P = prompt_ids.shape
    if B == 0:
        raise ValueError("there are no prompts: prompt_ids has no rows")
    if attention_mask is None:
        attention_mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    if attention_mask.shape != prompt_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, "
            f"prompt_ids {tuple(prompt_ids.shape)}; they must be equal"
        )
    lengths = attention_mask.sum(dim=1)
    if not lengths.all():
        raise ValueError(f"row {int(lengths.argmin())}: the prompt is empty")
    positions = torch.arange(P, device=prompt_ids.device)
    padded_left = positions >= P - lengths[:, None]
    if not torch.equal(attention_mask, padded_left):
        row = int((attention_mask != padded_left).any(dim=1).int().argmax())
        raise ValueError(f"row {row}: by its attention_mask the prompt is not padded on the left")
    ids = prompt_ids.gather(1, (positions + P - lengths[:, None]) % P)
    return ids.where(positions < lengths[:, None], ids[:, :1])[:, : int(lengths.max())], lengths
