"""Gates: conditions on metrics, checked after all measurements."""

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
"""Maximum number of metrics that a message lists."""


@dataclass(frozen=True)
class GateResult:
    """A gate with the metric's value and the verdict."""

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
        """The missed condition, for a message."""
        return f"{self.gate.metric} is {self.value:.6g}, the gate requires {self.limits}"


def check_gates(gates: Sequence[Gate], metrics: Mapping[str, float]) -> list[GateResult]:
    """Check the metrics against their gates. NaN never passes.

    Raises UserError for a gate on a metric that was not measured.
    """
    require_known(gates, list(metrics))
    return [GateResult(gate, metrics[gate.metric], _passes(gate, metrics[gate.metric])) for gate in gates]


def _passes(gate: Gate, value: float) -> bool:
    above = gate.at_least is None or value >= gate.at_least
    below = gate.at_most is None or value <= gate.at_most
    return above and below and not math.isnan(value)


def require_known(gates: Sequence[Gate], names: Sequence[str]) -> None:
    """Raise UserError if a gate's metric is not in `names`; the message has the nearest name and all of them."""
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
    """Return the names of the metrics that this stage will measure; None if it has lm-eval tasks, which define their
    own."""
    if config.lm_eval:
        return None
    held_out = [f"heldOut.{source.name}.{metric}" for source in config.held_out for metric in HELD_OUT_METRICS]
    rewards = [name for task in config.rewards for name in reward_metrics(task)]
    return [*held_out, *(f"{task.name}.exactMatch" for task in config.exact_match), *rewards]
