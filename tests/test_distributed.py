import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import (
    TEXTS,
    fives,
    make_ppo,
    make_trainer,
    model_folders,
    rows,
    run,
    run_ranks,
    snapshot,
    tiny,
    write,
)  # fmt: skip
from safetensors.torch import load_file

from rlhf_core import distributed
from rlhf_core.feedback.rewards import RewardError
from rlhf_core.models import Transformer, hub
from rlhf_core.models.gather import is_sharded, whole
from rlhf_core.models.shard import mesh_of
from rlhf_core.trainers import (
    IteratedRLHFConfig,
    PPOConfig,
    RewardConfig,
    RFTConfig,
    SFTConfig,
    rft,
)
from rlhf_core.training.metrics import Metrics

# ---- shares


@pytest.mark.parametrize("n", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_cover_every_row_once_in_order_and_differ_by_at_most_one(n, world, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: world)
    found, sizes = [], []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        own = distributed.share(n)
        sizes.append(own.stop - own.start)
        for part in distributed.shares(n, 2):
            assert 0 < part.stop - part.start <= 2
            found += range(part.start, part.stop)
    assert found == list(range(n)) and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("n", [1, 4, 7])
@pytest.mark.parametrize("at_once", [None, 1, 2])
def test_in_lockstep_all_ranks_take_equally_many_slices(n, at_once, monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 3)
    monkeypatch.setitem(distributed._state, "lockstep", True)
    found, counts = [], []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        slices = [(part, distributed.idle()) for part in distributed.shares(n, at_once)]
        counts.append(len(slices))
        found += [i for part, idle in slices if not idle for i in range(part.start, part.stop)]
        assert all(part == slice(0, 1) for part, idle in slices if idle)
        assert not distributed.idle()
    assert found == list(range(n)) and len(set(counts)) == 1


def test_an_idle_rank_adds_nothing_to_metrics(monkeypatch):
    metrics = Metrics()
    monkeypatch.setitem(distributed._state, "idle", True)
    metrics.add("loss", torch.ones(3))
    metrics.add_part("part", torch.tensor(2.0))
    assert metrics.means() == {}


# ---- exchanges


def exchange(rank, world):
    own = torch.arange(6).view(3, 2)[distributed.share(3)] if rank < 2 else torch.zeros(0, 2)
    ragged = torch.full((1, rank + 1), float(rank)) if rank != 1 else None
    columns = [(ragged > 0, ragged, None, ragged[:, 0])] if ragged is not None else []
    gradients = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]  # the second has none
    if rank:
        gradients[0].grad = torch.tensor([1.0, rank])
    distributed.add_gradients(gradients)
    metrics = Metrics()
    metrics.add("mean", torch.ones(rank) * rank)
    metrics.add_part("part", torch.tensor(0.5))
    if rank == 2:
        metrics.add("own", torch.tensor([4.0]))
    return {
        "gathered": distributed.gather(columns),
        "objects": distributed.gather_objects(rank),
        "first": distributed.from_rank_0(f"from {rank}"),
        "added": distributed.added(rank, 1.5),
        "gradients": [x.grad for x in gradients],
        "means": metrics.over_ranks().means(),
        "rows": len(own),
    }


@pytest.mark.slow
def test_every_rank_gets_all_rows_sums_and_objects(tmp_path):
    results = run_ranks(exchange, 3, tmp_path)
    for result in results:
        positive, ragged, none, first = result["gathered"]
        assert ragged.tolist() == [[0, 0, 0], [2, 2, 2]] and none is None
        assert positive.tolist() == [[False] * 3, [True] * 3] and first.tolist() == [0, 2]
        assert result["objects"] == [0, 1, 2] and result["first"] == "from 0"
        assert result["added"] == [3, 4.5]
        assert result["gradients"][0].tolist() == [2, 3] and result["gradients"][1] is None
        assert result["means"] == {"mean": 5 / 3, "part": 1.5, "own": 4}
    assert [result["rows"] for result in results] == [1, 1, 0]


# ---- errors


def fails(rank, world, folder):
    messages = []
    for bad in (1, 0):
        try:
            with distributed.together():
                if rank == bad:
                    raise RewardError(f"the reward of row {bad} is bad")
                distributed.gather_objects(rank)  # the others wait here
        except RewardError as error:
            assert distributed.is_shared(error)
            messages.append(str(error))
    try:  # all the same: no matter of a rank
        with distributed.together():
            raise ValueError("wrong option")
    except ValueError as error:
        messages.append(str(error))

    def reward(prompts, responses):
        if rank == 1:
            raise KeyError("no answer")
        return fives(prompts, responses)

    trainer = make_ppo(reward=reward, others=dict(out=folder), max_steps=2)
    try:
        trainer.train()
    except RewardError as error:
        messages.append(str(error))
    return messages


