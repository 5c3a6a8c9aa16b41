"""Segments of rows that are alike: one cluster for every member."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from metamerge.errors import ConfigError, ZooError
from zoo.splits import algorithms
from zoo.splits.checks import check_count, check_request, take
from zoo.splits.drawing import draw_from_groups, numpy_generator

ALGORITHMS = ("kmeans", "agglomerative", "spectral", "hdbscan", "gmm")
_DIMENSIONS = 50
_CLIP = 5.0  # deviations: a pixel lit in one row of thousands would make a cluster of that row


def clusters(
    targets: Tensor,
    rows: Tensor,
    members: int,
    *,
    features: Tensor,
    algorithm: str = "kmeans",
    linkage: str = "ward",
    neighbours: int = 10,
    min_cluster_size: int = 10,
    covariance: str = "full",
    fit_rows: int = 2000,
    size: int | None = None,
    min_rows: int = 10,
    generator: torch.Generator,
) -> list[Tensor]:
    """Cluster rows by their features and give every member a cluster.

    Features are standardised, clipped at five deviations and rotated to their first 50 principal
    components at most. All this and the clustering are fitted on ``fit_rows`` random rows, for some
    algorithms take the square of their number; ``kmeans`` and ``gmm`` then predict the other rows,
    and after the rest of the algorithms a row goes to the cluster of its nearest fitted row.
    Members get clusters in random order. Another seed fits other rows, if there are more; families
    of all rows thus differ only as much as the clusters do, and ``size`` sets them apart.

    Args:
        targets: Targets of every row of the task, int64 ``[task rows]`` or float32
            ``[task rows, outputs]``; not looked at.
        rows: Row numbers to cut, without repeats, int64 ``[rows]``.
        members: Number of segments.
        features: What rows are clustered by, float32 ``[task rows, d]``; see
            ``zoo.splits.features``. Only those of ``rows`` are looked at.
        algorithm: One of ``ALGORITHMS``.
        linkage: Of "agglomerative": "ward", "complete", "average" or "single".
        neighbours: Of "spectral": neighbours of a row in the graph, itself included.
        min_cluster_size: Of "hdbscan": fewest fitted rows that make a cluster. It finds their
            number itself: of too many, the smallest are joined with their nearest.
        covariance: Of "gmm": "full", "tied", "diag" or "spherical".
        fit_rows: Rows that the clustering is fitted on, at most.
        size: Rows drawn from each cluster; None deals all rows out, in segments of unequal size.
        min_rows: Fewest rows of a segment; not used with ``size``.
        generator: Source of randomness.

    Returns:
        One tensor of row numbers per member, int64 ``[segment rows]``.

    Raises:
        ConfigError: If an option is out of range.
        ZooError: If there are too few rows, rows that the task does not have, features that are
            not finite, or a cluster is too small.
    """
    cluster = _chosen(algorithm, linkage, neighbours, min_cluster_size, covariance)
    check_count("clusters", "fit_rows", fit_rows)
    check_count("clusters", "min_rows", min_rows)
    check_request("clusters", targets, rows, members, size)
    values = take("clusters", "features", features, rows, (len(targets), "d"))  # [rows, d]
    rng = numpy_generator(generator)
    fitted = torch.from_numpy(rng.permutation(len(rows))[:fit_rows])
    seed = int(rng.integers(2**31))

    found = np.zeros(len(rows), dtype=np.int64)
    if members > 1:
        points = _embed(values, fitted, members, seed)  # [rows, 50]
        found = cluster(points[fitted.numpy()], points, members, seed=seed)
    groups = [rows.numpy()[found == c] for c in rng.permutation(members)]
    _check_sizes(algorithm, groups, size, min_rows)
    return draw_from_groups(groups, size, rng)


def _chosen(
    algorithm: str, linkage: str, neighbours: int, min_cluster_size: int, covariance: str
) -> Callable[..., np.ndarray]:
    """Bind the algorithm asked for to its option; refuse options out of range."""
    for option, value, allowed in (
        ("algorithm", algorithm, ALGORITHMS),
        ("linkage", linkage, algorithms.LINKAGES),
        ("covariance", covariance, algorithms.COVARIANCES),
    ):
        if value not in allowed:
            raise ConfigError(
                f"clusters: {option} must be one of {', '.join(allowed)}, got {value!r}."
            )
    for option, value in (("neighbours", neighbours), ("min_cluster_size", min_cluster_size)):
        check_count("clusters", option, value)
        if value < 2:
            raise ConfigError(f"clusters: {option} counts the row itself, so 2 at least, got 1.")
    return {
        "kmeans": algorithms.kmeans,
        "agglomerative": partial(algorithms.agglomerative, linkage=linkage),
        "spectral": partial(algorithms.spectral, neighbours=neighbours),
        "hdbscan": partial(algorithms.hdbscan, min_cluster_size=min_cluster_size),
        "gmm": partial(algorithms.gmm, covariance=covariance),
    }[algorithm]


def _embed(values: Tensor, fitted: Tensor, members: int, seed: int) -> np.ndarray:
    """Standardise, clip and rotate features as the fitted rows have it ``[rows, <= 50]``."""
    from sklearn.decomposition import PCA  # a second of import that other splits do not need

    deviation, mean = torch.std_mean(values[fitted], 0, correction=0)
    deviation[deviation == 0] = 1
    values.sub_(mean).div_(deviation).clamp_(-_CLIP, _CLIP)  # in place: `take` made a copy
    sample = values[fitted].numpy()
    distinct = len(np.unique(sample, axis=0))
    if distinct < members:
        raise ZooError(
            f"clusters: the {len(sample)} rows that are fitted have {distinct} different vectors "
            f"of features, {members} members need as many. Raise fit_rows, lower members, or "
            "cluster by other features."
        )
    rotation = PCA(min(_DIMENSIONS, *sample.shape), random_state=seed).fit(sample)
    return rotation.transform(values.numpy())


def _check_sizes(algorithm: str, groups: list[np.ndarray], size: int | None, min_rows: int) -> None:
    """Refuse clusters too small for a segment."""
    smallest = min(map(len, groups))
    option, needed = ("min_rows", min_rows) if size is None else ("size", size)
    if smallest < needed:
        raise ZooError(
            f"clusters: {algorithm!r} made clusters of {sorted(map(len, groups))} rows, "
            f"{option}={needed}. Lower {option} or members, or choose another algorithm or other "
            "features."
        )
