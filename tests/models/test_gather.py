"""A sharded model saves the files of a plain one, and reads its own pieces of them.

On a save rank 0 holds one whole tensor at a time. Reading takes a rank no more than its pieces.
"""

import weakref
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import GPT2, run_ranks, tiny
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_core.models import ILQLModel, RewardModel, Transformer, ValueModel, hub
from rlhf_core.models.gather import is_piece, local, on_rank_0, rows_of, whole_tensor
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.models.safetensors import StoredTensor, TensorWriter
from rlhf_core.models.shard import mesh_of, shard
from rlhf_core.trainers import PPOConfig, PPOTrainer

ODD = dict(hidden_size=15, num_heads=3, head_dim=2, num_kv_heads=1, vocab_size=13)


def adapted(model, base="base"):
    add_adapters(model, LoRAConfig(rank=3, base=base))
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
        given = {x.untyped_storage()._cdata for x in parts((args, kwargs))}
        for x in parts(result):
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


def parts(tree):
    """The tensors on the CPU, also those inside of DTensors."""
    leaves = [getattr(x, "_local_tensor", x) for x in tree_leaves(tree)]
    kinds = torch.Tensor, torch.nn.Parameter
    return [x for x in leaves if type(x) in kinds and x.device.type == "cpu"]


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


# ---- reading

READ = {  # the class that reads a folder, and its model, given the folder of a base model
    "tied": (Transformer, lambda base: tiny(tie_embeddings=True, **ODD)),
    "gated": (Transformer, lambda base: tiny(**ODD, intermediate_size=7, qkv_bias=True)),
    "gpt2": (Transformer, lambda base: tiny(**GPT2, vocab_size=13, intermediate_size=7)),
    "reward": (RewardModel, lambda base: process_rewards()),
    "critic": (ValueModel, lambda base: tiny(RewardModel)),
    "values": (ILQLModel, lambda base: ILQLModel(tiny(**ODD), beta=0.7)),
    "adapters": (Transformer, lambda base: adapted(tiny(), base)),
    "adapters of a reward model": (RewardModel, lambda base: adapted(tiny(RewardModel), base)),
}
PARTLY = ("values", "adapters", "adapters of a reward model")  # whose heads or adapters are whole


def bytes_read(function):
    """The result of the function, and the bytes that it reads of tensors in files."""
    sizes, pieces = [], StoredTensor.pieces

    def watched(self, box=()):
        for first, rows in pieces(self, box):
            sizes.append(rows.nbytes)
            yield first, rows

    with mock.patch.object(StoredTensor, "pieces", watched):
        return function(), sum(sizes)


def reads(rank, world, root, copies):
    """Read every folder in pieces, and compare with the whole model."""
    mesh, ids = mesh_of(copies), torch.tensor([[7, 8, 9]])
    folders = {name: kind for name, (kind, _) in READ.items()}
    for name, kind in (
        folders | dict.fromkeys(("several files", "same head"), Transformer)
    ).items():
        plain = kind.from_pretrained(f"{root}/{name}")
        model, size = bytes_read(lambda: kind.from_pretrained(f"{root}/{name}", mesh=mesh))  # noqa: B023
        if name not in PARTLY:
            assert all(map(is_piece, model.parameters())), name
            held = [local(x).nbytes for x in model.parameters()]
            assert size == sum(held) + held[0] * (name == "same head"), name
        for x, y in zip(model.parameters(), plain.parameters(), strict=True):
            assert x.requires_grad == y.requires_grad and torch.equal(local(x), y[rows_of(x)]), name
            assert torch.equal(whole_tensor(x), y), name
        shard(model, mesh)
        with torch.no_grad():
            assert torch.equal(model.hidden_states(ids), plain.hidden_states(ids)), name
    with pytest.raises(ValueError, match=r"lm_head.weight is not the embedding, but config.json"):
        Transformer.from_pretrained(f"{root}/other head", mesh=mesh)


@pytest.mark.slow
@pytest.mark.parametrize("copies, world", [(2, 4), (1, 3)])
def test_a_model_read_in_pieces_is_the_plain_one(copies, world, tmp_path):
    """Each rank reads its own rows only, also of transposed, joined and tied weights."""
    tiny().save_pretrained(tmp_path / "base")
    for name, (_, build) in READ.items():
        build(str(tmp_path / "base")).save_pretrained(tmp_path / name)
    hub.save(tiny(**ODD), tmp_path / "several files", max_shard_bytes=3000)
    for name in ("same head", "other head"):
        model = tiny(tie_embeddings=True, **ODD)
        model.save_pretrained(tmp_path / name)
        file, head = tmp_path / name / "model.safetensors", model.trunk.embed.weight.detach()
        tensors = load_file(file) | {"lm_head.weight": head.clone()}
        tensors["lm_head.weight"][-1] += name == "other head"  # on the last rank alone
        save_file(tensors, file, {"format": "pt"})
    run_ranks(reads, world, tmp_path, str(tmp_path), copies)


def peaks_of_reading(rank, world, root):
    """A PPO run of four models up to its first step: policy, reference, reward model and critic."""
    with Alive() as alive:
        policy = Transformer.from_pretrained(f"{root}/policy", mesh=mesh_of())
        reward = RewardModel.from_pretrained(f"{root}/reward", mesh=mesh_of())
        config = PPOConfig(shard=True, response_length=4, kl_coef=0.1)
        trainer = PPOTrainer(policy, [[5, 6]], config, reward=reward)
        trainer._check_same_run()  # by a digest of all weights
        trainer.shard()
        del policy, reward
    models = [*trainer.trained_models(), *trainer.scorer.models, trainer.reference.model]
    assert len(models) == 4 and trainer.sharded
    held = sum(local(x).nbytes for model in models for x in model.parameters())
    return alive.peak, held, max(x.numel() * 4 for x in models[0].parameters())


@pytest.mark.slow
def test_a_sharded_run_begins_with_its_pieces_and_two_tensors_at_most(tmp_path):
    sizes = dict(hidden_size=64, num_layers=12, vocab_size=1000)
    tiny(**sizes).save_pretrained(tmp_path / "policy")
    tiny(RewardModel, **sizes).save_pretrained(tmp_path / "reward")
    for peak, held, largest in run_ranks(peaks_of_reading, 2, tmp_path, str(tmp_path)):
        assert largest * 8 < held
        assert held <= peak <= held + 2 * largest + 10_000
