"""From a run file to a plan: what `run`, `plan`, `validate` and `render` have in common."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagecoach_api.artifacts import Manifest
from stagecoach_api.code import code_identity
from stagecoach_api.problems import InvalidRun, Problem
from stagecoach_api.reading.loading import LoadedRun, load_run
from stagecoach_api.spec import TrainingRun
from stagecoach_api.store import AccessDenied, Store, StoreError, Unreachable, open_store
from stagecoach_api.stores.lookup import absolute, find_manifest, input_problems
from stagecoach_core.artifacts import look_up_result
from stagecoach_core.decide import decide
from stagecoach_core.plan import PlanError, external_keys, make_plan
from stagecoach_core.values import Decision, Found, LookUp, Missing, Observed, Plan
from stagecoach_local.inputs import HashMemory, input_root, look_up, unknown_external
from stagecoach_local.workspace import Workspace

HASHES_FILE = "hashes.json"


@dataclass(frozen=True)
class Prepared:
    """A run, checked and planned, and where its artifacts lie."""

    loaded: LoadedRun
    plan: Plan
    store: Store
    unreachable: dict[str, StoreError]
    """Inputs that could not be looked at, by `Reference.key`: digests that rest on them mean nothing."""

    @property
    def run(self) -> TrainingRun:
        return self.loaded.run


def prepare(
    file: Path,
    workspace: Workspace,
    overrides: Sequence[str] = (),
    storage: str | None = None,
    tolerant: bool = False,
) -> Prepared:
    """Load, check and plan a run.

    `storage`: where artifacts lie instead of `spec.storage.uri`, relative to the working directory. `tolerant`: inputs
    that cannot be reached do not stop the planning; those that are missing do. Raises InvalidRun with all problems,
    StoreError, ModuleNotFoundError where no trainer is installed.
    """
    loaded = load_run(file, overrides)
    memory = HashMemory(workspace.cache / HASHES_FILE)
    lookup = look_up(loaded.run, loaded.folder, memory.sha256)
    unreachable = {key: error for key, error in lookup.failures.items() if tolerant and _may_exist(error)}
    missing = {key: error for key, error in lookup.failures.items() if key not in unreachable}
    if missing:
        raise InvalidRun(missing_inputs(loaded, missing))
    with contextlib.suppress(OSError):  # a plan can be looked at where nothing can be written
        workspace.prepare()
        memory.save()
    root = input_root(loaded.run, loaded.folder)
    unknown = {key: unknown_external(absolute(key.removeprefix("uri:"), root)) for key in unreachable}
    plan = make_plan(without_images(loaded.run), {**lookup.found, **unknown}, code_identity())
    return Prepared(loaded, plan, open_run_store(loaded, workspace, storage), unreachable)


def _may_exist(error: StoreError) -> bool:
    """Whether the store did not say that the input is not there."""
    return isinstance(error, AccessDenied | Unreachable)


def check(file: Path, overrides: Sequence[str] = (), inputs: bool = True) -> LoadedRun:
    """Load a run and check that its graph is one and that its local inputs exist; their bytes are not read.

    `inputs`: whether inputs are looked for on this machine. Raises InvalidRun with all problems.
    """
    loaded = load_run(file, overrides)
    root = input_root(loaded.run, loaded.folder)

    def is_local(uri: str) -> bool:
        return inputs and not absolute(uri, root).startswith("s3:")

    lookup = look_up(loaded.run, loaded.folder, hash_file=lambda path: "", wanted=is_local)
    problems = missing_inputs(loaded, lookup.failures)
    try:
        make_plan(loaded.run, {key: unknown_external(uri) for key, uri in external_keys(loaded.run).items()}, code="")
    except PlanError as error:
        problems += [Problem("", loaded.run.metadata.name, text, "correct the stages") for text in error.problems]
    if problems:
        raise InvalidRun(problems)
    return loaded


def without_images(run: TrainingRun) -> TrainingRun:
    """Return the run without trainer images: on this machine the installed trainer does the work, and is the code that
    stage digests name."""
    stages = tuple(stage.model_copy(update={"image": None}) for stage in run.spec.stages)
    defaults = run.spec.defaults.model_copy(update={"image": None})
    return run.model_copy(update={"spec": run.spec.model_copy(update={"stages": stages, "defaults": defaults})})


def open_run_store(loaded: LoadedRun, workspace: Workspace, storage: str | None) -> Store:
    """Open the store a run's artifacts lie in: `storage`, else the run's own, else the workspace's."""
    given = loaded.run.spec.storage
    uri = storage
    if uri is None and given.uri is not None:
        uri = absolute(given.uri, str(loaded.folder))
    return open_store(str(workspace.default_storage) if uri is None else uri, given.endpoint, given.region)


def missing_inputs(loaded: LoadedRun, failures: Mapping[str, StoreError]) -> list[Problem]:
    """Return a problem for every place of the run that names an input which was not found."""
    root = input_root(loaded.run, loaded.folder)
    return input_problems(loaded.run, failures, f"relative inputs are looked for in {root}", str(loaded.source or ""))


def look_into_cache(
    prepared: Prepared, selected: frozenset[str] | None = None, forced: frozenset[str] = frozenset()
) -> tuple[Decision, dict[str, Manifest]]:
    """Return what the core would decide now, everything that the store knows looked up, and the manifests found."""
    answers: dict[str, Found | Missing] = {}
    manifests: dict[str, Manifest] = {}
    while True:
        now = time.time()
        observed = Observed(artifacts=answers, selected=selected, forced=forced, forced_since=now, since=now)
        decision = decide(prepared.plan, observed, now)
        asked = [action.digest for action in decision.actions if isinstance(action, LookUp)]
        if not asked:
            return decision, manifests
        for digest in asked:
            manifest = find_manifest(prepared.store, digest)
            answers[digest] = look_up_result(digest, manifest, prepared.store.uri, now)
            if manifest is not None:
                manifests[digest] = manifest


def without_answers(prepared: Prepared) -> Decision:
    """Return what the core knows of a run whose storage cannot be asked."""
    now = time.time()
    return decide(prepared.plan, Observed(), now)
