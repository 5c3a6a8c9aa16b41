"""Networks of one architecture and any hidden widths, as far as a transport has to know them."""

from dataclasses import dataclass

from metamerge.alignment._activations import Reading, readings
from metamerge.alignment._transport import group_of
from metamerge.errors import IncompatibleWeights, StructureError
from metamerge.structure import Concat, Layout, PermutationSpec
from metamerge.structure.factors import axis_length
from metamerge.weights import Weights


@dataclass(frozen=True)
class Network:
    """What transport has to know of an architecture.

    Attributes:
        layout: Its layers.
        spec: Its permutation spec.
        columns: Keys of weights whose axis 1 reads units; all other axes make them.
        order: Groups from the inputs to the outputs.
        places: Where units can be seen.
    """

    layout: Layout
    spec: PermutationSpec
    columns: frozenset[str]
    order: tuple[str, ...]
    places: list[Reading]


def network_of(layout: Layout, spec: PermutationSpec) -> Network:
    """What a transport has to know of an architecture.

    Args:
        layout: Its layers.
        spec: Its permutation spec.

    Returns:
        The network.

    Raises:
        StructureError: If layers cannot be followed, or units are nested in blocks.
    """
    places = readings(layout, spec, "optimal_transport")
    several = [
        key
        for key, axes in spec.axes.items()
        if any(isinstance(f, Concat) for axis in axes for f in axis)
        or any(len(spec.places(key, axis)) > 1 for axis in range(len(axes)))
    ]
    if several or spec.within:
        raise StructureError(
            f"optimal_transport: {(several or sorted(spec.within))[0]!r} has units nested in "
            "blocks, or of several groups on one axis. Use align='weight_matching'."
        )
    columns = frozenset(layer.weight for layer in layout.layers if layer.source in spec.groups)
    made = (layer.target for layer in layout.layers if layer.target in spec.groups)
    order = tuple(dict.fromkeys([*made, *spec.groups]))
    return Network(layout, spec, columns, order, places)


def widths_of(name: str, weights: Weights, spec: PermutationSpec) -> dict[str, int]:
    """Read off how many units a network has in every group of a spec.

    Args:
        name: What the weights are called in messages.
        weights: State dict of the network; its hidden widths need not be the spec's.
        spec: Permutation spec of a network that differs from it in widths only.

    Returns:
        Group -> number of units.

    Raises:
        IncompatibleWeights: If a tensor differs from the spec in more than hidden widths, or the
            widths contradict each other.
    """
    found: dict[str, tuple[int, str]] = {}
    for key, axes in spec.axes.items():
        shape = tuple(weights[key].shape) if key in weights else "nothing"
        expected = tuple(map(axis_length, axes))
        if len(shape) != len(axes) or key not in weights:
            raise IncompatibleWeights(
                f"{name}: {key!r} has shape {shape}, the network has {expected}. Merge networks "
                "that differ in nothing but hidden widths."
            )
        for axis, factors in enumerate(axes):
            group = group_of(factors)
            rest = expected[axis] // spec.groups[group] if group else expected[axis]
            units, left = divmod(shape[axis], rest)
            if left or units < 1 or (group is None and units != 1):
                why = "carries no hidden units" if group is None else f"must hold {rest} per unit"
                raise IncompatibleWeights(
                    f"{name}: {key!r} has shape {shape}, the network has {expected}; axis {axis} "
                    f"{why}. Merge networks that differ in nothing but hidden widths."
                )
            before, where = found.setdefault(group, (units, key)) if group else (units, key)
            if before != units:
                raise IncompatibleWeights(
                    f"{name}: the units of {group!r} are {before} in {where!r} and {units} in "
                    f"{key!r}. Pass weights of one network."
                )
    return {group: units for group, (units, _) in found.items()}
