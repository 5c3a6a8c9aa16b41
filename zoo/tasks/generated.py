"""Data sets that need no file: those embedded in scikit-learn, MNIST-1D and generated housing."""

from __future__ import annotations

import random

import numpy as np
import torch

from zoo.tasks.housing import GENERATED_HOUSING, generate_housing
from zoo.tasks.task import Task

_TABLES = ("breast-cancer", "wine", "diabetes")
GENERATED = ("digits", *_TABLES, "mnist-1d", GENERATED_HOUSING)


def load_generated(name: str) -> Task:
    """Load one of ``GENERATED``."""
    if name == "digits":
        return _load_digits()
    if name == GENERATED_HOUSING:
        return generate_housing()
    return _load_mnist_1d() if name == "mnist-1d" else _load_table(name)


def _load_digits() -> Task:
    """Load scikit-learn's 1797 digits of 8 x 8 pixels with 17 levels."""
    from sklearn.datasets import load_digits  # a second of import that IDX files do not need

    digits = load_digits()
    inputs = torch.from_numpy(digits.images).float().div_(16).unsqueeze(1)  # [n, 1, 8, 8]
    return Task("digits", inputs, torch.from_numpy(digits.target).long(), classes=10)


def _load_table(name: str) -> Task:
    """Load a table of scikit-learn as it was measured; scikit-learn's own scaling is not taken.

    Args:
        name: "breast-cancer", "wine" or "diabetes".

    Returns:
        569 rows, 30 features and 2 classes; 178 rows, 13 features and 3 classes; or 442 rows,
        10 features and one number to predict.
    """
    from sklearn import datasets

    if name == "diabetes":
        # Scaled by default over all rows, those that a split sets aside for testing included.
        table = datasets.load_diabetes(scaled=False)
        targets = torch.from_numpy(table.target).float().unsqueeze(1)  # [n, 1]
        return Task(
            name, torch.from_numpy(table.data).float(), targets, classes=None, standardise=True
        )
    table = datasets.load_wine() if name == "wine" else datasets.load_breast_cancer()
    labels = tuple(str(label) for label in table.target_names)
    return Task(
        name,
        torch.from_numpy(table.data).float(),
        torch.from_numpy(table.target).long(),
        classes=len(labels),
        standardise=True,
        labels=labels,
    )


def _load_mnist_1d() -> Task:
    """Generate MNIST-1D: ten digits drawn as lines of 40 points, shifted, sheared and noisy.

    Paper: Greydanus and Kobak, "Scaling Down Deep Learning with MNIST-1D", ICML 2024,
    arXiv:2011.14439. The authors' package makes it, at its own sizes and seed. Two things differ:
    the file that the authors published is never fetched, since it is a pickle, and their scaling
    over all rows is followed by the split's own.

    Returns:
        4000 rows for training, then 1000 for testing.
    """
    from mnist1d.data import get_dataset_args, make_dataset

    states = random.getstate(), np.random.get_state()  # the package seeds both generators
    try:
        made = make_dataset(get_dataset_args())
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    signals = np.concatenate([made["x"], made["x_test"]])  # [5000, 40]
    targets = np.concatenate([made["y"], made["y_test"]])  # [5000]
    return Task(
        "mnist-1d",
        torch.from_numpy(signals).float().unsqueeze(1),  # [5000, 1, 40]
        torch.from_numpy(targets).long(),
        classes=10,
        test_rows=range(len(made["x"]), len(signals)),
        standardise=True,
    )
