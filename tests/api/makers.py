"""Makers for tests of the API: a whole small run as a document, and edits of it."""

from __future__ import annotations

import copy
from typing import Any

import yaml

REMOVED = object()
"""Value for `edited`: take the field out."""

_DOCUMENT = """
apiVersion: stagecoach.dev/v1alpha1
kind: TrainingRun
metadata: {name: demo}
spec:
  storage: {uri: "s3://models/demo"}
  stages:
  - name: corpus
    data: {sources: [{uri: corpus/*.jsonl}], heldOutShare: 0.1}
  - name: vocabulary
    tokenizer: {train: {data: [{stage: corpus}], vocabSize: 1000}}
  - name: pretrain
    pretrain:
      architecture: {hiddenSize: 32, intermediateSize: 64, numLayers: 2, numHeads: 4, maxPositionEmbeddings: 128}
      tokenizer: {stage: vocabulary}
      data: [{stage: corpus}]
      sequenceLength: 128
      batch: {tokens: 1024}
      budget: {tokens: 10240}
      optimizer: {learningRate: 1.0e-3}
      heldOut: {sets: [{name: zh, stage: corpus, split: heldout}], everySteps: 5}
  - name: sft
    sft:
      model: {stage: pretrain}
      data: [{uri: alpaca.json, format: alpaca}]
      template: {name: alpaca}
      trainable: {lora: {rank: 4}}
      sequenceLength: 128
      batch: {samples: 8}
      optimizer: {learningRate: 1.0e-4}
  - name: score
    evaluate:
      model: {stage: sft}
      heldOut: [{name: zh, stage: corpus, split: heldout}]
      exactMatch: [{name: verse, data: {name: verse, uri: verse.json}}]
      gates: [{metric: heldOut.zh.bitsPerCharacter, atMost: 9}]
  - name: release
    after: [score]
    export: {model: {stage: sft}}
  - name: taste
    rewardModel:
      model: {stage: sft}
      data: [{uri: comparisons.json, format: comparison}]
      batch: {samples: 8}
      optimizer: {learningRate: 1.0e-5}
  - name: reinforced
    ppo:
      model: {stage: sft}
      data: [{uri: alpaca.json, format: alpaca}]
      rewards: [{name: liked, model: {stage: taste}}]
      batch: {samples: 8}
      optimizer: {learningRate: 1.0e-6}
  - name: direct
    dpo:
      model: {stage: sft}
      data: [{uri: comparisons.json, format: comparison}]
      batch: {samples: 8}
      optimizer: {learningRate: 1.0e-6}
"""


def document() -> dict[str, Any]:
    """A valid run with every kind of stage."""
    made: dict[str, Any] = yaml.safe_load(_DOCUMENT)
    return made


def document_text() -> str:
    """The same as text; `spec.storage` is on line 6."""
    return _DOCUMENT


def edited(*edits: tuple[str, Any]) -> dict[str, Any]:
    """The valid run with (path, value) edits: `stages.sft.sft.batch`, `storage.uri`, `/metadata.name`."""
    made = document()
    for path, value in edits:
        _edit(made, path, value if value is REMOVED else copy.deepcopy(value))
    return made


def _edit(made: dict[str, Any], path: str, value: Any) -> None:
    here: Any = made if path.startswith("/") else made["spec"]
    steps = path.lstrip("/").split(".")
    for step in steps[:-1]:
        here = _step(here, step)
    last: Any = int(steps[-1]) if isinstance(here, list) and steps[-1].isdigit() else steps[-1]
    if isinstance(here, list) and not isinstance(last, int):
        last = next(index for index, item in enumerate(here) if item["name"] == last)
    if value is REMOVED:
        del here[last]
    elif isinstance(here, list) and last == len(here):
        here.append(value)
    else:
        here[last] = value


def _step(here: Any, step: str) -> Any:
    if isinstance(here, list):
        return here[int(step)] if step.isdigit() else next(item for item in here if item["name"] == step)
    return here.setdefault(step, {})