@pytest.mark.slow
def test_an_error_on_one_rank_is_that_of_all_and_names_rank_and_row(tmp_path):
    """Row 61."""
    for messages in run_ranks(fails, 3, tmp_path, str(tmp_path / "out")):
        first, second, third, fourth = messages
        assert first.removeprefix("rank 1: ") == "the reward of row 1 is bad"
        assert second.removeprefix("rank 0: ") == "the reward of row 0 is bad"
        assert third == "wrong option"
        assert "KeyError('no answer')" in fourth and "also raises on row 2 alone" in fourth
        assert fourth.startswith("step 1: ")
    assert (tmp_path / "out" / "checkpoint-error" / "state.safetensors").is_file()


@pytest.mark.slow
def test_a_rank_that_stalls_ends_the_others_and_is_named(tmp_path):
    """Row 61."""
    script = tmp_path / "stall.py"
    script.write_text(
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from helpers import make_ppo, fives\n"
        "from rlhf_core import distributed\n"
        "distributed.start()\n"
        "def reward(prompts, responses):\n"
        "    time.sleep(600 * distributed.rank())\n"
        "    return fives(prompts, responses)\n"
        "make_ppo(reward=reward, max_steps=1).train()\n"
    )
    begun = time.monotonic()
    done = torchrun(2, script, os.path.dirname(__file__), RLHF_CORE_TIMEOUT="15")
    assert done.returncode and time.monotonic() - begun < 300
    assert "RankError: step 1: rank 1 did not answer for 15 s" in done.stderr


def differs(rank, world, what):
    model = tiny(seed=rank if what == "weights" else 0)
    examples = rows("sft", seed=rank if what == "data" else 0)
    options = dict(max_grad_norm=1 + rank) if what == "option" else {}
    try:
        make_trainer("sft", model, examples, **options).train()
    except ValueError as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, message",
    [
        ("weights", "rank 1 has another trained weights than rank 0"),
        ("data", "rank 1 has another examples than rank 0"),
        ("option", "rank 1 has another max_grad_norm than rank 0: 2, not 1"),
    ],
)
def test_a_rank_with_other_weights_data_or_options_is_found_before_a_step(what, message, tmp_path):
    """Row 61."""
    for found in run_ranks(differs, 2, tmp_path, what):
        assert message in found and "same command, files and seed" in found


# ---- the same numbers


