"""The network that checkpoints belong to: given as a module, or carried by one of them."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from metamerge.calibration import check_fit
from metamerge.checkpoints import Checkpoint
from metamerge.errors import ConfigError, StructureError
from metamerge.structure import (
    Inputs,
    Layout,
    PermutationSpec,
    Program,
    discover_program,
    prove,
    prove_module,
    trace,
)
from metamerge.weights import Weights, strip_wrappers

Data = tuple[Tensor, Tensor | None]
"""Calibration inputs ``[b, ...]`` and their labels ``[b]``, if there are any."""

# Proved layouts, by digests of program and spec and the order in which tensors are listed.
_LAYOUTS: dict[tuple[str, ...], Layout] = {}


def carried_program(members: list[Checkpoint]) -> Program | None:
    """The first program that a checkpoint brought along."""
    carried = next((member.program for member in members if member.program), None)
    return None if carried is None else Program.from_json(carried)


@dataclass(frozen=True)
class Given:
    """All that can say what network checkpoints belong to.

    Attributes:
        members: The checkpoints that were read.
        sources: What they were read from; a module among them says what network it is.
        model: A module that the caller gave.
        data: Calibration data to trace with.
        merger: A trained merger, whose probes are inputs of its networks.
        example_inputs: What to trace a module with, before anything else.
        spec: A permutation spec of the caller's.
    """

    members: list[Checkpoint]
    sources: Sequence[Any]
    model: nn.Module | None = None
    data: Data | None = None
    merger: Any = None
    example_inputs: Inputs | None = None
    spec: PermutationSpec | None = None


def find_network(
    given: Given, named: list[tuple[str, Weights]], *, elastic: bool = False
) -> tuple[Layout, list[tuple[str, Weights]]]:
    """The weight graph of the network, and the members in its names.

    A network that cannot be traced is aligned by the caller's own spec, which is proved on inputs.

    Args:
        given: What says what network it is.
        named: Pairs of a member's name and its weights.
        elastic: Whether members may differ from the network in their widths.

    Returns:
        The layout and the pairs.

    Raises:
        ConfigError: If nothing says what network it is, or of what shape its inputs are.
        StructureError: If it cannot be followed, a member does not fit it, or the spec fails.
    """
    inputs = given.example_inputs
    if inputs is None and given.data is not None:
        inputs = given.data[0][:2]
    try:
        program = find_program(given)
    except StructureError:
        if given.spec is None or given.model is None or inputs is None:
            raise
        return _by_hand(given.model, inputs, given.spec, named[0]), named
    named = fit_members(named, program, elastic=elastic)
    if given.data is not None:
        check_fit(program, given.data[0])
    fitting = next((pair for pair in named if _fits(pair[1], program)), named[0])
    return find_layout(program, given.spec, fitting), named


def find_program(given: Given) -> Program:
    """The network: the given model, a member that is a module, or what a checkpoint carries.

    Args:
        given: What says what network it is.

    Returns:
        The traced network.

    Raises:
        ConfigError: If nothing says what network it is, or of what shape its inputs are.
    """
    model = given.model or next((s for s in given.sources if isinstance(s, nn.Module)), None)
    if model is not None and given.example_inputs is not None:
        return trace(model, given.example_inputs)
    if model is not None:
        return _traced(model, given.data, given.merger)
    carried = carried_program(given.members)
    if carried is None:
        raise ConfigError(
            "model: the checkpoints do not say what network they belong to. Pass model=<an "
            "nn.Module of their architecture>; only averages with align=None do without."
        )
    return carried


def _traced(model: nn.Module, data: Data | None, merger: Any) -> Program:
    """Trace on the batches, in a shape of a merger's probes, or as the first layer says."""
    first = next(model.parameters(), None)
    if data is not None:
        return trace(model, data[0][:2] if first is None else data[0][:2].to(first))
    shapes = getattr(getattr(merger, "config", None), "shapes", ())
    found = _readable(model, first, shapes) if first is not None else []
    if len(found) == 1:
        return found[0]
    if first is None or first.ndim != 2:
        raise ConfigError(
            "example_inputs: the shape of the model's inputs cannot be read from its first layer. "
            "Pass batches=<a few inputs [b, ...]>, or example_inputs=<a tensor, a tuple of them, "
            "or a mapping from argument names>."
        )
    return trace(model, torch.zeros(2, first.shape[1], device=first.device, dtype=first.dtype))


