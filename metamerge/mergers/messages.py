"""Messages along weights: every edge carries its sender's state times the weight itself.

A message is linear in the weight (``w_ij * A h_j``), so it means the same for any width and needs
no embedding per edge: related networks that learn from weights (Zhou et al., "Permutation
Equivariant Neural Functionals", arXiv:2302.14040; Kofinas et al., "Graph Neural Networks for
Learning Equivariant Representations of Neural Networks", arXiv:2403.12143) hold a vector per edge.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

Edges = Sequence[tuple[Sequence[str], Sequence[str], Tensor]]
Received = dict[str, tuple[Tensor, Tensor]]


class LinearMessage(MessagePassing):
    """Sum over incoming edges of ``w_ij * A h_j``, with a dense path for fully connected layers.

    Args:
        width: Size of the node states.
    """

    def __init__(self, width: int) -> None:
        super().__init__(aggr="add")
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
        return self.propagate(edge_index, x=self.lin(x), edge_weight=edge_weight)

    def message(self, x_j: Tensor, edge_weight: Tensor) -> Tensor:
        """Sender's state times the weight of the edge."""
        return edge_weight[:, None] * x_j

    def dense(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The dense path: all edges of a layer as one batched product.

        Args:
            x: States of the senders ``[..., columns, width]``.
            matrix: Weights ``[..., rows, columns]``.

        Returns:
            ``[..., rows, width]``.
        """
        return matrix @ self.lin(x)


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
        edges: Edges,
        *,
        sparse: bool = False,
    ) -> dict[str, Tensor]:
        """Update all node states.

        Args:
            states: Space -> ``[f, m, n, width]``, or ``[f, 1, n, width]`` for units that all
                members share, as they do their inputs.
            edges: Per layer: source spaces, target spaces, scaled weights ``[f, m, rows, columns]``
                between the units of these spaces, one space after the other.
            sparse: Whether to build one PyG graph instead of one product per layer.

        Returns:
            New states, same shapes.
        """
        received = self._sparse(states, edges) if sparse else self._dense(states, edges)
        updated = {}
        for space, state in states.items():
            pooled = torch.cat([state.mean(1, keepdim=True), state.amax(1, keepdim=True)], -1)
            pooled = pooled.expand(-1, state.shape[1], -1, -1)
            told = torch.cat([state, *received[space], pooled], -1)
            updated[space] = state + self.update(told)
        return updated

    def _dense(self, states: dict[str, Tensor], edges: Edges) -> Received:
        along = {space: torch.zeros_like(state) for space, state in states.items()}
        back = dict(along)
        for sources, targets, matrix in edges:
            rows, columns = matrix.shape[-2:]
            given = (_joined(states, sources), _joined(states, targets))
            _add(along, targets, self.along.dense(given[0], matrix / columns**0.5))
            _add(back, sources, self.back.dense(given[1], matrix.mT / rows**0.5))
        return {space: (along[space], back[space]) for space in states}

    def _sparse(self, states: dict[str, Tensor], edges: Edges) -> Received:
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
        for sources, targets, matrix in edges:
            rows, columns = matrix.shape[-2:]
            to = _joined(places, targets)[..., :, None].expand(matrix.shape)
            come = _joined(places, sources)[..., None, :].expand(matrix.shape)
            shares = _joined(share, targets)[..., :, None], _joined(share, sources)[..., None, :]
            receivers.append(to.flatten())
            senders.append(come.flatten())
            forward.append((matrix / columns**0.5 * shares[0]).flatten())
            backward.append((matrix / rows**0.5 * shares[1]).flatten())
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


def _add(sums: dict[str, Tensor], spaces: Sequence[str], values: Tensor) -> None:
    """Add values of the units of several spaces to their sums; shared units take the mean."""
    parts = values.split([sums[space].shape[2] for space in spaces], 2)
    for space, part in zip(spaces, parts, strict=True):
        shared = sums[space].shape[1] < part.shape[1]
        sums[space] = sums[space] + (part.mean(1, keepdim=True) if shared else part)
