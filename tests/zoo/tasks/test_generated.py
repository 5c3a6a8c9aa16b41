import random

import numpy as np
import pytest
import sklearn.datasets
import torch

from zoo.parts import PARTS, split_task
from zoo.tasks import load_task


def test_digits_are_scikit_learns_images_over_sixteen():
    task = load_task("digits")
    original = sklearn.datasets.load_digits()
    assert task.inputs.shape == (1797, 1, 8, 8)
    assert task.inputs.dtype == torch.float32
    np.testing.assert_array_equal(task.inputs[:, 0].numpy() * 16, original.images)
    np.testing.assert_array_equal(task.targets.numpy(), original.target)
    assert (task.classes, task.test_rows, task.standardise) == (10, None, False)


@pytest.mark.parametrize(
    ("name", "shape", "labels"),
    [
        ("breast-cancer", (569, 30), ("malignant", "benign")),
        ("wine", (178, 13), ("class_0", "class_1", "class_2")),
    ],
)
def test_a_table_holds_what_was_measured(name, shape, labels):
    task = load_task(name)
    original = getattr(sklearn.datasets, f"load_{name.replace('-', '_')}")()
    np.testing.assert_array_equal(task.inputs.numpy(), original.data.astype(np.float32))
    np.testing.assert_array_equal(task.targets.numpy(), original.target)
    assert task.inputs.shape == shape
    assert (task.outputs, task.labels, task.standardise) == (len(labels), labels, True)


def test_diabetes_is_a_regression_on_unscaled_columns():
    task = load_task("diabetes")
    assert task.regression
    assert task.targets.shape == (442, 1)
    assert (task.targets.min(), task.targets.max()) == (25, 346)
    assert set(task.inputs[:, 1].tolist()) == {1, 2}  # sex, as it was written down
    assert task.inputs[0, 0] == 59  # years of age
    assert task.standardise


def test_no_table_repeats_a_row():
    for name in ("breast-cancer", "wine", "diabetes"):
        inputs = load_task(name).inputs
        assert len(inputs.unique(dim=0)) == len(inputs)


def test_mnist_1d_has_the_sizes_of_its_paper():
    task = load_task("mnist-1d")
    assert task.inputs.shape == (5000, 1, 40)
    assert task.test_rows == range(4000, 5000)
    assert task.targets.bincount().tolist() == [500] * 10
    assert (task.classes, task.standardise) == (10, True)
    split = split_task(task, objective=500)
    assert [len(split.rows(part)) for part in PARTS] == [3500, 375, 125, 1000]


def test_mnist_1d_is_hard_for_lines_and_not_for_neighbours():
    # Greydanus and Kobak: logistic regression 32 %, a human 96 %; the classes are there to learn.
    from sklearn.linear_model import LogisticRegression

    task = load_task("mnist-1d")
    signals, targets = task.inputs[:, 0].numpy(), task.targets.numpy()
    line = LogisticRegression(max_iter=200).fit(signals[:4000], targets[:4000])
    assert 0.25 < line.score(signals[4000:], targets[4000:]) < 0.40


def test_mnist_1d_is_the_same_every_time_and_leaves_random_states_alone():
    random.seed(5)
    np.random.seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist()
    digests = {load_task("mnist-1d").digest for _ in range(2)}
    assert len(digests) == 1
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
