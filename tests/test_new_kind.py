"""A new kind of stage takes two files and an example: a throw-away one is added to a copy of the packages and used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import ROOT

KIND = '''
"""`headCount`: add up the numbers of the ranks and count what they were given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from stagecoach_api.base import Count
from stagecoach_api.constraints import Constraint, either, given
from stagecoach_api.draft import Draft, Fault, configs
from stagecoach_api.references import ArtifactType, NamedSource, Reference
from stagecoach_api.stage_kind import Ranks, StageConfig, StageKind, reads


class HeadCountStage(StageConfig):
    """Count heads."""

    constraints = (
        Constraint(
            either(given("at_least"), given("at_most")), "`headCount` needs a limit", "give `atLeast` or `atMost`"
        ),
    )

    sets: Annotated[tuple[NamedSource, ...], Field(max_length=8)] = ()
    """Records to count."""

    vocabulary: Reference | None = None
    """A vocabulary. If unset: there is none."""

    at_least: Count | None = None
    """Fewest heads. If unset: no limit."""

    at_most: Count | None = None
    """Most heads. If unset: no limit."""

    factor: Count = 7
    """Factor of every number."""


def limits_are_in_order(draft: Draft) -> Iterator[Fault]:
    for stage, config in configs(draft, HeadCountStage):
        if config.at_least is not None and config.at_most is not None and config.at_least > config.at_most:
            yield Fault(stage.at("atLeast"), config.at_least, "must not be above `atMost`", "lower it")


KIND = StageKind(
    name="headCount",
    position=45,
    summary="Count heads.",
    config=HeadCountStage,
    makes=ArtifactType.REPORT,
    reads={"vocabulary": reads(ArtifactType.VOCABULARY)},
    ranks=Ranks.ALL,
    heavy=True,
    rules=(limits_are_in_order,),
)
'''
STAGE = '''
"""`headCount`: a collective over all ranks."""

from __future__ import annotations

import json

from stagecoach_trainer.runtime.context import StageContext, StageOutcome


def run(config, context: StageContext) -> StageOutcome:
    import torch
    import torch.distributed as dist

    total = torch.tensor(config.factor * (context.world.rank + 1))
    dist.all_reduce(total)
    if context.world.is_main:
        (context.output / "count.json").write_text(json.dumps({"sum": int(total), "ranks": context.world.size}))
    return StageOutcome(metrics={"heads": float(total)})
