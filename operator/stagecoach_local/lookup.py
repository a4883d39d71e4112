"""Whether a stage's artifact is in the store."""

from __future__ import annotations

from stagecoach_api.artifacts import Manifest
from stagecoach_api.store import NotFound, Store
from stagecoach_api.stores.lookup import artifact_uri, read_manifest
from stagecoach_core.values import Found, Missing


def ask(store: Store, digest: str, now: float) -> tuple[Found | Missing, Manifest | None]:
    """Return the store's answer whether the work of a stage digest is done, and the manifest if it is."""
    try:
        manifest = read_manifest(store, digest)
    except NotFound:
        return Missing(at=now), None
    return Found(digest, manifest.content_digest, artifact_uri(store.uri, digest)), manifest
