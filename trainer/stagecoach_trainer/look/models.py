"""Local models: what their configuration, their vocabulary and the headers of their weights show."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stagecoach_api.fields import FieldPath, walk_values
from stagecoach_api.model_folders import ADAPTER_CONFIG, CONFIG, VOCABULARIES, folder_problems
from stagecoach_api.references import ArtifactType, RecordSource, Reference
from stagecoach_api.stage_kind import StageConfig, StageKind
from stagecoach_api.stores.base import FolderLocation, parse_location
from stagecoach_api.training import LoraTraining, TextTraining, Training
from stagecoach_trainer.look.finding import Finding
from stagecoach_trainer.models.safety import check_adapter_folder, check_model_folder, read_json
from stagecoach_trainer.runtime.errors import UserError

ALL_LINEAR = "all-linear"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def look_at_models(kind: StageKind, config: StageConfig, local: Mapping[str, str]) -> Iterator[Finding]:
    """Yield what is wrong with the models and vocabularies of a stage that are on this machine.

    Args: as `look_at_records`.
    """
    for path, value in walk_values(config):
        if not isinstance(value, Reference) or isinstance(value, RecordSource) or value.uri not in local:
            continue
        location = parse_location(local[str(value.uri)])
        if isinstance(location, FolderLocation):
            place = (kind.name, *path, "uri")
            found = list(_folder(place, value, location.path, kind.readable_at(path), config))
            yield from found
            if path == ("model",) and not found:
                yield from _starting_point(kind.name, config, value, location.path)


def _folder(
    path: FieldPath, reference: Reference, folder: Path, readable: frozenset[ArtifactType], config: StageConfig
) -> Iterator[Finding]:
    """Yield what is wrong with the files of a folder."""
    if ArtifactType.VOCABULARY in readable:
        if not any((folder / name).is_file() for name in VOCABULARIES):
            remedy = "give a `tokenizer` artifact or a Hugging Face folder"
            yield Finding(path, reference.uri, f"has neither {' nor '.join(VOCABULARIES)}", remedy)
        return
    needs_vocabulary = path[1:] == ("model", "uri") and getattr(config, "tokenizer", None) is None
    problems = folder_problems(folder, needs_vocabulary)
    if not problems:
        problems = _damage(folder)
    for problem in problems:
        yield Finding.from_error(path, reference.uri, problem, "give a complete folder in Hugging Face layout")


def _damage(folder: Path) -> list[str]:
    """Return what is wrong with the weights' files by their headers."""
    check = check_adapter_folder if (folder / ADAPTER_CONFIG).is_file() else check_model_folder
    try:
        check(folder)
    except UserError as error:
        return [str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder}/")]
    return []


def _starting_point(kind: str, config: StageConfig, model: Reference, folder: Path) -> Iterator[Finding]:
    """Yield what does not fit between a sound folder and the stage's settings."""
    if not (folder / CONFIG).is_file():
        return  # an adapter: its base is another artifact
    settings = _text_config(folder)
    yield from _targets(kind, config, folder)
    yield from _positions(kind, config, settings)
    yield from _rows((kind, "model", "uri"), config, model, folder, settings)
    yield from _template(kind, config, folder)


def _text_config(folder: Path) -> dict[str, Any]:
    """Return the part of `config.json` that describes the language model."""
    try:
        settings = read_json(folder / CONFIG)
    except UserError:
        return {}  # reported with the folder
    text = settings.get("text_config")
    return {**settings, **text} if isinstance(text, dict) else settings


# -- adapters ----------------------------------------------------------------------------------------------------------


