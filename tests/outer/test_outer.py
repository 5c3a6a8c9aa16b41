"""Outer optimisers: examples of four numbers, torch's own, and what holds for all of them."""

from itertools import pairwise
from math import log

import pytest
import torch

from metamerge.errors import ConfigError
from metamerge.outer import (
    OUTER,
    Position,
    averaging,
    elastic_averaging,
    nesterov,
    soft_weight_sharing,
)
from metamerge.outer.soft_weight_sharing import Mixture, drawn_in, fitted_mixture, responsibility

EXACT = {"rtol": 0, "atol": 1e-15}


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def position(centre, members, momentum=None):
    kept = None if momentum is None else {"w": numbers(*momentum)}
    return Position(
        {"w": numbers(*centre)}, {"w": torch.stack([numbers(*m) for m in members])}, kept
    )


# ------------------------------------------------------------------------------- by hand


def test_averaging_by_hand():
    after = averaging(position([0, 0], [[1, 5], [3, 7]]), {"w": numbers(2, 6)})
    assert after.centre["w"].tolist() == [2, 6]
    assert after.members["w"].tolist() == [[2, 6], [2, 6]]


def test_nesterov_by_hand():
    """Gradient 4 - 2 = 2; momentum 0.5 * 8 + 2 = 6; centre 4 - 0.1 * (2 + 0.5 * 6) = 3.5."""
    after = nesterov(position([4], [[1], [3]], [8]), {"w": numbers(2)}, lr=0.1, momentum=0.5)
    torch.testing.assert_close(after.momentum["w"], numbers(6), **EXACT)
    torch.testing.assert_close(after.centre["w"], numbers(3.5), **EXACT)
    torch.testing.assert_close(after.members["w"], numbers(3.5).expand(2, 1), **EXACT)


def test_elastic_averaging_by_hand():
    """Two members 1 and 3, pull 0.5: each gives up a quarter of its distance from the centre 0."""
    after = elastic_averaging(position([0], [[1], [3]]), {"w": numbers(2)}, pull=0.5)
    torch.testing.assert_close(after.members["w"], numbers(0.75, 2.25)[:, None], **EXACT)
    torch.testing.assert_close(after.centre["w"], numbers(1), **EXACT)


def test_soft_weight_sharing_by_hand():
    """At 0 the narrow density is twice the broad one; where v^2 = ln 2 / (3/8), both are equal."""
    mixture, pull = Mixture(0.5, 1.0, 4.0), 0.8
    distances = numbers(0, (log(2) * 8 / 3) ** 0.5)
    torch.testing.assert_close(
        responsibility(distances.square(), mixture), numbers(2 / 3, 1 / 2), rtol=0, atol=1e-14
    )
    # Halves of the pull of 1 and of 1/4: five eighths of 0.8 are a half.
    expected = distances * numbers(1, 0.5)
    torch.testing.assert_close(drawn_in(distances, mixture, pull), expected, rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------- beside others


def test_nesterov_is_the_sgd_of_torch():
    generator = torch.Generator().manual_seed(0)
    theirs = torch.nn.Parameter(torch.randn(5, dtype=torch.float64, generator=generator))
    optimizer = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)
    at = Position({"w": theirs.detach().clone()}, {"w": torch.zeros(3, 5)})
    for _ in range(4):
        merged = torch.randn(5, dtype=torch.float64, generator=generator)
        theirs.grad = theirs.detach() - merged
        at = nesterov(at, {"w": merged})
        optimizer.step()
        torch.testing.assert_close(at.centre["w"], theirs.detach(), rtol=0, atol=1e-14)


def test_elastic_averaging_with_the_mean_keeps_the_sum_of_all():
    """Equation 5 of the paper: what members give up, the centre gains."""
    generator = torch.Generator().manual_seed(1)
    members = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    centre = torch.randn(6, dtype=torch.float64, generator=generator)
    after = elastic_averaging(
        Position({"w": centre}, {"w": members}), {"w": members.mean(0)}, pull=0.6
    )
    total = after.centre["w"] + after.members["w"].sum(0)
    torch.testing.assert_close(total, centre + members.sum(0), rtol=0, atol=1e-14)


