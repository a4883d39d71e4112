"""Names that more than one side must know: the API group, environment variables, files of an attempt. Written once."""

from __future__ import annotations

API_GROUP = "stagecoach.dev"
API_VERSION = "v1alpha1"
API_GROUP_VERSION = f"{API_GROUP}/{API_VERSION}"
KIND = "TrainingRun"
PLURAL = "trainingruns"
SINGULAR = "trainingrun"
SHORT_NAME = "tr"

# What a driver tells the trainer's launcher through the environment. Never a secret: those are mounted files.
ENV_STAGE_FILE = "STAGECOACH_STAGE_FILE"
"""Path of `stage.json`, the resolved stage."""
ENV_WORK_DIR = "STAGECOACH_WORK_DIR"
"""Folder of this attempt: scratch, logs, local checkpoints."""
ENV_CACHE_DIR = "STAGECOACH_CACHE_DIR"
"""Folder shared by all attempts on this machine: fetched inputs and tokenised shards."""
ENV_RESULT_FILE = "STAGECOACH_RESULT_FILE"
"""Where the launcher writes the attempt's outcome (on a cluster: the termination message)."""
ENV_PROGRESS_FILE = "STAGECOACH_PROGRESS_FILE"
"""JSON lines of progress and heartbeats."""
ENV_THREADS = "STAGECOACH_THREADS"
"""CPU threads of each rank. Always pinned: the number changes the last digits of a sum."""

# Files of one attempt, below its work folder.
STAGE_FILE = "stage.json"
RESULT_FILE = "result.json"
PROGRESS_FILE = "progress.jsonl"
LOG_FILE = "log.txt"

DEFAULT_LOCAL_ROOT = ".stagecoach"
"""Where a laptop keeps artifacts, attempts and caches when the run names no storage; below the working directory."""
