"""Watching: which probes are strange to members, what stands beside these, and who is kept."""

from copy import deepcopy

import pytest
import torch

from metamerge.alignment import weight_matching
from metamerge.calibration import predict
from metamerge.mergers import fuse, fuse_beside, refine
from metamerge.mergers.gate import answers_of
from metamerge.mergers.inversion import invert
from metamerge.mergers.ordering import in_canonical_order, member_order
from metamerge.mergers.refining import ALONE
from metamerge.mergers.watching import (
    ENOUGH,
    FEW,
    FEW_MAPS,
    near,
    spared,
    spokesman,
    strange,
    told_apart,
    watched_beside,
    watched_inputs,
)


@pytest.fixture(scope="module")
def alike(digits_zoo):
    """A member of a zoo of digits, sure of what it says, five times: with other noise on each, and
    with its units in another order, so that they are as far apart as networks of other inits."""
    generator = torch.Generator().manual_seed(0)
    members, last = {}, list(digits_zoo.unseen)[-2:]
    for key, tensor in digits_zoo.unseen.items():
        noise = torch.randn(1, 5, *tensor.shape[2:], generator=generator)
        one = tensor[:1, :1] * (5 if key in last else 1)
        members[key] = one + 0.05 * one.std() * noise
    spec = digits_zoo.layout.spec
    return digits_zoo.layout, spec.permute(members, spec.random(generator, (1, 5)))


# ---------------------------------------------------------------------------- what is told apart


def test_members_that_are_sure_of_every_class_tell_all_apart():
    answers = 50 * torch.eye(4).repeat(1, 3, 2, 1)  # 3 members, 8 inputs, every class twice
    assert told_apart(answers) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (50 * torch.eye(4)[:1].expand(1, 3, 8, 4), 0.0),  # sure, of one class only
        (1e-3 * torch.eye(4).repeat(1, 3, 2, 1), 0.0),  # every class, but sure of none
        (50 * torch.eye(4)[[0, 1]].repeat(1, 3, 4, 1), 0.5),  # sure, of two of four classes
    ],
)
def test_few_classes_or_doubt_tell_less_apart_by_hand(answers, expected):
    assert told_apart(answers) == pytest.approx(expected, abs=1e-4)


def test_votes_are_those_of_the_soft_vote_and_families_stand_alone():
    one = 50 * torch.eye(4).repeat(1, 3, 2, 1)
    other = one.clone()
    other[:, 1:] = 50 * torch.eye(4)[0]  # two of three members always name the first class
    both = torch.cat([one, other])
    assert told_apart(both) == pytest.approx([1.0, 0.0], abs=1e-4)
    assert told_apart(both[1:]) == pytest.approx([0.0], abs=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 8, 1), (2, 3, 8, 6, 4)])
def test_what_is_no_choice_among_classes_counts_as_told_apart(shape):
    assert told_apart(torch.zeros(shape)).tolist() == [1.0, 1.0]


# ---------------------------------------------------------------------------- use


def test_a_merger_that_knows_no_limit_watches_on_its_probes_alone(mlp_case, make_merger):
    merger = make_merger()
    (watched,) = watched_inputs(merger, mlp_case.members, mlp_case.layout)
    assert watched.families.tolist() == [0, 1]
    assert torch.equal(watched.inputs, merger.probes((1, 8, 8)))
    assert watched.told == "48 learned probes"


@pytest.mark.parametrize("useful", [True, False])
def test_spare_probes_stay_beside_what_is_watched_while_probes_are_of_use(
    mlp_case, make_merger, only, useful
):
    merger, one = make_merger(spare=9, inputs=useful), only(mlp_case.members, 0)
    (watched,) = watched_inputs(merger, one, mlp_case.layout)
    assert torch.equal(watched.spare, merger.probes.spare((1, 8, 8)))
    few, many = mlp_case.inputs[:7], mlp_case.inputs[:1].repeat(ENOUGH, 1, 1, 1)
    beside = watched_beside(merger, one, mlp_case.layout, few)
    assert len(beside.inputs) == 48 + 7 * useful
    assert torch.equal(beside.spare, watched.spare)
    assert "48 learned probes" in beside.told
    report = {}
    fuse_beside(merger, one, mlp_case.layout, few, steps=1, report=report)
    assert "48 learned probes" in report["watched_on"]
    assert report["watched_on"].endswith(" (and 9 spare ones to refine on)")
    beside = watched_beside(merger, one, mlp_case.layout, many)
    assert (beside.spare is None) == useful  # many inputs that are of use stand alone
    assert watched_inputs(make_merger(), one, mlp_case.layout)[0].spare is None


