"""From a module to a ``Program``, by ``torch.export``: which line of Python ran no longer matters.

The exported graph is brought into one form: functional (``torch.export``'s own pass rewrites what
works in place), without copies, casts that change nothing and dropout, and with one name for
operators that have several.
"""

import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metamerge.errors import StructureError
from metamerge.structure.program import FACTORIES, Node, Program, Ref, operator

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""Example inputs: one tensor, several in call order, or by the names of forward()'s arguments."""

_SAME = {
    *("clone.default", "alias.default", "contiguous.default", "detach.default"),
    *("lift_fresh_copy.default", "lift.default", "lift_fresh.default"),
}
_DROPPED = {
    *("_assert_tensor_metadata.default", "_assert_scalar.default", "_assert_async.msg"),
    *("sym_constrain_range_for_size.default", "sym_constrain_range.default"),
}
_RENAMED = {"view.default": "reshape.default", "_unsafe_view.default": "reshape.default"}
_SAYS_NOTHING = {"memory_format", "layout", "pin_memory", "device", "non_blocking"}  # of values
_SYMBOLIC = {"mul", "add", "sub", "floordiv", "getitem"}


def trace(model: nn.Module, example_inputs: Inputs) -> Program:
    """Trace a network in eval mode into a ``Program``; the module is left as it was.

    Args:
        model: Any network that ``torch.export`` accepts.
        example_inputs: One input tensor, a sequence of them, or a mapping from the names of
            forward()'s arguments; batch axis first.

    Returns:
        The program. The first axis of its inputs is free where the network allows that.

    Raises:
        StructureError: If the network cannot be exported, computes with operators that are not
            torch's own, or returns no tensor.
    """
    args, kwargs = _call(example_inputs)
    given = [*args, *kwargs.values()]
    _check_devices(model, given)
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with _quiet():
            try:
                return _program(_exported(model, *_two_rows(args, kwargs), free=True), model)
            except Exception:  # a free batch is more than many networks can do
                return _program(_exported(model, args, kwargs, free=False), model)
    except StructureError:
        raise
    except Exception as error:
        raise StructureError(
            f"{type(model).__name__} cannot be traced by torch.export on inputs of shape "
            f"{[tuple(x.shape) for x in given]}: {_first_lines(error)}{_culprit(error)} Check the "
            "shape of the example inputs, and keep control flow that depends on values out of "
            "forward(). Where that cannot be, write a PermutationSpec by hand and test it with "
            "metamerge.structure.prove_module(model, example_inputs, spec)."
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training


def _call(example_inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if not isinstance(example_inputs, Sequence):
        raise StructureError(_expected(example_inputs))
    return tuple(example_inputs), {}


def _expected(found: Any) -> str:
    return (
        f"example_inputs: got {type(found).__name__}, expected tensors: one, a sequence, or a "
        "mapping from the names of forward()'s arguments."
    )


def _two_rows(
    args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Two rows of inputs that share a batch axis: the program is the same for every batch.

    A batch of one would be taken for a batch that is always one.

    Returns:
        Positional and keyword inputs.
    """
    given = [x for x in (*args, *kwargs.values()) if x.ndim]
    if len({x.shape[0] for x in given}) != 1 or given[0].shape[0] == 0:
        return args, kwargs

    def cut(x: Tensor) -> Tensor:
        return x[:2] if len(x) > 1 else x.repeat(2, *[1] * (x.ndim - 1))

    return tuple(cut(x) if x.ndim else x for x in args), {
        name: cut(x) if x.ndim else x for name, x in kwargs.items()
    }


def _check_devices(model: nn.Module, given: Sequence[Tensor]) -> None:
    for x in given:
        if not isinstance(x, Tensor):
            raise StructureError(_expected(x))
    homes = {str(t.device) for t in (*model.parameters(), *model.buffers())}
    strangers = {str(x.device) for x in given} - homes
    if homes and strangers:
        raise StructureError(
            f"example_inputs are on {sorted(strangers)}, the weights of {type(model).__name__} on "
            f"{sorted(homes)}. Move one to the other with .to()."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No gradients, no fused attention that hides its operators, no pages of torch's own log.

    What torch.export has to say is in the error that it raises.
    """
    fast, logged = torch.backends.mha.get_fastpath_enabled(), logging.root.manager.disable
    torch.backends.mha.set_fastpath_enabled(False)
    logging.disable(logging.CRITICAL)
    try:
        with torch.no_grad(), warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            with redirect_stdout(StringIO()):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        logging.disable(logged)


def _exported(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], *, free: bool
) -> torch.export.ExportedProgram:
    shapes = torch.export.ShapesCollection()
    for x in (*args, *kwargs.values()) if free else ():
        if x.ndim:
            shapes[x] = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes if free else None)
    _check_dropout(exported.graph)
    return exported.run_decompositions({})  # decomposes nothing, makes everything functional


def _check_dropout(graph: torch.fx.Graph) -> None:
    """Refuse what torch.export gets wrong: in eval mode dropout gives back its very input."""
    for n in graph.nodes:
        if str(n.target) not in {"aten.dropout.default", "aten.feature_dropout.default"}:
            continue
        changed = [user for user in n.users if "_." in str(user.target)]  # add_.Tensor
        if changed and len(n.args[0].users) > 1:
            raise StructureError(
                f"Operator {changed[0].target} ({changed[0].name}) changes what dropout gives "
                "back, which in eval mode is its input, and that is read again. Use an operator "
                "that is not in place."
            )


def _first_lines(error: Exception) -> str:
    """What the error says, without the pages that torch.export adds."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return " ".join(lines[:2]) or repr(error)


def _culprit(error: Exception) -> str:
    """The last line of the user's own code that ran before the error."""
    torch_home = str(Path(torch.__file__).parent)
    here = str(Path(__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_home, here, "<"))
    ]
    if not frames:
        return "."
    last = frames[-1]
    return f", in {last.filename}, line {last.lineno}: {last.line!r}."


