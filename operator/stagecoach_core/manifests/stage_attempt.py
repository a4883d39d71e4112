"""The input of manifests: one attempt of one stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stagecoach_api.artifacts import ResolvedStage
from stagecoach_api.base import Model
from stagecoach_api.rewards import EndpointCredentials
from stagecoach_api.spec import Stage
from stagecoach_core.manifests.naming import attempt_name
from stagecoach_core.policies.avoidance import AvoidedNode
from stagecoach_core.quantities import threads_per_rank


@dataclass(frozen=True)
class StageAttempt:
    """Everything that the manifests of one attempt depend on.

    Not to be confused with `stagecoach_core.values.Attempt`, the observed state of an attempt.
    """

    run_uid: str
    """UID of the TrainingRun, which owns all objects."""
    stage: Stage
    """The stage with all settings resolved (`PlannedStage.stage`)."""
    resolved: ResolvedStage
    """Content of `stage.json`."""
    credentials: str | None = None
    """Secret with S3 credentials in the run's namespace. None to use the service account's identity."""

    avoided: tuple[AvoidedNode, ...] = ()
    """Nodes that the pods avoid."""

    @property
    def name(self) -> str:
        """Name of the JobSet, and the beginning of the ConfigMap's."""
        return attempt_name(self.resolved.run, self.resolved.stage, self.run_uid, self.resolved.attempt)

    @property
    def num_threads(self) -> int:
        """Number of CPU threads of each rank: its share of the requested CPUs, 1 if none are requested."""
        return threads_per_rank(self.stage.resources) or 1

    @property
    def endpoint_secrets(self) -> tuple[str, ...]:
        """Secrets with API keys of the endpoints that the stage uses, sorted, without duplicates."""
        return tuple(sorted({item.secret_name for item in _endpoint_credentials(self.stage.config)}))


def _endpoint_credentials(value: Any) -> Iterator[EndpointCredentials]:
    """Yield the credentials anywhere below a configuration."""
    if isinstance(value, EndpointCredentials):
        yield value
    elif isinstance(value, Model):
        for _, member in value:
            yield from _endpoint_credentials(member)
    elif isinstance(value, tuple):
        for item in value:
            yield from _endpoint_credentials(item)
