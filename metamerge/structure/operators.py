"""What each operator does to axes: one readable rule per kind, and the table that names them.

A rule takes ``(axes, node, values, shape)``, where ``values[name]`` lists the axes of a value and
``shape`` is that of the output, ties what the operator ties, and returns the axes of the output. An
operator without a rule is refused by name: nothing is guessed.
"""

from collections.abc import Callable

from metamerge.errors import StructureError
from metamerge.structure.axes import BATCH, Axes, Axis
from metamerge.structure.program import Node, Ref

Values = dict[str, list[Axis]]
Rule = Callable[[Axes, Node, Values, tuple[int | None, ...]], list[Axis]]

LINEAR = {"linear.default"}
CONVOLUTIONS = {"conv1d.default", "conv2d.default", "conv3d.default"}
LAYERS = LINEAR | CONVOLUTIONS
"""Operators with a weight whose rows make units and whose columns read units."""

ELEMENTWISE = {
    *("relu.default", "relu6.default", "leaky_relu.default", "elu.default", "selu.default"),
    *("gelu.default", "silu.default", "mish.default", "hardswish.default", "softplus.default"),
    *("tanh.default", "hardtanh.default", "sigmoid.default", "softmax.int", "log_softmax.int"),
    *("exp.default", "sin.default", "cos.default", "abs.default", "neg.default", "sqrt.default"),
    *("rsqrt.default", "square.default", "pow.Tensor_Scalar", "clamp.default"),
    *("add.Scalar", "mul.Scalar"),
    *("dropout.default", "clone.default", "contiguous.default", "detach.default"),
    *("alias.default", "to.dtype"),
}
BINARY = {
    *("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"),
    *("maximum.default", "minimum.default"),
}
SPATIAL = {
    *("max_pool1d.default", "max_pool2d.default", "max_pool3d.default"),
    *("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default"),
    *("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", "adaptive_avg_pool3d.default"),
    *("adaptive_max_pool2d.default", "pad.default", "constant_pad_nd.default"),
}
RESHAPES = {"flatten.using_ints", "view.default", "reshape.default", "_unsafe_view.default"}


def _axes_of(node: Node, position: int, values: Values) -> list[Axis]:
    argument = node.argument(position)
    if not isinstance(argument, Ref):
        raise StructureError(f"{node.op} ({node.name}): argument {position} is no tensor.")
    return values[argument.name]


def linear(axes: Axes, node: Node, values: Values, shape: tuple) -> list[Axis]:
    """``y = x W^T + b``: columns of W meet the last axis of x, rows make the last axis of y."""
    x, weight = _axes_of(node, 0, values), _axes_of(node, 1, values)
    axes.unify(x[-1], weight[1], node.name)
    if node.argument(2) is not None:
        axes.unify(_axes_of(node, 2, values)[0], weight[0], node.name)
    return [*x[:-1], weight[0]]


def convolution(axes: Axes, node: Node, values: Values, shape: tuple) -> list[Axis]:
    """Channels in meet axis 1 of the weight, channels out are its rows, taps are fixed."""
    x, weight = _axes_of(node, 0, values), _axes_of(node, 1, values)
    groups = node.argument(6, 1)
    if groups == 1:
        axes.unify(x[1], weight[1], node.name)
    elif axes.size(x[1]) == axes.size(weight[0]) == groups:
        axes.unify(x[1], weight[0], node.name)
    else:
        raise StructureError(
            f"{node.name}: a convolution in {groups} groups of several channels is not followed "
            "yet; depthwise and ungrouped ones are."
        )
    if node.argument(2) is not None:
        axes.unify(_axes_of(node, 2, values)[0], weight[0], node.name)
    for tap in weight[2:]:
        axes.fix(tap, "taps of a kernel keep their place")
    return [x[0], weight[0], *_positions(axes, x[2:], shape[2:])]


def batch_norm(axes: Axes, node: Node, values: Values, shape: tuple) -> list[Axis]:
    """Every statistic and parameter is one number per channel."""
    x = _axes_of(node, 0, values)
    for position in range(1, 5):
        if node.argument(position) is not None:
            axes.unify(x[1], _axes_of(node, position, values)[0], node.name)
    return list(x)


def layer_norm(axes: Axes, node: Node, values: Values, shape: tuple) -> list[Axis]:
    """Mean and variance over the last axes do not care for their order; gain and bias follow it."""
    x = _axes_of(node, 0, values)
    for position in (2, 3):
        if node.argument(position) is not None:
            affine = _axes_of(node, position, values)
            for own, other in zip(x[-len(affine) :], affine, strict=True):
                axes.unify(own, other, node.name)
    return list(x)


def elementwise(axes: Axes, node: Node, values: Values, shape: tuple) -> list[Axis]:
    """One tensor in, each entry on its own (or normalised over a whole axis)."""
    return list(_axes_of(node, 0, values))


def binary(axes: Axes, node: Node, values: Values, shape: tuple) -> list[Axis]:
    """Two tensors, entry by entry, with broadcasting: equal axes are tied."""
    if not isinstance(node.argument(1), Ref):
        return elementwise(axes, node, values, shape)
    left, right = _axes_of(node, 0, values), _axes_of(node, 1, values)
    width = max(len(left), len(right))
    pairs = zip(_padded(left, width), _padded(right, width), strict=True)
    return [axes.unify(a, b, node.name) if a and b else a or b for a, b in pairs]


def spatial(axes: Axes, node: Node, values: Values, shape: tuple) -> list[Axis]:
    """Pooling and padding: batch and channel stay, positions are new and fixed."""
    x = _axes_of(node, 0, values)
    if axes.size(x[1]) != shape[1]:
        raise StructureError(
            f"{node.name}: {node.op} changes the channel axis, which is not followed yet."
        )
    return [*x[:2], *_positions(axes, x[2:], shape[2:])]


def reshape(axes: Axes, node: Node, values: Values, shape: tuple) -> list[Axis]:
    """Flatten, view and reshape: the factors stay in order and are cut anew."""
    factors = [f for axis in _axes_of(node, 0, values) for f in axes.resolve(axis)]
    taken = [axes.take(factors, BATCH if size is None else size, node.name) for size in shape]
    if factors:
        raise StructureError(f"{node.name} mixes the batch axis with another.")
    return taken


def mean(axes: Axes, node: Node, values: Values, shape: tuple) -> list[Axis]:
    """Mean over axes: the others stay."""
    x = _axes_of(node, 0, values)
    reduced = {d % len(x) for d in node.argument(1, ())}
    if node.argument(2, False):
        return [() if d in reduced else axis for d, axis in enumerate(x)]
    return [axis for d, axis in enumerate(x) if d not in reduced]


def _padded(axis: list[Axis], width: int) -> list[Axis]:
    return [()] * (width - len(axis)) + list(axis)


def _positions(axes: Axes, read: list[Axis], sizes: tuple) -> list[Axis]:
    """New axes of positions; neither they nor those that were read can be permuted."""
    positions = [axes.fresh(BATCH if size is None else size) for size in sizes]
    for axis in (*read, *positions):
        axes.fix(axis, "positions keep their place")
    return positions


RULES: dict[str, Rule] = {
    **dict.fromkeys(LINEAR, linear),
    **dict.fromkeys(CONVOLUTIONS, convolution),
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(BINARY, binary),
    **dict.fromkeys(SPATIAL, spatial),
    **dict.fromkeys(RESHAPES, reshape),
    "batch_norm.default": batch_norm,
    "layer_norm.default": layer_norm,
    "mean.dim": mean,
}
