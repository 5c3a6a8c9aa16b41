"""Assigning groups with groups nested in their blocks: attention heads with their units.

A group with groups nested in its blocks is assigned as in a tree: the gain of putting a member's
block in a place is the best gain over the units inside it, found by assignments of their own for
every pair of blocks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metamerge.alignment.assignment import assign
from metamerge.structure import Permutation, PermutationSpec
from metamerge.weights import Weights


def cluster(spec: PermutationSpec, group: str) -> tuple[str, ...]:
    """A group and what is nested in it: they are assigned together."""
    return (group, *spec.inner(group))


def touched(spec: PermutationSpec, groups: Sequence[str]) -> list[str]:
    """Tensors that some groups permute."""
    return list(dict.fromkeys(key for group in groups for key, _ in spec.touching(group)))


def comparable(spec: PermutationSpec, groups: Sequence[str], known: set[str]) -> list[str]:
    """Tensors of some groups whose other groups are known by now.

    A group that permutes two axes of a tensor, or two parts of an axis, does not know the other.

    Args:
        spec: The permutation spec.
        groups: The groups.
        known: Groups that are in place.

    Returns:
        State-dict keys.
    """
    keys = []
    for key in touched(spec, groups):
        carried = [p.group for axis in range(len(spec.axes[key])) for p in spec.places(key, axis)]
        if {*carried} - {*groups} <= known and all(carried.count(g) <= 1 for g in groups):
            keys.append(key)
    return keys


def assign_blocks(
    placed: Weights, spec: PermutationSpec, centre: Weights, group: str
) -> Permutation:
    """Match the blocks of a group together with the groups that are nested in them.

    Every shift of the blocks pairs each block of the centre with another one of the members; the
    units inside are matched for all pairs of a shift at once. The assignment of blocks then picks
    pairs, and with them the units inside.

    Args:
        placed: Tensors of the members ``[f, m, ...]``, in which all other groups are in place.
        spec: The permutation spec.
        centre: Tensors ``[f, ...]``.
        group: The group; it is nested in no other.

    Returns:
        Indices ``[f, m, *blocks, n]`` of the group and of those nested in it.
    """
    count, inner = spec.groups[group], spec.inner(group)
    lead = next(iter(placed.values())).shape[:2]
    here = torch.arange(count).expand(*lead, count)
    score = torch.zeros(*here.shape, count, dtype=torch.float64)
    found: dict[str, list[Tensor]] = {g: [] for g in inner}
    for shift in range(count):
        trial = _filled(placed, spec, {group: (here + shift) % count}, centre, inner)
        value = sum(
            _agreement(placed, centre, spec, trial, group, key) for key in placed
        )  # [f, m, n]
        score.scatter_(-1, trial[group][..., None], value.cpu()[..., None])
        for g in inner:
            found[g].append(trial[g])
    chosen = assign(score)  # [f, m, n]
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
        ready = {g: [k for k in comparable(spec, [g], known) if k in placed] for g in waiting}
        group = max(waiting, key=lambda g: sum(placed[key].numel() for key in ready[g]))
        some = {key: placed[key] for key in ready[group]} or placed
        if any(key in some for key, _ in spec.touching(group)):
            trial[group] = assign(_gain(some, centre, spec, trial, group))
        waiting.remove(group)
    there = [g for g in inner if any(key in placed for key, _ in spec.touching(g))]
    for group in there if len(there) > 1 else ():
        trial[group] = assign(_gain(placed, centre, spec, trial, group))
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
