"""The launchers as operators `torch.ops.rlhf_core.*`, which torch.compile does not trace into.

While torch.compile traces, `backends.resolve` returns one of `launchers` instead of `rlhf_core.cpp`
or `rlhf_core.kernels`. The ops do not notice: dynamo traces their autograd.Functions, so these give
the gradient here too. The operators alone have no gradient and raise if asked for one, also in
forward mode. Eager mode does not use operators, because one costs several times a plain call.

An operator cannot return None, so an empty bool tensor stands for a missing result. A launcher that
writes to its arguments is not an operator but breaks the graph: inductor loses writes of such an
operator to tensors that share memory, as the layers of a cache do (seen with torch 2.13 and dynamic
shapes).
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The two types of a launcher's `temperature`.
TEMPERATURE = "float temperature, Tensor? temperatures"

_classes = {name: type(name, (), {}) for name in ("rlhf_core.cpp", "rlhf_core.kernels")}


def launchers(module: str) -> type:
    """A class that has the name of a backend's module, and its launchers as static methods."""
    return _classes[module]


def operator(name: str, parameters: str, fake: Callable, function: Callable | None = None) -> None:
    """Register a launcher as an operator.

    Args:
        name: of the launcher in the backends' modules.
        parameters: in the schema language, in the launcher's order.
        fake: maps the launcher's arguments to results with the right shapes, strides and dtypes.
        function: the launcher, if the backends have none; its first argument is their module.
    """
    names = [parameter.split()[1] for parameter in parameters.split(",")]
    has_temperature = "temperatures" in names
    at = names.index("temperature") if has_temperature else 0

    def run(module: str, *args: Any) -> list[Tensor]:
        refuse_forward_mode()
        args = join(args)
        module = importlib.import_module(module)
        return _pack(function(module, *args) if function else getattr(module, name)(*args))

    def join(args):
        if not has_temperature:
            return args
        number, tensor = args[at : at + 2]
        return (*args[:at], number if tensor is None else tensor, *args[at + 2 :])

    def shapes(module: str, *args: Any) -> list[Tensor]:
        refuse_forward_mode()
        return _pack(fake(*join(args)))

    def refuse_forward_mode():  # torch would drop the tangents
        if torch.autograd.forward_ad._current_level >= 0:
            raise RuntimeError(
                f"{name} has no forward-mode derivative under torch.compile: "
                "use backend='reference'"
            )

    def launcher(module: str) -> Callable:
        def call(*args):
            if has_temperature:
                two = (1.0, args[at]) if isinstance(args[at], Tensor) else (args[at], None)
                args = (*args[:at], *two, *args[at + 1 :])
            results = getattr(torch.ops.rlhf_core, name)(module, *args)
            results = [None if x.dtype == torch.bool else x for x in results]
            return results[0] if len(results) == 1 else tuple(results)

        return staticmethod(call)

    schema = f"(str module, {parameters}) -> Tensor[]"
    registered = torch.library.custom_op(f"rlhf_core::{name}", run, mutates_args=(), schema=schema)
    registered.register_fake(shapes)
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
    "Tensor dlogprobs, Tensor? dentropy, Tensor logits, Tensor targets, Tensor? mask, "
    f"{TEMPERATURE}, Tensor? entropy, Tensor lse, bool inplace",  # inplace must be False here
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
    f"Tensor dkl, Tensor logits, Tensor ref_logits, Tensor? mask, {TEMPERATURE}, Tensor kl, "
    "Tensor lse, bool needs_logits, bool needs_ref_logits",
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
    "Tensor rewards, Tensor values, Tensor mask, float gamma, float lam, Tensor? last_values, "
    "Tensor? cu_seqlens",
    lambda rewards, *rest: (torch.empty_like(rewards), torch.empty_like(rewards)),
)
operator(
    "gae_bwd",
    "Tensor dadvantages, Tensor dreturns, Tensor mask, float gamma, float lam, "
    "bool has_last_values, Tensor? cu_seqlens",
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
    "Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, Tensor mask, "
    "float kl_coef, str estimator, float gamma, float lam, bool whiten, Tensor? cu_seqlens",
    lambda scores, logprobs, *rest: tuple(torch.empty_like(logprobs) for _ in range(4)),
)
operator(
    "ppo_loss_fwd",
    "Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor? values, Tensor? old_values, "
    "Tensor? returns, Tensor? entropy, Tensor mask, Tensor? weights, bool sequence_mean, "
    "float clip_low, float clip_high, float? value_clip_range, float vf_coef, "
    "float entropy_coef, float? dual_clip",
    lambda logprobs, old, advantages, values, old_values, returns, entropy, *rest: (
        logprobs.new_empty(()),
        logprobs.new_empty(()),
        logprobs.new_empty(10),
        *(None if x is None else torch.empty_like(x) for x in (logprobs, values, entropy)),
    ),
)
operator(
    "sample_tokens_fwd",
    "Tensor logits, Tensor seeds, Tensor counters, float temperature, int? top_k, float? top_p, "
    "float? min_p",
    lambda logits, seeds, counters, temperature, *truncation: (
        torch.empty_like(seeds),
        torch.empty_like(seeds, dtype=torch.float32),
        torch.empty_like(seeds, dtype=torch.float32)
        if any(x is not None for x in truncation)
        else None,
    ),
)


def eagerly(function: Callable, *args: Any, **options: Any) -> Any:
    """Call a function outside of the graph that torch.compile makes, which breaks there."""
    return torch.compiler.disable(function)(*args, **options)


eagerly._torchdynamo_disable = True  # like torch.compiler.disable, which would import dynamo now


def _breaking(module: str, name: str) -> Callable:
    def call(*args):
        return getattr(importlib.import_module(module), name)(*args)

    call._torchdynamo_disable = True
    return staticmethod(call)


for module, home in _classes.items():
    home.decode_attention_fwd = _breaking(module, "decode_attention_fwd")
