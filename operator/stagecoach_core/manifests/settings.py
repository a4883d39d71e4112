"""What an installation puts into the pods of every stage; a part of the operator's settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stagecoach_api.base import Model, Name
from stagecoach_api.pods import Quantity
from stagecoach_api.version import __version__

LAUNCHER_MARGIN_SECONDS = 10
"""What of a pod's grace period the launcher keeps for itself: to end its workers and write the result."""


class BuildSettings(Model):
    """The same for all runs: image, user, grace period, progress server."""

    trainer_image: str = f"stagecoach/trainer:{__version__}"
    """Image of stages that name none."""

    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When a node fetches the image."""

    grace_seconds: Annotated[int, Field(gt=LAUNCHER_MARGIN_SECONDS, le=86_400)] = 330
    """Seconds from a pod's SIGTERM to its SIGKILL: time to save a checkpoint."""

    user_id: Annotated[int, Field(ge=1, le=2**31 - 1)] = 65532
    """Numeric user of the containers."""

    group_id: Annotated[int, Field(ge=1, le=2**31 - 1)] = 65532
    """Numeric group of the containers and of the volumes they write to."""

    service_account: Name | None = None
    """Service account of stages that name none; its identity may be that of the storage. None: the namespace's
    `default`."""

    image_pull_secrets: tuple[Name, ...] = ()
    """Pull secrets of stages that name none."""

    work_size_limit: Quantity | None = None
    """Most that scratch, checkpoints and fetched inputs of one pod may take on its node. None: the node's own limit."""

    progress_url: str | None = None
    """Base URL under which pods reach the progress server, such as `https://stagecoach.stagecoach-system.svc:8443`.
    None: stages do not report."""

    progress_ca: str | None = None
    """Certificate (PEM) that the progress server's is signed by. None: one that the image trusts, or plain HTTP."""

    progress_token_seconds: Annotated[int, Field(ge=600, le=86_400)] = 3600
    """Lifetime of the tokens with which pods report; the kubelet renews them."""

    @property
    def launcher_grace_seconds(self) -> int:
        """Seconds the launcher gives its workers."""
        return self.grace_seconds - LAUNCHER_MARGIN_SECONDS