def test_spare_probes_are_as_strange_as_the_others(mlp_case, make_merger, only, knowing, familiar):
    merger, one = familiar(make_merger(spare=9), 1.0), only(knowing(mlp_case), 0)
    (watched,) = watched_inputs(merger, one, mlp_case.layout)
    assert watched.spare is None
    assert watched.told == "48 learned probes, strange to the members, and 48 made from the members"


def test_strange_probes_are_joined_by_inputs_of_each_familys_own(
    mlp_case, make_merger, only, knowing, familiar
):
    merger, members = familiar(make_merger(), 1.0), knowing(mlp_case)
    probes = merger.probes((1, 8, 8))
    assert strange(merger, members, mlp_case.layout, probes).all()
    first, second = watched_inputs(merger, members, mlp_case.layout)
    assert [first.families.tolist(), second.families.tolist()] == [[0], [1]]
    assert first.told == "48 learned probes, strange to the members, and 48 made from the members"
    for family, watched in enumerate((first, second)):
        made = invert(only(members, family), mlp_case.layout, probes, (1, 8, 8))
        assert torch.equal(watched.inputs, torch.cat([probes, made]))
        assert (watched.kept, watched.given) == (None, False)
    assert not torch.equal(first.inputs, second.inputs)


def test_a_family_is_merged_the_same_alone_and_beside_one_that_finds_probes_strange(
    mlp_case, make_merger, only, knowing, familiar
):
    merger, members = make_merger(refine=3), knowing(mlp_case)
    answers = answers_of(members, mlp_case.layout, merger.probes((1, 8, 8)))
    told = told_apart(answers)
    familiar(merger, float(told.mean()))
    odd = strange(merger, members, mlp_case.layout, merger.probes((1, 8, 8)))
    assert sorted(odd.tolist()) == [False, True]
    both = fuse(merger, members, mlp_case.layout)
    for family in (0, 1):
        alone = fuse(merger, only(members, family), mlp_case.layout)
        for key, tensor in alone.items():
            assert torch.allclose(both[key][family], tensor[0], atol=1e-5)
    plain = fuse(familiar(merger, 0.0), members, mlp_case.layout)
    changed = [
        max(float((both[k][f] - plain[k][f]).abs().max()) for k in plain) > 1e-3 for f in (0, 1)
    ]
    assert changed == odd.tolist()


def test_neither_order_of_members_nor_of_units_matters(case, make_merger, knowing, familiar):
    merger, spec = familiar(make_merger(refine=3), 1.0), case.layout.spec
    members = knowing(case)
    expected = fuse(merger, members, case.layout)
    turned = {key: tensor[:, [2, 0, 3, 1]] for key, tensor in members.items()}
    perm = spec.random(torch.Generator().manual_seed(1), (2,))
    everyone = {group: p[:, None].expand(-1, 4, -1) for group, p in perm.items()}
    for found, wanted in (
        (fuse(merger, turned, case.layout), expected),
        (
            fuse(merger, spec.permute(members, everyone), case.layout),
            spec.permute(expected, perm),
        ),
    ):
        for key, tensor in wanted.items():
            assert torch.equal(found[key], tensor)


def test_imagined_inputs_are_always_joined_by_made_ones(make_case, make_merger):
    case, merger = make_case("mlp", (6,), families=1, shape=(1, 9, 9)), make_merger()
    members, _ = in_canonical_order(case.members, case.layout)
    imagined = merger.probes.for_members(members, case.layout)
    made = invert(members, case.layout, imagined, (1, 9, 9))
    (watched,) = watched_inputs(merger, members, case.layout)
    assert torch.equal(watched.inputs, torch.cat([imagined, made]))
    assert watched.told == "48 imagined inputs and 48 made from the members"


def test_inputs_are_never_joined_by_made_ones(mlp_case, make_merger, knowing, familiar):
    merger, members = make_merger(refine=3), knowing(mlp_case)
    expected = fuse(merger, members, mlp_case.layout, mlp_case.inputs)
    found = fuse(familiar(merger, 1.0), members, mlp_case.layout, mlp_case.inputs)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_a_merger_whose_probes_show_two_classes_sees_the_others_in_what_is_made(
    digits_zoo, trained_merger, familiar
):
    layout, (images, classes), members = digits_zoo.layout, digits_zoo.objective, digits_zoo.unseen
    members = layout.spec.permute(members, weight_matching(members, layout.spec))
    merger, found = deepcopy(trained_merger), []
    with torch.no_grad():
        merger.probes((1, 8, 8)).copy_(images[classes < 2][torch.arange(64) % 50])
    for least in (0.0, 0.4):
        named = predict(fuse(familiar(merger, least), members, layout), layout, images).argmax(-1)
        found.append((named == classes).float().mean(1))
    gain = found[1] - found[0]
    assert gain.mean() > max(0.02, 2 * gain.std() / len(gain) ** 0.5)


