"""`python -m bench [NAME …]`: measure, print a table, write `bench/results/latest.json` and `alignment.json`."""

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

TRAINING = ("throughput", "packing", "startup", "memory")
ALIGNMENT = ("ppo_speed", "generation", "reward_speed", "shared_memory")
BENCHES = (*TRAINING, *ALIGNMENT)
RESULTS = Path(__file__).parent / "results" / "latest.json"
ALIGNMENT_RESULTS = RESULTS.with_name("alignment.json")
ALIGNMENT_ALONE = "alignment"
"""Name of all benches of alignment."""


def main() -> int:
    """Run the benches; 0 when every goal is met, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    known = ", ".join((*BENCHES, ALIGNMENT_ALONE))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {known}; default: all")
    names = tuple(parser.parse_args().names) or BENCHES
    names = ALIGNMENT if names == (ALIGNMENT_ALONE,) else names
    if unknown := sorted(set(names) - set(BENCHES)):
        parser.error(f"there is no bench {', '.join(unknown)}; there are {known}")
    console = Console()
    use_all_threads()
    found: dict[str, list[Figure]] = {}
    for name in names:
        started = time.monotonic()
        package = "bench.alignment" if name in ALIGNMENT else "bench"
        found[name] = importlib.import_module(f"{package}.{name}").figures()
        console.print(f"{name}: {time.monotonic() - started:.0f} s", style="dim")
    for group, path, peer in ((TRAINING, RESULTS, "Trainer"), (ALIGNMENT, ALIGNMENT_RESULTS, "peer")):
        of_group = [figure for name in group for figure in found.get(name, ())]
        if of_group:
            console.print(table(of_group, peer))
        if set(group) <= set(found):
            write(of_group, path)
            console.print(f"written to {path}")
    return 0 if all(figure.met for figures in found.values() for figure in figures) else 1


def write(found: list[Figure], path: Path) -> None:
    """Write figures as JSON."""
    path.parent.mkdir(exist_ok=True)
    text = json.dumps([figure.as_json() for figure in found], ensure_ascii=False, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


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
