"""Builds the images with buildah, podman or docker, and says how large they are.

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
CA_FILE = "ca.pem"
WHEELS = "wheels"
IMAGES = ("operator", "trainer")
OWN_BASE = "debian"
MOST_MEGABYTES_OVER_BASE = {"operator": 160}
"""The operator is pulled by every node it may move to."""

BUILD_COMMANDS: Mapping[str, tuple[str, ...]] = {
    "buildah": ("buildah", "bud", "--layers", "--isolation", "chroot", "--network", "host"),  # needs no daemon, no init
    "podman": ("podman", "build"),
    "docker": ("docker", "build"),
}
UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class BuildError(Exception):
    """An image cannot be built; the message says what to do."""


@dataclass(frozen=True)
class Engine:
    """The program that builds."""

    name: str

    def build(self, image: str, dockerfile: Path, context: Path, arguments: Mapping[str, str]) -> None:
        """Build an image. Raises BuildError; the engine has said why on standard error."""
        given = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
        self._run([*BUILD_COMMANDS[self.name], *given, "--tag", image, "--file", str(dockerfile), str(context)])

    def has(self, image: str) -> bool:
        command = [self.name, "inspect", "--type", "image", image]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def megabytes(self, image: str) -> float:
        """Return what an image takes on disk, in 10⁶ bytes."""
        if self.name == "buildah":
            size = json.loads(self._ask(["buildah", "images", "--json", image]))[0]["size"]
            found = re.fullmatch(r"([\d.]+)\s*(\w+)", size)
            if found is None or found[2] not in UNITS:
                raise BuildError(f"buildah says that {image} takes `{size}`; a size such as `282 MB` was expected")
            return float(found[1]) * UNITS[found[2]] / 10**6
        return int(self._ask([self.name, "image", "inspect", "--format", "{{.Size}}", image])) / 10**6

    def base_of(self, dockerfile: Path) -> str:
        """Return the base that a Dockerfile names."""
        found = re.search(r"^ARG BASE=(\S+)$", dockerfile.read_text(encoding="utf-8"), re.MULTILINE)
        if found is None:
            raise BuildError(f"{dockerfile}: has no line `ARG BASE=…`")
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

    def _ask(self, command: Sequence[str]) -> str:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise BuildError(f"failed: {' '.join(command)}: {done.stderr.strip()}")
        return done.stdout


def find_engine(name: str | None) -> Engine:
    """Return the engine asked for, else the first there is. Raises BuildError."""
    for candidate in BUILD_COMMANDS if name is None else [name]:
        if shutil.which(candidate):
            return Engine(candidate)
    raise BuildError(f"{name or 'no engine'} found; install one of {', '.join(BUILD_COMMANDS)}")


def fill_local(wheels: Path | None, ca_file: Path | None) -> None:
    """Put what builds need of this machine where Dockerfiles find it; what an earlier build left there goes."""
    shutil.rmtree(LOCAL / WHEELS, ignore_errors=True)
    (LOCAL / CA_FILE).unlink(missing_ok=True)
    (LOCAL / WHEELS).mkdir(parents=True)
    for wheel in sorted(wheels.glob("*.whl")) if wheels else ():
        shutil.copy2(wheel, LOCAL / WHEELS / wheel.name)  # its time, too: engines that compare it see the same file
    if ca_file is not None:
        shutil.copyfile(ca_file, LOCAL / CA_FILE)


def build_arguments(options: argparse.Namespace, image: str, base: str) -> dict[str, str]:
    """Return the build arguments of one image."""
    found = {"BASE": base, "INDEX_URL": options.index_url}
    if options.ca_file is not None:
        found["CA_FILE"] = f"/local/{CA_FILE}"
    if image == "trainer":
        found["TORCH"] = options.torch
    return {name: value for name, value in found.items() if value}


def own_base(engine: Engine, image: str, mirror: str | None) -> None:
    """Make a base without a registry: Debian and its Python, from Debian's own packages (about two minutes)."""
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
        print("base: debootstrap, about two minutes", flush=True)
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
    """Build the images that the options name, and print a line for each. Raises BuildError."""
    unknown = set(options.images) - set(IMAGES)
    if unknown:
        raise BuildError(f"{', '.join(sorted(unknown))}: no such image; one of {', '.join(IMAGES)}")
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
    """Return the chart's `appVersion`: the tag that it looks for."""
    chart = (ROOT / "charts" / "stagecoach" / "Chart.yaml").read_text(encoding="utf-8")
    return next(line.split(":")[1].strip() for line in chart.splitlines() if line.startswith("appVersion:"))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python images/build.py", description=__doc__)
    found.add_argument("images", nargs="*", metavar="operator|trainer", help="which images (default: both)")
    found.add_argument("--engine", choices=list(BUILD_COMMANDS), help="default: the first of them that is installed")
    found.add_argument("--registry", default="localhost/stagecoach", help="registry and folder (default: %(default)s)")
    found.add_argument("--tag", default=version(), help="default: the chart's appVersion, %(default)s")
    found.add_argument("--torch", choices=("cuda", "cpu"), default="cuda", help="PyTorch of the trainer's image")
    found.add_argument(
        "--base", help=f"base image (default: the Dockerfile's); `{OWN_BASE}`: one made here by debootstrap"
    )
    found.add_argument("--debian-mirror", help="where debootstrap fetches from (default: its own)")
    found.add_argument("--wheels", type=Path, help="folder with packages that the index does not have")
    found.add_argument("--index-url", default=os.environ.get("UV_DEFAULT_INDEX", ""), help="package index")
    found.add_argument("--ca-file", type=Path, help="certificates to trust while downloading")
    found.add_argument("--archives", type=Path, help="folder to write each image to as a tar archive")
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
