"""Validates a run's spec and plans it. The plan is stored with the run, so an operator upgrade does not re-run stages.

A new plan is made only when the spec is edited. Suspending or cancelling does not change what a run computes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from stagecoach_api import names
from stagecoach_api.artifacts import ResolvedInput, digest_of
from stagecoach_api.fields import format_path
from stagecoach_api.problems import MISSING, InvalidRun, Problem
from stagecoach_api.reading.validation import validate
from stagecoach_api.spec import Stage, Storage, TrainingRun
from stagecoach_api.status import Reason
from stagecoach_api.store import AccessDenied, NotFound, Store, StoreError, open_store
from stagecoach_api.stores.base import FolderLocation, InvalidLocation, parse_location
from stagecoach_api.stores.lookup import absolute, find_inputs, input_problems
from stagecoach_api.stores.retry import CONTROL_PLANE
from stagecoach_core.manifests.labels import owner_reference
from stagecoach_core.plan import PlanError, external_uris, make_plan, with_profiles, with_queue_of_label
from stagecoach_core.values import External, Plan, PlannedStage
from stagecoach_operator.object_views import Raw, RunView
from stagecoach_operator.permitted import permission_problems
from stagecoach_operator.settings import Settings
from stagecoach_operator.storage_access import endpoint_weakness, place_of

PLAN_KEY = "plan.json"
PROBE_KEY = ".stagecoach"
NO_EDIT = frozenset({"managedBy", "suspend", "cancel", "onFailure"})
"""Fields of a spec that control whether the run is worked on, but do not affect what it computes."""
INPUT_REMEDY = "put it there, or correct the URI; the operator looks for it again"
ALLOW_REMEDY = (
    "use a storage that the operator knows, or ask its administrator to add endpoint and bucket to the chart's value "
    "`storage.allowed`"
)
INPUT_THREADS = 4
"""Inputs of one run that are looked up at the same time."""
MAX_PLAN_BYTES = 900_000
"""A ConfigMap holds 1 MiB."""

RETRY_SECONDS = 30.0
"""How soon a run is validated again that was rejected for an external reason: an input or the storage."""


@dataclass(frozen=True)
class FrozenPlan:
    """A plan, and everything else that must not change during a run."""

    plan: Plan
    storage: Storage
    """Resolved against the operator's defaults; `uri` is set."""
    image: str
    """The operator's trainer image at planning time: the one that contains `plan.code`."""
    spec_digest: str
    """Digest of the spec it was made from, without `NO_EDIT`: the plan is valid as long as this is unchanged."""

    @property
    def storage_uri(self) -> str:
        return self.storage.uri or ""

    def digest(self) -> str:
        """Return the digest of the plan as it is stored."""
        return digest_of(to_json(self))


@dataclass(frozen=True)
class Rejection:
    """Why a run is not accepted."""

    reason: Reason
    message: str
    generation: int
    retry: bool = False
    """Whether it may become acceptable without an edit, such as when an input appears."""
    not_before: float = 0.0
    """When it may be validated again at the earliest, in seconds since the epoch."""


# -- planning ----------------------------------------------------------------------------------------------------------


def spec_digest(run: RunView) -> str:
    """Return the digest of everything in a spec that affects the plan."""
    spec = {key: value for key, value in run.spec.items() if key not in NO_EDIT}
    return digest_of({**spec, "queueLabels": dict(run.queue_labels)} if run.queue_labels else spec)


@dataclass(frozen=True)
class CheckedRun:
    """A valid run, and what its plan needs from stores."""

    spec: TrainingRun
    storage: Storage
    inputs: Mapping[str, str]
    """Absolute URIs of external inputs by `Reference.key`."""
    looks_at_storage: bool
    """Whether the operator may use its credentials for `storage.uri`. If not, only the stages' pods look there."""


def rejected(run: RunView, reason: Reason, message: str, retry: bool = False) -> Rejection:
    return Rejection(reason, message[:4000], run.generation, retry)


