import pickle
from dataclasses import replace

import pytest
import torch

from metamerge.errors import ConfigError, ZooError
from zoo.parts import PARTS, TaskSplit, split_task
from zoo.tasks import Task, load_task


def small_task(rows=40, classes=4, test_rows=None):
    inputs = torch.linspace(0, 1, rows).reshape(rows, 1, 1, 1)
    return Task("small", inputs, torch.arange(rows) % classes, classes, test_rows)


def small_parts():
    """Return four parts of 40 rows and 4 classes, 8 rows each."""
    return {part: torch.arange(8) + 8 * place for place, part in enumerate(PARTS)}


# ---------------------------------------------------------------------------- splits of a task


def test_every_row_is_in_exactly_one_part():
    split = split_task(load_task("digits"))
    rows = torch.cat([split.rows(part) for part in PARTS])
    assert rows.sort().values.tolist() == list(range(1797))
    # 1797 / 4 = 449.25; of the other 1348 a quarter is 337, of those a quarter 84.25.
    assert [len(split.rows(part)) for part in PARTS] == [1011, 253, 84, 449]


def test_parts_keep_the_class_frequencies_to_within_one_row():
    task = load_task("digits")
    targets = torch.cat([task.targets, task.targets[task.targets == 7].repeat(5)])
    task = Task("skewed", torch.zeros(len(targets), 1, 1, 1), targets, classes=10)
    split = split_task(task, seed=3, test=0.3)
    share = targets.bincount() / len(targets)
    # Three cuts follow each other; each rounds a class by less than one row.
    for part in PARTS:
        counts = targets[split.rows(part)].bincount(minlength=10)
        assert ((counts - share * counts.sum()).abs() < 3).all(), part
    test_counts = targets[split.test].bincount(minlength=10)
    assert ((test_counts - share * test_counts.sum()).abs() < 1).all()


def test_largest_remainders_decide_who_gets_the_last_rows():
    targets = torch.tensor([0] * 16 + [1] * 16 + [2] * 8)
    task = Task("by hand", torch.zeros(40, 1, 1, 1), targets, classes=3)
    # 9 of 40: quotas 3.6, 3.6, 1.8, so whole rows 3, 3, 1; the two rows left go to class 2, with
    # the largest remainder, and to class 0, the first of the two others.
    split = split_task(task, test=9, objective=0.5, validation_share=0.5)
    assert targets[split.test].bincount().tolist() == [4, 3, 2]


def test_the_same_seed_gives_the_same_split_and_another_seed_another():
    task = load_task("digits")
    one, same, other = split_task(task, seed=1), split_task(task, seed=1), split_task(task, seed=2)
    for part in PARTS:
        assert torch.equal(one.rows(part), same.rows(part))
        assert not torch.equal(one.rows(part), other.rows(part))


def test_splitting_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    split_task(small_task(), objective=0.5, validation_share=0.5)
    assert torch.equal(before, torch.get_rng_state())


def test_whole_numbers_are_numbers_of_rows():
    split = split_task(load_task("digits"), objective=400, validation_share=100, test=300)
    assert [len(split.rows(part)) for part in PARTS] == [1097, 300, 100, 300]


def test_official_test_rows_are_the_test_part_and_nothing_else():
    split = split_task(small_task(100, test_rows=range(10, 22)), test=0.5)
    assert split.test.tolist() == list(range(10, 22))
    trained_on = torch.cat([split.segments, split.objective, split.validation])
    assert trained_on.sort().values.tolist() == [*range(10), *range(22, 100)]


@pytest.mark.parametrize("option", ["objective", "validation_share", "test"])
@pytest.mark.parametrize("amount", [0, 0.0, 1.0, -3, 1.5, float("nan"), True, "0.5", None, 4000])
def test_an_amount_that_makes_no_sense_is_refused(option, amount):
    with pytest.raises(ConfigError, match=f"split_task: {option}"):
        split_task(small_task(), **{option: amount})


def test_a_part_too_small_for_all_classes_is_refused():
    with pytest.raises(ZooError, match="'validation' has 2 rows, but none of class 2, 3"):
        split_task(small_task(), validation_share=2)


def test_overlapping_parts_are_refused_with_their_names_and_number_of_rows():
    parts = small_parts()
    parts["test"] = torch.cat([parts["test"], parts["objective"][:3]])
    with pytest.raises(ZooError, match="'objective' and 'test' share 3 rows"):
        TaskSplit(small_task(), **parts)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.arange(0), "is empty"),
        (torch.arange(32.0, 40.0), "must be int64 row numbers"),
        (torch.arange(32, 40).reshape(2, 4), "must be int64 row numbers"),
        (torch.arange(33, 41), "names rows 33 to 40, the task has rows 0 to 39"),
        (torch.arange(-1, 7), "names rows -1 to 6"),
        (torch.tensor([32, 33, 34, 35, 32]), "names 1 rows more than once"),
        (torch.tensor([32, 33, 35]), "none of class 2"),
    ],
)
def test_a_malformed_part_is_refused_by_name(part, rows, message):
    with pytest.raises(ZooError, match=f"'{part}' .*{message}|'{part}' {message}"):
        TaskSplit(small_task(), **{**small_parts(), part: rows})


def test_official_test_rows_cannot_be_moved_to_another_part():
    parts = small_parts()
    TaskSplit(small_task(test_rows=range(24, 40)), **parts)
    with pytest.raises(ZooError, match="'validation' has 2 rows that are official test rows"):
        TaskSplit(small_task(test_rows=range(22, 40)), **parts)
    with pytest.raises(ZooError, match="'test' has 1 rows that are not official test rows"):
        TaskSplit(small_task(test_rows=range(25, 40)), **parts)


def test_images_are_the_rows_of_their_part():
    split = TaskSplit(small_task(), **small_parts())
    for part in PARTS:
        inputs, targets = split.images(part)
        assert torch.equal(inputs, split.task.inputs[split.rows(part)])
        assert torch.equal(targets, split.task.targets[split.rows(part)])


def test_changing_images_does_not_change_the_task():
    split = TaskSplit(small_task(), **small_parts())
    digest = split.task.digest
    for tensor in split.images("segments"):
        tensor.zero_()
    assert replace(split.task).digest == digest


def test_an_unknown_part_is_refused_with_the_nearest_name():
    split = TaskSplit(small_task(), **small_parts())
    with pytest.raises(ConfigError, match="'tests', did you mean 'test'"):
        split.images("tests")
    with pytest.raises(ConfigError, match="no part 'task'"):
        split.rows("task")


def test_test_images_are_refused_inside_training_only():
    split = TaskSplit(small_task(), **small_parts())
    with split.training():
        for part in ("segments", "objective", "validation"):
            split.images(part)
        with split.training():
            pass
        with pytest.raises(ZooError, match="inside `with split"):
            split.images("test")
    assert len(split.images("test")[0]) == 8


def test_training_that_fails_gives_the_test_images_back():
    split = TaskSplit(small_task(), **small_parts())
    with pytest.raises(KeyboardInterrupt), split.training():
        raise KeyboardInterrupt
    assert len(split.images("test")[0]) == 8


def test_a_copy_sent_to_a_worker_while_training_refuses_too():
    split = TaskSplit(small_task(), **small_parts())
    with split.training():
        copy = pickle.loads(pickle.dumps(split))
    with pytest.raises(ZooError, match="inside"):
        copy.images("test")
