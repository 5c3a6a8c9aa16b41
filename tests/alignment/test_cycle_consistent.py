from itertools import permutations, product

import pytest
import torch
from torch import nn

from metamerge.alignment import cycle_consistent, matching_cost, weight_matching
from metamerge.alignment.cycle_consistent import _finished
from metamerge.errors import ConfigError
from metamerge.structure import Factor, PermutationSpec, discover_program, run, trace

DRAWS = 6


class Residual(nn.Module):
    """One group on both axes of a matrix, and another."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner = nn.Linear(4, 6), nn.Linear(6, 6)
        self.up, self.leave = nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x):
        x = torch.relu(self.enter(x))
        x = torch.relu(x + self.inner(x))
        return self.leave(torch.relu(self.up(x)))


class Network:
    """Program and spec of a module, and members drawn at random."""

    def __init__(self, build, *shape):
        self.shapes = {key: t.shape for key, t in build().state_dict().items()}
        self.program = trace(build(), torch.zeros(2, *shape))
        self.spec = discover_program(self.program)

    def draw(self, *sizes, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return {k: torch.randn(*sizes, *s, generator=generator) for k, s in self.shapes.items()}

    def cost(self, members, perm):
        return matching_cost(members, self.spec, perm)

    def fused(self, members, perm):
        average = {k: t.mean(1) for k, t in self.spec.permute(members, perm).items()}
        generator = torch.Generator().manual_seed(9)
        inputs = torch.randn(32, self.shapes["enter.weight"][1], generator=generator)
        return run(self.program, average, [inputs], stacked=True)


@pytest.fixture(scope="module")
def residual():
    return Network(Residual, 4)


def test_three_members_by_hand():
    # The smaller units 1, 2, 1 and the larger 5, 5, 6 meet: each spreads by 2/3 about its mean.
    spec = PermutationSpec({"g": 2}, {"w": ((Factor("g", 2),),)})
    members = {"w": torch.tensor([[[1.0, 5.0], [5.0, 2.0], [1.0, 6.0]]])}
    perm = cycle_consistent(members, spec)
    slots = sorted(spec.permute(members, perm)["w"][0].T.tolist())
    assert slots == [[1.0, 2.0, 1.0], [5.0, 5.0, 6.0]]
    assert float(matching_cost(members, spec, perm)) == pytest.approx(4 / 3 / 92)


@pytest.mark.parametrize("seed", range(6))
def test_three_members_of_three_units_come_as_close_as_in_any_order(seed):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    spec = discover_program(trace(model, torch.zeros(2, 2)))
    generator = torch.Generator().manual_seed(seed)
    members = {
        key: torch.randn(1, 3, *t.shape, generator=generator)
        for key, t in model.state_dict().items()
    }
    orders = [torch.tensor(order) for order in permutations(range(3))]
    best = min(
        float(matching_cost(members, spec, {"0": torch.stack([orders[0], one, other])[None]}))
        for one, other in product(orders, orders)
    )
    perm = cycle_consistent(members, spec, restarts=3)
    assert float(matching_cost(members, spec, perm)) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_members_are_never_further_apart_than_weight_matching_leaves_them(residual, count):
    members = residual.draw(DRAWS, count)
    known = residual.cost(members, weight_matching(members, residual.spec))
    found = residual.cost(members, cycle_consistent(members, residual.spec))
    assert (found <= known * (1 + 1e-12)).all()
    assert (found < known * (1 - 1e-6)).any()


def test_most_trained_families_come_closer_than_by_weight_matching(digits_zoo):
    spec, report = digits_zoo.layout.spec, {}
    known = matching_cost(digits_zoo.unseen, spec, weight_matching(digits_zoo.unseen, spec))
    perm = cycle_consistent(digits_zoo.unseen, spec, restarts=4, report=report)
    found = matching_cost(digits_zoo.unseen, spec, perm)
    assert (found <= known * (1 + 1e-12)).all()
    assert float((found < known * (1 - 1e-6)).double().mean()) > 0.5
    assert report["costs"]["weight_matching"] == pytest.approx(float(known.mean()))
    assert report["objective"][-1] == pytest.approx(float(found.mean()))


@pytest.mark.parametrize("count", [2, 5])
def test_noisy_copies_in_other_orders_are_matched_back_exactly(residual, count):
    generator = torch.Generator().manual_seed(1)
    given = residual.spec.random(generator, (2, count))
    copies = {
        key: t + 0.05 * torch.randn(2, count, *t.shape[2:], generator=generator)
        for key, t in residual.draw(2, 1).items()
    }
    members = residual.spec.permute(copies, given)
    found = cycle_consistent(members, residual.spec)
    for group in residual.spec.groups:
        whole = given[group].gather(-1, found[group])
        assert torch.equal(whole, whole[:, :1].expand_as(whole))


def test_neither_the_order_of_members_nor_that_of_units_changes_the_merged_function(residual):
    members, generator = residual.draw(DRAWS, 4), torch.Generator().manual_seed(2)
    expected = residual.fused(members, cycle_consistent(members, residual.spec))
    order = torch.randperm(4, generator=generator)
    stored = residual.spec.random(generator, (DRAWS, 4))
    for other in (
        {key: t[:, order] for key, t in members.items()},
        residual.spec.permute(members, stored),
    ):
        found = residual.fused(other, cycle_consistent(other, residual.spec))
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_families_are_matched_independently_of_each_other(residual):
    members = residual.draw(4, 3)
    together = residual.cost(members, cycle_consistent(members, residual.spec))
    for f in range(4):
        own = {key: t[f : f + 1] for key, t in members.items()}
        alone = residual.cost(own, cycle_consistent(own, residual.spec))
        assert float(alone) == pytest.approx(float(together[f]), rel=1e-9)


def test_finishing_leaves_no_member_that_could_come_closer(residual):
    members = {key: t.double() for key, t in residual.draw(DRAWS, 4).items()}
    start = residual.spec.random(torch.Generator().manual_seed(3), (DRAWS, 4))
    before = {group: index.clone() for group, index in start.items()}
    found = _finished(members, residual.spec, start)
    assert all(torch.equal(start[group], before[group]) for group in start)
    cost = residual.cost(members, found)
    assert (cost < residual.cost(members, start)).all()
    for group, k in product(residual.spec.groups, range(4)):
        for i, j in ((0, 1), (2, 5), (3, 4)):
            other = {g: index.clone() for g, index in found.items()}
            other[group][:, k, [i, j]] = found[group][:, k, [j, i]]
            if group != "enter":  # of a group on both axes a step is no exact minimum
                assert (residual.cost(members, other) >= cost * (1 - 1e-12)).all()


def test_restarts_beyond_the_number_of_members_change_nothing(residual):
    members = residual.draw(2, 2)
    one, other = ({}, {})
    cycle_consistent(members, residual.spec, restarts=2, report=one)
    cycle_consistent(members, residual.spec, restarts=9, report=other)
    assert one == other
    assert list(one["costs"]) == ["weight_matching", "blurred", "anchored_0", "anchored_1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restarts": -1}, "cycle_consistent: restarts must be a whole number of at least 0"),
        ({"restarts": 1.5}, "restarts must be a whole number of at least 0, got 1.5"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": None}, "steps must be a whole number of at least 1, got None"),
        ({"steps": True}, "steps must be a whole number of at least 1, got True"),
    ],
)
def test_options_out_of_range_are_refused(residual, options, message):
    with pytest.raises(ConfigError, match=message):
        cycle_consistent(residual.draw(1, 2), residual.spec, **options)


def test_groups_in_blocks_of_others_are_refused():
    axis = (Factor("heads", 2), Factor("units", 3))
    spec = PermutationSpec({"heads": 2, "units": 3}, {"w": (axis,)}, {"units": ("heads",)})
    with pytest.raises(ConfigError, match='Use align="weight_matching" for this network'):
        cycle_consistent({"w": torch.zeros(1, 2, 6)}, spec)


def test_a_network_without_groups_is_left_alone():
    assert cycle_consistent({"w": torch.zeros(1, 2, 6)}, PermutationSpec({}, {})) == {}
