"""The record of the attempt that may write to an artifact (see `stagecoach_api.writers`)."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ConfigDict, Field

from stagecoach_api.artifacts import ResolvedStage
from stagecoach_api.base import Model

LEASE_SECONDS = 120.0
"""How long a lease lasts after it was last renewed."""
RENEWAL_SECONDS = 30.0


class WriterRecord(Model):
    """`writer.json`: who may write to an artifact. Fields of later versions are ignored."""

    model_config = ConfigDict(extra="ignore")

    namespace: str
    run: str
    run_uid: str
    stage: str
    attempt: int

    epoch: int = Field(ge=1)
    """How many times the right was taken; the latest holder has the highest."""

    mark: str = ""
    """Chosen at random at each change, so that no two versions are equal."""

    released: bool = False
    """Whether the holder has given it up."""

    @property
    def title(self) -> str:
        return f"run {self.namespace}/{self.run}"

    def is_same_work(self, stage: ResolvedStage) -> bool:
        """Whether it is held by an attempt of the same stage of the same run."""
        return self.run_uid != "" and (self.run_uid, self.stage) == (stage.run_uid, stage.stage)


@dataclass(frozen=True)
class WriterLease:
    """The right to write, as one answer of the store shows it."""

    record: WriterRecord
    tag: str
    """Version of the object."""
    remaining: float
    """Seconds after which it ends unless it is renewed; not above 0 if it has ended."""

    @property
    def is_alive(self) -> bool:
        return self.remaining > 0
