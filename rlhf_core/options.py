"""Config dataclasses whose fields carry their meaning and their valid values.

The class checks the values; the command line and `help()` show them. A contradiction between fields
is an error. A field that has no effect, given the others, is a warning, so that a sweep over it
runs.
"""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any

TYPES = {  # annotation -> the values that fit it, and how to say so
    "int": (numbers.Integral, "a whole number"),
    "float": (numbers.Real, "a number"),
    "bool": (bool, "True or False"),
    "str": (str, "a string"),
}


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    within: str | None = None,
    choices: Sequence[str] | None = None,
    factory: Any = MISSING,
) -> Any:
    """A config field.

    Args:
        default, factory: as for `dataclasses.field`. A field whose default is None may be None.
        help: meaning and unit; what happens when the value goes up.
        within: interval of valid numbers, such as "(0, 1]" or "[0, inf)".
        choices: valid strings.
    """
    metadata = {"help": help, "within": within, "choices": choices}
    return field(default=default, default_factory=factory, metadata=metadata)


class Options:
    """Base of the config dataclasses. Its ValueErrors name the field, its value and valid ones."""

    def __init_subclass__(cls, **options):
        """List the fields in the class's docstring."""
        super().__init_subclass__(**options)
        listed: dict[str, Field] = {}
        for base in reversed(cls.__mro__[1:]):
            listed |= getattr(base, "__dataclass_fields__", {})
        listed |= {name: value for name, value in vars(cls).items() if isinstance(value, Field)}
        lines = [f"    {name}: {describe(entry)}" for name, entry in listed.items()]
        cls.__doc__ = "\n".join([cls.__doc__ or cls.__name__, "", "Attributes:", *lines])

    def __post_init__(self):
        for entry in fields(self):
            value, valid = getattr(self, entry.name), entry.metadata.get("choices")
            if value is None and entry.default is None:
                continue
            annotation = getattr(entry.type, "__name__", str(entry.type))  # a type, or its name
            kind = TYPES.get(annotation.removesuffix(" | None"))
            if kind is not None:
                is_bool = isinstance(value, bool)
                fits = isinstance(value, kind[0]) and is_bool == (kind[0] is bool)
                self.check((entry.name, fits, kind[1]))
            if valid is not None:
                self.check((entry.name, value in valid, f"one of {', '.join(valid)}"))
            interval = entry.metadata.get("within")
            if interval is not None:
                self.check((entry.name, _contains(interval, value), _as_text(interval, value)))

    def check(self, *rules: tuple[str, Any, str]) -> None:
        """Raise ValueError for the first rule (field, is it valid, what it must be) that fails."""
        for name, valid, wanted in rules:
            if not valid:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    def warn_unused(self, *rules: tuple[str, Any, str]) -> None:
        """Warn for each rule (field, has it an effect, why not) whose field is set in vain."""
        defaults = {entry.name: entry.default for entry in fields(self)}
        for name, effective, reason in rules:
            if not effective and getattr(self, name) != defaults[name]:
                text = f"{name}={getattr(self, name)!r} has no effect {reason}"
                warnings.warn(text, stacklevel=_levels_to_caller())


def _levels_to_caller() -> int:
    """The stacklevel, in the calling method, of the line that makes the config or the trainer."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back and frame.f_code.co_name in ("__post_init__", "__init__"):
        level, frame = level + 1, frame.f_back
    return level


def describe(entry: Field) -> str:
    """A field's help with its choices or interval and its default."""
    help, choices, within = (entry.metadata.get(key) for key in ("help", "choices", "within"))
    valid = f"one of {', '.join(choices)}" if choices else within and _as_text(within)
    notes = "; ".join(filter(None, [valid, _default(entry)]))
    return f"{help} ({notes})" if notes else str(help)


def _default(entry: Field) -> str:
    unset = any(entry.default is value for value in (MISSING, None, False))
    return "" if unset else f"default {entry.default}"


def _bounds(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)


def _contains(interval: str, value: Any) -> bool:
    low, high = _bounds(interval)
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below


def _as_text(interval: str, value: Any = 0) -> str:
    low, high = _bounds(interval)
    if low > -math.inf and high < math.inf:
        return f"in {interval}"
    texts = []
    if low > -math.inf:
        texts.append(f"at least {low:g}" if interval[0] == "[" else f"> {low:g}")
    if low == -math.inf or value in (math.inf, -math.inf) or value != value:
        texts.append("finite")
    return " and ".join(texts)
