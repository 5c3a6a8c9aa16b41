"""Variance of units, by hand, beside a loop, and in chunks."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from metamerge.corrections import variance
from metamerge.corrections.variance import unit_variances, variance_ratio
from metamerge.structure import Layout, discover_program, trace


@pytest.fixture(scope="module")
def case():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    program = trace(model, inputs)
    members = {
        key: torch.randn(2, 3, *t.shape, generator=generator, dtype=torch.float64)
        for key, t in model.state_dict().items()
    }
    return model, Layout(program, discover_program(program)), members, inputs


def test_the_average_of_opposite_networks_does_not_vary(case):
    _, layout, members, inputs = case
    pair = {key: torch.stack([t[:, 0], -t[:, 0]], 1) for key, t in members.items()}
    fused = {key: t.mean(1) for key, t in pair.items()}
    found = variance_ratio(fused, pair, layout, inputs)
    assert {key: ratio.tolist() for key, ratio in found.items()} == {
        "0.weight": [0.0, 0.0],
        "2.weight": [0.0, 0.0],
    }


def test_copies_have_a_ratio_of_1(case):
    _, layout, members, inputs = case
    one = {key: t[:, 0] for key, t in members.items()}
    copies = {key: t[:, None].repeat_interleave(3, 1) for key, t in one.items()}
    for ratio in variance_ratio(one, copies, layout, inputs).values():
        assert torch.allclose(ratio, torch.ones(2).double())


@pytest.mark.parametrize("entries", [1, 2**26])
def test_variances_are_those_of_modules(case, monkeypatch, entries):
    model, layout, members, inputs = case
    monkeypatch.setattr(variance, "_ENTRIES", entries)
    flat = {key: t.flatten(0, 1) for key, t in members.items()}
    found = unit_variances(flat, layout, inputs)
    for place in range(6):
        own = {key: t[place] for key, t in flat.items()}
        hidden = inputs @ own["0.weight"].T + own["0.bias"]
        outputs = functional_call(model, own, inputs)
        assert found["0.weight"][place] == pytest.approx(float(hidden.var(0).mean()), rel=1e-12)
        assert found["2.weight"][place] == pytest.approx(float(outputs.var(0).mean()), rel=1e-12)
