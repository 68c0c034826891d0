"""What a policy is compared with: a frozen copy, itself without its adapters, or log-probs in a file.

Those in a file are computed once for a data set, after which no run holds a reference. They are those of single tokens,
so that every loss makes its own of them: sums, means, weights. With them go the digest of every example, by which they
are found in any order or split, and what they were made of. KTO cannot have them: its KL is of prompts with the
completions of others, which change with the batch.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_core.data.collate import as_group
from rlhf_core.files import check_writable
from rlhf_core.models import eval_mode
from rlhf_core.models.lora import adapters_off, frozen_adapters, has_adapters
from rlhf_core.models.safetensors import read_tensors, write_tensors


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters take no gradient: a reference policy."""
    return copy.deepcopy(model).eval().requires_grad_(False)


class Reference:
    """What a policy is compared with: the model given; else the policy as it is now.

    Where the policy has adapters that is the policy itself with them as they are now, off if they are new, and no
    second copy of its weights; else it is a frozen copy. One that `moves` (whoever holds it moves it) is a copy, too.
    """

    def __init__(self, model: nn.Module, given: nn.Module | None = None, *, moves: bool = False):
        if given is model:
            raise ValueError(
                "the reference is the policy itself, which moves; leave it out for the policy as it is now"
            )
        self.adapters, self.switch, self.moves = None, given is None and has_adapters(model), moves
        if moves and self.switch:
            raise ValueError("a reference that is the policy without its adapters cannot follow it")
        if moves and given is not None:
            of_policy = {name: x.shape for name, x in model.state_dict().items()}
            if of_policy != {name: x.shape for name, x in given.state_dict().items()}:
                raise ValueError(
                    "a reference that follows the policy must have its shape, and the one given has not"
                )
            given = frozen_copy(given)
        if self.switch:
            moving = [
                n for n, p in model.named_parameters() if p.requires_grad and ".adapters." not in n
            ]
            if moving:
                raise ValueError(
                    f"the policy is no reference without its adapters while {moving[0]} trains; freeze it"
                )
            self.adapters = frozen_adapters(model)
        self.model = model if self.switch else frozen_copy(model) if given is None else given

    @contextlib.contextmanager
    def policy(self) -> Iterator[nn.Module]:
        """The reference, for forwards without gradient and without dropout."""
        off = adapters_off(self.model, self.adapters) if self.switch else contextlib.nullcontext()
        with eval_mode(self.model), off, torch.no_grad():
            yield self.model


class ReferenceLogprobs:
    """From batches of examples to the log-probs (M,) of their targets, sequence after sequence."""

    def __init__(
        self,
        path: str | os.PathLike,
        examples: Sequence,
        reference: nn.Module,
        precision: str,
        compute: Callable[[nn.Module], Iterable[tuple[list, Sequence[Tensor]]]],
    ):
        """
        path: read where the file is there, else written.
        compute: called with the reference; yields lists of examples with the log-probs of the targets of each, in the
            end of all `examples`.

        Raises ValueError where the file is damaged, was made of another reference or precision, or lacks an example.
        """
        path, self.made_of = (
            Path(path),
            {"reference": digest_of_model(reference), "precision": precision},
        )
        if path.is_dir():
            raise IsADirectoryError(f"reference_logprobs {path} is a folder, not a file")
        if path.is_file():
            self._logprobs = _read(path, self.made_of)
        else:
            check_writable(path.parent)
            self._logprobs = {
                _key(example): part.cpu()
                for batch, parts in compute(reference)
                for example, part in zip(batch, parts)
            }
            lengths = torch.tensor([len(part) for part in self._logprobs.values()])
            keys = torch.tensor([list(key) for key in self._logprobs], dtype=torch.uint8)
            tensors = {
                "keys": keys,
                "lengths": lengths,
                "logprobs": torch.cat(list(self._logprobs.values())),
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, tensors, {"made_of": json.dumps(self.made_of)})
        for i, example in enumerate(examples):
            if _key(example) not in self._logprobs:
                raise ValueError(
                    f"{path}: made of other examples, without example {i}: {repr(example)[:80]}"
                )

    def __call__(self, batch: list) -> Tensor:
        return torch.cat([self._logprobs[_key(example)] for example in batch])


def digest_of_model(model: nn.Module) -> str:
    """SHA-256 of a model's config and weights; of adapters that change nothing it takes no notice."""
    digest = hashlib.sha256(repr(model.config).encode())
    adapters = nn.ModuleList(frozen_adapters(model) or ())
    weights = [weight for name, weight in model.named_parameters() if ".adapters." not in name]
    for weight in (*weights, *adapters.parameters()):
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(path: Path, made_of: dict[str, str]) -> dict[bytes, Tensor]:
    header, tensors = read_tensors(path)
    if "made_of" not in header or not tensors.keys() >= {"keys", "lengths", "logprobs"}:
        raise ValueError(f"{path}: a safetensors file, but not of a reference's log-probs")
    for name, then in json.loads(header["made_of"]).items():
        if then != made_of[name]:
            raise ValueError(
                f"{path}: made with another {name}, {then:.12}, not {made_of[name]:.12}; remove the file"
            )
    keys, lengths, logprobs = (tensors[name] for name in ("keys", "lengths", "logprobs"))
    whole = (
        lengths.ge(0).all()
        and lengths.sum() == logprobs.numel()
        and logprobs.ndim == lengths.ndim == 1
    )
    if not whole or keys.shape != (len(lengths), hashlib.sha256().digest_size):
        shapes = f"keys of shape {tuple(keys.shape)}, {len(lengths)} lengths of {int(lengths.sum())} in all"
        raise ValueError(f"{path}: damaged: {shapes}, log-probs of shape {tuple(logprobs.shape)}")
    return dict(zip(map(bytes, keys.tolist()), logprobs.split(lengths.tolist()), strict=True))


def _key(example) -> bytes:
    """Of the tokens and which of them count, as all that log-probs depend on."""
    prompt, completions, masks = as_group(example)
    masks = ([True] * len(ids) if mask is None else mask for ids, mask in zip(completions, masks))
    rows = [[int(x) for x in row] for row in (prompt, *completions, *masks)]
    return hashlib.sha256(repr(rows).encode()).digest()
