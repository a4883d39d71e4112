"""DeepSpeed at one rank with everything offloaded gives the plain engine's results, whatever is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stagecoach_api.training import Sharding, Trainable
from stagecoach_trainer.loop.checkpoint import CheckpointManager
from stagecoach_trainer.loop.job import TrainingJob
from stagecoach_trainer.loop.loop import train
from stagecoach_trainer.models.trainable import choose_trainable
from stagecoach_trainer.runtime.checkpoint_paths import CheckpointId
from stagecoach_trainer.runtime.context import World
from stagecoach_trainer.runtime.distributed import process_group
from tests.trainer.architectures import tiny
from tests.trainer.loop.makers import VOCABULARY, RandomPlan, context, equal_weights, tiny_model, training, weights

OFFLOADED = Sharding(zero=3, offload_optimizer="cpu", offload_parameters="cpu")
NEW_ROWS = range(190, 197)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of one rank, which DeepSpeed requires."""
    with process_group(World(), alone=True):
        yield


def chosen(trainable: dict[str, Any], tie: bool = False, model: Any = None) -> Any:
    model = model or tiny_model(tie=tie)
    return choose_trainable(model, Trainable.model_validate(trainable), NEW_ROWS, seed=1).model


MODELS: dict[str, Callable[[], Any]] = {
    "everything": lambda: chosen({"full": {}}),
    "everything, head tied": lambda: chosen({"full": {}}, tie=True),
    "new rows only": lambda: chosen({"embeddings": {"rows": "new"}}),
    "adapters and new rows": lambda: chosen({"lora": {"rank": 2, "newRows": True}}),
    "adapters and whole layers": lambda: chosen({"lora": {"rank": 2, "modulesToSave": ["embed_tokens", "lm_head"]}}),
    "adapters on fused experts": lambda: chosen(
        {"lora": {"rank": 2, "experts": "adapt"}}, model=tiny("qwen3_moe", vocab_size=VOCABULARY)
    ),
    "an adapter on the head": lambda: chosen({"lora": {"rank": 2, "targets": ["q_proj", "lm_head"]}}),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_zero_3_trains_like_the_plain_engine(tmp_path: Path, make: Callable[[], Any]) -> None:
    plain, sharded = make(), make()
    expected = train(TrainingJob(plain, training(), RandomPlan(num_steps=3)), context(tmp_path / "plain"))
    job = TrainingJob(sharded, training(sharding=OFFLOADED), RandomPlan(num_steps=3))
    got = train(job, context(tmp_path / "sharded"))
    assert [point["loss"] for point in got.history] == pytest.approx(
        [point["loss"] for point in expected.history], abs=1e-6
    )
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(sharded)[name], tensor, atol=2e-6, rtol=0, msg=name)
    assert all(type(item) is torch.nn.Parameter and not hasattr(item, "ds_id") for item in sharded.parameters())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_training_resumes_bit_for_bit(tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = training(
        precision="bf16",
        sharding=Sharding(zero=stage, offload_optimizer="cpu"),
        checkpoints={"every_steps": 2},
        attention_dropout=0.1,
    )
    whole, resumed = tiny_model(), tiny_model()
    first = train(TrainingJob(whole, config, RandomPlan()), context(tmp_path))
    found: list[CheckpointId | None] = []
    find = CheckpointManager.find_newest

    def find_and_note(self: CheckpointManager) -> CheckpointId | None:
        found.append(find(self))
        return found[-1]

    monkeypatch.setattr(CheckpointManager, "find_newest", find_and_note)
    again = train(TrainingJob(resumed, config, RandomPlan()), context(tmp_path))
    assert found == [CheckpointId(0, 4)]
    assert again == first
    assert equal_weights(weights(resumed), weights(whole))
