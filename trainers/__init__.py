"""The training scripts, in reading order: merger.py."""
