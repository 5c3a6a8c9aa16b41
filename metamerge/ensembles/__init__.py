"""Ensembles: what does not merge but must be beaten."""

from metamerge.ensembles.votes import Ensemble, majority_vote, soft_vote

__all__ = ["Ensemble", "majority_vote", "soft_vote"]
