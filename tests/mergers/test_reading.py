"""What all mergers share: coefficients of members, edges of the weight graph, disagreement."""

import pytest
import torch
from torch import nn

from metamerge.mergers.reading import (
    disagreement,
    mixing_of,
    trust_in,
    weight_edges,
    zero_head,
)
from metamerge.structure import OUTPUTS, Layout, discover_program, trace


def layout_of(model, *shape):
    program = trace(model, torch.zeros(2, *shape))
    return Layout(program, discover_program(program))


def scalar_layout():
    return layout_of(nn.Sequential(nn.Linear(1, 2, bias=False)), 1)


# ---------------------------------------------------------------------------- coefficients


def test_coefficients_sum_to_one_and_inputs_have_none():
    generator = torch.Generator().manual_seed(0)
    states = {
        "inputs:x": torch.randn(2, 1, 7, 3, generator=generator),
        "hidden": torch.randn(2, 4, 5, 3, generator=generator),
        OUTPUTS: torch.randn(2, 4, 2, 3, generator=generator),
    }
    head = nn.Linear(3, 1)
    found = mixing_of(states, head)
    assert {space: t.shape for space, t in found.items()} == {
        "hidden": (2, 4, 5),
        OUTPUTS: (2, 4, 2),
    }
    for space, mixing in found.items():
        assert torch.allclose(mixing.sum(1), torch.ones_like(mixing[:, 0]), atol=1e-6)
        logit = states[space] @ head.weight[0] + head.bias
        assert torch.allclose(mixing, logit.softmax(1), atol=1e-6)


def test_a_fresh_head_mixes_all_members_alike():
    states = {OUTPUTS: torch.randn(2, 4, 3, 6)}
    found = mixing_of(states, zero_head(6, 1))
    assert torch.equal(found[OUTPUTS], torch.full((2, 4, 3), 0.25))


# ---------------------------------------------------------------------------- edges


def test_an_edge_carries_the_sum_of_its_taps():
    layout = layout_of(nn.Sequential(nn.Conv2d(1, 2, (1, 2), bias=False)), 1, 4, 4)
    weight = torch.tensor([[1.0, 2.0], [3.0, -3.0]]).reshape(1, 1, 2, 1, 1, 2)
    ((sources, targets, matrix, size),) = weight_edges({"0.weight": weight}, layout)
    assert len(sources) == 1
    assert targets == (OUTPUTS,)
    # Sums 3 and 0 over the root of 2 taps, measured by the root of their mean square.
    assert (matrix / size).flatten().tolist() == pytest.approx([2**0.5, 0.0])


def test_edges_do_not_see_the_scale_of_a_layer(case):
    before = weight_edges(case.members, case.layout)
    scaled = {key: 64 * tensor for key, tensor in case.members.items()}
    for one, other in zip(before, weight_edges(scaled, case.layout), strict=True):
        matrix = one.matrix / one.size
        assert torch.allclose(matrix, other.matrix / other.size, atol=1e-5)
        square = matrix.square().mean((1, 2, 3))
        assert square.tolist() == pytest.approx([1.0, 1.0], rel=1e-4)


# ---------------------------------------------------------------------------- disagreement


def test_the_disagreement_of_one_and_three_is_a_fifth():
    members = {"0.weight": torch.tensor([[[[1.0], [1.0]], [[3.0], [3.0]]]])}
    assert disagreement(members, scalar_layout())["0.weight"].tolist() == pytest.approx([0.2])


def test_copies_do_not_disagree(case):
    for count in (1, 2, 3, 8):
        copies = {key: t[:, :1].expand(-1, count, *t.shape[2:]) for key, t in case.members.items()}
        for spread in disagreement(copies, case.layout).values():
            # A mean of up to 8 numbers is off by 8 roundings of 6e-8 at most; of 2, by none.
            assert float(spread.max()) < (8 * 6e-8) ** 2
            assert count > 2 or spread.tolist() == [0.0, 0.0]


def test_members_of_zeros_do_not_disagree(case):
    zeros = {key: torch.zeros_like(t) for key, t in case.members.items()}
    for spread in disagreement(zeros, case.layout).values():
        assert spread.tolist() == [0.0, 0.0]


def test_disagreement_is_below_one_and_grows_with_the_distance(case):
    near = {k: t + 0.1 * (t - t.mean(1, keepdim=True)) for k, t in case.members.items()}
    spread, further = disagreement(case.members, case.layout), disagreement(near, case.layout)
    for key in spread:
        assert (spread[key] < further[key]).all()
        assert (further[key] < 1).all()


# ---------------------------------------------------------------------------- competence


def test_where_no_one_layer_makes_the_outputs_all_members_are_trusted_alike():
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.one(x) + self.two(x)

    layout = layout_of(Ends(), 3)
    states = {OUTPUTS: torch.randn(1, 4, 2, 6)}
    found = trust_in(nn.Identity(), {}, layout, states, {}, {})
    assert len(layout.producers(OUTPUTS)) == 2
    assert torch.equal(found, torch.zeros(1, 4, 2, 5))
