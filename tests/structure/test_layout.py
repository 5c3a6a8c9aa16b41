import pytest
import torch
from torch import nn

from metamerge.errors import StructureError
from metamerge.structure import OUTPUTS, Layout, discover_program, trace


def layout_of(model, *shape):
    program = trace(model, torch.zeros(2, *shape))
    return Layout(program, discover_program(program))


def described(layout):
    """Weight, bias, source and target of every layer, in order; node names are left out."""
    return [
        (x.weight, x.bias, x.source.partition(":")[0], x.target.partition(":")[0])
        for x in layout.layers
    ]


def kinds(layout):
    return [(x.linear, x.regressable, x.reads_inputs) for x in layout.layers]


def test_layers_of_a_perceptron_read_inputs_then_groups_then_make_outputs(networks):
    layout = networks["mlp"].layout
    assert described(layout) == [
        ("0.weight", "0.bias", "inputs", "0"),
        ("2.weight", "2.bias", "0", "2"),
        ("4.weight", "4.bias", "2", OUTPUTS),
    ]
    assert kinds(layout) == [(True, True, True), (True, True, False), (True, True, False)]
    assert list(layout.spaces.values()) == [5, 7, 6, 3]
    assert list(layout.spaces)[1:] == ["0", "2", OUTPUTS]


def test_a_space_knows_the_layers_that_make_it_and_read_it(networks):
    layout = networks["residual"].layout

    def weights(layers):
        return [layer.weight for layer in layers]

    assert weights(layout.producers("enter")) == ["enter.weight", "inner.weight", "down.weight"]
    assert weights(layout.consumers("enter")) == ["inner.weight", "up.weight", "leave.weight"]
    assert weights(layout.producers(OUTPUTS)) == ["leave.weight"]
    assert layout.consumers(OUTPUTS) == []
    assert layout.spaces["enter"] == 6


def test_layers_are_found_by_their_node(networks):
    layout = networks["residual maps"].layout
    for layer in layout.layers:
        assert layout.by_node[layer.node] is layer
    assert {layer.bias for layer in layout.layers} == {None, "fc.bias"}


def test_only_linear_maps_and_ungrouped_2d_convolutions_are_matrices_over_patches(networks):
    assert kinds(networks["conv1d"].layout)[:2] == [(False, False, True), (False, False, False)]
    depthwise = networks["depthwise"].layout
    assert kinds(depthwise) == [(False, True, True), (False, False, True), (True, True, False)]
    assert depthwise.layers[1].target == "0"


def test_a_hidden_layer_of_one_unit_is_fixed_but_no_output(networks):
    layout = networks["bottleneck of one unit"].layout
    assert described(layout) == [
        ("0.weight", "0.bias", "inputs", "0"),
        ("2.weight", "2.bias", "0", "fixed"),
        ("4.weight", "4.bias", "inputs", OUTPUTS),
    ]
    assert list(layout.spaces.values()) == [5, 4, 1, 1, 3]


def test_rows_that_are_tied_to_the_inputs_are_fixed_but_no_output():
    class Back(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.back, self.leave = nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.leave(x + self.back(torch.relu(self.enter(x))))

    layout = layout_of(Back(), 5)
    assert described(layout) == [
        ("enter.weight", "enter.bias", "inputs", "enter"),
        ("back.weight", "back.bias", "enter", "fixed"),
        ("leave.weight", "leave.bias", "inputs", OUTPUTS),
    ]


def test_the_matrix_of_a_linear_layer_is_its_weight():
    layout = layout_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), 2)
    weight = torch.arange(6.0)
    first = layout.matrix(layout.layers[0], weight.reshape(3, 2))
    second = layout.matrix(layout.layers[1], weight.reshape(2, 3))
    assert first.tolist() == [[[0], [1]], [[2], [3]], [[4], [5]]]
    assert second.tolist() == [[[0], [1], [2]], [[3], [4], [5]]]


