"""Merge methods, one per file; importing this package registers them all."""

from metamerge.methods.average import average
from metamerge.methods.cluster import cluster
from metamerge.methods.gnn import gnn
from metamerge.methods.rank_average import rank_average
from metamerge.methods.weighted_average import weighted_average

__all__ = ["average", "cluster", "gnn", "rank_average", "weighted_average"]
