"""What a merger is told about units and classes: relative numbers, whatever sizes and order."""

import pytest
import torch
from torch import nn

from metamerge.corrections.refit import observe
from metamerge.mergers.tokens import (
    BOUND,
    CLASS_FEATURES,
    UNIT_FEATURES,
    class_tokens,
    log_probability,
    unit_tokens,
)
from metamerge.structure import OUTPUTS, Layout, discover_program, trace


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tokens(case, members):
    return unit_tokens(members, case.layout, observe(members, case.layout, case.inputs))


def linear_layout(columns, rows):
    program = trace(nn.Sequential(nn.Linear(columns, rows)), torch.zeros(2, columns))
    return Layout(program, discover_program(program))


def class_case(classes=4):
    """Rows, biases and logits of two families of three members."""
    generator = seeded(5)
    shapes = ((2, 3, classes, 6), (2, 3, classes), (2, 3, 20, classes))
    return [torch.randn(shape, generator=generator) for shape in shapes]


# ---------------------------------------------------------------------------- units


def test_every_unit_of_every_space_has_a_token(case):
    found = tokens(case, case.members)
    sizes = {space: t.shape for space, t in found.items()}
    assert sizes == {space: (2, 4, n, UNIT_FEATURES) for space, n in case.layout.spaces.items()}
    assert all(t.isfinite().all() for t in found.values())


def test_tokens_of_four_weights():
    members = {
        "0.weight": torch.tensor([[[[1.0], [3.0]], [[-2.0], [2.0]]]]),  # [1, 2 members, 2 rows, 1]
        "0.bias": torch.tensor([[[0.0, 4.0], [1.0, 0.0]]]),
    }
    layout = linear_layout(1, 2)
    inputs = torch.tensor([[0.0], [2.0]])
    first, second = unit_tokens(members, layout, observe(members, layout, inputs))[OUTPUTS][0]
    # Norms 1 3 and 2 2 with mean 2; the mean rows are -0.5 and 2.5, so only the first sign differs.
    assert first[:, 0].tolist() == [-0.5, 0.5]
    assert second[:, 0].tolist() == [0.0, 0.0]
    assert first[:, 1].tolist() == pytest.approx([-1.0, 1.0])
    assert second[:, 1].tolist() == pytest.approx([1.0, 1.0])
    assert first[:, 3].tolist() == [0.0, 2.0]  # biases by the mean norm
    # Pre-activations 0 2 | 4 10 and 1 -3 | 0 4: deviations 1 3 and 2 2 with mean 2.
    assert first[:, 4].tolist() == pytest.approx([0.5, 3.5])
    assert second[:, 4].tolist() == pytest.approx([-0.5, 1.0])
    assert first[:, 5].tolist() == pytest.approx([0.5, 1.5])
    half = torch.tensor([[0.0, 1.0], [2.0, 5.0]]).sigmoid().mean(1)
    assert first[:, 6].tolist() == pytest.approx(half.tolist())


def test_a_token_says_of_what_kind_its_space_is():
    program = trace(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)),
        torch.zeros(2, 1, 4, 4),
    )
    layout = Layout(program, discover_program(program))
    model = {"0.weight": (3, 1, 3, 3), "0.bias": (3,), "3.weight": (2, 12), "3.bias": (2,)}
    members = {key: torch.randn(1, 2, *shape) for key, shape in model.items()}
    found = unit_tokens(members, layout, observe(members, layout, torch.rand(4, 1, 4, 4)))
    kinds = [t[0, 0, 0, -4:].tolist() for t in found.values()]
    assert kinds == [[1, 0, 0, 0], [0, 0, 0, 0.5], [0, 1, 1, 1]]  # inputs, feature maps, outputs


def test_scaling_a_layer_of_all_members_leaves_the_tokens_on_both_its_sides(case):
    before = tokens(case, case.members)
    for layer in case.layout.layers:
        scaled = dict(case.members)
        for key in (layer.weight, layer.bias):
            scaled[key] = 64 * scaled[key]  # exact in floating point
        after = tokens(case, scaled)
        for space in (*layer.sources, *layer.targets):
            assert torch.allclose(after[space], before[space], atol=1e-4), (layer.weight, space)


def test_a_member_that_differs_shows_in_its_token(case):
    before = tokens(case, case.members)
    for layer in case.layout.layers:
        changed = {key: t.clone() for key, t in case.members.items()}
        changed[layer.weight][:, 1] *= 2
        after = tokens(case, changed)
        for space in (*layer.sources, *layer.targets):
            moved = (after[space] - before[space]).abs().amax((2, 3))
            assert (moved[:, 1] > 1e-2).all(), (layer.weight, space)


def test_tokens_follow_the_units(case):
    spec = case.layout.spec
    perm = spec.random(seeded(1), (2,))
    everyone = {group: p[:, None].expand(-1, 4, -1) for group, p in perm.items()}
    before, after = tokens(case, case.members), tokens(case, spec.permute(case.members, everyone))
    for space, token in before.items():
        if space in perm:
            token = torch.take_along_dim(token, everyone[space][..., None], dim=2)
        assert torch.allclose(after[space], token, atol=1e-4), space


