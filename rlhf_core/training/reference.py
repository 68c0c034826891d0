"""The reference that a policy is compared with: a frozen model, or log-probs in a file.

A file holds the log-probs of single tokens, so that every loss can sum, average or weight them. It
also holds a digest of every example, by which they are found in any order or split, and the digest
of the reference and its precision. KTO cannot use a file: its KL pairs prompts with other prompts'
completions, which change with the batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_core import distributed
from rlhf_core.data.collate import as_group, count_targets
from rlhf_core.files import check_replaceable, check_writable
from rlhf_core.models import eval_mode
from rlhf_core.models.gather import copy_of, is_sharded, whole, whole_copy
from rlhf_core.models.lora import adapters_off, frozen_adapters, has_adapters
from rlhf_core.models.safetensors import read_tensors, write_tensors
from rlhf_core.training.checkpoint import digest


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters take no gradient: a reference policy."""
    return copy_of(model).eval().requires_grad_(False)


def _moving_copy(model: nn.Module) -> nn.Module:
    """As `frozen_copy`, of whole weights."""
    return whole_copy(model).eval() if is_sharded(model) else frozen_copy(model)


class Reference:
    """The reference model: the one given, else the policy as it is now.

    For a policy with adapters, "as it is now" is the policy itself with its adapters frozen or, if
    they are new, switched off: its weights are held once. Otherwise it is a frozen copy. A
    reference that `moves` (its holder moves it) is a copy, too.
    """

    def __init__(self, model: nn.Module, given: nn.Module | None = None, *, moves: bool = False):
        if given is model:
            raise ValueError(
                "the reference is the policy itself, which trains. Leave the reference out to "
                "compare with the policy as it is now"
            )
        self.adapters, self.moves = None, moves
        self.switch = given is None and has_adapters(model)
        if moves and self.switch:
            raise ValueError("a reference that is the policy without adapters cannot follow it")
        if moves and given is not None:
            policy_shapes = {name: x.shape for name, x in model.state_dict().items()}
            if policy_shapes != {name: x.shape for name, x in given.state_dict().items()}:
                raise ValueError("a reference that follows the policy must have its shapes")
            given = _moving_copy(given)
        if self.switch:
            trained = [n for n, p in model.named_parameters() if p.requires_grad]
            moving = [name for name in trained if ".adapters." not in name]
            if moving:
                raise ValueError(
                    f"{moving[0]} trains beside the adapters, so the policy without adapters is no "
                    "fixed reference. Freeze it, or pass a reference"
                )
            self.adapters = frozen_adapters(model)
        if self.switch:
            self.model = model
        else:
            copied = _moving_copy if moves else frozen_copy
            self.model = copied(model) if given is None else given

    @contextlib.contextmanager
    def policy(self) -> Iterator[nn.Module]:
        """The reference model, for forwards without gradient and without dropout."""
        off = contextlib.nullcontext()
        if self.switch:
            off = adapters_off(self.model, self.adapters)
        with eval_mode(self.model), off, torch.no_grad():
            yield self.model

    def fixed_models(self) -> list[nn.Module]:
        """The modules that no step changes, see `Trainer.fixed_models`."""
        return [] if self.moves else [self.model, *(self.adapters or ())]


class KnownLogps:
    """What a fixed reference has said about examples, so that it reads each of them once."""

    def __init__(self):
        self._found: dict[bytes, list[float]] = {}
        self._like = torch.empty(0)

    def __call__(self, batch: list, compute: Callable[[], Tensor]) -> Tensor:
        """Rows (B, K) of the examples, all from `compute` if one of them is new."""
        keys = list(map(_key, batch))
        if all(key in self._found for key in keys):
            return self._like.new_tensor([self._found[key] for key in keys])
        rows = compute()
        self._found |= zip(keys, rows.tolist())
        self._like = rows[:0]
        return rows


