"""Karcher mean: the point of the sphere that is nearest to all members.

Paper: Karcher, "Riemannian center of mass and mollifier smoothing", Communications on Pure and
Applied Mathematics 30, 1977, doi:10.1002/cpa.3160300502 (the mean as the zero of the summed
logarithms; for two members of one length it is SLERP half-way).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metamerge.methods._directions import SCOPES, combine_by_angles
from metamerge.options import check_choice
from metamerge.registry import merge_method
from metamerge.weights import Weights

_STEPS = 200  # each shrinks the error; members of less than a right angle take about ten
_STILL = 1e-12  # length of a step, in radians, behind which nothing moves
_OPPOSED = 1e-6  # length of the mean of unit vectors below which it has no direction


@merge_method(paper="doi:10.1002/cpa.3160300502", per_tensor={"scope": "tensor"})
def karcher_mean(weights: Sequence[Weights], *, scope: str = "tensor") -> Weights:
    """Average directions along great circles, and lengths on their own.

    Members that are all zeros have no direction, but their length counts. Where the directions
    cancel each other, as those of w and -w do, the result is the plain average. Running statistics
    are averaged.

    Args:
        weights: One state dict per member, of one architecture.
        scope: ``tensor`` does it for every tensor by itself, ``model`` for the vector of all.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If ``scope`` is something else.
    """
    check_choice("karcher_mean", "scope", scope, SCOPES)
    shares = [1 / len(weights)] * len(weights)
    if len(weights) == 1:
        return combine_by_angles(weights, torch.ones_like, scope="tensor", shares=shares)
    return combine_by_angles(weights, _coefficients, scope=scope, shares=shares)


def _coefficients(products: Tensor) -> Tensor:
    """What of every member makes up the mean, ``[m, m]`` -> ``[m]``."""
    lengths = _root(products.diagonal())  # [m]
    there = (lengths > 0).to(products)
    inverse = there / torch.where(lengths > 0, lengths, 1)
    cosines = inverse[:, None] * products * inverse  # [m, m]
    start = there / there.sum().clamp(min=1)
    if float((start @ cosines @ start).detach()) < _OPPOSED**2:
        return torch.full_like(lengths, 1 / len(lengths))
    return lengths.mean() * _nearest(cosines, start) * inverse


def _nearest(cosines: Tensor, start: Tensor) -> Tensor:
    """Coefficients of the unit vectors in their Karcher mean, by fixed-point steps."""
    share, mean = start, start / _root(start @ cosines @ start)
    for _ in range(_STEPS):
        cosine = (cosines @ mean).clamp(-1, 1)  # of every member to the mean, [m]
        sine = _root(1 - cosine.square())
        stretch = torch.where(sine > 0, cosine.acos() / torch.where(sine > 0, sine, 1), 1.0)
        pull = share * stretch
        tangent = pull - (pull * cosine).sum() * mean
        step = _root(tangent @ cosines @ tangent)
        if float(step.detach()) < _STILL:
            break
        mean = step.cos() * mean + step.sin() / step * tangent
        mean = mean / _root(mean @ cosines @ mean)
    return mean


def _root(squares: Tensor) -> Tensor:
    """Square root with a finite slope at 0, where rounding may also leave less than 0."""
    return torch.where(squares > 0, squares, 0).clamp(min=1e-300).sqrt() * (squares > 0)
