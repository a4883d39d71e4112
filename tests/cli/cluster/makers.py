"""A fake API server for tests of the command line: runs, pods and logs in memory, served over real HTTP.

It implements what the command line relies on: merge patches, server-side apply with 201 for new objects, label
selectors, followed logs with time stamps, Status objects for errors. `tests/charts` and e2e use a real API server.
"""

from __future__ import annotations

import copy
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from stagecoach_api import names
from stagecoach_api.status import (
    Condition,
    ConditionStatus,
    ConditionType,
    Reason,
    StageState,
    StageStatus,
    Summary,
    TrainingRunStatus,
)
from stagecoach_core.values import RunState

Body = dict[str, Any]

NAMESPACE = "team"
TOKEN = "token-of-the-test"  # noqa: S105 - of a server that lives as long as a test
RUN_UID = "uid-of-demo"
RUN_PATH = re.compile(r"/apis/stagecoach\.dev/v1alpha1(?:/namespaces/([^/]+))?/trainingruns(?:/([^/]+))?")
POD_PATH = re.compile(r"/api/v1/namespaces/([^/]+)/pods(?:/([^/]+))?(/log)?")


@dataclass
class FakePod:
    """A pod and the output of its trainer."""

    body: Body
    lines: list[tuple[str, str]] = field(default_factory=list)
    """Time stamp and text."""
    cuts: int = 0
    """Number of log connections to reset after all lines have been sent."""

    def print(self, *texts: str) -> None:
        for text in texts:
            number = len(self.lines)
            self.lines.append((f"2026-11-22T10:00:{number // 4:02d}.{number:09d}Z", text))

    @property
    def state(self) -> Body:
        found: Body = self.body["status"]["containerStatuses"][0]["state"]
        return found

    def end(self) -> None:
        self.body["status"]["containerStatuses"][0]["state"] = {"terminated": {"exitCode": 0}}


class FakeCluster:
    """A fake API server on 127.0.0.1."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, str], Body] = {}
        self.pods: dict[str, FakePod] = {}
        self.requests: list[str] = []
        """Method and path with query of every request."""
        self.refused: dict[str, tuple[int, str]] = {}
        """Error status and message by a text in the request, such as `PATCH ` or `/pods`."""
        self.is_installed = True
        self.on_patch: Callable[[Body], None] = lambda run: None
        """The operator's reaction to an edited run."""
        cluster = self

        class Handler(_Handler):
            fake = cluster

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def write_kubeconfig(self, path: Path, namespace: str = NAMESPACE) -> Path:
        """Write a kubeconfig whose current context is this cluster; the context `away` names a closed port."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [
                {"name": "test", "cluster": {"server": self.endpoint}},
                {"name": "away", "cluster": {"server": "http://127.0.0.1:9"}},
            ],
            "users": [{"name": "user", "user": {"token": TOKEN}}],
            "contexts": [
                {"name": "test", "context": {"cluster": "test", "user": "user", "namespace": namespace}},
                {"name": "other", "context": {"cluster": "test", "user": "user", "namespace": "other"}},
                {"name": "away", "context": {"cluster": "away", "user": "user"}},
            ],
        }
        path.write_text(json.dumps(config))  # JSON is YAML
        return path

    def add_run(self, *stages: StageStatus, name: str = "demo", namespace: str = NAMESPACE, **fields: Any) -> Body:
        """Add a run with a status. `fields`: `spec`, `status` (a TrainingRunStatus) and metadata."""
        spec = fields.pop("spec", {"storage": {"uri": "s3://models/demo"}, "stages": [{"name": "sft", "sft": {}}]})
        status = fields.pop("status", None) or status_of(*stages)
        body: Body = {
            "apiVersion": names.API_GROUP_VERSION,
            "kind": names.KIND,
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": RUN_UID,
                "generation": 1,
                "creationTimestamp": "2026-11-22T09:00:00Z",
                **fields,
            },
            "spec": spec,
            "status": status.model_dump(mode="json", exclude_none=True),
        }
        self.runs[namespace, name] = body
        return body

    def set_status(self, status: TrainingRunStatus, name: str = "demo", namespace: str = NAMESPACE) -> None:
        self.runs[namespace, name]["status"] = status.model_dump(mode="json", exclude_none=True)

    def add_pod(self, index: int = 0, attempt: int = 1, stage: str = "sft", suffix: str = "a", **state: Any) -> FakePod:
        """Add a pod of an attempt of `demo`. `state`: the container's, default running."""
        name = f"r-demo-{stage}-{attempt}-w-0-{index}-{suffix}"
        labels = {
            names.LABEL_RUN_UID: RUN_UID,
            names.LABEL_STAGE: stage,
            names.LABEL_ATTEMPT: str(attempt),
            names.COMPLETION_INDEX: str(index),
        }
        container = {"name": names.TRAINER_CONTAINER, "state": state or {"running": {}}}
        body: Body = {
            "metadata": {"name": name, "namespace": NAMESPACE, "uid": f"uid-{name}", "labels": labels},
            "status": {"phase": "Running", "containerStatuses": [container]},
        }
        self.pods[name] = FakePod(body)
        return self.pods[name]


