"""What the units of hidden groups do on calibration inputs, for alignments that look at that.

Shape comments: n networks, b inputs, r rows (inputs, or inputs by positions).
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from metamerge.alignment._transport import surroundings
from metamerge.calibration import Batches, check_fit, collect
from metamerge.errors import ConfigError, StructureError
from metamerge.structure import Execution, Layer, Layout, PermutationSpec
from metamerge.weights import Weights

CHUNK = 256  # inputs per pass: memory is that of one pass, however many inputs there are
MAX_ROWS = 4096  # rows per value and pass; positions of feature maps are subsampled to stay below

_CONSTANT = 1e-5  # variance, relative to the mean square, below which a unit counts as constant


class Reading(NamedTuple):
    """Where the units of a group can be seen: in what an operator call reads first, or makes.

    ``axis`` counts without that of networks; along it lie ``before * units * after`` entries.
    """

    group: str
    node: str
    made: bool
    axis: int
    before: int
    after: int


def readings(layout: Layout, spec: PermutationSpec, name: str) -> list[Reading]:
    """Where every group of a network can be seen.

    In the values that layers read, each once; a group that no layer reads is seen in what layers
    make.

    Args:
        layout: The network.
        spec: Its permutation spec.
        name: What asks, for messages.

    Returns:
        At least one reading per group.

    Raises:
        StructureError: If the network has layers of another kind than linear maps and convolutions,
            or a group that none of these reads or makes.
    """
    try:
        layout.check_plain()
        layers = layout.layers
    except StructureError as error:
        raise StructureError(f"{name}: {error} Use align='weight_matching'.") from error
    calls = {node.name: node for node in layout.program.nodes}
    found: dict[str, Reading] = {}
    for layer in layers:
        if layer.source in spec.groups:
            found.setdefault(calls[layer.node].refs[0], _reading(layer, spec, made=False))
    read = {reading.group for reading in found.values()}
    for layer in layers:
        if layer.target in spec.groups and layer.target not in read:
            found[layer.node] = _reading(layer, spec, made=True)
    missing = sorted({*spec.groups} - {reading.group for reading in found.values()})
    if missing:
        raise StructureError(
            f"{name}: no linear map or convolution reads or makes the units of {missing}, so they "
            "are not seen. Use align='weight_matching'."
        )
    return list(found.values())


def calibration(batches: Batches, layout: Layout, name: str) -> Tensor:
    """Inputs on which units are looked at.

    Args:
        batches: Calibration data; labels are not looked at.
        layout: The network.
        name: What asks, for messages.

    Returns:
        ``[b, ...]``.

    Raises:
        ConfigError: If they do not fit the network, or it takes several inputs.
    """
    if len(layout.program.inputs) != 1:
        raise ConfigError(
            f"{name}: the network takes {len(layout.program.inputs)} inputs, batches hold one. "
            "Use align='weight_matching'."
        )
    inputs, _ = collect(batches, labelled=False)
    check_fit(layout.program, inputs)
    return inputs


def activations(
    weights: Weights, layout: Layout, inputs: Tensor, places: Sequence[Reading]
) -> Iterator[tuple[str, Tensor]]:
    """Run networks side by side and give out the units of every group as they are reached.

    Args:
        weights: Stacked weights, every tensor ``[n, ...]``; widths need not be the layout's.
        layout: The network.
        inputs: ``[b, ...]``, read by all.
        places: What ``readings`` returned.

    Yields:
        Group and ``[n, r, units]``, at most ``MAX_ROWS`` rows, the same ones for all networks.
    """
    by_node: dict[str, list[Reading]] = {}
    for place in places:
        by_node.setdefault(place.node, []).append(place)
    execution = Execution(layout.program, weights, [inputs], stacked=True)
    for node in layout.program.nodes:
        for place in by_node.get(node.name, ()):
            lane = execution.peek(node) if place.made else execution.argument(node, 0)
            yield place.group, _rows(lane.value, place)
        execution.step(node)


class Moments(NamedTuple):
    """Sums over rows, for ``f`` families of ``u`` units: enough for any pair of units.

    Attributes:
        count: Number of rows.
        total: Sum of every unit, ``[f, u]``.
        products: Sum of the products of every two units, ``[f, u, u]``.
    """

    count: int
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Moments":
        """Moments of ``[f, r, u]``, in float64 on the CPU."""
        products = (rows.mT @ rows).double().cpu()
        return cls(rows.shape[1], rows.double().sum(1).cpu(), products)

    def plus(self, other: "Moments") -> "Moments":
        """Moments of the rows of both."""
        return Moments(*(one + more for one, more in zip(self, other, strict=True)))

    def inner(self) -> Tensor:
        """Mean product of every two units, ``[f, u, u]``."""
        return self.products / self.count

    def correlation(self) -> Tensor:
        """Correlation of every two units, ``[f, u, u]``; 0 where one of them is constant."""
        products, mean = self.inner(), self.total / self.count
        square = products.diagonal(dim1=1, dim2=2)
        variance = square - mean.square()
        spread = torch.where(variance > _CONSTANT * square, variance, torch.inf).sqrt()
        covariance = products - mean[:, :, None] * mean[:, None]
        return covariance / spread[:, :, None] / spread[:, None]


def _reading(layer: Layer, spec: PermutationSpec, *, made: bool) -> Reading:
    around = surroundings(spec.axes[layer.weight][0 if made else 1])
    group = layer.target if made else layer.source
    return Reading(group, layer.node, made, -1 if layer.linear else 1, *around)


def _rows(value: Tensor, place: Reading) -> Tensor:
    """Units of a value ``[n, b, ...]`` as ``[n, r, units]``."""
    axis = place.axis if place.axis < 0 else place.axis + 1
    split = value.movedim(axis, -1).unflatten(-1, (place.before, -1, place.after))
    rows = split.movedim(-2, -1).flatten(1, -2)
    if rows.shape[1] <= MAX_ROWS:
        return rows
    generator = torch.Generator().manual_seed(rows.shape[1])
    picked = torch.randperm(rows.shape[1], generator=generator)[:MAX_ROWS]
    return rows[:, picked.to(rows.device)]
