"""`stagecoach logs` of a cluster's run: from pods while they exist, else from the store."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from stagecoach_api.artifacts import (
    Manifest,
    StoredObject,
    attempt_id,
    attempt_logs_prefix,
    content_digest,
    manifest_key,
    output_prefix,
    rank_log_name,
)
from stagecoach_api.status import StageState, StageStatus
from stagecoach_api.store import Store
from stagecoach_cli.artifacts.logs import stored_logs
from tests.cli.cluster.makers import FakeCluster, failed_status, stage_status, status_of
from tests.cli.makers import Cli

pytestmark = pytest.mark.slow

DIGEST = "a" * 64
T0 = 1_795_341_600.0


def keep(store: Store, rank: int, text: str, started: float = T0, attempt: int = 1) -> None:
    store.write(f"{attempt_logs_prefix(DIGEST, f'{attempt:04d}')}/{rank_log_name(rank, started)}", text.encode())


def record(number: int = 1, ended: bool = False, **fields: Any) -> dict[str, Any]:
    times = {"started": f"2026-11-22T10:0{number}:00Z", "ended": f"2026-11-22T10:0{number}:30Z" if ended else None}
    return {"number": number, "digest": DIGEST, "name": f"r-{number}", **times, **fields}


def sft(*records: dict[str, Any], **fields: Any) -> StageStatus:
    return stage_status(attempt=len(records), digest=DIGEST, attempts=list(records), **fields)


def spec(store: Store | None = None, **resources: int) -> dict[str, Any]:
    endpoint = getattr(store, "endpoint", None)
    storage = {"uri": "s3://gone" if store is None else store.uri} | ({"endpoint": endpoint} if endpoint else {})
    return {"storage": storage, "stages": [{"name": "sft", "sft": {}, "resources": resources}]}


# -- from pods ---------------------------------------------------------------------------------------------------------


def test_logs_of_a_running_attempt_come_from_its_pods(cluster: FakeCluster, cli: Cli) -> None:
    cluster.add_run(sft(record()), spec=spec(nodes=2))
    cluster.add_pod(1).print("second")
    cluster.add_pod(0).print("first", "more")
    cluster.add_pod(0, attempt=2).print("of another attempt")
    code, output = cli("logs", "demo")
    assert code == 0
    assert output.splitlines() == ["[rank 0] first", "[rank 0] more", "[rank 1] second", "sft, attempt 1"]
    assert cli("logs", "demo", "sft", "--rank", "1")[1].splitlines() == ["second", "sft, attempt 1"]


def test_a_pod_that_has_not_started_is_reported(cluster: FakeCluster, cli: Cli) -> None:
    cluster.add_run(sft(record()), spec=spec())
    name = cluster.add_pod(waiting={"reason": "ContainerCreating"}).body["metadata"]["name"]
    assert f"{name} has not started: ContainerCreating" in cli("logs", "demo")[1]


def test_a_finished_attempt_whose_pods_all_exist_needs_no_store(cluster: FakeCluster, cli: Cli) -> None:
    cluster.add_run(sft(record(ended=True), state=StageState.SUCCEEDED), spec=spec())
    pod = cluster.add_pod()
    pod.print("done")
    pod.end()
    assert cli("logs", "demo")[1].splitlines()[0] == "done"


def test_following_ends_with_the_attempt(cluster: FakeCluster, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagecoach_cli.cluster.pod_logs.Follower.poll_seconds", 0.01)
    cluster.add_run(sft(record()), spec=spec())
    pod = cluster.add_pod()
    pod.print("working")

    class Requests(list[str]):
        def append(self, request: str) -> None:
            super().append(request)
            if "/log?" in request and len(pod.lines) == 1:
                pod.print("done")
                pod.end()
                cluster.set_status(status_of(sft(record(ended=True), state=StageState.SUCCEEDED)))

    cluster.requests = Requests()
    code, output = cli("logs", "demo", "-f")
    assert (code, output.splitlines()) == (0, ["working", "done", "sft, attempt 1"])


# -- from the store ----------------------------------------------------------------------------------------------------


def test_an_ended_attempts_logs_come_from_the_store_rank_by_rank(cluster: FakeCluster, store: Store, cli: Cli) -> None:
    cluster.add_run(sft(record(1, ended=True), record(2, ended=True)), spec=spec(store, nodes=2))
    keep(store, 10, "ten\n")
    keep(store, 2, "again\n", started=T0 + 60)
    keep(store, 2, "two\nmore\n")
    store.write(f"{attempt_logs_prefix(DIGEST, '0001')}/metrics.jsonl", b"{}")
    keep(store, 0, "another attempt's\n", attempt=2)
    code, output = cli("logs", "demo", "sft", "--attempt", "1")
    assert code == 0
    lines = [line for line in output.splitlines() if line.startswith("[rank")]
    assert lines == ["[rank 2] two", "[rank 2] more", "[rank 2] again", "[rank 10] ten"]
    assert f"{attempt_logs_prefix(DIGEST, '0001')}/{rank_log_name(2, T0)}" in output
    assert cli("logs", "demo", "--rank", "0")[1].splitlines()[0] == "another attempt's"


def test_logs_come_from_the_store_if_only_some_pods_still_exist(cluster: FakeCluster, store: Store, cli: Cli) -> None:
    cluster.add_run(sft(record(ended=True)), spec=spec(store, nodes=2))
    cluster.add_pod(1).print("left")
    keep(store, 0, "whole\n")
    assert "whole" in cli("logs", "demo")[1].splitlines()


def test_the_storage_is_read_from_an_option_or_an_artifacts_uri(cluster: FakeCluster, store: Store, cli: Cli) -> None:
    uri = f"{store.uri}/artifacts/{'b' * 64}/output"
    made = stage_status(
        "data", StageState.SUCCEEDED, artifact={"uri": uri, "stageDigest": "b" * 64, "contentDigest": DIGEST}
    )
    keep(store, 0, "kept\n")
    endpoint = getattr(store, "endpoint", None)
    own = {"storage": {"endpoint": endpoint} if endpoint else {}, "stages": [{"name": "sft", "sft": {}}]}
    cluster.add_run(made, sft(record(ended=True)), spec=own)
    assert "kept" in cli("logs", "demo")[1].splitlines()
    cluster.add_run(sft(record(ended=True)), spec={"stages": []})
    code, output = cli("logs", "demo")
    assert (code, "give it by --storage" in output) == (1, True)
    options = ["--storage", store.uri, *(["--endpoint", endpoint] if endpoint else [])]
    assert "kept" in cli("logs", "demo", *options)[1].splitlines()


def test_logs_of_an_attempt_that_is_no_longer_in_the_status_are_found(
    cluster: FakeCluster, store: Store, cli: Cli
) -> None:
    forgotten = {"infrastructure": 4, "digest": DIGEST, "until": "2026-11-22T10:00:00Z"}
    cluster.add_run(sft(record(5, ended=True), forgotten=forgotten), spec=spec(store))
    keep(store, 0, "long ago\n", attempt=2)
    assert "long ago" in cli("logs", "demo", "sft", "--attempt", "2")[1].splitlines()


def test_missing_logs_are_reported_with_their_prefix_in_the_store(cluster: FakeCluster, store: Store, cli: Cli) -> None:
    cluster.add_run(sft(record(ended=True)), spec=spec(store))
    code, output = cli("logs", "demo")
    assert code == 1
    name = attempt_id("uid-of-demo", "sft", 1)
    assert f"no logs in {store.uri}/{attempt_logs_prefix(DIGEST, name)}" in output


def test_logs_of_another_run_of_the_same_digest_are_not_shown(cluster: FakeCluster, store: Store, cli: Cli) -> None:
    cluster.add_run(sft(record(ended=True)), spec=spec(store))
    for uid, text in (("uid-of-demo", "mine\n"), ("uid-of-another", "theirs\n")):
        folder = attempt_logs_prefix(DIGEST, attempt_id(uid, "sft", 1))
        store.write(f"{folder}/{rank_log_name(0, T0)}", text.encode())
    assert [line for line in cli("logs", "demo")[1].splitlines() if line in ("mine", "theirs")] == ["mine"]


def test_logs_are_sorted_by_rank_then_start(store: Store) -> None:
    for rank, started in ((1, T0 + 5), (0, T0 + 9), (1, T0), (12, T0)):
        keep(store, rank, "", started)
    assert [item.name for item in stored_logs(store, DIGEST, "0001")] == [(0, T0 + 9), (1, T0), (1, T0 + 5), (12, T0)]


# -- which attempt -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("sft", "--attempt", "7"), "has no attempt 7 of sft; known attempts: sft 1"),
        (("gone",), "has no attempt of gone; known attempts: sft 1"),
        (("gone", "-f"), "has no attempt of gone; known attempts: sft 1"),
        (("sft", "--rank", "2"), "--rank 2: sft has 2 ranks, from rank 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_unknown_attempts_and_ranks_are_reported_with_the_known_ones(
    arguments: tuple[str, ...], text: str, cluster: FakeCluster, cli: Cli
) -> None:
    cluster.add_run(sft(record()), spec=spec(nodes=2))
    code, output = cli("logs", "demo", *arguments)
    assert (code, text in output) == (2, True), output


def test_following_waits_for_an_attempt_to_start_unless_the_run_is_over(
    cluster: FakeCluster, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stagecoach_cli.commands.logs.CLUSTER_POLL_SECONDS", 0.01)
    cluster.add_run(stage_status(state=StageState.PENDING), spec=spec())
    pod = cluster.add_pod()
    pod.print("begun")
    pod.end()
    asked: list[str] = []

    class Requests(list[str]):
        def append(self, request: str) -> None:
            asked.append(request)
            if len(asked) == 3:
                cluster.set_status(status_of(sft(record(ended=True))))

    cluster.requests = Requests()
    code, output = cli("logs", "demo", "-f")
    assert (code, output.splitlines()[0]) == (0, "begun")
    assert output.count("has not started yet; waiting") == 1
    cluster.set_status(failed_status(1))
    assert cli("logs", "demo", "-f")[0] == 2


# -- artifacts ---------------------------------------------------------------------------------------------------------


def test_an_artifact_of_a_clusters_run_is_downloaded_by_its_name(cluster: FakeCluster, store: Store, cli: Cli) -> None:
    item = StoredObject(path="model", size=7, sha256=hashlib.sha256(b"weights").hexdigest())
    store.write(f"{output_prefix(DIGEST)}/model", b"weights")
    manifest = Manifest(
        stage_digest=DIGEST,
        content_digest=content_digest([item]),
        kind="sft",
        objects=(item,),
        config={},
        code="test",
        seed=0,
        created=T0,
    )
    store.write(manifest_key(DIGEST), manifest.model_dump_json().encode())
    made = {"uri": f"{store.uri}/{output_prefix(DIGEST)}", "stageDigest": DIGEST, "contentDigest": DIGEST}
    cluster.add_run(stage_status(state=StageState.SUCCEEDED, artifact=made), spec=spec(store))
    for index, arguments in enumerate((["demo/sft"], ["team/demo/sft"], ["demo/sft", "-n", "team"])):
        code, output = cli("artifacts", "get", arguments[0], f"copy-{index}", *arguments[1:])
        assert (code, Path(f"copy-{index}/model").read_bytes()) == (0, b"weights"), output
    assert cli("artifacts", "verify", "demo/sft")[0] == 0
    code, output = cli("artifacts", "get", "gone/sft", "copy")
    assert (code, "no run `gone` in namespace `team`; known runs: demo" in output) == (2, True)
    cluster.add_run(spec={"stages": []})
    code, output = cli("artifacts", "get", "demo/sft", "copy")
    assert (code, "the operator's storage; give it by --storage" in output) == (1, True)
