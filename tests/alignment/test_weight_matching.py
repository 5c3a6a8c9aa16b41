from importlib import import_module
from itertools import pairwise, permutations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from metamerge.alignment import matching_cost, medoid, weight_matching
from metamerge.alignment.assignment import assign, reassign
from metamerge.alignment.barycentre import to_each_other
from metamerge.alignment.medoid import distances
from metamerge.alignment.plan import Plan
from metamerge.alignment.weight_matching import _member
from metamerge.errors import ConfigError
from metamerge.registry import get_alignment
from metamerge.structure import Factor, PermutationSpec, discover_program, run, trace

DRAWS = 20
NOISE = 0.05  # of the standard deviation of a weight


class Residual(nn.Module):
    """One group on both axes of a tensor, and in three layers at once."""

    def __init__(self):
        super().__init__()
        self.enter, self.inner = nn.Linear(6, 8), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 8)
        self.leave, self.warmth = nn.Linear(8, 3), nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        x = torch.relu(self.enter(x))
        x = torch.relu(x + self.inner(x))
        return self.leave(x + self.down(torch.relu(self.up(x)))) * self.warmth


class OutOfOrder(nn.Module):
    """Registered from the outputs to the inputs, and without biases."""

    def __init__(self):
        super().__init__()
        self.leave = nn.Linear(7, 3, bias=False)
        self.second, self.first = nn.Linear(9, 7, bias=False), nn.Linear(8, 9, bias=False)
        self.enter = nn.Linear(6, 8, bias=False)

    def forward(self, x):
        for layer in (self.enter, self.first, self.second):
            x = torch.relu(layer(x))
        return self.leave(x)


MODELS = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(6, 12),
            nn.ReLU(),
            nn.Linear(12, 10),
            nn.ReLU(),
            nn.Linear(10, 8),
            nn.ReLU(),
            nn.Linear(8, 3),
        ),
        (6,),
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(54, 9),
            nn.ReLU(),
            nn.Linear(9, 3),
        ),
        (2, 6, 6),
    ),
    "residual": (Residual, (6,)),
    "out of order": (OutOfOrder, (6,)),
}


