from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import nn

from metamerge.alignment.frank_wolfe import _degree, _lengths, _lowest, frank_wolfe
from metamerge.alignment.soft_permutation import normalised, relaxed_cost
from metamerge.structure import Concat, Factor, PermutationSpec, discover_program, trace


@pytest.fixture(scope="module")
def drawn():
    """Spec of 3-5-4-2, members ``[3, 3, ...]`` and random doubly stochastic matrices."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    spec = discover_program(trace(model, torch.zeros(2, 3)))
    generator = torch.Generator().manual_seed(0)
    members = {
        key: torch.randn(3, 3, *t.shape, generator=generator, dtype=torch.float64)
        for key, t in model.state_dict().items()
    }
    return spec, members, *(random_matrices(spec, generator) for _ in range(2))


def random_matrices(spec, generator):
    return {
        g: normalised(torch.randn(3, 3, n, n, generator=generator, dtype=torch.float64)).exp()
        for g, n in spec.groups.items()
    }


def test_the_lowest_point_of_a_polynomial_by_hand():
    nodes = np.array([0.0, 0.5, 1.0])
    assert _lowest(nodes, nodes**2 - nodes) == pytest.approx(0.5)
    assert _lowest(nodes, nodes**2 + nodes) == 0.0  # its turn, -0.5, is out of reach
    assert _lowest(nodes, -nodes) == 1.0


def test_the_degree_counts_the_matrices_that_an_entry_is_multiplied_by():
    two = (Factor("g", 2),)
    one_axis = PermutationSpec({"g": 2}, {"w": (two, (Factor(None, 5),))})
    both_axes = PermutationSpec({"g": 2}, {"w": (two, two)})
    side_by_side = PermutationSpec({"g": 2}, {"w": ((Concat((two, two)),),)})
    one_in_the_other = PermutationSpec({"g": 2, "h": 2}, {"w": ((*two, Factor("h", 2)), two)})
    specs = (one_axis, both_axes, side_by_side, one_in_the_other)
    assert [_degree(spec) for spec in specs] == [2, 4, 2, 6]


def test_the_step_length_is_the_best_of_a_fine_grid(drawn):
    spec, members, matrices, others = drawn
    towards = {g: others[g] - matrices[g] for g in matrices}
    cost = relaxed_cost(members, spec, matrices)
    found = _lengths(members, spec, matrices, towards, cost, _degree(spec))

    def at(length):
        return relaxed_cost(
            members, spec, {g: m + length * towards[g] for g, m in matrices.items()}
        )

    grid = torch.stack([at(t) for t in torch.linspace(0, 1, 201, dtype=torch.float64)])
    own = torch.stack([at(t)[f] for f, t in enumerate(found)])
    assert (own <= grid.amin(0) + 1e-12).all()
    assert (own >= grid.amin(0) - 1e-3).all()


def test_the_cost_falls_with_every_step_and_matrices_stay_doubly_stochastic(drawn):
    spec, members, matrices, _ = drawn
    found, costs = frank_wolfe(members, spec, matrices, 40)
    assert all(after <= before + 1e-12 for before, after in pairwise(costs))
    assert costs[-1] < 0.9 * costs[0]
    for matrix in found.values():
        assert float(matrix.min()) >= -1e-12
        for axis in (-1, -2):
            assert torch.allclose(matrix.sum(axis), torch.ones(()).double(), atol=1e-6)


def test_families_do_not_wait_for_each_other(drawn):
    spec, members, matrices, _ = drawn
    together, _ = frank_wolfe(members, spec, matrices, 40)
    for f, g in product(range(3), spec.groups):
        own = {key: t[f : f + 1] for key, t in members.items()}
        alone, _ = frank_wolfe(own, spec, {h: m[f : f + 1] for h, m in matrices.items()}, 40)
        assert torch.allclose(together[g][f], alone[g][0], atol=1e-6)


def test_a_member_that_sees_only_blurred_others_stays_where_it_is():
    # Every order of the anchor's units agrees as well with members whose units are all alike.
    spec = PermutationSpec({"g": 3}, {"w": ((Factor("g", 3),), (Factor(None, 4),))})
    generator = torch.Generator().manual_seed(0)
    members = {"w": torch.randn(1, 2, 3, 4, generator=generator, dtype=torch.float64)}
    start = torch.stack([torch.eye(3), torch.full((3, 3), 1 / 3)]).double()
    found, _ = frank_wolfe(members, spec, {"g": start[None]}, 1)
    assert torch.equal(found["g"][0, 0], torch.eye(3).double())
    assert set(found["g"][0, 1].flatten().tolist()) == {0.0, 1.0}
