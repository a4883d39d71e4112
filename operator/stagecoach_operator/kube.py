"""The only module that calls the API server. Bodies are raw JSON; errors are classified.

KubeError             the request failed
├── ObjectNotFound    the object does not exist
│   └── NotServed     the kind does not exist: its CRD is not installed
├── AlreadyExists     an object of that name exists
├── Conflict          the object has changed since it was read, or another one has its name now
├── RequestForbidden  denied by RBAC, a quota or a policy
├── Invalid           rejected by the API server's validation or a webhook
└── Unavailable       no response, overloaded, or an internal error: the same request may succeed later
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote, urlencode

from stagecoach_api import names
from stagecoach_api.kubernetes_status import status_object

Body = dict[str, Any]
"""An object of the API as JSON."""

MERGE_PATCH = "application/merge-patch+json"
JSON = "application/json"
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
LIST_CHUNK = 500

# -- errors ------------------------------------------------------------------------------------------------------------


class KubeError(Exception):
    """The request failed; the message is the API server's."""


class ObjectNotFound(KubeError):
    """The object does not exist."""


class NotServed(ObjectNotFound):
    """The kind of object does not exist: its CRD is not installed."""


class AlreadyExists(KubeError):
    """An object of that name exists."""


class Conflict(KubeError):
    """The object has changed since it was read, or another one has its name now."""


class RequestForbidden(KubeError):
    """Denied by RBAC, a quota or a policy."""


class Invalid(KubeError):
    """Rejected by the API server's validation or a webhook."""


class Unavailable(KubeError):
    """No response, overloaded, or an internal error."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds to wait before the next request, if the server specified them."""


def error_of(status: int, text: str, retry_after: str | None = None) -> KubeError:
    """Return the error for a response with status 400 or above."""
    answer = status_object(text)
    message = str(answer.get("message") or text[:500] or f"status {status}")
    reason = answer.get("reason")
    if status == 404:
        # A missing object gives a Status object as the body; an unknown path the plain text `404 page not found`.
        return ObjectNotFound(message) if answer else NotServed(message)
    if status == 409:
        return AlreadyExists(message) if reason == "AlreadyExists" else Conflict(message)
    if status in (401, 403):
        return RequestForbidden(message)
    if status == 410:  # Expired: the resource version, or the continue token of a list, is too old
        return Conflict(message)
    if status in (408, 429) or status >= 500:
        seconds = retry_after if retry_after and retry_after.isdigit() else None
        return Unavailable(f"{status}: {message}", None if seconds is None else float(seconds))
    return Invalid(message)


# -- resources ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resource:
    """A kind of object and its place in URLs."""

    group: str
    """Empty for the core group."""
    version: str
    plural: str
    kind: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None, name: str = "", subresource: str = "") -> str:
        """Return the URL path of one object, or of all (in all namespaces if `namespace` is None)."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root]
        if namespace is not None:
            parts += ["namespaces", quote(namespace, safe="")]
        parts += [self.plural, *(quote(part, safe="") for part in (name, subresource) if part)]
        return "/".join(parts)


TRAINING_RUNS = Resource(names.API_GROUP, names.API_VERSION, names.PLURAL, names.KIND)
JOBSETS = Resource(names.JOBSET_GROUP, names.JOBSET_VERSION, names.JOBSET_PLURAL, names.JOBSET_KIND)
WORKLOADS = Resource(names.KUEUE_GROUP, names.KUEUE_WORKLOAD_VERSION, names.KUEUE_WORKLOAD_PLURAL, "Workload")
PODS = Resource("", "v1", "pods", "Pod")
CONFIG_MAPS = Resource("", "v1", "configmaps", "ConfigMap")
NETWORK_POLICIES = Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy")
EVENTS = Resource("", "v1", "events", "Event")
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease")


@dataclass(frozen=True)
class Listing:
    """Listed objects, and the resource version of the list."""

    items: tuple[Body, ...]
    resource_version: str


class Kube(Protocol):
    """The operations of the API server that the operator uses. Every method may raise any KubeError."""

    async def create(self, resource: Resource, body: Body) -> Body:
        """Create an object in the namespace named in its metadata. Raises AlreadyExists."""

    async def get(self, resource: Resource, namespace: str, name: str) -> Body:
        """Return an object. Raises ObjectNotFound."""

    async def list(
        self, resource: Resource, namespace: str | None, labels: str = "", fields: str = "", metadata_only: bool = False
    ) -> Listing:
        """Return the objects that match both selectors. Raises NotServed if the kind is not installed."""

    async def patch(self, resource: Resource, namespace: str, name: str, patch: Body, subresource: str = "") -> Body:
        """Apply a JSON merge patch. With `metadata.resourceVersion` and `metadata.uid` in it, raises Conflict if the
        object has changed or is another one."""

    async def replace(self, resource: Resource, body: Body) -> Body:
        """Replace an object. Raises Conflict if it has changed since its `resourceVersion`."""

    async def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        uid: str | None = None,
        foreground: bool = True,
        grace_seconds: int | None = None,
    ) -> None:
        """Delete an object, its dependants first (`foreground`) or afterwards.

        `grace_seconds`: replaces a pod's own grace period; 0 removes the object without waiting for its node. Raises
        ObjectNotFound, and Conflict if the object of that name has another UID.
        """

    async def read(self, path: str) -> Any:
        """Return the JSON at a path that is not an object of the API, such as the server's signing keys."""


