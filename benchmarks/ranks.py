"""Whether several processes train as one does: the largest difference of weights, method by method.

`python -m rlhf_core.benchmarks.ranks` trains every method on small models with 1, 2, 3 and 5
processes (Gloo, on the CPU), and with sharded weights, and prints a table. All orders of summation
differ, so weights differ by rounding. adam_eps is 1e-3: at 1e-8 Adam's first steps turn a
gradient's rounding error into whole steps.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import random
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from rlhf_core import distributed, trainers
from rlhf_core.data import Example, Pair, Ranked, Steps
from rlhf_core.models import ILQLModel, RewardModel, Transformer, TransformerConfig
from rlhf_core.models.gather import whole
from rlhf_core.models.lora import LoRAConfig, add_adapters

PROMPTS = [[5, 3, 7, 4], [8, 1], [6], [9, 9, 1], [4, 4], [3], [7, 8, 9], [1, 5], [6, 6, 2, 8]]
# Processes are forks of one that has imported this file, where that is safe.
START = "forkserver" if sys.platform == "linux" else "spawn"
PRELOAD = ["rlhf_core.benchmarks.ranks"]
IGNORED = {"eps", "lr"}  # metrics that measure time, or that are equal by construction
Result = tuple[dict[str, torch.Tensor], list[dict[str, float]]]


class Letters:
    """A tokenizer: token i is a letter, and 11 ends a step."""

    eos_ids = (2,)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("..abcdefghi\n"[i] if i < 12 else "x" for i in ids)

    def save(self, path: Path) -> None:
        (Path(path) / "letters").touch()


def tiny(kind: Callable = Transformer, *, lora: bool = False, **options: Any) -> Any:
    """A model of some 10,000 weights, equal on every rank."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=24, hidden_size=24, num_layers=2, num_heads=2, max_positions=32)
    model = kind(TransformerConfig(**sizes, eos_ids=(2,), pad_id=0, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    if lora:
        add_adapters(model, LoRAConfig(rank=2))
    return model


def fives(prompts: list, responses: list) -> list[float]:
    """A reward of 1 for every 5, 0.1 for a long response."""
    return [response.count(5) + 0.1 * (len(response) > 4) for response in responses]


def longer(prompts: list, first: list, second: list) -> list[float]:
    """A judge that prefers the response with more fives."""
    wins = zip(fives(prompts, first), fives(prompts, second))
    return [0.5 if a == b else float(a > b) for a, b in wins]


def examples(kind: str, n: int = 11) -> list:
    """Rows of unequal lengths, so that no rank has the mean of the others."""
    rng = random.Random(0)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(3, 24) for _ in range(rng.randrange(low, high))]

    rows: dict[str, Callable[[int], Any]] = {
        "text": lambda i: Example(ids(1, 5), [*ids(1, 8), 2]),
        "labelled": lambda i: Example(ids(1, 5), [*ids(1, 8), 2], None, i % 3 > 0),
        "scored": lambda i: Example(ids(1, 5), [*ids(1, 8), 2], None, None, rng.random()),
        "context": lambda i: Example(
            ids(1, 5), [*ids(1, 6), 2], teacher_prompt_ids=[4, 9, *ids(1, 5)]
        ),
        "pairs": lambda i: Pair(ids(1, 5), [*ids(1, 6), 2], [*ids(1, 7), 2]),
        "criteria": lambda i: Pair(
            ids(1, 5),
            [*ids(1, 6), 2],
            [*ids(1, 7), 2],
            criteria=[None, {"helpful": True}, {"helpful": True, "harmless": False}][i % 3],
        ),
        "lists": lambda i: Ranked(ids(1, 5), [[*ids(1, 6), 2] for _ in range(2 + i % 2)]),
        "steps": lambda i: Steps(ids(1, 4), [5, 6, 7, 11], [False, True, False, True], [1.0, 0.0]),
    }
    return [rows[kind](i) for i in range(n)]


OPTIONS: dict[str, Any] = {}  # of all cases: how weights are sharded


def on_data(trainer: type, config: type, kind: str, model: Callable = tiny, **options: Any):
    """A method on examples: batches of 4, so that the last one has 3 rows."""

    def run() -> tuple[list[nn.Module], list[dict]]:
        settings = dict(batch_size=4, max_steps=8, epochs=9, lr=1e-2, adam_eps=1e-3)
        with_eval = dict(eval_examples=examples(kind, 3))
        if kind == "text":
            with_eval["pretraining_examples"] = examples(kind, 2)
        trained = trainer(
            model(), examples(kind), config(**(settings | options | OPTIONS)), **with_eval
        )
        return trained.trained_models(), trained.train()

    return run


def on_prompts(trainer: type, config: type, others: dict | None = None, **options: Any):
    """A method that samples: rollouts of 5 prompts, so that the last one has 4."""

    def run() -> tuple[list[nn.Module], list[dict]]:
        given = {"reward": fives, "model": tiny, "eval_examples": PROMPTS[:3]} | (others or {})
        made = {name: x() if name in MADE else x for name, x in given.items()}
        settings = dict(batch_size=5, max_steps=8, epochs=9, lr=2e-3, response_length=6)
        settings |= dict(adam_eps=1e-3, max_grad_norm=1e9, seed=3)
        trained = trainer(
            made.pop("model"), PROMPTS, config(**(settings | options | OPTIONS)), **made
        )
        return trained.trained_models(), trained.train()

    return run


MADE = {"model", "reference"}  # arguments that are made anew for each run


def in_rounds(train: Callable, config: Any, **others: Any):
    """A method made of rounds."""

    def run() -> tuple[list[nn.Module], list[dict]]:
        model = tiny()
        return [model], train(model, PROMPTS, config(**OPTIONS), **others)

    return run


def _ptx() -> dict[str, Any]:
    return {"ptx_examples": examples("text", 5)}


def _process_reward() -> RewardModel:
    model = tiny(RewardModel)
    model.of_steps = True
    return model


def _criteria() -> RewardModel:
    model = tiny(RewardModel)
    model.set_criteria({"helpful": 1.0, "harmless": 0.5})
    return model


def _iterated_rlhf(**options: Any) -> trainers.IteratedRLHFConfig:
    small = dict(batch_size=5, lr=2e-3, adam_eps=1e-3, **options)
    return trainers.IteratedRLHFConfig(
        rounds=2,
        sampling=trainers.SamplingConfig(num_samples=2, response_length=6, batch_size=4),
        reward=trainers.RewardConfig(**small),
        ppo=trainers.PPOConfig(**small, response_length=6, max_steps=2),
    )


t = trainers
ROUNDS = dict(rounds=2, batch_size=4, lr=1e-2, adam_eps=1e-3, response_length=6, num_samples=4)
REWARD = partial(
    on_data, t.RewardTrainer, t.RewardConfig, model=partial(tiny, RewardModel), lr=1e-3
)
PPO = partial(on_prompts, t.PPOTrainer, t.PPOConfig, ppo_epochs=2, minibatch_size=3)
GRPO = partial(on_prompts, t.GRPOTrainer, t.GRPOConfig, num_samples=3, minibatch_size=7)
CASES: dict[str, Callable[[], tuple[list[nn.Module], list[dict]]]] = {
    "sft": on_data(t.SFTTrainer, t.SFTConfig, "text", micro_batch_size=1),
    "sft, packed": on_data(t.SFTTrainer, t.SFTConfig, "text", packing=True, z_coef=1e-3),
    "sft, lora": on_data(t.SFTTrainer, t.SFTConfig, "text", partial(tiny, lora=True)),
    "sft, untied, checkpointing": on_data(
        t.SFTTrainer, t.SFTConfig, "text", partial(tiny, tie_embeddings=False),
        activation_checkpointing=True,
    ),
    "reward": REWARD("pairs"),
    "reward, lists": REWARD("lists"),
    "reward, steps": REWARD("steps"),
    "reward, criteria": REWARD("criteria", model=_criteria),
    "dpo": on_data(t.DPOTrainer, t.DPOConfig, "pairs", micro_batch_size=1),
    "dpo, lora": on_data(t.DPOTrainer, t.DPOConfig, "pairs", partial(tiny, lora=True)),
    "kto": on_data(t.KTOTrainer, t.KTOConfig, "labelled"),
    "ilql": on_data(t.ILQLTrainer, t.ILQLConfig, "scored", lambda: ILQLModel(tiny())),
    "distill": on_data(t.DistillTrainer, t.DistillConfig, "context"),
    "distill, sampled": on_data(
        t.DistillTrainer, t.DistillConfig, "context", responses="student", response_length=6
    ),
    "ppo": PPO(),
    "ppo, critic head": PPO(critic="head", micro_batch_size=1),
    "ppo, critic head, lora": PPO({"model": partial(tiny, lora=True)}, critic="head"),
    "ppo, ptx, full kl": PPO(_ptx(), ptx_coef=0.5, kl_estimator="full", kl_in="loss"),
    "ppo, adaptive kl, stop": PPO(kl_target=0.5, kl_horizon=50, max_approx_kl=0.02),
    "ppo, running whitening": PPO(whiten_scores="running", score_clip=2.0),
    "ppo, process rewards": PPO(
        {"reward": _process_reward(), "tokenizer": Letters()}, process_rewards=True
    ),
    "ppo, reference ema": PPO(reference_ema=0.9),
    "ppo, sequence mean": PPO(aggregation="sequence_mean"),
    "a2c": on_prompts(t.A2CTrainer, t.A2CConfig),
    "nlpo": on_prompts(t.NLPOTrainer, t.NLPOConfig, minibatch_size=3, mask_every=2),
    "trpo": on_prompts(
        t.TRPOTrainer, t.TRPOConfig, ppo_epochs=2, minibatch_size=3,
        max_kl=3e-5, cg_damping=0.1, cg_iterations=4,
    ),
    "grpo": GRPO(),
    "grpo, gspo": GRPO(ratio="sequence", aggregation="sequence_mean", ppo_epochs=2),
    "grpo, dapo": GRPO(dynamic_sampling=2, mask_truncated=True, clip_range_high=0.28, ppo_epochs=2),
    "grpo, dr. grpo": GRPO(normalize=False, aggregation="sequence_sum", kl_coef=0.1),
    "grpo, cispo": GRPO(loss="cispo", ppo_epochs=2),
    "rloo": GRPO(advantage="rloo"),
    "reinforce++": GRPO(advantage="reinforce_pp", kl_coef=0.1, kl_in="reward", kl_estimator="k1"),
    "remax": GRPO(advantage="remax"),
    "online dpo": on_prompts(t.OnlineDPOTrainer, t.OnlineDPOConfig, num_samples=4),
    "online dpo, judge": on_prompts(
        t.OnlineDPOTrainer, t.OnlineDPOConfig, {"reward": None, "judge": longer}, num_samples=4
    ),
    "iterated dpo": in_rounds(
        t.iterated_dpo, partial(t.IteratedDPOConfig, **ROUNDS), reward=fives
    ),
    "rft": in_rounds(t.rft, partial(t.RFTConfig, **ROUNDS), reward=fives),
    "iterated rlhf": in_rounds(
        t.iterated_rlhf, _iterated_rlhf, judge=longer, eval_prompts=PROMPTS[:3]
    ),
}  # fmt: skip


def result_of(name: str) -> Result:
    """Weights and metrics of a case after its run; AssertionError if the ranks' weights differ."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        models, history = CASES[name]()
    weights = {}
    for i, model in enumerate(models):
        with whole(model) as plain:
            weights |= {f"{i}.{key}": x.clone() for key, x in plain.state_dict().items()}
    for other in distributed.gather_objects(weights):
        for key, x in weights.items():
            assert torch.equal(x, other[key]), f"{name}: {key} differs between ranks"
    return weights, history


def difference(result: Result, expected: Result) -> tuple[float, float]:
    """The largest difference of a weight, and of a metric relative to max(1, the metric)."""
    (weights, history), (right_weights, right_history) = result, expected
    assert len(history) == len(right_history)
    of_weights = max(float((x - right_weights[key]).abs().max()) for key, x in weights.items())
    of_metrics = 0.0
    for line, right in zip(history, right_history):
        assert line.keys() == right.keys(), line.keys() ^ right.keys()
        for key in right.keys() - IGNORED:
            found, wanted = (torch.tensor(x[key], dtype=torch.float64) for x in (line, right))
            error = (found - wanted).abs() / wanted.abs().clamp_min(1)
            of_metrics = max(of_metrics, float(error.nan_to_num(0).max()))
    return of_weights, of_metrics


def _worker(
    rank: int, world: int, port: int, names: Sequence[str], mesh: str | None, folder: str
) -> None:
    torch.set_num_threads(1)
    OPTIONS["mesh"] = mesh
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=world)
    results = {name: result_of(name) for name in names}
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    torch.distributed.destroy_process_group()


def in_world(processes: int | str, names: Sequence[str]) -> dict[str, Result]:
    """The results of cases in a number of processes, or in pieces on a mesh such as 1x2."""
    mesh = processes if isinstance(processes, str) else None
    world = math.prod(map(int, str(processes).split("x")))
    with socket.socket() as free, TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        arguments = (world, port, names, mesh, folder)
        torch.multiprocessing.get_context(START).set_forkserver_preload(PRELOAD)
        torch.multiprocessing.start_processes(_worker, arguments, world, start_method=START)
        return torch.load(Path(folder) / "results.pt", weights_only=False)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=int, nargs="*", default=[2, 3, 5], help="processes")
    parser.add_argument(
        "--mesh", nargs="*", default=["1x2", "2x2"], help="sharded weights, copies x pieces"
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    expected = {name: result_of(name) for name in arguments.case}
    found = {}
    for processes in (*arguments.world, *arguments.mesh):
        found[processes] = in_world(processes, arguments.case)
        print(f"{processes}: done", file=sys.stderr)
    print("| method | " + " | ".join(map(str, found)) + " |")
    print("|---|" + "---:|" * len(found))
    for name in arguments.case:
        columns = [
            "{:.0e}, {:.0e}".format(*difference(results[name], expected[name]))
            for results in found.values()
        ]
        print(f"| {name} | " + " | ".join(columns) + " |")
    print("\nLargest difference of a weight, and of a metric relative to max(1, metric).")


if __name__ == "__main__":
    main()
