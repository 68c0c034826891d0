"""The class that reads and writes model folders: whole models, and adapters on a base model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from typing_extensions import Self

from rlhf_core.files import model_folder
from rlhf_core.locks import check_free
from rlhf_core.models import hub, lora
from rlhf_core.models.gather import on_rank_0, reshard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Pretrained:
    """Reads and writes a model. One with a `score` head is a sequence classifier with one label.

    Subclasses must have a `config`, and a constructor that takes it alone.
    """

    is_language_model = True

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        dtype: torch.dtype = torch.float32,
        mesh: DeviceMesh | None = None,
    ) -> Self:
        """Read a model in eval mode, with its adapters if it was saved with some.

        Args:
            source: A folder in the Hugging Face or PEFT layout, or "owner/name" on the hub.
            dtype: Dtype of the weights in memory.
            mesh: Each rank reads only its pieces of the weights, as `shard` cuts them on this mesh;
                see `models.shard.mesh_of`. Adapters are read whole. Call `shard` before the model
                computes.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A config field or a tensor does not fit; the message names it.
        """
        if not lora.is_adapter(source):
            return hub.load(cls, source, dtype, mesh)
        base = lora.read_adapter_config(source).base
        if base is None:
            raise ValueError(
                f"{Path(source) / lora.CONFIG_FILE}: base_model_name_or_path is missing; load that "
                "model, then the adapters into it"
            )
        if cls.is_language_model and lora.is_reward_model(source):
            raise ValueError(f"{source}: adapters of a reward model, not of a language model")
        try:
            folder = model_folder(base)
        except OSError as error:
            file = Path(source) / lora.CONFIG_FILE
            raise FileNotFoundError(f"{file}: base_model_name_or_path: {error}") from None
        model = cls._load_base(folder, dtype, mesh)
        lora.load_adapters(model, source)
        return model.eval()

    @classmethod
    def from_transformers(cls, model):
        """Return a model in eval mode with the weights of a loaded model of `transformers`.

        A tensor that both store in one layout is shared: training either model changes the other.
        Most are. Copied are the matrices of GPT-2's blocks, which it stores transposed, and
        queries, keys and values, or gate and up, where they are tensors of their own.

        Args:
            model: A causal language model, or a sequence classifier for RewardModel. Its dtype and
                device stay.

        Raises:
            ValueError: The family, a config field or a tensor does not fit; the message names it.
        """
        return hub.adopt(cls, model)

    @classmethod
    def _load_base(cls, path: Path, dtype: torch.dtype, mesh: DeviceMesh | None):
        """A `cls` to load adapters into."""
        return hub.load(cls, path, dtype, mesh)

    def save_pretrained(self, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write a folder in the Hugging Face layout. A model with adapters writes only these.

        All ranks of a sharded model must call this. Rank 0 writes.

        Args:
            path: The folder.
            dtype: Dtype of the weights in the files. None means that in memory.

        Raises:
            BlockingIOError: A run in another process or thread writes into the folder.
            ValueError: A weight is beyond the range of dtype.
        """
        reshard(self)
        on_rank_0(self.state_dict(), lambda _: check_free(path))
        save = lora.save_adapters if lora.has_adapters(self) else hub.save
        save(self, path, dtype=dtype)