# ---------------------------------------------------------------------------- inputs at hand


def test_inputs_that_are_worth_less_than_the_probes_are_left_out(mlp_case, make_merger, only):
    inputs, probes = torch.rand(20, 1, 8, 8), make_merger().probes((1, 8, 8))
    for useful, asked, told in (
        (True, torch.cat([inputs, probes]), "20 inputs and 48 learned probes"),
        (False, probes, "48 learned probes; beside these, inputs did harm in training"),
    ):
        watched = watched_beside(
            make_merger(inputs=useful), only(mlp_case.members, 0), mlp_case.layout, inputs
        )
        assert torch.equal(watched.inputs, asked)
        assert (watched.told, watched.given) == (told, False)


@pytest.mark.parametrize("refine_by", [0, ALONE + 1])
def test_many_inputs_take_the_place_of_probes_and_at_least_so_many_steps(
    mlp_case, make_merger, only, refine_by
):
    merger, members = make_merger(refine=refine_by), only(mlp_case.members, 0)
    inputs = torch.rand(1000, 1, 8, 8)
    watched = watched_beside(merger, members, mlp_case.layout, inputs)
    assert (watched.told, watched.given, watched.kept) == ("1000 inputs", True, None)
    found = fuse_beside(merger, members, mlp_case.layout, inputs)
    steps = max(ALONE, refine_by)
    expected = fuse(merger, members, mlp_case.layout, inputs, steps=steps)
    fewer = fuse(merger, members, mlp_case.layout, inputs, steps=steps - 1)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert not all(torch.equal(found[key], tensor) for key, tensor in fewer.items())


@pytest.mark.parametrize("useful", [True, False])
@pytest.mark.parametrize("count", [FEW, 1000])
def test_inputs_stand_alone_where_probes_are_strange(
    mlp_case, make_merger, only, knowing, useful, count
):
    merger, inputs = make_merger(familiar=1.0, inputs=useful), torch.rand(count, 1, 8, 8)
    watched = watched_beside(merger, only(knowing(mlp_case), 0), mlp_case.layout, inputs)
    assert torch.equal(watched.inputs, inputs)
    assert (watched.told, watched.given) == (f"{count} inputs", True)


def test_hardly_any_inputs_are_joined_by_strange_probes_and_made_inputs(
    case, make_merger, only, knowing
):
    merger, members = make_merger(familiar=1.0), only(knowing(case), 0)
    few = FEW if all(layer.linear for layer in case.layout.layers) else FEW_MAPS
    inputs = torch.rand(few, 1, 8, 8)
    (without,) = watched_inputs(merger, members, case.layout)
    watched = watched_beside(merger, members, case.layout, inputs[:-1])
    assert torch.equal(watched.inputs, torch.cat([inputs[:-1], without.inputs]))
    assert (watched.told, watched.given) == (f"{few - 1} inputs, {without.told}", False)
    assert watched_beside(merger, members, case.layout, inputs).given


# ---------------------------------------------------------------------------- who is kept


def test_the_member_that_agrees_most_by_hand():
    """Of four members, on two inputs: two agree fully, one is in doubt, one is their contrary."""
    sure = 50 * torch.eye(3)[[0, 1]]
    doubt, contrary = sure / 50 * 1.9, 50 * torch.eye(3)[[2, 2]]  # softmax: 0.77, 0.12, 0.12

    def asked(*members):
        return spokesman(torch.stack(members), given=False)[0]

    assert asked(doubt, sure, sure) == 1  # (1 + 0.77) / 2 each, and 0.77
    assert asked(doubt, doubt, sure) is None  # 0.69, 0.69 and 0.77
    assert asked(contrary, doubt, sure, sure) == 2  # who contradicts has no say
    assert asked(contrary, sure) is None
    assert asked(sure[..., :1], sure[..., :1]) is None  # no classes


