"""Builds the images with buildah, podman or docker, and prints their sizes.

python images/build.py [operator] [trainer] [options]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ROOT / "images" / "local"
VERSION_FILE = ROOT / "operator" / "stagecoach_api" / "version.py"
CA_FILE = "ca.pem"
WHEELS = "wheels"
IMAGES = ("operator", "trainer")
OWN_BASE = "debian"
MOST_MEGABYTES_OVER_BASE = {"operator": 160}
"""Limit per image. The operator's is pulled by every node that it may be moved to."""

BUILD_COMMANDS: Mapping[str, tuple[str, ...]] = {
    "buildah": (
        "buildah",
        "bud",
        "--layers",
        "--isolation",
        "chroot",
        "--network",
        "host",
    ),  # no daemon needed
    "podman": ("podman", "build"),
    "docker": ("docker", "build"),
}
UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class BuildError(Exception):
    """An image cannot be built; the message states what to do."""


@dataclass(frozen=True)
class Engine:
    """The program that builds images."""

    name: str

    def build(self, image: str, dockerfile: Path, context: Path, arguments: Mapping[str, str]) -> None:
        """Build an image. Raises BuildError; the engine has printed the reason on standard error."""
        given = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
        self._run([*BUILD_COMMANDS[self.name], *given, "--tag", image, "--file", str(dockerfile), str(context)])

    def has(self, image: str) -> bool:
        command = [self.name, "inspect", "--type", "image", image]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def megabytes(self, image: str) -> float:
        """Return the size of an image on disk, in 10⁶ bytes."""
        if self.name == "buildah":
            size = json.loads(self._output(["buildah", "images", "--json", image]))[0]["size"]
            found = re.fullmatch(r"([\d.]+)\s*(\w+)", size)
            if found is None or found[2] not in UNITS:
                raise BuildError(f"buildah reports `{size}` as the size of {image}; expected a size such as `282 MB`")
            return float(found[1]) * UNITS[found[2]] / 10**6
        return int(self._output([self.name, "image", "inspect", "--format", "{{.Size}}", image])) / 10**6

    def base_of(self, dockerfile: Path) -> str:
        """Return the base image named in a Dockerfile."""
        found = re.search(r"^ARG BASE=(\S+)$", dockerfile.read_text(encoding="utf-8"), re.MULTILINE)
        if found is None:
            raise BuildError(f"{dockerfile}: must contain a line `ARG BASE=…`")
        return found[1]

    def archive(self, image: str, file: Path) -> None:
        """Write an image as `docker save` does."""
        file.unlink(missing_ok=True)
        if self.name == "buildah":
            self._run(["buildah", "push", "--quiet", image, f"docker-archive:{file}:{image}"])
        else:
            self._run([self.name, "save", "--output", str(file), image])

    def _run(self, command: Sequence[str]) -> None:
        if subprocess.run(command, check=False).returncode != 0:
            raise BuildError(f"failed: {' '.join(command)}")

    def _output(self, command: Sequence[str]) -> str:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"failed: {' '.join(command)}: {done.stderr.strip()}")
        return done.stdout


def find_engine(name: str | None) -> Engine:
    """Return the requested engine, else the first installed one. Raises BuildError."""
    for candidate in BUILD_COMMANDS if name is None else [name]:
        if shutil.which(candidate):
            return Engine(candidate)
    missing = "no build engine is installed" if name is None else f"{name} is not installed"
    raise BuildError(f"{missing}; install one of {', '.join(BUILD_COMMANDS)}")


def fill_local(wheels: Path | None, ca_file: Path | None) -> None:
    """Copy local files that builds need to where the Dockerfiles expect them, and remove those of an earlier build."""
    shutil.rmtree(LOCAL / WHEELS, ignore_errors=True)
    (LOCAL / CA_FILE).unlink(missing_ok=True)
    (LOCAL / WHEELS).mkdir(parents=True)
    for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
        shutil.copy2(wheel, LOCAL / WHEELS / wheel.name)  # with its mtime: engines that compare it can reuse the layer
    if ca_file is not None:
        shutil.copyfile(ca_file, LOCAL / CA_FILE)


