import numpy as np
import pandas as pd
import pytest

from zoo.tasks.columns import check_feature, check_gaps, encode_column, parse_column
from zoo.tasks.findings import Findings

DROP = r"leave (it|the column) out with drop=\['x'\]"


def findings():
    return Findings("file", "rows are counted from 0")


def parse(values, dtype=None):
    found = findings()
    return parse_column(pd.Series(values, name="x", dtype=dtype), found), found


def texts(*values):
    return pd.Series(values, name="x", dtype="string")


def only_problem(found):
    assert len(found.problems) == 1, found.problems
    return found.problems[0]


@pytest.mark.parametrize(
    ("values", "expected", "dtype"),
    [
        (texts("1", " 2 ", "-3"), [1, 2, -3], "int64"),
        (texts("1", "2.5", "1e3"), [1, 2.5, 1000], "float64"),
        (texts("1", None, " "), [1, np.nan, np.nan], "float64"),
        (texts("18446744073709551615", "1"), [2**64 - 1, 1], "uint64"),
        (pd.Series([1, None], name="x", dtype="Int64"), [1, np.nan], "float64"),
        (pd.Series([1, 2], name="x", dtype="Int16"), [1, 2], "int64"),
        (pd.Series([0.5, 2], name="x", dtype="float16"), [0.5, 2], "float64"),
    ],
)
def test_what_spells_numbers_is_numbers(values, expected, dtype):
    column, found = parse(values)
    assert column.dtype == dtype
    np.testing.assert_array_equal(column, expected)
    assert found.problems == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (texts(" red", "blue"), ["red", "blue"]),
        ([True, False], ["True", "False"]),
        (texts("True", "False"), ["True", "False"]),
        (pd.Series([3, 1], name="x", dtype="category"), ["3", "1"]),
        (texts("1_000", "0x10"), ["1_000", "0x10"]),
    ],
)
def test_the_rest_is_text(values, expected):
    column, found = parse(values)
    assert isinstance(column.dtype, pd.StringDtype)
    assert column.tolist() == expected
    assert found.problems == []


def test_a_word_among_numbers_is_told_with_its_row():
    column, found = parse(texts("1", "2", "n/k", "4", "?"))
    assert column is None
    message = only_problem(found)
    assert (
        "expected numbers, as in 3 rows, got something else in 2, first 'n/k' in row 2" in message
    )
    assert "drop=['x']" in message


def test_a_number_among_words_is_told_with_its_row():
    _, found = parse(texts("a", "b", "7", "c"))
    assert "expected text, as in 3 rows, got something else in 1, first '7' in row 2" in (
        only_problem(found)
    )


def test_a_mixed_column_tells_its_gaps_as_well():
    _, found = parse(texts("1", "2", "n/k", None))
    assert len(found.problems) == 2
    assert "missing: 1, first in row 3" in found.problems[1]


@pytest.mark.parametrize(
    "values",
    [
        pd.date_range("2026-01-01", periods=3).to_series(name="x"),
        pd.Series([[1], [2], [3]], name="x"),
        pd.Series([1j, 2, 3], name="x"),
    ],
)
def test_types_that_are_neither_are_refused(values):
    column, found = parse(values)
    assert column is None
    assert f"expected numbers, text or booleans, got {values.dtype}, first" in only_problem(found)


def check(values, dtype=None):
    column, found = parse(values, dtype)
    check_gaps(column, found)
    check_feature(column, found)
    return found


def test_missing_values_are_counted_and_the_first_is_named():
    message = only_problem(check([1.5, np.nan, 2.5, np.nan]))
    assert "expected 4 values, got 2; missing: 2, first in row 1" in message


def test_a_column_of_nothing_is_missing_and_nothing_else():
    assert "missing: 3, first in row 0" in only_problem(check(texts(None, None, None)))


@pytest.mark.parametrize(
    ("value", "shown"), [("inf", "inf"), ("-Infinity", "-inf"), ("1e39", "1e+39")]
)
def test_numbers_that_float32_cannot_hold_are_refused(value, shown):
    message = only_problem(check(texts("1.5", "2.5", value, value)))
    assert f"finite numbers up to 3.4e+38, got larger in 2 rows, first {shown} in row 2" in message


@pytest.mark.parametrize("values", [[3, 3, 3], [0.5, 0.5, np.nan], texts("a", "a", "a")])
def test_constants_are_refused(values):
    assert "expected values that differ, got" in check(values).problems[-1]


def test_what_differs_beyond_float32_is_constant():
    message = only_problem(check([1e9, 1e9 + 1, 1e9, 1e9 + 1]))
    assert "got 1e+09 in every row from row 0 on once rounded to float32" in message


@pytest.mark.parametrize(
    ("values", "first"), [(texts("P1", "P2", "P3"), "'P1'"), (np.array([7, 3, 5]), "7")]
)
def test_a_column_that_names_every_row_is_an_identifier(values, first):
    message = only_problem(check(values))
    assert f"got another one in every row, beginning with {first} in row 0" in message
    assert "It reads like an identifier" in message


def test_whole_numbers_are_told_how_not_to_be_an_identifier():
    assert "write it with decimals" in only_problem(check(texts("7", "3", "5")))
    assert check(texts("7.0", "3.0", "5.0")).problems == []


def test_numbers_with_decimals_are_no_identifier():
    assert check([0.1, 0.2, 0.3]).problems == []


def test_thirty_two_texts_are_levels_and_thirty_three_are_refused():
    names = [f"L{i:02d}" for i in range(33)]
    assert check(texts(*names[:32], *names[:32])).problems == []
    message = only_problem(check(texts(*names, *names)))
    assert "at most 32 different texts, got 33, the first beyond in row 32: 'L32'" in message


def test_text_is_one_hot_in_the_order_of_its_levels():
    found = findings()
    features = encode_column(texts("red", "blue", "red"), found)
    assert features.tolist() == [[0, 1], [1, 0], [0, 1]]
    assert features.dtype == np.float32
    assert found.notes == ["column 'x': one-hot, 2 features: blue, red"]


def test_numbers_are_encoded_as_they_are():
    assert encode_column(pd.Series([3, -1], name="x"), findings()).tolist() == [[3], [-1]]
