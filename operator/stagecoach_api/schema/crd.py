"""The CustomResourceDefinition, made from the models.

A structural schema is not JSON Schema: no `$ref`, no `anyOf … null`, no `const`, `exclusiveMinimum` of another type. So
the models' schema is rewritten keyword by keyword, and a keyword that is not known here stops the generator. There are
no defaults in it: the models fill them in, and an object in etcd stays as small as it was written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stagecoach_api import names
from stagecoach_api.base import Model
from stagecoach_api.conversation import Template
from stagecoach_api.fields import fields_of, shape_of, walk_models
from stagecoach_api.kinds import STAGE_KINDS, PpoStage, PretrainStage, TokenizerStage
from stagecoach_api.kinds.data import DataStep, Match
from stagecoach_api.kinds.dpo import DirectLoss
from stagecoach_api.kinds.evaluate import Gate, LmEvalTask
from stagecoach_api.kinds.pretrain import Architecture
from stagecoach_api.kinds.reward_model import PreferenceLoss
from stagecoach_api.pods import Pods, Toleration, Volume
from stagecoach_api.references import Reference
from stagecoach_api.rewards import REWARD_MEMBERS, PropositionReward, RewardTerm
from stagecoach_api.spec import Metadata, Queue, RunSpec, Stage, TrainingRun
from stagecoach_api.status import TrainingRunStatus
from stagecoach_api.training import Batch, Budget, Sharding, Trainable

Schema = dict[str, Any]

# Members of which exactly one is given; the models check the same.
EXACTLY_ONE: dict[type[Model], tuple[str, ...]] = {
    Stage: tuple(STAGE_KINDS),
    Reference: ("stage", "uri"),
    Trainable: ("full", "embeddings", "lora"),
    Budget: ("tokens", "steps", "epochs"),
    Batch: ("tokens", "samples"),
    DataStep: tuple(fields_of(DataStep)),
    Match: ("keep", "drop"),
    LmEvalTask: ("task", "uri"),
    PretrainStage: ("model", "architecture"),
    RewardTerm: tuple(REWARD_MEMBERS),
    PreferenceLoss: ("pair", "ranked", "focal"),
    DirectLoss: ("sigmoid", "ipo", "kto"),
    Volume: ("claimName", "configMapName", "secretName"),
}


@dataclass(frozen=True)
class CelRule:
    """A rule over fields of one object, which the API server checks. CEL's `self` is the object."""

    rule: str
    message: str
    """Which field, what must hold, what to do."""

    def as_schema(self) -> Schema:
        return {"rule": self.rule, "message": self.message}


