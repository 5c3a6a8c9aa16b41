"""How far members are from each other, whatever the order of their units, and once aligned."""

import torch
from torch import Tensor

from metamerge.structure import Permutation, PermutationSpec
from metamerge.weights import Weights

_SKETCH = 16  # columns of the random sketch that compares members before they are aligned
_EXACT = 64  # columns up to which none is needed: the order of classes must not choose the medoid


def medoid(weights: Weights, spec: PermutationSpec) -> Tensor:
    """The member that is most like the others, whatever the order of anyone's units.

    Members are compared by ``A^T A R`` for every matrix ``A`` of units by fixed columns (inputs,
    classes), a sum over units and hence blind to their order. ``R`` is the identity, or a random
    sketch where there are many columns.

    Args:
        weights: Stacked members, every tensor ``[f, m, ...]``.
        spec: Permutation spec of their architecture.

    Returns:
        Index of the medoid of each family, ``[f]``.
    """
    return distances(weights, spec).argmin(-1)


def distances(weights: Weights, spec: PermutationSpec) -> Tensor:
    """Sum of each member's distances from the others, as ``medoid`` compares them.

    Args:
        weights: Stacked members, every tensor ``[f, m, ...]``.
        spec: Permutation spec of their architecture.

    Returns:
        ``[f, m]``, on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    families, members = next(iter(weights.values())).shape[:2]
    distance = torch.zeros(families, members, dtype=torch.float64)
    for key in spec.axes:
        axes = {axis for group in spec.groups for k, axis in spec.touching(group) if k == key}
        if len(axes) != 1:
            continue
        units = weights[key].detach().double().movedim(2 + axes.pop(), 2)[..., None].flatten(3)
        columns = units.shape[-1]
        sketch = torch.randn(columns, _SKETCH, generator=generator, dtype=torch.float64)
        if columns <= _EXACT:
            sketch = torch.eye(columns, dtype=torch.float64)
        fingerprint = units.mT @ (units @ sketch.to(units.device))  # [f, m, r, sketch]
        gaps = torch.cdist(fingerprint.flatten(2), fingerprint.flatten(2)).sum(-1)  # [f, m]
        distance += (gaps / gaps.mean(-1, keepdim=True).clamp_min(1e-300)).cpu()
    return distance


def matching_cost(weights: Weights, spec: PermutationSpec, perm: Permutation) -> Tensor:
    """Mean squared distance of the aligned members to their mean, relative to their squared norm.

    Args:
        weights: Stacked members, every tensor ``[f, m, ...]``.
        spec: Permutation spec of their architecture.
        perm: Group -> ``[f, m, n]``; a group without an entry stays in place.

    Returns:
        One number per family, ``[f]``; 0 for members that are permutations of each other.
    """
    families = len(next(iter(weights.values())))
    spread, size = torch.zeros(2, families, dtype=torch.float64)
    for key in spec.axes:
        own = spec.permute_tensor(key, weights[key].detach(), perm).double()
        spread += (own - own.mean(1, keepdim=True)).square().flatten(1).sum(1).cpu()
        size += own.square().flatten(1).sum(1).cpu()
    return spread / size.clamp_min(1e-300)
