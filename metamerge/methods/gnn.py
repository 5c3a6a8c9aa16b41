"""GNN: a trained graph network reads all members and emits one set of weights.

No paper: the network is this package's own, see ``metamerge.mergers.gnn``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from metamerge.calibration import Batches
from metamerge.mergers import GNNMerger
from metamerge.methods._learned import merge_learned
from metamerge.registry import merge_method
from metamerge.structure import Layout
from metamerge.weights import Weights


@merge_method(neutral={"adapt": False})
def gnn(
    weights: Sequence[Weights],
    *,
    layout: Layout,
    merger: nn.Module | None = None,
    batches: Batches | None = None,
    refine: int | None = None,
    adapt: bool = True,
    generator: torch.Generator | None = None,
    report: dict[str, Any] | None = None,
) -> Weights:
    """Merge with a trained graph network.

    Without ``batches`` members are watched on the merger's learned probes (on imagined ones, where
    it has none of their inputs' shape). Where these are strange to them, inputs are made from the
    members, and of members that agree on nearly all of those one is kept as it is. Inputs take the
    place of the probes, or join them where they are fewer, if that has proved to be of use; where
    probes are strange and members cast the same votes on the inputs, one learns the soft vote of
    all. With labels the fused network is adapted to them as well, as far as that helps in
    cross-validation.

    Args:
        weights: One state dict per member, of one architecture. A single one comes back as it is.
        layout: That architecture.
        merger: A trained ``GNNMerger``; by default the one that comes with the package.
        batches: Calibration inputs, or pairs of inputs and labels.
        refine: Steps of distillation from the fused start; None for as many as proved best when
            the merger was trained, 0 for none.
        adapt: Whether the network is fine-tuned to labels, where there are any, as far as that
            helps in cross-validation; if not, they are not looked at.
        generator: Source of randomness of the adaptation.
        report: Takes what members were ``watched_on``, the number of the one that was ``kept`` as
            it is or ``started_from``, if any, and what was chosen by labels.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If the merger is something else, or the batches are of no use.
        IncompatibleWeights: If the network's inputs are of unknown shape and there are no batches.
    """
    return merge_learned(
        weights,
        layout,
        merger,
        kind=GNNMerger,
        batches=batches,
        refine=refine,
        adapted=adapt,
        generator=generator,
        report=report,
    )
