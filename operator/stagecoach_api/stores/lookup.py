"""Look-ups that both drivers make: the inputs of a run, and the artifact of a stage."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from stagecoach_api.artifacts import Manifest, ResolvedInput, manifest_key
from stagecoach_api.fields import FieldPath, format_path
from stagecoach_api.problems import Problem
from stagecoach_api.references import RecordSource, Reference, hub_advice
from stagecoach_api.spec import TrainingRun
from stagecoach_api.stores.base import (
    Corrupt,
    FolderLocation,
    NotFound,
    Store,
    StoreError,
    file_uri,
    parse_location,
    sha256_of_file,
)
from stagecoach_api.stores.external import external_digest, list_external
from stagecoach_api.stores.retry import TRANSFERS, StorePatience

LOOKUP_THREADS = 8

_HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
"""`owner/name`, or the name alone for the oldest models."""

# -- inputs from outside -----------------------------------------------------------------------------------------------


def absolute(uri: str, root: str) -> str:
    """Return `uri` itself if it is absolute, else joined to `root`, an absolute URI."""
    if "://" in uri or uri.startswith(("/", "~")):
        return parse_location(uri).uri
    location = parse_location(root)
    if isinstance(location, FolderLocation):
        return file_uri(Path(os.path.normpath(location.path / uri)))
    return f"{location.uri.rstrip('/')}/{os.path.normpath(uri)}"


def find_inputs(
    uris: Mapping[str, str],
    endpoint: str | None = None,
    region: str | None = None,
    hash_file: Callable[[Path], str] = sha256_of_file,
    patience: StorePatience = TRANSFERS,
    threads: int = LOOKUP_THREADS,
) -> dict[str, ResolvedInput | StoreError]:
    """Look up absolute URIs, several at a time. Returns the input, or the error, under the same keys.

    `endpoint`, `region`: of S3. `hash_file`: returns the SHA-256 (hex) of a local file. `patience`: how long S3 is
    waited for.
    """

    def find(uri: str) -> ResolvedInput | StoreError:
        try:
            _, entries = list_external(uri, endpoint, region, hash_file, patience)
        # Returned, not raised: all unreadable inputs of a run are reported together.
        except StoreError as error:
            return error
        return ResolvedInput(uri=uri, digest=external_digest(entries))

    with ThreadPoolExecutor(threads, thread_name_prefix="inputs") as pool:
        # `map` keeps the order of its arguments, whichever look-up ends first.
        return dict(zip(uris, pool.map(find, uris.values()), strict=True))


def input_problems(
    run: TrainingRun, failures: Mapping[str, StoreError], remedy: str
) -> list[tuple[FieldPath, Problem]]:
    """Return a problem, with its path, for every field of a run that refers to an input in `failures`.

    `failures`: by `Reference.key`.
    """
    return [
        (
            ("spec", "stages", index, *path, "uri"),
            Problem(
                path=format_path(("stages", stage.name, *path, "uri")),
                value=reference.uri,
                rule=f"cannot be read: {failures[reference.key].message}",
                remedy=_hub_remedy(reference) or remedy,
            ),
        )
        for index, stage in enumerate(run.spec.stages)
        for path, reference in stage.references()
        if reference.uri is not None and reference.key in failures
    ]


def _hub_remedy(reference: Reference) -> str:
    """Return what to do about a URI that looks like a name on the Hugging Face Hub; empty if it does not."""
    uri = str(reference.uri)
    if not _HUB_NAME.fullmatch(uri) or (isinstance(reference, RecordSource) and PurePosixPath(uri).suffix):
        return ""
    return hub_advice(uri, "dataset" if isinstance(reference, RecordSource) else "model")


# -- artifacts ---------------------------------------------------------------------------------------------------------


def find_manifest(store: Store, digest: str) -> Manifest | None:
    """Return the manifest of a stage digest, or None if the store has no such artifact. Raises Corrupt."""
    try:
        return read_manifest(store, digest)
    except NotFound:
        return None


def read_manifest(store: Store, digest: str) -> Manifest:
    """Return the manifest of a stage digest. Raises NotFound if there is no artifact, Corrupt if it is invalid."""
    key = manifest_key(digest)
    try:
        return Manifest.model_validate_json(store.read(key))
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise Corrupt(key, f"is not a manifest ({reason}); delete the artifact to make it again") from error
