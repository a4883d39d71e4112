"""The `stagecoach` command, and the driver that runs stages as processes on this machine."""
