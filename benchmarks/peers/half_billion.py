"""LoRA training of a Qwen2.5-0.5B shape with random weights, against TRL and the machine's rates.

    OMP_NUM_THREADS=1 python -m benchmarks.peers --model-size 0.5b --methods sft --dtypes float32

Times are CPU seconds. The floor of a step is its necessary arithmetic at the rate of the machine's
matrix products, which our process measures after each step. Per weight and token this arithmetic
is 2 FLOP forward, 2 for the gradient of the activations, and 2 for that of a weight that trains.
The prompt of a pair or a group counts once. The head, and the last block apart from its keys and
values, count for the tokens of completions only. Products in bfloat16 count at the faster rate of
bfloat16 and float32, which any CPU can fall back to. GRPO also samples: the longer of one forward
pass and of reading the weights for each token of a response.

PPO samples too. Its policy and its critic, a model of its own, have adapters; the reference is the
policy without them, and the reward model is frozen. All have the same shape. A step is one update,
so the pass that trains policy or critic also gives the old log-probs or values.
"""

from __future__ import annotations

import math
import statistics
import time

from benchmarks.peers.cells import judged, memory
from benchmarks.peers.task import SAMPLING, Task

# dpo-cached: the reference's log-probs are cached
METHODS = ("sft", "dpo", "dpo-cached", "grpo", "ppo")
SETTINGS = dict(
    family="qwen2",
    batch_size=4,
    num_layers=24,
    hidden_size=896,
    num_heads=14,
    num_kv_heads=2,
    intermediate_size=4864,
    lora_rank=16,
    ppo_epochs=1,
    shortest=0.5,
)
BARS = {  # lowest ratio of TRL's time to ours
    ("sft", "float32"): 1.4,
    ("sft", "bfloat16"): 2.0,
    ("dpo", "float32"): 1.9,
    ("dpo", "bfloat16"): 1.9,
    ("dpo-cached", "float32"): 2.5,
    ("dpo-cached", "bfloat16"): 2.5,
    ("grpo", "float32"): 2.0,
    ("grpo", "bfloat16"): 2.5,
    ("ppo", "float32"): 2.0,
    ("ppo", "bfloat16"): 2.0,
}
FLOOR_BARS = {"float32": 0.85, "bfloat16": 0.7}  # lowest ratio of the floor to our time
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
ROWS = 512  # of the product that is timed


def settings_of(method: str, dtype: str) -> tuple[str, dict]:
    """The method of the task, and its further settings."""
    name, _, cached = method.partition("-")
    settings = SETTINGS | {"precision": dtype, "cached_reference": bool(cached)}
    return name, settings | ({"completion_length": 64} if name in SAMPLING else {})


def machine_rates(task: Task) -> dict[str, float]:
    """FLOP/s of products with the MLP's first weight, and bytes/s of reading, on CPU time."""
    import torch

    def fastest(function, times: int) -> float:
        found = []
        for _ in range(times):
            start = time.process_time()
            function()
            found.append(time.process_time() - start)
        return min(found)

    rates, width = {}, 2 * task.intermediate_size
    for dtype in {"float32", task.precision}:
        kind = getattr(torch, dtype)
        x, weight = (
            torch.ones(ROWS, task.hidden_size, dtype=kind),
            torch.ones(width, task.hidden_size, dtype=kind),
        )
        seconds = fastest(lambda x=x, weight=weight: x @ weight.T, 3)
        rates[dtype] = 2 * ROWS * width * task.hidden_size / seconds
    read = torch.ones(2**25)
    return rates | {"read": read.nbytes / fastest(read.sum, 3)}


