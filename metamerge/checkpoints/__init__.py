"""Every way in and out for checkpoints: files, folders, shards, modules and members of a zoo."""

from metamerge.checkpoints.checkpoint import MAX_BYTES, Checkpoint
from metamerge.checkpoints.reading import Source, read_checkpoints
from metamerge.checkpoints.writing import check_output, save_checkpoint

__all__ = [
    "MAX_BYTES",
    "Checkpoint",
    "Source",
    "check_output",
    "read_checkpoints",
    "save_checkpoint",
]
