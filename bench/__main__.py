"""`python -m bench [NAME …]`: run benches and print tables of their figures.

The figures of each bench that ran replace its previous ones in `bench/results/latest.json` or `alignment.json`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench.measuring import RESULTS, Figure, num_threads, write_result

TRAINING = ("throughput", "neighbours", "packing", "startup", "memory")
AGAINST_TRL = ("ppo_speed", "generation", "reward_speed", "shared_memory")
LEARNING = ("ppo_toy", "domains", "reward_model", "hindsight", "rlhf_example")
ALIGNMENT = (*AGAINST_TRL, *LEARNING)
BENCHES = (*TRAINING, *ALIGNMENT)
TRAINING_RESULTS = RESULTS / "latest.json"
ALIGNMENT_RESULTS = RESULTS / "alignment.json"
ALIGNMENT_GROUP = "alignment"
"""Name that selects all benches of alignment."""


def main() -> int:
    """Run the benches; return 0 if every goal is met, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    known = ", ".join((*BENCHES, ALIGNMENT_GROUP))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {known}; default: all")
    names = tuple(parser.parse_args().names) or BENCHES
    names = ALIGNMENT if names == (ALIGNMENT_GROUP,) else names
    if unknown := sorted(set(names) - set(BENCHES)):
        parser.error(f"unknown benches: {', '.join(unknown)}; choose from {known}")
    console = Console()
    use_all_threads()
    found: dict[str, list[Figure]] = {}
    for name in names:
        started = time.monotonic()
        package = "bench.alignment" if name in ALIGNMENT else "bench"
        found[name] = importlib.import_module(f"{package}.{name}").figures()
        record(name, found[name])
        console.print(f"{name}: {time.monotonic() - started:.0f} s", style="dim")
    for group, peer in ((TRAINING, "Trainer"), (ALIGNMENT, "peer")):
        of_group = [figure for name in group for figure in found.get(name, ())]
        if of_group:
            console.print(table(of_group, peer))
    return exit_code([figure for figures in found.values() for figure in figures])


def record(name: str, found: Sequence[Figure]) -> None:
    """Replace a bench's stored figures."""
    group, path = (TRAINING, TRAINING_RESULTS) if name in TRAINING else (ALIGNMENT, ALIGNMENT_RESULTS)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known[name] = [figure.as_json() for figure in found]
    write_result(path, {each: known[each] for each in group if each in known})


def report(found: Sequence[Figure], peer: str = "peer") -> int:
    """Print the figures of a bench that runs as a program of its own; return its exit code."""
    Console().print(table(found, peer))
    return exit_code(found)


def exit_code(found: Sequence[Figure]) -> int:
    """Return 0 if every goal is met, else 1."""
    return 0 if all(figure.met for figure in found) else 1


def use_all_threads() -> None:
    """Give both sides the same number of threads; numpy and torch read it when they are imported."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads())


def table(found: Sequence[Figure], peer: str = "Trainer") -> Table:
    """Return a table of the figures. `peer`: title of the column of the other side."""
    shown = Table("what", "unit", "ours", peer, "ratio", "goal", "")
    for figure in found:
        theirs, ratio = _number(figure.peer), _number(figure.ratio)
        mark = "[green]met[/]" if figure.met else "[red]missed[/]"
        shown.add_row(figure.name, figure.unit, _number(figure.ours), theirs, ratio, figure.goal, mark)
    return shown


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())
