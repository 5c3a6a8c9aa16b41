"""Unit clusters: cluster the units of all members, and fit a network that computes the centres.

Paper: "Model Fusion via Neuron Interpolation", 2025, arXiv:2507.00037, in the variants K-means and
Hungarian with linear levels: what a fused unit is to compute is the weighted centre of a cluster of
members' units, and a layer is fitted to it by least squares on what the fused layers before it
give. We differ in three ways: levels are the groups of the network and found, not written by hand;
a layer's starting point is the weighted mean of the units in its clusters, and only its correction
is fitted, by ridge regression, so that a few inputs do; and K-means starts at each member's units
instead of at random ones, so nothing is drawn and the order of members does not matter.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from metamerge.calibration import Batches
from metamerge.corrections.refit import Target, Targets, construct, observe
from metamerge.methods._combination import combine, restore
from metamerge.methods._slots import Grouping, assemble, entries, grouped, mixed
from metamerge.methods._units import OUTPUT_TARGETS, prepared, ranked, unit_activations, voted
from metamerge.options import check_choice, check_number
from metamerge.registry import merge_method
from metamerge.structure import OUTPUTS, Layer, Layout
from metamerge.weights import Weights

_ALGORITHMS = ("kmeans", "hungarian")
_IMPORTANCE = ("uniform", "weights")
_SWEEPS = 100
_ROUNDING = 1e-9  # relative to the units' power: what costs of equal clusters may differ by


@merge_method(paper="arXiv:2507.00037", align=None)
def unit_clusters(
    weights: Sequence[Weights],
    *,
    layout: Layout,
    batches: Batches,
    report: dict[str, Any] | None = None,
    algorithm: str = "kmeans",
    importance: str = "uniform",
    outputs: str = "mean",
    ridge: float = 1e-2,
) -> Weights:
    """Fit a network whose units compute the centres of clusters of the members' units.

    Members need no alignment. Units are compared by their pre-activations (behind a batch
    normalisation, where there is one).

    Args:
        weights: One state dict per member, of one architecture.
        layout: That architecture.
        batches: Calibration inputs; labels are not used.
        report: Takes ``spread``, the share of the units' power that is not in the centres, per
            group, and ``sizes``, the least and the largest cluster.
        algorithm: ``kmeans`` lets clusters hold any number of units of any members, ``hungarian``
            one unit of every member.
        importance: What units count in the centres: ``uniform``, or ``weights``, the norm of what
            reads them, relative to the mean of their member.
        outputs: What the outputs are fitted to: ``mean`` of the members' outputs, or ``votes``, for
            logits: the logarithm of their mean probabilities. Worth a try where members have seen
            different classes, and their mean logits do worse than their votes.
        ridge: Pull towards the mean of the clustered units, relative to the mean square of the
            inputs of a layer; above 0.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If an option is out of its range, or the batches do not fit the network.
        StructureError: If the network has layers or axes that cannot be fused unit by unit.
    """
    check_choice("unit_clusters", "algorithm", algorithm, _ALGORITHMS)
    check_choice("unit_clusters", "importance", importance, _IMPORTANCE)
    check_choice("unit_clusters", "outputs", outputs, OUTPUT_TARGETS)
    check_number("unit_clusters", "ridge", ridge, "(0, inf)")
    if len(weights) == 1:
        return combine(weights, [1.0])
    layout.check_plain()
    stacked, layout, inputs = prepared(weights, layout, batches)
    made = unit_activations(stacked, layout, inputs, read=False)
    order = ranked(stacked, layout)
    groupings, told = {}, {"spread": {}, "sizes": {}}
    for group, seen in made.items():
        counts = torch.ones(seen.shape[:2], dtype=torch.float64)
        if importance == "weights":
            counts = _read_norms(stacked, layout, group)
        groupings[group] = found = _clustered(seen, counts, algorithm, order)
        told["spread"][group] = _spread(seen, counts, found)
        sizes = found.slot.flatten().bincount()
        told["sizes"][group] = [int(sizes.min()), int(sizes.max())]
    if report is not None:
        report.update(told)
    targets = _targets(layout, groupings, outputs)
    start = {key: t[None] for key, t in assemble(stacked, layout, groupings).items()}
    observed = observe({key: t[None] for key, t in stacked.items()}, layout, inputs)
    fitted = construct(start, observed, layout, inputs, targets=targets, ridge=ridge)
    return restore({key: tensor[0] for key, tensor in fitted.items()}, weights)


def _read_norms(stacked: Weights, layout: Layout, group: str) -> Tensor:
    """Norm of all weights that read a unit, relative to its member's mean: ``[m, n]``."""
    members = len(next(iter(stacked.values())))
    power = torch.zeros(members, layout.spec.groups[group], dtype=torch.float64)
    for layer in layout.consumers(group):
        weight = layout.matrix(layer, stacked[layer.weight].detach())  # [m, out, n, taps]
        power = power + weight.double().square().sum((1, 3)).cpu()
    norm = power.sqrt()
    return norm / norm.mean(1, keepdim=True).clamp_min(1e-300)


