"""GNN: a trained graph network reads all members and emits one set of weights.

No paper: the network is this package's own, see ``metamerge.mergers.gnn``.
"""

from collections.abc import Sequence

from torch import nn

from metamerge.calibration import Batches, collect
from metamerge.errors import ConfigError
from metamerge.methods._combination import combine, restore
from metamerge.registry import merge_method
from metamerge.structure import Layout
from metamerge.weights import Weights, stack, widened


@merge_method()
def gnn(
    weights: Sequence[Weights],
    *,
    layout: Layout,
    merger: nn.Module,
    batches: Batches | None = None,
) -> Weights:
    """Merge with a trained graph network.

    Args:
        weights: One state dict per member, of one architecture. A single one comes back as it is.
        layout: That architecture.
        merger: A trained ``GNNMerger``.
        batches: Calibration inputs that replace the merger's learned probes; labels are not used.

    Returns:
        New state dict with the members' names, shapes and dtypes.

    Raises:
        ConfigError: If the merger is something else, or the batches are of no use.
        IncompatibleWeights: If the network's inputs are not those that the merger was trained for.
    """
    from metamerge.mergers.gnn import GNNMerger  # imports torch-geometric

    if not isinstance(merger, GNNMerger):
        raise ConfigError(
            f"gnn: merger is a {type(merger).__name__}, expected a GNNMerger. Train one with "
            f"`accelerate launch trainers/merger.py` and pass merger=<folder>."
        )
    inputs = None if batches is None else collect(batches, labelled=False)[0]
    if len(weights) == 1:
        return combine(weights, [1.0])
    members = {key: tensor[None] for key, tensor in stack(widened(weights)).items()}  # [1, m, ...]
    fused = merger(members, layout, inputs=inputs)
    return restore({key: tensor[0] for key, tensor in fused.items()}, weights)