def test_the_matrix_of_a_convolution_has_its_taps_behind():
    model = nn.Sequential(nn.Conv2d(1, 2, (1, 2)), nn.ReLU(), nn.Conv2d(2, 3, (1, 2)))
    layout = layout_of(model, 1, 3, 5)
    first = layout.matrix(layout.layers[0], torch.arange(4.0).reshape(2, 1, 1, 2))
    assert first.tolist() == [[[0, 1]], [[2, 3]]]
    second = layout.matrix(layout.layers[1], torch.arange(12.0).reshape(3, 2, 1, 2))
    assert second.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    assert list(layout.spaces.values()) == [1, 2, 3]


def test_the_matrix_behind_a_flatten_has_positions_behind():
    # Two channels of 1 by 2 positions: columns 0 and 1 are channel 0, 2 and 3 channel 1.
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(4, 2))
    layout = layout_of(model, 1, 1, 2)
    last = layout.layers[1]
    weight = torch.arange(8.0).reshape(2, 4)
    assert layout.matrix(last, weight).tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert layout.spaces[last.source] == 2
    stacked = layout.matrix(last, torch.stack([weight, -weight])[None])
    assert stacked.shape == (1, 2, 2, 2, 2)
    assert torch.equal(stacked[0, 1], -layout.matrix(last, weight))


def test_a_matrix_is_permuted_by_permuting_its_rows_and_columns(layered):
    spec, layout, weights = layered.spec, layered.layout, layered.weights(2)
    perm = spec.random(torch.Generator().manual_seed(0))
    permuted = spec.permute(weights, perm)
    sizes = layout.spaces
    for layer in layout.layers:
        rows = perm.get(layer.target, torch.arange(sizes[layer.target]))
        columns = perm.get(layer.source, torch.arange(sizes[layer.source]))
        before = layout.matrix(layer, weights[layer.weight])
        after = layout.matrix(layer, permuted[layer.weight])
        assert before.shape[:3] == (2, len(rows), len(columns))
        assert before.numel() == weights[layer.weight].numel()
        assert torch.equal(after, before[:, rows][:, :, columns]), layer.weight


def test_running_means_belong_to_layers_that_only_a_batch_normalisation_reads(networks):
    layout = networks["residual maps"].layout
    named = {layout.by_node[node].weight: key for node, key in layout.running_means.items()}
    assert named == {
        "stem.weight": "bn0.running_mean",
        "conv1.weight": "bn1.running_mean",
        "conv2.weight": "bn2.running_mean",
        "short.weight": "bn3.running_mean",
    }


def test_a_layer_that_is_read_beside_its_normalisation_has_no_running_mean():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.norm, self.leave = nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)

        def forward(self, x):
            x = self.enter(x)
            return self.leave(x + self.norm(x))

    assert layout_of(Beside(), 5).running_means == {}


def test_a_normalisation_of_the_batch_itself_has_no_running_mean(networks):
    layout = networks["batch normalisation without running statistics"].layout
    assert layout.running_means == {}
    assert networks["mlp"].layout.running_means == {}


def test_the_layers_of_every_network_are_its_linear_maps_and_convolutions(layered):
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
    modules = [f"{n}.weight" for n, m in layered.build().named_modules() if isinstance(m, kinds)]
    assert sorted(layer.weight for layer in layered.layout.layers) == sorted(modules)


def test_plain_networks_are_those_of_layers_with_one_group_per_axis(networks):
    for name, network in networks.items():
        assert network.layout.spec.groups, name
        assert network.layout.layers, name
        if network.layered:
            network.layout.check_plain()
            continue
        with pytest.raises(StructureError):
            network.layout.check_plain()


def refused(layout):
    """What a layout says of a network that is no plain one."""
    with pytest.raises(StructureError) as caught:
        layout.check_plain()
    return str(caught.value)


class Shared(nn.Module):
    """Two layers that share a weight or a bias."""

    def __init__(self, weight, bias):
        super().__init__()
        self.enter, self.one = nn.Linear(4, 5), nn.Linear(5, 5)
        self.two, self.leave = nn.Linear(5, 5), nn.Linear(5, 3)
        if weight:
            self.two.weight = self.one.weight
        if bias:
            self.two.bias = self.one.bias

    def forward(self, x):
        x = torch.relu(self.enter(x))
        return self.leave(torch.relu(self.two(torch.relu(self.one(x)))))


