"""Names of attempts: the name of the JobSet, and the prefix of the names of the ConfigMap, Job, pods and hosts."""

from __future__ import annotations

import hashlib
import re

from stagecoach_api.names import REPLICATED_JOB

RUN_CHARACTERS = 18
STAGE_CHARACTERS = 14
HASH_CHARACTERS = 6

MAX_CHARACTERS = 49
"""JobSet rejects names with which a pod's name (`<name>-w-0-<index>-<5 characters>`) could exceed 63 characters. Up to
49 characters leave room for 1,000 pods. Attempts up to number 999,999 stay within that."""


def attempt_name(run: str, stage: str, run_uid: str, attempt: int) -> str:
    """Return the name of an attempt's JobSet: `r-<run>-<stage>-<hash>-<attempt>`, an RFC 1035 label.

    The shortened names of run and stage are for people. The hash over the run's UID and the stage's full name makes the
    name unique: it distinguishes `a-b` + `c` from `a` + `b-c`, and a re-created run from remains of its predecessor.
    """
    unique = hashlib.sha256(f"{run_uid}/{stage}".encode()).hexdigest()[:HASH_CHARACTERS]
    parts = ["r", _shortened(run, RUN_CHARACTERS), _shortened(stage, STAGE_CHARACTERS), unique, str(attempt)]
    return "-".join(part for part in parts if part)


def _shortened(name: str, length: int) -> str:
    """Return the beginning of a name, reduced to lower-case letters, digits and dashes between them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:length].rstrip("-")


def pod_host(name: str, index: int) -> str:
    """Return the DNS name of an attempt's pod within its namespace."""
    return f"{name}-{REPLICATED_JOB}-0-{index}.{name}"
