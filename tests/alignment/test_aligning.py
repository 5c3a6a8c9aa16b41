import json

import pytest
import torch
from torch import nn

from metamerge.alignment import align_members, aligning, matching_cost
from metamerge.alignment.aligning import chosen_alignments, listed
from metamerge.errors import ConfigError, IncompatibleWeights
from metamerge.structure import Layout, discover_program, trace
from metamerge.weights import stack


@pytest.fixture(scope="module")
def layout():
    program = trace(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), torch.zeros(2, 5))
    return Layout(program, discover_program(program))


@pytest.fixture
def members(layout):
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (6, 5), "0.bias": (6,), "2.weight": (3, 6), "2.bias": (3,)}
    return [{k: torch.randn(s, generator=generator) for k, s in shapes.items()} for _ in range(3)]


def cost(members, layout):
    family = {key: tensor[None] for key, tensor in stack(members).items()}
    return float(matching_cost(family, layout.spec, layout.spec.identity()))


def test_names_are_a_string_several_or_none():
    assert listed(None) == []
    assert listed("weight_matching") == ["weight_matching"]
    assert listed(("canonical", "weight_matching")) == ["canonical", "weight_matching"]
    assert [a.name for a in chosen_alignments(["weight_matching"])] == ["weight_matching"]


@pytest.mark.parametrize("align", ["weight_macthing", 3, ["weight_matching", None]])
def test_what_is_no_alignment_is_refused(align):
    with pytest.raises(ConfigError, match="Expected None, or one or several of"):
        chosen_alignments(align)


def test_none_leaves_members_as_they_are(layout, members):
    found, told = align_members(members, layout, None)
    assert told == []
    assert all(torch.equal(f[k], m[k]) for f, m in zip(found, members, strict=True) for k in m)


def test_the_cost_before_and_after_is_told_for_every_step(layout, members):
    found, told = align_members(members, layout, ["canonical", "weight_matching"])
    assert [step["name"] for step in told] == ["canonical", "weight_matching"]
    assert told[0]["matching_cost_before"] == pytest.approx(cost(members, layout), rel=1e-9)
    assert told[0]["matching_cost"] == pytest.approx(told[1]["matching_cost_before"], rel=1e-9)
    assert told[1]["matching_cost"] == pytest.approx(cost(found, layout), rel=1e-9)
    assert told[1]["objective"][-1] == pytest.approx(told[1]["matching_cost"], rel=1e-9)
    assert all(step["seconds"] >= 0 for step in told)
    assert json.loads(json.dumps(told)) == told


@pytest.mark.parametrize(
    ("chain", "times"),
    [("weight_matching", 1), (["weight_matching"] * 3, 1), (["canonical", "weight_matching"], 2)],
)
def test_members_are_stacked_anew_only_where_more_than_their_order_changes(
    layout, members, chain, times, monkeypatch
):
    calls = []
    monkeypatch.setattr(aligning, "stack", lambda given: calls.append(0) or stack(given))
    align_members(members, layout, chain)
    assert len(calls) == times


def test_members_of_several_widths_are_refused_by_what_only_permutes(layout, members):
    small = {"0.weight": (4, 5), "0.bias": (4,), "2.weight": (3, 4), "2.bias": (3,)}
    members = [*members, {key: torch.ones(shape) for key, shape in small.items()}]
    with pytest.raises(IncompatibleWeights, match="'weight_matching' takes members of one width"):
        align_members(members, layout, "weight_matching")


def test_every_alignment_of_a_chain_gets_the_options_that_it_has(layout, members):
    options = {"signs": "own", "to": "reference", "reference": 1}
    found, _ = align_members(members, layout, ["canonical", "weight_matching"], options=options)
    canonical, _ = align_members(members, layout, "canonical", options={"signs": "own"})
    assert all(torch.equal(found[1][key], canonical[1][key]) for key in canonical[1])


def test_members_keep_their_own_dtypes(layout, members):
    mixed = [
        {k: t.to(d) for k, t in m.items()}
        for m, d in zip(members, (torch.float16, torch.float64, torch.bfloat16), strict=True)
    ]
    found, _ = align_members(mixed, layout, "weight_matching")
    for own, given in zip(found, mixed, strict=True):
        assert {k: t.dtype for k, t in own.items()} == {k: t.dtype for k, t in given.items()}


def test_an_option_that_none_of_a_chain_has_is_refused(layout, members):
    with pytest.raises(ConfigError, match="'canonical' and 'weight_matching' has no option 'swep'"):
        align_members(members, layout, ["canonical", "weight_matching"], options={"swep": 1})
    with pytest.raises(ConfigError, match="align=None has no option 'sweeps'"):
        align_members(members, layout, None, options={"sweeps": 1})


def test_a_resource_that_is_missing_is_asked_for(layout, members):
    with pytest.raises(ConfigError, match="activation_matching needs 'batches'"):
        align_members(members, layout, "activation_matching")
