"""Inversion: which probes are strange to members, and inputs that are made from these."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from metamerge.alignment import weight_matching
from metamerge.calibration import predict
from metamerge.mergers import fuse
from metamerge.mergers.gate import answers_of
from metamerge.mergers.inversion import (
    FEW,
    STEPS,
    equal_shares,
    in_agreement,
    invert,
    strange,
    told_apart,
    watched_inputs,
)
from metamerge.mergers.ordering import in_canonical_order


def only(members, family):
    return {key: tensor[family : family + 1] for key, tensor in members.items()}


def familiar(merger, least):
    merger.config = replace(merger.config, familiar=least)
    return merger


def knowing(case, *, of=3.0):
    """Members whose output layers say more than an init does, so that answers are not all alike."""
    last = list(case.members)[-2:]
    return {key: of * t if key in last else t for key, t in case.members.items()}


@pytest.fixture(scope="module")
def digits_family(digits_zoo):
    """Aligned members that know digits, their layout, and labelled objective images."""
    members, layout = only(digits_zoo.unseen, 0), digits_zoo.layout
    return (
        layout.spec.permute(members, weight_matching(members, layout.spec)),
        layout,
        (digits_zoo.objective),
    )


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


# ---------------------------------------------------------------------------- equal shares


def test_classes_get_equal_shares_however_likely_they_are():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 4, generator=generator) + torch.tensor([4.0, 1.0, 0.0, -3.0])
    plain = torch.bincount(logits.argmax(-1), minlength=4)
    shared = torch.bincount(equal_shares(logits.softmax(-1)), minlength=4)
    assert plain[3] == 0
    assert shared.min() >= 80
    assert shared.max() <= 120


def test_an_input_keeps_its_class_where_shares_are_equal_already():
    likely = (6 * torch.eye(5)).repeat(3, 1).softmax(-1)
    assert equal_shares(likely).tolist() == list(range(5)) * 3


def test_other_names_of_classes_give_the_same_shares_by_other_names():
    likely = torch.randn(60, 5, generator=torch.Generator().manual_seed(1)).softmax(-1)
    names = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(names[equal_shares(likely[:, names])], equal_shares(likely))


# ---------------------------------------------------------------------------- whom to ask


def test_a_member_that_contradicts_all_others_is_not_asked():
    alike = (5 * torch.eye(4) + torch.rand(5, 4, 4)).softmax(-1)
    alike[2] = alike[2].roll(1, -1)
    assert in_agreement(alike).tolist() == [0, 1, 3, 4]
    assert in_agreement(alike[[2, 0, 1]]).tolist() == [1, 2]
    assert in_agreement(alike[[0, 1, 3]]).tolist() == [0, 1, 2]


def test_agreement_by_hand():
    sure = torch.eye(3)[:, None]  # three members, one input, each sure of a class of its own
    assert in_agreement(sure).tolist() == [0, 1, 2]  # nobody agrees, so nobody stands out
    assert in_agreement(sure[[0, 0, 0, 1]]).tolist() == [0, 1, 2]
    assert in_agreement(sure[[0, 1]]).tolist() == [0, 1]
    assert in_agreement(sure[:1]).tolist() == [0]


# ---------------------------------------------------------------------------- inversion


def test_members_tell_more_of_the_made_inputs_apart(digits_family):
    members, layout, (images, classes) = digits_family
    for start in (images[classes < 2], torch.rand(64, 1, 8, 8)):
        kept = start.clone()
        made = invert(members, layout, start, (1, 8, 8))
        before, after = (told_apart(answers_of(members, layout, x)) for x in (start, made))
        assert before < 0.4
        assert after > before + 0.05
        assert torch.equal(start, kept)  # nobody's inputs are changed
        assert made.shape == start.shape
        assert made.amin() >= start.amin()
        assert made.amax() <= start.amax()
        assert torch.equal(made, invert(members, layout, start, (1, 8, 8)))


def test_a_merger_whose_probes_show_two_classes_sees_the_others_in_what_is_made(
    digits_zoo, trained_merger
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


def test_members_that_choose_nothing_leave_inputs_as_they_are(make_case):
    case = make_case("mlp", (6,), families=1, classes=1)
    made = invert(case.members, case.layout, case.inputs, (1, 8, 8))
    assert torch.equal(made, case.inputs)
    assert made.data_ptr() != case.inputs.data_ptr()


def test_images_are_smoothed_and_other_inputs_are_not(case):
    members, start = only(knowing(case), 0), case.inputs
    smooth, plain = (invert(members, case.layout, start, grid) for grid in ((1, 8, 8), (64,)))
    rough = [float(x.diff(dim=-1).abs().mean()) for x in (start, smooth, plain)]
    assert rough[1] < 0.8 * rough[0]
    assert rough[2] > rough[1] + 0.1


def test_members_with_other_names_of_classes_give_the_same_inputs(mlp_case):
    members, layout = only(knowing(mlp_case), 0), mlp_case.layout
    names = torch.tensor([3, 0, 4, 1, 2])
    last = list(members)[-2:]
    renamed = {k: t[:, :, names] if k in last else t for k, t in members.items()}
    made = invert(members, layout, mlp_case.inputs, (1, 8, 8))
    assert torch.allclose(invert(renamed, layout, mlp_case.inputs, (1, 8, 8)), made, atol=1e-3)
    assert not torch.allclose(made, mlp_case.inputs, atol=0.1)


def test_the_classes_of_members_are_not_asked_for_more_than_a_few_at_a_time(mlp_case, monkeypatch):
    asked = []
    from metamerge.mergers import inversion

    run = inversion.run

    def counted(program, weights, inputs, **options):
        asked.append(len(next(iter(weights.values()))))
        return run(program, weights, inputs, **options)

    monkeypatch.setattr(inversion, "run", counted)
    invert(only(knowing(mlp_case), 0), mlp_case.layout, mlp_case.inputs, (1, 8, 8))
    assert asked == [FEW] * STEPS


# ---------------------------------------------------------------------------- use


def test_a_merger_that_knows_no_limit_watches_on_its_probes_alone(mlp_case, make_merger):
    merger = make_merger()
    (watched,) = watched_inputs(merger, mlp_case.members, mlp_case.layout)
    assert watched.families.tolist() == [0, 1]
    assert torch.equal(watched.inputs, merger.probes((1, 8, 8)))
    assert watched.told == "48 learned probes"


def test_strange_probes_are_joined_by_inputs_of_each_familys_own(mlp_case, make_merger):
    merger, members = familiar(make_merger(), 1.0), knowing(mlp_case)
    probes = merger.probes((1, 8, 8))
    assert strange(merger, members, mlp_case.layout, probes).all()
    first, second = watched_inputs(merger, members, mlp_case.layout)
    assert [first.families.tolist(), second.families.tolist()] == [[0], [1]]
    assert first.told == ("48 learned probes, strange to the members, and 48 made from the members")
    for family, watched in enumerate((first, second)):
        made = invert(only(members, family), mlp_case.layout, probes, (1, 8, 8))
        assert torch.equal(watched.inputs, torch.cat([probes, made]))
    assert not torch.equal(first.inputs, second.inputs)


def test_a_family_is_merged_the_same_alone_and_beside_one_that_finds_probes_strange(
    mlp_case, make_merger
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


def test_neither_order_of_members_nor_of_units_matters(case, make_merger):
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


def test_inputs_are_never_joined_by_made_ones(mlp_case, make_merger):
    merger, members = make_merger(refine=3), knowing(mlp_case)
    expected = fuse(merger, members, mlp_case.layout, mlp_case.inputs)
    found = fuse(familiar(merger, 1.0), members, mlp_case.layout, mlp_case.inputs)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