class Setting:
    """A network of the table: its program and spec, and members drawn at random."""

    def __init__(self, name):
        self.build, self.shape = MODELS[name]
        self.program = trace(self.build(), torch.zeros(2, *self.shape))
        self.spec = discover_program(self.program)

    def draw(self, *sizes, seed=0, dtype=torch.float32):
        """Random members of unit spread ``[*sizes, ...]``; variances are positive."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for key, tensor in self.build().state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(*sizes, *tensor.shape, generator=generator, dtype=dtype)
                drawn[key] = noise.abs() + 0.5 if key.endswith("running_var") else noise
        return drawn

    def inputs(self, seed=0):
        return torch.randn(64, *self.shape, generator=torch.Generator().manual_seed(seed))

    def fused(self, members, inputs, perm=None):
        """Outputs of the aligned average of every family, ``[f, b, o]``."""
        perm = perm or weight_matching(members, self.spec)
        aligned = self.spec.permute(members, perm)
        average = {key: tensor.mean(1) for key, tensor in aligned.items()}
        return run(self.program, average, [inputs], stacked=True)


@pytest.fixture(scope="module", params=MODELS)
def setting(request):
    return Setting(request.param)


@pytest.fixture(scope="module")
def mlp():
    return Setting("mlp")


def permuted_copies(setting, count, noise, seed):
    """Noisy copies of one network with hidden units in random order, and how they were permuted."""
    generator = torch.Generator().manual_seed(seed)
    origin = setting.draw(1, 1, seed=seed)
    copies = {
        key: t + noise * torch.randn(1, count, *t.shape[2:], generator=generator)
        for key, t in origin.items()
    }
    perm = setting.spec.random(generator, (1, count))
    return setting.spec.permute(copies, perm), perm


def objective(members, spec, perm):
    """Sum of squared distances to the barycentre, the slow way."""
    aligned = spec.permute(members, perm)
    total = torch.zeros(len(next(iter(members.values()))), dtype=torch.float64)
    for key in spec.axes:
        for f in range(len(total)):
            own = aligned[key][f].double()
            total[f] += sum((member - own.mean(0)).square().sum() for member in own)
    return total


def one_pass(weights, spec, perm):
    """Permutations after one pass of the second stage, over all members and groups."""
    aligned = {key: tensor.double() for key, tensor in spec.permute(weights, perm).items()}
    aligned = {key: aligned[key] for key in spec.axes}
    families, count = next(iter(aligned.values())).shape[:2]
    plan, rows = Plan(spec, tuple(spec.groups)), torch.arange(families)
    members = [_member(aligned, plan, rows, torch.full((families,), k)) for k in range(count)]
    to_each_other(members, plan, 1)
    return {
        g: perm[g].gather(-1, torch.stack([member.index[g] for member in members], 1)) for g in perm
    }


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_permuted_noisy_copies_are_matched_back_exactly(setting, count, seed):
    members, given = permuted_copies(setting, count, NOISE, seed)
    found = weight_matching(members, setting.spec)
    for group in setting.spec.groups:
        # What was given and what was found, one after the other, is the same for all members.
        whole = given[group].gather(-1, found[group])
        assert torch.equal(whole, whole[:, :1].expand_as(whole)), group
    # Copies differ by noise of variance NOISE**2; about its mean 1 - 1/count of that is left.
    left = objective(members, setting.spec, found) / sum(
        members[key].numel() for key in setting.spec.axes
    )
    assert float(left) == pytest.approx(NOISE**2 * (1 - 1 / count), rel=0.25)


def test_exact_copies_are_aligned_without_a_remainder(setting):
    members, _ = permuted_copies(setting, 4, 0.0, seed=0)
    found = weight_matching(members, setting.spec)
    assert float(matching_cost(members, setting.spec, setting.spec.identity())) > 0.3
    assert float(matching_cost(members, setting.spec, found)) < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_two_members_with_one_hidden_layer_reach_the_best_of_all_permutations(seed):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    spec = discover_program(trace(model, torch.zeros(2, 3)))
    generator = torch.Generator().manual_seed(seed)
    members = {
        key: torch.randn(1, 2, *t.shape, generator=generator)
        for key, t in model.state_dict().items()
    }
    best = min(
        float(objective(members, spec, {"0": torch.tensor([[[0, 1, 2, 3], order]])}))
        for order in permutations(range(4))
    )
    found = float(objective(members, spec, weight_matching(members, spec)))
    assert found == pytest.approx(best, rel=1e-6)


def test_two_units_by_hand():
    # Member 1 stores units 5 and 1 in the other order. Squares about the mean: (1 - 1.5)**2 twice
    # and (5 - 5)**2, over 1 + 25 + 25 + 4; unaligned 2 * (2**2 + 1.5**2).
    spec = PermutationSpec({"g": 2}, {"w": ((Factor("g", 2),),)}, {})
    members = {"w": torch.tensor([[[1.0, 5.0], [5.0, 2.0]]])}
    perm = weight_matching(members, spec)
    aligned = spec.permute(members, perm)["w"]
    assert aligned.tolist() in ([[[1.0, 5.0], [2.0, 5.0]]], [[[5.0, 1.0], [5.0, 2.0]]])
    assert float(matching_cost(members, spec, perm)) == pytest.approx(0.5 / 55)
    unaligned = matching_cost(members, spec, spec.identity())
    assert float(unaligned) == pytest.approx(2 * (2**2 + 1.5**2) / 55)


def test_the_cost_is_the_objective_over_the_squared_norm(setting):
    members = setting.draw(2, 3)
    perm = setting.spec.random(torch.Generator().manual_seed(0), (2, 3))
    size = sum(members[key].double().square().flatten(1).sum(1) for key in setting.spec.axes)
    expected = objective(members, setting.spec, perm) / size
    assert torch.allclose(matching_cost(members, setting.spec, perm), expected, rtol=1e-10)


def test_no_sweep_raises_the_objective(setting):
    members = setting.draw(1, 5, dtype=torch.float64)
    perm = setting.spec.random(torch.Generator().manual_seed(0), (1, 5))
    costs = [float(objective(members, setting.spec, perm))]
    for _ in range(12):
        perm = one_pass(members, setting.spec, perm)
        costs.append(float(objective(members, setting.spec, perm)))
    rounding = 1e-12 * costs[0]
    assert all(after <= before + rounding for before, after in pairwise(costs))
    assert costs[1] < 0.99 * costs[0]
    assert costs[-1] == costs[-2]


@pytest.mark.parametrize("seed", range(5))
def test_no_sweep_raises_the_objective_of_a_group_on_both_axes_of_a_matrix(seed):
    # There a step is no exact minimum: it takes the other axis to stay as it was.
    spec = PermutationSpec({"g": 3}, {"w": ((Factor("g", 3),), (Factor("g", 3),))}, {})
    generator = torch.Generator().manual_seed(seed)
    members = {"w": torch.randn(1, 3, 3, 3, generator=generator, dtype=torch.float64)}
    perm = spec.random(generator, (1, 3))
    costs = [float(objective(members, spec, perm))]
    for _ in range(6):
        perm = one_pass(members, spec, perm)
        costs.append(float(objective(members, spec, perm)))
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(costs))


def test_at_rest_no_member_can_come_closer_to_the_rest(setting):
    members = setting.draw(2, 4)
    perm = weight_matching(members, setting.spec)
    exact = {key: members[key].double() for key in setting.spec.axes}
    longer = weight_matching(members, setting.spec, sweeps=60)
    for f in range(2):
        own = {group: index[f : f + 1] for group, index in perm.items()}
        again = one_pass({k: t[f : f + 1] for k, t in exact.items()}, setting.spec, own)
        for group in setting.spec.groups:
            assert torch.equal(again[group], own[group])
            assert torch.equal(longer[group], perm[group])


@pytest.mark.parametrize("seed", range(5))
def test_no_single_member_of_four_can_be_permuted_any_better(seed):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    spec = discover_program(trace(model, torch.zeros(2, 3)))
    generator = torch.Generator().manual_seed(seed)
    members = {
        key: torch.randn(1, 4, *t.shape, generator=generator)
        for key, t in model.state_dict().items()
    }
    perm = weight_matching(members, spec)["0"]
    found = float(objective(members, spec, {"0": perm}))
    for k in range(4):
        for order in permutations(range(4)):
            other = perm.clone()
            other[0, k] = torch.tensor(order)
            assert float(objective(members, spec, {"0": other})) >= found * (1 - 1e-12)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_independent_members_come_closer_than_they_were(setting, count):
    members = setting.draw(DRAWS, count)
    found = objective(members, setting.spec, weight_matching(members, setting.spec))
    before = objective(members, setting.spec, setting.spec.identity())
    assert (found < before).all()


@pytest.mark.parametrize("count", [2, 4])
def test_neither_the_order_of_members_nor_that_of_their_units_changes_the_merged_function(
    setting, count
):
    members, inputs = setting.draw(DRAWS, count), setting.inputs()
    generator = torch.Generator().manual_seed(1)
    expected = setting.fused(members, inputs)
    size = (expected - expected.mean(1, keepdim=True)).flatten(1).norm(dim=1)

    def differences(other):
        return (setting.fused(other, inputs) - expected).flatten(1).norm(dim=1) / size

    order = torch.randperm(count, generator=generator)
    assert differences({key: t[:, order] for key, t in members.items()}).max() < 1e-4
    perm = setting.spec.random(generator, (DRAWS, count))
    assert differences(setting.spec.permute(members, perm)).max() < 1e-4
    # That would not hold of any alignment: it fails for the plain average.
    plain = setting.fused(setting.spec.permute(members, perm), inputs, setting.spec.identity())
    unaligned = setting.fused(members, inputs, setting.spec.identity())
    assert ((plain - unaligned).flatten(1).norm(dim=1) / size).min() > 1e-2


def test_families_are_matched_independently_of_each_other(setting):
    members = setting.draw(4, 3)
    together = weight_matching(members, setting.spec)
    for f in range(4):
        alone = weight_matching({key: t[f : f + 1] for key, t in members.items()}, setting.spec)
        for group in setting.spec.groups:
            assert torch.equal(together[group][f], alone[group][0])


def test_families_may_be_matched_in_any_number_at_a_time(setting, monkeypatch):
    members = setting.draw(5, 4)
    together = weight_matching(members, setting.spec)
    monkeypatch.setattr(import_module("metamerge.alignment.weight_matching"), "_CACHED", 1)
    one_by_one = weight_matching(members, setting.spec)
    assert all(torch.equal(together[group], one_by_one[group]) for group in together)


def test_the_order_of_classes_changes_nothing(mlp):
    members = mlp.draw(DRAWS, 5)
    classes = torch.tensor([2, 0, 1])
    renamed = {
        **members,
        "6.weight": members["6.weight"][:, :, classes],
        "6.bias": members["6.bias"][:, :, classes],
    }
    assert torch.equal(medoid(renamed, mlp.spec), medoid(members, mlp.spec))
    found, expected = (weight_matching(w, mlp.spec) for w in (renamed, members))
    assert all(torch.equal(found[group], expected[group]) for group in expected)


def test_one_member_stays_as_it_is(setting):
    members = setting.draw(2, 1)
    perm = weight_matching(members, setting.spec)
    for group, n in setting.spec.groups.items():
        assert torch.equal(perm[group], torch.arange(n).expand(2, 1, n))
    assert torch.equal(matching_cost(members, setting.spec, perm), torch.zeros(2).double())


def test_identical_members_stay_aligned(setting):
    members = {key: t.expand(1, 3, *t.shape[2:]) for key, t in setting.draw(1, 1).items()}
    perm = weight_matching(members, setting.spec)
    for index in perm.values():
        assert torch.equal(index, index[:, :1].expand_as(index))


def test_every_index_is_a_permutation_with_an_axis_of_families_and_members(setting):
    perm = weight_matching(setting.draw(2, 3), setting.spec)
    assert list(perm) == list(setting.spec.groups)
    for group, n in setting.spec.groups.items():
        assert perm[group].shape == (2, 3, n)
        assert torch.equal(perm[group].sort(-1).values, torch.arange(n).expand(2, 3, n))


def test_members_stay_as_they_are(setting):
    members = setting.draw(2, 3)
    before = {key: tensor.clone() for key, tensor in members.items()}
    perm = weight_matching(members, setting.spec)
    matching_cost(members, setting.spec, perm)
    medoid(members, setting.spec)
    assert all(torch.equal(members[key], before[key]) for key in before)


def test_the_result_does_not_hang_on_the_global_seed(setting):
    members = setting.draw(2, 3)
    torch.manual_seed(0)
    first = weight_matching(members, setting.spec)
    torch.manual_seed(1)
    second = weight_matching(members, setting.spec)
    assert all(torch.equal(first[group], second[group]) for group in first)


def test_the_medoid_is_the_same_member_in_any_order_of_members_and_units(setting):
    members = setting.draw(DRAWS, 5)
    generator = torch.Generator().manual_seed(1)
    expected = medoid(members, setting.spec)
    perm = setting.spec.random(generator, (DRAWS, 5))
    assert torch.equal(medoid(setting.spec.permute(members, perm), setting.spec), expected)
    order = torch.randperm(5, generator=generator)
    moved = medoid({key: t[:, order] for key, t in members.items()}, setting.spec)
    assert torch.equal(order[moved], expected)
    assert len(expected.unique()) > 1  # not always the first


def test_the_medoid_is_the_member_between_the_others(mlp):
    # Members 0, 1 and 4 times apart along a line: the second is nearest to all.
    one, step = mlp.draw(1, 1, seed=0), mlp.draw(1, 1, seed=1)
    members = {
        key: torch.cat([one[key] + 0.02 * far * step[key] for far in (0.0, 1.0, 4.0)], 1)
        for key in one
    }
    perm = mlp.spec.random(torch.Generator().manual_seed(0), (1, 3))
    assert medoid(mlp.spec.permute(members, perm), mlp.spec).tolist() == [1]


def test_a_network_without_groups_has_nothing_to_permute():
    spec = discover_program(trace(nn.Sequential(nn.Linear(3, 2)), torch.zeros(2, 3)))
    members = {"0.weight": torch.randn(2, 3, 2, 3), "0.bias": torch.randn(2, 3, 2)}
    assert weight_matching(members, spec) == {}


def plain_weight_matching(weights, spec, order, sweeps=30):
    """The descent, slowly: whole tensors permuted, all products made anew, scipy for all groups.

    For groups that are not nested and do not meet themselves on a tensor; one family.
    """
    perms = [{g: torch.arange(n) for g, n in spec.groups.items()} for _ in order]
    ranked = [{key: weights[key][0, k].double() for key in spec.axes} for k in order]

    def assigned(k, target, group, keys):
        others = {g: index for g, index in perms[k].items() if g != group}
        gain = torch.zeros(spec.groups[group], spec.groups[group], dtype=torch.float64)
        for key, axis in spec.touching(group):
            if key in keys:
                placed = spec.permute_tensor(key, ranked[k][key], others)
                wanted = spec.unit_rows(key, axis, group, target[key])
                gain += wanted @ spec.unit_rows(key, axis, group, placed).T
        return torch.from_numpy(linear_sum_assignment(gain.numpy(), maximize=True)[1])

    def matched(k, target):
        before = dict(perms[k])
        for group in spec.groups:
            perms[k][group] = assigned(k, target, group, spec.axes)
        return any(not torch.equal(before[g], perms[k][g]) for g in before)

    sizes = {key: tensor.numel() for key, tensor in ranked[0].items()}
    for group, keys in Plan(spec, tuple(spec.groups)).first(sizes):
        for k in range(1, len(order)):
            perms[k][group] = assigned(k, ranked[0], group, keys)
    for k in range(1, len(order)):
        any(not matched(k, ranked[0]) for _ in range(sweeps))
    for _ in range(sweeps):
        moved = False
        for k in range(len(order)):
            aligned = [spec.permute(own, perm) for own, perm in zip(ranked, perms, strict=True)]
            rest = {key: sum(a[key] for j, a in enumerate(aligned) if j != k) for key in aligned[k]}
            moved |= matched(k, rest)
        if not moved:
            break
    return perms


@pytest.mark.parametrize(("widths", "count"), [((80, 70), 2), ((70, 66), 4), ((12, 9, 7), 6)])
def test_the_descent_is_that_of_plain_assignments_on_whole_tensors(widths, count):
    layers, before = [], 20
    for width in widths:
        layers += [nn.Linear(before, width), nn.ReLU()]
        before = width
    model = nn.Sequential(*layers, nn.Linear(before, 4))
    spec = discover_program(trace(model, torch.zeros(2, 20)))
    generator = torch.Generator().manual_seed(0)
    members = {
        key: torch.randn(1, count, *t.shape, generator=generator)
        for key, t in model.state_dict().items()
    }
    order = distances(members, spec).argsort(-1)[0].tolist()
    expected = plain_weight_matching(members, spec, order)
    found = weight_matching(members, spec)
    for rank, k in enumerate(order):
        for group in spec.groups:
            assert torch.equal(found[group][0, k], expected[rank][group])


def test_members_too_large_for_float64_are_matched_alike(setting, monkeypatch):
    members = setting.draw(2, 4)
    expected = weight_matching(members, setting.spec)
    monkeypatch.setattr(import_module("metamerge.alignment.weight_matching"), "_EXACT", 0)
    monkeypatch.setattr(import_module("metamerge.alignment.descent"), "_PIECE", 64)
    found = weight_matching(members, setting.spec)
    assert all(torch.equal(found[group], expected[group]) for group in expected)


def test_to_a_reference_every_member_is_matched_as_in_a_pair_with_it(setting):
    members = setting.draw(3, 4)
    found = weight_matching(members, setting.spec, to="reference", reference=2)
    for k in (0, 1, 3):
        pair = {key: tensor[:, [2, k]] for key, tensor in members.items()}
        expected = weight_matching(pair, setting.spec, to="reference", reference=0)
        for group, n in setting.spec.groups.items():
            assert torch.equal(found[group][:, k], expected[group][:, 1])
            assert torch.equal(found[group][:, 2], torch.arange(n).expand(3, n))


def test_without_a_number_the_reference_is_the_medoid(setting):
    members = setting.draw(5, 4)
    found = weight_matching(members, setting.spec, to="reference")
    for f, k in enumerate(medoid(members, setting.spec).tolist()):
        for group, n in setting.spec.groups.items():
            assert torch.equal(found[group][f, k], torch.arange(n))


def test_the_barycentre_is_nearer_than_a_reference_lets_it_be(setting):
    members = setting.draw(DRAWS, 6)
    near, far = (
        matching_cost(members, setting.spec, weight_matching(members, setting.spec, to=to))
        for to in ("barycentre", "reference")
    )
    assert (near <= far + 1e-12).all()
    assert near.mean() < 0.99 * far.mean()


def test_restarts_never_cost_more_and_say_which_run_counts(setting):
    members, report = setting.draw(8, 4), {}
    once = matching_cost(members, setting.spec, weight_matching(members, setting.spec))
    found = weight_matching(
        members,
        setting.spec,
        restarts=6,
        generator=torch.Generator().manual_seed(0),
        report=report,
    )
    cost = matching_cost(members, setting.spec, found)
    assert (cost <= once + 1e-12).all()
    assert float(cost.mean()) <= min(report["costs"]) + 1e-12
    assert len(report["costs"]) == 7
    for f, winner in enumerate(report["restart"]):
        assert winner in range(7)
        assert (winner == 0) == bool(cost[f] > once[f] - 1e-12)
    assert max(report["restart"]) > 0


def test_restarts_with_the_same_seed_are_the_same(mlp):
    members = mlp.draw(4, 4)
    first, second = (
        weight_matching(
            members, mlp.spec, restarts=2, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (3, 3)
    )
    assert all(torch.equal(first[group], second[group]) for group in first)


def test_the_report_holds_the_matching_cost_of_every_step(setting):
    members, report = setting.draw(3, 4), {}
    perm = weight_matching(members, setting.spec, report=report)
    steps = report["objective"]
    before = matching_cost(members, setting.spec, setting.spec.identity())
    after = matching_cost(members, setting.spec, perm)
    assert steps[0] == pytest.approx(float(before.mean()), rel=1e-12)
    assert steps[-1] == pytest.approx(float(after.mean()), rel=1e-12)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(steps[1:]))
    assert "restart" not in report


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "mean"}, r"to must be one of .*'barycentre', 'reference'.*, got 'mean'"),
        ({"to": ["reference"]}, "to must be one of"),
        ({"sweeps": 0}, "sweeps must be a whole number of at least 1, got 0"),
        ({"sweeps": True}, "sweeps must be a whole number"),
        ({"sweeps": float("nan")}, "sweeps must be a whole number"),
        ({"restarts": -1}, "restarts must be a whole number of at least 0, got -1"),
        ({"restarts": None}, "restarts must be a whole number"),
        ({"reference": 3}, "reference must be None .* 0 to 2; got 3"),
        ({"reference": "first"}, "reference must be None"),
    ],
)
def test_options_out_of_range_are_refused(mlp, options, message):
    with pytest.raises(ConfigError, match=message):
        weight_matching(mlp.draw(1, 3), mlp.spec, **options)


@pytest.mark.parametrize("count", [1, 5, 90])
def test_an_assignment_is_that_of_scipy_from_whatever_prices_it_starts(count):
    generator = torch.Generator().manual_seed(count)
    gain = torch.randn(2, count, count, generator=generator, dtype=torch.float64)
    prices = None
    for _ in range(6):
        expected = [linear_sum_assignment(own.numpy(), maximize=True)[1] for own in gain]
        found, prices = reassign(gain, prices)
        assert found.tolist() == [index.tolist() for index in expected]
        assert torch.equal(found, assign(gain))
        gain = gain.gather(-1, found[:, None].expand_as(gain))  # the best is in place now
        again, prices = reassign(gain, prices)
        assert torch.equal(again, torch.arange(count).expand(2, count))
        gain += 0.05 * torch.randn(gain.shape, generator=generator, dtype=torch.float64)


def test_where_every_slot_has_a_best_unit_of_its_own_each_gets_it():
    gain = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.5, 5.0], [4.0, 0.0, 0.0]])
    assert assign(gain).tolist() == [1, 2, 0]
    assert assign(torch.stack([gain, gain.flip(0)])).tolist() == [[1, 2, 0], [0, 2, 1]]


def test_the_alignment_is_found_by_its_name():
    assert get_alignment("weight_matching").function is weight_matching
