"""A network as data: the operators that ``torch.export`` saw, and named tensors; no Python behind.

The program is what every other room reads instead of a module: structure discovery walks it, the
lockstep interpreter runs it for many networks at once, and a zoo stores it as JSON so that its
checkpoints can be merged without the code that made them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from json import dumps
from typing import Any

import torch
from torch import Tensor, nn

from metamerge.errors import StructureError, Unreadable
from metamerge.weights import Weights

_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float64, torch.int64)}


@dataclass(frozen=True)
class Ref:
    """The value called ``name``: a parameter, an input or the output of a node."""

    name: str


@dataclass(frozen=True)
class Node:
    """One operator call: ``op`` is its aten name, such as ``linear.default``."""

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def refs(self) -> tuple[str, ...]:
        """Names of the values that this node reads, in order."""
        return tuple(_names_in((self.args, dict(self.kwargs))))

    def argument(self, position: int, default: Any = None) -> Any:
        """Positional argument, or ``default`` where the call left it out."""
        return self.args[position] if position < len(self.args) else default


@dataclass(frozen=True)
class Program:
    """A traced network.

    Attributes:
        parameters: Value name -> key in the state dict, for every parameter and buffer that is
            used.
        inputs: Names of the input values, in call order.
        nodes: Operator calls in execution order.
        output: Name of the (single) output value.
        shapes: Value name -> shape; None stands for the batch axis.
        tied: State-dict key -> the key whose tensor it shares.
        untraced: Keys of the state dict that no operator reads (step counters, unused layers).
    """

    parameters: Mapping[str, str]
    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    output: str
    shapes: Mapping[str, tuple[int | None, ...]]
    tied: Mapping[str, str]
    untraced: tuple[str, ...]

    @cached_property
    def last_use(self) -> dict[str, str]:
        """Value name -> name of the last node that reads it (the output is never freed)."""
        uses = {ref: node.name for node in self.nodes for ref in node.refs}
        return {ref: user for ref, user in uses.items() if ref != self.output}

    @cached_property
    def digest(self) -> str:
        """Hash of the program: equal for equal architectures."""
        return sha256(dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def input_shape(self) -> tuple[int | None, ...]:
        """Shape of the first input, batch axis included."""
        return self.shapes[self.inputs[0]]

    def check_weights(self, name: str, weights: Weights) -> None:
        """Refuse weights that are not those of this network.

        Args:
            name: Where the weights came from, for the message.
            weights: State dict of one network.

        Raises:
            StructureError: If a tensor is missing or has another shape.
        """
        for value, key in self.parameters.items():
            if key not in weights:
                raise StructureError(
                    f"{name}: tensor {key!r} is missing; the network reads "
                    f"{sorted(self.parameters.values())}. Pass the model these weights belong to."
                )
            if tuple(weights[key].shape) != self.shapes[value]:
                raise StructureError(
                    f"{name}: {key!r} has shape {tuple(weights[key].shape)}, the network has "
                    f"{self.shapes[value]}. Pass the model these weights belong to."
                )

    def to_json(self) -> dict[str, Any]:
        """Plain types only, for ``json.dumps``."""
        return {
            "format": "metamerge-program-1",
            "parameters": dict(self.parameters),
            "inputs": list(self.inputs),
            "nodes": [
                [n.name, n.op, _encode(list(n.args)), _encode(dict(n.kwargs))] for n in self.nodes
            ],
            "output": self.output,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "tied": dict(self.tied),
            "untraced": list(self.untraced),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Program":
        """Read back what ``to_json`` wrote.

        Args:
            data: The parsed JSON.

        Returns:
            The program.

        Raises:
            Unreadable: If the data is no program, or names an operator that is not a pure aten one.
        """
        try:
            nodes = tuple(
                Node(name, _checked_op(op), tuple(_decode(args)), _decode(kwargs))
                for name, op, args, kwargs in data["nodes"]
            )
            return cls(
                parameters=dict(data["parameters"]),
                inputs=tuple(data["inputs"]),
                nodes=nodes,
                output=data["output"],
                shapes={name: tuple(shape) for name, shape in data["shapes"].items()},
                tied=dict(data["tied"]),
                untraced=tuple(data["untraced"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Unreadable(f"This is no program written by metamerge: {error!r}.") from error


def operator(op: str) -> Any:
    """The callable of an aten operator name such as ``linear.default``."""
    packet, overload = op.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def trace(model: nn.Module, example_inputs: Sequence[Tensor] | Tensor) -> Program:
    """Trace a network in eval mode into a ``Program``; the module is left as it was.

    Args:
        model: Any network that ``torch.export`` accepts, with one tensor as output.
        example_inputs: One input tensor, or a sequence of them, batch axis first.

    Returns:
        The program, with the first axis of every input free.

    Raises:
        StructureError: If the network cannot be exported, has several outputs or none per row of
            its inputs, or computes with tensors that its state dict does not hold.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    inputs = tuple(x.repeat(2, *[1] * (x.ndim - 1)) if x.shape[0] == 1 else x for x in inputs)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        batch = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
        exported = torch.export.export(model, inputs, dynamic_shapes=batch)
    except Exception as error:
        raise StructureError(
            f"{type(model).__name__} cannot be traced by torch.export on inputs of shape "
            f"{[tuple(x.shape) for x in inputs]}: {error}. Check the shape of the example input, "
            "and keep control flow that depends on values out of forward()."
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    return _from_export(exported, model)


def _from_export(exported: torch.export.ExportedProgram, model: nn.Module) -> Program:
    signature = exported.graph_signature
    if len(signature.user_outputs) != 1:
        raise StructureError(
            f"{type(model).__name__} returns {len(signature.user_outputs)} tensors; wrap it in a "
            "module that returns the one to be judged."
        )
    parameters = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    graph = list(exported.graph.nodes)
    read = {n.name for n in graph if n.op == "placeholder" and n.users}
    state = model.state_dict(keep_vars=True)
    used = {value: key for value, key in parameters.items() if value in read}
    tied = _tied(state, set(used.values()))
    missing = set(used.values()) - set(state)
    if missing:
        raise StructureError(
            f"{type(model).__name__} computes with {sorted(missing)}, which its state dict does "
            "not hold; register them as persistent buffers."
        )
    nodes, renamed = _nodes(graph)
    output = signature.user_outputs[0]
    shapes = _shapes(graph)
    if None not in shapes.get(output, ()):
        raise StructureError(
            f"{type(model).__name__} returns {shapes.get(output, 'no tensor')} for batches of any "
            "size; forward() must return one row of outputs per row of inputs."
        )
    return Program(
        parameters=used,
        inputs=tuple(signature.user_inputs),
        nodes=nodes,
        output=renamed.get(output, output),
        shapes=shapes,
        tied=tied,
        untraced=tuple(k for k in state if k not in set(used.values()) and k not in tied),
    )


def _shapes(graph: Sequence[torch.fx.Node]) -> dict[str, tuple[int | None, ...]]:
    return {
        n.name: tuple(s if isinstance(s, int) else None for s in n.meta["val"].shape)
        for n in graph
        if isinstance(n.meta.get("val"), Tensor)
    }


def _nodes(graph: Sequence[torch.fx.Node]) -> tuple[tuple[Node, ...], dict[str, str]]:
    """The operator calls; those in place (``relu_``) become pure, later calls read the result."""
    renamed: dict[str, str] = {}
    nodes = []
    for n in graph:
        if n.op != "call_function" or n.target is torch.ops.aten._assert_tensor_metadata.default:
            continue
        if _gives_back(n):
            renamed[n.name] = renamed.get(n.args[0].name, n.args[0].name)
            continue
        name, args, kwargs = _op_name(n.target), _plain(n.args, renamed), _plain(n.kwargs, renamed)
        kwargs.pop("memory_format", None)  # says nothing of values
        packet, overload = name.split(".")
        if operator(name)._schema.is_mutable:
            if not packet.endswith("_") or not hasattr(torch.ops.aten, packet[:-1]):
                raise StructureError(
                    f"Operator aten.{name} ({n.name}) changes its inputs in place; use a pure one."
                )
            changed = args[0].name
            _check_alone(n, changed, graph, renamed)
            for old in (changed, *(k for k, v in renamed.items() if v == changed)):
                renamed[old] = n.name
            name = f"{packet[:-1]}.{overload}"
        nodes.append(Node(n.name, name, args, kwargs))
    return tuple(nodes), renamed


def _gives_back(n: torch.fx.Node) -> bool:
    """Whether a call returns its very argument: dropout in eval mode, a cast to the same dtype."""
    if n.target is torch.ops.aten.dropout.default:
        return n.args[2] is False
    same = n.target is torch.ops.aten.to.dtype and len(n.args) == 2 and "copy" not in n.kwargs
    return same and n.args[0].meta["val"].dtype == n.meta["val"].dtype


def _check_alone(
    n: torch.fx.Node, changed: str, graph: Sequence[torch.fx.Node], renamed: Mapping[str, str]
) -> None:
    """Refuse a change in place that is read later through another name, such as that of a view."""
    place = {other: i for i, other in enumerate(graph)}
    for other in graph[: place[n]]:
        if renamed.get(other.name, other.name) == changed or _memory(other) != _memory(n):
            continue
        if any(place[user] > place[n] for user in other.users):
            raise StructureError(
                f"Operator {n.target} ({n.name}) changes {other.name} as well, which shares its "
                "memory and is read later; use one that is not in place."
            )


def _memory(n: torch.fx.Node) -> int | None:
    value = n.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _tied(state: Mapping[str, Tensor], traced: set[str]) -> dict[str, str]:
    owner = {id(state[key]): key for key in state if key in traced}
    return {key: owner[id(t)] for key, t in state.items() if id(t) in owner and key not in traced}


def _op_name(target: Any) -> str:
    name = str(target)
    if not name.startswith("aten."):
        raise StructureError(
            f"Operator {name} is not one of torch's own (aten); rewrite that part of forward() "
            "with tensor methods."
        )
    return name.removeprefix("aten.")


def _checked_op(op: str) -> str:
    schema = operator(op)._schema
    if schema.is_mutable:
        raise ValueError(f"operator {op!r} changes its inputs in place")
    if not any("Tensor" in str(argument.type) for argument in schema.arguments):
        raise ValueError(f"operator {op!r} reads no tensor")  # but makes one, or reads a file
    return op


def _plain(value: Any, renamed: Mapping[str, str]) -> Any:
    if isinstance(value, torch.fx.Node):
        return Ref(renamed.get(value.name, value.name))
    if isinstance(value, list | tuple):
        return tuple(_plain(v, renamed) for v in value)
    if isinstance(value, Mapping):
        return {k: _plain(v, renamed) for k, v in value.items()}
    return value


def _names_in(value: Any) -> list[str]:
    if isinstance(value, Ref):
        return [value.name]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [name for v in value for name in _names_in(v)]
    return []


def _encode(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": "cpu"}
    if isinstance(value, Mapping):
        return {"map": {k: _encode(v) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise StructureError(f"An operator is called with {value!r}, which a program cannot hold.")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if not isinstance(value, Mapping):
        return value
    if "ref" in value:
        return Ref(value["ref"])
    if "dtype" in value:
        return _DTYPES[value["dtype"]]
    if "device" in value:
        return torch.device(value["device"])
    return {k: _decode(v) for k, v in value["map"].items()}
