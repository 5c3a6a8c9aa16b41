"""Kernels: what a layer computes one output with, a row of its weight and an entry of its bias."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from metamerge.structure import Layout
from metamerge.weights import Weights


@dataclass(frozen=True)
class Kernels:
    """The kernels of one layer.

    Attributes:
        keys: Its weight and bias, or whichever of them is trained; kernel ``i`` is row ``i`` of
            each. A tensor that belongs to no layer stands alone.
        count: How many there are.
        size: Weights of one of them.
        dense: Whether the layer is fully connected.
    """

    keys: tuple[str, ...]
    count: int
    size: int
    dense: bool = False


def find_kernels(layout: Layout, untrained: Collection[str] = ()) -> list[Kernels]:
    """Find the kernels of a network.

    Args:
        layout: Its weight graph.
        untrained: Keys that training leaves alone, such as buffers.

    Returns:
        Layer by layer in the order of execution, then tensors that belong to no layer.
    """
    program = layout.program
    shapes = {key: program.shape(value) for value, key in program.parameters.items()}
    owners = [((layer.weight, layer.bias), layer.linear) for layer in layout.layers]
    owners += [((key,), False) for key in shapes]
    found, seen = [], {None, *untrained, *program.indices}
    for keys, dense in owners:
        own = tuple(key for key in keys if key not in seen)
        seen.update(own)
        if own:
            size = sum(prod(shapes[key][1:]) for key in own)
            found.append(Kernels(own, shapes[own[0]][0], size, dense))
    return found


def by_kernel(values: Weights, kernels: Sequence[Kernels]) -> Tensor:
    """Sum numbers of single weights over every kernel.

    Args:
        values: ``[...]`` like the weights of one network.
        kernels: Its kernels.

    Returns:
        ``[kernels]``, layer by layer.
    """
    return torch.cat(
        [
            sum(
                values[key].flatten(1).sum(1) if values[key].ndim > 1 else values[key]
                for key in own.keys
            )
            for own in kernels
        ]
    )
