"""Exit codes of the `stagecoach` command, except 0 for success."""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""
