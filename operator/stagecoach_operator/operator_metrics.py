"""The metrics of the running operator that its parts count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

from stagecoach_operator.certificate_files import CertificateFiles
from stagecoach_operator.guarded_listener import GuardedListener
from stagecoach_operator.kube import ApiServer
from stagecoach_operator.lease import Lease
from stagecoach_operator.metrics import OTHER, Family, Values, gpu_seconds, runs_by_state, stages_by_state
from stagecoach_operator.object_cache import Cache
from stagecoach_operator.progress_server import ProgressServer
from stagecoach_operator.settings import Settings
from stagecoach_operator.storage_access import AWS, FOLDER, normalised
from stagecoach_operator.store_lanes import Lane, StoreLanes
from stagecoach_operator.worker import Workers


class Parts(Protocol):
    """The parts of the operator that count something."""

    settings: Settings
    cache: Cache
    kube: ApiServer
    lease: Lease
    lanes: StoreLanes
    workers: Workers
    progress: ProgressServer
    listener: GuardedListener
    certificates: CertificateFiles


def families_of(parts: Parts) -> tuple[Family, ...]:
    """Return the metrics of all parts."""
    return (*_of_work(parts), *_of_calls(parts), *_of_stores(parts), *_of_reports(parts))


def _of_work(parts: Parts) -> tuple[Family, ...]:
    runs = parts.cache.runs
    return (
        Family("stagecoach_leader", "Whether this replica is the active one.", lambda: one(parts.lease.held)),
        Family("stagecoach_runs", "Runs by state.", lambda: runs_by_state(runs.values()), ("state",)),
        Family("stagecoach_stages", "Stages by state.", lambda: stages_by_state(runs.values()), ("state",)),
        Family(
            "stagecoach_gpu_seconds",
            "GPU-seconds of the ended attempts of existing runs.",
            lambda: gpu_seconds(runs.values()),
            ("namespace",),
        ),
        Family(
            "stagecoach_watched_objects",
            "JobSets, pods and Workloads in the cache.",
            lambda: one(len(parts.cache.children)),
        ),
        Family(
            "stagecoach_oldest_turn_seconds",
            "Time since the beginning of the longest reconciliation that is running.",
            lambda: one(parts.workers.longest_running_seconds()),
        ),
    )


def _of_calls(parts: Parts) -> tuple[Family, ...]:
    calls = parts.kube.calls
    return (
        Family(
            "stagecoach_api_calls",
            "Requests to the API server.",
            lambda: as_floats(calls.counts),
            ("verb", "resource"),
            is_counter=True,
        ),
        Family(
            "stagecoach_api_answers",
            "Responses of the API server by status code; `error` without a response.",
            lambda: as_floats(calls.answers),
            ("method", "code"),
            is_counter=True,
        ),
    )


def _of_stores(parts: Parts) -> tuple[Family, ...]:
    known = known_endpoints(parts.settings)

    def lanes() -> Iterable[tuple[str, Lane]]:
        for (endpoint, _), lane in parts.lanes.lanes.items():
            yield (endpoint or AWS if endpoint in known else OTHER), lane

    def summed(values: Iterable[tuple[str, float]]) -> Values:
        sums: Counter[str] = Counter()
        for name, value in values:
            sums[name] += value  # type: ignore[assignment]
        return {(name,): float(value) for name, value in sums.items()}

    def family(name: str, text: str, read: str, is_counter: bool) -> Family:
        values = lambda: summed((name, float(getattr(lane, read))) for name, lane in lanes())  # noqa: E731
        return Family(f"stagecoach_store_{name}", text, values, ("endpoint",), is_counter)

    return (
        family("calls", "Calls to an endpoint of S3.", "calls", is_counter=True),
        family("errors", "Calls to an endpoint of S3 that failed.", "errors", is_counter=True),
        family("waiting", "Calls that wait for a thread of the endpoint's lane.", "waiting", is_counter=False),
        family("paused", "Lanes of an endpoint that is left alone, because it did not answer.", "is_paused", False),
    )


def _of_reports(parts: Parts) -> tuple[Family, ...]:
    progress, listener, certificates = parts.progress, parts.listener, parts.certificates
    return (
        Family(
            "stagecoach_reports",
            "Progress reports by the status code of the answer.",
            lambda: {(str(code),): float(count) for code, count in progress.answers.items()},
            ("code",),
            is_counter=True,
        ),
        Family(
            "stagecoach_report_values_dropped",
            "Values of reports that fit no status.",
            lambda: by_name(progress.dropped),
            ("field",),
            is_counter=True,
        ),
        Family(
            "stagecoach_progress_connections",
            "Open connections of the progress server.",
            lambda: one(len(listener.connections)),
        ),
        Family(
            "stagecoach_progress_connections_refused",
            "Connections that were refused or closed, by the limit that they exceeded.",
            lambda: by_name(listener.refused),
            ("limit",),
            is_counter=True,
        ),
        Family(
            "stagecoach_certificate_reloads",
            "Certificates taken over from their files, and tries that failed.",
            lambda: {("taken over",): certificates.reloads, ("failed",): certificates.failures},
            ("result",),
            is_counter=True,
        ),
    )


def known_endpoints(settings: Settings) -> frozenset[str]:
    """Return the normalised endpoints that the settings name: others share one label."""
    allowed = (normalised(entry.endpoint) for entry in settings.allowed_storage)
    return frozenset({normalised(settings.storage.endpoint), FOLDER, *allowed})


def one(value: float) -> Values:
    """Return the values of a metric without labels."""
    return {(): float(value)}


def by_name(counts: Mapping[str, int]) -> Values:
    return {(name,): float(count) for name, count in counts.items()}


def as_floats(counts: Mapping[tuple[str, str], int]) -> Values:
    return {labels: float(count) for labels, count in counts.items()}
