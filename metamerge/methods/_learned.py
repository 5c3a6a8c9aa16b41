"""What the learned mergers share as methods: three budgets of images at merge time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metamerge.calibration import Batches, check_fit, collect
from metamerge.errors import ConfigError
from metamerge.mergers import adapt, bundled_merger, fuse
from metamerge.mergers.inversion import strange
from metamerge.methods._combination import combine, restore
from metamerge.options import check_choice, check_count
from metamerge.structure import Layout
from metamerge.weights import Weights, stack, widened

ENOUGH = 1000  # inputs from which on they need no probes beside them
LONGER = 4  # times as many steps of refining on inputs where the probes are strange


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
    else:
        watched, longer = None, False
        if inputs is not None:
            watched, longer = _beside_probes(merger, members, layout, inputs, told)
        steps = LONGER * merger.config.refine if longer and refine is None else refine
        fused = fuse(merger, members, layout, watched, steps=steps, report=told)
    if report is not None:
        report.update(told)
    return restore({key: tensor[0] for key, tensor in fused.items()}, weights)


def _beside_probes(
    merger: nn.Module, members: Weights, layout: Layout, inputs: Tensor, told: dict[str, Any]
) -> tuple[Tensor, bool]:
    """Learned probes beside inputs that are few, unless they are strange to the members.

    Those would do harm there; inputs alone can be learned from for longer.

    Returns:
        What members are watched on, and whether probes are strange to them.
    """
    probes = merger.probes(inputs.shape[1:])
    told["watched_on"] = f"{len(inputs)} inputs"
    if probes is None:
        return inputs, False
    check_fit(layout.program, inputs)
    if strange(merger, members, layout, probes.detach()).any():
        return inputs, True
    if len(inputs) >= ENOUGH:
        return inputs, False
    told["watched_on"] += f" and {len(probes)} learned probes"
    return torch.cat([inputs, probes.to(inputs)]), False
