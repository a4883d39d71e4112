"""The use of kopf: it watches. Its handlers only store objects in the cache and request reconciliations.

Only `on.event` handlers are registered. For its change-detecting handlers kopf adds annotations and finalizers, and
would write to every watched pod.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import kopf

from stagecoach_operator.audit import WATCHED, selector_of, store
from stagecoach_operator.kube import Resource
from stagecoach_operator.object_cache import Cache

SERVER_TIMEOUT_SECONDS = 300
"""How long the API server keeps one watch open; kopf then resumes from its last resource version."""
CLIENT_TIMEOUT_SECONDS = 330.0
"""Longer than the server's, so that a watch normally ends at the server."""
INACTIVITY_SECONDS = 70.0
"""A watch without any event for this long counts as broken: the API server sends bookmarks about every minute."""


def make_registry(cache: Cache, enqueue: Callable[[str], None]) -> kopf.OperatorRegistry:
    """Return the handlers for all watched kinds."""
    registry = kopf.OperatorRegistry()
    for resource in WATCHED:
        _watch(resource, cache, enqueue, registry)
    kopf.on.login(registry=registry)(log_in)
    return registry


def _watch(resource: Resource, cache: Cache, enqueue: Callable[[str], None], registry: kopf.OperatorRegistry) -> None:
    async def on_event(event: Any, **_: Any) -> None:
        receive(resource, cache, enqueue, event["type"], event["object"])

    kopf.on.event(
        group=resource.group,
        version=resource.version,
        plural=resource.plural,
        id=resource.plural,
        registry=registry,
    )(on_event)


def receive(resource: Resource, cache: Cache, enqueue: Callable[[str], None], kind: str | None, body: Any) -> None:
    """Apply an event of a watch: ADDED, MODIFIED, DELETED, or None for an object listed at the start."""
    run_uid = cache.remove(body["metadata"]["uid"]) if kind == "DELETED" else store(cache, resource, body)
    if run_uid is not None:
        enqueue(run_uid)


def make_settings() -> kopf.OperatorSettings:
    """Return kopf's settings: no scanning, no posting, no peering; watches that detect broken connections."""
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True  # it needs cluster-wide rights to list CRDs and namespaces
    settings.posting.enabled = False  # kopf would post its log lines as Events; ours have stable reasons
    settings.peering.standalone = True  # the Lease elects the active replica
    settings.watching.server_timeout = SERVER_TIMEOUT_SECONDS
    settings.watching.client_timeout = CLIENT_TIMEOUT_SECONDS
    settings.watching.inactivity_timeout = INACTIVITY_SECONDS
    settings.watching.reconnect_backoff = 0.1
    # Handlers return at once, so per-object workers need neither a limit nor kopf's default linger of 5 seconds.
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
    """Give kopf the credentials that kube.py uses: the pod's service account, else KUBECONFIG.

    These login functions, unlike kopf's default, do not import a client library.
    """
    return kopf.login_with_service_account(**arguments) or kopf.login_with_kubeconfig(**arguments)
