import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from metamerge.calibration import collect, losses
from metamerge.errors import ConfigError, IncompatibleWeights

X = torch.arange(12.0).reshape(6, 2)
Y = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    "batches",
    [
        (X, Y),
        [(X, Y)],
        [(X[:4], Y[:4]), (X[4:], Y[4:])],
        DataLoader(TensorDataset(X, Y), batch_size=4),
        ([x, y] for x, y in zip(X.split(1), Y.split(1), strict=True)),
        (X.double(), Y.to(torch.uint8)),
    ],
    ids=["pair", "list of a pair", "list", "loader", "generator", "other dtypes"],
)
def test_labelled_batches_are_joined(batches):
    inputs, labels = collect(batches, labelled=True)
    assert torch.equal(inputs, X)
    assert inputs.dtype == torch.float32
    assert torch.equal(labels, Y)
    assert labels.dtype == torch.int64


@pytest.mark.parametrize("batches", [X, [X], [X[:4], X[4:]], X.split(2)], ids=len)
def test_inputs_without_labels_are_joined(batches):
    inputs, labels = collect(batches, labelled=False)
    assert torch.equal(inputs, X)
    assert labels is None


def test_labels_come_along_where_they_are_not_needed():
    assert torch.equal(collect((X, Y), labelled=False)[1], Y)


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        ([], "batches holds no inputs"),
        (X[:0], "batches holds no inputs"),
        (5, "batches is a int"),
        (None, "batches is a NoneType"),
        ("images", r"batches\[0\] is a str"),
        (X.numpy(), r"batches\[0\] is a ndarray"),
        ({"x": X}, r"batches\[0\] is a str"),
        ([X, (X, Y, Y)], r"batches\[1\] is a tuple"),
        (X[:, 0], r"shape \(6,\)"),
        (Y[:, None], "dtype torch.int64"),
        ([X, X[:, :1]], r"batches\[1\]: inputs have shape \(6, 1\)"),
        (X.where(X != 3, torch.nan), "hold 1 values of 12"),
        ([X, X / 0], r"batches\[1\]: inputs hold 12 values of 12"),
        ((X, X), r"labels have shape \(6, 2\)"),
        ((X, Y[:5]), r"shape \(5,\) .* expected \(6,\)"),
        ((X, Y.float()), "dtype torch.float32"),
        ((X, Y > 0), "dtype torch.bool"),
        ((X, Y - 1), "labels hold -1"),
        ([(X, Y), X], r"batches\[1\] has no labels, batches\[0\] has"),
        ([X, (X, Y)], r"batches\[0\] has no labels, batches\[1\] has"),
    ],
)
def test_what_makes_no_sense_is_refused(batches, told):
    with pytest.raises(ConfigError, match=told):
        collect(batches, labelled=False)


@pytest.mark.parametrize(
    ("batches", "told"),
    [(X, "batches has no labels"), ([(X, Y), X], r"batches\[1\] has no labels")],
)
def test_missing_labels_are_refused_where_they_are_needed(batches, told):
    with pytest.raises(ConfigError, match=told):
        collect(batches, labelled=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_numbers_to_put_out_stand_where_labels_do(dtype):
    targets = (X - 3).to(dtype)
    inputs, found = collect(
        [(X[:4], targets[:4]), (X[4:], targets[4:])], labelled=True, numbers=True
    )
    assert torch.equal(inputs, X)
    assert torch.equal(found, targets)
    assert found.dtype == dtype


def test_one_number_per_input_is_a_column():
    assert torch.equal(collect((X, X[:, 0]), labelled=True, numbers=True)[1], X[:, :1])


def test_numbers_are_not_needed_where_nobody_says_so():
    assert collect(X, labelled=False, numbers=True)[1] is None


@pytest.mark.parametrize(
    ("batches", "told"),
    [
        (X, "batches has no targets. Pass pairs"),
        ([(X, X), X], r"batches\[1\] has no targets"),
        ((X, X[:5]), r"targets have shape \(5, 2\), expected \(6, outputs\)"),
        ((X, X[0, 0]), r"targets have shape \(\), expected"),
        ([(X, X), (X, X[:, 0])], r"shapes \(6, 2\), \(6, 1\)"),
    ],
)
def test_numbers_that_do_not_fit_the_inputs_are_refused(batches, told):
    with pytest.raises(ConfigError, match=told):
        collect(batches, labelled=True, numbers=True)


def test_the_loss_of_two_numbers(scalar_layout, scalar_members):
    inputs, labels = torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1])
    # log(1 + e^-a) and log(1 + e^2a), for a = 0 and a = 1
    expected = torch.tensor([[0.0, 0.0], [-1.0, 2.0]]).double().exp().log1p().mean(1)
    found = losses(scalar_members(0, 1), scalar_layout, inputs, labels)
    assert torch.allclose(found, expected, atol=1e-6)


def test_losses_of_half_precision_members_are_computed_in_float32(scalar_layout, scalar_members):
    halves = [{"0.weight": m["0.weight"].half()} for m in scalar_members(0, 1)]
    labels = torch.tensor([0])
    found = losses(halves, scalar_layout, torch.ones(1, 1), labels)
    expected = losses(scalar_members(0, 1), scalar_layout, torch.ones(1, 1), labels)
    assert torch.equal(found, expected)


def test_an_output_that_is_no_logits_is_refused(image_layout):
    layout, members = image_layout
    with pytest.raises(IncompatibleWeights, match="expected logits"):
        losses(members, layout, torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]))
