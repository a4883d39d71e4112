"""The reports of `evaluate`: `report.json` for programs and `report.md` for people.

Equal measurements give equal bytes: the files are part of the artifact, whose digest covers them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagecoach_api.artifacts import REPORT, REPORT_TEXT
from stagecoach_trainer.evaluation.gates import GateResult


@dataclass
class EvaluationReport:
    """The stage's results so far."""

    model: str
    """Key of the model."""

    metrics: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, dict[str, int]] = field(default_factory=dict)
    """Token and character counts of each set."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    exact_match: dict[str, dict[str, Any]] = field(default_factory=dict)
    rewards: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Comparisons by reward: each model's figures, and example answers of all models."""

    lm_eval: dict[str, dict[str, Any]] = field(default_factory=dict)
    gates: list[GateResult] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def write(self, output: Path, logs: Path) -> None:
        """Write both files to `output`, and copies to `logs`, which is preserved if a gate is missed."""
        write_json(self._as_json(), output / REPORT)
        (output / REPORT_TEXT).write_text(self._as_text(), encoding="utf-8")
        logs.mkdir(parents=True, exist_ok=True)
        for name in (REPORT, REPORT_TEXT):
            shutil.copyfile(output / name, logs / name)

    def _as_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "metrics": self.metrics,
            "heldOut": self.held_out,
            "exactMatch": self.exact_match,
            "rewards": self.rewards,
            "lmEval": self.lm_eval,
            "samples": self.samples,
            "gates": [
                {
                    "metric": result.gate.metric,
                    "value": result.value,
                    "atLeast": result.gate.at_least,
                    "atMost": result.gate.at_most,
                    "onFailure": result.gate.on_failure.value,
                    "passed": result.passed,
                }
                for result in self.gates
            ],
            "warnings": self.warnings,
        }

    def _as_text(self) -> str:
        parts = [f"# Evaluation\n\nModel: `{self.model}`\n"]
        parts += [f"> {warning}\n" for warning in self.warnings]
        parts.append(table(("metric", "value"), [(name, figure(value)) for name, value in self.metrics.items()]))
        if self.gates:
            rows = [
                (result.gate.metric, figure(result.value), result.limits, self._verdict(result))
                for result in self.gates
            ]
            parts.append("## Gates\n\n" + table(("metric", "value", "limit", "verdict"), rows))
        for name, task in self.exact_match.items():
            title = f"## {name}: {task['right']} of {task['questions']} right\n\n"
            cases = [(case["asked"], case["reference"], case["answer"]) for case in task["cases"]]
            parts.append(title + table(("asked", "reference", "answer"), cases))
        parts += [rewards_text(name, task) for name, task in self.rewards.items()]
        if self.samples:
            parts.append("## Samples\n\n" + samples_text(self.samples))
        return "\n".join(parts)

    @staticmethod
    def _verdict(result: GateResult) -> str:
        return "passed" if result.passed else f"missed ({result.gate.on_failure.value})"


def write_json(value: Any, path: Path) -> None:
    """Write JSON indented by two spaces; NaN and infinity become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; line breaks and bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell_text(cell) for cell in line) + " |\n" for line in lines)


def cell_text(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\r", "").replace("\n", "<br>")


def figure(value: float) -> str:
    """Return a number with six significant digits."""
    return f"{value:.6g}"


def rewards_text(name: str, task: Mapping[str, Any]) -> str:
    """Return a comparison by reward: a table of the models, then a table of their answers with rewards."""
    models: Mapping[str, Any] = task["models"]
    terms = list(next(iter(models.values()))["terms"])
    rows = [
        (model, *map(figure, (found["reward"], *found["terms"].values(), found["meanTokens"], found["ended"])))
        for model, found in models.items()
    ]
    means = table(("answers of", "reward", *terms, "tokens", "ended"), rows)
    cases = [
        [case["prompt"], *(f"{case['answers'][model]} ({figure(case['rewards'][model])})" for model in models)]
        for case in task["cases"]
    ]
    return f"## {name}: rewards of {task['prompts']} prompts\n\n{means}\n{table(('prompt', *models), cases)}"


def samples_text(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return prompts and answers as a Markdown table."""
    return table(("prompt", "answer"), [(sample["prompt"], sample["answer"]) for sample in samples])
