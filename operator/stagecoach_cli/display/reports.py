"""The reports of finished stages: warnings, gates and samples, read from `report.json` in their artifacts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagecoach_api.artifacts import REPORT, Manifest
from stagecoach_api.store import NotFound, Store, StoreError
from stagecoach_api.stores.lookup import read_manifest


@dataclass(frozen=True)
class GateLine:
    """A gate with the value measured."""

    metric: str
    value: float | None
    """None for NaN."""
    limits: str
    """The condition, such as `≥ 0.8`."""
    passed: bool
    stops: bool
    """Whether missing it fails the stage."""

    @property
    def verdict(self) -> str:
        if self.passed:
            return "passed"
        return "missed" if self.stops else "missed, the run continues"


@dataclass(frozen=True)
class StageReport:
    """The parts of a stage's report that people have to see."""

    warnings: tuple[str, ...] = ()
    gates: tuple[GateLine, ...] = ()
    samples: tuple[tuple[str, str], ...] = ()
    """Prompts and answers."""


def read_reports(store: Store, manifests: Mapping[str, Manifest]) -> dict[str, StageReport]:
    """Return the reports of the stages whose artifact has one, by stage name. A report that cannot be read is empty."""
    return {
        name: _read(store, manifest)
        for name, manifest in manifests.items()
        if REPORT in {item.path for item in manifest.objects}
    }


def find_reports(store: Store, digests: Mapping[str, str]) -> dict[str, StageReport]:
    """Return the reports of artifacts, given by stage digest. Raises StoreError if the store cannot be read."""
    found = {}
    for name, digest in digests.items():
        with contextlib.suppress(NotFound):
            found[name] = parse_report(store.read(f"{read_manifest(store, digest).folder}/{REPORT}"))
    return found


def _read(store: Store, manifest: Manifest) -> StageReport:
    try:
        return parse_report(store.read(f"{manifest.folder}/{REPORT}"))
    except StoreError:
        return StageReport()


def read_report_file(path: Path) -> StageReport:
    """Return the report that an attempt has left in its folder; an empty one if there is none."""
    try:
        return parse_report(path.read_bytes())
    except OSError:
        return StageReport()


def parse_report(data: bytes) -> StageReport:
    """Parse `report.json`; what is missing or has another form is left out."""
    try:
        report = json.loads(data)
    except ValueError:
        return StageReport()
    if not isinstance(report, dict):
        return StageReport()
    return StageReport(
        warnings=tuple(str(item) for item in _list(report, "warnings")),
        gates=tuple(_gate(item) for item in _list(report, "gates") if isinstance(item, dict)),
        samples=tuple(
            (str(item.get("prompt", "")), str(item.get("answer", "")))
            for item in _list(report, "samples")
            if isinstance(item, dict)
        ),
    )


def _list(report: Mapping[str, Any], name: str) -> list[Any]:
    found = report.get(name)
    return found if isinstance(found, list) else []


def _gate(item: Mapping[str, Any]) -> GateLine:
    limits = [
        f"{sign} {item[name]:g}"
        for sign, name in (("≥", "atLeast"), ("≤", "atMost"))
        if isinstance(item.get(name), int | float)
    ]
    value = item.get("value")
    return GateLine(
        metric=str(item.get("metric", "")),
        value=value if isinstance(value, int | float) else None,
        limits=" and ".join(limits),
        passed=item.get("passed") is True,
        stops=item.get("onFailure") == "stop",
    )
