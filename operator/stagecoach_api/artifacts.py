"""Artifacts: their keys in the store, their manifests, and the resolved stage that makes one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pydantic import Field, JsonValue, model_validator

from stagecoach_api.base import Model

MANIFEST = "manifest.json"
CARD = "stagecoach.json"
REPORT = "report.json"
REPORT_TEXT = "report.md"


# -- keys below `spec.storage.uri` -------------------------------------------------------------------------------------


def artifact_prefix(digest: str) -> str:
    """Return the folder of the artifact with this stage digest."""
    return f"artifacts/{digest}"


def manifest_key(digest: str) -> str:
    return f"{artifact_prefix(digest)}/{MANIFEST}"


def output_prefix(digest: str) -> str:
    """Return the key by which an artifact's content names another artifact of its store.

    Artifacts of earlier versions have their files there. The folder of any artifact is `Manifest.folder`.
    """
    return f"{artifact_prefix(digest)}/output"


def uri_below(storage_uri: str, key: str) -> str:
    """Return the URI of a key in the store at `storage_uri`."""
    return f"{storage_uri.rstrip('/')}/{key}"


def storage_of(uri: str, digest: str) -> str | None:
    """Return the URI of the store that the URI of an artifact, or of a file in it, is in; None if it is another's."""
    root, found, _ = f"{uri.rstrip('/')}/".rpartition(f"/{artifact_prefix(digest)}/")
    return root if found else None


def writer_key(digest: str) -> str:
    """Return the key of the object that names the attempt that may write to it (`stagecoach_api.writers`)."""
    return f"{artifact_prefix(digest)}/writer.json"


def checkpoints_prefix(digest: str) -> str:
    return f"{artifact_prefix(digest)}/checkpoints"


def checkpoint_name(step: int, version: int = 0) -> str:
    """Return the name of a checkpoint's folder.

    `version`: how many times training had gone back to a saved step. A checkpoint is never overwritten.
    """
    return f"step-{step:08d}" + (f"-{version:04d}" if version else "")


def attempt_id(run_uid: str, stage: str, number: int) -> str:
    """Return the name of an attempt that no other has in any run, namespace or cluster that shares a store.

    `run_uid`: empty for an attempt that a version before run UIDs started; it is named by its number alone.
    """
    return f"{run_uid}-{stage}-{number:04d}" if run_uid else f"{number:04d}"


def attempt_prefix(digest: str, attempt: str) -> str:
    """Return the folder that one attempt alone writes to: its uploads, logs and metrics. `attempt`: `attempt_id`."""
    return f"{artifact_prefix(digest)}/attempts/{attempt}"


def attempt_logs_prefix(digest: str, attempt: str) -> str:
    """Return the folder of one attempt's rank logs (see `rank_log_name`) and metrics. `attempt`: `attempt_id`."""
    return f"{attempt_prefix(digest, attempt)}/logs"


def upload_prefix(digest: str, attempt: str, upload: str) -> str:
    """Return the folder that one upload of an output alone writes to.

    `attempt`: `attempt_id`. `upload`: chosen at random, because the pods of an attempt may be replaced while the old
    ones still run on a lost node.
    """
    return f"{attempt_prefix(digest, attempt)}/{upload}/output"


def rank_log_name(rank: int, started: float) -> str:
    """Return the name of the log file of one rank, e.g. `rank-00003.20261122T095244.125Z.log`.

    `rank`: global rank. `started`: seconds since the epoch at which its node's launcher started. It
    distinguishes the incarnations of one attempt (Kueue stops an attempt's pods and starts new ones). The names of one
    rank's logs sort by it.
    """
    seconds, milliseconds = divmod(round(started * 1000), 1000)
    return f"rank-{rank:05d}.{datetime.fromtimestamp(seconds, UTC):%Y%m%dT%H%M%S}.{milliseconds:03d}Z.log"


RANK_MARK = "[rank "


def rank_mark(rank: int) -> str:
    """Return the prefix of a rank's lines where the logs of several ranks are shown together."""
    return f"{RANK_MARK}{rank}] "


class RankLog(NamedTuple):
    """The parts of a rank log's name."""

    rank: int
    """Global rank."""

    started: float
    """Seconds since the epoch, to the millisecond, at which this incarnation of the rank's node started."""


def parse_rank_log_name(name: str) -> RankLog | None:
    """Parse a name made by `rank_log_name`. Returns None for any other file, such as one with metrics."""
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
    """Return the key of the small file (`Pointer`) in which a run's stage names its artifact."""
    return f"runs/{namespace}/{run}/{stage}.json"


# -- digests -----------------------------------------------------------------------------------------------------------


def canonical_json(value: Any) -> bytes:
    """Serialise so that equal values give equal bytes: sorted keys, no white space, UTF-8, NaN rejected."""
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
    """Return the digest of an artifact's content: paths, sizes and checksums, in any order."""
    return digest_of(sorted([item.path, item.size, item.sha256] for item in objects))