def test_a_mixture_is_found_again():
    """20,000 distances of deviations 1 and 10: the standard errors are below 2 and 4 percent."""
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randn(20_000, dtype=torch.float64, generator=generator)
    drawn[5_000:] *= 0.1
    mixture = fitted_mixture(drawn, passes=200)
    assert mixture.share == pytest.approx(0.75, rel=0.04)
    assert mixture.narrow == pytest.approx(0.01, rel=0.08)
    assert mixture.broad == pytest.approx(1.0, rel=0.08)


def test_fitting_raises_the_likelihood_in_every_pass():
    distances = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    distances[:50] *= 8

    def likelihood(mixture):
        share, narrow, broad = mixture
        densities = [
            part * torch.distributions.Normal(0, numbers(variance**0.5)).log_prob(distances).exp()
            for part, variance in ((share, narrow), (1 - share, broad))
        ]
        return float(sum(densities).log().sum())

    found = [likelihood(fitted_mixture(distances, passes)) for passes in range(12)]
    assert all(later > earlier for earlier, later in pairwise(found))


def test_drawing_in_is_a_step_along_the_gradient_of_the_cost():
    mixture = Mixture(0.7, 0.04, 1.5)
    distances = numbers(-2.0, -0.3, 0.1, 0.9).requires_grad_()
    narrow, broad = (torch.distributions.Normal(0, numbers(v**0.5)) for v in mixture[1:])
    cost = -(
        0.7 * narrow.log_prob(distances).exp() + 0.3 * broad.log_prob(distances).exp()
    ).log().sum()  # fmt: skip
    (gradient,) = torch.autograd.grad(cost, distances)
    expected = distances.detach() - 0.6 * mixture.narrow * gradient
    found = drawn_in(distances.detach(), mixture, 0.6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------- all of them


@pytest.fixture(params=OUTER)
def optimiser(request):
    return OUTER[request.param]


def family():
    generator = torch.Generator().manual_seed(4)
    members = {
        "weight": torch.randn(3, 4, 2, generator=generator),
        "norm.running_var": torch.rand(3, 4, generator=generator) + 0.5,
        "norm.num_batches_tracked": torch.tensor([5, 6, 7]),
    }
    centre = {k: t[0] for k, t in members.items()}
    merged = {k: t.float().mean(0).to(t.dtype) for k, t in members.items()}
    return Position(centre, members), merged


def test_keys_shapes_and_dtypes_stay(optimiser):
    before, merged = family()
    after = optimiser(before, merged)
    for key, tensor in merged.items():
        assert after.centre[key].shape == tensor.shape
        assert after.members[key].shape == before.members[key].shape
        assert after.centre[key].dtype == after.members[key].dtype == tensor.dtype


def test_nothing_given_is_changed_or_shared(optimiser):
    before, merged = family()
    copies = [{k: t.clone() for k, t in w.items()} for w in (*before[:2], merged)]
    after = optimiser(before, merged)
    for weights in (*after[:2], after.momentum or {}):
        for tensor in weights.values():
            tensor.zero_()
    for weights, copy in zip((*before[:2], merged), copies, strict=True):
        assert all(torch.equal(weights[key], copy[key]) for key in copy)


def test_members_that_agree_with_the_centre_stay(optimiser):
    before, _ = family()
    same = {k: t.expand(3, *t.shape) for k, t in before.centre.items()}
    after = optimiser(Position(before.centre, same), before.centre)
    for key, tensor in before.centre.items():
        assert torch.equal(after.centre[key], tensor)
        assert torch.equal(after.members[key], same[key])


def test_statistics_and_counters_of_the_centre_are_those_of_the_merged_network(optimiser):
    before, merged = family()
    after = optimiser(before, merged)
    for key in ("norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(after.centre[key], merged[key])


@pytest.mark.parametrize(
    ("outer", "options", "told"),
    [
        (nesterov, {"lr": 0.0}, "nesterov: lr must be above 0, got 0.0"),
        (nesterov, {"momentum": 1.0}, "momentum must be in"),
        (elastic_averaging, {"pull": 0.0}, "pull must be in"),
        (elastic_averaging, {"pull": 1.1}, "got 1.1"),
        (soft_weight_sharing, {"pull": 2.0}, "pull must be in"),
    ],
)
def test_options_out_of_range_are_refused(outer, options, told):
    with pytest.raises(ConfigError, match=told):
        outer(*family(), **options)
