"""A sharded model saves the files of a plain one, and rank 0 holds one whole tensor at a time."""

import weakref
from pathlib import Path

import pytest
import torch
from helpers import GPT2, run_ranks, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_core.models import ILQLModel, RewardModel, hub
from rlhf_core.models.gather import on_rank_0
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.models.safetensors import TensorWriter
from rlhf_core.models.shard import mesh_of, shard

ODD = dict(hidden_size=15, num_heads=3, head_dim=2, num_kv_heads=1, vocab_size=13)


def adapted(model):
    add_adapters(model, LoRAConfig(rank=3, base="base"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def process_rewards():
    model = tiny(RewardModel)
    model.of_steps = True
    model.normalize(0.5, 2.0)
    return model


MODELS = {
    "tied": lambda: tiny(tie_embeddings=True, **ODD),
    "gpt2": lambda: tiny(**GPT2),
    "reward": process_rewards,
    "adapters": lambda: adapted(tiny(**ODD)),
    "adapters of a reward model": lambda: adapted(tiny(RewardModel)),
    "values": lambda: ILQLModel(tiny(**ODD), beta=0.7),
    "values on adapters": lambda: ILQLModel(adapted(tiny())),
}


class Alive(TorchDispatchMode):
    """The most bytes of tensors alive at a time that operations in the block have made."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if plain(x)}
        for x in filter(plain, tree_leaves(result)):
            storage = x.untyped_storage()
            if storage._cdata not in self.known | given:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


def plain(x):
    return type(x) in (torch.Tensor, torch.nn.Parameter) and x.device.type == "cpu"


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def saves(rank, world, root):
    """Save every model; a full disk, and a run that holds the folder, are errors of all ranks."""
    mesh = mesh_of(world // 2)
    for name, build in MODELS.items():
        model = build()
        shard(model, mesh)
        if hasattr(model, "hidden_states"):
            model.hidden_states(torch.tensor([[7, 8, 9]]))  # the head stays gathered
        model.save_pretrained(f"{root}/{name}")
        model.save_pretrained(f"{root}/{name} in 16 bits", dtype=torch.bfloat16)
    model = tiny()
    shard(model, mesh)
    hub.save(model, f"{root}/many", max_shard_bytes=3000)
    write = TensorWriter.write

    def full(self, name, tensor):
        if ".1." in name:
            raise OSError(28, "No space left on device")
        write(self, name, tensor)

    TensorWriter.write = full if rank == 0 else None
    before = files(f"{root}/tied")
    prefix = "" if rank == 0 else "rank 0: "
    with pytest.raises(OSError) as error:
        model.save_pretrained(f"{root}/tied")
    file = f"{root}/tied/model.safetensors"
    assert str(error.value) == f"{prefix}{file}: not written: No space left on device"
    assert files(f"{root}/tied") == before
    TensorWriter.write = write

    def fail(pairs):
        raise UnicodeDecodeError("utf-8", b"", 0, 1, "why")

    with pytest.raises(UnicodeDecodeError if rank == 0 else RuntimeError, match="why"):
        on_rank_0(model.state_dict(), fail)
    taken = []
    on_rank_0(model.state_dict(), lambda pairs: taken.append(next(iter(pairs))[0]))
    assert taken == ["trunk.embed.weight"] * (rank == 0)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_sharded_model_saves_the_bytes_of_a_plain_one(world, tmp_path):
    run_ranks(saves, world, tmp_path, str(tmp_path))
    for name, build in MODELS.items():
        build().save_pretrained(tmp_path / "wanted")
        assert files(tmp_path / name) == files(tmp_path / "wanted"), name
        build().save_pretrained(tmp_path / "wanted", dtype=torch.bfloat16)
        assert files(tmp_path / f"{name} in 16 bits") == files(tmp_path / "wanted"), name
        for file in (tmp_path / "wanted").iterdir():
            file.unlink()
    hub.save(tiny(), tmp_path / "wanted", max_shard_bytes=3000)
    assert files(tmp_path / "many") == files(tmp_path / "wanted")
    assert len(files(tmp_path / "many")) > 5


def peaks(rank, world, root):
    model = tiny(hidden_size=64, num_layers=12, vocab_size=1000)
    sizes = [x.nbytes for x in model.parameters()]
    shard(model, mesh_of())
    with Alive() as alive:
        model.save_pretrained(f"{root}/out", dtype=torch.float64)
    return alive.peak, max(sizes), sum(sizes)


@pytest.mark.slow
def test_a_save_holds_one_tensor_at_a_time(tmp_path):
    first, second = run_ranks(peaks, 2, tmp_path, str(tmp_path))
    for (peak, largest, total), tensors in ((first, 3), (second, 0)):  # one of them in 64 bits
        assert largest * 8 < total
        assert tensors * largest <= peak <= tensors * largest + 10_000