class _Handler(BaseHTTPRequestHandler):
    fake: FakeCluster
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log."""

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_PATCH(self) -> None:
        self._answer(self._patch)

    # -- requests ------------------------------------------------------------------------------------------------------

    def _answer(self, work: Callable[[str, dict[str, str]], None]) -> None:
        self.fake.requests.append(f"{self.command} {self.path}")
        for text, (status, message) in self.fake.refused.items():
            if text in f"{self.command} {self.path}":
                self._fail(status, message)
                return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._fail(401, "Unauthorized")
            return
        parts = urlsplit(self.path)
        work(parts.path, {name: values[0] for name, values in parse_qs(parts.query).items()})

    def _get(self, path: str, query: dict[str, str]) -> None:
        run, pod = RUN_PATH.fullmatch(path), POD_PATH.fullmatch(path)
        if run is not None and not self.fake.is_installed:
            self._send(404, b"404 page not found\n", "text/plain")
        elif run is not None:
            self._get_run(run[1], run[2])
        elif pod is not None and pod[3]:
            self._stream(pod[2], query)
        elif pod is not None:
            self._get_pod(pod[1], pod[2], query)
        else:
            self._send(404, b"404 page not found\n", "text/plain")

    def _get_run(self, namespace: str | None, name: str | None) -> None:
        if name is None:
            self._list([body for key, body in self.fake.runs.items() if namespace in (None, key[0])])
        elif (namespace, name) in self.fake.runs:
            self._json(200, self.fake.runs[str(namespace), name])
        else:
            self._fail(404, f'trainingruns.stagecoach.dev "{name}" not found')

    def _get_pod(self, namespace: str, name: str | None, query: dict[str, str]) -> None:
        if name is None:
            wanted = dict(part.split("=", 1) for part in query.get("labelSelector", "").split(",") if part)
            bodies = [pod.body for pod in list(self.fake.pods.values())]
            self._list([body for body in bodies if wanted.items() <= body["metadata"]["labels"].items()])
        elif name in self.fake.pods:
            self._json(200, self.fake.pods[name].body)
        else:
            self._fail(404, f'pods "{name}" not found')

    def _patch(self, path: str, query: dict[str, str]) -> None:
        found = RUN_PATH.fullmatch(path)
        patch = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if found is None or not self.fake.is_installed:
            self._send(404, b"404 page not found\n", "text/plain")
            return
        key = (str(found[1]), str(found[2]))
        is_apply = self.headers["Content-Type"] == "application/apply-patch+yaml"
        if key not in self.fake.runs and not is_apply:
            self._fail(404, f'trainingruns.stagecoach.dev "{key[1]}" not found')
            return
        is_new = key not in self.fake.runs
        if is_new:
            self.fake.add_run(name=key[1], namespace=key[0], spec={}, status=TrainingRunStatus())
        run = self.fake.runs[key]
        before = copy.deepcopy(run["spec"])
        merge(run, {name: value for name, value in patch.items() if name != "status"})
        if run["spec"] != before and not is_new:
            run["metadata"]["generation"] += 1
        answer = copy.deepcopy(run)
        self.fake.on_patch(run)
        self._json(201 if is_new else 200, answer)

    def _stream(self, name: str, query: dict[str, str]) -> None:
        """Send a pod's lines; with `follow`, until its container has ended or the connection is to be reset."""
        pod = self.fake.pods.get(name)
        if pod is None:
            self._fail(404, f'pods "{name}" not found')
            return
        if "waiting" in pod.state:
            self._fail(400, f'container "{names.TRAINER_CONTAINER}" in pod "{name}" is waiting to start')
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        since = query.get("sinceTime", "")[:19]  # to the second
        sent = 0
        while True:
            ended = "terminated" in pod.state
            for stamp, text in pod.lines[sent:]:
                sent += 1
                if stamp[:19] >= since:
                    line = f"{stamp} {text}\n".encode()
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            self.wfile.flush()
            if ended or "follow" not in query or name not in self.fake.pods:
                self.wfile.write(b"0\r\n\r\n")
                return
            if pod.cuts:
                pod.cuts -= 1
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                return
            time.sleep(0.01)

    # -- answers -------------------------------------------------------------------------------------------------------

    def _list(self, items: list[Body]) -> None:
        self._json(200, {"kind": "List", "metadata": {}, "items": items})

    def _fail(self, status: int, message: str) -> None:
        self._json(status, {"kind": "Status", "status": "Failure", "message": message, "code": status})

    def _json(self, status: int, body: Body) -> None:
        self._send(status, json.dumps(body).encode(), "application/json")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def merge(target: Body, patch: Body) -> None:
    """Apply an RFC 7386 merge patch in place."""
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        elif isinstance(value, dict) and isinstance(target.get(name), dict):
            merge(target[name], value)
        else:
            target[name] = value


