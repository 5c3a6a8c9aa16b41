import zipfile

import numpy as np
import pytest

from metamerge.errors import ConfigError, ZooError
from zoo.tasks import arrays, load_task

ROWS = 60
CLASSES = np.arange(ROWS) % 3


def draw(*shape, rows=ROWS):
    return np.random.default_rng(0).random((rows, *shape))


def pixels(*shape, rows=ROWS):
    return (draw(*shape, rows=rows) * 256).astype(np.uint8)


def load(tmp_path, options=None, **saved):
    np.savez(tmp_path / "a.npz", **saved)
    return load_task(tmp_path / "a.npz", **(options or {}))


@pytest.mark.parametrize("inputs", ["inputs", "x", "X"])
@pytest.mark.parametrize("targets", ["targets", "y"])
def test_arrays_are_found_under_their_usual_names(tmp_path, inputs, targets):
    task = load(tmp_path, **{inputs: draw(5), targets: CLASSES})
    np.testing.assert_array_equal(task.inputs, draw(5).astype(np.float32))
    np.testing.assert_array_equal(task.targets, CLASSES)
    assert (task.standardise, task.test_rows, task.labels) == (True, None, ("0", "1", "2"))


@pytest.mark.parametrize("shape", [(8, 6), (1, 8, 6), (3, 8, 6)])
def test_bytes_are_images_and_divided_by_255(tmp_path, shape):
    task = load(tmp_path, x=pixels(*shape), y=CLASSES)
    assert task.inputs.shape == (ROWS, *shape)[-4:] if len(shape) == 3 else (ROWS, 1, *shape)
    expected = pixels(*shape).reshape(task.inputs.shape).astype(np.float32) / 255
    np.testing.assert_array_equal(task.inputs, expected)
    assert not task.standardise


def test_floats_of_four_axes_within_the_unit_interval_are_images(tmp_path):
    task = load(tmp_path, x=draw(3, 4, 4), y=CLASSES)
    np.testing.assert_array_equal(task.inputs, draw(3, 4, 4).astype(np.float32))
    assert not task.standardise


def test_floats_of_three_axes_are_grey_images_or_signals_by_their_range(tmp_path):
    image, signal = (load(tmp_path, x=draw(4, 9) * by, y=CLASSES) for by in (1, -1))
    assert (image.inputs.shape, image.standardise) == ((ROWS, 1, 4, 9), False)
    assert (
        "inputs of shape (60, 4, 9) were read as grey images [rows, height, width]" in image.notes
    )
    assert (signal.inputs.shape, signal.standardise) == ((ROWS, 4, 9), True)
    assert "were read as signals [rows, channels, length]" in signal.notes[0]


def test_training_and_test_arrays_keep_their_sides(tmp_path):
    x, y = draw(5, rows=100), np.arange(100) % 2
    task = load(tmp_path, x_train=x[:70], y_train=y[:70], x_test=x[70:], y_test=y[70:])
    np.testing.assert_array_equal(task.inputs, x.astype(np.float32))
    assert task.test_rows == range(70, 100)


@pytest.mark.parametrize("shape", [(5,), (2, 5, 5)])
def test_a_training_row_that_is_a_test_row_is_removed(tmp_path, shape):
    x, y = draw(*shape, rows=100), np.arange(100) % 2
    x[[0, 1, 2]] = x[[98, 96, 94]]
    x[99] = x[97]
    y[2] = 1 - y[94]
    task = load(tmp_path, x_train=x[:70], y_train=y[:70], x_test=x[70:], y_test=y[70:])
    assert task.test_rows == range(69, 99)  # row 0: same class; row 1: another class, noted
    np.testing.assert_array_equal(task.inputs[69:], x[70:].astype(np.float32))


def test_several_numbers_per_row_are_a_regression(tmp_path):
    task = load(tmp_path, x=draw(5), y=draw(2))
    assert (task.outputs, task.regression) == (2, True)
    np.testing.assert_array_equal(task.targets, draw(2).astype(np.float32))


def test_a_column_of_classes_is_classes(tmp_path):
    assert load(tmp_path, x=draw(5), y=CLASSES[:, None]).targets.tolist() == CLASSES.tolist()


def test_texts_are_classes_and_their_names_are_kept(tmp_path):
    names = np.array(["cat", "ant", "bee"])[CLASSES]
    task = load(tmp_path, x=pixels(1, 4, 4), y=names)
    assert task.labels == ("ant", "bee", "cat")
    assert [task.labels[code] for code in task.targets] == names.tolist()


