"""The cache of watched objects."""

from __future__ import annotations

from dataclasses import replace

from stagecoach_operator.object_cache import Cache, Children, is_newer
from stagecoach_operator.object_views import RunView, run_view
from tests.operator.view_makers import RUN, jobset, meta, pod, workload


def test_an_older_version_does_not_replace_a_newer_one() -> None:
    cache = Cache()
    newer = jobset(meta=meta("a-1", resource_version="12"))
    assert cache.put(newer) == RUN
    assert cache.put(jobset(meta=meta("a-1", resource_version="9"), suspended=True)) is None
    assert cache.of_run(RUN).jobsets == (newer,)
    assert is_newer("10", "9")


def test_a_late_response_does_not_restore_a_deleted_object() -> None:
    cache = Cache()
    cache.put(jobset())
    assert cache.remove("uid-a-1") == RUN
    assert cache.put(jobset(meta=meta("a-1", resource_version="99"))) is None
    assert cache.of_run(RUN).jobsets == ()
    assert cache.remove("uid-a-1") is None


def test_a_workload_may_arrive_before_its_jobset() -> None:
    cache = Cache()
    assert cache.put(workload()) is None
    cache.put(jobset())
    assert cache.of_run(RUN).workloads["uid-a-1"] == workload()
    cache.put(workload(meta=meta("other"), jobset_uid="uid-other"))
    cache.remove("uid-other")
    cache.remove("uid-workload")
    assert cache.of_run(RUN).workloads == {}


def test_a_workload_may_be_deleted_after_its_jobset() -> None:
    cache = Cache()
    cache.put(jobset())
    cache.put(workload())
    cache.remove("uid-a-1")
    assert cache.remove("uid-workload") == RUN
    assert cache.of_run(RUN) == Children()


def test_objects_without_our_labels_are_not_stored() -> None:
    cache = Cache()
    assert cache.put(pod(run_uid="")) is None
    assert cache.children == {}


def test_removing_a_run_returns_its_own_uid() -> None:
    cache = Cache()
    view: RunView = run_view({"metadata": {"name": "x", "namespace": "team", "uid": "run", "resourceVersion": "7"}})
    assert cache.put_run(view)
    assert not cache.put_run(view)
    assert cache.put_run(replace(view, meta=replace(view.meta, resource_version="8")))
    assert cache.remove("run") == "run"
