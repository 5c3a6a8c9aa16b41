"""Cluster: find groups of members that are close to each other; average within, then between them.

No paper. Merging goes in two stages: the members within each cluster are averaged, then the means
of the clusters. With ``keep="all"`` every cluster counts the same however many members it has; with
``keep="best"`` there is no second stage, and members of other clusters are left out.

Retraining the survivors between the stages is training, and so it is no part of this library: take
``report["clusters"]``, average each cluster's members with ``average``, train the means, and merge
them as checkpoints like any others.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metamerge.calibration import Batches, collect, losses, predict
from metamerge.errors import ConfigError
from metamerge.methods._combination import combine
from metamerge.options import check_choice, check_count
from metamerge.registry import merge_method
from metamerge.structure import Layout
from metamerge.weights import Weights, flatten, reorder, stack, widened

_KEEP = ("all", "best")
_ALGORITHMS = ("ward", "kmeans")
_BY = ("weights", "predictions")


@merge_method()
def cluster(
    weights: Sequence[Weights],
    *,
    clusters: int = 2,
    keep: str = "all",
    algorithm: str = "ward",
    by: str = "weights",
    layout: Layout | None = None,
    batches: Batches | None = None,
    generator: torch.Generator | None = None,
    report: dict[str, Any] | None = None,
) -> Weights:
    """Average clusters of similar members, then the clusters' means, or keep the best cluster only.

    The best cluster is the one whose mean has the lowest loss on labelled batches. Without batches
    it is the one with the most members; among those, the one with the smallest mean squared
    distance to its mean; among those, the one whose first member comes first.

    Args:
        weights: One state dict per member, of one architecture.
        clusters: Number of clusters, from 1 to the number of members; not used with one member.
        keep: ``all`` averages the means of all clusters, ``best`` returns the best one's.
        algorithm: ``ward`` joins the two nearest clusters again and again; ``kmeans``.
        by: What makes members similar: their ``weights``, which should be aligned, or their
            ``predictions``, the probabilities that they give to the classes of ``batches``.
        layout: The members' architecture; needed for what batches are needed for.
        batches: Calibration inputs, needed by ``predictions``, with labels where ``best`` is to
            choose by them.
        generator: Randomness of ``kmeans``; without it a fixed seed.
        report: Takes ``clusters``, the members of every cluster; ``kept``, the cluster that
            ``best`` chose; and with labelled batches ``losses``, of every cluster's mean.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If an option is out of its range, or batches or a layout are missing, or labels
            with ``keep="best"``.
    """
    _check(len(weights), clusters, keep, algorithm, by)
    if len(weights) == 1:
        return combine(weights, [1.0])
    inputs, labels = _data(keep, by, layout, batches)
    points = _weight_points(weights) if by == "weights" else _predictions(weights, layout, inputs)
    groups = _groups(points.cpu(), clusters, algorithm, generator)
    told: dict[str, Any] = {"clusters": groups}
    means = [combine([weights[i] for i in g], [1 / len(g)] * len(g)) for g in groups]
    if labels is not None:
        told["losses"] = losses(means, layout, inputs, labels).tolist()
    if keep == "best":
        told["kept"] = _lowest(told["losses"]) if labels is not None else _densest(points, groups)
    if report is not None:
        report.update(told)
    if keep == "best":
        return means[told["kept"]]
    return combine(weights, _coefficients(groups, len(weights)))


def _check(members: int, clusters: int, keep: str, algorithm: str, by: str) -> None:
    if members > 1:
        limit = "the number of members"
        check_count("cluster", "clusters", clusters, 1, members, limit=limit)
    check_choice("cluster", "keep", keep, _KEEP)
    check_choice("cluster", "algorithm", algorithm, _ALGORITHMS)
    check_choice("cluster", "by", by, _BY)


def _data(
    keep: str, by: str, layout: Layout | None, batches: Batches | None
) -> tuple[Tensor | None, Tensor | None]:
    """Inputs and labels, as far as they are there; what ``by`` and ``keep`` need must be."""
    if batches is None and by == "predictions":
        raise ConfigError('cluster: by="predictions" needs batches=<calibration inputs>.')
    needed = by == "predictions" or keep == "best"
    if batches is None or (layout is None and not needed):
        return None, None
    if layout is None:
        raise ConfigError(
            "cluster: batches come without a layout. Pass layout=, or model= to merge()."
        )
    return collect(batches, labelled=keep == "best" and by == "weights")


def _weight_points(weights: Sequence[Weights]) -> Tensor:
    return torch.stack([flatten(reorder(member, weights[0])).detach() for member in weights])


def _predictions(weights: Sequence[Weights], layout: Layout, inputs: Tensor) -> Tensor:
    """Probabilities of every class of every input, ``[m, b * c]``."""
    stacked = stack([reorder(member, weights[0]) for member in widened(weights)])
    return predict(stacked, layout, inputs).detach().softmax(-1).flatten(1)


def _lowest(values: Sequence[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)


def _groups(
    points: Tensor, clusters: int, algorithm: str, generator: torch.Generator | None
) -> list[list[int]]:
    """Members of every cluster; clusters in the order of their first members."""
    from sklearn.cluster import AgglomerativeClustering, KMeans  # takes a second to import

    if algorithm == "ward":
        model = AgglomerativeClustering(clusters, linkage="ward")
    else:
        seed = 0
        if generator is not None:
            seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
        model = KMeans(clusters, n_init=10, random_state=seed)
    labels = model.fit_predict(points.numpy()).tolist()
    return [[i for i, own in enumerate(labels) if own == c] for c in dict.fromkeys(labels)]


def _coefficients(groups: list[list[int]], members: int) -> list[float]:
    """Share of every member in the mean of the clusters' means."""
    shares = [0.0] * members
    for group in groups:
        for member in group:
            shares[member] = 1 / (len(groups) * len(group))
    return shares


def _densest(points: Tensor, groups: list[list[int]]) -> int:
    spread = [float((points[g] - points[g].mean(0)).square().sum(1).mean()) for g in groups]
    return min(range(len(groups)), key=lambda i: (-len(groups[i]), spread[i]))
