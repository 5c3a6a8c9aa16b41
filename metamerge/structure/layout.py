"""The weight graph of a network: which layers read which spaces of units and write which.

A space is a permutable group, the network's inputs, or its outputs. Methods that go layer by layer
(repair, refit) and the learned mergers read a ``Layout`` instead of names of layers.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from metamerge.errors import StructureError
from metamerge.structure.factors import Concat
from metamerge.structure.operators import LAYERS, LINEAR
from metamerge.structure.program import Node, Program
from metamerge.structure.spec import PermutationSpec

OUTPUTS = "outputs"


@dataclass(frozen=True)
class Layer:
    """One linear map or convolution.

    Attributes:
        node: Name of the operator call.
        weight: State-dict key of the weight.
        bias: State-dict key of the bias, or None.
        source: Space that its columns read; ``inputs:<node>`` where they are fixed.
        target: Space that its rows make: a group, ``outputs`` where no layer comes after it, or
            ``fixed:<node>``.
        linear: Whether it is a linear map rather than a convolution.
        regressable: Whether its weight is a matrix over (patches of) its inputs: linear, or an
            ungrouped 2-d convolution.
    """

    node: str
    weight: str
    bias: str | None
    source: str
    target: str
    linear: bool
    regressable: bool

    @property
    def reads_inputs(self) -> bool:
        """Whether its columns are fixed, as those of a first layer are."""
        return self.source.startswith("inputs:")


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

        Alignment and averages need none of them; what goes layer by layer refuses networks whose
        layers are not followed yet.

        Raises:
            StructureError: If a weight or bias is used twice or computed, a weight joins several
                groups on one axis, or an operator of another kind reads a matrix of weights.
        """
        program, spec = self.program, self.spec
        if program is None:
            raise StructureError(
                "The network cannot be traced, so nothing goes through it layer by layer: align "
                "and average its members, without correct= and learned mergers."
            )
        program.check_rows()
        _check_readers(program)
        calls = [node for node in program.nodes if node.op in LAYERS]
        hidden = _hidden(program)
        layers = tuple(_layer(program, spec, node, node.name in hidden) for node in calls)
        keys = [key for layer in layers for key in (layer.weight, layer.bias) if key]
        if len(set(keys)) < len(keys):
            shared = sorted(key for key, uses in Counter(keys).items() if uses > 1)
            raise StructureError(
                f"{shared}: used by several layers, which is not supported yet. Give each a copy."
            )
        return layers

    @cached_property
    def by_node(self) -> dict[str, Layer]:
        """Name of the operator call -> layer."""
        return {layer.node: layer for layer in self.layers}

    @cached_property
    def spaces(self) -> dict[str, int]:
        """Space -> number of units, in the order of the network."""
        sizes = {}
        for layer in self.layers:
            rows, columns, _ = self._matrix_shape(layer)
            sizes.setdefault(layer.source, columns)
            sizes.setdefault(layer.target, rows)
        return sizes

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

    def producers(self, space: str) -> list[Layer]:
        """Layers whose rows make the units of a space."""
        return [layer for layer in self.layers if layer.target == space]

    def consumers(self, space: str) -> list[Layer]:
        """Layers whose columns read the units of a space."""
        return [layer for layer in self.layers if layer.source == space]

    def matrix(self, layer: Layer, weight: Tensor) -> Tensor:
        """View a layer's weight as units by units by the rest (taps, positions).

        Args:
            layer: The layer.
            weight: ``[*batch, out, in, *taps]``.

        Returns:
            ``[*batch, rows, columns, rest]``.
        """
        rows, _, _ = self._matrix_shape(layer)
        lead = weight.ndim - len(self.spec.axes[layer.weight])
        if layer.reads_inputs:
            return weight[..., None].flatten(lead + 2)
        units = self.spec.unit_rows(
            layer.weight, 1, layer.source, weight
        )  # [*, columns, rows * rest]
        return units.unflatten(-1, (rows, -1)).transpose(lead, lead + 1)

    def _matrix_shape(self, layer: Layer) -> tuple[int, int, int]:
        value = next(v for v, key in self.program.parameters.items() if key == layer.weight)
        rows, fan_in, *taps = self.program.shapes[value]
        columns = fan_in if layer.reads_inputs else self.spec.groups[layer.source]
        rest = fan_in // columns
        for tap in taps:
            rest *= tap
        return rows, columns, rest


def _check_readers(program: Program) -> None:
    """Refuse networks with weights that are no layers, such as embeddings and recurrent ones."""
    for node in program.nodes:
        if node.op in LAYERS:
            continue
        for value in {*node.refs} & program.parameters.keys():
            if len(program.shape(value)) > 1:
                raise StructureError(
                    f"{program.parameters[value]}: is read by aten.{node.op} ({node.name}); what "
                    "goes layer by layer (repair, refit, learned mergers) knows linear maps and "
                    "convolutions. Align and average such networks."
                )


def _hidden(program: Program) -> set[str]:
    """Nodes of the layers that other layers read, directly or through what lies between."""
    hidden: set[str] = set()
    behind: dict[str, set[str]] = {}  # value -> layers that it comes from
    for node in program.nodes:
        sources = set().union(*(behind.get(name, ()) for name in node.refs))
        if node.op in LAYERS:
            hidden |= sources
            sources = {node.name}
        behind[node.name] = sources
    return hidden


def _layer(program: Program, spec: PermutationSpec, node: Node, hidden: bool) -> Layer:
    keys = [program.parameters.get(ref) for ref in node.refs[1:3]]
    if None in keys:
        raise StructureError(
            f"{node.name}: its weight is computed, not a parameter; this is not supported yet."
        )
    weight, bias = keys[0], keys[1] if len(keys) > 1 else None
    rows, columns = ([place.group for place in spec.places(weight, axis)] for axis in (0, 1))
    nested = [group for group in (*rows, *columns) if spec.outer(group)]
    if len(columns) > 1 or len(rows) > 1 or nested or _concatenated(spec, weight):
        raise StructureError(
            f"{weight}: its rows carry the groups {rows}, its columns {columns}; what goes layer "
            "by layer (repair, refit, learned mergers) needs one group per axis. Align and average "
            "such networks."
        )
    source = columns[0] if columns else f"inputs:{node.name}"
    target = spec.row_group(weight) or (f"fixed:{node.name}" if hidden else OUTPUTS)
    linear = node.op in LINEAR
    plain = node.op == "conv2d.default" and node.argument(6, 1) == 1
    patches = plain and not isinstance(node.argument(4, ()), str)
    return Layer(node.name, weight, bias, source, target, linear, linear or patches)


def _concatenated(spec: PermutationSpec, weight: str) -> bool:
    return any(isinstance(f, Concat) for axis in spec.axes[weight] for f in axis)
