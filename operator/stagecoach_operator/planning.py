"""From a run's spec to its plan, which is kept beside the run: neither a new operator nor a new image re-runs it.

A plan is made anew when the spec is edited, and only then; to suspend or cancel a run is no edit of what it computes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from stagecoach_api import names
from stagecoach_api.artifacts import ResolvedInput, digest_of
from stagecoach_api.problems import MISSING, InvalidRun, Problem
from stagecoach_api.reading.validation import validate
from stagecoach_api.spec import Stage, Storage, TrainingRun
from stagecoach_api.status import Reason
from stagecoach_api.store import AccessDenied, NotFound, Store, StoreError, open_store
from stagecoach_api.stores.base import FolderLocation, parse_location
from stagecoach_api.stores.lookup import absolute, find_inputs, input_problems
from stagecoach_core.manifests.labels import owner_reference
from stagecoach_core.plan import PlanError, external_keys, make_plan
from stagecoach_core.values import External, Plan, PlannedStage
from stagecoach_operator.settings import Settings
from stagecoach_operator.watched import Raw, RunView

PLAN_KEY = "plan.json"
PROBE_KEY = ".stagecoach"
NO_EDIT = frozenset({"suspend", "cancel"})
"""Fields of a spec that say whether it is worked on, and nothing of what is computed."""
INPUT_REMEDY = "put it there, or correct the URI; it is looked for again"
MAX_PLAN_BYTES = 900_000
"""A ConfigMap holds 1 MiB."""

RETRY_SECONDS = 30.0
"""How soon a run is looked at again that was refused for something outside of it: an input, the storage."""


@dataclass(frozen=True)
class Snapshot:
    """A plan, and what else must not change under a run."""

    plan: Plan
    storage: Storage
    """Resolved against the operator's defaults; `uri` is given."""
    image: str
    """The operator's trainer image when the plan was made: it belongs to `plan.code`."""
    spec_digest: str
    """Digest of the spec it was made of, `NO_EDIT` apart: while that is the same, so is the plan."""

    @property
    def storage_uri(self) -> str:
        return self.storage.uri or ""

    def digest(self) -> str:
        """Return the digest of the plan as it is kept."""
        return digest_of(to_json(self))


@dataclass(frozen=True)
class Refusal:
    """A run that cannot be accepted as it is."""

    reason: Reason
    message: str
    generation: int
    retry: bool = False
    """Something outside the spec may put it right."""


# -- making ------------------------------------------------------------------------------------------------------------


def spec_digest(run: RunView) -> str:
    """Return the digest of everything in a spec that a plan rests on."""
    return digest_of({key: value for key, value in run.spec.items() if key not in NO_EDIT})


def plan_run(  # noqa: PLR0911 - each refusal ends it
    run: RunView, settings: Settings, before: Snapshot | None = None
) -> Snapshot | Refusal:
    """Check and plan a run. Asks S3 for its inputs: takes seconds, so call it in a thread.

    `before`: the run's plan before its spec was edited; code and image stay those it was accepted with.
    """

    def refused(reason: Reason, message: str, retry: bool = False) -> Refusal:
        return Refusal(reason, message[:4000], run.generation, retry)

    try:
        spec = validate(document_of(run))
    except InvalidRun as error:
        return refused(Reason.INVALID_SPEC, str(error))
    storage = settings.storage_of(spec.spec.storage)
    problems = [*storage_problems(spec, storage, settings), *image_problems(spec, settings)]
    if problems:
        only_images = all(problem.path.endswith("image") for problem in problems)
        reason = Reason.IMAGE_NOT_ALLOWED if only_images else Reason.INVALID_SPEC
        return refused(reason, str(InvalidRun(problems)))
    trouble = storage_trouble(storage)
    if trouble:
        return refused(Reason.STORAGE_UNREACHABLE, trouble, retry=True)
    found = look_up(spec, storage)
    failures = {key: error for key, error in found.items() if isinstance(error, StoreError)}
    if failures:
        gone = all(isinstance(error, NotFound) for error in failures.values())
        reason = Reason.INPUT_NOT_FOUND if gone else Reason.STORAGE_UNREACHABLE
        return refused(reason, str(InvalidRun(input_problems(spec, failures, INPUT_REMEDY))), retry=True)
    externals = {key: External(item.uri, item.digest) for key, item in found.items() if isinstance(item, ResolvedInput)}
    code, image = (settings.code, settings.trainer_image) if before is None else (before.plan.code, before.image)
    try:
        plan = make_plan(spec, externals, code)
    except PlanError as error:
        return refused(Reason.INVALID_SPEC, str(error))
    snapshot = Snapshot(plan, storage, image, spec_digest(run))
    if len(json.dumps(to_json(snapshot))) > MAX_PLAN_BYTES:
        return refused(Reason.INVALID_SPEC, f"the resolved plan exceeds {MAX_PLAN_BYTES:,} bytes; split the run")
    return snapshot


def document_of(run: RunView) -> dict[str, Any]:
    """Return the run as a file would have it. Labels and annotations play no part."""
    metadata = {"name": run.meta.name, "namespace": run.meta.namespace}
    return {"apiVersion": names.API_GROUP_VERSION, "kind": names.KIND, "metadata": metadata, "spec": dict(run.spec)}


