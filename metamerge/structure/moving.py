"""Index arithmetic of a permutation spec: moving, scaling and collecting the entries of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metamerge.structure.factors import Place, labels_of

if TYPE_CHECKING:
    from metamerge.structure.spec import Permutation, PermutationSpec, Scaling


def unit_rows(spec: PermutationSpec, key: str, axis: int, group: str, tensor: Tensor) -> Tensor:
    """See ``PermutationSpec.unit_rows``."""
    lead = tensor.ndim - len(spec.axes[key])
    wanted = [*spec.outer(group), group]
    homes = {g: _home(spec, key, axis, g) for g in wanted}
    found: dict[str, int] = {}
    for number in sorted(set(homes.values()), reverse=True):
        here = [g for g in wanted if homes[g] == number]
        if (index := _sorted(spec, key, number, tuple(here))) is not None:
            tensor = tensor.index_select(lead + number, index.to(tensor.device))
        sizes = [spec.groups[g] for g in here]
        tensor = tensor.unflatten(lead + number, (*sizes, -1))
        found = {g: d + (d > lead + number) * len(here) for g, d in found.items()}
        found.update({g: lead + number + i for i, g in enumerate(here)})
    count = len(wanted)
    rows = tensor.movedim([found[g] for g in wanted], list(range(lead, lead + count)))
    return rows[..., None].flatten(lead + count)


def permute_tensor(
    spec: PermutationSpec,
    key: str,
    tensor: Tensor,
    perm: Permutation,
    *,
    keep: tuple[int, str] | None = None,
) -> Tensor:
    """See ``PermutationSpec.permute_tensor``."""
    lead = tensor.ndim - len(spec.axes.get(key, ()))
    across, taken = [], []
    for axis, places in spec.carriers(key).items():
        moved = [p for p in places if p.group in perm and (axis, p.group) != keep]
        here = {p.group for p in places}
        alone = [p for p in moved if here >= {*spec.outer(p.group)}]
        across += [(axis, p) for p in moved if not here >= {*spec.outer(p.group)}]
        if alone:
            taken.append((lead + axis, _index(spec, places, alone, perm)))
    tensor = _taken(tensor, taken)
    across.sort(key=lambda item: spec.order.index(item[1].group))
    for axis, place in across:  # nested in groups of other axes, which are in order by now
        tensor = _take_across(spec, key, tensor, axis, place, perm)
    return tensor


def rescale_tensor(
    spec: PermutationSpec, key: str, tensor: Tensor, scaling: Scaling, factors: Tensor
) -> Tensor:
    """See ``PermutationSpec.rescale_tensor``."""
    for axis, power in scaling.powers.get(key, {}).items():
        own = _at_entries(spec, key, axis, scaling.group, factors.to(tensor))
        tensor = tensor * own**power
    return tensor


def inverse(spec: PermutationSpec, perm: Permutation) -> Permutation:
    """See ``PermutationSpec.inverse``."""
    back: Permutation = {}
    for group in spec.order:
        index, outer = perm[group], spec.outer(group)
        if outer:
            lead = index.ndim - len(outer) - 1
            source = _grid(spec, outer, back, index.shape[:lead])
            flat = index.flatten(lead, -2)  # [*batch, blocks, n]
            chosen = source.reshape(*index.shape[:lead], -1)[..., None].expand_as(flat)
            index = flat.gather(-2, chosen).reshape(index.shape)
        back[group] = index.argsort(-1)
    return back


def _home(spec: PermutationSpec, key: str, axis: int, group: str) -> int:
    """The axis that carries a group, rather ``axis`` than another."""
    axes = [axis, *(other for other in spec.carriers(key) if other != axis)]
    return next(a for a in axes if _has(spec, key, a, group))


def _has(spec: PermutationSpec, key: str, axis: int, group: str) -> bool:
    return any(place.group == group for place in spec.places(key, axis))


def _sorted(spec: PermutationSpec, key: str, axis: int, groups: tuple[str, ...]) -> Tensor | None:
    """Entries of an axis ordered by their units; None where they are in that order already."""
    labels = torch.stack(
        [
            torch.stack([p.labels for p in spec.places(key, axis) if p.group == g]).amax(0)
            for g in groups
        ]
    )  # [groups, size]
    number = torch.zeros_like(labels[0])
    for group, own in zip(groups, labels, strict=True):
        number = number * spec.groups[group] + own
    index = number.argsort(stable=True)
    index = index[(labels >= 0).all(0)[index]]
    plain = len(index) == len(number) and bool((index == torch.arange(len(index))).all())
    return None if plain else index


def _index(
    spec: PermutationSpec, places: list[Place], moved: list[Place], perm: Permutation
) -> Tensor:
    """Index along one axis, ``[*batch, size]``: the outer groups first, then what is nested."""
    index = torch.arange(len(places[0].labels))
    for place in moved:
        outer = [labels_of(places, group) for group in spec.outer(place.group)]
        index = _composed(index, _step(place, perm[place.group], outer))
    return index


def _take_across(
    spec: PermutationSpec, key: str, tensor: Tensor, axis: int, place: Place, perm: Permutation
) -> Tensor:
    count = len(spec.axes[key])
    outer = [_spread_labels(spec, key, axis, group) for group in spec.outer(place.group)]
    shape = _alone(axis, count)
    wide = Place(place.group, place.labels.reshape(shape), place.stride.reshape(shape))
    index = _step(wide, perm[place.group].cpu(), outer)
    index = index.reshape(*[1] * (tensor.ndim - index.ndim), *index.shape)
    dim = tensor.ndim - count + axis
    return torch.take_along_dim(tensor, index.to(tensor.device), dim=dim)


def _spread_labels(spec: PermutationSpec, key: str, axis: int, group: str) -> Tensor:
    """Labels of a group along the axis that carries it, rather ``axis`` than another."""
    home = _home(spec, key, axis, group)
    labels = labels_of(spec.places(key, home), group)
    return labels.reshape(_alone(home, len(spec.axes[key])))


def _at_entries(spec: PermutationSpec, key: str, axis: int, group: str, factors: Tensor) -> Tensor:
    """One number per unit, spread over the entries of a tensor; 1 for other entries."""
    shape = _alone(axis, len(spec.axes[key]))
    spread = torch.ones(1, dtype=factors.dtype, device=factors.device)
    outer = [_spread_labels(spec, key, axis, o).clamp_min(0) for o in spec.outer(group)]
    for place in spec.places(key, axis):
        if place.group == group:
            labels = place.labels.reshape(shape)
            own = factors[(*outer, labels.clamp_min(0))]
            spread = spread * own.where((labels >= 0).to(own.device), 1.0)
    return spread


def _grid(
    spec: PermutationSpec, outer: tuple[str, ...], back: Permutation, batch: Sequence[int]
) -> Tensor:
    """Number of the block, of the groups before the change, for each block after it."""
    sizes = [spec.groups[g] for g in outer]
    grid = torch.meshgrid(*[torch.arange(n) for n in sizes], indexing="ij")
    number = torch.zeros(*batch, *sizes, dtype=torch.long)
    for group, size in zip(outer, sizes, strict=True):
        at = tuple(grid[outer.index(o)] for o in spec.outer(group))
        own = back[group][(..., *at, grid[outer.index(group)])]
        number = number * size + own
    return number


def _alone(axis: int, count: int) -> list[int]:
    """Shape of a row of numbers along one of ``count`` axes."""
    return [-1 if other == axis else 1 for other in range(count)]


def _step(place: Place, own: Tensor, outer: Sequence[Tensor]) -> Tensor:
    """Where each entry of an axis comes from when one group moves, ``[*batch, ...]``."""
    inside = place.labels >= 0
    at = tuple(labels.clamp_min(0) for labels in outer)
    chosen = own.cpu()[(..., *at, place.labels.clamp_min(0))]
    size = max(place.labels.shape, default=1)
    here = torch.arange(size).reshape(place.labels.shape)
    return torch.where(inside, here + (chosen - place.labels) * place.stride, here)


def _composed(first: Tensor, then: Tensor) -> Tensor:
    """``index[..., i] = first[..., then[..., i]]``."""
    if first.ndim == 1:
        return first[then]
    shape = torch.broadcast_shapes(first.shape, then.shape)
    return first.expand(shape).gather(-1, then.expand(shape))


def _taken(tensor: Tensor, indices: Sequence[tuple[int, Tensor]]) -> Tensor:
    """``_take`` along several axes; kernels are moved whole, without a copy in between."""
    if [axis for axis, _ in indices] == [0, 1] and tensor.ndim > 2:
        rows, columns = (index.to(tensor.device) for _, index in indices)
        if rows.ndim == columns.ndim == 1:
            return tensor[rows[:, None], columns]
    for axis, index in indices:
        tensor = _take(tensor, index, axis)
    return tensor


def _take(tensor: Tensor, index: Tensor, axis: int) -> Tensor:
    """``tensor[..., index, ...]`` along ``axis``, for every leading index of ``index``."""
    if index.ndim == 1:
        return tensor.index_select(axis, index.to(tensor.device))
    lead = index.ndim - 1
    shape = [1] * tensor.ndim
    shape[:lead], shape[axis] = index.shape[:-1], index.shape[-1]
    expanded = index.to(tensor.device).reshape(shape)
    return torch.take_along_dim(tensor, expanded, dim=axis)
