from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from stagecoach_trainer.data import files
from stagecoach_trainer.data.files import read_values
from stagecoach_trainer.data.raw import Raw
from stagecoach_trainer.runtime.errors import UserError

VALUES = [{"text": "白日依山尽"}, {"text": 'quote " brace } and \\ "'}, {"text": "", "n": [1, {"a": None}]}]


def read(path: Path) -> list[Raw]:
    return list(read_values(path, path.name))


def values(path: Path) -> list[object]:
    return [raw.value for raw in read(path)]


def write(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


LINES = "\n".join(json.dumps(value, ensure_ascii=False) for value in VALUES).encode()
ARRAY = json.dumps(VALUES, ensure_ascii=False, indent=2).encode()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        pytest.param("a.jsonl", LINES, id="JSON lines"),
        pytest.param("a.jsonl", b"\xef\xbb\xbf" + LINES + b"\r\n\n  \n", id="JSON lines with mark, blank lines, CR"),
        pytest.param("a.json", ARRAY, id="an indented array"),
        pytest.param("a.json", json.dumps(VALUES).encode(), id="an array on one line"),
        pytest.param("a.json", LINES, id="JSON lines called .json"),
        pytest.param("a.json", ARRAY[1:-1].replace(b"},\n  {", b"}\n{"), id="indented objects one after another"),
        pytest.param("part-0", ARRAY, id="an array with an unknown suffix"),
    ],
)
def test_every_json_layout_yields_the_same_values(tmp_path: Path, name: str, data: bytes, suffix: str) -> None:
    assert values(write(tmp_path / (name + suffix), data)) == VALUES


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_parquet_rows_are_values(tmp_path: Path, suffix: str) -> None:
    plain = tmp_path / "plain"
    pq.write_table(pa.table({"text": ["一", "二"] * 700, "n": list(range(1400))}), plain)
    path = write(tmp_path / f"a.parquet{suffix}", plain.read_bytes())
    found = read(path)
    assert [raw.value for raw in found] == [{"text": "一二"[n % 2], "n": n} for n in range(1400)]
    assert [raw.line for raw in found] == list(range(1, 1401))


def test_small_chunks_yield_the_same_values_and_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = write(tmp_path / "a.json", ARRAY)
    lines = write(tmp_path / "a.jsonl", LINES)
    expected = read(array), read(lines)
    monkeypatch.setattr(files, "CHUNK_BYTES", 3)
    assert (read(array), read(lines)) == expected


def test_values_carry_the_line_they_begin_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b'[\n{"a": 1},\n{\n"a":\n2},\n\n{"a": 3}]')
    assert [raw.line for raw in read(path)] == [2, 3, 7]


def test_text_is_split_at_blank_lines_or_else_at_lines(tmp_path: Path) -> None:
    poems = write(tmp_path / "poems.txt", "\n\n春眠\r\n不觉晓\r\n \t\n\n处处\n闻啼鸟\n".encode())
    assert [(raw.line, raw.value) for raw in read(poems)] == [
        (3, {"text": "春眠\n不觉晓"}),
        (7, {"text": "处处\n闻啼鸟"}),
    ]
    lines = write(tmp_path / "lines.txt.zst", b"\none\ntwo\n\n")
    assert [(raw.line, raw.value) for raw in read(lines)] == [(2, {"text": "one"}), (3, {"text": "two"})]


@pytest.mark.parametrize(
    ("name", "data", "line", "reason"),
    [
        pytest.param("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 3}', 2, "malformed JSON", id="a cut line"),
        pytest.param("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n{"a": 3}', 2, "bad UTF-8 at byte 7", id="bad UTF-8"),
        pytest.param("a.jsonl", b'{"a": 1}\n{"a": NaN}\n{"a": 3}', 2, "NaN", id="NaN is no JSON"),
        pytest.param("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000 + b'\n{"a": 3}', 2, "nested too deeply", id="deep JSON"),
        pytest.param("a.jsonl", b'{"a": 1}\n' + b"9" * 5000 + b'\n{"a": 3}', 2, "malformed JSON", id="a huge number"),
        pytest.param(
            "a.json", b'[{"a": 1},\n{"a": tru},\n{"a": 3}]', 2, "malformed JSON", id="a bad object in an array"
        ),
        pytest.param(
            "a.json", b'[{"a": 1},\n"no object",\n{"a": 3}]', 2, "expected an object", id="a string in an array"
        ),
        pytest.param("a.json", b'[{"a": 1},\n{"a": "\xff"},\n{"a": 3}]', 2, "bad UTF-8", id="bad UTF-8 in an array"),
        pytest.param("a.txt", b"one\n\ntw\xc0\n\nthree", 3, "bad UTF-8", id="bad UTF-8 in text"),
    ],
)
def test_unreadable_values_are_reported_and_the_rest_is_read(
    tmp_path: Path, name: str, data: bytes, line: int, reason: str
) -> None:
    first, bad, last = read(write(tmp_path / name, data))
    assert (first.error, last.error) == (None, None)
    assert bad.line == line
    assert reason in (bad.error or "")


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b'[\n{"a": 1},\n{"a": 2}\n', "not closed"), (b'[\n{"a": 1},\n{"a": 2}] x', "behind the closing")],
)
def test_an_array_that_ends_badly_is_malformed(tmp_path: Path, data: bytes, reason: str) -> None:
    *good, bad = read(write(tmp_path / "a.json", data))
    assert len(good) == 2
    assert reason in (bad.error or "")


def test_an_unclosed_object_stops_reading_and_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", b'[{"a": 1},\n{"a": "no end},\n{"a": 3}]')
    with pytest.raises(UserError, match=r"a\.json:2: the end of the JSON object"):
        read(path)


def test_a_line_beyond_the_limit_is_malformed_and_never_kept_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 1 << 20
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", limit)
    monkeypatch.setattr(files, "CHUNK_BYTES", 1 << 16)
    long = b'{"a": "' + b"x" * (64 * limit) + b'"}'
    path = write(tmp_path / "a.jsonl.zst", b'{"a": 1}\n' + long + b'\n{"a": 3}\n' + long)
    del long
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(raw.line, raw.error) for raw in found] == [
        (1, None),
        (2, "longer than 1 MiB"),
        (3, None),
        (4, "longer than 1 MiB"),
    ]
    assert peak < 8 * limit


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_truncated_archive_is_rejected_by_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, LINES * 5000)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=rf"{name}: the archive is damaged"):
        read(path)


def test_a_damaged_parquet_file_is_rejected_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.parquet: row 1: the Parquet file cannot be read"):
        read(write(tmp_path / "a.parquet", b"PAR1 but not really"))


def test_a_file_of_unknown_layout_is_rejected_with_the_allowed_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.bin: .*\.jsonl.*\.parquet"):
        read(write(tmp_path / "a.bin", b"\0\1\2"))
