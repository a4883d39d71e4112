"""Runs on a cluster: the API client, a run's state, watching it, its pods' logs."""
