"""The learned mergers: networks that read the weights of K members and emit one set of weights."""

from metamerge.mergers.adapting import adapt
from metamerge.mergers.autoencoder import AutoencoderConfig, AutoencoderMerger
from metamerge.mergers.files import (
    Merger,
    bundled_merger,
    load_merger,
    read_card,
    read_kind,
    save_merger,
)
from metamerge.mergers.gate import consensus
from metamerge.mergers.gnn import GNNConfig, GNNMerger
from metamerge.mergers.objective import ThresholdObjective, wilson_lower_bound
from metamerge.mergers.probes import probe_start
from metamerge.mergers.reading import Fusion
from metamerge.mergers.reconstruction import reconstruction_loss
from metamerge.mergers.refining import fuse, fuse_beside, refine

__all__ = [
    "AutoencoderConfig",
    "AutoencoderMerger",
    "Fusion",
    "GNNConfig",
    "GNNMerger",
    "Merger",
    "ThresholdObjective",
    "adapt",
    "bundled_merger",
    "consensus",
    "fuse",
    "fuse_beside",
    "load_merger",
    "probe_start",
    "read_card",
    "read_kind",
    "reconstruction_loss",
    "refine",
    "save_merger",
    "wilson_lower_bound",
]
