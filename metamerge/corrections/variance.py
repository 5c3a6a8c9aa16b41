"""How much the units of a network vary, layer by layer: what averaging takes away.

Paper: Jordan, Sedghi, Saukh, Entezari, Neyshabur, "REPAIR: REnormalizing Permuted Activations for
Interpolation Repair", ICLR 2023, arXiv:2211.08403, section 3: in averages of networks the variance
of pre-activations collapses, the more the deeper.
"""

import torch
from torch import Tensor

from metamerge.corrections.refit import MAX_ROWS, sampled, unit_rows
from metamerge.structure import Execution, Layout
from metamerge.weights import Weights

_ENTRIES = 2**21  # numbers of the widest value that is made at a time


@torch.no_grad()
def unit_variances(networks: Weights, layout: Layout, inputs: Tensor) -> dict[str, Tensor]:
    """Variance of pre-activations over inputs and positions, the mean over the units of a layer.

    Args:
        networks: ``[n, ...]``.
        layout: Layers of their architecture.
        inputs: ``[b, ...]``, at least two.

    Returns:
        Key of the layer's weight -> ``[n]``, in the order of the network.

    Raises:
        StructureError: If the network has layers that cannot be followed.
    """
    size = max(1, _ENTRIES // (layout.program.widest * len(inputs)))
    parts = []
    for start in range(0, len(next(iter(networks.values()))), size):
        own = {key: tensor[start : start + size] for key, tensor in networks.items()}
        execution, found = Execution(layout.program, own, [inputs], stacked=True), {}
        for node in layout.program.nodes:
            lane, layer = execution.step(node), layout.by_node.get(node.name)
            if layer is not None:
                rows = sampled(unit_rows(lane.value, layer), MAX_ROWS)  # [n, r, o]
                centred = rows - rows.mean(1, keepdim=True)  # torch.var takes many times as long
                found[layer.weight] = centred.square().mean(2).sum(1) / (rows.shape[1] - 1)
        parts.append(found)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def variance_ratio(
    fused: Weights, members: Weights, layout: Layout, inputs: Tensor
) -> dict[str, Tensor]:
    """Variance of fused pre-activations over the mean of the members'; 1 is healthy.

    Args:
        fused: Fused weights, ``[f, ...]``.
        members: Their members, ``[f, m, ...]``, aligned or not: units count alike.
        layout: Layers of the architecture.
        inputs: ``[b, ...]``, at least two.

    Returns:
        Key of the layer's weight -> ``[f]``, in the order of the network.

    Raises:
        StructureError: If the network has layers that cannot be followed.
    """
    shape = next(iter(members.values())).shape[:2]
    flat = {key: tensor.flatten(0, 1) for key, tensor in members.items()}
    theirs = unit_variances(flat, layout, inputs)
    own = unit_variances(fused, layout, inputs)
    return {key: own[key] / theirs[key].unflatten(0, shape).mean(1).clamp_min(1e-12) for key in own}
