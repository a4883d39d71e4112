"""A look into a run's local inputs before anything runs. No torch."""
