"""Layers of networks whose axes carry nests of groups, concatenations, blocks or shared weights."""

import pytest
import torch
from torch import nn

from metamerge.errors import StructureError
from metamerge.structure import OUTPUTS, Layout, discover_program, trace
from metamerge.structure.factors import Factor
from metamerge.structure.spec import PermutationSpec

READ_AND_MADE = {
    "vision": {
        "patches": (["inputs"], ["token"]),
        "q": (["token"], ["q x q#2"]),
        "k": (["token"], ["q x q#2"]),
        "v": (["token"], ["q x v"]),
        "out": (["q x v"], ["token"]),
        "up": (["token"], ["up"]),
        "down": (["up"], ["token"]),
        "leave": (["token"], [OUTPUTS]),
    },
    "dense": {
        "stem": (["inputs"], ["stem"]),
        "one": (["stem"], ["one"]),
        "two": (["stem", "one"], ["two"]),
        "leave": (["stem", "one", "two"], [OUTPUTS]),
    },
    "hourglass": {
        "enter": (["inputs"], ["enter"]),
        "down": (["enter"], ["down"]),
        "join": (["enter", "up", "inputs"], ["join"]),
        "leave": (["join"], [OUTPUTS]),
    },
    "blocks": {
        "enter": (["inputs"], ["enter x enter#2"]),
        "inner": (["enter x enter#2"], ["enter x inner"]),
        "leave": (["enter x inner"], [OUTPUTS]),
    },
    "recurrent": {"enter": (["inputs"], ["enter"]), "leave": (["cells"], [OUTPUTS])},
    "tied": {"inner": (["inner"], ["inner"]), "leave": (["inner"], [OUTPUTS])},
}


def layout_of(model, *shape):
    program = trace(model, torch.zeros(2, *shape))
    return Layout(program, discover_program(program))


def described(layer):
    return tuple([s.partition(":")[0] for s in spaces] for spaces in (layer.sources, layer.targets))


@pytest.mark.parametrize("name", READ_AND_MADE)
def test_spaces_are_groups_nests_and_parts_of_concatenations(wired_network, name):
    layers = wired_network(name).layout.layers
    found = {layer.weight.removesuffix(".weight"): described(layer) for layer in layers}
    assert found == READ_AND_MADE[name]


def test_a_packed_layer_makes_queries_and_keys_together_and_values_beside_them(wired_network):
    layout = wired_network("encoder").layout
    packed = layout.layers[0]
    assert packed.weight == "encoder.layers.0.self_attn.in_proj_weight"
    name = "encoder.layers.0.self_attn"
    assert packed.targets == (f"{name} x {name}#2", f"{name} x {name}#3")
    rows = layout.rows(packed)
    assert rows.sizes == (8, 8)  # two heads of four units
    assert rows.index.tolist() == [*range(8), *range(8), *range(8, 16)]


def test_shared_layers_are_those_whose_tensors_something_else_reads(wired):
    shared = [layer for layer in wired.layout.layers if layer.shared]
    assert len(shared) == (3 if wired.name == "tied" else 0)  # a layer twice, and the embedding
    assert len(wired.layout.unshared) == len(wired.layout.layers) - len(shared)


def test_a_matrix_is_permuted_by_permuting_the_units_of_its_rows_and_columns(wired):
    spec, layout = wired.layout.spec, wired.layout
    weights = {key: t[0, :1] for key, t in wired.members.items()}  # [1, ...]
    perm = spec.random(torch.Generator().manual_seed(0))
    permuted = spec.permute(weights, perm)
    for layer in layout.layers:
        rows, columns = layout.rows(layer), layout.columns(layer)
        before = layout.matrix(layer, weights[layer.weight])
        after = layout.matrix(layer, permuted[layer.weight])
        assert before.shape[:3] == (1, sum(rows.sizes), sum(columns.sizes))
        assert before.count_nonzero() == weights[layer.weight].numel()
        if layer.blocks > 1:  # pairs of units in different blocks are all alike
            continue
        same = (after[0][:, :, None] == before[0].flatten(0, 1)).all(-1)  # [rows, columns, pairs]
        assert (same.sum(-1) == 1).all(), layer.weight
        row, column = torch.unravel_index(same.long().argmax(-1), before.shape[1:3])
        assert (row == row[:, :1]).all(), layer.weight
        assert (column == column[:1]).all(), layer.weight


