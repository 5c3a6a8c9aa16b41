from math import log

import pytest
import torch
from torch import nn

from metamerge import merge
from metamerge.alignment import weight_matching
from metamerge.errors import ConfigError, IncompatibleWeights
from metamerge.methods import adaptive, average
from metamerge.structure import Layout, discover_program, run, trace
from metamerge.weights import stack

ONE = torch.ones(1, 1)
THREE_TO_ONE = (torch.ones(4, 1), torch.tensor([0, 0, 0, 1]))  # least loss at log(3)


def layout_of(model, inputs):
    program = trace(model, inputs)
    return Layout(program, discover_program(program))


@pytest.mark.parametrize("per", ["model", "layer", "unit"])
def test_labels_find_the_best_point_between_two_members(per, scalar_layout, scalar_members):
    told = {}
    fused = adaptive(
        scalar_members(0, 2), layout=scalar_layout, batches=THREE_TO_ONE, per=per, report=told
    )
    assert fused["0.weight"][0].item() == pytest.approx(log(3), abs=1e-3)
    assert told["objective"] == "labels"
    assert told["per"] == per
    # the other unit is 0 in both members, so that its shares stay where they are
    share = log(3) / 2 if per != "unit" else (log(3) / 2 + 0.5) / 2
    assert told["shares"] == pytest.approx([1 - share, share], abs=1e-3)
    assert min(told["curve"]) == pytest.approx(0.75 * log(4 / 3) + 0.25 * log(4), abs=1e-5)


def test_without_labels_it_goes_to_the_soft_vote(scalar_layout, scalar_members):
    told = {}
    fused = adaptive(scalar_members(0, 2), layout=scalar_layout, batches=ONE, report=told)
    vote = (0.5 + float(torch.tensor(2.0).sigmoid())) / 2
    assert fused["0.weight"][0].item() == pytest.approx(log(vote / (1 - vote)), abs=1e-3)
    assert told["objective"] == "distillation"
    assert told["curve"][0] > 1e-3
    assert min(told["curve"]) == pytest.approx(0, abs=1e-6)


def test_labels_are_not_read_for_another_objective(scalar_layout, scalar_members):
    with_labels, without = (
        adaptive(
            scalar_members(0, 2), layout=scalar_layout, batches=batches, objective="distillation"
        )
        for batches in (THREE_TO_ONE, THREE_TO_ONE[0])
    )
    assert torch.equal(with_labels["0.weight"], without["0.weight"])


def test_entropy_prefers_members_that_are_sure(scalar_layout, scalar_members):
    fused = adaptive(
        scalar_members(0, 2), layout=scalar_layout, batches=ONE, objective="entropy", steps=400
    )
    assert fused["0.weight"][0].item() > 1.9


def test_no_steps_are_the_average(mlp_layout, mlp_members):
    batches = torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    fused = adaptive(mlp_members, layout=mlp_layout, batches=batches, steps=0)
    for key, tensor in average(mlp_members).items():
        assert torch.allclose(fused[key], tensor, atol=1e-6)


def test_with_too_long_steps_the_average_is_kept(mlp_layout, mlp_members):
    told, batches = {}, torch.randn(10, 5, generator=torch.Generator().manual_seed(0))
    fused = adaptive(
        mlp_members, layout=mlp_layout, batches=batches, steps=3, lr=1e4, report=told, per="model"
    )
    assert min(told["curve"][1:]) > told["curve"][0]
    for key, tensor in average(mlp_members).items():
        assert torch.allclose(fused[key], tensor, atol=1e-6)


@pytest.mark.parametrize("per", ["model", "layer", "unit"])
def test_tensors_lie_between_the_members_with_shares_as_told(per, mlp_layout, mlp_members):
    generator = torch.Generator().manual_seed(0)
    batches = (torch.randn(40, 5, generator=generator), torch.arange(40) % 3)
    fused = adaptive(mlp_members, layout=mlp_layout, batches=batches, per=per)
    rows = {key: torch.stack([m[key] for m in mlp_members]).double() for key in fused}
    groups = {
        "model": [[(key, slice(None)) for key in fused]],
        "layer": [[(f"{n}.{kind}", slice(None)) for kind in ("weight", "bias")] for n in (0, 2)],
        "unit": [
            [(f"{n}.{kind}", slice(u, u + 1)) for kind in ("weight", "bias")]
            for n, units in ((0, 6), (2, 3))
            for u in range(units)
        ],
    }
    for group in groups[per]:
        columns = torch.cat([rows[key][:, some].flatten(1) for key, some in group], 1).T
        wanted = torch.cat([fused[key][some].flatten().double() for key, some in group])
        # one set of shares that sum to 1 explains all of the group
        columns = torch.cat([columns, torch.ones(1, 5).double()])
        wanted = torch.cat([wanted, torch.ones(1).double()])
        shares = torch.linalg.lstsq(columns, wanted[:, None]).solution
        if len(columns) > 5:
            assert torch.allclose(columns @ shares, wanted[:, None], atol=1e-5)
            assert float(shares.min()) > -1e-4


