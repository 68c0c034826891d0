"""TRL's trainers on our ops: `patch` replaces TRL's log-prob and entropy functions with ours.

    from rlhf_core.integrations import trl

    trl.patch()  # or `with trl.patch():` for a part of the program
    DPOTrainer(...).train()  # TRL's own
    trl.unpatch()

The functions in `_REPLACEMENTS` are replaced wherever TRL holds them. `patch` prints those that
the installed version has. Two results differ. For 16-bit logits TRL's log-probs and entropies have
16 bits, ours 32. If several tokens are the most likely ones, `is_top1` is True for the first of
them in TRL, for all of them here.

TRL's own code still runs in cases that our ops do not cover: several targets for each row, a soft
cap on logits, the sum of squared probabilities, and a head that DeepSpeed has sharded.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf_core.files import require
from rlhf_core.ops import (
    linear_token_logprobs,
    linear_token_statistics,
    token_logprobs,
    token_logprobs_and_entropy,
)

VERSIONS = ("1.12", "1.13", "1.14", "1.15", "1.16")  # the tested ones
# Largest difference of values (nats) and gradients, which float32 sums in another order have.
TOLERANCE = 1e-4

_replaced: list[tuple[Any, Any]] = []  # pairs of TRL's object and ours
_last: dict[str, Any] = {}  # what the last patch reported


class Patch(contextlib.ExitStack):
    """What `patch` has replaced; as text, a report. As a context manager it undoes the patch.

    Attributes:
        version: TRL's version.
        replaced: Names of TRL's functions that are ours now.
        kept: Those that still are TRL's, with the reason.
    """

    def __init__(self, version: str, replaced: list[str], kept: dict[str, str]):
        super().__init__()
        self.version, self.replaced, self.kept = version, replaced, kept

    def __str__(self) -> str:
        lines = [f"TRL {self.version}: replaced {', '.join(self.replaced)}"]
        lines += [f"  not replaced: {name}, which {reason}" for name, reason in self.kept.items()]
        if _FUSED in self.kept:
            lines.append("  SFTTrainer's default loss, and losses on hidden states, stay TRL's own")
        if not self.version.startswith(tuple(f"{version}." for version in VERSIONS)):
            lines.append(
                f"  this version is not tested ({VERSIONS[0]} to {VERSIONS[-1]} are), but values "
                "and gradients agree"
            )
        return "\n".join(lines)


def patch() -> Patch:
    """Replace TRL's functions with our ops, and print which, unless that has been done.

    Before that, values and gradients of both are compared on random input. A function that this
    version of TRL lacks, or that cannot run on a CPU, is not replaced.

    Returns:
        What was replaced: a context manager that calls `unpatch` at the end of its block.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: a function is missing or differs from the tested versions. The message names
            it, and nothing is replaced.
    """
    if _replaced:
        return Patch(**_last)
    utils, version = require("trl.trainer.utils", "trl"), require("trl", "trl").__version__
    pairs, kept = {}, {}
    for name, replacement in _REPLACEMENTS.items():
        theirs = getattr(utils, name, None) or getattr(sys.modules.get("trl.kernels"), name, None)
        if theirs is None and name in _OPTIONAL:
            kept[name] = "this version lacks"
            continue
        ours = replacement(theirs)
        try:
            fault = "is missing" if theirs is None else _difference(name, theirs, ours)
        except _Failed as failure:
            kept[name] = f"cannot be checked on a CPU: {failure}"
            continue
        if fault:
            raise RuntimeError(
                f"{name} {fault}, so nothing is replaced (found TRL {version}). "
                f"Install one of the tested versions, {VERSIONS[0]} to {VERSIONS[-1]}"
            )
        pairs[name] = theirs, ours
    for theirs, ours in pairs.values():
        _replace(theirs, ours)
    _replaced.extend(pairs.values())
    _last.update(version=version, replaced=list(pairs), kept=kept)
    done = Patch(**_last)
    done.callback(unpatch)
    print(done, file=sys.stderr)
    return done


def unpatch() -> None:
    """Give TRL its own functions back."""
    for theirs, ours in _replaced:
        _replace(ours, theirs)
    _replaced.clear()


class _Failed(Exception):
    """A function of TRL raised an error, where ours did not."""


def _replace(old: Any, new: Any) -> None:
    """Replace an object in every module of TRL, because `from ..utils import f` copies the name."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "trl":
            for attribute, value in list(vars(module).items()):
                if value is old:
                    setattr(module, attribute, new)


def _selective_log_softmax(theirs: Callable) -> Callable:
    def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
        if index.ndim == logits.ndim:
            plain = temperature == 1.0 and row_mask is None  # older versions have no other
            options = {} if plain else dict(temperature=temperature, row_mask=row_mask)
            return theirs(logits, index, **options)
        return token_logprobs(logits, index, temperature=temperature, mask=_bool(row_mask))

    return selective_log_softmax


