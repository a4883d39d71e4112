"""How the ranks and threads of a stage are fitted to one machine."""

from __future__ import annotations

from typing import Any

import pytest

from stagecoach_api.spec import Stage
from stagecoach_local.machine import Machine, admits, num_ranks, num_threads, this_machine
from tests.cli.makers import data_stage, evaluate_stage, pretrain_stage


def stage(document: dict[str, Any], **resources: Any) -> Stage:
    return Stage.model_validate(document | {"resources": resources})


TRAINING = pretrain_stage("base", "words", "one")


@pytest.mark.parametrize(
    ("document", "resources", "machine", "nproc", "ranks"),
    [
        pytest.param(TRAINING, {}, Machine(8), None, 1, id="one rank unless more are requested"),
        pytest.param(TRAINING, {"ranksPerNode": 2}, Machine(8), None, 2, id="CPU ranks as requested"),
        pytest.param(
            TRAINING, {"nodes": 2, "ranksPerNode": 2}, Machine(8), None, 4, id="all nodes' ranks on one machine"
        ),
        pytest.param(TRAINING, {"ranksPerNode": 16}, Machine(2), None, 2, id="never more CPU ranks than cores"),
        pytest.param(TRAINING, {"nodes": 2, "gpusPerNode": 8}, Machine(2), None, 1, id="GPUs on a machine without any"),
        pytest.param(
            TRAINING, {"nodes": 2, "gpusPerNode": 8}, Machine(64, gpus=4), None, 4, id="at most the GPUs of the machine"
        ),
        pytest.param(TRAINING, {"gpusPerNode": 8}, Machine(2), 3, 3, id="--nproc takes precedence"),
        pytest.param(
            data_stage("one"), {"nodes": 2, "ranksPerNode": 4}, Machine(8), 2, 1, id="a data stage has one rank"
        ),
        pytest.param(
            evaluate_stage("e", "m", "d"), {"gpusPerNode": 8}, Machine(8), 2, 1, id="an evaluation has one rank"
        ),
    ],
)
def test_ranks(
    document: dict[str, Any], resources: dict[str, Any], machine: Machine, nproc: int | None, ranks: int
) -> None:
    assert num_ranks(stage(document, **resources), machine, nproc) == ranks


def test_threads_are_a_share_of_the_cores_and_at_least_one() -> None:
    cases = ((2, 1), (6, 2), (7, 2), (2, 4))
    assert [num_threads(stage(TRAINING), Machine(cores), ranks) for cores, ranks in cases] == [2, 3, 3, 1]


@pytest.mark.parametrize(("cpu", "threads"), [("1", 1), ("4", 4), ("96", 8), ("1500m", 1), ("500m", 1), ("1k", 8)])
def test_a_stage_that_requests_fewer_cpus_gets_fewer_threads(cpu: str, threads: int) -> None:
    assert num_threads(stage(TRAINING, cpu=cpu), Machine(8), 1) == threads


def test_ranks_of_several_pods_have_at_most_their_pods_threads() -> None:
    gang = stage(TRAINING, nodes=2, ranksPerNode=2, cpu="4")
    assert num_threads(gang, Machine(16), 4) == 2
    assert num_threads(gang, Machine(4), 4) == 1


@pytest.mark.parametrize(
    ("machine", "kind", "running", "admitted"),
    [
        (Machine(2), "pretrain", ["data", "tokenizer"], True),
        (Machine(2), "export", ["evaluate"], False),
        (Machine(8), "export", ["evaluate"], True),
        (Machine(64, gpus=8), "export", ["evaluate"], False),
        (Machine(2), "data", ["pretrain", "data"], True),
        (Machine(2), "data", ["pretrain", "data", "tokenizer"], False),
    ],
)
def test_admission(machine: Machine, kind: str, running: list[str], admitted: bool) -> None:
    assert admits(machine, kind, running) is admitted


def test_this_machine_has_at_least_one_core() -> None:
    assert this_machine().cores >= 1
