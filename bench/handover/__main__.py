"""`python -m bench.handover`: measure, print a table and write `bench/results/operator.json`."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from rich.console import Console

from bench.__main__ import report
from bench.handover.bench_cluster import prepare
from bench.handover.chains import NUM_HANDOVERS, Ours, Peer, Round
from bench.measuring import RESULTS, Figure, Goal, alone, alternate, write_result

ROUNDS = 5
"""Chains on each side, each with `NUM_HANDOVERS` hand-overs."""
MILLISECONDS = Goal("≤", 150)
WRITES = Goal("≤", 3)
READS = Goal("≤", 0)
OPERATOR_RESULTS = RESULTS / "operator.json"


def main() -> int:
    """Measure both sides alternately; return 0 if every goal is met, else 1."""
    console = Console()
    with ExitStack() as stack:
        cluster = prepare(stack)
        ours = Ours(cluster)
        peer = Peer(cluster, ours)
        pairs = alternate(printing(console, "ours", ours.run), printing(console, "JobSet status", peer.run), ROUNDS)
    found = figures([mine for mine, _ in pairs], [theirs for _, theirs in pairs])
    write_result(OPERATOR_RESULTS, [figure.as_json() for figure in found])
    console.print(f"written to {OPERATOR_RESULTS}")
    return report(found, "JobSet status")


def printing(console: Console, side: str, run: Callable[[int], Round]) -> Callable[[int], Round]:
    """Return `run` with a line printed after each round."""

    def run_and_print(number: int) -> Round:
        done = run(number)
        median = statistics.median(done.milliseconds)
        console.print(f"round {number + 1} of {ROUNDS}, {side}: {median:.0f} ms (p50)", style="dim")
        return done

    return run_and_print


def figures(ours: Sequence[Round], peer: Sequence[Round]) -> list[Figure]:
    """Return the figures over all rounds."""
    mine = [value for done in ours for value in done.milliseconds]
    theirs = [value for done in peer for value in done.milliseconds]
    counted = [done.calls for done in ours if done.calls is not None]
    name = "last pod Succeeded to next stage's pod"
    found = [percentile(f"{name}, p50", mine, theirs, 50, MILLISECONDS), percentile(f"{name}, p95", mine, theirs, 95)]
    if counted:
        writes = [calls.writes / NUM_HANDOVERS for calls in counted]
        reads = [calls.reads / NUM_HANDOVERS for calls in counted]
        found.append(alone("writes per transition", "calls", writes, WRITES))
        found.append(alone("reads per transition", "calls", reads, READS))
        whole = 60 * sum(calls.whole_lists for calls in counted) / sum(calls.seconds for calls in counted)
        found.append(Figure("periodic lists of whole kinds", "calls/min", whole, None, None, "–", True))
    return found


def percentile(
    name: str, ours: Sequence[float], peer: Sequence[float], percent: int, goal: Goal | None = None
) -> Figure:
    """Return a percentile of both sides; the goal, if any, applies to ours."""
    mine, theirs = (statistics.quantiles(side, n=100, method="inclusive")[percent - 1] for side in (ours, peer))
    met = goal is None or goal.met_by(mine)
    return Figure(name, "ms", mine, theirs, mine / theirs, "–" if goal is None else str(goal), met)


if __name__ == "__main__":
    sys.exit(main())
