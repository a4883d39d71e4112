"""What an error of a stage is reported as: whose it is, its message, and whether it may recur."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stagecoach_api.outcomes import AttemptResult, Cause, ExitCode
from stagecoach_api.store import InvalidLocation, Replaced, StoreError, Unreachable, open_store
from stagecoach_trainer.runtime.failures import outcome_of
from stagecoach_trainer.runtime.outcomes import RankOutcome, combine, failure


def result_of(error: BaseException) -> AttemptResult:
    """Return the result of an error that was raised in this function."""
    try:
        raise error  # noqa: TRY301 - the traceback is what is tested
    except BaseException as raised:
        return outcome_of(raised, last_step=7).result


def system_error(code: int, path: str | None = "/data/x") -> OSError:
    return OSError(code, os.strerror(code), path)


USERS: list[Any] = [
    pytest.param(ImportError("a GPTQ model requires gptqmodel"), "requires gptqmodel; install", id="gptq"),
    pytest.param(ModuleNotFoundError("No module named 'bitsandbytes'"), "bitsandbytes'; install it", id="bitsandbytes"),
    pytest.param(system_error(errno.EACCES), "permission denied: /data/x .*access it", id="permission denied"),
    pytest.param(system_error(errno.EROFS), "permission denied: /data/x .*Read-only", id="read-only file system"),
    pytest.param(InvalidLocation("k", "is a file"), "k: is a file", id="a storage that cannot be one"),
    pytest.param(MemoryError("300 GiB"), "out of memory: 300 GiB; lower `batch.microBatchRows`", id="memory"),
]


@pytest.mark.parametrize(("error", "message"), USERS)
def test_what_only_the_user_can_mend_is_a_user_error_at_once(error: BaseException, message: str) -> None:
    result = result_of(error)
    assert (result.exit_code, result.cause, result.fault) == (ExitCode.USER_ERROR, Cause.USER, None)
    assert re.search(message, result.message)


@pytest.mark.parametrize(
    "error",
    [
        Unreachable("k", "no answer"),
        Replaced("k", "replaced while read"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        TimeoutError("no answer"),
        system_error(errno.EIO),
        system_error(errno.ESTALE),
        torch.distributed.DistBackendError("NCCL communicator was aborted"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}"[:50],
)
def test_lost_machines_stores_and_connections_never_recur_as_the_users(error: BaseException) -> None:
    result = result_of(error)
    assert (result.cause, result.fault) == (Cause.INFRASTRUCTURE, None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("expected m1 and m2 to have the same dtype"), "RuntimeError: expected m1 and m2"),
        (TypeError("cannot pickle 'tokenizers.normalizers.Normalizer' object"), "TypeError: cannot pickle"),
        (RuntimeError("CUDA error: device-side assert triggered"), "RuntimeError: CUDA error"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: CUDA out of memory; lower"),
        (system_error(errno.ENOSPC), "disk full: /data/x: No space left on device; free space"),
        (StoreError("k", "the request failed"), "k: the request failed"),
    ],
)
def test_other_errors_have_a_fault_that_shows_a_recurrence(error: BaseException, message: str) -> None:
    """peft#2018, transformers#34214 and others: bugs in libraries, on which 20 retries were spent."""
    result = result_of(error)
    assert (result.cause, result.last_step) == (Cause.INFRASTRUCTURE, 7)
    assert result.message.startswith(message)
    assert result.fault is not None
    assert result.fault.startswith(f"{type(error).__name__} at runtime/test_failures.py:")
    assert result.fault.endswith(" in result_of")
    assert result.fault == result_of(error).fault


def test_errors_of_another_type_have_another_fault() -> None:
    faults = []
    for key in ("a", "b"):
        try:
            assert {"a": 0}[key]
        except (AssertionError, KeyError) as error:
            faults.append(outcome_of(error).result.fault)
    assert len(set(faults)) == 2


def test_the_message_of_an_unnamed_error_fits_a_termination_message() -> None:
    result = result_of(RuntimeError("begin " + "错" * 5000 + " end"))
    assert result.message.startswith("RuntimeError: begin")
    assert " end\n" in result.message
    assert "test_failures.py" in result.message
    assert len(result.model_dump_json().encode()) <= 4096


def test_a_storage_that_is_a_file_is_named_at_the_first_write(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(InvalidLocation) as caught:
        open_store(str(tmp_path / "store")).write("artifacts/a/attempt.json", b"{}")
    result = outcome_of(caught.value).result
    assert result.cause is Cause.USER
    assert f"{tmp_path}/store" in result.message
    assert "use another `storage`" in result.message


# -- several ranks -----------------------------------------------------------------------------------------------------


def end(code: int, named: bool, at: float, message: str, fault: str | None = None) -> RankOutcome:
    return RankOutcome(failure(code, message, fault=fault), named, at)


CLOSED = end(1, False, 1.0, "connection closed by peer")
BUG = end(1, False, 2.0, "shapes differ", "RuntimeError at loop.py:3")
ASKED = end(75, True, 3.0, "stopped by SIGTERM")


def test_the_error_of_a_rank_of_its_own_explains_the_end_of_the_others() -> None:
    assert combine({0: CLOSED, 1: BUG, 2: ASKED}, range(3), 1).message == "shapes differ"
    assert combine({1: BUG}, range(2), 1).message == "shapes differ", "torchrun kills ranks that wait on a GPU"


def test_a_killed_rank_is_not_hidden_by_those_that_were_asked_to_stop_for_it() -> None:
    result = combine({0: ASKED}, range(2), -9)
    assert (result.cause, result.fault) == (Cause.INFRASTRUCTURE, None)
    assert "rank 1 was killed by signal 9" in result.message
    assert combine({0: ASKED, 1: ASKED}, range(2), 1).cause is Cause.PREEMPTION


def test_a_worker_that_died_before_it_could_report_is_explained_by_its_log() -> None:
    log = """Traceback (most recent call last):
  File "/x/a.py", line 3, in <module>
ModuleNotFoundError: No module named 'x'
"""
    result = combine({}, range(1), 1, lambda rank: log if rank == 0 else "")
    assert result.cause is Cause.USER
    assert "No module named 'x'" in result.message
