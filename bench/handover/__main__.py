"""`python -m bench.handover`: measure, print a table, write `bench/results/operator.json`."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from rich.console import Console

from bench.__main__ import told as show
from bench.handover.chains import NUM_HANDOVERS, Ours, Peer, Round
from bench.handover.place import prepare
from bench.measuring import RESULTS, Figure, Goal, alone, alternate, write_result

ROUNDS = 5
"""Chains of each side; every one has `NUM_HANDOVERS` hand-overs."""
MILLISECONDS = Goal("≤", 150)
WRITES = Goal("≤", 3)
READS = Goal("≤", 0)
OPERATOR_RESULTS = RESULTS / "operator.json"


def main() -> int:
    """Measure both sides in turn; 0 when every goal is met, else 1."""
    console = Console()
    with ExitStack() as stack:
        place = prepare(stack)
        ours = Ours(place)
        peer = Peer(place, ours)
        pairs = alternate(told(console, "ours", ours.run), told(console, "JobSet status", peer.run), ROUNDS)
    found = figures([mine for mine, _ in pairs], [theirs for _, theirs in pairs])
    write_result(OPERATOR_RESULTS, [figure.as_json() for figure in found])
    console.print(f"written to {OPERATOR_RESULTS}")
    return show(found, "JobSet status")


def told(console: Console, side: str, run: Callable[[int], Round]) -> Callable[[int], Round]:
    """Return `run` with a line after each round."""

    def telling(number: int) -> Round:
        done = run(number)
        median = statistics.median(done.milliseconds)
        console.print(f"round {number + 1} of {ROUNDS}, {side}: {median:.0f} ms (p50)", style="dim")
        return done

    return telling


def figures(ours: Sequence[Round], peer: Sequence[Round]) -> list[Figure]:
    """Return the figures of all rounds together."""
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
        found.append(Figure("lists of whole kinds, whatever goes on", "calls/min", whole, None, None, "–", True))
    return found


def percentile(
    name: str, ours: Sequence[float], peer: Sequence[float], percent: int, goal: Goal | None = None
) -> Figure:
    """Return a percentile of both sides; the goal is for ours. None: it is only shown."""
    mine, theirs = (statistics.quantiles(side, n=100, method="inclusive")[percent - 1] for side in (ours, peer))
    met = goal is None or goal.met_by(mine)
    return Figure(name, "ms", mine, theirs, mine / theirs, "–" if goal is None else str(goal), met)


if __name__ == "__main__":
    sys.exit(main())
