"""Cells that the tables of both model sizes share."""

from __future__ import annotations

MEMORY_BAR = 0.7  # highest ratio of our memory to TRL's


def judged(value: float, bar: float) -> str:
    """A ratio, with its bar in parentheses."""
    return f"{value:.2f} ({bar}{'' if value >= bar else ', missed'})"


def memory(sides: dict[str, dict]) -> list[str]:
    """Our memory, above that of the loaded model and in all, each with its ratio to TRL's."""
    cells = []
    for start in ("ready_bytes", None):
        used = {name: x["peak_bytes"] - (x[start] if start else 0) for name, x in sides.items()}
        share = used["ours"] / used["theirs"] if "theirs" in used else None
        missed = " missed" if share is not None and share > MEMORY_BAR else ""
        cells += [f"{used['ours'] / 1e6:.0f}", "" if share is None else f"{share:.2f}{missed}"]
    return cells
