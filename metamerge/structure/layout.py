"""The weight graph of a network: which layers read which spaces of units and write which.

A space is what (a part of) an axis carries: a permutable group, a nest of groups such as attention
heads and the units inside them, the network's inputs, or its outputs. Methods that go layer by
layer (repair, refit) and the learned mergers read a ``Layout`` instead of names of layers.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from metamerge.errors import StructureError
from metamerge.structure.layers import OUTPUTS, Found, Layer, check_plain, find_layers
from metamerge.structure.program import Node, Program
from metamerge.structure.spec import PermutationSpec
from metamerge.structure.units import FIXED, Units, units_along

__all__ = ["OUTPUTS", "Layer", "Layout"]

_MADE = {  # operators with a matrix whose axis 1 makes units and whose axis 0 reads them
    *(f"conv_transpose{d}d.{form}" for d in (1, 2, 3) for form in ("default", "input")),
    *("matmul.default", "mm.default", "addmm.default"),
}


@dataclass(frozen=True)
class Layout:
    """A program, its permutation spec, and with them the layers in execution order.

    A network that cannot be traced has no program: its members can be aligned by a spec that was
    written by hand, and averaged.
    """

    program: Program | None
    spec: PermutationSpec

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Every linear map and convolution, in execution order.

        Other weights (embeddings, positional parameters, recurrent cells, weights that are computed
        before a layer uses them) are no layers: what goes layer by layer passes them through.

        Raises:
            StructureError: If the network cannot be run on batches of any size, or columns are
                nested in blocks that cannot be told apart.
        """
        return tuple(found.layer for found in self._found.values())

    @property
    def unshared(self) -> tuple[Layer, ...]:
        """The layers whose weight and bias nothing else reads."""
        return tuple(layer for layer in self.layers if not layer.shared)

    @cached_property
    def by_node(self) -> dict[str, Layer]:
        """Name of the operator call -> layer."""
        return {layer.node: layer for layer in self.layers}

    @cached_property
    def spaces(self) -> dict[str, int]:
        """Space -> number of units, in the order of the network."""
        sizes = {}
        for found in self._found.values():
            for units in (found.columns, found.rows):
                for space, size in zip(units.spaces, units.sizes, strict=True):
                    sizes.setdefault(space, size)
        return sizes

    @cached_property
    def carried(self) -> dict[str, tuple[int, Units]]:
        """State-dict key -> the axis along which members are mixed, and its units.

        That is the axis of the rows of layers and their biases; of other tensors the first axis
        with units of a space, the second of matrices that are multiplied from the right. Tensors
        without such an axis have no entry.
        """
        found = {key: own for key in self.spec.axes for own in self._carried_by_no_layer(key)[:1]}
        owners = sorted(self._found.values(), key=lambda own: OUTPUTS in own.layer.targets)
        for layer, rows, _ in owners:  # of a shared tensor, outputs say more than what is fixed
            fixed = all(space.startswith(FIXED) for space in rows.spaces)
            for key in filter(None, (layer.weight, layer.bias)):
                found.pop(key, None)
                found.update({} if fixed else {key: (0, rows)})
        return found

    @cached_property
    def running_means(self) -> dict[str, str]:
        """Node of a layer that only a batch normalisation reads -> key of its running mean."""
        readers: dict[str, list[Node]] = {}
        for node in self.program.nodes:
            for name in node.refs:
                readers.setdefault(name, []).append(node)
        return {
            name: self.program.parameters[own[0].args[3].name]
            for name, own in readers.items()
            if len(own) == 1
            and own[0].op == "batch_norm.default"
            and own[0].refs[0] == name
            and own[0].args[3] is not None
        }

    def check_plain(self) -> None:
        """Refuse networks that are more than layers of one group per axis, each used once.

        Methods that fuse the units of every group by themselves need such a network.

        Raises:
            StructureError: If a weight or bias is used twice or computed, a weight joins several
                groups on one axis, or an operator of another kind reads a matrix of weights.
        """
        self._check_traced()
        check_plain(self.program, self.spec)

    def producers(self, space: str) -> list[Layer]:
        """Layers whose rows make the units of a space, all of them or beside those of others."""
        return [layer for layer in self.layers if space in layer.targets]

    def consumers(self, space: str) -> list[Layer]:
        """Layers whose columns read the units of a space, alone or beside those of others."""
        return [layer for layer in self.layers if space in layer.sources]

    def rows(self, layer: Layer) -> Units:
        """Units that the rows of a layer make."""
        return self._found[layer.node].rows

    def columns(self, layer: Layer) -> Units:
        """Units that the columns of a layer read; of a grouped convolution, all its blocks'."""
        return self._found[layer.node].columns

    def matrix(self, layer: Layer, weight: Tensor) -> Tensor:
        """View a layer's weight as units by units by the rest (taps, positions).

        Args:
            layer: The layer.
            weight: ``[*batch, out, in, *taps]``.

        Returns:
            ``[*batch, rows, columns, rest]``, where rows are the units of ``layer.targets`` and
            columns those of ``layer.sources``, one space after another; zeros between the blocks of
            a grouped convolution, and where a unit has fewer entries than those of other spaces.
        """
        rows, columns = self.rows(layer), self.columns(layer)
        lead = weight.ndim - len(self.spec.axes[layer.weight])
        if layer.blocks > 1:
            weight = _on_the_diagonal(weight, lead, layer.blocks)
        if layer.reads_inputs and rows.plain:
            return weight[..., None].flatten(lead + 2)
        units = columns.collected(rows.collected(weight, lead), lead + 2)
        units = units.movedim(lead + 2, lead)[..., None].flatten(lead + 1)
        return units.unflatten(-1, (sum(rows.sizes), -1)).transpose(lead, lead + 1)

    @cached_property
    def _found(self) -> dict[str, Found]:
        self._check_traced()
        return {own.layer.node: own for own in find_layers(self.program, self.spec)}

    def _check_traced(self) -> None:
        if self.program is None:
            raise StructureError(
                "The network cannot be traced, so nothing goes through it layer by layer: align "
                "and average its members, without correct= and learned mergers."
            )
        self.program.check_rows()

    def _carried_by_no_layer(self, key: str) -> list[tuple[int, Units]]:
        """Axes of a tensor with units of a space, the one that is mixed along first."""
        axes = list(range(len(self.spec.axes[key])))
        found = []
        for axis in axes[::-1] if key in self._right_hand else axes:
            places = self.spec.places(key, axis)
            if places:
                units = units_along(self.spec, places, len(places[0].labels), FIXED)
                if not self.spaces.keys().isdisjoint(units.spaces):
                    found.append((axis, units))
        return found

    @cached_property
    def _right_hand(self) -> set[str]:
        """Keys of matrices whose axis 1 makes units."""
        return {
            self.program.parameters[name]
            for node in self.program.nodes
            if node.op in _MADE
            for name in node.refs[1:]
            if name in self.program.parameters
        }


def _on_the_diagonal(weight: Tensor, lead: int, blocks: int) -> Tensor:
    """Write the blocks of a grouped convolution into one that reads all channels."""
    split = weight.unflatten(lead, (blocks, -1))[..., None]  # [*, blocks, out, in, *taps, 1]
    split = split.movedim(-1, lead + 2)  # [*, blocks, out, 1, in, *taps]
    own = torch.eye(blocks, dtype=weight.dtype, device=weight.device)
    own = own.reshape(blocks, 1, blocks, *[1] * (weight.ndim - lead - 1))
    return (split * own).flatten(lead, lead + 1).flatten(lead + 1, lead + 2)
