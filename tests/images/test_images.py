"""The inputs of the images, and the script that builds them. The builds themselves run in `make images`."""

from __future__ import annotations

import re
import stat
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from stagecoach_api.version import __version__
from tests import ROOT
from tests.scripts import load_script

DOCKERFILES = {name: ROOT / "images" / name / "Dockerfile" for name in ("operator", "trainer")}


build = load_script("images/build.py")


def pins(lock: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in lock.read_text().splitlines():
        if line and line[0] not in " #":
            requirement = Requirement(line.removesuffix("\\").strip())
            found.setdefault(requirement.name, set()).add(str(requirement.specifier))
    return found


def final_stage(dockerfile: Path) -> str:
    return dockerfile.read_text().rsplit("\nFROM ", 1)[1]


# -- the images --------------------------------------------------------------------------------------------------------


def test_the_operators_lock_is_a_subset_without_torch() -> None:
    whole, own = pins(ROOT / "requirements.lock"), pins(ROOT / "images" / "operator" / "requirements.lock")
    assert {name: versions for name, versions in own.items() if whole.get(name) != versions} == {}
    assert {"kopf", "kubernetes", "boto3", "pydantic"} <= set(own)
    assert not {"torch", "transformers", "deepspeed", "numpy"} & set(own)


def test_pytorch_for_cpus_has_the_same_version_as_for_cuda() -> None:
    (cuda,) = pins(ROOT / "trainer" / "stagecoach_trainer" / "requirements.lock")["torch"]
    assert pins(ROOT / "images" / "trainer" / "torch-cpu.lock") == {"torch": {f"{cuda}+cpu"}}


def test_images_and_checkout_use_the_same_uv() -> None:
    (wanted,) = re.findall(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for dockerfile in DOCKERFILES.values():
        assert re.findall(r"^ARG UV_VERSION=(\S+)$", dockerfile.read_text(), re.MULTILINE) == [wanted]


@pytest.mark.parametrize("dockerfile", DOCKERFILES.values(), ids=DOCKERFILES)
def test_the_final_stage_is_not_root_and_has_no_build_tools(dockerfile: Path) -> None:
    stage = final_stage(dockerfile)
    assert re.search(r"^USER ([1-9]\d*):([1-9]\d*)$", stage, re.MULTILINE)
    assert "\nRUN " not in stage
    copies = re.findall(r"^COPY (.*)$", stage, re.MULTILINE)
    assert copies
    assert all(re.fullmatch(r"--from=\w+ (/opt/stagecoach\S*) \1", copied) for copied in copies), copies


@pytest.mark.parametrize("dockerfile", DOCKERFILES.values(), ids=DOCKERFILES)
def test_every_package_is_installed_with_its_hash(dockerfile: Path) -> None:
    text = dockerfile.read_text().replace("\\\n", " ")
    installs = re.findall(r"/tools/bin/uv pip install[^&;\"]*", text)
    assert installs
    assert all("--require-hashes" in command and "--no-deps" in command for command in installs)


def is_in_context(path: str) -> bool:
    """Return whether .dockerignore includes a path in the build context."""
    found = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if not line or line.startswith("#"):
            continue
        if fnmatch(path, pattern) or path.startswith(f"{pattern}/") or fnmatch(Path(path).name, pattern):
            found = line.startswith("!")
    return found


@pytest.mark.parametrize("dockerfile", DOCKERFILES.values(), ids=DOCKERFILES)
def test_copied_files_exist_and_are_in_the_build_context(dockerfile: Path) -> None:
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile.read_text(), re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert len(sources) >= 4
    for source in sources:
        path = ROOT / source
        assert path.exists(), source
        files = [path] if path.is_file() else [file for file in path.rglob("*.py") if "__pycache__" not in file.parts]
        included_files = [file for file in files if is_in_context(file.relative_to(ROOT).as_posix())]
        assert included_files or source.startswith("images/local"), source


def test_tests_and_command_line_are_not_in_the_build_context() -> None:
    assert not is_in_context("operator/stagecoach_cli/main.py")
    assert not is_in_context("tests/conftest.py")
    assert not is_in_context(".venv/bin/python")
    assert is_in_context("operator/stagecoach_operator/settings.py")


# -- the script --------------------------------------------------------------------------------------------------------

FAKE_DOCKER = """\
#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in
  *inspect*base*) echo 100000000 ;;
  *inspect*) echo "$SIZE" ;;
  *build*) ls {local} {local}/wheels >> "$CALLS" ;;
esac
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a fake `docker` that logs its calls; return the log."""
    local = tmp_path / "local"
    local.mkdir()
    monkeypatch.setattr(build, "LOCAL", local)
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(FAKE_DOCKER.format(local=local))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    calls = tmp_path / "calls"
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("SIZE", "250000000")
    return calls


def test_an_image_is_built_with_the_given_options_and_measured(
    docker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "torch-2-py3-none-any.whl").write_text("a wheel")
    (tmp_path / "own.pem").write_text("a certificate")
    options = ["--engine", "docker", "--base", "base:1", "--torch", "cpu", "--tag", "7", "--registry", "here/team"]
    options += ["--wheels", str(wheels), "--ca-file", str(tmp_path / "own.pem"), "--index-url", "https://index/simple"]
    assert build.main(["trainer", *options]) == 0
    calls = docker.read_text()
    for argument in ("BASE=base:1", "TORCH=cpu", "CA_FILE=/local/ca.pem", "INDEX_URL=https://index/simple"):
        assert f"--build-arg {argument}" in calls
    assert f"--tag here/team/trainer:7 --file {DOCKERFILES['trainer']} {ROOT}" in calls
    assert "torch-2-py3-none-any.whl" in calls
    assert "ca.pem" in calls
    assert "here/team/trainer:7: 250 MB, 150 MB over its base" in capsys.readouterr().out


def test_files_of_an_earlier_build_are_removed(docker: Path) -> None:
    (build.LOCAL / "wheels").mkdir()
    (build.LOCAL / "wheels" / "old.whl").write_text("old")
    (build.LOCAL / "ca.pem").write_text("old")
    assert build.main(["operator", "--engine", "docker", "--base", "base:1"]) == 0
    assert "old.whl" not in docker.read_text()
    assert "ca.pem" not in docker.read_text()


def test_an_operator_image_over_the_limit_fails(
    docker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIZE", "261000000")
    assert build.main(["operator", "--engine", "docker", "--base", "base:1"]) == 1
    assert "161 MB over its base; at most 160 MB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["kitchen"], "unknown images: kitchen; choose from operator, trainer", id="an unknown image"),
        pytest.param(
            ["--engine", "podman"], "podman is not installed; install one of buildah, podman, docker", id="no engine"
        ),
        pytest.param(["--base", "debian"], "needs debootstrap", id="no debootstrap"),
    ],
)
def test_errors_are_reported(
    docker: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(build.Engine, "has", lambda self, image: False)
    assert build.main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("size", "megabytes"), [("282 MB", 282), ("1.77 GB", 1770), ("512 kB", 0.512)])
def test_sizes_printed_by_buildah_are_parsed(
    size: str, megabytes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "buildah"
    program.write_text(f"""#!/bin/sh\necho '[{{"size": "{size}"}}]'\n""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert build.Engine("buildah").megabytes("any") == pytest.approx(megabytes)


def test_the_default_tag_is_the_version() -> None:
    assert build.parser().parse_args([]).tag == build.version() == __version__
