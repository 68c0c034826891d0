"""A language model that knows what its tokens are worth: Q and V heads on its trunk (Snell et al. 2022).

`generate` samples from what the values make of its logits. Its folder is that of the language model, in the Hugging
Face layout, and one more file with the heads, which `rlhf-core ilql`, `generate` and `merge` read; to whatever else
reads it, as `best-of-n`, `ppo` or `sft`, it is the language model alone. Left out: value heads on a trunk of their own.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_core.files import model_folder
from rlhf_core.models.hub import HEADS_FILE
from rlhf_core.models.lagging import lagging_copy
from rlhf_core.models.safetensors import read_tensors, write_tensors
from rlhf_core.models.transformer import Transformer, Trunk, TrunkModel
from rlhf_core.ops import linear_token_logprobs


class QHead(nn.Module):
    """Hidden states to a value for each token of the vocabulary; 0 at first."""

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__()
        self.up = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(2 * hidden_size, vocab_size, bias=False)
        nn.init.zeros_(self.out.weight)

    def features(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., 2 D), which `out` is linear in."""
        return F.relu(self.up(hidden.to(self.up.weight.dtype)))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return self.out(self.features(hidden))

    def token_logprobs(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Log-probs (N,) of tokens (N,) under softmax(values), from hidden states (N, D)."""
        return linear_token_logprobs(self.features(hidden), self.out.weight, tokens)

    def of_tokens(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(..., D) and (...) ids -> (...) float32, under autocast too, without the values of all other tokens."""
        with torch.autocast(hidden.device.type, enabled=False):
            return (self.features(hidden) * self.out.weight[tokens]).sum(dim=-1).float()


class ILQLModel(TrunkModel):
    """lm, a Transformer, with two Q heads `q`, their slow copies `target_q` and a V head; all values are 0 at first.

    beta: how much they count in its logits, per unit of reward; 0: not at all.
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
        """V(s) (...) float32 of hidden states (..., D), under autocast too."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.v(hidden.to(self.v[0].weight.dtype))[..., 0].float()

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V): the language model's + beta (min target_q - V)."""
        q = torch.minimum(*(head(hidden) for head in self.target_q))
        return self.lm.logits(hidden) + self.beta * (q - self.v(hidden))

    prefill, decode = Transformer.prefill, Transformer.decode  # of these logits

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write the language model's folder (with adapters: these alone), and the heads beside it."""
        self.lm.save_pretrained(path)
        write_tensors(Path(path) / HEADS_FILE, self._heads(), {"beta": repr(self.beta)})

    @classmethod
    @torch.no_grad()
    def from_pretrained(
        cls, source: str | os.PathLike, dtype: torch.dtype = torch.float32
    ) -> ILQLModel:
        """Read what `save_pretrained` wrote; errors as of `Transformer.from_pretrained`, and ValueError where the heads
        are damaged or not those of this language model."""
        model, file = (
            cls(Transformer.from_pretrained(source, dtype)),
            model_folder(source) / HEADS_FILE,
        )
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, so this is a plain language model")
        header, stored = read_tensors(file)
        heads = model._heads()
        for name in heads.keys() | stored.keys():
            shapes = [
                tuple(tensors[name].shape) if name in tensors else None
                for tensors in (stored, heads)
            ]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{file}: tensor {name!r} has shape {shapes[0]}, this model's is {shapes[1]}"
                )
            heads[name].copy_(stored[name])
        model.beta = float(header["beta"])
        return model.eval()

    def _heads(self) -> dict[str, Tensor]:
        return {
            name: x
            for name, x in self.state_dict(keep_vars=True).items()
            if not name.startswith("lm.")
        }


def has_values(source: str | os.PathLike) -> bool:
    """Whether a folder, or hub repository, is an ILQLModel's."""
    return (model_folder(source) / HEADS_FILE).is_file()
