"""The launchers as operators `torch.ops.rlhf_core.*`, which torch.compile takes into a graph without looking inside.

While torch.compile traces, `backends.resolve` answers with one of `launchers` in place of `rlhf_core.cpp` or
`rlhf_core.kernels`. The ops cannot tell: their autograd.Functions, traced, give the gradient here too; the operators
alone have none and raise when asked for one. Eager mode does not come this way, as an operator costs several times a
plain call.

An operator has no way to return None: a result that is not there leaves it as an empty bool tensor. A launcher that
writes to its arguments is no operator but breaks the graph: inductor loses what such a one writes to tensors that share
memory, as the layers of a cache do (seen with torch 2.13 and dynamic shapes).
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TEMPERATURE = (
    "float temperature, Tensor? temperatures"  # the two types of a launcher's `temperature`
)

_classes = {name: type(name, (), {}) for name in ("rlhf_core.cpp", "rlhf_core.kernels")}


def launchers(module: str) -> type:
    """The launchers of a backend's module, as static methods of a class with the module's name."""
    return _classes[module]


def operator(name: str, parameters: str, fake: Callable, function: Callable | None = None) -> None:
    """Register a launcher.

    parameters: in the schema's language, in the launcher's order.
    fake: from the launcher's arguments to its results, shapes, strides and dtypes only.
    function: the launcher itself where no backend has one: it takes the backend's module first.
    """
    names = [parameter.split()[1] for parameter in parameters.split(",")]
    has_temperature = "temperatures" in names
    at = names.index("temperature") if has_temperature else 0

    def run(module: str, *args: Any) -> list[Tensor]:
        module = importlib.import_module(module)
        return _pack(
            function(module, *join(args)) if function else getattr(module, name)(*join(args))
        )

    def join(args):
        if not has_temperature:
            return args
        number, tensor = args[at : at + 2]
        return (*args[:at], number if tensor is None else tensor, *args[at + 2 :])

    def launcher(module: str) -> Callable:
        def call(*args):
            if has_temperature:
                two = (1.0, args[at]) if isinstance(args[at], Tensor) else (args[at], None)
                args = (*args[:at], *two, *args[at + 1 :])
            results = [
                None if x.dtype == torch.bool else x
                for x in getattr(torch.ops.rlhf_core, name)(module, *args)
            ]
            return results[0] if len(results) == 1 else tuple(results)

        return staticmethod(call)

    schema = f"(str module, {parameters}) -> Tensor[]"
    registered = torch.library.custom_op(f"rlhf_core::{name}", run, mutates_args=(), schema=schema)
    registered.register_fake(lambda module, *args: _pack(fake(*join(args))))
    for module, home in _classes.items():
        setattr(home, name, launcher(module))


def _pack(results: Tensor | tuple[Tensor | None, ...] | None) -> list[Tensor]:
    results = results if isinstance(results, tuple) else (results,)
    return [torch.empty(0, dtype=torch.bool) if x is None else x for x in results]


def _token_logprobs_fwd(logits, targets, mask, temperature, with_entropy, with_lse):
    logprobs = logits.new_empty(targets.shape, dtype=torch.float32)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    return logprobs, entropy, logprobs.new_empty((*targets.shape, 2)) if with_lse else None


def _gradient(logits):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


operator(
    "token_logprobs_fwd",
    f"Tensor logits, Tensor targets, Tensor? mask, {TEMPERATURE}, bool with_entropy, bool with_lse",
    _token_logprobs_fwd,
)
operator(
    "token_logprobs_bwd",
    f"Tensor dlogprobs, Tensor? dentropy, Tensor logits, Tensor targets, Tensor? mask, {TEMPERATURE}, Tensor? entropy, "
    "Tensor lse, bool inplace",  # inplace is False here: an operator's results are its own
    lambda dlogprobs, dentropy, logits, *rest: _gradient(logits),
)
operator(
    "full_kl_fwd",
    f"Tensor logits, Tensor ref_logits, Tensor? mask, {TEMPERATURE}",
    lambda logits, *rest: tuple(
        logits.new_empty(logits.shape[:-1] + n, dtype=torch.float32) for n in ((), (4,))
    ),
)
operator(
    "full_kl_bwd",
    f"Tensor dkl, Tensor logits, Tensor ref_logits, Tensor? mask, {TEMPERATURE}, Tensor kl, Tensor lse, "
    "bool needs_logits, bool needs_ref_logits",
    lambda dkl, logits, ref, mask, temperature, kl, lse, needs_logits, needs_ref: (
        _gradient(logits) if needs_logits else None,
        _gradient(ref) if needs_ref else None,
    ),
)
operator(
    "kl_estimate_fwd",
    "Tensor logprobs, Tensor ref_logprobs, Tensor? mask, str estimator",
    lambda logprobs, *rest: torch.empty_like(logprobs),
)
operator(
    "kl_estimate_bwd",
    "Tensor dkl, Tensor logprobs, Tensor ref_logprobs, Tensor? mask, str estimator",
    lambda dkl, logprobs, *rest: (torch.empty_like(logprobs), torch.empty_like(logprobs)),
)
operator(
    "gae_fwd",
    "Tensor rewards, Tensor values, Tensor mask, float gamma, float lam, Tensor? last_values, Tensor? cu_seqlens",
    lambda rewards, *rest: (torch.empty_like(rewards), torch.empty_like(rewards)),
)
operator(
    "gae_bwd",
    "Tensor dadvantages, Tensor dreturns, Tensor mask, float gamma, float lam, bool has_last_values, "
    "Tensor? cu_seqlens",
    lambda dadvantages, dreturns, mask, gamma, lam, has_last_values, cu_seqlens: (
        torch.empty_like(dreturns),
        torch.empty_like(dreturns),
        dreturns.new_empty(len(dreturns) if cu_seqlens is None else len(cu_seqlens) - 1)
        if has_last_values
        else None,
    ),
)
operator(
    "ppo_advantages_fwd",
    "Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask, float kl_coef, str estimator, "
    "float gamma, float lam, bool whiten, Tensor? cu_seqlens",
    lambda scores, logprobs, *rest: tuple(torch.empty_like(logprobs) for _ in range(4)),
)
operator(
    "ppo_loss_fwd",
    "Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? values, Tensor? old_values, Tensor? returns, "
    "Tensor? entropy, Tensor mask, Tensor? weights, bool sequence_mean, float clip_low, float clip_high, "
    "float? value_clip_range, float vf_coef, float entropy_coef, float? dual_clip",
    lambda logprobs, old, advantages, values, old_values, returns, entropy, *rest: (
        logprobs.new_empty(()),
        logprobs.new_empty(()),
        logprobs.new_empty(10),
        *(None if x is None else torch.empty_like(x) for x in (logprobs, values, entropy)),
    ),
)
operator(
    "sample_tokens_fwd",
    "Tensor logits, Tensor seeds, Tensor counters, float temperature, int? top_k, float? top_p, float? min_p",
    lambda logits, seeds, counters, temperature, *truncation: (
        torch.empty_like(seeds),
        torch.empty_like(seeds, dtype=torch.float32),
        torch.empty_like(seeds, dtype=torch.float32)
        if any(x is not None for x in truncation)
        else None,
    ),
)


def _breaking(module: str, name: str) -> Callable:
    def call(*args):
        return getattr(importlib.import_module(module), name)(*args)

    call._torchdynamo_disable = (
        True  # torch.compiler.disable, which would import dynamo here and now
    )
    return staticmethod(call)


for module, home in _classes.items():
    home.decode_attention_fwd = _breaking(module, "decode_attention_fwd")
