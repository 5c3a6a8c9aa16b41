import pytest
import torch

from metamerge.errors import ConfigError
from metamerge.gradients import ORDERS, keep_some, orthogonalise

every_order = pytest.mark.parametrize("order", ORDERS)


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_sum(vectors, order, leak=0.0, kept=None):
    """Modified Gram-Schmidt on the vectors themselves, one run at a time."""
    own = [v for place, v in enumerate(vectors) if kept is None or kept[place]]
    if order != "given":
        own = sorted(own, key=lambda v: float(v.norm()), reverse=order == "decreasing")
    basis, total = [], torch.zeros_like(vectors[0])
    for vector in own:
        left = vector.clone()
        for unit in basis:
            left = left - (left @ unit) * unit
        if left.norm() > 1e-6 * vector.norm():
            basis.append(left / left.norm())
        else:
            left = torch.zeros_like(left)
        total += (1 - leak) * left + leak * vector
    return total


# ---------------------------------------------------------------------------- by hand


def test_the_projection_on_the_shorter_vector_goes_in_increasing_order():
    # of [2, 2] the part along [1, 0] is [2, 0]: [1, 0] + [0, 2]
    found = orthogonalise(torch.tensor([[2.0, 2.0], [1.0, 0.0]]), order="increasing")
    assert found.tolist() == [1.0, 2.0]


def test_the_projection_on_the_longer_vector_goes_in_decreasing_order():
    # of [1, 0] the part along [2, 2] is [0.5, 0.5]: [2, 2] + [0.5, -0.5]
    found = orthogonalise(torch.tensor([[1.0, 0.0], [2.0, 2.0]]), order="decreasing")
    assert found.tolist() == [2.5, 1.5]


def test_half_a_leak_takes_half_of_the_projection():
    found = orthogonalise(torch.tensor([[1.0, 0.0], [2.0, 2.0]]), order="given", leak=0.5)
    assert found.tolist() == [2.0, 2.0]


def test_opposed_gradients_leave_the_first_of_them():
    pair = torch.tensor([[3.0, 0.0], [-4.0, 0.0]])
    assert orthogonalise(pair, order="increasing").tolist() == [3.0, 0.0]  # uphill on the sum
    assert orthogonalise(pair, order="decreasing").tolist() == [-4.0, 0.0]


# ---------------------------------------------------------------------------- properties


@every_order
def test_equal_gradients_count_once(order):
    one = drawn(7)
    torch.testing.assert_close(orthogonalise(one.expand(5, 7), order=order), one)


@every_order
def test_orthogonal_gradients_are_summed(order):
    basis = torch.linalg.qr(drawn(6, 4)).Q.T * torch.tensor([[1.0], [3.0], [0.5], [2.0]])
    torch.testing.assert_close(orthogonalise(basis.double(), order=order), basis.sum(0).double())


@every_order
@pytest.mark.parametrize("leak", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("k", "p"), [(1, 3), (2, 2), (4, 50), (6, 4), (10, 200)])
def test_a_batch_equals_gram_schmidt_run_by_run(order, leak, k, p):
    gradients = drawn(5, k, p, seed=k)
    expected = torch.stack([slow_sum(own, order, leak) for own in gradients])
    # residuals far below the tolerance of dependence amplify rounding by its inverse
    torch.testing.assert_close(
        orthogonalise(gradients, order=order, leak=leak), expected, rtol=1e-8, atol=1e-8
    )


@every_order
def test_vectors_that_are_dropped_are_as_if_they_were_not_there(order):
    gradients = drawn(6, 5, 9)
    kept = keep_some(torch.rand(6, 5, generator=torch.Generator().manual_seed(1)), 0.5)
    assert not kept.all()
    expected = torch.stack(
        [slow_sum(own, order, kept=mask) for own, mask in zip(gradients, kept, strict=True)]
    )
    torch.testing.assert_close(orthogonalise(gradients, order=order, kept=kept), expected)
    leaky = orthogonalise(gradients, order=order, kept=kept, leak=1.0)
    torch.testing.assert_close(leaky, (gradients * kept.unsqueeze(-1)).sum(1))


@every_order
def test_zeros_and_multiples_add_nothing(order):
    gradients = drawn(3, 3, 8)
    expected = orthogonalise(gradients, order=order)
    zeros = torch.zeros(3, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(
        orthogonalise(torch.cat([gradients, zeros], 1), order=order), expected
    )
    longest = gradients[:, :1] if order == "given" else gradients
    repeated = torch.cat([gradients, longest], 1)  # equal norms: the copy comes after the original
    torch.testing.assert_close(orthogonalise(repeated, order=order), expected)


def test_of_two_gradients_in_decreasing_order_no_step_points_uphill():
    pairs = drawn(2000, 2, 3) * drawn(2000, 2, 1, seed=1).exp()
    steps = orthogonalise(pairs, order="decreasing")
    assert ((steps * pairs.sum(1)).sum(1) >= 0).all()
    uphill = (orthogonalise(pairs, order="increasing") * pairs.sum(1)).sum(1) < 0
    assert uphill.any()


@every_order
def test_float32_of_correlated_gradients_is_close_to_float64(order):
    # cosines of about 0.99: a squared residual is 0.02 of its vector's square, whose products
    # are rounded by a few 6e-8, so shares are off by about 1e-5 of the length
    wide = (drawn(1, 1, 300) + 0.1 * drawn(20, 4, 300, seed=1)).float()
    exact = orthogonalise(wide.double(), order=order)
    found = orthogonalise(wide, order=order)
    assert found.dtype == torch.float32
    length = float(exact.norm(dim=-1).max())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5 * length)


def test_a_run_that_is_not_finite_spoils_no_other():
    gradients = drawn(3, 4, 6)
    expected = orthogonalise(gradients)
    gradients[1, 2, 3] = torch.nan
    found = orthogonalise(gradients)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_inputs_are_left_alone_and_runs_may_have_several_axes():
    gradients = drawn(2, 3, 4, 5)
    before = gradients.clone()
    found = orthogonalise(gradients)
    assert torch.equal(gradients, before)
    torch.testing.assert_close(found[1, 2], orthogonalise(gradients[1, 2]))


def test_one_vector_is_always_kept():
    draws = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    kept = keep_some(draws, 0.9)
    assert kept.any(-1).all()
    assert kept.double().mean() < 0.45  # a third, and a tenth of the rest


@pytest.mark.parametrize(
    ("options", "word"),
    [({"order": "up"}, "order"), ({"leak": 1.5}, "leak"), ({"kept": torch.ones(3) > 0}, "kept")],
)
def test_options_out_of_range_are_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        orthogonalise(torch.zeros(2, 4), **options)


def test_dropping_everything_is_refused():
    with pytest.raises(ConfigError, match="dropped"):
        keep_some(torch.rand(2, 3), 1.0)