def _entropy_from_logits(theirs: Callable) -> Callable:
    def entropy_from_logits(logits, chunk_size=128):
        return token_logprobs_and_entropy(
            logits, logits.new_zeros(logits.shape[:-1], dtype=torch.int64)
        )[1]

    return entropy_from_logits


def _selective_log_softmax_and_entropy(theirs: Callable) -> Callable:
    def selective_log_softmax_and_entropy(
        logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None
    ):
        mask = _bool(row_mask)
        logprobs, entropy = token_logprobs_and_entropy(
            logits, index, temperature=temperature, mask=mask
        )
        return logprobs, entropy if entropy_requires_grad else entropy.detach()

    return selective_log_softmax_and_entropy


def _chunked_log_prob_function(theirs: type[torch.autograd.Function]) -> type:
    class ChunkedLogProbFunction:
        """Has TRL's `apply` for hidden (N, D), weight (V, D), bias (V,) or None, targets (N,)."""

        @staticmethod
        def apply(hidden, weight, bias, targets, temperature, chunk_size,
                  final_logit_softcapping=None, logit_scale=1.0,
                  outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")):  # fmt: skip
            covered = (
                final_logit_softcapping is None
                and logit_scale > 0
                and "log_sum_sq_probs" not in outputs
            )
            if not covered or hasattr(weight, "ds_id"):
                settings = temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
                return theirs.apply(hidden, weight, bias, targets, *settings)
            temperature, dtype = temperature / logit_scale, hidden.dtype
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
            entropy = mean = top = None
            if "entropy" in outputs or "is_top1" in outputs:
                found = linear_token_statistics(
                    hidden, weight, targets, bias=bias, temperature=temperature
                )
                logprobs = found.logprobs
                entropy = found.entropy if "entropy" in outputs else None
                top = found.likeliest if "is_top1" in outputs else None
            else:
                logprobs = linear_token_logprobs(
                    hidden, weight, targets, bias=bias, temperature=temperature
                )
            if "mean_logits" in outputs:  # hidden times the mean row of the head
                with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
                    mean = hidden.float() @ weight.mean(dim=0, dtype=torch.float32)
                    mean = (mean if bias is None else mean + bias.float().mean()) / temperature
            return logprobs, entropy, None, mean, top

    return ChunkedLogProbFunction


_FUSED = "ChunkedLogProbFunction"
_OPTIONAL = {  # since TRL 1.14 and 1.15
    "selective_log_softmax_and_entropy": _selective_log_softmax_and_entropy,
    _FUSED: _chunked_log_prob_function,
}
_REPLACEMENTS = {
    "selective_log_softmax": _selective_log_softmax,
    "entropy_from_logits": _entropy_from_logits,
} | _OPTIONAL


def _bool(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask != 0


def _difference(name: str, theirs: Any, ours: Any) -> str:
    """Describe how the two functions differ. Empty if they do not."""
    takes = list(inspect.signature(getattr(theirs, "forward", theirs)).parameters)
    takes = [parameter for parameter in takes if parameter != "ctx"]
    known = list(inspect.signature(getattr(ours, "apply", ours)).parameters)
    if takes != known[: len(takes)]:
        return f"takes {', '.join(takes)}, not {', '.join(known)}"
    ours_tried = _tried(name, ours)
    try:
        theirs_tried = _tried(name, theirs)
    except Exception as error:  # such as a Triton kernel, which needs a GPU
        raise _Failed(f"{type(error).__name__}: {str(error).splitlines()[0]}") from None
    for what, expected, found in zip(("value", "gradient"), theirs_tried, ours_tried):
        error = max(
            float((a.float() - b.float()).detach().abs().max())
            for a, b in zip(expected, found, strict=True)
        )
        if not error <= TOLERANCE:
            return f"differs from our op in its {what} by {error:.2g}"
    return ""


@torch.enable_grad()
def _tried(name: str, function: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Results on random input, and gradients of a random weighted sum of them."""
    generator = torch.Generator().manual_seed(0)
    logits, hidden, weight, bias = (
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((2, 5, 37), (10, 8), (37, 8), (37,))
    )
    targets = torch.randint(37, (2, 5), generator=generator)
    if name == _FUSED:
        outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
        results = function.apply(
            hidden, weight, bias, targets.flatten(), 0.7, 16, None, 0.5, outputs
        )
        leaves = [hidden, weight, bias]
    else:
        results = function(logits) if name == "entropy_from_logits" else function(logits, targets)
        leaves = [logits]
    results = [x for x in ((results,) if isinstance(results, Tensor) else results) if x is not None]
    total = sum(
        (x * torch.randn(x.shape, generator=generator)).sum() for x in results if x.requires_grad
    )
    return results, list(torch.autograd.grad(total, leaves))
