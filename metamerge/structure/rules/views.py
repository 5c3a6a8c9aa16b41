"""Operators that rearrange entries: reshape, transpose, expand, slice, split, concatenate, pad."""

from collections.abc import Sequence

from metamerge.errors import StructureError
from metamerge.structure.axes import Axis
from metamerge.structure.rules.call import Call


def reshape(call: Call) -> list[Axis]:
    """View, reshape, flatten, unflatten: the factors stay in order and are grouped anew."""
    return regroup(call, call.tensor(), call.shape)


def regroup(call: Call, x: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Axes of a tensor that is viewed with other sizes.

    Args:
        call: The operator call.
        x: Axes before.
        sizes: Sizes after.

    Returns:
        Axes after.
    """
    factors = call.axes.roots(tuple(f for axis in x for f in axis))
    return [call.axes.take(factors, size, call.where) for size in sizes]


def permute(call: Call) -> list[Axis]:
    """Axes in another order."""
    x = call.tensor()
    return [x[d] for d in call["dims"]]


def transpose(call: Call) -> list[Axis]:
    """Two axes change places."""
    x = call.tensor()
    a, b = call["dim0"], call["dim1"]
    x[a], x[b] = x[b], x[a]
    return x


def reversed_axes(call: Call) -> list[Axis]:
    """``t`` and ``T``: axes from last to first."""
    return call.tensor()[::-1]


def squeeze(call: Call) -> list[Axis]:
    """Axes of one entry go: the named ones, or all."""
    x = call.tensor()
    dims = call.node.arguments.get("dim", range(len(x)))
    gone = {d % len(x) for d in ((dims,) if isinstance(dims, int) else dims)} if x else set()
    return [axis for d, axis in enumerate(x) if d not in gone or call.axes.size(axis) != 1]


def unsqueeze(call: Call) -> list[Axis]:
    """A new axis of one entry."""
    x = call.tensor()
    x.insert(call["dim"] % (len(x) + 1), ())
    return x


def expand(call: Call) -> list[Axis]:
    """Axes of one entry are repeated; the copies are all alike."""
    x = call.tensor()
    x = [()] * (len(call.shape) - len(x)) + x
    return [
        call.fresh(size) if call.axes.size(axis) == 1 else axis
        for axis, size in zip(x, call.shape, strict=True)
    ]


def repeat(call: Call) -> list[Axis]:
    """Whole copies, one behind the other: a factor before the axis, all of whose entries agree."""
    x = call.tensor()
    repeats = [size // old for size, old in _sizes_before(call, x)]
    x = [()] * (len(call.shape) - len(x)) + x
    return [(*call.fresh(count), *axis) for count, axis in zip(repeats, x, strict=True)]


def repeat_interleave(call: Call) -> list[Axis]:
    """Copies of each entry side by side: a factor behind the axis."""
    x = call.tensor()
    if call["dim"] is None:
        x = [tuple(f for axis in x for f in axis)]
    dim = (call["dim"] or 0) % len(x)
    x[dim] = (*x[dim], *call.fresh(call.number(call["repeats"])))
    return x


def select(call: Call) -> list[Axis]:
    """One entry of an axis; the axis goes."""
    x = call.tensor()
    dim = call["dim"] % len(x)
    index = call.number(call["index"]) % call.axes.size(x[dim])
    _cut_small(call, x[dim])
    picked = call.axes.pick(x, dim, index, 1, call.where)
    return picked[:dim] + picked[dim + 1 :]


def slice_(call: Call) -> list[Axis]:
    """A piece of an axis, or every n-th entry of it."""
    x = call.tensor()
    if not x:
        return x
    dim = call["dim"] % len(x)
    size, step = call.axes.size(x[dim]), call["step"]
    start = _clamped(call["start"] or 0, size)
    length = call.shape[dim]
    if step == 1:
        return call.axes.pick(x, dim, start, length, call.where)
    if size % step or length != size // step:
        call.fix(x[dim])
        x[dim] = call.ordered(length)
        return x
    inner = regroup(call, [x[dim]], [size // step, step])
    split = [*x[:dim], *inner, *x[dim + 1 :]]
    picked = call.axes.pick(split, dim + 1, start % step, 1, call.where)
    return picked[: dim + 1] + picked[dim + 2 :]


def split(call: Call) -> list[list[Axis]]:
    """Split, chunk and unbind: several pieces of an axis."""
    x = call.tensor()
    dim = call["dim"] % len(x)
    size = call.axes.size(x[dim])
    if call.node.op.startswith("unbind"):
        _cut_small(call, x[dim])
        each = [call.axes.pick(x, dim, i, 1, call.where) for i in range(size)]
        return [axes[:dim] + axes[dim + 1 :] for axes in each]
    pieces, start = [], 0
    for length in _lengths(call, size):
        pieces.append(call.axes.pick(x, dim, start, length, call.where))
        start += length
    return pieces


def cat(call: Call) -> list[Axis]:
    """One behind the other along an axis; the other axes are tied."""
    tensors = [axes for axes in call.tensors() if [call.axes.size(a) for a in axes] != [0]]
    width = len(tensors[0])
    dim = call["dim"] % width
    others = [[axis for d, axis in enumerate(x) if d != dim] for x in tensors]
    tied = call.broadcast(*others) if width > 1 else []
    return [*tied[:dim], call.axes.joined([x[dim] for x in tensors]), *tied[dim:]]


def stack(call: Call) -> list[Axis]:
    """One behind the other along a new axis."""
    tensors = call.tensors()
    tied = call.broadcast(*tensors)
    dim = call["dim"] % (len(tied) + 1)
    return [*tied[:dim], call.ordered(len(tensors), "members of a stack"), *tied[dim:]]


def pad(call: Call) -> list[Axis]:
    """A constant before and behind an axis is a part whose entries are all alike."""
    x = call.tensor()
    constant = call.node.arguments.get("mode", "constant") == "constant"
    given = [call.number(n) for n in call["pad"]]
    for place in range(len(given) // 2):
        dim = len(x) - 1 - place
        before, behind = given[2 * place], given[2 * place + 1]
        if not before and not behind:
            continue
        if not constant or before < 0 or behind < 0:
            call.fix(x[dim])
            x[dim] = call.ordered(call.shape[dim])
            continue
        whole = [call.fresh(before) if before else None, x[dim]]
        whole.append(call.fresh(behind) if behind else None)
        x[dim] = call.axes.joined([axis for axis in whole if axis is not None])
    return x


def scattered(call: Call) -> list[Axis]:
    """``slice_scatter`` and ``select_scatter``: a piece of ``self`` is overwritten by ``src``."""
    x, source = call.tensor(), call.tensor("src")
    dim = call["dim"] % len(x)
    if call.node.op.startswith("select"):
        source.insert(dim, ())
    for d, (axis, other) in enumerate(zip(x, source, strict=True)):
        if d == dim and call.axes.size(axis) != call.axes.size(other):
            call.fix(axis, other)
        else:
            call.unify(axis, other)
    return x


def pixel_shuffle(call: Call) -> list[Axis]:
    """Blocks of ``r * r`` channels become positions."""
    x, r = call.tensor(), call["upscale_factor"]
    channels = call.axes.size(x[-3]) // r**2
    kept, within = regroup(call, [x[-3]], [channels, r * r])
    call.fix(within, *x[-2:])
    return [*x[:-3], kept, *(call.ordered(size) for size in call.shape[-2:])]


def glu(call: Call) -> list[Axis]:
    """The first half of an axis times a function of the second."""
    x = call.tensor()
    dim = call["dim"] % len(x)
    half = call.axes.size(x[dim]) // 2
    first, second = (call.axes.pick(x, dim, s, half, call.where) for s in (0, half))
    return call.broadcast(first, second)


def _cut_small(call: Call, axis: Axis) -> None:
    """Cut an axis that holds blocks into single ones at once: what is nested in each is its own."""
    first = call.axes.roots(axis)[:1]
    if first and first[0] not in call.axes.parts and call.axes.holds_nested(first[0]):
        call.axes.cut(first[0], range(call.axes.sizes[first[0]]))


def _lengths(call: Call, size: int) -> list[int]:
    arguments = call.node.arguments
    if "split_sizes" in arguments:
        return [call.number(n) for n in arguments["split_sizes"]]
    if "chunks" in arguments:
        width = -(-size // arguments["chunks"])
    elif isinstance(arguments["split_size"], tuple):
        return [call.number(n) for n in arguments["split_size"]]
    else:
        width = call.number(arguments["split_size"])
    return [min(width, size - start) for start in range(0, size, width)]


def _sizes_before(call: Call, x: Sequence[Axis]) -> list[tuple[int, int]]:
    old = [1] * (len(call.shape) - len(x)) + [call.axes.size(axis) for axis in x]
    return list(zip(call.shape, old, strict=True))


def _clamped(index: object, size: int) -> int:
    if not isinstance(index, int):
        raise StructureError("a slice that begins at a computed place is not followed.")
    return min(max(index + size if index < 0 else index, 0), size)


_REGROUPED = (
    *("reshape.default", "flatten.using_ints", "unflatten.int"),  # a view is traced as a reshape
    *("reshape_as.default", "view_as.default"),
)
_SPLITS = (
    *("split.Tensor", "split_with_sizes.default", "split.sizes", "chunk.default", "unbind.int"),
    *("split_with_sizes_copy.default", "split_copy.Tensor", "unbind_copy.int"),
)

VIEW_RULES = {
    **dict.fromkeys(_REGROUPED, reshape),
    "permute.default": permute,
    **dict.fromkeys(("transpose.int", "swapaxes.default", "transpose_copy.int"), transpose),
    **dict.fromkeys(("t.default", "numpy_T.default"), reversed_axes),
    **dict.fromkeys(("squeeze.dim", "squeeze.dims", "squeeze.default"), squeeze),
    "unsqueeze.default": unsqueeze,
    **dict.fromkeys(("expand.default", "expand_as.default", "broadcast_to.default"), expand),
    **dict.fromkeys(("repeat.default", "tile.default"), repeat),
    "repeat_interleave.self_int": repeat_interleave,
    **dict.fromkeys(("select.int", "select_copy.int"), select),
    **dict.fromkeys(("slice.Tensor", "slice_copy.Tensor"), slice_),
    **dict.fromkeys(_SPLITS, split),
    **dict.fromkeys(("cat.default", "concat.default", "concatenate.default"), cat),
    "stack.default": stack,
    **dict.fromkeys(("pad.default", "constant_pad_nd.default"), pad),
    **dict.fromkeys(("slice_scatter.default", "select_scatter.default"), scattered),
    "pixel_shuffle.default": pixel_shuffle,
    "glu.default": glu,
}
