"""The CRD: a structural schema that the API server accepts and that rejects what the models reject."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import Field

from stagecoach_api.base import Model, constraints_of
from stagecoach_api.fields import FieldPath, fields_of, format_path, one_of_members, walk_models
from stagecoach_api.kinds import STAGE_KINDS
from stagecoach_api.kinds.ppo import Guards
from stagecoach_api.problems import InvalidRun
from stagecoach_api.reading.loading import load_run
from stagecoach_api.reading.validation import validate
from stagecoach_api.rewards import RewardTerm
from stagecoach_api.schema.crd import custom_resource_definition, structural_schema, structural_schema_of
from stagecoach_api.schema.editor_schema import editor_schema
from stagecoach_api.spec import TrainingRun
from stagecoach_api.status import TrainingRunStatus
from stagecoach_api.training import Batch
from tests import ROOT
from tests.api.makers import REMOVED, document, edited
from tests.api.schema.cel import holds

SCHEMA = structural_schema()
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
MAX_APPLY_BYTES = 1_000_000
"""An object in etcd may have 1.5 MB; requests for a CRD are JSON."""


def nodes(schema: dict[str, Any], path: FieldPath = ()) -> Iterator[tuple[FieldPath, dict[str, Any]]]:
    """Yield every node of a structural schema, properties by their name."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, (*path, name))
    if "items" in schema:
        yield from nodes(schema["items"], (*path, 0))
    if isinstance(schema.get("additionalProperties"), dict):
        yield from nodes(schema["additionalProperties"], (*path, "*"))


NODES = list(nodes(SCHEMA))


# -- structural schema (apiextensions.k8s.io/v1, checked here on its own) ----------------------------------------------

ALLOWED = {
    "description", "type", "format", "enum", "required", "properties", "items", "additionalProperties", "nullable",
    "minimum", "maximum", "minLength", "maxLength", "pattern", "minItems", "maxItems", "maxProperties",
    "x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-int-or-string",
}  # fmt: skip
TYPES = {"object", "array", "string", "integer", "number", "boolean", "quantity"}


def type_of(node: dict[str, Any]) -> str:
    """Return the node's type; one that is text or a whole number has no `type` in a structural schema."""
    if node.get("x-kubernetes-int-or-string"):
        assert "type" not in node
        return "quantity"
    return str(node["type"])


def test_every_node_has_a_type_and_only_keywords_a_structural_schema_knows() -> None:
    for path, node in NODES:
        assert type_of(node) in TYPES, format_path(path)
        assert set(node) <= ALLOWED, format_path(path)


def test_keywords_are_used_only_with_their_type() -> None:
    owners = {"properties": "object", "required": "object", "additionalProperties": "object", "items": "array"}
    owners |= {"maxItems": "array", "minItems": "array", "maxLength": "string", "pattern": "string"}
    for path, node in NODES:
        for keyword, kind in owners.items():
            known = {kind} | ({"quantity"} if kind == "string" else set())
            assert keyword not in node or type_of(node) in known, (format_path(path), keyword)
        assert not ("properties" in node and "additionalProperties" in node), format_path(path)
        assert set(node.get("required", ())) <= set(node.get("properties", ())), format_path(path)


def test_metadata_restricts_the_name_only() -> None:
    assert set(SCHEMA["properties"]["metadata"]) == {"type", "properties"}
    assert set(SCHEMA["properties"]["metadata"]["properties"]) <= {"name", "generateName"}


STAGE_SETTINGS = ("spec.defaults", "spec.stages[0]")
"""What `StageSettings` holds is in both."""


def test_lists_with_keys_have_items_with_these_keys_required() -> None:
    keyed = {}
    for path, node in NODES:
        if type_of(node) == "array":
            assert node["x-kubernetes-list-type"] in {"atomic", "map"}, format_path(path)
        if node.get("x-kubernetes-list-type") == "map":
            (key,) = node["x-kubernetes-list-map-keys"]
            assert key in node["items"]["required"], format_path(path)
            keyed[format_path(path)] = key
    pods = {f"{where}.pods.{name}": "name" for where in STAGE_SETTINGS for name in ("volumes", "fabric")}
    assert keyed == {"spec.stages": "name", "status.stages": "name", "status.conditions": "type", **pods}


