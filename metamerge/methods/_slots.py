"""Units of all members put into common slots: several units of one member may share a slot.

A ``Grouping`` stands for the matrices that merge units and undo it (Stoica et al., "ZipIt! Merging
Models from Different Tasks without Training", ICLR 2024, arXiv:2305.03053, section 4): ``M`` takes
the mean of the units in a slot, ``U`` gives each of them back what their slot holds, and the fused
weight of a layer is ``M_out blockdiag(W_1, ..., W_m) U_in``. Both have one entry per unit, so they
are kept as an index and never built.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from metamerge.errors import StructureError
from metamerge.structure import Layout, PermutationSpec
from metamerge.weights import Weights


class Grouping(NamedTuple):
    """Which slot every unit goes to, and its share in the slot's mean.

    Attributes:
        slot: ``[m, n]``, from 0 to ``width - 1``; every slot holds a unit.
        share: ``[m, n]``; the shares of a slot's units sum to 1.
        width: Number of slots.
    """

    slot: Tensor
    share: Tensor
    width: int


class Entries(NamedTuple):
    """The same for the entries of an axis, where a unit may have several of them."""

    index: Tensor  # [m, size]
    share: Tensor  # [m, size]
    size: int  # of the fused axis


def grouped(slot: Tensor, width: int, importance: Tensor | None = None) -> Grouping:
    """Share every slot among its units.

    Args:
        slot: ``[m, n]``.
        width: Number of slots.
        importance: What units count relative to each other, ``[m, n]``; by default all alike.

    Returns:
        The grouping; units of a slot in which none is of importance count alike.
    """
    weight = torch.ones(slot.shape, dtype=torch.float64) if importance is None else importance
    flat = slot.flatten()
    total = torch.zeros(width, dtype=weight.dtype).index_add(0, flat, weight.flatten())
    weight = torch.where(total[slot] > 0, weight, 1.0)
    total = torch.zeros(width, dtype=weight.dtype).index_add(0, flat, weight.flatten())
    return Grouping(slot, weight / total[slot], width)


def entries(
    spec: PermutationSpec, key: str, axis: int, groupings: Mapping[str, Grouping]
) -> Entries | None:
    """Where the entries of an axis go.

    Args:
        spec: Permutation spec of the members.
        key: Name of the tensor.
        axis: One of its axes.
        groupings: Group -> grouping.

    Returns:
        The entries; None for an axis that carries no units.

    Raises:
        StructureError: If the axis carries units of several groups, or of a nested one.
    """
    places = spec.places(key, axis)
    if not places:
        return None
    place = places[0]
    if len(places) > 1 or spec.outer(place.group) or bool((place.labels < 0).any()):
        raise StructureError(
            f"{key}: axis {axis} carries the groups {[p.group for p in places]}; methods that fuse "
            "units need one group per axis, with no group inside another. Align and average such "
            "networks."
        )
    slot, share, width = groupings[place.group]
    block = place.stride * spec.groups[place.group]
    here = torch.arange(len(place.labels))
    wide = here // block * place.stride * width + here % place.stride  # [size]
    index = wide + slot[:, place.labels] * place.stride
    return Entries(index, share[:, place.labels], len(here) // spec.groups[place.group] * width)


def spread(values: Tensor, dim: int, at: Entries) -> Tensor:
    """Add up what goes into the same entry, member by member.

    Args:
        values: ``[m, ...]``.
        dim: The axis that the entries are of.
        at: Where they go.

    Returns:
        ``[m, ...]``, with ``at.size`` entries along ``dim``.
    """
    moved = values.movedim(dim, 1)
    index = at.index.to(values.device).reshape(*at.index.shape, *[1] * (moved.ndim - 2))
    made = moved.new_zeros(len(moved), at.size, *moved.shape[2:])
    return made.scatter_add(1, index.expand_as(moved), moved).movedim(1, dim)


def mixed(values: Tensor, dim: int, at: Entries | None) -> Tensor:
    """Mean over the units of every slot; over members where an axis carries no units.

    Args:
        values: ``[m, ...]``.
        dim: The axis that carries the units.
        at: Where they go.

    Returns:
        ``[...]``, without the axis of members.
    """
    if at is None:
        return values.mean(0)
    shape = [len(values), *[1] * (values.ndim - 1)]
    shape[dim] = -1
    return spread(values * at.share.to(values).reshape(shape), dim, at).sum(0)


def assemble(stacked: Weights, layout: Layout, groupings: Mapping[str, Grouping]) -> Weights:
    """Weights of the fused network: every layer is ``M_out blockdiag(W_1, ..., W_m) U_in``.

    What belongs to a unit and is no layer (biases, normalisations) is the mean over its slot. A
    convolution whose channels read one channel each keeps its one column.

    Args:
        stacked: Members, every tensor ``[m, ...]``, in the dtype of the computation.
        layout: Their architecture.
        groupings: Group -> grouping, for every group of the spec.

    Returns:
        Fused weights; tensors that are not floating are left out.

    Raises:
        StructureError: If the network has layers or axes that cannot be fused unit by unit.
    """
    layers = {layer.weight for layer in layout.layers}
    fused = {}
    for key, tensor in stacked.items():
        if not tensor.is_floating_point():
            continue
        axes = [entries(layout.spec, key, a, groupings) for a in range(tensor.ndim - 1)]
        carrying = [a for a, at in enumerate(axes) if at is not None]
        if key in layers and 1 in carrying:
            tensor = spread(tensor, 2, axes[1])
            carrying.remove(1)
        if len(carrying) > 1:
            raise StructureError(
                f"{key}: carries units on the axes {carrying} without being a layer. Align and "
                "average such networks."
            )
        axis = carrying[0] if carrying else 0
        fused[key] = mixed(tensor, axis + 1, axes[axis] if carrying else None)
    tied = layout.program.tied.items()
    return {**fused, **{alias: fused[key].clone() for alias, key in tied if key in fused}}