def test_of_members_that_are_alike_one_is_kept_to_the_bit(alike, make_merger, familiar):
    layout, members = alike
    merger, report = familiar(make_merger(refine=3), 1.0), {}
    found = fuse(merger, members, layout, report=report)
    assert report["kept"] in range(5)
    assert "Pass a hundred inputs of their task or more (batches=)" in report["note"]
    for key, tensor in found.items():
        assert torch.equal(tensor[0], members[key][0, report["kept"]])
    turn = torch.tensor([2, 4, 1, 0, 3])
    again = {}
    turned = fuse(merger, {k: t[:, turn] for k, t in members.items()}, layout, report=again)
    assert turn[again["kept"]] == report["kept"]
    assert all(torch.equal(turned[key], tensor) for key, tensor in found.items())


def test_the_member_whose_votes_are_those_of_all_by_hand():
    """Of members that are sure of what they say, on 100 inputs of two classes."""
    same = 50 * torch.eye(2)[torch.arange(100) % 2]
    other = same.clone()
    other[:20] = 50 * torch.eye(2)[1 - torch.arange(20) % 2]  # votes as the rest on 80 of 100
    odd = same.flip(-1)
    third = other.roll(20, 0)
    for members, kept, voters in (
        ((other, same, same), 1, [0, 1, 2]),  # 0.8, 0.9, 0.9: 0.9 - 0.03 > 0.86
        ((odd, other, same, same), 2, [1, 2, 3]),  # who contradicts has no say
        ((same, same), 0, [0, 1]),
    ):
        found = spokesman(torch.stack(members), given=True)
        assert (found[0], found[1].tolist()) == (kept, voters)
    for members in (
        (other, same, third),  # 0.7, 0.8, 0.7
        (odd, same),
        (same[..., :1], same[..., :1]),  # no classes
    ):
        assert spokesman(torch.stack(members), given=True) == (None, None)


def test_few_inputs_have_to_show_more_agreement():
    same = 50 * torch.eye(2)[torch.arange(1000) % 2]
    other = same.clone()
    other[::4] = same[::4].flip(-1)  # shares 0.75, 0.875, 0.875
    answers = torch.stack([other, same, same])
    assert spokesman(answers, given=True)[0] == 1  # 0.875 - 0.01
    assert spokesman(answers[:, :100], given=True)[0] is None  # 0.875 - 0.03


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 9, 9)])
def test_one_of_members_that_cast_the_same_votes_learns_their_soft_vote(
    alike, make_merger, familiar, shape
):
    """Where probes are strange to them, and where there are none of this shape."""
    layout, members = alike
    merger = familiar(make_merger(shapes=(shape,), refine=3), 1.0)
    report, inputs = {}, torch.rand(FEW, 1, 8, 8)
    ordered, perm = in_canonical_order(members, layout)
    number, _ = spokesman(answers_of(ordered, layout, inputs)[0], given=True)
    start = {key: tensor[:, number] for key, tensor in ordered.items()}
    expected = layout.spec.unpermute(
        refine(start, ordered, layout, inputs, None, steps=ALONE), perm
    )
    found = fuse_beside(merger, members, layout, inputs, report=report)
    assert report["started_from"] == member_order(members)[0, number]
    assert "learns the soft vote of all" in report["note"]
    assert "kept" not in report
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor)
    turn = torch.tensor([2, 4, 1, 0, 3])
    turned = fuse_beside(merger, {k: t[:, turn] for k, t in members.items()}, layout, inputs)
    assert all(torch.equal(turned[key], tensor) for key, tensor in expected.items())


def test_without_steps_the_member_that_was_to_learn_is_kept(alike, make_merger, familiar):
    layout, members = alike
    inputs = torch.rand(FEW, 1, 8, 8)
    merger, report = familiar(make_merger(refine=3), 1.0), {}
    found = fuse_beside(merger, members, layout, inputs, steps=0, report=report)
    assert "started_from" not in report
    assert "With steps (refine=) it learns" in report["note"]
    for key, tensor in found.items():
        assert torch.equal(tensor[0], members[key][0, report["kept"]])


def test_noise_has_no_vote_among_members_that_cast_the_same_ones(alike, make_merger, familiar):
    layout, members = alike
    merger, noisy = familiar(make_merger(refine=3), 1.0), {}
    generator = torch.Generator().manual_seed(0)
    for key, tensor in members.items():
        noise = tensor.std() * torch.randn(1, 1, *tensor.shape[2:], generator=generator)
        noisy[key] = torch.cat([noise, tensor], 1)
    inputs = torch.rand(FEW, 1, 8, 8)
    found, expected = (fuse_beside(merger, own, layout, inputs) for own in (noisy, members))
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, atol=1e-5)


