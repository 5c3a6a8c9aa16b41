"""metamerge learns to merge: K checkpoints of one network go in, one set of weights comes out."""

from metamerge.api import Merged, merge
from metamerge.registry import list_methods

__all__ = ["Merged", "list_methods", "merge"]
