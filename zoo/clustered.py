"""Train runs of one network side by side, with one gradient for every cluster of a run's rows.

Every run has rows, an init, clusters and an order of rows of its own. A step takes the same share
of every cluster, so that an epoch meets each row once, whatever the clusters' sizes; their mean
gradients are combined by a rule of ``zoo.combination``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metamerge.errors import ConfigError, ZooError
from metamerge.structure import Execution, Program, run
from metamerge.weights import Weights
from zoo.adam import AdamW
from zoo.combination import Rule, combine

RowLoss = Callable[[Tensor, Tensor], Tensor]
"""Outputs ``[r, b, c]`` and targets ``[r, b]`` or ``[r, b, c]`` -> a loss per row ``[r, b]``."""


def row_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each row, ``[r, b, c]`` and ``[r, b]`` -> ``[r, b]``."""
    return F.cross_entropy(logits.movedim(-1, 1), targets, reduction="none")


def row_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of each row, mean over outputs, ``[r, b, o]`` twice -> ``[r, b]``."""
    return (outputs - targets).square().mean(-1)


@dataclass(frozen=True, eq=False)
class Runs:
    """Data of ``r`` independent runs.

    Attributes:
        inputs: ``[r, rows, ...]``: every run standardises the rows in its own way.
        targets: ``[r, rows]`` or ``[r, rows, outputs]``.
        clusters: Per run, the rows of each of its ``k`` clusters; any of them may be empty.
        validation: Rows that a run is judged on after every epoch, ``[r, v]``.
        seeds: Seed of the order in which each run meets its rows, and of what it drops.
    """

    inputs: Tensor
    targets: Tensor
    clusters: Sequence[Sequence[Tensor]]
    validation: Tensor
    seeds: Sequence[int]


class Clustered(NamedTuple):
    """Runs after their training.

    Attributes:
        weights: Those of the epoch with the smallest loss on validation rows, ``[r, ...]``.
        epoch: That epoch, 0 before the first, ``[r]``.
        validation: Mean loss on validation rows before training and after every epoch,
            ``[r, epochs + 1]``; not finite where a run has diverged.
        agreement: Squared norm of the clusters' mean gradient over the mean of their squared norms,
            in the first step of every epoch, ``[r, epochs]``: 1 where all are equal, 1 / k where
            they are orthogonal and of one length, 0 where they cancel.
    """

    weights: Weights
    epoch: Tensor
    validation: Tensor
    agreement: Tensor


class Batches:
    """The order of rows in every epoch: shuffled clusters, cut into as many steps as the largest.

    Args:
        runs: Whose rows.
        batch_size: Rows of a step, over all clusters.
    """

    def __init__(self, runs: Runs, batch_size: int) -> None:
        sizes = torch.tensor([[len(own) for own in clusters] for clusters in runs.clusters])
        if (sizes.sum(1) == 0).any():
            raise ZooError("train_clustered: a run has no rows in any cluster, expected some.")
        self.steps = -(-int(sizes.sum(1).max()) // batch_size)
        self.table = torch.zeros(*sizes.shape, int(sizes.max()), dtype=torch.int64)  # [r, k, m]
        for r, clusters in enumerate(runs.clusters):
            for k, own in enumerate(clusters):
                self.table[r, k, : len(own)] = own
        self.there = torch.arange(self.table.shape[-1]) < sizes.unsqueeze(-1)
        cuts = sizes.unsqueeze(-1) * torch.arange(self.steps + 1) // self.steps  # [r, k, s + 1]
        self.starts, self.counts = cuts[..., :-1], cuts.diff(dim=-1)
        self.rows = runs.inputs.shape[1]
        self.generators = [torch.Generator().manual_seed(seed) for seed in runs.seeds]

    def epoch(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The steps of the next epoch.

        Returns:
            Per step: rows ``[r, k, b]``, the weight of each in its cluster's mean ``[r, k, b]``, 0
            where a place is empty, and random numbers for what is dropped, ``[r, k]``.
        """
        clusters = self.table.shape[1]
        # One number per row of the task: how rows are shuffled does not depend on the clusters.
        draws = [torch.rand(self.rows, generator=own) for own in self.generators]
        drops = [torch.rand(self.steps, clusters, generator=own) for own in self.generators]
        keys = torch.stack(draws).unsqueeze(1).expand(-1, clusters, -1).gather(2, self.table)
        order = keys.masked_fill(~self.there, 2.0).argsort(-1)
        shuffled = self.table.gather(2, order)  # [r, k, m]
        width = int(self.counts.max())
        place = (self.starts.unsqueeze(-1) + torch.arange(width)).clamp(max=order.shape[-1] - 1)
        rows = shuffled.unsqueeze(2).expand(-1, -1, self.steps, -1).gather(3, place)
        counts = self.counts.unsqueeze(-1)
        weights = (torch.arange(width) < counts) / counts.clamp_min(1)  # [r, k, s, b]
        return list(
            zip(rows.unbind(2), weights.unbind(2), torch.stack(drops).unbind(1), strict=True)
        )


