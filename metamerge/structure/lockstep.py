"""The lockstep interpreter: one program, many networks, one batched operator call per node.

Values are ``Lane``s: a tensor that is shared by all networks, or stacked with a leading axis ``n``
of networks. Operators with a fast batched form have it in ``BATCHED``; every other one is mapped
over the networks by ``torch.vmap``. A value is freed after its last use, so memory is that of the
widest cut through the graph.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from metamerge.structure.operators import is_entrywise
from metamerge.structure.program import FACTORIES, Node, Program, Ref, operator
from metamerge.structure.rules.recurrent import RECURRENT_RULES
from metamerge.structure.rules.spatial import SPATIAL_RULES, pooling
from metamerge.weights import Weights


class Lane(NamedTuple):
    """A value of the interpreter: ``[n, ...]`` where stacked, ``[...]`` where it is shared."""

    value: Any
    stacked: bool


def run(
    program: Program,
    weights: Weights,
    inputs: Sequence[Tensor],
    *,
    stacked: bool = False,
    own_inputs: bool = False,
) -> Tensor:
    """Run one network, or ``n`` stacked ones.

    Args:
        program: The traced network.
        weights: State dict; with ``stacked``, every tensor has a leading axis ``n``.
        inputs: The network's inputs, batch axis first; all networks share them.
        stacked: Whether the weights hold many networks.
        own_inputs: Whether every network has inputs of its own: ``[n, b, ...]``.

    Returns:
        Outputs ``[b, ...]``, or ``[n, b, ...]`` with ``stacked``.
    """
    execution = Execution(program, weights, inputs, stacked=stacked, own_inputs=own_inputs)
    return execution.run_all()


class Execution:
    """One pass through a program, a node at a time.

    ``weights`` is read when a node needs it, so a caller may fill it while the pass goes on: this
    is how refit computes a layer from the inputs that the layers before it produce. In
    ``training``, stacked networks normalise by the statistics of their own batch, and
    ``statistics`` holds what becomes of the running ones: key -> ``[n, c]``.
    """

    def __init__(
        self,
        program: Program,
        weights: Weights,
        inputs: Sequence[Tensor],
        *,
        stacked: bool,
        own_inputs: bool = False,
        training: bool = False,
    ) -> None:
        self.program = program
        self.weights = weights
        self.stacked = stacked
        self.training = training
        self.statistics: Weights = {}
        self.device = inputs[0].device if inputs else torch.device("cpu")
        lanes = [Lane(x, own_inputs) for x in inputs]
        self.values = dict(zip(program.inputs, lanes, strict=bool(inputs)))

    def step(self, node: Node, lane: Lane | None = None) -> Lane:
        """Run one node and free what is not needed after it.

        Args:
            node: The next node of the program.
            lane: Its output, where ``peek`` has it already.

        Returns:
            Its output.
        """
        lane = self.values[node.name] = self.peek(node) if lane is None else lane
        for name in node.refs:
            if self.program.last_use.get(name) == node.name:
                self.values.pop(name, None)
        return lane

    def run_all(self) -> Tensor:
        """Run every node; the network's output, as ``output`` gives it."""
        for node in self.program.nodes:
            self.step(node)
        return self.output()

    def peek(self, node: Node) -> Lane:
        """What the node would put out now; nothing is stored and nothing freed."""
        args = tuple(self._lane(a) for a in node.args)
        kwargs = {k: self._plain(v) for k, v in node.kwargs.items()}
        if node.op in FACTORIES:
            kwargs["device"] = self.device
        if self.training and node.op == "batch_norm.default" and args[3].stacked:
            return self._normalise_by_batch(node, args)
        return _call(node.op, args, kwargs)

    def _normalise_by_batch(self, node: Node, args: tuple[Lane, ...]) -> Lane:
        """Batch normalisation of ``n`` networks in training mode: one of ``n * c`` channels."""
        x, weight, bias = (lane.value for lane in args[:3])
        momentum, eps, n = args[6].value, args[7].value, len(args[3].value)
        x = x if args[0].stacked else x.expand(n, *x.shape)
        keys = [self.program.parameters[node.args[position].name] for position in (3, 4)]
        known = [
            self.statistics.get(key, lane.value).detach().flatten().clone()  # torch changes it
            for key, lane in zip(keys, args[3:5], strict=True)
        ]
        affine = (None if t is None else t.flatten() for t in (weight, bias))
        y = F.batch_norm(as_channels(x), *known, *affine, True, momentum, eps)
        for key, value in zip(keys, known, strict=True):
            self.statistics[key] = value.unflatten(0, (n, -1))
        return Lane(rearrange(y, "b (n c) ... -> n b c ...", n=n), True)

    def argument(self, node: Node, position: int) -> Lane:
        """A tensor argument that the node is about to read."""
        return self._lane(node.args[position])

    def output(self) -> Tensor:
        """The network's output, ``[n, b, ...]`` or ``[b, ...]``."""
        value, stacked = self.values[self.program.output]
        return value if stacked or not self.stacked else value[None]

    def _lane(self, argument: Any) -> Lane:
        if isinstance(argument, tuple):
            return _joined([self._lane(a) for a in argument])
        if not isinstance(argument, Ref):
            return Lane(argument, False)
        if argument.name in self.values:
            return self.values[argument.name]
        if argument.name in self.program.constants:
            return Lane(self.program.constants[argument.name].to(self.device), False)
        return Lane(self.weights[self.program.parameters[argument.name]], self.stacked)

    def _plain(self, argument: Any) -> Any:
        """Replace references inside lists (sizes of a view) by their values."""
        if isinstance(argument, Ref):
            return self._lane(argument).value
        if isinstance(argument, tuple):
            return [self._plain(a) for a in argument]
        return argument


