"""The only module of the command line that talks to a cluster: runs, their pods, and what those print.

ClusterError          the cluster did not do what was asked; the message says why, and what to do
├── NotConfigured     nothing says which cluster is meant
├── Unreachable       it does not answer, or is ill: the same call may succeed later
├── Forbidden         it does not know who asks, or refuses it
├── NotInstalled      it does not know TrainingRuns
├── Changed           somebody else's fields would have to be overwritten
└── Unusable          what was asked for makes no sense to it
    └── UnknownObject there is no such run or pod

The official client finds the cluster and signs requests; it is imported when a cluster is asked, never before.
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
"""A JSON object as the API server has it."""

FIELD_MANAGER = "stagecoach-cli"
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 30.0
SILENCE_SECONDS = 60.0
"""A followed log that says nothing for so long is asked for anew: its connection may be dead."""
LIST_CHUNK = 500
MAX_CONNECTIONS = 128
"""More than there are logs followed at once."""

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
    """The cluster did not do what was asked."""


class NotConfigured(ClusterError):
    """Nothing says which cluster is meant."""


class Unreachable(ClusterError):
    """It does not answer, or is ill."""


class Forbidden(ClusterError):
    """It does not know who asks, or refuses it."""


class NotInstalled(ClusterError):
    """It does not know TrainingRuns."""


class Changed(ClusterError):
    """Somebody else's fields would have to be overwritten."""


class Unusable(ClusterError):
    """What was asked for makes no sense to it."""


class UnknownObject(Unusable):
    """There is no such run or pod."""


def error_of(status: int, text: str, server: str) -> ClusterError:
    """Return the error that an answer of 400 or above stands for."""
    answer = status_object(text)
    said = str(answer.get("message") or text.strip()[:500] or f"status {status}")
    if status == 401:
        return Forbidden(f"{server} does not know who you are ({said}); log in again, or choose another --context")
    if status == 403:
        return Forbidden(f"{said}; ask whoever runs {server} for that right, or choose another --namespace")
    if status == 404:
        return UnknownObject(said) if answer else NotInstalled(f"{server} knows no TrainingRuns; {INSTALL}")
    if status == 409:
        return Changed(said)
    if status in (408, 429) or status >= 500:
        return Unreachable(f"{server} answers {status}: {said}; try again")
    return Unusable(said)


# -- finding the cluster -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClusterChoice:
    """What a command line says about the cluster."""

    context: str | None = None
    """Context of the kubeconfig. None: its current one."""
    namespace: str | None = None
    """None: the context's, else `default`."""

    @property
    def is_given(self) -> bool:
        return self.context is not None or self.namespace is not None


def kubeconfig_files() -> list[str]:
    """Return the files that say which cluster is meant, those that exist: of KUBECONFIG, else ~/.kube/config."""
    given = os.environ.get(ENV_KUBECONFIG) or DEFAULT_KUBECONFIG
    paths = [str(Path(item).expanduser()) for item in given.split(os.pathsep) if item]
    return [path for path in paths if Path(path).is_file()]


