"""Settings of an installation for the pods of all stages; a part of the operator's settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stagecoach_api.base import Model, Name
from stagecoach_api.pods import Quantity
from stagecoach_api.version import __version__

LAUNCHER_MARGIN_SECONDS = 10
"""Part of a pod's grace period that the launcher reserves to kill its workers and to write the result."""


class ManifestSettings(Model):
    """Settings common to all runs: image, user, grace period, progress server."""

    trainer_image: str = f"stagecoach/trainer:{__version__}"
    """Image of stages that set none."""

    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When a node pulls the image."""

    grace_seconds: Annotated[int, Field(gt=LAUNCHER_MARGIN_SECONDS, le=86_400)] = 330
    """Seconds between SIGTERM and SIGKILL of a pod, in which it saves a checkpoint."""

    user_id: Annotated[int, Field(ge=1, le=2**31 - 1)] = 65532
    """Numeric user ID of the containers."""

    group_id: Annotated[int, Field(ge=1, le=2**31 - 1)] = 65532
    """Numeric group ID of the containers and of the volumes they write to."""

    service_account: Name | None = None
    """Service account of stages that set none. Its identity may grant access to the storage. If unset: the
    namespace's `default`."""

    image_pull_secrets: tuple[Name, ...] = ()
    """Image pull secrets of stages that set none."""

    work_size_limit: Quantity | None = None
    """Size limit of a pod's scratch space, checkpoints and fetched inputs. If unset: the node's own limit."""

    network_policies: bool = False
    """Whether each attempt gets a NetworkPolicy that lets only its own pods connect to each other."""

    progress_url: str | None = None
    """Base URL under which pods reach the progress server, such as `https://stagecoach.stagecoach-system.svc:8443`.
    If unset: stages do not report."""

    progress_ca: str | None = None
    """CA certificate (PEM) of the progress server. If unset: a CA that the image trusts, or plain HTTP."""

    progress_token_seconds: Annotated[int, Field(ge=600, le=86_400)] = 3600
    """Lifetime in seconds of the tokens with which pods report. The kubelet renews them."""

    @property
    def launcher_grace_seconds(self) -> int:
        """Seconds that the launcher leaves its workers to end."""
        return self.grace_seconds - LAUNCHER_MARGIN_SECONDS