def _call(op: str, args: tuple[Lane, ...], kwargs: dict[str, Any]) -> Lane:
    values = tuple(a.value for a in args)
    if op == "sym_size.int":
        value, dim = args[0], values[1]
        return Lane(value.value.shape[dim + value.stacked], False)
    if op == "python.getitem":
        return Lane(values[0][values[1]], args[0].stacked)
    if not any(a.stacked for a in args):
        return Lane(operator(op)(*values, **kwargs), False)
    if is_entrywise(op) and sum(isinstance(v, Tensor) for v in values) == 1:
        return Lane(operator(op)(*values, **kwargs), True)
    if op in BATCHED:
        result = BATCHED[op](op, args, kwargs)
        if result is not None:
            return Lane(result, True)
    return Lane(_mapped(op, args, kwargs), True)


def _joined(lanes: list[Lane]) -> Lane:
    """A list of sizes, or of tensors; where one of these is stacked, all are."""
    stacked = [len(lane.value) for lane in lanes if lane.stacked]
    if not stacked:
        return Lane([lane.value for lane in lanes], False)
    shared = [v.expand(stacked[0], *v.shape) if isinstance(v, Tensor) else v for v, _ in lanes]
    return Lane([v if own else s for (v, own), s in zip(lanes, shared, strict=True)], True)


def _mapped(op: str, args: tuple[Lane, ...], kwargs: dict[str, Any]) -> Tensor:
    """Any operator, over the networks."""
    if op in RECURRENT_RULES:  # torch.vmap knows none of these
        return _one_by_one(op, args, kwargs)
    tensors = [i for i, a in enumerate(args) if a.stacked or isinstance(a.value, Tensor)]
    dims = tuple(0 if args[i].stacked else None for i in tensors)

    def call(*given: Tensor) -> Tensor:
        full = [a.value for a in args]
        for i, tensor in zip(tensors, given, strict=True):
            full[i] = tensor
        return operator(op)(*full, **kwargs)

    return torch.vmap(call, in_dims=dims)(*(args[i].value for i in tensors))


