"""Alignment: speed and memory beside TRL, and what the stages learn on small tasks whose best answer is known."""
