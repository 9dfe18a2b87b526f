"""Delimited text is read completely or not at all; Python's csv module is the reference."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esmm_torchrec.data.sources import delimited_text
from esmm_torchrec.data.sources.delimited_text import DelimitedText, TextFormat
from esmm_torchrec.errors import DataError, OptionError


def read(path: Path, **format: str | None) -> tuple[list[str], list[list[str]], list[int]]:
    """Returns the header, the rows and their lines."""
    text = DelimitedText(path, TextFormat(**format))
    names = list(text.column_names)
    rows, lines = [], []
    for fields, misfits in text.blocks(names):
        assert misfits == []
        rows += [list(row.values()) for row in fields.table.to_pylist()]
        lines += fields.lines.tolist()
    return names, rows, lines


def thousand_rows() -> list[str]:
    return [f"{row},city {row % 7},{row % 3}\n" for row in range(1000)]


FIELD = st.text(
    st.one_of(
        st.sampled_from("\",;\t|\n '007."),
        st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"),
    ),
    max_size=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(st.tuples(FIELD, FIELD, FIELD), max_size=12),
    separator=st.sampled_from(",\t;|"),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    blank=st.booleans(),
    block=st.integers(1, 40),
)
def test_what_csv_writes_is_read_back(
    rows: list[tuple[str, ...]],
    separator: str,
    line_end: str,
    quoting: csv._QuotingType,
    blank: bool,
    block: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delimited_text, "BYTES_PER_BLOCK", block)
    if line_end == "\r":
        quoting = csv.QUOTE_ALL  # The writer does not quote a line feed there.
    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter=separator, lineterminator=line_end, quoting=quoting)
    writer.writerow(["a", "b", "c"])
    lines = []
    for row in rows:
        if blank:
            written.write(line_end)
        text = written.getvalue().replace("\r\n", "\n").replace("\r", "\n")
        lines.append(1 + text.count("\n"))
        writer.writerow(row)
    path = tmp_path / "a.csv"
    path.write_bytes(written.getvalue().encode())
    names, found, found_lines = read(path, separator=separator)
    assert names == ["a", "b", "c"]
    reference = csv.reader(io.StringIO(written.getvalue(), newline=""), delimiter=separator)
    assert [names, *found] == [row for row in reference if row]
    assert found == [list(row) for row in rows]
    assert found_lines == lines


def test_a_quote_that_is_never_closed_is_named(tmp_path: Path) -> None:
    lines = thousand_rows()
    lines[9] = '9,city 2,"0\n'
    path = tmp_path / "a.csv"
    path.write_text("id,city,n\n" + "".join(lines))
    with pytest.raises(DataError, match=r'a\.csv, line 11: the quote " is not closed'):
        read(path)
    assert len(read(path, quote=None)[1]) == 1000


@pytest.mark.parametrize("quoted", ["0", "999"])
def test_a_quote_that_joins_two_records_is_named(quoted: str, tmp_path: Path) -> None:
    """pyarrow reads 999 rows here; so does csv unless it is strict."""
    lines = [f'{row},city,"{row}"\n' for row in range(1000)]
    lines[9] = lines[9].replace('"9"', f'"{quoted}')
    path = tmp_path / "a.csv"
    path.write_text("id,city,n\n" + "".join(lines))
    table = pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(newlines_in_values=True))
    assert len(table) == 999
    with pytest.raises(DataError, match=r"a\.csv, line 11: the quote"):
        read(path)


@pytest.mark.parametrize("text", ['5" pipe', '"a"b', 'a"b"', '"a" '])
def test_a_quote_in_the_middle_of_a_field_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"id,size\n1,2\n2,{text}\n3,4\n")
    with pytest.raises(DataError, match=r"line 3: the quote .* close it or double it, or read"):
        read(path)
    assert read(path, quote=None)[1][1] == ["2", text]


def test_a_record_without_end_is_named_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited_text, "BYTES_PER_BLOCK", 100)
    monkeypatch.setattr(delimited_text, "MAX_RECORD_BYTES", 1000)
    lines = thousand_rows()
    lines[9] = '9,city 2,"0\n'
    (tmp_path / "a.csv").write_text("id,city,n\n" + "".join(lines))
    with pytest.raises(DataError, match="line 11: a record of more than 0 MiB begins here"):
        read(tmp_path / "a.csv")


def test_a_field_may_be_long(tmp_path: Path) -> None:
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text(f'id,note\n1,{long}\n2,"{long}\n"\n')
    assert read(tmp_path / "a.csv")[1] == [["1", long], ["2", f"{long}\n"]]


def test_records_with_other_than_the_headers_fields_are_reported(tmp_path: Path) -> None:
    long = "x" * 200_000
    (tmp_path / "a.csv").write_text(f"a,b\n1,2\n\n3\n4,5\n6,{long},8\n")
    text = DelimitedText(tmp_path / "a.csv", TextFormat())
    ((fields, misfits),) = text.blocks(["b"])
    assert fields.table.to_pydict() == {"b": ["2", "5"]}
    assert fields.lines.tolist() == [2, 5]
    assert [tuple(misfit) for misfit in misfits] == [(4, 1), (6, 3)]
    (tmp_path / "b.csv").write_text("a,b\n1\n2\n")
    ((fields, misfits),) = DelimitedText(tmp_path / "b.csv", TextFormat()).blocks(["b"])
    assert len(fields.table) == 0
    assert [misfit.line for misfit in misfits] == [2, 3]


@pytest.mark.parametrize("block", [32, 33, 1 << 20])
def test_text_in_another_encoding_is_named_and_can_be_read(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited_text, "BYTES_PER_BLOCK", block)
    rows = [["1", "Malmö"], ["2", "Köln"], ["3", "東京"]]
    text = "id,city\n" + "".join(f"{number},{city}\n" for number, city in rows)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "a.csv").write_bytes(text.encode(encoding))
        assert read(tmp_path / "a.csv")[:2] == (["id", "city"], rows)
    latin = "id,city\n1,Oslo\n2,New York City\n3,Malmö\n"
    (tmp_path / "a.csv").write_bytes(latin.encode("cp1252"))
    with pytest.raises(DataError, match=r"line 4: the text is not UTF-8; name the encoding"):
        read(tmp_path / "a.csv")
    assert read(tmp_path / "a.csv", encoding="cp1252")[1][2] == ["3", "Malmö"]


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_the_separator_is_detected_in_the_header(separator: str, tmp_path: Path) -> None:
    header = separator.join(["id", '"a, b; c|d"', "n"])
    (tmp_path / "a.txt").write_text(f"{header}\n{separator.join('123')}\n")
    assert read(tmp_path / "a.txt")[:2] == (["id", "a, b; c|d", "n"], [["1", "2", "3"]])


@pytest.mark.parametrize(
    ("format", "sentence"),
    [
        ({"separator": ",,"}, "`separator` must be one ASCII character, not ',,'"),
        ({"quote": "\n"}, "`quote` must be one ASCII character"),
        ({"separator": '"'}, "`separator` and `quote` are both '\"'"),
        ({"encoding": "klingon"}, "`encoding` 'klingon' is not an encoding Python knows"),
        ({"encoding": "zlib"}, "`encoding` 'zlib' is not an encoding Python knows"),
    ],
)
def test_a_format_that_cannot_be_is_refused(format: dict[str, str], sentence: str) -> None:
    with pytest.raises(OptionError) as raised:
        TextFormat(**format)
    assert sentence in str(raised.value)


def test_blocks_begin_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    rows = [[str(row), "a\n" * int(random.integers(4)) + '"', "x,y"] for row in range(300)]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["a", "b", "c"], *rows])
    for block in (1, 13, 1000, 1 << 20):
        monkeypatch.setattr(delimited_text, "BYTES_PER_BLOCK", block)
        assert read(tmp_path / "a.csv")[1] == rows
