"""Cosines and distances of networks, beside vectors that are laid out whole."""

import pytest
import torch

from evaluation.metrics import (
    cosines,
    distances,
    mean_of_pairs,
    output_cosines,
    relative_distances,
)
from metamerge.weights import flatten, unstack
from zoo import weight_space


def networks(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "scale": ()}
    found = {key: torch.randn(count, *s, generator=generator) for key, s in shapes.items()}
    return found | {"steps": torch.arange(count)}


def test_two_networks_by_hand():
    weights = {"w": torch.tensor([[3.0], [0.0]]), "b": torch.tensor([[0.0], [4.0]])}
    assert cosines(weights).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert distances(weights).tolist() == [[0.0, 5.0], [5.0, 0.0]]
    assert relative_distances(weights)[0, 1] == pytest.approx(5 / 3.5)


@pytest.mark.parametrize("columns", [5, 2**18])
def test_they_are_those_of_whole_vectors(monkeypatch, columns):
    monkeypatch.setattr(weight_space, "_COLUMNS", columns)
    weights = networks(6)
    vectors = torch.stack([flatten(own).double() for own in unstack(weights)])
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    assert torch.allclose(cosines(weights), unit @ unit.T, atol=1e-12)
    assert torch.allclose(distances(weights), torch.cdist(vectors, vectors), atol=1e-12)


def test_networks_that_are_almost_the_same_keep_their_small_distance():
    generator = torch.Generator().manual_seed(0)
    base = 1000 * torch.randn(1, 500, generator=generator, dtype=torch.float64)
    step = torch.zeros(3, 500, dtype=torch.float64)
    step[1, 0], step[2, 1] = 1e-6, 2e-6
    found = distances({"w": base + step})
    # entries near 1000 are known to 1000 * 2**-53 each
    assert found[0].tolist() == pytest.approx([0.0, 1e-6, 2e-6], abs=500**0.5 * 1000 * 2**-52)


def test_answers_are_compared_whatever_their_mean_over_classes():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(1, 9, 4, generator=generator)
    shifted = 3 * one + torch.randn(1, 9, 1, generator=generator)
    found = output_cosines(torch.cat([one, shifted, -one]))
    assert torch.allclose(found[0], torch.tensor([1.0, 1.0, -1.0]), atol=1e-6)


def test_the_mean_of_pairs_leaves_the_diagonal_out():
    matrix = torch.tensor([[9.0, 1.0, 2.0], [1.0, 9.0, 3.0], [2.0, 3.0, 9.0]])
    assert float(mean_of_pairs(matrix)) == 2.0
    assert mean_of_pairs(torch.stack([matrix, 2 * matrix])).tolist() == [2.0, 4.0]
