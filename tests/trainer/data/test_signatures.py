from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from stagecoach_trainer.data.files import read_values
from stagecoach_trainer.runtime.errors import UserError

LINES = b'{"text": "a"}\n{"text": "b"}\n'


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)  # the same bytes in every worker, which names its tests by them


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.jsonl", LINES)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("a.jsonl")
        entry.size = len(LINES)
        archive.addfile(entry, io.BytesIO(LINES))
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"]}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", LINES.decode().encode("utf-16"), "UTF-16 text; convert it to UTF-8"),
        ("a.txt", "words\n".encode("utf-16-le"), "UTF-16 text"),
        ("a.csv", "a,b\n".encode("utf-16-be"), "UTF-16 text"),
        ("a.csv", "a,b\n".encode("utf-32"), "UTF-32 text"),
        ("a.jsonl", gzipped(LINES), "gzip data; add .gz to its name"),
        ("a.json.gz", gzipped(gzipped(LINES)), "gzip data"),
        ("a.txt", zstandard.compress(LINES), "zstd data"),
        ("a.json", zipped(), "a zip archive or an Office file"),
        ("a.csv", bz2.compress(LINES), "bzip2 data; unpack it"),
        ("a.jsonl", lzma.compress(LINES), "xz data"),
        ("a.jsonl", tarred(), "a tar archive"),
        ("a.jsonl.gz", gzipped(tarred()), "a tar archive"),
        ("a.json", parquet(), r"Parquet; end its name in \.parquet"),
        ("a.txt", parquet(), "Parquet"),
        ("a.parquet", LINES, "no Parquet file"),
        ("a.parquet", zipped(), "a zip archive"),
        ("a.csv", LINES, r"JSON; end its name in \.jsonl"),
        ("a.jsonl", b"<!DOCTYPE html><html>", "an HTML or XML page"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        ("a.txt", b"%PDF-1.7\n", "a PDF; extract its text"),
        ("a.jsonl.gz", LINES, r"is called \.gz, but is not gzip data"),
        ("a.jsonl.zst", gzipped(LINES), r"is called \.zst, but is not zstd data"),
        ("part-0", gzipped(LINES), "gzip data"),
        ("part-0", b"words\n", r"end its name in \.txt"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"^{name}: .*{message}"):
        list(read_values(tmp_path / name, name))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.txt", "\ufeff<html> is how a page begins\n".encode()),
        ("a.txt", b"a"),
        ("a.csv", b'"a","b"\n1,2\n'),
        ("a.jsonl", b""),
        ("a.jsonl.gz", b""),
        ("a.txt", "汉字".encode()),
    ],
)
def test_files_of_their_own_layout_pass(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert all(raw.error is None for raw in read_values(tmp_path / name, name))
