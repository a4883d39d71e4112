"""Benchmarks: the trainer against transformers' Trainer and TRL on equal models and data, and the operator."""
