"""What every side trains: one set of settings, one file of token ids, one folder of weights.

The ids are random and the weights fresh, as neither changes the work. Every batch has the same lengths, one of its rows
the longest possible, so that steps cost the same and medians mean something.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

METHODS = ("sft", "dpo", "reward", "ppo")
Turn = Callable[[float], None]  # called before the first step, and after every step with its loss


@dataclass(frozen=True)
class Task:
    """Every setting that a side may read. float32, no dropout, constant learning rate, AdamW without decay."""

    method: str
    folder: str  # of policy/, reward/ (Hugging Face layout) and examples.json
    vocab_size: int = 50257
    batch_size: int = 8  # rows, pairs or prompts
    steps: int = 6
    seed: int = 0
    # the model: GPT-2
    num_layers: int = 4
    hidden_size: int = 256
    num_heads: int = 4
    max_positions: int = 256
    # the data
    prompt_length: int = 64  # of the longest; the shortest have a quarter of it
    completion_length: int = 128  # PPO: of all
    # the optimiser
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    max_grad_norm: float = (
        1.0  # of SFT, DPO and reward; TRL's PPO does not clip, so nobody does there
    )
    # DPO
    beta: float = 0.1
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
        """In no example."""
        return self.vocab_size - 1

    @property
    def policy(self) -> str:
        return str(Path(self.folder, "policy"))

    @property
    def reward(self) -> str:
        return str(Path(self.folder, "reward"))

    def examples(self) -> list[Row]:
        """All rows in the order in which every side takes them, batch_size a step."""
        return [
            Row(*row)
            for row in json.loads(Path(self.folder, "examples.json").read_text(encoding="utf-8"))
        ]

    def batches(self) -> list[list[Row]]:
        rows = self.examples()
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def write(self) -> None:
        """The files that `examples`, `policy` and `reward` name."""
        import torch

        from rlhf_core import RewardModel, Transformer, TransformerConfig

        rng = random.Random(self.seed)
        lengths = [(self.prompt_length, self.completion_length, self.completion_length)]
        while len(lengths) < self.batch_size:
            prompt, *completions = (rng.randint(-(-n // 4), n) for n in lengths[0])
            lengths.append(
                (prompt, *completions) if self.method != "ppo" else (prompt, *lengths[0][1:])
            )
        rows = [
            [[rng.randrange(self.pad_id) for _ in range(n)] for n in row]
            for _ in range(self.steps)
            for row in lengths
        ]
        Path(self.folder, "examples.json").write_text(json.dumps(rows), encoding="utf-8")
        config = TransformerConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            max_positions=self.max_positions,
            positions="learned",
            norm="layernorm",
            activation="gelu_tanh",
            gated_mlp=False,
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            pad_id=self.pad_id,
        )
        torch.manual_seed(self.seed)
        Transformer(config).save_pretrained(self.policy)
        RewardModel(config).save_pretrained(self.reward)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Task:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**fields | {"betas": tuple(fields["betas"])})


@dataclass(frozen=True)
class Row:
    """One example as token ids: `chosen` alone for SFT, the prompt alone for PPO, whose first responses it gives."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int] = field(default_factory=list)
