"""Products with the Hessian, beside the dense one."""

import pytest
import torch

from metamerge.subsets import (
    hessian_diagonal,
    hessian_product,
    saliencies,
    squared_interactions,
    summed_interactions,
)


@pytest.fixture(scope="module")
def dense(tiny):
    """The whole Hessian, and the kernel of each of its rows."""
    keys, shapes = list(tiny.first), [t.shape for t in tiny.first.values()]
    sizes = [shape.numel() for shape in shapes]

    def flat_loss(flat):
        parts = zip(keys, flat.split(sizes), shapes, strict=True)
        return tiny.loss({key: part.reshape(shape) for key, part, shape in parts})

    flat = torch.cat([tensor.flatten() for tensor in tiny.first.values()])
    owner, first = {}, 0
    for own in tiny.kernels:
        for key in own.keys:
            rows = torch.arange(first, first + own.count)
            owner[key] = rows.repeat_interleave(tiny.first[key][0].numel())
        first += own.count
    return torch.func.hessian(flat_loss)(flat), torch.cat([owner[key] for key in keys])


@pytest.fixture(scope="module")
def product(tiny):
    return hessian_product(tiny.loss, tiny.first)


def blocks(matrix, owner):
    count = int(owner.max()) + 1
    one = torch.nn.functional.one_hot(owner, count).double()
    return one.T @ matrix @ one


def test_products_are_those_of_the_dense_hessian(tiny, dense, product):
    generator = torch.Generator().manual_seed(1)
    vector = {k: torch.randn(t.shape, generator=generator).double() for k, t in tiny.first.items()}
    expected = dense[0] @ torch.cat([t.flatten() for t in vector.values()])
    for _ in range(2):  # a product leaves nothing behind
        found = torch.cat([t.flatten() for t in product(vector).values()])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_summed_interactions_are_sums_over_blocks(tiny, dense, product):
    found = summed_interactions(product, tiny.first, tiny.kernels)
    torch.testing.assert_close(found, blocks(*dense), rtol=1e-10, atol=1e-12)


def test_squared_interactions_estimate_norms_of_blocks(tiny, dense, product):
    generator = torch.Generator().manual_seed(0)
    given = {"probes": 64, "generator": generator}
    found = squared_interactions(product, tiny.first, tiny.kernels, **given)
    expected = blocks(dense[0].square(), dense[1])
    # 64 probes, each with a relative deviation of at most sqrt(2): 0.18; means of 81 pairs.
    assert float((found / expected - 1).mean().abs()) < 0.1
    assert float((found - expected).norm() / expected.norm()) < 0.35


def test_the_diagonal_is_estimated_by_random_signs(tiny, dense, product):
    generator = torch.Generator().manual_seed(0)
    found = hessian_diagonal(product, tiny.first, probes=200, generator=generator)
    flat = torch.cat([found[key].flatten() for key in tiny.first])
    # The variance of entry k is the sum of its row's other squares over the number of probes.
    others = (dense[0].square().sum(1) - dense[0].diag().square()) / 200
    assert ((flat - dense[0].diag()).abs() < 5 * others.sqrt() + 1e-12).all()


def test_a_quadratic_loss_has_saliencies_by_hand():
    """Loss 3 a^2 + a b + b^2 / 2 at a = 2, b = -4: diagonal 6 and 1, saliencies 12 and 8."""

    def loss(weights):
        a, b = weights["w"]
        return 3 * a**2 + a * b + b**2 / 2

    weights = {"w": torch.tensor([2.0, -4.0])}
    hessian = hessian_product(loss, weights)
    assert hessian({"w": torch.tensor([1.0, 0.0])})["w"].tolist() == [6, 1]
    assert saliencies({"w": torch.tensor([6.0, 1.0])}, weights)["w"].tolist() == [12, 8]