@torch.no_grad()
def train_clustered(
    program: Program,
    weights: Weights,
    runs: Runs,
    *,
    rule: Rule,
    lr: float,
    epochs: int,
    batch_size: int = 32,
    loss: RowLoss = row_squared_error,
    curriculum: float = 0.0,
) -> Clustered:
    """Train all runs at once at a constant learning rate.

    Args:
        program: The network: linear layers, and whatever has no parameters.
        weights: Stacked state dicts ``[r, ...]``, not modified.
        runs: Their data.
        rule: How the clusters' gradients are combined, and who makes the step.
        lr: Learning rate.
        epochs: Passes over the rows.
        batch_size: Rows of a step, over all clusters.
        loss: Loss of every row.
        curriculum: Share of the epochs over which clusters are admitted one after the other, in
            their order; 0 trains on all of them from the start.

    Returns:
        The runs.

    Raises:
        ConfigError: If the network has other parameters than those of linear layers.
        ZooError: If a run has no rows.
    """
    _check_linear(program, weights)
    state = {key: tensor.detach().clone() for key, tensor in weights.items()}
    optimizer = AdamW(state, torch.zeros(len(runs.inputs))) if rule.adam else None
    rates = torch.full((len(runs.inputs),), lr, dtype=torch.float64)
    batches = Batches(runs, batch_size)
    own = torch.arange(len(runs.inputs)).unsqueeze(1)
    held_back = runs.inputs[own, runs.validation], runs.targets[own, runs.validation]
    best = Best(state, _mean_loss(program, state, *held_back, loss))
    agreement = []
    for epoch in range(epochs):
        admitted = _admitted(runs, curriculum * epochs, epoch)
        for step, (rows, within, draws) in enumerate(batches.epoch()):
            gradients = cluster_gradients(program, state, runs, rows, within, loss)  # [r, k, p]
            counts = (within > 0).sum(-1)
            shares = counts / counts.sum(-1, keepdim=True).clamp_min(1)
            if step == 0:
                squares = gradients.square().sum(-1).mean(-1).clamp_min(1e-30)
                agreement.append(gradients.mean(1).square().sum(-1) / squares)
            direction = _named(combine(gradients, shares, rule, draws, admitted), state)
            if optimizer:
                optimizer.step(direction, rates)
            else:
                for key, tensor in state.items():
                    tensor.sub_(direction[key], alpha=lr)
        best.consider(state, _mean_loss(program, state, *held_back, loss))
    return Clustered(
        best.weights, best.epoch, torch.stack(best.losses, 1), torch.stack(agreement, 1)
    )


