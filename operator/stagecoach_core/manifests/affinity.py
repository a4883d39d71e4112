"""On which nodes an attempt's pods run: one pod per node, and none on nodes that failed earlier attempts."""

from __future__ import annotations

from typing import Any

from stagecoach_api import names
from stagecoach_api.pods import Placement
from stagecoach_core.manifests.labels import labels_of
from stagecoach_core.manifests.stage_attempt import StageAttempt
from stagecoach_core.policies.avoidance import AvoidedNode

WEIGHT = 100
"""The largest weight of a preference."""


def affinity(attempt: StageAttempt) -> dict[str, Any]:
    """Return the affinity of the pods. Empty if they may run anywhere."""
    return {**_spread(attempt), **_avoidance(attempt.avoided)}


def placement_of(attempt: StageAttempt) -> Placement:
    """Return how the pods are placed. Pods with GPUs are meant to have a node each."""
    given = attempt.stage.pods.placement
    gpus = attempt.stage.resources.gpus_per_node
    return given or (Placement.SPREAD if gpus else Placement.PREFER_SPREAD)


def _spread(attempt: StageAttempt) -> dict[str, Any]:
    """Return the affinity between the attempt's own pods.

    A topology spread constraint would not do: with a maximum skew of 1, a cluster with one suitable node accepts both
    pods there.
    """
    if attempt.resolved.num_nodes == 1:
        return {}
    own = {key: value for key, value in labels_of(attempt).items() if key in OWN_LABELS}
    term = {"labelSelector": {"matchLabels": own}, "topologyKey": names.LABEL_HOSTNAME}
    preferred = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": WEIGHT, "podAffinityTerm": term}]}
    match placement_of(attempt):
        case Placement.SPREAD:
            return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
        case Placement.PREFER_SPREAD:
            return {"podAntiAffinity": preferred}
        case Placement.PACK:
            return {"podAffinity": preferred}


OWN_LABELS = frozenset({names.LABEL_RUN_UID, names.LABEL_STAGE, names.LABEL_ATTEMPT})
"""Labels that select the pods of one attempt."""


def _avoidance(nodes: tuple[AvoidedNode, ...]) -> dict[str, Any]:
    """Return the affinity to all nodes but the avoided ones.

    By name instead of the label `kubernetes.io/hostname`, which may differ from it. A requirement on a field takes a
    single value; those of one term must all hold.
    """
    excluded, unwanted = ([node.name for node in nodes if node.excluded is kind] for kind in (True, False))
    fields: dict[str, Any] = {}
    if excluded:
        fields["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": [_none_of(excluded)]}
    if unwanted:
        preference = {"weight": WEIGHT, "preference": _none_of(unwanted)}
        fields["preferredDuringSchedulingIgnoredDuringExecution"] = [preference]
    return {"nodeAffinity": fields} if fields else {}


def _none_of(nodes: list[str]) -> dict[str, Any]:
    return {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]}
