"""What optimal transport cannot bring together is refused, with the way out."""

import pytest
import torch
from torch import nn

from metamerge import merge
from metamerge.errors import ConfigError, IncompatibleWeights, StructureError


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"classes": 4}, r"weights\[1\]: '4.weight' has shape \(4, 5\).*axis 0 carries no hidden"),
        ({"inputs": 7}, r"weights\[1\]: '0.weight' has shape \(6, 7\).*axis 1 carries no hidden"),
    ],
)
def test_what_are_no_hidden_widths_must_agree(elastic_mlp, other, message):
    with pytest.raises(IncompatibleWeights, match=message):
        elastic_mlp.move([elastic_mlp.draw(), elastic_mlp.draw(**other)])


def test_widths_that_contradict_each_other_are_refused(elastic_mlp, elastic_cnn):
    broken = elastic_mlp.draw(7, 5)
    broken["2.weight"] = torch.zeros(5, 8)
    with pytest.raises(IncompatibleWeights, match=r"'0' are 7 in '0.weight' and 8 in '2.weight'"):
        elastic_mlp.move([elastic_mlp.draw(), broken])
    broken = elastic_cnn.draw()
    broken["5.weight"] = torch.zeros(3, 18)
    with pytest.raises(IncompatibleWeights, match="axis 1 must hold 4 per unit"):
        elastic_cnn.move([elastic_cnn.draw(), broken])
    broken["5.weight"] = torch.zeros(3, 16, 1)
    with pytest.raises(IncompatibleWeights, match=r"'5.weight' has shape \(3, 16, 1\)"):
        elastic_cnn.move([elastic_cnn.draw(), broken])


def test_a_reference_has_the_networks_widths(elastic_mlp):
    small, large = elastic_mlp.draw(), elastic_mlp.draw(9, 9)
    with pytest.raises(IncompatibleWeights, match="reference=1 has the widths"):
        elastic_mlp.move([small, large], reference=1)
    with pytest.raises(IncompatibleWeights, match="no member has the network's widths"):
        elastic_mlp.move([large, large])


@pytest.mark.parametrize(
    "options",
    [
        {"cost": "rows"},
        {"cost": None},
        {"hard": 1},
        {"regularisation": 0},
        {"regularisation": float("nan")},
        {"regularisation": True},
        {"regularisation": "small"},
        {"reference": 2},
        {"reference": -1},
        {"reference": True},
        {"cost": "activations"},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(elastic_mlp, options):
    with pytest.raises(ConfigError, match=f"optimal_transport: {next(iter(options))}"):
        elastic_mlp.move([elastic_mlp.draw(), elastic_mlp.draw(seed=1)], **options)


def test_a_network_with_a_width_in_its_operators_is_refused_at_other_widths():
    def depthwise(width):
        return nn.Sequential(
            nn.Conv2d(2, width, 1), nn.Conv2d(width, width, 1, groups=width), nn.Flatten(),
            nn.Linear(4 * width, 2),
        )  # fmt: skip

    nets, inputs = [depthwise(3), depthwise(5)], torch.randn(6, 2, 2, 2)
    given = {"method": "average", "align": "optimal_transport", "batches": inputs}
    assert merge(nets, **given).weights["1.weight"].shape == (3, 1, 1, 1)
    with pytest.raises(StructureError, match=r"weights\[1\] cannot be run at its own widths"):
        merge(nets, **given, align_options={"cost": "activations"})


def test_attention_is_refused_with_the_way_out(attention):
    with pytest.raises(StructureError, match=r"optimal_transport: .*align='weight_matching'"):
        merge(
            [attention(), attention()],
            method="average",
            align="optimal_transport",
            batches=torch.randn(4, 5, 3),
        )
