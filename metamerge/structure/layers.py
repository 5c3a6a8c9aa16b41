"""Finding the layers of a program: which units every linear map and convolution reads and makes."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

from metamerge.errors import StructureError
from metamerge.structure.factors import Concat, Place, labels_of
from metamerge.structure.operators import LAYERS, LINEAR, is_entrywise
from metamerge.structure.program import Node, Program
from metamerge.structure.spec import PermutationSpec
from metamerge.structure.units import FIXED, Units, units_along

OUTPUTS = "outputs"
INPUTS = "inputs:"


@dataclass(frozen=True)
class Layer:
    """One linear map or convolution with a weight of its own kind.

    Attributes:
        node: Name of the operator call.
        weight: State-dict key of the weight.
        bias: State-dict key of the bias, or None.
        sources: Spaces that its columns read, one after the other; ``inputs:<node>`` where they are
            fixed.
        targets: Spaces that its rows make: groups or nests of groups, ``outputs`` where no layer
            comes after it, or ``fixed:<node>``.
        linear: Whether it is a linear map rather than a convolution.
        regressable: Whether its weight is a matrix over (patches of) its inputs: linear, or an
            ungrouped 2-d convolution.
        shared: Whether something else reads its weight or bias, too (the layer once more, an
            embedding): it cannot be fitted to what it reads and makes in one place.
        blocks: Number of blocks of a grouped convolution whose columns are units of a block each.
    """

    node: str
    weight: str
    bias: str | None
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    linear: bool
    regressable: bool
    shared: bool = False
    blocks: int = 1

    @property
    def source(self) -> str:
        """The space that its columns read; those of a concatenation joined by `` + ``."""
        return " + ".join(self.sources)

    @property
    def target(self) -> str:
        """The space that its rows make; several joined by `` + ``."""
        return " + ".join(self.targets)

    @property
    def reads_inputs(self) -> bool:
        """Whether its columns are fixed, as those of a first layer are."""
        return all(source.startswith(INPUTS) for source in self.sources)


class Found(NamedTuple):
    """A layer with the units along its rows and columns."""

    layer: Layer
    rows: Units
    columns: Units


def find_layers(program: Program, spec: PermutationSpec) -> list[Found]:
    """Find every linear map and convolution whose weight is a parameter.

    Args:
        program: The traced network.
        spec: Its permutation spec.

    Returns:
        In execution order. A call whose weight is computed is none of them.

    Raises:
        StructureError: If columns are nested in blocks that its rows do not tell apart.
    """
    reads = Counter(
        program.parameters[value]
        for node in program.nodes
        for value in {*node.refs} & program.parameters.keys()
    )
    calls = [node for node in program.nodes if node.op in LAYERS and _keys(program, node)]
    last = _last(program, calls)
    return [_found(program, spec, node, node.name in last, reads) for node in calls]


def check_plain(program: Program, spec: PermutationSpec) -> None:
    """Refuse networks that are more than layers of one group per axis.

    Args:
        program: The traced network.
        spec: Its permutation spec.

    Raises:
        StructureError: If a weight or bias is used twice or computed, a weight joins several groups
            on one axis, or an operator of another kind reads a matrix of weights.
    """
    for node in program.nodes:
        for value in {*node.refs} & program.parameters.keys():
            if node.op not in LAYERS and len(program.shape(value)) > 1:
                raise StructureError(
                    f"{program.parameters[value]}: is read by aten.{node.op} ({node.name}); what "
                    "fuses units by themselves knows linear maps and convolutions. Align and "
                    "average such networks."
                )
    uses: Counter[str] = Counter()
    for node in (node for node in program.nodes if node.op in LAYERS):
        keys = [program.parameters.get(ref) for ref in node.refs[1:3]]
        if None in keys:
            raise StructureError(
                f"{node.name}: its weight is computed, not a parameter; this is not supported yet."
            )
        _check_axes(spec, keys[0])
        uses.update(keys)
    shared = sorted(key for key, count in uses.items() if count > 1)
    if shared:
        raise StructureError(
            f"{shared}: used by several layers, which is not supported yet. Give each a copy."
        )


def _check_axes(spec: PermutationSpec, weight: str) -> None:
    rows, columns = ([place.group for place in spec.places(weight, axis)] for axis in (0, 1))
    joined = any(isinstance(factor, Concat) for axis in spec.axes[weight] for factor in axis)
    nested = any(spec.outer(group) for group in (*rows, *columns))
    if len(columns) > 1 or len(rows) > 1 or nested or joined:
        raise StructureError(
            f"{weight}: its rows carry the groups {rows}, its columns {columns}; what "
            "fuses units by themselves needs one group per axis. Align and average such networks."
        )


def _keys(program: Program, node: Node) -> tuple[str, str | None] | None:
    """Keys of weight and bias; None where one of them is computed."""
    keys = [program.parameters.get(ref) for ref in node.refs[1:3]]
    return None if None in keys else (keys[0], keys[1] if len(keys) > 1 else None)


def _last(program: Program, calls: list[Node]) -> set[str]:
    """Nodes of the layers that make outputs: no other weights come after them."""
    sizes = {node.name: program.shape(node.refs[1])[0] for node in calls}
    hidden: set[str] = set()
    behind: dict[str, set[str]] = {}  # value -> layers that it comes from
    matrices = {v for v in program.parameters if len(program.shape(v)) > 1}  # and what they become
    computed = set(program.inputs)
    for node in program.nodes:
        sources = set().union(*(behind.get(name, ()) for name in node.refs))
        weighs = not (matrices.isdisjoint(node.refs) or _passes_on(node.op))
        if node.op in LAYERS or (weighs and not computed.isdisjoint(node.refs)):
            hidden |= sources
            sources = {node.name} & sizes.keys()
        behind[node.name] = sources
        if not computed.isdisjoint(node.refs):
            computed.add(node.name)
        elif not matrices.isdisjoint(node.refs):
            matrices.add(node.name)
    last = sizes.keys() - hidden
    # heads of several sizes are not the outputs as a whole, unless those that are judged agree
    if len({sizes[name] for name in last}) > 1:
        last &= behind.get(program.output, set())
    return {*last} if len({sizes[name] for name in last}) == 1 else set()


def _passes_on(op: str) -> bool:
    """Whether an operator makes no units of its own: arithmetic entry by entry, or on sizes."""
    return op.startswith("python.") or is_entrywise(op)


def _found(
    program: Program, spec: PermutationSpec, node: Node, last: bool, reads: Counter[str]
) -> Found:
    weight, bias = _keys(program, node)
    length, fan_in, *_ = program.shape(node.refs[1])
    places = spec.places(weight, 1)
    missing = {o for p in places for o in spec.outer(p.group)} - {p.group for p in places}
    groups = 1 if node.op in LINEAR else node.argument(6, 1)
    blocks = groups if missing else 1
    if missing:
        places = _across_blocks(spec, weight, blocks, missing)
    rows = units_along(
        spec, spec.places(weight, 0), length, OUTPUTS if last else f"{FIXED}{node.name}"
    )
    columns = units_along(spec, places, fan_in * blocks, f"{INPUTS}{node.name}")
    linear = node.op in LINEAR
    patches = node.op == "conv2d.default" and groups == 1
    plain = linear or (patches and not isinstance(node.argument(4, ()), str))
    shared = reads[weight] > 1 or (bias is not None and reads[bias] > 1)
    spaces = columns.spaces, rows.spaces
    layer = Layer(node.name, weight, bias, *spaces, linear, plain, shared, blocks)
    return Found(layer, rows, columns)


def _across_blocks(
    spec: PermutationSpec, weight: str, blocks: int, missing: set[str]
) -> list[Place]:
    """What all columns of a grouped convolution carry, block by block."""
    places, rows = spec.places(weight, 1), spec.places(weight, 0)
    known = {place.group for place in rows}
    if not known >= missing or blocks == 1:
        raise StructureError(
            f"{weight}: its columns carry {[p.group for p in places]}, which are nested in "
            f"{sorted(missing)}; its rows carry {sorted(known)} and do not say which block they "
            "read. Align and average such networks."
        )
    width, outer = len(places[0].labels), []
    for group in sorted(missing):
        labels = labels_of(rows, group)
        block = labels[:: len(labels) // blocks].repeat_interleave(width)
        outer.append(Place(group, block, torch.full_like(block, width)))
    inner = [Place(p.group, p.labels.repeat(blocks), p.stride.repeat(blocks)) for p in places]
    return [*outer, *inner]
