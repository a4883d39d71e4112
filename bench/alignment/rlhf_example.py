"""`python -m bench.alignment.rlhf_example [OPTION …]`: `examples/rlhf-tiny.yaml` as a user runs it, from scratch.

Measures its duration and the quality of reward model, PPO and DPO; the run's own gates must pass, too. The options of
`stagecoach run`, such as `--set`, make shorter trials possible; no result file is written then.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from bench.measuring import RESULTS, ROOT, Figure, Goal, gain, run_child, write_result
from stagecoach_api.artifacts import Manifest
from stagecoach_api.names import DEFAULT_LOCAL_ROOT

EXAMPLE = ROOT / "examples" / "rlhf-tiny.yaml"
RESULT = RESULTS / "rlhf_example.json"
SECONDS = Goal("≤", 600)
BETTER = Goal(">", 0.5)
"""Share of the questions that a model must answer better than the model it started from; a tie counts half."""


def figures() -> list[Figure]:
    """Run the example."""
    return figures_of(measure())


def measure(*options: str) -> dict[str, float]:
    """Run the example in an empty folder and write the result file: its seconds and its stages' metrics."""
    with tempfile.TemporaryDirectory() as name:
        started = time.monotonic()
        run_child(["-m", "stagecoach_cli", "run", str(EXAMPLE), *options], folder=Path(name))
        found = {"seconds": time.monotonic() - started, **metrics_in(Path(name) / DEFAULT_LOCAL_ROOT)}
    if not options:
        write_result(RESULT, found)
    return found


def metrics_in(workspace: Path) -> dict[str, float]:
    """Return the metrics of the reward model and of the comparison."""
    paths = (workspace / "store").rglob("manifest.json")
    manifests = {found.kind: found for found in (Manifest.model_validate_json(path.read_text()) for path in paths)}
    return {**manifests["rewardModel"].metrics, **manifests["evaluate"].metrics}


def figures_of(found: Mapping[str, float]) -> list[Figure]:
    """Return seconds, reward model against the longer answer, and win rates of PPO and DPO over their start."""
    accuracy, length = ([found[f"heldOut.comparisons.{name}"]] for name in ("accuracy", "lengthBaseline"))
    seconds = found["seconds"]
    shown = [
        Figure("rlhf-tiny", "s", seconds, None, None, str(SECONDS), SECONDS.met_by(seconds)),
        gain("rlhf-tiny, reward model against the longer answer", "accuracy", accuracy, length, Goal(">", 0.0)),
    ]
    for task in ("liked", "rules"):
        for rival in ("ppo", "dpo"):
            share = 1.0 - found[f"{task}.winRate.{rival}"]  # which is the fine-tuned model's
            name = f"rlhf-tiny, {rival.upper()} over SFT by `{task}`"
            shown.append(Figure(name, "win rate", share, None, None, str(BETTER), BETTER.met_by(share)))
    return shown


def main() -> int:
    """Run the example and print the goals."""
    from bench.__main__ import report

    return report(figures_of(measure(*sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(main())
