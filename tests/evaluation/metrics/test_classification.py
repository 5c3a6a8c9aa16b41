"""Scores by hand, and batched logits beside a loop over modules."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from evaluation.metrics import accuracy, family_logits, references
from metamerge.structure import trace


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


def test_the_accuracy_of_four_images():
    logits = torch.tensor([[0.1, 0.9], [3.0, 1.0], [-1.0, -2.0], [0.0, 5.0]])
    assert float(accuracy(logits, torch.tensor([1, 0, 1, 1]))) == 0.75
    stacked = torch.stack([logits, -logits])[:, None]  # [2, 1, 4, 2]
    assert accuracy(stacked, torch.tensor([1, 0, 1, 1])).tolist() == [[0.75], [0.25]]


def test_references_of_one_family():
    targets = torch.tensor([0, 1, 0, 1])
    # Logits of class 0; class 1 has 0. Probabilities of 10, 2, 0.1: 1.00, 0.88, 0.52.
    margins = torch.tensor(
        [
            [10.0, -0.1, 10.0, -0.1],  # right, right, right, right
            [-2.0, 10.0, -0.1, -2.0],  # wrong, wrong, wrong, right
            [-2.0, -0.1, -0.1, 10.0],  # wrong, right, wrong, wrong
        ]
    )
    logits = torch.stack([margins, torch.zeros_like(margins)], -1)[None]
    # Sums of probabilities of class 0: 1.24, 1.95, 1.95, 1.59, where 1.5 is half. The first is
    # wrong although the sum of logits is above 0, the third right against two of three votes.
    found = references(logits, targets)
    assert {key: value.tolist() for key, value in found.items()} == {
        "best_member": [1.0],
        "mean_member": [pytest.approx((1 + 0.25 + 0.25) / 3)],
        "ensemble": [0.25],
    }


def test_references_are_those_of_each_family():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 4, 50, 5, generator=generator), torch.arange(50) % 5
    together = references(logits, targets)
    for family in range(3):
        alone = references(logits[family : family + 1], targets)
        assert {k: v.item() for k, v in alone.items()} == {
            k: v[family].item() for k, v in together.items()
        }
    assert (together["best_member"] >= together["mean_member"]).all()
