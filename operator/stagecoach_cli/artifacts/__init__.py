"""Artifacts in a store: list, fetch, verify, trace, collect, and the logs stored with them."""