def double_gradients(rank, world):
    model = tiny().double()
    trainer = make_trainer("sft", model, rows("sft", 5), micro_batch_size=1)
    trainer.optimize(trainer.losses(trainer.examples, Metrics()))
    return [p.grad for p in trainer.trained_parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_gradients_in_float64_are_those_of_one_process(world, tmp_path):
    """Row 60."""
    expected = double_gradients(0, 1)
    for found in run_ranks(double_gradients, world, tmp_path):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def first_policy(folder, in_pieces):
    """The model in the folder "start" beside the run's."""
    mesh = mesh_of() if in_pieces else None
    return Transformer.from_pretrained(Path(folder).parent / "start", mesh=mesh)


def part_of_a_run(rank, world, folder, steps, resume, shard=False):
    options = dict(max_steps=steps, batch_size=5, minibatch_size=3, epochs=9, save_every=2)
    options |= dict(adam_eps=1e-3, lr_schedule="constant", shard=shard)
    policy = first_policy(folder, shard and world > 1)
    trainer = make_ppo(policy, others=dict(out=folder), **options)
    if resume:
        trainer.resume()
    history = trainer.train()
    assert trainer.sharded == (shard and world > 1)
    with whole(trainer.model) as plain:
        return snapshot(plain), [line["objective/scores"] for line in history]


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_run_resumes_on_another_number_of_processes(shard, tmp_path):
    """Row 60: 2, then 1, then 3 processes, with whole or sharded weights: as one process."""
    tiny().save_pretrained(tmp_path / "start")
    weights, scores = part_of_a_run(0, 1, tmp_path / "whole", 6, False)
    out = str(tmp_path / "out")
    run_ranks(part_of_a_run, 2, tmp_path, out, 2, False, shard)
    assert (tmp_path / "out" / "checkpoint-2" / "pieces").is_dir() == shard
    Transformer.from_pretrained(tmp_path / "out" / "checkpoint-2")
    part_of_a_run(0, 1, out, 4, True)
    found = run_ranks(part_of_a_run, 3, tmp_path, out, 6, True, shard)
    for found_weights, found_scores in found:
        assert found_scores == pytest.approx(scores)
        for name, x in weights.items():
            torch.testing.assert_close(found_weights[name], x, rtol=0, atol=1e-6)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def rounds(rank, world, folder, count, resume, shard=False):
    options = dict(response_length=4, batch_size=3, num_samples=3, lr=1e-2, adam_eps=1e-3)
    config = RFTConfig(rounds=count, max_steps=2, shard=shard, **options)
    model = first_policy(folder, shard and world > 1)
    history = rft(model, [[5, 6], [7], [8, 9, 4]], config, reward=fives, out=folder, resume=resume)
    assert is_sharded(model) == (shard and world > 1)
    with whole(model) as plain:
        return snapshot(plain), [line["objective/scores"] for line in history]


@pytest.mark.slow
def test_sharded_rounds_resume_on_another_number_of_processes(tmp_path):
    """Row 60: rounds on 2, 1 and 3 processes."""
    tiny().save_pretrained(tmp_path / "start")
    weights, scores = rounds(0, 1, tmp_path / "whole", 3, False)
    out = str(tmp_path / "out")
    run_ranks(rounds, 2, tmp_path, out, 1, False, True)
    rounds(0, 1, out, 2, True)
    for found_weights, found_scores in run_ranks(rounds, 3, tmp_path, out, 3, True, True):
        assert found_scores == pytest.approx(scores)
        for name, x in weights.items():
            torch.testing.assert_close(found_weights[name], x, rtol=0, atol=1e-6)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_rounds_shard_their_reward_model_and_ppo_alike():
    assert (
        IteratedRLHFConfig(reward=RewardConfig(mesh="2x2"), ppo=PPOConfig(mesh="2x3")).copies == 2
    )
    with pytest.raises(ValueError, match="reward has None copies of weights in pieces, but ppo"):
        IteratedRLHFConfig(ppo=PPOConfig(shard=True))


def test_a_mesh_must_multiply_to_the_processes(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 6)
    make_trainer("sft", mesh="2x3")
    with pytest.raises(ValueError, match="mesh is 2x2, but there are 6 processes"):
        make_trainer("sft", mesh="2x2")
    for mesh in ("2", "2x", "0x6", "2x3x1", "x", "-2x3", "2X3"):
        with pytest.raises(ValueError, match=f"mesh must be COPIESxPIECES.*got '{mesh}'"):
            SFTConfig(mesh=mesh)


def test_sharding_in_one_process_warns_and_changes_nothing():
    with pytest.warns(UserWarning, match="shard has no effect in one process"):
        trainer = make_trainer("sft", shard=True)
    trainer.train()
    plain = make_trainer("sft")
    plain.train()
    for x, y in zip(snapshot(trainer.model).values(), snapshot(plain.model).values()):
        assert torch.equal(x, y)


# ---- torchrun


def torchrun(world, *command, restarts=0, background=False, **environment):
    """`torchrun` on one machine. Its children print to the same stderr."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--nproc-per-node", str(world), "--max-restarts", str(restarts)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    process = subprocess.Popen([*start, *map(str, command)], **pipes)
    if background:
        return process
    out, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


@pytest.fixture
def task(tmp_path):
    """Arguments of a short SFT command."""
    model_folders(tmp_path)
    write(tmp_path / "data.jsonl", TEXTS)
    return [
        "-m", "rlhf_core", "sft", "--model", tmp_path / "policy", "--data", tmp_path / "data.jsonl",
        "--batch-size", 3, "--max-steps", 6, "--epochs", 9, "--lr", 1e-3, "--adam-eps", 1e-3,
        "--max-length", 16, "--device", "cpu", "--save-every", 1, "--eval-every", 2,
    ]  # fmt: skip


def assert_same_run(out, other):
    weights = (load_file(x / "model.safetensors") for x in (out, other))
    for x, y in zip(*(map(one.get, sorted(one)) for one in weights), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
    lines = [(x / "metrics.jsonl").read_text().splitlines() for x in (out, other)]
    for line, right in zip(*lines, strict=True):
        assert json.loads(line) == pytest.approx(json.loads(right), rel=1e-4)


def commands(rank, world, folder, out, *options):
    """Run commands with all kinds of models; whether each model was read in pieces."""
    meshes, load = [], hub.load

    def watched(cls, source, dtype, mesh=None):
        meshes.append(mesh is not None)
        return load(cls, source, dtype, mesh)

    small = ["--max-steps", 1, "--adam-eps", 1e-3, "--device", "cpu", *options]
    sampled = ["--prompts", f"{folder}/prompts.jsonl", "--response-length", 4, "--batch-size", 3]
    judged = ["--reward-model", f"{folder}/reward", "--eval-prompts", f"{folder}/held_out.jsonl"]
    data = ["--data", f"{folder}/data.jsonl", "--max-length", 16]
    with mock.patch.object(hub, "load", watched):
        for name, rest in {
            "sft": data,
            "ppo": [*sampled, *judged, "--lora-rank", 2, "--ppo-epochs", 1],
            "rft": [*sampled, *judged, "--rounds", 2],
        }.items():
            model = ["--model", f"{folder}/policy", "--out", f"{out}/{name}"]
            assert run(name, *model, *rest, *small) == 0, name
    return meshes


@pytest.mark.slow
def test_commands_with_shard_read_pieces_and_give_the_run_of_one_process(tmp_path):
    model_folders(tmp_path)
    write(tmp_path / "data.jsonl", TEXTS)
    for name, texts in (("prompts", TEXTS[:4]), ("held_out", TEXTS[4:5])):
        write(tmp_path / f"{name}.jsonl", [{"prompt": x["prompt"]} for x in texts])
    commands(0, 1, tmp_path, tmp_path / "one")
    for meshes in run_ranks(commands, 2, tmp_path, str(tmp_path), str(tmp_path / "two"), "--shard"):
        assert len(meshes) == 5 and all(meshes)
    for file in (tmp_path / "one").glob("*/*model.safetensors"):  # or adapter_model.safetensors
        two = load_file(tmp_path / "two" / file.relative_to(tmp_path / "one"))
        for name, x in load_file(file).items():
            torch.testing.assert_close(two[name], x, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_ends_as_an_unbroken_run(task, tmp_path):
    """Row 60: SIGKILL of a rank after step 2, under torchrun --max-restarts 1.

    The unbroken run is that of one process, and rank 0 alone prints.
    """
    assert run(*task[2:], "--out", tmp_path / "one") == 0
    out = tmp_path / "two"
    slow = tmp_path / "slow.py"  # waits before each step, so that the kill comes in between
    slow.write_text(
        "import os, sys, time\n"
        "from rlhf_core import cli\n"
        "from rlhf_core.training.trainer import Trainer\n"
        "step = Trainer.step\n"
        "Trainer.step = lambda self, batch: (time.sleep(1), step(self, batch))[1]\n"
        f"with open({str(tmp_path / 'pids')!r}, 'a') as file:\n"
        "    print(os.environ['RANK'], os.getpid(), file=file)\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    process = torchrun(2, slow, *task[2:], "--out", out, restarts=1, background=True)
    end = time.monotonic() + 300
    while not (out / "checkpoint-2").is_dir() and time.monotonic() < end:
        time.sleep(0.1)
    pids = [line.split() for line in (tmp_path / "pids").read_text().splitlines()]
    os.kill(next(int(pid) for rank, pid in pids if rank == "1"), signal.SIGKILL)
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert len((tmp_path / "pids").read_text().splitlines()) == 4
    assert_same_run(out, tmp_path / "one")
    assert shown.count("written to") == 1 and errors.count("sft 1/6") == 1
    about = json.loads((out / "run.json").read_text())
    assert about["resumed"] and about["status"] == "finished"
    assert {x.name for x in out.iterdir()} == {x.name for x in (tmp_path / "one").iterdir()}


def status_and_errors(rank, world, *arguments):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        return run(*arguments), errors.getvalue()


@pytest.mark.slow
def test_bad_input_is_one_line_of_rank_0_with_status_2_and_nothing_is_written(task, tmp_path):
    """Row 61."""
    write(tmp_path / "data.jsonl", [*TEXTS[:3], {"prompt": "no completion"}])
    arguments = [*map(str, task[2:]), "--out", str(tmp_path / "out")]
    (status, errors), other = run_ranks(status_and_errors, 2, tmp_path, *arguments)
    assert status == 2 and other == (2, "")
    assert errors.count("rlhf-core sft: error:") == 1 and "data.jsonl:4" in errors
    assert not (tmp_path / "out").exists()


def test_processes_that_do_not_know_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, but RANK.* torchrun --nproc-per-node"):
        distributed.start()
    with pytest.raises(ValueError, match=r"Call rlhf_core.distributed.start\(\) first"):
        make_trainer("sft")
    for size in ("x", "0", "-1"):
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(ValueError, match="WORLD_SIZE must be a number of processes"):
            distributed.start()


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_bad_timeout_is_named(seconds, monkeypatch):
    monkeypatch.setenv("RLHF_CORE_TIMEOUT", seconds)
    with pytest.raises(ValueError, match=f"RLHF_CORE_TIMEOUT must be .* got '{seconds}'"):
        distributed._timeout()
