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


# ---------------------------------------------------------------------------- regressions


def regression(rows=400, *, standardise=False, seed=0, outputs=2):
    """Numbers on scales of their own, the last of them a constant, and skewed targets."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 4, generator=generator) * torch.tensor([1e-3, 1.0, 50.0, 0.0])
    inputs += torch.tensor([0.0, 5.0, -700.0, 0.1])
    targets = torch.randn(rows, outputs, generator=generator).exp() * 30 + 4
    return Task("numbers", inputs, targets, None, standardise=standardise)


def test_every_part_of_a_regression_keeps_the_deciles_of_its_first_output():
    task = regression(1000)
    split = split_task(task)
    first = task.targets[:, 0].double()
    borders = torch.tensor([first.quantile(share / 10) for share in range(1, 10)])
    for part in PARTS:
        counts = torch.bincount(torch.bucketize(first[split.rows(part)], borders), minlength=10)
        # Three cuts follow each other; each rounds a decile by less than one row.
        assert (counts - counts.sum() / 10).abs().max() < 3, part
    rows = torch.cat([split.rows(part) for part in PARTS])
    assert rows.sort().values.tolist() == list(range(1000))


def test_deciles_are_those_of_the_first_output_by_hand():
    """Ten values, ten rows each: a part of one tenth has one of each, wherever they lie."""
    values = torch.arange(10.0).repeat(10).square()
    targets = torch.stack([values, torch.randn(100)], 1)
    split = split_task(Task("squares", torch.zeros(100, 1), targets, None), test=10)
    assert targets[split.test, 0].sort().values.tolist() == torch.arange(10.0).square().tolist()


def test_a_regression_whose_first_output_never_varies_is_split_all_the_same():
    task = Task("constant", torch.rand(40, 2), torch.ones(40, 1), None)
    split = split_task(task, test=10)
    assert [len(split.rows(part)) for part in PARTS] == [22, 6, 2, 10]


def test_images_of_a_regression_are_rows_of_inputs_and_of_outputs():
    task = regression(outputs=3)
    inputs, targets = split_task(task).images("validation")
    assert inputs.shape[1:] == (4,)
    assert targets.shape[1:] == (3,)


# ---------------------------------------------------------------------------- standardised tasks


@pytest.mark.parametrize("task", [regression(standardise=True), load_task("diabetes")], ids=repr)
def test_segments_have_mean_0_and_deviation_1(task):
    split = split_task(task)
    for values in split.images("segments"):
        values = values.double()
        varies = values.amax(0) > values.amin(0)
        # Numbers as large as 700 deviations from 0 lose three of float32's seven digits.
        assert values.mean(0).abs().max() < 1e-4
        assert (values.std(0, correction=0)[varies] - 1).abs().max() < 1e-4
    other = split.images("validation")[0].double()
    assert other.mean(0).abs().max() > 1e-3  # theirs are not their own


def test_standardising_by_hand():
    """Half of the segments hold input 1 and target 0, half 5 and 4: means 3 and 2, deviation 2."""
    inputs = torch.tensor([1.0, 5.0] * 8 + [7.0]).unsqueeze(1)
    targets = torch.tensor([0.0, 4.0] * 8 + [8.0]).unsqueeze(1)
    task = Task("by hand", inputs, targets, None, range(16, 17), standardise=True)
    split = split_task(task, objective=8, validation_share=4)
    assert task.inputs[split.segments].sum() == 2 * 1 + 2 * 5 + 4 * 3  # four of each
    assert split.task.inputs.flatten().tolist() == [-1.0, 1.0] * 8 + [2.0]
    assert split.task.targets.flatten().tolist() == [-1.0, 1.0] * 8 + [3.0]
    told = {name: values.tolist() for name, values in split.scaling.items()}
    assert told == {
        "inputs.mean": [3.0], "inputs.scale": [2.0],
        "targets.mean": [2.0], "targets.scale": [2.0],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["breast-cancer", "wine"])
def test_classes_are_left_as_they_are(name):
    task = load_task(name)
    split = split_task(task)
    assert task.standardise
    assert torch.equal(split.task.targets, task.targets)
    assert split.scaling.keys() == {"inputs.mean", "inputs.scale"}
    assert split.images("segments")[0].mean(0).abs().max() < 1e-4


def test_no_row_but_those_of_the_segments_has_a_say_in_the_scale():
    task = regression(standardise=True)
    split = split_task(task)
    others = torch.cat([split.rows(part) for part in ("objective", "validation", "test")])
    inputs, targets = task.inputs.clone(), task.targets.clone()
    inputs[others] = 1e6 * torch.rand(len(others), 4)
    targets[others, 1] = 1e6  # the first decides about the parts
    again = split_task(replace(task, inputs=inputs, targets=targets))
    for name, values in split.scaling.items():
        assert torch.equal(again.scaling[name], values)
    for one, other in zip(split.images("segments"), again.images("segments"), strict=True):
        assert torch.equal(one, other)
    own = split_task(replace(task, inputs=2 * task.inputs))
    assert not torch.equal(own.scaling["inputs.scale"], split.scaling["inputs.scale"])


@pytest.mark.parametrize("value", [0.1, 1 / 3, -7e5, 0.0])
def test_a_constant_column_is_0_where_it_is_constant_and_finite_where_it_is_not(value):
    task = regression(1011, standardise=True)
    inputs = task.inputs.clone()
    inputs[:, 3] = value
    split = split_task(replace(task, inputs=inputs))
    inputs[split.test, 3] += 2.5
    split = split_task(replace(task, inputs=inputs))
    column = split.task.inputs[:, 3]
    assert (column[split.segments] == 0).all()
    assert split.scaling["inputs.scale"][3] == 1
    torch.testing.assert_close(
        column[split.test], torch.full((len(split.test),), 2.5), atol=0.1, rtol=0
    )


def test_scaling_leads_back_to_the_data():
    task = regression(standardise=True)
    split = split_task(task)
    for name in ("inputs", "targets"):
        scaled, mean, scale = (
            getattr(split.task, name),
            *(split.scaling[f"{name}.{kind}"] for kind in ("mean", "scale")),
        )
        # Rounded to 6e-8 of at most some ten deviations.
        back = scaled.double() * scale + mean
        assert ((back - getattr(task, name).double()).abs() <= 1e-6 * scale).all()
        assert scaled.dtype == torch.float32
        assert {mean.dtype, scale.dtype} == {torch.float64}


def test_a_standardised_task_has_the_digest_of_its_data_and_is_not_standardised_again():
    task = regression(standardise=True)
    split = split_task(task)
    assert not torch.equal(split.task.inputs, task.inputs)
    assert split.task.digest == task.digest == replace(task, standardise=False).digest
    assert not split.task.standardise
    again = split_task(split.task)
    assert again.scaling == {}
    assert torch.equal(again.task.inputs, split.task.inputs)


def test_splitting_leaves_the_task_as_it_was():
    task = regression(standardise=True)
    before = task.inputs.clone(), task.targets.clone()
    split_task(task)
    assert torch.equal(task.inputs, before[0])
    assert torch.equal(task.targets, before[1])


def test_a_task_that_does_not_ask_for_it_is_not_standardised():
    task = regression()
    split = split_task(task)
    assert split.task is task
    assert split.scaling == {}


def test_official_test_rows_of_a_standardised_task_are_scaled_as_all_others():
    task = replace(regression(standardise=True), test_rows=range(300, 400))
    split = split_task(task)
    assert split.test.tolist() == list(range(300, 400))
    mean, scale = split.scaling["inputs.mean"], split.scaling["inputs.scale"]
    expected = (task.inputs[300:].double() - mean) / scale
    torch.testing.assert_close(split.images("test")[0], expected.float())
