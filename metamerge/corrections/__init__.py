"""Corrections of fused weights on calibration inputs, one per file; importing registers them all.

Every one is ``function(fused, members, layout, inputs, *, <options>)`` with fused weights
``[f, ...]`` and their aligned members ``[f, m, ...]``, and returns new fused weights.
"""

from metamerge.corrections import batch_norm, refit, repair, rescale, scale

__all__ = ["batch_norm", "refit", "repair", "rescale", "scale"]
