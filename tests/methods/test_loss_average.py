import math

import pytest
import torch

from metamerge import merge
from metamerge.errors import ConfigError
from metamerge.methods import average, loss_average
from metamerge.weights import unstack


def value(fused):
    return fused["0.weight"][0].item()


def batches(label):
    return torch.ones(1, 1), torch.tensor([label])


def test_two_numbers(scalar_layout, scalar_members):
    # Logits [a, 0] and label 0 give the loss log(1 + exp(-a)); exp(-loss) is 1 / (1 + exp(-a)).
    chance = [1 / (1 + math.exp(-a)) for a in (1, 3)]
    expected = (chance[0] + 3 * chance[1]) / sum(chance)
    report = {}
    fused = loss_average(
        scalar_members(1, 3), layout=scalar_layout, batches=batches(0), report=report
    )
    assert value(fused) == pytest.approx(expected)
    assert report["coefficients"] == pytest.approx([c / sum(chance) for c in chance])
    assert report["losses"] == pytest.approx([-math.log(c) for c in chance])


@pytest.mark.parametrize(("label", "best"), [(0, 9.0), (1, -4.0)])
def test_a_small_temperature_leaves_the_best(scalar_layout, scalar_members, label, best):
    members = scalar_members(-4, 2, 9)
    given = {"layout": scalar_layout, "batches": batches(label)}
    for temperature in (1e-3, 1e-300):
        assert value(loss_average(members, **given, temperature=temperature)) == best
    cold = loss_average(members, **given, temperature=1e9)
    assert value(cold) == pytest.approx(value(average(members)))


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf"), None, "hot"])
def test_a_temperature_that_is_not_above_zero_is_refused(
    scalar_layout, scalar_members, temperature
):
    with pytest.raises(ConfigError, match=r"temperature must be a number in \(0, inf\)"):
        loss_average(
            scalar_members(1, 2), layout=scalar_layout, batches=batches(0), temperature=temperature
        )


def test_batches_without_labels_are_refused(scalar_layout, scalar_members):
    with pytest.raises(ConfigError, match="no labels"):
        loss_average(scalar_members(1, 2), layout=scalar_layout, batches=torch.ones(1, 1))


def test_of_trained_networks_the_better_counts_more(digits_zoo):
    inputs, targets = digits_zoo.objective
    family = unstack({key: tensor[0] for key, tensor in digits_zoo.unseen.items()})
    options = {"model": digits_zoo.network(), "batches": (inputs, targets), "align": None}
    told = merge(family, method="loss_average", **options).report["chosen"]
    order = sorted(range(4), key=told["losses"].__getitem__)
    shares = [told["coefficients"][i] for i in order]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
