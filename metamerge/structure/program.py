"""A network as data: the operators that ``torch.export`` saw, and named tensors; no Python behind.

The program is what every other room reads instead of a module: structure discovery walks it, the
lockstep interpreter runs it for many networks at once, and a zoo stores it as JSON so that its
checkpoints can be merged without the code that made them.
"""

import operator as python
from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from json import dumps
from math import prod
from typing import Any
from zlib import compress, decompressobj
from zlib import error as ZlibError

import torch
from torch import Tensor

from metamerge.errors import StructureError, Unreadable
from metamerge.weights import Weights

FORMAT = "metamerge-program-2"
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    )
}
_PYTHON = {f"python.{f.__name__}": f for f in (python.mul, python.add, python.sub, python.floordiv)}
_PYTHON["python.getitem"] = python.getitem
FACTORIES = {
    *("arange.default", "arange.start", "arange.start_step", "zeros.default", "ones.default"),
    *("full.default", "scalar_tensor.default", "empty.memory_format", "eye.default", "eye.m"),
}
"""Operators that make a tensor of nothing but numbers."""
_LARGEST_MADE = 2**28  # numbers that a factory in a foreign program may ask for


@dataclass(frozen=True)
class Ref:
    """The value called ``name``: a parameter, a constant, an input or the output of a node."""

    name: str


@dataclass(frozen=True)
class Node:
    """One operator call: ``op`` is its aten name, such as ``linear.default``.

    Operators from outside torch have the name of their library before that. Python's own arithmetic
    on sizes is named ``python.mul`` and so on, and ``python.getitem`` takes one of several outputs.
    """

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def refs(self) -> tuple[str, ...]:
        """Names of the values that this node reads, in order."""
        return tuple(_names_in((self.args, dict(self.kwargs))))

    @property
    def title(self) -> str:
        """Full name of the operator and its place in the graph, for messages."""
        return f"{'' if self.op.count('.') > 1 else 'aten.'}{self.op} ({self.name})"

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Every argument by the name that the operator's schema gives it, defaults filled in."""
        if self.op in _PYTHON:
            return {str(i): a for i, a in enumerate(self.args)}
        schema = operator(self.op)._schema.arguments
        given = dict(zip((a.name for a in schema), self.args, strict=False))
        left_out = {a.name: a.default_value for a in schema if a.has_default_value()}
        return {**left_out, **given, **self.kwargs}

    def argument(self, position: int, default: Any = None) -> Any:
        """Positional argument, or ``default`` where the call left it out."""
        return self.args[position] if position < len(self.args) else default


