"""Activation matching: units that fire on the same inputs come together, whatever their weights."""

from functools import partial
from importlib import import_module
from itertools import pairwise, permutations, product

import numpy as np
import pytest
import torch
from torch import nn

from metamerge import merge
from metamerge.alignment import _activations, activation_matching, align_members
from metamerge.errors import ConfigError, StructureError
from metamerge.structure import run


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, x, y):
        return (self.one(x) * self.other(y)).sum(-1, keepdim=True)


class OneTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(3, 4)

    def forward(self, x):
        return self.one(x).square().sum(-1, keepdim=True)


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(),
                                  nn.Linear(7, 3)), (6,)),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(),
                                  nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 6), nn.ReLU(),
                                  nn.Linear(6, 3)), (2, 4, 4)),
    "nothing reads it": (OneTower, (3,)),
}  # fmt: skip


class Setting:
    def __init__(self, model, layout, shape):
        self.model, self.layout, self.shape = model, layout, shape
        self.spec = layout.spec

    def draw(self, *sizes, seed=0):
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for key, tensor in self.model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(*sizes, *tensor.shape, generator=generator)
                drawn[key] = noise.abs() + 0.5 if key.endswith("running_var") else noise
        return drawn

    def inputs(self, count=60, seed=0):
        return torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(seed))

    def match(self, members, inputs=None, **options):
        batches = self.inputs() if inputs is None else inputs
        return activation_matching(
            members, self.spec, layout=self.layout, batches=batches, **options
        )

    def averaged(self, members, **options):
        aligned = self.spec.permute(members, self.match(members, **options))
        average = {key: tensor.mean(1) for key, tensor in aligned.items()}
        return run(self.layout.program, average, [self.inputs()], stacked=True)


@pytest.fixture(scope="module")
def settings(residual_maps, make_layout):
    """Name of a network -> the network in its setting."""
    models = {**MODELS, "residual": (partial(residual_maps, torch.tanh), (2, 4, 4))}
    made = {}
    for name, (build, shape) in models.items():
        model = build()
        made[name] = Setting(model, make_layout(model, torch.zeros(2, *shape)), shape)
    return made


@pytest.fixture(scope="module", params=[*MODELS, "residual"])
def setting(request, settings):
    return settings[request.param]


@pytest.fixture(scope="module")
def mlp(settings):
    return settings["mlp"]


@pytest.fixture(scope="module")
def two_units(make_layout):
    """Inputs and two hidden ReLU units; a member holds the inputs' weights of either unit."""
    layout = make_layout(
        nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)),
        torch.zeros(2, 2),
    )

    def match(*firsts, **options):
        members = {
            "0.weight": torch.tensor([firsts]),
            "2.weight": torch.ones(1, len(firsts), 1, 2),
        }
        inputs = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
        return activation_matching(members, layout.spec, layout=layout, batches=inputs, **options)

    return match


def test_two_units_by_hand(two_units):
    # The second member's units read the inputs the other way round, and ten times as loud.
    perm = two_units([[1.0, 0.0], [0.0, 1.0]], [[0.0, 10.0], [10.0, 0.0]])["0"]
    assert perm.tolist() in ([[[0, 1], [1, 0]]], [[[1, 0], [0, 1]]])


def test_loud_units_count_for_more_only_by_inner_products(two_units):
    # Activations on the four inputs: 1 2 0 0 and 0 0 1 2 of the first member; of the second, the
    # loud unit has 9 18 10 20 and the quiet one 0 0 .1 .2. Inner products 45 + .5 and 0 + 50, but
    # the loud one's correlation with the first is lower than what is lost with the second.
    members = [[1.0, 0.0], [0.0, 1.0]], [[9.0, 10.0], [0.0, 0.1]]
    loud = two_units(*members, measure="inner")["0"][0]
    alike = two_units(*members, measure="correlation")["0"][0]
    assert loud[1, loud[0].argsort()].tolist() == [1, 0]
    assert alike[1, alike[0].argsort()].tolist() == [0, 1]


