"""Activation matching: units are permuted so that members' units fire on the same inputs.

Paper: Ainsworth, Hayase, Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries",
ICLR 2023, arXiv:2209.04836, section 3.1; with correlations, Li, Yosinski, Clune, Lipson, Hopcroft,
"Convergent Learning: Do different neural networks learn the same representations?", ICLR 2016,
arXiv:1511.07543. We differ in that any number of members is matched, each to the sum of the others,
from the most central one on, so that the order in which members are given does not matter.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from metamerge.alignment._activations import (
    CHUNK,
    Moments,
    Reading,
    activations,
    calibration,
    readings,
)
from metamerge.alignment.assignment import assign
from metamerge.calibration import Batches
from metamerge.options import check_choice, check_count
from metamerge.registry import alignment
from metamerge.structure import Layout, Permutation, PermutationSpec
from metamerge.weights import Weights

_MEASURES = ("correlation", "inner")
_ROUNDING = 1e-9  # relative: what sums of equally good permutations may differ by


@alignment(paper="arXiv:2209.04836")
def activation_matching(
    weights: Weights,
    spec: PermutationSpec,
    *,
    layout: Layout,
    batches: Batches,
    measure: str = "correlation",
    sweeps: int = 30,
    report: dict[str, Any] | None = None,
) -> Permutation:
    """Permute every member's units to bring together units with the same activations.

    What is compared are the activations that other layers read, on calibration inputs that all
    members see. Groups do not depend on each other. In each, all members are matched to the most
    central one (whose activations span most nearly what the others' do), and then one after the
    other to the sum of the rest, until nothing moves.

    Args:
        weights: Stacked members of ``f`` families, every tensor ``[f, m, ...]``.
        spec: Permutation spec of their architecture.
        layout: That architecture.
        batches: Calibration inputs; labels are not looked at.
        measure: ``correlation``, blind to scale and mean of a unit, or ``inner`` for the inner
            products of the paper, in which units with large activations count for more.
        sweeps: Upper bound on passes over all members.
        report: Takes ``objective``, the mean similarity of matched units of different members: of
            members as they were, after the first matching, and after every pass.

    Returns:
        Group -> ``[f, m, n]``; apply it with ``spec.permute``.

    Raises:
        ConfigError: If an option is out of its range, or the inputs do not fit the network.
        StructureError: If layers of the network cannot be followed, or units are nested in blocks.
    """
    check_choice("activation_matching", "measure", measure, _MEASURES)
    check_count("activation_matching", "sweeps", sweeps)
    places = readings(layout, spec, "activation_matching")
    inputs = calibration(batches, layout, "activation_matching")
    members = next(iter(weights.values())).shape[1]
    moments = _moments(weights, layout, inputs, places)
    perm, objective = {}, []
    for group in spec.groups:
        own = moments.pop(group)
        pairs = own.correlation() if measure == "correlation" else own.inner()
        similar = rearrange(pairs, "f (k i) (l j) -> f k l i j", k=members, l=members)
        found = [_match(family, sweeps) for family in similar]
        perm[group] = torch.stack([index for index, _ in found])
        objective += [steps for _, steps in found]
    if report is not None and objective:
        report["objective"] = _mean(objective)
    return perm


def _mean(objective: list[list[float]]) -> list[float]:
    """Mean over groups and families; those that were done early stay at their last value."""
    longest = max(map(len, objective))
    filled = [steps + steps[-1:] * (longest - len(steps)) for steps in objective]
    return [sum(step) / len(step) for step in zip(*filled, strict=True)]


def _moments(
    weights: Weights, layout: Layout, inputs: Tensor, places: Sequence[Reading]
) -> dict[str, Moments]:
    """Run all members on all inputs, some at a time: group -> moments of ``m * n`` units."""
    families, members = next(iter(weights.values())).shape[:2]
    flat = {key: tensor.flatten(0, 1) for key, tensor in weights.items()}
    found: dict[str, Moments] = {}
    for some in inputs.split(CHUNK):
        for group, rows in activations(flat, layout, some, places):
            side = rearrange(rows, "(f m) r n -> f r (m n)", f=families, m=members)
            new = Moments.of(side)
            found[group] = found[group].plus(new) if group in found else new
    return found


def _match(similar: Tensor, sweeps: int) -> tuple[Tensor, list[float]]:
    """Match the members of one family.

    Args:
        similar: Similarity of all units of all members, ``[m, m, n, n]``.
        sweeps: Upper bound on passes.

    Returns:
        Index ``[m, n]``, and the mean similarity of matched units at every step.
    """
    order = _most_central_first(similar)
    slots = torch.arange(similar.shape[-1])
    index = slots.repeat(len(order), 1)
    steps = [_matched(similar, index)]
    for k in order[1:]:
        index[k] = assign(similar[order[0], k])
    steps.append(_matched(similar, index))
    for _ in range(sweeps if len(order) > 2 else 0):
        for k in order:
            gain = sum(similar[other, k, index[other]] for other in order if other != k)
            found = assign(gain)
            here, there = gain[slots, index[k]].sum(), gain[slots, found].sum()
            if there - here > _ROUNDING * there.abs():
                index[k] = found
        steps.append(_matched(similar, index))
        if steps[-1] == steps[-2]:
            break
    return index, steps


def _most_central_first(similar: Tensor) -> list[int]:
    """Members by how nearly their units span the same activations as the others' units.

    The squared norm of two members' similarities over that of their own (kernel alignment) does not
    depend on the order of anyone's units.

    Returns:
        Numbers of the members.
    """
    norms = similar.square().sum((-2, -1))  # [m, m]
    own = norms.diagonal().clamp_min(1e-300).sqrt()
    return (norms / own[:, None] / own).sum(1).argsort(descending=True, stable=True).tolist()


def _matched(similar: Tensor, index: Tensor) -> float:
    """Mean similarity of units in one slot, over pairs of members; 0 for one member."""
    pairs = combinations(range(len(index)), 2)
    means = [float(similar[one, other, index[one], index[other]].mean()) for one, other in pairs]
    return sum(means) / len(means) if means else 0.0
