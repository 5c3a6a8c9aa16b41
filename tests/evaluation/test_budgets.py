"""Budgets: few images out of many, drawn fairly."""

import pytest
import torch

from evaluation.budgets import Budget


@pytest.fixture
def budget():
    """80 images, which are their own numbers; of classes 0 to 3, and of class 4 only three."""
    inputs, targets = torch.arange(80.0), torch.arange(80) % 4
    targets[[1, 40, 70]] = 4
    return Budget((inputs[:60], targets[:60]), (inputs[60:], targets[60:]), ("frozen",))


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("count", [4, 20, 79])
def test_few_images_are_different_ones_of_the_budget(budget, count, stratified):
    few = budget.few(count, stratified=stratified)
    inputs, targets = few.everything
    assert len(few) == len(inputs.unique()) == count
    assert torch.equal(budget.everything[1][inputs.long()], targets)
    assert len(few.validation[1]) == max(1, count // 4)
    assert few.frozen == ("frozen",)


def test_a_stratified_draw_has_as_many_of_every_class_in_both_parts(budget):
    few = budget.few(60, stratified=True)
    counts = few.everything[1].bincount(minlength=5)
    assert counts[4] == 3  # there are no more
    assert int(counts[:4].max() - counts[:4].min()) <= 1
    chosen_by = few.validation[1].bincount(minlength=4)[:4]
    assert int(chosen_by.max() - chosen_by.min()) <= 1


def test_smaller_draws_are_parts_of_larger_ones(budget):
    for stratified in (False, True):
        draws = [budget.few(n, stratified=stratified, seed=3).everything[0] for n in (10, 30)]
        assert torch.isin(draws[0], draws[1]).all()


def test_the_seed_decides_which_images_are_drawn(budget):
    one, same, other = (
        budget.few(20, stratified=True, seed=s).everything[0].tolist() for s in (0, 0, 1)
    )
    assert one == same
    assert one != other


def test_more_images_than_there_are_is_all_of_them(budget):
    assert budget.few(80, stratified=True) is budget
    assert budget.few(500, stratified=False) is budget
