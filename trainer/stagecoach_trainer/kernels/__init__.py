"""Losses, log-probabilities and faster parts of models, as functions of tensors and modules.

This package may import `batches` and `runtime`.
"""
