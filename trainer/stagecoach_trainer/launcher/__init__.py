"""The process that starts a stage's workers, stores their output and writes the attempt's result.

This package may import `runtime`, and nothing heavy before the workers have started.
"""