def _targets(kind: str, config: StageConfig, folder: Path) -> Iterator[Finding]:
    """Yield a finding for layers that get an adapter and do not exist.

    A layer's weight is a matrix in the folder's files, under the layer's name.
    """
    lora = config.trainable.lora if isinstance(config, Training) else None
    if lora is None or lora.continue_adapter:
        return
    matrices = matrices_of(folder)
    layers = {name.rsplit(".", 2)[-2] for name in matrices if name.endswith(".weight") and name.count(".") > 1}
    for field, names in _named_layers(lora):
        unknown = [name for name in names if name != ALL_LINEAR and name.rsplit(".", 1)[-1] not in layers]
        if unknown and matrices:
            yield Finding(
                (kind, "trainable", "lora", field),
                ", ".join(unknown),
                f"the model has no {', '.join(unknown)}; its layers are {', '.join(sorted(layers))}",
                "name some of these",
            )


def _named_layers(lora: LoraTraining) -> Iterator[tuple[str, tuple[str, ...]]]:
    targets: Any = lora.targets
    yield "targets", (targets,) if isinstance(targets, str) else tuple(targets or ())


def matrices_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors with two dimensions, by their names; empty if a header cannot be read."""
    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in _header(file).items():
            shape = entry.get("shape") if isinstance(entry, dict) else None
            if name != "__metadata__" and isinstance(shape, list) and len(shape) == 2:
                found[name] = tuple(shape)
    return found


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, file.stat().st_size)))
    except (OSError, ValueError, struct.error):
        return {}  # reported as a damaged file
    return header if isinstance(header, dict) else {}


# -- sizes -------------------------------------------------------------------------------------------------------------


def _positions(kind: str, config: StageConfig, settings: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield a warning if rows are longer than the model was trained for."""
    length = getattr(config, "sequence_length", None)
    positions = settings.get("max_position_embeddings", settings.get("n_positions"))
    if isinstance(length, int) and isinstance(positions, int) and length > positions:
        yield Finding(
            (kind, "sequenceLength"),
            length,
            f"the model was trained on {positions:,} positions; rotary ones are extended beyond that without scaling, "
            "and learned ones cannot be",
            f"use at most {positions:,}, unless longer texts are to be learnt here",
            fatal=False,
        )


def _rows(
    path: FieldPath, config: StageConfig, model: Reference, folder: Path, settings: Mapping[str, Any]
) -> Iterator[Finding]:
    """Yield a finding if the vocabulary has ids without a row, in a stage that adds none."""
    rows, ids = settings.get("vocab_size"), _num_ids(folder)
    if isinstance(config, TextTraining) or not isinstance(rows, int) or ids is None or ids <= rows:
        return
    yield Finding(
        path,
        model.uri,
        f"its vocabulary has {ids:,} ids and the model {rows:,} rows",
        "train it in a `pretrain` or `sft` stage first, which adds rows as `resize` sets",
    )


def _num_ids(folder: Path) -> int | None:
    """Return one more than the highest id in `tokenizer.json`; None if it has none or lists it in another way."""
    try:
        content = json.loads((folder / "tokenizer.json").read_bytes())
        vocabulary = content["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else list(range(len(vocabulary)))
        ids += [item["id"] for item in content.get("added_tokens", ())]
        return int(max(ids)) + 1
    except (OSError, ValueError, KeyError, TypeError):
        return None


# -- templates ---------------------------------------------------------------------------------------------------------


def _template(kind: str, config: StageConfig, folder: Path) -> Iterator[Finding]:
    """Yield a finding if conversations are to be rendered with the model's own template, and it has none."""
    if "template" not in type(config).model_fields or kind == "evaluate":
        return  # `evaluate` may measure text alone
    template = getattr(config, "template", None)
    own = template is None or str(getattr(template, "name", "")) == "model"
    if own and not has_template(folder):
        yield Finding(
            (kind, "template"),
            None if template is None else "model",
            "the model has no chat template of its own, so its conversations cannot be rendered",
            "name one, such as `template: {name: chatml}`",
        )


def has_template(folder: Path) -> bool:
    """Return whether a folder's tokenizer has a chat template, in a file of its own or in its configuration."""
    if any((folder / name).is_file() for name in TEMPLATE_FILES) or (folder / "additional_chat_templates").is_dir():
        return True
    try:
        return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))
    except UserError:
        return False
