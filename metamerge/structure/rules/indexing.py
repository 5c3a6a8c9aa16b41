"""Operators that look entries up by their number: embedding, index, gather, scatter."""

import torch

from metamerge.structure.axes import Axis
from metamerge.structure.rules.call import Call

LOOKED_UP = "entries are looked up by number"


def embedding(call: Call) -> list[Axis]:
    """A row of the table per token; the order of the table is that of the vocabulary."""
    table = call.tensor("weight")
    call.fix(table[0], reason=LOOKED_UP)
    return [*call.tensor("indices"), table[1]]


def index(call: Call) -> list[Axis]:
    """``x[i, :, j]``: indexed axes keep their order and give way to those of the index tensors."""
    x = call.tensor()
    given = [call.axes_of(ref) for ref in call["indices"]]
    indexed = [d for d, axes in enumerate(given) if axes is not None]
    if (run := _run(call, indexed)) is not None:
        return call.axes.pick(x, indexed[0], *run, call.where)
    call.fix(*(x[d] for d in indexed), reason=LOOKED_UP)
    looked = call.broadcast(*(list(given[d]) for d in indexed))
    kept = [axis for d, axis in enumerate(x) if d not in indexed]
    together = indexed[-1] - indexed[0] + 1 == len(indexed)
    place = indexed[0] if together else 0
    return [*kept[:place], *looked, *kept[place:]]


def _run(call: Call, indexed: list[int]) -> tuple[int, int] | None:
    """Start and length where the only index is a constant run of neighbours: ``x[:, [-1]]``."""
    constant = call.program.constants.get(call["indices"][indexed[0]].name)
    if len(indexed) > 1 or constant is None or constant.ndim != 1 or constant.dtype == torch.bool:
        return None
    places = (constant % call.axes.size(call.tensor()[indexed[0]])).tolist()
    run = places == list(range(places[0], places[0] + len(places)))
    return (places[0], len(places)) if run else None


def index_put(call: Call) -> list[Axis]:
    """``x[i, :, j] = values``."""
    x = call.tensor()
    call.broadcast(index(call), call.tensor("values"))
    return x


def index_select(call: Call) -> list[Axis]:
    """Entries of one axis in a given order."""
    x = call.tensor()
    dim = call["dim"] % len(x)
    call.fix(x[dim], reason=LOOKED_UP)
    x[dim] = call.tensor("index")[0]
    return x


def gather(call: Call) -> list[Axis]:
    """``out[i, j] = x[i, index[i, j]]``."""
    x, places = call.tensor(), call.tensor("index")
    dim = call["dim"] % len(x)
    call.fix(x[dim], reason=LOOKED_UP)
    _match_but(call, dim, x, places)
    return places


def scatter(call: Call) -> list[Axis]:
    """``x[i, index[i, j]] = src[i, j]``, or added to it."""
    x, places = call.tensor(), call.tensor("index")
    source = call.optional("src")
    dim = call["dim"] % len(x)
    call.fix(x[dim], reason=LOOKED_UP)
    _match_but(call, dim, x, places)
    if source is not None:
        _match_but(call, None, list(source), places)
    return x


def index_add(call: Call) -> list[Axis]:
    """Rows of ``source`` are added to those rows of ``x`` that the index names."""
    x, source = call.tensor(), call.tensor("source")
    dim = call["dim"] % len(x)
    call.fix(x[dim], reason=LOOKED_UP)
    call.unify(call.tensor("index")[0], source[dim])
    for d, (axis, other) in enumerate(zip(x, source, strict=True)):
        if d != dim:
            call.unify(axis, other)
    return x


def counted(call: Call) -> list[Axis]:
    """One entry per number that occurs: ``one_hot``, ``bincount``, ``histc``."""
    x = call.tensor()
    call.fix(*x, reason=LOOKED_UP)
    return [call.ordered(size) for size in call.shape]


def _match_but(call: Call, dim: int | None, x: list[Axis], other: list[Axis]) -> None:
    for d, (a, b) in enumerate(zip(x, other, strict=True)):
        if d == dim:
            continue
        if call.axes.size(a) == call.axes.size(b):
            call.unify(a, b)
        else:  # only the first entries take part
            call.fix(a, b)


INDEX_RULES = {
    "embedding.default": embedding,
    **dict.fromkeys(("index.Tensor", "_unsafe_index.Tensor"), index),
    **dict.fromkeys(("index_put.default", "_unsafe_index_put.default"), index_put),
    "index_select.default": index_select,
    "gather.default": gather,
    **dict.fromkeys(("scatter.src", "scatter.value", "scatter_add.default"), scatter),
    "scatter_reduce.two": scatter,
    "index_add.default": index_add,
    **dict.fromkeys(("one_hot.default", "bincount.default", "histc.default"), counted),
}
