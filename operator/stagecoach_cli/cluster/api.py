"""The client for the API server of a cluster: runs, their pods, and the logs of these.

ClusterError          a request failed; the message gives the reason and what to do
├── NotConfigured     no cluster is configured
├── ClusterUnreachable no answer, or a server error: the same request may succeed later
├── ClusterForbidden   the user is not authenticated, or not authorized
├── NotInstalled      the cluster has no TrainingRun CRD
├── Changed           a conflict: another field manager owns the fields
└── Unusable          the API server rejected the request
    └── UnknownObject there is no such run or pod

Kubernetes' official client reads the kubeconfig and signs requests; it is imported at the first use of a cluster.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from stagecoach_api import names
from stagecoach_api.kubernetes_status import status_object

Body = dict[str, Any]
"""A JSON object of the API server."""

FIELD_MANAGER = "stagecoach-cli"
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 30.0
SILENCE_SECONDS = 60.0
"""A followed log without output for this long is requested again: the connection may be dead."""
LIST_CHUNK = 500
MAX_CONNECTIONS = 128
"""More than the number of logs that are followed at once."""

JSON_TYPE = "application/json"
MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"

ENV_KUBECONFIG = "KUBECONFIG"
DEFAULT_KUBECONFIG = "~/.kube/config"
IN_CLUSTER_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
DEFAULT_NAMESPACE = "default"

INSTALL = "install the operator there with `helm install stagecoach charts/stagecoach`, or choose another --context"


# -- errors ------------------------------------------------------------------------------------------------------------


class ClusterError(Exception):
    """A request to the cluster failed."""


class NotConfigured(ClusterError):
    """No cluster is configured, or the client library is missing."""


class ClusterUnreachable(ClusterError):
    """The API server does not answer, or answers with a server error."""


class ClusterForbidden(ClusterError):
    """The user is not authenticated, or not authorized."""


class NotInstalled(ClusterError):
    """The cluster has no TrainingRun CRD."""


class Changed(ClusterError):
    """The fields to apply belong to another field manager."""


class Unusable(ClusterError):
    """The API server rejected the request as invalid."""


class UnknownObject(Unusable):
    """There is no such run or pod."""


def error_of(status: int, text: str, server: str) -> ClusterError:
    """Return the error for an HTTP status of 400 or above; `text`: the response's body."""
    answer = status_object(text)
    message = str(answer.get("message") or text.strip()[:500] or f"status {status}")
    if status == 401:
        return ClusterForbidden(
            f"{server} does not accept your credentials ({message}); log in, or choose another --context"
        )
    if status == 403:
        return ClusterForbidden(
            f"{message}; ask the administrator of {server} for access, or choose another --namespace"
        )
    if status == 404:
        return UnknownObject(message) if answer else NotInstalled(f"{server} has no TrainingRuns; {INSTALL}")
    if status == 409:
        return Changed(message)
    if status in (408, 429) or status >= 500:
        return ClusterUnreachable(f"{server} answered {status}: {message}; this may be temporary")
    return Unusable(message)


# -- finding the cluster -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClusterChoice:
    """The options of a command line that select a cluster."""

    context: str | None = None
    """Context of the kubeconfig; None for its current one."""
    namespace: str | None = None
    """None for the context's namespace, else `default`."""

    @property
    def is_given(self) -> bool:
        return self.context is not None or self.namespace is not None


def kubeconfig_files() -> list[str]:
    """Return the existing kubeconfig files: those of KUBECONFIG, else ~/.kube/config."""
    paths_variable = os.environ.get(ENV_KUBECONFIG) or DEFAULT_KUBECONFIG
    paths = [str(Path(item).expanduser()) for item in paths_variable.split(os.pathsep) if item]
    return [path for path in paths if Path(path).is_file()]


def connect(choice: ClusterChoice) -> ClusterApi:
    """Return a client for the chosen cluster. No request is sent yet.

    Raises NotConfigured if there is neither a kubeconfig nor a pod's service account, and if the client library is not
    installed.
    """
    try:
        from kubernetes import config
        from kubernetes.client import ApiClient, Configuration
    except ModuleNotFoundError as error:
        raise NotConfigured(
            f"{error.name} is not installed; run `pip install 'stagecoach[cluster]'` to work with a cluster"
        ) from error
    configuration = Configuration()
    files = kubeconfig_files()
    try:
        if files:
            merged = os.pathsep.join(files)
            load = config.load_kube_config
            load(merged, choice.context, configuration, persist_config=False)  # type: ignore[no-untyped-call]
            contexts, current = config.list_kube_config_contexts(merged)
            chosen = next((item for item in contexts if item["name"] == choice.context), current)
            namespace = chosen["context"].get("namespace")
        else:
            config.load_incluster_config(configuration)
            namespace = IN_CLUSTER_NAMESPACE.read_text(encoding="utf-8").strip()
    except (config.ConfigException, OSError, KeyError, TypeError, ValueError) as error:
        raise NotConfigured(_not_configured(files, error)) from error
    configuration.retries = False  # commands that watch retry by themselves; the others report the error at once
    configuration.connection_pool_maxsize = MAX_CONNECTIONS
    return ClusterApi(ApiClient(configuration), choice.namespace or namespace or DEFAULT_NAMESPACE)


def _not_configured(files: list[str], error: Exception) -> str:
    if files:
        return f"{os.pathsep.join(files)}: {error}; correct it, or choose another --context"
    looked = os.environ.get(ENV_KUBECONFIG) or DEFAULT_KUBECONFIG
    return f"no cluster is configured: {looked} does not exist, and this process is not in a pod; set KUBECONFIG"


# -- requests ----------------------------------------------------------------------------------------------------------