def _readable(model: nn.Module, first: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Program]:
    """The model traced on inputs of every shape that it can read."""
    found = []
    for shape in shapes:
        if _can_read(first, shape):
            with suppress(StructureError):
                example = torch.zeros(2, *shape, device=first.device, dtype=first.dtype)
                found.append(trace(model, example))
    return found


def _can_read(weight: Tensor, shape: Sequence[int]) -> bool:
    """Whether a first layer can be one for inputs of a shape, flattened where it is linear."""
    if weight.ndim == 2:
        return weight.shape[1] == prod(shape)
    return weight.ndim == len(shape) + 1 and weight.shape[1] == shape[0]


def _by_hand(
    model: nn.Module, inputs: Inputs, spec: PermutationSpec, member: tuple[str, Weights]
) -> Layout:
    """A layout without a program: members can be aligned by the user's spec, and averaged."""
    spec.check_weights(*member)
    prove_module(copy.deepcopy(model).eval(), inputs, spec)
    return Layout(None, spec)


def _fits(weights: Weights, program: Program) -> bool:
    shapes = {key: tuple(program.shapes[value]) for value, key in program.parameters.items()}
    return all(tuple(weights[key].shape) == shape for key, shape in shapes.items())


def fit_members(
    named: list[tuple[str, Weights]], program: Program, *, elastic: bool = False
) -> list[tuple[str, Weights]]:
    """The members in the network's names, with ties completed.

    Args:
        named: Pairs of a member's name and its weights.
        program: The network.
        elastic: Whether members may differ from it in their widths; one has to be of its own.

    Returns:
        The pairs, in new dicts.

    Raises:
        StructureError: If a tensor is missing, unknown or of another shape, or a tie is broken.
    """
    known = {*program.parameters.values(), *program.tied, *program.untraced}
    named = strip_wrappers([("the model", dict.fromkeys(known)), *named])[1:]
    own = [
        (name, _own(f"checkpoints[{index}] ({name})", weights, program, known, elastic))
        for index, (name, weights) in enumerate(named)
    ]
    if elastic and not any(_fits(weights, program) for _, weights in own):
        program.check_weights(f"checkpoints[0] ({own[0][0]})", own[0][1])
    return own


def _own(name: str, weights: Weights, program: Program, known: set[str], elastic: bool) -> Weights:
    weights = dict(weights)
    for alias, key in program.tied.items():  # a file may hold a shared tensor once, by either name
        for one, other in ((alias, key), (key, alias)):
            if one not in weights and other in weights:
                weights[one] = weights[other]
    program.check_weights(name, weights, widths=not elastic)
    unknown = sorted(set(weights) - known)
    if unknown:
        raise StructureError(
            f"{name}: the network has no tensor {unknown[0]!r} ({len(unknown)} such names); it has "
            f"{sorted(known)}. Pass the model these weights belong to."
        )
    for alias, key in program.tied.items():
        if not torch.equal(weights[alias], weights[key]):
            raise StructureError(
                f"{name}: {alias!r} and {key!r} are one tensor in the model and differ in these "
                "weights. Pass the model these weights belong to."
            )
    return weights


def find_layout(
    program: Program, spec: PermutationSpec | None, member: tuple[str, Weights]
) -> Layout:
    """The weight graph, from memory where it was proved before.

    Args:
        program: The network.
        spec: A spec of the user's, to be proved first; by default it is discovered.
        member: Name and weights of a member, to compare the spec with.

    Returns:
        The layout.

    Raises:
        StructureError: If the user's spec leaves out a tensor, or the proof fails.
    """
    key = (program.digest, spec.digest if spec else "", *program.parameters.values())
    if key not in _LAYOUTS:
        if spec is not None:
            spec.check_weights(*member)
            missing = sorted(set(program.parameters.values()) - set(spec.axes))
            if missing:
                raise StructureError(
                    f"spec: it says nothing of {missing}. Give the axes of every tensor that the "
                    "network reads; axes that stay in place have factors without a group."
                )
            prove(program, spec)
        _LAYOUTS[key] = Layout(program, spec or discover_program(program))
    return _LAYOUTS[key]
