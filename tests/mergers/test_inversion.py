"""Inversion: inputs that are made from what members know."""

import pytest
import torch

from metamerge.alignment import weight_matching
from metamerge.mergers.gate import answers_of
from metamerge.mergers.inversion import (
    FEW,
    STEPS,
    equal_shares,
    in_agreement,
    invert,
)
from metamerge.mergers.watching import told_apart


@pytest.fixture(scope="module")
def digits_family(digits_zoo):
    """Aligned members that know digits, their layout, and labelled objective images."""
    members, layout = {key: t[:1] for key, t in digits_zoo.unseen.items()}, digits_zoo.layout
    return (
        layout.spec.permute(members, weight_matching(members, layout.spec)),
        layout,
        (digits_zoo.objective),
    )


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


def test_members_that_choose_nothing_leave_inputs_as_they_are(make_case):
    case = make_case("mlp", (6,), families=1, classes=1)
    made = invert(case.members, case.layout, case.inputs, (1, 8, 8))
    assert torch.equal(made, case.inputs)
    assert made.data_ptr() != case.inputs.data_ptr()


def test_images_are_smoothed_and_other_inputs_are_not(case, only, knowing):
    members, start = only(knowing(case), 0), case.inputs
    smooth, plain = (invert(members, case.layout, start, grid) for grid in ((1, 8, 8), (64,)))
    rough = [float(x.diff(dim=-1).abs().mean()) for x in (start, smooth, plain)]
    assert rough[1] < 0.8 * rough[0]
    assert rough[2] > rough[1] + 0.1


def test_members_with_other_names_of_classes_give_the_same_inputs(mlp_case, only, knowing):
    members, layout = only(knowing(mlp_case), 0), mlp_case.layout
    names = torch.tensor([3, 0, 4, 1, 2])
    last = list(members)[-2:]
    renamed = {k: t[:, :, names] if k in last else t for k, t in members.items()}
    made = invert(members, layout, mlp_case.inputs, (1, 8, 8))
    assert torch.allclose(invert(renamed, layout, mlp_case.inputs, (1, 8, 8)), made, atol=1e-3)
    assert not torch.allclose(made, mlp_case.inputs, atol=0.1)


def test_the_classes_of_members_are_not_asked_for_more_than_a_few_at_a_time(
    mlp_case, monkeypatch, only, knowing
):
    asked = []
    from metamerge.mergers import inversion

    run = inversion.run

    def counted(program, weights, inputs, **options):
        asked.append(len(next(iter(weights.values()))))
        return run(program, weights, inputs, **options)

    monkeypatch.setattr(inversion, "run", counted)
    invert(only(knowing(mlp_case), 0), mlp_case.layout, mlp_case.inputs, (1, 8, 8))
    assert asked == [FEW] * STEPS
