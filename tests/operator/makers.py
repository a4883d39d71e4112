"""Makers for tests of the operator: an API server in memory, a JobSet controller, and a kubelet that the test controls.

The API server implements what the operator relies on: resource versions, preconditions, 409 on creation, merge patches
of the object and of its status, foreground deletion that waits for pods, garbage collection of dependants. The rest
is tested against a real one.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from stagecoach_api import names
from stagecoach_api.artifacts import Manifest, manifest_key, uri_below
from stagecoach_api.spec import Storage
from stagecoach_api.status import Condition, ConditionType, StageStatus, TrainingRunStatus
from stagecoach_api.store import open_store
from stagecoach_operator.artifact_lookup import ArtifactLookups
from stagecoach_operator.attempt_client import AttemptClient
from stagecoach_operator.events import RunEvent
from stagecoach_operator.kube import (
    CONFIG_MAPS,
    JOBSETS,
    NETWORK_POLICIES,
    PODS,
    TRAINING_RUNS,
    WORKLOADS,
    AlreadyExists,
    Body,
    Conflict,
    KubeError,
    Listing,
    NotServed,
    ObjectNotFound,
    Resource,
    Unavailable,
)
from stagecoach_operator.object_cache import Cache, Child
from stagecoach_operator.object_views import RunView, jobset_view, pod_view, run_view, workload_view
from stagecoach_operator.plan_maker import PlanMaker
from stagecoach_operator.planning import FrozenPlan, Rejection, check_run, look_up, make_frozen
from stagecoach_operator.progress_reports import ProgressReports
from stagecoach_operator.reconcile import Reconciler
from stagecoach_operator.settings import Settings
from stagecoach_operator.store_lanes import StoreLanes
from tests.core import makers as core_makers

_VIEWS: dict[str, Callable[[Body], Child]] = {
    JOBSETS.plural: jobset_view,
    PODS.plural: pod_view,
    WORKLOADS.plural: workload_view,
}
NAMESPACE = "team"
START = 1_800_000_000.0
FOREGROUND = "foregroundDeletion"

Key = tuple[str, str, str]
"""Plural, namespace, name."""


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Killed(BaseException):
    """The operator is killed here. A BaseException, so that no `except Exception` catches it."""


@dataclass
class FakeApi:
    """An API server in memory. Writes are counted; hooks around each may raise errors or kill the operator."""

    clock: Callable[[], float]
    objects: dict[Key, Body] = field(default_factory=dict)
    watchers: list[Callable[[Resource, str, Body], None]] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    before_write: Callable[[int, str], None] = lambda number, what: None
    after_write: Callable[[int, str], None] = lambda number, what: None
    unserved: set[str] = field(default_factory=set)
    _versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _uids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    # -- Kube ----------------------------------------------------------------------------------------------------------

    async def create(self, resource: Resource, body: Body) -> Body:
        with self._writing(f"create {resource.plural} {body['metadata'].get('name')}"):
            return self.add(resource, body)

    async def get(self, resource: Resource, namespace: str, name: str) -> Body:
        await asyncio.sleep(0)
        self._must_serve(resource)
        self.reads.append(f"get {resource.plural} {name}")
        return copy.deepcopy(self._found(resource, namespace, name))

    async def list(
        self, resource: Resource, namespace: str | None, labels: str = "", fields: str = "", metadata_only: bool = False
    ) -> Listing:
        await asyncio.sleep(0)
        self._must_serve(resource)
        self.reads.append(f"list {resource.plural}")
        wanted = dict(part.split("=", 1) for part in labels.split(",") if part)
        items = [
            copy.deepcopy(item)
            for key, item in self.objects.items()
            if key[0] == resource.plural
            and namespace in (None, key[1])
            and wanted.items() <= (item["metadata"].get("labels") or {}).items()
            and _has_fields(item, fields)
        ]
        return Listing(tuple(items), str(self.version))

    async def patch(self, resource: Resource, namespace: str, name: str, patch: Body, subresource: str = "") -> Body:
        with self._writing(f"patch {resource.plural}/{subresource or 'object'} {name}"):
            found = self._found(resource, namespace, name)
            given = dict(patch.get("metadata") or {})
            for precondition in ("uid", "resourceVersion"):
                if given.pop(precondition, found["metadata"][precondition]) != found["metadata"][precondition]:
                    raise Conflict(f"{name}: {precondition} differs")
            if subresource:
                change: Body = {subresource: patch.get(subresource, {})}
            else:
                change = {**{key: value for key, value in patch.items() if key != "status"}, "metadata": given}
            return self._merge(resource, (resource.plural, namespace, name), json.loads(json.dumps(change)))

    async def replace(self, resource: Resource, body: Body) -> Body:
        with self._writing(f"replace {resource.plural} {body['metadata']['name']}"):
            found = self._found(resource, body["metadata"]["namespace"], body["metadata"]["name"])
            if body["metadata"].get("resourceVersion") != found["metadata"]["resourceVersion"]:
                raise Conflict("the object has been modified")
            self.objects[self._key(resource, body)] = copy.deepcopy(body)
            return self._changed(resource, self._key(resource, body))

    async def delete(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        uid: str | None = None,
        foreground: bool = True,
        grace_seconds: int | None = None,
    ) -> None:
        with self._writing(f"delete {resource.plural} {name}"):
            found = self._found(resource, namespace, name)
            if uid is not None and found["metadata"]["uid"] != uid:
                raise Conflict(f"{name}: uid differs")
            finalizers = [item for item in found["metadata"].get("finalizers") or () if item != PODS_END]
            if resource is PODS and grace_seconds != 0 and _runs(found):
                finalizers.append(PODS_END)
            found["metadata"]["finalizers"] = finalizers
            self.remove(resource, namespace, name, foreground)

    async def read(self, path: str) -> Any:
        raise ObjectNotFound(path)

    # -- changes by other clients and controllers ----------------------------------------------------------------------

    def add(self, resource: Resource, body: Body) -> Body:
        """Create an object without counting a write."""
        self._must_serve(resource)
        key = self._key(resource, body)
        if key in self.objects:
            raise AlreadyExists(f"{resource.plural} {key[2]} already exists")
        made: Body = json.loads(json.dumps(body))
        made["metadata"] |= {
            "uid": f"uid-{next(self._uids)}",
            "creationTimestamp": stamp(self.clock()),
            "generation": 1,
        }
        self.objects[key] = made
        return self._changed(resource, key, "ADDED")

    def edit(self, resource: Resource, namespace: str, name: str, **change: Any) -> Body:
        """Change an object as another client would."""
        return self._merge(resource, (resource.plural, namespace, name), change)

    def edit_spec(self, name: str, **change: Any) -> Body:
        """Edit a run's spec."""
        return self.edit(TRAINING_RUNS, NAMESPACE, name, spec=change)

    def remove(self, resource: Resource, namespace: str, name: str, foreground: bool = False) -> None:
        """Delete an object: at once, or, in the foreground or with finalizers, when they are gone."""
        key = (resource.plural, namespace, name)
        metadata = self.objects[key]["metadata"]
        if "deletionTimestamp" not in metadata:
            metadata["deletionTimestamp"] = stamp(self.clock())
            if foreground:
                metadata["finalizers"] = [*(metadata.get("finalizers") or ()), FOREGROUND]
            self._changed(resource, key)
        self.collect()

    def collect(self) -> None:
        """Run the garbage collector: foreground deletion proceeds from the pods upwards; orphans are deleted."""
        changed = True
        while changed:
            changed = False
            for key, item in list(self.objects.items()):
                if key in self.objects and self._collect_one(key, item):
                    changed = True

    def _collect_one(self, key: Key, item: Body) -> bool:
        if key[0] not in _RESOURCES:  # nothing owns it, and it owns nothing
            return False
        resource, metadata = _RESOURCES[key[0]], item["metadata"]
        owned = [other for other in self.objects.values() if _owner(other) == metadata["uid"]]
        if "deletionTimestamp" in metadata:
            finalizers = metadata.get("finalizers") or []
            if FOREGROUND in finalizers:
                started = False
                for other in owned:
                    if "deletionTimestamp" not in other["metadata"]:
                        kind = _RESOURCES_BY_KIND[other["kind"]]
                        other["metadata"]["deletionTimestamp"] = stamp(self.clock())
                        finalizer = [PODS_END] if kind is PODS and _runs(other) else [FOREGROUND]
                        other["metadata"]["finalizers"] = finalizer
                        self._changed(kind, self._key(kind, other))
                        started = True
                if owned:
                    return started
                finalizers = [name for name in finalizers if name != FOREGROUND]
                metadata["finalizers"] = finalizers
            if not finalizers:
                self._drop(resource, key)
                return True
            return False
        owner = _owner(item)
        if owner and all(other["metadata"]["uid"] != owner for other in self.objects.values()):
            self.remove(resource, key[1], key[2], foreground=key[0] != PODS.plural)
            return True
        return False

    def end_pod(self, pod: Body) -> None:
        """Remove a pod that is being deleted and whose process has ended."""
        key = self._key(PODS, pod)
        if key in self.objects and "deletionTimestamp" in self.objects[key]["metadata"]:
            self.objects[key]["metadata"]["finalizers"] = []
            self.collect()

    @property
    def version(self) -> int:
        return max((int(item["metadata"]["resourceVersion"]) for item in self.objects.values()), default=0)

    def all_of(self, resource: Resource) -> Sequence[Body]:
        return [item for key, item in self.objects.items() if key[0] == resource.plural]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _writing(self, what: str) -> _Write:
        return _Write(self, what)

    def _must_serve(self, resource: Resource) -> None:
        if resource.plural in self.unserved:
            raise NotServed("404 page not found")

    def _found(self, resource: Resource, namespace: str, name: str) -> Body:
        self._must_serve(resource)
        try:
            return self.objects[resource.plural, namespace, name]
        except KeyError:
            raise ObjectNotFound(f"{resource.plural} {name} not found") from None

    def _merge(self, resource: Resource, key: Key, change: Body) -> Body:
        before = copy.deepcopy(self.objects[key])
        self.objects[key] = merged(self.objects[key], change)
        if self.objects[key] == before:
            return copy.deepcopy(before)
        if self.objects[key].get("spec") != before.get("spec"):
            self.objects[key]["metadata"]["generation"] += 1
        answer = self._changed(resource, key)
        self.collect()
        return answer

    def _changed(self, resource: Resource, key: Key, kind: str = "MODIFIED") -> Body:
        item = self.objects[key]
        item["metadata"]["resourceVersion"] = str(next(self._versions) + 100)
        self._notify(resource, kind, item)
        return copy.deepcopy(item)

    def _drop(self, resource: Resource, key: Key) -> None:
        item = self.objects.pop(key)
        item["metadata"]["resourceVersion"] = str(next(self._versions) + 100)
        self._notify(resource, "DELETED", item)

    def _notify(self, resource: Resource, kind: str, item: Body) -> None:
        for watcher in list(self.watchers):
            watcher(resource, kind, copy.deepcopy(item))

    @staticmethod
    def _key(resource: Resource, body: Body) -> Key:
        return resource.plural, body["metadata"]["namespace"], body["metadata"]["name"]


