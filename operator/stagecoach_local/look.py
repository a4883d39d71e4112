"""A look at what a run will use on this machine, before anything runs: its inputs, and the folder of its artifacts.

The records and models are looked at by the trainer, in one process of its own: this package does not import it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stagecoach_api.fields import FieldPath
from stagecoach_api.problems import MISSING, Problem
from stagecoach_api.reading.loading import LoadedRun
from stagecoach_api.store import StoreError
from stagecoach_api.stores.base import FolderLocation, parse_location
from stagecoach_api.stores.lookup import absolute
from stagecoach_core.plan import external_uris
from stagecoach_local.inputs import input_root

LOOKER = (sys.executable, "-m", "stagecoach_trainer.look")
"""Command of the trainer that looks into inputs."""

TIMEOUT_SECONDS = 60.0
"""A look takes about a second; on a slow network file system it is given up after this."""


@dataclass(frozen=True)
class Look:
    """What was found, and what was not looked into."""

    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()
    unseen: tuple[str, ...] = ()
    """One sentence each."""

    def __add__(self, other: Look) -> Look:
        return Look(self.problems + other.problems, self.warnings + other.warnings, self.unseen + other.unseen)


def look_into_inputs(loaded: LoadedRun, missing: frozenset[str] = frozenset()) -> Look:
    """Look into the first records and the models of a run that are on this machine.

    `missing`: inputs that do not exist or cannot be reached, by `Reference.key`.
    """
    root = input_root(loaded.run, loaded.folder)
    found = {uri: absolute(uri, root) for key, uri in external_uris(loaded.run).items() if key not in missing}
    local = {uri: place for uri, place in found.items() if not place.startswith("s3:")}
    unseen = tuple(f"{place} is remote" for uri, place in found.items() if uri not in local)
    if not local:
        return Look(unseen=unseen)
    if find_spec("stagecoach_trainer") is None:
        reason = "the trainer is not installed (`pip install 'stagecoach[trainer]'`), so no record and no model"
        return Look(unseen=(*unseen, reason))
    findings = _ask_the_trainer(loaded, local)
    if isinstance(findings, str):
        return Look(unseen=(*unseen, findings))
    located = [(_problem(loaded, finding), bool(finding["fatal"])) for finding in findings]
    return Look(
        tuple(problem for problem, fatal in located if fatal),
        tuple(problem for problem, fatal in located if not fatal),
        unseen,
    )


def _ask_the_trainer(loaded: LoadedRun, local: Mapping[str, str]) -> list[dict[str, Any]] | str:
    """Return what the trainer found, or why it could not look."""
    stages = [
        {"kind": stage.kind, "config": stage.config.model_dump(mode="json", by_alias=True)}
        for stage in loaded.run.spec.stages
    ]
    asked = json.dumps({"stages": stages, "local": local})
    try:
        done = subprocess.run(
            LOOKER, input=asked, capture_output=True, text=True, encoding="utf-8", timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"looking into local inputs took more than {TIMEOUT_SECONDS:.0f} s"
    if done.returncode != 0:
        # Not an error of the run: its stages report what this failed at, with more room to say it.
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"the trainer could not look into local inputs: {last}"
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def _problem(loaded: LoadedRun, finding: Mapping[str, Any]) -> Problem:
    path: FieldPath = ("spec", "stages", finding["stage"], *finding["path"])
    value = MISSING if finding["value"] is None else finding["value"]
    return loaded.problem(path, value, finding["rule"], finding["remedy"])


# -- storage -----------------------------------------------------------------------------------------------------------


def look_at_storage(loaded: LoadedRun, uri: str, option: str | None = None) -> Look:
    """Look whether artifacts can be written to a folder.

    `uri`: absolute, of the store. `option`: value of `--storage`, if it gave the URI.
    """
    location = parse_location(uri)
    if not isinstance(location, FolderLocation):
        return Look(unseen=(f"{uri} is remote",))

    def problem(rule: str, remedy: str) -> Problem:
        if option is not None:
            return Problem("", option, rule, remedy, None, "--storage")
        return loaded.problem(("spec", "storage", "uri"), str(location.path), rule, remedy)

    found = _folder_fault(location.path)
    if found is not None:
        return Look(problems=(problem(*found),))
    free, needed = shutil.disk_usage(_existing(location.path)).free, largest_model_bytes(loaded)
    if free < needed:
        rule = f"has {free / 1e9:,.1f} GB free, and one copy of the largest model takes {needed / 1e9:,.1f} GB"
        return Look(warnings=(problem(rule, "free some space, or choose another folder with `--storage`"),))
    return Look()


def _folder_fault(path: Path) -> tuple[str, str] | None:
    """Return (rule, remedy) if no file can be written below `path`, which need not exist yet."""
    there = _existing(path)
    if not there.is_dir():
        return f"must be a folder, and {there} is a file", "name a folder, which is created if there is none"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"cannot be written: no permission for {there}", "change its mode or owner, or name another folder"
    if there != path:
        return None
    try:  # permissions do not show a read-only or full file system
        with tempfile.TemporaryFile(dir=path, prefix=".stagecoach-"):
            return None
    except OSError as error:
        return f"cannot be written: {error.strerror}", "free some space or mount it writable, or name another folder"


def _existing(path: Path) -> Path:
    """Return `path`, or the nearest part of it that exists."""
    return next(part for part in (path, *path.parents) if part.exists())


def largest_model_bytes(loaded: LoadedRun) -> int:
    """Return the size of the largest model on this machine that the run starts from; 0 if there is none."""
    root = input_root(loaded.run, loaded.folder)
    return max((_weights_bytes(folder) for folder in _local_models(loaded, root)), default=0)


def _local_models(loaded: LoadedRun, root: str) -> Iterator[Path]:
    for uri in external_uris(loaded.run).values():
        try:
            location = parse_location(absolute(uri, root))
        except StoreError:
            continue  # reported as an input
        if isinstance(location, FolderLocation) and location.path.is_dir():
            yield location.path


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
