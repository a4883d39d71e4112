"""What images are built from, and the script that builds them; the builds themselves run in `make images`."""

from __future__ import annotations

import importlib.util
import re
import stat
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from tests import ROOT

DOCKERFILES = {name: ROOT / "images" / name / "Dockerfile" for name in ("operator", "trainer")}


def load() -> ModuleType:
    """Return images/build.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("images_build", ROOT / "images" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = load()


def pins(lock: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in lock.read_text().splitlines():
        if line and line[0] not in " #":
            requirement = Requirement(line.removesuffix("\\").strip())
            found.setdefault(requirement.name, set()).add(str(requirement.specifier))
    return found


def final_stage(dockerfile: Path) -> str:
    return dockerfile.read_text().rsplit("\nFROM ", 1)[1]


# -- what is built -----------------------------------------------------------------------------------------------------


def test_the_operator_s_lock_has_the_versions_of_the_whole_lock_and_no_torch() -> None:
    whole, own = pins(ROOT / "requirements.lock"), pins(ROOT / "images" / "operator" / "requirements.lock")
    assert {name: versions for name, versions in own.items() if whole.get(name) != versions} == {}
    assert {"kopf", "kubernetes", "boto3", "pydantic"} <= set(own)
    assert not {"torch", "transformers", "deepspeed", "numpy"} & set(own)


def test_pytorch_without_cuda_is_of_the_trainer_s_version() -> None:
    (cuda,) = pins(ROOT / "trainer" / "stagecoach_trainer" / "requirements.lock")["torch"]
    assert pins(ROOT / "images" / "trainer" / "torch-cpu.lock") == {"torch": {f"{cuda}+cpu"}}


def test_images_and_checkout_are_installed_by_the_same_uv() -> None:
    (wanted,) = re.findall(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for dockerfile in DOCKERFILES.values():
        assert re.findall(r"^ARG UV_VERSION=(\S+)$", dockerfile.read_text(), re.MULTILINE) == [wanted]


@pytest.mark.parametrize("dockerfile", DOCKERFILES.values(), ids=DOCKERFILES)
def test_what_runs_is_no_root_and_has_no_build_tools(dockerfile: Path) -> None:
    stage = final_stage(dockerfile)
    assert re.search(r"^USER ([1-9]\d*):([1-9]\d*)$", stage, re.MULTILINE)
    assert "\nRUN " not in stage
    copies = re.findall(r"^COPY (.*)$", stage, re.MULTILINE)
    assert copies
    assert all(re.fullmatch(r"--from=\w+ (/opt/stagecoach\S*) \1", copied) for copied in copies), copies


@pytest.mark.parametrize("dockerfile", DOCKERFILES.values(), ids=DOCKERFILES)
def test_every_package_is_installed_by_its_hash(dockerfile: Path) -> None:
    text = dockerfile.read_text().replace("\\\n", " ")
    installs = re.findall(r"/tools/bin/uv pip install[^&;\"]*", text)
    assert installs
    assert all("--require-hashes" in command and "--no-deps" in command for command in installs)


def carried(path: str) -> bool:
    """Tell whether .dockerignore lets a path into a build."""
    found = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if not line or line.startswith("#"):
            continue
        if fnmatch(path, pattern) or path.startswith(f"{pattern}/") or fnmatch(Path(path).name, pattern):
            found = line.startswith("!")
    return found


@pytest.mark.parametrize("dockerfile", DOCKERFILES.values(), ids=DOCKERFILES)
def test_what_is_copied_exists_and_is_carried_into_the_build(dockerfile: Path) -> None:
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
        carried_files = [file for file in files if carried(file.relative_to(ROOT).as_posix())]
        assert carried_files or source.startswith("images/local"), source


def test_neither_tests_nor_the_command_line_get_into_an_image() -> None:
    assert not carried("operator/stagecoach_cli/main.py")
    assert not carried("tests/conftest.py")
    assert not carried(".venv/bin/python")
    assert carried("operator/stagecoach_operator/settings.py")


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
    """A `docker` that notes how it is called, and the file with the notes."""
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


def test_an_image_is_built_with_what_was_given_and_measured_against_its_base(
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


def test_what_an_earlier_build_left_is_not_built_in(docker: Path) -> None:
    (build.LOCAL / "wheels").mkdir()
    (build.LOCAL / "wheels" / "old.whl").write_text("old")
    (build.LOCAL / "ca.pem").write_text("old")
    assert build.main(["operator", "--engine", "docker", "--base", "base:1"]) == 0
    assert "old.whl" not in docker.read_text()
    assert "ca.pem" not in docker.read_text()


def test_an_operator_that_grew_too_large_fails(
    docker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SIZE", "261000000")
    assert build.main(["operator", "--engine", "docker", "--base", "base:1"]) == 1
    assert "161 MB over its base; at most 160 MB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["kitchen"], "kitchen: no such image; one of operator, trainer", id="an unknown image"),
        pytest.param(["--engine", "podman"], "podman found; install one of buildah, podman, docker", id="no engine"),
        pytest.param(["--base", "debian"], "needs debootstrap", id="no debootstrap"),
    ],
)
def test_what_cannot_be_done_is_told(
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


@pytest.mark.parametrize(("said", "megabytes"), [("282 MB", 282), ("1.77 GB", 1770), ("512 kB", 0.512)])
def test_sizes_are_read_as_buildah_says_them(
    said: str, megabytes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "buildah"
    program.write_text(f"""#!/bin/sh\necho '[{{"size": "{said}"}}]'\n""")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert build.Engine("buildah").megabytes("any") == pytest.approx(megabytes)


def test_the_tag_is_the_one_that_the_chart_looks_for() -> None:
    assert build.parser().parse_args([]).tag == build.version() == "0.1.0"
