"""Processes are found and stopped by their records."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.processes import Processes, run, wait_until
from tests.cluster.report import ClusterError

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "print(child.pid, flush=True); time.sleep(600)",
]


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path / "processes")
    yield made
    for name in made.names:
        made.stop(name, 0.1)


def first_output(processes: Processes, name: str) -> str:
    wait_until(f"{name} has written to its log", lambda: bool(processes.log(name).read_text()), 30)
    return processes.log(name).read_text()


def test_a_process_runs_in_its_own_session_and_is_started_once(processes: Processes, tmp_path: Path) -> None:
    assert processes.start("one", SLEEP)
    assert not processes.start("one", SLEEP)
    pid = json.loads((tmp_path / "processes" / "one.json").read_text())["pid"]
    assert os.getsid(pid) == pid
    assert first_output(processes, "one") == "up\n"


def test_another_caller_finds_and_stops_a_process(processes: Processes, tmp_path: Path) -> None:
    processes.start("one", SLEEP)
    other = Processes(tmp_path / "processes")
    assert other.names == ["one"]
    assert other.is_alive("one")
    other.stop("one")
    assert not processes.is_alive("one")
    assert other.names == []


def test_a_process_that_ignores_sigterm_is_killed_with_its_children(processes: Processes) -> None:
    processes.start("one", STUBBORN)
    child = int(first_output(processes, "one"))
    processes.stop("one", grace_seconds=0.3)
    wait_until("the child has ended", lambda: not psutil.pid_exists(child) or zombie(child), 10)


def zombie(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_another_process_with_the_recorded_pid_is_not_touched(processes: Processes, tmp_path: Path) -> None:
    folder = tmp_path / "processes"
    folder.mkdir()
    (folder / "one.json").write_text(json.dumps({"pid": os.getpid(), "started": 1.0}))
    assert not processes.is_alive("one")
    processes.stop("one")  # would end this very test


def test_a_process_that_ends_too_early_is_reported_with_the_end_of_its_log(processes: Processes) -> None:
    processes.start("one", [sys.executable, "-c", "import sys; sys.exit('no such flag')"])
    with pytest.raises(ClusterError, match="no such flag"):
        processes.wait_for("one", lambda: False, seconds=30)


def test_a_process_gets_only_the_needed_environment_variables(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not for others")
    show = [sys.executable, "-c", "import os, time; print(sorted(os.environ), flush=True); time.sleep(600)"]
    processes.start("one", show, {"ROOT_ACCESS_KEY": "for it"})
    names = first_output(processes, "one")
    assert "ROOT_ACCESS_KEY" in names
    assert "PATH" in names
    assert "AWS_SECRET_ACCESS_KEY" not in names


def test_a_command_that_fails_raises_with_its_message() -> None:
    with pytest.raises(ClusterError, match="exit code 3: out of order"):
        run([sys.executable, "-c", "import sys; print('out of order', file=sys.stderr); sys.exit(3)"])
