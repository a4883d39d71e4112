"""Lists in addition to the watches: the cache is complete at the start, and a stale watch is detected and repaired."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from stagecoach_operator.audit import Audit, merged
from stagecoach_operator.handlers import make_registry, make_settings, receive
from stagecoach_operator.kube import JOBSETS, TRAINING_RUNS, WORKLOADS, Listing, RequestForbidden, Resource
from stagecoach_operator.object_cache import Cache
from tests.operator.makers import NAMESPACE, FakeApi, World, data_stage


class Bench:
    """An audit over a world, with a watch that may be missing."""

    def __init__(self, folder: Path) -> None:
        self.world = World(folder)
        self.cache = Cache()
        self.enqueued: list[str] = []
        self.now = 0.0
        self.audit = Audit(self.world.api, self.cache, [NAMESPACE], self.enqueued.append, clock=lambda: self.now)

    def watch(self) -> None:
        self.world.api.watchers.append(
            lambda resource, kind, body: receive(resource, self.cache, self.enqueued.append, kind, body)
            if resource.plural in ("trainingruns", "jobsets", "pods", "workloads")
            else None
        )

    def check(self, seconds: float = 60.0) -> None:
        self.now += seconds
        asyncio.run(self.audit.check())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_the_cache_is_complete_after_the_cold_start(bench: Bench) -> None:
    uid = bench.world.submit(data_stage("a"))
    asyncio.run(bench.audit.cold_start())
    assert list(bench.cache.runs) == [uid]


def test_a_kind_installed_later_is_detected(bench: Bench) -> None:
    bench.world.api.unserved |= {JOBSETS.plural, WORKLOADS.plural}
    asyncio.run(bench.audit.cold_start())
    bench.check()
    assert not bench.audit.appeared
    bench.world.api.unserved.clear()
    bench.check()
    assert bench.audit.appeared, "kopf does not discover it"


def test_a_healthy_watch_is_not_reported(bench: Bench) -> None:
    bench.watch()
    bench.world.submit(data_stage("a"))
    asyncio.run(bench.audit.cold_start())
    for _ in range(10):
        bench.world.api.edit(TRAINING_RUNS, NAMESPACE, "demo", spec={"seed": int(bench.now)})
        bench.check()
    assert bench.audit.problems(240) == []


def test_a_stale_watch_is_repaired(bench: Bench) -> None:
    uid = bench.world.submit(data_stage("a"))
    asyncio.run(bench.audit.cold_start())
    bench.enqueued.clear()
    for seed in range(6):
        bench.world.api.edit(TRAINING_RUNS, NAMESPACE, "demo", spec={"seed": seed})
        version = bench.world.run().meta.resource_version
        bench.check()
        bench.check(1.0)
        assert bench.cache.runs[uid].meta.resource_version == version
    assert bench.enqueued == [uid] * 6


def test_an_unreported_deletion_is_detected(bench: Bench) -> None:
    uid = bench.world.submit(data_stage("a"))
    bench.world.submit(data_stage("a"), name="other")
    asyncio.run(bench.audit.cold_start())
    bench.world.api.remove(TRAINING_RUNS, NAMESPACE, "demo")
    bench.world.api.edit(TRAINING_RUNS, NAMESPACE, "other", spec={"seed": 1})
    bench.enqueued.clear()
    bench.check()
    assert uid not in bench.cache.runs
    assert bench.enqueued == [uid]


def test_a_kind_that_may_not_be_listed_is_reported(bench: Bench) -> None:
    asyncio.run(bench.audit.cold_start())
    allowed = FakeApi.list

    async def forbidden(
        resource: Resource, namespace: str | None, labels: str = "", fields: str = "", metadata_only: bool = False
    ) -> Listing:
        if resource == JOBSETS:
            raise RequestForbidden("jobsets is forbidden")
        return await allowed(bench.world.api, resource, namespace, labels, fields, metadata_only)

    bench.world.api.list = forbidden  # type: ignore[method-assign]
    bench.check()
    assert bench.audit.problems(240) == ["jobsets may not be listed: jobsets is forbidden"]


def test_a_namespace_that_refuses_is_left_out_and_the_others_continue(bench: Bench) -> None:
    """A namespace is deleted with its RoleBinding; the operator of 40 others must not end with it."""
    uid = bench.world.submit(data_stage("a"))
    bench.audit.namespaces = [NAMESPACE, "gone"]
    allowed, refused = FakeApi.list, {"gone"}

    async def forbidden(
        resource: Resource, namespace: str | None, labels: str = "", fields: str = "", metadata_only: bool = False
    ) -> Listing:
        if namespace in refused:
            raise RequestForbidden(f"no list in {namespace}")
        return await allowed(bench.world.api, resource, namespace, labels, fields, metadata_only)

    bench.world.api.list = forbidden  # type: ignore[method-assign]
    asyncio.run(bench.audit.cold_start())
    assert (list(bench.cache.runs), bench.audit.reachable) == ([uid], [NAMESPACE])
    bench.check()
    assert bench.audit.problems(240) == []
    assert not bench.audit.appeared
    refused.clear()
    bench.check()
    assert bench.audit.appeared, "kopf does not watch it: the operator restarts"


def test_an_operator_that_may_list_no_namespace_does_not_start(bench: Bench) -> None:
    async def forbidden(*_: object, **__: object) -> Listing:
        raise RequestForbidden("no list")

    bench.audit.namespaces = [NAMESPACE, "other"]
    bench.world.api.list = forbidden  # type: ignore[method-assign]
    with pytest.raises(RequestForbidden, match="no list; no list"):
        asyncio.run(bench.audit.cold_start())


def test_runs_of_several_namespaces_are_all_listed_and_the_oldest_version_proves_a_deletion() -> None:
    one, two = Listing(({"a": 1},), "12"), Listing(({"b": 2},), "9")
    assert merged([one, two]) == Listing(({"a": 1}, {"b": 2}), "9")


def test_kopf_only_watches() -> None:
    registry, settings = make_registry(Cache(), lambda uid: None), make_settings()
    assert len(registry._watching.get_all_handlers()) == 4
    assert registry._changing.get_all_handlers() == []
    assert registry._spawning.get_all_handlers() == []
    assert settings.scanning.disabled
    assert not settings.posting.enabled
