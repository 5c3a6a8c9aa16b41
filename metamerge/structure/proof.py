"""The proof of a permutation spec: permuted networks compute what the network computes.

The network runs once in float64 on random weights, and beside it a *lane* for every group alone,
for all groups at once and for every change of scale. A lane holds only the values that differ from
the network's own: it opens where a permuted weight is first read and ends where its units were
summed over, so that proving fifty groups costs a few passes rather than fifty. Weights are drawn
when an operator reads them and dropped after it.

A wrong claim must not fade away on its way through many contracting layers. As long as a claim is
right, what a lane holds is the network's own value in another order; where it is not, the lane has
*strayed*, and a strayed lane whose difference then shrinks step by step is a failure as well.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metamerge.errors import StructureError
from metamerge.structure.draws import NORMS, Drawn, on_batch_statistics, random_inputs
from metamerge.structure.lockstep import Execution
from metamerge.structure.program import Node, Program
from metamerge.structure.spec import PermutationSpec, Scaling
from metamerge.structure.tracing import Inputs

PROOF_TOLERANCE = 1e-9  # relative, in float64: sums in another order differ by 1e-13 or so
_MEETS = 1e-11  # relative: a lane whose value is that close to the network's own has ended
_FADES = 1e-6  # relative: nothing but a wrong claim gets from above to below this by itself
_ORDER = 1e-7  # relative: sums over the same numbers in another order differ by less
_SAMPLE = 4096  # entries that say how large the others are
_ALL = "all groups at once"


@dataclass(frozen=True)
class Failure:
    """A group, or a change of its scale, that changes the outputs: ``error`` is relative."""

    group: str | None
    what: str
    error: float
    scaling: Scaling | None = None


def prove(program: Program, spec: PermutationSpec, *, seed: int = 0) -> None:
    """Check that permuting any group, and all at once, leaves the outputs as they are.

    Random weights in float64 and a relative tolerance of 1e-9 leave no room for luck. The weights
    are drawn twice, the second time positive, so that no ReLU hides a narrow layer; alone, a group
    is permuted in one cycle, so that no unit stays in place. Networks with batch normalisation are
    proved in training mode (statistics of the batch) as well, and changes of scale like groups.

    Args:
        program: The traced network.
        spec: The claim to be tested; one from ``discover`` or a user's own.
        seed: Seed of weights, inputs and permutations.

    Raises:
        IncompatibleWeights: If the spec is one of another network.
        StructureError: If a group fails; the message names it, every tensor that it touches and the
            operators that read these.
    """
    shapes = {
        key: torch.empty(program.shape(v), device="meta") for v, key in program.parameters.items()
    }
    shapes |= {alias: shapes[key] for alias, key in program.tied.items()}
    spec.check()
    spec.check_weights("The traced network", shapes)
    failure = find_failure(program, spec, seed=seed)
    if failure is not None:
        raise StructureError(refusal(program, spec, failure))


def refusal(program: Program, spec: PermutationSpec, failure: Failure) -> str:
    """The message that says which group fails, what it touches and what reads that."""
    groups = [failure.group] if failure.group else list(spec.groups)
    touched = [place for group in groups for place in spec.touching(group)]
    return (
        f"The permutation spec is wrong: {failure.what} changes the output by "
        f"{failure.error:.1e} (relative), expected below {PROOF_TOLERANCE:.0e}. It touches "
        f"{touched}, read by {_readers(program, {key for key, _ in touched})}."
    )


def find_failure(program: Program, spec: PermutationSpec, *, seed: int = 0) -> Failure | None:
    """The first group that fails the proof, or None.

    Args:
        program: The traced network.
        spec: The claim.
        seed: Seed of weights, inputs and permutations.

    Returns:
        What fails, groups alone before all at once.
    """
    exact = program.in_float64()
    trials = [(exact, False), (exact, True)]
    if any(node.op in NORMS for node in exact.nodes):
        trials.append((on_batch_statistics(exact), False))
    for trial, (variant, positive) in enumerate(trials):
        generator = torch.Generator().manual_seed(1000 * trial + seed)
        drawn = Drawn(variant, seed + trial, positive=positive)
        lanes = list(_lanes(spec, drawn, generator))
        failures = _run(variant, drawn, lanes, random_inputs(variant, generator))
        if failures:
            return failures[0]
    return None


def prove_module(model: nn.Module, example_inputs: Inputs, spec: PermutationSpec) -> None:
    """``prove`` for a network that cannot be traced: a spec that was written by hand is tested.

    Args:
        model: The network; it runs as it is, in eval mode, on copies of its own weights with noise.
        example_inputs: One input tensor, a sequence of them, or a mapping from argument names.
        spec: The claim.

    Raises:
        IncompatibleWeights: If the spec is one of another network.
        StructureError: If a group fails, or the network is in training mode.
    """
    if model.training:
        raise StructureError(
            f"{type(model).__name__} is in training mode, where dropout and batch statistics make "
            "outputs random. Call model.eval() first."
        )
    spec.check()
    spec.check_weights(type(model).__name__, model.state_dict())
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: t.double() + 0.1 * torch.rand(t.shape, generator=generator, dtype=torch.float64)
        if t.is_floating_point()
        else t
        for key, t in model.state_dict().items()
    }
    args, kwargs = _exact_call(example_inputs)
    with torch.no_grad():
        reference = _tensors(functional_call(model, weights, args, kwargs))
        for group in (*spec.groups, None):
            perm = _alone(spec, group, generator) if group else spec.random(generator)
            moved = functional_call(model, spec.permute(weights, perm), args, kwargs)
            error = max(map(_gap, _tensors(moved), reference), default=0.0)
            if not error < PROOF_TOLERANCE:
                raise StructureError(
                    f"The permutation spec is wrong: permuting {group or _ALL} changes the output "
                    f"by {error:.1e} (relative), expected below {PROOF_TOLERANCE:.0e}. It touches "
                    f"{spec.touching(group) if group else list(spec.axes)}."
                )


class _Changed(Mapping[str, Tensor]):
    """Weights of a lane: drawn ones with some units moved or scaled."""

    def __init__(self, drawn: Drawn, touched: set[str], change: Any) -> None:
        self.drawn = drawn
        self.touched = touched
        self.change = change

    def __iter__(self) -> Iterator[str]:
        return iter(self.drawn)

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, key: str) -> Tensor:
        tensor = self.drawn[key]
        return self.change(key, tensor) if key in self.touched else tensor


@dataclass
class _Lane:
    """A changed network: only values that differ from the network's own are held."""

    group: str | None
    what: str
    weights: _Changed
    scaling: Scaling | None = None
    values: dict[str, Any] = field(default_factory=dict)
    strayed: float = 0.0  # largest difference where the value was not the network's in other order
    faded: bool = False


