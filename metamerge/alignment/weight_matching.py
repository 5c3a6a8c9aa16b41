"""Weight matching for any number of members: units are permuted towards the members' barycentre.

Paper: Ainsworth, Hayase, Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries",
ICLR 2023, arXiv:2209.04836, sections 3.2 (weight matching) and A.10 (MergeMany). We differ in three
ways: members are matched to the medoid first, and then in the order of their distance from the
others, so the result does not depend on the order in which they are given; a first pass compares
units only by weights whose other axes are known by then, so nothing depends on the order in which a
member stores its units either; and many families are matched in one call.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from metamerge.structure import Permutation, PermutationSpec
from metamerge.weights import Weights

_SKETCH = 16  # columns of the random sketch that compares members before they are aligned
_EXACT = 64  # columns up to which none is needed: the order of classes must not choose the medoid
_CACHED = 2**20  # numbers of as many families as are matched side by side: they stay in the cache
_ROUNDING = 1e-12  # relative: what inner products of equally good permutations may differ by


def weight_matching(weights: Weights, spec: PermutationSpec, *, sweeps: int = 30) -> Permutation:
    """Permute every member's units to bring all members close to their common mean.

    Coordinate descent over groups; each step is a linear assignment. First all members are matched
    to the medoid, then one after the other to the mean of the rest, until nothing moves. No step of
    the second stage takes the members further from their common mean.

    Args:
        weights: Stacked members of ``f`` families, every tensor ``[f, m, ...]``.
        spec: Permutation spec of their architecture.
        sweeps: Upper bound on passes over all groups, in each of the two stages.

    Returns:
        Group -> ``[f, m, n]``; apply it with ``spec.permute``.
    """
    exact = {key: weights[key].detach().double() for key in spec.axes}
    order = _distances(exact, spec).argsort(-1)  # [f, m], the medoid first
    families, members = order.shape
    rows = torch.arange(families)[:, None]
    ranked = {key: tensor[rows, order] for key, tensor in exact.items()}
    perm = {g: torch.arange(n).expand(families, members, n) for g, n in spec.groups.items()}
    centre = {key: tensor[:, 0] for key, tensor in ranked.items()}
    perm = _first_pass(ranked, spec, perm, centre)
    perm = _to_centre(ranked, spec, perm, centre, sweeps)
    size = sum(tensor[0].numel() for tensor in ranked.values())
    parts = rows[:, 0].split(max(1, _CACHED // size))
    each = [_to_each_other(_at(ranked, part), spec, _at(perm, part), sweeps) for part in parts]
    perm = {group: torch.cat([own[group] for own in each]) for group in perm}
    return {group: index[rows, order.argsort(-1)] for group, index in perm.items()}


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
    return _distances(weights, spec).argmin(-1)


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


def _at(stacked: dict[str, Tensor], families: Tensor) -> dict[str, Tensor]:
    return {key: tensor[families] for key, tensor in stacked.items()}


def _distances(weights: Weights, spec: PermutationSpec) -> Tensor:
    """Sum of each member's distances from the others, ``[f, m]``, on the CPU; see ``medoid``."""
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
        columns = units.shape[-1]
        sketch = torch.randn(columns, _SKETCH, generator=generator, dtype=torch.float64)
        if columns <= _EXACT:
            sketch = torch.eye(columns, dtype=torch.float64)
        fingerprint = units.mT @ (units @ sketch.to(units.device))  # [f, m, r, sketch]
        gaps = torch.cdist(fingerprint.flatten(2), fingerprint.flatten(2)).sum(-1)  # [f, m]
        distance += (gaps / gaps.mean(-1, keepdim=True).clamp_min(1e-300)).cpu()
    return distance


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


def _to_centre(
    weights: Weights, spec: PermutationSpec, perm: Permutation, centre: Weights, sweeps: int
) -> Permutation:
    """Match all members to one centre, group after group, until nothing moves.

    Returns:
        Group -> ``[f, m, n]``.
    """
    for _ in range(sweeps):
        before = perm
        for group in spec.groups:
            places = spec.touching(group)
            perm = {**perm, group: _assign(_gain(weights, centre, spec, perm, group, places))}
        if all(torch.equal(before[g], perm[g]) for g in perm):
            break
    return perm


def _to_each_other(
    weights: Weights, spec: PermutationSpec, perm: Permutation, sweeps: int
) -> Permutation:
    """Match the members of every family to each other, until none comes any closer.

    One after the other is matched to the sum of the rest. Leaving it out of the sum matters:
    independent members are nearly orthogonal, so that in a sum with itself a member is matched to
    itself, wherever it is.

    Returns:
        Group -> ``[f, m, n]``.
    """
    perm = {group: index.clone() for group, index in perm.items()}
    aligned = {key: tensor.clone() for key, tensor in spec.permute(weights, perm).items()}
    total = {key: tensor.sum(1) for key, tensor in aligned.items()}  # [f, ...]
    families, members = next(iter(weights.values())).shape[:2]
    for _ in range(sweeps):
        moved = torch.zeros(families, dtype=torch.bool)
        for k in range(members):
            own = {group: index[:, [k]] for group, index in perm.items()}
            one = {key: tensor[:, [k]] for key, tensor in weights.items()}
            here = {key: tensor[:, k] for key, tensor in aligned.items()}
            rest = {key: tensor - here[key] for key, tensor in total.items()}
            found = _to_centre(one, spec, own, rest, 1)
            there = {key: tensor[:, 0] for key, tensor in spec.permute(one, found).items()}
            # no gain is possible where a group has two axes of a tensor, or two ways are as good
            gain = _inner(there, rest) - _inner(here, rest)  # [f]
            better = gain > _ROUNDING * _inner(here, here)
            moved |= better.cpu()
            for group, index in found.items():
                perm[group][better.cpu(), k] = index[better.cpu(), 0]
            for key, tensor in there.items():
                aligned[key][better, k] = tensor[better]
                total[key][better] = rest[key][better] + tensor[better]
        if not moved.any():
            break
    return perm


def _inner(one: Weights, other: Weights) -> Tensor:
    """Inner product per family, ``[f, ...]`` twice -> ``[f]``."""
    return sum((tensor * other[key]).reshape(len(tensor), -1).sum(1) for key, tensor in one.items())


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
