"""Files of a cache with their own SHA-256."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecoach_trainer.runtime.sealed import Damaged, read_sealed, require_sha256, write_sealed

BYTES = st.integers(1, 255)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_sealed(tmp_path / "folder" / "file", b"numbers")
    assert read_sealed(tmp_path / "folder" / "file") == b"numbers"
    assert read_sealed(tmp_path / "other") is None
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["file"]


@settings(max_examples=30, deadline=None)
@given(
    content=st.binary(max_size=99), at=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255), cut=st.booleans()
)
def test_a_changed_byte_or_a_lost_end_gives_nothing(content: bytes, at: float, change: int, cut: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write_sealed(path, content)
        stored = bytearray(path.read_bytes())
        position = int(at * len(stored))
        stored[position] ^= change
        path.write_bytes(stored[:position] if cut else stored)
        assert read_sealed(path) is None


def test_a_file_with_another_digest_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    require_sha256(tmp_path / "file", hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(Damaged, match="file: its SHA-256 is ba7816bf"):
        require_sha256(tmp_path / "file", "0" * 64)
    with pytest.raises(Damaged, match="other is missing"):
        require_sha256(tmp_path / "other", "0" * 64)