def test_everything_is_bounded_so_that_cel_rules_stay_within_the_cost_limit() -> None:
    """The API server estimates the cost of a rule for the largest object that the schema allows."""
    for path, node in NODES:
        if path in {("apiVersion",), ("kind",)}:
            continue
        if type_of(node) in {"string", "quantity"}:
            assert "maxLength" in node or "enum" in node or node.get("format") == "date-time", format_path(path)
        if type_of(node) == "array":
            assert node["maxItems"] <= 1024, format_path(path)
        if "additionalProperties" in node:
            assert "maxProperties" in node, format_path(path)


def test_every_field_of_spec_and_status_is_described() -> None:
    items = (0, "*")  # of lists and maps: their field describes them
    undescribed = [path for path, node in NODES if path and "description" not in node and path[-1] not in items]
    assert [format_path(path) for path in undescribed if path[0] != "metadata"] == []


def test_null_is_allowed_only_where_it_differs_from_leaving_the_field_out() -> None:
    limits = Guards.model_fields.items()
    guards = {field.alias for name, field in limits if name.startswith(("min_", "max_")) and field.default is not None}
    assert {str(path[-1]) for path, node in NODES if node.get("nullable")} == {"clip"} | guards - {"maxRollbacks"}


def test_title_is_dropped_as_a_keyword_and_kept_as_a_name() -> None:
    class Book(Model):
        """A book."""

        title: str = ""
        """Its title."""

    assert structural_schema_of(Book)["properties"] == {"title": {"description": "Its title.", "type": "string"}}


def test_a_keyword_that_is_not_allowed_stops_the_generator() -> None:
    class Rate(Model):
        """A rate."""

        rate: float = Field(gt=0)
        """Above zero: `exclusiveMinimum` is a number here and a boolean there."""

    with pytest.raises(ValueError, match="exclusiveMinimum"):
        structural_schema_of(Rate)


# -- the resource ------------------------------------------------------------------------------------------------------


def test_the_resource_has_its_names_status_and_columns() -> None:
    definition = custom_resource_definition()
    spec = definition["spec"]
    (version,) = spec["versions"]
    assert definition["metadata"]["name"] == f"{spec['names']['plural']}.{spec['group']}"
    assert (spec["scope"], spec["names"]["shortNames"]) == ("Namespaced", ["tr"])
    assert version["subresources"] == {"status": {}}
    assert (version["name"], version["served"], version["storage"]) == ("v1alpha1", True, True)
    names = [column["name"].upper() for column in version["additionalPrinterColumns"]]
    assert names == ["STATE", "STAGE", "PROGRESS", "ETA", "RESTARTS", "AGE"]


def test_printer_columns_read_fields_that_exist_and_have_their_type() -> None:
    by_path = {format_path(path): node for path, node in NODES}
    for column in custom_resource_definition()["spec"]["versions"][0]["additionalPrinterColumns"]:
        path = column["jsonPath"].removeprefix(".")
        if path != "metadata.creationTimestamp":
            assert by_path[path]["type"] == column["type"], path


def test_the_definition_is_small_enough_to_be_stored() -> None:
    assert len(yaml.safe_dump(custom_resource_definition())) < MAX_APPLY_BYTES


# -- CEL ---------------------------------------------------------------------------------------------------------------


def broken_rules(schema: dict[str, Any], value: Any) -> list[str]:
    """Return the messages of all rules that a document breaks."""
    found: list[str] = []
    if isinstance(value, dict):
        rules = schema.get("x-kubernetes-validations", ())
        found += [rule["message"] for rule in rules if not holds(rule["rule"], value)]
        for name, child in schema.get("properties", {}).items():
            if name in value:
                found += broken_rules(child, value[name])
    elif isinstance(value, list):
        for item in value:
            found += broken_rules(schema["items"], item)
    return found


def test_messages_name_a_field_and_a_remedy() -> None:
    for model in walk_models(TrainingRun):
        for constraint in constraints_of(model):
            assert re.search(r"`\w+", constraint.message), constraint
            assert ": " in constraint.message, constraint


def test_members_of_which_one_must_be_set_are_all_fields_of_their_model() -> None:
    """A member that the constraint does not name would be silently ignored."""
    for model in walk_models(TrainingRun):
        if members := one_of_members(model):
            assert all(fields_of(model)[member].default is None for member in members), model.__name__
            others = set(fields_of(model)) - set(members)
            if "xactly one member" in (model.__doc__ or "") and model is not RewardTerm and model is not Batch:
                assert not others, model.__name__


