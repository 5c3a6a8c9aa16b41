import pytest
import torch
from torch import nn

from metamerge.errors import ConfigError
from metamerge.mergers import GNNConfig, GNNMerger, adapt, fuse
from metamerge.mergers.refining import ALONE
from metamerge.methods import average, gnn
from metamerge.weights import stack


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make_merger(noise=0.0, shape=(5,), **config):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        merger = GNNMerger(GNNConfig(shapes=(shape,), probes=32, width=8, **config))
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


def family(members):
    """A family of one: ``[1, m, ...]``."""
    return {key: tensor[None] for key, tensor in stack(members).items()}


def first_of(fused, members):
    return {key: fused[key][0] for key in members[0]}


@pytest.mark.parametrize("steps", [0, 3])
def test_the_method_is_the_merger_on_a_family_of_one(mlp_layout, mlp_members, steps):
    merger = make_merger(0.1, refine=steps)
    expected = fuse(merger, family(mlp_members), mlp_layout)
    report = {}
    fused = gnn(mlp_members, layout=mlp_layout, merger=merger, report=report)
    assert_equal(fused, first_of(expected, mlp_members), 0)
    assert not torch.allclose(fused["0.weight"], average(mlp_members)["0.weight"], atol=1e-3)
    assert report == {"watched_on": "32 learned probes"}


def test_steps_of_refining_can_be_asked_for(mlp_layout, mlp_members):
    merger = make_merger(0.1, refine=3)
    for steps in (0, 5):
        expected = fuse(merger, family(mlp_members), mlp_layout, steps=steps)
        fused = gnn(mlp_members, layout=mlp_layout, merger=merger, refine=steps)
        assert_equal(fused, first_of(expected, mlp_members), 0)
    with pytest.raises(ConfigError, match="refine"):
        gnn(mlp_members, layout=mlp_layout, merger=merger, refine=-1)


def test_many_inputs_take_the_place_of_the_probes(mlp_layout, mlp_members):
    merger, inputs = make_merger(0.1), torch.randn(1000, 5)
    expected = fuse(merger, family(mlp_members), mlp_layout, inputs, steps=ALONE)
    for batches in (inputs, inputs.split(300)):
        report = {}
        fused = gnn(mlp_members, layout=mlp_layout, merger=merger, batches=batches, report=report)
        assert_equal(fused, first_of(expected, mlp_members), 0)
        assert report == {"watched_on": "1000 inputs"}
    without = gnn(mlp_members, layout=mlp_layout, merger=merger)
    assert not torch.equal(fused["2.weight"], without["2.weight"])


def test_few_inputs_join_the_probes(mlp_layout, mlp_members):
    merger, inputs, report = make_merger(0.1), torch.randn(999, 5), {}
    both = torch.cat([inputs, merger.probes((5,))])
    expected = fuse(merger, family(mlp_members), mlp_layout, both)
    fused = gnn(mlp_members, layout=mlp_layout, merger=merger, batches=inputs, report=report)
    assert_equal(fused, first_of(expected, mlp_members), 0)
    assert report == {"watched_on": "999 inputs and 32 learned probes"}


def test_few_inputs_stand_alone_and_count_for_more_where_probes_are_strange(
    mlp_layout, mlp_members
):
    merger, inputs, report = make_merger(0.1, refine=2, familiar=1.0), torch.randn(200, 5), {}
    expected = fuse(merger, family(mlp_members), mlp_layout, inputs, steps=ALONE)
    fused = gnn(mlp_members, layout=mlp_layout, merger=merger, batches=inputs, report=report)
    assert_equal(fused, first_of(expected, mlp_members), 0)
    assert report == {"watched_on": "200 inputs"}
    asked = gnn(mlp_members, layout=mlp_layout, merger=merger, batches=inputs, refine=2)
    assert not torch.allclose(asked["0.weight"], fused["0.weight"], atol=1e-5)


