from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagecoach_trainer.data import tables
from stagecoach_trainer.data.files import read_values
from stagecoach_trainer.data.raw import Raw
from stagecoach_trainer.runtime.errors import UserError


def read(path: Path) -> list[Raw]:
    return list(read_values(path, path.name))


def parquet_of(tmp_path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> list[Any]:
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
    return [raw.value for raw in read(tmp_path / "a.parquet")]


# -- Parquet -----------------------------------------------------------------------------------------------------------


def test_keys_that_storage_adds_to_a_struct_are_no_content(tmp_path: Path) -> None:
    """ms-swift#10125, #6467: two tools of unlike arguments, each stored with the other's as null."""
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "assistant", "call": {"name": "a", "arguments": {"city": "A"}}}]},
        {"messages": [{"role": "assistant", "call": {"name": "b", "arguments": {"x": 1, "y": [{"z": 2}, {"w": 3}]}}}]},
        {"messages": [{"role": "user"}]},
    ]
    assert parquet_of(tmp_path, rows) == rows


def test_nulls_in_lists_maps_columns_and_json_text_are_content(tmp_path: Path) -> None:
    map_type = pa.map_(pa.string(), pa.struct([("a", pa.int64()), ("b", pa.int64())]))
    schema = pa.schema([("list", pa.list_(pa.int64())), ("map", map_type), ("text", pa.string()), ("none", pa.int64())])
    row = {"list": [1, None], "map": {"k": {"a": 1}, "l": None}, "text": '{"x": null}', "none": None}
    stored = row | {"map": [("k", {"a": 1}), ("l", None)]}
    assert parquet_of(tmp_path, [stored], schema) == [row]


LEAF = st.dictionaries(st.sampled_from("pq"), st.integers(0, 9), min_size=1)


@given(st.lists(LEAF, min_size=1, max_size=5), st.data())
@settings(max_examples=40, deadline=None)
def test_structs_come_back_as_they_were_written(leaves: list[dict[str, int]], data: st.DataObject) -> None:
    rows = [{"v": {"in": leaf, "list": [leaf, data.draw(st.sampled_from(leaves))]}} for leaf in leaves]
    with tempfile.TemporaryDirectory() as folder:
        assert parquet_of(Path(folder), rows) == rows


# -- CSV ---------------------------------------------------------------------------------------------------------------

CELL = st.text(st.sampled_from("ab ,;\t\"\n\r'é汉#\\0"), max_size=8)


@given(
    rows=st.lists(st.tuples(CELL, CELL, CELL), max_size=6), tabs=st.booleans(), crlf=st.booleans(), mark=st.booleans()
)
@settings(max_examples=150, deadline=None)
def test_csv_is_read_as_the_standard_library_reads_it(
    rows: list[tuple[str, str, str]], tabs: bool, crlf: bool, mark: bool
) -> None:
    text, delimiter = io.StringIO(), "\t" if tabs else ","
    # The library does not quote a cell for a lone CR, which then ends a row.
    writes_cr = any("\r" in cell for row in rows for cell in row)
    writer = csv.writer(
        text,
        delimiter=delimiter,
        lineterminator="\r\n" if crlf else "\n",
        quoting=csv.QUOTE_ALL if writes_cr else csv.QUOTE_MINIMAL,
    )
    writer.writerows([("x", "y y", "z"), *rows])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("a.tsv" if tabs else "a.csv")
        path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.getvalue().encode())
        expected = list(csv.DictReader(io.StringIO(text.getvalue(), newline=""), delimiter=delimiter))
        assert [raw.value for raw in read(path)] == expected


def test_csv_in_small_blocks_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv.gz"
    rows = [f'{number},"a\nb{number}"' for number in range(300)]
    rows[150] = "1,2,3"
    path.write_bytes(gzip.compress("\n".join(["n,t", *rows]).encode()))
    whole = read(path)
    assert [raw.line for raw in whole] == list(range(2, 302))
    assert [raw.error for raw in whole if raw.error] == ["3 cells where the header has 2"]
    assert whole[150].error
    assert whole[299].value == {"n": "299", "t": "a\nb299"}
    monkeypatch.setattr(tables, "CSV_BLOCK_BYTES", 200)
    assert read(path) == whole


def test_cells_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,b,e,d\n007,true,,2024-01-01\nNA,null,nan,1e5\n", encoding="utf-8")
    assert [raw.value for raw in read(tmp_path / "a.csv")] == [
        {"n": "007", "b": "true", "e": "", "d": "2024-01-01"},
        {"n": "NA", "b": "null", "e": "nan", "d": "1e5"},
    ]


def test_a_cell_that_is_not_utf8_spoils_its_row_only(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,2\n3,\xe9\n5,6\n")
    found = read(tmp_path / "a.csv")
    assert [raw.error for raw in found] == [None, "bad UTF-8 at byte 0 of the column 'b'", None]
    assert found[2] == Raw(4, {"a": "5", "b": "6"})


@pytest.mark.parametrize("data", [b"", b"a,b\n", b"a,b"])
def test_a_csv_file_without_rows_has_no_values(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    assert read(tmp_path / "a.csv") == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"a,b,a\n1,2,3\n", r"a\.csv: row 1: the column 'a' occurs twice", id="a column twice"),
        pytest.param(b"\xe9,b\n1,2\n", r"a\.csv: row 1: the header is not UTF-8", id="a header in Latin-1"),
        pytest.param(
            b"a,b\n1,2\n3,4\n5,6\n" + b'"' + b"7,8\n" * 99, r"a\.csv: .* a quote may not be closed", id="an open quote"
        ),
    ],
)
def test_an_unreadable_csv_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    monkeypatch.setattr(tables, "CSV_BLOCK_BYTES", 100)
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.csv")


def test_csv_holds_the_values_of_the_same_json(tmp_path: Path) -> None:
    values = [{"instruction": f"q {n}", "output": 'a "quoted", answer\nof two lines'} for n in range(3)]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(values[0]))
        writer.writeheader()
        writer.writerows(values)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, values)), encoding="utf-8")
    assert [raw.value for raw in read(tmp_path / "a.csv")] == [raw.value for raw in read(tmp_path / "a.jsonl")]
