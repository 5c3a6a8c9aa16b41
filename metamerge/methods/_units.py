"""What the units of all members do on calibration inputs, and what follows from it.

Shape comments: m models, n units of a group, u = m * n units of all members, r rows: inputs, or
inputs by positions.
"""

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

from metamerge.alignment.medoid import distances
from metamerge.calibration import Batches, check_fit, collect
from metamerge.errors import StructureError
from metamerge.structure import Execution, Layer, Layout
from metamerge.structure.lockstep import Lane
from metamerge.weights import Weights, stack

OUTPUT_TARGETS = ("mean", "votes")  # what the outputs of a fused network can be fitted to
MAX_ROWS = 4096  # rows per point of observation; positions are subsampled to stay below
_CHUNK = 256  # inputs per pass: the widest feature map of all members has to fit into memory


def prepared(
    weights: Sequence[Weights], layout: Layout, batches: Batches
) -> tuple[Weights, Layout, Tensor]:
    """Bring all into the dtype of the computation: float32, or float64 where a member has it.

    Args:
        weights: One state dict per member.
        layout: Their architecture.
        batches: Calibration inputs.

    Returns:
        Stacked members ``[m, ...]``, the layout with a program of that precision, and the inputs
        ``[b, ...]``.

    Raises:
        ConfigError: If the batches do not fit the network.
    """
    inputs, _ = collect(batches, labelled=False)
    check_fit(layout.program, inputs)
    kinds = {t.dtype for member in weights for t in member.values() if t.is_floating_point()}
    double = torch.float64 in kinds
    dtype = torch.float64 if double else torch.float32
    members = [
        {k: t.to(dtype) if t.is_floating_point() else t for k, t in own.items()} for own in weights
    ]
    program = layout.program.in_float64() if double else layout.program
    return stack(members), Layout(program, layout.spec), inputs.to(dtype)


def ranked(stacked: Weights, layout: Layout) -> list[int]:
    """Order the members by content, so that the order in which they are given does not matter.

    The medoid comes first, then the others by their distance from the rest; of two members, which
    are equally far from each other, the one of larger norm comes first.

    Args:
        stacked: Members ``[m, ...]``.
        layout: Their architecture.

    Returns:
        Indices of the members. Slots are numbered after the units of the first of them.
    """
    own = {key: stacked[key].detach() for key in layout.spec.axes}
    if len(next(iter(own.values()))) > 2:
        family = {key: tensor[None] for key, tensor in own.items()}
        return distances(family, layout.spec)[0].argsort(stable=True).tolist()
    power = sum(t.double().square().flatten(1).sum(1) for t in own.values())
    return power.argsort(descending=True, stable=True).tolist()


def unit_activations(
    stacked: Weights, layout: Layout, inputs: Tensor, *, read: bool
) -> dict[str, Tensor]:
    """Observe every unit of every member, without gradients.

    A group that is observed in several places, such as a residual stream, has the rows of all of
    them one behind the other.

    Args:
        stacked: Members ``[m, ...]``.
        layout: Their architecture.
        inputs: Calibration inputs ``[b, ...]``.
        read: Whether units are observed where layers read them, behind the activation function, or
            where layers make them, behind the batch normalisation if there is one. Units that no
            layer reads, or makes, are observed at the other end.

    Returns:
        Group -> ``[m, n, r]``.

    Raises:
        StructureError: If there are units that no layer reads or makes.
    """
    points = _points(layout, read)
    seen: dict[str, list[Tensor]] = {group: [] for group in layout.spec.groups}
    own = {key: tensor.detach() for key, tensor in stacked.items()}
    for some in inputs.split(_CHUNK):
        execution = Execution(layout.program, own, [some], stacked=True)
        most = max(1, MAX_ROWS * len(some) // len(inputs))
        for node in layout.program.nodes:
            layer, axis = points.get(node.name, (None, 0))
            lane = execution.argument(node, 0) if layer and axis == 1 else None
            made = execution.step(node)
            if layer:
                group = layer.source if axis == 1 else layer.target
                seen[group].append(_unit_rows(layout, layer, lane or made, axis, most))
    return {group: torch.cat(rows, -1) for group, rows in seen.items()}


def correlations(activations: Tensor) -> Tensor:
    """Correlation of every pair of units, in float64; 0 for units that are constant.

    Args:
        activations: ``[m, n, r]``.

    Returns:
        ``[u, u]``.
    """
    flat = activations.flatten(0, 1).double()
    centred = flat - flat.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    alive = norm > 1e-6 * flat.norm(dim=1, keepdim=True)
    unit = torch.where(alive, centred / torch.where(alive, norm, 1.0), 0.0)
    return unit @ unit.mT


def _points(layout: Layout, read: bool) -> dict[str, tuple[Layer, int]]:
    """Node -> the layer that is observed there, and the axis of its weight that has the units."""
    behind = {n.refs[0]: n.name for n in layout.program.nodes if n.op == "batch_norm.default"}
    points = {}
    for group in layout.spec.groups:
        readers, makers = layout.consumers(group), layout.producers(group)
        _check_seen(group, readers, makers)
        if readers and (read or not makers):
            points.update({layer.node: (layer, 1) for layer in readers})
            continue
        for layer in makers:
            alone = layer.node in layout.running_means
            points[behind[layer.node] if alone else layer.node] = (layer, 0)
    return points


def _check_seen(group: str, readers: Sequence[Layer], makers: Sequence[Layer]) -> None:
    if not readers and not makers:
        raise StructureError(
            f"{group}: no layer reads or makes these units, so they cannot be compared by what "
            "they do. Align and average such networks."
        )


def _unit_rows(layout: Layout, layer: Layer, lane: Lane, axis: int, most: int) -> Tensor:
    """A value that a layer reads (axis 1) or makes (axis 0), as one row per unit: ``[m, n, r]``."""
    place = layout.spec.places(layer.weight, axis)[0]
    value = lane.value if layer.linear else lane.value.movedim(2, -1)
    rows = value.flatten(1, -2)  # [m, r, entries]
    units = layout.spec.groups[place.group]
    rows = rows[:, sampled(rows.shape[1], max(1, most * units // rows.shape[-1]), rows.device)]
    rows = rows[..., place.labels.argsort(stable=True).to(rows.device)]
    return rows.unflatten(-1, (units, -1)).movedim(2, 1).flatten(2)


def voted(logits: Tensor) -> Tensor:
    """Logits of the soft vote: logarithm of the members' mean probabilities, less its row mean.

    Under label skew a member's logits are wild for classes that it has hardly seen, and their mean
    with them; its probabilities are bounded.

    Args:
        logits: ``[m, ..., c]``.

    Returns:
        ``[..., c]``.
    """
    vote = logits.log_softmax(-1).logsumexp(0) - log(len(logits))
    return vote - vote.mean(-1, keepdim=True)


def sampled(count: int, most: int, device: torch.device) -> Tensor:
    """Which rows take part: all, or as many as wanted, picked by a fixed seed.

    Args:
        count: Number of rows.
        most: How many may take part.
        device: Where the rows are.

    Returns:
        Their indices, in ascending order.
    """
    if count <= most:
        return torch.arange(count, device=device)
    generator = torch.Generator().manual_seed(count)
    return torch.randperm(count, generator=generator)[:most].sort().values.to(device)