def storage_problems(run: TrainingRun, storage: Storage, settings: Settings) -> list[Problem]:
    """Return what a laptop bears and a cluster does not: no storage, relative inputs, folders of one machine."""
    problems = []
    has_folders = is_folder(settings.storage.uri)  # whoever installs the operator so says that nodes share it
    if storage.uri is None:
        problems.append(Problem("spec.storage.uri", MISSING, "a cluster needs one", "write `s3://bucket/prefix`"))
    elif is_folder(storage.uri) and not has_folders:
        problems.append(_no_folder("spec.storage.uri", storage.uri))
    for index, stage in enumerate(run.spec.stages):
        for path, reference in stage.references():
            uri, where = reference.uri, f"spec.stages[{index}].{path}.uri"
            if uri is None:
                continue
            if "://" not in uri and not uri.startswith(("/", "~")) and storage.inputs is None:
                remedy = "give `spec.storage.inputs`, or write the whole `s3://…`"
                problems.append(Problem(where, uri, "a relative URI has nothing to be relative to here", remedy))
            elif not has_folders and is_folder(absolute(uri, storage.inputs or "")):
                problems.append(_no_folder(where, uri))
    return problems


def is_folder(uri: str | None) -> bool:
    """Tell whether a URI is a folder of one machine."""
    return uri is not None and isinstance(parse_location(uri), FolderLocation)


def _no_folder(path: str, uri: str) -> Problem:
    return Problem(path, uri, "pods do not see a folder of your machine", "copy it to S3 and write `s3://…`")


def image_problems(run: TrainingRun, settings: Settings) -> list[Problem]:
    """Return the images that the operator's settings do not allow."""
    places = [("spec.defaults.image", run.spec.defaults.image)]
    places += [(f"spec.stages[{index}].image", stage.image) for index, stage in enumerate(run.spec.stages)]
    allowed = ", ".join(settings.allowed_images or ()) or "the operator's own only"
    return [
        Problem(path, image, f"must be an allowed image ({allowed})", "use one of them, or ask who runs the operator")
        for path, image in places
        if not settings.allows_image(image)
    ]


def storage_trouble(storage: Storage) -> str:
    """Return why the storage cannot be used. Empty: it answers, or says that only the stages may read it."""
    try:
        next(iter(open_storage(storage).list(PROBE_KEY)), None)
    except AccessDenied:
        return ""
    except StoreError as error:
        return f"spec.storage.uri: {storage.uri}: {error.message}"
    return ""


def open_storage(storage: Storage) -> Store:
    """Open the store of a run. Credentials are the operator's own, found where the AWS SDK looks for them."""
    return open_store(storage.uri or "", storage.endpoint, storage.region)


def look_up(run: TrainingRun, storage: Storage) -> dict[str, ResolvedInput | StoreError]:
    """Return what lies at every external input, by `Reference.key`."""
    uris = {key: absolute(uri, storage.inputs or "") for key, uri in external_keys(run).items()}
    return find_inputs(uris, storage.endpoint, storage.region)


# -- keeping -----------------------------------------------------------------------------------------------------------


def plan_name(run: RunView) -> str:
    """Return the name of the ConfigMap that keeps a run's plan."""
    told_apart = hashlib.sha256(f"{run.meta.uid}/plan".encode()).hexdigest()[:6]
    return f"p-{run.meta.name[:40].rstrip('-.')}-{told_apart}"


def plan_config_map(run: RunView, snapshot: Snapshot) -> dict[str, Any]:
    """Return the ConfigMap that keeps a run's plan; it goes with the run."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": plan_name(run),
            "namespace": run.meta.namespace,
            "labels": {
                names.LABEL_MANAGED_BY: names.MANAGED_BY,
                names.LABEL_RUN: run.meta.name,
                names.LABEL_RUN_UID: run.meta.uid,
            },
            "ownerReferences": [owner_reference(run.meta.name, run.meta.uid)],
        },
        "data": {PLAN_KEY: json.dumps(to_json(snapshot), ensure_ascii=False)},
    }


def to_json(snapshot: Snapshot) -> dict[str, Any]:
    plan = snapshot.plan
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
        "order": list(plan.stages),
        "stages": stages,
        "storage": snapshot.storage.model_dump(mode="json", exclude_none=True),
        "image": snapshot.image,
        "spec": snapshot.spec_digest,
    }


def from_config_map(body: Raw, run: RunView) -> Snapshot | None:
    """Return the plan that is kept for a run. None: it is another run's, or damaged, and must be made anew."""
    owners = [item.get("uid") for item in body["metadata"].get("ownerReferences") or ()]
    try:
        return from_json(json.loads(body["data"][PLAN_KEY])) if run.meta.uid in owners else None
    except (KeyError, TypeError, ValueError, ValidationError):
        return None


def from_json(kept: Mapping[str, Any]) -> Snapshot:
    """Return the plan. Raises KeyError, TypeError and ValueError for what is none."""
    stages = {name: _planned(kept["stages"][name]) for name in kept["order"]}
    plan = Plan(namespace=kept["namespace"], run=kept["run"], stages=stages, code=kept["code"])
    storage = Storage.model_validate(kept["storage"])
    return Snapshot(plan, storage, str(kept["image"]), str(kept["spec"]))


def _planned(kept: Mapping[str, Any]) -> PlannedStage:
    return PlannedStage(
        stage=Stage.model_validate_json(json.dumps(kept["stage"])),
        upstream=tuple(kept["upstream"]),
        externals={key: External(uri, digest) for key, (uri, digest) in kept["externals"].items()},
    )