@pytest.mark.parametrize("measure", ["correlation", "inner"])
@pytest.mark.parametrize("seed", range(3))
def test_a_pair_gets_the_best_of_all_permutations_by_plain_numpy(make_layout, measure, seed):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    layout = make_layout(model.float(), torch.zeros(2, 3))
    generator = torch.Generator().manual_seed(seed)
    members = {
        key: torch.randn(1, 2, *t.shape, generator=generator)
        for key, t in model.state_dict().items()
    }
    inputs = torch.randn(40, 3, generator=generator)
    units = [
        np.tanh(
            inputs.double().numpy() @ members["0.weight"][0, k].double().numpy().T
            + members["0.bias"][0, k].double().numpy()
        )
        for k in (0, 1)
    ]

    def similarity(i, j):
        one, other = units[0][:, i], units[1][:, j]
        return np.corrcoef(one, other)[0, 1] if measure == "correlation" else (one * other).mean()

    best = max(sum(similarity(i, p[i]) for i in range(4)) for p in permutations(range(4)))
    report = {}
    perm = activation_matching(
        members, layout.spec, layout=layout, batches=inputs, measure=measure, report=report
    )["0"][0]
    found = sum(similarity(int(i), int(j)) for i, j in zip(perm[0], perm[1], strict=True))
    assert found == pytest.approx(best, rel=1e-5)
    assert report["objective"][-1] == pytest.approx(best / 4, rel=1e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_permuted_copies_come_back_to_the_same_function(setting, count):
    generator = torch.Generator().manual_seed(1)
    origin = setting.draw(1, 1)
    copies = {key: t.expand(1, count, *t.shape[2:]) for key, t in origin.items()}
    members = setting.spec.permute(copies, setting.spec.random(generator, (1, count)))
    expected = run(
        setting.layout.program, {k: t[0] for k, t in origin.items()}, [setting.inputs()],
        stacked=True,
    )  # fmt: skip
    plain = {key: tensor.mean(1) for key, tensor in members.items()}
    unaligned = run(setting.layout.program, plain, [setting.inputs()], stacked=True)
    assert torch.allclose(setting.averaged(members), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(unaligned, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("count", [2, 5])
def test_neither_the_order_of_members_nor_that_of_units_changes_the_average(setting, count):
    members = setting.draw(1, count)
    generator = torch.Generator().manual_seed(1)
    expected = setting.averaged(members)
    order = torch.randperm(count, generator=generator)
    shuffled = setting.averaged({key: t[:, order] for key, t in members.items()})
    moved = setting.averaged(
        setting.spec.permute(members, setting.spec.random(generator, (1, count)))
    )
    for other in (shuffled, moved):
        assert (other - expected).norm() < 1e-3 * (expected - expected.mean()).norm()


def test_at_rest_no_member_can_be_matched_any_better_to_the_rest(make_layout):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    layout = make_layout(model, torch.zeros(2, 3))
    generator = torch.Generator().manual_seed(0)
    members = {
        key: torch.randn(1, 4, *t.shape, generator=generator)
        for key, t in model.state_dict().items()
    }
    inputs = torch.randn(50, 3, generator=generator)
    perm = activation_matching(members, layout.spec, layout=layout, batches=inputs)["0"][0]
    units = [
        torch.tanh(inputs @ members["0.weight"][0, k].T + members["0.bias"][0, k]).T.numpy()
        for k in range(4)
    ]

    def total(perm):
        slots = [units[k][perm[k]] for k in range(4)]
        pairs = [(a, b) for a, b in product(slots, slots) if a is not b]
        return sum(np.corrcoef(a[i], b[i])[0, 1] for a, b in pairs for i in range(3))

    for k in range(4):
        for order in permutations(range(3)):
            other = perm.clone()
            other[k] = torch.tensor(order)
            assert total(other) <= total(perm) + 1e-4


def test_the_objective_never_falls(mlp):
    report = {}
    mlp.match(mlp.draw(2, 6), report=report)
    steps = report["objective"]
    assert len(steps) > 3
    assert all(after >= before - 1e-12 for before, after in pairwise(steps[1:]))
    assert steps[1] > steps[0] + 0.1


def test_constant_units_take_what_is_left_and_nothing_is_nan(mlp):
    members = mlp.draw(1, 3)
    members["0.weight"][:, 1, :4] = 0  # their bias is all that is left of them
    report = {}
    perm = mlp.match(members, report=report)
    for group, n in mlp.spec.groups.items():
        assert torch.equal(perm[group].sort(-1).values, torch.arange(n).expand(1, 3, n))
    assert all(np.isfinite(report["objective"]))


def test_families_do_not_depend_on_each_other(mlp):
    members = mlp.draw(3, 3)
    together = mlp.match(members)
    for f in range(3):
        alone = mlp.match({key: t[f : f + 1] for key, t in members.items()})
        assert all(torch.equal(together[group][f], alone[group][0]) for group in alone)


def test_inputs_may_come_in_any_number_at_a_time(setting, monkeypatch):
    members = setting.draw(1, 3)
    once = setting.match(members)
    module = import_module("metamerge.alignment.activation_matching")
    monkeypatch.setattr(module, "CHUNK", 7)
    pieces = setting.match(members)
    assert all(torch.equal(once[group], pieces[group]) for group in once)


def test_rows_of_a_pass_are_bounded_and_the_same_for_all_networks(settings, monkeypatch):
    setting = settings["cnn"]
    monkeypatch.setattr(_activations, "MAX_ROWS", 50)
    weights = {k: t[0].expand(2, *t.shape[1:]) for k, t in setting.draw(1).items()}
    places = _activations.readings(setting.layout, setting.spec, "test")
    found = list(_activations.activations(weights, setting.layout, setting.inputs(), places))
    assert {group for group, _ in found} == {*setting.spec.groups}
    assert all(rows.shape[:2] == (2, 50) and torch.equal(*rows) for _, rows in found)


def test_a_value_that_several_layers_read_counts_once(make_layout):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            x = torch.relu(self.a(x))
            return self.b(x) * self.c(x)

    layout = make_layout(Shared(), torch.zeros(2, 3))
    assert len(_activations.readings(layout, layout.spec, "test")) == 1


def test_members_and_inputs_stay_as_they_are(mlp):
    members, inputs = mlp.draw(1, 3), mlp.inputs()
    before = {key: tensor.clone() for key, tensor in members.items()}
    mlp.match(members, inputs)
    assert all(torch.equal(members[key], before[key]) for key in before)
    assert torch.equal(inputs, mlp.inputs())


def test_one_member_stays_as_it_is(setting):
    perm = setting.match(setting.draw(1, 1))
    for group, n in setting.spec.groups.items():
        assert torch.equal(perm[group], torch.arange(n).expand(1, 1, n))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "cosine"}, "measure must be one of"),
        ({"measure": None}, "measure must be one of"),
        ({"sweeps": -1}, "sweeps must be a whole number of at least 0, got -1"),
        ({"sweeps": True}, "sweeps must be a whole number of at least 0, got True"),
        ({"sweeps": 1.5}, "sweeps must be a whole number of at least 0, got 1.5"),
    ],
)
def test_options_out_of_range_are_refused(mlp, options, message):
    with pytest.raises(ConfigError, match=message):
        mlp.match(mlp.draw(1, 2), **options)


