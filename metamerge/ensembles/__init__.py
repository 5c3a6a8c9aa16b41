"""Ensembles: what does not merge but must be beaten."""

from metamerge.ensembles.convolutional_consensus import convolutional_consensus
from metamerge.ensembles.ensemble import Ensemble, load_ensemble
from metamerge.ensembles.fusing import Mutant, fused
from metamerge.ensembles.gated_consensus import gated_consensus
from metamerge.ensembles.kinds import get_ensemble, list_ensembles
from metamerge.ensembles.learned_consensus import learned_consensus
from metamerge.ensembles.making import ensemble
from metamerge.ensembles.mutating import mutant
from metamerge.ensembles.pruning import magnitude, pruned, taylor
from metamerge.ensembles.regression import stacked_mean, weighted_mean
from metamerge.ensembles.stacking import stacking
from metamerge.ensembles.votes import majority_vote, soft_vote
from metamerge.ensembles.watching import Seen
from metamerge.ensembles.weighted_consensus import weighted_consensus

__all__ = [
    "Ensemble",
    "Mutant",
    "Seen",
    "convolutional_consensus",
    "ensemble",
    "fused",
    "gated_consensus",
    "get_ensemble",
    "learned_consensus",
    "list_ensembles",
    "load_ensemble",
    "magnitude",
    "majority_vote",
    "mutant",
    "pruned",
    "soft_vote",
    "stacked_mean",
    "stacking",
    "taylor",
    "weighted_consensus",
    "weighted_mean",
]