class ClusterApi:
    """A client for one cluster and namespace. Safe to use from several threads."""

    def __init__(self, client: Any, namespace: str) -> None:
        self._client = client
        self.namespace = namespace
        self.server: str = client.configuration.host

    def at(self, namespace: str) -> ClusterApi:
        """Return a client for the same cluster and another namespace."""
        return ClusterApi(self._client, namespace)

    # -- runs ----------------------------------------------------------------------------------------------------------

    def run(self, name: str) -> Body:
        """Return a run. Raises UnknownObject, whose message lists the known runs."""
        try:
            return _body(self._request("GET", self._runs_path(self.namespace, name)))
        except UnknownObject as error:
            known = ", ".join(item["metadata"]["name"] for item in self.runs()) or "none"
            raise UnknownObject(f"no run `{name}` in namespace `{self.namespace}`; known runs: {known}") from error

    def runs(self, everywhere: bool = False) -> list[Body]:
        """Return all runs of the namespace, or of all namespaces."""
        return self._list(self._runs_path(None if everywhere else self.namespace), {})

    def apply_run(self, document: Mapping[str, Any], force: bool = False) -> tuple[Body, bool]:
        """Apply a run by server-side apply; return it, and whether it was created.

        `force`: take over fields of other field managers. Raises Unusable with the API server's message, and Changed
        if fields of another manager differ.
        """
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"} | ({"force": "true"} if force else {})
        path = self._runs_path(self.namespace, document["metadata"]["name"])
        response = self._request("PATCH", path, query, dict(document), APPLY_PATCH)
        return _body(response), response.status == 201

    def patch_run(self, name: str, patch: Mapping[str, Any]) -> Body:
        """Merge a patch into a run; return it."""
        path = self._runs_path(self.namespace, name)
        return _body(self._request("PATCH", path, {"fieldManager": FIELD_MANAGER}, dict(patch), MERGE_PATCH))

    @staticmethod
    def _runs_path(namespace: str | None, name: str = "") -> str:
        parts = [f"/apis/{names.API_GROUP_VERSION}"]
        if namespace is not None:
            parts += ["namespaces", quote(namespace, safe="")]
        return "/".join([*parts, names.PLURAL, *([quote(name, safe="")] if name else [])])

    # -- pods ----------------------------------------------------------------------------------------------------------

    def pods(self, selector: str) -> list[Body]:
        """Return the pods of the namespace that a label selector matches."""
        return self._list(self._pods_path(), {"labelSelector": selector})

    def pod(self, name: str) -> Body:
        """Return a pod. Raises UnknownObject."""
        return _body(self._request("GET", self._pods_path(name)))

    def log_lines(self, pod: str, follow: bool = False, since: str = "") -> Iterator[tuple[str, str]]:
        """Yield the log lines of a pod's trainer, each with its time stamp (RFC 3339).

        `follow`: wait for further lines until the container ends; the stream may end earlier. `since`: RFC 3339 time;
        the API server rounds it down to the second. Raises UnknownObject, ClusterUnreachable, and Unusable if the
        container has not started.
        """
        query = {"container": names.TRAINER_CONTAINER, "timestamps": "true"}
        query |= {"follow": "true"} if follow else {}
        query |= {"sinceTime": since} if since else {}
        response = self._request("GET", f"{self._pods_path(pod)}/log", query, accept="*/*", silence=SILENCE_SECONDS)
        try:
            for line in self._lines(response):
                stamp, _, text = line.partition(" ")
                yield stamp, text
        finally:
            response.response.close()

    def _pods_path(self, name: str = "") -> str:
        parts = ["/api/v1/namespaces", quote(self.namespace, safe=""), "pods"]
        return "/".join([*parts, *([quote(name, safe="")] if name else [])])

    def _lines(self, response: Any) -> Iterator[str]:
        from urllib3.exceptions import HTTPError

        rest = b""
        try:
            while chunk := response.response.read1(1 << 16):  # does not wait for a full chunk, as `read` does
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line.decode("utf-8", errors="replace") for line in lines)
        except (HTTPError, OSError) as error:
            raise self._unreachable(error) from error
        if rest:
            yield rest.decode("utf-8", errors="replace")

    # -- one request ---------------------------------------------------------------------------------------------------

    def _list(self, path: str, query: Mapping[str, str]) -> list[Body]:
        items: list[Body] = []
        token = ""
        while True:
            page = _body(self._request("GET", path, {**query, "limit": str(LIST_CHUNK), "continue": token}))
            items += page.get("items") or []
            token = page["metadata"].get("continue") or ""
            if not token:
                return items

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Body | None = None,
        content_type: str = JSON_TYPE,
        accept: str = JSON_TYPE,
        silence: float = ANSWER_SECONDS,
    ) -> Any:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        parameters = {name: value for name, value in (query or {}).items() if value}
        url = f"{self.server}{path}" + (f"?{urlencode(parameters)}" if parameters else "")
        headers = {"Accept": accept, "Content-Type": content_type, "User-Agent": FIELD_MANAGER}
        self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        try:
            response = self._client.call_api(method, url, headers, body, _request_timeout=(CONNECT_SECONDS, silence))
            if response.status < 400:
                return response
            text = response.read().decode("utf-8", errors="replace")
        except (HTTPError, OSError, ApiException) as error:
            raise self._unreachable(error) from error
        raise error_of(response.status, text, self.server)

    def _unreachable(self, error: Exception) -> ClusterUnreachable:
        reason = getattr(error, "reason", None) or error
        return ClusterUnreachable(
            f"{self.server} does not answer: {reason}; check that it is running and --context is right"
        )


def _body(response: Any) -> Body:
    body: Body = json.loads(response.read())
    return body
