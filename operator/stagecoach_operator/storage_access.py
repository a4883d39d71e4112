"""Where the operator may use its own credentials: the storage of its settings, and what they allow in addition.

A run names any endpoint and bucket. A signed request gives the server there the operator's session token, and lets
a user read through the operator what only the operator may read. Other storage is left to the stages' own pods.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import socket
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field

from stagecoach_api.base import Model
from stagecoach_api.stores.base import FolderLocation, parse_location

AWS = "AWS"
FOLDER = "folder"
"""Endpoint of a place that is a folder."""
_DEFAULT_PORTS = {"http": 80, "https": 443}
_LOCAL_NAMES = ("localhost", "local", "internal", "svc", "svc.cluster.local", "localdomain")
"""Names, and ends of names, that only mean something inside a network."""


class AllowedStorage(Model):
    """An endpoint, and buckets there, for which the operator may use its credentials."""

    endpoint: str | None = Field(default=None, min_length=1, max_length=512)
    """Endpoint, exactly as in `spec.storage.endpoint`. If unset: AWS."""

    buckets: Annotated[tuple[str, ...], Field(min_length=1, max_length=1024)]
    """Names of buckets; `*` matches any characters."""


@dataclass(frozen=True)
class Place:
    """A bucket of an endpoint."""

    endpoint: str
    """Normalised. Empty: AWS."""
    bucket: str
    """Empty for a folder."""

    def __str__(self) -> str:
        return f"the bucket `{self.bucket}` of {self.endpoint or AWS}" if self.bucket else "folders"


def place_of(uri: str, endpoint: str | None) -> Place:
    """Return the place of an absolute URI. Raises InvalidLocation."""
    location = parse_location(uri)
    if isinstance(location, FolderLocation):
        return Place(FOLDER, "")
    return Place(normalised(endpoint), location.bucket)


def normalised(endpoint: str | None) -> str:
    """Return an endpoint in the form in which equal ones are equal: lower case, no default port, no final slash."""
    if endpoint is None:
        return ""
    try:
        parts = urlsplit(endpoint.strip())
        port = parts.port
    except ValueError:
        return endpoint
    host = (parts.hostname or "").rstrip(".")
    if parts.username is not None or parts.query or parts.fragment or not host:
        return endpoint
    shown = f"[{host}]" if ":" in host else host
    given = "" if port in (None, _DEFAULT_PORTS.get(parts.scheme)) else f":{port}"
    return f"{parts.scheme}://{shown}{given}{parts.path.rstrip('/')}"


def is_allowed(place: Place, allowed: tuple[AllowedStorage, ...]) -> bool:
    """Return whether one of the entries allows a place."""
    return any(
        normalised(entry.endpoint) == place.endpoint
        and any(fnmatch.fnmatchcase(place.bucket, pattern) for pattern in entry.buckets)
        for entry in allowed
    )


def endpoint_weakness(endpoint: str) -> str:
    """Return why an endpoint is refused that the settings do not name: it is not encrypted, or inside a network.

    Empty if there is no such reason.
    """
    try:
        parts = urlsplit(endpoint)
        host = (parts.hostname or "").rstrip(".")
    except ValueError:
        return "is not a URL"
    if parts.scheme != "https":
        return "is not encrypted (https)"
    if not host or parts.username is not None:
        return "is not the URL of a host"
    address = _address(host)
    if address is not None and not address.is_global:
        return "is an address inside a network"
    if address is None and ("." not in host or host.endswith(tuple(f".{name}" for name in _LOCAL_NAMES))):
        return "is a name inside a network"
    return ""


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a host is written as, in any form that resolvers accept, such as `0x7f.1`."""
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return None
    mapped = getattr(found, "ipv4_mapped", None)
    return found if mapped is None else mapped
