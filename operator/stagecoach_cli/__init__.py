"""The `stagecoach` command."""