def cluster_gradients(
    program: Program, weights: Weights, runs: Runs, rows: Tensor, within: Tensor, loss: RowLoss
) -> Tensor:
    """Gradient of each cluster's mean loss, for all runs.

    The rows of all clusters pass through the network together, and back as far as the
    pre-activations; only the last product, of these with a layer's inputs, is one per cluster. That
    is two to three times as fast as a copy of the weights for each of them.

    Args:
        program: The network, all of whose parameters are those of linear layers.
        weights: Stacked state dicts ``[r, ...]``.
        runs: The data.
        rows: Rows of each cluster ``[r, k, b]``.
        within: Weight of each in the mean of its cluster ``[r, k, b]``.
        loss: Loss of every row.

    Returns:
        ``[r, k, p]``, in the order of ``weights``.
    """
    count, clusters, width = rows.shape
    own = torch.arange(count).unsqueeze(1)
    flat = rows.flatten(1)
    inputs, targets = runs.inputs[own, flat], runs.targets[own, flat]
    execution = Execution(program, weights, [inputs], stacked=True, own_inputs=True)
    layers, befores, afters = [], [], []
    with torch.enable_grad():
        for node in program.nodes:
            before = execution.argument(node, 0).value if _is_linear(node) else None
            lane = execution.step(node)
            if before is not None:
                layers.append(node)
                befores.append(before.detach())
                afters.append(lane.value.requires_grad_() if lane.value.is_leaf else lane.value)
        total = (loss(execution.output(), targets) * within.flatten(1)).sum()
        deltas = torch.autograd.grad(total, afters)
    found: Weights = {}
    for node, before, delta in zip(layers, befores, deltas, strict=True):
        deep, wide = (t.reshape(count * clusters, width, t.shape[-1]) for t in (delta, before))
        found[program.parameters[node.args[1].name]] = deep.mT @ wide
        if len(node.args) > 2 and node.args[2] is not None:
            found[program.parameters[node.args[2].name]] = deep.sum(1)
    return torch.cat([found[key].reshape(count, clusters, -1) for key in weights], -1)


class Best:
    """The weights of every run in its best epoch so far.

    Args:
        weights: Before training, ``[r, ...]``.
        losses: On validation rows, ``[r]``.
    """

    def __init__(self, weights: Weights, losses: Tensor) -> None:
        self.weights = {key: tensor.clone() for key, tensor in weights.items()}
        self.smallest, self.epoch = losses.clone(), torch.zeros(len(losses), dtype=torch.int64)
        self.losses = [losses]

    def consider(self, weights: Weights, losses: Tensor) -> None:
        """Keep the weights of those runs that are better than ever; NaN never is."""
        better = losses < self.smallest
        self.smallest[better] = losses[better]
        self.epoch[better] = len(self.losses)
        for key, tensor in self.weights.items():
            tensor[better] = weights[key][better]
        self.losses.append(losses)


def _mean_loss(
    program: Program, weights: Weights, inputs: Tensor, targets: Tensor, loss: RowLoss
) -> Tensor:
    outputs = run(program, weights, [inputs], stacked=True, own_inputs=True)
    return loss(outputs, targets).mean(1)


def _admitted(runs: Runs, over: float, epoch: int) -> Tensor | None:
    """Clusters that have been admitted, bool ``[r, k]``; None once all are."""
    count = len(runs.clusters[0])
    known = count if over <= 0 else 1 + int(count * epoch / over)
    if known >= count:
        return None
    return (torch.arange(count) < known).expand(len(runs.clusters), count)


def _named(direction: Tensor, like: Weights) -> Weights:
    """Cut ``[r, p]`` into tensors ``[r, ...]``."""
    pieces = direction.split([tensor[0].numel() for tensor in like.values()], dim=1)
    return {
        key: piece.reshape(tensor.shape)
        for (key, tensor), piece in zip(like.items(), pieces, strict=True)
    }


def _is_linear(node: object) -> bool:
    return node.op == "linear.default"


def _check_linear(program: Program, weights: Weights) -> None:
    """Refuse networks with parameters that ``cluster_gradients`` would not see."""
    linear = {
        program.parameters.get(argument.name)
        for node in program.nodes
        if _is_linear(node)
        for argument in node.args[1:]
        if argument is not None
    }
    others = sorted(set(weights) - linear)
    if others or program.tied:
        raise ConfigError(
            f"train_clustered: {', '.join(others or sorted(program.tied))} is no weight of one "
            "linear layer. Gradients of clusters are taken through linear layers only: train an "
            "'mlp'."
        )
