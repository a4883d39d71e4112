"""The commands on a cluster's runs against a fake API server: their requests, output and exit codes."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from stagecoach_api.names import ANNOTATION_RETRY
from stagecoach_api.status import ConditionType, Reason, StageState
from stagecoach_cli.cluster import watch as watching
from stagecoach_cli.display.reports import StageReport
from stagecoach_cli.display.summary import print_warnings
from tests.cli.cluster.makers import (
    NAMESPACE,
    Body,
    FakeCluster,
    complete_status,
    condition,
    failed_status,
    stage_status,
    status_of,
    suspended_status,
)
from tests.cli.makers import Bench, Cli, data_stage


@pytest.fixture
def bench(cluster: FakeCluster, tmp_path: Any) -> Bench:
    made = Bench(tmp_path)
    made.write([data_stage("one")], storage={"uri": "s3://models/tiny", "inputs": "s3://inputs"})
    return made


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "POLL_SECONDS", 0.01)


def patches(cluster: FakeCluster) -> list[str]:
    return [request for request in cluster.requests if request.startswith("PATCH")]


# -- submit ------------------------------------------------------------------------------------------------------------


def test_a_run_is_created_then_configured_by_server_side_apply(bench: Bench, cluster: FakeCluster, cli: Cli) -> None:
    assert cli("submit", "run.yaml") == (0, "trainingrun.stagecoach.dev/tiny created\n")
    assert cluster.runs[NAMESPACE, "tiny"]["spec"] == json.loads(bench.file.read_text())["spec"]
    assert cli("submit", "run.yaml", "--set", "seed=7", "--storage", "s3://elsewhere") == (
        0,
        "trainingrun.stagecoach.dev/tiny configured\n",
    )
    spec = cluster.runs[NAMESPACE, "tiny"]["spec"]
    assert (spec["seed"], spec["storage"]["uri"]) == (7, "s3://elsewhere")
    assert all("fieldManager=stagecoach-cli" in request and "force" not in request for request in patches(cluster))


def test_the_namespace_is_that_of_the_command_line_the_file_or_the_context(
    bench: Bench, cluster: FakeCluster, cli: Cli
) -> None:
    assert cli("submit", "run.yaml", "-n", "mine")[0] == 0
    assert cli("submit", "run.yaml", "--set", "metadata.namespace=filed")[0] == 0
    assert cli("submit", "run.yaml", "--context", "other")[0] == 0
    assert sorted(cluster.runs) == [("filed", "tiny"), ("mine", "tiny"), ("other", "tiny")]
    code, output = cli("submit", "run.yaml", "-n", "mine", "--set", "metadata.namespace=filed")
    assert (code, "is for namespace `filed`, but --namespace is `mine`" in output) == (2, True)


def test_submit_does_not_look_for_inputs_on_this_machine(bench: Bench, cluster: FakeCluster, cli: Cli) -> None:
    (bench.folder / "data" / "one.txt").unlink()
    bench.write([data_stage("one")])
    (bench.folder / "data" / "one.txt").unlink()
    assert cli("submit", "run.yaml")[0] == 0


def test_an_invalid_file_is_rejected_before_any_request(bench: Bench, cluster: FakeCluster, cli: Cli) -> None:
    code, output = cli("submit", "run.yaml", "--set", "stages.one.after=[gone]")
    assert code == 2
    assert "gone" in output
    assert cluster.requests == []


def test_rejections_by_the_api_server_are_reported_with_its_message(
    bench: Bench, cluster: FakeCluster, cli: Cli
) -> None:
    cluster.refused["PATCH"] = (422, 'TrainingRun.stagecoach.dev "tiny" is invalid: spec.seed: too large')
    assert cli("submit", "run.yaml") == (
        2,
        'stagecoach: TrainingRun.stagecoach.dev "tiny" is invalid: spec.seed: too large\n',
    )
    cluster.refused["PATCH"] = (409, 'Apply failed with 1 conflict: conflict with "kubectl": .spec.seed')
    code, output = cli("submit", "run.yaml")
    assert (code, "--force-conflicts" in output) == (1, True)
    cluster.refused.clear()
    cluster.is_installed = False
    code, output = cli("submit", "run.yaml")
    assert (code, "has no TrainingRuns; install the operator" in output) == (1, True)


def test_conflicting_fields_are_taken_over_with_force_conflicts(bench: Bench, cluster: FakeCluster, cli: Cli) -> None:
    assert cli("submit", "run.yaml", "--force-conflicts")[0] == 0
    assert "force=true" in patches(cluster)[0]


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        pytest.param(
            complete_status(1, stage_status(state=StageState.CACHED)), 0, "team/tiny: complete", id="complete"
        ),
        pytest.param(
            failed_status(
                1, Reason.USER_ERROR, "bad", stage_status(state=StageState.FAILED, message="data.jsonl:3: bad")
            ),
            1,
            "data.jsonl:3: bad\nteam/tiny: failed; retry with `stagecoach resume team/tiny`",
            id="failed",
        ),
        pytest.param(failed_status(1, Reason.CANCELLED, "cancelled"), 130, "team/tiny: cancelled", id="cancelled"),
        pytest.param(suspended_status(1), 130, "team/tiny: suspended", id="suspended"),
        pytest.param(
            status_of(conditions=(condition(ConditionType.ACCEPTED, False, Reason.INPUT_NOT_FOUND, "s3://x: gone"),)),
            2,
            "Accepted is False, InputNotFound: s3://x: gone",
            id="rejected",
        ),
    ],
)
def test_submit_waits_and_ends_with_the_exit_codes_of_a_local_run(
    status: Any, code: int, text: str, bench: Bench, cluster: FakeCluster, cli: Cli
) -> None:
    answers = iter([status_of(stage_status(state=StageState.PENDING)), status_of(stage_status()), status])

    def operator(run: Body) -> None:
        run["status"] = next(answers).model_dump(mode="json", exclude_none=True)

    real = cluster.requests

    class Requests(list[str]):
        def append(self, request: str) -> None:
            super().append(request)
            if request.startswith("GET"):
                operator(cluster.runs[NAMESPACE, "tiny"])

    cluster.requests = Requests(real)
    got, output = cli("submit", "run.yaml", "--wait")
    assert (got, text in output) == (code, True), output
    assert "sft: started" in output


# -- status ------------------------------------------------------------------------------------------------------------

WAITS = (
    "couldn't assign flavors to pod set w: insufficient unused quota for cpu in flavor default-flavor, 2 more needed"
)


def test_status_shows_stages_and_warnings(cluster: FakeCluster, cli: Cli) -> None:
    waiting = condition(ConditionType.QUOTA_RESERVED, False, Reason.WAITING_FOR_QUOTA, f"stage `sft`: {WAITS}")
    stage = stage_status(state=StageState.PENDING, waiting_for=WAITS)
    cluster.add_run(stage, status=status_of(stage, conditions=(waiting,)))
    code, output = cli("status", "demo")
    assert code == 0
    first, row, *rest = output.splitlines()
    assert first == "team/demo: progressing  s3://models/demo"
    assert row.split()[1:3] == ["sft", "sft"]
    assert rest == [f"QuotaReserved is False, WaitingForQuota: stage `sft`: {WAITS}"]


def test_a_long_wait_reason_without_a_condition_is_shown_in_full(cluster: FakeCluster, cli: Cli) -> None:
    cluster.add_run(stage_status(state=StageState.PENDING, waiting_for=WAITS))
    assert f"sft: waiting for {WAITS}" in cli("status", "demo")[1].splitlines()


def test_status_shows_why_a_stage_failed(cluster: FakeCluster, cli: Cli) -> None:
    failed = stage_status(state=StageState.FAILED, message="OOMKilled (attempt 2, pod p, node n)", restarts={"user": 1})
    cluster.add_run(status=failed_status(1, Reason.USER_ERROR, "stage `sft`: OOMKilled", failed))
    _, output = cli("status", "team/demo")
    assert "sft failed (user × 1)" in output
    assert "Failed is True, UserError: stage `sft`: OOMKilled" in output


def test_status_shows_a_stages_warnings_as_the_local_view_does(cluster: FakeCluster, cli: Cli) -> None:
    texts = ("3 records have a field `weight`, which is not read", "and 2 more warnings")
    attempt = {"number": 1, "digest": "d" * 64, "name": "a", "started": "2026-11-22T11:00:00Z", "warnings": texts}
    cluster.add_run(status=complete_status(1, stage_status(state=StageState.SUCCEEDED, attempts=(attempt,))))
    _, output = cli("status", "team/demo")
    local = Console(file=io.StringIO(), width=200)
    print_warnings(local, {"sft": StageReport(warnings=texts)})
    assert local.file.getvalue().strip() in output  # type: ignore[attr-defined]
    assert json.loads(cli("status", "team/demo", "-o", "json")[1])["stages"][0]["warnings"] == list(texts)


def test_without_a_name_all_runs_of_the_namespace_are_listed(cluster: FakeCluster, cli: Cli) -> None:
    cluster.add_run(stage_status())
    cluster.add_run(name="later", creationTimestamp="2026-11-22T09:30:00Z")
    cluster.add_run(name="foreign", namespace="other")
    lines = cli("status")[1].splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["team/demo", "team/later"]
    assert "other/foreign" in cli("status", "-n", "other")[1]


def test_watching_continues_while_the_api_server_is_unreachable_and_ends_with_the_run(
    cluster: FakeCluster, cli: Cli
) -> None:
    cluster.add_run(stage_status())
    asked = []

    class Requests(list[str]):
        def append(self, request: str) -> None:
            asked.append(request)
            cluster.refused.clear()
            if len(asked) in (2, 3):
                cluster.refused["GET"] = (503, "starting")
            if len(asked) == 5:
                cluster.set_status(complete_status(1, stage_status(state=StageState.SUCCEEDED)))

    cluster.requests = Requests()
    code, output = cli("status", "demo", "--watch")
    assert code == 0
    assert output.count("answered 503: starting; this may be temporary; retrying") == 1
    assert "team/demo: complete" in output


# -- suspend, resume, cancel -------------------------------------------------------------------------------------------


def test_suspending_waits_until_the_run_is_suspended(cluster: FakeCluster, cli: Cli) -> None:
    cluster.add_run(stage_status())

    def suspend(run: Body) -> None:
        assert run["spec"]["suspend"] is True
        cluster.set_status(suspended_status(run["metadata"]["generation"]))

    cluster.on_patch = suspend
    code, output = cli("suspend", "demo", "--wait")
    assert code == 0
    assert output.splitlines() == [
        "team/demo: stopping at a checkpoint; resume with `stagecoach resume team/demo`",
        "team/demo: suspended; checkpoints: `sft` at step 120",
    ]


def test_cancelling_waits_until_nothing_runs(cluster: FakeCluster, cli: Cli) -> None:
    cluster.add_run(stage_status())
    cluster.on_patch = lambda run: cluster.set_status(failed_status(run["metadata"]["generation"], Reason.CANCELLED))
    code, output = cli("cancel", "demo", "--wait")
    assert (code, output.splitlines()[-1]) == (0, "team/demo: cancelled")
    assert cluster.runs[NAMESPACE, "demo"]["spec"]["cancel"] is True


@pytest.mark.parametrize("held", [{"suspend": True}, {"cancel": True}, {"suspend": True, "cancel": True}])
def test_resuming_reverts_suspend_and_cancel(held: dict[str, bool], cluster: FakeCluster, cli: Cli) -> None:
    status = failed_status(1, Reason.CANCELLED) if "cancel" in held else suspended_status(1)
    run = cluster.add_run(spec={"stages": [], **held}, status=status)
    cluster.on_patch = lambda run: cluster.set_status(status_of(generation=run["metadata"]["generation"]))
    assert cli("resume", "demo", "--wait") == (
        0,
        "team/demo: resuming from its checkpoints\nteam/demo: progressing\n",
    )
    assert {name: run["spec"][name] for name in held} == dict.fromkeys(held, False)
    assert "annotations" not in run["metadata"]


def test_resuming_a_failed_run_requests_a_retry(cluster: FakeCluster, cli: Cli) -> None:
    late = datetime(2099, 1, 1, tzinfo=UTC)  # the cluster's clock is ahead of this one, which does not matter
    record = {"number": 1, "digest": "a" * 64, "name": "r", "started": late, "ended": late, "cause": "user"}
    failed = stage_status(state=StageState.FAILED, attempts=[record])
    run = cluster.add_run(status=failed_status(1, Reason.USER_ERROR, "bad", failed))
    cluster.on_patch = lambda run: cluster.set_status(status_of(stage_status()))
    code, output = cli("resume", "demo", "--wait")
    assert (code, output.splitlines()[0]) == (0, "team/demo: retrying")
    assert datetime.fromisoformat(run["metadata"]["annotations"][ANNOTATION_RETRY]) < late
    assert run["metadata"]["generation"] == 1


def test_resuming_a_run_that_is_progressing_changes_nothing(cluster: FakeCluster, cli: Cli) -> None:
    cluster.add_run(stage_status())
    assert cli("resume", "demo") == (0, "team/demo: progressing; nothing to resume\n")
    assert patches(cluster) == []


# -- target ------------------------------------------------------------------------------------------------------------

VERBS = [("status",), ("suspend",), ("resume",), ("cancel",), ("logs",)]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_an_unknown_run_is_reported_with_the_known_ones(verb: tuple[str, ...], cluster: FakeCluster, cli: Cli) -> None:
    cluster.add_run(name="one")
    cluster.add_run(name="two")
    code, output = cli(*verb, "gone")
    assert code == 2
    assert "no run `gone` in namespace `team`; known runs: one, two" in output


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_an_unknown_run_without_a_cluster_is_reported_with_this_folders_runs(
    verb: tuple[str, ...], cli: Cli, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = cli(*verb, "gone")
    assert code == 2
    assert "no run `gone` in" in output
    assert "no cluster is configured" in output


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_a_forbidden_request_is_exit_code_1_with_the_api_servers_message(
    verb: tuple[str, ...], cluster: FakeCluster, cli: Cli
) -> None:
    cluster.refused["GET"] = (403, 'trainingruns.stagecoach.dev is forbidden: User "me" cannot get')
    code, output = cli(*verb, "demo")
    assert code == 1
    assert 'User "me" cannot get; ask the administrator of' in output
    assert "Traceback" not in output


def test_a_run_of_this_folder_takes_precedence_unless_a_cluster_is_selected(
    bench: Bench, cluster: FakeCluster, cli: Cli
) -> None:
    bench.write([data_stage("one")])
    bench.drive()
    cluster.add_run(name="tiny")
    assert "default/tiny: complete" in cli("status", "tiny")[1]
    assert "default/tiny" in cli("status")[1]
    assert cluster.requests == []
    assert "team/tiny: progressing" in cli("status", "tiny", "-n", NAMESPACE)[1]
    assert "other/foreign" not in cli("status", "--context", "test")[1]
    assert "team/tiny" in cli("status", "--context", "test")[1]


def test_a_name_with_a_namespace_must_not_contradict_the_option(cluster: FakeCluster, cli: Cli) -> None:
    code, output = cli("status", "team/demo", "-n", "other")
    assert (code, "`team/demo` contradicts --namespace other" in output) == (2, True)
