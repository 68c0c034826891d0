"""`--preset`: values of options for a size of model. docs/guides/settings.md says where from.

`tiny`, `small` and `100m` come from runs of benchmarks/learning, or follow the nearest method that
was run. `1b` has published values, which were not measured here.
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

SIZES = {"tiny": "0.3 M", "small": "5 to 30 M", "100m": "0.1 B", "1b": "1 B"}  # parameters, about
# Go through a batch in parts and recompute activations: the same steps in less memory.
_MIDDLE = dict(micro_batch_size=8)
_LARGE = dict(micro_batch_size=4, activation_checkpointing=True)


def _by_size(tiny: dict, small: dict, middle: dict, large: dict) -> dict[str, dict[str, Any]]:
    return dict(zip(SIZES, (tiny, small, middle | _MIDDLE, large | _LARGE)))


_PPO = _by_size(
    dict(lr=1e-4, kl_coef=0.06, temperature=1.0),
    dict(lr=3e-5, kl_coef=0.06, temperature=1.0),
    dict(lr=1e-5, kl_coef=0.06, temperature=1.0),
    dict(lr=3e-6, kl_coef=0.05, missing_eos_penalty=1.0),
)
_DPO = _by_size(
    dict(lr=1e-4, batch_size=64),
    dict(lr=3e-5, batch_size=32),
    dict(lr=1e-5, batch_size=32),
    dict(lr=5e-7, batch_size=16),
)
PRESETS = {  # command -> size -> values of options
    "sft": _by_size(
        dict(lr=1e-3, batch_size=32),
        dict(lr=3e-4, batch_size=32),
        dict(lr=1e-4, batch_size=32),
        dict(lr=2e-5, batch_size=16),
    ),
    "reward": _by_size(
        dict(lr=1e-3, batch_size=64),
        dict(lr=5e-4, batch_size=32),
        dict(lr=1e-4, batch_size=32),
        dict(lr=1e-5, batch_size=16),
    ),
    "dpo": _DPO,
    "kto": _by_size(
        dict(lr=3e-4, batch_size=64),
        dict(lr=1e-4, batch_size=32),
        dict(lr=3e-5, batch_size=32),
        dict(lr=5e-7, batch_size=16),
    ),
    "distill": _by_size(
        dict(lr=1e-3, batch_size=32),
        dict(lr=3e-4, batch_size=32),
        dict(lr=1e-4, batch_size=32),
        dict(lr=2e-5, batch_size=16),
    ),
    "ilql": _by_size(
        dict(lr=1e-3, batch_size=64, epochs=2, target_rate=0.05, beta=16.0),
        dict(lr=3e-4, batch_size=64, epochs=2, target_rate=0.05, beta=16.0),
        dict(lr=1e-4, batch_size=64, epochs=2, target_rate=0.05, beta=16.0),
        dict(lr=5e-5, batch_size=128),
    ),
    "ppo": _PPO,
    "a2c": _by_size(
        dict(lr=1e-3, kl_coef=0.06, temperature=1.0),
        dict(lr=3e-4, kl_coef=0.06, temperature=1.0),
        dict(lr=1e-4, kl_coef=0.06, temperature=1.0),
        dict(lr=3e-6, kl_coef=0.05, missing_eos_penalty=1.0),
    ),
    "nlpo": _PPO,
    "trpo": _by_size(  # lr is the critic's
        dict(lr=1e-4, kl_coef=0.06, temperature=1.0, max_kl=0.01),
        dict(lr=3e-5, kl_coef=0.06, temperature=1.0, max_kl=0.01),
        dict(lr=1e-5, kl_coef=0.06, temperature=1.0, max_kl=0.01, fisher_share=0.1),
        dict(lr=3e-6, kl_coef=0.05, missing_eos_penalty=1.0, fisher_share=0.1),
    ),
    "grpo": _by_size(
        dict(lr=2e-4, kl_coef=0.2),
        dict(lr=1e-4, kl_coef=0.2),
        dict(lr=3e-5, kl_coef=0.2),
        dict(lr=1e-6, kl_coef=0.0),
    ),
    "online-dpo": _DPO,
    "iterated-dpo": _DPO,
    "rft": _by_size(
        dict(lr=3e-4, batch_size=32, num_samples=8),
        dict(lr=1e-4, batch_size=32, num_samples=8),
        dict(lr=3e-5, batch_size=32, num_samples=8),
        dict(lr=2e-5, batch_size=16),
    ),
}


def add_preset(parser: ArgumentParser) -> None:
    sizes = ", ".join(f"{name} ({parameters} parameters)" for name, parameters in SIZES.items())
    help = f"settings for a size of model: {sizes}; other options override them"
    parser.add_argument("--preset", choices=SIZES, help=help)


def settings(preset: Any, command: str) -> dict[str, Any]:
    """The values of a preset's options; none if it is unset, or no preset."""
    return PRESETS.get(command, {}).get(str(preset), {})
