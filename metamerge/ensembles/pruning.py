"""Pruning: how much every unit matters, and the same network without the least of them.

Units go from all axes of their group at once, so tensors become smaller and nothing has to be
masked.

Papers: the Taylor criterion, Molchanov, Tyree, Karras, Aila, Kautz, "Pruning Convolutional Neural
Networks for Resource Efficient Inference", ICLR 2017, arXiv:1611.06440, section 2.2; the size of
kernels, Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", ICLR 2017,
arXiv:1608.08710, section 3.1.

Shape comments: b inputs, n units of a group.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from metamerge.calibration import check_fit
from metamerge.ensembles.fusing import Mutant
from metamerge.errors import ConfigError, StructureError
from metamerge.structure import Execution, Layer, Layout, discover_program
from metamerge.structure.lockstep import Lane
from metamerge.structure.resizing import narrowed, resized
from metamerge.weights import Weights

Saliency = dict[str, Tensor]
"""Group -> how much each of its units matters, ``[*blocks, n]``."""

Criterion = Callable[[Weights, Layout, Tensor, Tensor], Saliency]

_CHUNK = 128  # inputs whose feature maps and their gradients are held at a time


def taylor(weights: Weights, layout: Layout, inputs: Tensor, labels: Tensor) -> Saliency:
    """How much the loss changes, to first order, when a unit's feature map is set to zero.

    Equation 8 of arXiv:1611.06440: the absolute value, input by input, of activation times gradient
    summed over places; then the mean over inputs. A unit is watched where layers read it, and all
    its readers are added up first, since it is taken away from all of them. We differ in summing
    over places where the paper takes their mean, which ranks the units of a group alike.

    Args:
        weights: State dict.
        layout: Its architecture, a classifier.
        inputs: ``[b, ...]``.
        labels: ``[b]``.

    Returns:
        Saliency of every group that layers read, up to a factor that all have in common.

    Raises:
        ConfigError: If the inputs do not fit the network.
    """
    check_fit(layout.program, inputs)
    own = {key: tensor.detach() for key, tensor in weights.items()}
    total: dict[str, Tensor] = {}
    for some, wanted in zip(inputs.split(_CHUNK), labels.split(_CHUNK), strict=True):
        for space, change in _changes(own, layout, some, wanted).items():
            total[space] = total.get(space, 0) + change.abs().sum(0) / len(inputs)
    return _by_group(layout, total)


def magnitude(weights: Weights, layout: Layout, *_: Tensor) -> Saliency:
    """The sum of absolute weights that make a unit: arXiv:1608.08710, section 3.1.

    Args:
        weights: State dict.
        layout: Its architecture.
        *_: Inputs and labels, which the other criteria look at.

    Returns:
        Saliency of every group that layers make.
    """
    total: dict[str, Tensor] = {}
    for layer in layout.layers:
        size = layout.matrix(layer, weights[layer.weight].detach()).abs().sum((1, 2))
        rows = layout.rows(layer)
        for space in rows.spaces:
            total[space] = total.get(space, 0) + size[rows.part(space)]
    return _by_group(layout, total)


CRITERIA: dict[str, Criterion] = {"taylor": taylor, "magnitude": magnitude}


def pruned(mutant: Mutant, widths: Mapping[str, int], saliency: Saliency) -> Mutant:
    """The network with fewer units: the most salient of every group, in the order they were in.

    Args:
        mutant: A network.
        widths: Group -> number of units to keep; in every block, where it is nested in others. What
            is left out keeps all of its own.
        saliency: How much units matter.

    Returns:
        A network of smaller tensors, in new memory. Nothing makes up for what was taken away.

    Raises:
        ConfigError: If a group has fewer units than are wanted, or nothing says how they matter.
        StructureError: If sizes of the network cannot be followed.
    """
    spec = mutant.layout.spec
    for group, width in widths.items():
        if not 0 < width <= spec.groups.get(group, 0):
            raise ConfigError(
                f"widths: {width} units of {group!r}; the network has {dict(spec.groups)}. Ask "
                "for no more than it has, and at least 1."
            )
        if group not in saliency:
            raise ConfigError(
                f"saliency: nothing is known of {group!r}, which no layer reads or makes alone. "
                "Leave it out of widths."
            )
    weights = mutant.weights
    for group in reversed(spec.order):  # what is nested goes first, while its blocks are in place
        if group in widths:
            first = _kept_first(saliency[group], widths[group])
            weights = spec.permute(weights, {group: first})
    weights = narrowed(weights, spec, widths)
    program = resized(mutant.layout.program, spec, widths)
    return Mutant(weights, Layout(program, discover_program(program)))


def _kept_first(scores: Tensor, width: int) -> Tensor:
    """Units in an order that begins with the most salient, each part as it was, ``[..., n]``."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.cat([order[..., :width].sort(-1)[0], order[..., width:].sort(-1)[0]], -1)


def _changes(weights: Weights, layout: Layout, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradient of the loss by a factor on what layers read: space -> ``[b, units]``."""
    execution = Execution(layout.program, weights, [inputs], stacked=False)
    gates: list[tuple[Layer, Tensor]] = []
    with torch.enable_grad():
        for node in layout.program.nodes:
            layer = layout.by_node.get(node.name)
            if layer is None or layer.reads_inputs:
                execution.step(node)
                continue
            read = execution.argument(node, 0)
            gate = _gate(read.value, layer)
            gates.append((layer, gate))
            name = node.args[0].name
            execution.values[name] = Lane(read.value * gate, False)  # for this layer alone
            made = execution.peek(node)
            execution.values[name] = read
            execution.step(node, made)
        loss = F.cross_entropy(execution.output(), labels, reduction="sum")
        found = torch.autograd.grad(loss, [gate for _, gate in gates])
    changes: dict[str, Tensor] = {}
    for (layer, _), change in zip(gates, found, strict=True):
        flat = change.flatten(1)  # summed over places already, where the gate was spread
        columns = layout.columns(layer)
        for space in columns.spaces:
            own = columns.collected(flat, 1, space).sum(2)
            changes[space] = changes.get(space, 0) + own
    return changes


def _gate(value: Tensor, layer: Layer) -> Tensor:
    """Ones, one per input and entry of the axis that a layer reads, differentiable."""
    if layer.linear:
        shape = value.shape
        return value.new_ones(shape[0], *[1] * (value.ndim - 2), shape[-1]).requires_grad_()
    return value.new_ones(*value.shape[:2], *[1] * (value.ndim - 2)).requires_grad_()


def _by_group(layout: Layout, total: Mapping[str, Tensor]) -> Saliency:
    """From spaces, which may be nests of groups, to groups; several spaces are added up."""
    spec, found = layout.spec, {}
    for space, scores in total.items():
        groups = space.split(" x ")
        if not {*groups} <= spec.groups.keys():
            continue  # inputs, outputs, what is fixed
        grid = scores.reshape([spec.groups[g] for g in groups])
        for place, group in enumerate(groups):
            outer = spec.outer(group)
            if not {*outer} <= {*groups}:
                raise StructureError(
                    f"{group}: is nested in {outer}, and {space} is not. Its units cannot be "
                    "ranked block by block."
                )
            kept = [groups.index(o) for o in outer] + [place]
            gone = [d for d in range(len(groups)) if d not in kept]
            own = grid.permute(*kept, *gone).flatten(len(kept)).sum(-1) if gone else grid
            own = own if gone else grid.permute(*kept)
            found[group] = found[group] + own if group in found else own
    return found