# -- statuses ----------------------------------------------------------------------------------------------------------


def condition(kind: ConditionType, holds: bool, reason: Reason, message: str = "", generation: int = 1) -> Condition:
    return Condition(
        type=kind,
        status=ConditionStatus.TRUE if holds else ConditionStatus.FALSE,
        reason=reason,
        message=message,
        observed_generation=generation,
        last_transition_time="2026-11-22T10:00:00Z",
    )


def status_of(
    *stages: StageStatus,
    state: RunState = RunState.PROGRESSING,
    generation: int = 1,
    conditions: tuple[Condition, ...] = (),
) -> TrainingRunStatus:
    """Return a status; conditions that are not given are those of a healthy run."""
    healthy = {
        ConditionType.ACCEPTED: condition(ConditionType.ACCEPTED, True, Reason.VALID),
        ConditionType.PROGRESSING: condition(ConditionType.PROGRESSING, True, Reason.STAGES_RUNNING, "running: sft"),
        ConditionType.SUSPENDED: condition(ConditionType.SUSPENDED, False, Reason.NOT_SUSPENDED),
        ConditionType.COMPLETE: condition(ConditionType.COMPLETE, False, Reason.STAGES_UNFINISHED),
        ConditionType.FAILED: condition(ConditionType.FAILED, False, Reason.NO_FAILURE),
    }
    by_type = {**healthy, **{item.type: item for item in conditions}}
    return TrainingRunStatus(
        observed_generation=generation,
        conditions=tuple(by_type.values()),
        stages=stages,
        summary=Summary(state=state, stage="0/1 sft"),
    )


def suspended_status(generation: int, *stages: StageStatus) -> TrainingRunStatus:
    held = condition(ConditionType.SUSPENDED, True, Reason.SUSPENDED_BY_USER, "checkpoints: `sft` at step 120")
    idle = condition(ConditionType.PROGRESSING, False, Reason.NOTHING_TO_DO, "suspended")
    return status_of(*stages, state=RunState.SUSPENDED, generation=generation, conditions=(held, idle))


def failed_status(
    generation: int, reason: Reason = Reason.USER_ERROR, message: str = "", *stages: StageStatus
) -> TrainingRunStatus:
    state = RunState.CANCELLED if reason is Reason.CANCELLED else RunState.FAILED
    failed = condition(ConditionType.FAILED, True, reason, message)
    idle = condition(ConditionType.PROGRESSING, False, Reason.NOTHING_TO_DO)
    return status_of(*stages, state=state, generation=generation, conditions=(failed, idle))


def complete_status(generation: int, *stages: StageStatus) -> TrainingRunStatus:
    done = condition(ConditionType.COMPLETE, True, Reason.ALL_STAGES_FINISHED, "1 stages, 0 of them cached")
    idle = condition(ConditionType.PROGRESSING, False, Reason.NOTHING_TO_DO)
    return status_of(*stages, state=RunState.COMPLETE, generation=generation, conditions=(done, idle))


def stage_status(name: str = "sft", state: StageState = StageState.RUNNING, **fields: Any) -> StageStatus:
    return StageStatus.model_validate({"name": name, "state": state, **fields})
