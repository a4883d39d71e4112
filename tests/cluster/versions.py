"""The pinned versions of the cluster's parts, read from `versions.toml`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

VERSIONS_FILE = Path(__file__).with_name("versions.toml")


@dataclass(frozen=True)
class Part:
    """A Go module at a version, with the programs and folders that the cluster needs from it."""

    name: str
    module: str
    version: str
    programs: Mapping[str, str]
    """File name of each program, and the package that it is built from."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """Folders to copy: name of the copy, path in the module."""
    local_version: str | None = None
    """Version of the modules that this one's go.mod replaces by folders of its own repository; if None, those
    replacements are dropped."""
    version_variable: str | None = None
    """Go variable that is set to the version when a program is linked, if any."""
    unverified: str = ""
    """Modules that are not in Go's checksum database, in the format of GONOSUMDB."""

    @property
    def label(self) -> str:
        """Name and version, as in the folder's name: `etcd-v3.6.4`."""
        return f"{self.name}-{self.version}"


@dataclass(frozen=True)
class Versions:
    """All pinned versions."""

    go_at_least: str
    parts: Mapping[str, Part]
    debian: Mapping[str, Mapping[str, Path]]
    """Debian packages by purpose, `node` or `images`; each with a file that exists once it is installed."""

    @property
    def labels(self) -> list[str]:
        """Names and versions of all parts, sorted: two clusters with equal labels are the same."""
        return sorted(part.label for part in self.parts.values())


def read_versions(file: Path = VERSIONS_FILE) -> Versions:
    """Read the pinned versions. Raises TypeError if a part lacks a field or has an unknown one."""
    table = tomllib.loads(file.read_text())
    parts = {name: Part(name=name, **fields) for name, fields in table["part"].items()}
    debian = {need: {name: Path(file) for name, file in found.items()} for need, found in table["debian"].items()}
    return Versions(go_at_least=table["go"]["at_least"], parts=parts, debian=debian)