'''
EXAMPLE = """
apiVersion: stagecoach.dev/v1alpha1
kind: TrainingRun
metadata: {name: heads}
spec:
  stages:
  - name: corpus
    data: {sources: [{uri: text.jsonl, format: text}]}
  - name: count
    headCount: {sets: [{name: all, stage: corpus}], atLeast: 1}
"""
ADDED = {
    "operator/stagecoach_api/kinds/head_count.py": KIND,
    "trainer/stagecoach_trainer/stages/head_count.py": STAGE,
}


@dataclass(frozen=True)
class Tree:
    """A copy of the packages with the new kind, and a folder with a run file."""

    root: Path

    @property
    def work(self) -> Path:
        return self.root / "work"

    def python(self, *arguments: str, rc: int = 0) -> str:
        """Run Python with the copy's packages; return its output, standard error included."""
        paths = os.pathsep.join(str(self.root / room) for room in ("operator", "trainer"))
        environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command,
            cwd=self.work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == rc, done.stdout
        return done.stdout

    def cli(self, *arguments: str, rc: int = 0) -> str:
        return self.python("-m", "stagecoach_cli", *arguments, rc=rc)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    root = tmp_path_factory.mktemp("tree")
    for room in ("operator", "trainer"):
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in ADDED.items():
        (root / name).write_text(text.lstrip(), encoding="utf-8")
    made = Tree(root)
    made.work.mkdir()
    (made.work / "heads.yaml").write_text(EXAMPLE, encoding="utf-8")
    lines = [json.dumps({"text": f"line {number} of a text"}) for number in range(20)]
    (made.work / "text.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made


def test_the_copy_is_what_is_run(tree: Tree) -> None:
    script = (
        "import stagecoach_api, stagecoach_cli, stagecoach_trainer as t; print(stagecoach_api.__file__, t.__file__)"
    )
    assert tree.python("-c", script).count(str(tree.root)) == 2


def test_a_run_with_the_new_kind_is_valid(tree: Tree) -> None:
    assert "heads" in tree.cli("validate", "heads.yaml")


BAD = """
  - name: a
    headCount: {atLest: 1}
  - name: b
    headCount: {}
  - name: c
    headCount: {atLeast: 2, atMost: 1}
  - name: d
    headCount: {atLeast: 1, sets: [{name: twice, uri: text.jsonl}, {name: twice, uri: text.jsonl}]}
  - name: e
    headCount: {atLeast: 1, vocabulary: {stage: corpus}}
  - name: f
    headCount: {atLeast: 1, sets: [{name: own, stage: count}]}
  - name: g
    headCont: {atLeast: 1}
"""
PROBLEMS = (
    "stages.a.headCount.atLest: `atLest` is not a field of HeadCountStage",
    "stages.b.headCount: `headCount` needs a limit (got {}); give `atLeast` or `atMost`",
    "stages.c.headCount.atLeast: must not be above `atMost`",
    "stages.d.headCount.sets[1]: must have a name of its own in this list",
    "stages.e.headCount.vocabulary.stage: must be a stage of kind tokenizer, and `corpus` is a data stage",
    "stages.f.headCount.sets[0].stage: must be a stage of kind data, and `count` is a headCount stage",
    "did you mean `headCount`?",
)


def test_all_mistakes_in_it_are_reported_at_once(tree: Tree) -> None:
    (tree.work / "bad.yaml").write_text(EXAMPLE + BAD.lstrip("\n"), encoding="utf-8")
    text = tree.cli("validate", "bad.yaml", rc=2)
    assert [problem for problem in PROBLEMS if problem not in text] == []


def test_it_is_planned_and_rendered(tree: Tree) -> None:
    assert "headCount" in tree.cli("plan", "heads.yaml")
    rendered = tree.cli("render", "heads.yaml")
    assert rendered.count("kind: JobSet") == 2
    assert '"kind":"headCount"' in rendered.replace(": ", ":")


def test_it_runs_as_several_ranks_and_is_in_the_summary(tree: Tree) -> None:
    text = tree.cli("run", "heads.yaml", "--nproc", "2")
    assert "Metrics" in text
    assert re.search(r"^count +heads +21$", text, re.MULTILINE)
    (found,) = tree.work.glob(".stagecoach/store/artifacts/*/attempts/*/*/output/count.json")
    assert json.loads(found.read_text()) == {"sum": 7 * (1 + 2), "ranks": 2}


def test_it_is_in_every_table_made_of_the_kinds(tree: Tree) -> None:
    script = """
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_local.machine import Machine, admits
print(list(STAGE_KINDS)[3:6], [admits(Machine(cores=2), "headCount", [other]) for other in ("sft", "data")])
"""
    assert tree.python("-c", script).strip() == "['sft', 'headCount', 'rewardModel'] [False, True]"


def test_the_generators_write_it(tree: Tree) -> None:
    tree.python("-m", "stagecoach_api.schema.generate", "--root", str(tree.root))
    crd = (tree.root / "charts/stagecoach/files/trainingruns.yaml").read_text(encoding="utf-8")
    assert "has(self.atLeast) || has(self.atMost)" in crd
    assert "has(self.sft), has(self.headCount), has(self.rewardModel)" in crd
    reference = (tree.root / "docs/reference.md").read_text(encoding="utf-8")
    assert "## Stage kind `headCount`" in reference
    assert "HeadCountStage" in (tree.root / "docs/schema/trainingrun.schema.json").read_text(encoding="utf-8")


def test_a_missing_trainer_module_is_named(tree: Tree, tmp_path: Path) -> None:
    script = "from stagecoach_trainer.stages import load_stage; load_stage('headCount')"
    other = Tree(tmp_path)
    other.work.mkdir()
    for room in ("operator", "trainer"):
        shutil.copytree(tree.root / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "trainer/stagecoach_trainer/stages/head_count.py").unlink()
    assert "has no module stagecoach_trainer.stages.head_count in this trainer" in other.python("-c", script, rc=1)