@dataclass(frozen=True, eq=False)
class Program:
    """A traced network.

    Attributes:
        parameters: Value name -> key in the state dict, for every parameter and buffer that is
            used.
        inputs: Names of the input values, in call order.
        nodes: Operator calls in execution order.
        outputs: Names of the output values; the first is the one that is judged.
        sizes: Value name -> shape as traced; an axis that grows with the batch is negative.
        constants: Value name -> tensor that is part of the network and not of its state dict.
        indices: State-dict key -> values of a buffer of integers or booleans.
        examples: Input name -> values of an input of integers or booleans, as traced.
        tied: State-dict key -> the key whose tensor it shares.
        untraced: Keys of the state dict that no operator reads (step counters, unused layers).
    """

    parameters: Mapping[str, str]
    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    sizes: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    indices: Mapping[str, Tensor] = field(default_factory=dict)
    examples: Mapping[str, Tensor] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    untraced: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        """Name of the output that is judged, the first."""
        return self.outputs[0]

    @cached_property
    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Value name -> shape; None stands for an axis that grows with the batch."""
        return {
            name: tuple(None if size < 0 else size for size in sizes)
            for name, sizes in self.sizes.items()
        }

    @cached_property
    def widest(self) -> int:
        """Numbers in the widest value that the network reads or computes, per input."""
        names = [*self.inputs, *(node.name for node in self.nodes)]
        shapes = [self.shapes[name] for name in names if name in self.shapes]
        return max(prod(size for size in shape if size) for shape in shapes)

    @cached_property
    def last_use(self) -> dict[str, str]:
        """Value name -> name of the last node that reads it (an output is never freed)."""
        uses = {ref: node.name for node in self.nodes for ref in node.refs}
        return {ref: user for ref, user in uses.items() if ref not in self.outputs}

    @cached_property
    def digest(self) -> str:
        """Hash of the program: equal for equal architectures, whatever they were traced with."""
        own = {key: part for key, part in self.to_json().items() if key != "examples"}
        return sha256(dumps(own, sort_keys=True).encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Program) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value as it was traced, batch axis included."""
        return tuple(abs(size) for size in self.sizes[name])

    def input_shape(self) -> tuple[int | None, ...]:
        """Shape of the first input, batch axis included."""
        return self.shapes[self.inputs[0]]

    def check_rows(self) -> None:
        """Refuse a network that cannot be run on batches of another size than it was traced with.

        Raises:
            StructureError: If its output has no row per row of its inputs.
        """
        if None not in self.shapes[self.output][:1]:
            raise StructureError(
                f"The network returns {self.shapes[self.output]} whatever the size of the batch; "
                "data can only be used with a forward() that returns one row per row of inputs."
            )

    def check_weights(self, name: str, weights: Weights, *, widths: bool = True) -> None:
        """Refuse weights that are not those of this network.

        Args:
            name: Where the weights came from, for the message.
            weights: State dict of one network.
            widths: Whether the lengths of axes must agree, too.

        Raises:
            StructureError: If a tensor is missing or has another shape.
        """
        for value, key in self.parameters.items():
            if key not in weights:
                raise StructureError(
                    f"{name}: tensor {key!r} is missing; the network reads "
                    f"{sorted(self.parameters.values())}. Pass the model these weights belong to."
                )
            if widths and tuple(weights[key].shape) != self.shapes[value]:
                raise StructureError(
                    f"{name}: {key!r} has shape {tuple(weights[key].shape)}, the network has "
                    f"{self.shapes[value]}. Pass the model these weights belong to."
                )

    def in_float64(self) -> "Program":
        """The same network where every cast and constant of lower precision is float64."""
        nodes = tuple(
            replace(n, args=_doubled(n.args), kwargs=_doubled(dict(n.kwargs))) for n in self.nodes
        )
        constants = {
            name: t.double() if t.is_floating_point() else t for name, t in self.constants.items()
        }
        return replace(self, nodes=nodes, constants=constants)

    def to_json(self) -> dict[str, Any]:
        """Plain types only, for ``json.dumps``."""
        return {
            "format": FORMAT,
            "parameters": dict(self.parameters),
            "inputs": list(self.inputs),
            "nodes": [
                [n.name, n.op, _encode(list(n.args)), _encode(dict(n.kwargs))] for n in self.nodes
            ],
            "outputs": list(self.outputs),
            "sizes": {name: list(sizes) for name, sizes in self.sizes.items()},
            "constants": {name: _packed(t) for name, t in self.constants.items()},
            "indices": {key: _packed(t) for key, t in self.indices.items()},
            "examples": {name: _packed(t) for name, t in self.examples.items()},
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
            _check_format(data["format"])
            nodes = tuple(
                _checked(Node(name, op, tuple(_decode(args)), _decode(kwargs)))
                for name, op, args, kwargs in data["nodes"]
            )
            return cls(
                parameters=dict(data["parameters"]),
                inputs=tuple(data["inputs"]),
                nodes=nodes,
                outputs=tuple(data["outputs"]),
                sizes={name: tuple(sizes) for name, sizes in data["sizes"].items()},
                constants={name: _unpacked(t) for name, t in data["constants"].items()},
                indices={key: _unpacked(t) for key, t in data["indices"].items()},
                examples={name: _unpacked(t) for name, t in data["examples"].items()},
                tied=dict(data["tied"]),
                untraced=tuple(data["untraced"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ZlibError) as error:
            raise Unreadable(f"This is no program written by metamerge: {error!r}.") from error


def operator(op: str) -> Any:
    """The callable of an operator name such as ``linear.default``."""
    if op in _PYTHON:
        return _PYTHON[op]
    *library, packet, overload = op.split(".")
    home = getattr(torch.ops, library[0]) if library else torch.ops.aten
    return getattr(getattr(home, packet), overload)


def _check_format(found: str) -> None:
    if found != FORMAT:
        raise ValueError(
            f"format {found!r}, expected {FORMAT!r}; another version wrote it: build the zoo, or "
            "save the checkpoint, anew"
        )


def _checked(node: Node) -> Node:
    """Nothing in a foreign program may change its inputs, read a file or fill the memory."""
    if node.op in _PYTHON:
        return node
    if node.op.count(".") != 1:
        raise ValueError(f"operator {node.op!r} is not one of torch's own")
    schema = operator(node.op)._schema
    if schema.is_mutable:
        raise ValueError(f"operator {node.op!r} changes its inputs in place")
    if _made(node) > _LARGEST_MADE:
        raise ValueError(f"operator {node.op!r} makes more than {_LARGEST_MADE} numbers")
    if node.op not in FACTORIES and not any(
        "Tensor" in str(argument.type) for argument in schema.arguments
    ):
        raise ValueError(f"operator {node.op!r} reads no tensor")  # but makes one, or reads a file
    return node


def _made(node: Node) -> float:
    """How many numbers an operator makes by the sizes that it is given, 0 without any."""
    given = node.arguments
    if node.op.startswith("arange"):
        start, end, step = (given.get(n, d) for n, d in (("start", 0), ("end", 0), ("step", 1)))
        numbers = all(isinstance(n, int | float) for n in (start, end, step)) and step
        return abs((end - start) / step) if numbers else 0
    if node.op.startswith("eye"):
        return given["n"] * given.get("m", given["n"])
    lists = [a for a in given.values() if isinstance(a, tuple) and a]
    sizes = [[s for s in a if isinstance(s, int)] for a in lists]
    return max((prod(abs(s) for s in some) for some in sizes), default=0)


def _doubled(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, tuple):
        return tuple(_doubled(v) for v in value)
    if isinstance(value, Mapping):
        return {k: _doubled(v) for k, v in value.items()}
    return value


def _names_in(value: Any) -> list[str]:
    if isinstance(value, Ref):
        return [value.name]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [name for v in value for name in _names_in(v)]
    return []


def _packed(tensor: Tensor) -> dict[str, Any]:
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "zlib": b64encode(compress(raw)).decode(),
    }


def _unpacked(data: Mapping[str, Any]) -> Tensor:
    dtype, shape = _DTYPES[data["dtype"]], tuple(int(s) for s in data["shape"])
    size = prod(shape) * dtype.itemsize
    if min(shape, default=1) < 0 or size > _LARGEST_MADE:
        raise ValueError(f"a tensor of shape {shape}")
    raw = decompressobj().decompress(b64decode(data["zlib"]), size + 1)
    if len(raw) != size:
        raise ValueError(f"a tensor of shape {shape} in {len(raw)} bytes, expected {size}")
    if not size:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).reshape(shape)


def _encode(value: Any) -> Any:
    if isinstance(value, Ref):
        return {"ref": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
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
    return {k: _decode(v) for k, v in value["map"].items()}
