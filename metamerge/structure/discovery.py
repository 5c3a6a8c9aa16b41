"""Structure discovery: follow every axis through the traced operators, then prove the result.

The proof permutes units of random weights and compares outputs; what fails it is refused.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metamerge.errors import StructureError
from metamerge.structure.axes import BATCH, Axes
from metamerge.structure.lockstep import run
from metamerge.structure.operators import RULES
from metamerge.structure.program import Program, trace
from metamerge.structure.spec import Factor, PermutationSpec
from metamerge.weights import Weights

PROOF_TOLERANCE = 1e-9  # relative, in float64: sums in another order differ by 1e-13 or so


def discover(model: nn.Module, example_inputs: Sequence[Tensor] | Tensor) -> PermutationSpec:
    """Find which axes of a network's tensors carry permutable units, and prove it.

    Args:
        model: Any network made of the operators in ``structure.operators.RULES``.
        example_inputs: One input tensor, or a sequence of them, batch axis first.

    Returns:
        The permutation spec.

    Raises:
        StructureError: If the network cannot be traced, an operator has no rule, or the proof
            fails.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> print(discover(net, torch.zeros(2, 4)))
        PermutationSpec: 1 groups, 8 free units
          0 (8 units): 0.weight[0], 0.bias[0], 2.weight[1]
    """
    return discover_program(trace(model, example_inputs))


def discover_program(program: Program) -> PermutationSpec:
    """``discover`` for a network that is traced already; the proof runs on random weights.

    Args:
        program: The traced network.

    Returns:
        The permutation spec.

    Raises:
        StructureError: If an operator has no rule, or the proof fails.
    """
    spec = _spec_of(program, _walk(program))
    prove(program, spec)
    return spec


def prove(program: Program, spec: PermutationSpec, *, seed: int = 0) -> None:
    """Check that permuting any group, and all at once, leaves the outputs as they are.

    Random weights in float64 and a relative tolerance of 1e-9 leave no room for luck. The weights
    are drawn twice, the second time positive, so that no ReLU hides a narrow layer; alone, a group
    is permuted in one cycle, so that no unit stays in place.

    Args:
        program: The traced network.
        spec: The claim to be tested; one from ``discover`` or a user's own.
        seed: Seed of weights, inputs and permutations.

    Raises:
        IncompatibleWeights: If the spec is one of another network.
        StructureError: If a group fails; the message names it and every tensor it touches.
    """
    generator = torch.Generator().manual_seed(seed)
    for positive in (False, True):
        weights = _random_weights(program, generator, positive=positive)
        spec.check_weights("The traced network", weights)
        inputs = [_random_input(program.shapes[name], generator) for name in program.inputs]
        reference = run(program, weights, inputs)
        for group in (*spec.groups, None):
            perm = spec.random(generator)
            if group is not None:
                perm = {**spec.identity(), group: _cycle(spec.groups[group], generator)}
            moved = run(program, spec.permute(weights, perm), inputs)
            error = float((moved - reference).norm() / reference.norm().clamp_min(1e-300))
            if not error < PROOF_TOLERANCE:
                touched = spec.touching(group) if group else list(spec.axes)
                raise StructureError(
                    f"The permutation spec is wrong: permuting {group or 'all groups at once'} "
                    f"changes the output by {error:.1e} (relative), expected below "
                    f"{PROOF_TOLERANCE:.0e}. It touches {touched}."
                )


def _walk(program: Program) -> tuple[Axes, dict[str, list]]:
    axes = Axes()
    values = {}
    for name in (*program.parameters, *program.inputs):
        shape = program.shapes[name]
        values[name] = [axes.fresh(BATCH if size is None else size) for size in shape]
    for name in program.inputs:
        for axis in values[name]:
            axes.fix(axis, "inputs keep their place")
    for node in program.nodes:
        if node.name not in program.shapes:
            continue  # a size, not a tensor
        if node.op not in RULES:
            reads = [program.parameters.get(ref, ref) for ref in node.refs]
            raise StructureError(
                f"Operator aten.{node.op} ({node.name}) has no rule yet; it reads {reads}. "
                f"Operators that are followed: {', '.join(sorted(RULES))}."
            )
        values[node.name] = RULES[node.op](axes, node, values, program.shapes[node.name])
    for axis in values[program.output]:
        axes.fix(axis, "outputs keep their place")
    return axes, values


def _spec_of(program: Program, walked: tuple[Axes, dict[str, list]]) -> PermutationSpec:
    axes, values = walked
    names: dict[int, str] = {}
    factored = {}
    fixed: Counter[str] = Counter()
    for value, key in program.parameters.items():
        resolved = [axes.resolve(axis) for axis in values[value]]
        for factor in (f for axis in resolved for f in axis):
            if factor in axes.fixed:
                fixed[axes.fixed[factor]] += 1
            elif factor not in names:
                names[factor] = _unique(key.rpartition(".")[0] or key, set(names.values()))
        factored[key] = tuple(
            tuple(Factor(names.get(f), axes.sizes[f]) for f in axis) or (Factor(None, 1),)
            for axis in resolved
        )
    for alias, key in program.tied.items():
        factored[alias] = factored[key]
    groups = {name: axes.sizes[factor] for factor, name in names.items()}
    return PermutationSpec(groups, factored, dict(fixed))


def _unique(name: str, taken: set[str]) -> str:
    count = sum(other == name or other.startswith(f"{name}#") for other in taken)
    return f"{name}#{count + 1}" if count else name


def _random_weights(program: Program, generator: torch.Generator, *, positive: bool) -> Weights:
    """Normal weights; or positive ones with small biases, negative where they are subtracted."""
    weights = {}
    for value, key in program.parameters.items():
        shape = program.shapes[value]
        tensor = torch.randn(shape, generator=generator, dtype=torch.float64)
        fan_in = max(1, tensor[0].numel()) if tensor.ndim > 1 else 1
        if key.endswith("running_var"):
            weights[key] = tensor.abs() + 0.5
        elif not positive:
            weights[key] = tensor / fan_in**0.5
        elif tensor.ndim > 1:
            weights[key] = tensor.abs() / fan_in
        elif key.endswith("weight"):
            weights[key] = tensor.abs() + 0.5
        else:
            weights[key] = tensor.abs() / (-10 if key.endswith("running_mean") else 10)
    return {**weights, **{alias: weights[key] for alias, key in program.tied.items()}}


def _cycle(count: int, generator: torch.Generator) -> Tensor:
    """A random permutation in one cycle, which leaves no unit where it is."""
    order = torch.randperm(count, generator=generator)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def _random_input(shape: tuple[int | None, ...], generator: torch.Generator) -> Tensor:
    """The first half positive, the second of either sign."""
    sizes = [4 if size is None else size for size in shape]
    inputs = torch.randn(sizes, generator=generator, dtype=torch.float64)
    inputs[: sizes[0] // 2].abs_()
    return inputs