CEL_RULES: dict[type[Model], tuple[CelRule, ...]] = {
    Queue: (
        CelRule(
            "!has(self.requiredTopology) || !has(self.preferredTopology)",
            "`requiredTopology` and `preferredTopology` exclude each other: give at most one",
        ),
    ),
    Toleration: (
        CelRule(
            "!has(self.operator) || self.operator != 'Exists' || !has(self.value)",
            "`operator: Exists` takes no `value`: leave one of them out",
        ),
        CelRule(
            "has(self.key) || (has(self.operator) && self.operator == 'Exists')",
            "without `key` every taint is meant: write `operator: Exists`",
        ),
    ),
    PretrainStage: (
        CelRule(
            "!has(self.architecture) || has(self.tokenizer)",
            "`architecture` needs a `tokenizer`, whose size is the vocabulary's: give one",
        ),
    ),
    Architecture: (
        CelRule(
            "self.hiddenSize % self.numHeads == 0", "`hiddenSize` must be divisible by `numHeads`: change one of them"
        ),
        CelRule(
            "!has(self.numKeyValueHeads) || self.numHeads % self.numKeyValueHeads == 0",
            "`numHeads` must be divisible by `numKeyValueHeads`: change one of them",
        ),
    ),
    Sharding: (
        CelRule(
            "!has(self.offloadOptimizer) || self.offloadOptimizer != 'cpu' || (has(self.zero) && self.zero >= 1)",
            "`offloadOptimizer: cpu` needs `zero` of 1 or more: raise it, or leave the offload out",
        ),
        CelRule(
            "!has(self.offloadParameters) || self.offloadParameters != 'cpu' || (has(self.zero) && self.zero >= 3)",
            "`offloadParameters: cpu` needs `zero: 3`: raise it, or leave the offload out",
        ),
    ),
    Template: (
        CelRule(
            "(self.name == 'custom') == has(self.jinja)",
            "`jinja` belongs to `name: custom`, and only to it: give both or neither",
        ),
    ),
    PropositionReward: (
        CelRule(
            "has(self.fit) || self.propositions.all(item, has(item.weight))",
            "weights come from somewhere: give `fit`, or a `weight` to every proposition",
        ),
    ),
    PpoStage: (
        CelRule(
            "has(self.batch.samples)", "`batch.samples` says how many answers an update has: give it, not `tokens`"
        ),
        CelRule(
            "!has(self.budget) || !has(self.budget.tokens)",
            "`budget` counts updates or passes over the prompts: give `steps` or `epochs`, not `tokens`",
        ),
    ),
    Gate: (CelRule("has(self.atLeast) || has(self.atMost)", "a gate needs a limit: give `atLeast`, `atMost` or both"),),
    TokenizerStage: (
        CelRule(
            "has(self.train) || has(self.merge) || has(self.add)",
            "a tokenizer stage does something: give at least one of `train`, `merge` and `add`",
        ),
        CelRule("has(self.base) || has(self.train)", "without `base` there must be `train`: give one of them"),
        CelRule("!has(self.merge) || has(self.base)", "`merge` needs a `base` to merge into: give it"),
        CelRule(
            "!has(self.merge) || has(self.merge.vocabulary) != has(self.train)",
            "`merge` needs exactly one source: give `train` or `merge.vocabulary`, not both",
        ),
        CelRule(
            "!has(self.base) || !has(self.train) || has(self.merge)",
            "`train` beside `base` needs `merge`, or the base would be unused: give it, or leave `base` out",
        ),
    ),
}


def rules_of(model: type[Model]) -> Iterator[CelRule]:
    """Yield the rules of a model and of the models it extends."""
    for owner in reversed(model.__mro__):
        if owner in EXACTLY_ONE:
            yield _exactly_one(EXACTLY_ONE[owner])
        yield from CEL_RULES.get(owner, ())


def _exactly_one(members: tuple[str, ...]) -> CelRule:
    present = ", ".join(f"has(self.{member})" for member in members)
    listed = ", ".join(f"`{member}`" for member in members)
    return CelRule(
        f"[{present}].exists_one(given, given)", f"give exactly one of {listed}: add one, or remove the rest"
    )


# -- from the models to a structural schema ----------------------------------------------------------------------------

LIST_KEYS: dict[tuple[str, str], str] = {
    (RunSpec.__name__, "stages"): "name",
    (Pods.__name__, "volumes"): "name",
    (Pods.__name__, "fabric"): "name",
    (TrainingRunStatus.__name__, "stages"): "name",
    (TrainingRunStatus.__name__, "conditions"): "type",
}
"""Lists whose items have a key of their own; every other list is replaced as a whole."""

_KEPT = frozenset({"type", "format", "enum", "required", "pattern"}) | {
    f"{bound}{measure}" for bound in ("min", "max") for measure in ("imum", "Length", "Items", "Properties")
}
_DROPPED = frozenset({"default", "title"})
"""`title` as a keyword; a property may have that name."""
_FORMATS = {"integer": "int64", "number": "double"}