def test_a_kind_is_taken_as_asked_for(tmp_path):
    assert load(tmp_path, {"kind": "regression"}, x=draw(5), y=CLASSES).regression


def test_columns_of_a_table_are_left_out_by_their_place(tmp_path):
    task = load(tmp_path, {"drop": ["feature 1", "feature 3"]}, x=draw(5), y=CLASSES)
    np.testing.assert_array_equal(task.inputs, draw(5)[:, [0, 2, 4]].astype(np.float32))
    with pytest.raises(ConfigError, match=r"no column 'feature', did you mean 'feature 4'"):
        load(tmp_path, {"drop": ["feature"]}, x=draw(5), y=CLASSES)
    with pytest.raises(ConfigError, match="are no columns to leave out"):
        load(tmp_path, {"drop": ["feature 1"]}, x=pixels(4, 4), y=CLASSES)


def test_arrays_of_other_names_are_noted(tmp_path):
    assert (
        "arrays that were not read: ids" in load(tmp_path, x=draw(5), y=CLASSES, ids=CLASSES).notes
    )


def test_equal_images_are_removed_with_a_note(tmp_path):
    images = pixels(4, 4)
    images[6] = images[3] = images[0]
    task = load(tmp_path, x=images, y=CLASSES)
    assert len(task.targets) == ROWS - 2
    assert "removed 2 rows that repeat another one exactly, the first of them row 3" in task.notes


def spoiled(array, row, value):
    array[row] = value
    return array


