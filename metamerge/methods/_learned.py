"""What the learned mergers share as methods: three budgets of images at merge time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from metamerge.calibration import Batches, collect
from metamerge.errors import ConfigError
from metamerge.mergers import adapt, bundled_merger, fuse, fuse_beside
from metamerge.methods._combination import combine, restore
from metamerge.options import check_choice, check_count
from metamerge.structure import Layout
from metamerge.weights import Weights, stack, widened


def merge_learned(
    weights: Sequence[Weights],
    layout: Layout,
    merger: nn.Module | None,
    *,
    kind: type[nn.Module],
    batches: Batches | None,
    refine: int | None,
    adapted: bool,
    generator: torch.Generator | None,
    report: dict[str, Any] | None,
) -> Weights:
    """Merge with a trained merger.

    Args:
        weights: One state dict per member. A single one comes back as it is.
        layout: Their architecture.
        merger: The merger; None for the one that comes with the package.
        kind: Class that it has to be of.
        batches: Calibration inputs, or pairs of inputs and labels, or None.
        refine: Steps of refining; None for the merger's own.
        adapted: Whether labels are used.
        generator: Source of randomness.
        report: Takes what was done.

    Returns:
        New state dict.

    Raises:
        ConfigError: If the merger is of another kind, or the batches are of no use.
    """
    name = kind.__name__.removesuffix("Merger").lower()
    check_count(name, "refine", refine, none="for what proved best in training")
    check_choice(name, "adapt", adapted, (True, False))
    if merger is None and name == "gnn":
        merger = bundled_merger()
    if not isinstance(merger, kind):
        raise ConfigError(
            f"{name}: merger is of type {type(merger).__name__}, expected {kind.__name__}. Train "
            "one with `accelerate launch trainers/merger.py` and pass merger=<folder>."
        )
    data = (None, None) if batches is None else collect(batches, labelled=False)
    if len(weights) == 1:
        return combine(weights, [1.0])
    device = next(merger.parameters()).device
    inputs, labels = (None if t is None else t.to(device) for t in data)
    members = {k: t[None].to(device) for k, t in stack(widened(weights)).items()}  # [1, m, ...]
    told: dict[str, Any] = {}
    if labels is not None and adapted:
        fused = adapt(merger, members, layout, inputs, labels, generator=generator, report=told)
    elif inputs is None:
        fused = fuse(merger, members, layout, steps=refine, report=told)
    else:
        fused = fuse_beside(merger, members, layout, inputs, steps=refine, report=told)
    if report is not None:
        report.update(told)
    return restore({key: tensor[0] for key, tensor in fused.items()}, weights)
