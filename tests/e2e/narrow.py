"""Limit a command's resources and execute it: `python narrow.py CORE FILE_BYTES COMMAND…`, `-` for no limit.

The processes that the command starts inherit the limits.
"""

from __future__ import annotations

import os
import resource
import sys

core, file_bytes, *command = sys.argv[1:]
if core != "-":
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(core) % len(cores)]})
if file_bytes != "-":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_bytes), int(file_bytes)))
os.execv(command[0], command)  # noqa: S606 - no shell