# -- implementation ----------------------------------------------------------------------------------------------------


@dataclass
class Calls:
    """Number of requests to the API server by verb and kind, for metrics and benchmarks."""

    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    answers: dict[tuple[str, str], int] = field(default_factory=dict)
    """By method and status code; `error` without a response."""

    def answered(self, method: str, code: str) -> None:
        self.answers[method, code] = self.answers.get((method, code), 0) + 1

    def count(self, verb: str, plural: str) -> None:
        self.counts[verb, plural] = self.counts.get((verb, plural), 0) + 1


class TokenBucket:
    """Allows `rate` calls per second and bursts of `burst`: a restarted operator must not flood the API server."""

    def __init__(self, rate: float, burst: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._tokens = burst
        self._at = clock()

    def wait_seconds(self) -> float:
        """Take a token; return how long to wait before using it."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate) - 1.0
        self._at = now
        return max(0.0, -self._tokens / self._rate)


WRITES_PER_SECOND = 100.0
WRITE_BURST = 200.0


class ApiServer:
    """`Kube` on top of kubernetes.aio, with credentials from the pod's service account, else from KUBECONFIG."""

    def __init__(self, client: Any, timeout_seconds: float) -> None:
        self._client = client
        self._timeout = timeout_seconds
        self._bucket = TokenBucket(WRITES_PER_SECOND, WRITE_BURST)
        self.calls = Calls()

    @classmethod
    async def connect(cls, timeout_seconds: float = 30.0) -> ApiServer:
        """Read the credentials. Raises Unavailable if there are none."""
        from kubernetes.aio import config
        from kubernetes.aio.client import ApiClient, Configuration

        configuration = Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException:
            try:
                await config.load_kube_config(client_configuration=configuration)
            except config.ConfigException as error:
                raise Unavailable(f"no credentials for the API server: {error}; run in a pod, or set KUBECONFIG") from (
                    error
                )
        return cls(ApiClient(configuration), timeout_seconds)

    async def close(self) -> None:
        await self._client.close()

    async def create(self, resource: Resource, body: Body) -> Body:
        path = resource.path(body["metadata"]["namespace"])
        return await self._write("POST", resource, path, body)

    async def get(self, resource: Resource, namespace: str, name: str) -> Body:
        self.calls.count("get", resource.plural)
        body: Body = await self._request("GET", resource.path(namespace, name))
        return body

    async def list(
        self, resource: Resource, namespace: str | None, labels: str = "", fields: str = "", metadata_only: bool = False
    ) -> Listing:
        query = {"labelSelector": labels, "fieldSelector": fields, "limit": str(LIST_CHUNK)}
        accept = f"{METADATA_ONLY},{JSON}" if metadata_only else JSON
        items: list[Body] = []
        token = ""
        while True:
            self.calls.count("list", resource.plural)
            page = await self._request("GET", resource.path(namespace), {**query, "continue": token}, accept=accept)
            items += page.get("items") or []
            token = page["metadata"].get("continue") or ""
            if not token:
                return Listing(tuple(items), page["metadata"].get("resourceVersion", ""))

    async def patch(self, resource: Resource, namespace: str, name: str, patch: Body, subresource: str = "") -> Body:
        query = {"fieldManager": names.MANAGED_BY}
        path = resource.path(namespace, name, subresource)
        return await self._write("PATCH", resource, path, patch, query, MERGE_PATCH)

    async def replace(self, resource: Resource, body: Body) -> Body:
        path = resource.path(body["metadata"]["namespace"], body["metadata"]["name"])
        return await self._write("PUT", resource, path, body)

    async def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        uid: str | None = None,
        foreground: bool = True,
        grace_seconds: int | None = None,
    ) -> None:
        body: Body = {"propagationPolicy": "Foreground" if foreground else "Background"}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        await self._write("DELETE", resource, resource.path(namespace, name), body)

    async def read(self, path: str) -> Any:
        return await self._request(
            "GET", path, accept="*/*"
        )  # signing keys are served only as `application/jwk-set+json`

    # -- one request ---------------------------------------------------------------------------------------------------

    async def _write(
        self,
        method: str,
        resource: Resource,
        path: str,
        body: Body,
        query: Mapping[str, str] | None = None,
        content_type: str = JSON,
    ) -> Body:
        wait = self._bucket.wait_seconds()
        if wait:
            await asyncio.sleep(wait)
        self.calls.count(method.lower(), resource.plural)
        answer: Body = await self._request(method, path, query, body, content_type)
        return answer

    async def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Body | None = None,
        content_type: str = JSON,
        accept: str = JSON,
    ) -> Any:
        import aiohttp

        given = {name: value for name, value in (query or {}).items() if value}
        url = f"{self._client.configuration.host}{path}" + (f"?{urlencode(given)}" if given else "")
        headers = {"Accept": accept, "Content-Type": content_type, "User-Agent": "stagecoach-operator"}
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        try:
            response = await self._client.call_api(method, url, headers, body, _request_timeout=self._timeout)
            text = (await response.read()).decode()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.calls.answered(method, "error")
            raise Unavailable(f"{method} {path}: {type(error).__name__}: {error}") from error
        self.calls.answered(method, str(response.status))
        if response.status >= 400:
            raise error_of(response.status, text, response.headers.get("Retry-After"))
        return json.loads(text) if text else {}
