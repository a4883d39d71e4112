"""The store in which a stage's run keeps its artifacts. Imports nothing heavy: the launcher uses it too."""

from __future__ import annotations

from stagecoach_api.artifacts import ResolvedStage
from stagecoach_api.store import Store, open_store


def open_run_store(resolved: ResolvedStage) -> Store:
    """Open the store the run's artifacts lie in."""
    return open_store(resolved.storage_uri, endpoint=resolved.storage_endpoint, region=resolved.storage_region)
