"""Scores of regressions by hand and beside scikit-learn."""

import pytest
import torch
from sklearn import metrics

from evaluation.metrics import mean_absolute_error, mean_squared_error, r2, regression_scores


def test_scores_of_three_numbers_by_hand():
    outputs, targets = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([[1.0], [4.0], [4.0]])
    assert float(mean_absolute_error(outputs, targets)) == 1.0  # 0, 2, 1
    assert float(mean_squared_error(outputs, targets)) == pytest.approx(5 / 3)
    assert float(r2(outputs, targets)) == pytest.approx(1 - 5 / 6)  # mean 3: 4 + 1 + 1


def test_scores_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 3, 50, 2, generator=generator, dtype=torch.float64)
    outputs = targets + noise * torch.tensor([0.1, 1.5])
    found = regression_scores(outputs, targets)
    for i in range(2):
        for j in range(3):
            expected = {
                "mean_absolute_error": metrics.mean_absolute_error(targets, outputs[i, j]),
                "mean_squared_error": metrics.mean_squared_error(targets, outputs[i, j]),
                "r2": metrics.r2_score(targets, outputs[i, j]),
            }
            assert {k: float(v[i, j]) for k, v in found.items()} == pytest.approx(expected)


def test_a_network_that_says_the_mean_explains_nothing():
    targets = torch.tensor([[1.0], [2.0], [6.0]])
    assert float(r2(targets.mean(0).expand(3, 1), targets)) == 0.0
