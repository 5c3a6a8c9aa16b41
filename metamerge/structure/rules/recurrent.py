"""Recurrent layers: all gates of a unit move together, and so do the states it keeps."""

from metamerge.structure.axes import Axis
from metamerge.structure.rules.call import POSITIONS, Call

GATES = "gates of a recurrent layer"


def recurrent(call: Call) -> list[list[Axis]]:
    """LSTM, GRU and plain recurrent layers, stacked and in both directions.

    Weights ``[gates * h, in]`` and ``[gates * h, h]``, biases, and for projected LSTMs ``[p, h]``.

    Returns:
        Axes of the output and of the last states.
    """
    x = call.tensor("input")
    time = 1 if call["batch_first"] else 0
    call.fix(x[time], reason=POSITIONS)
    params = [call.axes_of(ref) for ref in call["params"]]
    directions = 1 + call["bidirectional"]
    each = len(params) // (call["num_layers"] * directions)
    read, hidden, cells = x[-1], [], []
    for layer in range(call["num_layers"]):
        made = []
        for direction in range(directions):
            place = layer * directions + direction
            own = params[place * each : (place + 1) * each]
            state, cell = _layer(call, read, own)
            _tie_states(call, place, [state, cell])
            made.append(state)
            hidden.append(state)
            cells.append(cell)
        read = call.axes.joined(made)
    out = [*x[:-1], read]
    batch = x[0 if call["batch_first"] else 1]
    kept = [_stacked(call, hidden, batch)]
    if call.node.op.startswith("lstm"):
        kept.append(_stacked(call, cells, batch))
    return [out, *kept]


def _layer(call: Call, read: Axis, params: list[list[Axis]]) -> tuple[Axis, Axis]:
    """One layer in one direction; its output and its cell."""
    weights = [p for p in params if len(p) == 2]
    units = call.axes.fresh(call.axes.size(weights[0][0]) // _GATES[call.node.op])
    state = units
    if len(weights) == 3:  # projected
        state = weights[2][0]
        call.unify(weights[2][1], units)
    call.unify(weights[0][1], read)
    call.unify(weights[1][1], state)
    gates = call.ordered(_GATES[call.node.op], GATES)
    for tensor in [*weights[:2], *(p for p in params if len(p) == 1)]:
        call.unify(tensor[0], (*gates, *units))
    return state, units


def _tie_states(call: Call, place: int, units: list[Axis]) -> None:
    """Initial states ``[layers * directions, b, h]``."""
    given = call["hx"]
    for ref, own in zip(given if isinstance(given, tuple) else (given,), units, strict=False):
        axes = call.axes_of(ref)
        if axes is not None:
            piece = call.axes.pick(axes, 0, place, 1, call.where)
            call.unify(piece[-1], own)


def _stacked(call: Call, units: list[Axis], batch: Axis) -> list[Axis]:
    """Last states ``[layers * directions, b, h]``, each with units of its own."""
    if len(units) == 1 or call.axes.size(units[0]) == 1:
        return [call.ordered(len(units)), batch, units[0]]
    front, inner = call.axes.stacked(units)
    return [front, batch, inner]


_GATES = {
    **dict.fromkeys(("lstm.input",), 4),
    **dict.fromkeys(("gru.input",), 3),
    **dict.fromkeys(("rnn_tanh.input", "rnn_relu.input"), 1),
}
RECURRENT_RULES = dict.fromkeys(_GATES, recurrent)
