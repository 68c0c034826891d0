"""What tests of several files share: small models, data, trainers, the command line."""

import contextlib
import datetime
import faulthandler
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import pickle
import random
import sys
import threading
import time
import traceback
import urllib.request
import uuid
import warnings
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch

from rlhf_core import cli, distributed
from rlhf_core.benchmarks import ranks
from rlhf_core.data import ByteTokenizer, Example, Pair
from rlhf_core.models import RewardModel, Transformer, TransformerConfig, transformer
from rlhf_core.models.lora import LoRAConfig, add_adapters
from rlhf_core.ops import linear_logprobs_blocks
from rlhf_core.policy_gradient.experience import Experience, Predictions
from rlhf_core.rollout import response_hidden, sample, scatter
from rlhf_core.trainers import (
    DPOConfig,
    DPOTrainer,
    PPOConfig,
    PPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from rlhf_core.training.metrics import Metrics

NAN = float("nan")
GPT2 = dict(
    positions="learned",
    norm="layernorm",
    activation="gelu_tanh",
    gated_mlp=False,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
)
softplus = torch.nn.functional.softplus

# ---- models


@torch.no_grad()
def tiny(cls=Transformer, seed=0, *, noise=0.2, **options):
    """A model with noise on every weight, biases and norms too; equal for an equal seed."""
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=12,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        max_positions=32,
        eos_ids=(2, 3),
        pad_id=0,
    )
    model = cls(TransformerConfig(**(sizes | options)))
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * noise)
    return model


def adapted(seed=0, start=0.3, **options):
    """`tiny` with adapters, as if trained already unless start is 0."""
    model = tiny(seed=seed, **options)
    add_adapters(model, LoRAConfig(rank=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=start)
    return model


def edit_json(file, **changes):
    """Set fields of the object in a JSON file; "remove" takes one away."""
    fields = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: x for name, x in fields.items() if x != "remove"}))


def snapshot(module):
    """A copy of every weight, by name."""
    return {name: weight.clone() for name, weight in module.state_dict().items()}


def input_shapes(module):
    """A list that gets the shape of the module's input at every call from now on."""
    shapes = []
    module.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    return shapes


# ---- trainers on given completions

KINDS = {
    "sft": (SFTTrainer, SFTConfig, Transformer),
    "reward": (RewardTrainer, RewardConfig, RewardModel),
    "dpo": (DPOTrainer, DPOConfig, Transformer),
}


def rows(kind, n=8, seed=0):
    """Examples or pairs of unequal lengths; the preferred completion holds a 5, the other a 6."""
    rng = random.Random(seed)

    def ids(low, high):
        return [rng.randrange(7, 12) for _ in range(rng.randrange(low, high))]

    if kind == "sft":
        return [Example(ids(1, 5), [*ids(0, 7), 2]) for _ in range(n)]
    return [
        Pair(ids(1, 5), [*ids(0, 4), 5, *ids(0, 4), 2], [*ids(0, 4), 6, *ids(0, 4), 2])
        for _ in range(n)
    ]


