"""PLeaS: permutations and least squares; units that match badly can stay apart in a wider network.

Paper: Nasery, Hayase, Koh, Oh, "PLeaS - Merging Models with Permutations and Least Squares", CVPR
2025, arXiv:2407.02447. A layer is fitted to map the mean of what the aligned members read to the
mean of what they put out; unlike ``correct="refit"``, which fits a layer to what the fused layers
before it give, layers do not depend on each other. We differ in three ways: any number of members;
only a correction to the mean of the weights is fitted, by ridge regression; and widths follow from
how badly units match, by one rule for all networks, instead of from an optimised proxy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metamerge.calibration import Batches
from metamerge.methods._combination import combine, restore
from metamerge.methods._least_squares import fitted_layers
from metamerge.methods._slots import Grouping, grouped
from metamerge.methods._units import OUTPUT_TARGETS, prepared, ranked, unit_activations
from metamerge.options import check_choice, check_number
from metamerge.registry import merge_method
from metamerge.structure import Layout
from metamerge.weights import Weights

_DISTRIBUTIONS = ("uniform", "greedy")


@merge_method(paper="arXiv:2407.02447")
def pleas(
    weights: Sequence[Weights],
    *,
    layout: Layout,
    batches: Batches,
    report: dict[str, Any] | None = None,
    budget: float = 1.0,
    distribution: str = "uniform",
    outputs: str = "mean",
    ridge: float = 1e-2,
) -> Weights:
    """Merge aligned members by least squares, in their own width or a larger one.

    With a budget above 1 the units that match worst are not merged: every member's own unit is
    there, and reads only what is its member's. With a budget of the number of members nothing is
    merged, and the outputs are the mean of the members' outputs (but for layer and group
    normalisations, which see the units of all members). A wider network needs a module of its
    widths: build the architecture with the numbers of ``report["widths"]``, which are also the
    lengths of the first axes of its weights, and load the fused weights into it. Grouped
    convolutions over single channels need as many groups, layer normalisations as many features.

    Args:
        weights: One state dict per member, of one architecture, aligned.
        layout: That architecture.
        batches: Calibration inputs; labels are not used.
        report: Takes ``widths``, the number of units per group, and ``gap``, the share of the
            units' power that merging them takes away, per group.
        budget: Width of the fused network relative to the members', from 1 to their number.
        distribution: Which units stay apart: ``uniform``, the worst of every group in the same
            share, or ``greedy``, the worst of all groups.
        outputs: What the outputs are fitted to: ``mean`` of the members' outputs, or ``votes``, for
            logits: the logarithm of their mean probabilities.
        ridge: Pull towards the mean of the weights, relative to the mean square of what a layer
            reads; above 0.

    Returns:
        New state dict with the members' names and dtypes; its shapes are theirs at a budget of 1.

    Raises:
        ConfigError: If an option is out of its range, or the batches do not fit the network.
        StructureError: If the network has layers or axes that cannot be fused unit by unit.
    """
    check_number("pleas", "budget", budget, f"[1, {len(weights)}]")
    check_choice("pleas", "distribution", distribution, _DISTRIBUTIONS)
    check_choice("pleas", "outputs", outputs, OUTPUT_TARGETS)
    check_number("pleas", "ridge", ridge, "(0, inf)")
    if len(weights) == 1:
        return combine(weights, [1.0])
    layout.check_plain()
    stacked, layout, inputs = prepared(weights, layout, batches)
    gaps = {
        group: _gaps(seen)
        for group, seen in unit_activations(stacked, layout, inputs, read=True).items()
    }
    apart = _apart(gaps, (budget - 1) / (len(weights) - 1), distribution)
    order = ranked(stacked, layout)
    groupings = {group: _slots(chosen, order) for group, chosen in apart.items()}
    if report is not None:
        report["widths"] = {group: own.width for group, own in groupings.items()}
        report["gap"] = {g: float(gap[~apart[g]].sum()) for g, gap in gaps.items()}
    fused = fitted_layers(stacked, layout, inputs, groupings, outputs=outputs, ridge=ridge)
    return restore(fused, weights)


def _gaps(seen: Tensor) -> Tensor:
    """How far each unit's members are from their mean, relative to the power of all units.

    Args:
        seen: Activations of aligned units, ``[m, n, r]``.

    Returns:
        ``[n]``; their sum is 0 for members that do the same, and 1 at most.
    """
    seen = seen.double()
    gap = (seen - seen.mean(0)).square().sum((0, 2))
    return (gap / seen.square().sum().clamp_min(1e-300)).cpu()


def _apart(gaps: Mapping[str, Tensor], share: float, distribution: str) -> dict[str, Tensor]:
    """Which units stay apart: the worst of each group, or of all, ``[n]`` of booleans."""
    if distribution == "uniform":
        return {group: _worst(gap, share) for group, gap in gaps.items()}
    chosen = _worst(torch.cat(list(gaps.values())), share)
    parts = chosen.split([len(gap) for gap in gaps.values()])
    return dict(zip(gaps, parts, strict=True))


def _worst(gap: Tensor, share: float) -> Tensor:
    chosen = torch.zeros(len(gap), dtype=torch.bool)
    chosen[gap.argsort(descending=True, stable=True)[: int(share * len(gap) + 1e-9)]] = True
    return chosen


def _slots(apart: Tensor, order: Sequence[int]) -> Grouping:
    """Slots of a group: those of the first member, then the units of others that stay apart.

    Args:
        apart: Which units are not merged, ``[n]``.
        order: The members; their own units come in this order.

    Returns:
        The grouping.
    """
    width, more = len(apart), int(apart.sum())
    slot = torch.arange(width).repeat(len(order), 1)
    for place, member in enumerate(order[1:]):
        slot[member, apart] = width + place * more + torch.arange(more)
    return grouped(slot, width + more * (len(order) - 1))
