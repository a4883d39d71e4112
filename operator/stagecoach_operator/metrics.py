"""Prometheus metrics of the operator, in a registry of its own. Every label has few values, whatever users do.

Figures that the parts count anyway are read when they are scraped. Only what is counted nowhere else is counted here.
"""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from stagecoach_api.status import ConditionStatus, ConditionType, TrainingRunStatus
from stagecoach_operator.object_views import RunView

MAX_NAMESPACES = 200
"""Namespaces with a series of their own: those with the highest figures."""
OTHER = "other"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
WAIT_SECONDS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 24 * 3600.0)
RUN_STATES = (
    ConditionType.FAILED,
    ConditionType.COMPLETE,
    ConditionType.SUSPENDED,
    ConditionType.PROGRESSING,
)
"""States of a run; the first whose condition is true is the run's."""
REJECTED, PENDING = "Rejected", "Pending"

Labels = tuple[str, ...]
Values = Mapping[Labels, float]


@dataclass(frozen=True)
class Family:
    """A metric that is read when it is scraped."""

    name: str
    help: str
    read: Callable[[], Values]
    labels: Labels = ()
    is_counter: bool = False

    def collect(self) -> Metric:
        kind = CounterMetricFamily if self.is_counter else GaugeMetricFamily
        family = kind(self.name, self.help, labels=self.labels)
        for labels, value in sorted(self.read().items()):
            family.add_metric(labels, value)
        return family


@dataclass(eq=False)
class Families:
    """Collects the metrics that are read; `prometheus_client` calls it."""

    families: list[Family] = field(default_factory=list)

    def collect(self) -> Iterator[Metric]:
        for family in self.families:
            yield family.collect()


class Metrics:
    """The metrics that are counted here, and the registry of all."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        self.turns = Histogram(
            "stagecoach_turn_seconds", "Time of reconciling a run once.", buckets=SECONDS, registry=registry
        )
        self.turn_errors = Counter(
            "stagecoach_turn_errors", "Reconciliations that failed and are repeated.", ["error"], registry=registry
        )
        self.loop_lag = Histogram(
            "stagecoach_loop_lag_seconds", "Lag of the event loop.", buckets=SECONDS, registry=registry
        )
        self.attempts_ended = Counter(
            "stagecoach_attempts_ended", "Attempts that ended, by cause.", ["cause"], registry=registry
        )
        self.start_wait = Histogram(
            "stagecoach_attempt_start_wait_seconds",
            "Time from the creation of an attempt until all of its pods run: queue, scheduling, images.",
            buckets=WAIT_SECONDS,
            registry=registry,
        )
        self._read = Families()
        registry.register(self._read)

    def add(self, *families: Family) -> None:
        """Add metrics that are read when they are scraped."""
        self._read.families += families

    def observe_turn(self, seconds: float, error: str) -> None:
        """Count a reconciliation. `error`: the type of the error that ended it, or empty."""
        self.turns.observe(seconds)
        if error:
            self.turn_errors.labels(error).inc()

    def observe_status(self, before: TrainingRunStatus, after: TrainingRunStatus) -> None:
        """Count what a status that was written contains in addition to the one before it."""
        known = {(stage.name, attempt.number): attempt for stage in before.stages for attempt in stage.attempts}
        for stage in after.stages:
            for attempt in stage.attempts:
                old = known.get((stage.name, attempt.number))
                if attempt.ended is not None and (old is None or old.ended is None):
                    self.attempts_ended.labels("none" if attempt.cause is None else attempt.cause.value).inc()
                if attempt.running_since is not None and (old is None or old.running_since is None):
                    wait = (attempt.running_since - attempt.started).total_seconds()
                    self.start_wait.observe(max(0.0, wait))


# -- figures of the runs -----------------------------------------------------------------------------------------------


def run_state(status: TrainingRunStatus) -> str:
    """Return the state of a run in one word."""
    states = {item.type: item.status for item in status.conditions}
    if states.get(ConditionType.ACCEPTED) is ConditionStatus.FALSE:
        return REJECTED
    found = (kind.value for kind in RUN_STATES if states.get(kind) is ConditionStatus.TRUE)
    return next(found, PENDING)


def runs_by_state(runs: Iterable[RunView]) -> Values:
    counts = Count((run_state(run.status),) for run in runs)
    names = (*(kind.value for kind in RUN_STATES), REJECTED, PENDING)
    return {(name,): counts[name,] for name in names}


def stages_by_state(runs: Iterable[RunView]) -> Values:
    return Count((stage.state.value,) for run in runs for stage in run.status.stages)


def gpu_seconds(runs: Iterable[RunView]) -> Values:
    """Return the GPU-seconds of the ended attempts of existing runs, by namespace."""
    sums: Count[str] = Count()
    for run in runs:
        sums[run.meta.namespace] += sum(stage.gpu_seconds for stage in run.status.stages)
    return bounded({name: float(value) for name, value in sums.items() if value})


def bounded(values: Mapping[str, float], limit: int = MAX_NAMESPACES) -> Values:
    """Return the highest values under their own label, and the sum of the others under `other`."""
    ordered = sorted(values.items(), key=lambda item: -item[1])
    found: dict[Labels, float] = {(name,): value for name, value in ordered[:limit]}
    rest = sum(value for _, value in ordered[limit:])
    return found | ({(OTHER,): rest + found.get((OTHER,), 0.0)} if rest else {})