def arithmetic(task: Task) -> tuple[int, int]:
    """FLOP that a step's passes over known tokens need, and those of sampling.

    One pass over the responses of GRPO or PPO gives the old log-probs and those that train. PPO's
    reward model reads the last token of a response.
    """
    rows = task.batches()[0]
    counted = sum(len(row.chosen) for row in rows)
    if task.method == "dpo":
        counted += sum(len(row.rejected) for row in rows)
    if task.method == "grpo":
        counted *= task.samples
    tokens = counted + sum(len(row.prompt) for row in rows)
    D, wide = task.hidden_size, task.intermediate_size
    kv = D * task.num_kv_heads // task.num_heads
    keys_values, others = [(D, kv)] * 2, [(D, D)] * 2 + [(D, wide)] * 2 + [(wide, D)]
    blocks = task.num_layers - 1
    at_tokens, at_counted = blocks * (keys_values + others) + keys_values, others

    def products(size, read: int = counted) -> int:
        """`size` of each matrix, times the tokens that it is multiplied with."""
        return tokens * sum(map(size, at_tokens)) + read * sum(map(size, at_counted))

    trunk = 2 * products(math.prod)
    once = trunk + 2 * task.vocab_size * D * counted
    adapters = 2 * task.lora_rank * products(sum)
    sampling = once + adapters if task.method in SAMPLING else 0
    training = 2 * once + 3 * adapters
    if task.method == "ppo":
        critic, reward = 2 * trunk + 3 * adapters, 2 * products(math.prod, len(rows))
        return training + once + critic + reward, sampling
    reference = once if task.method == "dpo" and not task.cached_reference else 0
    return training + reference, sampling


def reading(task: Task) -> int:
    """Bytes of weights that sampling reads: all of them for each token of the longest response."""
    if task.method not in SAMPLING:
        return 0
    D, wide, kv = task.hidden_size, task.intermediate_size, task.num_kv_heads
    block = 2 * D * D + 2 * D * D * kv // task.num_heads + 3 * D * wide
    weights = task.num_layers * block + task.vocab_size * D
    return task.completion_length * weights * (2 if task.precision == "bfloat16" else 4)


HEAD = (
    "| method, dtype, layers, V | ours, CPU s | floor, s | floor / ours (bar) | GFLOP/s "
    "| GB/s read | TRL, CPU s | TRL / ours (bar) | memory of training, MB | / TRL's "
    "| in all, MB | / TRL's | losses |",
    "|---|" + "---:|" * 11 + "---|",
)


def row(result: dict) -> str:
    """A row of the table. Times are medians of the steps after the first."""
    method, dtype, sides = result["method"], result["dtype"], result["sides"]
    cpu = {name: statistics.median(side["cpu_seconds"][1:]) for name, side in sides.items()}
    rates = sides["ours"]["rates"]
    fastest = max(statistics.median(rate[name] for rate in rates) for name in {"float32", dtype})
    own = statistics.median(rate[dtype] for rate in rates)
    read = statistics.median(rate["read"] for rate in rates)
    known, sampled = result["flop"]
    floor = known / fastest + max(sampled / fastest, result["bytes_read"] / read)
    bar = FLOOR_BARS[dtype]

    rate = f"{own / 1e9:.1f}" + (f" ({fastest / 1e9:.1f} in float32)" if own < fastest else "")
    cells = [f"{method}, {dtype}, {result['layers']}, {result['vocab_size']}"]
    cells += [f"{cpu['ours']:.3g}", f"{floor:.3g}", judged(floor / cpu["ours"], bar), rate]
    cells += [f"{read / 1e9:.1f}"]
    if "theirs" in sides:
        ratio = judged(cpu["theirs"] / cpu["ours"], BARS[method, dtype])
        cells += [f"{cpu['theirs']:.3g}", ratio]
    else:
        cells += ["", ""]
    cells += memory(sides)
    apart = max(abs(x["losses"][0] - sides["ours"]["losses"][0]) for x in sides.values())
    verdict = "" if apart <= LOSS_TOLERANCE[dtype] else "DIFFER: "
    return f"| {' | '.join(cells)} | {verdict}first {apart:.1e} |"
