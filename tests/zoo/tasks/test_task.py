import hashlib
from dataclasses import replace

import pytest
import torch

from metamerge.errors import ZooError
from zoo.tasks import Task


def small_task(rows=40, classes=4):
    inputs = torch.linspace(0, 1, rows * 4).reshape(rows, 1, 2, 2)
    return Task("small", inputs, torch.arange(rows) % classes, classes)


def small_regression(rows=40, outputs=2):
    inputs = torch.linspace(-9, 9, rows * 3).reshape(rows, 3)
    targets = torch.linspace(-1, 1, rows * outputs).reshape(rows, outputs)
    return Task("lines", inputs, targets, classes=None, standardise=True)


def test_a_classification_has_one_output_per_class():
    assert (small_task().regression, small_task().outputs) == (False, 4)


def test_a_regression_has_one_output_per_number():
    assert (small_regression().regression, small_regression().outputs) == (True, 2)


def test_digest_is_the_hash_of_inputs_and_targets():
    for task in (small_task(), small_regression()):
        content = task.inputs.numpy().tobytes() + task.targets.numpy().tobytes()
        assert task.digest == hashlib.sha256(content).hexdigest()


def test_digest_sees_one_pixel_and_one_label():
    task = small_task()
    inputs, targets = task.inputs.clone(), task.targets.clone()
    inputs[3] = 0
    targets[3] = 0
    digests = {
        task.digest,
        replace(task, inputs=inputs).digest,
        replace(task, targets=targets).digest,
    }
    assert len(digests) == 3


def test_digest_does_not_depend_on_the_memory_layout():
    task = small_task()
    other = replace(task, inputs=task.inputs.mT.contiguous().mT)
    assert not other.inputs.is_contiguous()
    assert other.digest == task.digest


@pytest.mark.parametrize("shape", [(40, 3), (40, 1, 12)])
def test_tables_and_signals_may_leave_the_unit_interval(shape):
    inputs = torch.full(shape, -300.0)
    assert replace(small_task(), inputs=inputs).inputs.shape == shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(40, 1, 1, 1, dtype=torch.float64)}, "inputs must be float32"),
        ({"inputs": torch.zeros(40)}, "inputs must be float32"),
        ({"inputs": torch.zeros(40, 1, 1, 1, 1)}, "inputs must be float32"),
        ({"inputs": torch.full((40, 1, 1, 1), 255.0)}, r"must lie in \[0, 1\], got 255 to 255"),
        ({"inputs": torch.full((40, 1, 1, 1), torch.nan)}, "got nan"),
        ({"inputs": torch.full((40, 3), torch.nan)}, "must be finite, got nan"),
        ({"inputs": torch.full((40, 1, 3), torch.inf)}, "must be finite, got inf"),
        ({"inputs": torch.zeros(40, 1, 0, 1)}, "nothing in it"),
        ({"targets": torch.zeros(39, dtype=torch.int64)}, r"targets must be int64 \[40\]"),
        ({"targets": torch.zeros(40)}, r"targets must be int64 \[40\]"),
        ({"targets": torch.full((40,), 4)}, r"must lie in \[0, 4\), got 4 to 4"),
        ({"targets": torch.full((40,), -1)}, "got -1 to -1"),
        ({"labels": ("a", "b")}, "must name each of 4 classes, got 2: a, b"),
        ({"test_rows": range(30, 41)}, "do not lie within 40 rows"),
        ({"test_rows": range(30, 30)}, "do not lie within 40 rows"),
        ({"test_rows": range(0, 40, 2)}, "do not lie within 40 rows"),
    ],
)
def test_a_classification_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(ZooError, match=message):
        replace(small_task(), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(40, dtype=torch.int64)}, r"must be float32 \[40, outputs\]"),
        ({"targets": torch.zeros(40)}, r"must be float32 \[40, outputs\]"),
        ({"targets": torch.zeros(39, 1)}, r"must be float32 \[40, outputs\]"),
        ({"targets": torch.zeros(40, 0)}, "at least one per row"),
        ({"targets": torch.full((40, 1), torch.nan)}, r"must be finite .* with 40 others"),
        ({"labels": ("a",)}, "must name each of None classes"),
    ],
)
def test_a_regression_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(ZooError, match=message):
        replace(small_regression(), **change)
