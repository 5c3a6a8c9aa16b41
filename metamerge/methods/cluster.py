"""Cluster: find groups of members that are close to each other; average within, then between them.

No paper. With ``keep="all"`` every group counts the same however many members it has; with
``keep="best"`` members far from the chosen group are left out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from metamerge.calibration import Batches, collect, losses
from metamerge.errors import ConfigError
from metamerge.methods._combination import combine
from metamerge.registry import merge_method
from metamerge.structure import Layout
from metamerge.weights import Weights, flatten, reorder

_KEEP = ("all", "best")
_ALGORITHMS = ("ward", "kmeans")


@merge_method()
def cluster(
    weights: Sequence[Weights],
    *,
    clusters: int = 2,
    keep: str = "all",
    algorithm: str = "ward",
    layout: Layout | None = None,
    batches: Batches | None = None,
    generator: torch.Generator | None = None,
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
        layout: The members' architecture; needed with ``batches`` and ``keep="best"``.
        batches: Calibration inputs with labels, by which ``best`` chooses.
        generator: Randomness of ``kmeans``; without it a fixed seed.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If an option is out of its range, or batches do not have labels or a layout.
    """
    _check(len(weights), clusters, keep, algorithm)
    if len(weights) == 1:
        return combine(weights, [1.0])
    points = torch.stack([flatten(reorder(member, weights[0])).detach() for member in weights])
    groups = _groups(points.cpu(), clusters, algorithm, generator)
    if keep == "all":
        return combine(weights, _coefficients(groups, len(weights)))
    means = [combine([weights[i] for i in g], [1 / len(g)] * len(g)) for g in groups]
    if batches is None:
        return means[_densest(points, groups)]
    if layout is None:
        raise ConfigError(
            "cluster: batches come without a layout. Pass layout=, or model= to merge()."
        )
    return means[int(losses(means, layout, *collect(batches, labelled=True)).argmin())]


def _check(members: int, clusters: int, keep: str, algorithm: str) -> None:
    if members > 1 and not (isinstance(clusters, int) and 1 <= clusters <= members):
        raise ConfigError(
            f"cluster: clusters must be a whole number from 1 to the number of members, {members}, "
            f"got {clusters!r}."
        )
    for option, value, known in (("keep", keep, _KEEP), ("algorithm", algorithm, _ALGORITHMS)):
        if value not in known:
            raise ConfigError(f"cluster: {option} must be one of {known}, got {value!r}.")


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