class _Write:
    """One write: counted, with hooks before and after it."""

    def __init__(self, api: FakeApi, what: str) -> None:
        self._api, self._what = api, what

    def __enter__(self) -> None:
        self._number = len(self._api.writes)
        self._api.before_write(self._number, self._what)
        self._api.writes.append(self._what)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self._api.after_write(self._number, self._what)


PODS_END = "kubelet"
_RESOURCES = {item.plural: item for item in (TRAINING_RUNS, JOBSETS, PODS, CONFIG_MAPS, WORKLOADS)}
_RESOURCES |= {"leases": Resource("coordination.k8s.io", "v1", "leases", "Lease")}
_RESOURCES |= {"events": Resource("", "v1", "events", "Event")}
_RESOURCES |= {NETWORK_POLICIES.plural: NETWORK_POLICIES}
_RESOURCES_BY_KIND = {item.kind: item for item in _RESOURCES.values()}


def _runs(pod: Body) -> bool:
    return (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")


def _owner(body: Body) -> str:
    owners = body["metadata"].get("ownerReferences") or []
    return str(owners[0]["uid"]) if owners else ""


def _has_fields(item: Body, fields: str) -> bool:
    for part in filter(None, fields.split(",")):
        path, _, value = part.partition("=")
        found: Any = item
        for name in path.split("."):
            found = (found or {}).get(name)
        if found != value:
            return False
    return True


def merged(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


# -- the rest of the cluster -------------------------------------------------------------------------------------------


@dataclass
class Ends:
    """How the next pods of a stage end."""

    exit_code: int = 0
    cause: str | None = None
    message: str = ""
    publishes: bool = True
    raw: str | None = None
    """Literal termination message, instead of a result."""
    reason: str = ""
    disruption: str = ""


@dataclass
class World:
    """A cluster: the API server, a JobSet controller, and a kubelet whose trainers publish artifacts."""

    folder: Path
    settings: Settings = field(init=False)
    now: float = START
    node_skew: float = 0.0
    """How far the nodes' clocks are ahead of the operator's, in seconds."""
    api: FakeApi = field(init=False)
    ends: dict[str, list[Ends]] = field(default_factory=dict)
    """How the attempts of a stage end, in order; further attempts succeed."""
    waits: dict[str, dict[str, str]] = field(default_factory=dict)
    """Stages whose pods do not start, with their waiting state."""
    holds: set[str] = field(default_factory=set)
    """Stages whose pods run until removed from here."""
    pods_made: list[str] = field(default_factory=list)
    two_at_once: list[str] = field(default_factory=list)
    """Stages of which two pods with index 0 ran at once: there must be none."""

    def __post_init__(self) -> None:
        self.api = FakeApi(lambda: self.now)
        self.store = open_store(str(self.folder / "store"))
        self.settings = Settings(
            trainer_image="trainer:1",
            trainer_code="code-1",
            storage=Storage(uri=f"file://{self.folder}/store", inputs=f"file://{self.folder}/inputs"),
        )
        (self.folder / "inputs").mkdir(parents=True, exist_ok=True)

    def clock(self) -> float:
        """Advance a little with every call, like real time."""
        self.now += 0.001
        return self.now

    def input(self, name: str, text: str = "text\n") -> str:
        (self.folder / "inputs" / name).write_text(text, encoding="utf-8")
        return name

    def submit(self, *stages: dict[str, Any], name: str = "demo", **spec: Any) -> str:
        """Create a run; return its UID."""
        body = {
            "apiVersion": names.API_GROUP_VERSION,
            "kind": names.KIND,
            "metadata": {"name": name, "namespace": NAMESPACE},
            "spec": {"stages": list(stages), **spec},
        }
        return str(self.api.add(TRAINING_RUNS, body)["metadata"]["uid"])

    def run(self, name: str = "demo") -> RunView:
        return run_view(self.api.objects[TRAINING_RUNS.plural, NAMESPACE, name])

    def status(self, name: str = "demo") -> TrainingRunStatus:
        return self.run(name).status

    def stage(self, stage: str, name: str = "demo") -> StageStatus:
        return next(item for item in self.status(name).stages if item.name == stage)

    def condition(self, kind: ConditionType, name: str = "demo") -> Condition:
        return next(item for item in self.status(name).conditions if item.type is kind)

    def jobsets(self) -> list[str]:
        return [item["metadata"]["name"] for item in self.api.all_of(JOBSETS)]

    # -- controllers ---------------------------------------------------------------------------------------------------

    def tick(self) -> bool:
        """Run one step of the JobSet controller and of the kubelet; return whether anything changed."""
        did = False
        for jobset in self.api.all_of(JOBSETS):
            did = self._make_pods(jobset) or did
        for pod in self.api.all_of(PODS):
            did = self._work_on(pod) or did
        self.api.collect()
        return did

    def _make_pods(self, jobset: Body) -> bool:
        metadata = jobset["metadata"]
        own = [pod for pod in self.api.all_of(PODS) if _owner(pod) == metadata["uid"]]
        if own or "deletionTimestamp" in metadata or jobset["spec"].get("suspend") or jobset.get("status"):
            return False
        job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
        stage = job["template"]["metadata"]["labels"][names.LABEL_STAGE]
        if any(_runs(pod) and pod["metadata"]["labels"][names.LABEL_STAGE] == stage for pod in self.api.all_of(PODS)):
            self.two_at_once.append(stage)
        for index in range(job["parallelism"]):
            self.pods_made.append(metadata["name"])
            self.api.add(
                PODS,
                {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {
                        "name": f"{metadata['name']}-w-0-{index}-{len(self.pods_made)}",
                        "namespace": metadata["namespace"],
                        "labels": {**job["template"]["metadata"]["labels"], names.COMPLETION_INDEX: str(index)},
                        "annotations": job["template"]["metadata"]["annotations"],
                        "ownerReferences": [
                            {"name": f"{metadata['name']}-w-0", "uid": metadata["uid"], "controller": True}
                        ],
                    },
                    "spec": {"nodeName": f"node-{index}"},
                    "status": {"phase": "Pending"},
                },
            )
        return True

    def _work_on(self, pod: Body) -> bool:
        labels, phase = pod["metadata"]["labels"], pod["status"]["phase"]
        stage, index = labels[names.LABEL_STAGE], int(labels[names.COMPLETION_INDEX])
        if phase in ("Succeeded", "Failed"):
            self.api.end_pod(pod)
            return False
        if "deletionTimestamp" in pod["metadata"]:
            self._finish(pod, Ends(75, "preemption", "stop requested, checkpoint saved"), index)
            return True
        if stage in self.waits:
            waiting = {"name": names.TRAINER_CONTAINER, "state": {"waiting": self.waits[stage]}}
            status = {"phase": "Pending", "containerStatuses": [waiting]}
            return self._set_status(pod, status)
        if phase == "Pending":
            running = {
                "name": names.TRAINER_CONTAINER,
                "state": {"running": {"startedAt": stamp(self.now + self.node_skew)}},
            }
            return self._set_status(pod, {"phase": "Running", "containerStatuses": [running]})
        if stage in self.holds:
            return False
        queued = self.ends.get(stage)
        ends = queued[0] if queued else Ends()
        if queued and index == self._last_index(pod):
            queued.pop(0)
        self._finish(pod, ends, index)
        return True

    def _last_index(self, pod: Body) -> int:
        owner = _owner(pod)
        return max(
            int(other["metadata"]["labels"][names.COMPLETION_INDEX])
            for other in self.api.all_of(PODS)
            if _owner(other) == owner
        )

    def _finish(self, pod: Body, ends: Ends, index: int) -> None:
        content = uri = None
        if ends.exit_code == 0 and ends.cause is None and index == 0 and ends.publishes:
            content, uri = self._publish(pod)
        result = {"exitCode": ends.exit_code, "cause": ends.cause, "message": ends.message, "contentDigest": content}
        result |= {"artifactUri": uri, "artifactEndpoint": None if uri is None else ""}
        message = json.dumps(result) if ends.raw is None else ends.raw
        code = ends.exit_code if ends.exit_code >= 0 else 128 - ends.exit_code
        terminated = {
            "exitCode": code,
            "reason": ends.reason or ("Completed" if code == 0 else "Error"),
            "message": message,
            "finishedAt": stamp(self.now + self.node_skew),
            "startedAt": stamp(self.now + self.node_skew - 1),
        }
        status: Body = {
            "phase": "Succeeded" if code == 0 else "Failed",
            "containerStatuses": [{"name": names.TRAINER_CONTAINER, "state": {"terminated": terminated}}],
        }
        if ends.disruption:
            condition = {
                "type": "DisruptionTarget",
                "status": "True",
                "reason": ends.disruption,
                "message": "by a test",
            }
            status["conditions"] = [condition]
        self._set_status(pod, status)

    def _set_status(self, pod: Body, status: Body) -> bool:
        key = pod["metadata"]["namespace"], pod["metadata"]["name"]
        before = pod["metadata"]["resourceVersion"]
        return bool(self.api.edit(PODS, *key, status=status)["metadata"]["resourceVersion"] != before)

    def _publish(self, pod: Body) -> tuple[str, str]:
        """Publish as a trainer does: write the manifest unless it exists; return its content digest and its URI."""
        stage = self._stage_file(pod)
        content = digest(stage["digest"])
        manifest = Manifest(
            stage_digest=stage["digest"],
            content_digest=content,
            kind=stage["kind"],
            objects=(),
            config={},
            code=stage["code"],
            seed=0,
            created=self.now,
        )
        store = open_store(stage["storageUri"])
        store.commit(manifest_key(stage["digest"]), manifest.model_dump_json().encode())
        return content, uri_below(store.uri, manifest.folder)

    def _stage_file(self, pod: Body) -> Body:
        return self.stage_file_of(pod["metadata"]["name"].rsplit("-w-0-", 1)[0])

    def stage_file_of(self, attempt: str) -> Body:
        """Return the `stage.json` of the attempt with this JobSet name."""
        (jobset,) = (body for body in self.api.all_of(JOBSETS) if body["metadata"]["name"] == attempt)
        (job,) = jobset["spec"]["replicatedJobs"]
        volumes = job["template"]["spec"]["template"]["spec"]["volumes"]
        (name,) = (volume["configMap"]["name"] for volume in volumes if volume["name"] == "stage")
        body = self.api.objects[CONFIG_MAPS.plural, jobset["metadata"]["namespace"], name]
        stage: Body = json.loads(body["data"][names.STAGE_FILE])
        return stage


def digest(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def plan_run(run: RunView, settings: Settings, before: FrozenPlan | None = None) -> FrozenPlan | Rejection:
    """Plan a run at once, in the steps of the planner."""
    checked = check_run(run, settings, before)
    if isinstance(checked, Rejection):
        return checked
    return make_frozen(run, checked, look_up(checked), settings, before)


MAX_RECONCILIATIONS = 3000

# -- an operator driven by the test -----------------------------------------------------------------------------------


class Operator:
    """The reconciler on a world, run step by step; its watches start with the existing objects."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cache = Cache()
        self.due: dict[str, None] = {}
        self.timers: dict[str, float] = {}
        self.events: list[RunEvent] = []
        self.reconciliations = 0
        lanes = StoreLanes(world.settings, clock=world.clock)
        self.lookups = ArtifactLookups(lanes, clock=world.clock)
        self.planner = PlanMaker(lanes, world.settings, self.enqueue, clock=world.clock)
        client = AttemptClient(world.api, self.cache, world.settings)
        self.reconciler = Reconciler(
            client=client,
            lookups=self.lookups,
            planner=self.planner,
            reports=ProgressReports(since=world.now),
            enqueue=self.enqueue,
            record_events=lambda run, events: self.events.extend(events),
            clock=world.clock,
        )
        for resource in (TRAINING_RUNS, JOBSETS, PODS, WORKLOADS):
            for item in world.api.all_of(resource):
                self.receive(resource, "ADDED", copy.deepcopy(item))
        world.api.watchers.append(self.receive)

    def enqueue(self, uid: str) -> None:
        self.due[uid] = None

    def receive(self, resource: Resource, kind: str, body: Body) -> None:
        """Apply an event of a watch, as the handlers do."""
        uid = body["metadata"]["uid"]
        if kind == "DELETED":
            run_uid = self.cache.remove(uid)
        elif resource is TRAINING_RUNS:
            run_uid = uid if self.cache.put_run(run_view(body)) else None
        else:
            view = _VIEWS.get(resource.plural)
            run_uid = None if view is None else self.cache.put(view(body))
        if run_uid:
            self.enqueue(run_uid)

    def die(self) -> None:
        self.world.api.watchers.remove(self.receive)
        self.planner.close()
        self.lookups.close()

    async def settle(self) -> None:
        """Reconcile until nothing is due, waiting for pending lookups."""
        while True:
            for uid, moment in list(self.timers.items()):
                if moment <= self.world.now:
                    del self.timers[uid]
                    self.enqueue(uid)
            if not self.due:
                if not await self._lookups_done():
                    return
                continue
            uid = next(iter(self.due))
            del self.due[uid]
            await self.reconcile(uid)

    async def reconcile(self, uid: str) -> None:
        self.reconciliations += 1
        if self.reconciliations > MAX_RECONCILIATIONS:
            raise AssertionError(f"the operator does not come to rest; its last writes: {self.world.api.writes[-8:]}")
        try:
            moment = await self.reconciler.reconcile(uid)
        except Unavailable as error:
            moment = self.world.now + (error.retry_after or 0.2)
        except KubeError:
            moment = self.world.now + 0.2
        self.timers.pop(uid, None)
        if moment is not None:
            self.timers[uid] = moment

    async def _lookups_done(self) -> bool:
        """Wait for the threads of the lanes: plans, pending lookups, and pointers being written."""
        making = [job.task for job in self.planner.jobs.values() if not job.task.done()]
        if making:
            await asyncio.wait(making)
            await asyncio.sleep(0)  # their callbacks
        await asyncio.gather(*self.reconciler._pointers._tasks)
        for _ in range(200):
            if self.due:
                return True
            if not any(state.pending for state in self.lookups._states.values()):
                return False
            await asyncio.sleep(0.005)
        return bool(self.due)


async def drive(world: World, operator: Operator, seconds: float = 3600.0) -> None:
    """Alternate between operator and cluster until nothing more happens within `seconds` of the world's time."""
    end = world.now + seconds
    while world.now < end:
        await operator.settle()
        if world.tick() or operator.due:
            world.now += 0.25
            continue
        coming = min(operator.timers.values(), default=None)
        if coming is None or coming > end:
            return
        world.now = max(world.now + 0.001, coming)


data_stage = partial(core_makers.data_stage, uri="a.txt")
"""A `data` stage that reads the named stages, or the file `a.txt` if there are none."""
