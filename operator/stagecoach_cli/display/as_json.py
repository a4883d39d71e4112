"""What commands print with `-o json`: stable names, times as seconds since the epoch, null for what is unknown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stagecoach_cli.display.reports import StageReport
from stagecoach_core.snapshot import Snapshot, StageRow


def snapshot_json(
    namespace: str, state: str, snapshot: Snapshot, warnings: Sequence[str], reports: Mapping[str, StageReport]
) -> dict[str, Any]:
    """Return a run as JSON values. `warnings`: of the run as a whole; `reports`: of its finished stages, by name."""
    return {
        "run": snapshot.run,
        "namespace": namespace,
        "state": state,
        "message": snapshot.message,
        "storage": snapshot.storage,
        "warnings": list(warnings),
        "stages": [stage_json(row, reports.get(row.name, StageReport())) for row in snapshot.rows],
    }


def stage_json(row: StageRow, report: StageReport) -> dict[str, Any]:
    """Return a stage as JSON values."""
    view, event = row.view, row.progress
    return {
        "name": row.name,
        "kind": row.kind,
        "state": view.state.value,
        "digest": view.digest,
        "uri": None if view.artifact is None else view.artifact.uri,
        "attempt": view.attempt,
        "restarts": {cause.value: count for cause, count in view.restarts.items()},
        "waitingFor": view.waiting_for,
        "message": view.message,
        "started": row.started,
        "seconds": row.seconds,
        "resumedFrom": row.resumed_from,
        "eta": row.eta,
        "progress": None if event is None else event.model_dump(mode="json", exclude={"warning"}),
        "warnings": list(report.warnings),
        "gates": [
            {"metric": gate.metric, "value": gate.value, "bound": gate.limits, "passed": gate.passed}
            for gate in report.gates
        ],
    }
