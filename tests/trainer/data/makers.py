"""Stage contexts, files and real data for the tests of records, data sets and vocabularies. No torch."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagecoach_api.artifacts import ResolvedInput
from stagecoach_api.references import Reference
from stagecoach_api.store import Store, external_digest, list_external, open_store
from stagecoach_trainer.runtime.context import StageContext, World
from stagecoach_trainer.runtime.progress import Progress
from tests import SHARED_DATA as SHARED
from tests.trainer.contexts import resolved_stage

LLAMA = SHARED / "tokenizers" / "llama_32000.model"
CHINESE = SHARED / "tokenizers" / "chinese_sp_20000.model"


@dataclass(frozen=True)
class FolderContext(StageContext):
    """A context whose stage references are plain folders, and whose URIs are resolved as a plan would."""

    stages: Mapping[str, Path] = field(default_factory=dict)

    def input(self, reference: Reference) -> ResolvedInput:
        uri = str(self.stages[reference.stage]) if reference.stage is not None else reference.uri
        assert uri is not None
        _, entries = list_external(uri, endpoint=getattr(self.store, "endpoint", None))
        return ResolvedInput(uri=uri, digest=external_digest(entries))

    def fetch(self, reference: Reference) -> Path:
        if reference.stage is not None:
            return self.stages[reference.stage]
        return self.fetch_resolved(self.input(reference))


def make_context(
    folder: Path, seed: int = 1, stages: Mapping[str, Path] | None = None, store: Store | None = None
) -> FolderContext:
    """Return a context that works below `folder`, where its store is, too, unless one is given."""
    work = folder / f"work-{seed}"
    (work / "output").mkdir(parents=True)
    return FolderContext(
        resolved=resolved_stage(folder, kind="data", digest="0" * 64, seed=seed, code="test"),
        store=store or open_store(str(folder / "store")),
        work=work,
        cache=folder / "cache",
        world=World(),
        progress=Progress(None),
        stop=threading.Event(),
        stages=stages or {},
    )


def write_jsonl(path: Path, values: Iterable[Any]) -> Path:
    """Write one JSON value per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path