def check_run(run: RunView, settings: Settings, before: FrozenPlan | None = None) -> CheckedRun | Rejection:
    """Validate a run without any request. `before`: the plan that is in force, whose artifacts stay where they are."""
    try:
        spec = with_queue_of_label(validate(document_of(run)))
        complete = with_profiles(spec, settings.profiles)
    except (InvalidRun, PlanError) as error:
        return rejected(run, Reason.INVALID_SPEC, str(error))
    storage = settings.storage_of(spec.spec.storage)
    forbidden = permission_problems(spec, settings.allowed, settings.own_names)
    problems = [*storage_problems(spec, storage, settings), *forbidden]
    if problems:
        return rejected(run, reason_of(problems, forbidden), str(InvalidRun(problems)))
    try:
        inputs = {key: absolute(uri, storage.inputs or "") for key, uri in external_uris(spec).items()}
        looks = settings.allows_place(place_of(storage.uri or "", storage.endpoint))
        problems = access_problems(spec, storage, settings, looks)
    except InvalidLocation as error:
        return rejected(run, Reason.INVALID_SPEC, f"spec.storage: {error}")
    if problems:
        return rejected(run, Reason.STORAGE_NOT_ALLOWED, str(InvalidRun(problems)))
    moved = moved_problem(storage, before, run)
    if moved is not None:
        return rejected(run, Reason.INVALID_SPEC, str(InvalidRun([moved])))
    # What a profile adds was chosen by the administrator, so that only the run's own spec was looked up in the lists.
    return CheckedRun(complete, storage, inputs, looks)


def look_up(checked: CheckedRun) -> dict[str, ResolvedInput | StoreError]:
    """Return each external input, or the error of its look-up, by `Reference.key`. Takes seconds: for a thread.

    Raises Unreachable if the storage does not answer. A denied access is an answer: stages may have it.
    """
    storage = checked.storage
    # Before the inputs, which use the same endpoint: each of them would otherwise use up its own retries. A listing,
    # not a write: the operator's credentials may be narrower than those of the stages.
    if checked.looks_at_storage:
        with suppress(AccessDenied):
            next(iter(open_storage(storage).list(PROBE_KEY)), None)
    return find_inputs(checked.inputs, storage.endpoint, storage.region, patience=CONTROL_PLANE, threads=INPUT_THREADS)


def make_frozen(
    run: RunView,
    checked: CheckedRun,
    inputs: Mapping[str, ResolvedInput | StoreError],
    settings: Settings,
    before: FrozenPlan | None = None,
) -> FrozenPlan | Rejection:
    """Return the plan of a run whose inputs were looked up. `before`: the plan before an edit; its code is kept."""
    failures = {key: item for key, item in inputs.items() if isinstance(item, StoreError)}
    if failures:
        missing = all(isinstance(failure, NotFound) for failure in failures.values())
        reason = Reason.INPUT_NOT_FOUND if missing else Reason.STORAGE_UNREACHABLE
        problems = [problem for _, problem in input_problems(checked.spec, failures, INPUT_REMEDY)]
        return rejected(run, reason, str(InvalidRun(problems)), retry=True)
    externals = {
        key: External(item.uri, item.digest) for key, item in inputs.items() if isinstance(item, ResolvedInput)
    }
    # An edited run keeps the code it began with: that of a newer operator would change the digest of every stage, and
    # finished ones would run again.
    code, image = (settings.code, settings.trainer_image) if before is None else (before.plan.code, before.image)
    try:
        plan = make_plan(checked.spec, externals, code)
    except PlanError as error:
        return rejected(run, Reason.INVALID_SPEC, str(error))
    frozen = FrozenPlan(plan, checked.storage, image, spec_digest(run))
    # Checked here, where the user gets a reason: the API server would reject the ConfigMap at every try.
    if len(json.dumps(to_json(frozen))) > MAX_PLAN_BYTES:
        return rejected(run, Reason.INVALID_SPEC, f"the resolved plan exceeds {MAX_PLAN_BYTES:,} bytes; split the run")
    return frozen