def _program(exported: torch.export.ExportedProgram, model: nn.Module) -> Program:
    signature = exported.graph_signature
    state = model.state_dict(keep_vars=True)
    graph = list(exported.graph.nodes)
    read = {n.name for n in graph if n.op == "placeholder" and n.users}
    given = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    used = {value: key for value, key in given.items() if value in read}
    parameters = {value: key for value, key in used.items() if key in state}
    constants = {value: _constant(exported, key) for value, key in used.items() if key not in state}
    tied = _tied(state, set(parameters.values()))
    nodes, renamed = _nodes(graph)
    sizes = _sizes(graph)
    outputs = tuple(
        dict.fromkeys(
            renamed.get(name, name)
            for name in signature.user_outputs
            if isinstance(name, str) and name in sizes
        )
    )
    if not outputs:
        raise StructureError(f"{type(model).__name__} returns no tensor.")
    inputs = tuple(name for name in signature.user_inputs if name in sizes)
    kept = {*parameters, *constants, *inputs, *(n.name for n in nodes)}
    return Program(
        parameters=parameters,
        inputs=inputs,
        nodes=nodes,
        outputs=outputs,
        sizes={name: size for name, size in sizes.items() if name in kept},
        constants=constants,
        indices={
            key: state[key].detach().cpu().clone()
            for key in parameters.values()
            if not state[key].is_floating_point()
        },
        examples=_examples(exported, inputs),
        tied=tied,
        untraced=tuple(k for k in state if k not in set(parameters.values()) and k not in tied),
    )


def _constant(exported: torch.export.ExportedProgram, key: str) -> Tensor:
    found = exported.constants.get(key, exported.state_dict.get(key))
    if not isinstance(found, Tensor):
        raise StructureError(f"The network computes with {key!r}, whose values are not to be had.")
    return found.detach().cpu().clone()


def _examples(exported: torch.export.ExportedProgram, inputs: Sequence[str]) -> dict[str, Tensor]:
    """Values of the inputs that are no floating numbers: indices and masks cannot be drawn."""
    args, kwargs = exported.example_inputs
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    return {
        name: x.detach().cpu().clone()
        for name, x in zip(inputs, given, strict=True)
        if not x.is_floating_point()
    }


