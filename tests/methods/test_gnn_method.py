import pytest
import torch
from torch import nn

from metamerge.errors import ConfigError, IncompatibleWeights
from metamerge.mergers.gnn import GNNConfig, GNNMerger
from metamerge.methods import average, gnn
from metamerge.weights import stack


def make_merger(noise=0.0, shape=(5,)):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        merger = GNNMerger(GNNConfig(input_shape=shape, probes=32, width=8))
        for parameter in merger.parameters():
            parameter.add_(noise * torch.randn(parameter.shape))
    return merger.requires_grad_(False)


def assert_equal(found, expected, tolerance):
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, atol=tolerance, rtol=0), key


def test_a_fresh_merger_is_the_average_of_four_numbers(scalar_layout, scalar_members):
    fused = gnn(scalar_members(1, 2, 3, 6), layout=scalar_layout, merger=make_merger(shape=(1,)))
    assert fused["0.weight"].flatten().tolist() == pytest.approx([3.0, 0.0])


def test_a_fresh_merger_is_the_average(mlp_layout, mlp_members):
    fused = gnn(mlp_members, layout=mlp_layout, merger=make_merger())
    assert_equal(fused, average(mlp_members), 1e-6)


def test_the_method_is_the_merger_on_a_family_of_one(mlp_layout, mlp_members):
    merger = make_merger(0.1)
    expected = merger({k: t[None] for k, t in stack(mlp_members).items()}, mlp_layout)
    fused = gnn(mlp_members, layout=mlp_layout, merger=merger)
    assert_equal(fused, {key: expected[key][0] for key in mlp_members[0]}, 0)
    assert not torch.allclose(fused["0.weight"], average(mlp_members)["0.weight"], atol=1e-3)


def test_calibration_inputs_replace_the_probes(mlp_layout, mlp_members):
    merger, inputs = make_merger(0.1), torch.randn(40, 5)
    expected = merger({k: t[None] for k, t in stack(mlp_members).items()}, mlp_layout, inputs)
    for batches in (inputs, (inputs, torch.zeros(40, dtype=torch.long)), inputs.split(7)):
        fused = gnn(mlp_members, layout=mlp_layout, merger=merger, batches=batches)
        assert_equal(fused, {key: expected[key][0] for key in mlp_members[0]}, 0)
    without = gnn(mlp_members, layout=mlp_layout, merger=merger)
    assert not torch.equal(fused["2.weight"], without["2.weight"])


def test_another_module_is_refused(mlp_layout, mlp_members):
    with pytest.raises(ConfigError, match="merger is a Linear, expected a GNNMerger"):
        gnn(mlp_members, layout=mlp_layout, merger=nn.Linear(2, 2))


def test_a_merger_for_other_inputs_is_refused(mlp_layout, mlp_members):
    with pytest.raises(IncompatibleWeights, match="batches="):
        gnn(mlp_members, layout=mlp_layout, merger=make_merger(shape=(7,)))


def test_empty_batches_are_refused_even_with_one_member(mlp_layout, mlp_members):
    with pytest.raises(ConfigError, match="no inputs"):
        gnn(mlp_members[:1], layout=mlp_layout, merger=make_merger(), batches=[])