def reason_of(problems: Sequence[Problem], forbidden: Sequence[Problem]) -> Reason:
    """Return the reason of a rejection for `problems`, of which `forbidden` are things that the run may not name."""
    if len(forbidden) < len(problems):
        return Reason.INVALID_SPEC
    only_images = all(problem.path.endswith(".image") for problem in forbidden)
    return Reason.IMAGE_NOT_ALLOWED if only_images else Reason.NOT_ALLOWED


def document_of(run: RunView) -> dict[str, Any]:
    """Return the run as it would be in a file. Of labels and annotations only those with a queue affect the plan."""
    metadata = {"name": run.meta.name, "namespace": run.meta.namespace, "labels": dict(run.queue_labels)}
    return {"apiVersion": names.API_GROUP_VERSION, "kind": names.KIND, "metadata": metadata, "spec": dict(run.spec)}


def storage_problems(run: TrainingRun, storage: Storage, settings: Settings) -> list[Problem]:
    """Return problems that only a cluster has: no storage, inputs with relative URIs, folders of a single machine."""
    problems = []
    has_folders = is_folder(settings.storage.uri)  # an operator configured with a folder vouches that nodes share it
    if storage.uri is None:
        problems.append(Problem("spec.storage.uri", MISSING, "required on a cluster", "write `s3://bucket/prefix`"))
    elif is_folder(storage.uri) and not has_folders:
        problems.append(_folder_problem("spec.storage.uri", storage.uri))
    for stage in run.spec.stages:
        for path, reference in stage.references():
            uri, where = reference.uri, format_path(("stages", stage.name, *path, "uri"))
            if uri is None:
                continue
            if "://" not in uri and not uri.startswith(("/", "~")) and storage.inputs is None:
                remedy = "set `spec.storage.inputs`, or write the full `s3://…`"
                problems.append(Problem(where, uri, "a relative URI needs a base, and there is none here", remedy))
            elif not has_folders and is_folder(absolute(uri, storage.inputs or "")):
                problems.append(_folder_problem(where, uri))
    return problems


def is_folder(uri: str | None) -> bool:
    """Return whether a URI is a folder of a single machine."""
    return uri is not None and isinstance(parse_location(uri), FolderLocation)


def _folder_problem(path: str, uri: str) -> Problem:
    return Problem(path, uri, "pods cannot access a folder of your machine", "copy it to S3 and write `s3://…`")


def access_problems(run: TrainingRun, storage: Storage, settings: Settings, looks: bool) -> list[Problem]:
    """Return a problem for each input for which the operator may not use its credentials, and for a weak endpoint.

    `looks`: whether it may use them for the storage itself. Raises InvalidLocation.
    """
    problems = []
    weakness = endpoint_weakness(storage.endpoint) if storage.endpoint and not looks else ""
    if weakness:
        rule = f"{weakness}, and the operator's settings do not name it"
        problems.append(Problem("spec.storage.endpoint", storage.endpoint, rule, ALLOW_REMEDY))
    for stage in run.spec.stages:
        for path, reference in stage.references():
            if reference.uri is None:
                continue
            place = place_of(absolute(reference.uri, storage.inputs or ""), storage.endpoint)
            if not settings.allows_place(place):
                where = format_path(("stages", stage.name, *path, "uri"))
                rule = f"the operator may not look it up: its settings do not name {place}"
                problems.append(Problem(where, reference.uri, rule, ALLOW_REMEDY))
    return problems


def moved_problem(storage: Storage, before: FrozenPlan | None, run: RunView) -> Problem | None:
    """Return a problem if an edit moves the storage of a run that has attempts or artifacts in the old one.

    Its status would name artifacts where they are not, and a running attempt would publish where it is not looked for.
    """
    has_work = any(stage.artifact is not None or stage.attempt for stage in run.status.stages)
    if before is None or not has_work:
        return None
    old, new = before.storage, storage
    if (old.uri, old.endpoint) == (new.uri, new.endpoint):
        return None
    place = f"`{old.uri}`" + (f" at `{old.endpoint}`" if old.endpoint else "")
    return Problem(
        "spec.storage",
        new.uri,
        f"cannot be changed once stages have run: their artifacts are in {place}",
        "write the old storage again; to use another one, create a run under another name",
    )