class _Converter:
    """Rewrites one model's JSON schema, definitions inlined."""

    def __init__(self, root: type[Model]) -> None:
        schema = root.model_json_schema(by_alias=True)
        self.definitions: Mapping[str, Schema] = schema.pop("$defs", {})
        self.models = {model.__name__: model for model in walk_models(root)}
        self.root = root
        self.root_schema = schema

    def convert(self) -> Schema:
        return self._object(self.root, self.root_schema)

    def _node(self, node: Schema, described: str | None = None) -> Schema:
        """Return the structural schema of a node; `described` is the field's own description, which goes first."""
        described = described or node.get("description")
        if "$ref" in node:
            return self._reference(node["$ref"], described)
        if "anyOf" in node:
            (inner,) = [member for member in node["anyOf"] if member.get("type") != "null"]
            return self._node(inner, described)
        converted = self._keywords(node)
        return _describe(converted, described)

    def _reference(self, reference: str, described: str | None) -> Schema:
        name = reference.removeprefix("#/$defs/")
        definition = self.definitions[name]
        if name in self.models:
            return _describe(self._object(self.models[name], definition), described)
        return self._node(definition, described)

    def _keywords(self, node: Schema) -> Schema:
        found: Schema = {}
        for keyword, value in node.items():
            if keyword in _KEPT:
                found[keyword] = value
            elif keyword == "const":
                found["enum"] = [value]
            elif keyword == "items":
                found["items"] = self._node(value)
            elif keyword == "additionalProperties":
                found["additionalProperties"] = self._node(value)
            elif keyword not in _DROPPED and keyword != "description":
                raise ValueError(f"keyword `{keyword}` has no place in a structural schema: {node}")
        if found.get("type") == "array":
            found["x-kubernetes-list-type"] = "atomic"
        if found.get("type") in _FORMATS:
            found.setdefault("format", _FORMATS[found["type"]])
        return found

    def _object(self, model: type[Model], node: Schema) -> Schema:
        found: Schema = {"type": "object"}
        properties = {name: self._property(model, name, value) for name, value in node.get("properties", {}).items()}
        if properties:
            found["properties"] = properties
        if node.get("required"):
            found["required"] = node["required"]
        rules = [rule.as_schema() for rule in rules_of(model)]
        if rules:
            found["x-kubernetes-validations"] = rules
        return _describe(found, node.get("description"))

    def _property(self, model: type[Model], name: str, node: Schema) -> Schema:
        if model is TrainingRun and name == "metadata":
            return _metadata()
        found = self._node(node)
        field = fields_of(model)[name]
        if shape_of(field.annotation).optional and field.default is not None:
            found["nullable"] = True  # null says something else than leaving the field out
        key = LIST_KEYS.get((model.__name__, name))
        if key is not None:
            found |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
        return found


def _describe(node: Schema, description: str | None) -> Schema:
    """Put a description, as one paragraph, in front."""
    rest = {keyword: value for keyword, value in node.items() if keyword != "description"}
    return {"description": " ".join(description.split()), **rest} if description else rest


def _metadata() -> Schema:
    """The API server checks metadata itself; only the name is held shorter here."""
    name = Metadata.model_json_schema(by_alias=True)["properties"]["name"]
    kept = {keyword: value for keyword, value in name.items() if keyword in _KEPT}
    return {"type": "object", "properties": {"name": kept}}


def structural_schema_of(model: type[Model]) -> Schema:
    """Return a model's schema as a CRD may hold it. Raises ValueError for a keyword that has no place there."""
    return _Converter(model).convert()


def structural_schema() -> Schema:
    """Return the OpenAPI v3 schema of a whole object: spec and status."""
    run = structural_schema_of(TrainingRun)
    run["properties"]["status"] = structural_schema_of(TrainingRunStatus)
    # Kubernetes fills in both, and writes them as plain strings.
    for name in ("apiVersion", "kind"):
        run["properties"][name] = {"description": run["properties"][name]["description"], "type": "string"}
    run["required"] = ["spec"]
    return run


# -- the resource ------------------------------------------------------------------------------------------------------

PRINTER_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("State", "string", ".status.summary.state"),
    ("Stage", "string", ".status.summary.stage"),
    ("Progress", "string", ".status.summary.progress"),
    ("ETA", "string", ".status.summary.eta"),  # as `date` kubectl shows an age, and a future time as <invalid>
    ("Restarts", "integer", ".status.summary.restarts"),
    ("Age", "date", ".metadata.creationTimestamp"),
)


def custom_resource_definition() -> Schema:
    """Return the CustomResourceDefinition (apiextensions.k8s.io/v1) of a TrainingRun."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.API_GROUP}"},
        "spec": {
            "group": names.API_GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": names.KIND,
                "listKind": f"{names.KIND}List",
                "plural": names.PLURAL,
                "singular": names.SINGULAR,
                "shortNames": [names.SHORT_NAME],
                "categories": ["stagecoach"],
            },
            "versions": [_version()],
        },
    }


def _version() -> Schema:
    return {
        "name": names.API_VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {"name": name, "type": kind, "jsonPath": path} for name, kind, path in PRINTER_COLUMNS
        ],
        "schema": {"openAPIV3Schema": structural_schema()},
    }
