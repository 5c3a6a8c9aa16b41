"""Operators that treat every entry on its own, that fold axes away, or that make new tensors."""

from metamerge.structure.axes import Axis
from metamerge.structure.rules.call import Call


def pointwise(call: Call) -> list[Axis]:
    """Tensors combined entry by entry, with broadcasting: equal axes are tied."""
    return call.broadcast(*call.tensors())


def prelu(call: Call) -> list[Axis]:
    """One slope per channel (axis 1), or one for all."""
    x, slope = call.tensor(), call.tensor("weight")
    if slope:
        call.unify(x[min(1, len(x) - 1)], slope[0])
    return x


def normalised(call: Call) -> list[Axis]:
    """Softmax and the like: a sum over the axis does not care for its order."""
    x = call.tensor()
    if "dim" in call.node.arguments and x:
        dim = call["dim"] % len(x)
        call.implied.append([axis for d, axis in enumerate(x) if d != dim])
    return x


def copied(call: Call) -> list[Axis]:
    """``self`` overwritten by ``src``, or shaped like ``other``: axes are those of both."""
    return call.broadcast(*call.tensors())


def shaped_like(call: Call) -> list[Axis]:
    """A cast: the other tensor gives only its dtype."""
    return call.tensor()


def weight_norm(call: Call) -> list[Axis]:
    """``g * v / |v|``, a norm per entry of one axis."""
    v, g = call.tensor("v"), call.tensor("g")
    call.match(v, g)
    return v


def reduction(call: Call) -> list[Axis] | list[list[Axis]]:
    """Mean, sum, norm, largest entry: the order along the folded axes does not matter.

    Where the place of an entry is asked for, it does.

    Returns:
        Axes of the output, or of both outputs.
    """
    x = call.tensor()
    arguments = call.node.arguments
    dims = arguments.get("dim")
    dims = range(len(x)) if dims is None or dims == () else dims
    folded = {d % len(x) for d in ((dims,) if isinstance(dims, int) else dims)} if x else set()
    places = call.node.op.startswith(("argmax", "argmin"))
    several = call.node.op.startswith(("max.dim", "min.dim", "median.dim", "mode"))
    if places or (several and call.reads_output(1)):
        call.fix(*(x[d] for d in folded), reason="places of entries are read")
    if arguments.get("keepdim"):
        kept = [() if d in folded else axis for d, axis in enumerate(x)]
    else:
        kept = [axis for d, axis in enumerate(x) if d not in folded]
    if call.node.op.startswith("var_mean"):
        return [kept, kept]
    return [kept, kept] if several else kept


def along(call: Call) -> list[Axis] | list[list[Axis]]:
    """Running sums, differences, sorting, rolling: every axis that is named keeps its order."""
    x = call.tensor()
    dims = call.node.arguments.get("dim", call.node.arguments.get("dims"))
    dims = range(len(x)) if dims in (None, ()) else (dims,) if isinstance(dims, int) else dims
    out = list(x)
    for dim in {d % len(x) for d in dims}:
        call.fix(x[dim])
        size = call.program.sizes.get(call.node.name)
        out[dim] = call.ordered(call.shape[dim]) if size else x[dim]
    if call.node.op.startswith("topk"):
        last = call["dim"] % len(x)
        out[last] = call.ordered(call["k"])
    return [out, out] if call.node.op.startswith(("sort", "topk")) else out


def triangle(call: Call) -> list[Axis]:
    """``tril`` and ``triu``: the last two axes keep their places."""
    x = call.tensor()
    call.fix(*x[-2:])
    return x


def uniform(call: Call) -> list[Axis]:
    """Zeros, ones and the like: every entry is the same, so any order is."""
    return [call.fresh(size) for size in call.shape]


def numbered(call: Call) -> list[Axis]:
    """``arange``, ``eye``: every entry says its place."""
    return [call.ordered(size) for size in call.shape]


_FOLDING = (
    *("mean.dim", "mean.default", "sum.dim_IntList", "sum.default", "amax.default", "amin.default"),
    *(
        "var.correction",
        "var.default",
        "var.dim",
        "std.correction",
        "std.dim",
        "var_mean.correction",
        "var_mean.dim",
    ),
    *("logsumexp.default", "prod.dim_int", "prod.default", "any.dim", "any.default", "all.dim"),
    *("all.default", "linalg_vector_norm.default", "norm.ScalarOpt_dim", "norm.Scalar"),
    *("max.default", "min.default", "max.dim", "min.dim", "median.dim", "argmax.default"),
    *("argmin.default", "count_nonzero.dim_IntList", "any.dims", "all.dims"),
)
_ALONG = (
    *("cumsum.default", "cumprod.default", "diff.default", "flip.default", "roll.default"),
    *("sort.default", "sort.stable", "argsort.default", "topk.default", "logcumsumexp.default"),
)
_UNIFORM = (
    *("zeros.default", "ones.default", "full.default", "zeros_like.default", "ones_like.default"),
    *("full_like.default", "new_zeros.default", "new_ones.default", "new_full.default"),
    *("scalar_tensor.default", "empty.memory_format", "empty_like.default", "new_empty.default"),
)
_CASTS = ("to.dtype", "type_as.default", "to.other")
_NUMBERED = ("arange.default", "arange.start", "arange.start_step", "eye.default", "eye.m")

POINTWISE_RULES = {
    "prelu.default": prelu,
    "_prelu_kernel.default": prelu,
    "copy.default": copied,
    "_weight_norm.default": weight_norm,
    **dict.fromkeys(("softmax.int", "_softmax.default", "log_softmax.int"), normalised),
    **dict.fromkeys(("dropout.default", "native_dropout.default"), normalised),
    **dict.fromkeys(_CASTS, shaped_like),
    **dict.fromkeys(_FOLDING, reduction),
    **dict.fromkeys(_ALONG, along),
    **dict.fromkeys(("tril.default", "triu.default"), triangle),
    **dict.fromkeys(_UNIFORM, uniform),
    **dict.fromkeys(_NUMBERED, numbered),
}
