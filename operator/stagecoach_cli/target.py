"""The target of a command: a run of this folder's workspace, or one of a cluster.

The rule, stated for users in `commands.options.TARGET_RULE`: if the workspace has a run of that name and the command
line selects no cluster, the local run is the target, otherwise the cluster's.
"""

from __future__ import annotations

from stagecoach_cli.cluster.api import ClusterApi, ClusterChoice, NotConfigured, UnknownObject, connect
from stagecoach_cli.cluster.runs import ClusterRun, cluster_run
from stagecoach_local.workspace import RunFolder, UnknownRun, current_workspace


def local_run(name: str, choice: ClusterChoice) -> RunFolder | None:
    """Return the local run that is the target, None if the target is on a cluster. Raises WorkspaceError if the name
    is ambiguous."""
    if choice.is_given:
        return None
    try:
        return current_workspace().find(name)
    except UnknownRun:
        return None


def set_on_cluster(name: str, choice: ClusterChoice, field: str) -> tuple[ClusterApi, ClusterRun]:
    """Set a boolean field of a run's spec, such as `suspend`, to true; return the cluster and the patched run."""
    api, name = cluster_of(name, choice)
    api.run(name)  # its error for an unknown run lists the known ones
    return api, cluster_run(api.patch_run(name, {"spec": {field: True}}))


def cluster_of(name: str, choice: ClusterChoice) -> tuple[ClusterApi, str]:
    """Return the client for the cluster and namespace of a run, and the run's name.

    `name`: `RUN` or `NAMESPACE/RUN`. If no cluster is configured, raises NotConfigured if the command line selects a
    cluster, and otherwise UnknownRun, which lists the runs of this folder.
    """
    namespace, slash, run = name.rpartition("/")
    try:
        api = connect(choice)
    except NotConfigured as error:
        if choice.is_given:
            raise
        raise UnknownRun(f"{current_workspace().unknown_message(name)}; {error}") from error
    if not slash:
        return api, run
    if choice.namespace not in (None, namespace):
        raise UnknownObject(f"`{name}` contradicts --namespace {choice.namespace}; give the namespace only once")
    return api.at(namespace), run
