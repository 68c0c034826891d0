"""The options that every trainer has."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from rlhf_core.options import Options, option

# Declared by every method that reads whole texts.
MAX_LENGTH = "tokens of prompt and completion together; longer examples are cut"

# Declared by every method that samples in its steps.
SAMPLE_EVERY = "steps between rows of the policy's responses in samples.jsonl; 0: none"
PRINT_SAMPLES = "also show these rows on the terminal, a line for each"


@dataclass(frozen=True)
class TrainConfig(Options):
    """Optimiser, batches, schedule and logging."""

    lr: float = option(1e-5, "peak learning rate of AdamW", within="(0, inf)")
    lr_schedule: str = option(
        "linear",
        "after the warmup, linear and cosine decay lr to 0 over the run",
        choices=("linear", "cosine", "constant"),
    )
    warmup_steps: int = option(0, "steps over which lr rises from 0", within="[0, inf)")
    batch_size: int = option(
        16, "examples, pairs or prompts of an optimiser step; PPO: of a rollout", within="[1, inf)"
    )
    micro_batch_size: int | None = option(
        None, "rows of one forward and backward; unset: the whole batch", within="[1, inf)"
    )
    epochs: int = option(1, "passes over the data", within="[1, inf)")
    max_steps: int | None = option(
        None, "stop after this many steps; unset: after all epochs", within="[1, inf)"
    )
    max_grad_norm: float = option(1.0, "clip the gradient's global norm to this", within="(0, inf]")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", within="[0, inf)")
    adam_eps: float = option(1e-8, "AdamW's epsilon", within="[0, inf)")
    dropout: bool = option(False, "train with the dropout of the model's config")
    log_every: int = option(
        10, "steps between printed lines where there is no progress bar", within="[1, inf)"
    )
    eval_every: int | None = option(
        None, "steps between evaluations; unset: only at the end", within="[1, inf)"
    )
    save_every: int | None = option(
        None,
        "steps between checkpoints, with one at the end; unset: only when interrupted",
        within="[1, inf)",
    )
    keep: int = option(1, "checkpoints to keep, the newest ones", within="[1, inf)")
    keep_best: str | None = option(
        None,
        "keep the model with the best value of this metric in checkpoint-best: the lowest one of a "
        "metric that ends with loss, else the highest one; min:METRIC and max:METRIC say which",
    )
    precision: str = option(
        "float32",
        "precision of the forward pass; weights and log-probs stay float32. CPUs without bfloat16 "
        "instructions compute in float32, which is faster there",
        choices=("float32", "bfloat16"),
    )
    activation_checkpointing: bool = option(
        False, "keep only each block's input and recompute the rest: less memory, more time"
    )
    freeze_layers: int = option(
        0, "from 1: freeze the embedding and this many of the lowest blocks", within="[0, inf)"
    )
    shard: bool = option(
        False,
        "cut weights, gradients and optimiser states into pieces, one for each process (FSDP2)",
    )
    mesh: str | None = option(
        None,
        "processes as COPIESxPIECES: 2x4 holds 2 copies of the weights, each cut into 4 pieces; "
        "unset: one copy with shard, else one for each process",
    )
    seed: int = option(0, "seed of data order and sampling")

    def __post_init__(self):
        super().__post_init__()
        form = self.mesh is None or re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", self.mesh)
        self.check(("mesh", form, "COPIESxPIECES, such as 2x4"))
        self.warn_unused(
            ("keep", self.save_every is not None, "without save_every"),
            ("shard", self.mesh is None, "with mesh, which says more"),
        )

    def check_ranks(self, ranks: int) -> None:
        """Raise ValueError if the mesh has another number of processes."""
        if self.mesh is not None and math.prod(map(int, self.mesh.split("x"))) != ranks:
            raise ValueError(
                f"mesh is {self.mesh}, but there are {ranks} processes: copies times pieces must "
                "be their number. Start them with torchrun --nproc-per-node"
            )

    @property
    def copies(self) -> int | None:
        """Copies of the weights that are cut into pieces; None: they are not cut."""
        if self.mesh is not None:
            return int(self.mesh.partition("x")[0])
        return 1 if self.shard else None
