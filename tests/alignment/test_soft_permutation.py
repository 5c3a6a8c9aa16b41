from math import exp

import pytest
import torch
from torch import nn

from metamerge.alignment import matching_cost
from metamerge.alignment.soft_permutation import (
    check_not_nested,
    doubly_stochastic,
    hardened,
    matrices_of,
    mixed,
    normalised,
    relaxed_cost,
)
from metamerge.errors import ConfigError
from metamerge.structure import Concat, Factor, PermutationSpec, discover_program, trace

ROUNDS = 100_000  # far beyond convergence


class Joined(nn.Module):
    """Two groups side by side on one axis, and a group that a flattened axis carries in blocks."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 4, 1)
        self.last = nn.Linear(28, 2)

    def forward(self, x):
        maps = torch.cat([torch.relu(self.one(x)), torch.relu(self.other(x))], 1)
        return self.last(maps.flatten(1))


class Residual(nn.Module):
    """One group on both axes of a matrix."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        x = torch.relu(self.enter(x))
        return self.leave(torch.relu(x + self.inner(x)))


NETWORKS = {
    "joined": (Joined, (2, 2, 2)),
    "residual": (Residual, (3,)),
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)
        ),
        (3,),
    ),
}


@pytest.fixture(scope="module", params=NETWORKS)
def drawn(request):
    """Spec of a network, and random members ``[2, 3, ...]`` in float64."""
    build, shape = NETWORKS[request.param]
    spec = discover_program(trace(build(), torch.zeros(2, *shape)))
    generator = torch.Generator().manual_seed(0)
    members = {
        key: torch.randn(2, 3, *t.shape, generator=generator, dtype=torch.float64)
        for key, t in build().state_dict().items()
    }
    return spec, members


def random_matrices(spec, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        g: normalised(torch.randn(2, 3, n, n, generator=generator, dtype=torch.float64)).exp()
        for g, n in spec.groups.items()
    }


def test_two_units_by_hand():
    # Rows and columns of [[p, 1-p], [1-p, p]] sum to 1, and p / (1-p) = exp((a + d - b - c) / 2).
    logits = torch.tensor([[0.7, -0.1], [0.3, 0.5]], dtype=torch.float64, requires_grad=True)
    matrix = doubly_stochastic(logits)
    p = 1 / (1 + exp(-(0.7 + 0.5 + 0.1 - 0.3) / 2))
    assert matrix.flatten().tolist() == pytest.approx([p, 1 - p, 1 - p, p], rel=1e-9)
    (slope,) = torch.autograd.grad(matrix[0, 0], logits)
    d = p * (1 - p) / 2
    assert slope.flatten().tolist() == pytest.approx([d, -d, -d, d], rel=1e-6)


@pytest.mark.parametrize("units", [1, 2, 7])
def test_rows_and_columns_sum_to_one(units):
    logits = 3 * torch.randn(2, 4, units, units, generator=torch.Generator().manual_seed(0))
    matrix = doubly_stochastic(logits)
    assert torch.allclose(matrix.sum(-1), torch.ones(2, 4, units), atol=1e-4)
    assert torch.allclose(matrix.sum(-2), torch.ones(2, 4, units), atol=1e-5)


def test_the_implicit_gradient_is_that_of_small_changes():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda own: doubly_stochastic(own, ROUNDS), logits, atol=1e-8)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
def test_the_implicit_gradient_is_that_of_the_unrolled_iteration(sharpness):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64) * sharpness
    factor = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    one, other = (
        torch.autograd.grad((matrix * factor).sum(), logits)[0]
        for matrix in (doubly_stochastic(logits, ROUNDS), normalised(logits, ROUNDS).exp())
    )
    assert torch.allclose(one, other, rtol=0, atol=1e-8)
    assert float(one.abs().max()) > 0.1


def test_the_gradient_of_a_permutation_is_zero_and_not_nan():
    logits = 200 * torch.eye(4)[[2, 0, 3, 1]].expand(2, 4, 4)
    logits = logits.clone().requires_grad_()
    factor = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad((doubly_stochastic(logits) * factor).sum(), logits)
    assert float(slope.abs().max()) < 1e-6


def test_putting_logits_near_their_limit_does_not_change_the_matrix():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, other = doubly_stochastic(logits, ROUNDS), doubly_stochastic(normalised(logits, 2), ROUNDS)
    assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_hardening_gives_back_the_permutations_that_matrices_were_made_of(drawn):
    spec, members = drawn
    perm = spec.random(torch.Generator().manual_seed(0), (2, 3))
    found = hardened(matrices_of(perm, next(iter(members.values()))))
    assert all(torch.equal(found[g], perm[g]) for g in perm)


