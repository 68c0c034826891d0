"""Rotary positions (Su et al. 2021): their frequencies, and scaling beyond the trained length.

The float32 results equal those of `transformers` bit for bit, because an error in the last bit of a
frequency turns a pair by 0.006 rad at position 100,000.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_core.files import short

# rope_type: its options. Options in brackets are optional.
_OPTIONS = {
    "default": "",
    "linear": "factor",
    "dynamic": "factor",
    "llama3": "factor low_freq_factor high_freq_factor [original_max_position_embeddings]",
    "yarn": "factor [original_max_position_embeddings] [attention_factor] [beta_fast] [beta_slow] "
    "[mscale] [mscale_all_dim] [truncate]",
    "longrope": "short_factor long_factor [factor] [original_max_position_embeddings] "
    "[attention_factor]",
}
_LISTS = ("short_factor", "long_factor")  # one number for each pair


def check_rope(config) -> None:
    """Raise ValueError if the rope_theta or rope_scaling of a TransformerConfig cannot be used."""
    if not config.rope_theta > 0:
        raise ValueError(f"rope_theta must be > 0, got {config.rope_theta}")
    scaling = config.rope_scaling
    if scaling is None:
        return
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling must be an object, got {short(scaling)}")
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in _OPTIONS:
        supported = ", ".join(_OPTIONS)
        raise ValueError(f"rope scaling {short(kind)} is not supported, only {supported}")
    options = {name.strip("[]"): name[0] != "[" for name in _OPTIONS[kind].split()}
    for name, required in options.items():
        value, pairs = scaling.get(name), config.rotary_dim // 2
        if value is None and not required:
            continue
        if name == "truncate":
            fits, what = isinstance(value, bool), "true or false as"
        elif name == "original_max_position_embeddings":
            fits, what = type(value) is int and value > 0, "a whole number > 0 as"
        elif name in _LISTS:
            fits = isinstance(value, list) and len(value) == pairs and all(map(_is_number, value))
            what = f"a list of {pairs} numbers as"
        else:
            fits, what = _is_number(value), "a number"
        if not fits:
            raise ValueError(f"rope scaling {kind!r} needs {what} {name!r}, got {short(value)}")
    for name in scaling.keys() - options - {"rope_type"}:
        raise ValueError(f"rope scaling {kind!r} has no option {name!r}, only {', '.join(options)}")
    try:
        found = [rope_frequencies(config, long) for long in (False, True)]
        usable = all(bool(x.isfinite().all()) and math.isfinite(factor) for x, factor in found)
    except (ArithmeticError, ValueError, TypeError):
        usable = False
    if not usable:
        raise ValueError(
            f"rope_scaling {short(scaling)} with rope_theta {config.rope_theta} gives frequencies "
            "that are not numbers"
        )


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rope_tables(config, length: int, kind: str = "global") -> tuple[Tensor, Tensor]:
    """Return cos and sin, (length, K/2) float32 on the CPU, of positions 0 to length - 1.

    K is the number of rotated elements of a head.

    Args:
        kind: One of `TransformerConfig.ropes`. With longrope, "global" has the long factors from
            position `config.long_from` on, and "long" has them at all positions.
    """
    if kind == "local":
        config = replace(
            config, rope_theta=config.local_rope_theta, rope_scaling=None, local_rope_theta=None
        )
    frequencies, magnitude = rope_frequencies(config)
    positions = torch.arange(length, dtype=torch.float32, device="cpu")[:, None]
    angles = positions * frequencies  # (S, K/2)
    long_from = 0 if kind == "long" else config.long_from
    if long_from < length:
        long, _ = rope_frequencies(config, long=True)
        angles = torch.where(positions < long_from, angles, positions * long)
    return angles.cos() * magnitude, angles.sin() * magnitude


def rope_frequencies(config, long: bool = False) -> tuple[Tensor, float]:
    """Return radians per position of each pair, (K/2,) float32, and the factor of cos and sin.

    long: Use the long factors of longrope.
    """
    K, base, scaling = config.rotary_dim, config.rope_theta, config.rope_scaling or {}
    powers = base ** (torch.arange(0, K, 2, dtype=torch.float32, device="cpu") / K)
    plain = 1.0 / powers
    kind, factor = scaling.get("rope_type"), scaling.get("factor")
    trained = scaling.get("original_max_position_embeddings") or config.max_positions
    if kind == "linear":  # position interpolation (Chen et al. 2023)
        return plain / factor, 1.0
    if kind == "llama3":  # Llama 3.1: interpolate long waves, keep short ones, blend in between
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        waves = 2 * math.pi / plain
        blend = (trained / waves - low) / (high - low)
        blended = (1 - blend) * plain / factor + blend * plain
        shorter = torch.where(waves < trained / high, plain, blended)
        return torch.where(waves > trained / low, plain / factor, shorter), 1.0
    if kind == "yarn":  # Peng et al. 2023, equations 17, 18, 22
        ramp = _yarn_ramp(scaling, trained, base, K)
        return 1.0 / (factor * powers) * ramp + plain * (1 - ramp), _yarn_magnitude(scaling)
    if kind == "longrope":  # Ding et al. 2024, as in Phi-3
        factor = factor or config.max_positions / trained
        magnitude = scaling.get("attention_factor")
        if magnitude is None:
            magnitude = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
        factors = scaling["long_factor" if long else "short_factor"]
        factors = torch.tensor(factors, dtype=torch.float32, device="cpu")
        return 1.0 / (factors * powers), magnitude
    return plain, 1.0  # also for "dynamic", which scales only beyond max_positions


def _yarn_ramp(scaling: dict, trained: int, base: float, K: int) -> Tensor:
    """How far each pair (K/2,) is interpolated: from 0 for high frequencies to 1 for low ones."""

    def pair_that_turns(times: float) -> float:
        return K * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(base))

    low = pair_that_turns(scaling.get("beta_fast") or 32)
    high = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, K - 1)
    width = high - low or 0.001
    keep = 1 - ((torch.arange(K // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    return 1 - keep  # rounds as in `transformers`


def _yarn_magnitude(scaling: dict) -> float:
    def grown(share: float) -> float:
        return 0.1 * share * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return grown(scaling["mscale"]) / grown(scaling["mscale_all_dim"])
    return grown(1)
