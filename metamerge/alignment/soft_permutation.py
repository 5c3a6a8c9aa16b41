"""Soft permutations: doubly stochastic matrices in the place of indices, to be differentiated.

Papers: Sinkhorn, Knopp, "Concerning nonnegative matrices and doubly stochastic matrices", Pacific
J. Math. 21, 1967; Eisenberger et al., "A Unified Framework for Implicit Sinkhorn Differentiation",
CVPR 2022, arXiv:2205.06688, for the gradient.

Shape comments: f families, m members, n units of a group. A permutation ``index`` is the matrix
with ones at ``[i, index[i]]``: ``matrix @ units`` is what ``aligned[i] = w[index[i]]`` says.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from metamerge.alignment.assignment import assign
from metamerge.errors import ConfigError
from metamerge.structure import Concat, Permutation, PermutationSpec
from metamerge.structure.factors import AxisSpec, axis_length
from metamerge.weights import Weights

Matrices = dict[str, Tensor]
"""Group -> doubly stochastic matrices ``[f, m, n, n]``."""

_ITERATIONS = 200  # far more than logits of the size that alignments use need
_RIDGE = 1e-10  # where a matrix is a permutation to rounding, its gradient is 0 and not 0 / 0


def doubly_stochastic(logits: Tensor, rounds: int = _ITERATIONS) -> Tensor:
    """Bring ``exp(logits)`` to row and column sums of 1, with the gradient of the exact limit.

    The forward pass normalises rows and columns in turn, in logarithms. The backward pass solves
    the linear system that the sums impose on any small change (implicit differentiation), so it
    needs neither the iterations nor their memory.

    Args:
        logits: ``[*batch, n, n]``.
        rounds: Upper bound on rounds of rows and columns.

    Returns:
        ``[*batch, n, n]``; columns sum to 1, rows nearly so where the rounds were enough.
    """
    return _Sinkhorn.apply(logits, rounds)


def normalised(logits: Tensor, rounds: int = _ITERATIONS) -> Tensor:
    """The iteration of ``doubly_stochastic``, to be differentiated step by step.

    Args:
        logits: ``[*batch, n, n]``.
        rounds: Upper bound on rounds of rows and columns.

    Returns:
        Logarithms of the matrices, ``[*batch, n, n]``.
    """
    tolerance = torch.finfo(logits.dtype).eps ** 0.75
    for _ in range(rounds):
        rows = logits.logsumexp(-1, keepdim=True)
        if not bool((rows.detach().abs() > tolerance).any()):
            break
        logits = logits - rows
        logits = logits - logits.logsumexp(-2, keepdim=True)
    return logits


class _Sinkhorn(torch.autograd.Function):
    """With ``P = exp(L + a + b)`` and sums fixed, ``dP = P * (dL + da + db)``.

    The gradient is ``P * (G - x - y)``, where ``x`` (per row) and ``y`` (per column) give
    ``P * (x + y)`` the row and column sums of ``P * G``. Without ``x`` that is a system in ``y``,
    positive but for the constant vector, which changes nothing and is made 0. It keeps to the sums
    that ``P`` has, so it stays positive where the rounds were too few to make them 1.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rounds: int) -> Tensor:
        matrix = normalised(logits, rounds).exp()
        ctx.save_for_backward(matrix)
        return matrix

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        exact, weighted = matrix.double(), (matrix * gradient).double()
        sums = exact.sum(-1, keepdim=True)  # [*batch, n, 1]
        share = exact / sums
        rows, columns = weighted.sum(-1, keepdim=True), weighted.sum(-2)[..., None]
        own = torch.diag_embed(exact.sum(-2) + _RIDGE)
        system = own - exact.mT @ share + 1 / matrix.shape[-1]
        y = torch.linalg.solve(system, columns - share.mT @ rows)  # [*batch, n, 1]
        x = rows / sums - share @ y
        return (weighted - exact * (x + y.mT)).to(matrix.dtype), None


def matrices_of(perm: Permutation, like: Tensor) -> Matrices:
    """Permutation matrices of indices.

    Args:
        perm: Group -> ``[f, m, n]``.
        like: A tensor of the dtype and device that they are to have.

    Returns:
        Group -> ``[f, m, n, n]``.
    """
    return {group: F.one_hot(index, index.shape[-1]).to(like) for group, index in perm.items()}


