"""The training loop of every training stage but `ppo`, and what PPO's loop shares with it: checkpoints, state, metrics.

This package may import `engine` and everything below it.
"""
