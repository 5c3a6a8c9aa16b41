import numpy as np
import pandas as pd
import pytest

from zoo.tasks.findings import Findings
from zoo.tasks.leakage import check_leak, first_of_each
from zoo.tasks.targets import Targets

ROWS = 120
RNG = np.random.default_rng(0)
CLASSES = np.arange(ROWS) % 3
NUMBERS = RNG.normal(size=ROWS)


def classes_of(codes):
    return Targets(np.asarray(codes), ("a", "b", "c"), pd.RangeIndex(len(codes)))


def numbers_of(values):
    values = np.asarray(values, dtype=np.float64)
    return Targets(values.reshape(len(values), -1), None, pd.RangeIndex(len(values)))


def leak(values, targets):
    found = Findings("file", "rows are counted from 0")
    check_leak(pd.Series(values, name="x"), targets, found)
    assert len(found.problems) <= 1
    return found.problems[0] if found.problems else None


@pytest.mark.parametrize(
    "values",
    [
        CLASSES,
        np.array(["north", "south", "west"])[CLASSES],
        np.array([0.25, -1.5, 7.0])[CLASSES],
        -CLASSES,
    ],
)
def test_a_column_that_is_the_classes_renamed_is_refused(values):
    message = leak(
        pd.Series(values, dtype="string" if values.dtype.kind == "U" else None), classes_of(CLASSES)
    )
    assert "the target itself, perhaps renamed: 3 values that go with its own" in message
    assert "leave the column out with drop=['x']" in message


def test_one_exception_among_many_rows_is_no_renaming():
    values = CLASSES.copy()
    values[0] = 1
    assert leak(values, classes_of(CLASSES)) is None


def test_patients_that_have_one_diagnosis_each_give_it_away():
    patients = RNG.integers(0, 20, ROWS) * 3 + CLASSES
    message = leak(patients, classes_of(CLASSES))
    assert f"{len(set(patients))} values, each in rows of one class only" in message
    assert "write it with decimals if it measures" in message


def test_names_of_patients_give_it_away_even_if_some_came_once():
    patients = RNG.integers(0, 20, ROWS) * 3 + CLASSES
    patients[:5] = 1000 + np.arange(5)
    names = pd.Series([f"P{p}" for p in patients], dtype="string")
    assert "each in rows of one class only" in leak(names, classes_of(CLASSES))


def test_a_few_equal_pairs_of_one_class_are_chance():
    values = np.arange(ROWS)
    values[3], values[9], values[4] = values[0], values[0], values[1]  # rows of one class
    assert leak(values, classes_of(CLASSES)) is None


def test_a_measurement_that_separates_the_classes_is_no_leak():
    values = CLASSES * 10 + RNG.integers(0, 40, ROWS) / 8
    assert len(set(values)) > 32
    assert leak(values, classes_of(CLASSES)) is None


def test_few_decimal_levels_that_tell_the_class_are_a_leak():
    values = CLASSES + RNG.integers(0, 4, ROWS) / 8
    assert "12 values, each in rows of one class only" in leak(values, classes_of(CLASSES))


def test_an_honest_category_is_no_leak():
    assert leak(RNG.integers(0, 5, ROWS), classes_of(CLASSES)) is None


def test_missing_values_hide_no_leak():
    values = CLASSES.astype(float)
    values[7] = np.nan
    assert "perhaps renamed" in leak(values, classes_of(CLASSES))


@pytest.mark.parametrize(
    "values", [NUMBERS, NUMBERS * -3 + 2, NUMBERS * 1e30, (NUMBERS * 1000).round().astype(int)]
)
def test_the_number_to_predict_in_other_units_is_refused(values):
    message = leak(values, numbers_of(NUMBERS))
    assert "the target in other units, |correlation|" in message
    assert "> 0.9999, from row 0" in message


def test_a_strong_hint_is_no_leak():
    values = NUMBERS + RNG.normal(size=ROWS) / 30
    assert 0.999 < np.corrcoef(values, NUMBERS)[0, 1] < 0.9999
    assert leak(values, numbers_of(NUMBERS)) is None


def test_every_output_of_a_regression_is_compared():
    assert leak(NUMBERS, numbers_of(np.column_stack([RNG.normal(size=ROWS), NUMBERS]))) is not None


def test_levels_that_stand_for_numbers_are_refused():
    values = pd.Series(np.array(["low", "mid", "high"])[CLASSES], dtype="string")
    targets = numbers_of(np.array([0.1, 0.7, 0.2])[CLASSES])
    assert "perhaps renamed" in leak(values, targets)


def test_constants_are_compared_with_nothing():
    assert leak(np.ones(ROWS), classes_of(CLASSES)) is None
    assert leak(np.ones(ROWS), numbers_of(NUMBERS)) is None


# ---------------------------------------------------------------------------- repeated rows


def keep(inputs, targets, train=None):
    found = Findings("file", "rows are counted from 0")
    kept = first_of_each(np.asarray(inputs, dtype=np.float32), targets, train, found)
    return kept.tolist(), found.notes


def test_of_equal_rows_the_first_is_kept():
    kept, notes = keep([[1, 2], [3, 4], [1, 2], [1, 2]], classes_of([0, 1, 0, 0]))
    assert kept == [True, True, False, False]
    assert notes == ["removed 2 rows that repeat another one exactly, the first of them row 2"]


def test_rows_without_a_twin_are_all_kept_without_a_note():
    assert keep([[1, 2], [2, 1]], classes_of([0, 0])) == ([True, True], [])


def test_equal_inputs_of_two_classes_are_kept_and_noted():
    kept, notes = keep([[5], [1], [1], [1]], classes_of([0, 0, 1, 1]))
    assert kept == [True, True, True, False]
    assert notes[1] == (
        "2 rows have the inputs of another row, but not its target, the first of them row 1"
    )


def test_equal_inputs_of_two_numbers_are_kept_and_noted():
    assert keep([[1], [1]], numbers_of([0.5, 0.25]))[0] == [True, True]


def test_a_training_row_that_repeats_a_test_row_is_removed_and_no_test_row_is():
    kept, _ = keep([[1], [2], [2], [1], [3], [3]], classes_of([0] * 6), train=3)
    assert kept == [False, True, False, True, True, True]
