"""`python -m bench [NAME …]`: measure, print tables, write the figures of each bench that ran to its place in
`bench/results/latest.json` or `alignment.json`."""

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

TRAINING = ("throughput", "packing", "startup", "memory")
BESIDE_TRL = ("ppo_speed", "generation", "reward_speed", "shared_memory")
LEARNING = ("ppo_toy", "domains", "reward_model", "hindsight", "rlhf_example")
ALIGNMENT = (*BESIDE_TRL, *LEARNING)
BENCHES = (*TRAINING, *ALIGNMENT)
TRAINING_RESULTS = RESULTS / "latest.json"
ALIGNMENT_RESULTS = RESULTS / "alignment.json"
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
        record(name, found[name])
        console.print(f"{name}: {time.monotonic() - started:.0f} s", style="dim")
    for group, peer in ((TRAINING, "Trainer"), (ALIGNMENT, "peer")):
        of_group = [figure for name in group for figure in found.get(name, ())]
        if of_group:
            console.print(table(of_group, peer))
    return exit_code([figure for figures in found.values() for figure in figures])


def record(name: str, found: Sequence[Figure]) -> None:
    """Put the figures of a bench in the place of those of its last run."""
    group, path = (TRAINING, TRAINING_RESULTS) if name in TRAINING else (ALIGNMENT, ALIGNMENT_RESULTS)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known[name] = [figure.as_json() for figure in found]
    write_result(path, {each: known[each] for each in group if each in known})


def told(found: Sequence[Figure], peer: str = "peer") -> int:
    """Print the figures; return the exit code they ask for. For a bench that is run by its own name."""
    Console().print(table(found, peer))
    return exit_code(found)


def exit_code(found: Sequence[Figure]) -> int:
    """Return 0 where every goal is met, else 1."""
    return 0 if all(figure.met for figure in found) else 1


def use_all_threads() -> None:
    """Let both sides compute with the same number of threads, before numpy or torch count for themselves."""
    os.environ["OMP_NUM_THREADS"] = str(num_threads())


def table(found: Sequence[Figure], peer: str = "Trainer") -> Table:
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
