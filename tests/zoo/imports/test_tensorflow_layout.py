"""A layout fills its rows without gap, and gives every variable torch's order of axes."""

import numpy as np
import pytest
import torch

from metamerge.errors import Unreadable, ZooError
from zoo.imports import tensorflow_layout
from zoo.imports.tensorflow_layout import gather, read_layout

HEADER = "varname,start_idx,end_idx,size,shape"
ROWS = (
    'sequential/conv2d/bias:0,0,2,2,"(2,)"',
    'sequential/conv2d/kernel:0,2,14,12,"(2, 3, 1, 2)"',
    'sequential/dense/bias:0,14,17,3,"(3,)"',
    'sequential/dense/kernel:0,17,23,6,"(2, 3)"',
)
WIDTH = 23


def write(folder, rows=ROWS, header=HEADER):
    path = folder / "layout.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_variables_are_read_in_the_order_of_their_columns(tmp_path):
    variables = read_layout(write(tmp_path, ROWS[::-1]), WIDTH)
    names = ["conv2d.bias", "conv2d.weight", "dense.bias", "dense.weight"]
    assert [variable.name for variable in variables] == names
    assert [variable.torch_shape for variable in variables] == [(2,), (2, 1, 2, 3), (3,), (3, 2)]


def test_sizes_need_not_be_given_and_other_columns_do_no_harm(tmp_path):
    rows = [
        '0,"(2,)",0,2,a/bias',
        '1,"[3, 2]",2,8,a/kernel',
    ]
    variables = read_layout(write(tmp_path, rows, ",shape,start_idx,end_idx,varname"), 8)
    assert [variable.name for variable in variables] == ["a.bias", "a.weight"]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (ROWS[1].replace(",2,14,12", ",3,15,12"), "a gap"),
        (ROWS[1].replace(",2,14,12", ",1,13,12"), "an overlap"),
        (ROWS[1].replace(",14,12", ",14,11"), r"line 3, .*12 numbers.*size 11"),
        (ROWS[1].replace(",14,12", ",15,13"), r"13 numbers, expected .* \(2, 3, 1, 2\)"),
        (ROWS[1].replace("(2, 3, 1, 2)", "(2, 3, 2, 2)"), r"12 numbers, expected .*\(2, 3, 2, 2\)"),
        (ROWS[1].replace("(2, 3, 1, 2)", "(2, 6)") + "\n" + ROWS[1], "an overlap"),
        (ROWS[1].replace("(2, 3, 1, 2)", "__import__('os')"), "expected a shape such as"),
        (ROWS[1].replace("(2, 3, 1, 2)", "(0, 3, 1, 2)"), "expected a shape such as"),
        (ROWS[1].replace(",2,14", ",-2,14"), "whole columns"),
        (ROWS[1].replace(",2,14", ",2.0,14"), "whole columns"),
        (ROWS[1].replace("kernel:0", "gamma:0"), "expected kernels"),
        (ROWS[1].replace("(2, 3, 1, 2)", "(2, 3, 2)"), "kernels of 4 or 2 axes"),
        (ROWS[1].replace("conv2d", "dense"), r"each variable once, got several \['dense.weight'\]"),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(tmp_path, row, match):
    path = write(tmp_path, [ROWS[0], row, *ROWS[2:]])
    with pytest.raises(ZooError, match=match) as caught:
        read_layout(path, WIDTH)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("width", [WIDTH - 1, WIDTH + 1])
def test_a_layout_of_another_width_is_refused(tmp_path, width):
    with pytest.raises(ZooError, match=f"end at column 23, expected {width}"):
        read_layout(write(tmp_path), width)


def test_a_missing_file_or_column_is_refused(tmp_path):
    with pytest.raises(Unreadable, match=r"layout\.csv"):
        read_layout(tmp_path / "layout.csv", WIDTH)
    with pytest.raises(ZooError, match="no column 'varname'"):
        read_layout(write(tmp_path, header=HEADER.replace("varname", "variable")), WIDTH)


def test_rows_are_cut_and_turned_by_hand(tmp_path):
    variables = read_layout(write(tmp_path), WIDTH)
    array = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    weights, kept = gather(array, [1], variables, drop_nonfinite=False)
    assert kept == [0]
    assert list(weights) == ["conv2d.weight", "conv2d.bias", "dense.weight", "dense.bias"]
    assert weights["conv2d.bias"].tolist() == [[23, 24]]
    # HWIO (2, 3, 1, 2): the outputs alternate in the row.
    first, second = [[25, 27, 29], [31, 33, 35]], [[26, 28, 30], [32, 34, 36]]
    assert weights["conv2d.weight"].tolist() == [[[first], [second]]]
    assert weights["dense.bias"].tolist() == [[37, 38, 39]]
    assert weights["dense.weight"].tolist() == [[[40, 43], [41, 44], [42, 45]]]


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_chunks_change_nothing(tmp_path, monkeypatch, chunk):
    variables = read_layout(write(tmp_path), WIDTH)
    array = np.random.default_rng(0).normal(size=(7, WIDTH)).astype(np.float32)
    array[[0, 4], [3, 22]] = np.nan, np.inf
    rows = [6, 0, 1, 4, 2]
    whole, kept = gather(array, rows, variables, drop_nonfinite=True)
    monkeypatch.setattr(tensorflow_layout, "_CHUNK", chunk)
    weights, kept_in_chunks = gather(array, rows, variables, drop_nonfinite=True)
    assert kept == kept_in_chunks == [0, 2, 4]
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    assert torch.equal(weights["conv2d.bias"], torch.from_numpy(array[[6, 1, 2], :2]))


def test_a_row_with_nan_is_refused_by_number(tmp_path):
    array = np.zeros((3, WIDTH), dtype=np.float32)
    array[2, 5] = np.nan
    variables = read_layout(write(tmp_path), WIDTH)
    with pytest.raises(ZooError, match=r"row 2 holds NaN.*drop_nonfinite=True"):
        gather(array, [0, 2], variables, drop_nonfinite=False)
