"""The identity of the trainer's code: whatever can change a result counts, and nothing else."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stagecoach_api import code
from stagecoach_api.code import UnparsableCode, code_identity, python_content, trainer_folder

SOURCE = '''\
"""A module."""

import math  # for exp

RATE = 0.5
"""An attribute's docstring."""


class Missing(Exception):
    """A class without a body."""


def scale(values: list[float], *, by: float = RATE) -> dict[str, object]:
    """Return the values, scaled."""
    return {**{"a": None}, f"x{by:>{8}}": [math.exp(-value * by) for value in values if value]}
'''

REFORMATTED = """\
import math
RATE = 0.50
class Missing(Exception): pass
def scale(
    values: list[float],
    *,
    by: float = RATE,
) -> dict[str, object]:
    # A comment.

    return {
        **{'a': None},
        f'x{by:>{8}}': [(math.exp((-value) * by)) for value in values if value],
    }
"""

LOCK = """\
numpy==2.4.6 ; python_full_version < '3.12' \\
    --hash=sha256:aa \\
    --hash=sha256:bb
torch==2.13.0 \\
    --hash=sha256:cc
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "one" / "stagecoach_trainer"
    (folder / "stages").mkdir(parents=True)
    (folder / "__init__.py").write_text("", encoding="utf-8")
    (folder / "stages" / "sft.py").write_text(SOURCE, encoding="utf-8")
    (folder / "stages" / "chatml.jinja").write_text("{{ bos_token }}\n", encoding="utf-8")
    (folder / "requirements.lock").write_text(LOCK, encoding="utf-8")
    return folder


def test_a_copy_elsewhere_has_the_same_identity(package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(package, tmp_path / "site-packages" / "stagecoach_trainer"))
    assert code_identity(copy) == code_identity(package)


def test_bytecode_and_other_files_do_not_count(package: Path) -> None:
    before = code_identity(package)
    (package / "stages" / "__pycache__").mkdir()
    (package / "stages" / "__pycache__" / "sft.py").write_text("cached", encoding="utf-8")
    (package / "py.typed").write_text("", encoding="utf-8")
    (package / "stages" / "requirements.lock").write_text("torch==1\n", encoding="utf-8")
    assert code_identity(package) == before


def test_every_file_of_the_trainer_is_of_a_kind_that_is_known() -> None:
    """A data file of a new kind either counts (`DATA_SUFFIXES`) or is named here because no result depends on it."""
    files = (path for path in trainer_folder().rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    others = {path.name for path in files if path.suffix not in {".py", *code.DATA_SUFFIXES}}
    assert others == {"py.typed", "requirements.lock"}


# -- what does not count -----------------------------------------------------------------------------------------------


def test_comments_docstrings_and_formatting_do_not_count(package: Path) -> None:
    before = code_identity(package)
    (package / "stages" / "sft.py").write_text(REFORMATTED, encoding="utf-8")
    (package / "__init__.py").write_text('"""The trainer."""\n\n# A comment.\n', encoding="utf-8")
    assert code_identity(package) == before


@pytest.mark.parametrize(
    "line",
    ["# a comment", "", '"""A docstring."""', "'another'\n'way' '''to write one'''", "pass", "..."],
)
@pytest.mark.parametrize("place", ["RATE", "class", "def", "    return"])
def test_a_line_without_effect_does_not_count(package: Path, line: str, place: str) -> None:
    before = code_identity(package)
    indent = place[: len(place) - len(place.lstrip())]
    lines = "\n".join(indent + part for part in line.split("\n"))
    (package / "stages" / "sft.py").write_text(SOURCE.replace(f"\n{place}", f"\n{lines}\n{place}"), encoding="utf-8")
    assert code_identity(package) == before


@pytest.mark.parametrize(
    "lock",
    [
        pytest.param(
            "# made by uv\n\n" + LOCK.replace(" \\\n    --hash=sha256:cc", "  # via deepspeed"), id="comments"
        ),
        pytest.param(LOCK.replace("--hash=sha256:bb", "--hash=sha256:bb \\\n    --hash=sha256:dd"), id="another hash"),
        pytest.param("".join(reversed(re.split(r"(?=torch)", LOCK))), id="order"),
        pytest.param(LOCK.replace("6 ; p", "6  ;  p").replace("\n", "\r\n"), id="spacing"),
    ],
)
def test_comments_hashes_and_order_of_the_lock_do_not_count(package: Path, lock: str) -> None:
    before = code_identity(package)
    (package / "requirements.lock").write_text(lock, encoding="utf-8", newline="")
    assert code_identity(package) == before


# -- what counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("0.5", "0.25", id="a constant"),
        pytest.param("= 0.5", "= '0.5'", id="the type of a constant"),
        pytest.param("RATE", "SPEED", id="a name"),
        pytest.param("by: float", "by: int", id="an annotation"),
        pytest.param("*, by", "by", id="how a parameter is passed"),
        pytest.param("-value", "+value", id="an operator"),
        pytest.param('"a": None', '"a": 0', id="None"),
        pytest.param('**{"a": None}', '"a": None', id="an unpacked mapping"),
        pytest.param("{8}", "{9}", id="the format of an f-string"),
        pytest.param(" if value]", "]", id="a condition"),
        pytest.param("import math", "import cmath as math", id="an import"),
        pytest.param("math.exp(", "math.exp('', ", id="an empty text"),
    ],
)
def test_a_change_of_the_code_counts(package: Path, old: str, new: str) -> None:
    before = code_identity(package)
    assert old in SOURCE
    (package / "stages" / "sft.py").write_text(SOURCE.replace(old, new), encoding="utf-8")
    assert code_identity(package) != before


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch==2.13.0", "torch==2.13.1"),
        ("< '3.12'", "< '3.13'"),
        ("torch==2.13.0", "torch==2.13.0\nattrs==1"),
        ("torch", "--index-url https://wheels.example.com\ntorch"),
    ],
)
def test_a_pin_of_the_lock_counts(package: Path, old: str, new: str) -> None:
    before = code_identity(package)
    (package / "requirements.lock").write_text(LOCK.replace(old, new), encoding="utf-8")
    assert code_identity(package) != before


def test_every_byte_of_a_chat_template_counts(package: Path) -> None:
    before = code_identity(package)
    (package / "stages" / "chatml.jinja").write_text("{{ bos_token }}", encoding="utf-8")
    assert code_identity(package) != before


def test_a_new_a_moved_and_a_renamed_file_count(package: Path) -> None:
    identities = [code_identity(package)]
    (package / "stages" / "new.py").write_text("", encoding="utf-8")
    identities.append(code_identity(package))
    (package / "stages" / "sft.py").rename(package / "sft.py")
    identities.append(code_identity(package))
    (package / "sft.py").rename(package / "dpo.py")
    identities.append(code_identity(package))
    assert len(set(identities)) == 4


def test_code_that_moves_from_one_file_to_the_next_counts(package: Path) -> None:
    (package / "a.py").write_text("x = 1\ny = 2\n", encoding="utf-8")
    (package / "b.py").write_text("z = 3\n", encoding="utf-8")
    before = code_identity(package)
    (package / "a.py").write_text("x = 1\n", encoding="utf-8")
    (package / "b.py").write_text("y = 2\nz = 3\n", encoding="utf-8")
    assert code_identity(package) != before


# -- stability ---------------------------------------------------------------------------------------------------------


def test_the_content_of_a_source_is_the_same_in_every_python_version() -> None:
    """The expected digest is a literal, so all Python versions that run this test must agree on it."""
    content = python_content(SOURCE.encode())
    assert content.startswith(b"Module(body=[Import(names=[alias(name='math',),],),Assign(targets=[Name(id='RATE',),],")
    assert hashlib.sha256(content).hexdigest() == "1101372d5406f4723e2fd7a2f116ef1178ca71a0123261764c42a0c6efba03f7"


def test_the_installed_trainer_is_found_without_importing_it() -> None:
    script = (
        "import sys; from stagecoach_api.code import code_identity; print(code_identity());"
        "sys.exit('stagecoach_trainer' in sys.modules or 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == code_identity() == code_identity(trainer_folder())


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_missing_trainer_is_reported_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "TRAINER_PACKAGE", "no_such_trainer")
    with pytest.raises(ModuleNotFoundError, match=r"install `stagecoach\[trainer\]`"):
        code_identity()


@pytest.mark.parametrize("source", [b"x = (\n", b"x = 1\0\n", b"x = '\xff'\n"])
def test_a_file_that_cannot_be_parsed_is_reported_with_its_path(package: Path, source: bytes) -> None:
    (package / "stages" / "sft.py").write_bytes(source)
    with pytest.raises(UnparsableCode, match=r"stages/sft\.py: .* cannot be parsed \(.+\); correct it"):
        code_identity(package)
