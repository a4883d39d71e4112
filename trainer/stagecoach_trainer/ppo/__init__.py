"""Proximal policy optimisation (arXiv 1707.06347, 2203.02155): answers, rewards, guards, updates."""
