"""The local driver: runs stages as processes on this machine, with the decisions of the core."""
