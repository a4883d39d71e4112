"""The local driver with a fake trainer: order, cache, retries, interruption and records."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import psutil
import pytest

from stagecoach_api.artifacts import Pointer
from stagecoach_api.outcomes import Cause
from stagecoach_api.store import Store, Unreachable
from stagecoach_core.snapshot import Snapshot
from stagecoach_core.values import RunState, StageState
from stagecoach_local.driver import Driver
from stagecoach_local.machine import Machine
from tests.cli.makers import Bench, Recorder, chain, data_stage, export_stage, pretrain_stage, tokenizer_stage


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def states(outcome_or_snapshot: object) -> dict[str, StageState]:
    snapshot = getattr(outcome_or_snapshot, "snapshot", outcome_or_snapshot)
    assert isinstance(snapshot, Snapshot)
    return {row.name: row.view.state for row in snapshot.rows}


# -- order -------------------------------------------------------------------------------------------------------------


def test_every_stage_runs_once_after_its_dependencies(bench: Bench) -> None:
    bench.write(chain())
    outcome = bench.drive()
    assert outcome.decision.state is RunState.COMPLETE
    assert sorted(bench.started()) == sorted(stage["name"] for stage in chain())
    ended: set[str] = set()
    needs = {"vocabulary": {"corpus"}, "base": {"corpus", "vocabulary"}, "score": {"base", "held"}, "release": {"base"}}
    for event in bench.events("start", "end"):
        if event["event"] == "end":
            ended.add(event["stage"])
        else:
            assert needs.get(event["stage"], set()) <= ended


def test_independent_light_stages_run_concurrently(bench: Bench) -> None:
    bench.write([data_stage("one"), data_stage("two")], {"one": {"waitFor": "two"}, "two": {"waitFor": "one"}})
    assert bench.drive().decision.state is RunState.COMPLETE


def test_a_light_stage_runs_concurrently_with_a_heavy_one(bench: Bench) -> None:
    stages = [data_stage("one"), tokenizer_stage("words", "one"), pretrain_stage("base", "words", "one")]
    stages.append(data_stage("late") | {"after": ["words"]})
    bench.write(stages, {"base": {"waitFor": "late"}, "late": {"waitFor": "base"}})
    assert bench.drive().decision.state is RunState.COMPLETE


def test_heavy_stages_run_one_after_the_other_on_a_small_machine(bench: Bench) -> None:
    stages = [data_stage("one"), tokenizer_stage("words", "one")]
    stages += [pretrain_stage("left", "words", "one"), pretrain_stage("right", "words", "one")]
    stages[-1]["pretrain"] = stages[-1]["pretrain"] | {"sequenceLength": 32}
    bench.write(stages, {"left": {"seconds": 0.2}, "right": {"seconds": 0.2}})
    view = Recorder()
    Driver(bench.job(), view).run()
    heavy = [(event["event"], event["stage"]) for event in bench.events() if event["stage"] in ("left", "right")]
    assert heavy == [("start", "left"), ("end", "left"), ("start", "right"), ("end", "right")]
    waits = {row.view.waiting_for for shown in view.snapshots for row in shown.rows if row.name == "right"}
    assert "a free slot: 2 cores run 1 training or evaluation stage at a time" in waits


def test_heavy_stages_run_concurrently_on_a_large_machine(bench: Bench) -> None:
    stages = [data_stage("one"), tokenizer_stage("words", "one")]
    stages += [pretrain_stage("left", "words", "one"), pretrain_stage("right", "words", "one")]
    stages[-1]["pretrain"] = stages[-1]["pretrain"] | {"sequenceLength": 32}
    bench.write(stages, {"left": {"waitFor": "right"}, "right": {"waitFor": "left"}})
    assert bench.drive(machine=Machine(cores=8)).decision.state is RunState.COMPLETE


def test_ranks_and_threads_depend_on_stage_and_machine_only(bench: Bench) -> None:
    bench.write(chain())
    bench.drive(machine=Machine(cores=6), nproc=2)
    sizes = {event["stage"]: (event["ranks"], event["threads"]) for event in bench.events("start")}
    assert sizes == dict.fromkeys(sizes, (1, "6")) | {"base": (2, "3")}


# -- cache -------------------------------------------------------------------------------------------------------------


def test_a_second_run_takes_every_stage_from_the_cache(bench: Bench) -> None:
    bench.write(chain())
    bench.drive()
    before = {path: path.read_bytes() for path in bench.workspace.default_storage.rglob("*.json")}
    outcome = bench.drive()
    assert set(states(outcome).values()) == {StageState.CACHED}
    assert len(bench.started()) == len(chain())
    assert {path: path.read_bytes() for path in bench.workspace.default_storage.rglob("*.json")} == before


def test_an_edited_stage_and_its_descendants_run_again_and_nothing_else(bench: Bench) -> None:
    bench.write(chain())
    bench.drive()
    outcome = bench.drive("stages.base.optimizer.learningRate=0.002")
    assert bench.started()[len(chain()) :] == ["base", "score", "release"]
    cached = [name for name, state in states(outcome).items() if state is StageState.CACHED]
    assert cached == ["corpus", "held", "vocabulary"]


def test_a_changed_byte_of_input_runs_the_stages_that_depend_on_it(bench: Bench) -> None:
    bench.write(chain(), {"score": {}})
    bench.drive()
    (bench.folder / "data" / "held.txt").write_text("text of help\n", encoding="utf-8")
    bench.drive()
    assert bench.started()[len(chain()) :] == ["held", "score"]


def test_renaming_resources_and_retries_run_nothing_again(bench: Bench) -> None:
    bench.write(chain())
    bench.drive()
    bench.drive("metadata.name=other", "defaults.retries.user=3", "stages.base.resources.ranksPerNode=2")
    assert len(bench.started()) == len(chain())


def test_finished_stages_have_pointers_in_the_store(bench: Bench) -> None:
    bench.write(chain())
    outcome = bench.drive()
    folder = bench.workspace.default_storage / "runs" / "default" / "tiny"
    pointers = {path.stem: Pointer.model_validate_json(path.read_bytes()) for path in folder.iterdir()}
    assert set(pointers) == set(states(outcome))
    for row in outcome.snapshot.rows:
        found = row.view.artifact
        assert found is not None
        assert (pointers[row.name].stage_digest, pointers[row.name].uri) == (row.view.digest, found.uri)
        assert (Path(found.uri.removeprefix("file://")) / "model.txt").is_file()


# -- selection ---------------------------------------------------------------------------------------------------------


def test_until_runs_the_stage_and_its_dependencies(bench: Bench) -> None:
    bench.write(chain())
    outcome = bench.drive(until="vocabulary")
    assert bench.started() == ["corpus", "vocabulary"]
    assert outcome.decision.state is RunState.COMPLETE
    assert states(outcome)["base"] is StageState.SKIPPED


def test_from_runs_a_finished_stage_again_and_later_ones_only_if_its_result_differs(bench: Bench) -> None:
    bench.write(chain())
    bench.drive()
    bench.drive(start="base")
    assert bench.started()[len(chain()) :] == ["base"]
    bench.follow({"base": {"random": True}})
    outcome = bench.drive(start="base")
    assert bench.started()[len(chain()) + 1 :] == ["base", "score", "release"]
    assert outcome.decision.state is RunState.COMPLETE


# -- failures ----------------------------------------------------------------------------------------------------------


def test_an_attempt_that_is_killed_is_retried(bench: Bench) -> None:
    bench.write([data_stage("one")], {"one": [{"kill": True}, {}]})
    outcome = bench.drive()
    assert outcome.decision.state is RunState.COMPLETE
    assert outcome.decision.stages["one"].restarts == {Cause.INFRASTRUCTURE: 1}
    first, second = bench.record().attempts
    assert (first.cause, second.cause) == (Cause.INFRASTRUCTURE, None)
    assert "SIGKILL" in first.message


def test_a_user_error_is_not_retried_and_stages_that_depend_on_it_are_skipped(bench: Bench) -> None:
    bench.write(chain(), {"vocabulary": {"exit": 64, "message": "data/corpus.txt:3: malformed"}})
    outcome = bench.drive()
    assert outcome.decision.state is RunState.FAILED
    assert bench.started().count("vocabulary") == 1
    view = outcome.decision.stages["vocabulary"]
    assert (view.state, view.message) == (StageState.FAILED, "data/corpus.txt:3: malformed")
    assert states(outcome)["base"] is StageState.SKIPPED
    row = next(row for row in outcome.snapshot.rows if row.name == "vocabulary")
    assert row.log is not None
    assert "working on vocabulary" in row.log.read_text(encoding="utf-8")


def test_an_error_that_recurs_is_tried_twice_and_one_that_advances_is_tried_again(bench: Bench) -> None:
    bug = {"exit": 1, "fault": "RuntimeError at loop.py:180 in step", "message": "RuntimeError: shapes differ"}
    bench.write([data_stage("one")], {"one": [bug | {"lastStep": 10}, bug | {"lastStep": 20}, bug | {"lastStep": 20}]})
    view = bench.drive().decision.stages["one"]
    assert view.state is StageState.FAILED
    assert view.restarts == {Cause.INFRASTRUCTURE: 2, Cause.USER: 1}
    assert view.message.startswith("attempts 2 and 3 ended with the same error at the same place")
    assert view.message.endswith("RuntimeError: shapes differ")


def test_a_request_to_run_again_gives_an_error_that_recurred_a_second_chance(bench: Bench) -> None:
    bug = {"exit": 1, "fault": "RuntimeError at loop.py:180 in step"}
    bench.write([data_stage("one")], {"one": bug})
    bench.drive()
    assert len(bench.started()) == 2
    bench.follow({"one": [bug, bug, bug, {}]})
    assert bench.drive().decision.state is RunState.COMPLETE


def test_a_failed_run_resumes_where_it_failed_once_the_cause_is_fixed(bench: Bench) -> None:
    bench.write(chain(), {"vocabulary": {"exit": 64}})
    bench.drive()
    done = set(bench.started()) - {"vocabulary"}
    bench.follow({})
    outcome = bench.drive()
    assert outcome.decision.state is RunState.COMPLETE
    assert all(bench.started().count(name) == 1 for name in done)
    assert bench.record().attempts[-1].number >= 1


def test_the_message_of_an_attempt_without_a_result_has_its_exit_code_and_log(bench: Bench) -> None:
    bench.write([data_stage("one")], {"one": {"silent": True, "exit": 64}})
    outcome = bench.drive()
    message = outcome.decision.stages["one"].message
    assert "exit code 64" in message
    assert "Traceback: something broke" in message


def test_a_worker_in_its_own_session_does_not_outlive_its_launcher(bench: Bench) -> None:
    bench.write([data_stage("one")], {"one": {"child": True}})
    bench.drive()
    (child,) = bench.events("child")
    assert not psutil.pid_exists(child["pid"]) or psutil.Process(child["pid"]).status() == psutil.STATUS_ZOMBIE


def test_an_error_of_the_driver_leaves_no_process(bench: Bench) -> None:
    class Broken(Recorder):
        def show(self, snapshot: Snapshot) -> None:
            if bench.events("start"):
                raise OSError(28, "No space left on device")

    bench.write([data_stage("one")], {"one": {"seconds": 30}})
    with pytest.raises(OSError, match="No space left"):
        Driver(bench.job(), Broken()).run()
    (start,) = bench.events("start")
    assert not psutil.pid_exists(start["pid"])


# -- interruption ------------------------------------------------------------------------------------------------------


def test_an_interrupt_stops_attempts_at_a_checkpoint_and_is_never_charged(bench: Bench) -> None:
    bench.write([data_stage("one")], {"one": [{"seconds": 30}, {}]})
    view = Recorder()
    outcome = Driver(bench.job(), view, interrupts=lambda: int(bool(bench.events("start")))).run()
    assert (outcome.decision.state, outcome.interrupted) == (RunState.SUSPENDED, True)
    (attempt,) = bench.record().attempts
    assert (attempt.cause, attempt.last_step) == (Cause.PREEMPTION, 3)
    assert view.messages == ["stopping one at a checkpoint; press Ctrl-C again to kill"]
    resumed = bench.drive()
    assert resumed.decision.state is RunState.COMPLETE
    assert [event["attempt"] for event in bench.events("start")] == [1, 2]


def test_a_second_interrupt_kills_attempts_that_do_not_stop(bench: Bench) -> None:
    bench.write([data_stage("one")], {"one": {"seconds": 30, "stubborn": True}})
    calls: list[float] = []

    def interrupts() -> int:
        if not bench.events("start"):
            return 0
        calls.append(time.monotonic())
        return 1 if calls[-1] - calls[0] < 0.3 else 2

    outcome = Driver(bench.job(grace_seconds=60.0), Recorder(), interrupts).run()
    assert outcome.interrupted
    (start,) = bench.events("start")
    assert not psutil.pid_exists(start["pid"])


def test_an_attempt_that_does_not_stop_in_time_is_killed(bench: Bench) -> None:
    bench.write([data_stage("one")], {"one": {"seconds": 30, "stubborn": True}})
    job = bench.job(grace_seconds=0.2)
    outcome = Driver(job, Recorder(), interrupts=lambda: int(bool(bench.events("start")))).run()
    assert outcome.interrupted
    assert bench.record().attempts[0].cause is Cause.PREEMPTION


def test_a_run_that_is_suspended_by_its_file_starts_nothing(bench: Bench) -> None:
    bench.write([data_stage("one")], suspend=True)
    assert bench.drive(suspend=True).decision.state is RunState.SUSPENDED
    assert bench.started() == []


# -- outages of the store ----------------------------------------------------------------------------------------------


class Flaky:
    """A store that is unreachable for `failures` calls, after `after` successful ones."""

    def __init__(self, store: Store, failures: int, after: int) -> None:
        self._store = store
        self._failures = failures
        self._after = after

    def __getattr__(self, name: str) -> object:
        if name in ("read", "write", "delete"):
            self._after -= 1
            if self._after < 0 < self._failures:
                self._failures -= 1
                raise Unreachable(name, "no answer")
        return getattr(self._store, name)


def flaky(store: Store, failures: int, after: int) -> Store:
    return cast(Store, Flaky(store, failures, after))


def test_a_temporary_outage_of_the_store_only_delays_the_run(bench: Bench) -> None:
    bench.write(chain())
    job = bench.job(store_pause_seconds=0.05)
    view = Recorder()
    outcome = Driver(replace(job, store=flaky(job.store, failures=3, after=5)), view).run()
    assert outcome.decision.state is RunState.COMPLETE
    assert len([text for text in view.messages if "storage is not reachable" in text]) == 3
    assert len(list((bench.workspace.default_storage / "runs" / "default" / "tiny").iterdir())) == len(chain())


def test_a_store_that_was_never_reachable_ends_the_run_at_once(bench: Bench) -> None:
    bench.write(chain())
    job = bench.job()
    with pytest.raises(Unreachable):
        Driver(replace(job, store=flaky(job.store, failures=1, after=0)), Recorder()).run()
    assert bench.started() == []


# -- records -----------------------------------------------------------------------------------------------------------


def test_the_record_has_every_stage_and_attempt(bench: Bench) -> None:
    bench.write([data_stage("one")])
    bench.drive()
    record = bench.record()
    assert (record.state, record.file) == (RunState.COMPLETE, str(bench.file))
    assert record.stages["one"].state is StageState.SUCCEEDED
    (attempt,) = record.attempts
    folder = bench.workspace.run("default", "tiny").attempt("one", 1)
    stage = json.loads(folder.stage_file.read_bytes())
    assert (stage["stage"], stage["attempt"], stage["digest"]) == ("one", 1, attempt.digest)
    assert attempt.ended is not None
    assert attempt.ended >= attempt.started


def test_an_attempt_folder_from_a_lost_record_is_replaced(bench: Bench) -> None:
    bench.write([data_stage("one")], {"one": {"exit": 64, "message": "first"}})
    bench.drive()
    bench.workspace.run("default", "tiny").state_file.unlink()
    bench.follow({})
    assert bench.drive().decision.state is RunState.COMPLETE


def test_a_process_id_that_now_belongs_to_another_process_is_not_killed(bench: Bench) -> None:
    bench.write([data_stage("one")], {"one": [{"kill": True}, {}]})
    bench.drive(until="one")
    folder = bench.workspace.run("default", "tiny")
    record = folder.load()
    assert record is not None
    forged = record.attempts[0].model_copy(update={"ended": None, "pid": os.getpid(), "process_created": 1.0})
    folder.save(record.model_copy(update={"attempts": (forged,)}))
    assert bench.drive().decision.state is RunState.COMPLETE
    assert psutil.pid_exists(os.getpid())


def test_the_outcome_has_the_manifests_of_all_stages(bench: Bench) -> None:
    bench.write(chain(), {"base": {"tokens": 6400}})
    outcome = bench.drive()
    tokens = {item.kind: item.tokens for item in outcome.manifests.values()}
    assert tokens == {"data": 0, "tokenizer": 0, "pretrain": 6400, "evaluate": 0, "export": 0}
    assert export_stage("release", "base")["name"] in states(outcome)
