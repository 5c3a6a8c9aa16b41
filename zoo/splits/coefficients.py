"""How well rows fall into clusters, and how many clusters that speaks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from metamerge.errors import ConfigError, ZooError
from zoo.splits.checks import take

COEFFICIENTS = {"silhouette": 1, "calinski_harabasz": 1, "davies_bouldin": -1}
"""Coefficient -> 1 where larger is better, -1 where smaller is."""

_LOOK = 2000  # rows that a silhouette looks at, for it takes the square of their number


def coefficients(points: Tensor, segments: Sequence[Tensor], *, seed: int = 0) -> dict[str, float]:
    """Judge clusters by how near their rows are to each other and how far from other clusters.

    Silhouette: Rousseeuw, "Silhouettes: a graphical aid to the interpretation and validation of
    cluster analysis", J. Comput. Appl. Math. 20, 1987; mean over rows. Ratio of variances between
    and within clusters: Calinski and Harabasz, "A dendrite method for cluster analysis", Commun.
    Stat. 3, 1974. Mean similarity of a cluster to its most similar one: Davies and Bouldin, "A
    Cluster Separation Measure", IEEE PAMI 1, 1979. Points are standardised first, as ``clusters``
    does; silhouettes look at 2,000 rows at most.

    Args:
        points: What rows were clustered by, float32 ``[task rows, d]``; only those of the segments
            are looked at.
        segments: Row numbers of every cluster.
        seed: Of the rows that silhouettes look at.

    Returns:
        A number for each of ``COEFFICIENTS``.

    Raises:
        ZooError: If there are fewer than two clusters, no more rows than clusters, or points that
            are not finite.
    """
    from sklearn import metrics  # a second of import

    rows = torch.cat(list(segments))
    if len(segments) < 2 or len(rows) <= len(segments):
        raise ZooError(
            f"coefficients: expected at least two clusters and more rows than clusters, got "
            f"{len(segments)} of {len(rows)} rows."
        )
    values = take("coefficients", "points", points, rows, (len(points), "d")).double()
    deviation, mean = torch.std_mean(values, 0, correction=0)
    values = ((values - mean) / deviation.where(deviation > 0, 1.0)).numpy()
    labels = np.repeat(np.arange(len(segments)), [len(own) for own in segments])
    look = min(_LOOK, len(rows)) if len(rows) > _LOOK else None
    return {
        "silhouette": float(
            metrics.silhouette_score(values, labels, sample_size=look, random_state=seed)
        ),
        "calinski_harabasz": float(metrics.calinski_harabasz_score(values, labels)),
        "davies_bouldin": float(metrics.davies_bouldin_score(values, labels)),
    }


def choose_members(found: Mapping[int, Mapping[str, float]], *, by: str = "all") -> int:
    """Choose a number of clusters.

    Args:
        found: Number of clusters -> its ``coefficients``.
        by: One of them, or "all": the smallest mean rank under all three.

    Returns:
        The best number; the smaller one of equals.

    Raises:
        ConfigError: If there is nothing to choose from, or no such coefficient.
    """
    if not found:
        raise ConfigError("choose_members: there are no numbers of clusters to choose from.")
    if by != "all" and by not in COEFFICIENTS:
        raise ConfigError(
            f"choose_members: by must be all or one of {', '.join(COEFFICIENTS)}, got {by!r}."
        )
    ranks = dict.fromkeys(found, 0.0)
    for name in COEFFICIENTS if by == "all" else (by,):
        values = {members: COEFFICIENTS[name] * own[name] for members, own in found.items()}
        for members, value in values.items():
            ranks[members] += sum(other > value for other in values.values())
    return min(sorted(ranks), key=ranks.get)
