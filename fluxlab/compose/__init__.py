"""Command lines: from words and config files to checked configs, and from errors to messages and exit codes."""

from fluxlab.compose.command import command_line, debugging, flags, guarded, is_users
from fluxlab.compose.configs import Combination, combinations, complete, compose, launch, launches_jobs, to_schema
from fluxlab.compose.explain import short

__all__ = [
    "Combination",
    "combinations",
    "command_line",
    "complete",
    "compose",
    "debugging",
    "flags",
    "guarded",
    "is_users",
    "launch",
    "launches_jobs",
    "short",
    "to_schema",
]
