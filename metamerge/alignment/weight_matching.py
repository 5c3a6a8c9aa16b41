"""Weight matching for any number of members: units are permuted towards the members' barycentre.

Paper: Ainsworth, Hayase, Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries",
ICLR 2023, arXiv:2209.04836, sections 3.2 (weight matching) and A.10 (MergeMany). We differ in three
ways: members are matched to the medoid first, and then in the order of their distance from the
others, so the result does not depend on the order in which they are given; a first pass compares
units only by weights whose other axes are known by then, so nothing depends on the order in which a
member stores its units either; and many families are matched in one call.

A group with groups nested in its blocks (attention heads with their units, groups of channels) is
assigned as in a tree: the gain of putting a member's block in a place is the best gain over the
units inside it, found by assignments of their own for every pair of blocks.
"""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from metamerge.registry import alignment
from metamerge.structure import Permutation, PermutationSpec
from metamerge.weights import Weights

_SKETCH = 16  # columns of the random sketch that compares members before they are aligned
_EXACT = 64  # columns up to which none is needed: the order of classes must not choose the medoid
_CACHED = 2**20  # numbers of as many families as are matched side by side: they stay in the cache
_ROUNDING = 1e-12  # relative: what inner products of equally good permutations may differ by


@alignment(paper="arXiv:2209.04836")
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
    perm = {
        g: index.expand(families, members, *index.shape) for g, index in spec.identity().items()
    }
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
    for key in spec.axes:
        axes = {axis for group in spec.groups for k, axis in spec.touching(group) if k == key}
        if len(axes) != 1:
            continue
        units = weights[key].double().movedim(2 + axes.pop(), 2)[..., None].flatten(3)
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
        waiting = [group for group in _outermost(spec) if group not in known]
        ready = {g: _comparable(spec, _cluster(spec, g), known) for g in waiting}
        share = {
            g: _size(weights, ready[g]) / _size(weights, _touched(spec, _cluster(spec, g)))
            for g in waiting
        }
        group = max(share, key=share.__getitem__)
        keys = ready[group] or _touched(spec, _cluster(spec, group))
        perm = _assigned(weights, spec, perm, centre, group, keys)
        known |= {*_cluster(spec, group)}
    return perm


def _outermost(spec: PermutationSpec) -> list[str]:
    """Groups that are nested in no other."""
    return [group for group in spec.groups if not spec.outer(group)]


def _cluster(spec: PermutationSpec, group: str) -> tuple[str, ...]:
    """A group and what is nested in it: they are assigned together."""
    return (group, *spec.inner(group))


def _touched(spec: PermutationSpec, groups: Sequence[str]) -> list[str]:
    """Tensors that some groups permute."""
    return list(dict.fromkeys(key for group in groups for key, _ in spec.touching(group)))


def _comparable(spec: PermutationSpec, groups: Sequence[str], known: set[str]) -> list[str]:
    """Tensors of some groups whose other groups are known by now.

    A group that permutes two axes of a tensor, or two parts of an axis, does not know the other.

    Returns:
        State-dict keys.
    """
    keys = []
    for key in _touched(spec, groups):
        carried = [p.group for axis in range(len(spec.axes[key])) for p in spec.places(key, axis)]
        if {*carried} - {*groups} <= known and all(carried.count(g) <= 1 for g in groups):
            keys.append(key)
    return keys


def _size(weights: Weights, keys: Sequence[str]) -> int:
    return sum(weights[key].numel() for key in keys)


def _to_centre(
    weights: Weights, spec: PermutationSpec, perm: Permutation, centre: Weights, sweeps: int
) -> Permutation:
    """Match all members to one centre, group after group, until nothing moves.

    Returns:
        Group -> ``[f, m, n]``.
    """
    for _ in range(sweeps):
        before = perm
        for group in _outermost(spec):
            keys = _touched(spec, _cluster(spec, group))
            perm = _assigned(weights, spec, perm, centre, group, keys)
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


def _assigned(
    weights: Weights,
    spec: PermutationSpec,
    perm: Permutation,
    centre: Weights,
    group: str,
    keys: Sequence[str],
) -> Permutation:
    """Match one group, and what is nested in it, by some tensors; all other groups stay.

    Returns:
        The permutation with new indices for these groups.
    """
    cluster = _cluster(spec, group)
    others = {g: index for g, index in perm.items() if g not in cluster}
    placed = {key: spec.permute_tensor(key, weights[key], others) for key in keys}
    if len(cluster) == 1:
        own = {group: perm[group]}
        return {**perm, group: _assign(_gain(placed, centre, spec, own, group))}
    return {**perm, **_assigned_blocks(placed, spec, perm, centre, group)}


