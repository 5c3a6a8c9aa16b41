"""metamerge learns to merge: K checkpoints of one network go in, one set of weights comes out."""

from metamerge.api import Merged, merge
from metamerge.registry import list_methods
from metamerge.streaming import merge_files

__all__ = ["Merged", "list_methods", "merge", "merge_files"]
