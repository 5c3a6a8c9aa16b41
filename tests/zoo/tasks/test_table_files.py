import gzip

import numpy as np
import pandas as pd
import pytest

from metamerge.errors import ZooError
from zoo.tasks import table_files
from zoo.tasks.findings import Findings
from zoo.tasks.table_files import read_csv, read_parquet


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = Findings("file", "the header is row 1")
    return read_csv(path, found), found


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_a_csv_file_is_text_with_rows_counted_from_its_header(tmp_path, separator):
    content = "a,b\n1,x\n2.50,\n".replace(",", separator)
    table, found = read(tmp_path / "t.csv", content)
    assert list(table.columns) == ["a", "b"]
    assert table.index.tolist() == [2, 3]
    assert table["a"].tolist() == ["1", "2.50"]
    assert table["b"].isna().tolist() == [False, True]
    assert (found.problems, found.notes) == ([], [])


def test_a_gzipped_csv_file_is_read_as_well(tmp_path):
    table, _ = read(tmp_path / "t.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0))
    assert table.loc[2].tolist() == ["1", "2"]


def test_the_mark_that_spreadsheets_write_first_is_no_part_of_a_name(tmp_path):
    table, _ = read(tmp_path / "t.csv", b"\xef\xbb\xbfa,b\r\n1,2\r\n")
    assert list(table.columns) == ["a", "b"]


def test_empty_rows_are_left_out_and_still_counted(tmp_path):
    table, found = read(tmp_path / "t.csv", "a,b\n1,2\n\n3,4\n,\n5,6\n\n")
    assert table.index.tolist() == [2, 4, 6]
    assert found.notes == ["left out 3 empty rows, first row 3"]


def test_quoted_cells_keep_their_separators(tmp_path):
    table, _ = read(tmp_path / "t.csv", 'a,b\n"x, y","1"\n')
    assert table.loc[2].tolist() == ["x, y", "1"]


def test_nameless_columns_are_called_by_their_place(tmp_path):
    table, found = read(tmp_path / "t.csv", ",b, \n0,1,2\n")
    assert list(table.columns) == ["column 1", "b", "column 3"]
    assert found.notes == ["columns without a name were called by their place, first 'column 1'"]


def test_a_first_row_of_numbers_is_no_header(tmp_path):
    _, found = read(tmp_path / "t.csv", "1,2.5\n3,4\n")
    assert (
        "header: expected names of columns in row 1, got numbers only, first '1'"
        in (found.problems[0])
    )


@pytest.mark.parametrize(
    "content",
    [
        b"\n\n",
        b"a,b\n1,2,3\n",
        b"a,b\n1,2\n1,2,3\n",
        b'a,b\n"1,2\n',
        b"a,b\n\xff\xfe,2\n",
        b"a\x00,b\n\xff,2\n",
    ],
)
def test_what_is_no_csv_file_is_refused(tmp_path, content):
    with pytest.raises(ZooError, match=r"t\.csv cannot be read as CSV.*as many cells in every row"):
        read(tmp_path / "t.csv", content)


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", gzip.compress(b"a,b\n1,2\n", mtime=0)[:-9]])
def test_what_is_no_gzip_file_is_refused(tmp_path, content):
    with pytest.raises(ZooError, match=r"t\.csv\.gz cannot be read as CSV"):
        read(tmp_path / "t.csv.gz", content)


def test_a_gzipped_file_is_unpacked_up_to_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "MOST_BYTES", 1000)
    with pytest.raises(ZooError, match="Draw a part of its rows"):
        read(tmp_path / "t.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 1000, mtime=0))


# ---------------------------------------------------------------------------- Parquet


def test_a_parquet_file_keeps_its_types_with_rows_counted_from_one(tmp_path):
    frame = pd.DataFrame({"a": [1, 2], "b": [0.5, None], "c": ["x", "y"], "d": [True, False]})
    frame.to_parquet(tmp_path / "t.parquet")
    table = read_parquet(tmp_path / "t.parquet")
    assert table.index.tolist() == [1, 2]
    assert [str(kind) for kind in table.dtypes] == ["Int64", "Float64", "string", "boolean"]


def test_a_named_index_is_a_column_and_a_nameless_one_is_not(tmp_path):
    frame = pd.DataFrame({"a": [1, 2, 3]})
    frame[frame["a"] > 1].to_parquet(tmp_path / "t.parquet")
    assert list(read_parquet(tmp_path / "t.parquet").columns) == ["a"]
    frame.rename_axis("id").to_parquet(tmp_path / "t.parquet", index=True)
    assert list(read_parquet(tmp_path / "t.parquet").columns) == ["id", "a"]


@pytest.mark.parametrize("cut", [3, 100])
def test_a_damaged_parquet_file_is_refused(tmp_path, cut):
    path = tmp_path / "t.parquet"
    pd.DataFrame({"a": np.arange(1000)}).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ZooError, match=r"t\.parquet cannot be read as Parquet"):
        read_parquet(path)


def test_text_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    pd.DataFrame({"a": ["green"] * 50}).to_parquet(path, compression=None)
    path.write_bytes(path.read_bytes().replace(b"green", b"g\xffeen"))
    with pytest.raises(ZooError, match=r"t\.parquet cannot be read as Parquet"):
        read_parquet(path)


def test_a_small_parquet_file_of_very_many_cells_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(table_files, "MOST_BYTES", 3_999_999)
    path = tmp_path / "t.parquet"
    pd.DataFrame({"a": np.zeros(1_000_000)}).to_parquet(path)
    assert path.stat().st_size < 10_000
    with pytest.raises(ZooError, match="Draw a part of its rows"):
        read_parquet(path)
