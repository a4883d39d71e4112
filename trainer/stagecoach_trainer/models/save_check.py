"""What a training stage will write is tried before its first step: the adapter's files, and room for checkpoints.

Vocabulary, configurations and the names of whole weights are tried by `shipping.rehearse`, before the data is read.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from stagecoach_api.model_folders import ADAPTER_CONFIG, UNNAMED_BASE
from stagecoach_api.training import Checkpoints
from stagecoach_trainer.loop.checkpoint import DEFAULT_CHECKPOINTS
from stagecoach_trainer.models.save import adapter_config, write_card, write_json
from stagecoach_trainer.models.shipping import adapter_card
from stagecoach_trainer.models.starting_point import StartingPoint
from stagecoach_trainer.models.trainable import TrainableModel
from stagecoach_trainer.runtime.checkpoint_paths import checkpoints_folder, complete_checkpoints
from stagecoach_trainer.runtime.context import StageContext
from stagecoach_trainer.runtime.errors import UserError

STATE_BYTES = 12
"""Bytes of a checkpoint for each trained parameter: the master and two moments, in fp32."""

WEIGHT_BYTES = 4


@dataclass(frozen=True)
class TrainingLength:
    """How much a stage trains, which determines the size of its checkpoints and their number."""

    checkpoints: Checkpoints
    num_steps: int
    num_trained: int
    """Trained parameters of all models of the stage."""

    @property
    def most_checkpoints(self) -> int:
        """The most checkpoints that are kept at a time."""
        every = self.checkpoints.every_steps or max(1, -(-self.num_steps // DEFAULT_CHECKPOINTS))
        interval = self.checkpoints.keep_every_steps
        # An old checkpoint is deleted once a new one is complete, so there is one more for a while.
        kept = self.checkpoints.keep_last + 1 + (self.num_steps // interval if interval else 0)
        return min(kept, -(-self.num_steps // every))


def check_saving(context: StageContext, start: StartingPoint, trained: TrainableModel, length: TrainingLength) -> None:
    """Try to write what this stage saves besides its weights' bytes, and compare free disk space with what it needs.

    Rank 0 does it. Raises UserError if the adapter cannot be saved, or the disk is too small.
    """
    if not context.world.is_main:
        return
    if trained.adapter:
        _write_adapter_files(context, start, trained)
    _require_room(context, trained, length)


def _write_adapter_files(context: StageContext, start: StartingPoint, trained: TrainableModel) -> None:
    from peft import get_peft_model_state_dict

    if not get_peft_model_state_dict(trained.model, save_embedding_layers=False):
        raise UserError("the adapter is empty: it has weights for no layer; check `trainable.lora.targets`")
    with tempfile.TemporaryDirectory() as folder:
        write_json(adapter_config(trained.model, UNNAMED_BASE), Path(folder) / ADAPTER_CONFIG)
        write_card(adapter_card(context, start), Path(folder))


def _require_room(context: StageContext, trained: TrainableModel, length: TrainingLength) -> None:
    """Raise UserError if the disk lacks room for the checkpoints that are kept and, if it is on the same disk, the
    output."""
    folder = checkpoints_folder(context.store, context.cache, context.resolved.digest)
    disk = next(path for path in (folder, *folder.parents) if path.is_dir())
    count = max(0, length.most_checkpoints - len(complete_checkpoints(folder)))
    needed = count * STATE_BYTES * length.num_trained
    what = f"{count} checkpoints of {length.num_trained:,} trained parameters"
    if disk.stat().st_dev == context.work.stat().st_dev:
        sizes = (item.numel() for item in trained.model.parameters())
        needed += WEIGHT_BYTES * (length.num_trained if trained.adapter else sum(sizes))
        what += " and the trained model"
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise UserError(
            f"{disk}: {what} need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; give the stage more "
            "storage, or lower `checkpoints.keepLast`"
        )