def test_hardly_any_inputs_stand_beside_all_that_there_is(mlp_layout, mlp_members):
    merger, inputs, report = make_merger(0.1, refine=2, familiar=1.0), torch.randn(20, 5), {}
    fused = gnn(mlp_members, layout=mlp_layout, merger=merger, batches=inputs, report=report)
    assert report["watched_on"] == (
        "20 inputs, 32 learned probes, strange to the members, and 32 made from the members"
    )
    for batches in (None, inputs[:19]):
        other = gnn(mlp_members, layout=mlp_layout, merger=merger, batches=batches)
        assert not torch.allclose(other["0.weight"], fused["0.weight"], atol=1e-6)


def test_who_is_watched_on_strange_probes_is_told_so(mlp_layout, mlp_members):
    merger, report = make_merger(0.1, familiar=1.0), {}
    fused = gnn(mlp_members, layout=mlp_layout, merger=merger, report=report)
    assert_equal(fused, first_of(fuse(merger, family(mlp_members), mlp_layout), mlp_members), 0)
    assert report["watched_on"] == (
        "32 learned probes, strange to the members, and 32 made from the members"
    )


def test_few_inputs_of_a_shape_without_probes_stand_alone(mlp_layout, mlp_members):
    merger, inputs, report = make_merger(0.1, shape=(7,)), torch.randn(200, 5), {}
    expected = fuse(merger, family(mlp_members), mlp_layout, inputs, steps=ALONE)
    fused = gnn(mlp_members, layout=mlp_layout, merger=merger, batches=inputs, report=report)
    assert_equal(fused, first_of(expected, mlp_members), 0)
    assert report == {"watched_on": "200 inputs"}


def test_labelled_inputs_adapt_the_fused_network(mlp_layout, mlp_members):
    merger, report = make_merger(0.1), {}
    inputs, labels = torch.randn(40, 5), torch.arange(40) % 3
    expected = adapt(merger, family(mlp_members), mlp_layout, inputs, labels, generator=seeded())
    fused = gnn(
        mlp_members,
        layout=mlp_layout,
        merger=merger,
        batches=(inputs, labels),
        generator=seeded(),
        report=report,
    )
    assert_equal(fused, first_of(expected, mlp_members), 0)
    assert report["chosen_on"] == "4-fold cross-validation on the 40 labelled inputs"


def test_without_adapting_labels_have_no_say(mlp_layout, mlp_members):
    merger, inputs = make_merger(0.1), torch.randn(40, 5)
    fused, plain = (
        gnn(mlp_members, layout=mlp_layout, merger=merger, batches=batches, adapt=False)
        for batches in ((inputs, torch.arange(40) % 3), inputs)
    )
    assert_equal(fused, plain, 0)


def test_a_merger_without_probes_of_this_shape_imagines_some(mlp_layout, mlp_members):
    merger = make_merger(0.1, shape=(7,))
    fused = gnn(mlp_members, layout=mlp_layout, merger=merger)
    expected = fuse(merger, family(mlp_members), mlp_layout)
    assert_equal(fused, first_of(expected, mlp_members), 0)
    assert not torch.allclose(fused["2.weight"], average(mlp_members)["2.weight"], atol=1e-3)


def test_inputs_of_another_shape_are_refused(mlp_layout, mlp_members):
    labels = torch.zeros(20, dtype=torch.long)
    for batches in (torch.randn(20, 7), (torch.randn(20, 7), labels)):
        with pytest.raises(ConfigError, match=r"\(20, 7\), the network takes \(b, 5\)"):
            gnn(mlp_members, layout=mlp_layout, merger=make_merger(), batches=batches)


def test_labels_that_the_network_does_not_have_are_refused(mlp_layout, mlp_members):
    batches = (torch.randn(20, 5), torch.arange(20) % 4)
    with pytest.raises(ConfigError, match="labels reach 3, the network has classes 0 to 2"):
        gnn(mlp_members, layout=mlp_layout, merger=make_merger(), batches=batches)


def test_another_module_is_refused(mlp_layout, mlp_members):
    with pytest.raises(ConfigError, match="merger is of type Linear, expected GNNMerger"):
        gnn(mlp_members, layout=mlp_layout, merger=nn.Linear(2, 2))


def test_empty_batches_are_refused_even_with_one_member(mlp_layout, mlp_members):
    with pytest.raises(ConfigError, match="no inputs"):
        gnn(mlp_members[:1], layout=mlp_layout, merger=make_merger(), batches=[])