def _sizes(graph: Sequence[torch.fx.Node]) -> dict[str, tuple[int, ...]]:
    values = {n.name: n.meta.get("val") for n in graph}
    for n in graph:
        if "_native_batch_norm_legit" in str(n.target):
            values[n.name] = n.meta["val"][0]
    return {
        name: tuple(map(_size, value.shape))
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def _size(size: int | torch.SymInt) -> int:
    """A size as traced, negative where it grows with the batch."""
    if isinstance(size, int):
        return size
    expression = size.node.shape_env.replace(size.node.expr)
    return int(expression) if expression.is_number else -int(size.node.hint)


def _nodes(graph: Sequence[torch.fx.Node]) -> tuple[tuple[Node, ...], dict[str, str]]:
    """The operator calls in their one form, and the new names of values that were only copied."""
    renamed: dict[str, str] = {}
    nodes = []
    for n in graph:
        if n.op != "call_function":
            continue
        name = _op_name(n)
        if name in _DROPPED:
            continue
        args, kwargs = _plain(n.args, renamed), _plain(n.kwargs, renamed)
        kwargs = {k: v for k, v in kwargs.items() if k not in _SAYS_NOTHING}
        if name in _SAME or _keeps_dtype(n, name) or _takes_norm(n, name):
            renamed[n.name] = args[0].name
            continue
        name, args, kwargs = _one_form(name, args, kwargs)
        if name in FACTORIES:
            kwargs["dtype"] = n.meta["val"].dtype
        if not name.startswith("python.") and operator(name)._schema.is_mutable:
            raise StructureError(
                f"Operator aten.{name} ({n.name}) changes its inputs in place; use a pure one."
            )
        nodes.append(Node(n.name, name, args, kwargs))
    return tuple(nodes), renamed


def _one_form(name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[str, tuple, dict[str, Any]]:
    if name == "_native_batch_norm_legit_no_training.default":
        x, weight, bias, mean, var, momentum, eps = args
        return "batch_norm.default", (x, weight, bias, mean, var, False, momentum, eps, False), {}
    if name == "_native_batch_norm_legit.no_stats":
        x, weight, bias, _, momentum, eps = args
        return "batch_norm.default", (x, weight, bias, None, None, True, momentum, eps, False), {}
    if name == "_to_copy.default":
        return "to.dtype", (args[0], kwargs["dtype"]), {}
    return _RENAMED.get(name, name), args, kwargs


def _keeps_dtype(n: torch.fx.Node, name: str) -> bool:
    casts = name in {"_to_copy.default", "to.dtype", "to.dtype_layout", "to.device"}
    return casts and n.args[0].meta["val"].dtype == n.meta["val"].dtype


def _takes_norm(n: torch.fx.Node, name: str) -> bool:
    """The first output of a batch normalisation, which in its one form has no other."""
    return name == "python.getitem" and "_native_batch_norm_legit" in str(n.args[0].target)


def _tied(state: Mapping[str, Tensor], traced: set[str]) -> dict[str, str]:
    owner = {id(state[key]): key for key in state if key in traced}
    return {key: owner[id(t)] for key, t in state.items() if id(t) in owner and key not in traced}


def _op_name(n: torch.fx.Node) -> str:
    target = n.target
    if getattr(target, "__module__", "") == "_operator" and target.__name__ in _SYMBOLIC:
        return f"python.{target.__name__}"
    name = str(target)
    if not isinstance(target, torch._ops.OpOverload):
        raise StructureError(
            f"Operator {name} ({n.name}), which reads {[a.name for a in n.all_input_nodes]}, is no "
            "operator on tensors; rewrite that part of forward() without control flow on values."
        )
    return name.removeprefix("aten.")


def _plain(value: Any, renamed: Mapping[str, str]) -> Any:
    if isinstance(value, torch.fx.Node):
        return Ref(renamed.get(value.name, value.name))
    if isinstance(value, list | tuple):
        return tuple(_plain(v, renamed) for v in value)
    if isinstance(value, Mapping):
        return {k: _plain(v, renamed) for k, v in value.items()}
    return value
