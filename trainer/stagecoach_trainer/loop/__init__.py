"""The training loop that all stages with gradients share: prefetching, checkpoints, metrics, held-out measurement.

This package may import `engine` and everything below it.
"""
