"""Artifact stores: one interface to a folder and to S3. boto3 is imported with the first call to S3.

store = open_store("s3://models/chinese-alpaca", endpoint="https://s3.example.com")
store.upload(Path("model.safetensors"), "artifacts/…/output/model.safetensors")
store.commit("artifacts/…/manifest.json", manifest)      # last, and only if it does not exist
"""

from __future__ import annotations

from stagecoach_api.stores.base import (
    AccessDenied,
    Corrupt,
    FolderLocation,
    InvalidLocation,
    NotFound,
    Replaced,
    Stamped,
    Store,
    StoreEntry,
    StoreError,
    Unreachable,
    parse_location,
)
from stagecoach_api.stores.external import external_digest, list_external
from stagecoach_api.stores.folder import FolderStore
from stagecoach_api.stores.retry import TRANSFERS, StorePatience
from stagecoach_api.stores.s3 import S3Store

__all__ = [
    "AccessDenied",
    "Corrupt",
    "FolderStore",
    "InvalidLocation",
    "NotFound",
    "Replaced",
    "S3Store",
    "Stamped",
    "Store",
    "StoreEntry",
    "StoreError",
    "Unreachable",
    "external_digest",
    "list_external",
    "open_store",
]


def open_store(
    uri: str, endpoint: str | None = None, region: str | None = None, patience: StorePatience = TRANSFERS
) -> Store:
    """Open the store at `s3://bucket/prefix`, `file:///folder` or a plain path. Nothing is read or created yet.

    `endpoint`, `region`: of S3; if None, those of the AWS SDK's configuration. `patience`: how long S3 is waited
    for. Raises InvalidLocation for any other scheme.
    """
    location = parse_location(uri)
    if isinstance(location, FolderLocation):
        return FolderStore(location)
    return S3Store(location, endpoint=endpoint, region=region, patience=patience)