# Documents that the schema with its rules must reject, and the models too.
SFT, PRETRAIN, SCORE = "stages.sft.sft", "stages.pretrain.pretrain", "stages.score.evaluate"
VOCABULARY = "stages.vocabulary.tokenizer"
PODS = "defaults.pods"
VOLUME = {"name": "a", "mountPath": "/a", "claimName": "c"}
BROKEN: dict[str, list[tuple[str, Any]]] = {
    "unknown field": [(f"{SFT}.optimzer", 1)],
    "unknown kind": [("stages.release.exprot", {})],
    "unknown field of a model without fields": [(f"{PRETRAIN}.trainable", {"full": {"rank": 3}})],
    "Python's spelling": [(f"{PRETRAIN}.sequence_length", 8)],
    "no spec": [("/spec", REMOVED)],
    "no stages": [("stages", REMOVED)],
    "an empty list of stages": [("stages", [])],
    "too many stages": [("stages", [document()["spec"]["stages"][0]] * 65)],
    "a stage without a name": [("stages.sft.name", REMOVED)],
    "a name in capitals": [("/metadata.name", "Demo")],
    "a name that is too long": [("/metadata.name", "a" * 64)],
    "a required field left out": [(f"{SFT}.optimizer", {})],
    "a value outside an enum": [(f"{SFT}.template.name", "alpacca")],
    "a number that is too large": [(f"{SFT}.optimizer.learningRate", 20)],
    "a number that is too small": [("seed", -1)],
    "a fraction for a whole number": [(f"{SFT}.batch.samples", 1.5)],
    "text for a number": [(f"{SFT}.batch.samples", "8")],
    "a number for text": [("defaults.image", 96)],
    "a fraction of a CPU without quotes": [("defaults.resources", {"cpu": 0.5})],
    "true for a quantity": [("defaults.resources", {"cpu": True})],
    "no CPU": [("defaults.resources", {"cpu": "0"})],
    "no CPU, as a number": [("defaults.resources", {"cpu": 0})],
    "no CPU, as a fraction": [("defaults.resources", {"cpu": "0.00"})],
    "billions of CPUs": [("defaults.resources", {"cpu": "4Gi"})],
    "a fraction of a byte": [("defaults.resources", {"memory": "64m"})],
    "no memory": [("defaults.resources", {"memory": "0Gi"})],
    "some bytes of memory": [("defaults.resources", {"memory": "64"})],
    "some bytes of memory, as a number": [("defaults.resources", {"memory": 64})],
    "a fraction of a byte of shared memory": [("stages.sft.resources", {"sharedMemory": "64m"})],
    "text for true or false": [("suspend", "yes")],
    "a malformed quantity": [("defaults.resources", {"memory": "64 GB"})],
    "a mapping for a list": [(f"{SFT}.data", {"uri": "x"})],
    "a list that is too short": [(f"{SFT}.data", [])],
    "text for a mapping": [(f"{SFT}.model", "pretrain")],
    "text that is too long": [("storage.uri", "s3://" + "x" * 1024)],
    "a stage of two kinds": [("stages.release.data", {"sources": [{"uri": "x"}]})],
    "a stage of no kind": [("stages.release.export", REMOVED)],
    "a reference to both": [(f"{SFT}.model.uri", "x")],
    "a reference to neither": [(f"{SFT}.model", {})],
    "a source from both": [("stages.corpus.data.sources.0.stage", "x")],
    "two budgets": [(f"{PRETRAIN}.budget.steps", 5)],
    "no budget": [(f"{PRETRAIN}.budget", {})],
    "two batch sizes": [(f"{PRETRAIN}.batch.samples", 5)],
    "two things that learn": [(f"{SFT}.trainable.full", {})],
    "two members of a step": [("stages.corpus.data.steps", [{"length": {}, "deduplicate": {}}])],
    "a match that neither keeps nor drops": [("stages.corpus.data.steps", [{"match": {}}])],
    "a task by name and by file": [(f"{SCORE}.lmEval", [{"task": "a", "uri": "b"}])],
    "an existing and a new model": [(f"{PRETRAIN}.model", {"uri": "x"})],
    "an architecture without a tokenizer": [(f"{PRETRAIN}.tokenizer", REMOVED)],
    "heads that do not divide the width": [(f"{PRETRAIN}.architecture.numHeads", 5)],
    "groups that do not divide the heads": [(f"{PRETRAIN}.architecture.numKeyValueHeads", 3)],
    "offload of the optimiser without sharding": [(f"{PRETRAIN}.sharding", {"offloadOptimizer": "cpu"})],
    "offload of parameters at ZeRO 2": [(f"{PRETRAIN}.sharding", {"zero": 2, "offloadParameters": "cpu"})],
    "a custom template without text": [(f"{SFT}.template.name", "custom")],
    "a named template with text": [(f"{SFT}.template.jinja", "x")],
    "a gate without a limit": [(f"{SCORE}.gates", [{"metric": "a"}])],
    "a vocabulary from nothing": [(VOCABULARY, {})],
    "an addition to nothing": [(VOCABULARY, {"add": {"characters": "a"}})],
    "a merge without a base": [(f"{VOCABULARY}.merge", {})],
    "a merge of nothing": [(VOCABULARY, {"base": {"uri": "x"}, "merge": {}})],
    "a merge of two": [
        (f"{VOCABULARY}.base", {"uri": "x"}),
        (f"{VOCABULARY}.merge", {"vocabulary": {"uri": "y"}}),
    ],
    "a base that is not used": [(f"{VOCABULARY}.base", {"uri": "x"})],
    "two topologies": [("defaults.queue", {"name": "q", "requiredTopology": "rack", "preferredTopology": "block"})],
    "a toleration of a value that need only exist": [
        (PODS, {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]})
    ],
    "a toleration of nothing": [(PODS, {"tolerations": [{"value": "b"}]})],
    "a volume of two kinds": [(PODS, {"volumes": [{**VOLUME, "secretName": "s"}]})],
    "two volumes at one path": [(PODS, {"volumes": [VOLUME, {**VOLUME, "name": "b"}]})],
    "a volume over the operator's own": [(PODS, {"volumes": [{**VOLUME, "mountPath": "/dev/shm"}]})],  # noqa: S108
    "a mount in a second spelling": [(PODS, {"volumes": [VOLUME, {**VOLUME, "name": "b", "mountPath": "/a/"}]})],
    "a mount through a parent": [(PODS, {"volumes": [VOLUME, {**VOLUME, "name": "b", "mountPath": "/b/../a"}]})],
    "a volume of no kind": [(PODS, {"volumes": [{"name": "a", "mountPath": "/a"}]})],
    "a mount at no absolute path": [(PODS, {"volumes": [{**VOLUME, "mountPath": "a"}]})],
    "a variable that is no setting of a fabric": [(PODS, {"fabric": [{"name": "LD_PRELOAD", "value": "x"}]})],
    "a malformed amount of a resource": [("defaults.resources", {"extended": {"rdma/hca": "all"}})],
    "a label that is none": [(PODS, {"nodeSelector": {"pool": "a b"}})],
}
GOOD: dict[str, list[tuple[str, Any]]] = {
    "the run as it is": [],
    "no clipping": [(f"{SFT}.optimizer.clip", None)],
    "a custom template": [(f"{SFT}.template", {"name": "custom", "jinja": "x"})],
    "offload at ZeRO 3": [(f"{PRETRAIN}.sharding", {"zero": 3, "offloadOptimizer": "cpu", "offloadParameters": "cpu"})],
    "grouped queries": [(f"{PRETRAIN}.architecture.numKeyValueHeads", 2)],
    "a merge of what is trained": [(f"{VOCABULARY}.base", {"uri": "x"}), (f"{VOCABULARY}.merge", {})],
    "a merge of what there is": [(VOCABULARY, {"base": {"uri": "x"}, "merge": {"vocabulary": {"uri": "y"}}})],
    "a volume": [(PODS, {"volumes": [VOLUME]})],
    "two volumes": [(PODS, {"volumes": [VOLUME, {**VOLUME, "name": "b", "mountPath": "/a/.hidden/..b"}]})],
    "whole numbers, as in every manifest": [
        ("defaults.resources", {"cpu": 4, "memory": 64_000_000_000, "extended": {"rdma/hca": 1, "example.com/x": 0}})
    ],
    "quantities as text": [("defaults.resources", {"cpu": "500m", "memory": "1.5Gi", "sharedMemory": "64Mi"})],
    "every taint tolerated": [(PODS, {"tolerations": [{"operator": "Exists"}]})],
    "a taint by key and value": [(PODS, {"tolerations": [{"key": "a.example.com/b", "value": "c"}]})],
    "a node by its labels": [(PODS, {"nodeSelector": {"pool": "a", "topology.kubernetes.io/zone": "b"}})],
    "a fabric": [(PODS, {"fabric": [{"name": "NCCL_IB_HCA", "value": "mlx5"}]})],
    "a topology": [("defaults.queue", {"name": "q", "preferredTopology": "cloud.example.com/rack"})],
    "an addition": [(VOCABULARY, {"base": {"uri": "x"}, "add": {"padToken": "[PAD]"}})],
}


