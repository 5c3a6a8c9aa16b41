"""A chunk of networks in training: every step is one step of each network that is still at work."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from metamerge.structure import Execution, Program
from metamerge.weights import Weights
from zoo.adam import AdamW, Moments

Transform = Callable[[Tensor, Tensor, Tensor, int | None], tuple[Tensor, Tensor]]
"""Inputs ``[a, b, ...]``, targets ``[a, b]``, the networks they are for ``[a]`` and the step, which
is None outside training -> what those networks see instead."""

_JUDGED = 512  # rows held back that are run at a time


@dataclass(frozen=True)
class Job:
    """What all chunks of one training share; see ``zoo.training.train_networks``."""

    program: Program
    inputs: Tensor
    targets: Tensor
    rows: Sequence[Tensor]
    lengths: Tensor  # rows per network, [n]
    steps: Tensor  # [n]
    epochs: int  # of the networks that have most
    batch_size: int
    rate: Tensor  # at the start, [n]
    last_rate: Tensor  # at the end, [n]
    decay: Tensor  # [n]
    seeds: Sequence[int]
    loss: Callable[[Tensor, Tensor], Tensor]
    frozen: frozenset[str]
    held_back: Sequence[Tensor] | None
    patience: int
    snapshots: int
    transform: Transform | None
    precision: torch.dtype | None
    moments: Moments | None


class Trained(NamedTuple):
    """Networks after their training, and how it went.

    Attributes:
        weights: State dicts ``[n, ...]``.
        steps: Steps that led to these weights, int64 ``[n]``.
        losses: Mean training loss in every epoch, ``[n, epochs]``; NaN where a network made no
            step: after its last, and between steps that are longer than its epochs.
        held_back: Loss on the rows held back, after every such epoch, ``[n, epochs]``.
        snapshots: Weights on the way, ``[n, s, ...]``: the first at the start, the others at equal
            distances before the end; empty if none were asked for.
        moments: What the optimizer remembers at the end; None if it was given none at the start.
    """

    weights: Weights
    steps: Tensor
    losses: Tensor
    held_back: Tensor
    snapshots: Weights
    moments: Moments | None


class Chunk:
    """Networks that are trained side by side, ``a`` of them as long as none has stopped early.

    Args:
        job: What is trained.
        weights: Start of all networks of the job, ``[n, ...]``; not modified.
        networks: Which of them belong to this chunk, by falling number of steps.
        result: Of the whole job; the rows of these networks are filled in.
    """

    def __init__(self, job: Job, weights: Weights, networks: Tensor, result: Trained) -> None:
        self.job, self.networks, self.result = job, networks, result
        self.device = job.inputs.device
        turned = _linear_keys(job.program)
        self.weights = {
            key: _laid_out(t.detach()[networks].to(self.device), key in turned)
            for key, t in weights.items()
        }
        self.steps, self.lengths, self.rate, self.last_rate = (
            values[networks] for values in (job.steps, job.lengths, job.rate, job.last_rate)
        )
        self.orders = _orders(job, networks).to(self.device)  # [a, steps * b]
        self.uses = _counters(job.program, self.weights)
        moments = job.moments and job.moments.only(networks)
        self.optimizer = AdamW(self._trained(), job.decay[networks], moments)
        self.best = torch.full((len(networks),), torch.inf)  # smallest loss on rows held back
        self.stale = torch.zeros(len(networks), dtype=torch.long)  # epochs since then
        self.kept = self.steps.clone()  # step that gave the weights to keep
        self.kept_weights = {k: t.clone() for k, t in self.weights.items() if job.patience}
        self.losses = torch.zeros(len(networks), job.epochs, device=self.device)  # sums, per epoch
        self.counts = torch.zeros(len(networks), job.epochs)  # of their terms

    def _trained(self) -> Weights:
        keys = dict.fromkeys(self.job.program.parameters.values())
        fixed = {key for pair in _statistics(self.job.program) for key in pair} | self.job.frozen
        return {
            key: self.weights[key]
            for key in keys
            if key not in fixed and self.weights[key].is_floating_point()
        }

    def train(self) -> None:
        """Train all networks of the chunk to their end."""
        for step in range(int(self.steps.max())):
            active = int((self.steps > step).sum())  # by falling steps: those at work come first
            if not active:
                break
            self._take_snapshots(step, active)
            losses = self._step(step, active)
            epoch = self._epoch(step)[:active]
            self.losses[:active].scatter_add_(1, epoch[:, None].to(self.device), losses[:, None])
            self.counts[:active].scatter_add_(1, epoch[:, None], torch.ones(active, 1))
            if self.job.held_back is not None:
                ended = (self._epoch(step + 1)[:active] > epoch) | (self.steps[:active] == step + 1)
                self._judge(ended.nonzero().flatten(), step, epoch)
        self._write(torch.arange(len(self.networks)))

    def _epoch(self, step: int) -> Tensor:
        """Epoch that each network is in at a step, ``[a]``."""
        return (step * self.job.batch_size // self.lengths).clamp(max=self.job.epochs - 1)

    def _step(self, step: int, active: int) -> Tensor:
        """One step of the first networks; their losses ``[active]``."""
        job = self.job
        rows = self.orders[:active, step * job.batch_size : (step + 1) * job.batch_size]
        live = {key: tensor[:active] for key, tensor in self.weights.items()}
        leaves = {k: t[:active].requires_grad_() for k, t in self._detached().items()}
        inputs, targets = self._batch(rows, self.networks[:active], step)
        with torch.enable_grad():
            outputs, statistics = self._forward({**live, **leaves}, inputs, training=True)
            losses = job.loss(outputs, targets)
            grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
        left = 1 - step / self.steps[:active].double()
        first, last = self.rate[:active], self.last_rate[:active]
        rates = last + (first - last) * left
        self.optimizer.step(dict(zip(leaves, grads, strict=True)), rates)
        for key, value in statistics.items():
            live[key].copy_(value)
        for key, uses in self.uses.items():
            live[key].add_(uses)
        return losses.detach().float()

    def _detached(self) -> Weights:
        return {key: tensor.detach() for key, tensor in self.optimizer.weights.items()}

    def _batch(self, rows: Tensor, networks: Tensor, step: int | None) -> tuple[Tensor, Tensor]:
        job, own = self.job, rows.to(self.device)
        if job.targets.ndim < 3:
            targets = job.targets[own]
        else:
            targets = job.targets[networks.to(self.device)[:, None], own]
        inputs = job.inputs.index_select(0, own.flatten()).unflatten(0, own.shape)
        return (
            job.transform(inputs, targets, networks, step) if job.transform else (inputs, targets)
        )

    def _forward(
        self, weights: Weights, inputs: Tensor, *, training: bool
    ) -> tuple[Tensor, Weights]:
        """Outputs ``[a, b, c]`` and new running statistics."""
        job, kind = self.job, self.device.type
        lower = torch.autocast(kind, job.precision) if job.precision else nullcontext()
        execution = Execution(
            job.program, weights, [inputs], stacked=True, own_inputs=True, training=training
        )
        with lower:
            outputs = execution.run_all()
        return outputs.float() if job.precision else outputs, execution.statistics

    @torch.no_grad()
    def _judge(self, ended: Tensor, step: int, epoch: Tensor) -> None:
        """Judge networks at the end of an epoch; those without progress stop."""
        if not len(ended):
            return
        found = torch.empty(len(ended))
        sizes = torch.tensor([len(self.job.held_back[i]) for i in self.networks[ended]])
        for size in sizes.unique().tolist():
            found[sizes == size] = self._held_back_loss(ended[sizes == size]).cpu().float()
        self.result.held_back[self.networks[ended], epoch[ended]] = found
        if not self.job.patience:
            return
        better = ended[(found < self.best[ended]) | self.best[ended].isinf()]
        self.best[ended] = torch.minimum(self.best[ended], found)
        self.stale[ended] += 1
        self.stale[better] = 0
        self.kept[better] = step + 1
        for key, tensor in self.kept_weights.items():
            tensor[better] = self.weights[key][better]
        stopped = self.stale >= self.job.patience
        if stopped.any():
            self._write(stopped.nonzero().flatten())
            self._go_on(~stopped)

    def _held_back_loss(self, chosen: Tensor) -> Tensor:
        """Mean loss of networks that hold equally many rows back, ``[chosen]``."""
        rows = torch.stack([self.job.held_back[i] for i in self.networks[chosen]])
        weights = {key: tensor[chosen.to(self.device)] for key, tensor in self.weights.items()}
        total = torch.zeros(len(chosen), device=self.device)
        for block in rows.split(_JUDGED, dim=1):
            inputs, targets = self._batch(block, self.networks[chosen], None)
            outputs, _ = self._forward(weights, inputs, training=False)
            total += self.job.loss(outputs, targets) * block.shape[1]
        return total / rows.shape[1]

    def _go_on(self, kept: Tensor) -> None:
        """Drop all networks but the kept ones, which stay in their order."""
        own = kept.nonzero().flatten()
        there = own.to(self.device)
        self.optimizer.keep(there)
        for tensors in (self.weights, self.kept_weights):
            tensors.update({key: tensor[there] for key, tensor in tensors.items()})
        self.weights.update(self.optimizer.weights)
        self.orders, self.losses = self.orders[there], self.losses[there]
        names = ("networks", "steps", "lengths", "rate", "last_rate")
        for name in (*names, "best", "stale", "kept", "counts"):
            setattr(self, name, getattr(self, name)[own])

    def _take_snapshots(self, step: int, active: int) -> None:
        if not self.job.snapshots:
            return
        network, place = (self._cuts(self.steps[:active]) == step).nonzero(as_tuple=True)
        if len(network):
            for key, room in self.result.snapshots.items():
                room[self.networks[network], place] = self.weights[key][network].to(room.device)

    def _write(self, done: Tensor) -> None:
        """Put the outcome of networks that are done into the result."""
        numbers, final = self.networks[done], self.kept_weights or self.weights
        for key, room in self.result.weights.items():
            room[numbers] = final[key][done.to(self.device)].to(room.device)
        self.result.steps[numbers] = self.kept[done]
        # An epoch without a step, after the last one, is 0 / 0: NaN.
        self.result.losses[numbers] = self.losses[done.to(self.device)].cpu() / self.counts[done]
        if self.job.snapshots:
            self._end_snapshots(done, final)
        if self.result.moments:
            self._write_moments(done)

    def _write_moments(self, done: Tensor) -> None:
        numbers, found = self.networks[done], self.result.moments
        for rooms, kept in (
            (found.first, self.optimizer.first),
            (found.second, self.optimizer.second),
        ):
            for key, tensor in kept.items():
                rooms[key][numbers] = tensor[done.to(self.device)].to(rooms[key].device)
        found.steps[numbers] = self.optimizer.steps[done]

    def _end_snapshots(self, done: Tensor, final: Weights) -> None:
        """Networks that stopped early stay as they are for the rest of their snapshots."""
        missed = self._cuts(self.steps[done]) >= self.kept[done][:, None]
        network, place = missed.nonzero(as_tuple=True)
        chosen = done[network]
        for key, room in self.result.snapshots.items():
            room[self.networks[chosen], place] = final[key][chosen.to(self.device)].to(room.device)

    def _cuts(self, steps: Tensor) -> Tensor:
        """Steps before which snapshots are taken, ``[a, snapshots]``."""
        return steps[:, None] * torch.arange(self.job.snapshots) // self.job.snapshots


def _statistics(program: Program) -> list[tuple[str, str]]:
    """Keys of running mean and variance, once per use of a batch normalisation."""
    return [
        (program.parameters[node.args[3].name], program.parameters[node.args[4].name])
        for node in program.nodes
        if node.op == "batch_norm.default" and node.args[3] is not None
    ]


def _counters(program: Program, weights: Weights) -> dict[str, int]:
    """Counters of batch normalisations -> by how much a step raises them."""
    means = [mean for mean, _ in _statistics(program)]
    counters = [mean.removesuffix("running_mean") + "num_batches_tracked" for mean in means]
    return {key: counters.count(key) for key in counters if key in weights}


def _linear_keys(program: Program) -> set[str]:
    """Keys of the weights of linear layers."""
    return {
        program.parameters[node.args[1].name]
        for node in program.nodes
        if node.op == "linear.default" and node.args[1].name in program.parameters
    }


def _laid_out(weight: Tensor, turned: bool) -> Tensor:
    """Weights in the memory layout of their gradients: those of linear layers lie transposed."""
    return weight.mT.contiguous().mT if turned else weight.contiguous()


def _orders(job: Job, networks: Tensor) -> Tensor:
    """Rows in the order in which each network meets them, ``[a, steps * b]``."""
    orders = torch.zeros(len(networks), int(job.steps[networks].max()) * job.batch_size).long()
    for i, network in enumerate(networks.tolist()):
        length = int(job.steps[network]) * job.batch_size
        orders[i, :length] = shuffled(job.rows[network], length, job.seeds[network])
    return orders


def shuffled(rows: Tensor, length: int, seed: int) -> Tensor:
    """Rows as a network meets them: all of them in a random order, then all in another.

    Args:
        rows: Row numbers.
        length: How many it meets.
        seed: Of the order.

    Returns:
        Row numbers ``[length]``.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(ceil(length / len(rows)), len(rows), generator=generator).argsort(1)
    return rows[order].flatten()[:length]
