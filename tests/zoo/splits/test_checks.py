import pytest
import torch

from metamerge.errors import ConfigError, ZooError
from zoo.splits import describe, validate


def test_describe_counts_classes_per_member():
    targets = torch.tensor([0, 0, 1, 2, 2, 2])
    segments = [torch.tensor([0, 1, 5]), torch.tensor([2]), torch.tensor([], dtype=torch.int64)]
    assert describe(segments, targets, 4).tolist() == [[2, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_describe_refuses_a_class_that_the_task_does_not_have():
    with pytest.raises(ZooError, match=r"segments\[1\] has classes 0 to 2, expected \[0, 2\)"):
        describe([torch.tensor([0]), torch.tensor([0, 1])], torch.tensor([0, 2]), 2)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "there are no segments"),
        ([[3, 5], []], r"segments\[1\]: expected .* at least one"),
        ([[3, 5], [4, 7]], r"segments\[1\]: 1 rows .* the first is 4"),
        ([[3, 5], [9, 10]], r"segments\[1\]: 1 rows .* the first is 10"),
        ([[-1, 5]], r"segments\[0\]: 1 rows .* the first is -1"),
        ([[3, 5, 3]], r"segments\[0\]: 1 rows are in it more than once"),
        ([[3], [5], [7, 5, 3]], r"segments\[2\]: 2 rows .* first in segments\[1\]"),
    ],
)
def test_a_dishonest_cut_is_refused(segments, message):
    rows = torch.tensor([3, 5, 7, 9])
    with pytest.raises(ZooError, match=message):
        validate([torch.tensor(s, dtype=torch.int64) for s in segments], rows)


def test_segments_of_another_type_are_refused():
    with pytest.raises(ZooError, match=r"segments\[0\]: expected int64 .* got torch.float32"):
        validate([torch.tensor([1.0])], torch.arange(3))


def test_shared_rows_pass_only_when_allowed():
    segments = [torch.tensor([0, 1]), torch.tensor([1, 2])]
    validate(segments, torch.arange(3), disjoint=False)
    with pytest.raises(ZooError, match=r"segments\[1\]: 1 rows are also in other segments"):
        validate(segments, torch.arange(3))
    with pytest.raises(ZooError, match="more than once"):
        validate([torch.tensor([1, 1])], torch.arange(3), disjoint=False)


def test_a_class_of_the_rows_that_no_segment_has_is_refused_where_asked_for():
    targets = torch.tensor([0, 1, 2, 2, 7])
    rows = torch.arange(4)  # class 7 is not among them
    validate([torch.tensor([0]), torch.tensor([1, 2])], rows, every_class=True, targets=targets)
    segments = [torch.tensor([0]), torch.tensor([2, 3])]
    validate(segments, rows)
    with pytest.raises(ZooError, match=r"no segment has rows of class 1; the rows .* 3 classes"):
        validate(segments, rows, every_class=True, targets=targets)


def test_every_class_needs_the_classes():
    segments, rows = [torch.tensor([0])], torch.arange(1)
    with pytest.raises(ConfigError, match="every_class=True needs targets="):
        validate(segments, rows, every_class=True)
    with pytest.raises(ConfigError, match="validate: needs classes"):
        validate(segments, rows, every_class=True, targets=torch.zeros(1, 2))


def test_describe_refuses_the_targets_of_a_regression():
    with pytest.raises(ConfigError, match="describe: needs classes"):
        describe([torch.tensor([0])], torch.zeros(3, 2), 2)
