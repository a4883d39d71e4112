"""The chart's hooks: the operator stops first, then its finalizer is removed, and nothing else of a run changes."""

from __future__ import annotations

import asyncio
import base64
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from stagecoach_api.names import FINALIZER
from stagecoach_operator.chart_hooks import (
    DEPLOYMENTS,
    MAX_TRIES,
    POLLS,
    SECRETS,
    HookError,
    check,
    provide_certificate,
    uninstall,
)
from stagecoach_operator.kube import LEASES, PODS, TRAINING_RUNS, Body, Listing, RequestForbidden, Resource
from tests.operator.makers import FakeApi

SYSTEM, RESEARCH, OTHER = "system", "research", "other"
LABELS = {"app.kubernetes.io/instance": "stagecoach", "app.kubernetes.io/component": "operator"}
LEASE = "stagecoach"
HOST = f"{'s' * 40}.{'n' * 63}.svc"
"""The longest there is: a common name would end after 64 characters."""
SELECTOR = ",".join(f"{name}={value}" for name, value in LABELS.items())


class Installed(FakeApi):
    """An API server with an installed operator, whose pods disappear some polls after it was scaled down."""

    polls_until_gone = 2
    scaled_to: int | None = None

    async def patch(self, resource: Resource, namespace: str, name: str, patch: Body, subresource: str = "") -> Body:
        if resource != DEPLOYMENTS:
            return await super().patch(resource, namespace, name, patch, subresource)
        assert (namespace, name, subresource) == (SYSTEM, "stagecoach", "scale")
        self.writes.append("scale")
        self.scaled_to = patch["spec"]["replicas"]
        return {}

    async def list(
        self, resource: Resource, namespace: str | None, labels: str = "", fields: str = "", metadata_only: bool = False
    ) -> Listing:
        if resource == PODS and self.scaled_to == 0:
            self.polls_until_gone -= 1
            if self.polls_until_gone == 0:
                self.remove(PODS, SYSTEM, "stagecoach-0")
        return await super().list(resource, namespace, labels, fields, metadata_only)


@pytest.fixture
def api() -> Installed:
    made = Installed(clock=lambda: 0.0)
    pod = {"kind": "Pod", "metadata": {"name": "stagecoach-0", "namespace": SYSTEM, "labels": LABELS}}
    made.add(PODS, pod)
    for namespace, name, finalizers in (
        (RESEARCH, "training", ["other.dev/keep", FINALIZER]),
        (RESEARCH, "finished", []),
        (OTHER, "far", [FINALIZER]),
    ):
        metadata = {"name": name, "namespace": namespace, "finalizers": finalizers}
        made.add(TRAINING_RUNS, {"kind": "TrainingRun", "metadata": metadata, "spec": {}})
    return made


async def no_sleep(seconds: float) -> None:
    del seconds


def remove_finalizers(api: FakeApi, runs_namespaces: Sequence[str] | None = (RESEARCH,)) -> int:
    return asyncio.run(uninstall(api, "stagecoach", SYSTEM, SELECTOR, LEASE, runs_namespaces, sleep=no_sleep))


def finalizers(api: FakeApi) -> dict[str, list[str]]:
    return {run["metadata"]["name"]: run["metadata"]["finalizers"] for run in api.all_of(TRAINING_RUNS)}


def test_only_our_finalizer_is_removed_and_only_in_one_namespace(api: Installed) -> None:
    assert remove_finalizers(api) == 1
    assert finalizers(api) == {"training": ["other.dev/keep"], "finished": [], "far": [FINALIZER]}


def test_in_cluster_scope_it_is_removed_in_all_namespaces(api: Installed) -> None:
    assert remove_finalizers(api, runs_namespaces=None) == 2
    assert finalizers(api) == {"training": ["other.dev/keep"], "finished": [], "far": []}


def test_the_operator_has_ended_before_a_run_is_patched(api: Installed) -> None:
    def no_pods(number: int, what: str) -> None:
        assert api.all_of(PODS) == [], what

    api.before_write = no_pods
    remove_finalizers(api)
    assert api.writes == ["scale", "delete leases stagecoach", "patch trainingruns/object training"]


def test_nothing_of_the_operator_is_left_not_even_its_lease(api: Installed) -> None:
    for name in (LEASE, "another"):
        api.add(LEASES, {"kind": "Lease", "metadata": {"name": name, "namespace": SYSTEM}})
    remove_finalizers(api)
    assert [lease["metadata"]["name"] for lease in api.all_of(LEASES)] == ["another"]


