"""AdamW over fp32 master weights, and the gradient norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from stagecoach_api.training import Optimizer

MATRIX_DIMENSIONS = 2

EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"


def parameter_groups(masters: Mapping[str, Tensor], weight_decay: float) -> list[dict[str, object]]:
    """Split parameters into those with weight decay (matrices) and those without (norms, biases)."""
    matrices = [master for master in masters.values() if master.ndim >= MATRIX_DIMENSIONS]
    vectors = [master for master in masters.values() if master.ndim < MATRIX_DIMENSIONS]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(masters: Mapping[str, Tensor], config: Optimizer, fused: bool = True) -> torch.optim.AdamW:
    """Return the optimiser; its learning rate is set before each step. Moments have the masters' dtype, fp32."""
    return torch.optim.AdamW(
        parameter_groups(masters, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=fused,
        foreach=None if fused else False,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def set_moments(
    optimizer: torch.optim.Optimizer, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, num_steps: int
) -> None:
    """Restore AdamW's state of a parameter after `num_steps` steps."""
    optimizer.state[master] = {
        "step": torch.tensor(float(num_steps), dtype=torch.float32, device=master.device),
        EXP_AVG: exp_avg.to(master.device, torch.float32).clone(),
        EXP_AVG_SQ: exp_avg_sq.to(master.device, torch.float32).clone(),
    }


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm over all gradients, a scalar on their device."""
    norms = torch._foreach_norm(list(gradients))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)))
    return norm


def clip_(gradients: Sequence[Tensor], norm: Tensor, largest: float) -> None:
    """Scale gradients down in place so that their global norm is at most `largest`; 0 makes them 0.

    On a CPU, gradients below the limit are not touched. On a GPU, reading the factor would wait for the stream.
    """
    # As in `torch.nn.utils.clip_grad_norm_`: the small constant avoids a division by 0.
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    if factor.device.type == "cpu" and float(factor) == 1.0:
        return
    torch._foreach_mul_(list(gradients), factor)
