"""All kinds of stage: each is declared once, and everything that should follow from it is there."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from stagecoach_api import kinds
from stagecoach_api.fields import fields_of
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.reading.loading import load_run
from stagecoach_api.reading.validation import RULES
from stagecoach_api.references import ArtifactType, RecordSource, Reference
from stagecoach_api.spec import Stage
from stagecoach_api.stage_kind import Ranks, StageKind, reads, references_of
from stagecoach_api.summary_tables import ChangeTable, MetricTable
from tests import ROOT

KINDS = pytest.mark.parametrize("kind", STAGE_KINDS.values(), ids=STAGE_KINDS)
ORDER = ["data", "tokenizer", "pretrain", "sft", "rewardModel", "ppo", "dpo", "evaluate", "export"]


def test_the_order_of_the_kinds_is_that_of_the_crd() -> None:
    assert [name for name in STAGE_KINDS if name in ORDER] == ORDER
    assert [name for name in fields_of(Stage) if name in STAGE_KINDS] == list(STAGE_KINDS)
    assert len({kind.position for kind in STAGE_KINDS.values()}) == len(STAGE_KINDS)


@KINDS
def test_a_kind_is_a_member_of_stage_described_by_its_summary(kind: StageKind) -> None:
    field = fields_of(Stage)[kind.name]
    assert field.annotation == kind.config | None
    assert field.description == f"{kind.summary} If unset: the stage is of another kind."
    assert re.fullmatch(r"[A-Z][^.]*\.", kind.summary)


@KINDS
def test_a_kind_has_a_trainer_module_with_a_run_function(kind: StageKind) -> None:
    """The module is not imported: that would import torch."""
    path = ROOT / "trainer" / "stagecoach_trainer" / "stages" / f"{kind.module}.py"
    assert re.search(r"^def run\(config: \w+, context: StageContext\) -> StageOutcome:", path.read_text(), re.MULTILINE)


def test_the_trainer_has_no_module_without_a_kind() -> None:
    folder = ROOT / "trainer" / "stagecoach_trainer" / "stages"
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert modules == {kind.module for kind in STAGE_KINDS.values()}


@KINDS
def test_a_kind_is_used_by_an_example(kind: StageKind) -> None:
    runs = [load_run(path).run for path in sorted((ROOT / "examples").glob("*.yaml"))]
    assert any(stage.kind == kind.name for run in runs for stage in run.spec.stages)


@KINDS
def test_a_kind_is_in_the_reference_and_in_the_readme(kind: StageKind) -> None:
    assert f"## Stage kind `{kind.name}`" in (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert f"`{kind.name}`" in readme_list()


def readme_list() -> str:
    """The sentence of the README that lists the kinds."""
    (found,) = re.findall(r"exactly one kind: ([^.]*)\.", (ROOT / "README.md").read_text(encoding="utf-8"))
    return str(found)


def test_the_readme_lists_the_kinds_in_their_order_and_no_others() -> None:
    assert re.findall(r"`(\w+)`", readme_list()) == list(STAGE_KINDS)


@KINDS
def test_every_reference_of_a_kind_accepts_artifacts_that_some_kind_makes(kind: StageKind) -> None:
    made = {other.makes for other in STAGE_KINDS.values()}
    for path, model in references_of(kind.config):
        accepted = kind.readable_at(tuple(path.split(".")))
        assert accepted, path
        assert accepted <= made, path
        assert (accepted == {ArtifactType.RECORDS}) is issubclass(model, RecordSource), path


@KINDS
def test_a_kind_that_trains_uses_all_ranks_and_every_core_and_shows_what_it_measured(kind: StageKind) -> None:
    if kind.config.trains:
        assert kind.ranks is Ranks.ALL
        assert kind.heavy
        assert kind.tables
    assert kind.config.trains is ("budget" in kind.config.model_fields)


def test_of_the_first_kinds_only_training_uses_all_ranks_and_only_export_is_a_release() -> None:
    kinds = {name: STAGE_KINDS[name] for name in ORDER}
    assert [name for name, kind in kinds.items() if kind.ranks is Ranks.ALL] == ORDER[2:7]
    assert [name for name, kind in kinds.items() if kind.heavy] == ORDER[2:]
    assert [name for name, kind in kinds.items() if kind.release] == ["export"]


@KINDS
def test_every_rule_of_a_kind_is_checked_and_has_a_name_of_its_own(kind: StageKind) -> None:
    assert set(kind.rules) <= set(RULES)
    assert len({rule.__name__ for rule in RULES}) == len(RULES)


@KINDS
def test_every_function_of_a_kind_s_module_that_looks_like_a_rule_is_declared(kind: StageKind) -> None:
    """A rule that is written and not listed in `rules` would silently be forgotten."""
    module = importlib.import_module(f"stagecoach_api.kinds.{kind.module}")
    functions = [item for item in vars(module).values() if getattr(item, "__module__", "") == module.__name__]
    rules = [item for item in functions if getattr(item, "__annotations__", {}).get("draft") == "Draft"]
    assert {rule.__name__ for rule in rules} == {rule.__name__ for rule in kind.rules}


@KINDS
def test_titles_of_tables_are_unique_and_templates_name_the_set(kind: StageKind) -> None:
    tables = {table for other in STAGE_KINDS.values() for table in other.tables}
    assert len({table.title for table in tables}) == len(tables)
    for table in kind.tables:
        if isinstance(table, ChangeTable):
            assert table.before.count("{set}") == table.after.count("{set}") == 1
        else:
            assert isinstance(table, MetricTable)


# -- what a declaration rejects ----------------------------------------------------------------------------------------


def test_a_reference_that_reads_does_not_mention_is_an_error_at_import() -> None:
    with pytest.raises(TypeError, match=r"kind `sft`: `reads` lacks \['model', 'tokenizer'\]"):
        replace(STAGE_KINDS["sft"], reads={})


def test_a_name_that_is_not_in_camel_case_is_an_error_at_import() -> None:
    with pytest.raises(TypeError, match="kind `reward_model`: the name must be in camelCase"):
        replace(STAGE_KINDS["rewardModel"], name="reward_model")


def test_a_path_of_reads_that_is_not_a_reference_is_an_error_at_import() -> None:
    sft = STAGE_KINDS["sft"]
    with pytest.raises(TypeError, match=r"has \['modle'\], which are not references"):
        replace(sft, reads={**sft.reads, "modle": reads(ArtifactType.MODEL)})


def test_sources_of_records_need_no_mention() -> None:
    assert "data" not in STAGE_KINDS["sft"].reads
    assert STAGE_KINDS["sft"].readable_at(("data", 3)) == {ArtifactType.RECORDS}
    assert STAGE_KINDS["ppo"].readable_at(("rewards", 0, "model")) == {ArtifactType.REWARD_MODEL}


@pytest.mark.parametrize("declared", [None, STAGE_KINDS["sft"]], ids=["nothing", "a kind of another name"])
def test_a_module_that_declares_no_kind_of_its_name_is_an_error(
    declared: StageKind | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kinds, "import_module", lambda name: SimpleNamespace(KIND=declared))
    with pytest.raises(TypeError, match=r"stagecoach_api\.kinds\.data must declare a StageKind of that name as `KIND`"):
        kinds._discover()


def test_references_are_found_at_any_depth() -> None:
    found = dict(references_of(STAGE_KINDS["evaluate"].config))
    assert found["rewards.rivals.model"] is Reference
    assert {"model", "heldOut", "exactMatch.data", "rewards.data", "rewards.rewards.model"} < set(found)
