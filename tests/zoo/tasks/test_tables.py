import numpy as np
import pandas as pd
import pytest
import torch

from metamerge.errors import ConfigError, ZooError
from zoo.tasks import load_task, tables
from zoo.tasks.findings import Findings

ROWS = 120


def good_frame():
    """A table without any fault: two numbers, a colour, and the species to tell."""
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "size": rng.normal(size=ROWS).round(4),
            "age": rng.integers(20, 60, ROWS),
            "colour": rng.choice(["red", "green", "blue"], ROWS),
            "species": rng.choice(["cat", "dog"], ROWS),
        }
    )


def load_csv(tmp_path, frame, **options):
    frame.to_csv(tmp_path / "t.csv", index=False)
    return load_task(tmp_path / "t.csv", **{"target": "species", **options})


def test_a_csv_file_becomes_a_task(tmp_path):
    frame = good_frame()
    task = load_csv(tmp_path, frame)
    assert task.inputs.shape == (ROWS, 5)
    np.testing.assert_array_equal(task.inputs[:, 0], frame["size"].astype(np.float32))
    np.testing.assert_array_equal(task.inputs[:, 1], frame["age"])
    for place, colour in enumerate(("blue", "green", "red")):
        np.testing.assert_array_equal(task.inputs[:, 2 + place], frame["colour"] == colour)
    assert task.labels == ("cat", "dog")
    np.testing.assert_array_equal(task.targets, frame["species"] == "dog")
    assert (task.name, task.classes) == (str(tmp_path / "t.csv"), 2)
    assert (task.standardise, task.test_rows) == (True, None)
    assert task.notes == (
        "the target was read as classes; kind='regression' asks for the other",
        "column 'colour': one-hot, 3 features: blue, green, red",
    )


def test_a_number_to_predict_becomes_a_regression(tmp_path):
    frame = good_frame()
    task = load_csv(tmp_path, frame, target="size")
    assert (task.regression, task.outputs, task.labels) == (True, 1, ())
    np.testing.assert_array_equal(task.targets[:, 0], frame["size"].astype(np.float32))


@pytest.mark.parametrize("ending", ["csv.gz", "parquet"])
def test_one_table_is_one_task_in_every_format(tmp_path, ending):
    frame = good_frame().assign(alive=np.arange(ROWS) % 5 > 0)
    path = tmp_path / f"t.{ending}"
    frame.to_parquet(path) if ending == "parquet" else frame.to_csv(path, index=False)
    task, other = load_csv(tmp_path, frame), load_task(path, target="species")
    assert task.digest == other.digest
    assert task.notes == other.notes


def test_columns_are_left_out_on_request(tmp_path):
    task = load_csv(tmp_path, good_frame(), drop=["colour", "age"])
    assert task.inputs.shape == (ROWS, 1)


def test_repeated_rows_are_removed_with_a_note(tmp_path):
    frame = good_frame()
    again = pd.concat([frame, frame.iloc[[5, 7]]])
    task = load_csv(tmp_path, again)
    assert task.digest == load_csv(tmp_path, frame).digest
    assert "removed 2 rows that repeat another one exactly, the first of them row 122" in task.notes


def test_rows_are_equal_when_their_numbers_are(tmp_path):
    lines = good_frame().to_csv(index=False).splitlines()
    size, rest = lines[1].split(",", 1)
    (tmp_path / "t.csv").write_text("\n".join([*lines, f"{size}000, {rest} "]))
    assert len(load_task(tmp_path / "t.csv", target="species").targets) == ROWS


