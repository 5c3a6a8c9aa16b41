"""Messages along weights: every edge carries its sender's state times the weight itself.

A message is linear in the weight (``w_ij * A h_j``), so it means the same for any width and needs
no embedding per edge: related networks that learn from weights (Zhou et al., "Permutation
Equivariant Neural Functionals", arXiv:2302.14040; Kofinas et al., "Graph Neural Networks for
Learning Equivariant Representations of Neural Networks", arXiv:2403.12143) hold a vector per edge.
"""

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing


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
        edges: list[tuple[str, str, Tensor]],
        *,
        sparse: bool = False,
    ) -> dict[str, Tensor]:
        """Update all node states.

        Args:
            states: Space -> ``[f, m, n, width]``.
            edges: Per layer: source space, target space, scaled weights ``[f, m, rows, columns]``.
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

    def _dense(
        self, states: dict[str, Tensor], edges: list[tuple[str, str, Tensor]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        along = {space: torch.zeros_like(state) for space, state in states.items()}
        back = dict(along)
        for source, target, matrix in edges:
            rows, columns = matrix.shape[-2:]
            along[target] = along[target] + self.along.dense(states[source], matrix / columns**0.5)
            back[source] = back[source] + self.back.dense(states[target], matrix.mT / rows**0.5)
        return {space: (along[space], back[space]) for space in states}

    def _sparse(
        self, states: dict[str, Tensor], edges: list[tuple[str, str, Tensor]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        flat = {space: state.flatten(0, 2) for space, state in states.items()}
        starts, total = {}, 0
        for space, nodes in flat.items():
            starts[space], total = total, total + len(nodes)
        senders, receivers, forward, backward = [], [], [], []
        for source, target, matrix in edges:
            rows, columns = matrix.shape[-2:]
            network, row, column = (
                torch.arange(size, device=matrix.device)
                for size in (matrix.shape[0] * matrix.shape[1], rows, columns)
            )
            to = starts[target] + network[:, None, None] * rows + row[:, None]
            come = starts[source] + network[:, None, None] * columns + column
            receivers.append(to.expand(-1, -1, columns).flatten())
            senders.append(come.expand(-1, rows, -1).flatten())
            forward.append((matrix / columns**0.5).flatten())
            backward.append((matrix / rows**0.5).flatten())
        edge_index = torch.stack([torch.cat(senders), torch.cat(receivers)])
        x = torch.cat(list(flat.values()))
        along = self.along(x, edge_index, torch.cat(forward))
        back = self.back(x, edge_index.flip(0), torch.cat(backward))
        received = {}
        for space, state in states.items():
            own = slice(starts[space], starts[space] + len(flat[space]))
            received[space] = (along[own].view_as(state), back[own].view_as(state))
        return received
