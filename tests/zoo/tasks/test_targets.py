import numpy as np
import pandas as pd
import pytest

from zoo.tasks.findings import Findings
from zoo.tasks.targets import check_counts, read_targets


def read(*columns, kind="auto"):
    found = Findings("file", "rows are counted from 0")
    frame = pd.DataFrame({f"y{i}": column for i, column in enumerate(columns)})
    return read_targets(frame, kind, found), found


def only_problem(found):
    assert len(found.problems) == 1, found.problems
    return found.problems[0]


ROWS = 60


@pytest.mark.parametrize(
    ("column", "labels"),
    [
        (np.array(["b", "a", "c"] * 20), ("a", "b", "c")),
        (np.array([True, False] * 30), ("False", "True")),
        (np.array([5, 3, 10] * 20), ("3", "5", "10")),
        (np.array([1.0, 0.0] * 30), ("0", "1")),
        (np.array(["10", "9"] * 30), ("9", "10")),
    ],
)
def test_few_texts_booleans_and_whole_numbers_are_classes(column, labels):
    targets, found = read(column)
    assert targets.labels == labels
    assert targets.values.dtype == np.int64
    assert [labels[code] for code in targets.values[:3]] == [
        str(int(v) if isinstance(v, np.float64) else v) for v in column[:3]
    ]
    assert found.notes == ["the target was read as classes; kind='regression' asks for the other"]


@pytest.mark.parametrize(
    "column",
    [
        np.linspace(0, 1, ROWS),
        np.arange(ROWS) % 21,  # one more than 20
        np.array([0.5, 1.5] * 30),
    ],
)
def test_many_or_broken_numbers_are_a_regression(column):
    targets, found = read(column)
    assert targets.labels is None
    np.testing.assert_array_equal(targets.values, column[:, None])
    assert found.notes[0].startswith("the target was read as numbers")
    assert found.problems == []


def test_twenty_whole_numbers_are_classes_only_in_more_than_forty_rows():
    assert read(np.arange(60) % 20)[0].labels is not None
    assert read(np.arange(40) % 20)[0].labels is None


def test_a_kind_that_was_asked_for_is_taken_without_a_note():
    targets, found = read(np.arange(ROWS) % 3, kind="regression")
    assert (targets.labels, found.notes) == (None, [])
    targets, found = read(np.arange(ROWS) % 25, kind="classification")
    assert (len(targets.labels), found.notes) == (25, [])


def test_several_columns_of_numbers_are_a_regression_with_several_outputs():
    targets, _ = read(np.linspace(0, 1, ROWS), np.linspace(5, 3, ROWS))
    assert targets.values.shape == (ROWS, 2)


def test_one_hot_columns_are_neither_guessed_nor_refused_when_asked_for():
    columns = np.eye(3)[np.arange(ROWS) % 3].T
    assert "give their argmax" in only_problem(read(*columns)[1])
    assert "give their argmax" in only_problem(read(*columns, kind="classification")[1])
    assert read(*columns, kind="regression")[0].values.shape == (ROWS, 3)


def test_fractions_are_no_classes():
    _, found = read(np.array([1.0, 2.0, 2.5] * 20), kind="classification")
    assert "got fractions in 20 rows, first 2.5 in row 2" in only_problem(found)


def test_text_is_no_number():
    targets, found = read(np.array([f"T{i % 30}" for i in range(ROWS)]))
    assert targets is None
    message = only_problem(found)
    assert "got text with 30 different values, first 'T0' in row 0" in message
    assert "kind='classification'" in message


def test_a_mixed_target_is_refused():
    targets, found = read(np.array(["1", "2", "x"] * 20))
    assert targets is None
    assert only_problem(found).endswith("one way, or choose another target.")


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_missing_targets_are_counted(kind):
    _, found = read(pd.Series([1, None, 2] * 20), kind=kind)
    assert "missing: 20, first in row 1" in found.problems[0]


def test_infinite_targets_are_refused():
    _, found = read(np.array([0.5, np.inf, 2.5] * 20))
    assert "got larger in 20 rows, first inf in row 1" in only_problem(found)


def test_a_constant_target_is_no_regression():
    _, found = read(np.full(ROWS, 0.5))
    assert "expected values that differ, got 0.5 in every row from row 0" in only_problem(found)


def counts(column, kind="auto"):
    targets, found = read(column, kind=kind)
    check_counts(targets, found)
    return found


def test_eight_rows_of_a_class_are_enough_and_seven_are_not():
    assert counts(np.array(["a"] * 50 + ["b"] * 8)).problems == []
    message = only_problem(counts(np.array(["a"] * 51 + ["b"] * 7)))
    assert "expected at least 8 different rows of class 'b', got 7, first in row 51" in message


def test_one_class_is_no_classification():
    assert "at least two classes, got only 'a', from row 0" in (
        only_problem(counts(np.array(["a"] * 50)))
    )


def test_forty_rows_are_enough_and_thirty_nine_are_not():
    assert counts(np.linspace(0, 1, 40)).problems == []
    assert "rows: expected at least 40 different ones, got 39" in (
        only_problem(counts(np.linspace(0, 1, 39)))
    )


def test_rows_without_a_target_count_for_no_class():
    column = pd.Series(["a"] * 50 + ["b"] * 8 + [None] * 5, dtype="string")
    assert all("class" not in problem for problem in counts(column).problems)