def connect(choice: ClusterChoice) -> ClusterApi:
    """Return the chosen cluster. Nothing is asked yet.

    Raises NotConfigured where neither a kubeconfig nor a pod's service account says which, and where the client library
    is missing.
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
            known, current = config.list_kube_config_contexts(merged)  # type: ignore[no-untyped-call]
            chosen = next((item for item in known if item["name"] == choice.context), current)
            own = chosen["context"].get("namespace")
        else:
            config.load_incluster_config(configuration)  # type: ignore[no-untyped-call]
            own = IN_CLUSTER_NAMESPACE.read_text(encoding="utf-8").strip()
    except (config.ConfigException, OSError, KeyError, TypeError, ValueError) as error:
        raise NotConfigured(_not_configured(files, error)) from error
    configuration.retries = False  # whoever follows a run asks again; others are told at once
    configuration.connection_pool_maxsize = MAX_CONNECTIONS
    return ClusterApi(ApiClient(configuration), choice.namespace or own or DEFAULT_NAMESPACE)


def _not_configured(files: list[str], error: Exception) -> str:
    if files:
        return f"{os.pathsep.join(files)}: {error}; correct it, or choose another --context"
    looked = os.environ.get(ENV_KUBECONFIG) or DEFAULT_KUBECONFIG
    return f"no cluster is configured: there is no {looked}, and this is no pod; set KUBECONFIG"


# -- asking it ---------------------------------------------------------------------------------------------------------


class ClusterApi:
    """One cluster, as a user sees it. Safe to use from several threads."""

    def __init__(self, client: Any, namespace: str) -> None:
        self._client = client
        self.namespace = namespace
        self.server: str = client.configuration.host

    def at(self, namespace: str) -> ClusterApi:
        """Return the same cluster, seen from another namespace."""
        return ClusterApi(self._client, namespace)

    # -- runs ----------------------------------------------------------------------------------------------------------

    def run(self, name: str) -> Body:
        """Return a run. Raises UnknownObject, naming those there are."""
        try:
            return self._json("GET", self._runs_path(self.namespace, name))
        except UnknownObject as error:
            known = ", ".join(item["metadata"]["name"] for item in self.runs()) or "none"
            raise UnknownObject(f"no run `{name}` in namespace `{self.namespace}`; there are: {known}") from error

    def runs(self, everywhere: bool = False) -> list[Body]:
        """Return all runs of the namespace, or of all namespaces."""
        return self._list(self._runs_path(None if everywhere else self.namespace), {})

    def apply_run(self, document: Mapping[str, Any], force: bool = False) -> tuple[Body, bool]:
        """Apply a run as this user's; return it, and whether it is new. `force`: take over fields of other managers.

        Raises Unusable with the API server's own words, and Changed where another manager's fields differ.
        """
        query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict"} | ({"force": "true"} if force else {})
        path = self._runs_path(self.namespace, document["metadata"]["name"])
        response = self._request("PATCH", path, query, dict(document), APPLY_PATCH)
        return json.loads(response.read()), response.status == 201

    def patch_run(self, name: str, patch: Mapping[str, Any]) -> Body:
        """Merge a patch into a run; return it."""
        path = self._runs_path(self.namespace, name)
        return self._json("PATCH", path, {"fieldManager": FIELD_MANAGER}, dict(patch), MERGE_PATCH)

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
        return self._json("GET", self._pods_path(name))

    def log_lines(self, pod: str, follow: bool = False, since: str = "") -> Iterator[tuple[str, str]]:
        """Yield the lines of a pod's trainer, each with its time stamp (RFC 3339); `since`: not before its second.

        A followed log ends when the container does, or earlier. Raises UnknownObject, Unreachable, and Unusable where
        the container has not started.
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
            while chunk := response.response.read1(1 << 16):  # whatever has come, unlike `read` and `stream`
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line.decode("utf-8", errors="replace") for line in lines)
        except (HTTPError, OSError) as error:
            raise self._unreachable(error) from error
        if rest:
            yield rest.decode("utf-8", errors="replace")

    # -- one call ------------------------------------------------------------------------------------------------------

    def _list(self, path: str, query: Mapping[str, str]) -> list[Body]:
        items: list[Body] = []
        token = ""
        while True:
            page = self._json("GET", path, {**query, "limit": str(LIST_CHUNK), "continue": token})
            items += page.get("items") or []
            token = page["metadata"].get("continue") or ""
            if not token:
                return items

    def _json(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Body | None = None,
        content_type: str = JSON_TYPE,
    ) -> Body:
        answer: Body = json.loads(self._request(method, path, query, body, content_type).read())
        return answer

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

        given = {name: value for name, value in (query or {}).items() if value}
        url = f"{self.server}{path}" + (f"?{urlencode(given)}" if given else "")
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

    def _unreachable(self, error: Exception) -> Unreachable:
        said = getattr(error, "reason", None) or error
        return Unreachable(f"{self.server} does not answer: {said}; is the cluster up, and the right --context chosen?")
