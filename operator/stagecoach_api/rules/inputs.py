"""Rules over URIs, images and names of data sets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from stagecoach_api.draft import Draft, Fault, Rule, walk
from stagecoach_api.fields import FieldPath, walk_values
from stagecoach_api.references import RecordSource, hub_advice

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_HUB_URL = re.compile(r"^(?:hf://|https?://(?:www\.)?huggingface\.co/)(?P<datasets>datasets/)?(?P<name>[^/]+/[^/?#]+)")
_IMAGE_DIGEST = re.compile(r"@sha256:[0-9a-f]{64}$")


# -- URIs and images ---------------------------------------------------------------------------------------------------


def uris_can_be_opened(draft: Draft) -> Iterator[Fault]:
    for path, value in walk(draft.spec, ("spec",)):
        if path[-1] in draft.uri_fields and isinstance(value, str):
            fault = _check_uri(value)
            if fault is not None:
                yield Fault(path, value, *fault)


def _check_uri(uri: str) -> tuple[str, str] | None:
    """Return (rule, remedy) for a URI that no store can open."""
    scheme = _SCHEME.match(uri)
    if scheme is None:
        return None
    rest = uri[scheme.end() :]
    if "@" in rest.split("/")[0]:
        return "must not contain credentials", "give `storage.credentials`, or let the SDK find them"
    match scheme[1]:
        case "s3":
            return None if rest.split("/")[0] else ("must name a bucket", "write `s3://bucket/prefix`")
        case "file":
            absolute = rest.startswith("/")
            return None if absolute else ("must be an absolute path", "write `file:///folder`, with three slashes")
    rule = "must be `s3://…`, `file:///…` or a path"
    hub = _HUB_URL.match(uri)
    if hub is not None:
        return rule, hub_advice(hub["name"], "dataset" if hub["datasets"] else "model")
    return rule, f"copy it there: `{scheme[1]}://` cannot be read"


def the_endpoint_is_an_http_url(draft: Draft) -> Iterator[Fault]:
    endpoint = draft.storage.get("endpoint")
    if not isinstance(endpoint, str):
        return
    path = ("spec", "storage", "endpoint")
    try:
        url = urlsplit(endpoint)
        valid, secret = url.scheme in ("http", "https") and bool(url.hostname), url.username is not None
    except ValueError:
        valid, secret = False, False
    if secret:
        yield Fault(
            path, endpoint, "must not contain credentials", "give `storage.credentials`, or let the SDK find them"
        )
    elif not valid:
        yield Fault(path, endpoint, "must be an http or https URL", "write it as `https://s3.example.com`")


def images_are_named_by_digest(draft: Draft) -> Iterator[Fault]:
    """A tag can be moved to other code without the cache noticing."""
    places: list[tuple[FieldPath, object]] = [(("spec", "defaults", "image"), draft.spec.get("defaults"))]
    places += [((*stage.path, "image"), stage.raw) for stage in draft.stages]
    for path, settings in places:
        image = settings.get("image") if isinstance(settings, dict) else None
        if isinstance(image, str) and not _IMAGE_DIGEST.search(image):
            yield Fault(
                path,
                image,
                "must be named by digest, so that the cache knows the code",
                "write `name@sha256:` and 64 hex digits, or leave it out for the operator's own image",
            )


# -- names of sets -----------------------------------------------------------------------------------------------------


def set_names_are_unique(draft: Draft) -> Iterator[Fault]:
    """Reports and metrics call data sets by name; sources without a `name` field are not reported."""
    for stage in draft.stages:
        for path, value in walk_values(stage.config):
            labels = _labels(value)
            for index, label in enumerate(labels):
                if label in labels[:index]:
                    rule = "must have a name of its own in this list"
                    yield Fault(stage.at(*path, index), label, rule, "give it another `name`")


def _labels(value: object) -> list[str]:
    """Return the labels of a list of data sets with names, nothing for any other value."""
    if not isinstance(value, tuple):
        return []
    return [item.label for item in value if isinstance(item, RecordSource) and "name" in type(item).model_fields]


INPUT_RULES: tuple[Rule, ...] = (
    uris_can_be_opened,
    the_endpoint_is_an_http_url,
    images_are_named_by_digest,
    set_names_are_unique,
)