FAULTS = {
    "missing": (
        lambda f: f.assign(size=f["size"].mask(f.index == 3)),
        "'size': .*missing: 1, first in row 5",
    ),
    "mixed": (
        lambda f: f.assign(age=f["age"].astype(object).mask(f.index == 3, "?")),
        r"'age': .*first '\?' in row 5",
    ),
    "infinite": (
        lambda f: f.assign(size=f["size"].mask(f.index == 3, np.inf)),
        "'size': .*first inf in row 5",
    ),
    "constant": (lambda f: f.assign(unit="m"), "'unit': .*'m' in every row from row 2"),
    "identifier": (lambda f: f.assign(id=f.index), "'id': .*It reads like an identifier"),
    "identifier of rows that repeat": (
        lambda f: pd.concat([f.assign(id=f.index), f.assign(id=f.index)[:9]]),
        "'id': .*It reads like an identifier",
    ),
    "many texts": (lambda f: f.assign(zip=[f"Z{i % 50}" for i in f.index]), "'zip': .*at most 32"),
    "renamed target": (
        lambda f: f.assign(latin=f["species"].map({"cat": "felis", "dog": "canis"})),
        "'latin': .*the target itself",
    ),
    "one class per patient": (
        lambda f: f.assign(patient=f.index // 4 * 2 + (f["species"] == "cat")),
        "'patient': .*each in rows of one class only",
    ),
    "a rare class": (
        lambda f: f.assign(species=f["species"].mask(f.index < 3, "yak")),
        "8 different rows of class 'yak', got 3, first in row 2",
    ),
    "one class": (lambda f: f[f["species"] == "cat"], "two classes, got only 'cat'"),
    "few rows": (lambda f: f[:39], "at least 40 different ones, got 39"),
    "missing target": (
        lambda f: f.assign(species=f["species"].mask(f.index == 3)),
        "'species': .*missing: 1, first in row 5",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_table_with_one_fault_is_refused_for_it_alone(tmp_path, fault):
    spoil, message = FAULTS[fault]
    with pytest.raises(ZooError, match=message) as caught:
        load_csv(tmp_path, spoil(good_frame()))
    assert "1 problem; rows are counted from the header, which is row 1." in str(caught.value)


def test_the_regression_target_in_other_units_is_refused(tmp_path):
    frame = good_frame()
    with pytest.raises(ZooError, match=r"'inches': .*the target in other units"):
        load_csv(tmp_path, frame.assign(inches=frame["size"] * 0.3937), target="size")


def test_all_faults_are_told_in_one_error(tmp_path):
    frame = good_frame().assign(id=np.arange(ROWS), unit="m", size=np.nan)
    frame["copy"] = frame["species"]
    frame.loc[frame.index[-3:], ["species", "copy"]] = "yak"
    with pytest.raises(ZooError, match="6 problems") as caught:
        load_csv(tmp_path, frame, drop=["colours"])
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == [
        "  - drop",
        "  - target",
        "  - column 'size'",
        "  - column 'id'",
        "  - column 'unit'",
        "  - column 'copy'",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": None}, "target: name the column to predict. There are: size, age"),
        ({"target": "Specie"}, r"no column 'Specie', did you mean 'species'\?"),
        ({"drop": ["SIZE"]}, r"no column 'SIZE', did you mean 'size'\?"),
        ({"drop": ["species"]}, "'species' is the target"),
        ({"drop": ["size", "age", "colour"]}, "no column is left for the inputs"),
    ],
)
def test_options_that_do_not_fit_the_table_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        load_csv(tmp_path, good_frame(), **options)


def test_two_columns_of_one_name_are_refused_unless_left_out(tmp_path):
    frame = good_frame()
    frame.columns = ["size", "size", "colour", "species"]
    with pytest.raises(ZooError, match="header: expected different names, got 'size' 2 times"):
        load_csv(tmp_path, frame)
    frame["age"] = good_frame()["age"]
    assert load_csv(tmp_path, frame, drop=["size"]).inputs.shape[1] == 4


def test_a_header_without_rows_is_refused(tmp_path):
    with pytest.raises(ZooError, match="rows: expected some below the header, got none"):
        load_csv(tmp_path, good_frame()[:0])


def test_text_that_would_not_fit_one_hot_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "MOST_BYTES", 5 * 4 * ROWS - 1)
    with pytest.raises(ZooError, match="inputs: expected at most"):
        load_csv(tmp_path, good_frame())


def test_dates_and_lists_are_refused_by_name(tmp_path):
    frame = good_frame().assign(when=pd.Timestamp("2026-01-01"), tags=[[1]] * ROWS)
    frame.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ZooError, match="2 problems; rows are counted from 1") as caught:
        load_task(tmp_path / "t.parquet", target="species")
    assert "column 'when': expected numbers, text or booleans, got datetime64" in str(caught.value)
    assert "column 'tags': expected numbers, text or booleans, got " in str(caught.value)


def test_a_hundred_problems_are_listed_and_the_rest_is_counted():
    found = Findings("t.csv", "rows are counted from 1", problems=[str(i) for i in range(130)])
    with pytest.raises(ZooError, match="and 30 more") as caught:
        found.refuse()
    assert len(str(caught.value).splitlines()) == 102


def test_a_table_trains_like_any_other_task(tmp_path):
    from zoo.parts import PARTS, split_task

    split = split_task(load_csv(tmp_path, good_frame()))
    rows = torch.cat([split.rows(part) for part in PARTS])
    assert rows.sort().values.tolist() == list(range(ROWS))
