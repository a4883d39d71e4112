"""Alignment: speed and memory compared with TRL, and learning on small tasks whose best answer is known."""
