"""Gates: conditions on the metrics, looked at when everything is measured."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stagecoach_api.kinds.evaluate import EvaluateStage, Gate, GateFailure
from stagecoach_trainer.evaluation.reward_comparison import reward_metrics
from stagecoach_trainer.runtime.errors import UserError

HELD_OUT_METRICS = ("loss", "perplexity", "bitsPerCharacter", "perplexityPerCharacter", "tokensPerCharacter")
MAX_LISTED = 60


@dataclass(frozen=True)
class GateResult:
    """How a metric stands to its limits."""

    gate: Gate
    value: float
    passed: bool

    @property
    def stops(self) -> bool:
        return not self.passed and self.gate.on_failure is GateFailure.STOP

    @property
    def limits(self) -> str:
        """The condition, such as `≥ 0.8`."""
        parts = [
            f"{sign} {limit:g}"
            for sign, limit in (("≥", self.gate.at_least), ("≤", self.gate.at_most))
            if limit is not None
        ]
        return " and ".join(parts)

    @property
    def sentence(self) -> str:
        """What was missed, for a message."""
        return f"{self.gate.metric} is {self.value:.6g}, the gate asks for {self.limits}"


def check_gates(gates: Sequence[Gate], metrics: Mapping[str, float]) -> list[GateResult]:
    """Hold the metrics against their gates; a value that is no number never passes.

    Raises UserError for a gate on a metric that was not measured.
    """
    require_known(gates, list(metrics))
    return [GateResult(gate, metrics[gate.metric], _passes(gate, metrics[gate.metric])) for gate in gates]


def _passes(gate: Gate, value: float) -> bool:
    above = gate.at_least is None or value >= gate.at_least
    below = gate.at_most is None or value <= gate.at_most
    return above and below and not math.isnan(value)


def require_known(gates: Sequence[Gate], names: Sequence[str]) -> None:
    """Raise UserError, with the nearest name and all of them, where a gate names a metric that is not in `names`."""
    for index, gate in enumerate(gates):
        if gate.metric in names:
            continue
        near = difflib.get_close_matches(gate.metric, names, n=1, cutoff=0.0)
        guess = f"; did you mean `{near[0]}`?" if near else ""
        listed = ", ".join(sorted(names)[:MAX_LISTED]) or "none at all"
        raise UserError(
            f"gates[{index}].metric: `{gate.metric}` is not measured by this stage{guess} It measures: {listed}"
        )


def metrics_to_come(config: EvaluateStage) -> list[str] | None:
    """Return the names this stage will measure; None where lm-eval decides, whose tasks name their own."""
    if config.lm_eval:
        return None
    held_out = [f"heldOut.{source.name}.{metric}" for source in config.held_out for metric in HELD_OUT_METRICS]
    rewards = [name for task in config.rewards for name in reward_metrics(task)]
    return [*held_out, *(f"{task.name}.exactMatch" for task in config.exact_match), *rewards]
