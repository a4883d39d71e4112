"""From a run file to a plan: the steps that `run`, `plan`, `validate` and `render` share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from stagecoach_core.values import Claimed, Decision, Found, LookUp, Missing, Observed, Plan
from stagecoach_local.inputs import HashCache, find_external_inputs, input_root, unknown_external
from stagecoach_local.look import Look, look_at_storage, look_into_inputs
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
    # A folder that cannot be written would otherwise be found at the end of the first stage.
    storage_problems = () if tolerant else check_storage(loaded, workspace, storage).problems
    if missing or storage_problems:
        raise InvalidRun([*storage_problems, *missing_inputs(loaded, missing)])
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


def check(file: Path, overrides: Sequence[str] = ()) -> LoadedRun:
    """Load a run and check that its graph is valid; inputs are not looked at. Raises InvalidRun with all problems."""
    loaded = load_run(file, overrides)
    problems = graph_problems(loaded)
    if problems:
        raise InvalidRun(problems)
    return loaded


def check_on_this_machine(
    file: Path, workspace: Workspace, overrides: Sequence[str] = (), storage: str | None = None
) -> tuple[LoadedRun, Look]:
    """Load a run, check it, and look into its local inputs and at its storage.

    Returns the run and everything that was found, its problems in the order of the file. `storage`: as for `prepare`.
    Raises InvalidRun if the file itself is not valid.
    """
    loaded = load_run(file, overrides)
    root = input_root(loaded.run, loaded.folder)

    def is_local(uri: str) -> bool:
        return not absolute(uri, root).startswith("s3:")

    lookup = find_external_inputs(loaded.run, loaded.folder, hash_file=lambda path: "", wanted=is_local)
    look = look_around(loaded, workspace, storage, frozenset(lookup.failures))
    problems = [*missing_inputs(loaded, lookup.failures), *graph_problems(loaded), *look.problems]
    return loaded, replace(look, problems=tuple(in_order(problems)))


def look_around(loaded: LoadedRun, workspace: Workspace, storage: str | None, missing: frozenset[str]) -> Look:
    """Look into a run's local inputs and at its storage. `missing`: inputs that cannot be read, by `Reference.key`."""
    return look_into_inputs(loaded, missing) + check_storage(loaded, workspace, storage)


def check_storage(loaded: LoadedRun, workspace: Workspace, storage: str | None) -> Look:
    """Look whether artifacts can be stored where the run is set to."""
    return look_at_storage(loaded, open_run_store(loaded, workspace, storage).uri, storage)


def graph_problems(loaded: LoadedRun) -> list[Problem]:
    """Return what is wrong with the graph of stages."""
    # Only the graph is checked, so placeholders for the digests of inputs and code are enough.
    try:
        make_plan(loaded.run, {key: unknown_external(uri) for key, uri in external_uris(loaded.run).items()}, code="")
    except PlanError as error:
        return [Problem("", loaded.run.metadata.name, text, "correct the stages") for text in error.problems]
    return []


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
    artifacts: dict[str, Found | Missing | Claimed] = {}
    manifests: dict[str, Manifest] = {}
    while True:
        now = time.time()
        observed = Observed(artifacts=artifacts, selected=selected, forced=dict.fromkeys(forced, 1))
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
