"""`python -m bench.fault_mix`: replay the faults of a large training on simulated time, and report the goodput.

The faults are those of Llama 3's pre-training: 419 unexpected interruptions in 54 days of 16,384 GPUs (The Llama 3 Herd
of Models, arXiv 2407.21783, table 5). The operator's own state machine decides what happens after each; the cluster
is simulated. Writes `bench/results/fault_mix.json`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.measuring import RESULTS, write_result
from stagecoach_api.outcomes import AttemptResult, Cause
from stagecoach_api.spec import TrainingRun
from stagecoach_core.decide import decide
from stagecoach_core.goodput import Ledger, Spent, goodput
from stagecoach_core.plan import external_uris, make_plan
from stagecoach_core.policies.ending import end_of_attempt
from stagecoach_core.values import (
    Attempt,
    AttemptState,
    External,
    Found,
    LookUp,
    Missing,
    Observed,
    Plan,
    RunState,
    Start,
    Stop,
)

GOAL = 0.97
HOUR = 3600.0
DAY = 24 * HOUR
RATE = 419 / (54 * DAY * 16_384)
"""Unexpected interruptions per second and GPU."""


@dataclass(frozen=True)
class Fault:
    """A kind of interruption."""

    count: int
    """Of the 419."""
    hangs: bool = False
    """Whether it shows as silence only."""
    node_is_lost: bool = False
    """Whether the pods of the node cannot end by themselves."""


FAULTS = {
    "faulty GPU": Fault(148),
    "GPU memory": Fault(72),
    "software bug": Fault(54),
    "network switch or cable": Fault(35, hangs=True),
    "unplanned host maintenance": Fault(32, node_is_lost=True),
    "GPU SRAM": Fault(19),
    "GPU system processor": Fault(17),
    "NIC": Fault(7, hangs=True),
    "NCCL watchdog": Fault(7),
    "silent data corruption": Fault(6),
    "GPU sensor or heat": Fault(6),
    "SSD": Fault(3),
    "power supply": Fault(3, node_is_lost=True),
    "server chassis": Fault(2, node_is_lost=True),
    "IO board": Fault(2, node_is_lost=True),
    "dependency": Fault(2),
    "CPU": Fault(2, node_is_lost=True),
    "system memory": Fault(2, node_is_lost=True),
}


@dataclass(frozen=True)
class Cluster:
    """How long things take, in seconds. Steps are seconds of training."""

    image: float = 10.0
    """From the creation of the pods until all containers run; images are on the nodes."""
    start: float = 45.0
    """Importing libraries, building the model and the first rendezvous."""
    restore: float = 30.0
    checkpoint_every: float = 240.0
    """Checkpoints are written in the background."""
    detection: float = 5.0
    """From a failed process until all pods of the gang have ended."""
    lost_node: float = 60.0 + 300.0
    """Grace period of a stopped pod that never ends, and the limit after it."""
    heartbeat: float = 5.0
    look_up: float = 0.2
    """To ask the store."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    state: RunState
    gpus: int
    ledgers: tuple[Ledger, ...]
    faults: Counter[str]
    message: str


