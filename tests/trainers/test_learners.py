"""Members in training: one round of it, with and without a leash."""

from dataclasses import replace

import pytest
import torch

from trainers.learners import CHECKED, Learners, Stint, distances, work
from zoo.adam import Moments
from zoo.augmentation import Augmentation
from zoo.training import init_networks

STINT = Stint(number=0, epochs=3.0, lr=0.01, last_lr=0.005)


@pytest.fixture(scope="module")
def learners(digits_zoo):
    task = digits_zoo.split.task
    return Learners(
        program=digits_zoo.layout.program,
        inputs=task.inputs,
        targets=task.targets,
        rows=digits_zoo.segments[:3],
        seeds=[1, 2, 3],
        augmentation=Augmentation(),
        settings={"batch_size": 20},
    )


@pytest.fixture(scope="module")
def start(digits_zoo):
    return init_networks(digits_zoo.network, [5, 6, 7])


def furthest(found, expected):
    return max(float((found[key] - expected[key]).abs().max()) for key in expected)


def test_distances_by_hand():
    """3, 4 is of norm 5; 0.6, 0.8 further is a distance of 1. Statistics do not count."""
    start = {"w": torch.tensor([[3.0, 4.0]]), "n.running_mean": torch.tensor([[9.0]])}
    now = {"w": torch.tensor([[3.6, 4.8]]), "n.running_mean": torch.tensor([[0.0]])}
    assert float(distances(now, start)) == pytest.approx(0.2, abs=1e-7)


def test_members_do_not_know_of_each_other(learners, start):
    """Sums in another order: a few units in the last place, over thirty steps."""
    together = work(learners, start, None, STINT)
    for k in range(3):
        alone = work(
            learners.only([k]), {key: t[k : k + 1] for key, t in start.items()}, None, STINT
        )
        assert (
            furthest(alone.weights, {key: t[k : k + 1] for key, t in together.weights.items()})
            < 1e-4
        )
    assert together.images.tolist() == [600, 600, 600]


def test_every_round_has_an_order_and_a_chance_of_its_own(learners, start):
    flipping = replace(learners, augmentation=Augmentation(flip=True))
    found = [
        work(own, start, None, replace(STINT, number=number)).weights
        for own in (learners, flipping)
        for number in (0, 1)
    ]
    pairs = [(0, 1), (0, 2), (2, 3)]
    assert all(furthest(found[one], found[other]) > 1e-3 for one, other in pairs)
    again = work(flipping, start, None, STINT).weights
    assert furthest(again, found[2]) == 0


def test_a_leash_ends_a_members_round(learners, start):
    """With a constant rate nothing but the leash differs; it is looked at every ten steps."""
    free = replace(STINT, last_lr=STINT.lr, divergence=1e9)
    whole = work(learners, start, None, free)
    assert whole.images.tolist() == [600, 600, 600]
    gone = distances(whole.weights, start)
    held = work(learners, start, None, replace(free, divergence=0.7 * float(gone.min())))
    assert (held.images < whole.images).all()
    assert (held.images % (20 * CHECKED) == 0).all()
    assert (distances(held.weights, start) > 0.7 * float(gone.min())).all()
    assert (distances(held.weights, start) < gone).all()
    assert held.moments.steps.tolist() == (held.images // 20).tolist()


def test_a_long_leash_changes_no_more_than_the_order_of_rows(learners, start):
    """Members stop one by one, and those at work do not notice."""
    free = replace(STINT, last_lr=STINT.lr, divergence=1e9)
    gone = distances(work(learners, start, None, free).weights, start).sort()
    middle = float(gone.values[0] + gone.values[1]) / 2  # one stays below, two may go beyond
    held = work(learners, start, None, replace(free, divergence=middle))
    last = int(gone.indices[0])
    whole = work(learners, start, None, free)
    assert held.images[last] == whole.images[last]
    assert furthest(
        {k: t[last] for k, t in held.weights.items()},
        {k: t[last] for k, t in whole.weights.items()},
    ) < 1e-4  # fmt: skip


def test_moments_are_taken_up(learners, start):
    first = work(learners, start, None, STINT)
    kept = work(learners, first.weights, first.moments, STINT)
    anew = work(learners, first.weights, None, STINT)
    assert kept.moments.steps.tolist() == [60, 60, 60]
    assert anew.moments.steps.tolist() == [30, 30, 30]
    assert furthest(kept.weights, anew.weights) > 1e-3


def test_the_union_holds_every_image_once(learners):
    shared = replace(learners, rows=[torch.tensor([4, 2]), torch.tensor([2, 9])])
    (rows,) = shared.together(seed=8).rows
    assert rows.tolist() == [2, 4, 9]


def test_a_process_without_members_makes_nothing(learners, start):
    none = {key: tensor[:0] for key, tensor in start.items()}
    found = work(learners.only([]), none, None, STINT)
    assert found.images.tolist() == []
    assert isinstance(found.moments, Moments)
    assert found.weights["1.weight"].shape == (0, 32, 64)
