"""Optimal transport: move every member's units, layer by layer, onto the units of a reference.

Paper: Singh, Jaggi, "Model Fusion via Optimal Transport", NeurIPS 2020, arXiv:1910.05653, section 4
and algorithm 1. We differ in four ways: the reference is the medoid, so that the order of members
does not matter; units are compared by squared distances, biases, gains and shifts included; a
second pass compares them by their outgoing weights as well; and where widths differ, outgoing
weights are shared out among the places that a unit goes to, where the paper takes their mean. Units
that are split in two or joined with their like thereby leave the network the same function.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metamerge.alignment._activations import CHUNK, Moments, activations, calibration
from metamerge.alignment._elastic import Network, network_of, widths_of
from metamerge.alignment._transport import group_of, plan, transported, units_first
from metamerge.alignment.medoid import medoid
from metamerge.calibration import Batches
from metamerge.errors import ConfigError, IncompatibleWeights, StructureError
from metamerge.options import check_choice, check_count, check_number
from metamerge.registry import alignment
from metamerge.structure import Layout, PermutationSpec
from metamerge.weights import Weights, stack, widened

_COSTS = ("weights", "activations")
_STATISTICS = ("running_mean", "running_var")  # of another scale than weights: not compared
_PASSES = 2  # further ones were measured to change nothing for the better

Plans = dict[str, Tensor]
"""Group -> share of each unit of a member that goes to each unit of the reference, ``[n, n']``."""


@alignment(paper="arXiv:1910.05653", permutes=False, elastic=True)
def optimal_transport(
    weights: Sequence[Weights],
    spec: PermutationSpec,
    *,
    layout: Layout,
    batches: Batches | None = None,
    cost: str = "weights",
    hard: bool = True,
    regularisation: float = 0.05,
    reference: int | None = None,
    report: dict[str, Any] | None = None,
) -> list[Weights]:
    """Bring members of any hidden widths to the units, and the widths, of one of them.

    Args:
        weights: One state dict per member; their hidden widths may differ.
        spec: Permutation spec of the network that they are brought to.
        layout: That network.
        batches: Calibration inputs; only ``cost="activations"`` looks at them.
        cost: What units are compared by: ``weights``, or the correlation of their ``activations``.
        hard: Whether as few units as possible are mixed: with equal widths, none is, and members
            are permuted. Otherwise every unit becomes a mixture (Sinkhorn).
        regularisation: How soft that mixture is: weight of the entropy over the mean cost.
        reference: Which member the others are brought to; by default, of those that have the
            network's widths, the one that is most like the others.
        report: Takes ``reference``, ``widths`` of the members before, and per pass ``objective``,
            the cost of transport as a share of that of pairing units at random.

    Returns:
        One state dict per member, all of the reference's shapes, in the members' own dtypes.

    Raises:
        ConfigError: If an option is out of its range, or batches are missing or do not fit.
        IncompatibleWeights: If shapes differ in more than hidden widths, or no member has the
            network's widths.
        StructureError: If layers of the network cannot be followed, or units are nested in blocks.
    """
    _check(cost, hard, regularisation, reference, len(weights))
    network = network_of(layout, spec)
    widths = [widths_of(f"weights[{k}]", member, spec) for k, member in enumerate(weights)]
    chosen = _medoid(weights, widths, spec) if reference is None else reference
    _check_reference(weights, widths, chosen, spec)
    inputs = _inputs(batches, layout) if cost == "activations" else None
    solve = partial(plan, hard=hard, regularisation=float(regularisation))
    moved, shares = [], []
    for k, member in enumerate(weights):
        plans: Plans = {}
        if k != chosen:
            seen = None if inputs is None else _seen(k, member, weights[chosen], network, inputs)
            plans, share = _plans(member, weights[chosen], network, seen, solve)
            shares.append(share)
        moved.append(_moved(member, network, plans))
    if report is not None:
        report |= {"reference": chosen, "widths": widths}
        report["objective"] = [sum(step) / len(step) for step in zip(*shares, strict=True)]
    return moved


def _medoid(weights: Sequence[Weights], widths: list[dict[str, int]], spec: PermutationSpec) -> int:
    """Of the members with the network's widths, the one that is most like the others of these."""
    fitting = [k for k, own in enumerate(widths) if own == dict(spec.groups)]
    if not fitting:
        raise IncompatibleWeights(
            f"optimal_transport: no member has the network's widths {dict(spec.groups)}; they have "
            f"{widths}. Pass model=<a network of the widths of one of them>."
        )
    family = stack(widened([{key: weights[k][key] for key in spec.axes} for k in fitting]))
    return fitting[int(medoid({key: t[None] for key, t in family.items()}, spec)[0])]


def _plans(
    member: Weights,
    target: Weights,
    network: Network,
    seen: Mapping[str, Tensor] | None,
    solve: Callable[[Tensor], Tensor],
) -> tuple[Plans, list[float]]:
    """Solve for one group after the other.

    Args:
        member: The member.
        target: The reference.
        network: Their architecture.
        seen: Cost of every group where it is known from the start: it needs one pass.
        solve: Cost of a group -> plan.

    Returns:
        The plans, and per pass the share of the cost of random pairing that is left, over groups.
    """
    plans: Plans = {}
    shares = []
    for _ in range(_PASSES if seen is None else 1):
        paid = random = 0.0
        for group in network.order:
            cost = seen[group] if seen else _cost(group, member, target, network, plans)
            plans[group] = solve(cost)
            paid += float((plans[group] * cost).sum())
            random += float(cost.mean())
        shares.append(paid / random if random else 0.0)
    return plans, shares


def _cost(group: str, member: Weights, target: Weights, network: Network, plans: Plans) -> Tensor:
    """Compare units by the weights whose other axes are known by now.

    In a second pass that includes what reads the units; a weight of a wide network counts for more
    there, as it has more of them.

    Returns:
        Squared distances, ``[n, n']``.
    """
    spec = network.spec
    total = torch.zeros((), dtype=torch.float64)
    for key, axis in spec.touching(group):
        axes = spec.axes[key]
        others = {group_of(f) for a, f in enumerate(axes) if a != axis} - {None}
        reads = key in network.columns and axis == 1
        known = others <= plans.keys() and (group in plans or not reads)
        if not known or key in network.layout.program.tied or key.endswith(_STATISTICS):
            continue
        placed = transported(
            member[key].double(), axes, plans, reading=key in network.columns, keep=axis
        )
        here = units_first(placed, axis, axes[axis])
        there = units_first(target[key].double(), axis, axes[axis])
        scale = len(here) / len(there) if reads else 1.0
        total = total + _distances(scale * here, there).cpu()
    return total.expand(len(here), len(there))


def _distances(here: Tensor, there: Tensor) -> Tensor:
    """Squared distances of rows, ``[n, r]`` and ``[n', r]`` -> ``[n, n']``."""
    norms = here.square().sum(1)[:, None] + there.square().sum(1)
    return (norms - 2 * here @ there.T).clamp_min(0)


def _seen(
    index: int, member: Weights, target: Weights, network: Network, inputs: Tensor
) -> dict[str, Tensor]:
    """How badly units correlate on the same inputs: group -> ``[n, n']``, from 0 to 2."""
    layout, places = network.layout, network.places
    pair = [{key: t[None] for key, t in own.items()} for own in widened([member, target])]
    found: dict[str, Moments] = {}
    units: dict[str, int] = {}
    try:
        for some in inputs.split(CHUNK):
            runs = (activations(own, layout, some, places) for own in pair)
            for (group, here), (_, there) in zip(*runs, strict=True):
                new = Moments.of(torch.cat([here, there], -1))
                found[group] = found[group].plus(new) if group in found else new
                units[group] = here.shape[-1]
    except RuntimeError as error:
        raise StructureError(
            f"optimal_transport: weights[{index}] cannot be run at its own widths by the network "
            f"of the others: {error}. Use cost='weights'."
        ) from error
    return {g: 1 - own.correlation()[0, : units[g], units[g] :] for g, own in found.items()}


def _moved(member: Weights, network: Network, plans: Plans) -> Weights:
    """One member at the reference's widths, in new memory."""
    moved = {}
    for key, tensor in member.items():
        axes = network.spec.axes.get(key, ())
        touched = tensor.is_floating_point() and plans
        reading = key in network.columns
        placed = transported(tensor, axes, plans, reading=reading) if touched else tensor
        moved[key] = placed.clone()
    for alias, key in network.layout.program.tied.items():
        if alias in moved:
            moved[alias] = moved[key].clone()
    return moved


def _inputs(batches: Batches | None, layout: Layout) -> Tensor:
    if batches is None:
        raise ConfigError(
            "optimal_transport: cost='activations' needs batches=<calibration inputs [b, ...]>."
        )
    return calibration(batches, layout, "optimal_transport")


def _check_reference(
    weights: Sequence[Weights], widths: list[dict[str, int]], chosen: int, spec: PermutationSpec
) -> None:
    """The reference has the network's widths, and what carries no units is shaped alike in all."""
    if widths[chosen] != dict(spec.groups):
        raise IncompatibleWeights(
            f"optimal_transport: reference={chosen} has the widths {widths[chosen]}, the network "
            f"{dict(spec.groups)}. Choose a member of the network's widths."
        )
    for k, member in enumerate(weights):
        for key, tensor in member.items():
            shape, expected = tuple(tensor.shape), tuple(weights[chosen][key].shape)
            if key not in spec.axes and shape != expected:
                raise IncompatibleWeights(
                    f"weights[{k}]: {key!r} has shape {shape}, weights[{chosen}] has {expected}, "
                    "and nothing says what units it carries. Merge networks that differ in "
                    "nothing but hidden widths."
                )


def _check(cost: Any, hard: Any, regularisation: Any, reference: Any, members: int) -> None:
    check_choice("optimal_transport", "cost", cost, _COSTS)
    check_choice("optimal_transport", "hard", hard, (False, True))
    check_number("optimal_transport", "regularisation", regularisation, "(0, inf)")
    last, medoid = "that of the last member", "for the medoid"
    check_count(
        "optimal_transport", "reference", reference, 0, members - 1, limit=last, none=medoid
    )
