"""Training data as pure functions: rows, packing, mixing, learning-rate schedules, division among ranks, tensors.

This package may import `runtime`.
"""
