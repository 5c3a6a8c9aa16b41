"""Linear assignments, beside those of scipy."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from metamerge.alignment.assignment import assign, reassign


@pytest.mark.parametrize("count", [1, 5, 90])
def test_an_assignment_is_that_of_scipy_from_whatever_prices_it_starts(count):
    generator = torch.Generator().manual_seed(count)
    gain = torch.randn(2, count, count, generator=generator, dtype=torch.float64)
    prices = None
    for _ in range(6):
        expected = [linear_sum_assignment(own.numpy(), maximize=True)[1] for own in gain]
        found, prices = reassign(gain, prices)
        assert found.tolist() == [index.tolist() for index in expected]
        assert torch.equal(found, assign(gain))
        gain = gain.gather(-1, found[:, None].expand_as(gain))  # the best is in place now
        again, prices = reassign(gain, prices)
        assert torch.equal(again, torch.arange(count).expand(2, count))
        gain += 0.05 * torch.randn(gain.shape, generator=generator, dtype=torch.float64)


def test_where_every_slot_has_a_best_unit_of_its_own_each_gets_it():
    gain = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.5, 5.0], [4.0, 0.0, 0.0]])
    assert assign(gain).tolist() == [1, 2, 0]
    assert assign(torch.stack([gain, gain.flip(0)])).tolist() == [[1, 2, 0], [0, 2, 1]]
