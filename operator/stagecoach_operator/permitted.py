"""What a run may name: service accounts, Secrets, priority classes, tolerations, node selectors and images.

A user who may create TrainingRuns gets pods with what the runs name, without any right to create pods. So an
installation has a list for each kind of thing, and what belongs to the operator itself is never handed out.

Every field of the models that describe pods, queues and credentials is either in `CHECKED` or in `HARMLESS`; a test
walks the models, so that a new field cannot be forgotten.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from stagecoach_api.base import Model
from stagecoach_api.fields import FieldPath, format_path, walk_values
from stagecoach_api.pods import FabricVariable, Pods, Toleration, Volume
from stagecoach_api.problems import Problem
from stagecoach_api.rewards import EndpointCredentials
from stagecoach_api.spec import Queue, Resources, SecretReference, StageSettings, TrainingRun

Patterns = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=512)], ...], Field(max_length=256)]
ANYTHING = ("*",)
EVERY_TAINT = "every taint"
"""How lists call a toleration without a key. No key of a taint contains a space."""


class Allowed(Model):
    """Patterns of what runs may name, `*` matching any characters. An empty list allows only what the operator's own
    settings name. For a node selector and a toleration, a pattern is `key` or `key=value`."""

    service_accounts: Patterns = ANYTHING
    """Service accounts of pods. The operator's own is never allowed."""

    secrets: Patterns = ANYTHING
    """Secrets that are mounted into pods, or with which their images are pulled. The operator's own are never
    mounted."""

    priority_classes: Patterns = ANYTHING
    """Priority classes of pods and of queues. One that begins with `system-` needs a pattern that does, too."""

    tolerations: Patterns = ANYTHING
    """Taints that pods may tolerate. `every taint`, and keys of Kubernetes itself such as
    `node-role.kubernetes.io/control-plane`, need a pattern that begins like them."""

    node_selectors: Patterns = ANYTHING
    """Node labels that pods may select. Those in `node-role.kubernetes.io/` need a pattern that begins like it."""

    images: Patterns = ANYTHING
    """Images of pods. The operator's trainer image is always allowed."""


@dataclass(frozen=True)
class OwnNames:
    """What the operator uses itself, and gives to pods that set nothing else."""

    namespace: str
    """The operator's namespace."""
    service_account: str | None = None
    """Its own service account."""
    secrets: tuple[str, ...] = ()
    """Secrets that only the operator uses, such as the key of its certificate."""
    credentials: str | None = None
    """Secret with the credentials for its default storage."""
    endpoint: str | None = None
    """Endpoint of its default storage."""
    pod_service_account: str | None = None
    """Service account of pods that set none."""
    pull_secrets: tuple[str, ...] = ()
    """Image pull Secrets of pods that set none."""
    image: str = ""
    """Image of pods that set none."""


class Kind(StrEnum):
    """What a field names. The value is how messages call it."""

    SERVICE_ACCOUNT = "service account"
    MOUNTED_SECRET = "Secret"  # noqa: S105 - a word
    PULL_SECRET = "image pull Secret"  # noqa: S105 - a word
    CREDENTIALS = "Secret with credentials"
    PRIORITY_CLASS = "priority class"
    TOLERATION = "toleration"
    NODE_SELECTOR = "node selector"
    IMAGE = "image"


CHECKED: Mapping[tuple[type[Model], str], Kind] = {
    (Pods, "node_selector"): Kind.NODE_SELECTOR,
    (Pods, "tolerations"): Kind.TOLERATION,
    (Pods, "image_pull_secrets"): Kind.PULL_SECRET,
    (Pods, "service_account"): Kind.SERVICE_ACCOUNT,
    (Pods, "priority_class"): Kind.PRIORITY_CLASS,
    (Queue, "priority_class"): Kind.PRIORITY_CLASS,
    (Volume, "secret_name"): Kind.MOUNTED_SECRET,
    (SecretReference, "secret_name"): Kind.CREDENTIALS,
    (EndpointCredentials, "secret_name"): Kind.MOUNTED_SECRET,
    (StageSettings, "image"): Kind.IMAGE,
}
"""Fields that are looked up in a list, by the model that declares them."""