# -- manifests ---------------------------------------------------------------------------------------------------------


class Parent(Model):
    """An input of an artifact."""

    key: str
    """The reference in the stage's configuration: `stage:NAME` or `uri:URI`."""

    digest: str
    """Content digest of the input."""

    stage_digest: str | None = None
    """Digest of the stage that made it. None for an input from outside the run."""

    uri: str
    """Its location when it was read."""


class Manifest(Model):
    """An artifact's manifest. It is written last, and only if it does not exist: it makes the artifact complete."""

    stage_digest: str
    """Digest of the stage, which is also the name of the artifact's folder."""

    content_digest: str
    """Digest of `objects`. Equal work gives equal content digests."""

    kind: str
    """Stage kind."""

    objects: tuple[StoredObject, ...]
    """The files in `folder`."""

    prefix: str | None = None
    """Key of the folder that the attempt which made the artifact uploaded its files to. None in manifests of earlier
    versions. It does not count in `content_digest`."""

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
    """Wall-clock seconds of all attempts that contributed."""

    gpu_seconds: float = 0.0
    """Seconds times GPUs."""

    environment: dict[str, JsonValue] = Field(default_factory=dict)
    """What the last digits of results depend on: ranks, threads, processor type, library versions."""

    metrics: dict[str, float] = Field(default_factory=dict)
    """The report's headline figures, so that a table of artifacts needs no further reads."""

    created: float
    """Seconds since the epoch."""

    @property
    def folder(self) -> str:
        """Key of the folder with the files. Readers follow it: attempts without a manifest leave folders, too."""
        return output_prefix(self.stage_digest) if self.prefix is None else self.prefix

    @model_validator(mode="after")
    def _lies_with_its_artifact(self) -> Manifest:
        if self.prefix is not None and not self.prefix.startswith(f"{artifact_prefix(self.stage_digest)}/"):
            raise ValueError(f"its files are in `{self.prefix}`, which is not a folder of the artifact")
        return self


class Pointer(Model):
    """`runs/<namespace>/<run>/<stage>.json`: the artifact of a run's stage."""

    stage: str
    kind: str
    stage_digest: str
    content_digest: str
    uri: str
    """The artifact's output folder."""
    cached: bool
    """Whether the artifact already existed."""
    recorded: float
    """Seconds since the epoch."""


# -- resolved stages ---------------------------------------------------------------------------------------------------


class ResolvedInput(Model):
    """One input of a stage: where it is and what it contains."""

    uri: str
    """Folder or file(s) to read: an artifact's output folder, or the absolute external URI."""

    digest: str
    """Content digest: an artifact's, or the hash over the external objects' paths, sizes and checksums."""

    stage_digest: str | None = None
    """Digest of the stage that made it. None for an external input."""


class ResolvedStage(Model):
    """`stage.json`: everything that the trainer needs to know about a stage. Its digest names the artifact."""

    namespace: str
    run: str
    stage: str
    kind: str
    attempt: int = Field(ge=1)

    run_uid: str = ""
    """Distinguishes runs of one name: the UID of the TrainingRun, or the id of the run's folder on a laptop. Empty from
    an operator of an earlier version."""

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
    """S3 endpoint. None for AWS."""

    storage_region: str | None = None
    """S3 region. None for that of the AWS SDK's configuration."""

    num_nodes: int = 1
    ranks_per_node: int = 1

    @property
    def attempt_id(self) -> str:
        """Name of the attempt, unique among all that share a store."""
        return attempt_id(self.run_uid, self.stage, self.attempt)


class RewardCard(Model):
    """The part of `ModelCard` that describes a reward model."""

    bias: float = 0.0
    """Added to the output of the linear head. It is stored here because the head of transformers' decoder sequence
    classifiers has no bias; it cancels out in differences between two rewards."""

    domains: dict[str, str] = Field(default_factory=dict)
    """System prompt by domain, as used in training."""


class ModelCard(Model):
    """`stagecoach.json` in the output of a stage that makes a model: what loading it requires."""

    adapter: bool
    """Whether the weights are a PEFT adapter on top of `base`."""

    base: ResolvedInput | None = None
    """The adapter's base model. An artifact of the same store is named by its key (`artifacts/<digest>/output`), so
    that the card does not depend on the store's location. None if the weights are complete."""

    new_rows: str | None = None
    """How the base's embedding is resized to the tokenizer's size before the adapter is applied (`mean`, `random`,
    `zero`). None if it has that size already."""

    resize_seed: int | None = None
    """Seed of `random` new rows. None for the other ways."""

    old_rows: int | None = Field(default=None, ge=0)
    """Number of embedding rows before the vocabulary was last extended. The rows from this index on are the new rows
    that later stages may train. None if it was never extended."""

    reward: RewardCard | None = None
    """Set if the model is a reward model: a sequence classifier with one label. None for a language model."""