def _lanes(spec: PermutationSpec, drawn: Drawn, generator: torch.Generator) -> Iterator[_Lane]:
    keys = set(drawn)

    def moved(perm: dict[str, Tensor]) -> Any:
        return lambda key, tensor: spec.permute_tensor(key, tensor, perm)

    for group in spec.groups:
        touched = {key for key, _ in spec.touching(group)} & keys
        change = moved(_alone(spec, group, generator))
        yield _Lane(group, f"permuting {group}", _Changed(drawn, touched, change))
    if len(spec.groups) > 1:
        change = moved(spec.random(generator))
        yield _Lane(None, f"permuting {_ALL}", _Changed(drawn, set(spec.axes) & keys, change))
    for scaling in spec.scalings:
        sizes = (*spec.blocks(scaling.group), spec.groups[scaling.group])
        factors = _factors(scaling.kind, sizes, generator)

        def scaled(key: str, tensor: Tensor, own: Any = (scaling, factors)) -> Tensor:
            return spec.rescale_tensor(key, tensor, *own)

        weights = _Changed(drawn, set(scaling.powers) & keys, scaled)
        what = f"{scaling.kind} scaling of {scaling.group}"
        yield _Lane(scaling.group, what, weights, scaling)


def _factors(kind: str, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    size = torch.rand(*sizes, generator=generator, dtype=torch.float64) + 0.5
    sign = torch.randint(0, 2, tuple(sizes), generator=generator).double() * 2 - 1
    return {"positive": size, "sign": sign, "real": size * sign}[kind]


def _alone(spec: PermutationSpec, group: str, generator: torch.Generator) -> dict[str, Tensor]:
    """A random permutation of one group, in one cycle per block: no unit stays where it is."""
    order = torch.rand(*spec.blocks(group), spec.groups[group], generator=generator).argsort(-1)
    return {group: torch.empty_like(order).scatter_(-1, order, order.roll(1, -1))}


def _run(
    program: Program, drawn: Drawn, lanes: Sequence[_Lane], inputs: Sequence[Tensor]
) -> list[Failure]:
    """Run the network and its lanes together; groups alone come before all at once."""
    own = Execution(program, drawn, inputs, stacked=False)
    keys = program.parameters
    for node in program.nodes:
        refs = node.refs
        value = _run_node(own, node)
        read = {keys[ref] for ref in refs if ref in keys}
        for lane in lanes:
            if lane.weights.touched & read or any(ref in lane.values for ref in refs):
                _step(program, own, lane, node, value)
        own.step(node, value)
        gone = [ref for ref in refs if program.last_use.get(ref) == node.name]
        for lane in lanes:
            for ref in gone:
                lane.values.pop(ref, None)
        drawn.kept.clear()
    reference = [own.values[name].value for name in program.outputs if name in own.values]
    for value in reference:
        if value.is_floating_point() and value.isnan().any():
            raise StructureError(
                "The proof runs the network on random weights, and on these its outputs are NaN. "
                "Test a permutation spec on the network's own weights with prove_module."
            )
    failures = []
    for lane in lanes:
        there = [lane.values.get(name) for name in program.outputs if name in own.values]
        gaps = [_gap(a.value, b) for a, b in zip(there, reference, strict=True) if a is not None]
        error = max(gaps, default=0.0)
        if lane.faded or not error < PROOF_TOLERANCE:
            error = max(error, lane.strayed)
            failures.append(Failure(lane.group, lane.what, error, lane.scaling))
    return failures


def _run_node(own: Execution, node: Node) -> Any:
    try:
        return own.peek(node)
    except (RuntimeError, NotImplementedError) as error:
        raise StructureError(
            f"Operator {node.title} does not run in float64 on the CPU, where the proof is made: "
            f"{error}. Test a permutation spec on the network itself with prove_module."
        ) from error


def _step(program: Program, own: Execution, lane: _Lane, node: Node, value: Any) -> None:
    """Run one node in a lane; the lane ends where its value is the network's own."""
    beside = Execution(program, lane.weights, (), stacked=False)
    there = {**own.values, **lane.values}
    beside.values = {ref: there[ref] for ref in node.refs if ref in there}
    moved = _run_node(beside, node)
    pairs = list(zip(_tensors(moved.value), _tensors(value.value), strict=True))
    gap = max((_gap(a, b) for a, b in pairs), default=0.0)
    if gap < _MEETS:
        return
    lane.values[node.name] = moved
    if lane.scaling is None and not all(_same_numbers(a, b) for a, b in pairs):
        lane.strayed = max(lane.strayed, gap)
    lane.faded |= lane.strayed > 0 and gap < _FADES


def _gap(moved: Tensor, reference: Tensor) -> float:
    """Largest relative distance of two entries; 0 or 1 for integers and booleans.

    Entries count relative to themselves, or to small ones among the others: in sight of the
    numbers that masks add, every other difference would be none.

    Returns:
        The distance; infinity for NaN.
    """
    if not reference.is_floating_point():
        return float(not torch.equal(moved, reference))
    if not reference.numel():
        return 0.0
    size = reference.abs()
    some = size.flatten()[:: 1 + size.numel() // _SAMPLE]
    some = some[(some > 0) & some.isfinite()]
    small = some.quantile(0.05) if len(some) else torch.ones((), dtype=size.dtype)
    gap = ((moved - reference).abs() / size.clamp_min(float(small))).masked_fill(
        moved == reference, 0.0
    )
    largest = float(gap.max())
    return largest if largest == largest else float("inf")


def _same_numbers(moved: Tensor, reference: Tensor) -> bool:
    """Whether two tensors may hold the same numbers in another order, by two sums over them."""
    if not reference.is_floating_point():
        return True
    one, other = (t / (1 + t.abs()) for t in (moved, reference))  # masks count 1
    one, other = (t.nan_to_num(1.0) for t in (one, other))
    close = _ORDER * other.abs().sum() + 1e-300
    sums = bool((one.sum() - other.sum()).abs() <= close)
    return sums and bool((one.square().sum() - other.square().sum()).abs() <= close)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [t for v in value for t in _tensors(v)]
    return []


def _exact_call(example_inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    def exact(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    if isinstance(example_inputs, Tensor):
        return (exact(example_inputs),), {}
    if isinstance(example_inputs, Mapping):
        return (), {name: exact(x) for name, x in example_inputs.items()}
    return tuple(exact(x) for x in example_inputs), {}


def _readers(program: Program, keys: set[str]) -> list[str]:
    """Operators that read a tensor, for messages."""
    values = {value for value, key in program.parameters.items() if key in keys}
    return [f"{node.op} ({node.name})" for node in program.nodes if values & {*node.refs}][:8]
