"""Many networks at once beside a loop over modules; memory does not change what comes out."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from evaluation.metrics import (
    classification_scores,
    family_logits,
    regression_scores,
    score_networks,
    score_outputs,
    scoring,
)
from metamerge.structure import trace


@pytest.fixture(scope="module")
def networks():
    """Seven networks 5-6-3 in float64, inputs and classes."""
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.randn(7, *t.shape, generator=generator, dtype=torch.float64)
        for key, t in model.state_dict().items()
    }
    inputs = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    return model, trace(model, inputs), weights, inputs, torch.arange(40) % 3


def test_logits_of_families_agree_with_a_loop_in_float64():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    generator = torch.Generator().manual_seed(0)
    families = {
        key: torch.randn(2, 3, *t.shape, generator=generator, dtype=torch.float64)
        for key, t in model.state_dict().items()
    }
    inputs = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    found = family_logits(trace(model, inputs), families, inputs)
    assert found.shape == (2, 3, 7, 3)
    for family in range(2):
        for member in range(3):
            own = {key: t[family, member] for key, t in families.items()}
            expected = functional_call(model, own, inputs)
            assert torch.allclose(found[family, member], expected, atol=1e-12)


def test_scores_are_those_of_one_module_after_the_other(networks):
    model, program, weights, inputs, targets = networks
    found = score_networks(program, weights, inputs, targets)
    for place in range(7):
        logits = functional_call(model, {k: t[place] for k, t in weights.items()}, inputs)
        expected = classification_scores(logits, targets)
        for name, value in expected.items():
            assert torch.allclose(found[name][place], value, atol=1e-12, equal_nan=True), name


@pytest.mark.parametrize("networks_at_once", [1, 2, 3])
def test_chunks_of_networks_give_the_same(networks, monkeypatch, networks_at_once):
    _, program, weights, inputs, targets = networks
    whole = score_networks(program, weights, inputs, targets)
    monkeypatch.setattr(scoring, "SAID", networks_at_once * 40 * 4 * 3)
    sizes = [at.stop - at.start for at in scoring.chunks(program, weights, 40)]
    assert sizes == [networks_at_once] * -(-7 // networks_at_once)
    parts = score_networks(program, weights, inputs, targets)
    for name, value in whole.items():
        assert torch.allclose(parts[name], value, atol=1e-12, equal_nan=True), name


def test_networks_with_classes_of_their_own_are_scored_in_chunks_too(networks, monkeypatch):
    _, program, weights, inputs, targets = networks
    own = torch.stack([targets.roll(shift) for shift in range(7)])
    monkeypatch.setattr(scoring, "SAID", 2 * 40 * 4 * 3)
    found = score_networks(program, weights, inputs, own)
    for place in range(7):
        one = {key: t[place : place + 1] for key, t in weights.items()}
        alone = score_networks(program, one, inputs, own[place])
        assert torch.equal(found["accuracy"][place], alone["accuracy"][0])


def test_what_targets_are_decides_on_the_scores(networks):
    _, program, weights, inputs, _ = networks
    numbers = torch.randn(40, 3, dtype=torch.float64)
    found = score_networks(program, weights, inputs, numbers)
    assert found.keys() == regression_scores(numbers, numbers).keys()
    assert found["r2"].shape == (7,)
    assert score_outputs(numbers, torch.arange(40) % 3).keys() >= {"calibration_error"}
