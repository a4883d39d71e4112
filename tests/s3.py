"""S3 servers for tests: versitygw if Go can build it, else moto; and a proxy that injects faults."""

from __future__ import annotations

import fcntl
import http.client
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from tests import ROOT

ACCESS_KEY = "stagecoach-test-id"
SECRET_KEY = "stagecoach-test-secret"  # noqa: S105 - of a server that only runs during the tests
REGION = "us-east-1"
BUILD = ROOT / "build" / "bin"
VERSITYGW = "github.com/versity/versitygw/cmd/versitygw@v1.8.0"
BUILD_TIMEOUT_SECONDS = 280
START_TIMEOUT_SECONDS = 20


class S3Server(Protocol):
    """A server on 127.0.0.1 that can be stopped and started again with its data."""

    endpoint: str

    def start(self) -> None: ...

    def stop(self) -> None: ...


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def make_server(folder: Path) -> S3Server:
    """Return a server that is not started yet and stores its data in `folder`."""
    binary = versitygw()
    return VersityServer(binary, folder) if binary else MotoServer()


def versitygw() -> Path | None:
    """Return the server's program, built once per checkout; None if Go is missing or cannot download it."""
    binary, go = BUILD / "versitygw", shutil.which("go")
    if binary.exists() or go is None:
        return binary if binary.exists() else None
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "versitygw.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test workers start at the same time
        if not binary.exists():
            environment = os.environ | {"GOBIN": str(BUILD)}
            try:
                subprocess.run([go, "install", VERSITYGW], env=environment, check=True, timeout=BUILD_TIMEOUT_SECONDS)
            except (subprocess.SubprocessError, OSError) as error:
                print(f"versitygw could not be built ({error}); moto is used instead")
    return binary if binary.exists() else None


class VersityServer:
    """versitygw, which stores objects in a folder, as a process in its own session."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self._binary = binary
        self._data = folder / "data"
        self._sidecar = folder / "sidecar"  # for metadata, on file systems without extended attributes
        self._log = folder / "log.txt"
        for path in (self._data, self._sidecar):
            path.mkdir(parents=True)
        self._port = free_port()
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        listen = ["--port", f"127.0.0.1:{self._port}", "--quiet"]
        command = [str(self._binary), *listen, "posix", "--sidecar", str(self._sidecar), str(self._data)]
        environment = {"ROOT_ACCESS_KEY": ACCESS_KEY, "ROOT_SECRET_KEY": SECRET_KEY, "PATH": os.environ["PATH"]}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        wait_for_port(self._port, lambda: self._log.read_text(errors="replace"))

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(timeout=START_TIMEOUT_SECONDS)
            self._process = None


class MotoServer:
    """moto in a thread; its data is in this process's memory. It serves one request at a time: moto checks and writes
    in two steps, so two concurrent conditional writes could both succeed."""

    def __init__(self) -> None:
        self._port = free_port()
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._server: Any = None

    def start(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", self._port, application, threaded=False)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        wait_for_port(self._port, lambda: "moto")

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


def wait_for_port(port: int, explain: Callable[[], str]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"no server listens on port {port}: {explain()}")


def make_bucket(endpoint: str, name: str) -> None:
    """Create a bucket unless it exists: fixtures of several folders may share one."""
    import boto3

    client = boto3.session.Session().client("s3", endpoint_url=endpoint, region_name=REGION)
    with suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=name)


# -- faults ------------------------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """A fault of the next `times` requests with `method` whose target contains `target`.

    `reset`: the connection is closed without a request to the server; `lose`: the server handles the request, but its
    response is dropped; `truncate`: only half the body is sent; `flip`: one bit of the body is changed; `answer`:
    `status` and `code` are returned without a request to the server.
    """

    method: str
    action: str
    target: str = ""
    times: int = 1
    status: int = 503
    code: str = "SlowDown"
    header: str = ""
    """Restricts the fault to requests with this header, if not empty."""

    def matches(self, request: BaseHTTPRequestHandler) -> bool:
        wanted = self.method == request.command and self.target in request.path
        return wanted and self.times > 0 and (not self.header or self.header in request.headers)


@dataclass
class FaultyFront:
    """An HTTP proxy of an S3 server that applies its `faults` to matching requests and forwards the others."""

    upstream: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Method and target of every request received."""
    endpoint: str = ""

    def __enter__(self) -> FaultyFront:
        front = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                """Log nothing."""

            def _serve(self) -> None:
                front.serve(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815 - http.server's names

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def seen(self, method: str, target: str = "") -> int:
        return sum(1 for request in self.requests if request.startswith(f"{method} ") and target in request)

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        self.requests.append(f"{request.command} {request.path}")
        fault = next((fault for fault in self.faults if fault.matches(request)), None)
        action = ""
        if fault is not None:
            fault.times -= 1
            action = fault.action
        if fault is not None and action == "answer":
            xml = f"<Error><Code>{fault.code}</Code><Message>{SECRET_KEY}</Message></Error>".encode()
            self._reply(request, fault.status, [("Content-Type", "application/xml")], xml, len(xml))
        elif action == "reset":
            request.close_connection = True
        else:
            self._forward(request, body, action)

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes, action: str) -> None:
        connection = http.client.HTTPConnection(self.upstream.removeprefix("http://"), timeout=20)
        connection.putrequest(request.command, request.path, skip_host=True, skip_accept_encoding=True)
        for name, value in request.headers.items():
            if name.lower() != "expect":
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if action == "lose":
            request.close_connection = True
            return
        length = int(answer.headers.get("Content-Length", len(data)))
        if action == "truncate":
            data = data[: len(data) // 2]
            request.close_connection = True
        elif action == "flip":
            data = bytes([data[0] ^ 1]) + data[1:]
        self._reply(request, answer.status, answer.getheaders(), data, length)

    @staticmethod
    def _reply(
        request: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], body: bytes, length: int
    ) -> None:
        request.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                request.send_header(name, value)
        request.send_header("Content-Length", str(length))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)