def test_inputs_of_another_shape_are_refused(mlp):
    with pytest.raises(ConfigError, match=r"the network takes \(b, 6\)"):
        mlp.match(mlp.draw(1, 2), torch.zeros(4, 5))


def test_attention_is_refused_with_the_way_out(attention):
    nets = [attention() for _ in range(2)]
    with pytest.raises(StructureError, match=r"activation_matching: .*align='weight_matching'"):
        merge(nets, method="average", align="activation_matching", batches=torch.randn(4, 5, 3))


def test_several_inputs_are_refused_with_the_way_out(make_layout):
    layout = make_layout(Towers(), torch.zeros(2, 3), torch.zeros(2, 2))
    members = {k: t.expand(1, 2, *t.shape) for k, t in Towers().state_dict().items()}
    with pytest.raises(ConfigError, match=r"takes 2 inputs.*align='weight_matching'"):
        activation_matching(members, layout.spec, layout=layout, batches=torch.zeros(4, 3))


def test_without_batches_it_says_what_is_missing(mlp):
    with pytest.raises(ConfigError, match="activation_matching needs 'batches'"):
        merge([mlp.model] * 2, method="average", align="activation_matching")


def test_trained_networks_are_merged_better_than_without(digits_zoo):
    layout, (inputs, _) = digits_zoo.layout, digits_zoo.objective
    images, labels = digits_zoo.validation
    gains = []
    for f in range(12):
        members = [{key: t[f, m] for key, t in digits_zoo.unseen.items()} for m in range(4)]
        right = []
        for align in ("activation_matching", None):
            aligned, _ = align_members(members, layout, align, resources={"batches": inputs})
            average = {key: sum(own[key] for own in aligned) / 4 for key in members[0]}
            guess = run(layout.program, average, [images]).argmax(-1)
            right.append(float((guess == labels).float().mean()))
        gains.append(right[0] - right[1])
    assert np.mean(gains) > 3 * np.std(gains, ddof=1) / np.sqrt(len(gains))
