"""The CustomResourceDefinition, generated from the models.

A structural schema is not JSON Schema: no `$ref`, no `anyOf … null`, no `const`, `exclusiveMinimum` of another type. So
the models' schema is rewritten keyword by keyword, and an unknown keyword stops the generator. Defaults are stated in
descriptions only: the models fill them in, and an object in etcd stays as small as it was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stagecoach_api import names
from stagecoach_api.base import Model, constraints_of
from stagecoach_api.fields import fields_of, shape_of, walk_models
from stagecoach_api.pods import Pods
from stagecoach_api.schema.cel import cel_of
from stagecoach_api.schema.defaults import described
from stagecoach_api.spec import Metadata, RunSpec, TrainingRun
from stagecoach_api.status import TrainingRunStatus

Schema = dict[str, Any]

# -- from the models to a structural schema ----------------------------------------------------------------------------

LIST_KEYS: dict[tuple[str, str], str] = {
    (RunSpec.__name__, "stages"): "name",
    (Pods.__name__, "volumes"): "name",
    (Pods.__name__, "fabric"): "name",
    (TrainingRunStatus.__name__, "stages"): "name",
    (TrainingRunStatus.__name__, "conditions"): "type",
}
"""Lists whose items are merged by a key; every other list is replaced as a whole."""

_KEPT = frozenset({"type", "format", "enum", "required", "pattern"}) | {
    f"{bound}{measure}" for bound in ("min", "max") for measure in ("imum", "Length", "Items", "Properties")
}
_DROPPED = frozenset({"default", "title"})
"""`title` as a keyword; a property may have that name."""
_FORMATS = {"integer": "int64", "number": "double"}


class _Converter:
    """Rewrites the JSON schema of one model with its definitions inlined."""

    def __init__(self, root: type[Model], with_defaults: bool) -> None:
        schema = root.model_json_schema(by_alias=True)
        self.definitions: Mapping[str, Schema] = schema.pop("$defs", {})
        self.models = {model.__name__: model for model in walk_models(root)}
        self.root = root
        self.with_defaults = with_defaults
        self.root_schema = schema

    def convert(self) -> Schema:
        return self._object(self.root, self.root_schema)

    def _node(self, node: Schema, description: str | None = None) -> Schema:
        """Return the structural schema of a node; `description`, the field's, takes precedence over the node's."""
        description = description or node.get("description")
        if "$ref" in node:
            return self._reference(node["$ref"], description)
        if "anyOf" in node:
            (inner,) = [member for member in node["anyOf"] if member.get("type") != "null"]
            return self._node(inner, description)
        converted = self._keywords(node)
        return _describe(converted, description)

    def _reference(self, reference: str, description: str | None) -> Schema:
        name = reference.removeprefix("#/$defs/")
        definition = self.definitions[name]
        if name in self.models:
            return _describe(self._object(self.models[name], definition), description)
        return self._node(definition, description)

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
                raise ValueError(f"keyword `{keyword}` is not allowed in a structural schema: {node}")
        if found.get("type") == ["integer", "string"]:
            del found["type"]
            found["x-kubernetes-int-or-string"] = True
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
        rules = [
            {"rule": cel_of(constraint.condition, model), "message": constraint.message}
            for constraint in constraints_of(model)
        ]
        if rules:
            found["x-kubernetes-validations"] = rules
        return _describe(found, node.get("description"))

    def _property(self, model: type[Model], name: str, node: Schema) -> Schema:
        if model is TrainingRun and name == "metadata":
            return _metadata()
        field = fields_of(model)[name]
        description = described(name, field) if self.with_defaults else None
        found = self._node(node, description)
        if shape_of(field.annotation).optional and field.default is not None:
            found["nullable"] = True  # null differs from leaving the field out
        key = LIST_KEYS.get((model.__name__, name))
        if key is not None:
            found |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
        return found


def _describe(node: Schema, description: str | None) -> Schema:
    """Return the node with the description, as one paragraph, first."""
    rest = {keyword: value for keyword, value in node.items() if keyword != "description"}
    return {"description": " ".join(description.split()), **rest} if description else rest


def _metadata() -> Schema:
    """The API server checks metadata itself; only the name has a lower limit here."""
    name = Metadata.model_json_schema(by_alias=True)["properties"]["name"]
    kept = {keyword: value for keyword, value in name.items() if keyword in _KEPT}
    return {"type": "object", "properties": {"name": kept}}


def structural_schema_of(model: type[Model], with_defaults: bool = True) -> Schema:
    """Return a model's schema as a CRD may contain it. Raises ValueError for a keyword that is not allowed there.

    `with_defaults`: state the defaults in the descriptions.
    """
    return _Converter(model, with_defaults).convert()


def structural_schema() -> Schema:
    """Return the OpenAPI v3 schema of a whole object: spec and status."""
    run = structural_schema_of(TrainingRun)
    run["properties"]["status"] = structural_schema_of(TrainingRunStatus, with_defaults=False)
    # Kubernetes fills in both, as plain strings.
    for name in ("apiVersion", "kind"):
        run["properties"][name] = {"description": run["properties"][name]["description"], "type": "string"}
    run["required"] = ["spec"]
    return run


# -- the resource ------------------------------------------------------------------------------------------------------

PRINTER_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("State", "string", ".status.summary.state"),
    ("Stage", "string", ".status.summary.stage"),
    ("Progress", "string", ".status.summary.progress"),
    ("ETA", "string", ".status.summary.eta"),  # kubectl would show a `date` as an age, and a future time as <invalid>
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
