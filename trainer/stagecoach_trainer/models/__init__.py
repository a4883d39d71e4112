"""Models in memory and on disk: load, grow, choose what is trained, save. Imports `text`, `kernels` and `runtime`."""