def test_units_of_one_module_and_of_different_groups_have_shares_of_their_own():
    class Plain(nn.Module):
        """Parameters without modules: their names have nothing before the dot."""

        def __init__(self):
            super().__init__()
            self.enter = nn.Parameter(torch.randn(4, 3))
            self.inner = nn.Parameter(torch.randn(4, 4))
            self.leave = nn.Parameter(torch.randn(2, 4))

        def forward(self, x):
            x = torch.relu(nn.functional.linear(x, self.enter))
            return nn.functional.linear(torch.relu(nn.functional.linear(x, self.inner)), self.leave)

    torch.manual_seed(0)
    layout = layout_of(Plain(), torch.zeros(2, 3))
    members = [dict(Plain().state_dict()) for _ in range(3)]
    batches = (torch.randn(30, 3), torch.arange(30) % 2)
    perm = layout.spec.random(torch.Generator().manual_seed(4))
    fused = adaptive(members, layout=layout, batches=batches, steps=30)
    moved = adaptive(
        [layout.spec.permute(m, perm) for m in members], layout=layout, batches=batches, steps=30
    )
    for key, tensor in layout.spec.permute(fused, perm).items():
        assert torch.allclose(moved[key], tensor, atol=1e-5)


def test_batch_normalisations_are_fitted_with_statistics_of_the_batch():
    # Running statistics of the members are nonsense; what is fitted must not look at them.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    layout = layout_of(model, torch.zeros(2, 4))
    members = [
        {
            k: torch.randn_like(t) if t.is_floating_point() else t.clone()
            for k, t in model.state_dict().items()
        }
        for _ in range(3)
    ]
    nonsense = [dict(m) for m in members]
    for number, member in enumerate(members):
        member["1.running_mean"], member["1.running_var"] = torch.zeros(8), torch.ones(8)
        nonsense[number]["1.running_mean"] = torch.full((8,), 1e3)
        nonsense[number]["1.running_var"] = torch.full((8,), 1e-3)
    batches = (torch.randn(60, 4), torch.arange(60) % 3)
    one, other = (
        adaptive(m, layout=layout, batches=batches, steps=20) for m in (members, nonsense)
    )
    for key in ("0.weight", "1.weight", "3.bias"):
        assert torch.equal(one[key], other[key])


def test_the_seed_draws_the_batches(mlp_layout, mlp_members):
    generator = torch.Generator().manual_seed(2)
    batches = torch.randn(300, 5, generator=generator)
    seeded = [
        adaptive(
            mlp_members,
            layout=mlp_layout,
            batches=batches,
            steps=10,
            generator=torch.Generator().manual_seed(seed),
        )["0.weight"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])


@pytest.mark.parametrize(("labelled", "gain"), [(False, 0.1), (True, 0.15)])
def test_it_predicts_better_than_the_average_on_digits(labelled, gain, digits_zoo):
    layout, (inputs, labels) = digits_zoo.layout, digits_zoo.validation
    found = {key: t[:2] for key, t in digits_zoo.unseen.items()}
    found = layout.spec.permute(found, weight_matching(found, layout.spec))
    families = [[{k: t[f, m] for k, t in found.items()} for m in range(4)] for f in range(2)]
    batches = digits_zoo.objective if labelled else digits_zoo.objective[0]
    fused = [adaptive(members, layout=layout, batches=batches) for members in families]
    fused += [average(members) for members in families]
    logits = run(layout.program, stack(fused), [inputs], stacked=True)
    own, plain = (logits.argmax(-1) == labels).float().unflatten(0, (2, 2)).mean((1, 2))
    assert float(own) > float(plain) + gain


def test_through_merge_what_was_fitted_is_reported(mlp, mlp_members):
    batches = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    told = merge(mlp_members, method="adaptive", model=mlp, batches=batches).report["chosen"]
    assert told["objective"] == "distillation"
    assert min(told["curve"]) < told["curve"][0]
    assert sum(told["shares"]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "channel"}, "per must be one of .* got 'channel'"),
        ({"per": None}, "per must be one of .* got None"),
        ({"objective": "accuracy"}, "objective must be one of .* got 'accuracy'"),
        ({"objective": True}, "objective must be one of .* got True"),
        ({"steps": -1}, "steps must be a whole number of at least 0, got -1"),
        ({"steps": True}, "steps must be a whole number of at least 0, got True"),
        ({"steps": 1.5}, "steps must be a whole number of at least 0, got 1.5"),
        ({"lr": 0}, r"lr must be a number in \(0, inf\), got 0"),
        ({"lr": float("inf")}, r"lr must be a number in \(0, inf\), got inf"),
        ({"lr": None}, r"lr must be a number in \(0, inf\), got None"),
        ({"objective": "labels"}, "batches has no labels"),
    ],
)
def test_options_out_of_their_range_are_refused(options, message, scalar_layout, scalar_members):
    with pytest.raises(ConfigError, match=message):
        adaptive(scalar_members(1, 2), layout=scalar_layout, batches=ONE, **options)


@pytest.mark.parametrize("objective", ["distillation", "entropy"])
def test_networks_that_are_no_classifiers_are_refused(objective, image_layout):
    layout, members = image_layout
    with pytest.raises(IncompatibleWeights, match="expected logits"):
        adaptive(members, layout=layout, batches=torch.zeros(2, 1, 4, 4), objective=objective)


def test_labels_of_another_task_are_refused(scalar_layout, scalar_members):
    with pytest.raises(ConfigError, match="labels reach 2, the network has classes 0 to 1"):
        adaptive(scalar_members(1, 2), layout=scalar_layout, batches=(ONE, torch.tensor([2])))
