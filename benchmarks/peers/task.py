"""The task that every side trains: settings, a file of token ids, and folders of weights.

Ids are random and weights fresh, because neither changes the amount of work. All batches have the
same lengths, and one row of each is as long as possible, so that all steps cost the same.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

METHODS = ("sft", "dpo", "reward", "ppo")  # of the small model
SAMPLING = ("ppo", "grpo")
Turn = Callable[[float], None]  # called with NaN before the first step, then with each loss


@dataclass(frozen=True)
class Task:
    """All settings. Training is without dropout, decay or a learning rate schedule."""

    method: str
    folder: str  # holds policy/, reward/ (Hugging Face layout) and examples.json
    vocab_size: int = 50257
    batch_size: int = 8  # rows, pairs or prompts
    steps: int = 6
    seed: int = 0
    precision: str = "float32"
    # the model: GPT-2, or a Qwen 2.5 whose adapters train
    family: str = "gpt2"
    num_layers: int = 4
    hidden_size: int = 256
    num_heads: int = 4
    max_positions: int = 256
    num_kv_heads: int | None = None
    intermediate_size: int | None = None
    lora_rank: int = 0
    # the data
    prompt_length: int = 64  # of the longest
    completion_length: int = 128  # likewise; sampled ones all have this length
    shortest: float = 0.25  # of the lengths above
    # the optimiser
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0  # not in PPO, because TRL's does not clip gradients
    # DPO
    beta: float = 0.1
    cached_reference: bool = False  # its log-probs are computed before the first step
    # GRPO
    samples: int = 4  # of each prompt
    # PPO
    ppo_epochs: int = 4
    minibatches: int = 1
    temperature: float = 1.0
    kl_coef: float = 0.05
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95

    @property
    def pad_id(self) -> int:
        """The last id, which no example contains."""
        return self.vocab_size - 1

    @property
    def policy(self) -> str:
        return str(Path(self.folder, "policy"))

    @property
    def reward(self) -> str:
        return str(Path(self.folder, "reward"))

    def examples(self) -> list[Row]:
        """All rows, in the order of training, `batch_size` for each step."""
        return [
            Row(*row)
            for row in json.loads(Path(self.folder, "examples.json").read_text(encoding="utf-8"))
        ]

    def batches(self) -> list[list[Row]]:
        rows = self.examples()
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def write(self) -> None:
        """Write the examples and the weights."""
        import torch

        from rlhf_core import RewardModel, Transformer, TransformerConfig

        rng = random.Random(self.seed)
        lengths = [(self.prompt_length, self.completion_length, self.completion_length)]
        while len(lengths) < self.batch_size:
            prompt, *completions = (
                rng.randint(math.ceil(self.shortest * n), n) for n in lengths[0]
            )
            lengths.append(
                (prompt, *lengths[0][1:]) if self.method in SAMPLING else (prompt, *completions)
            )
        rows = [
            [[rng.randrange(self.pad_id) for _ in range(n)] for n in row]
            for _ in range(self.steps)
            for row in lengths
        ]
        Path(self.folder, "examples.json").write_text(json.dumps(rows), encoding="utf-8")
        family = dict(
            positions="learned",
            norm="layernorm",
            activation="gelu_tanh",
            gated_mlp=False,
            out_bias=True,
            mlp_bias=True,
        )
        if self.family == "qwen2":
            family = dict(num_kv_heads=self.num_kv_heads, intermediate_size=self.intermediate_size)
        config = TransformerConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            max_positions=self.max_positions,
            qkv_bias=True,
            pad_id=self.pad_id,
            **family,
        )
        torch.manual_seed(self.seed)
        Transformer(config).save_pretrained(self.policy)
        if self.method in ("reward", "ppo"):
            RewardModel(config).save_pretrained(self.reward)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Task:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**fields | {"betas": tuple(fields["betas"])})


def ids_score(ids: list[int]) -> float:
    """A reward of GRPO that costs nothing and differs from sample to sample."""
    return sum(ids) % 97 / 97


@dataclass(frozen=True)
class Row:
    """An example as token ids. SFT learns `chosen`; in PPO it is the response of the first step."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int] = field(default_factory=list)
