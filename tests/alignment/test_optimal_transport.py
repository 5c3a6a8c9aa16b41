"""Optimal transport: members of any widths come to the units of one of them."""

from importlib import import_module

import numpy as np
import ot
import pytest
import torch
from torch import nn

from metamerge.alignment import optimal_transport
from metamerge.structure import run

MODULE = import_module("metamerge.alignment.optimal_transport")


def widened(weights, layout, times):
    """The same function with every unit split into copies that share its outgoing weights."""
    reads = {(layer.weight, 1) for layer in layout.layers}
    wide = {}
    for key, tensor in weights.items():
        for axis, factors in enumerate(layout.spec.axes.get(key, ())):
            group = next((f.group for f in factors if f.group), None)
            if group is None:
                continue
            units = tensor.unflatten(axis, (layout.spec.groups[group], -1))
            copied = units.repeat_interleave(times, axis).flatten(axis, axis + 1)
            tensor = copied / times if (key, axis) in reads else copied
        wide[key] = tensor
    return wide


@pytest.fixture(scope="module")
def pair(make_layout):
    """One hidden layer without biases: two inputs, two units, one output."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    layout = make_layout(model, torch.zeros(2, 2))

    def move(*members, **options):
        made = [
            {"0.weight": torch.tensor(rows), "2.weight": torch.tensor([reads])}
            for rows, reads in members
        ]
        return optimal_transport(made, layout.spec, layout=layout, **options)

    return move


def test_four_units_onto_two_by_hand(pair):
    # Units 0 and 3 lie around (1, 0), units 1 and 2 around (0, 2): each pair becomes its mean, and
    # their outgoing weights, 1 + 4 and 2 + 3, are summed up.
    small = [[1.0, 0.0], [0.0, 2.0]], [1.0, 1.0]
    large = [[1.5, 0.0], [0.0, 1.0], [0.0, 3.0], [0.5, 0.0]], [1.0, 2.0, 3.0, 4.0]
    kept, moved = pair(small, large)
    assert kept["0.weight"].tolist() == small[0]
    assert torch.allclose(moved["0.weight"], torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert torch.allclose(moved["2.weight"], torch.tensor([[5.0, 5.0]]))


def test_equal_widths_are_permuted_by_hand(pair):
    one = [[1.0, 0.0], [0.0, 2.0]], [3.0, 4.0]
    other = [[0.0, 2.5], [1.5, 0.0]], [5.0, 6.0]
    _, moved = pair(one, other, reference=0)
    assert moved["0.weight"].tolist() == [[1.5, 0.0], [0.0, 2.5]]
    assert moved["2.weight"].tolist() == [[6.0, 5.0]]


@pytest.mark.parametrize("passes", [1, 2])
def test_the_plans_are_those_of_a_slow_version_in_loops(elastic_mlp, monkeypatch, passes):
    monkeypatch.setattr(MODULE, "_PASSES", passes)
    layout = elastic_mlp.layout_at(3, 4)
    target = elastic_mlp.draw(3, 4, seed=0, dtype=torch.float64)
    member = elastic_mlp.draw(5, 7, seed=1, dtype=torch.float64)
    report = {}
    _, moved = optimal_transport(
        [target, member], layout.spec, layout=layout, reference=0, report=report
    )
    a, b = ({k: t.numpy() for k, t in w.items()} for w in (target, member))

    def solve(cost):
        n, m = cost.shape
        return ot.emd(np.full(n, 1 / n), np.full(m, 1 / m), cost)

    def cost(rows, others):
        return np.array([[((r - o) ** 2).sum() for o in others] for r in rows])

    ways = {}
    for _ in range(passes):
        share = {g: t / t.sum(1, keepdims=True) for g, t in ways.items()}  # of every unit
        mean = {g: t / t.sum(0, keepdims=True) for g, t in ways.items()}  # in every place
        first = cost(np.c_[b["0.weight"], b["0.bias"]], np.c_[a["0.weight"], a["0.bias"]])
        if ways:
            reads = (mean["2"].T @ b["2.weight"]) * 5 / 3
            first = first + cost(reads.T, a["2.weight"].T)
        ways["0"] = solve(first)
        share["0"] = ways["0"] / ways["0"].sum(1, keepdims=True)
        rows = b["2.weight"] @ share["0"]
        second = cost(np.c_[rows, b["2.bias"]], np.c_[a["2.weight"], a["2.bias"]])
        if "2" in mean:
            second = second + cost(b["4.weight"].T * 7 / 4, a["4.weight"].T)
        ways["2"] = solve(second)
    mean = {g: t / t.sum(0, keepdims=True) for g, t in ways.items()}
    share = {g: t / t.sum(1, keepdims=True) for g, t in ways.items()}
    expected = {
        "0.weight": mean["0"].T @ b["0.weight"],
        "0.bias": mean["0"].T @ b["0.bias"],
        "2.weight": mean["2"].T @ b["2.weight"] @ share["0"],
        "2.bias": mean["2"].T @ b["2.bias"],
        "4.weight": b["4.weight"] @ share["2"],
        "4.bias": b["4.bias"],
    }
    for key, value in expected.items():
        assert np.allclose(moved[key].numpy(), value, rtol=1e-10, atol=1e-12), key
    assert len(report["objective"]) == passes


def test_units_that_were_split_are_joined_and_the_function_stays(elastic):
    small = elastic.draw()
    large = widened(small, elastic.layout, 3)
    _, moved = elastic.move([small, large])
    for key in elastic.spec.axes:
        assert torch.allclose(moved[key], small[key], rtol=1e-5, atol=1e-6), key


def test_units_are_split_where_the_reference_has_more_and_the_function_stays(elastic):
    small, large = elastic.draw(), widened(elastic.draw(seed=1), elastic.layout, 2)
    sizes = {group: 2 * n for group, n in elastic.spec.groups.items()}
    wide = elastic.layout_at(*sizes.values())
    moved, _ = optimal_transport([small, large], wide.spec, layout=wide)
    found = run(wide.program, moved, [elastic.inputs()])
    assert torch.allclose(found, elastic.run(small), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cost", ["weights", "activations"])
def test_permuted_copies_come_back_exactly(elastic, cost):
    origin = elastic.draw()
    generator = torch.Generator().manual_seed(1)
    members = [elastic.spec.permute(origin, elastic.spec.random(generator)) for _ in range(3)]
    moved = elastic.move(members, cost=cost, batches=elastic.inputs())
    if cost == "weights":
        for key in origin:
            assert all(torch.equal(own[key], moved[0][key]) for own in moved), key
    expected = elastic.run(origin)  # units that are dead on the inputs are as good as each other
    average = {k: sum(own[k] for own in moved) / 3 for k in origin}
    assert torch.allclose(elastic.run(average), expected, rtol=1e-4, atol=1e-4)


def test_with_equal_widths_every_member_is_permuted_and_stays_the_same_function(elastic):
    members = [elastic.draw(seed=seed) for seed in range(4)]
    for own, moved in zip(members, elastic.move(members), strict=True):
        for key in elastic.spec.axes:
            assert own[key].shape == moved[key].shape
            assert torch.equal(own[key].flatten().sort().values, moved[key].flatten().sort().values)
        assert torch.allclose(elastic.run(own), elastic.run(moved), rtol=1e-4, atol=1e-4)


def test_a_soft_transport_mixes_units_and_a_hardly_regularised_one_does_not(elastic_mlp):
    members = [elastic_mlp.draw(seed=0), elastic_mlp.draw(seed=1)]
    hard, sharp, soft = (
        elastic_mlp.move(members, reference=0, **options)[1]
        for options in ({}, {"hard": False, "regularisation": 1e-3}, {"hard": False})
    )
    assert torch.allclose(hard["0.weight"], sharp["0.weight"], atol=1e-2)
    assert not torch.allclose(hard["0.weight"], soft["0.weight"], atol=1e-1)
    # a mixture of units, and nothing more: what all units have in common is kept
    ones = {**members[1], "0.bias": torch.ones(6)}
    found = elastic_mlp.move([members[0], ones], reference=0, hard=False)[1]
    assert torch.allclose(found["0.bias"], torch.ones(6), atol=1e-5)


def test_the_order_of_members_does_not_change_the_average(elastic):
    members = [elastic.draw(seed=seed) for seed in range(4)]
    large = widened(elastic.draw(seed=9), elastic.layout, 2)

    def average(weights):
        moved = elastic.move(weights)
        mean = {key: sum(own[key].double() for own in moved) / len(moved) for key in moved[0]}
        return elastic.run({key: t.float() for key, t in mean.items()})

    expected = average([*members, large])
    other = average([large, *(members[i] for i in (2, 0, 3, 1))])
    assert torch.allclose(other, expected, rtol=1e-4, atol=1e-4)


def test_the_reference_stays_as_it_is_and_is_reported(elastic_mlp):
    members = [elastic_mlp.draw(seed=seed) for seed in range(3)]
    for chosen in (0, 2):
        report = {}
        moved = elastic_mlp.move(members, reference=chosen, report=report)
        assert report["reference"] == chosen
        assert all(torch.equal(moved[chosen][key], t) for key, t in members[chosen].items())
        assert report["widths"] == [{"0": 6, "2": 5}] * 3
        assert all(0 < share < 1 for share in report["objective"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_kept_and_no_memory_is_shared(elastic_cnn, dtype):
    members = [elastic_cnn.draw(seed=0, dtype=dtype), elastic_cnn.draw(6, 4, seed=1, dtype=dtype)]
    before = [{k: t.clone() for k, t in own.items()} for own in members]
    moved = elastic_cnn.move(members)
    for own, untouched, new in zip(members, before, moved, strict=True):
        assert all(torch.equal(own[key], untouched[key]) for key in own)
        assert {k: t.dtype for k, t in new.items()} == {k: t.dtype for k, t in own.items()}
        assert {t.data_ptr() for t in own.values()}.isdisjoint(t.data_ptr() for t in new.values())
    assert {k: t.shape for k, t in moved[1].items()} == {k: t.shape for k, t in moved[0].items()}


def test_one_member_is_copied(elastic_mlp):
    (moved,) = elastic_mlp.move([elastic_mlp.draw()])
    assert all(torch.equal(moved[key], t) for key, t in elastic_mlp.draw().items())


def test_networks_of_equal_units_are_transported_without_nan(elastic_mlp):
    members = [
        {key: torch.zeros_like(t) for key, t in elastic_mlp.draw().items()} for _ in range(2)
    ]
    for hard in (True, False):
        report = {}
        moved = elastic_mlp.move(members, hard=hard, report=report)
        assert all(torch.equal(t, torch.zeros_like(t)) for own in moved for t in own.values())
        assert report["objective"] == [0.0, 0.0]