def as_the_server_reads_it(node: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema for a structural schema: `nullable`, and no unknown field (kubectl's strict field validation)."""
    read = {key: value for key, value in node.items() if not key.startswith("x-") and key != "nullable"}
    if "properties" in node:
        read["properties"] = {name: as_the_server_reads_it(child) for name, child in node["properties"].items()}
    if "items" in node:
        read["items"] = as_the_server_reads_it(node["items"])
    if type_of(node) == "quantity":
        read["type"] = ["integer", "string"]
    if read["type"] == "object":
        read.setdefault("additionalProperties", False)
    if node.get("nullable"):
        read["type"] = [node["type"], "null"]
    return read


SERVER = jsonschema.Draft202012Validator(as_the_server_reads_it(SCHEMA))
EDITOR = jsonschema.Draft202012Validator(editor_schema())


def rejected_by_the_crd(found: dict[str, Any]) -> bool:
    return not SERVER.is_valid(found) or bool(broken_rules(SCHEMA, found))


@pytest.mark.parametrize("edits", BROKEN.values(), ids=BROKEN)
def test_a_broken_document_is_rejected_by_the_crd_and_by_the_models(edits: list[tuple[str, Any]]) -> None:
    broken = edited(*edits)
    assert rejected_by_the_crd(broken)
    with pytest.raises(InvalidRun):
        validate(broken)


@pytest.mark.parametrize("edits", GOOD.values(), ids=GOOD)
def test_a_good_document_is_accepted_by_the_crd_and_by_the_models(edits: list[tuple[str, Any]]) -> None:
    good = edited(*edits)
    assert list(SERVER.iter_errors(good)) == []
    assert broken_rules(SCHEMA, good) == []
    validate(good)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_accepted_by_the_crd_and_by_the_editors_schema(path: Any) -> None:
    found = load_run(path).document
    assert list(SERVER.iter_errors(found)) == []
    assert broken_rules(SCHEMA, dict(found)) == []
    assert list(EDITOR.iter_errors(found)) == []


# -- the schema for editors --------------------------------------------------------------------------------------------

BEYOND_JSON_SCHEMA = {
    "an architecture without a tokenizer",
    "heads that do not divide the width",
    "groups that do not divide the heads",
    "offload of the optimiser without sharding",
    "offload of parameters at ZeRO 2",
    "a custom template without text",
    "a named template with text",
    "a gate without a limit",
    "a vocabulary from nothing",
    "an addition to nothing",
    "a merge without a base",
    "a merge of nothing",
    "a merge of two",
    "a base that is not used",
    "two topologies",
    "a toleration of a value that need only exist",
    "a toleration of nothing",
    "two volumes at one path",
    "a volume over the operator's own",
}


def test_the_editors_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(editor_schema())


def test_the_editors_schema_rejects_what_needs_no_comparison_of_fields() -> None:
    assert {name for name, edits in BROKEN.items() if EDITOR.is_valid(edited(*edits))} == BEYOND_JSON_SCHEMA
    for name, edits in GOOD.items():
        assert EDITOR.is_valid(edited(*edits)), name


def test_both_schemas_have_every_kind_of_stage() -> None:
    assert set(STAGE_KINDS) <= set(SCHEMA["properties"]["spec"]["properties"]["stages"]["items"]["properties"])
    assert set(STAGE_KINDS) <= set(editor_schema()["$defs"]["Stage"]["properties"])


def test_the_status_in_the_crd_is_the_model() -> None:
    assert set(SCHEMA["properties"]["status"]["properties"]) == set(fields_of(TrainingRunStatus))


def test_the_definition_stays_below_the_size_that_the_api_server_and_helm_take() -> None:
    """etcd takes 1.5 MiB, a Helm release 1 MiB compressed. Above 256 KiB, only `kubectl apply --server-side` works,
    as the chart's README states: a client-side one keeps a copy in an annotation."""
    size = len(json.dumps(custom_resource_definition(), separators=(",", ":"), ensure_ascii=False).encode())
    assert size < 320 * 1024
