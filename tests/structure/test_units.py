"""What lies along an axis, and what is computed along it, by hand and on wired networks."""

import pytest
import torch
from torch import nn

from metamerge.structure import OUTPUTS, Layout, PermutationSpec, discover_program, trace
from metamerge.structure.factors import Concat, Factor, axis_length, axis_places
from metamerge.structure.units import mix_units, units_along

A, B = Factor("a", 2), Factor("b", 3)
SPEC = PermutationSpec({"a": 2, "b": 3}, {}, {"b": ("a",)})


def along(*axis):
    return units_along(SPEC, list(axis_places(axis)), axis_length(axis), "fixed:0")


def layout_of(model, *shape):
    program = trace(model, torch.zeros(2, *shape))
    return Layout(program, discover_program(program))


def coefficients(members, layout):
    """Space -> coefficients ``[f, m, n]`` that are read off the weights, unit by unit."""
    scores = dict.fromkeys(layout.spaces, 0.0)
    for layer in layout.layers:
        matrix = layout.matrix(layer, members[layer.weight]).abs()
        for units, sums in (
            (layout.rows(layer), matrix.sum((3, 4))),
            (layout.columns(layer), matrix.sum((2, 4))),
        ):
            for space in units.spaces:
                scores[space] = scores[space] + sums[..., units.part(space)]
    return {space: score.softmax(1) for space, score in scores.items()}


@pytest.mark.parametrize(
    ("axis", "spaces", "sizes", "index"),
    [
        ((A,), ("a",), (2,), [0, 1]),
        ((Factor(None, 3),), ("fixed:0",), (3,), [0, 1, 2]),
        ((Factor(None, 2), A), ("a",), (2,), [0, 1, 0, 1]),
        ((A, Factor(None, 2)), ("a",), (2,), [0, 0, 1, 1]),
        ((A, B), ("a x b",), (6,), [0, 1, 2, 3, 4, 5]),
        ((B, A), ("a x b",), (6,), [0, 3, 1, 4, 2, 5]),
        ((Concat(((B,), (A,))),), ("b", "a"), (3, 2), [0, 1, 2, 3, 4]),
        ((Concat(((A,), (B,), (A,))),), ("a", "b"), (2, 3), [0, 1, 2, 3, 4, 0, 1]),
        (
            (Concat(((A,), (Factor(None, 2),))), Factor(None, 2)),
            ("a", "fixed:0"),
            (2, 4),
            [0, 0, 1, 1, 2, 3, 4, 5],
        ),
    ],
)
def test_the_units_along_an_axis_by_hand(axis, spaces, sizes, index):
    found = along(*axis)
    assert (found.spaces, found.sizes, found.index.tolist()) == (spaces, sizes, index)
    assert found.plain == (index == list(range(sum(sizes))))


def test_entries_are_collected_unit_by_unit():
    units = along(Concat(((B,), (A,), (B,))))
    assert (units.part("b"), units.part("a")) == (slice(0, 3), slice(3, 5))
    values = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    assert units.collected(values, 1).tolist() == [[[1, 6], [2, 7], [3, 8], [4, 0], [5, 0]]]
    assert units.collected(values, 1, "b").tolist() == [[[1, 6], [2, 7], [3, 8]]]
    assert units.collected(values, 1, "a").tolist() == [[[4], [5]]]


def test_units_are_spread_over_their_entries():
    units = along(Concat(((B,), (A,), (B,))))
    told = units.joined({"a": torch.tensor([4, 5]), "b": torch.tensor([1, 2, 3])}, 0)
    assert told.tolist() == [1, 2, 3, 4, 5]
    assert units.spread(told, 0).tolist() == [1, 2, 3, 4, 5, 1, 2, 3]


class Tokens(nn.Module):
    """An embedding and a layer that reads it."""

    def __init__(self):
        super().__init__()
        self.embed, self.leave = nn.Embedding(3, 2), nn.Linear(2, 2, bias=False)

    def forward(self, x):
        return self.leave(torch.relu(self.embed(x))).sum(1)


