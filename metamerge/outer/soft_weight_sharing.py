"""Soft weight sharing: members are drawn to the centre where they are near it, else let go.

Paper: Nowlan and Hinton, "Simplifying Neural Networks by Soft Weight-Sharing", Neural Computation
4(4), 1992. There the weights of one network pay ``-sum_i log sum_j p_j N(w_i; mu_j, s_j^2)``, and
the mixture of Gaussians is learned with them. Here it is members that share weights, not places of
one network:

* What pays is the distance of every weight of every member from the same weight of the centre.
* Of every tensor the mixture has two components, narrow and broad, as in the paper's section 2,
  both around the centre. Their proportions and variances are fitted to the tensor's distances by
  expectation maximisation, where the paper descends along the same likelihood.
* One step per round follows the cost's gradient: a distance ``v`` becomes
  ``v - pull * s_narrow^2 * sum_j r_j(v) * v / s_j^2`` with responsibilities ``r_j(v)``. What surely
  belongs to the narrow component moves by ``pull`` of its distance, what surely belongs to the
  broad one by the ratio of the variances less: weights that few members disagree on are shared,
  those that members need for themselves remain theirs.
"""

from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from metamerge.errors import ConfigError
from metamerge.outer.position import Position, learned
from metamerge.weights import Weights

FITTING = 25  # passes of expectation maximisation


class Mixture(NamedTuple):
    """Two Gaussians of mean 0.

    Attributes:
        share: Proportion of the narrow one, in [0, 1].
        narrow: Its variance.
        broad: Variance of the other.
    """

    share: float
    narrow: float
    broad: float


def soft_weight_sharing(before: Position, merged: Weights, *, pull: float = 0.9) -> Position:
    """Make the merged network the centre, and draw members to it, weight by weight.

    Args:
        before: The centre that the round started from, and the members after their training.
        merged: What a merge made of the members, in the same order of units.
        pull: How far a weight moves that surely belongs to the narrow component, in (0, 1].

    Returns:
        Where the next round starts. Counters and running statistics of members stay theirs.

    Raises:
        ConfigError: If ``pull`` is outside (0, 1].
    """
    if not 0 < pull <= 1:
        raise ConfigError(f"soft_weight_sharing: pull must be in (0, 1], got {pull}.")
    members = {}
    for key, tensor in before.members.items():
        if not learned(key, tensor):
            members[key] = tensor.clone()
            continue
        distances = tensor - merged[key]
        members[key] = merged[key] + drawn_in(distances, fitted_mixture(distances), pull)
    return Position({key: tensor.clone() for key, tensor in merged.items()}, members)


def fitted_mixture(distances: Tensor, passes: int = FITTING) -> Mixture:
    """Fit the mixture to distances by expectation maximisation.

    Args:
        distances: Any shape.
        passes: How many times.

    Returns:
        The mixture; that of distances that are all 0 has variances of 0.
    """
    squares = distances.detach().double().square().flatten()
    spread = float(squares.mean()) if len(squares) else 0.0
    mixture = Mixture(0.5, spread / 4, spread * 4)
    for _ in range(passes if spread else 0):
        own = responsibility(squares, mixture)
        total, rest = float(own.sum()), float((1 - own).sum())
        if min(total, rest) < 1 or float(own @ squares) == 0:  # one component is left
            break
        narrow, broad = float(own @ squares) / total, float((1 - own) @ squares) / rest
        mixture = Mixture(total / len(squares), narrow, broad)
    return mixture


def responsibility(squares: Tensor, mixture: Mixture) -> Tensor:
    """Probability that distances belong to the narrow component.

    Args:
        squares: Squared distances.
        mixture: Both variances above 0, the share between 0 and 1.

    Returns:
        One number in [0, 1] for each.
    """
    share, narrow, broad = mixture
    odds = log(share) - log(1 - share) + 0.5 * (log(broad) - log(narrow))
    return torch.sigmoid(odds - 0.5 * squares * (1 / narrow - 1 / broad))


def drawn_in(distances: Tensor, mixture: Mixture, pull: float) -> Tensor:
    """Distances after one step along the gradient of their cost.

    Args:
        distances: Any shape.
        mixture: What they are drawn from.
        pull: Of the narrow component.

    Returns:
        New distances of the same shape, none of them longer.
    """
    if not mixture.narrow:
        return distances.clone()
    own = responsibility(distances.double().square(), mixture)
    moved = own + (1 - own) * mixture.narrow / mixture.broad
    return distances * (1 - pull * moved).to(distances.dtype)
