"""Merge methods, one per file; importing this package registers them all."""

from metamerge.methods.adaptive import adaptive
from metamerge.methods.autoencoder import autoencoder
from metamerge.methods.average import average
from metamerge.methods.breadcrumbs import breadcrumbs
from metamerge.methods.cluster import cluster
from metamerge.methods.dare import dare
from metamerge.methods.fisher_average import fisher_average
from metamerge.methods.gnn import gnn
from metamerge.methods.greedy_soup import greedy_soup
from metamerge.methods.karcher_mean import karcher_mean
from metamerge.methods.loss_average import loss_average
from metamerge.methods.model_stock import model_stock
from metamerge.methods.pleas import pleas
from metamerge.methods.rank_average import rank_average
from metamerge.methods.regression_mean import regression_mean
from metamerge.methods.slerp import slerp
from metamerge.methods.task_arithmetic import task_arithmetic
from metamerge.methods.ties import ties
from metamerge.methods.unit_clusters import unit_clusters
from metamerge.methods.weighted_average import weighted_average
from metamerge.methods.zipit import zipit

__all__ = [
    "adaptive",
    "autoencoder",
    "average",
    "breadcrumbs",
    "cluster",
    "dare",
    "fisher_average",
    "gnn",
    "greedy_soup",
    "karcher_mean",
    "loss_average",
    "model_stock",
    "pleas",
    "rank_average",
    "regression_mean",
    "slerp",
    "task_arithmetic",
    "ties",
    "unit_clusters",
    "weighted_average",
    "zipit",
]
