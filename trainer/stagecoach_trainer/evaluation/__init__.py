"""Measurements of the `evaluate` stage, one module each, its gates and reports; `export` uses the proof and the tables.

This package may import `rewards`, `generation`, `models`, `samples`, `loop` and everything below them.
"""
