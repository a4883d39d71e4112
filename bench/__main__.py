"""`python -m bench [NAME …]`: measure, print a table, write `bench/results/latest.json`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.measuring import Figure, num_threads

BENCHES = ("throughput", "packing", "startup", "memory")
RESULTS = Path(__file__).parent / "results" / "latest.json"


def main() -> int:
    """Run the benches; 0 when every goal is met, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(BENCHES)}; default: all")
    names = parser.parse_args().names or BENCHES
    if unknown := sorted(set(names) - set(BENCHES)):
        parser.error(f"there is no bench {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    console = Console()
    use_all_threads()
    found: list[Figure] = []
    for name in names:
        started = time.monotonic()
        found += importlib.import_module(f"bench.{name}").figures()
        console.print(f"{name}: {time.monotonic() - started:.0f} s", style="dim")
    console.print(table(found))
    if tuple(names) == BENCHES:
        RESULTS.parent.mkdir(exist_ok=True)
        text = json.dumps([figure.as_json() for figure in found], ensure_ascii=False, indent=1)
        RESULTS.write_text(text + "\n", encoding="utf-8")
        console.print(f"written to {RESULTS}")
    return 0 if all(figure.met for figure in found) else 1


def use_all_threads() -> None:
    """Let both sides compute with the same number of threads, before numpy or torch count for themselves."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads())


def table(found: list[Figure], peer: str = "Trainer") -> Table:
    """Return the figures for people. `peer`: what ours is measured beside."""
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
