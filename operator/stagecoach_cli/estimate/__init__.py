"""Estimates of what a run costs: tokens, time, GPU-hours, memory. They are rough, and no decision depends on them."""
