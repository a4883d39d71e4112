"""Gradients and optimiser steps: objectives, number formats, the plain engine and DeepSpeed's.

This package may import `kernels`, `batches` and `runtime`.
"""
