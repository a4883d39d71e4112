"""The base of a downloaded adapter: PEFT looks it up by a name or a path, which an artifact cannot know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stagecoach_api.artifacts import CARD, ModelCard, ResolvedInput, output_prefix
from stagecoach_api.model_folders import ADAPTER_CONFIG, BASE_FOLDER, CONFIG, UNNAMED_BASE
from stagecoach_api.store import NotFound, Store, StoreError, external_digest, list_external, open_store
from stagecoach_api.stores.lookup import read_manifest
from stagecoach_cli.artifacts.store import fetch

OPENED = frozenset({".json", ".safetensors", ".jinja", ".model", ".txt", ".md", ""})
"""Suffixes of a model's files that are copied; pickled weights and code are not."""

EXPORT = "an `export` stage with `mergeAdapters: false` releases it with its base"
OPEN_IT = "PEFT opens it with its base: {base}"


def add_base(store: Store, folder: Path, endpoint: str | None, region: str | None) -> str | None:
    """Download the base of the adapter in `folder` to its folder `base`, and write the base's path to the adapter's
    configuration.

    Returns a sentence about it; None if `folder` has no adapter. What cannot be done is in the sentence: the adapter
    itself is complete.
    """
    config = _read(folder / ADAPTER_CONFIG)
    if config is None:
        return None
    named = config.get("base_model_name_or_path")
    if named not in (None, UNNAMED_BASE):
        return OPEN_IT.format(base=named)
    target = folder / BASE_FOLDER
    if not (target / CONFIG).is_file():
        problem = _download(store, folder, target, endpoint, region)
        if problem is not None:
            return problem
    config["base_model_name_or_path"] = str(target.resolve())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return OPEN_IT.format(base=target)


def _download(store: Store, folder: Path, target: Path, endpoint: str | None, region: str | None) -> str | None:
    """Download the base that the adapter's card names; return why it is not possible, None if it is done."""
    card = _card(_read(folder / CARD))
    if card is None or card.base is None:
        return "its base is not known: it has no card that names one"
    if card.new_rows is not None:
        return f"rows were added to its base when it was trained, so no folder is its base; {EXPORT}"
    base = card.base
    try:
        if base.stage_digest is not None and base.uri == output_prefix(base.stage_digest):
            return _download_artifact(store, base.stage_digest, target)
        return _download_external(base, target, endpoint, region)
    except (NotFound, StoreError) as error:
        return f"its base could not be downloaded: {error}"


def _download_artifact(store: Store, digest: str, target: Path) -> str | None:
    try:
        card = _card(json.loads(store.read(f"{read_manifest(store, digest).folder}/{CARD}")))
    except NotFound:
        card = None
    if card is not None and card.adapter:
        return f"its base is an adapter itself; {EXPORT}"
    for _ in fetch(store, digest, target):
        pass
    return None


def _download_external(base: ResolvedInput, target: Path, endpoint: str | None, region: str | None) -> str | None:
    root, entries = list_external(base.uri, endpoint, region)
    if external_digest(entries) != base.digest:
        return f"its base {base.uri} has changed since the adapter was trained"
    source = open_store(root, endpoint, region)
    if any(entry.key.rsplit("/", 1)[-1] == ADAPTER_CONFIG for entry in entries):
        return f"its base is an adapter itself; {EXPORT}"
    for entry in entries:
        if Path(entry.key).suffix in OPENED:
            (target / entry.key).parent.mkdir(parents=True, exist_ok=True)
            source.download(entry.key, target / entry.key)
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _card(value: Any) -> ModelCard | None:
    try:
        return ModelCard.model_validate(value)
    except ValidationError:
        return None
