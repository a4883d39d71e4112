"""What manifests are made of: one attempt of one stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from stagecoach_api.artifacts import ResolvedStage
from stagecoach_api.base import Model
from stagecoach_api.rewards import EndpointCredentials
from stagecoach_api.spec import Stage
from stagecoach_core.manifests.naming import attempt_name
from stagecoach_core.quantities import asked_threads


@dataclass(frozen=True)
class StageAttempt:
    """One attempt of one stage of one run."""

    run_uid: str
    """UID of the TrainingRun, which owns everything that is made."""
    stage: Stage
    """The stage with all settings resolved (`PlannedStage.stage`)."""
    resolved: ResolvedStage
    """`stage.json`."""
    credentials: str | None = None
    """Secret with S3 credentials in the run's namespace. None: the service account's identity."""

    @property
    def name(self) -> str:
        """Name of its JobSet and its ConfigMap."""
        return attempt_name(self.resolved.run, self.resolved.stage, self.run_uid, self.resolved.attempt)

    @property
    def num_threads(self) -> int:
        """CPU threads of each rank: its share of the CPUs that are asked for; one where none are."""
        return asked_threads(self.stage.resources) or 1

    @property
    def endpoint_secrets(self) -> tuple[str, ...]:
        """Secrets with the keys of the endpoints that the stage asks, each once, sorted."""
        return tuple(sorted({found.secret_name for found in _endpoint_credentials(self.stage.config)}))


def _endpoint_credentials(value: Any) -> Iterator[EndpointCredentials]:
    """Yield what stands anywhere below a configuration."""
    if isinstance(value, EndpointCredentials):
        yield value
    elif isinstance(value, Model):
        for _, member in value:
            yield from _endpoint_credentials(member)
    elif isinstance(value, tuple):
        for item in value:
            yield from _endpoint_credentials(item)
