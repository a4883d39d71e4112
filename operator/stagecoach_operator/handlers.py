"""What kopf is used for: watching and queueing. Its handlers only take objects into the cache and ask for a turn.

Only `on.event` handlers are registered: they add neither annotation nor finalizer to anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kopf

from stagecoach_operator.audit import WATCHED, selector_of, take
from stagecoach_operator.kube import Resource
from stagecoach_operator.watched import Cache

SERVER_TIMEOUT_SECONDS = 300
"""How long the API server keeps one watch; then it is begun anew where it was."""
CLIENT_TIMEOUT_SECONDS = 330.0
INACTIVITY_SECONDS = 70.0
"""A watch without an event, be it a bookmark (which come every minute), is taken for dead."""


def make_registry(cache: Cache, wake: Callable[[str], None]) -> kopf.OperatorRegistry:
    """Return the handlers of everything that is watched."""
    registry = kopf.OperatorRegistry()
    for resource in WATCHED:
        _watch(resource, cache, wake, registry)
    kopf.on.login(registry=registry)(log_in)
    return registry


def _watch(resource: Resource, cache: Cache, wake: Callable[[str], None], registry: kopf.OperatorRegistry) -> None:
    async def on_event(event: Any, **_: Any) -> None:
        hear(resource, cache, wake, event["type"], event["object"])

    kopf.on.event(
        group=resource.group,
        version=resource.version,
        plural=resource.plural,
        id=resource.plural,
        registry=registry,
    )(on_event)


def hear(resource: Resource, cache: Cache, wake: Callable[[str], None], kind: str | None, body: Any) -> None:
    """Take an event of a watch in: ADDED, MODIFIED, DELETED, or None for an object that was there at the start."""
    run_uid = cache.remove(body["metadata"]["uid"]) if kind == "DELETED" else take(cache, resource, body)
    if run_uid is not None:
        wake(run_uid)


def make_settings() -> kopf.OperatorSettings:
    """Return kopf's settings: no scanning, no posting, no peering, watches that notice when they are dead."""
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.watching.server_timeout = SERVER_TIMEOUT_SECONDS
    settings.watching.client_timeout = CLIENT_TIMEOUT_SECONDS
    settings.watching.inactivity_timeout = INACTIVITY_SECONDS
    settings.watching.reconnect_backoff = 0.1
    settings.queueing.worker_limit = None
    settings.queueing.idle_timeout = 1.0
    settings.networking.error_backoffs = (1, 2, 4, 8, 16)
    for resource in WATCHED:
        selector = selector_of(resource)
        if selector:
            key: Any = (resource.group, resource.version, resource.plural)
            settings.watching.label_selectors[key] = selector
    return settings


async def log_in(**arguments: Any) -> kopf.ConnectionInfo | None:
    """Let kopf use what kube.py uses: the pod's service account, else KUBECONFIG. No client library is imported."""
    return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)