def open_storage(storage: Storage) -> Store:
    """Open the store of a run with the operator's own credentials, as the AWS SDK finds them."""
    return open_store(storage.uri or "", storage.endpoint, storage.region, CONTROL_PLANE)


# -- storing -----------------------------------------------------------------------------------------------------------


def plan_name(run: RunView, plan_digest: str) -> str:
    """Return the name of the ConfigMap that stores a plan of a run.

    It follows from the UID, which distinguishes runs of the same name, and from the plan's digest in the status. So an
    edit makes another ConfigMap, and the operator needs no right to change one.
    """
    suffix = hashlib.sha256(f"{run.meta.uid}/plan/{plan_digest}".encode()).hexdigest()[:12]
    return f"p-{run.meta.name[:40].rstrip('-.')}-{suffix}"


def plan_config_map(run: RunView, frozen: FrozenPlan) -> dict[str, Any]:
    """Return the ConfigMap that stores a run's plan. The run owns it, so it is deleted with the run."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": plan_name(run, frozen.digest()),
            "namespace": run.meta.namespace,
            "labels": {
                names.LABEL_MANAGED_BY: names.MANAGED_BY,
                names.LABEL_RUN: run.meta.name,
                names.LABEL_RUN_UID: run.meta.uid,
            },
            "ownerReferences": [owner_reference(run.meta.name, run.meta.uid)],
        },
        "immutable": True,
        "data": {PLAN_KEY: json.dumps(to_json(frozen), ensure_ascii=False)},
    }


def to_json(frozen: FrozenPlan) -> dict[str, Any]:
    plan = frozen.plan
    stages = {
        name: {
            "stage": planned.stage.model_dump(mode="json", exclude_none=True),
            "upstream": list(planned.upstream),
            "externals": {key: [item.uri, item.digest] for key, item in planned.externals.items()},
        }
        for name, planned in plan.stages.items()
    }
    return {
        "namespace": plan.namespace,
        "run": plan.run,
        "code": plan.code,
        # JSON objects are unordered (RFC 8259), and the plan's digest sorts their keys: a list keeps the order.
        "order": list(plan.stages),
        "stages": stages,
        "storage": frozen.storage.model_dump(mode="json", exclude_none=True),
        "image": frozen.image,
        "spec": frozen.spec_digest,
    }


def from_config_map(body: Raw, run: RunView) -> FrozenPlan | None:
    """Return the stored plan of a run. None if it belongs to another run or is damaged: a new one must be made. It is
    a copy of what the spec and the inputs give, so nothing is lost."""
    # The name contains six digits of a hash only: the owner's UID is what proves that the plan is this run's.
    owners = [item.get("uid") for item in body["metadata"].get("ownerReferences") or ()]
    try:
        return from_json(json.loads(body["data"][PLAN_KEY])) if run.meta.uid in owners else None
    except (KeyError, TypeError, ValueError, ValidationError):
        return None


def from_json(stored: Mapping[str, Any]) -> FrozenPlan:
    """Return the plan. Raises KeyError, TypeError or ValueError if it is damaged."""
    stages = {name: _planned(stored["stages"][name]) for name in stored["order"]}
    plan = Plan(namespace=stored["namespace"], run=stored["run"], stages=stages, code=stored["code"])
    storage = Storage.model_validate(stored["storage"])
    return FrozenPlan(plan, storage, str(stored["image"]), str(stored["spec"]))


def _planned(stored: Mapping[str, Any]) -> PlannedStage:
    return PlannedStage(
        stage=Stage.model_validate_json(json.dumps(stored["stage"])),
        upstream=tuple(stored["upstream"]),
        externals={key: External(uri, digest) for key, (uri, digest) in stored["externals"].items()},
    )