def _one_by_one(op: str, args: tuple[Lane, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """A recurrent layer of one network after the other."""
    stacked = next(a.value for a in args if a.stacked)
    count = len(stacked[0] if isinstance(stacked, list) else stacked)

    def own(lane: Lane, network: int) -> Any:
        if not lane.stacked:
            return lane.value
        return (
            [v[network] for v in lane.value]
            if isinstance(lane.value, list)
            else lane.value[network]
        )

    each = [operator(op)(*(own(a, k) for a in args), **kwargs) for k in range(count)]
    return tuple(torch.stack(values) for values in zip(*each, strict=True))


def _linear(op: str, args: tuple[Lane, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 and args[2].value is not None else None
    if not weight.stacked or (bias is not None and not bias.stacked):
        return None
    n, out, fan_in = weight.value.shape
    if not x.stacked:  # one product with the rows of all networks
        rows, every = x.value.reshape(-1, fan_in), weight.value.flatten(0, 1).T  # [r, i], [i, n o]
        y = rows @ every if bias is None else torch.addmm(bias.value.flatten(), rows, every)
        return y.reshape(*x.value.shape[:-1], n, out).movedim(-2, 0)
    rows = x.value.reshape(n, -1, fan_in)
    columns = weight.value.transpose(1, 2)  # [n, i, o]
    if bias is None:
        y = torch.bmm(rows, columns)
    else:
        y = torch.baddbmm(bias.value[:, None], rows, columns)
    return y.reshape(n, *x.value.shape[1:-1], out)


def _conv2d(op: str, args: tuple[Lane, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """One convolution over the channels of all networks, in groups where inputs are their own."""
    x, weight, bias, stride, padding, dilation, groups = _convolution_arguments(args)
    if not weight.stacked or groups != 1 or not (bias is None or bias.stacked):
        return None
    n, maps = len(weight.value), as_channels(x.value) if x.stacked else x.value
    y = F.conv2d(
        channels_last(maps),
        channels_last(weight.value.flatten(0, 1)),
        None if bias is None else bias.value.flatten(),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=n if x.stacked else 1,
    )
    return rearrange(y, "b (n o) h w -> n b o h w", n=n)


def as_channels(value: Tensor) -> Tensor:
    """Networks as part of the channels, without a copy where a convolution made the value."""
    return rearrange(value, "n b c ... -> b (n c) ...")


def channels_last(value: Tensor) -> Tensor:
    """A CPU convolves groups up to ten times as fast when their channels come last in memory."""
    fast = value.device.type == "cpu" and value.dtype in (torch.float32, torch.bfloat16)
    return value.contiguous(memory_format=torch.channels_last) if fast else value


def _convolution_arguments(args: tuple[Lane, ...]) -> tuple:
    defaults = (None, None, None, [1, 1], [0, 0], [1, 1], 1)
    given = [a.value for a in args[3:]]
    bias = args[2] if len(args) > 2 and args[2].value is not None else None
    options = [*given, *defaults[3 + len(given) :]]
    return (args[0], args[1], bias, *options)


def _spatial(op: str, args: tuple[Lane, ...], kwargs: dict[str, Any]) -> Tensor:
    """Pooling and padding know nothing of networks: they become part of the batch or channels."""
    x, options = args[0].value, tuple(a.value for a in args[1:])
    if op == "adaptive_avg_pool2d.default" and set(options[0]) == {1}:
        # The gradient of a mean comes in another layout than its input, which costs the rest dear.
        op, options = "avg_pool2d.default", (x.shape[-2:],)
    if op in _POOLING and x.ndim == _POOLING[op] + 3:
        maps = as_channels(x)  # one input channel leaves channels first
        y = operator(op)(channels_last(maps) if maps.ndim == 4 else maps, *options, **kwargs)
        return rearrange(y, "b (n c) ... -> n b c ...", n=len(x))
    y = operator(op)(x.flatten(0, 1), *options, **kwargs)
    return y.unflatten(0, x.shape[:2])


def _batch_norm(op: str, args: tuple[Lane, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Evaluation mode: per network and channel one factor and one shift."""
    x, weight, bias, mean, var = args[:5]
    training, eps = args[5].value, args[7].value
    if training or not (mean.stacked and var.stacked):
        return None
    scale = (var.value + eps).rsqrt()  # [n, c]
    scale = scale if weight.value is None else scale * weight.value
    shift = -mean.value * scale
    shift = shift if bias.value is None else shift + bias.value
    value = x.value if x.stacked else x.value[None]
    shape = (scale.shape[0], 1, scale.shape[1], *[1] * (value.ndim - 3))
    return value * scale.reshape(shape) + shift.reshape(shape)


def _group_norm(op: str, args: tuple[Lane, ...], kwargs: dict[str, Any]) -> Tensor:
    """Normalise all networks as one batch; vmap cannot where channels come last in memory."""
    x, groups = args[0], args[1].value
    given = dict(zip(("weight", "bias", "eps"), args[2:5], strict=False))
    eps = given["eps"].value if "eps" in given else 1e-5
    rows = x.value.flatten(0, 1) if x.stacked else x.value
    y = F.group_norm(rows.contiguous(), groups, eps=eps)
    y = y.unflatten(0, x.value.shape[:2]) if x.stacked else y[None]  # [n, b, c, ...]
    for name, change in (("weight", torch.mul), ("bias", torch.add)):
        if name in given and given[name].value is not None:
            value = given[name].value  # [n, c], or [c] where all networks share it
            lead = value.shape[:-1] + (1,) * (2 - len(value.shape[:-1]))
            y = change(y, value.reshape(*lead, -1, *[1] * (y.ndim - 3)))
    return y


def _reshape(op: str, args: tuple[Lane, ...], kwargs: dict[str, Any]) -> Tensor:
    x = args[0].value
    return x.reshape(x.shape[0], *args[1].value)


def _flatten(op: str, args: tuple[Lane, ...], kwargs: dict[str, Any]) -> Tensor:
    start = args[1].value if len(args) > 1 else 0
    end = args[2].value if len(args) > 2 else -1
    return args[0].value.flatten(start + 1 if start >= 0 else start, end + 1 if end >= 0 else end)


def _attention(op: str, args: tuple[Lane, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Attention of all networks as one batch; vmap would take it network by network."""
    mask = args[3] if len(args) > 3 else Lane(kwargs.get("attn_mask"), False)
    if mask.stacked or (mask.value is not None and mask.value.ndim > 2):
        return None
    n = next(len(lane.value) for lane in args[:3] if lane.stacked)
    if min(lane.value.ndim - lane.stacked for lane in args[:3]) < 3:  # no batch to be part of
        return None
    whole = [v if stacked else v.expand(n, *v.shape) for v, stacked in args[:3]]
    options = [lane.value for lane in args[3:]]
    y = operator(op)(*(v.flatten(0, 1) for v in whole), *options, **kwargs)
    return y.unflatten(0, whole[0].shape[:2])


_POOLING = {  # operator -> number of axes that it pools over
    **{
        op: int(op[op.index("d.") - 1])
        for op, rule in SPATIAL_RULES.items()
        if rule is pooling and "max" not in op
    },
    **{f"max_pool{d}d.default": d for d in (1, 2, 3)},  # the others give places as well
}
_SPATIAL = {"pad.default", "constant_pad_nd.default", *_POOLING}
BATCHED: dict[str, Callable[[str, tuple[Lane, ...], dict[str, Any]], Tensor | None]] = {
    **dict.fromkeys(_SPATIAL, _spatial),
    "conv2d.default": _conv2d,
    "linear.default": _linear,
    "batch_norm.default": _batch_norm,
    "flatten.using_ints": _flatten,
    "group_norm.default": _group_norm,
    "reshape.default": _reshape,
    "scaled_dot_product_attention.default": _attention,
}