class ReferenceLogprobs:
    """Log-probs (M,) of the targets of any batch of the examples, sequence after sequence."""

    def __init__(
        self,
        path: str | os.PathLike,
        examples: Sequence,
        reference: nn.Module,
        precision: str,
        compute: Callable[[nn.Module], Iterable[tuple[list, Sequence[Tensor]]]],
    ):
        """
        Args:
            path: read if the file exists, else written.
            compute: called with the reference; yields lists of examples with the log-probs of each
                one's targets. Those of all ranks cover all `examples`.

        Raises:
            ValueError: the file is damaged, belongs to another reference or precision, or lacks an
                example.
        """
        path = Path(path)
        self.made_of = {"reference": model_digest(reference), "precision": precision}
        if path.is_dir():
            raise IsADirectoryError(f"reference_logprobs {path} is a directory, not a file")
        if distributed.from_rank_0(path.is_file()):
            self._logprobs = _read(path, self.made_of)
        else:
            check_replaceable(path)
            check_writable(path.parent)
            with distributed.together(), whole(reference) as plain:
                own = {
                    _key(example): logprobs.cpu()
                    for batch, parts in compute(plain)
                    for example, logprobs in zip(batch, parts)
                }
            ranks = distributed.gather_objects(own)
            self._logprobs = {key: x for found in ranks for key, x in found.items()}
            with distributed.together():
                if not distributed.rank():
                    _write(path, self.made_of, self._logprobs)
        for i, example in enumerate(examples):
            logprobs = self._logprobs.get(_key(example))
            if logprobs is not None and len(logprobs) != count_targets(example):
                raise ValueError(
                    f"{path}: damaged: {len(logprobs)} log-probs of example {i}, which has "
                    f"{count_targets(example)} targets"
                )
            if logprobs is None:
                raise ValueError(
                    f"{path}: no log-probs of example {i}, {repr(example)[:80]}. The file was made "
                    "from other data: remove it, or name another file"
                )

    def __call__(self, batch: list) -> Tensor:
        return torch.cat([self._logprobs[_key(example)] for example in batch])


def model_digest(model: nn.Module) -> str:
    """SHA-256 of a model's config and weights; adapters that change nothing are ignored."""
    weights = [weight for name, weight in model.named_parameters() if ".adapters." not in name]
    adapters = nn.ModuleList(frozen_adapters(model) or ())
    return digest(repr(model.config), *weights, *adapters.parameters())


def _write(path: Path, made_of: dict[str, str], logprobs: dict[bytes, Tensor]) -> None:
    tensors = {
        "keys": torch.tensor([list(key) for key in logprobs], dtype=torch.uint8),
        "lengths": torch.tensor([len(part) for part in logprobs.values()]),
        "logprobs": torch.cat(list(logprobs.values())),
    }
    write_tensors(path, tensors, {"made_of": json.dumps(made_of)})


def _read(path: Path, made_of: dict[str, str]) -> dict[bytes, Tensor]:
    header, tensors = read_tensors(path)
    if "made_of" not in header or not tensors.keys() >= {"keys", "lengths", "logprobs"}:
        raise ValueError(f"{path}: this safetensors file does not hold a reference's log-probs")
    try:
        then = json.loads(header["made_of"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: made_of in its header is not JSON: {error}") from None
    if not isinstance(then, dict):
        raise ValueError(f"{path}: damaged: made_of in its header is {then!r:.40}, not an object")
    for name, now in made_of.items():
        if then.get(name) != now:
            raise ValueError(
                f"{path}: made with another {name} ({then.get(name)!s:.12}, now {now:.12}). "
                "Remove the file, or name another one"
            )
    keys, lengths, logprobs = (tensors[name] for name in ("keys", "lengths", "logprobs"))
    dtypes = (keys.dtype, lengths.dtype, logprobs.dtype)
    if dtypes != (torch.uint8, torch.int64, torch.float32):
        raise ValueError(f"{path}: the file is damaged: keys, lengths and log-probs are {dtypes}")
    vectors = logprobs.ndim == lengths.ndim == 1
    whole = vectors and lengths.ge(0).all() and lengths.sum() == logprobs.numel()
    whole = whole and logprobs.isfinite().all()
    if not whole or keys.shape != (len(lengths), hashlib.sha256().digest_size):
        raise ValueError(
            f"{path}: the file is damaged: keys of shape {tuple(keys.shape)}, {len(lengths)} "
            f"lengths with sum {int(lengths.sum())}, log-probs of shape {tuple(logprobs.shape)}"
        )
    return dict(zip(map(bytes, keys.tolist()), logprobs.split(lengths.tolist()), strict=True))


def _key(example) -> bytes:
    """Digest of the tokens and of which of them count: all that log-probs depend on."""
    prompt, completions, masks = as_group(example)
    masks = ([True] * len(ids) if mask is None else mask for ids, mask in zip(completions, masks))
    rows = [[int(x) for x in row] for row in (prompt, *completions, *masks)]
    return hashlib.sha256(repr(rows).encode()).digest()