def _assigned_blocks(
    placed: Weights, spec: PermutationSpec, perm: Permutation, centre: Weights, group: str
) -> Permutation:
    """Match the blocks of a group together with the groups that are nested in them.

    Every shift of the blocks pairs each block of the centre with another one of the members; the
    units inside are matched for all pairs of a shift at once. The assignment of blocks then picks
    pairs, and with them the units inside.

    Returns:
        Indices of the group and of those nested in it.
    """
    count, inner = spec.groups[group], spec.inner(group)
    here = torch.arange(count).expand(perm[group].shape)
    score = torch.zeros(*here.shape, count, dtype=torch.float64)
    found: dict[str, list[Tensor]] = {g: [] for g in inner}
    for shift in range(count):
        trial = _filled(placed, spec, {group: (here + shift) % count}, centre, inner)
        value = sum(
            _agreement(placed, centre, spec, trial, group, key) for key in placed
        )  # [f, m, *blocks, n]
        score.scatter_(-1, trial[group][..., None], value.cpu()[..., None])
        for g in inner:
            found[g].append(trial[g])
    chosen = _assign(score)  # [f, m, *blocks, n]
    shifts = (chosen - here) % count
    return {group: chosen, **{g: _picked(spec, group, g, found[g], shifts) for g in inner}}


def _filled(
    placed: Weights,
    spec: PermutationSpec,
    trial: Permutation,
    centre: Weights,
    inner: Sequence[str],
) -> Permutation:
    """Match the nested groups inside blocks that are given.

    First each by the tensors that carry no nested group which is still unknown, then, where there
    are several, once more by all.

    Returns:
        The given indices and those of the nested groups.
    """
    trial = dict(trial)
    waiting = list(inner)
    lead = next(iter(placed.values())).shape[:2]
    for g in inner:
        index = spec.identity()[g]
        trial[g] = index.expand(*lead, *index.shape)
    while waiting:
        known = {*spec.groups} - {*waiting}
        ready = {g: [k for k in _comparable(spec, [g], known) if k in placed] for g in waiting}
        group = max(waiting, key=lambda g: _size(placed, ready[g]))
        some = {key: placed[key] for key in ready[group]} or placed
        if any(key in some for key, _ in spec.touching(group)):
            trial[group] = _assign(_gain(some, centre, spec, trial, group))
        waiting.remove(group)
    there = [g for g in inner if any(key in placed for key, _ in spec.touching(g))]
    for group in there if len(there) > 1 else ():
        trial[group] = _assign(_gain(placed, centre, spec, trial, group))
    return trial


def _picked(
    spec: PermutationSpec, group: str, nested: str, found: Sequence[Tensor], shifts: Tensor
) -> Tensor:
    """Of a nested group, the indices that belong to the shift that was chosen for each block."""
    every = torch.stack(found, -1)  # [f, m, *blocks of the nested, n, shifts]
    outer = spec.outer(nested)
    shape = [*shifts.shape[:2], *[1] * len(outer), 1, 1]
    for place, g in enumerate(outer):
        if g in spec.outer(group) or g == group:
            shape[2 + place] = spec.groups[g]
    return every.gather(-1, shifts.reshape(shape).expand(*every.shape[:-1], 1))[..., 0]


def _agreement(
    placed: Weights, centre: Weights, spec: PermutationSpec, perm: Permutation, group: str, key: str
) -> Tensor:
    """Inner product of each unit of the centre and what is put in its place, ``[f, m, *, n]``."""
    axes = [axis for k, axis in spec.touching(group) if k == key]
    if not axes:
        return torch.zeros(())
    aligned = spec.permute_tensor(key, placed[key], perm)
    rows = spec.unit_rows(key, axes[0], group, aligned)
    target = spec.unit_rows(key, axes[0], group, centre[key])
    return (rows * target[:, None]).sum(-1)


def _gain(
    placed: Weights, centre: Weights, spec: PermutationSpec, perm: Permutation, group: str
) -> Tensor:
    """Inner product of every unit of the centre and every unit of a member.

    Args:
        placed: Tensors ``[f, m, ...]`` in which all groups but those of ``perm`` are in place.
        centre: Tensors ``[f, ...]``.
        spec: The permutation spec.
        perm: Indices of groups that are still to be put in place; that of ``group`` counts where
            it permutes a second axis of a tensor.
        group: The group.

    Returns:
        ``[f, m, *blocks, n, n]``.
    """
    gain = torch.zeros(())
    for key, axis in spec.touching(group):
        if key in placed:
            aligned = spec.permute_tensor(key, placed[key], perm, keep=(axis, group))
            target = spec.unit_rows(key, axis, group, centre[key])  # [f, *blocks, n, r]
            units = spec.unit_rows(key, axis, group, aligned)  # [f, m, *blocks, n, r]
            gain = gain + torch.einsum("f...ir,fm...jr->fm...ij", target, units)
    return gain


def _assign(gain: Tensor) -> Tensor:
    flat = gain.flatten(0, -3).cpu().numpy()
    columns = [linear_sum_assignment(g, maximize=True)[1] for g in flat]
    index = torch.stack([torch.from_numpy(c) for c in columns])
    return index.reshape(gain.shape[:-1])
