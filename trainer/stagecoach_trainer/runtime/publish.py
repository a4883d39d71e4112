"""Publishing of a stage: upload its files, then commit its manifest. On rank 0 only. Does not import torch itself."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import re
import secrets
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from pydantic import JsonValue

from stagecoach_api.artifacts import (
    Manifest,
    Parent,
    ResolvedStage,
    StoredObject,
    artifact_prefix,
    attempt_logs_prefix,
    attempt_prefix,
    canonical_json,
    content_digest,
    manifest_key,
    parse_rank_log_name,
    upload_prefix,
)
from stagecoach_api.names import ENV_THREADS
from stagecoach_api.store import NotFound, Store, StoreError
from stagecoach_api.stores.lookup import find_manifest, read_manifest
from stagecoach_trainer.runtime.attempt_files import logs_folder
from stagecoach_trainer.runtime.checkpoint_paths import delete_checkpoints
from stagecoach_trainer.runtime.context import StageContext, StageOutcome
from stagecoach_trainer.runtime.errors import UserError

log = logging.getLogger(__name__)

PARALLEL_UPLOADS = 8
LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "tokenizers", "sentencepiece", "safetensors", "numpy")
ATTEMPT_FILE = "attempt.json"


def publish(context: StageContext, outcome: StageOutcome, started: float) -> Manifest:
    """Upload `context.output`, commit the manifest, delete the stage's checkpoints; return the manifest that counts.

    The files go to a folder that no other attempt writes to, and the manifest, which only one attempt can create, makes
    them the artifact: nothing that was committed is ever written again. `started`: when this attempt began, in seconds
    since the epoch. If another attempt has published the stage first, its manifest is returned, with a warning if the
    content differs, and this one's uploads are deleted. Raises UserError for an empty output, StoreError.
    """
    resolved, store = context.resolved, context.store
    context.progress.report("publish")
    first = find_manifest(store, resolved.digest)
    if first is not None:
        return first
    prefix = upload_prefix(resolved.digest, resolved.attempt_id, secrets.token_hex(4))
    objects = upload_folder(context, context.output, prefix)
    if not objects:
        raise UserError(f"stage `{resolved.stage}` wrote nothing to its output folder, so it has no artifact")
    seconds = time.time() - started + _seconds_of_earlier_attempts(context)
    manifest = _manifest(context, outcome, objects, seconds).model_copy(update={"prefix": prefix})
    context.confirm_writer()
    counts = _commit(store, manifest)
    if counts.prefix != prefix:
        _withdraw(context, manifest, counts)
        return counts
    size = sum(item.size for item in objects)
    log.info("published: %d files, %s bytes, %s, in %.0f s", len(objects), f"{size:,}", prefix, seconds)
    _delete_checkpoints(context)
    return manifest


def _commit(store: Store, manifest: Manifest) -> Manifest:
    """Create the manifest unless there is one; return the one that counts."""
    created = store.commit(manifest_key(manifest.stage_digest), canonical_json(manifest.model_dump(mode="json")))
    # Read rather than taken from the answer, which may be lost: the folder that a manifest names shows whose it is.
    return manifest if created else read_manifest(store, manifest.stage_digest)


def _withdraw(context: StageContext, ours: Manifest, theirs: Manifest) -> None:
    """Delete the uploads of this attempt, which no manifest names; report whether the artifact differs from them."""
    if theirs.content_digest != ours.content_digest:
        text = (
            f"stage `{context.resolved.stage}` was published by another attempt with different content "
            f"({theirs.content_digest[:12]}…, ours {ours.content_digest[:12]}…); using theirs"
        )
        log.warning("%s", text)
        context.progress.warn(text)
    try:
        context.store.delete(ours.folder)
    except StoreError as error:
        log.warning("the uploads of this attempt, which are not used, stay in the store: %s", error)


def _delete_checkpoints(context: StageContext) -> None:
    """Delete the checkpoints of the published stage; they only take up space, so a failure does not end the stage."""
    try:
        delete_checkpoints(context.store, context.cache, context.resolved.digest)
    except StoreError as error:
        log.warning("the checkpoints of the finished stage stay in the store: %s", error)


def upload_folder(context: StageContext, folder: Path, prefix: str) -> list[StoredObject]:
    """Upload all files of a folder below `prefix`, which this attempt alone writes to."""
    return _upload_files(context, folder, _files_below(folder), prefix)


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _upload_files(context: StageContext, folder: Path, files: list[Path], prefix: str) -> list[StoredObject]:
    def upload(path: Path) -> StoredObject:
        name = path.relative_to(folder).as_posix()
        stored = context.store.upload(path, f"{prefix}/{name}")
        return StoredObject(path=name, size=stored.size, sha256=stored.sha256)

    objects: list[StoredObject] = []
    with ThreadPoolExecutor(PARALLEL_UPLOADS) as pool:
        for item in pool.map(upload, files):
            objects.append(item)
            context.progress.report("publish", len(objects), len(files), "files")
    return objects


def upload_attempt(context: StageContext, started: float) -> None:
    """Upload the metrics of this attempt and its duration, which are not part of the artifact.

    The ranks' output is in the same folder, but is uploaded by the launcher.
    """
    digest, attempt, logs = context.resolved.digest, context.resolved.attempt_id, logs_folder(context.work)
    files = [path for path in _files_below(logs) if parse_rank_log_name(path.name) is None]
    _upload_files(context, logs, files, attempt_logs_prefix(digest, attempt))
    resolved = context.resolved
    about = {
        "namespace": resolved.namespace,
        "run": resolved.run,
        "stage": resolved.stage,
        "attempt": resolved.attempt,
        "seconds": round(time.time() - started, 3),
    }
    context.store.write(f"{attempt_prefix(resolved.digest, resolved.attempt_id)}/{ATTEMPT_FILE}", canonical_json(about))


def environment(resolved: ResolvedStage) -> dict[str, JsonValue]:
    """Return what the last digits of a result depend on: ranks, threads, processor and library versions."""
    result: dict[str, JsonValue] = {
        "ranks": resolved.num_nodes * resolved.ranks_per_node,
        "nodes": resolved.num_nodes,
        "threads": int(os.environ.get(ENV_THREADS, "0")) or None,
        "processor": processor(),
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
    }
    gpu = _gpu_name()
    if gpu is not None:
        result["gpu"] = gpu
    for name in LIBRARIES:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return result


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the processor's model, with family and stepping if Linux reports them."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(re.findall(r"^(model name|cpu family|model|stepping)\s*:\s*(.+)$", text, re.MULTILINE))
    name = found.get("model name", platform.machine())
    parts = [f"{word} {found[key]}" for key, word in _CPU_FIELDS.items() if key in found]
    return f"{name} ({', '.join(parts)})" if parts else name


_CPU_FIELDS = {"cpu family": "family", "model": "model", "stepping": "stepping"}


def _gpu_name() -> str | None:
    torch = sys.modules.get("torch")  # a stage that never imported it used no GPU
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name())


def _manifest(context: StageContext, outcome: StageOutcome, objects: list[StoredObject], seconds: float) -> Manifest:
    resolved = context.resolved
    gpus = context.world.size if _gpu_name() else 0
    return Manifest(
        stage_digest=resolved.digest,
        content_digest=content_digest(objects),
        kind=resolved.kind,
        objects=tuple(objects),
        parents=tuple(
            Parent(key=key, digest=found.digest, stage_digest=found.stage_digest, uri=found.uri)
            for key, found in sorted(resolved.inputs.items())
        ),
        config=resolved.config,
        code=resolved.code,
        seed=resolved.seed,
        tokens=outcome.tokens,
        seconds=round(seconds, 3),
        gpu_seconds=round(seconds * gpus, 3),
        environment=environment(resolved),
        metrics=dict(outcome.metrics),
        created=time.time(),
    )


def _seconds_of_earlier_attempts(context: StageContext) -> float:
    total = 0.0
    own = f"{attempt_prefix(context.resolved.digest, context.resolved.attempt_id)}/{ATTEMPT_FILE}"
    for entry in context.store.list(artifact_prefix(context.resolved.digest) + "/attempts"):
        if entry.key.endswith(f"/{ATTEMPT_FILE}") and entry.key != own:
            with contextlib.suppress(ValueError, KeyError, TypeError, NotFound):  # only a figure of the manifest
                total += json.loads(context.store.read(entry.key))["seconds"]
    return total
