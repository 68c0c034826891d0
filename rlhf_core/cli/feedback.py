"""The commands for human feedback: from candidates to labels, agreement and clean data."""

from __future__ import annotations

from rlhf_core.cli.arguments import Command

COMMANDS: dict[str, Command] = {}
