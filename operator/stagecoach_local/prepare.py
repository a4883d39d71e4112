"""From a run file to a plan: the steps that `run`, `plan`, `validate` and `render` share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagecoach_api.artifacts import Manifest
from stagecoach_api.code import code_identity
from stagecoach_api.problems import InvalidRun, Problem
from stagecoach_api.reading.loading import LoadedRun, in_order, load_run
from stagecoach_api.spec import TrainingRun
from stagecoach_api.store import AccessDenied, Store, StoreError, Unreachable, open_store
from stagecoach_api.stores.lookup import absolute, find_manifest, input_problems
from stagecoach_core.artifacts import look_up_result
from stagecoach_core.decide import decide
from stagecoach_core.plan import PlanError, external_uris, make_plan
from stagecoach_core.values import Decision, Found, LookUp, Missing, Observed, Plan
from stagecoach_local.inputs import HashCache, find_external_inputs, input_root, unknown_external
from stagecoach_local.workspace import Workspace

HASHES_FILE = "hashes.json"


@dataclass(frozen=True)
class PreparedRun:
    """A run, checked and planned, and the store of its artifacts."""

    loaded: LoadedRun
    plan: Plan
    store: Store
    unreachable: dict[str, StoreError]
    """Inputs that could not be reached, by `Reference.key`; digests that depend on them are arbitrary."""

    @property
    def run(self) -> TrainingRun:
        return self.loaded.run


def prepare(
    file: Path,
    workspace: Workspace,
    overrides: Sequence[str] = (),
    storage: str | None = None,
    tolerant: bool = False,
) -> PreparedRun:
    """Load, check and plan a run.

    `storage`: URI of the artifact store instead of `spec.storage.uri`, relative to the working directory. `tolerant`:
    plan even if inputs cannot be reached; missing inputs are an error in any case. Raises InvalidRun with all problems,
    StoreError, and ModuleNotFoundError if no trainer is installed.
    """
    loaded = load_run(file, overrides)
    hashes = HashCache(workspace.cache / HASHES_FILE)
    lookup = find_external_inputs(loaded.run, loaded.folder, hashes.sha256)
    unreachable = {key: error for key, error in lookup.failures.items() if tolerant and _may_exist(error)}
    missing = {key: error for key, error in lookup.failures.items() if key not in unreachable}
    if missing:
        raise InvalidRun(missing_inputs(loaded, missing))
    with contextlib.suppress(OSError):  # `plan` also works in a read-only folder
        workspace.prepare()
        hashes.save()
    root = input_root(loaded.run, loaded.folder)
    unknown = {key: unknown_external(absolute(key.removeprefix("uri:"), root)) for key in unreachable}
    plan = make_plan(without_images(loaded.run), {**lookup.found, **unknown}, code_identity())
    return PreparedRun(loaded, plan, open_run_store(loaded, workspace, storage), unreachable)


def _may_exist(error: StoreError) -> bool:
    """Whether the input may exist although it could not be read."""
    return isinstance(error, AccessDenied | Unreachable)


def check(file: Path, overrides: Sequence[str] = (), inputs: bool = True) -> LoadedRun:
    """Load a run, check that its graph is valid and that its local inputs exist; the inputs are not read.

    `inputs`: whether to look for inputs on this machine. Raises InvalidRun with all problems.
    """
    loaded = load_run(file, overrides)
    root = input_root(loaded.run, loaded.folder)

    def is_local(uri: str) -> bool:
        return inputs and not absolute(uri, root).startswith("s3:")

    lookup = find_external_inputs(loaded.run, loaded.folder, hash_file=lambda path: "", wanted=is_local)
    problems = missing_inputs(loaded, lookup.failures)
    # Only the graph is checked, so placeholders for the digests of inputs and code are enough.
    try:
        make_plan(loaded.run, {key: unknown_external(uri) for key, uri in external_uris(loaded.run).items()}, code="")
    except PlanError as error:
        problems += [Problem("", loaded.run.metadata.name, text, "correct the stages") for text in error.problems]
    if problems:
        raise InvalidRun(problems)
    return loaded


def without_images(run: TrainingRun) -> TrainingRun:
    """Return the run without trainer images: on this machine the installed trainer runs the stages, and stage digests
    contain its code identity."""
    stages = tuple(stage.model_copy(update={"image": None}) for stage in run.spec.stages)
    defaults = run.spec.defaults.model_copy(update={"image": None})
    return run.model_copy(update={"spec": run.spec.model_copy(update={"stages": stages, "defaults": defaults})})


def open_run_store(loaded: LoadedRun, workspace: Workspace, storage: str | None) -> Store:
    """Open the store of a run's artifacts: `storage`, else the run's own, else the workspace's."""
    settings = loaded.run.spec.storage
    uri = storage
    if uri is None and settings.uri is not None:
        uri = absolute(settings.uri, str(loaded.folder))
    return open_store(str(workspace.default_storage) if uri is None else uri, settings.endpoint, settings.region)


def missing_inputs(loaded: LoadedRun, failures: Mapping[str, StoreError]) -> list[Problem]:
    """Return a problem for every field of the run that names an input that was not found."""
    root = input_root(loaded.run, loaded.folder)
    found = input_problems(loaded.run, failures, f"relative inputs are looked for in {root}")
    return in_order(loaded.located(path, problem) for path, problem in found)


def check_cache(
    prepared: PreparedRun, selected: frozenset[str] | None = None, forced: frozenset[str] = frozenset()
) -> tuple[Decision, dict[str, Manifest]]:
    """Look up every stage in the store; return what the core would decide now, and the manifests found."""
    artifacts: dict[str, Found | Missing] = {}
    manifests: dict[str, Manifest] = {}
    while True:
        now = time.time()
        observed = Observed(artifacts=artifacts, selected=selected, forced=forced, forced_since=now, since=now)
        decision = decide(prepared.plan, observed, now)
        digests = [action.digest for action in decision.actions if isinstance(action, LookUp)]
        if not digests:
            return decision, manifests
        for digest in digests:
            manifest = find_manifest(prepared.store, digest)
            artifacts[digest] = look_up_result(digest, manifest, prepared.store.uri, now)
            if manifest is not None:
                manifests[digest] = manifest


def decide_without_store(prepared: PreparedRun) -> Decision:
    """Return what the core decides about a run whose store cannot be reached."""
    now = time.time()
    return decide(prepared.plan, Observed(), now)
