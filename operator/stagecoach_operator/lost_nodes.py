"""Pods that a lost node keeps from ending. Pure.

Only the kubelet of its node confirms that a pod has ended. If the node is lost, the pod stays `Terminating` for
ever, and with it everything that is deleted in the foreground. So a limit applies: beyond it the pod's object is
removed without the node. Should the node come back, its kubelet ends the container, whose pod does not exist any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from stagecoach_api.outcomes import Cause
from stagecoach_api.status import AttemptStatus
from stagecoach_operator.object_views import PodView

REMOVAL_SECONDS = 60.0
"""How long the removal of a lost pod's object may take. A finalizer of another controller may hold it for longer; the
pod is then ignored."""
STOPPING_CHARACTERS = 512


@dataclass(frozen=True)
class Patience:
    """How long the operator waits for pods, in seconds; the settings of the same names."""

    lost_node_seconds: float = 300.0
    leftover_seconds: float = 120.0


DEFAULT_PATIENCE = Patience()


def is_lost(pod: PodView, now: float, patience: Patience) -> bool:
    """Return whether a pod should have ended so long ago that its node must be lost."""
    return bool(pod.meta.delete_by) and not pod.has_ended and now >= pod.meta.delete_by + patience.lost_node_seconds


def is_ignored(pod: PodView, now: float, patience: Patience) -> bool:
    """Return whether nothing waits for a pod any more: it has ended, or its removal has failed."""
    return pod.has_ended or is_lost(pod, now - REMOVAL_SECONDS, patience)


def next_moment(pods: Iterable[PodView], now: float, patience: Patience) -> float | None:
    """Return when the next pod counts as lost or is ignored if nothing happens until then."""
    limits = [
        pod.meta.delete_by + patience.lost_node_seconds for pod in pods if pod.meta.delete_by and not pod.has_ended
    ]
    moments = [moment for limit in limits for moment in (limit, limit + REMOVAL_SECONDS)]
    return min((moment for moment in moments if moment > now), default=None)


def with_loss(record: AttemptStatus, lost: Sequence[PodView], patience: Patience) -> AttemptStatus:
    """Return the record of an attempt with pods on a lost node. The node is charged, unless the attempt was to end."""
    if not lost:
        return record
    text = loss_text(lost[0], patience)
    if text in record.stopping:
        return record
    stopping = "; ".join(part for part in (text, record.stopping) if part)
    # A hang is what a lost node looks like from the other nodes.
    charged = Cause.INFRASTRUCTURE if record.stop_cause in (None, Cause.HANG) else record.stop_cause
    found = {"stopping": stopping[:STOPPING_CHARACTERS], "stop_cause": charged}
    return record.model_copy(update={**found, "pod": lost[0].meta.name, "node": lost[0].node})


def loss_text(pod: PodView, patience: Patience) -> str:
    """Return what is known of the loss: the node, its pod, and when that should have ended."""
    due = datetime.fromtimestamp(pod.meta.delete_by, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return (
        f"node {pod.node} is lost: pod {pod.meta.name} should have ended by {due}, and had not "
        f"{patience.lost_node_seconds:.0f} s later"
    )