FAULTS = {
    "no inputs": ({"y": CLASSES}, "expected one of inputs, x, X, got none among y"),
    "no targets": ({"x": draw(5)}, "expected one of targets, y, got none among x"),
    "two inputs": ({"x": draw(5), "X": draw(5), "y": CLASSES}, "got x and X among"),
    "half of the halves": ({"x_train": draw(5), "y_train": CLASSES}, "expected one of inputs"),
    "other lengths": ({"x": draw(5), "y": CLASSES[:-1]}, r"as 'x' has, \(60,\), got \(59,\)"),
    "one axis": ({"x": CLASSES * 1.0, "y": CLASSES}, r"'x': expected 2, 3, 4 axes.*shape \(60,\)"),
    "five axes": ({"x": draw(1, 1, 1, 1), "y": CLASSES}, "expected 2, 3, 4 axes"),
    "no axis": ({"x": np.float32(3), "y": CLASSES}, r"got shape \(\)"),
    "no pixels": ({"x": draw(3, 0, 4), "y": CLASSES}, r"got shape \(60, 3, 0, 4\)"),
    "targets of three axes": ({"x": draw(5), "y": draw(2, 2)}, "'y': expected 1, 2 axes"),
    "not a number in a table": (
        {"x": spoiled(draw(5), (7, 2), np.nan), "y": CLASSES},
        "'feature 2': .*first in row 7",
    ),
    "not a number in an image": (
        {"x": spoiled(draw(1, 4, 4), (7, 0, 2, 2), np.nan), "y": CLASSES},
        "others in 1 rows, first in row 7",
    ),
    "infinite in a signal": (
        {"x": spoiled(draw(2, 9), (7, 0, 2), -np.inf), "y": CLASSES},
        "others in 1 rows, first in row 7",
    ),
    "beyond float32": (
        {"x": spoiled(draw(2, 9), (7, 0, 2), 1e300), "y": CLASSES},
        "others in 1 rows, first in row 7",
    ),
    "floats to 255": (
        {"x": draw(1, 4, 4) * 255, "y": CLASSES},
        r"images in \[0, 1\], got .*first in row 0.*Divide",
    ),
    "one pixel below zero": (
        {"x": spoiled(draw(1, 4, 4), (7, 0, 2, 2), -0.5), "y": CLASSES},
        "got -0.5 to .* first in row 7",
    ),
    "channels last": (
        {"x": pixels(8, 8, 3), "y": CLASSES},
        r"channels last. Save x\.transpose\(0, 3, 1, 2\)",
    ),
    "integers as images": (
        {"x": pixels(1, 8, 8).astype(int), "y": CLASSES},
        r"got int64.*\.astype\(np\.uint8\)",
    ),
    "texts as images": ({"x": pixels(1, 8, 8).astype(str), "y": CLASSES}, "got <U3"),
    "few rows": ({"x": draw(5)[:39], "y": CLASSES[:39]}, "at least 40 different ones, got 39"),
    "few rows of a class": (
        {"x": pixels(4, 4), "y": np.where(CLASSES, 5, np.arange(ROWS) // 12)},
        "8 different rows of class '0', got 4",
    ),
    "the target among the inputs": (
        {"x": np.column_stack([draw(5), CLASSES]), "y": CLASSES},
        "'feature 5': .*the target itself",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_arrays_with_a_fault_are_refused(tmp_path, fault):
    saved, message = FAULTS[fault]
    with pytest.raises(ZooError, match=message) as caught:
        load(tmp_path, **saved)
    assert f"load_task('{tmp_path / 'a.npz'}'): " in str(caught.value)
    assert "rows are counted from 0." in str(caught.value)


@pytest.mark.parametrize("kind", ["c16", "M8[s]", "S3", "f4,f4"])
def test_types_that_are_no_values_are_refused(tmp_path, kind):
    for saved in (
        {"x": np.zeros((ROWS, 2), kind), "y": CLASSES},
        {"x": draw(2), "y": np.zeros(ROWS, kind)},
    ):
        with pytest.raises(ZooError, match="expected numbers, booleans or text, got"):
            load(tmp_path, **saved)


@pytest.mark.parametrize("kind", [">f8", "f2", "g", "i1", "u8", ">i2"])
def test_numbers_of_every_width_and_byte_order_are_read(tmp_path, kind):
    x, y = (draw(5) * 100).astype(kind), CLASSES.astype(kind)
    task = load(tmp_path, x=x, y=y)
    np.testing.assert_array_equal(task.inputs, x.astype(np.float32))
    assert task.targets.tolist() == CLASSES.tolist()


def test_training_and_test_rows_of_different_forms_are_refused(tmp_path):
    saved = {"x_train": draw(5), "y_train": CLASSES, "x_test": draw(4), "y_test": draw()}
    with pytest.raises(ZooError, match="2 problems") as caught:
        load(tmp_path, **saved)
    assert "array 'x_test': expected rows like those of 'x_train', float64 (5,)" in str(
        caught.value
    )
    assert "array 'y_test': expected rows like those of 'y_train', int64 ()" in str(caught.value)


class Intruder:
    """Unpickled, it ends the tests."""

    def __reduce__(self):
        return (exit, (1,))


def test_objects_are_never_unpickled(tmp_path):
    with pytest.raises(ZooError, match=r"array 'x' is damaged, or holds objects.*astype\(str\)"):
        load(tmp_path, x=np.array([Intruder()] * ROWS, dtype=object), y=CLASSES)


@pytest.mark.parametrize("content", [b"PK", b"<!DOCTYPE html>", b"\x93NUMPY"])
def test_what_is_no_npz_file_is_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ZooError, match=r"a\.npz: no NPZ file"):
        load_task(tmp_path / "a.npz")


def test_a_damaged_array_is_refused_by_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order'")
    with pytest.raises(ZooError, match="array 'x' is damaged"):
        load_task(tmp_path / "a.npz")


def test_an_array_packed_in_an_unknown_way_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=draw(5), y=CLASSES)
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[8] = content[content.index(b"PK\x01\x02") + 10] = 77  # method of compression
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ZooError, match="array 'x' is damaged"):
        load_task(tmp_path / "a.npz")


def test_a_header_that_claims_terabytes_is_refused(tmp_path):
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        content = b"\x93NUMPY\x01\x00v\x00" + header.ljust(117).encode() + b"\n" + bytes(100)
        archive.writestr("x.npy", content)
    with pytest.raises(ZooError, match="array 'x' is damaged"):
        load_task(tmp_path / "a.npz")


def test_an_archive_that_unpacks_to_gigabytes_is_refused_unread(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("x.npy", "w", force_zip64=True) as file,
    ):
        for _ in range(129):
            file.write(bytes(2**24))
    with pytest.raises(ZooError, match=r"its arrays take 2\.0 GiB, expected at most 2\.0 GiB"):
        load_task(tmp_path / "a.npz")


def test_images_that_take_gigabytes_as_floats_are_refused(tmp_path, monkeypatch):
    from zoo.tasks import tables

    monkeypatch.setattr(tables, "MOST_BYTES", 4 * ROWS * 16 - 1)
    monkeypatch.setattr(arrays, "MOST_BYTES", 2**31)
    with pytest.raises(ZooError, match="inputs: expected at most"):
        load(tmp_path, x=pixels(4, 4), y=CLASSES)
