"""Models as files and in memory: load, grow, choose what is trained, save."""
