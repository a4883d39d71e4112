"""Programs from pinned Go modules: each is required by a module of our own, built by `go build` and kept in the cache.

`go install module@version` is not used because it rejects modules whose go.mod has replacements (etcd, Kubernetes) and
modules without versions in the proxy's list (JobSet, Kueue).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.cluster.report import ClusterError, last_lines, print_line, timed
from tests.cluster.versions import Part, Versions

GO_FALLBACK = "/usr/local/go/bin/go"
"""Path of Go in its own installation."""
UNRELEASED = "v0.0.0"
"""The version that a go.mod gives to modules of its own repository."""


class Builder:
    """Builds missing programs into `<cache>/bin/<part>-<version>/`."""

    def __init__(self, versions: Versions, cache: Path) -> None:
        self._versions = versions
        self._cache = cache

    def program(self, part: str, name: str) -> Path:
        """Return the path of a part's program, which exists once it is built."""
        return self._folder(self._versions.parts[part]) / name

    def folder(self, part: str, name: str) -> Path:
        """Return the path of a folder copied from a part's module, which exists once the part is built."""
        return self._folder(self._versions.parts[part]) / name

    def ensure(self, wanted: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Build the missing programs of each part in the given order, printing one line for each.

        Raises ClusterError with the end of the compiler's output if one cannot be built.
        """
        cached = 0
        for part_name, programs in wanted:
            part = self._versions.parts[part_name]
            if self._is_there(part, programs):
                cached += len(programs)
            else:
                with self._locked(part.label):  # another process may have built it in the meantime
                    self._build_missing(part, programs)
        print_line(f"{cached} of {sum(len(programs) for _, programs in wanted)} programs", "in the cache")

    def build_source(self, name: str, source: Path, version: str) -> Path:
        """Build a Go file of this folder that needs no module; return the program's path."""
        target = self._cache / "bin" / f"{name}-{version}" / name
        if not target.exists():
            with self._locked(name), timed(f"{name} {version}", "built"):
                target.parent.mkdir(parents=True, exist_ok=True)
                self._go(
                    ["build", "-trimpath", "-ldflags", "-s -w", "-o", str(target), str(source)], source.parent, name
                )
        return target

    def _is_there(self, part: Part, programs: Sequence[str]) -> bool:
        return all((self._folder(part) / name).exists() for name in (*programs, *part.folders))

    def _build_missing(self, part: Part, programs: Sequence[str]) -> None:
        with timed(f"{part.name} {part.version}", "fetched"):
            workspace = self._prepare(part)
        for program in programs:
            if not self.program(part.name, program).exists():
                with timed(f"{part.name} {part.version}: {program}", "built"):
                    self._build(part, program, workspace)

    def _prepare(self, part: Part) -> Path:
        """Write the module that requires the part, and copy the part's folders that are kept."""
        workspace = self._cache / "src" / part.label
        workspace.mkdir(parents=True, exist_ok=True)
        self._check_go(workspace)
        downloaded = json.loads(
            self._go(["mod", "download", "-json", f"{part.module}@{part.version}"], workspace, part.name)
        )
        upstream = json.loads(self._go(["mod", "edit", "-json", downloaded["GoMod"]], workspace, part.name))
        (workspace / "go.mod").write_text(module_file(part, upstream))
        for name, path in part.folders.items():
            copy_folder(Path(downloaded["Dir"]) / path, self.folder(part.name, name))
        return workspace

    def _build(self, part: Part, program: str, workspace: Path) -> None:
        target = self.program(part.name, program)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{program}.unfinished")
        command = [
            "build",
            "-mod=mod",
            "-trimpath",
            "-ldflags",
            link_flags(part),
            "-o",
            str(unfinished),
            part.programs[program],
        ]
        self._go(command, workspace, part.name, unverified=part.unverified)
        unfinished.rename(target)

    def _check_go(self, workspace: Path) -> None:
        version = self._go(["env", "GOVERSION"], workspace, "go").strip().removeprefix("go")
        if _numbers(version) < _numbers(self._versions.go_at_least):
            raise ClusterError(
                f"Go {version} is installed; {self._versions.go_at_least} or newer is needed (go.dev/dl)"
            )

    def _go(self, arguments: list[str], workspace: Path, name: str, *, unverified: str = "") -> str:
        """Run Go and return its standard output; its messages are appended to the log of `name`."""
        log = self._cache / "log" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"CGO_ENABLED": "0", "GOWORK": "off"}
        if unverified:
            known = [os.environ.get("GONOSUMDB", ""), unverified]
            environment["GONOSUMDB"] = ",".join(modules for modules in known if modules)
        with log.open("a") as messages:
            done = subprocess.run(
                [find_go(), *arguments],
                cwd=workspace,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                check=False,
            )
        if done.returncode != 0:
            raise ClusterError(f"`go {' '.join(arguments[:2])}` failed for {name}; {last_lines(log)}")
        return done.stdout

    def _folder(self, part: Part) -> Path:
        return self._cache / "bin" / part.label

    @contextmanager
    def _locked(self, label: str) -> Iterator[None]:
        """Hold the lock of a part: concurrent builds of it would write the same files."""
        locks = self._cache / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / label).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def find_go() -> str:
    """Return the path of Go. Raises ClusterError if it is not installed."""
    found = shutil.which("go") or shutil.which(GO_FALLBACK)
    if found is None:
        raise ClusterError("Go is needed to build the cluster: install it (go.dev/dl) and put `go` into PATH")
    return found


def module_file(part: Part, upstream: Mapping[str, Any]) -> str:
    """Return the go.mod of a module of ours with which a part is built as in its own repository.

    `upstream` is the part's go.mod as `go mod edit -json` prints it. Go ignores the replacements of required modules,
    so they are repeated.
    """
    lines = [f"module stagecoach.dev/cluster/{part.name}", "", f"go {upstream['Go']}", ""]
    lines += [f"require {part.module} {part.version}", ""]
    lines += [f"replace {old} => {new}" for old, new in sorted(replacements(part, upstream).items())]
    return "\n".join(lines) + "\n"


def replacements(part: Part, upstream: Mapping[str, Any]) -> dict[str, str]:
    """Return the replacements: modules of the part's own repository by their released version, others as upstream."""
    found: dict[str, str] = {}
    for requirement in upstream.get("Require") or []:
        if requirement["Version"] == UNRELEASED and part.local_version:
            found[requirement["Path"]] = f"{requirement['Path']} {part.local_version}"
    for replacement in upstream.get("Replace") or []:
        old, new = replacement["Old"], replacement["New"]
        name = " ".join(filter(None, [old["Path"], old.get("Version")]))
        if "Version" in new:
            found[name] = f"{new['Path']} {new['Version']}"
        elif part.local_version:
            found[name] = f"{old['Path']} {part.local_version}"
    return found


def link_flags(part: Part) -> str:
    """Return the linker's flags: no debugging tables, and the version if the part has a variable for it."""
    flags = "-s -w"
    if part.version_variable:
        flags += f" -X {part.version_variable}={part.version}"
    return flags


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder of Go's read-only module cache as a writable one."""
    if target.exists():
        return
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished, copy_function=shutil.copyfile)
    for folder in [unfinished, *(path for path in unfinished.rglob("*") if path.is_dir())]:
        folder.chmod(0o755)
    unfinished.rename(target)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split("rc")[0].split("-")[0].split(".")[:2]]