def test_a_repeated_uninstall_writes_nothing_to_runs(api: Installed) -> None:
    remove_finalizers(api)
    api.writes.clear()
    assert remove_finalizers(api) == 0
    assert api.writes == ["scale", "delete leases stagecoach"]


def test_a_run_that_was_being_deleted_disappears(api: Installed) -> None:
    api.edit(TRAINING_RUNS, RESEARCH, "training", metadata={"finalizers": [FINALIZER]})
    api.remove(TRAINING_RUNS, RESEARCH, "training")
    remove_finalizers(api)
    assert "training" not in finalizers(api)


def test_a_run_that_changes_meanwhile_is_retried(api: Installed) -> None:
    def change_once(number: int, what: str) -> None:
        if "trainingruns" in what and not any("trainingruns" in write for write in api.writes):
            api.edit(TRAINING_RUNS, RESEARCH, "training", metadata={"finalizers": [FINALIZER, "late.dev/keep"]})

    api.before_write = change_once
    assert remove_finalizers(api) == 1
    assert finalizers(api)["training"] == ["late.dev/keep"]


def test_a_run_that_keeps_changing_is_reported(api: Installed) -> None:
    def change_always(number: int, what: str) -> None:
        if "trainingruns" in what:
            api.edit(TRAINING_RUNS, RESEARCH, "training", metadata={"labels": {"n": str(number)}})

    api.before_write = change_always
    with pytest.raises(HookError, match=f"research/training keeps changing.*{FINALIZER}"):
        remove_finalizers(api)
    assert sum("trainingruns" in write for write in api.writes) == MAX_TRIES


def test_pods_that_do_not_end_are_reported(api: Installed) -> None:
    api.polls_until_gone = POLLS + 1
    with pytest.raises(HookError, match="do not end: delete them"):
        remove_finalizers(api)
    assert finalizers(api)["training"] == ["other.dev/keep", FINALIZER]


def test_without_an_operator_or_its_crd_nothing_is_done(api: Installed) -> None:
    api.unserved.add(TRAINING_RUNS.plural)
    assert remove_finalizers(api) == 0
    empty = FakeApi(clock=lambda: 0.0)  # patching the deployment raises NotFound
    assert remove_finalizers(empty) == 0


# -- the certificate ---------------------------------------------------------------------------------------------------


def certificate(api: FakeApi) -> dict[str, str]:
    """Run the hook; return the data of the Secret."""
    asyncio.run(provide_certificate(api, SYSTEM, "stagecoach-progress", HOST, "stagecoach"))
    (secret,) = api.all_of(SECRETS)
    assert secret["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    data: dict[str, str] = secret["data"]
    return data


def test_an_upgrade_keeps_the_certificate_that_running_pods_trust(api: Installed) -> None:
    first = certificate(api)
    api.edit(SECRETS, SYSTEM, "stagecoach-progress", metadata={"annotations": None})
    assert certificate(api) == first, "of a release whose manifest contained it, the Secret stays as well"


def test_the_certificate_is_valid_for_the_progress_servers_name(api: Installed, tmp_path: Path) -> None:
    for name, content in certificate(api).items():
        (tmp_path / name).write_bytes(base64.b64decode(content))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    client = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on

    async def talk() -> None:
        async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        listener = await asyncio.start_server(hang_up, "127.0.0.1", 0, ssl=server)
        async with listener:
            port = listener.sockets[0].getsockname()[1]
            for host in (HOST, f"{HOST}.cluster.local"):
                _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname=host)
                writer.close()
            with pytest.raises(ssl.SSLCertVerificationError):
                await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname="other.training.svc")

    asyncio.run(talk())


# -- helm test ---------------------------------------------------------------------------------------------------------


@contextmanager
def answering(status: int) -> Iterator[str]:
    class Probe(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            del args

    with HTTPServer(("127.0.0.1", 0), Probe) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/readyz"
        server.shutdown()


def test_a_ready_operator_passes(api: Installed, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(200) as url:
        asyncio.run(check(api, url, [RESEARCH]))
    assert capsys.readouterr().out == "the operator is ready; 2 run(s) in research\n"


def test_an_operator_that_is_not_ready_fails(api: Installed) -> None:
    with answering(503) as url, pytest.raises(HookError, match=r"503.*inspect the operator's pods"):
        asyncio.run(check(api, url, [RESEARCH]))


def test_runs_that_may_not_be_listed_fail_the_check(api: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    async def forbidden(*args: object, **others: object) -> None:
        raise RequestForbidden("trainingruns is forbidden")

    monkeypatch.setattr(api, "list", forbidden)
    with answering(200) as url, pytest.raises(RequestForbidden):
        asyncio.run(check(api, url, [RESEARCH]))
