"""The learned mergers: networks that read the weights of K members and emit one set of weights."""

from metamerge.mergers.files import load_merger, read_card, save_merger
from metamerge.mergers.gnn import GNNConfig, GNNMerger, probe_start
from metamerge.mergers.objective import ThresholdObjective, wilson_lower_bound

__all__ = [
    "GNNConfig",
    "GNNMerger",
    "ThresholdObjective",
    "load_merger",
    "probe_start",
    "read_card",
    "save_merger",
    "wilson_lower_bound",
]
