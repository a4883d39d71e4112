"""Names of attempts: one for JobSet and ConfigMap, and the start of every Job's, pod's and host's name."""

from __future__ import annotations

import hashlib
import re

from stagecoach_api.names import REPLICATED_JOB

RUN_CHARACTERS = 18
STAGE_CHARACTERS = 14
HASH_CHARACTERS = 6

MAX_CHARACTERS = 49
"""JobSet refuses names whose pods' (`<name>-w-0-<index>-<5 characters>`) might exceed 63 characters: up to 49 there is
room for 1,000 pods. Attempts up to 999,999 stay within it."""


def attempt_name(run: str, stage: str, run_uid: str, attempt: int) -> str:
    """Return the name of an attempt's JobSet: `r-<run>-<stage>-<hash>-<attempt>`, an RFC 1035 label.

    Run and stage are cut for people's eyes only. The hash, over the run's UID and the stage's whole name, is what keeps
    `a-b` + `c` apart from `a` + `b-c`, and a recreated run from what its predecessor left.
    """
    told_apart = hashlib.sha256(f"{run_uid}/{stage}".encode()).hexdigest()[:HASH_CHARACTERS]
    parts = ["r", _cut(run, RUN_CHARACTERS), _cut(stage, STAGE_CHARACTERS), told_apart, str(attempt)]
    return "-".join(part for part in parts if part)


def _cut(name: str, length: int) -> str:
    """Return the beginning of a name, of lower-case letters, digits and dashes between them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:length].rstrip("-")


def pod_host(name: str, index: int) -> str:
    """Return the DNS name, within the namespace, of an attempt's pod."""
    return f"{name}-{REPLICATED_JOB}-0-{index}.{name}"
