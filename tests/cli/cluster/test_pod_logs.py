"""Logs of running pods over HTTP: each line once, with its rank, through restarts of pods and broken connections."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from stagecoach_cli.cluster.api import ClusterApi, ClusterChoice, ClusterForbidden, ClusterUnreachable, connect
from stagecoach_cli.cluster.pod_logs import Follower, PodChoice, pod_info
from tests.cli.cluster.makers import FakeCluster

pytestmark = pytest.mark.slow

SELECTOR = "stagecoach.dev/stage=sft,stagecoach.dev/attempt=1"


@dataclass
class Reader:
    """A follower in its own thread, and its output."""

    api: ClusterApi
    choice: PodChoice
    lines: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    over: bool = False
    error: Exception | None = None
    num_pods: int | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        follower = Follower(
            self.api,
            self.choice,
            self._is_over,
            self.messages.append,
            self.lines.append,
            poll_seconds=0.02,
            drain_seconds=1,
        )
        try:
            self.num_pods = follower.follow()
        except Exception as error:
            self.error = error

    def _is_over(self) -> bool:
        if isinstance(self.error, ClusterUnreachable):
            raise self.error
        return self.over

    def wait_for(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not holds():
            assert time.monotonic() < deadline, (self.lines, self.messages, self.error)
            time.sleep(0.01)

    def finish(self) -> None:
        self.over = True
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def api(cluster: FakeCluster) -> Iterator[ClusterApi]:
    yield connect(ClusterChoice())
    for pod in cluster.pods.values():
        pod.end()


def test_lines_of_all_pods_are_merged_as_they_are_printed_each_with_its_rank(
    cluster: FakeCluster, api: ClusterApi
) -> None:
    first, second = cluster.add_pod(0), cluster.add_pod(1)
    first.print("hello")
    reader = Reader(api, PodChoice(SELECTOR, 2, 1))
    reader.wait_for(lambda: reader.lines == ["[rank 0] hello"])
    second.print("here, too")
    reader.wait_for(lambda: "[rank 1] here, too" in reader.lines)
    first.print("late")
    reader.wait_for(lambda: reader.lines[-1] == "[rank 0] late")
    first.end()
    second.end()
    reader.finish()
    assert (len(reader.lines), reader.num_pods) == (3, 2)


def test_a_log_resumes_at_the_next_line_after_a_broken_connection(cluster: FakeCluster, api: ClusterApi) -> None:
    pod = cluster.add_pod()
    pod.print(*(f"line {number}" for number in range(10)))
    pod.cuts = 3
    reader = Reader(api, PodChoice(SELECTOR, 1, 1))
    reader.wait_for(lambda: pod.cuts == 0)
    pod.print(*(f"line {number}" for number in range(10, 20)))
    pod.end()
    reader.finish()
    assert reader.lines == [f"line {number}" for number in range(20)]


def test_replacements_of_deleted_pods_are_followed(cluster: FakeCluster, api: ClusterApi) -> None:
    pod = cluster.add_pod()
    pod.print("before")
    reader = Reader(api, PodChoice(SELECTOR, 1, 1))
    reader.wait_for(lambda: reader.lines == ["before"])
    del cluster.pods[pod.body["metadata"]["name"]]
    again = cluster.add_pod(suffix="b")
    again.print("after")
    reader.wait_for(lambda: reader.lines == ["before", "after"])
    again.end()
    reader.finish()
    assert reader.num_pods == 2


def test_pods_are_waited_for_until_they_start(cluster: FakeCluster, api: ClusterApi) -> None:
    pod = cluster.add_pod(waiting={"reason": "ContainerCreating"})
    name = pod.body["metadata"]["name"]
    reader = Reader(api, PodChoice(SELECTOR, 1, 1))
    reader.wait_for(lambda: any("pods?" in request for request in cluster.requests))
    assert reader.messages == []
    pod.state["waiting"]["reason"] = "ErrImagePull"
    reader.wait_for(lambda: reader.messages == [f"{name} has not started: ErrImagePull"])
    pod.print("at last")
    pod.body["status"]["containerStatuses"][0]["state"] = {"running": {}}
    reader.wait_for(lambda: reader.lines == ["at last"])
    assert len(reader.messages) == 1
    pod.end()
    reader.finish()


def test_following_ends_with_an_attempt_that_has_no_pods(cluster: FakeCluster, api: ClusterApi) -> None:
    reader = Reader(api, PodChoice(SELECTOR, 1, 1))
    reader.finish()
    assert (reader.lines, reader.num_pods) == ([], 0)


def test_following_stops_waiting_for_a_pod_that_never_ends(cluster: FakeCluster, api: ClusterApi) -> None:
    pod = cluster.add_pod()
    pod.print("stuck")
    reader = Reader(api, PodChoice(SELECTOR, 1, 1))
    reader.wait_for(lambda: reader.lines == ["stuck"])
    reader.finish()


def test_an_outage_of_the_api_server_is_reported_once_and_tolerated(cluster: FakeCluster, api: ClusterApi) -> None:
    pod = cluster.add_pod()
    pod.print("before")
    reader = Reader(api, PodChoice(SELECTOR, 1, 1))
    reader.wait_for(lambda: reader.lines == ["before"])
    cluster.refused["/pods"] = (503, "starting")
    reader.wait_for(lambda: len(reader.messages) == 1)
    time.sleep(0.1)
    cluster.refused.clear()
    pod.print("after")
    pod.end()
    reader.finish()
    assert reader.lines == ["before", "after"]
    assert len(reader.messages) == 1
    assert "answered 503: starting; this may be temporary; retrying" in reader.messages[0]


def test_a_forbidden_request_ends_following(cluster: FakeCluster, api: ClusterApi) -> None:
    cluster.add_pod()
    cluster.refused["/log"] = (403, "pods/log is forbidden")
    reader = Reader(api, PodChoice(SELECTOR, 1, 1))
    reader.wait_for(lambda: reader.error is not None)
    assert isinstance(reader.error, ClusterForbidden)


def test_a_closed_output_ends_following(cluster: FakeCluster, api: ClusterApi) -> None:
    cluster.add_pod().print("text")

    def write(text: str) -> None:
        raise BrokenPipeError

    follower = Follower(api, PodChoice(SELECTOR, 1, 1), lambda: False, print, write, poll_seconds=0.02)
    with pytest.raises(BrokenPipeError):
        follower.follow()


@pytest.mark.parametrize(
    ("choice", "index", "text", "line"),
    [
        (PodChoice("", 1, 1), 0, "text", "text"),
        (PodChoice("", 2, 1), 1, "text", "[rank 1] text"),
        (PodChoice("", 2, 1, rank=1), 1, "text", "text"),
        (PodChoice("", 1, 8), 0, "[rank 3] text", "[rank 3] text"),
        (PodChoice("", 2, 8), 1, "[rank 11] text", "[rank 11] text"),
        (PodChoice("", 2, 8), 1, "[launcher] text", "[pod 1] [launcher] text"),
        (PodChoice("", 2, 8, rank=11), 1, "[rank 11] text", "text"),
        (PodChoice("", 2, 8, rank=11), 1, "[rank 1] text", None),
        (PodChoice("", 2, 8, rank=11), 1, "[launcher] text", None),
    ],
)
def test_each_line_is_marked_with_its_rank_if_there_are_several(
    choice: PodChoice, index: int, text: str, line: str | None
) -> None:
    assert choice.format_line(index, text) == line


def test_one_rank_is_read_from_its_pod_only(cluster: FakeCluster, api: ClusterApi) -> None:
    for index in range(3):
        cluster.add_pod(index)
    assert [pod.index for pod in PodChoice(SELECTOR, 3, 8, rank=17).find(api)] == [2]
    assert [pod.index for pod in PodChoice(SELECTOR, 3, 8).find(api)] == [0, 1, 2]


def test_the_reason_why_a_pod_has_not_started_is_read_from_its_status(cluster: FakeCluster) -> None:
    waiting = {"reason": "ImagePullBackOff", "message": "not found"}
    pod = pod_info(cluster.add_pod(waiting=waiting).body)
    assert (pod.has_started, pod.has_ended, pod.waiting) == (False, False, "ImagePullBackOff: not found")
    pending = cluster.add_pod().body
    scheduled = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available"}
    pending["status"] = {"phase": "Pending", "conditions": [scheduled]}
    assert pod_info(pending).waiting == "0/1 nodes are available"
