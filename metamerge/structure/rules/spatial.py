"""Convolutions, pooling and interpolation: channels carry units, positions and taps are fixed."""

from collections.abc import Sequence
from contextlib import suppress

from metamerge.errors import StructureError
from metamerge.structure.axes import Axis
from metamerge.structure.rules.call import Call
from metamerge.structure.rules.views import regroup

TAPS = "taps of a kernel"


def convolution(call: Call) -> list[Axis]:
    """Channels in meet axis 1 of the weight, channels out are its rows.

    In a grouped convolution both are blocks, one per group of the convolution.

    Returns:
        Axes of the output.
    """
    x, weight, bias = call.tensor("input"), call.tensor("weight"), call.optional("bias")
    spatial = len(weight) - 2
    channels = x[-spatial - 1]
    groups = call["groups"]
    if groups == 1:
        call.unify(channels, weight[1])
    else:
        _tie_groups(call, channels, weight, groups)
    if bias:
        call.unify(bias[0], weight[0])
    call.fix(*weight[2:], reason=TAPS)
    return [*x[: -spatial - 1], weight[0], *_moved(call, x[-spatial:])]


def _tie_groups(call: Call, channels: Axis, weight: list[Axis], groups: int) -> None:
    """Tie what the groups of a convolution read and make.

    Where the channels do not come in equal blocks, as behind a shuffle of channels, or keep their
    place, the groups are taken one by one; they share axis 1 of the weight, which ties what they
    read.
    """
    wide, made = (call.axes.size(axis) // groups for axis in (channels, weight[0]))
    if not {*call.axes.atoms(channels)} <= call.axes.fixed.keys():
        with suppress(StructureError):
            read = regroup(call, [channels], [groups, wide])
            rows = regroup(call, [weight[0]], [groups, made])
            call.unify(read[0], rows[0])
            call.unify(read[1], weight[1])
            return
    for group in range(groups):
        own = call.axes.pick([channels], 0, group * wide, wide, call.where)[0]
        call.unify(own, weight[1])
        call.axes.pick([weight[0]], 0, group * made, made, call.where)


def transposed_convolution(call: Call) -> list[Axis]:
    """Channels in are the rows of the weight, channels out its axis 1, once per group."""
    x, weight, bias = call.tensor("input"), call.tensor("weight"), call.optional("bias")
    spatial = len(weight) - 2
    groups = call["groups"]
    channels = weight[1]
    if groups > 1:
        blocks = regroup(call, [weight[0]], [groups, call.axes.size(weight[0]) // groups])
        channels = (*blocks[0], *weight[1])
    call.unify(x[-spatial - 1], weight[0])
    if bias:
        call.unify(bias[0], channels)
    call.fix(*weight[2:], reason=TAPS)
    return [*x[: -spatial - 1], channels, *_moved(call, x[-spatial:])]


def general_convolution(call: Call) -> list[Axis]:
    """``convolution.default``, which says in an argument whether it is transposed."""
    return transposed_convolution(call) if call["transposed"] else convolution(call)


def pooling(call: Call) -> list[Axis] | list[list[Axis]]:
    """Windows of positions; the channel axis stays."""
    x = call.tensor("input" if "input" in call.node.arguments else "self")
    spatial = int(next(c for c in call.node.op if c.isdigit()))
    several = call.node.op.startswith("adaptive_max") or "with_indices" in call.node.op
    sizes = call.program.sizes.get(call.node.name)
    if call.node.op.startswith("adaptive"):
        sizes = call["output_size"]
    if sizes is not None and all(size == 1 for size in sizes[-spatial:]) and not several:
        out = [*x[:-spatial], *[()] * spatial]  # a mean over all positions
    elif sizes is None:  # one of two outputs: getitem knows their sizes
        call.fix(*x[-spatial:])
        out = [*x[:-spatial], *[None] * spatial]
    else:
        call.fix(*x[-spatial:])
        out = [*x[:-spatial], *(call.ordered(abs(s)) for s in sizes[-spatial:])]
    return [out, out] if several else out


def unfold(call: Call) -> list[Axis]:
    """Patches: ``[b, c * taps, positions]``."""
    x = call.tensor()
    size = call.axes.size(x[-3])
    call.fix(*x[-2:])
    taps = call.ordered(call.shape[-2] // size, TAPS)
    return [*x[:-3], (*x[-3], *taps), call.ordered(call.shape[-1])]


def fold(call: Call) -> list[Axis]:
    """Patches put back in place: ``[b, c, h, w]``."""
    x = call.tensor()
    channels = call.shape[-3]
    made = regroup(call, [x[-2]], [channels, call.axes.size(x[-2]) // channels])
    call.fix(made[1], reason=TAPS)
    call.fix(x[-1])
    return [*x[:-2], made[0], *(call.ordered(size) for size in call.shape[-2:])]


def _moved(call: Call, read: Sequence[Axis]) -> list[Axis]:
    """New axes of positions; neither they nor those that were read can be permuted."""
    call.fix(*read)
    return [call.ordered(size) for size in call.shape[len(call.shape) - len(read) :]]


_DIMENSIONS = ("1d", "2d", "3d")
_POOLS = [
    f"{kind}_pool{d}.default"
    for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
    for d in _DIMENSIONS
]
_UPSAMPLED = [
    f"{'_' * kind.startswith('nearest_exact')}upsample_{kind}.{form}"
    for kind in (
        *("nearest1d", "nearest2d", "nearest3d", "nearest_exact2d"),
        *("linear1d", "bilinear2d", "trilinear3d", "bicubic2d"),
    )
    for form in ("vec", "default")
]

SPATIAL_RULES = {
    **{f"conv{d}.{form}": convolution for d in _DIMENSIONS for form in ("default", "padding")},
    **{
        f"conv_transpose{d}.{form}": transposed_convolution
        for d, form in zip(_DIMENSIONS, ("default", "input", "input"), strict=True)
    },
    "convolution.default": general_convolution,
    **dict.fromkeys(_POOLS, pooling),
    **dict.fromkeys([f"max_pool{d}_with_indices.default" for d in _DIMENSIONS], pooling),
    **dict.fromkeys(_UPSAMPLED, pooling),
    "im2col.default": unfold,
    "col2im.default": fold,
}
