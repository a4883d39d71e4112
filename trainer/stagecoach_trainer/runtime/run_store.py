"""The store of a run's artifacts. Imports nothing heavy: the launcher uses it too."""

from __future__ import annotations

from stagecoach_api.artifacts import ResolvedStage
from stagecoach_api.store import Store, open_store


def open_run_store(resolved: ResolvedStage) -> Store:
    """Return the store of the run's artifacts."""
    return open_store(resolved.storage_uri, endpoint=resolved.storage_endpoint, region=resolved.storage_region)
