"""Files whose bytes do not match their name: another format, another encoding, a placeholder."""

from __future__ import annotations

from pathlib import Path

from stagecoach_trainer.data.raw import BYTE_ORDER_MARK, COMPRESSIONS, Layout, open_bytes
from stagecoach_trainer.runtime.errors import UserError

HEAD_BYTES = 4096
PARQUET = (b"PAR1", b"PARE")
COMPRESSED = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}

BINARY = (
    (b"\x1f\x8b", "gzip data", "add .gz to its name"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "add .zst to its name"),
    (b"PK\x03\x04", "a zip archive or an Office file such as .xlsx", "unpack it, or save the sheet as CSV"),
    (b"\xd0\xcf\x11\xe0", "an Office file such as .xls", "save the sheet as CSV"),
    (b"BZh", "bzip2 data", "unpack it"),
    (b"\xfd7zXZ", "xz data", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it"),
    (b"Rar!", "a RAR archive", "unpack it"),
    (b"PAR1", "Parquet", "end its name in .parquet"),
    (b"ARROW1", "an Arrow file", "write it as Parquet"),
    (b"SQLite format 3", "an SQLite database", "export its table as CSV"),
    (b"\x89HDF", "an HDF5 file", "export it as JSON lines or Parquet"),
    (b"%PDF-", "a PDF", "extract its text"),
    (b"version https://git-lfs", "a Git LFS pointer in place of the file", "fetch the file with `git lfs pull`"),
    (b"\xff\xfe\x00\x00", "UTF-32 text", "convert it to UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "convert it to UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "convert it to UTF-8, as by `iconv -f UTF-16 -t UTF-8`"),
    (b"\xfe\xff", "UTF-16 text", "convert it to UTF-8, as by `iconv -f UTF-16 -t UTF-8`"),
)
"""First bytes, what they are, and what to do; the first that matches counts."""

TAR_MARK, TAR_MARK_AT = b"ustar", 257
MARKUP = (b"<!doctype", b"<html", b"<?xml")
JSON_STARTS = (b'{"', b"[{", b"[\n", b"{\n")


def refuse_other_formats(path: Path, name: str, layout: Layout) -> None:
    """Raise UserError if the first bytes of a file, decompressed, show that it does not have that layout."""
    _require_compressed(path, name)
    with open_bytes(path, name) as stream:
        head = stream.read(HEAD_BYTES)
    found = _other_format(head, layout)
    if found is not None:
        what, remedy = found
        raise UserError(f"{name}: is read as {layout.value}, but its first bytes are those of {what}; {remedy}")


def _require_compressed(path: Path, name: str) -> None:
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return
    with path.open("rb") as file:
        head = file.read(4)
    if head and not head.startswith(COMPRESSED[compression]):
        raise UserError(
            f"{name}: is called {path.suffix}, but is not {compression} data; remove {path.suffix} from its name if it "
            "is not compressed, or fetch it again"
        )


def _other_format(head: bytes, layout: Layout) -> tuple[str, str] | None:
    """Return what the first bytes of a file are, and what to do, if that is not `layout`. None if they may be it."""
    if not head or (layout is Layout.PARQUET and head.startswith(PARQUET)):
        return None
    known = next(((what, remedy) for mark, what, remedy in BINARY if head.startswith(mark)), None)
    if known is None and layout is Layout.PARQUET:
        return "no Parquet file", "fetch it again, or give it the suffix of its format"
    return known or _other_text(head, layout)


def _other_text(head: bytes, layout: Layout) -> tuple[str, str] | None:
    if head[TAR_MARK_AT:].startswith(TAR_MARK):
        return "a tar archive", "unpack it"
    if _is_utf16(head):
        return "UTF-16 text", "convert it to UTF-8, as by `iconv -f UTF-16 -t UTF-8`"
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip()[:16].lower()
    if layout is not Layout.TEXT and start.startswith(MARKUP):
        return "an HTML or XML page", "it may be a site's message in place of the file; fetch it again"
    if layout in (Layout.CSV, Layout.TSV) and start.startswith(JSON_STARTS):
        return "JSON", "end its name in .jsonl or .json"
    return None


def _is_utf16(head: bytes) -> bool:
    """Return whether bytes without a mark are UTF-16: in Latin text, every other byte is 0."""
    halves = head[0::2], head[1::2]
    return any(half.count(0) * 2 > len(half) > 1 and not other.count(0) for half, other in (halves, halves[::-1]))
