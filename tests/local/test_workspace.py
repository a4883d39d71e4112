"""The workspace folder: records, locks and atomic writes; and reading growing files."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from stagecoach_api.progress import ProgressEvent
from stagecoach_local.tail import ProgressTail, last_lines
from stagecoach_local.workspace import RunFolder, RunLocked, RunRecord, Workspace, WorkspaceError, write_atomically


def record(run: str, namespace: str = "default") -> RunRecord:
    return RunRecord(namespace=namespace, run=run, file="/run.yaml", storage_uri="file:///store", updated=1.0)


def test_a_record_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    folder = Workspace(tmp_path).run("default", "tiny")
    assert folder.load() is None
    folder.save(record("tiny"))
    assert folder.load() == record("tiny")


def test_a_damaged_record_is_named_with_what_to_do(tmp_path: Path) -> None:
    folder = Workspace(tmp_path).run("default", "tiny")
    folder.save(record("tiny"))
    folder.state_file.write_text('{"run": "tiny"}', encoding="utf-8")
    with pytest.raises(WorkspaceError, match=r"state\.json: .* move the file away"):
        folder.load()


def test_a_run_is_found_by_name_and_by_namespace(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for namespace, name in (("default", "tiny"), ("team", "tiny"), ("team", "large")):
        workspace.run(namespace, name).save(record(name, namespace))
    assert workspace.find("large").path == tmp_path / "runs" / "team" / "large"
    assert workspace.find("team/tiny").path == tmp_path / "runs" / "team" / "tiny"
    with pytest.raises(WorkspaceError, match="several namespaces; give one of default/tiny, team/tiny"):
        workspace.find("tiny")
    with pytest.raises(WorkspaceError, match=r"no run `other`.*default/tiny, team/large, team/tiny"):
        workspace.find("other")


def locked_folders(*folders: RunFolder) -> list[RunFolder]:
    return [folder for folder in folders if folder.is_locked]


def test_a_run_is_locked_by_one_driver_at_a_time(tmp_path: Path) -> None:
    folder = Workspace(tmp_path).run("default", "tiny")
    assert locked_folders(folder) == []
    with folder.lock():
        assert locked_folders(folder) == [folder]
        with pytest.raises(RunLocked, match=r"another driver is working on this run: process \d+ since"), folder.lock():
            pass
        with Workspace(tmp_path).run("default", "other").lock():
            pass
    assert locked_folders(folder) == []


def test_an_atomic_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, None)  # type: ignore[arg-type]
    assert [item.name for item in tmp_path.iterdir()] == ["state.json"]
    assert path.read_bytes() == b"old"


def test_an_atomic_write_to_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_bytes(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write does, without the file's name

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match=r"No space left on device: '.*/state\.json'"):
        write_atomically(tmp_path / "state.json", b"new")


def test_logs_of_an_ended_attempt_are_kept_and_its_working_files_deleted(tmp_path: Path) -> None:
    folder = Workspace(tmp_path).run("default", "tiny").attempt("one", 1)
    for name in ("output/model", "spool/range-0000", "logs/metrics.jsonl", "outcomes/rank-00000.json", "log.txt"):
        write_atomically(folder.path / name, b"x")
    folder.drop_scratch()
    assert sorted(path.name for path in folder.path.iterdir()) == ["log.txt", "logs", "outcomes"]


def test_the_workspace_keeps_itself_out_of_git(tmp_path: Path) -> None:
    Workspace(tmp_path / "w").prepare()
    assert (tmp_path / "w" / ".gitignore").read_text(encoding="utf-8") == "*\n"


def line(number: int) -> str:
    return ProgressEvent(time=float(number), activity="train", done=number).model_dump_json()


def test_progress_is_read_as_complete_events_and_each_once(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    tail = ProgressTail(path)
    assert tail.added() == []
    path.write_text(f"{line(1)}\n{line(2)}\nnonsense\n{line(3)[:10]}", encoding="utf-8")
    assert [event.done for event in tail.added()] == [1, 2]
    assert tail.added() == []
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{line(3)[10:]}\n")
    assert [event.done for event in tail.added()] == [3]


def test_the_last_lines_of_a_log_omit_overwritten_states_of_progress_bars(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    assert last_lines(path, 3) == []
    path.write_bytes(b"x" * 40_000 + b"\nfirst\n\n 10%\r 50%\r100%\nlast \xff\n")
    assert last_lines(path, 3) == ["first", "100%", "last �"]
