"""A state is read by any number of ranks, and training goes on as if it had not stopped."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks, tiny
from torch.distributed.checkpoint import FileSystemWriter

from rlhf_core.models import Transformer
from rlhf_core.models.gather import reshard, whole_tensor
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.models.shard import mesh_of, shard
from rlhf_core.models.shard_state import load_state, save_state

pytestmark = pytest.mark.slow  # other processes
IDS = torch.tensor([[7, 8, 9, 10, 11, 2], [7, 9, 9, 8, 11, 2]])
ODD = dict(hidden_size=15, num_heads=3, head_dim=2, num_kv_heads=1, vocab_size=13)


def build(seed, sharded, lora=False, **options):
    model = tiny(Transformer, seed, **(ODD | options)).double()
    if lora:
        add_adapters(model, LoRAConfig(rank=2))
    if sharded:
        shard(model, mesh_of())
    parameters = {name: x for name, x in model.named_parameters() if x.requires_grad}
    return model, parameters, torch.optim.AdamW(parameters.values(), lr=0.01, eps=1e-3)


def train(model, optimizer, steps=3):
    """Steps on both rows, which every rank computes a part of."""
    parts = dist.get_world_size() if dist.is_initialized() else 1
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(IDS[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
        (loss / parts).backward()
        optimizer.step()
    reshard(model)


def weights(parameters):
    return {name: whole_tensor(x).detach().clone() for name, x in parameters.items()}


def stages(rank, world, source, target, lora):
    """Go on from `source`, if there is one: save to `target`, and return the next weights."""
    model, parameters, optimizer = build(0, dist.is_initialized(), lora)
    state = {"generator": torch.Generator().get_state(), "steps": torch.tensor(3)}
    if source:
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.fill_(0.5)
        state = {name: torch.zeros_like(x) for name, x in state.items()}
        load_state(source, parameters, optimizer, state)
        assert int(state["steps"]) == 3 and torch.Generator().set_state(state["generator"])
    else:
        train(model, optimizer)
    save_state(target, parameters, optimizer, state)
    saved = weights(parameters)
    train(model, optimizer)
    return saved, weights(parameters)


@pytest.mark.parametrize("lora", [False, True])
def test_another_number_of_ranks_goes_on(lora, tmp_path):
    two = run_ranks(stages, 2, tmp_path, None, str(tmp_path / "2"), lora)
    one = [stages(0, 1, tmp_path / "2", tmp_path / "1", lora)]
    three = run_ranks(stages, 3, tmp_path, str(tmp_path / "1"), str(tmp_path / "3"), lora)
    (saved, after), *others = two + one + three
    assert saved.keys() == after.keys() and len(saved) > 4
    for then, now in others:
        for name, x in saved.items():
            assert torch.equal(then[name], x), name
            assert (now[name] - after[name]).abs().max() < 1e-12, name
    assert max(float((after[name] - x).abs().max()) for name, x in saved.items()) > 1e-3


def test_a_state_that_does_not_fit_or_is_damaged_changes_nothing(tmp_path):
    good = tmp_path / "good"
    model, parameters, optimizer = build(0, False)
    train(model, optimizer)
    save_state(good, parameters, optimizer)

    def check(error, message, parameters=parameters, state=None, damage=None):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        if damage:
            damage(folder)
        before = weights(parameters)
        optimizer = torch.optim.AdamW(parameters.values())
        with pytest.raises(error, match=message):
            load_state(folder, parameters, optimizer, state)
        assert all(torch.equal(x, before[name]) for name, x in weights(parameters).items())
        assert not optimizer.state

    def flip(name):
        def damage(folder):
            data = bytearray((folder / name).read_bytes())
            data[len(data) // 2] ^= 1
            (folder / name).write_bytes(data)

        return damage

    check(
        ValueError, r"__0_0.distcp: damaged: its digest is \w{8}, but", damage=flip("__0_0.distcp")
    )
    check(ValueError, "metadata: damaged: its digest", damage=flip(".metadata"))
    gone = lambda name: lambda folder: (folder / name).unlink()  # noqa: E731
    check(FileNotFoundError, "no state.json, so there is no complete", damage=gone("state.json"))
    check(FileNotFoundError, "__0_0.distcp: no such file", damage=gone("__0_0.distcp"))
    text = lambda value: lambda folder: (folder / "state.json").write_text(json.dumps(value))  # noqa: E731
    check(ValueError, "files must list digests, got None", damage=text({}))
    outside = {"files": {".metadata": "", "../good/.metadata": ""}}
    check(FileNotFoundError, "good/.metadata: no such file", damage=text(outside))
    other = build(1, False, hidden_size=16)[1]
    check(ValueError, r"this run needs torch.float64 \(", other)
    fewer = {name: x for name, x in parameters.items() if "norm1" not in name}
    check(ValueError, "norm1.weight' belongs to nothing in this run", fewer)
    check(ValueError, "'state:steps' is missing", state={"steps": torch.tensor(0)})


def fails(rank, world, root):
    _, parameters, optimizer = build(0, True)
    save_state(root, parameters, optimizer)
    if rank == 1:

        def full(*_):
            raise OSError(28, "No space left on device")

        FileSystemWriter.write_data = full
    with pytest.raises(OSError, match=r"not written: rank 1: \[Errno 28\] No space left on device"):
        save_state(root, parameters, optimizer)
    with pytest.raises(FileNotFoundError, match="so there is no complete state"):
        load_state(root, parameters, optimizer)


def test_a_rank_that_cannot_write_is_an_error_of_all(tmp_path):
    run_ranks(fails, 2, tmp_path, str(tmp_path / "state"))
