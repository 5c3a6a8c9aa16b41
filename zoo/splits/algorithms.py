"""Clustering algorithms of scikit-learn: fitted on a sample, applied to every row.

Each is ``algorithm(sample, points, members, *, <option>, seed)`` and returns the cluster of every
point. scikit-learn takes a second to import, so that only those who cluster wait for it.
"""

from __future__ import annotations

import warnings

import numpy as np

from metamerge.errors import ZooError

LINKAGES = ("ward", "complete", "average", "single")
COVARIANCES = ("full", "tied", "diag", "spherical")


def kmeans(sample: np.ndarray, points: np.ndarray, members: int, *, seed: int) -> np.ndarray:
    """Cluster around centres that minimise squared distances; the best of ten starts.

    Args:
        sample: What is fitted ``[sample, d]``.
        points: What is to be labelled ``[rows, d]``.
        members: Number of clusters.
        seed: Seed of the starts.

    Returns:
        Cluster of the nearest centre, in [0, members), ``[rows]``.
    """
    from sklearn.cluster import KMeans

    return KMeans(members, n_init=10, random_state=seed).fit(sample).predict(points)


def gmm(
    sample: np.ndarray, points: np.ndarray, members: int, *, covariance: str, seed: int
) -> np.ndarray:
    """Cluster by a mixture of Gaussians; the best of five starts.

    Args:
        sample: What is fitted ``[sample, d]``.
        points: What is to be labelled ``[rows, d]``.
        members: Number of clusters.
        covariance: One of ``COVARIANCES``.
        seed: Seed of the starts, each by k-means.

    Returns:
        The most probable component, in [0, members), ``[rows]``.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    # In float64 and with some variance added, few rows in many dimensions stay positive definite.
    mixture = GaussianMixture(
        members, covariance_type=covariance, reg_covar=1e-3, n_init=5, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a mixture on its way cuts as well
        return mixture.fit(sample.astype(np.float64)).predict(points.astype(np.float64))


def agglomerative(
    sample: np.ndarray, points: np.ndarray, members: int, *, linkage: str, seed: int
) -> np.ndarray:
    """Cluster by joining the two nearest groups again and again.

    Args:
        sample: What is fitted ``[sample, d]``.
        points: What is to be labelled ``[rows, d]``.
        members: Number of clusters.
        linkage: What the distance of two groups is; one of ``LINKAGES``.
        seed: Not needed: nothing is drawn.

    Returns:
        Cluster of the nearest point of the sample, in [0, members), ``[rows]``.
    """
    from sklearn.cluster import AgglomerativeClustering

    found = AgglomerativeClustering(members, linkage=linkage).fit_predict(sample)
    return found[_nearest(points, sample)]


def spectral(
    sample: np.ndarray, points: np.ndarray, members: int, *, neighbours: int, seed: int
) -> np.ndarray:
    """Cluster the graph of nearest neighbours along its sparsest cuts.

    Args:
        sample: What is fitted ``[sample, d]``.
        points: What is to be labelled ``[rows, d]``.
        members: Number of clusters.
        neighbours: Neighbours of every point in the graph, the point itself included.
        seed: Seed of the eigensolver and of the k-means in its space.

    Returns:
        Cluster of the nearest point of the sample, in [0, members), ``[rows]``.

    Raises:
        ZooError: If the sample has no more rows than there are members.
    """
    from sklearn.cluster import SpectralClustering
    from sklearn.neighbors import kneighbors_graph

    if len(sample) <= members:
        raise ZooError(
            f"clusters: 'spectral' needs more than {members} rows to fit for {members} members, "
            f"got {len(sample)}. Raise fit_rows, or take algorithm='kmeans'."
        )
    graph = kneighbors_graph(sample, min(neighbours, len(sample)), include_self=True)
    model = SpectralClustering(members, affinity="precomputed", random_state=seed)
    with warnings.catch_warnings():
        # Clusters without a path between them are what is looked for.
        warnings.filterwarnings("ignore", message="Graph is not fully connected")
        found = model.fit_predict((graph + graph.T) / 2)
    return found[_nearest(points, sample)]


def hdbscan(
    sample: np.ndarray, points: np.ndarray, members: int, *, min_cluster_size: int, seed: int
) -> np.ndarray:
    """Cluster by density: HDBSCAN finds the number of clusters, and calls some rows noise.

    The smallest clusters are joined with their nearest, by centroids, until ``members`` are left;
    noise goes where its nearest neighbour among the clustered rows is.

    Args:
        sample: What is fitted ``[sample, d]``.
        points: What is to be labelled ``[rows, d]``.
        members: Number of clusters.
        min_cluster_size: Fewest rows of the sample that make a cluster.
        seed: Not needed: nothing is drawn.

    Returns:
        Cluster of the nearest clustered point of the sample, in [0, members), ``[rows]``.

    Raises:
        ZooError: If fewer clusters are found.
    """
    from sklearn.cluster import HDBSCAN

    found = HDBSCAN(min_cluster_size=min(min_cluster_size, len(sample)), copy=True).fit_predict(
        sample
    )
    clustered = found >= 0
    count = int(found.max()) + 1
    if count < members:
        raise ZooError(
            f"clusters: 'hdbscan' found {count} clusters in {len(sample)} rows, {members} members "
            f"need as many; {np.count_nonzero(~clustered)} rows are noise. Lower min_cluster_size "
            f"(now {min_cluster_size}) or members, raise fit_rows, or take algorithm='kmeans'."
        )
    found = _join_smallest(sample[clustered], found[clustered], members)
    return found[_nearest(points, sample[clustered])]


def _join_smallest(sample: np.ndarray, found: np.ndarray, members: int) -> np.ndarray:
    """Join the smallest cluster with its nearest until ``members`` are left ``[sample]``."""
    while (count := found.max() + 1) > members:
        sizes = np.bincount(found)
        centroids = np.stack([sample[found == c].mean(axis=0) for c in range(count)])
        smallest = sizes.argmin()
        distances = np.linalg.norm(centroids - centroids[smallest], axis=1)
        distances[smallest] = np.inf
        found = np.where(found == smallest, distances.argmin(), found)
        found = np.unique(found, return_inverse=True)[1]  # numbers without a gap
    return found


def _nearest(points: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Number of the point of the sample that is nearest to each point ``[rows]``."""
    from sklearn.metrics import pairwise_distances_argmin

    return pairwise_distances_argmin(points, sample)