@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (True, True)])
def test_tensors_that_two_layers_share_are_refused_by_name(weight, bias):
    message = refused(layout_of(Shared(weight, bias), 4))
    assert "used by several layers" in message
    assert (".weight'" in message) == weight
    assert (".bias'" in message) == bias


@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (True, True)])
def test_layers_that_share_a_tensor_say_so(weight, bias):
    layers = layout_of(Shared(weight, bias), 4).layers
    assert [layer.shared for layer in layers] == [False, True, True, False]


def test_nothing_shared_is_not_refused():
    layout = layout_of(Shared(False, False), 4)
    layout.check_plain()
    assert layout.unshared == layout.layers
    assert len(layout.layers) == 4


class Scaled(nn.Module):
    """A weight that is computed."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = nn.functional.linear(x, self.enter.weight * 2)
        return self.leave(torch.relu(x))


def test_a_computed_weight_is_refused_by_name():
    message = refused(layout_of(Scaled(), 4))
    assert message.startswith("enter.weight: is read by aten.mul.Tensor (mul)")
    assert "Align and average such networks." in message


def test_a_computed_weight_is_no_layer_and_mixed_along_its_rows():
    layout = layout_of(Scaled(), 4)
    assert [layer.weight for layer in layout.layers] == ["leave.weight"]
    axis, units = layout.carried["enter.weight"]
    assert (axis, units.spaces) == (0, ("enter",))


def test_a_vector_that_is_computed_is_refused_where_a_layer_reads_it():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            x = nn.functional.linear(x, self.enter.weight, self.enter.bias * 2)
            return self.leave(torch.relu(x))

    assert "its weight is computed" in refused(layout_of(Shifted(), 4))


@pytest.mark.parametrize(
    ("model", "example", "reader"),
    [
        (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3)), torch.zeros(2, 5).long(), "embedding"),
        (nn.ConvTranspose2d(2, 3, 2), torch.zeros(2, 2, 4, 4), "conv_transpose2d"),
        (nn.Bilinear(4, 4, 3), [torch.zeros(2, 4)] * 2, "bilinear"),
    ],
)
def test_matrices_that_no_layer_reads_are_refused_with_their_reader(model, example, reader):
    program = trace(model, example)
    message = refused(Layout(program, discover_program(program)))
    assert "weight: is read by aten." in message
    assert f"aten.{reader}" in message


def test_columns_of_two_groups_are_refused_with_both():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.inner = nn.Conv1d(2, 3, 1), nn.Linear(4, 5, bias=False)
            self.leave = nn.Linear(15, 2)

        def forward(self, x):  # [b, 2, 4] -> channels by units
            return self.leave(torch.relu(self.inner(self.conv(x))).flatten(1))

    message = refused(layout_of(Both(), 2, 4))
    assert "leave.weight: its rows carry the groups [], its columns ['conv', 'inner']" in message


@pytest.mark.parametrize(
    ("name", "weight"), [("grouped convolution", "0.weight"), ("concatenation", "leave.weight")]
)
def test_blocks_and_concatenations_are_refused_by_name(networks, name, weight):
    assert refused(networks[name].layout).startswith(f"{weight}: its rows carry the groups ")


def test_a_fixed_batch_is_refused():
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(4, 5)

        def forward(self, x):
            return self.enter(x)[0]

    layout = layout_of(First(), 4)
    assert "whatever the size of the batch" in refused(layout)
    with pytest.raises(StructureError, match="whatever the size of the batch"):
        _ = layout.layers


def test_a_network_that_cannot_be_traced_has_a_layout_without_layers(networks):
    layout = Layout(None, networks["mlp"].spec)
    assert layout.spec.groups == {"0": 7, "2": 6}
    assert "cannot be traced" in refused(layout)
    with pytest.raises(StructureError, match="cannot be traced"):
        _ = layout.layers
