"""Weighted average: the mean of all members with coefficients that the caller chooses.

Paper: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data",
AISTATS 2017, arXiv:1602.05629 (algorithm 1, where a client's coefficient is its share of the data).
"""

from collections.abc import Sequence
from math import isfinite

from metamerge.errors import ConfigError
from metamerge.methods._combination import combine
from metamerge.registry import merge_method
from metamerge.weights import Weights


@merge_method(paper="arXiv:1602.05629", ordered=True, per_tensor={}, pointwise=True)
def weighted_average(weights: Sequence[Weights], *, coefficients: Sequence[float]) -> Weights:
    """Average all members with given coefficients.

    Args:
        weights: One state dict per member, of one architecture.
        coefficients: One number per member, 0 or above; divided by their sum, so numbers of
            training images will do.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If there are more or fewer coefficients than members, one of them is negative
            or not finite, or all are 0.
    """
    numbers = _numbers(coefficients)
    if len(numbers) != len(weights):
        raise ConfigError(
            f"weighted_average: there are {len(numbers)} coefficients and {len(weights)} members. "
            f"Give one coefficient per member, in the order of the members."
        )
    for index, number in enumerate(numbers):
        if not (isfinite(number) and number >= 0):
            raise ConfigError(
                f"weighted_average: coefficients[{index}] is {number}, expected a finite number, 0 "
                f"or above. Leave out members that should not count."
            )
    largest = max(numbers)
    if largest == 0:
        raise ConfigError(
            "weighted_average: all coefficients are 0, which leaves nothing to average. Give at "
            "least one member a coefficient above 0."
        )
    shares = [number / largest for number in numbers]  # their sum cannot overflow
    return combine(weights, [share / sum(shares) for share in shares])


def _numbers(coefficients: Sequence[float]) -> list[float]:
    try:
        return [float(number) for number in coefficients]
    except (TypeError, ValueError):
        raise ConfigError(
            f"weighted_average: coefficients is {coefficients!r}, expected a sequence of numbers. "
            f"Write coefficients=[0.7, 0.3]."
        ) from None