def test_members_that_are_alike_are_fused_where_probes_or_inputs_are_familiar(alike, make_merger):
    layout, members = alike
    for merger, inputs in (
        (make_merger(), None),
        (make_merger(familiar=1.0), torch.rand(20, 1, 8, 8)),
    ):
        report = {}
        found = fuse(merger, members, layout, inputs, report=report)
        assert "kept" not in report
        for member in range(5):
            assert not torch.equal(found["1.weight"][0], members["1.weight"][0, member])


def test_the_member_that_is_kept_is_refined_if_that_is_asked_for(alike, make_merger, familiar):
    layout, members = alike
    merger, report = familiar(make_merger(refine=3), 1.0), {}
    one, two = (fuse(merger, members, layout, steps=n, report=report) for n in (1, 2))
    assert "is the start, and learns the consensus" in report["note"]
    assert "kept" not in report
    kept = members["1.weight"][0, report["started_from"]]
    first, second = ((each["1.weight"][0] - kept).abs().max() for each in (one, two))
    assert 0 < first < second < 4e-3  # no further than steps of 1e-3 go


def test_noise_among_members_that_are_alike_is_not_kept(alike, make_merger, familiar):
    layout, members = alike
    report, noisy, generator = {}, {}, torch.Generator().manual_seed(0)
    for key, tensor in members.items():
        noise = tensor.std() * torch.randn(1, 1, *tensor.shape[2:], generator=generator)
        noisy[key] = torch.cat([noise, tensor], 1)
    fuse(familiar(make_merger(), 1.0), noisy, layout, report=report)
    assert report["kept"] > 0


def test_members_in_one_basin_are_fused_however_alike_they_are(alike, make_merger, familiar):
    layout, members = alike
    generator = torch.Generator().manual_seed(0)
    close = {
        key: tensor[:, :1] + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for key, tensor in members.items()
    }
    merger = familiar(make_merger(), 1.0)
    inputs = torch.rand(1000, 1, 8, 8, generator=generator)
    assert spokesman(answers_of(close, layout, inputs)[0], given=True)[0] is not None
    for merge in (
        lambda report: fuse(merger, close, layout, report=report),
        lambda report: fuse_beside(merger, close, layout, inputs, report=report),
    ):
        merge(report := {})
        assert report.keys() == {"watched_on"}


def test_noise_does_not_put_members_of_one_basin_far_apart(alike):
    layout, members = alike
    close = {key: tensor[:, :1].expand_as(tensor) for key, tensor in members.items()}
    generator, noisy = torch.Generator().manual_seed(0), {}
    for key, tensor in close.items():
        noise = tensor.std() * torch.randn(1, 1, *tensor.shape[2:], generator=generator)
        noisy[key] = torch.cat([noise, tensor], 1)
    inputs = torch.rand(FEW, 1, 8, 8, generator=generator)
    _, sound = spokesman(answers_of(noisy, layout, inputs)[0], given=True)
    assert sound.tolist() == [1, 2, 3, 4, 5]
    assert not near(noisy, layout)
    assert spared(noisy, layout, inputs, given=True) == (None, None)


@pytest.mark.parametrize(("apart", "expected"), [(0.44, True), (0.46, False)])
@pytest.mark.parametrize("count", [2, 6])
def test_how_near_members_are_by_hand(mlp_case, apart, expected, count):
    """Weights are 1 + b and 1 - b: the spread b^2 / (1 + b^2) is, unbiased, ``apart`` squared."""
    layout, signs = mlp_case.layout, torch.tensor([1.0, -1.0]).repeat(count // 2)
    by = apart * (1 - 1 / count) ** 0.5 / (1 - apart**2 * (1 - 1 / count)) ** 0.5
    members = {
        key: 1 + by * signs.reshape(1, -1, *[1] * (t.ndim - 2)) * torch.ones_like(t[:1, :1])
        for key, t in mlp_case.members.items()
    }
    assert near(members, layout) == expected


def test_members_that_know_other_classes_are_fused(digits_zoo, make_merger, familiar):
    """Members of a zoo of digits, which is skewed."""
    layout, members = digits_zoo.layout, digits_zoo.unseen
    merger = familiar(make_merger(), 1.0)
    for family in range(3):
        one = {key: tensor[family : family + 1] for key, tensor in members.items()}
        report = {}
        fuse(merger, one, layout, report=report)
        assert "strange" in report["watched_on"]
        assert "kept" not in report
