"""Networks of the zoo: shapes, sizes by formula, and what their programs say."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from metamerge.errors import ConfigError
from metamerge.structure import discover_program, run
from zoo.architectures import ARCHITECTURES, build, cnn, mlp, program_of


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10)])
@pytest.mark.parametrize("widths", [(), (7,), (9, 8, 7)])
def test_an_mlp_has_the_layers_that_were_asked_for(shape, widths):
    model = mlp(shape, 5, widths=widths)
    sizes = [shape[0] * shape[1] * shape[2], *widths, 5]
    linear = [module for module in model if isinstance(module, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == list(pairwise(sizes))
    assert count(model) == sum((i + 1) * o for i, o in pairwise(sizes))
    assert sum(isinstance(module, nn.ReLU) for module in model) == len(widths)
    assert model(torch.zeros(4, *shape)).shape == (4, 5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20)])
@pytest.mark.parametrize("widths", [(4,), (6, 5), (4, 6, 8)])
def test_a_cnn_has_the_layers_that_were_asked_for(shape, widths):
    model = cnn(shape, 5, widths=widths)
    sizes = [shape[0], *widths]
    convolutions = sum((9 * i + 1) * o for i, o in pairwise(sizes))
    assert count(model) == convolutions + (widths[-1] + 1) * 5
    assert sum(isinstance(module, nn.MaxPool2d) for module in model) == len(widths) - 1
    assert model(torch.zeros(4, *shape)).shape == (4, 5)


def test_a_cnn_reads_images_of_other_sizes():
    model = cnn((1, 8, 8), 5, widths=(4, 6))
    assert model(torch.zeros(2, 1, 14, 9)).shape == (2, 5)


def test_convolutions_do_not_lose_the_border():
    model = cnn((1, 8, 8), 5, widths=(4,))
    assert model[0](torch.zeros(1, 1, 8, 8)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_networks_are_built_by_name_with_widths_of_any_sequence(name):
    torch.manual_seed(0)
    expected = ARCHITECTURES[name]((1, 8, 8), 10, widths=(6, 5)).state_dict()
    torch.manual_seed(0)
    found = build(name, (1, 8, 8), 10, widths=[6, 5]).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_an_unknown_name_is_refused_with_those_that_are_known():
    told = r"'transformer' is unknown; there are \['cnn', 'convnet', 'mlp', 'resnet20', 'resnet8'\]"
    with pytest.raises(ConfigError, match=told):
        build("transformer", (1, 8, 8), 10, widths=(4,))


@pytest.mark.parametrize(("name", "groups"), [("mlp", [6, 5]), ("cnn", [6, 5])])
def test_the_program_computes_what_the_network_does_and_has_its_hidden_units(name, groups):
    model = build(name, (1, 8, 8), 4, widths=groups)
    program = program_of(model, (1, 8, 8))
    inputs = torch.rand(3, 1, 8, 8)
    found = run(program, model.state_dict(), [inputs])
    assert torch.allclose(found, model(inputs), atol=1e-6)
    assert program.input_shape() == (None, 1, 8, 8)
    assert sorted(discover_program(program).groups.values()) == sorted(groups)
