"""Artifacts: where they lie in the store, and the manifest that proves what they are."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pydantic import Field, JsonValue

from stagecoach_api.base import Model

MANIFEST = "manifest.json"
CARD = "stagecoach.json"
REPORT = "report.json"
REPORT_TEXT = "report.md"


# -- keys below `spec.storage.uri` -------------------------------------------------------------------------------------


def artifact_prefix(digest: str) -> str:
    """Folder of the artifact of the stage with this digest."""
    return f"artifacts/{digest}"


def manifest_key(digest: str) -> str:
    return f"{artifact_prefix(digest)}/{MANIFEST}"


def output_prefix(digest: str) -> str:
    """Folder of what the stage made."""
    return f"{artifact_prefix(digest)}/output"


def artifact_uri(storage_uri: str, digest: str) -> str:
    """Return the URI of `output_prefix` in the store at `storage_uri`."""
    return f"{storage_uri.rstrip('/')}/{output_prefix(digest)}"


def checkpoints_prefix(digest: str) -> str:
    return f"{artifact_prefix(digest)}/checkpoints"


def checkpoint_name(step: int, version: int = 0) -> str:
    """Name of a checkpoint's folder. `version`: how often training had gone back to a step saved already."""
    return f"step-{step:08d}" + (f"-{version:04d}" if version else "")


def attempt_prefix(digest: str, attempt: int) -> str:
    """Folder of one attempt's logs and metrics; no part of the artifact's content."""
    return f"{artifact_prefix(digest)}/attempts/{attempt:04d}"


def attempt_logs_prefix(digest: str, attempt: int) -> str:
    """Folder of what the ranks of one attempt printed (`rank_log_name`), and of its metrics."""
    return f"{attempt_prefix(digest, attempt)}/logs"


def rank_log_name(rank: int, started: float) -> str:
    """Name of the file that holds what one rank printed, e.g. `rank-00003.20261122T095244.125Z.log`.

    `rank`: global rank. `started`: seconds since the epoch at which its node's launcher started; it tells apart the
    incarnations of one attempt (Kueue stops an attempt's pods and starts new ones). Names of one rank sort by it.
    """
    seconds, milliseconds = divmod(round(started * 1000), 1000)
    return f"rank-{rank:05d}.{datetime.fromtimestamp(seconds, UTC):%Y%m%dT%H%M%S}.{milliseconds:03d}Z.log"


RANK_MARK = "[rank "


def rank_mark(rank: int) -> str:
    """Return what stands before each line of a rank where several are shown together."""
    return f"{RANK_MARK}{rank}] "


class RankLog(NamedTuple):
    """What the name of a rank's log says."""

    rank: int
    """Global rank."""

    started: float
    """Seconds since the epoch, to the millisecond, at which this incarnation of the rank's node started."""


def parse_rank_log_name(name: str) -> RankLog | None:
    """Read a name as `rank_log_name` makes them. None: it is no rank's log (a metrics file, say)."""
    found = re.fullmatch(r"rank-(\d{5,})\.(\d{8}T\d{6})\.(\d{3})Z\.log", name, re.ASCII)
    if found is None:
        return None
    rank, seconds, milliseconds = found.groups()
    try:
        started = datetime.strptime(seconds, "%Y%m%dT%H%M%S").replace(tzinfo=UTC)
    except ValueError:
        return None
    return RankLog(int(rank), started.timestamp() + int(milliseconds) / 1000)


def pointer_key(namespace: str, run: str, stage: str) -> str:
    """The small file through which a run's stage names its artifact."""
    return f"runs/{namespace}/{run}/{stage}.json"


# -- digests -----------------------------------------------------------------------------------------------------------


def canonical_json(value: Any) -> bytes:
    """Serialise so that equal values give equal bytes: sorted keys, no blanks, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """Return the hex sha256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


class StoredObject(Model):
    """One object of an artifact."""

    path: str
    """Key below the artifact's (or checkpoint's) folder."""

    size: int = Field(ge=0)
    """Bytes."""

    sha256: str
    """Hex digest of the bytes."""


def content_digest(objects: Iterable[StoredObject]) -> str:
    """Return the digest of an artifact's content: paths, sizes and checksums, in whatever order they are given."""
    return digest_of(sorted([item.path, item.size, item.sha256] for item in objects))


# -- manifests ---------------------------------------------------------------------------------------------------------


