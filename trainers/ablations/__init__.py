"""Ablations: what every part of a merger earns; ``python -m trainers.ablations``."""
