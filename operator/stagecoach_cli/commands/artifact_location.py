"""Resolving the run or artifact that a command names to its store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stagecoach_cli.commands.options import Failure

if TYPE_CHECKING:
    from stagecoach_api.store import Store
    from stagecoach_cli.cluster.api import ClusterChoice

WIDE = 1000
"""Columns of a listing that is not printed to a terminal; wide enough to keep a URI on one line."""


@dataclass(frozen=True)
class ArtifactLocation:
    """A store, and the name of the requested run or artifact in it."""

    store: Store
    name: str | None = None
    """None if no name was given."""
    endpoint: str | None = None
    region: str | None = None


def cluster_choice(context: str | None, namespace: str | None) -> ClusterChoice:
    from stagecoach_cli.cluster.api import ClusterChoice

    return ClusterChoice(context, namespace)


def locate_run(what: str | None, storage: str | None, endpoint: str | None, choice: ClusterChoice) -> ArtifactLocation:
    """Return the store of a run, given by its file or name. Raises InvalidRun, WorkspaceError and ClusterError."""
    from stagecoach_api.reading.loading import load_run
    from stagecoach_local.prepare import open_run_store
    from stagecoach_local.workspace import current_workspace

    if what is not None and Path(what).is_file():
        loaded = load_run(Path(what))
        settings = loaded.run.spec.storage
        name = f"{loaded.run.metadata.namespace}/{loaded.run.metadata.name}"
        return ArtifactLocation(
            open_run_store(loaded, current_workspace(), storage), name, endpoint or settings.endpoint, settings.region
        )
    return locate(what, what, storage, endpoint, choice)


def locate_artifact(
    artifact: str, storage: str | None, endpoint: str | None, choice: ClusterChoice
) -> ArtifactLocation:
    """Return the store of an artifact, given by URI, RUN/STAGE or digest."""
    from stagecoach_cli.artifacts.store import split_uri

    parts = split_uri(artifact)
    if parts is not None:
        return locate(None, parts[1], storage or parts[0], endpoint, choice)
    run = artifact.rpartition("/")[0] or None
    return locate(run, artifact, storage, endpoint, choice)


def locate(
    run: str | None, name: str | None, storage: str | None, endpoint: str | None, choice: ClusterChoice
) -> ArtifactLocation:
    """Return the first of these stores: `storage` if given, that of the local run, the workspace's default store if it
    has pointers of the run, that of the cluster's run."""
    from stagecoach_api.store import open_store
    from stagecoach_cli.artifacts.store import pointers
    from stagecoach_cli.target import local_run
    from stagecoach_local.workspace import current_workspace

    if storage is not None:
        return ArtifactLocation(open_store(storage, endpoint), name, endpoint)
    folder = None if run is None else local_run(run, choice)
    record = None if folder is None else folder.load()
    if record is not None:
        endpoint, region = endpoint or record.storage_endpoint, record.storage_region
        return ArtifactLocation(open_store(record.storage_uri, endpoint, region), name, endpoint, region)
    default = open_store(str(current_workspace().default_storage), endpoint)
    if run is None or (not choice.is_given and pointers(default, run)):  # also finds runs whose record was deleted
        return ArtifactLocation(default, name, endpoint)
    return locate_on_cluster(run, name, endpoint, choice) or ArtifactLocation(default, name, endpoint)


def locate_on_cluster(
    run: str, name: str | None, endpoint: str | None, choice: ClusterChoice
) -> ArtifactLocation | None:
    """Return the store of a cluster's run; None if no cluster is configured.

    An artifact's name is replaced by its digest, which the run's status has even if no pointer could be written.
    """
    from stagecoach_api.store import open_store
    from stagecoach_cli.cluster.api import NotConfigured
    from stagecoach_cli.cluster.runs import cluster_run
    from stagecoach_cli.target import cluster_of
    from stagecoach_local.workspace import UnknownRun

    try:
        api, own_name = cluster_of(run, choice)
    except (NotConfigured, UnknownRun):
        if choice.is_given:
            raise
        return None
    found = cluster_run(api.run(own_name))
    settings = found.storage
    if settings is None or settings.uri is None:
        raise Failure(f"{found.title} has no artifacts yet that show the operator's storage; give it by --storage")
    endpoint = endpoint or settings.endpoint
    stage = (name or "").removeprefix(run).strip("/")
    artifact = next((item.artifact for item in found.status.stages if item.name == stage), None)
    full_name = f"{found.title}/{stage}" if stage else found.title
    return ArtifactLocation(
        store=open_store(settings.uri, endpoint, settings.region),
        name=full_name if artifact is None else artifact.stage_digest,
        endpoint=endpoint,
        region=settings.region,
    )
