"""Normalisations: statistics over an axis do not care for its order; gain and bias follow it."""

from metamerge.errors import StructureError
from metamerge.structure.axes import Axis
from metamerge.structure.rules.call import Call
from metamerge.structure.rules.views import regroup


def batch_norm(call: Call) -> list[Axis]:
    """Batch and instance normalisation: every statistic and parameter is one per channel."""
    x = call.tensor("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        own = call.optional(name)
        if own is not None:
            call.unify(x[1], own[0])
    call.implied.append(x[:2] if call.node.op.startswith("instance") else x[1:2])
    return x


def layer_norm(call: Call) -> list[Axis]:
    """Layer and root-mean-square normalisation over the last axes."""
    x = call.tensor("input")
    for name in ("weight", "bias"):
        own = call.optional(name)
        if own is not None:
            call.match(x[len(x) - len(own) :], own)
    call.implied.append(x[: len(x) - len(call["normalized_shape"])])
    return x


def group_norm(call: Call) -> list[Axis]:
    """Channels are blocks: whole groups may change places, and the channels of each group.

    Where parts of a concatenation meet inside a group, only the channels of each part may.

    Returns:
        Axes of the output.
    """
    x = call.tensor("input")
    groups = call["num_groups"]
    size = call.axes.size(x[1]) // groups
    try:
        call.implied.append([x[0], regroup(call, [x[1]], [groups, size])[0]])
    except StructureError:
        for group in range(groups):
            call.axes.pick([x[1]], 0, group * size, size, call.where)
    for name in ("weight", "bias"):
        own = call.optional(name)
        if own is not None:
            call.unify(x[1], own[0])
    return x


NORM_RULES = {
    **dict.fromkeys(("batch_norm.default", "instance_norm.default"), batch_norm),
    **dict.fromkeys(("layer_norm.default", "rms_norm.default"), layer_norm),
    "group_norm.default": group_norm,
}
