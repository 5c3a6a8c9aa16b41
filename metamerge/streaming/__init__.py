"""Merging checkpoint files of any size, a few tensors at a time."""

from metamerge.streaming.merging import merge_files

__all__ = ["merge_files"]
