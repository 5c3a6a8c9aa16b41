"""Messages along weights: every edge carries its sender's state times the weight itself.

A message is linear in the weight (``w_ij * A h_j``), so it means the same for any width and needs
no embedding per edge: related networks that learn from weights (Zhou et al., "Permutation
Equivariant Neural Functionals", arXiv:2302.14040; Kofinas et al., "Graph Neural Networks for
Learning Equivariant Representations of Neural Networks", arXiv:2403.12143) hold a vector per edge.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Received = dict[str, tuple[Tensor, Tensor]]


class Edge(NamedTuple):
    """The edges of a layer.

    Attributes:
        sources: Spaces of its inputs, one after another.
        targets: Spaces of its outputs, one after another.
        matrix: Weights between the units of these spaces, ``[f, m, rows, columns]``.
        size: What a weight is measured by, the root of their mean square, ``[f, 1, 1, 1]``.
    """

    sources: Sequence[str]
    targets: Sequence[str]
    matrix: Tensor
    size: Tensor


class LinearMessage(nn.Module):
    """Sum over incoming edges of ``w_ij * A h_j``, with a dense path for fully connected layers.

    Args:
        width: Size of the node states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor) -> Tensor:
        """The sparse path: one PyG graph, any mixture of architectures.

        Args:
            x: Node states ``[nodes, width]``.
            edge_index: Sender and receiver of every edge, ``[2, edges]``.
            edge_weight: Weight of every edge, ``[edges]``.

        Returns:
            ``[nodes, width]``.
        """
        from torch_geometric.nn import SimpleConv  # a second or two, which dense merges do without

        return SimpleConv(aggr="sum")(self.lin(x), edge_index, edge_weight)

    def dense(self, x: Tensor, matrix: Tensor, *, shared: bool = False) -> Tensor:
        """The dense path: all edges of a layer as one batched product.

        Args:
            x: States of the senders ``[f, m, columns, width]``; ``[f, 1, columns, width]`` where
                all members share them.
            matrix: Weights ``[f, m, rows, columns]``.
            shared: Whether all members share the receivers, who take the mean.

        Returns:
            ``[f, m, rows, width]``, or ``[f, 1, rows, width]`` with ``shared``.
        """
        x, (members, rows) = self.lin(x), matrix.shape[1:3]
        if shared and x.shape[1] == members:  # the sum over members is part of the product
            flat = matrix.mT.flatten(1, 2).mT @ (x / members).flatten(1, 2)
            return flat[:, None]
        if x.shape[1] < members:
            return (matrix.flatten(1, 2) @ x[:, 0]).unflatten(1, (members, rows))
        return matrix @ x


class MessageRound(nn.Module):
    """One round on the weight graph: along the weights, back along them, pool over members, update.

    Args:
        width: Size of the node states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.along = LinearMessage(width)
        self.back = LinearMessage(width)
        self.update = nn.Sequential(nn.Linear(5 * width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(
        self,
        states: dict[str, Tensor],
        edges: Sequence[Edge],
        *,
        sparse: bool = False,
    ) -> dict[str, Tensor]:
        """Update all node states.

        Args:
            states: Space -> ``[f, m, n, width]``, or ``[f, 1, n, width]`` for units that all
                members share, as they do their inputs.
            edges: Those of every layer.
            sparse: Whether to build one PyG graph instead of one product per layer.

        Returns:
            New states, same shapes.
        """
        received = self._sparse(states, edges) if sparse else self._dense(states, edges)
        first, *rest = self.update
        parts = first.weight.chunk(5, 1)  # of what a unit is told: no copy puts it side by side
        updated = {}
        for space, state in states.items():
            pooled = state.mean(1, keepdim=True), state.amax(1, keepdim=True)
            told = zip((state, *received[space], *pooled), parts, strict=True)
            change = sum((F.linear(value, part) for value, part in told), first.bias)
            for layer in rest:
                change = layer(change)
            updated[space] = state + change
        return updated

    def _dense(self, states: dict[str, Tensor], edges: Sequence[Edge]) -> Received:
        along, back = {}, {}
        for sources, targets, matrix, size in edges:
            rows, columns = matrix.shape[-2:]
            given, asked = _joined(states, sources), _joined(states, targets)
            said = self.along.dense(given / (size * columns**0.5), matrix)
            _add(along, targets, said, states)
            shared = all(states[space].shape[1] < matrix.shape[1] for space in sources)
            said = self.back.dense(asked / (size * rows**0.5), matrix.mT, shared=shared)
            _add(back, sources, said, states)
        return {
            space: tuple(
                sums[space] if space in sums else torch.zeros_like(state) for sums in (along, back)
            )
            for space, state in states.items()
        }

    def _sparse(self, states: dict[str, Tensor], edges: Sequence[Edge]) -> Received:
        places, total = {}, 0  # number of every node in the one graph
        for space, state in states.items():
            count = state.shape[:3].numel()
            own = torch.arange(total, total + count, device=state.device)
            places[space], total = own.view(state.shape[:3]), total + count
        members = max(state.shape[1] for state in states.values())
        share = {  # of every message that counts: shared units take the mean over members
            space: state.new_full(state.shape[:3], state.shape[1] / members)
            for space, state in states.items()
        }
        senders, receivers, forward, backward = [], [], [], []
        for sources, targets, matrix, size in edges:
            rows, columns = matrix.shape[-2:]
            to = _joined(places, targets)[..., :, None].expand(matrix.shape)
            come = _joined(places, sources)[..., None, :].expand(matrix.shape)
            shares = _joined(share, targets)[..., :, None], _joined(share, sources)[..., None, :]
            receivers.append(to.flatten())
            senders.append(come.flatten())
            forward.append((matrix / (size * columns**0.5) * shares[0]).flatten())
            backward.append((matrix / (size * rows**0.5) * shares[1]).flatten())
        x = torch.cat([state.flatten(0, 2) for state in states.values()])
        if edges:
            edge_index = torch.stack([torch.cat(senders), torch.cat(receivers)])
            along = self.along(x, edge_index, torch.cat(forward))
            back = self.back(x, edge_index.flip(0), torch.cat(backward))
        else:
            along = back = torch.zeros_like(x)
        return {space: (along[own], back[own]) for space, own in places.items()}


def _joined(values: dict[str, Tensor], spaces: Sequence[str]) -> Tensor:
    """Values of the units of several spaces, one space after the other, ``[f, m, n, ...]``."""
    parts = [values[space] for space in spaces]
    if len(parts) == 1:
        return parts[0]
    members = max(part.shape[1] for part in parts)
    return torch.cat([part.expand(-1, members, *part.shape[2:]) for part in parts], 2)


def _add(
    sums: dict[str, Tensor], spaces: Sequence[str], values: Tensor, states: dict[str, Tensor]
) -> None:
    """Add values of the units of several spaces to their sums; shared units take the mean."""
    parts = values.split([states[space].shape[2] for space in spaces], 2)
    for space, part in zip(spaces, parts, strict=True):
        own = part.mean(1, keepdim=True) if states[space].shape[1] < part.shape[1] else part
        sums[space] = sums[space] + own if space in sums else own
