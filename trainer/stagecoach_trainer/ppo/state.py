"""PPO's state between updates, in addition to weights and random states."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from stagecoach_trainer.engine.engine import MASTER, EngineState
from stagecoach_trainer.ppo.guards import Watch

POLICY, CRITIC, AVERAGE = "policy:", "critic:", "average:"
"""Prefixes of parameter names in a checkpoint."""


@dataclass
class PpoProgress:
    """Counters and coefficients of the stage."""

    kl_coefficient: float
    watch: Watch = field(default_factory=Watch)
    rollbacks: int = 0
    critic_steps: int = 0
    critic_loss_scale: float = 1.0
    critic_good_steps: int = 0
    rewards: dict[str, Any] = field(default_factory=dict)
    """State of the reward's terms, such as requests spent and weights fitted."""

    @property
    def rate_factor(self) -> float:
        """Factor of the learning rates: halved by each rollback."""
        return 0.5**self.rollbacks

    def record(self, critic: EngineState, rewards: Mapping[str, Any]) -> None:
        """Take over state for which the checkpoint format has no field of its own."""
        self.critic_steps = critic.num_steps
        self.critic_loss_scale, self.critic_good_steps = critic.loss_scale, critic.good_steps
        self.rewards = copy.deepcopy(dict(rewards))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PpoProgress:
        return cls(**(dict(value) | {"watch": Watch(**value["watch"])}))


def join_states(policy: EngineState, critic: EngineState, average: Mapping[str, Tensor]) -> EngineState:
    """Return the tensors of both engines and the average of the policy's weights as one state, with the policy's
    counters."""
    tensors = {_named(key, POLICY): tensor for key, tensor in policy.tensors.items()}
    tensors |= {_named(key, CRITIC): tensor for key, tensor in critic.tensors.items()}
    tensors |= {f"{MASTER}{AVERAGE}{name}": tensor for name, tensor in average.items()}
    return EngineState(tensors, policy.num_steps, policy.loss_scale, policy.good_steps)


def split_state(state: EngineState, progress: PpoProgress) -> tuple[EngineState, EngineState, dict[str, Tensor]]:
    """Return what `join_states` joined."""
    policy = EngineState(_part(state.tensors, POLICY), state.num_steps, state.loss_scale, state.good_steps)
    critic = EngineState(
        _part(state.tensors, CRITIC), progress.critic_steps, progress.critic_loss_scale, progress.critic_good_steps
    )
    average = {key.removeprefix(MASTER): tensor for key, tensor in _part(state.tensors, AVERAGE).items()}
    return policy, critic, average


def _named(key: str, side: str) -> str:
    kind, _, name = key.partition("/")
    return f"{kind}/{side}{name}"


def _part(tensors: Mapping[str, Tensor], side: str) -> dict[str, Tensor]:
    found = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if name.startswith(side):
            found[f"{kind}/{name.removeprefix(side)}"] = tensor
    return found