def _clustered(seen: Tensor, counts: Tensor, algorithm: str, order: list[int]) -> Grouping:
    """Clusters of the units of one group, numbered after one member's units.

    Args:
        seen: Pre-activations ``[m, n, r]``.
        counts: Importance of every unit ``[m, n]``.
        algorithm: ``kmeans`` or ``hungarian``.
        order: The members; the units of the first are the first centres of ``hungarian``, and of
            equally good results of K-means that which started at an earlier member's is taken.

    Returns:
        The grouping.
    """
    members, width = seen.shape[:2]
    flat = seen.flatten(0, 1).double()
    gram = (flat @ flat.mT).cpu()  # centres are mixtures of units, so this is all that is needed
    if algorithm == "hungarian":
        return _hungarian(gram, counts, _start(members, width, order[0]))
    tried = [_kmeans(gram, counts, _start(members, width, k)) for k in order]
    costs = torch.stack([_cost(gram, counts, found) for found in tried])
    rounding = _ROUNDING * (gram.diagonal() * counts.flatten()).sum()
    return tried[int((costs <= costs.min() + rounding).nonzero()[0])]


def _start(members: int, width: int, first: int) -> Grouping:
    """Centres at one member's units; the units of all others count nothing yet."""
    only = torch.zeros(members, width, dtype=torch.float64)
    only[first] = 1.0
    return grouped(torch.arange(width).repeat(members, 1), width, only)


def _distances(gram: Tensor, grouping: Grouping) -> Tensor:
    """Squared distance of every unit from every centre, ``[u, width]``, out of inner products."""
    slot, share = grouping.slot.flatten(), grouping.share.flatten()
    empty = gram.new_zeros(len(gram), grouping.width)
    cross = empty.index_add(1, slot, gram * share)  # [u, width], unit by centre
    centre = gram.new_zeros(grouping.width)
    centre = centre.index_add(0, slot, share * cross[torch.arange(len(slot)), slot])
    return (gram.diagonal()[:, None] - 2 * cross + centre).clamp_min(0)


def _kmeans(gram: Tensor, counts: Tensor, grouping: Grouping) -> Grouping:
    """Lloyd's algorithm, with weights."""
    for _ in range(_SWEEPS):
        distance = _distances(gram, grouping)
        slot = _filled(distance.argmin(1), distance, counts.flatten(), grouping.width)
        slot = slot.reshape(counts.shape)
        if torch.equal(slot, grouping.slot) and bool((grouping.share > 0).all()):
            break
        grouping = grouped(slot, grouping.width, counts)
    return grouping


def _filled(slot: Tensor, distance: Tensor, counts: Tensor, width: int) -> Tensor:
    """Give every empty cluster the unit that is furthest from its centre, of those with company."""
    sizes = slot.bincount(minlength=width)
    far = distance[torch.arange(len(slot)), slot] * counts
    for empty in (sizes == 0).nonzero().flatten().tolist():
        unit = int(torch.where(sizes[slot] > 1, far, -1.0).argmax())
        sizes[slot[unit]] -= 1
        slot[unit], sizes[empty], far[unit] = empty, 1, 0.0
    return slot


def _hungarian(gram: Tensor, counts: Tensor, grouping: Grouping) -> Grouping:
    """Assign the units of every member to the centres one by one, until none moves."""
    for _ in range(_SWEEPS):
        distance = _distances(gram, grouping).unflatten(0, counts.shape)  # [m, n, width]
        cost = (distance * counts[..., None]).numpy()
        slot = torch.stack([torch.from_numpy(linear_sum_assignment(c)[1]) for c in cost])
        if torch.equal(slot, grouping.slot) and bool((grouping.share > 0).all()):
            break
        grouping = grouped(slot, grouping.width, counts)
    return grouping


def _cost(gram: Tensor, counts: Tensor, grouping: Grouping) -> Tensor:
    own = _distances(gram, grouping).gather(1, grouping.slot.flatten()[:, None])[:, 0]
    return (own * counts.flatten()).sum()


def _spread(seen: Tensor, counts: Tensor, grouping: Grouping) -> float:
    flat = seen.flatten(0, 1).double()
    gram = (flat @ flat.mT).cpu()
    power = (gram.diagonal() * counts.flatten()).sum()
    return float(_cost(gram, counts, grouping) / power.clamp_min(1e-300))


def _targets(layout: Layout, groupings: Mapping[str, Grouping], outputs: str) -> Targets:
    """Targets of a layer's units: the weighted centres of their clusters."""

    def target(layer: Layer, observed: Tensor) -> Target:
        if layer.target == OUTPUTS and outputs == "votes":
            return Target(voted(observed[0])[None], 1.0)
        at = entries(layout.spec, layer.weight, 0, groupings)
        return Target(mixed(observed[0], 2, at)[None], 1.0)  # [1, m, r, o] -> [1, r, o]

    return target