def hardened(matrices: Mapping[str, Tensor]) -> Permutation:
    """The permutations that agree best with matrices: one linear assignment each.

    Args:
        matrices: Group -> scores ``[f, m, n, n]``.

    Returns:
        Group -> ``[f, m, n]``, on the CPU.
    """
    return {group: assign(scores.detach()) for group, scores in matrices.items()}


def mixed(weights: Weights, spec: PermutationSpec, matrices: Mapping[str, Tensor]) -> Weights:
    """Apply soft permutations: ``aligned = matrix @ units`` along every axis of every group.

    Args:
        weights: Stacked members, every tensor ``[f, m, ...]``.
        spec: Permutation spec of their architecture, without nested groups.
        matrices: Group -> ``[f, m, n, n]``; a group without an entry stays in place.

    Returns:
        The tensors that ``spec.axes`` names; with permutation matrices, what ``spec.permute`` does.
    """
    return {key: _mixed_tensor(weights[key], spec.axes[key], matrices) for key in spec.axes}


def relaxed_cost(weights: Weights, spec: PermutationSpec, matrices: Mapping[str, Tensor]) -> Tensor:
    """``matching_cost`` for soft permutations, as inner products of *different* members.

    At permutations it is the mean squared distance of the members to their mean, relative to their
    squared norm. In between it is linear in every single matrix (of a group on one axis). Distances
    are not: they fall as soon as matrices are blurred, until all units are alike.

    Args:
        weights: Stacked members, every tensor ``[f, m, ...]``.
        spec: Permutation spec of their architecture, without nested groups.
        matrices: Group -> ``[f, m, n, n]``.

    Returns:
        One number per family, ``[f]``.
    """
    size = sum(weights[key].square().flatten(1).sum(1) for key in spec.axes)
    aligned = mixed(weights, spec, matrices)
    total = sum(t.sum(1).square().flatten(1).sum(1) for t in aligned.values())
    own = sum(t.square().flatten(1).sum(1) for t in aligned.values())
    members = next(iter(weights.values())).shape[1]
    tiny = torch.finfo(size.dtype).tiny
    cost = 1 - 1 / members - (total - own) / (members * size.clamp_min(tiny))
    return cost * (size > 0)


def check_not_nested(name: str, spec: PermutationSpec) -> None:
    """Refuse specs with groups that are permuted on their own in the blocks of others.

    Args:
        name: The alignment, for the message.
        spec: The permutation spec.

    Raises:
        ConfigError: If a group is nested.
    """
    nested = [group for group in spec.groups if spec.outer(group)]
    if nested:
        raise ConfigError(
            f"{name}: the groups {nested} are permuted on their own in every block of others "
            f"(units of attention heads, groups of channels); soft permutations have one matrix "
            f'per group. Use align="weight_matching" for this network.'
        )


def _mixed_tensor(
    tensor: Tensor, axes: tuple[AxisSpec, ...], matrices: Mapping[str, Tensor]
) -> Tensor:
    lead = tensor.ndim - len(axes)
    for number, axis in enumerate(axes):
        tensor = _mixed_axis(tensor, lead + number, axis, matrices)
    return tensor


def _mixed_axis(tensor: Tensor, dim: int, axis: AxisSpec, matrices: Mapping[str, Tensor]) -> Tensor:
    """Cut an axis into its factors, mix those of a group, and join them again."""
    if not axis:
        return tensor
    tensor = tensor.unflatten(dim, [factor.size for factor in axis])
    for place, factor in enumerate(axis, start=dim):
        if isinstance(factor, Concat):
            parts = tensor.split([axis_length(part) for part in factor.axes], place)
            each = zip(parts, factor.axes, strict=True)
            tensor = torch.cat([_mixed_axis(t, place, part, matrices) for t, part in each], place)
        elif factor.group in matrices:
            tensor = _multiplied(matrices[factor.group], tensor, place)
    return tensor.flatten(dim, dim + len(axis) - 1)


def _multiplied(matrix: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """``matrix [f, m, n, n]`` times ``tensor [f, m, ...]`` along ``dim``."""
    rows = tensor.movedim(dim, 2)  # [f, m, n, ...]
    product = matrix.to(rows.dtype) @ rows[..., None].flatten(3)
    return product.reshape(rows.shape).movedim(2, dim)
