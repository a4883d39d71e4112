"""Which store holds the artifacts that a command asks for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stagecoach_cli.commands.options import Failure

if TYPE_CHECKING:
    from stagecoach_api.store import Store
    from stagecoach_cli.cluster.api import ClusterChoice

WIDE = 1000
"""Columns of a listing that nobody's terminal limits: a URI stays in one piece."""


@dataclass(frozen=True)
class Place:
    """A store, and how the thing asked for is called in it."""

    store: Store
    name: str | None = None
    """None: nothing in particular."""
    endpoint: str | None = None
    region: str | None = None


def chosen(context: str | None, namespace: str | None) -> ClusterChoice:
    from stagecoach_cli.cluster.api import ClusterChoice

    return ClusterChoice(context, namespace)


def place_of_run(what: str | None, storage: str | None, endpoint: str | None, choice: ClusterChoice) -> Place:
    """Return the store of a run given by its file or its name. Raises InvalidRun, WorkspaceError, ClusterError."""
    from stagecoach_api.reading.loading import load_run
    from stagecoach_local.prepare import open_run_store
    from stagecoach_local.workspace import here

    if what is not None and Path(what).is_file():
        loaded = load_run(Path(what))
        settings = loaded.run.spec.storage
        name = f"{loaded.run.metadata.namespace}/{loaded.run.metadata.name}"
        return Place(open_run_store(loaded, here(), storage), name, endpoint or settings.endpoint, settings.region)
    return place(what, what, storage, endpoint, choice)


def place_of_artifact(artifact: str, storage: str | None, endpoint: str | None, choice: ClusterChoice) -> Place:
    """Return the store of an artifact given by URI, by RUN/STAGE or by digest."""
    from stagecoach_cli.artifacts.store import split_uri

    parts = split_uri(artifact)
    if parts is not None:
        return place(None, parts[1], storage or parts[0], endpoint, choice)
    run = artifact.rpartition("/")[0] or None
    return place(run, artifact, storage, endpoint, choice)


def place(run: str | None, name: str | None, storage: str | None, endpoint: str | None, choice: ClusterChoice) -> Place:
    """Return `storage` if given, else where the named run of this workspace keeps its artifacts, else the default where
    that knows the run, else where the cluster's run keeps them."""
    from stagecoach_api.store import open_store
    from stagecoach_cli.artifacts.store import pointers
    from stagecoach_cli.target import local_run
    from stagecoach_local.workspace import here

    if storage is not None:
        return Place(open_store(storage, endpoint), name, endpoint)
    folder = None if run is None else local_run(run, choice)
    record = None if folder is None else folder.load()
    if record is not None:
        endpoint, region = endpoint or record.storage_endpoint, record.storage_region
        return Place(open_store(record.storage_uri, endpoint, region), name, endpoint, region)
    default = open_store(str(here().default_storage), endpoint)
    if run is None or (not choice.is_given and pointers(default, run)):  # runs without a record may lie there, too
        return Place(default, name, endpoint)
    return place_on_cluster(run, name, endpoint, choice) or Place(default, name, endpoint)


def place_on_cluster(run: str, name: str | None, endpoint: str | None, choice: ClusterChoice) -> Place | None:
    """Return where a cluster's run keeps its artifacts; None where no cluster is configured.

    An artifact goes by its digest then, which the run's status names even where no pointers could be written.
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
        raise Failure(f"{found.title} has made nothing yet in the operator's storage; name that by --storage")
    endpoint = endpoint or settings.endpoint
    stage = (name or "").removeprefix(run).strip("/")
    made = next((item.artifact for item in found.status.stages if item.name == stage), None)
    known = f"{found.title}/{stage}" if stage else found.title
    return Place(
        store=open_store(settings.uri, endpoint, settings.region),
        name=known if made is None else made.stage_digest,
        endpoint=endpoint,
        region=settings.region,
    )
