"""A language model whose logits Q and V heads on its trunk shift (ILQL, Snell et al. 2022).

Its folder is that of the language model, plus one file with the heads. `rlhf-core ilql`, `generate`
and `merge` read this file. Other commands, such as `ppo` or `sft`, read only the language model.
Left out: value heads on a separate trunk.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_core.files import model_folder, short
from rlhf_core.models import hub
from rlhf_core.models.gather import reshard
from rlhf_core.models.hub import HEADS_FILE
from rlhf_core.models.lagging import lagging_copy
from rlhf_core.models.lora import has_adapters, save_adapters
from rlhf_core.models.safetensors import stored_tensors, stored_texts
from rlhf_core.models.transformer import Transformer, Trunk, TrunkModel
from rlhf_core.ops import linear_token_logprobs

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class QHead(nn.Module):
    """Hidden states to a value of each token in the vocabulary. All values start at 0."""

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__()
        self.up = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(2 * hidden_size, vocab_size, bias=False)
        nn.init.zeros_(self.out.weight)

    def features(self, hidden: Tensor) -> Tensor:
        """Map (..., D) to the input (..., 2 D) of `out`."""
        return F.relu(self.up(hidden.to(self.up.weight.dtype)))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., D) to (..., V)."""
        return self.out(self.features(hidden))

    def token_logprobs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return log-probs (N,) of tokens (N,) under softmax(values) of hidden states (N, D)."""
        return linear_token_logprobs(self.features(hidden), self.out.weight, tokens)

    def of_tokens(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Return only the values (...) float32 of given tokens (...), also under autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return (self.features(hidden) * self.out.weight[tokens]).sum(dim=-1).float()


class ILQLModel(TrunkModel):
    """A Transformer `lm` with two Q heads `q`, their lagging copies `target_q`, and a V head `v`.

    beta: Weight of the values in the logits, per unit of reward. All values start at 0.
    """

    def __init__(self, lm: Transformer, beta: float = 1.0):
        super().__init__()
        D, V = lm.config.hidden_size, lm.config.vocab_size
        self.lm, self.beta = lm, beta
        self.q = nn.ModuleList(QHead(D, V) for _ in range(2))
        self.v = nn.Sequential(nn.Linear(D, 2 * D), nn.ReLU(), nn.Linear(2 * D, 1))
        for parameter in self.v[2].parameters():
            nn.init.zeros_(parameter)
        self.target_q = lagging_copy(self.q)
        for heads in (self.q, self.v, self.target_q):
            heads.to(lm.head_weight)

    @property
    def trunk(self) -> Trunk:
        return self.lm.trunk

    def values(self, hidden: Tensor) -> Tensor:
        """Return V(s) (...) float32 of hidden states (..., D), also under autocast."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.v(hidden.to(self.v[0].weight.dtype))[..., 0].float()

    def logits(self, hidden: Tensor) -> Tensor:
        """Map (..., D) to (..., V): the language model's logits + beta (min target_q - V)."""
        q = torch.minimum(*(head(hidden) for head in self.target_q))
        return self.lm.logits(hidden) + self.beta * (q - self.v(hidden))

    prefill, decode = Transformer.prefill, Transformer.decode  # which call `logits`

    def save_pretrained(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write the heads, and the language model as `Transformer.save_pretrained` does.

        The heads keep their dtype. All ranks of a sharded model must call this.
        """
        reshard(self)
        save = save_adapters if has_adapters(self.lm) else hub.save
        save(self.lm, path, dtype=dtype, heads=(self._heads(), {"beta": repr(self.beta)}))

    @classmethod
    @torch.no_grad()
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        dtype: torch.dtype = torch.float32,
        mesh: DeviceMesh | None = None,
    ) -> ILQLModel:
        """Read a folder that `save_pretrained` wrote.

        mesh: As for `Transformer.from_pretrained`. The heads are read whole.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file is damaged or does not fit; the message names it.
        """
        model = cls(Transformer.from_pretrained(source, dtype, mesh))
        file = model_folder(source) / HEADS_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, so this is a plain language model")
        stored, heads, beta = stored_tensors(file), model._heads(), stored_texts(file).get("beta")
        for name in sorted(heads.keys() | stored.keys()):
            got, wanted = (tuple(x[name].shape) if name in x else None for x in (stored, heads))
            if got != wanted:
                raise ValueError(
                    f"{file}: tensor {name[:80]!r} has shape {got}, this model's is {wanted}"
                )
        try:
            model.beta = float(beta)
        except (TypeError, ValueError):
            model.beta = math.nan
        if not 0 <= model.beta < math.inf:
            raise ValueError(f"{file}: beta must be a finite number >= 0, got {short(beta)}")
        for name, tensor in stored.items():
            tensor.copy_to(heads[name])
        return model.eval()

    def _heads(self) -> dict[str, Tensor]:
        tensors = self.state_dict(keep_vars=True).items()
        return {name: tensor for name, tensor in tensors if not name.startswith("lm.")}


def has_values(source: str | os.PathLike) -> bool:
    """Whether a folder or hub repository holds an ILQLModel."""
    return (model_folder(source) / HEADS_FILE).is_file()