HARMLESS: Mapping[tuple[type[Model], str], str] = {
    (Pods, "volumes"): "its members are checked",
    (Pods, "placement"): "how pods share nodes; narrows",
    (Pods, "fabric"): "variables inside the run's own container",
    (Volume, "name"): "a name within the pod",
    (Volume, "mount_path"): "a path within the pod; those of the operator are refused by the schema",
    (Volume, "sub_path"): "stays within the volume",
    (Volume, "read_only"): "narrows",
    (Volume, "claim_name"): "a claim in the run's own namespace, and no credential",
    (Volume, "config_map_name"): "a ConfigMap in the run's own namespace, and no credential",
    (FabricVariable, "name"): "limited to communication libraries by the schema",
    (FabricVariable, "value"): "read inside the run's own container",
    (Toleration, "key"): "checked with the list it is in",
    (Toleration, "operator"): "checked with the list it is in",
    (Toleration, "value"): "checked with the list it is in",
    (Toleration, "effect"): "narrows",
    (Toleration, "toleration_seconds"): "narrows",
    (Queue, "name"): "a LocalQueue in the run's own namespace, which the quota is given to",
    (Queue, "required_topology"): "narrows the placement",
    (Queue, "preferred_topology"): "narrows the placement",
    (Resources, "nodes"): "limited by quota",
    (Resources, "gpus_per_node"): "limited by quota",
    (Resources, "gpu_product"): "narrows the placement",
    (Resources, "ranks_per_node"): "processes inside the run's own container",
    (Resources, "cpu"): "limited by quota",
    (Resources, "memory"): "limited by quota",
    (Resources, "shared_memory"): "counts as memory",
    (Resources, "extended"): "limited by quota",
}
"""Fields that need no list, with the reason."""

RESERVED: Mapping[Kind, tuple[str, ...]] = {
    Kind.PRIORITY_CLASS: ("system-",),
    # Kubernetes keeps pods off the control plane, and off nodes that are not ready or being drained, by these taints.
    Kind.TOLERATION: (
        EVERY_TAINT,
        "node-role.kubernetes.io/",
        "node.kubernetes.io/",
        "node.cloudprovider.kubernetes.io/",
    ),
    Kind.NODE_SELECTOR: ("node-role.kubernetes.io/",),
}
"""Beginnings of names that `*` does not cover: only a pattern that begins with them does."""


@dataclass(frozen=True)
class Naming:
    """One thing that a run names."""

    path: FieldPath
    kind: Kind
    name: str
    value: str | None = None
    """Value of a node label or a taint. None if it has none."""

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value}"


def permission_problems(run: TrainingRun, allowed: Allowed, own: OwnNames) -> list[Problem]:
    """Return a problem for everything a run names and may not, in the order of the document."""
    stages = [stage.name for stage in run.spec.stages]
    found = []
    for naming in names_in(run):
        refused = _never(naming, run, own) or _unlisted(naming, allowed, own)
        if refused is not None:
            rule, remedy = refused
            found.append(Problem(format_path(naming.path, stages), str(naming), rule, remedy))
    return found


def names_in(run: TrainingRun) -> Iterator[Naming]:
    """Yield everything a run names that is looked up in a list."""
    for path, value in walk_values(run.spec, ("spec",)):
        if not isinstance(value, Model):
            continue
        for owner in type(value).__mro__:
            for field, kind in ((field, kind) for (model, field), kind in CHECKED.items() if model is owner):
                alias = type(value).model_fields[field].alias or field
                yield from _namings((*path, alias), kind, getattr(value, field))