def pairs_biased_to_length(n, alpha=0.4, quality=2.0, seed=0):
    """Pairs whose labels reward a 5 over a 6 by `quality`, and each token by `alpha`."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(n):
        good = [rng.random() < 0.5 for _ in range(2)]
        answers = [
            [5 if x else 6, *(rng.randrange(7, 12) for _ in range(rng.randrange(8))), 2]
            for x in good
        ]
        margin = quality * (good[0] - good[1]) + alpha * (len(answers[0]) - len(answers[1]))
        if rng.random() > 1 / (1 + math.exp(-margin)):
            answers.reverse()
        pairs.append(Pair([4], *answers))
    return pairs


def make_trainer(kind, model=None, examples=None, others=None, **config):
    """An SFT, reward or DPO trainer whose batch is all `rows`."""
    trainer_type, config_type, model_type = KINDS[kind]
    config = config_type(**(dict(batch_size=8, lr=1e-3) | config))
    model = tiny(model_type) if model is None else model
    return trainer_type(
        model, rows(kind) if examples is None else examples, config, **(others or {})
    )


def accumulated(trainer, batch):
    """Loss, metrics and gradients of the batch, as `optimize` adds them up."""
    metrics = Metrics()
    return added_up(trainer, trainer.losses(batch, metrics), metrics)


def added_up(trainer, losses, metrics):
    """Loss, metrics and gradients of an iterator of losses."""
    total = 0.0
    trainer.optimizer.zero_grad()
    for loss in losses:
        loss.backward()
        total += loss.item()
    return total, metrics.means(), [p.grad.clone() for p in trainer.trained_parameters()]


def head_calls(monkeypatch, rows_at_once):
    """A list with one entry per call of `linear_token_loss` from now on.

    An entry lists the calls of the loss function: the slice of groups, and the number of targets.
    Chunks hold at most rows_at_once targets, and a separate backward pass of the head is an error.
    """
    calls, op = [], transformer.linear_token_loss

    def counted(hidden, weight, targets, losses, **options):
        chunks = []
        calls.append(chunks)

        def noted(statistics, groups, *extras):
            chunks.append((groups, len(statistics.logprobs)))
            return losses(statistics, groups, *extras)

        return op(hidden, weight, targets, noted, **options)

    monkeypatch.setattr(transformer, "linear_token_loss", counted)
    monkeypatch.setattr(linear_logprobs_blocks, "CPU_WHOLE", rows_at_once * 12)
    monkeypatch.setattr(
        linear_logprobs_blocks, "backward", lambda *_: pytest.fail("logits computed again")
    )
    return calls


# ---- trainers that sample

PROMPTS = [[5, 3, 7, 4], [8, 1], [6], [9, 9, 1], [4, 4], [3], [7, 8, 9], [1, 5]]


class Letters:
    """A tokenizer: token i is the i-th letter; 2 and 3 are special."""

    def decode(self, ids):
        return "".join("abcdefghijkl"[i] for i in ids if i not in (2, 3))

    def save(self, path):
        (Path(path) / "letters").touch()


def fives(prompts, responses):
    """A reward of 1 for every 5."""
    return [float(response.count(5)) for response in responses]


def lengths(prompts, responses):
    """A reward of 1 for every token."""
    return [float(len(response)) for response in responses]


def make_ppo(model=None, reward=fives, prompts=PROMPTS, others=None, **config):
    """A PPO trainer whose step is one minibatch, unless the config says otherwise."""
    torch.manual_seed(5)
    settings = dict(
        batch_size=8, minibatch_size=8, ppo_epochs=1, response_length=6, temperature=1.0, lr=1e-3
    )
    config = PPOConfig(**(settings | config))
    return PPOTrainer(
        tiny() if model is None else model, prompts, config, reward=reward, **(others or {})
    )


def rollout_of(trainer, **options):
    """Responses to PROMPTS of several lengths, equal for equal models."""
    generator = torch.Generator().manual_seed(1)
    rollout = sample(
        trainer.model, PROMPTS, max_new_tokens=6, temperature=1.5, generator=generator, **options
    )
    assert len(rollout.response_mask.sum(dim=1).unique()) > 2  # lengths differ
    return rollout


def experience_of(trainer, rollout):
    """As after some updates: the policy has moved, so that ratios differ and some clip."""
    columns = trainer.predict(rollout)
    noise = torch.Generator().manual_seed(2)
    logprobs, values, advantages, returns = (
        torch.randn(columns.values.shape, generator=noise) for _ in range(4)
    )
    old = Experience(columns.logprobs + logprobs * 0.2, advantages, columns.ref_logprobs)
    return old._replace(old_values=columns.values + values * 0.2, returns=returns)


def forward(trainer, rollout):
    """Log-probs, entropy and values (B, R) of the response tokens, with gradient."""
    mask, hidden = rollout.response_mask, response_hidden(trainer.model, rollout)
    tokens = trainer.head(rollout).token_logprobs(
        hidden, rollout.response_ids[mask], temperature=trainer.config.temperature
    )
    logprobs, entropy = scatter(tokens.logprobs, mask), scatter(tokens.entropy, mask)
    return Predictions(logprobs, entropy, None, None, trainer.predict_values(rollout, hidden))


def gradients(trainer, rollout, experience):
    """Loss, metrics and gradients of the minibatch, as `optimize` adds them up."""
    metrics = Metrics()
    return added_up(trainer, trainer.minibatch_losses(rollout, experience, metrics), metrics)


# ---- several processes


SECONDS = 300  # for one call of `run_ranks`
_ranks = {}  # groups that wait for calls, by their size: process and pipe of each rank


def run_ranks(function, world, folder, *args):
    """What `function(rank, world, *args)` returns on each of `world` processes of a Gloo group.

    The processes have one thread each, and torchrun's RANK, LOCAL_RANK and WORLD_SIZE. They wait
    for the next call with as many ranks, because a start takes seconds. The function is at the top
    level of its file; args and results are pickled, so they hold no class of a test file. If the
    function raises on a rank, the test fails with the traceback; if it takes too long, with the
    place where each rank is.
    """
    folder = Path(folder) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    processes, pipes = zip(*_started(world, folder))
    for pipe in pipes:
        pipe.send((str(folder), inspect.getfile(function), function.__name__, args))
    running, end, failed = set(pipes), time.monotonic() + SECONDS + 60, False
    while running and not failed and time.monotonic() < end:
        for pipe in wait(running, timeout=1):
            running.remove(pipe)
            try:
                pipe.recv()
            except (EOFError, ConnectionError):  # it has ended
                failed = True
    if running or failed:
        time.sleep(1)  # for the others' errors
        _end_ranks(world)
        ends = (f"rank {rank} exited {x.exitcode}: " for rank, x in enumerate(processes))
        errors = ((folder / f"error{rank}") for rank in range(world))
        texts = (x.read_text() if x.exists() else "" for x in errors)
        pytest.fail("\n".join(end + (text or "no error") for end, text in zip(ends, texts)))
    return [pickle.loads((folder / f"result{rank}").read_bytes()) for rank in range(world)]


def _started(world, folder):
    """The processes of a group of this size. At most 6 wait; those of the oldest group end."""
    if world not in _ranks:
        while _ranks and sum(_ranks) + world > 6:
            _end_ranks(next(iter(_ranks)))
        context, group = multiprocessing.get_context(ranks.START), []
        context.set_forkserver_preload(ranks.PRELOAD)
        for rank in range(world):
            pipe, theirs = context.Pipe()
            arguments = rank, world, (folder / "store").as_uri(), theirs
            process = context.Process(target=_serve_rank, args=arguments, daemon=True)
            process.start()
            theirs.close()
            group.append((process, pipe))
        _ranks[world] = group
    return _ranks[world]


def _end_ranks(world):
    for process, _ in _ranks.pop(world):
        process.kill()
        process.join()


def _serve_rank(rank, world, store, pipe):
    """One process of `run_ranks`; it ends with its test process, or when a call fails."""
    numbers = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, OMP_NUM_THREADS=1)
    os.environ.update({name: str(x) for name, x in numbers.items()})
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=2 * SECONDS)
    options = dict(rank=rank, world_size=world, timeout=timeout)
    torch.distributed.init_process_group("gloo", init_method=store, **options)
    fresh = dict(distributed._state)
    with contextlib.suppress(EOFError):
        while True:
            folder, file, name, args = pipe.recv()
            distributed._state.update(fresh)
            torch.manual_seed(0)
            with (Path(folder) / f"error{rank}").open("w") as errors, warnings.catch_warnings():
                faulthandler.dump_traceback_later(SECONDS, exit=True, file=errors)
                try:
                    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
                    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
                    spec.loader.exec_module(module)
                    result = pickle.dumps(getattr(module, name)(rank, world, *args))
                except BaseException:
                    errors.write(traceback.format_exc())
                    errors.flush()
                    os._exit(1)  # without waiting for the group
                faulthandler.cancel_dump_traceback_later()
            (Path(folder) / f"result{rank}").write_bytes(result)
            pipe.send("done")


# ---- people


def label_all(link, score):
    """Choose the response with the higher score in every item, over HTTP; the number of labels."""
    base, token = link.split("/?token=")

    def call(path, body=None):
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(base + path, data, headers)
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.load(reply)

    count = 0
    with contextlib.suppress(OSError):  # a run closes its page after the last label
        while "item" in (item := call("/next")):
            left, right = score(item["left"]), score(item["right"])
            choice = 0 if left == right else 1 if left > right else 2
            call("/label", {"id": uuid.uuid4().hex, "item": item["item"], "choice": choice})
            count += 1
    return count


def label_printed_links(monkeypatch, module, score, then=lambda: None):
    """Each link that the module prints is labelled by a thread; returns the counts of labels."""
    counts = []

    def label(link):
        counts.append(label_all(link, score))
        then()

    def shown(*texts, **options):
        if "/?token=" in texts[0]:
            threading.Thread(target=label, args=[texts[0].split(": ")[1]], daemon=True).start()

    monkeypatch.setattr(module, "print", shown, raising=False)
    return counts


# ---- the command line


def run(*arguments):
    """The command line in this process; returns its exit status."""
    return cli.main([str(argument) for argument in arguments])


def write(path, rows):
    """A JSONL file of the rows; a row that is a string is written as it is."""
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def model_folders(root):
    """Folders policy, reward and process (a process reward model), with byte tokenizers."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    sizes = dict(vocab_size=259, hidden_size=16, num_layers=1, num_heads=2, max_positions=64)
    ids = dict(bos_id=tokenizer.bos_id, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id)
    policy = Transformer(TransformerConfig(**sizes, **ids))
    reward, process = (RewardModel.from_model(policy) for _ in range(2))
    process.of_steps = True
    for model, name in ((policy, "policy"), (reward, "reward"), (process, "process")):
        model.save_pretrained(root / name)
        tokenizer.save(root / name)
    return root


TEXTS = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(10)]
PAIRS = [{"prompt": f"say {i}", "chosen": " yes", "rejected": " no way"} for i in range(10)]
SMALL = ["--batch-size", 4, "--max-steps", 2, "--device", "cpu"]