def test_an_embedding_is_mixed_along_its_units_by_hand():
    program = trace(Tokens(), torch.zeros(2, 4).long())
    layout = Layout(program, discover_program(program))
    first = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    second = torch.tensor([[4.0, 8.0], [4.0, 8.0], [8.0, 4.0]])
    leave = torch.tensor([[[1.0, 1.0], [2.0, 2.0]], [[3.0, 5.0], [6.0, 6.0]]])
    members = {"embed.weight": torch.stack([first, second])[None], "leave.weight": leave[None]}
    mixing = {
        "embed": torch.tensor([[[0.5, 0.75], [0.5, 0.25]]]),
        OUTPUTS: torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]),
    }
    mixed = mix_units(members, layout, mixing)
    assert mixed["embed.weight"].tolist() == [[[2, 2], [2, 2], [4, 1]]]
    assert mixed["leave.weight"].tolist() == [[[2, 3], [2, 2]]]


def test_what_is_made_on_the_second_axis_is_mixed_along_it():
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.up = nn.Conv2d(1, 2, 1), nn.ConvTranspose2d(2, 3, 2)
            self.leave = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.leave(torch.relu(self.up(torch.relu(self.enter(x)))))

    carried = layout_of(Up(), 1, 3, 3).carried
    assert {key: (axis, units.spaces) for key, (axis, units) in carried.items()} == {
        "enter.weight": (0, ("enter",)),
        "enter.bias": (0, ("enter",)),
        "up.weight": (1, ("up",)),
        "up.bias": (0, ("up",)),
        "leave.weight": (0, (OUTPUTS,)),
        "leave.bias": (0, (OUTPUTS,)),
    }


def test_rows_that_are_fixed_and_no_outputs_are_averaged():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 2))
    layout = layout_of(model, 2)
    generator = torch.Generator().manual_seed(0)
    members = {
        key: torch.randn(1, 2, *t.shape, generator=generator)
        for key, t in model.state_dict().items()
    }
    mixing = {space: torch.zeros(1, 2, n) for space, n in layout.spaces.items()}
    for share in mixing.values():
        share[:, 0] = 1
    mixed = mix_units(members, layout, mixing)
    assert torch.equal(mixed["0.weight"], members["0.weight"][:, 0])
    assert torch.equal(mixed["4.bias"], members["4.bias"][:, 0])
    assert torch.equal(mixed["2.weight"], members["2.weight"].mean(1))


def test_mixtures_are_convex_and_permuted_with_their_members(wired):
    spec, layout, members = wired.layout.spec, wired.layout, wired.members
    members = {k: t.double() if t.is_floating_point() else t for k, t in members.items()}
    mixed = mix_units(members, layout, coefficients(members, layout))
    assert mixed.keys() == members.keys()
    for key, tensor in mixed.items():
        assert (tensor <= members[key].amax(1) + 1e-12).all(), key
        assert (tensor >= members[key].amin(1) - 1e-12).all(), key
    perm = spec.random(torch.Generator().manual_seed(0), (2,))
    everyone = {g: p[:, None].expand(-1, 3, *p.shape[1:]) for g, p in perm.items()}
    moved = spec.permute(members, everyone)
    found = mix_units(moved, layout, coefficients(moved, layout))
    for key, tensor in spec.permute(mixed, perm).items():
        assert torch.allclose(found[key].double(), tensor.double(), atol=1e-12), key


def test_copies_are_mixed_into_themselves(wired):
    copies = {k: t[:, :1].expand(-1, 3, *t.shape[2:]) for k, t in wired.members.items()}
    mixed = mix_units(copies, wired.layout, coefficients(wired.members, wired.layout))
    for key, tensor in mixed.items():
        assert torch.allclose(tensor.float(), wired.members[key][:, 0].float(), atol=1e-5), key


def test_tied_tensors_stay_tied(wired):
    mixed = mix_units(wired.members, wired.layout, coefficients(wired.members, wired.layout))
    for alias, key in wired.layout.program.tied.items():
        assert torch.equal(mixed[alias], mixed[key])
