"""Where everybody stands between two rounds of training."""

from typing import NamedTuple

from torch import Tensor

from metamerge.weights import Weights

STATISTICS = ("running_mean", "running_var")  # measured, not learned


class Position(NamedTuple):
    """The centre, and what each of ``m`` members goes on from.

    Attributes:
        centre: The network of all of them, in whose order of units the members are.
        members: ``[m, ...]``.
        momentum: What the centre's optimiser remembers; None for nothing.
    """

    centre: Weights
    members: Weights
    momentum: Weights | None = None


def gathered_at(centre: Weights, members: int, momentum: Weights | None = None) -> Position:
    """The position in which every member goes on from the centre.

    Args:
        centre: The network.
        members: How many members there are.
        momentum: What the centre's optimiser remembers.

    Returns:
        The position; its members are copies.
    """
    copies = {key: t.expand(members, *t.shape).clone() for key, t in centre.items()}
    return Position(centre, copies, momentum)


def learned(key: str, tensor: Tensor) -> bool:
    """Whether a tensor is learned: neither a counter nor a running statistic."""
    return tensor.is_floating_point() and not key.endswith(STATISTICS)
