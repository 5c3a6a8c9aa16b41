"""Programs of other widths: the same as if the wider network had been traced."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamerge.errors import StructureError
from metamerge.structure import Concat, Factor, discover_program, run, trace
from metamerge.structure.resizing import narrowed, places, resized
from zoo import architectures

SHAPE = (1, 12, 12)


def program_of(name, widths):
    network = architectures.build(name, SHAPE, 5, widths=widths)
    return architectures.program_of(network, SHAPE)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("mlp", (3, 4), (6, 2)), ("cnn", (2, 3), (5, 2)), ("convnet", (2, 3), (4, 7))],
)
def test_a_program_is_the_one_that_would_have_been_traced(name, before, after):
    program, wanted = (program_of(name, widths) for widths in (before, after))
    spec, other = discover_program(program), discover_program(wanted)
    found = resized(program, spec, other.groups)
    assert found.to_json() == wanted.to_json()


class Parts(nn.Module):
    """Concatenation, slices, a grouped convolution and a split."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 3, 1)
        self.c = nn.Conv2d(4, 4, 3, groups=4)
        self.head = nn.Linear(7, 2)
        self.gate = nn.Linear(3, 3)

    def forward(self, x):
        x = torch.cat([self.a(x).relu(), self.b(x).relu()], 1)
        first, second = x[:, :4], x[:, 4:]
        first = self.c(first).mean((2, 3))
        second = second.mean((2, 3))
        x = torch.cat([first, self.gate(second).tanh()], 1)
        one, two = x.split([4, 3], 1)
        return self.head(torch.cat([one, two], 1))


def test_slices_splits_and_groups_follow_their_units():
    program = trace(Parts(), torch.rand(2, *SHAPE))
    spec = discover_program(program)
    group = next(g for g, n in spec.groups.items() if n == 4)
    wide = resized(program, spec, {group: 6})
    calls = {node.op: node for node in wide.nodes}
    assert calls["split_with_sizes.default"].arguments["split_sizes"] == (6, 3)
    assert wide.nodes[0].op == "conv2d.default"
    assert [n.arguments["groups"] for n in wide.nodes if n.op == "conv2d.default"] == [1, 1, 6]
    shapes = {key: wide.shape(value) for value, key in wide.parameters.items()}
    assert shapes["head.weight"] == (2, 9)
    assert run(
        wide, {k: torch.ones(s) for k, s in shapes.items()}, [torch.ones(3, *SHAPE)]
    ).shape == (
        3,
        2,
    )


class Fixed(nn.Module):
    """A forward() with a size that belongs to no parameter."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(F.relu(self.a(x)) + torch.zeros(4))


def test_a_size_that_cannot_be_followed_is_refused():
    program = trace(Fixed(), torch.rand(2, 3))
    spec = discover_program(program)
    with pytest.raises(StructureError, match="does not follow its units"):
        resized(program, spec, {"a": 8})


@pytest.mark.parametrize("widths", [{"nobody": 3}, {"1": 0}])
def test_unknown_groups_and_empty_ones_are_refused(widths):
    program = program_of("mlp", (3,))
    with pytest.raises(StructureError, match="expected 1 or more units for each of"):
        resized(program, discover_program(program), widths)


def test_places_by_hand():
    # two units of "a" times three positions, in a network with five units, from unit 2 on
    axis = (Factor("a", 2), Factor(None, 3))
    assert places(axis, {"a": 5}, {"a": 2}).tolist() == [6, 7, 8, 9, 10, 11]
    # "b" behind "a": it begins where the five units of "a" end
    joined = (Concat(((Factor("a", 2),), (Factor("b", 2),))),)
    assert places(joined, {"a": 5, "b": 3}, {"a": 1, "b": 1}).tolist() == [1, 2, 6, 7]


def test_narrowing_by_hand():
    program = program_of("mlp", (3,))
    spec = discover_program(program)
    weights = {
        "1.weight": torch.arange(3.0)[:, None].expand(3, 144),
        "1.bias": torch.arange(3.0),
        "3.weight": torch.arange(15.0).reshape(5, 3),
        "3.bias": torch.zeros(5),
    }
    found = narrowed(weights, spec, {"1": 2})
    assert found["1.bias"].tolist() == [0, 1]
    assert found["3.weight"].tolist() == [[0, 1], [3, 4], [6, 7], [9, 10], [12, 13]]
    assert found["3.bias"] is not weights["3.bias"]