def build_arguments(options: argparse.Namespace, image: str, base: str) -> dict[str, str]:
    """Return the build arguments of one image."""
    given = {"BASE": base, "INDEX_URL": options.index_url}
    if options.ca_file is not None:
        given["CA_FILE"] = f"/local/{CA_FILE}"
    if image == "trainer":
        given["TORCH"] = options.torch
    return {name: value for name, value in given.items() if value}


def own_base(engine: Engine, image: str, mirror: str | None) -> None:
    """Build a base image without a registry: Debian and its Python, from Debian's packages. Takes about two minutes."""
    if engine.has(image):
        return
    if shutil.which("debootstrap") is None:
        raise BuildError(f"--base {OWN_BASE} needs debootstrap: install it, or name a base")
    folder = ROOT / "build" / "images" / "base"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    packages = "--include=python3,python3-venv,ca-certificates"
    root = str(folder / "root")
    command = ["debootstrap", "--variant=minbase", packages, "bookworm", root, *([mirror] if mirror else [])]
    pack = ["tar", "-C", root, "-cf", str(folder / "root.tar"), "."]
    try:
        print("base: running debootstrap, about two minutes", flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        subprocess.run(pack, check=True)
        (folder / "Dockerfile").write_text("FROM scratch\nADD root.tar /\n", encoding="utf-8")
        shutil.rmtree(root)
        engine.build(image, folder / "Dockerfile", folder, {})
    except subprocess.CalledProcessError as error:
        raise BuildError(f"failed: {' '.join(command)}: status {error.returncode}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build_all(options: argparse.Namespace) -> None:
    """Build the requested images and print a line for each. Raises BuildError."""
    unknown = set(options.images) - set(IMAGES)
    if unknown:
        raise BuildError(f"unknown images: {', '.join(sorted(unknown))}; choose from {', '.join(IMAGES)}")
    engine = find_engine(options.engine)
    fill_local(options.wheels, options.ca_file)
    base = options.base
    if base == OWN_BASE:
        base = f"{options.registry}/base:bookworm"
        own_base(engine, base, options.debian_mirror)
    for image in options.images or IMAGES:
        started = time.monotonic()
        name = f"{options.registry}/{image}:{options.tag}"
        dockerfile = ROOT / "images" / image / "Dockerfile"
        own = base or engine.base_of(dockerfile)
        engine.build(name, dockerfile, ROOT, build_arguments(options, image, own))
        size = engine.megabytes(name)
        over = size - engine.megabytes(own)
        seconds = time.monotonic() - started
        print(f"{name}: {size:.0f} MB, {over:.0f} MB over its base, {seconds:.0f} s", flush=True)
        if over > MOST_MEGABYTES_OVER_BASE.get(image, over):
            raise BuildError(f"{name} is {over:.0f} MB over its base; at most {MOST_MEGABYTES_OVER_BASE[image]} MB")
        if options.archives is not None:
            options.archives.mkdir(parents=True, exist_ok=True)
            engine.archive(name, options.archives / f"{image}.tar")


def version() -> str:
    """Return the version of Stagecoach, the chart's default tag. Read as text: this script has no dependencies."""
    text = VERSION_FILE.read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise BuildError(f'{VERSION_FILE}: must contain a line `__version__ = "…"`')
    return found[1]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python images/build.py", description=__doc__)
    found.add_argument("images", nargs="*", metavar="operator|trainer", help="images to build (default: both)")
    found.add_argument("--engine", choices=list(BUILD_COMMANDS), help="default: the first that is installed")
    found.add_argument("--registry", default="localhost/stagecoach", help="registry and path (default: %(default)s)")
    found.add_argument("--tag", default=version(), help="default: the version, %(default)s")
    found.add_argument("--torch", choices=("cuda", "cpu"), default="cuda", help="PyTorch variant of the trainer image")
    found.add_argument(
        "--base", help=f"base image (default: the Dockerfile's); `{OWN_BASE}`: build one with debootstrap"
    )
    found.add_argument("--debian-mirror", help="mirror for debootstrap (default: its own)")
    found.add_argument("--wheels", type=Path, help="folder of packages that are not in the index")
    found.add_argument("--index-url", default=os.environ.get("UV_DEFAULT_INDEX", ""), help="package index")
    found.add_argument("--ca-file", type=Path, help="CA certificates to trust for downloads")
    found.add_argument("--archives", type=Path, help="folder to save the images to, as tar archives")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    try:
        build_all(parser().parse_args(arguments))
    except (BuildError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
