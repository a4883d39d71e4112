"""Which run is meant: one of this folder's workspace, or one of a cluster. The one rule for every command."""

from __future__ import annotations

from stagecoach_cli.cluster_api import ClusterApi, ClusterChoice, ClusterError, NotConfigured, UnknownObject, connect
from stagecoach_cli.workspace import RunFolder, UnknownRun, here

RULE = """A run of this folder's workspace (.stagecoach) is meant where there is one by that name and neither
--namespace nor --context is given; else the cluster's: that of KUBECONFIG, ~/.kube/config, or the pod this runs in."""


def local_run(name: str, choice: ClusterChoice) -> RunFolder | None:
    """Return the run of this folder that is meant; None: a cluster's is. Raises WorkspaceError for several."""
    if choice.is_given:
        return None
    try:
        return here().find(name)
    except UnknownRun:
        return None


def cluster_of(name: str, choice: ClusterChoice) -> tuple[ClusterApi, str]:
    """Return the cluster, seen from the namespace of the run that is meant, and the run's name.

    `name`: `RUN` or `NAMESPACE/RUN`. Raises NotConfigured, naming the runs of this folder where there might be one.
    """
    namespace, slash, run = name.rpartition("/")
    try:
        api = connect(choice)
    except NotConfigured as error:
        if choice.is_given:
            raise
        raise UnknownRun(f"{here().unknown(name)}; {error}") from error
    if not slash:
        return api, run
    if choice.namespace not in (None, namespace):
        raise UnknownObject(f"`{name}` is in another namespace than --namespace {choice.namespace}; give one of them")
    return api.at(namespace), run


def explain_both(name: str, choice: ClusterChoice, error: ClusterError) -> ClusterError:
    """Return the cluster's error, with what this folder has where a run of it may have been meant."""
    if choice.is_given or not here().known_runs():
        return error
    return type(error)(f"{error}\n{here().unknown(name)}")
