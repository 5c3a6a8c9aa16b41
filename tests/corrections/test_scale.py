from functools import cache
from math import log

import pytest
import torch
from torch import nn
from torch.func import functional_call

from metamerge import merge
from metamerge.corrections.scale import scale
from metamerge.errors import ConfigError
from metamerge.structure import Layout, discover_program, trace

# Three inputs of class 0 and one of class 1: with weights [a, 0] log(1 + e^a) - 3/4 a.
THREE_TO_ONE = (torch.ones(4, 1), torch.tensor([0, 0, 0, 1]))


@cache
def layout_of(build, width):
    program = trace(build(), torch.zeros(2, width))
    return Layout(program, discover_program(program))


def scalar():
    return nn.Sequential(nn.Linear(1, 2, bias=False))


def scalars(*numbers):
    return {"0.weight": torch.tensor([[[float(a)], [0.0]] for a in numbers])}


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def normalised():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def drawn(model, *lead):
    generator = torch.Generator().manual_seed(1)
    return {
        key: torch.rand(*lead, *t.shape, generator=generator) - 0.4
        if t.is_floating_point()
        else t.expand(*lead, *t.shape).clone()
        for key, t in model.state_dict().items()
    }


def test_labels_choose_by_hand():
    # .5, 1 and 1.5 score .599, .563 and .576
    inputs, labels = THREE_TO_ONE
    told, members = {}, {k: t[None] for k, t in scalars(0, 1).items()}
    scaled = scale(
        scalars(0.5),
        members,
        layout_of(scalar, 1),
        inputs,
        labels=labels,
        grid=(3, 2),
        report=told,
    )
    assert scaled["0.weight"].flatten().tolist() == [1.0, 0.0]
    assert told["judged_by"] == "labels"
    assert told["grid"] == [1.0, 2.0, 3.0]
    assert told["scales"] == {"0.weight": 2.0}
    curve = [log(1 + torch.tensor(a).exp().item()) - 0.75 * a for a in (0.5, 1.0, 1.5)]
    assert told["curve"]["model"] == pytest.approx(curve, abs=1e-5)


def test_without_labels_the_soft_vote_chooses():
    inputs, told = torch.ones(4, 1), {}
    members = {k: t[None] for k, t in scalars(1, 1).items()}
    scaled = scale(scalars(0.5), members, layout_of(scalar, 1), inputs, report=told)
    assert scaled["0.weight"].flatten().tolist() == [1.0, 0.0]
    assert told["judged_by"] == "soft vote"
    assert min(told["curve"]["model"]) == pytest.approx(0, abs=1e-6)


def test_one_is_always_tried_and_kept_where_nothing_is_better():
    inputs = torch.ones(4, 1)
    members = {k: t[None] for k, t in scalars(1, 1).items()}
    scaled = scale(scalars(1), members, layout_of(scalar, 1), inputs, grid=[0.5, 2])
    assert torch.equal(scaled["0.weight"], scalars(1)["0.weight"])


@pytest.mark.parametrize("per", ["model", "layer"])
def test_agrees_with_a_loop_in_float64(per):
    model, grid = mlp(), (0.5, 1.0, 1.5, 2.0)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(60, 4, generator=generator)
    labels = torch.randint(3, (60,), generator=generator)
    members = drawn(model, 1, 3)
    fused = {key: t.mean(1) for key, t in members.items()}
    exact = {key: t[0].double() for key, t in fused.items()}

    def loss(factors):
        weights = {k: t * factors[int(k[0])] for k, t in exact.items()}
        logits = functional_call(model, weights, inputs.double())
        return float(nn.functional.cross_entropy(logits, labels))

    best = dict.fromkeys((0, 2, 4), 1.0)
    if per == "model":
        factor = min(grid, key=lambda g: loss(dict.fromkeys(best, g)))
        best = dict.fromkeys(best, factor)
    else:
        for layer in best:
            best[layer] = min(grid, key=lambda g: loss({**best, layer: g}))
    told = {}
    scaled = scale(
        fused,
        members,
        layout_of(mlp, 4),
        inputs,
        labels=labels,
        per=per,
        grid=grid,
        report=told,
    )
    assert set(best.values()) != {1.0}
    assert list(told["scales"].values()) == list(best.values())
    for key, tensor in exact.items():
        assert torch.allclose(scaled[key][0].double(), tensor * best[int(key[0])], atol=1e-6)


