"""Calling corrections by name, one after the other, on one fused network."""

from collections.abc import Sequence
from typing import Any

from metamerge.corrections.batch_norm import normalisations, recalibrate
from metamerge.declaration import Record, bind
from metamerge.network import Data
from metamerge.structure import Layout
from metamerge.weights import Weights, stack, unstack, widened


def correct_fused(
    fused: Weights,
    members: Sequence[Weights],
    layout: Layout,
    data: Data,
    corrections: Sequence[Record],
) -> tuple[Weights, dict[str, Any]]:
    """Correct a fused network, and measure its running statistics anew where it has any.

    Args:
        fused: Its weights.
        members: Its aligned members, one state dict each.
        layout: The architecture.
        data: Calibration inputs, and labels if there are any.
        corrections: What is done, in this order.

    Returns:
        New weights, floating tensors in float32; and what is told of each step, by its name.
    """
    told: dict[str, Any] = {}
    inputs, labels = data
    normalised = any(True for _ in normalisations(layout.program))
    if not corrections and not normalised:
        return fused, told
    corrected = {key: tensor[None] for key, tensor in widened([fused])[0].items()}
    if corrections:
        family = {key: tensor[None] for key, tensor in stack(widened(members)).items()}
    for record in corrections:
        report: dict[str, Any] = {}
        arguments = bind(record, {"labels": labels, "report": report}, {})
        corrected = record.function(corrected, family, layout, inputs, **arguments)
        told[record.name] = report
    if normalised:
        corrected = recalibrate(corrected, layout.program, inputs)
        told["batch_norm"] = {"inputs": len(inputs)}
    return unstack(corrected)[0], told
