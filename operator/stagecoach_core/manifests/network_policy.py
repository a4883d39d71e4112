"""The NetworkPolicy of an attempt: only its own pods may connect to them.

The rendezvous (torch's TCPStore) and the transports of NCCL and Gloo ask for no credential: a client that can connect
reads and writes them. So the network decides who can.
"""

from __future__ import annotations

from typing import Any

from stagecoach_api import names
from stagecoach_core.manifests.labels import labels_of, metadata
from stagecoach_core.manifests.stage_attempt import StageAttempt

IDENTITY = (names.LABEL_RUN_UID, names.LABEL_STAGE, names.LABEL_ATTEMPT)
"""Labels that the pods of one attempt share with no other pod."""


def network_policy(attempt: StageAttempt) -> dict[str, Any]:
    """Return the NetworkPolicy. All ports are open among the pods: NCCL and Gloo choose theirs at run time."""
    own = {"matchLabels": {label: labels_of(attempt)[label] for label in IDENTITY}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(attempt),
        "spec": {
            "podSelector": own,
            "policyTypes": ["Ingress"],
            # A peer without a namespace selector is in the namespace of the policy.
            "ingress": [{"from": [{"podSelector": own}]}],
        },
    }
