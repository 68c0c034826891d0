"""The commands that compare policies and show runs."""

from __future__ import annotations

from rlhf_core.cli.arguments import Command

COMMANDS: dict[str, Command] = {}