def _namings(path: FieldPath, kind: Kind, value: object) -> Iterator[Naming]:
    match value:
        case str():
            yield Naming(path, kind, value)
        case dict():
            for key, content in value.items():
                yield Naming((*path, key), kind, key, content)
        case Toleration():
            yield Naming(path, kind, value.key or EVERY_TAINT, value.value)
        case tuple():
            for index, item in enumerate(value):
                yield from _namings((*path, index), kind, item)


Refusal = tuple[str, str]
"""The rule that is broken, and what to do."""


def _never(naming: Naming, run: TrainingRun, own: OwnNames) -> Refusal | None:
    """Return why something of the operator itself is refused, whatever the lists contain."""
    is_at_home = run.metadata.namespace == own.namespace
    if naming.kind is Kind.SERVICE_ACCOUNT and is_at_home and naming.name == own.service_account:
        return "must not be the operator's own service account", "use another one, or leave it out"
    if naming.kind in (Kind.MOUNTED_SECRET, Kind.CREDENTIALS, Kind.PULL_SECRET) and is_at_home:
        mounted = own.pull_secrets if naming.kind is not Kind.PULL_SECRET else ()
        if naming.name in (*own.secrets, *mounted):
            return "must not be a Secret of the operator", "use another one, or leave it out"
    # In any namespace: pods get it for the operator's storage, and for no other purpose or endpoint.
    if naming.name != own.credentials:
        return None
    if naming.kind is Kind.MOUNTED_SECRET:
        return "must not be the Secret with the operator's credentials", "use another one, or leave it out"
    if naming.kind is Kind.CREDENTIALS and run.spec.storage.endpoint != own.endpoint:
        rule = "the operator's credentials are only for its own endpoint"
        return rule, "name a Secret with other credentials, or leave `endpoint` and `credentials` out"
    return None


def _unlisted(naming: Naming, allowed: Allowed, own: OwnNames) -> Refusal | None:
    """Return why something is refused that the lists do not contain."""
    patterns = patterns_of(naming.kind, allowed)
    if naming.name in _defaults(naming.kind, own) or matches(naming, patterns):
        return None
    listed = ", ".join(patterns) or "only what the operator sets itself"
    remedy = "use one of them, or ask the operator's administrator to allow it"
    return f"must be an allowed {naming.kind} ({listed}){_note(naming)}", remedy


def _note(naming: Naming) -> str:
    held = _reserved(naming)
    return "" if held is None else f"; what begins with `{held}` must be listed by that"


def patterns_of(kind: Kind, allowed: Allowed) -> tuple[str, ...]:
    """Return the patterns for a kind of thing."""
    match kind:
        case Kind.SERVICE_ACCOUNT:
            return allowed.service_accounts
        case Kind.MOUNTED_SECRET | Kind.PULL_SECRET | Kind.CREDENTIALS:
            return allowed.secrets
        case Kind.PRIORITY_CLASS:
            return allowed.priority_classes
        case Kind.TOLERATION:
            return allowed.tolerations
        case Kind.NODE_SELECTOR:
            return allowed.node_selectors
        case Kind.IMAGE:
            return allowed.images


def _defaults(kind: Kind, own: OwnNames) -> tuple[str | None, ...]:
    """Return what pods would get without the run's naming it."""
    match kind:
        case Kind.SERVICE_ACCOUNT:
            return (own.pod_service_account,)
        case Kind.PULL_SECRET:
            return own.pull_secrets
        case Kind.CREDENTIALS:
            return (own.credentials,)
        case Kind.IMAGE:
            return (own.image,)
    return ()


def matches(naming: Naming, patterns: tuple[str, ...]) -> bool:
    """Return whether a pattern covers a name."""
    held = _reserved(naming)
    texts = (naming.name, str(naming))
    return any(
        fnmatch.fnmatchcase(text, pattern)
        for pattern in patterns
        if held is None or pattern.startswith(held)
        for text in texts
    )


def _reserved(naming: Naming) -> str | None:
    return next((start for start in RESERVED.get(naming.kind, ()) if naming.name.startswith(start)), None)