class Parent(Model):
    """An input of an artifact."""

    key: str
    """The reference in the stage's configuration: `stage:NAME` or `uri:URI`."""

    digest: str
    """Content digest of the input."""

    stage_digest: str | None = None
    """Digest of the stage that made it. None: it came from outside."""

    uri: str
    """Where it lay."""


class Manifest(Model):
    """Written last, only if absent: an artifact counts only when its manifest exists."""

    stage_digest: str
    """Digest of the stage; the artifact's folder is named by it."""

    content_digest: str
    """Digest of `objects`. Equal work gives equal content digests."""

    kind: str
    """Stage kind."""

    objects: tuple[StoredObject, ...]
    """What lies in `output/`."""

    parents: tuple[Parent, ...] = ()
    """The stage's inputs."""

    config: dict[str, JsonValue]
    """The stage's resolved configuration."""

    code: str
    """Identity of the code that made it: hash of the trainer package and its lock, or an image digest."""

    seed: int

    tokens: int = 0
    """Training tokens the stage consumed; 0 for a stage that does not train."""

    seconds: float = 0.0
    """Wall-clock seconds of all attempts that count."""

    gpu_seconds: float = 0.0
    """Seconds times GPUs."""

    environment: dict[str, JsonValue] = Field(default_factory=dict)
    """What the last digits depend on: ranks, threads, processor type, library versions."""

    metrics: dict[str, float] = Field(default_factory=dict)
    """The report's headline figures, so that a table needs no further read."""

    created: float
    """Seconds since the epoch."""


class Pointer(Model):
    """`runs/<namespace>/<run>/<stage>.json`: which artifact a run's stage has."""

    stage: str
    kind: str
    stage_digest: str
    content_digest: str
    uri: str
    """The artifact's output folder."""
    cached: bool
    """The stage's work was found done."""
    recorded: float
    """Seconds since the epoch."""


# -- what a stage is told ----------------------------------------------------------------------------------------------


class ResolvedInput(Model):
    """One input of a stage, found."""

    uri: str
    """Folder or file(s) to read: an artifact's output folder, or the absolute external URI."""

    digest: str
    """Content digest: an artifact's, or the hash over the external objects' paths, sizes and checksums."""

    stage_digest: str | None = None
    """Digest of the stage that made it. None: external."""


class ResolvedStage(Model):
    """`stage.json`: everything a stage's trainer is told. Its digest names the artifact."""

    namespace: str
    run: str
    stage: str
    kind: str
    attempt: int = Field(ge=1)

    digest: str
    """Stage digest."""

    config: dict[str, JsonValue]
    """The stage's configuration as in the spec, with every default filled in."""

    inputs: dict[str, ResolvedInput] = Field(default_factory=dict)
    """Inputs by `Reference.key`."""

    seed: int
    code: str

    storage_uri: str
    """Root of the store, absolute."""

    storage_endpoint: str | None = None
    """S3 endpoint. None: AWS's own."""

    storage_region: str | None = None
    """S3 region. None: the SDK's configuration."""

    num_nodes: int = 1
    ranks_per_node: int = 1


class RewardCard(Model):
    """What a reward model's folder says beside its weights."""

    bias: float = 0.0
    """Added to what the linear head says. transformers' sequence classifiers of decoders have a head without a bias, so
    it stands here; differences between two rewards do not need it."""

    domains: dict[str, str] = Field(default_factory=dict)
    """System prompt by domain, as it was trained with."""


class ModelCard(Model):
    """`stagecoach.json` in the output of a stage that makes a model: what is needed to load it again."""

    adapter: bool
    """The weights are a PEFT adapter; `base` is what it sits on."""

    base: ResolvedInput | None = None
    """The model below the adapter. An artifact of the same store is named by its key (`artifacts/<digest>/output`), so
    that the card does not depend on where the store lies. None: the weights are whole."""

    new_rows: str | None = None
    """How the base's embedding is grown to the tokenizer's size before the adapter is put on (`mean`, `random`,
    `zero`). None: it has that size."""

    resize_seed: int | None = None
    """Seed of `random` new rows. None: not random."""

    old_rows: int | None = Field(default=None, ge=0)
    """Rows the embedding had before the vocabulary last grew; those from here on are the new rows that later stages
    may train. None: it never grew."""

    reward: RewardCard | None = None
    """It is a reward model, a sequence classifier of one label. None: it is a language model."""
