"""Weight matching for any number of members: units are permuted towards the members' barycentre.

Paper: Ainsworth, Hayase, Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries",
ICLR 2023, arXiv:2209.04836, sections 3.2 (weight matching) and A.10 (MergeMany). We differ in three
ways: the search starts at the medoid rather than at the first member, so the result does not depend
on the members' order; all members are matched to the current barycentre at once rather than one by
one; and families are matched side by side. A first pass compares units only by weights whose other
axes are known by then, so nothing depends on the order in which a member stores its units either.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from metamerge.structure import Permutation, PermutationSpec
from metamerge.weights import Weights

_SKETCH = 16  # columns of the random sketch that compares members before they are aligned


def weight_matching(weights: Weights, spec: PermutationSpec, *, sweeps: int = 30) -> Permutation:
    """Permute every member's units to bring all members close to their common mean.

    Coordinate descent on ``sum_k ||P_k w_k - centre||^2`` over groups: each step is a linear
    assignment. First the centre is the medoid, then the mean of the aligned members, until nothing
    moves.

    Args:
        weights: Stacked members of ``f`` families, every tensor ``[f, m, ...]``.
        spec: Permutation spec of their architecture.
        sweeps: Upper bound on passes over all groups, in each of the two stages.

    Returns:
        Group -> ``[f, m, n]``; apply it with ``spec.permute``.
    """
    touched = {key: weights[key].detach().double() for key in spec.axes}
    families, members = next(iter(touched.values())).shape[:2]
    perm = {g: torch.arange(n).expand(families, members, n) for g, n in spec.groups.items()}
    start = medoid(touched, spec)
    rows = torch.arange(families, device=start.device)
    centre = {key: tensor[rows, start] for key, tensor in touched.items()}
    perm = _first_pass(touched, spec, perm, centre)
    perm = _descend(touched, spec, perm, sweeps, lambda aligned: centre)
    return _descend(touched, spec, perm, sweeps, _mean)


def medoid(weights: Weights, spec: PermutationSpec) -> Tensor:
    """The member that is most like the others, whatever the order of anyone's units.

    Members are compared by ``A^T A R`` for every matrix ``A`` of units by fixed columns (inputs,
    classes) and a random sketch ``R``: a sum over units, hence blind to their order.

    Args:
        weights: Stacked members, every tensor ``[f, m, ...]``.
        spec: Permutation spec of their architecture.

    Returns:
        Index of the medoid of each family, ``[f]``.
    """
    generator = torch.Generator().manual_seed(0)
    families, members = next(iter(weights.values())).shape[:2]
    distance = torch.zeros(families, members, dtype=torch.float64)
    for key, factored in spec.axes.items():
        free = [
            (axis, f.group) for axis, factors in enumerate(factored) for f in factors if f.group
        ]
        if len(free) != 1:
            continue
        units = spec.unit_rows(key, *free[0], weights[key].double())  # [f, m, n, r]
        sketch = torch.randn(units.shape[-1], _SKETCH, generator=generator, dtype=torch.float64)
        fingerprint = (units.mT @ (units @ sketch.to(units.device))).flatten(
            2
        )  # [f, m, r * sketch]
        gaps = torch.cdist(fingerprint, fingerprint).sum(-1)  # [f, m]
        distance += (gaps / gaps.mean(-1, keepdim=True).clamp_min(1e-300)).cpu()
    return distance.argmin(-1)


def matching_cost(weights: Weights, spec: PermutationSpec, perm: Permutation) -> Tensor:
    """Mean squared distance of the aligned members to their mean, relative to their squared norm.

    Args:
        weights: Stacked members, every tensor ``[f, m, ...]``.
        spec: Permutation spec of their architecture.
        perm: Group -> ``[f, m, n]``.

    Returns:
        One number per family, ``[f]``; 0 for members that are permutations of each other.
    """
    touched = {key: weights[key].double() for key in spec.axes}
    aligned = spec.permute(touched, perm)
    spread = sum((t - t.mean(1, keepdim=True)).square().flatten(1).sum(1) for t in aligned.values())
    size = sum(t.square().flatten(1).sum(1) for t in aligned.values())
    return spread / size.clamp_min(1e-300)


def _first_pass(
    weights: Weights, spec: PermutationSpec, perm: Permutation, centre: Weights
) -> Permutation:
    """Assign every group once, by the tensors whose other axes keep their place or are known.

    Next is always the group of whose weights the largest share can be compared already, so the pass
    usually goes from the inputs to the outputs.

    Returns:
        Group -> ``[f, m, n]``.
    """
    known: set[str] = set()
    while len(known) < len(spec.groups):
        ready = {
            group: [place for place in spec.touching(group) if _others(spec, place, group) <= known]
            for group in spec.groups
            if group not in known
        }
        share = {g: _size(weights, ready[g]) / _size(weights, spec.touching(g)) for g in ready}
        group = max(share, key=share.__getitem__)
        places = ready[group] or spec.touching(group)
        perm = {**perm, group: _assign(_gain(weights, centre, spec, perm, group, places))}
        known.add(group)
    return perm


def _others(spec: PermutationSpec, place: tuple[str, int], group: str) -> set[str]:
    """Groups that permute a tensor besides ``group``, which counts if it is there twice."""
    groups = [f.group for factors in spec.axes[place[0]] for f in factors if f.group]
    groups.remove(group)
    return set(groups)


def _size(weights: Weights, places: Sequence[tuple[str, int]]) -> int:
    return sum(weights[key].numel() for key, _ in places)


def _descend(
    weights: Weights, spec: PermutationSpec, perm: Permutation, sweeps: int, centre_of
) -> Permutation:
    for _ in range(sweeps):
        before = perm
        centre = centre_of(spec.permute(weights, perm))
        for group in spec.groups:
            places = spec.touching(group)
            perm = {**perm, group: _assign(_gain(weights, centre, spec, perm, group, places))}
        if all(torch.equal(before[g], perm[g]) for g in perm):
            break
    return perm


def _mean(aligned: Weights) -> Weights:
    return {key: tensor.mean(1) for key, tensor in aligned.items()}


def _gain(
    weights: Weights,
    centre: Weights,
    spec: PermutationSpec,
    perm: Permutation,
    group: str,
    places: Sequence[tuple[str, int]],
) -> Tensor:
    """Inner product of every unit of the centre and every unit of a member, ``[f, m, n, n]``."""
    gain = 0.0
    for key, axis in places:
        aligned = spec.permute_tensor(key, weights[key], perm, keep=(axis, group))
        target = spec.unit_rows(key, axis, group, centre[key])  # [f, n, r]
        units = spec.unit_rows(key, axis, group, aligned)  # [f, m, n, r]
        gain = gain + torch.einsum("fir,fmjr->fmij", target, units)
    return gain


def _assign(gain: Tensor) -> Tensor:
    flat = gain.flatten(0, 1).cpu().numpy()
    columns = [linear_sum_assignment(g, maximize=True)[1] for g in flat]
    index = torch.stack([torch.from_numpy(c) for c in columns])
    return index.reshape(*gain.shape[:2], -1)
