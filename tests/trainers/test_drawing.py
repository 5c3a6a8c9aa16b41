"""What a merger sees in one step, and that it follows from seed and step alone."""

from dataclasses import fields, replace

import pytest
import torch

from metamerge.mergers import ThresholdObjective
from metamerge.structure import run
from trainers.drawing import Drawing, draw, draw_step
from trainers.families import thresholds_of
from zoo.variants import Variants

PLAIN = Drawing(
    families=6, groups=1, images=50, noise=0.0, drop=0.0, garbage=0.0, calibrated=0.0, labels=True
)
EVERYTHING = replace(PLAIN, noise=0.5, drop=0.5, garbage=0.5, calibrated=0.5)
OBJECTIVE = ThresholdObjective("ensemble", 0.01)
FIRST = "1.weight"


@pytest.fixture(scope="module")
def group(make_families):
    return make_families()


@pytest.fixture(scope="module")
def groups(make_families):
    return [make_families(members, f"k{members}") for members in (2, 3, 4)]


def one(group, drawing, step=0, seed=0, **more):
    return draw(step, seed, [group], drawing, OBJECTIVE, **more)


def tensors(batch):
    """All tensors of a step by name."""
    found = {f"members.{key}": tensor for key, tensor in batch.members.items()}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            found[field.name] = value
    return found


