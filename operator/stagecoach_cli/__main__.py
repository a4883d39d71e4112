"""`python -m stagecoach_cli`: the same as the `stagecoach` command."""

from __future__ import annotations

from stagecoach_cli.main import main

if __name__ == "__main__":
    main()