def test_tokens_follow_the_members(case):
    order = [2, 0, 3, 1]
    before = tokens(case, case.members)
    after = tokens(case, {key: t[:, order] for key, t in case.members.items()})
    for space, token in before.items():
        assert torch.allclose(after[space], token[:, order], atol=1e-4), space


def test_tokens_do_not_look_at_other_families(case):
    both = tokens(case, case.members)
    second = tokens(case, {key: t[1:] for key, t in case.members.items()})
    for space, token in second.items():
        assert torch.allclose(token, both[space][1:], atol=1e-4), space


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_tokens_of_members_of_zeros_are_bounded(case, bias):
    zeros = {key: torch.full_like(t, bias * (t.ndim == 3)) for key, t in case.members.items()}
    for token in tokens(case, zeros).values():
        assert (token.abs() <= BOUND).all()  # NaN would not be


def test_the_bound_is_far_from_the_tokens_of_trained_networks(digits_zoo):
    inputs = digits_zoo.objective[0][:100]
    observed = observe(digits_zoo.unseen, digits_zoo.layout, inputs)
    found = unit_tokens(digits_zoo.unseen, digits_zoo.layout, observed)
    assert max(float(token.abs().max()) for token in found.values()) < BOUND / 2


# ---------------------------------------------------------------------------- classes


def test_every_class_of_every_member_has_a_token():
    found = class_tokens(*class_case())
    assert found.shape == (2, 3, 4, CLASS_FEATURES)
    assert found.isfinite().all()


def test_class_tokens_of_two_classes():
    rows = torch.tensor([[[[3.0, 4.0], [0.0, 5.0]]]])  # norms 5 and 5
    bias = torch.tensor([[[1.0, 3.0]]])
    logits = torch.tensor([[[[2.0, 0.0], [0.0, 0.0]]]])  # centred: 1 -1, 0 0
    first, second = class_tokens(rows, bias, logits)[0, 0]
    assert [float(first[0]), float(second[0])] == [1.0, 1.0]
    assert float(first[1]) == pytest.approx(7 / 5 / 2**0.5)
    assert [float(first[2]), float(second[2])] == pytest.approx([-0.2, 0.2])
    scale = 0.5**0.5  # deviation of 1 -1 0 0
    assert [float(first[3]), float(second[3])] == pytest.approx([0.5 / scale, -0.5 / scale])
    assert float(first[4]) == pytest.approx(0.5 / scale)
    assert [float(first[5]), float(second[5])] == pytest.approx([1 / scale / 3, 0.0])
    high = torch.tensor([2.0, 0.0]).softmax(0)  # probabilities on the first probe
    mean = (high + 0.5) / 2
    assert [float(first[6]), float(second[6])] == pytest.approx(
        ((mean + 1e-4).log() / 4).tolist(), abs=1e-6
    )
    top = torch.stack([high[0], torch.tensor(0.5)])
    assert [float(first[7]), float(second[7])] == pytest.approx(
        ((top + 1e-4).log() / 4).tolist(), abs=1e-6
    )


def test_class_tokens_follow_the_classes():
    rows, bias, logits = class_case()
    names = torch.tensor([2, 0, 3, 1])
    found = class_tokens(rows[:, :, names], bias[:, :, names], logits[..., names])
    assert torch.allclose(found, class_tokens(rows, bias, logits)[:, :, names], atol=1e-5)


def test_class_tokens_do_not_see_the_scale_of_the_output_layer_but_in_probabilities():
    rows, bias, logits = class_case()
    before, after = class_tokens(rows, bias, logits), class_tokens(8 * rows, 8 * bias, 8 * logits)
    assert torch.allclose(after[..., :6], before[..., :6], atol=1e-5)
    assert not torch.allclose(after[..., 6:], before[..., 6:], atol=1e-2)


def test_class_tokens_do_not_see_what_is_added_to_all_logits():
    rows, bias, logits = class_case()
    found = class_tokens(rows, bias + 3, logits + 3)
    assert torch.allclose(found, class_tokens(rows, bias, logits), atol=1e-5)


def test_no_bias_is_a_bias_of_zeros():
    rows, bias, logits = class_case()
    found = class_tokens(rows, None, logits)
    assert torch.equal(found, class_tokens(rows, torch.zeros_like(bias), logits))


def test_class_tokens_of_zeros_are_bounded():
    rows, bias, logits = class_case()
    for some in ((rows * 0, bias * 0, logits * 0), (rows * 0, bias, logits * 0 + bias[:, :, None])):
        assert (class_tokens(*some).abs() <= BOUND).all()


def test_log_probabilities_are_those_of_torch_where_logits_are_large():
    logits = torch.tensor([[1000.0, 990.0, -1000.0], [0.0, 0.0, 0.0]])
    assert torch.equal(log_probability(logits), logits.log_softmax(-1))
    exact = (5 * torch.randn(4, 3, generator=seeded(), dtype=torch.float64)).requires_grad_()
    assert torch.allclose(log_probability(exact), exact.log_softmax(-1), atol=1e-14)
    assert torch.autograd.gradcheck(log_probability, exact)