@pytest.mark.parametrize("per", ["model", "layer"])
def test_a_family_does_not_depend_on_those_beside_it(per):
    model, inputs = mlp(), torch.randn(60, 4, generator=torch.Generator().manual_seed(2))
    members, layout = drawn(model, 2, 3), layout_of(mlp, 4)
    fused = {key: t.mean(1) for key, t in members.items()}
    together = scale(fused, members, layout, inputs, per=per)
    for f in range(2):
        some = ({k: t[f : f + 1] for k, t in w.items()} for w in (fused, members))
        alone = scale(*some, layout, inputs, per=per)
        assert all(torch.allclose(together[k][f], alone[k][0], atol=1e-6) for k in alone)


def test_what_a_batch_normalisation_reads_is_not_scaled():
    model = normalised()
    inputs, told = torch.randn(60, 4, generator=torch.Generator().manual_seed(2)), {}
    members, layout = drawn(model, 1, 3), layout_of(normalised, 4)
    members["1.running_var"] = members["1.running_var"].abs() + 0.1
    fused = {k: t.mean(1) if t.is_floating_point() else t[:, 0] for k, t in members.items()}
    fused["3.weight"] = 0.3 * fused["3.weight"]
    scaled = scale(fused, members, layout, inputs, per="layer", report=told)
    assert told["scales"]["0.weight"] == 1.0
    assert told["scales"]["3.weight"] > 1
    assert torch.equal(scaled["1.weight"], fused["1.weight"])
    assert torch.equal(scaled["1.running_var"], fused["1.running_var"])


def test_inputs_stay_as_they_are_and_no_memory_is_shared():
    model, inputs = mlp(), torch.randn(20, 4, generator=torch.Generator().manual_seed(2))
    members = drawn(model, 1, 3)
    fused = {key: t.mean(1) for key, t in members.items()}
    before = {key: t.clone() for key, t in fused.items()}
    scaled = scale(fused, members, layout_of(mlp, 4), inputs)
    for key, tensor in scaled.items():
        assert torch.equal(fused[key], before[key])
        assert tensor.untyped_storage().data_ptr() != fused[key].untyped_storage().data_ptr()


def test_through_merge_what_was_chosen_is_reported():
    model, inputs = mlp(), torch.randn(20, 4, generator=torch.Generator().manual_seed(2))
    members = drawn(model, 3)
    members = [{k: t[m] for k, t in members.items()} for m in range(3)]
    report = merge(members, method="average", correct="scale", model=model, batches=inputs).report
    assert report["corrections"]["scale"]["judged_by"] == "soft vote"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "unit"}, "per must be one of .* got 'unit'"),
        ({"per": None}, "per must be one of .* got None"),
        ({"grid": (1, 0)}, r"grid\[1\] must be a number in \(0, inf\), got 0"),
        ({"grid": (1, float("nan"))}, r"grid\[1\] must be a number in \(0, inf\), got nan"),
        ({"grid": "12"}, "grid must hold numbers above 0, got '12'"),
        ({"grid": (True,)}, r"grid\[0\] must be a number in \(0, inf\), got True"),
        ({"grid": None}, "grid must hold numbers above 0, got None"),
        ({"grid": 2.0}, "grid must hold numbers above 0, got 2.0"),
        ({"labels": torch.tensor([2])}, "labels reach 2, the network has classes 0 to 1"),
    ],
)
def test_options_out_of_their_range_are_refused(options, message):
    inputs = torch.ones(1, 1)
    members = {k: t[None] for k, t in scalars(1, 2).items()}
    with pytest.raises(ConfigError, match=message):
        scale(scalars(1), members, layout_of(scalar, 1), inputs, **options)
