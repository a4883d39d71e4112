"""Validation: all problems of a run are reported at once, each with place, value, rule and remedy."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.problems import InvalidRun, Problem, format_value, nearest
from stagecoach_api.reading.validation import RULES, validate
from tests.api.makers import REMOVED, document, edited

SHA = "a" * 64


def problems_of(found: Any) -> tuple[Problem, ...]:
    try:
        validate(found)
    except InvalidRun as error:
        return error.problems
    return ()


def test_a_run_with_many_kinds_of_stage_is_valid() -> None:
    run = validate(document())
    assert {stage.kind for stage in run.spec.stages} <= set(STAGE_KINDS)
    assert len({stage.kind for stage in run.spec.stages}) >= 9


def test_fields_that_the_api_server_adds_to_an_object_are_accepted() -> None:
    stored = document()
    stored["metadata"] |= {"uid": "1", "resourceVersion": "2", "generation": 1, "managedFields": [], "finalizers": []}
    stored["status"] = {"stages": []}
    assert validate(stored) == validate(document())


# (sentence, edits, path of the only problem, texts it must contain)
BAD: list[tuple[str, list[tuple[str, Any]], str, tuple[str, ...]]] = [
    # -- fields
    (
        "an unknown field is reported with the most similar name",
        [("stages.sft.sft.optimzer", 1)],
        "stages.sft.sft.optimzer",
        ("not a field of SftStage", "did you mean `optimizer`?"),
    ),
    (
        "an unknown kind of stage is reported with the most similar one",
        [("stages.release.exprot", {"model": {"stage": "sft"}}), ("stages.release.export", REMOVED)],
        "stages.release.exprot",
        ("did you mean `export`?",),
    ),
    (
        "a field in Python's spelling is reported with YAML's",
        [("stages.pretrain.pretrain.sequence_length", 8)],
        "stages.pretrain.pretrain.sequence_length",
        ("did you mean `sequenceLength`?",),
    ),
    (
        "a field of a model without fields is to be removed",
        [("stages.pretrain.pretrain.trainable", {"full": {"rank": 3}})],
        "stages.pretrain.pretrain.trainable.full.rank",
        ("which has none", "remove it"),
    ),
    (
        "a missing field is reported with its purpose",
        [("stages.sft.sft.optimizer", {})],
        "stages.sft.sft.optimizer.learningRate",
        ("is required; add `learningRate` (Highest learning rate)",),
    ),
    (
        "a value outside an enum is reported with the most similar one",
        [("stages.sft.sft.template.name", "alpacca")],
        "stages.sft.sft.template.name",
        ("did you mean `alpaca`?", "chatml"),
    ),
    (
        "a number above its limit is reported with the limit",
        [("stages.sft.sft.optimizer.learningRate", 20)],
        "stages.sft.sft.optimizer.learningRate",
        ("must be at most 10", "got 20"),
    ),
    (
        "a number below its limit is reported with the limit",
        [("seed", -1)],
        "spec.seed",
        ("must be at least 0", "got -1"),
    ),
    (
        "infinity is not allowed",
        [("stages.sft.sft.optimizer.learningRate", float("inf"))],
        "stages.sft.sft.optimizer.learningRate",
        ("finite",),
    ),
    (
        "a fraction is not an integer",
        [("stages.sft.sft.batch.samples", 1.5)],
        "stages.sft.sft.batch.samples",
        ("whole number",),
    ),
    (
        "a number in quotes is a string",
        [("stages.sft.sft.batch.samples", "8")],
        "stages.sft.sft.batch.samples",
        ("without quotes",),
    ),
    (
        "a number is not a string",
        [("storage.uri", 96)],
        "spec.storage.uri",
        ("must be a string", "put it in quotes"),
    ),
    (
        "a string is not a boolean",
        [("suspend", "yes")],
        "spec.suspend",
        ("true or false",),
    ),
    (
        "a quantity has a form",
        [("defaults.resources", {"memory": "64 GB"})],
        "spec.defaults.resources.memory",
        ("an amount of memory with its unit", "64Gi"),
    ),
    (
        "a name has a form",
        [("/metadata.name", "Demo_Run")],
        "metadata.name",
        ("lower-case letters, digits and `-`",),
    ),
    (
        "a name has a longest length",
        [("/metadata.name", "a" * 64)],
        "metadata.name",
        ("at most 63 characters",),
    ),
    (
        "an empty list of stages is too short",
        [("stages", [])],
        "spec.stages",
        ("at least 1 item",),
    ),
    (
        "another API version is rejected",
        [("/apiVersion", "stagecoach.dev/v1")],
        "apiVersion",
        ("stagecoach.dev/v1alpha1",),
    ),
    (
        "a mapping is not a list",
        [("stages.sft.sft.data", {"uri": "a.json"})],
        "stages.sft.sft.data",
        ("must be a list", "`- `"),
    ),
    (
        "a bare name is not a reference",
        [("stages.sft.sft.model", "pretrain")],
        "stages.sft.sft.model",
        ("{stage: pretrain}", "{uri: pretrain}"),
    ),
    (
        "an empty mapping is reported as empty",
        [("stages.sft.resources", None)],
        "stages.sft.resources",
        ("is empty", "leave the field out"),
    ),
    # -- exactly one
    (
        "a reference is a stage or a URI, not both",
        [("stages.sft.sft.model.uri", "base")],
        "stages.sft.sft.model",
        ("exactly one of stage, uri", "keep one of stage, uri"),
    ),
    (
        "a reference is a stage or a URI, not neither",
        [("stages.sft.sft.model", {})],
        "stages.sft.sft.model",
        ("exactly one of stage, uri", "add one"),
    ),
    (
        "a stage of two kinds is rejected",
        [("stages.release.data", {"sources": [{"uri": "x"}]})],
        "stages.release",
        ("exactly one of data, tokenizer", "keep one of data, export"),
    ),
    (
        "a stage of no kind is rejected",
        [("stages.release.export", REMOVED)],
        "stages.release",
        ("exactly one of data, tokenizer", "add one of them"),
    ),
    (
        "a member without a value is not set",
        [("stages.sft.sft.trainable", {"full": None})],
        "stages.sft.sft.trainable",
        ("write `full: {}`",),
    ),
    (
        "a model is an existing or a new one, not both",
        [("stages.pretrain.pretrain.model", {"uri": "base"})],
        "stages.pretrain.pretrain",
        ("exactly one of model, architecture",),
    ),
    (
        "a custom template needs its text",
        [("stages.sft.sft.template.name", "custom")],
        "stages.sft.sft.template",
        ("`jinja` belongs to `name: custom`",),
    ),
    (
        "heads divide the width",
        [("stages.pretrain.pretrain.architecture.numHeads", 5)],
        "stages.pretrain.pretrain.architecture",
        ("must be divisible by `numHeads`", 'got {"hiddenSize": 32, "numHeads": 5}', "change one of them"),
    ),
    # -- the graph
    (
        "two stages of one name are rejected",
        [("stages.9", {"name": "sft", "data": {"sources": [{"uri": "x"}]}})],
        "spec.stages[9].name",
        ("must be unique", "spec.stages[3]"),
    ),
    (
        "an input that names no stage is reported with the most similar one",
        [("stages.release.export.model.stage", "stf")],
        "stages.release.export.model.stage",
        ("did you mean `sft`?",),
    ),
    (
        "an `after` that names no stage is reported with the most similar one",
        [("stages.release.after", ["scores"])],
        "stages.release.after[0]",
        ("did you mean `score`?",),
    ),
    (
        "a stage does not depend on itself",
        [("stages.release.export.model.stage", "release")],
        "stages.release.export.model.stage",
        ("must not be the stage itself",),
    ),
    (
        "a cycle of inputs is shown",
        [("stages.corpus.after", ["release"])],
        "stages.corpus.after[0]",
        ("corpus -> ", " -> release -> corpus"),
    ),
    (
        "a model must come from a stage that makes one",
        [("stages.release.export.model.stage", "corpus")],
        "stages.release.export.model.stage",
        ("of kind pretrain or sft or ppo or dpo or export", "`corpus` is a data stage", "name one of pretrain, sft"),
    ),
    (
        "records must come from a data stage",
        [("stages.sft.sft.data", [{"stage": "vocabulary"}])],
        "stages.sft.sft.data[0].stage",
        ("of kind data", "name one of corpus"),
    ),
    (
        "a vocabulary must come from a stage that has one",
        [("stages.pretrain.pretrain.tokenizer.stage", "corpus")],
        "stages.pretrain.pretrain.tokenizer.stage",
        ("of kind tokenizer or",),
    ),
    (
        "a part that is empty is not read",
        [
            ("stages.corpus.data.heldOutShare", 0),
            ("stages.pretrain.pretrain.heldOut", REMOVED),
            ("stages.score.evaluate.heldOut.0.split", "heldout"),
        ],
        "stages.score.evaluate.heldOut[0].split",
        ("`corpus` holds out no records", "heldOutShare"),
    ),
    # -- the data mix
    (
        "every set has a weight or none has",
        [("stages.pretrain.pretrain.data", [{"stage": "corpus", "weight": 1}, {"uri": "more.jsonl"}])],
        "stages.pretrain.pretrain.data[1]",
        ("has no weight", "every set"),
    ),
    (
        "some weight is above zero",
        [("stages.pretrain.pretrain.data.0.weight", 0)],
        "stages.pretrain.pretrain.data",
        ("all weights are 0",),
    ),
    (
        "two sets of one name are rejected",
        [("stages.sft.sft.data", [{"uri": "a/x.json"}, {"uri": "b/x.json"}])],
        "stages.sft.sft.data[1]",
        ("a name of its own", "x.json"),
    ),
    (
        "two held-out sets of one name are rejected",
        [("stages.score.evaluate.heldOut.1", {"name": "zh", "uri": "more.jsonl"})],
        "stages.score.evaluate.heldOut[1]",
        ("a name of its own",),
    ),
    (
        "a phase weighs sets that exist",
        [
            (
                "stages.pretrain.pretrain.phases",
                [{"name": "a", "tokens": 2048, "weights": [{"name": "corpse", "weight": 1}]}],
            ),
            ("stages.pretrain.pretrain.budget", REMOVED),
        ],
        "stages.pretrain.pretrain.phases[0].weights[0].name",
        ("did you mean `corpus`?",),
    ),
    (
        "two phases of one name are rejected",
        [
            ("stages.pretrain.pretrain.phases", [{"name": "a", "tokens": 2048}, {"name": "a", "tokens": 2048}]),
            ("stages.pretrain.pretrain.budget", REMOVED),
        ],
        "stages.pretrain.pretrain.phases[1].name",
        ("must be unique",),
    ),
    (
        "plain text has no turns",
        [("stages.sft.sft.data.0.format", "text")],
        "stages.sft.sft.data[0].format",
        ("no turns", "pretrain"),
    ),
    (
        "held-out text that is trained on measures nothing",
        [("stages.pretrain.pretrain.heldOut.sets.0.split", "train")],
        "stages.pretrain.pretrain.heldOut.sets[0]",
        ("also trained on", "split: heldout"),
    ),
    # -- batch, budget, schedule
    (
        "a batch smaller than a row is rejected",
        [("stages.pretrain.pretrain.batch.tokens", 100)],
        "stages.pretrain.pretrain.batch.tokens",
        ("100 tokens", "128 tokens"),
    ),
    (
        "a phase's batch smaller than its row is rejected",
        [
            ("stages.pretrain.pretrain.phases", [{"name": "a", "tokens": 2048, "batchTokens": 64}]),
            ("stages.pretrain.pretrain.budget", REMOVED),
        ],
        "stages.pretrain.pretrain.phases[0].batchTokens",
        ("64 tokens", "128 tokens"),
    ),
    (
        "a micro-batch larger than the batch is rejected",
        [("stages.pretrain.pretrain.batch.microBatchRows", 9)],
        "stages.pretrain.pretrain.batch.microBatchRows",
        ("at most 8",),
    ),
    (
        "a budget below one step is rejected",
        [("stages.pretrain.pretrain.budget.tokens", 1000)],
        "stages.pretrain.pretrain.budget.tokens",
        ("one optimiser step of 1,024 tokens",),
    ),
    (
        "a budget in addition to phases is rejected",
        [("stages.pretrain.pretrain.phases", [{"name": "a", "tokens": 2048}])],
        "stages.pretrain.pretrain.budget",
        ("the phases are the budget", "2,048"),
    ),
    (
        "a warm-up longer than training is rejected",
        [("stages.pretrain.pretrain.schedule", {"warmupSteps": 11})],
        "stages.pretrain.pretrain.schedule.warmupSteps",
        ("at most 10, the steps",),
    ),
    (
        "warm-up and decay add up to at most the whole",
        [("stages.pretrain.pretrain.schedule", {"name": "wsd", "warmupShare": 0.6, "decayShare": 0.5})],
        "stages.pretrain.pretrain.schedule",
        ("add up to at most 1",),
    ),
    (
        "early stop watches a set that is measured",
        [("stages.pretrain.pretrain.earlyStop", {"set": "en"})],
        "stages.pretrain.pretrain.earlyStop.set",
        ("a set in `heldOut.sets`", "zh"),
    ),
    (
        "early stop needs measurements during training",
        [
            ("stages.pretrain.pretrain.earlyStop", {"set": "zh"}),
            ("stages.pretrain.pretrain.heldOut.everySteps", REMOVED),
        ],
        "stages.pretrain.pretrain.heldOut.everySteps",
        ("`earlyStop` needs measurements",),
    ),
    # -- what learns
    (
        "new rows need a vocabulary that grows",
        [
            ("stages.pretrain.pretrain.architecture", REMOVED),
            ("stages.pretrain.pretrain.model", {"uri": "base"}),
            ("stages.pretrain.pretrain.tokenizer", REMOVED),
            ("stages.pretrain.pretrain.trainable", {"embeddings": {}}),
        ],
        "stages.pretrain.pretrain.trainable.embeddings.rows",
        ("no new rows", "give the `tokenizer`"),
    ),
    (
        "new rows next to adapters need a vocabulary that grows",
        [("stages.sft.sft.trainable.lora.newRows", True)],
        "stages.sft.sft.trainable.lora.newRows",
        ("no new rows",),
    ),
    (
        "a new model has no new rows",
        [("stages.pretrain.pretrain.trainable", {"embeddings": {}})],
        "stages.pretrain.pretrain.trainable.embeddings.rows",
        ("all rows of a model made from `architecture` are new",),
    ),
    (
        "a layer has one role in LoRA",
        [("stages.sft.sft.trainable.lora", {"rank": 4, "targets": ["q_proj"], "modulesToSave": ["q_proj"]})],
        "stages.sft.sft.trainable.lora.modulesToSave[0]",
        ("is in `targets` too",),
    ),
    (
        "only an adapter is continued",
        [("stages.sft.sft.trainable.lora.continueAdapter", True)],
        "stages.sft.sft.trainable.lora.continueAdapter",
        ("`pretrain` makes whole weights",),
    ),
    (
        "rows fit into the architecture's context",
        [("stages.pretrain.pretrain.sequenceLength", 256)],
        "stages.pretrain.pretrain.sequenceLength",
        ("at most 128", "maxPositionEmbeddings"),
    ),
    (
        "offload of parameters needs ZeRO 3",
        [("stages.pretrain.pretrain.sharding", {"zero": 2, "offloadParameters": "cpu"})],
        "stages.pretrain.pretrain.sharding",
        ("needs `zero: 3`",),
    ),
    # -- URIs and images
    (
        "a store of an unknown kind is rejected",
        [("storage.uri", "gs://models/demo")],
        "spec.storage.uri",
        ("`s3://…`, `file:///…` or a path", "gs://"),
    ),
    (
        "an input at an unknown kind of store is rejected",
        [("stages.sft.sft.data.0.uri", "https://example.com/a.json")],
        "stages.sft.sft.data[0].uri",
        ("copy it there",),
    ),
    (
        "a file URI has three slashes",
        [("storage.uri", "file://models/demo")],
        "spec.storage.uri",
        ("file:///folder",),
    ),
    (
        "an S3 URI names a bucket",
        [("storage.uri", "s3:///demo")],
        "spec.storage.uri",
        ("must name a bucket",),
    ),
    (
        "an endpoint is a URL",
        [("storage.endpoint", "localhost:9000")],
        "spec.storage.endpoint",
        ("http or https URL",),
    ),
    (
        "a custom image is named by digest",
        [("stages.sft.image", "trainer:latest")],
        "stages.sft.image",
        ("by digest", "@sha256:"),
    ),
    # -- data and evaluation
    (
        "length limits are in order",
        [("stages.corpus.data.steps", [{"length": {"minCharacters": 9, "maxCharacters": 3}}])],
        "stages.corpus.data.steps[0].length",
        ("`minCharacters` must be at most `maxCharacters`",),
    ),
    (
        "an evaluation measures something",
        [("stages.score.evaluate", {"model": {"stage": "sft"}})],
        "stages.score.evaluate",
        ("measures nothing",),
    ),
    (
        "a gate watches a held-out set that is measured",
        [("stages.score.evaluate.gates.0.metric", "heldOut.en.bitsPerCharacter")],
        "stages.score.evaluate.gates[0].metric",
        ("a set in `heldOut`", "zh"),
    ),
    (
        "a gate watches a task that is evaluated",
        [("stages.score.evaluate.gates.0.metric", "verses.exactMatch")],
        "stages.score.evaluate.gates[0].metric",
        ("did you mean `verse.exactMatch`?",),
    ),
    (
        "a gate has a limit",
        [("stages.score.evaluate.gates", [{"metric": "heldOut.zh.loss"}])],
        "stages.score.evaluate.gates[0]",
        ("give `atLeast`, `atMost` or both",),
    ),
    (
        "a gate can be passed",
        [("stages.score.evaluate.gates.0.atLeast", 10)],
        "stages.score.evaluate.gates[0]",
        ("`atLeast` must not be above `atMost`",),
    ),
    (
        "a share is given as a fraction",
        [("stages.score.evaluate.gates", [{"metric": "verse.exactMatch", "atLeast": 90}])],
        "stages.score.evaluate.gates[0].atLeast",
        ("0.9 for 90 %",),
    ),
]


@pytest.mark.parametrize(("edits", "path", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_one_clear_problem(edits: list[tuple[str, Any]], path: str, words: tuple[str, ...]) -> None:
    found = problems_of(edited(*edits))
    assert [problem.path for problem in found] == [path]
    text = str(found[0])
    assert [word for word in words if word not in text] == []
    assert found[0].remedy


def test_problems_of_the_schema_and_of_the_graph_are_reported_together() -> None:
    spoiled = edited(
        ("stages.sft.sft.optimizer", {"learningRate": -1}),  # the schema
        ("stages.sft.sft.model.stage", "pretrian"),  # the graph, in the same stage
        ("stages.pretrain.pretrain.batch.tokens", 10),  # a rule, in another
        ("stages.release.after", ["scor"]),
        ("storage.uri", "ftp://x"),
        ("/metadata.name", "NO"),
    )
    assert {problem.path for problem in problems_of(spoiled)} == {
        "stages.sft.sft.optimizer.learningRate",
        "stages.sft.sft.model.stage",
        "stages.pretrain.pretrain.batch.tokens",
        "stages.release.after[0]",
        "spec.storage.uri",
        "metadata.name",
    }


def test_every_cycle_is_reported_once() -> None:
    spoiled = edited(
        ("stages.corpus.after", ["release"]),
        ("stages.9", {"name": "a", "export": {"model": {"stage": "b"}}}),
        ("stages.10", {"name": "b", "export": {"model": {"stage": "a"}}}),
    )
    cycles = [problem.rule.rpartition(": ")[2] for problem in problems_of(spoiled)]
    assert "a -> b -> a" in cycles
    assert len(cycles) == len(set(cycles))
    for cycle in cycles:
        assert cycle.split(" -> ")[0] == cycle.split(" -> ")[-1]


def test_a_stage_that_cannot_be_read_does_not_affect_its_readers() -> None:
    spoiled = edited(("stages.sft.sft.batch", REMOVED))
    assert [problem.path for problem in problems_of(spoiled)] == ["stages.sft.sft.batch"]


def test_new_rows_of_an_earlier_stage_may_be_trained_on() -> None:
    grown = edited(
        ("stages.pretrain.pretrain.architecture", REMOVED),
        ("stages.pretrain.pretrain.model", {"uri": "base"}),
        ("stages.sft.sft.trainable.lora.newRows", True),
    )
    assert problems_of(grown) == ()


def test_a_gate_on_a_metric_of_the_harness_is_left_to_the_harness() -> None:
    harness = edited(
        ("stages.score.evaluate.lmEval", [{"task": "arc_easy"}]),
        ("stages.score.evaluate.gates", [{"metric": "arc_easy.acc", "atLeast": 0.3}]),
    )
    assert problems_of(harness) == ()


def test_credentials_in_a_uri_are_rejected_and_never_repeated() -> None:
    spoiled = edited(("storage.uri", "s3://KEY:SECRET@models/demo"), ("storage.endpoint", "https://KEY:SECRET@host"))
    found = problems_of(spoiled)
    assert {problem.path for problem in found} == {"spec.storage.uri", "spec.storage.endpoint"}
    assert "SECRET" not in str(InvalidRun(found))


@pytest.mark.parametrize("document_", [{}, {"spec": None}, {"spec": {"stages": 3}}, {"spec": {"stages": [1, None]}}])
def test_documents_that_are_not_a_run_at_all_are_problems_not_crashes(document_: dict[str, Any]) -> None:
    found = problems_of(document_)
    assert "metadata" in {problem.path for problem in found}


def test_values_that_are_not_json_are_problems_not_crashes() -> None:
    assert problems_of(edited(("seed", {1, 2})))[0].remedy
    nested: dict[str, Any] = {}
    nested["self"] = nested
    assert problems_of({"spec": nested})


def test_the_list_of_problems_reads_from_the_top() -> None:
    error = InvalidRun([Problem("spec.seed", -1, "must be at least 0", "write 0", 4, "run.yaml")])
    assert str(error) == (
        "1 problem in the run:\n- run.yaml:4: spec.seed: must be at least 0 (got -1); write 0"
    )  # fmt: skip


def test_a_line_without_a_file_is_shown_as_a_line() -> None:
    assert str(Problem("spec.seed", -1, "must be at least 0", "write 0", 4)).startswith("line 4: spec.seed: ")


def test_a_very_long_list_of_problems_is_cut() -> None:
    text = str(InvalidRun([Problem("spec.seed", -1, "must be at least 0", "write 0")] * 150))
    assert text.startswith("150 problems")
    assert text.endswith("- and 50 more")
    assert len(text.splitlines()) == 102


def test_long_values_are_cut_in_messages() -> None:
    assert len(format_value("x" * 10_000)) == 80


@pytest.mark.parametrize(
    ("word", "expected"),
    [("learningrate", "learningRate"), ("learning_rate", "learningRate"), ("learn", "learningRate"), ("zzz", None)],
)
def test_the_most_similar_name_is_found_whatever_the_spelling(word: str, expected: str | None) -> None:
    assert nearest(word, ["batch", "learningRate", "weightDecay"]) == expected


def test_every_rule_is_named_once() -> None:
    assert len({rule.__name__ for rule in RULES}) == len(RULES) >= 30


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PLACES = [
    "/metadata",
    "/spec",
    "storage",
    "stages",
    "stages.sft",
    "stages.sft.sft",
    "stages.sft.sft.model",
    "stages.sft.sft.data",
    "stages.sft.after",
    "stages.pretrain.pretrain.phases",
    "stages.pretrain.pretrain.trainable",
    "stages.score.evaluate.gates",
    "defaults",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(place=st.sampled_from(PLACES), value=json_values)
def test_any_value_anywhere_is_accepted_or_reported_never_a_crash(place: str, value: Any) -> None:
    spoiled = edited((place, value))
    for problem in problems_of(spoiled):
        assert problem.rule
        assert problem.remedy
        assert str(problem)