def plan_of(name: str, gpus: int) -> Plan:
    """Return the plan of a run with one stage that trains on nodes of eight GPUs."""
    train = {
        "model": {"uri": "base"}, "data": [{"uri": "text.jsonl"}], "batch": {"tokens": 4096},
        "optimizer": {"learningRate": 1e-4}, "sequenceLength": 512,
    }  # fmt: skip
    resources = {"nodes": max(1, gpus // 8), "gpusPerNode": min(8, gpus)}
    stages = [{"name": "train", "pretrain": train, "resources": resources}]
    run = TrainingRun.model_validate({"metadata": {"name": name}, "spec": {"stages": stages}})
    externals = {key: External(f"s3://data/{uri}", f"content of {uri}") for key, uri in external_uris(run).items()}
    return make_plan(run, externals, "code")


class Simulation:
    """One run on simulated time."""

    def __init__(self, name: str, gpus: int, work: float, cluster: Cluster, chance: random.Random) -> None:
        """`work`: seconds of training that the run needs."""
        self._plan, self._gpus, self._work = plan_of(name, gpus), gpus, work
        self._cluster, self._chance = cluster, chance
        self._now = 0.0
        self._saved = 0.0
        self._attempts: list[Attempt] = []
        self._ledgers: list[Ledger] = []
        self._answers: dict[str, Found | Missing] = {}
        self._faults: Counter[str] = Counter()

    def run(self) -> Outcome:
        """Let the state machine decide, and carry out its actions, until the run has ended."""
        while True:
            observed = Observed(attempts=tuple(self._attempts), artifacts=dict(self._answers))
            decision = decide(self._plan, observed, self._now)
            if decision.state is not RunState.PROGRESSING:
                return Outcome(decision.state, self._gpus, tuple(self._ledgers), self._faults, decision.message)
            for action in decision.actions:
                if isinstance(action, LookUp):
                    self._now += self._cluster.look_up
                    self._answers[action.digest] = Missing(self._now)
                elif isinstance(action, Start):
                    self._attempt(action)
            if not decision.actions:
                if decision.look_again_at is None:
                    raise RuntimeError(f"the run waits for nothing: {decision}")
                self._now = max(self._now, decision.look_again_at)

    def _attempt(self, start: Start) -> None:
        """Simulate an attempt from its creation to its end."""
        began, cluster = self._now, self._cluster
        ledger = Ledger(began, Spent.IMAGE)
        running = began + cluster.image
        ledger = ledger.enter(running, Spent.COMPILE)
        ready = running + cluster.start
        if self._saved:
            ledger = ledger.enter(ready, Spent.RESTORE)
            ready += cluster.restore
        fails = running + self._chance.expovariate(RATE * self._gpus)
        done = ready + self._work - self._saved
        live = Attempt(start.stage, start.digest, start.number, AttemptState.RUNNING, began, running_since=running)
        if done <= fails:
            self._succeed(live, done, ledger.enter(ready, Spent.TRAINING).at(done))
            return
        if fails > ready:
            ledger = ledger.enter(ready, Spent.TRAINING).reach(ready, self._saved)
            ledger = ledger.reach(fails, self._saved + fails - ready)
            every = cluster.checkpoint_every
            self._saved = max(self._saved, every * ((self._saved + fails - ready) // every))
        self._fail(replace(live, heartbeat=max(running, fails - cluster.heartbeat)), ledger.at(fails), fails)

    def _succeed(self, attempt: Attempt, done: float, ledger: Ledger) -> None:
        self._now = done
        self._ledgers.append(ledger)
        self._attempts.append(replace(attempt, state=AttemptState.ENDED, ended=done))
        self._answers[attempt.digest] = Found(attempt.digest, "content", "s3://store/output", at=self._now)

    def _fail(self, attempt: Attempt, ledger: Ledger, failed: float) -> None:
        name = self._chance.choices(list(FAULTS), [fault.count for fault in FAULTS.values()])[0]
        fault = FAULTS[name]
        self._faults[name] += 1
        stop_cause = None
        ended = failed + self._cluster.detection
        if fault.hangs or fault.node_is_lost:  # other ranks wait for the one that is gone
            self._now, stop_cause = self._hang(attempt, failed)
            ended = self._now + self._cluster.detection
        if fault.node_is_lost:
            ended += self._cluster.lost_node
            stop_cause = Cause.INFRASTRUCTURE
        step = int(self._saved) or None
        result = AttemptResult(exit_code=-6, cause=Cause.INFRASTRUCTURE, message=name, last_step=step)
        end = end_of_attempt(stop_cause, None if stop_cause else result, self._attempts, attempt.number)
        self._ledgers.append(ledger.end(ended, self._saved, hung=stop_cause is not None))
        self._attempts.append(
            replace(
                attempt, state=AttemptState.ENDED, ended=ended, cause=end.cause, message=end.message, last_step=step
            )
        )
        self._now = ended

    def _hang(self, attempt: Attempt, failed: float) -> tuple[float, Cause]:
        """Return when the state machine stops a silent attempt, and the cause that it charges."""
        now = failed
        while True:
            decision = decide(self._plan, Observed((*self._attempts, attempt), dict(self._answers)), now)
            stops = [action for action in decision.actions if isinstance(action, Stop)]
            if stops:
                return now, stops[0].cause
            if decision.look_again_at is None:
                raise RuntimeError("nothing ends a silent attempt")
            now = decision.look_again_at


SIZES = (8, 16, 64, 128, 512, 1024, 4096, 16_384)


def replay(number: int) -> list[Outcome]:
    """Replay `number` runs of 8 to 16,384 GPUs; each trains for 54 days, as Llama 3 did."""
    outcomes = []
    for index in range(number):
        chance = random.Random(f"0/{index}")  # noqa: S311 - a simulation
        gpus = SIZES[index % len(SIZES)]
        outcomes.append(Simulation(f"run-{index}", gpus, 54 * DAY, Cluster(), chance).run())
    return outcomes


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the figures that the bench stores."""
    shares = [share for item in outcomes if (share := goodput(item.ledgers)) is not None]
    large = [goodput(item.ledgers) or 0.0 for item in outcomes if item.gpus == max(SIZES)]
    spent: Counter[str] = Counter()
    for item in outcomes:
        for ledger in item.ledgers:
            spent.update({what.value: seconds * item.gpus for what, seconds in ledger.seconds.items()})
    whole = sum(spent.values())
    return {
        "runs": len(outcomes),
        "complete": sum(item.state is RunState.COMPLETE for item in outcomes),
        "faults": sum(sum(item.faults.values()) for item in outcomes),
        "goodput": round(spent[Spent.TRAINING] / whole, 4),
        "lowestGoodput": round(min(shares), 4),
        "goodputAt16384Gpus": round(statistics.median(large), 4) if large else None,
        "shareOfGpuTime": {what: round(seconds / whole, 5) for what, seconds in spent.most_common()},
        "goal": GOAL,
    }


def main() -> int:
    """Replay the runs and store the figures; return 0 if no run failed and the goodput reaches the goal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    outcomes = replay(parser.parse_args().runs)
    found = figures(outcomes)
    write_result(RESULTS / "fault_mix.json", found)
    for name, value in found.items():
        print(f"{name:<20} {value}")
    for item in outcomes:
        if item.state is not RunState.COMPLETE:
            print(f"{item.gpus} GPUs: {item.state.value}: {item.message}", file=sys.stderr)
    return 0 if found["complete"] == len(outcomes) and found["goodput"] >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