def test_the_matrix_of_a_grouped_convolution_has_zeros_between_its_blocks():
    # Two blocks of two rows and two columns, without room around them: a matrix of 4 by 4.
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1, groups=2), nn.GELU(), nn.Conv2d(4, 3, 1)
    )
    layout = layout_of(model, 1, 2, 2)
    layer = layout.layers[1]
    assert layer.blocks == 2
    assert not layer.regressable
    matrix = layout.matrix(layer, torch.arange(1.0, 9.0).reshape(4, 2, 1, 1))
    assert matrix[..., 0].tolist() == [[1, 2, 0, 0], [3, 4, 0, 0], [0, 0, 5, 6], [0, 0, 7, 8]]


def test_a_depthwise_convolution_reads_one_fixed_column():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 3, groups=4), nn.GELU())
    layer = layout_of(nn.Sequential(model, nn.Conv2d(4, 3, 1)), 1, 5, 5).layers[1]
    assert (layer.blocks, layer.reads_inputs, layer.targets) == (1, True, ("0.0",))


def test_parts_of_different_length_are_filled_up_with_zeros():
    class Uneven(nn.Module):
        """Two maps by two positions beside one unit."""

        def __init__(self):
            super().__init__()
            self.maps, self.unit = nn.Conv1d(1, 2, 1), nn.Linear(2, 3)
            self.leave = nn.Linear(7, 2)

        def forward(self, x):
            left, right = torch.relu(self.maps(x)).flatten(1), torch.relu(self.unit(x[:, 0]))
            return self.leave(torch.cat([left, right], 1))

    layout = layout_of(Uneven(), 1, 2)
    last = layout.layers[-1]
    assert last.sources == ("maps", "unit")
    assert last.source == "maps + unit"
    assert not last.reads_inputs
    matrix = layout.matrix(last, torch.arange(1.0, 15.0).reshape(2, 7))
    assert matrix[0].tolist() == [[1, 2], [3, 4], [5, 0], [6, 0], [7, 0]]
    assert layout.consumers("unit") == [last]
    assert list(layout.spaces.values()) == [1, 2, 2, 3, 2]


def test_heads_of_different_sizes_are_not_the_outputs_as_a_whole():
    class Heads(nn.Module):
        def __init__(self, left, right):
            super().__init__()
            self.enter = nn.Linear(4, 6)
            self.left, self.right = nn.Linear(6, left), nn.Linear(6, right)

        def forward(self, x):
            x = torch.relu(self.enter(x))
            return torch.cat([self.left(x), self.right(x)], 1)

    def targets(*sizes):
        return [x.target.partition(":")[0] for x in layout_of(Heads(*sizes), 4).layers]

    assert targets(3, 3) == ["enter", OUTPUTS, OUTPUTS]
    assert targets(3, 2) == ["enter", "fixed", "fixed"]


def test_a_layer_before_a_matrix_of_another_kind_makes_no_outputs():
    class Multiplied(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(4, 1), nn.Parameter(torch.randn(1, 3))

        def forward(self, x):
            return torch.tanh(self.enter(x)) @ (2 * self.leave)

    layout = layout_of(Multiplied(), 4)
    assert [x.target.partition(":")[0] for x in layout.layers] == ["fixed"]
    assert layout.producers(OUTPUTS) == []


def test_columns_whose_blocks_cannot_be_told_apart_are_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    program = trace(model, torch.zeros(2, 3))
    rows, inner = (Factor("heads", 2), Factor("units", 2)), (Factor(None, 2), Factor("units", 2))
    axes = {"0.weight": (rows, (Factor(None, 3),)), "0.bias": (rows,)}
    axes["2.weight"] = ((Factor(None, 2),), inner)
    spec = PermutationSpec({"heads": 2, "units": 2}, axes, {"units": ("heads",)})
    with pytest.raises(StructureError, match=r"^2\.weight: its columns carry \['units'\], which"):
        _ = Layout(program, spec).layers
