"""Which run is meant: one of this folder's workspace, or one of a cluster.

The one rule, as `commands.options.WHICH_WORLD` tells it: a run of this folder is meant where there is one by that name
and no cluster is chosen on the command line; else the cluster's.
"""

from __future__ import annotations

from stagecoach_cli.cluster.api import ClusterApi, ClusterChoice, NotConfigured, UnknownObject, connect
from stagecoach_cli.cluster.runs import ClusterRun, cluster_run
from stagecoach_local.workspace import RunFolder, UnknownRun, here


def local_run(name: str, choice: ClusterChoice) -> RunFolder | None:
    """Return the run of this folder that is meant; None: a cluster's is. Raises WorkspaceError for several."""
    if choice.is_given:
        return None
    try:
        return here().find(name)
    except UnknownRun:
        return None


def ask_cluster(name: str, choice: ClusterChoice, wish: str) -> tuple[ClusterApi, ClusterRun]:
    """Set a field of the spec of a cluster's run, such as `suspend`; return the cluster, and the run as it is then."""
    api, name = cluster_of(name, choice)
    api.run(name)  # of an unknown one it says which there are
    return api, cluster_run(api.patch_run(name, {"spec": {wish: True}}))


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
