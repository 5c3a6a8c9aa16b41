"""ZipIt: merge the units that do the same, across members and within them, until one width is left.

Paper: Stoica, Bolya, Bjorner, Ramesh, Hearn, Hoffman, "ZipIt! Merging Models from Different Tasks
without Training", ICLR 2024, arXiv:2305.03053, section 4. We differ in four ways: any number of
members are zipped at once; the whole network is zipped, and its outputs are the mean of the
members'; units that are constant on the inputs are compared by what makes them; and slots are
numbered after one member that is chosen by content, so the order of members does not matter.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from metamerge.calibration import Batches
from metamerge.methods._combination import combine, restore
from metamerge.methods._slots import Grouping, assemble, grouped
from metamerge.methods._units import correlations, prepared, ranked, unit_activations
from metamerge.options import check_number
from metamerge.registry import merge_method
from metamerge.structure import Layout
from metamerge.weights import Weights

_TIES = 1e-6  # weight of what only decides between equal similarities


@merge_method(paper="arXiv:2305.03053", align=None)
def zipit(
    weights: Sequence[Weights],
    *,
    layout: Layout,
    batches: Batches,
    report: dict[str, Any] | None = None,
    within: float = 0.5,
) -> Weights:
    """Merge the most correlated units of all members, pair after pair, until one width is left.

    Members need no alignment. A merged unit is as similar to others as the least similar of the
    units in it (section 4.2 of the paper, with its alpha at 1).

    Args:
        weights: One state dict per member, of one architecture.
        layout: That architecture.
        batches: Calibration inputs; labels are not used.
        report: Takes ``within``, the number of merges inside members per group, and
            ``correlation``, the mean over merges of the least correlation that was accepted.
        within: Share of a member's merges that may be inside the member, from 0 to 1 (beta of the
            paper). More are made only where nothing else is left to be merged.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If ``within`` is out of its range, or the batches do not fit the network.
        StructureError: If the network has layers or axes that cannot be fused unit by unit.
    """
    check_number("zipit", "within", within, "[0, 1]")
    if len(weights) == 1:
        return combine(weights, [1.0])
    layout.check_plain()
    stacked, layout, inputs = prepared(weights, layout, batches)
    first = ranked(stacked, layout)[0]
    read = unit_activations(stacked, layout, inputs, read=True)
    made = unit_activations(stacked, layout, inputs, read=False)
    groupings, told = {}, {"within": {}, "correlation": {}}
    for group in layout.spec.groups:
        similarity = _similarity(read[group], made[group])
        cluster, inside, value = zipped(similarity, len(weights), within)
        told["within"][group], told["correlation"][group] = inside, value
        groupings[group] = _numbered(cluster, similarity, len(weights), first)
    if report is not None:
        report.update(told)
    return restore(assemble(stacked, layout, groupings), weights)


def _similarity(read: Tensor, made: Tensor) -> Tensor:
    """Correlations where units are read; of those that are constant there, where they are made."""
    similarity, before = correlations(read), correlations(made)
    constant = similarity.diagonal() == 0
    both = constant[:, None] & constant
    # with a constant unit correlations are 0, many times over: what makes the units breaks the ties
    return torch.where(both, before, similarity + _TIES * before)


def zipped(similarity: Tensor, members: int, within: float) -> tuple[Tensor, int, float]:
    """Merge units greedily, the most similar pair first.

    Args:
        similarity: ``[u, u]`` for the units of all members, one member behind the other.
        members: Number of members.
        within: Share of each member's merges that may be inside it.

    Returns:
        Cluster of every unit, ``[u]``, numbered from 0; the number of merges inside members; and
        the mean similarity of what was merged.
    """
    linkage = similarity.cpu().numpy().copy()
    np.fill_diagonal(linkage, -np.inf)
    count = len(linkage)
    owners = np.repeat(np.eye(members, dtype=bool), count // members, axis=0)  # [u, m]
    merges = count - count // members
    left = np.full(members, int(within * merges / members + 1e-9))
    cluster, alive = np.arange(count), np.ones(count, dtype=bool)
    best = _best(linkage, owners, left, np.arange(count))
    inside, total = 0, 0.0
    for _ in range(merges):
        i = int(np.where(alive, best[0], -np.inf).argmax())
        if not np.isfinite(best[0][i]):  # the rest can only be merged inside members
            left[:] = count
            best = _best(linkage, owners, left, np.arange(count))
            i = int(best[0].argmax())
        j = int(best[1][i])
        total += float(best[0][i])
        both = owners[i] & owners[j]
        inside, left = inside + int(both.sum()), left - both
        owners[i] |= owners[j]
        linkage[i] = linkage[:, i] = np.minimum(linkage[i], linkage[j])
        linkage[j] = linkage[:, j] = -np.inf
        alive[j], cluster[cluster == j] = False, i
        stale = (best[1] == i) | (best[1] == j) | (np.arange(count) == i)
        if (both & (left == 0)).any():
            stale[:] = True
        rows = stale.nonzero()[0]
        best[0][rows], best[1][rows] = _best(linkage, owners, left, rows)
    return torch.from_numpy(np.unique(cluster, return_inverse=True)[1]), inside, total / merges


def _best(
    linkage: np.ndarray, owners: np.ndarray, left: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For some clusters, the similarity and the number of the best partner that is allowed."""
    spent = owners & (left <= 0)
    shared = spent[rows].astype(np.float32) @ spent.T.astype(np.float32) > 0
    allowed = np.where(shared, -np.inf, linkage[rows])
    partner = allowed.argmax(1)
    return allowed[np.arange(len(rows)), partner], partner


def _numbered(cluster: Tensor, similarity: Tensor, members: int, first: int) -> Grouping:
    """Number clusters after the units of one member: those that they hold, or are closest to."""
    width = len(cluster) // members
    holds = torch.nn.functional.one_hot(cluster, width).double()  # [u, clusters]
    own = slice(first * width, (first + 1) * width)
    closeness = holds.mT @ similarity[:, own].cpu() / holds.sum(0)[:, None]
    rows, slots = linear_sum_assignment((closeness + 2 * holds[own].mT).numpy(), maximize=True)
    slot_of = torch.empty(width, dtype=torch.long)
    slot_of[torch.from_numpy(rows)] = torch.from_numpy(slots)
    return grouped(slot_of[cluster].reshape(members, width), width)
