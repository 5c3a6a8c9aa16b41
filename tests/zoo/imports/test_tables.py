"""Tables are read as they are written, or refused with the line that is wrong."""

import gzip
import math

import pytest

from metamerge.errors import Unreadable, ZooError
from zoo.imports import tables
from zoo.imports.tables import numbers, read_table


def write(folder, text, name="metrics.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_columns_are_read_by_name(tmp_path):
    table = read_table(write(tmp_path, 'file,loss\n"a,b.pt",1\n\nc.pt,2.5\n'))
    assert table.columns == {"file": ["a,b.pt", "c.pt"], "loss": ["1", "2.5"]}
    assert table.lines == [2, 4]


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_byte_order_marks_line_ends_and_gzip_change_nothing(tmp_path, prefix, newline, pack):
    text = prefix + newline.join([b"file,loss", b"a.pt,1", b""])
    table = read_table(write(tmp_path, pack(text)))
    assert table.columns == {"file": ["a.pt"], "loss": ["1"]}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "an empty file"),
        (b"file,loss,loss\na,1,2\n", "'loss' more than once"),
        (b"file,loss\na,1\nb\n", "line 3 has 1 values, the header names 2"),
        (b'file,loss\n"a"b,1\n', "line 2 is not CSV"),
        (b'file,loss\n"a,1\n', "is not CSV"),
        (b"file,loss\n\xff\xfe,1\n", "UTF-8"),
        (gzip.compress(b"file,loss\na,1\n" * 100, mtime=0)[:-20], "cannot be read"),
        (b"\x1f\x8bnothing", "cannot be read"),
        (b"file\n" + b"a" * 200_000, "field larger"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, text, match):
    path = write(tmp_path, text)
    with pytest.raises(ZooError, match=match) as caught:
        read_table(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_table_is_not_unpacked_beyond_the_limit(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(tables, "MAX_BYTES", 1000)
    assert read_table(write(tmp_path, pack(b"file\n" + b"a\n" * 497))).lines
    with pytest.raises(ZooError, match="at most 1000 bytes"):
        read_table(write(tmp_path, pack(b"file\n" + b"a\n" * 498)))


def test_a_missing_table_is_refused(tmp_path):
    with pytest.raises(Unreadable, match=r"absent\.csv"):
        read_table(tmp_path / "absent.csv")


def test_a_missing_column_is_refused(tmp_path):
    table = read_table(write(tmp_path, "file,loss\na,1\n"))
    with pytest.raises(ZooError, match=r"no column 'step'; there are 'file', 'loss'"):
        table.column("step")


def test_unknown_values_are_nan():
    found = numbers(["1", " 2e3 ", "", "NA", "nan", "None", "inf"])
    assert found.tolist()[:2] == [1.0, 2000.0]
    assert found[2:6].isnan().all()
    assert found[6] == math.inf


def test_a_column_that_holds_a_word_is_no_metric():
    assert numbers(["1", "adam"]) is None


def test_metrics_are_the_columns_of_numbers_in_the_order_of_rows(tmp_path):
    text = ",file,loss,optimizer\n0,a,1,adam\n1,b,,sgd\n2,c,3,adam\n"
    metrics, notes = read_table(write(tmp_path, text)).metrics([2, 1], skip={"file"})
    assert list(metrics) == ["loss"]
    assert metrics["loss"][0] == 3
    assert metrics["loss"][1].isnan()
    assert notes == ("metrics.csv: columns that hold no numbers are left out: 'optimizer'.",)


def test_a_word_in_a_row_that_is_not_asked_for_does_no_harm(tmp_path):
    table = read_table(write(tmp_path, "file,loss\na,1\nb,broken\n"))
    assert table.metrics([0], skip={"file"})[1] == ()
