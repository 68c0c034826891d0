"""The CPU backend: torch tensors to the addresses and strides that `rlhf_core._C` takes. Its only importer.

Same launchers as `rlhf_core.kernels`. Arguments are trusted, but for the range of targets: the ops have validated
them and made the last axis contiguous. A launcher allocates its outputs and runs on `torch.get_num_threads()` threads;
the result does not depend on how many.
"""

import torch
from torch import Tensor

import rlhf_core._C as _C  # not "from rlhf_core import": its error would not name the missing file

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2, "abs": 3}


def isa() -> str:
    """The instruction set in use: the CPU's best, or RLHF_CORE_CPU_ISA."""
    return _C.isa()


def cpu_features() -> dict[str, str]:
    """The instruction sets that RLHF_CORE_CPU_ISA may name here, and how work is spread over threads."""
    return {"instruction sets": ", ".join(_C.available_isas()), "threading": _C.threading()}


def token_logprobs_fwd(
    logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(B, T, V), (B, T), (B, T) -> logprobs (B, T), entropy (B, T) or None, lse (B, T, 2), all float32.

    Raises ValueError for a counted target outside [0, V).
    """
    logprobs = logits.new_empty(targets.shape, dtype=torch.float32)
    entropy = torch.empty_like(logprobs) if with_entropy else None
    lse = logprobs.new_empty((*targets.shape, 2))
    _C.token_logprobs_fwd(
        _DTYPES[logits.dtype], temperature, torch.get_num_threads(), *logits.shape,
        *_grid(logits), *_grid(targets), *_grid(mask),
        logprobs.data_ptr(), _address(entropy), lse.data_ptr(),
    )  # fmt: skip
    return logprobs, entropy, lse


def token_logprobs_bwd(
    dlogprobs: Tensor,
    dentropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float,
    entropy: Tensor | None,
    lse: Tensor,
    dlogits: Tensor,
) -> None:
    """Write the gradient into dlogits (B, T, V), which may be the logits themselves."""
    _C.token_logprobs_bwd(
        _DTYPES[logits.dtype], temperature, torch.get_num_threads(), *logits.shape,
        *_grid(logits), *_grid(targets), *_grid(mask), *_grid(dlogprobs), *_grid(dentropy),
        _address(entropy), lse.data_ptr(), *_grid(dlogits),
    )  # fmt: skip


def kl_estimate_fwd(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str) -> Tensor:
    kl = torch.empty_like(logprobs)
    _C.kl_estimate_fwd(
        _ESTIMATORS[estimator], torch.get_num_threads(), logprobs.numel(),
        logprobs.data_ptr(), ref_logprobs.data_ptr(), _address(mask), kl.data_ptr(),
    )  # fmt: skip
    return kl


def kl_estimate_bwd(
    dkl: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, estimator: str
) -> tuple[Tensor, Tensor]:
    dlogprobs, dref_logprobs = torch.empty_like(logprobs), torch.empty_like(logprobs)
    _C.kl_estimate_bwd(
        _ESTIMATORS[estimator], torch.get_num_threads(), logprobs.numel(),
        dkl.data_ptr(), logprobs.data_ptr(), ref_logprobs.data_ptr(), _address(mask),
        dlogprobs.data_ptr(), dref_logprobs.data_ptr(),
    )  # fmt: skip
    return dlogprobs, dref_logprobs


def gae_fwd(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, last_values: Tensor | None
) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    _C.gae_fwd(
        gamma, lam, torch.get_num_threads(), *rewards.shape,
        rewards.data_ptr(), values.data_ptr(), mask.data_ptr(), _address(last_values),
        advantages.data_ptr(), returns.data_ptr(),
    )  # fmt: skip
    return advantages, returns


def gae_bwd(
    dadvantages: Tensor, dreturns: Tensor, mask: Tensor, gamma: float, lam: float, has_last_values: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    drewards, dvalues = torch.empty_like(dreturns), torch.empty_like(dreturns)
    dlast_values = dreturns.new_empty(dreturns.shape[:1]) if has_last_values else None
    _C.gae_bwd(
        gamma, lam, torch.get_num_threads(), *dreturns.shape,
        dadvantages.data_ptr(), dreturns.data_ptr(), mask.data_ptr(),
        drewards.data_ptr(), dvalues.data_ptr(), _address(dlast_values),
    )  # fmt: skip
    return drewards, dvalues, dlast_values


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _grid(x: Tensor | None) -> tuple[int, int, int]:
    """Address and strides of the leading two axes."""
    return (0, 0, 0) if x is None else (x.data_ptr(), x.stride(0), x.stride(1))
