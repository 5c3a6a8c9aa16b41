"""Squares of the gradients of each input by itself, summed over inputs, for stacked members.

In networks of linear maps and plain convolutions only, the gradient of a weight for one input is
the product of what the layer reads with the gradient at what it gives: one pass back for all
inputs gives these. Any other network is run once more for every pair of a member and an input, as a
network of its own; that takes longer.

Shape comments: m members, b inputs, c classes, r rows, l positions, i fan-in, o units.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import prod

import torch
from torch import Tensor

from metamerge.calibration import check_logits
from metamerge.corrections.refit import fan_in_rows, unit_rows
from metamerge.errors import StructureError
from metamerge.methods._combination import running
from metamerge.structure import Execution, Layer, Layout, run
from metamerge.structure.lockstep import Lane
from metamerge.structure.program import Node
from metamerge.weights import Weights

ENTRIES = 2**25  # entries of gradients at a time: 128 MiB

Pick = Callable[..., Iterator[tuple[Tensor, Tensor]]]
"""Probabilities ``[m, b, c]`` and ``rows=``, the numbers of the inputs, -> classes whose log
probability gradients are taken of, and the weights of their squares, both ``[m, b]``."""


def squared_gradients(members: Weights, layout: Layout, inputs: Tensor, pick: Pick) -> Weights:
    """Add up squared gradients of log probabilities, some inputs at a time.

    Args:
        members: Stacked members, every tensor ``[m, ...]``, without gradients of their own.
        layout: Their architecture; its output is logits.
        inputs: ``[b, ...]``.
        pick: Which classes are looked at, and what they count.

    Returns:
        Every parameter that the network reads -> ``[m, ...]``.

    Raises:
        IncompatibleWeights: If the network's output is not logits.
    """
    buffers = running(members)
    keys = dict.fromkeys(layout.program.parameters.values())
    read = [k for k in keys if k not in buffers and members[k].is_floating_point()]
    total = {key: torch.zeros_like(members[key]) for key in read}
    entries = sum(t[0].numel() for t in total.values())  # of one member and input
    squares = _by_network
    if _made_of_layers(layout, read):
        squares, entries = _by_layer, entries + _read_entries(members, layout)
    size = max(1, ENTRIES // max(1, entries * len(next(iter(members.values())))))
    for rows in torch.arange(len(inputs), device=inputs.device).split(size):
        with torch.enable_grad():  # merge() has it switched off
            for key, part in squares(members, layout, inputs[rows], partial(pick, rows=rows)):
                total[key] += part
    return total


def _made_of_layers(layout: Layout, read: list[str]) -> bool:
    """Whether every parameter is the weight or bias of a linear map or plain convolution."""
    try:
        layout.check_plain()
    except StructureError:
        return False
    layers = layout.layers
    known = {key for layer in layers for key in (layer.weight, layer.bias)}
    return all(layer.regressable for layer in layers) and known.issuperset(read)


def _read_entries(members: Weights, layout: Layout) -> int:
    """Entries of what all layers read for one input, position by position."""
    entries = 0
    for layer in layout.layers:
        made = layout.program.shape(layer.node)
        positions = made[1:-1] if layer.linear else made[2:]
        entries += members[layer.weight][0, 0].numel() * prod(positions)
    return entries


def _by_layer(
    members: Weights, layout: Layout, inputs: Tensor, pick: Pick
) -> Iterator[tuple[str, Tensor]]:
    """Squares summed over inputs, class after class, out of what layers read and give."""
    execution = Execution(layout.program, members, [inputs], stacked=True)
    read: list[tuple[Layer, Tensor]] = []
    given: list[Tensor] = []
    for node in layout.program.nodes:
        lane = execution.peek(node)
        if node.name in layout.by_node:
            layer = layout.by_node[node.name]
            read.append((layer, _read(node, layer, execution.argument(node, 0), members)))
            given.append(lane.value if lane.value.requires_grad else lane.value.requires_grad_())
        execution.step(node, lane)
    for chosen, weight in _chosen(execution.output(), pick):
        gradients = torch.autograd.grad(chosen, given, retain_graph=True, allow_unused=True)
        for (layer, rows), gradient in zip(read, gradients, strict=True):
            if gradient is not None:
                delta = unit_rows(gradient, layer).unflatten(1, rows.shape[1:3])  # [m, b, l, o]
                squares = _products(rows, delta, weight)
                yield layer.weight, squares.reshape(members[layer.weight].shape)
                if layer.bias is not None:
                    yield layer.bias, (weight[:, None] @ delta.sum(2).square()).squeeze(1)


def _read(node: Node, layer: Layer, lane: Lane, members: Weights) -> Tensor:
    """What a layer reads, ``[m, b, l, i]``, or ``[1, b, l, i]`` where all members read the same."""
    value = lane.value.detach()  # what is computed of it is not followed back
    value = value if lane.stacked else value[None]
    rows = fan_in_rows(node, layer, Lane(value, True), members[layer.weight])
    return rows.unflatten(1, (value.shape[1], -1))


def _products(rows: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    """Squares of a weight's gradients, ``[m, o, i]`` in any shape."""
    if rows.shape[2] == 1:
        return (weight[..., None] * delta.squeeze(2).square()).mT @ rows.squeeze(2).square()
    each = delta.mT @ rows  # [m, b, o, i]
    return weight[:, None] @ each.square_().flatten(2)


def _by_network(
    members: Weights, layout: Layout, inputs: Tensor, pick: Pick
) -> Iterator[tuple[str, Tensor]]:
    """Squares summed over inputs, class after class, of networks that have one input each."""
    m, b = len(next(iter(members.values()))), len(inputs)
    copies = {k: t[:, None].expand(m, b, *t.shape[1:]).flatten(0, 1) for k, t in members.items()}
    buffers, floating = running(members), {k for k, t in members.items() if t.is_floating_point()}
    read = [k for k in layout.program.parameters.values() if k in floating and k not in buffers]
    leaves = [copies[key].requires_grad_() for key in read]
    own = inputs[:, None].expand(m, *inputs[:, None].shape).flatten(0, 1)  # [m*b, 1, ...]
    logits = run(layout.program, copies, [own], stacked=True, own_inputs=True)
    check_logits(logits)
    for chosen, weight in _chosen(logits.squeeze(1).unflatten(0, (m, b)), pick):
        gradients = torch.autograd.grad(chosen, leaves, retain_graph=True, allow_unused=True)
        for key, gradient in zip(read, gradients, strict=True):
            if gradient is not None:
                squares = gradient.square()[..., None].unflatten(0, (m, b)).flatten(2)
                yield key, (weight[:, None] @ squares).reshape(members[key].shape)


def _chosen(logits: Tensor, pick: Pick) -> Iterator[tuple[Tensor, Tensor]]:
    """Sum of the log probabilities of the classes picked, and the weights of inputs."""
    check_logits(logits)
    log_probabilities = logits.log_softmax(-1)
    for classes, weight in pick(log_probabilities.detach().exp()):
        yield log_probabilities.gather(-1, classes[..., None]).sum(), weight
