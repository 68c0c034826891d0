"""The log-probs of a reference policy in a file: computed once for a data set, after which no run holds a reference.

They are those of single tokens, so that every loss makes its own of them: sums, means, weights. With them go the digest
of every example, by which they are found in any order or split, and what they were made of. KTO cannot have them: its
KL is of prompts with the completions of others, which change with the batch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_core.models.lora import frozen_adapters
from rlhf_core.models.safetensors import read_tensors, write_tensors


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
        path, self.made_of = Path(path), {"reference": digest_of_model(reference), "precision": precision}
        if path.is_file():
            self._logprobs = _read(path, self.made_of)
        else:
            self._logprobs = {
                _key(example): part.cpu() for batch, parts in compute(reference) for example, part in zip(batch, parts)
            }
            lengths = torch.tensor([len(part) for part in self._logprobs.values()])
            keys = torch.tensor([list(key) for key in self._logprobs], dtype=torch.uint8)
            tensors = {"keys": keys, "lengths": lengths, "logprobs": torch.cat(list(self._logprobs.values()))}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, tensors, {"made_of": json.dumps(self.made_of)})
        for i, example in enumerate(examples):
            if _key(example) not in self._logprobs:
                raise ValueError(f"{path}: made of other examples, without example {i}: {repr(example)[:80]}")

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
            raise ValueError(f"{path}: made with another {name}, {then:.12}, not {made_of[name]:.12}; remove the file")
    parts = tensors["logprobs"].split(tensors["lengths"].tolist())
    return dict(zip(map(bytes, tensors["keys"].tolist()), parts, strict=True))


def _key(example) -> bytes:
    return hashlib.sha256(repr(example).encode()).digest()
