"""Whole manifests, compared byte by byte with `tests/core/manifests/golden/`.

After an intended change, `make generate` rewrites them, and so does
STAGECOACH_GOLDEN=write python -m pytest tests/core/manifests/test_manifests_golden.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from stagecoach_cli.rendered import as_yaml
from stagecoach_core.manifests.configmap import config_map
from stagecoach_core.manifests.jobset import job_set
from stagecoach_core.manifests.settings import ManifestSettings
from stagecoach_core.manifests.stage_attempt import StageAttempt
from tests.core.makers import data_stage, sft_stage
from tests.core.manifests.makers import A100, REPORTING, make_attempt
from tests.trainer.rewards.makers import evaluate_stage, feedback_term

GOLDEN = Path(__file__).parent / "golden"

KEY = {"secret": "judge-key"}
CASES: dict[str, tuple[StageAttempt, ManifestSettings]] = {
    "one-pod": (
        make_attempt(
            stage=data_stage("corpus"),
            storage={"uri": "file:///artifacts"},
            pods={
                "volumes": [
                    {"name": "artifacts", "mountPath": "/artifacts", "claimName": "artifacts", "readOnly": False}
                ]
            },
        ),
        ManifestSettings(),
    ),
    "two-pods-queued": (
        make_attempt(
            number=2,
            run="chinese-alpaca-tiny",
            resources={"nodes": 2, "cpu": "1", "memory": "2Gi"},
            queue={"name": "research"},
            storage={
                "uri": "s3://models/tiny",
                "endpoint": "http://s3.example.com",
                "region": "us-east-1",
                "credentials": {"secretName": "s3-access"},
            },
        ),
        REPORTING,
    ),
    "judged-by-endpoint": (
        make_attempt(stage=evaluate_stage(feedback_term(**KEY), {"name": "short", "expression": "1"})),
        ManifestSettings(),
    ),
    "a100-gang": (
        make_attempt(
            stage=sft_stage("instruction-tuning"),
            run="chinese-llama-alpaca-7b",
            image="registry.example.com/research/trainer@sha256:" + "b" * 64,
            resources=A100,
            queue={"name": "research", "priorityClass": "high", "requiredTopology": "cloud.example.com/rack"},
            pods={
                "nodeSelector": {"pool": "train"},
                "tolerations": [{"key": "reserved", "value": "research", "effect": "NoSchedule"}],
                "fabric": [{"name": "NCCL_IB_HCA", "value": "mlx5"}],
                "imagePullSecrets": ["registry"],
                "serviceAccount": "trainer",
                "priorityClass": "research",
            },
        ),
        REPORTING.model_copy(update={"work_size_limit": "2Ti"}),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_manifests_are_the_golden_ones(name: str) -> None:
    attempt, settings = CASES[name]
    path = GOLDEN / f"{name}.yaml"
    made = [config_map(attempt, settings), job_set(attempt, settings)]
    text = as_yaml(made)
    if os.environ.get("STAGECOACH_GOLDEN") == "write":
        path.write_text(text, encoding="utf-8")
    assert list(yaml.safe_load_all(text)) == made
    assert text == path.read_text(encoding="utf-8"), "the manifests changed; if that is meant, `make generate`"


def test_there_is_no_golden_file_without_a_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(CASES)
