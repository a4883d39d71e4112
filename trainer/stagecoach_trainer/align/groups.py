"""Groups of answers laid out as rows: all answers of the first group, then those of the second, and so on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stagecoach_trainer.samples.groups import Group, TokenSequence


def sequences_of(groups: Sequence[Group]) -> list[TokenSequence]:
    """Return the answers of all groups, in row order."""
    return [sequence for group in groups for sequence in group.sequences]


def pair_rows(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Return the rows of each pair's better and of its worse answer, int64 [P] each."""
    firsts = np.cumsum([0, *(len(group.sequences) for group in groups)])[:-1]
    better = [group.better + first for group, first in zip(groups, firsts, strict=True)]
    worse = [group.worse + first for group, first in zip(groups, firsts, strict=True)]
    return _joined(better), _joined(worse)


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *parts]))