def test_permutation_matrices_do_what_indices_do(drawn):
    spec, members = drawn
    perm = spec.random(torch.Generator().manual_seed(0), (2, 3))
    one = mixed(members, spec, matrices_of(perm, next(iter(members.values()))))
    other = spec.permute(members, perm)
    assert one.keys() == spec.axes.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_soft_permutations_are_mixtures_of_permuted_tensors(drawn):
    spec, members = drawn
    generator = torch.Generator().manual_seed(0)
    group = next(iter(spec.groups))
    perms = [spec.random(generator, (2, 3)) for _ in range(2)]
    one, other = (matrices_of({group: p[group]}, next(iter(members.values()))) for p in perms)
    half = mixed(members, spec, {group: (one[group] + other[group]) / 2})
    for key, tensor in half.items():
        if sum(g == group for g in carried(spec, key)) == 1:
            ends = [spec.permute_tensor(key, members[key], {group: p[group]}) for p in perms]
            assert torch.allclose(tensor, (ends[0] + ends[1]) / 2, atol=1e-12)


def carried(spec, key):
    return [place.group for places in spec.carriers(key).values() for place in places]


def test_parts_and_factors_by_hand():
    # The axis is (units of g, twice each) behind (units of h): g swaps softly, h swaps for good.
    spec = PermutationSpec(
        {"g": 2, "h": 2},
        {"w": ((Concat(((Factor("h", 2),), (Factor("g", 2), Factor(None, 2)))),),)},
    )
    members = {"w": torch.tensor([[[1.0, 2.0, 10.0, 20.0, 30.0, 40.0]]])}
    matrices = {
        "g": torch.tensor([[[[0.75, 0.25], [0.25, 0.75]]]]),
        "h": torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]]),
    }
    expected = [2.0, 1.0, 15.0, 25.0, 25.0, 35.0]
    assert mixed(members, spec, matrices)["w"].flatten().tolist() == expected


def test_the_relaxed_cost_by_hand():
    # Members 1, 5 and 5, 2. Softly, member 1 is 3.5, 3.5: 1 * 3.5 + 5 * 3.5 = 21 over 55 units of
    # squared norm; 1 - 1/2 - 2 * 21 / (2 * 55). Swapped it is 2, 5: 1/2 - 27 / 55 = 0.5 / 55.
    spec = PermutationSpec({"g": 2}, {"w": ((Factor("g", 2),),)})
    members = {"w": torch.tensor([[[1.0, 5.0], [5.0, 2.0]]])}
    eye, half = torch.eye(2), torch.full((2, 2), 0.5)
    soft = relaxed_cost(members, spec, {"g": torch.stack([eye, half])[None]})
    hard = relaxed_cost(members, spec, {"g": torch.stack([eye, eye.flip(0)])[None]})
    assert float(soft) == pytest.approx(0.5 - 21 / 55, rel=1e-6)
    assert float(hard) == pytest.approx(0.5 / 55, rel=1e-5)


def test_the_relaxed_cost_is_the_matching_cost_at_permutations(drawn):
    spec, members = drawn
    perm = spec.random(torch.Generator().manual_seed(0), (2, 3))
    found = relaxed_cost(members, spec, matrices_of(perm, next(iter(members.values()))))
    assert torch.allclose(found, matching_cost(members, spec, perm), rtol=1e-12)


def test_the_relaxed_cost_is_made_of_inner_products_of_pairs(drawn):
    spec, members = drawn
    matrices = random_matrices(spec)
    aligned = mixed(members, spec, matrices)
    for f in range(2):
        pairs = sum(
            float((t[f, i] * t[f, k]).sum())
            for t in aligned.values()
            for i in range(3)
            for k in range(3)
            if i != k
        )
        size = sum(float(members[key][f].square().sum()) for key in spec.axes)
        expected = 1 - 1 / 3 - pairs / (3 * size)
        assert float(relaxed_cost(members, spec, matrices)[f]) == pytest.approx(expected, rel=1e-9)


def test_zeros_cost_nothing():
    spec = PermutationSpec({"g": 2}, {"w": ((Factor("g", 2),),)})
    zeros = {"w": torch.zeros(1, 3, 2)}
    matrices = {"g": torch.full((1, 3, 2, 2), 0.5, requires_grad=True)}
    cost = relaxed_cost(zeros, spec, matrices)
    (slope,) = torch.autograd.grad(cost.sum(), matrices["g"])
    assert cost.tolist() == [0]
    assert not slope.any()


def test_groups_in_blocks_of_others_are_refused_with_the_way_out():
    spec = PermutationSpec(
        {"heads": 2, "units": 3},
        {"w": ((Factor("heads", 2), Factor("units", 3)),)},
        {"units": ("heads",)},
    )
    with pytest.raises(ConfigError, match=r"some_alignment: the groups \['units'\]") as error:
        check_not_nested("some_alignment", spec)
    assert 'align="weight_matching"' in str(error.value)