def equal(one, other):
    one, other = tensors(one), tensors(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def origin(batch, group):
    """Which families and members of the group those of a step are, ``[f, m]`` each; -1 for none."""
    drawn, known = batch.members[FIRST].flatten(2), group.weights[FIRST].flatten(2)
    same = (drawn[:, :, None, None] == known).all(-1)  # [f, m, families, members]
    place = same.flatten(2).float().argmax(-1)
    place[~same.flatten(2).any(-1)] = -1
    return place.div(group.members, rounding_mode="floor"), place % group.members


def places(batch, group):
    """Which images of the group those of a step are, ``[b]``."""
    same = (batch.inputs.flatten(1)[:, None] == group.images[0].flatten(1)).all(-1)
    assert same.any(1).all()
    return same.float().argmax(1)


# ---------------------------------------------------------------------------- repetition


def test_a_step_follows_from_seed_and_number_alone(groups):
    for step in range(12):
        first, again = (draw(step, 7, groups, EVERYTHING, OBJECTIVE) for _ in range(2))
        assert equal(first, again)
        torch.manual_seed(step)
        torch.rand(3)
        assert equal(first, draw(step, 7, groups, EVERYTHING, OBJECTIVE))


def test_another_step_or_seed_is_another_draw(group):
    first = one(group, EVERYTHING)
    assert not equal(first, one(group, EVERYTHING, step=1))
    assert not equal(first, one(group, EVERYTHING, seed=1))


def test_drawing_leaves_the_callers_random_numbers_alone(group):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one(group, replace(EVERYTHING, garbage=1.0))
    assert torch.equal(torch.rand(3), expected)


def test_groups_take_turns_in_random_order(groups):
    sizes = [draw(step, 0, groups, PLAIN, OBJECTIVE).answers.shape[1] for step in range(3 * 20)]
    rounds = [tuple(sizes[i : i + 3]) for i in range(0, len(sizes), 3)]
    assert {tuple(sorted(turn)) for turn in rounds} == {(2, 3, 4)}
    assert len(set(rounds)) > 3


def test_a_step_of_one_group_is_the_draw_of_its_number(groups):
    for step in range(4):
        (batch,) = draw_step(step, 0, groups, EVERYTHING, OBJECTIVE)
        assert equal(batch, draw(step, 0, groups, EVERYTHING, OBJECTIVE))


@pytest.mark.parametrize("together", [2, 3, 8])
def test_groups_that_share_a_step_share_its_families(groups, together):
    """6 families are shared out among 2 or 3 groups; there are no more than 3."""
    drawing = replace(PLAIN, groups=together)
    seen = []
    for step in range(6):
        batches = draw_step(step, 0, groups, drawing, OBJECTIVE)
        assert sum(len(batch.answers) for batch in batches) == 6
        seen += [batch.answers.shape[1] for batch in batches]
    for start in range(0, len(seen) - 2, 3):  # nobody comes twice before all others came once
        assert sorted(seen[start : start + 3]) == [2, 3, 4]


# ---------------------------------------------------------------------------- processes


@pytest.mark.parametrize("drawing", [PLAIN, replace(EVERYTHING, garbage=0.0)])
@pytest.mark.parametrize("world", [2, 4])
def test_shares_of_all_processes_make_up_the_step(group, drawing, world):
    for step in range(6):
        whole = tensors(one(group, drawing, step))
        shares = [tensors(one(group, drawing, step, share=(i, world))) for i in range(world)]
        for i, share in enumerate(shares):
            assert share.keys() == whole.keys()
            for key, tensor in share.items():
                common = key in ("inputs", "watched")
                assert torch.equal(tensor, whole[key] if common else whole[key][i::world]), key


def test_garbage_is_in_every_share_or_in_none_and_all_watch_the_same(group):
    drawing = replace(EVERYTHING, families=5, garbage=0.5, calibrated=1.0)  # shares of 3 and 2
    spoiled = []
    for step in range(12):
        shares = [one(group, drawing, step, share=(i, 2)) for i in range(2)]
        assert torch.equal(shares[0].watched, shares[1].watched)
        found = [(origin(share, group)[0] < 0).any(1) for share in shares]
        assert len({bool(some) for own in found for some in own}) == 1
        spoiled.append(bool(found[0][0]))
    assert 0 < sum(spoiled) < 12


# ---------------------------------------------------------------------------- what is drawn


def test_families_come_once_with_all_their_members(group):
    batch = one(group, PLAIN)
    families, members = origin(batch, group)
    assert (families == families[:, :1]).all()
    assert len(set(families[:, 0].tolist())) == 6
    assert (members.sort(-1).values == torch.arange(4)).all()
    assert len({tuple(own) for own in members.tolist()}) > 1  # in an order of their own


def test_images_come_once_with_their_classes_and_what_members_say(group):
    batch = one(group, PLAIN)
    families, members = origin(batch, group)
    images = places(batch, group)
    assert len(set(images.tolist())) == 50
    assert torch.equal(batch.targets, group.images[1][images].expand(6, -1))
    said = group.answers[families, members][:, :, images].float()
    assert torch.equal(batch.answers, said)
    assert torch.equal(batch.thresholds, thresholds_of(said, batch.targets, OBJECTIVE))
    assert batch.watched is None
    assert batch.layout is group.layout


def test_more_than_there_is_is_all_there_is(group):
    batch = one(group, replace(PLAIN, families=100, images=10_000))
    assert batch.targets.shape == (36, len(group.images[0]))


def test_the_targets_of_a_relabelled_family_are_its_own(make_families, renamed_classes):
    group = make_families(variants=Variants(renamed_classes))
    batch = one(group, PLAIN)
    families, images = origin(batch, group)[0][:, 0], places(batch, group)
    known = group.images[1][images]
    for family, targets in zip(families, batch.targets, strict=True):
        assert torch.equal(targets, renamed_classes[family][known])
    assert torch.equal(batch.thresholds, thresholds_of(batch.answers, batch.targets, OBJECTIVE))


def test_noise_stays_in_the_range_of_the_images(group):
    clean, noisy = one(group, PLAIN), one(group, replace(PLAIN, noise=0.5))
    assert not torch.equal(clean.inputs, noisy.inputs)
    low, high = group.images[0].aminmax()
    assert low <= noisy.inputs.min()
    assert noisy.inputs.max() <= high
    inside = (noisy.inputs > low) & (noisy.inputs < high) & (clean.inputs > low)
    moved = (noisy.inputs - clean.inputs)[inside & (clean.inputs < high)]
    assert float(moved.std()) == pytest.approx(0.5 * float(group.images[0].std()), rel=0.4)
    assert torch.equal(clean.targets, noisy.targets)
    assert torch.equal(clean.answers, noisy.answers)  # what they say of the images as they are


# ---------------------------------------------------------------------------- fewer members


def test_dropped_members_leave_at_least_two(group):
    sizes = []
    for step in range(20):
        batch = one(group, replace(PLAIN, drop=1.0), step)
        families, members = origin(batch, group)
        sizes.append(members.shape[1])
        assert (families == families[:, :1]).all()
        assert all(len(set(own)) == len(own) for own in members.tolist())
        said = group.answers[families, members][:, :, places(batch, group)].float()
        assert torch.equal(batch.answers, said)
        assert torch.equal(batch.thresholds, thresholds_of(said, batch.targets, OBJECTIVE))
    assert set(sizes) == {2, 3}


def test_two_members_are_never_fewer(groups):
    for step in range(10):
        assert one(groups[0], replace(PLAIN, drop=1.0), step).answers.shape[1] == 2


def test_a_share_of_the_steps_has_fewer_members(group):
    dropped = [
        one(group, replace(PLAIN, drop=0.25), step).answers.shape[1] < 4 for step in range(200)
    ]
    # The standard deviation of 200 coins of one in four is 6.1.
    assert abs(sum(dropped) - 50) < 4 * 6.2


# ---------------------------------------------------------------------------- garbage


def test_a_garbage_member_is_noise_of_the_size_of_a_member(group):
    batch = one(group, replace(PLAIN, garbage=1.0))
    families, members = origin(batch, group)
    assert (families[:, 0] == -1).all()
    assert (families[:, 1:] == families[:, 1:2]).all()
    assert all(len(set(own)) == 3 for own in members[:, 1:].tolist())
    for key, tensor in batch.members.items():
        sizes = tensor.square().mean(tuple(range(2, tensor.ndim))).sqrt()
        assert (sizes[:, 0] > 0.3 * sizes[:, 1:].mean(1)).all(), key
        assert (sizes[:, 0] < 3 * sizes[:, 1:].mean(1)).all(), key


def test_a_garbage_member_says_what_its_weights_say(group):
    batch = one(group, replace(PLAIN, garbage=1.0, noise=0.0))
    alone = {key: tensor[:, 0] for key, tensor in batch.members.items()}
    said = run(group.layout.program, alone, [batch.inputs], stacked=True)
    assert torch.allclose(batch.answers[:, 0], said, atol=1e-5)


@pytest.mark.parametrize("labels", [True, False])
def test_a_garbage_member_has_no_say_in_what_is_asked_for(group, labels):
    for step in range(5):
        batch = one(group, replace(PLAIN, garbage=1.0, drop=0.5, labels=labels), step)
        honest = batch.answers[:, 1:]
        targets = batch.targets
        if not labels:
            assert torch.equal(targets, honest.softmax(-1).mean(1))
            targets = targets.argmax(-1)
        assert torch.equal(batch.thresholds, thresholds_of(honest, targets, OBJECTIVE))
        whole = thresholds_of(batch.answers, targets, OBJECTIVE)
        assert not torch.equal(batch.thresholds, whole)


def test_the_zoo_is_not_spoiled(group):
    before = {key: tensor.clone() for key, tensor in group.weights.items()}
    said = group.answers.clone()
    one(group, replace(EVERYTHING, garbage=1.0))
    assert all(torch.equal(group.weights[key], tensor) for key, tensor in before.items())
    assert torch.equal(group.answers, said)


# ---------------------------------------------------------------------------- without labels


def test_without_labels_the_soft_vote_is_imitated(group):
    batch = one(group, replace(PLAIN, labels=False))
    assert torch.equal(batch.targets, batch.answers.softmax(-1).mean(1))
    # To agree with the soft vote everywhere is what the ensemble does: nothing is above that.
    assert batch.thresholds.tolist() == [1.0] * 6


def test_without_labels_classes_have_no_say(make_families, renamed_classes):
    drawing = replace(EVERYTHING, labels=False)
    plain = one(make_families(), drawing)
    assert equal(plain, one(make_families(variants=Variants(renamed_classes)), drawing))


# ---------------------------------------------------------------------------- calibrated steps


def test_calibrated_steps_watch_objective_images_without_noise(group):
    counts = set()
    for step in range(10):
        batch = one(group, replace(PLAIN, calibrated=1.0, noise=0.5), step)
        same = (batch.watched.flatten(1)[:, None] == group.images[0].flatten(1)).all(-1)
        assert same.any(1).all()
        assert len(set(same.float().argmax(1).tolist())) == len(batch.watched)
        counts.add(len(batch.watched))
    assert min(counts) >= 64
    assert max(counts) <= len(group.images[0])
    assert len(counts) > 3


def test_images_that_are_judged_by_are_not_those_that_are_watched_while_there_are_others(group):
    apart = []
    for step in range(10):
        batch = one(group, replace(PLAIN, calibrated=1.0, images=20), step)
        same = (batch.inputs.flatten(1)[:, None] == batch.watched.flatten(1)).all(-1)
        if len(batch.watched) + 20 <= len(group.images[0]):
            apart.append(not same.any())
    assert len(apart) > 2
    assert all(apart)
