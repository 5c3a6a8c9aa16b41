"""Frank-Wolfe over doubly stochastic matrices, for all members, groups and families at once.

Paper: Frank, Wolfe, "An algorithm for quadratic programming", Naval Research Logistics Quarterly 3,
1956. The permutations that lower the cost fastest are linear assignments of its gradient; on the
way to them the cost is a polynomial, whose minimum is the step length.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from metamerge.alignment.soft_permutation import Matrices, hardened, matrices_of, relaxed_cost
from metamerge.structure import PermutationSpec
from metamerge.weights import Weights

_TOLERANCE = 1e-3  # of the cost: what steps may still gain at most when they end
_PROMISING = 1e-9  # of the cost: less is rounding
_NONE = 1e-12  # a cost of no meaning: the members are permutations of each other


def frank_wolfe(
    weights: Weights, spec: PermutationSpec, matrices: Matrices, steps: int
) -> tuple[Matrices, list[float]]:
    """Lower the relaxed cost until no assignment promises much more.

    Args:
        weights: Stacked members in float64, every tensor ``[f, m, ...]``.
        spec: Permutation spec of their architecture, without nested groups.
        matrices: Where to start, group -> doubly stochastic ``[f, m, n, n]``.
        steps: Upper bound on steps.

    Returns:
        Matrices, and the cost (mean over families) before every step and after the last.
    """
    degree, costs = _degree(spec), []
    for _ in range(steps):
        cost, slopes = _slopes(weights, spec, matrices)
        costs.append(float(cost.mean()))
        towards, gap = _directions(matrices, slopes, cost)
        if (gap <= _TOLERANCE * cost).all():
            return matrices, costs
        length = _lengths(weights, spec, matrices, towards, cost, degree)
        length = length * (gap > _TOLERANCE * cost)  # families do not wait for each other
        matrices = _moved(matrices, towards, length[:, None, None, None])
    return matrices, [*costs, float(relaxed_cost(weights, spec, matrices).mean())]


def _slopes(
    weights: Weights, spec: PermutationSpec, matrices: Matrices
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cost ``[f]`` and its gradient by every matrix."""
    with torch.enable_grad():
        leaves = {g: matrix.detach().requires_grad_() for g, matrix in matrices.items()}
        cost = relaxed_cost(weights, spec, leaves)
        slopes = torch.autograd.grad(cost.sum(), list(leaves.values()), materialize_grads=True)
    return cost.detach().clamp_min(_NONE), dict(zip(leaves, slopes, strict=True))


def _directions(
    matrices: Matrices, slopes: Mapping[str, Tensor], cost: Tensor
) -> tuple[Matrices, Tensor]:
    """Ways from the matrices to the permutations that promise most.

    Where nothing is promised (an anchor sees only blurred members at first), a matrix stays: among
    equally good permutations any choice would depend on the order in which units are stored.

    Returns:
        Group -> ``[f, m, n, n]``, and what all of them promise together, ``[f]``.
    """
    ends = matrices_of(hardened({g: -slope for g, slope in slopes.items()}), cost)
    towards, gap = {}, torch.zeros_like(cost)
    for g, slope in slopes.items():
        promised = -(slope * (ends[g] - matrices[g])).sum((-1, -2), keepdim=True)
        worth = promised > _PROMISING * cost[:, None, None, None]
        towards[g] = (ends[g] - matrices[g]) * worth
        gap = gap + (promised * worth).flatten(1).sum(1)
    return towards, gap


def _moved(matrices: Matrices, towards: Matrices, length: Tensor | float) -> Matrices:
    return {g: matrix + length * towards[g] for g, matrix in matrices.items()}


def _degree(spec: PermutationSpec) -> int:
    """Degree of the cost along a line: twice the most matrices that one entry is multiplied by."""
    touched = [
        sum(int(sum(p.labels >= 0 for p in places).max()) for places in carriers.values())
        for carriers in map(spec.carriers, spec.axes)
    ]
    return 2 * max(touched, default=0)


def _lengths(
    weights: Weights,
    spec: PermutationSpec,
    matrices: Matrices,
    towards: Matrices,
    cost: Tensor,
    degree: int,
) -> Tensor:
    """The best step of every family, ``[f]`` in [0, 1]: the cost is a polynomial of its length."""
    nodes = (1 - np.cos(np.pi * np.arange(degree + 1) / degree)) / 2  # from 0 to 1
    costs = [relaxed_cost(weights, spec, _moved(matrices, towards, t)) for t in nodes[1:]]
    values = torch.stack([cost, *costs], 1).cpu().numpy()  # [f, degree + 1]
    return torch.tensor([_lowest(nodes, row) for row in values]).to(cost)


def _lowest(nodes: np.ndarray, values: np.ndarray) -> float:
    """Where in [0, 1] the polynomial through some points is lowest."""
    line = Polynomial.fit(nodes, values, len(nodes) - 1, domain=[0, 1], window=[0, 1])
    turns = [root.real for root in line.deriv().roots() if 0 < root.real < 1]
    return min([0.0, 1.0, *turns], key=line)
